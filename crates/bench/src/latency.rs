//! How long after its commit a row is visible: in Kafka (read_committed), in Redis, to a search.
//!
//! Rows come one in a transaction at a steady rate, and every place only ever counts more of them: what is seen at a
//! count of n is the nth commit.

use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use rdkafka::consumer::BaseConsumer;
use serde_json::Value;
use testkit::services::Postgres;

use crate::Options;
use crate::backlog::DATABASE;
use crate::program::Build;
use crate::rounds::{Column, Figures};
use crate::sides::{self, Side};
use crate::stack::Stack;

/// Connections that write.
const WRITERS: u32 = 4;
/// A row that is not visible after so long never will be.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often a store is asked.
const REDIS_LOOK: Duration = Duration::from_millis(1);
const SEARCH_LOOK: Duration = Duration::from_millis(20);
/// What comes before is not measured: a new JVM compiles the broker meanwhile.
const WARM_UP: Duration = Duration::from_secs(120);

/// What is measured of each place: from commit to visible.
pub(crate) const COLUMNS: [Column; 3] = [("p50 ms", 1), ("p99 ms", 1), ("max ms", 1)];

pub(crate) fn run(options: &Options, build: Build<'_>) -> Result<Vec<Figures>> {
    let sides = options.sides();
    let stack = Stack::start(build, "steady", &sides, |_, _| Ok(()))?;
    let rows = options.rows;
    eprintln!("{rows} transactions, {} a second", options.rate);
    let consumer = sides::consumer(&stack.kafka, "millrace.steady.1")?;
    let url = format!("http://127.0.0.1:{}/indexes/emails/documents?limit=0", stack.search);
    thread::scope(|scope| {
        let in_kafka = scope.spawn(|| watch(rows, Duration::ZERO, records(&consumer)));
        let mut seen = vec![("Kafka", in_kafka)];
        if sides.contains(&Side::Counters) {
            let mut connection = stack.redis.connect();
            let count = move || {
                Ok(redis::cmd("GET").arg("total").query::<Option<u64>>(&mut connection)?.unwrap_or(0))
            };
            seen.push(("Redis", scope.spawn(move || watch(rows, REDIS_LOOK, count))));
        }
        if sides.contains(&Side::Search) {
            let count = || {
                let page: Value = ureq::get(&url).call()?.body_mut().read_json()?;
                page["total"].as_u64().context("the page has a total")
            };
            seen.push(("search", scope.spawn(move || watch(rows, SEARCH_LOOK, count))));
        }
        let commits = write(&stack.postgres, rows, options.rate);
        let latencies = seen.into_iter().map(|(place, watched)| {
            let sights = watched.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            let values = sights.and_then(|sights| latency(&commits, &sights)).context(place)?;
            Ok(Figures { build: build.name(), subject: place, values })
        });
        latencies.collect()
    })
}

/// Writes rows at a steady rate; gives when each commit had returned, µs since the epoch. The server does it by itself:
/// clients that write would take a good part of the machine.
fn write(postgres: &Postgres, rows: u64, rate: u32) -> Vec<i64> {
    postgres.sql(DATABASE, "CREATE UNLOGGED TABLE commits (at bigint)");
    thread::scope(|scope| {
        for first in 1..=u64::from(WRITERS) {
            let session = postgres.session(DATABASE);
            scope.spawn(move || {
                session.sql(&format!(
                    "DO $$ DECLARE
                         id bigint := {first};
                         began timestamptz := clock_timestamp();
                         early float8;
                         times bigint[] := '{{}}';
                     BEGIN
                         WHILE id <= {rows} LOOP
                             early := id / {rate}.0 - extract(epoch FROM clock_timestamp() - began);
                             IF early > 0 THEN PERFORM pg_sleep(early); END IF;
                             INSERT INTO emails VALUES (id, id % 10000, 'inbox', 'me@example.org', 'subject ' || id,
                                 repeat('some words ', 30), false, now());
                             COMMIT;
                             times := times || (extract(epoch FROM clock_timestamp()) * 1000000)::bigint;
                             id := id + {WRITERS};
                         END LOOP;
                         INSERT INTO commits SELECT unnest(times);
                     END $$"
                ));
            });
        }
    });
    let commits = postgres.session(DATABASE).sql("SELECT at FROM commits ORDER BY at");
    commits.iter().map(|row| row[0].as_deref().and_then(|at| at.parse().ok()).expect("a number")).collect()
}

/// Counts the records of rows as they come.
fn records(consumer: &BaseConsumer) -> impl FnMut() -> Result<u64> {
    let mut rows = 0;
    move || {
        if let Some(Ok(message)) = consumer.poll(Duration::from_millis(100)) {
            rows += u64::from(sides::is_row(&message)?);
        }
        Ok(rows)
    }
}

/// Asks for a count until it is `rows`; gives when it was first seen to be how high.
fn watch(rows: u64, look: Duration, mut count: impl FnMut() -> Result<u64>) -> Result<Vec<(i64, u64)>> {
    let mut sights: Vec<(i64, u64)> = Vec::new();
    let mut moved = Instant::now();
    loop {
        let now = count()?;
        if now > sights.last().map_or(0, |last| last.1) {
            moved = Instant::now();
            sights.push((now_us()?, now));
        }
        if now >= rows {
            return Ok(sights);
        }
        ensure!(moved.elapsed() < PATIENCE, "{now} rows are visible of {rows}, and no more come");
        thread::sleep(look);
    }
}

/// Figures of one place, in the order of [`COLUMNS`].
fn latency(commits: &[i64], sights: &[(i64, u64)]) -> Result<Vec<f64>> {
    let from = *commits.first().context("there are commits")? + i64::try_from(WARM_UP.as_micros())?;
    let mut all = Vec::with_capacity(commits.len());
    let mut left = commits;
    let mut seen = 0;
    for (at, count) in sights {
        let (new, rest) = left.split_at(usize::try_from(count - seen)?);
        let measured = new.iter().filter(|commit| **commit >= from);
        all.extend(measured.map(|commit| Duration::from_micros(u64::try_from(at - commit).unwrap_or(0))));
        (left, seen) = (rest, *count);
    }
    all.sort_unstable();
    let part = |part: f64| all.get((all.len() as f64 * part) as usize).copied();
    let max = *all.last().context("more rows than the warm-up takes are needed: --rows")?;
    let figures = [part(0.5).unwrap_or(max), part(0.99).unwrap_or(max), max];
    Ok(figures.map(|time| time.as_secs_f64() * 1e3).to_vec())
}

fn now_us() -> Result<i64> {
    Ok(i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros())?)
}
