//! Two at once: workers that race, and readers that look while a commit happens.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use change::Op;
use redis_counters::Bounds;
use testkit::services::Redis;
use worker::{Sink, SinkError, Stored};

use crate::rig::{Mail, Rig, hash, mail, text};

const TINY: Bounds =
    Bounds { script_groups: 2, script_bytes: 1 << 20, held_groups: 10_000, held_bytes: 1 << 20 };

#[test]
fn of_two_racing_workers_exactly_one_wins() {
    for (bounds, rounds) in [(Bounds::default(), 30), (TINY, 30)] {
        let redis = Redis::start();
        let mut rigs =
            [Rig::with(&redis, &["bytes", "all"], bounds), Rig::with(&redis, &["bytes", "all"], bounds)];
        for round in 1..=rounds {
            let start = Barrier::new(2);
            let outcomes = thread::scope(|scope| {
                let start = &start;
                let race = move |rig: &mut Rig| {
                    (0..20).for_each(|n| rig.insert(&mail(round * 100 + n, n, 1)));
                    start.wait();
                    rig.commit()
                };
                let [first, second] = &mut rigs;
                let other = scope.spawn(move || race(second));
                [race(first), other.join().unwrap()]
            });
            let won = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
            assert_eq!(won, 1, "round {round}: {outcomes:?}");
            for (rig, outcome) in rigs.iter_mut().zip(&outcomes) {
                if let Err(error) = outcome {
                    assert!(matches!(error, SinkError::Moved(_)), "{error}");
                }
                assert!(rig.load().unwrap().iter().all(|stored| matches!(stored, Stored::At(_))));
                rig.offset = rig.at[0].next_offset;
            }
            assert_eq!(text(&redis, "all"), Some((round * 20).to_string()));
            assert!(hash(&redis, "bytes").values().all(|value| *value == round.to_string()));
        }
    }
}

#[test]
fn a_reader_never_sees_half_a_transaction() {
    for bounds in [Bounds::default(), TINY] {
        let redis = Redis::start();
        let mut rig = Rig::with(&redis, &["unread", "bytes", "all"], bounds);
        let mut mails: Vec<Mail> = (0..40).map(|id| mail(id, id % 8, 10)).collect();
        mails.iter().for_each(|mail| rig.insert(mail));
        rig.commit().unwrap();
        let done = AtomicBool::new(false);
        let seen = thread::scope(|scope| {
            let reader = scope.spawn(|| watch(&redis, &done));
            for round in 0..300 {
                // Every transaction moves mails between users: no total changes.
                for place in 0..10 {
                    let place = (round * 7 + place * 3) % mails.len();
                    let old = mails[place].clone();
                    mails[place].owner = old.owner.map(|owner| (owner + 1) % 8);
                    rig.change(Op::Update, Some(&old), Some(&mails[place])).unwrap();
                }
                rig.commit().unwrap();
            }
            done.store(true, Ordering::Relaxed);
            reader.join().unwrap()
        });
        assert!(seen > 50, "the reader looked {seen} times only");
        assert!(rig.sink.check().is_ok());
    }
}

/// Sums what the application sees, again and again; gives the number of different checkpoints seen.
fn watch(redis: &Redis, done: &AtomicBool) -> usize {
    let mut connection = redis.connect();
    let mut checkpoints = std::collections::BTreeSet::new();
    while !done.load(Ordering::Relaxed) {
        let (unread, bytes, first, second): (Vec<i64>, Vec<i64>, String, String) = redis::pipe()
            .atomic()
            .cmd("HVALS")
            .arg("unread")
            .cmd("HVALS")
            .arg("bytes")
            .cmd("HGET")
            .arg("millrace:p:unread")
            .arg("lsn")
            .cmd("HGET")
            .arg("millrace:p:bytes")
            .arg("lsn")
            .query(&mut connection)
            .unwrap();
        assert_eq!((unread.iter().sum::<i64>(), bytes.iter().sum::<i64>()), (40, 400));
        assert_eq!(first, second, "counters of one commit show it at once");
        checkpoints.insert(first);
    }
    checkpoints.len()
}
