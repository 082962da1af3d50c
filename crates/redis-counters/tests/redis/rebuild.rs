//! A copy takes a counter's place: whole, never behind what readers saw, and leaves nothing.

use change::Lsn;
use redis_counters::{Bounds, Counters, CountersSink, Namespace, Server};
use testkit::services::Redis;
use worker::{Checkpoint, Sink, Stored};

use crate::rig::{NAMES, Rig, definitions, everything, hash, mail, map, text};

/// The builder's side of a rig: copies that were asked for, emptied.
fn copies(redis: &Redis, names: &[&str]) -> Rig {
    let mut server = Server::new(redis.url());
    server.response_timeout = std::time::Duration::from_secs(5);
    let space = Namespace::new("", "p");
    let sink = CountersSink::of_copies(&server, space, Bounds::default(), definitions(names)).unwrap();
    let mut rig = Rig::over(sink);
    rig.load().unwrap();
    rig
}

fn filled(redis: &Redis, names: &[&str]) -> Rig {
    let mut rig = Rig::start(redis, names);
    rig.insert(&mail(1, 7, 5));
    rig.commit().unwrap();
    rig
}

#[test]
fn h42_a_copy_takes_the_place_only_where_readers_do_not_go_back() {
    let redis = Redis::start();
    let mut rig = filled(&redis, &NAMES);
    for place in 0..NAMES.len() {
        assert!(rig.sink.rebuild(place, true).unwrap());
    }
    assert!(rig.sink.copies().unwrap().iter().all(|copy| matches!(copy, Some(Stored::Damaged(_)))));
    let mut copy = copies(&redis, &NAMES);
    copy.insert(&mail(1, 8, 5));
    rig.insert(&mail(2, 7, 1));
    rig.commit().unwrap();
    copy.commit().unwrap();
    let shown = hash(&redis, "bytes");
    // One record behind; then as far, but with an older LSN.
    rig.sink.copies().unwrap();
    assert!(!rig.sink.swap(2).unwrap(), "it is behind");
    copy.insert(&mail(2, 8, 2));
    copy.commit().unwrap();
    let mut ahead = rig.moves();
    ahead.iter_mut().flatten().for_each(|step| step.to.lsn = Lsn(1 << 40));
    rig.sink.commit(&ahead).unwrap();
    rig.sink.copies().unwrap();
    assert!(!rig.sink.swap(2).unwrap(), "its LSN is older");
    assert_eq!(hash(&redis, "bytes"), shown);
    let mut ahead = copy.moves();
    ahead.iter_mut().flatten().for_each(|step| step.to.lsn = Lsn((1 << 40) + 1));
    copy.sink.commit(&ahead).unwrap();
    assert!(rig.sink.swap(2).is_err(), "not what was looked at last");
    rig.sink.copies().unwrap();
    for (place, name) in NAMES.iter().enumerate() {
        assert!(rig.sink.swap(place).unwrap(), "{name}");
    }
    assert_eq!(hash(&redis, "bytes"), map(&[("8", "7")]));
    assert_eq!(text(&redis, "all").as_deref(), Some("2"));
    let left = everything(&redis).into_keys().filter(|key| key.contains(":copy")).collect::<Vec<_>>();
    assert_eq!(left, [""; 0]);
    // Hidden counts came with it: a group vanishes when it should.
    rig.load().unwrap();
    rig.offset = rig.at[0].next_offset;
    rig.delete(&mail(1, 8, 5));
    rig.delete(&mail(2, 8, 2));
    let mut moves = rig.moves();
    moves.iter_mut().flatten().for_each(|step| step.to.lsn = Lsn((1 << 40) + 2));
    rig.sink.commit(&moves).unwrap();
    assert!(hash(&redis, "bytes").is_empty() && hash(&redis, "millrace:p:bytes:rows").is_empty());
}

#[test]
fn h42_an_empty_copy_is_swapped_in_and_an_empty_counter_swapped_out() {
    let redis = Redis::start();
    let mut rig = filled(&redis, &["bytes"]);
    for mails in [0, 3, 0] {
        rig.sink.rebuild(0, true).unwrap();
        let mut copy = copies(&redis, &["bytes"]);
        copy.offset = rig.at[0].next_offset + 1;
        for id in 0..mails {
            copy.insert(&mail(id, 1, 1));
        }
        copy.commit().unwrap();
        rig.sink.copies().unwrap();
        assert!(rig.sink.swap(0).unwrap());
        assert!(matches!(rig.load().unwrap()[..], [Stored::At(_)]), "whole");
        assert_eq!(hash(&redis, "bytes").len(), usize::from(mails > 0));
        rig.sink.check().unwrap();
    }
}

#[test]
fn h42_between_two_logs_the_lsn_decides() {
    let redis = Redis::start();
    let mut rig = filled(&redis, &["unread"]);
    rig.sink.rebuild(0, true).unwrap();
    let mut copy = copies(&redis, &["unread"]);
    let other = |lsn| Checkpoint { log: "log-2".into(), lsn: Lsn(lsn), ready: true, ..copy.beginning(0) };
    let (older, newer) = (other(1), other(1 << 33));
    copy.sink.reset(0, &older).unwrap();
    rig.sink.copies().unwrap();
    assert!(!rig.sink.swap(0).unwrap());
    copy.sink.load().unwrap();
    copy.sink.reset(0, &newer).unwrap();
    rig.sink.copies().unwrap();
    assert!(rig.sink.swap(0).unwrap());
    assert_eq!(hash(&redis, "millrace:p:unread")["log"], "log-2");
}

#[test]
fn h43_a_request_is_recorded_once_and_a_copy_that_was_begun_stays() {
    let redis = Redis::start();
    let mut rig = filled(&redis, &["unread", "all"]);
    let mut counters = Counters::new(&Server::new(redis.url()), Namespace::new("", "p")).unwrap();
    assert_eq!(counters.copies(&["unread"]).unwrap(), [None]);
    assert!(counters.rebuild("unread").unwrap());
    assert!(!counters.rebuild("unread").unwrap());
    assert_eq!(counters.copies(&["unread", "all"]).unwrap(), [Some(None), None]);
    assert!(rig.sink.copies().unwrap()[1].is_none());
    rig.sink.check().unwrap();
    let mut copy = copies(&redis, &["unread"]);
    copy.insert(&mail(1, 7, 1));
    copy.commit().unwrap();
    let at = copy.at[0].clone();
    assert!(!counters.rebuild("unread").unwrap());
    rig.sink.rebuild(0, true).unwrap();
    assert_eq!(counters.copies(&["unread"]).unwrap(), [Some(Some(at.clone()))]);
    assert_eq!(rig.sink.copies().unwrap()[0], Some(Stored::At(at)));
    // What is wrong is not shown, and what was begun stays.
    rig.sink.rebuild(0, false).unwrap();
    assert!(hash(&redis, "unread").is_empty());
    assert!(matches!(rig.sink.load().unwrap()[..], [Stored::Empty, Stored::At(_)]));
    assert_eq!(counters.drop_counters(&["unread", "all"]).unwrap(), 2);
    assert!(everything(&redis).is_empty());
}
