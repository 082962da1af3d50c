//! The stores' workers drain the log of a backlog, each beside its limit: a plain consumer that counts, a plain loop of
//! Tantivy upserts. Workers of another build drain the same log, which is this build's.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rdkafka::error::KafkaError;
use rdkafka::message::Message;
use serde_json::Value;
use tantivy::schema::{FAST, Field, STORED, STRING, Schema, TEXT};
use tantivy::{Index, IndexWriter, TantivyDocument, Term};
use testkit::services::{Kafka, Postgres, Process, Redis, free_port};

use crate::Options;
use crate::backlog::{self, DATABASE, Shape};
use crate::ledger::Ledger;
use crate::measure::{Sample, Watched, until, within};
use crate::producer;
use crate::program::Build;
use crate::rounds::in_order;
use crate::sides::{self, COUNTERS, INDEXES, PATIENCE, Running, START, Side, is_row};

/// The pipeline, and the topic of its log.
const NAME: &str = "stores";
const TOPIC: &str = "millrace.stores.1";
/// Between two looks at how far a worker is.
const LOOK: Duration = Duration::from_millis(20);
/// Memory of the plain Tantivy writer, bytes: as the search worker's.
const HEAP: usize = 50_000_000;
/// Groups of the plain increments, and how many go in a pipeline.
const GROUPS: u64 = 10_000;
const PIPELINE: usize = 1_000;
/// Rows between two commits of that writer.
const COMMIT_ROWS: u64 = 100_000;

pub(crate) fn run(options: &Options) -> Result<Vec<Sample>> {
    let (postgres, kafka) = (Postgres::start(), Kafka::tuned());
    producer::warm_up(&kafka)?;
    let changes = fill_log(&postgres, &kafka, options.rows)?;
    let mut samples = Vec::new();
    for round in 1..=options.rounds {
        for side in in_order(options.sides(), round) {
            let sample = match side {
                Side::Consumer => within(&kafka, side, round, || count(&kafka))?,
                Side::Redis => within(&kafka, side, round, || increment(changes))?,
                Side::Tantivy => within(&kafka, side, round, || upsert(&kafka, options.rows))?,
                Side::Counters | Side::OtherCounters | Side::Search | Side::OtherSearch => {
                    worker(&postgres, &kafka, options, side, round, changes)?
                }
                _ => bail!("side {} does not belong to the shape `stores`", side.name()),
            };
            eprintln!(
                "round {round}: {:<14} {:>9.0} rows/s, {:.1} s",
                sample.side,
                sample.rows_per_second(),
                sample.time.as_secs_f64()
            );
            samples.push(sample);
        }
    }
    Ok(samples)
}

/// Has the reader write the log; gives the number of row changes.
fn fill_log(postgres: &Postgres, kafka: &Kafka, rows: u64) -> Result<u64> {
    backlog::make_table(postgres);
    backlog::keep_old_rows(postgres);
    let directory = tempfile::tempdir()?;
    Build::Own.configure(directory.path(), NAME, postgres, kafka, "")?;
    let millrace = |arguments: &[&str]| {
        let mut command = Build::Own.command(directory.path(), arguments);
        command.stdout(Stdio::null());
        command
    };
    ensure!(millrace(&["setup"]).status()?.success(), "millrace setup");
    eprintln!("filling the table and the log");
    let reader = Process::spawn(millrace(&["reader"]).stderr(Stdio::null()));
    let ledger = Ledger::of(kafka, TOPIC)?;
    // The empty table is read.
    until(START, || ledger.has_reached(None))?;
    let changes = backlog::fill(postgres, Shape::Batches, rows);
    let head = postgres.value(DATABASE, "SELECT pg_current_wal_insert_lsn()").parse()?;
    postgres.sql(DATABASE, "SELECT pg_logical_emit_message(true, 'bench', '')");
    let mut running = Running::Reader(reader, ledger, Some(head));
    until(PATIENCE, || running.done())?;
    Ok(changes)
}

