//! How long after its commit a row is visible: in Kafka (read_committed), in Redis, to a search.
//!
//! Rows come one in a transaction at a steady rate, and every place only ever counts more of them: what is seen at a
//! count of n is the nth commit.

use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rdkafka::consumer::BaseConsumer;
use serde_json::Value;
use testkit::services::{Kafka, Postgres, Process, Redis, free_port};

use crate::Options;
use crate::backlog::{self, DATABASE};
use crate::sides;

/// Connections that write.
const WRITERS: u32 = 4;
/// A row that is not visible after so long never will be.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often a store is asked.
const REDIS_LOOK: Duration = Duration::from_micros(500);
const SEARCH_LOOK: Duration = Duration::from_millis(20);
/// Rows that come before any is measured: everything is warm then.
const WARM_UP: Duration = Duration::from_secs(5);

/// From commit to visible, in one place.
pub(crate) struct Latency {
    pub(crate) place: &'static str,
    pub(crate) p50: Duration,
    pub(crate) p99: Duration,
    pub(crate) max: Duration,
}

pub(crate) fn run(options: &Options) -> Result<Vec<Latency>> {
    let (postgres, kafka, redis) = (Postgres::start(), Kafka::tuned(), Redis::start());
    backlog::make_table(&postgres);
    // Counters by a column that is not the key need old values.
    postgres.sql(DATABASE, "ALTER TABLE emails REPLICA IDENTITY FULL");
    let directory = tempfile::tempdir()?;
    let search = free_port();
    let config = directory.path().join("millrace.toml");
    std::fs::write(
        &config,
        format!(
            "pipeline = \"steady\"\n[postgres]\nurl = \"{}\"\ntables = [\"public.emails\"]\n\
             [kafka]\nbootstrap = \"{}\"\n[redis]\nurl = \"{}\"\n\
             [counters.total]\nsql = \"SELECT count(*) FROM public.emails\"\n\
             [counters.unread]\nsql = \"SELECT user_id, count(*) FROM public.emails WHERE NOT is_read GROUP BY user_id\"\n\
             [search]\ndirectory = \"{}\"\nlisten = \"127.0.0.1:{search}\"\n\
             [search.indexes.emails]\ntable = \"public.emails\"\ntext = [\"subject\", \"body\"]\n",
            postgres.url(DATABASE),
            kafka.bootstrap(),
            redis.url(),
            directory.path().join("search").display()
        ),
    )?;
    let millrace = |arguments: &[&str]| {
        let mut command = Command::new(sides::own_program());
        command.arg("--config").arg(&config).args(arguments).stdin(Stdio::null()).stdout(Stdio::null());
        command
    };
    ensure!(millrace(&["setup"]).status()?.success(), "millrace setup");
    let _processes =
        ["reader", "counters", "search"].map(|role| Process::spawn(millrace(&[role]).stderr(Stdio::null())));
    ensure!(millrace(&["wait", "--timeout", "90s"]).status()?.success(), "millrace wait");

    let rows = options.rows;
    eprintln!("{rows} transactions, {} a second", options.rate);
    let consumer = sides::consumer(&kafka, "millrace.steady.1")?;
    let mut connection = redis.connect();
    let url = format!("http://127.0.0.1:{search}/indexes/emails/documents?limit=0");
    thread::scope(|scope| {
        let in_kafka = scope.spawn(|| watch(rows, Duration::ZERO, records(&consumer)));
        let in_redis = scope.spawn(|| {
            watch(rows, REDIS_LOOK, || {
                Ok(redis::cmd("GET").arg("total").query::<Option<u64>>(&mut connection)?.unwrap_or(0))
            })
        });
        let in_search = scope.spawn(|| {
            watch(rows, SEARCH_LOOK, || {
                let page: Value = ureq::get(&url).call()?.body_mut().read_json()?;
                page["total"].as_u64().context("the page has a total")
            })
        });
        let mut commits = write(&postgres, rows, options.rate);
        commits.sort_unstable();
        let seen = [("Kafka", in_kafka), ("Redis", in_redis), ("search", in_search)];
        let latencies = seen.map(|(place, watched)| {
            let sights = watched.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            sights.with_context(|| place).and_then(|sights| latency(place, &commits, &sights))
        });
        latencies.into_iter().collect()
    })
}

/// Writes rows at a steady rate; gives when each commit had returned.
fn write(postgres: &Postgres, rows: u64, rate: u32) -> Vec<Instant> {
    let began = Instant::now();
    let sessions: Vec<_> = (0..WRITERS).map(|_| postgres.session(DATABASE)).collect();
    thread::scope(|scope| {
        let writers: Vec<_> = (0..)
            .zip(sessions)
            .map(|(writer, session)| {
                scope.spawn(move || {
                    let own = (1..=rows).filter(|id| id % u64::from(WRITERS) == writer);
                    own.map(|id| {
                        let due = began + Duration::from_secs_f64(id as f64 / f64::from(rate));
                        thread::sleep(due.saturating_duration_since(Instant::now()));
                        session.sql(&format!(
                            "INSERT INTO emails VALUES ({id}, {id} % 10000, 'inbox', 'me@example.org', 'subject {id}', \
                             repeat('some words ', 30), false, now())"
                        ));
                        Instant::now()
                    })
                    .collect::<Vec<_>>()
                })
            })
            .collect();
        writers.into_iter().flat_map(|writer| writer.join().expect("every row is written")).collect()
    })
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
fn watch(rows: u64, look: Duration, mut count: impl FnMut() -> Result<u64>) -> Result<Vec<(Instant, u64)>> {
    let mut sights: Vec<(Instant, u64)> = Vec::new();
    let mut moved = Instant::now();
    loop {
        let now = count()?;
        if now > sights.last().map_or(0, |last| last.1) {
            moved = Instant::now();
            sights.push((moved, now));
        }
        if now >= rows {
            return Ok(sights);
        }
        ensure!(moved.elapsed() < PATIENCE, "{now} rows are visible of {rows}, and no more come");
        thread::sleep(look);
    }
}

fn latency(place: &'static str, commits: &[Instant], sights: &[(Instant, u64)]) -> Result<Latency> {
    let from = *commits.first().context("there are commits")? + WARM_UP;
    let mut all = Vec::with_capacity(commits.len());
    let mut left = commits;
    let mut seen = 0;
    for (at, count) in sights {
        let (new, rest) = left.split_at(usize::try_from(count - seen)?);
        all.extend(
            new.iter().filter(|commit| **commit >= from).map(|commit| at.saturating_duration_since(*commit)),
        );
        (left, seen) = (rest, *count);
    }
    all.sort_unstable();
    let part = |part: f64| all.get((all.len() as f64 * part) as usize).copied();
    let max = *all.last().context("more rows than the warm-up takes are needed: --rows")?;
    Ok(Latency { place, p50: part(0.5).unwrap_or(max), p99: part(0.99).unwrap_or(max), max })
}
