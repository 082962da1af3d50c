//! Measures how long Redis is held by a counter of many groups, by its own SLOWLOG.
//!
//! `MILLIONS` (20) says how many groups; `COUNTER` (`unread`) which of the rig's counters, `bytes` being the widest.

use std::time::Instant;

use redis_counters::{Bounds, Counters, CountersSink, Namespace, Server};
use testkit::services::Redis;
use worker::Sink;

use crate::rig::{Rig, definitions, mail, run};

/// Groups that one round of a snapshot brings.
const ROUND: i64 = 300_000;

#[test]
#[ignore = "a measurement"]
fn how_long_a_large_counter_holds_redis() {
    let setting = |name: &str, default: &str| std::env::var(name).unwrap_or_else(|_| default.to_owned());
    let groups = setting("MILLIONS", "20").parse::<i64>().unwrap() * 1_000_000;
    let name = &*setting("COUNTER", "unread");
    let redis = Redis::start_with(&[("slowlog-log-slower-than", "5000"), ("slowlog-max-len", "100000")]);
    let server = Server::new(redis.url());
    let space = || Namespace::new("", "p");
    let shown = CountersSink::new(&server, space(), Bounds::default(), definitions(&[name]));
    let copies = CountersSink::of_copies(&server, space(), Bounds::default(), definitions(&[name]));
    let (mut shown, mut copy) = (Rig::over(shown.unwrap()), Rig::over(copies.unwrap()));
    shown.load().unwrap();
    shown.sink.rebuild(0, true).unwrap();
    copy.load().unwrap();
    fill(&redis, &format!("millrace:p:{name}:copy"), name, groups);
    copy.load().unwrap();

    for round in 0..3 {
        timed(&redis, "a round of a fill", || {
            let first = groups + round * ROUND;
            (first..first + ROUND).for_each(|user| copy.insert(&mail(user, user, 1)));
            copy.commit().unwrap();
        });
    }
    timed(&redis, "the swap", || {
        shown.sink.copies().unwrap();
        assert!(shown.sink.swap(0).unwrap());
        shown.load().unwrap();
    });
    shown.offset = shown.at[0].next_offset;
    for changes in [100, 1_000, 8_000] {
        timed(&redis, &format!("10 transactions of {changes} groups"), || {
            for _ in 0..10 {
                (0..changes).for_each(|n| shown.insert(&mail(n, n * 7_919 % groups, 1)));
                shown.commit().unwrap();
            }
        });
    }
    timed(&redis, "a transaction of 3,000,000 groups", || {
        (0..3_000_000).for_each(|n| shown.insert(&mail(n, n * 7 % groups, 1)));
        shown.commit().unwrap();
    });
    timed(&redis, "a reading of all", || {
        let mut counters = Counters::new(&server, space()).unwrap();
        let mut next = None;
        loop {
            next = counters.part(name, next.as_deref()).unwrap().next;
            if next.is_none() {
                break;
            }
        }
    });
}

/// Fills a copy by hand, which is quicker than by the sink.
fn fill(redis: &Redis, copy: &str, name: &str, groups: i64) {
    const PIECE: i64 = 2_000;
    const SCRIPT: &str = "for _, key in ipairs(KEYS) do local list = {}
        for group = ARGV[1], ARGV[2] do list[#list + 1] = group list[#list + 1] = '1' end
        redis.call('HSET', key, unpack(list)) end";
    let (script, mut connection) = (redis::Script::new(SCRIPT), redis.connect());
    for first in (0..groups).step_by(PIECE as usize) {
        let mut call = script.key(format!("{copy}:value"));
        if name == "bytes" {
            call.key(format!("{copy}:rows")).key(format!("{copy}:nonnull"));
        }
        call.arg(first).arg(first + PIECE - 1).invoke::<()>(&mut connection).unwrap();
    }
    run(redis, &format!("HSET {copy} groups {groups}"));
    run(redis, "SLOWLOG RESET");
}

/// Runs something, and prints how long it took and what Redis calls slow.
fn timed(redis: &Redis, what: &str, run_it: impl FnOnce()) {
    type Entry = (i64, i64, i64, Vec<String>, String, String);
    let begun = Instant::now();
    run_it();
    let took = begun.elapsed();
    let entries: Vec<Entry> = redis::cmd("SLOWLOG").arg("GET").arg(-1).query(&mut redis.connect()).unwrap();
    let longest = entries.iter().max_by_key(|entry| entry.2);
    let longest = longest.map_or("below 5 ms".to_owned(), |entry| {
        format!("{:.1} ms ({})", entry.2 as f64 / 1000.0, entry.3[0])
    });
    let above = |ms: i64| entries.iter().filter(|entry| entry.2 > ms * 1000).count();
    println!(
        "{what}: {took:.2?}; longest command {longest}, {} above 30 ms, {} above 50 ms",
        above(30),
        above(50)
    );
    run(redis, "SLOWLOG RESET");
}