fn count(kafka: &Kafka) -> Result<u64> {
    let consumer = sides::consumer(kafka, TOPIC)?;
    let mut rows = 0;
    loop {
        match consumer.poll(PATIENCE).context("the log answers")? {
            Ok(message) => rows += u64::from(message.key().is_some()),
            // The last one is the message that marked the backlog's end.
            Err(KafkaError::PartitionEOF(_)) => return Ok(rows - 1),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Increments counters one by one, many in a pipeline, exactly-once left out.
fn increment(changes: u64) -> Result<u64> {
    let redis = Redis::start();
    let mut connection = redis.connect();
    for first in (0..changes).step_by(PIPELINE) {
        let mut pipeline = redis::pipe();
        for change in first..changes.min(first + PIPELINE as u64) {
            pipeline.cmd("HINCRBY").arg("unread").arg(change % GROUPS).arg(1).ignore();
        }
        pipeline.exec(&mut connection)?;
    }
    let groups: u64 = redis::cmd("HLEN").arg("unread").query(&mut connection)?;
    ensure!(groups == GROUPS.min(changes), "{groups} groups are in Redis");
    Ok(changes)
}

/// Keeps an index as anybody would at first: parse the record, delete what has its id, add the document.
fn upsert(kafka: &Kafka, documents: u64) -> Result<u64> {
    let consumer = sides::consumer(kafka, TOPIC)?;
    let mut schema = Schema::builder();
    let id = schema.add_text_field("id", STRING | FAST);
    let subject = schema.add_text_field("subject", TEXT);
    let body = schema.add_text_field("body", TEXT);
    let json = schema.add_text_field("json", STORED);
    let directory = tempfile::tempdir()?;
    let index = Index::create_in_dir(directory.path(), schema.build())?;
    let mut writer: IndexWriter = index.writer_with_num_threads(1, HEAP)?;
    let mut rows = 0;
    loop {
        match consumer.poll(PATIENCE).context("the log answers")? {
            Ok(message) if is_row(&message)? => {
                let envelope: Value = serde_json::from_slice(message.payload().unwrap_or_default())?;
                let after = &envelope["after"];
                let key = after["id"].to_string();
                writer.delete_term(Term::from_field_text(id, &key));
                let mut document = TantivyDocument::new();
                document.add_text(id, &key);
                let mut text = |field: Field, name: &str| {
                    document.add_text(field, after[name].as_str().unwrap_or_default());
                };
                text(subject, "subject");
                text(body, "body");
                document.add_text(json, after.to_string());
                writer.add_document(document)?;
                rows += 1;
                if rows % COMMIT_ROWS == 0 {
                    writer.commit()?;
                }
            }
            Ok(_) => {}
            Err(KafkaError::PartitionEOF(_)) => break,
            Err(error) => return Err(error.into()),
        }
    }
    writer.commit()?;
    let found = index.reader()?.searcher().num_docs();
    ensure!(found == documents, "{found} documents in the index of {documents}");
    Ok(rows)
}

/// A worker with an empty store of its own. Its clock begins with its first progress.
fn worker(
    postgres: &Postgres,
    kafka: &Kafka,
    options: &Options,
    side: Side,
    round: u32,
    changes: u64,
) -> Result<Sample> {
    let redis = Redis::start();
    let directory = tempfile::tempdir()?;
    let (search, telemetry) = (free_port(), free_port());
    let counts = matches!(side, Side::Counters | Side::OtherCounters);
    let (role, stores) = if counts {
        ("counters", format!("[redis]\nurl = \"{}\"\n{COUNTERS}", redis.url()))
    } else {
        let files = directory.path().join("search");
        let files = files.display();
        let listen = format!("127.0.0.1:{search}");
        ("search", format!("[search]\ndirectory = \"{files}\"\nlisten = \"{listen}\"\n{INDEXES}"))
    };
    let listen = format!("{stores}[telemetry.listen]\n{role} = \"127.0.0.1:{telemetry}\"\n");
    let build = options.build(side);
    build.configure(directory.path(), NAME, postgres, kafka, &listen)?;
    let metrics = format!("http://127.0.0.1:{telemetry}/metrics");

    let mut broker = Watched::new(kafka.id());
    let mut server = Watched::new(redis.id());
    let mut process = Process::spawn(build.command(directory.path(), &[role]).stderr(Stdio::null()));
    let mut own = Watched::born(process.id());
    let mut begun: Option<(Instant, u64)> = None;
    let launched = Instant::now();
    let (time, before) = loop {
        std::thread::sleep(LOOK);
        ensure!(process.ended().is_none(), "millrace {role} ended");
        ensure!(launched.elapsed() < PATIENCE, "not drained after {PATIENCE:?}");
        let Ok(mut answer) = ureq::get(&metrics).call() else { continue };
        let (offset, ready) = progress(&answer.body_mut().read_to_string()?, role);
        if offset > 1 {
            let (began, before) = *begun.get_or_insert((Instant::now(), offset));
            if ready {
                break (began.elapsed(), before);
            }
        }
    };
    own.look();
    broker.look();
    server.look();
    let found = if counts {
        redis::cmd("GET").arg("total").query::<u64>(&mut redis.connect())?
    } else {
        let url = format!("http://127.0.0.1:{search}/indexes/emails/documents?limit=0");
        let page: Value = ureq::get(&url).call()?.body_mut().read_json()?;
        page["total"].as_u64().context("the page has a total")?
    };
    ensure!(found == options.rows, "{found} rows are in the store of {}", options.rows);
    process.signal("TERM");
    process.wait(PATIENCE);
    Ok(Sample {
        side: side.name(),
        round,
        rows: changes.saturating_sub(before),
        time,
        own: own.used(),
        server: server.used(),
        broker: broker.used(),
        peak_kib: own.peak_kib(),
    })
}

/// How far the worker has come that fills the stores, and whether all of them are complete.
fn progress(metrics: &str, role: &str) -> (u64, bool) {
    let values = |name: &str| {
        let lines = metrics.lines().filter(move |line| line.contains(name) && !line.starts_with('#'));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).collect::<Vec<_>>()
    };
    let offset = values("_offset{").into_iter().min().unwrap_or(0);
    let ready = values(&format!("{role}_ready{{"));
    (offset, !ready.is_empty() && ready.iter().all(|ready| *ready == 1))
}
