//! Redis dies, hangs, forgets and runs full.

use std::time::Duration;

use redis_counters::{Bounds, CountersSink, Namespace, Server};
use testkit::services::{Redis, wait_until};
use worker::{Sink, SinkError, Stored};

use crate::rig::{Rig, definitions, everything, hash, mail, map, run, text};

const AWAY: Duration = Duration::from_secs(20);

#[test]
fn kill_9_between_commits_loses_nothing() {
    let mut redis = Redis::start_with(&[("appendfsync", "always")]);
    let mut rig = Rig::start(&redis, &["bytes", "all"]);
    for round in 0..5 {
        rig.insert(&mail(round, 1, 10));
        rig.commit().unwrap();
        redis.kill();
        rig.insert(&mail(round + 100, 1, 1));
        assert!(matches!(rig.commit(), Err(SinkError::Unavailable(_))));
        assert!(matches!(rig.load(), Err(SinkError::Unavailable(_))));
        redis.restart();
        // The worker reads the checkpoint and finds the change that was not written.
        let left = rig.at.clone();
        let found = rig.load().unwrap();
        assert_eq!(found, left.into_iter().map(Stored::At).collect::<Vec<_>>());
        rig.insert(&mail(round + 100, 1, 1));
        rig.commit().unwrap();
    }
    assert_eq!((text(&redis, "all"), hash(&redis, "bytes")), (Some("10".into()), map(&[("1", "55")])));
}

#[test]
fn an_answer_that_does_not_come_is_found_out_by_loading() {
    let redis = Redis::start();
    let mut server = Server::new(redis.url());
    server.response_timeout = Duration::from_millis(300);
    let space = Namespace::new("", "p");
    let sink = CountersSink::new(&server, space, Bounds::default(), definitions(&["unread", "all"])).unwrap();
    let mut rig = Rig::over(sink);
    rig.load().unwrap();
    // So that Redis knows the script.
    rig.commit().unwrap();
    // Without groups to read, the one script is the commit itself; it runs when Redis goes on.
    rig.offset += 1;
    redis.pause();
    assert!(matches!(rig.commit(), Err(SinkError::Unavailable(_))));
    redis.resume();
    let late = rig.offset;
    wait_until("the late script", AWAY, || {
        (hash(&redis, "millrace:p:all")["offset"] == late.to_string()).then_some(())
    });
    // The worker's idea of the checkpoint is old: the commit finds that out too.
    assert!(matches!(rig.commit(), Err(SinkError::Moved(_))));
    let found = rig.load().unwrap();
    assert!(matches!(&found[0], Stored::At(checkpoint) if checkpoint.next_offset == late), "{found:?}");
}

#[test]
fn a_late_reset_does_not_empty_what_was_filled_since() {
    let redis = Redis::start();
    let mut slow =
        Rig::over(crate::rig::sink(&redis.url(), Namespace::new("", "p"), Bounds::default(), &["unread"]));
    slow.sink.load().unwrap();
    let mut quick = Rig::start(&redis, &["unread"]);
    quick.insert(&mail(1, 1, 1));
    quick.commit().unwrap();
    let beginning = slow.beginning(0);
    assert!(matches!(slow.sink.reset(0, &beginning), Err(SinkError::Moved(_))));
    assert_eq!(hash(&redis, "unread"), map(&[("1", "1")]));
}

#[test]
fn an_old_dump_is_continued_from_its_own_checkpoint() {
    let mut redis = Redis::start();
    let mut rig = Rig::start(&redis, &["bytes", "all"]);
    rig.insert(&mail(1, 1, 1));
    rig.commit().unwrap();
    let old = rig.at.clone();
    let directory = std::env::temp_dir().join(format!("millrace-dump-{}", redis.port()));
    redis.dump_to(&directory);
    rig.insert(&mail(2, 1, 1));
    rig.commit().unwrap();
    redis.restore_from(&directory);
    std::fs::remove_dir_all(&directory).unwrap();

    rig.insert(&mail(3, 1, 1));
    assert!(matches!(rig.commit(), Err(SinkError::Unavailable(_) | SinkError::Moved(_))));
    assert!(matches!(rig.sink.check(), Err(SinkError::Moved(_))));
    assert_eq!(rig.load().unwrap(), old.into_iter().map(Stored::At).collect::<Vec<_>>());
    rig.insert(&mail(2, 1, 1));
    rig.insert(&mail(3, 1, 1));
    rig.commit().unwrap();
    assert_eq!((text(&redis, "all"), hash(&redis, "bytes")), (Some("3".into()), map(&[("1", "3")])));
}

#[test]
fn a_full_redis_writes_nothing_and_recovers() {
    let redis = Redis::start();
    let mut rig = Rig::start(&redis, &["bytes", "all"]);
    rig.insert(&mail(1, 1, 1));
    rig.commit().unwrap();
    let before = everything(&redis);
    run(&redis, "CONFIG SET maxmemory 1");
    rig.insert(&mail(2, 1, 1));
    let error = rig.commit().unwrap_err();
    assert!(matches!(error, SinkError::Unavailable(_)), "{error}");
    assert_eq!(everything(&redis), before);
    run(&redis, "CONFIG SET maxmemory 0");
    rig.load().unwrap();
    rig.insert(&mail(2, 1, 1));
    rig.commit().unwrap();
    assert_eq!(text(&redis, "all"), Some("2".into()));
}
