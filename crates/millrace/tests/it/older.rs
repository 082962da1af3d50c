//! This version goes on where an older one was killed: in its log, its ledger, its counters and its index. `scripts/older`
//! brings the older binary.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rand::Rng;
use rand::rngs::StdRng;
use redis::Commands;

use crate::harness::{Pipeline, ROLES, Role, THIS_BUILD, soon};
use crate::mailbox::{Traffic, answer};

const TABLES: &str = "
    CREATE TYPE mood AS ENUM ('fine', 'so so', 'bad');
    CREATE TABLE items (id bigint PRIMARY KEY, amount numeric(10,2), code char(4), mood mood, note text);
    ALTER TABLE items REPLICA IDENTITY FULL;
    CREATE TABLE events (id bigint, day date, kind text, PRIMARY KEY (id, day)) PARTITION BY RANGE (day);
    CREATE TABLE events_1 PARTITION OF events FOR VALUES FROM ('2026-01-01') TO ('2026-02-01');
    CREATE TABLE events_2 PARTITION OF events FOR VALUES FROM ('2026-02-01') TO ('2026-03-01');
    ALTER TABLE events REPLICA IDENTITY FULL;
    ALTER TABLE events_1 REPLICA IDENTITY FULL;
    ALTER TABLE events_2 REPLICA IDENTITY FULL;
    CREATE TABLE plain (id bigint PRIMARY KEY, note text);
    CREATE SEQUENCE ids;
    INSERT INTO events VALUES (0, '2026-01-01', 'first');";

const COUNTERS: [(&str, &str); 5] = [
    ("amounts", "SELECT amount, count(*) FROM public.items GROUP BY amount"),
    ("codes", "SELECT code, sum(id) FROM public.items GROUP BY code"),
    (
        "moods",
        "SELECT code, amount, count(mood) FROM public.items WHERE mood IS NOT NULL GROUP BY code, amount",
    ),
    ("kinds", "SELECT kind, day, count(*) FROM public.events GROUP BY kind, day"),
    ("all", "SELECT count(*) FROM public.items"),
];

/// Rows that a snapshot takes long enough over to be caught in the middle of.
const MANY: u64 = 80_000;
/// Record batches of the log by which a snapshot has begun.
const BEGUN: usize = 4;

#[test]
#[ignore = "needs a binary of an older version; scripts/older runs it"]
fn an_older_version_that_was_killed_under_traffic_is_continued() {
    let mut pipeline = older(1_000);
    let traffic = traffic(&pipeline, 1);
    pipeline.succeed(&["wait", "--timeout", "60s"]);
    soon("some traffic", || traffic.committed.load(Ordering::Relaxed) > 300);
    goes_on(&mut pipeline, traffic);
}

#[test]
#[ignore = "needs a binary of an older version; scripts/older runs it"]
fn an_older_version_that_was_killed_in_a_snapshot_is_continued() {
    let mut pipeline = older(MANY);
    let traffic = traffic(&pipeline, 2);
    soon("the snapshot has begun", || pipeline.kafka.batches("millrace.mailbox.1") >= BEGUN);
    pipeline.kill(Role::Reader);
    let log = pipeline.log("reader");
    assert!(!log.contains("the snapshot is complete"), "it was too fast: {log}");
    goes_on(&mut pipeline, traffic);
}

/// Servers with so many items, on which the older version runs.
fn older(items: u64) -> Pipeline {
    let program = std::env::var_os("MILLRACE_OLD").map(PathBuf::from);
    let program = program.expect("MILLRACE_OLD is the path of an older binary; scripts/older sets it");
    let mut pipeline = Pipeline::new();
    pipeline.postgres.sql("app", TABLES);
    pipeline.postgres.sql(
        "app",
        &format!(
            "INSERT INTO items SELECT g, g % 700 / 100.0, 'c' || g % 9, 'fine', 'words ' || g || repeat(' more', 20)
             FROM generate_series(1, {items}) g; SELECT setval('ids', {items})"
        ),
    );
    let counters: String =
        COUNTERS.iter().map(|(name, sql)| format!("[counters.{name}]\nsql = \"{sql}\"\n")).collect();
    let stores = format!(
        "[redis]\nurl = \"{}\"\n{counters}[search]\ndirectory = \"{}\"\nlisten = \"{}\"\n\
         [search.indexes.items]\ntable = \"public.items\"\ntext = [\"note\"]\nexact = [\"code\", \"mood\", \"amount\"]\n",
        pipeline.redis.url(),
        pipeline.search_directory().display(),
        pipeline.search_url().trim_start_matches("http://"),
    );
    pipeline.configure_tables("\"public.items\", \"public.events\", \"public.plain\"", &stores);
    pipeline.run_program(program);
    pipeline.succeed(&["setup"]);
    ROLES.into_iter().for_each(|role| pipeline.spawn(role));
    pipeline
}

/// Transactions in all the tables, with rows of every kind that moves.
fn traffic(pipeline: &Pipeline, seed: u64) -> Traffic {
    let transaction = |rng: &mut StdRng| {
        let (cents, code, id) =
            (rng.random_range(0..900), rng.random_range(0..12), rng.random_range(1..1_500));
        let (mood, month) = (["fine", "so so", "bad"][rng.random_range(0..3)], rng.random_range(1..3));
        let (amount, kind) = (format!("{cents} / 100.0"), ["first", "a:b"][rng.random_range(0..2)]);
        format!(
            "BEGIN;
             INSERT INTO items VALUES (nextval('ids'), {amount}, 'c{code}', nullif('{mood}', 'bad')::mood, 'some words');
             UPDATE items SET amount = {amount}, mood = '{mood}', code = 'c{code}' WHERE id = {id};
             DELETE FROM items WHERE id = {id} + 1;
             INSERT INTO events VALUES (nextval('ids'), '2026-0{month}-01', '{kind}');
             UPDATE events SET day = '2026-0{month}-02' WHERE id = currval('ids') - 7;
             INSERT INTO plain VALUES (nextval('ids'), 'note');
             COMMIT; SELECT pg_sleep(0.01)"
        )
    };
    Traffic::of(&pipeline.postgres, seed, 2, transaction, |_, _| ())
}

/// Kills the older version and has this one go on. No counter that was there goes meanwhile.
fn goes_on(pipeline: &mut Pipeline, traffic: Traffic) {
    ROLES.into_iter().for_each(|role| pipeline.kill(role));
    let ended = Arc::new(AtomicBool::new(false));
    let sampler = {
        let (ended, mut redis) = (ended.clone(), pipeline.redis.connect());
        let mut shown: Vec<&str> = COUNTERS.map(|(name, _)| name).into();
        shown.retain(|name| redis.exists(name).expect("Redis answers"));
        eprintln!("shown: {shown:?}");
        thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                for name in &shown {
                    assert!(redis.exists::<_, bool>(name).expect("Redis answers"), "{name} is gone");
                }
            }
        })
    };
    pipeline.run_program(THIS_BUILD);
    ROLES.into_iter().for_each(|role| pipeline.spawn(role));
    pipeline.succeed(&["wait", "--timeout", "180s"]);
    thread::sleep(Duration::from_secs(2));
    traffic.stop();
    soon("every store has its final form", || {
        pipeline.assert_alive();
        COUNTERS.iter().all(|(name, sql)| pipeline.counter(name) == answer(&pipeline.postgres, sql))
    });
    pipeline.succeed(&["wait", "--timeout", "60s"]);
    pipeline.succeed(&["verify"]);
    pipeline.assert_alive();
    ended.store(true, Ordering::Relaxed);
    sampler.join().expect("no counter was gone");
}
