//! `millrace status`: how far everything has come, from Postgres' head to each store.

use std::collections::HashMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use change::{Lsn, TableProgress};
use comfy_table::{ContentArrangement, Table, presets};
use kafka::{Connection, Generation, Generations, KafkaError, Names, RangeReader, ReadUntil, Start};
use postgres::setup::SetupError;
use serde::Serialize;
use tokio_postgres::Client;
use worker::{FeedError, LastRecord, LogBatch, Stopped};

use super::stores::{Store, Stores};
use crate::cli::Format;
use crate::failure::{Failure, Outcome};
use crate::wiring::{FIRST_GENERATION, Process};

/// How long the record that a store was left at may take to come.
const LAST_RECORD_WAIT: Duration = Duration::from_secs(2);

/// A table for people.
pub(crate) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_preset(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(header);
    table
}

/// Prints it without the blanks that fill its last column.
pub(crate) fn print_table(table: &Table) {
    for line in table.lines() {
        println!("{}", line.trim_end());
    }
}

/// Everything that is shown.
#[derive(Serialize)]
struct Report {
    pipeline: String,
    generation: u32,
    source: Seen<Source>,
    log: Seen<Log>,
    /// The log that is to take its place.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<NextLog>,
    stores: Vec<StoreLine>,
}

/// A log from which stores are being built.
#[derive(Serialize)]
struct NextLog {
    generation: u32,
    slot: Option<Slot>,
    #[serde(flatten)]
    log: Seen<Log>,
}

/// What was asked for, or why there is no answer.
#[derive(Serialize)]
#[serde(untagged)]
enum Seen<T> {
    Here(T),
    Not { problem: String },
}

impl<T> Seen<T> {
    fn of(answer: Result<T, Failure>) -> Self {
        match answer {
            Ok(answer) => Seen::Here(answer),
            Err(failure) => {
                let text = failure.to_string();
                let problem =
                    text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned();
                Seen::Not { problem }
            }
        }
    }

    fn here(&self) -> Option<&T> {
        match self {
            Seen::Here(answer) => Some(answer),
            Seen::Not { .. } => None,
        }
    }
}

/// Postgres and the slot.
#[derive(Serialize)]
struct Source {
    /// `pg_current_wal_lsn()`.
    head: Lsn,
    slot: Option<Slot>,
}

#[derive(Serialize)]
struct Slot {
    name: String,
    /// Whether a reader is connected.
    active: bool,
    sent: Option<Lsn>,
    received: Option<Lsn>,
    confirmed: Option<Lsn>,
    /// WAL that the server keeps for this slot.
    retained_bytes: i64,
    /// `reserved`, `extended`, `unreserved`, `lost`.
    wal_status: Option<String>,
    /// WAL that may still be written before the slot is in danger; absent without a limit.
    safe_wal_bytes: Option<i64>,
}

/// The ledger.
#[derive(Serialize)]
struct Log {
    topic: String,
    /// The log is Postgres up to here.
    published: Lsn,
    end: i64,
    #[serde(flatten)]
    lag: Lag,
    /// While tables are being read.
    #[serde(skip_serializing_if = "Option::is_none")]
    snapshot: Option<Snapshot>,
}

/// Tables that are being read.
#[derive(Serialize)]
struct Snapshot {
    /// Why it does not go on, where it does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    waiting: Option<String>,
    tables: Vec<Reading>,
}

/// How far a table has been read.
#[derive(Serialize)]
pub(crate) struct Reading {
    pub(crate) table: String,
    pub(crate) rows: u64,
    pub(crate) bytes: u64,
    /// Absent where Postgres has no estimate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) estimated_rows: Option<u64>,
    /// At the pace so far.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) seconds_left: Option<f64>,
}

impl Reading {
    pub(crate) fn of(table: &TableProgress) -> Self {
        let estimated_rows = u64::try_from(table.estimated_rows).ok();
        let left = estimated_rows.map(|estimated| estimated.saturating_sub(table.rows));
        let paced = (table.rows > 0 && table.begun_ms > 0).then(|| seconds_since(table.begun_ms));
        Reading {
            table: table.name.clone(),
            rows: table.rows,
            bytes: table.bytes,
            estimated_rows,
            seconds_left: paced.zip(left).map(|(spent, left)| spent * left as f64 / table.rows as f64),
        }
    }

    /// For people.
    pub(crate) fn describe(&self) -> String {
        let mut text = format!("{} rows", self.rows);
        if let Some(estimated) = self.estimated_rows {
            text.push_str(&format!(" of about {}", estimated.max(self.rows)));
        }
        text.push_str(&format!(", {}", bytes(self.bytes)));
        if let Some(left) = self.seconds_left {
            text.push_str(&format!(", about {left:.0} s left"));
        }
        text
    }
}

#[derive(Serialize)]
struct StoreLine {
    #[serde(flatten)]
    store: Store,
    #[serde(flatten)]
    lag: Lag,
    /// Why the log cannot be compared with what the store was left at, or does not go on from there.
    #[serde(skip_serializing_if = "Option::is_none")]
    last_record: Option<&'static str>,
}

/// How far behind the head.
#[derive(Clone, Copy, Default, Serialize)]
struct Lag {
    #[serde(skip_serializing_if = "Option::is_none")]
    lag_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lag_seconds: Option<f64>,
}

/// Asks everyone and prints what they say; what cannot be reached is shown as such.
pub(crate) fn execute(process: &Process, format: Format) -> Outcome {
    let kafka = process.kafka_briefly()?;
    let (generations, away) = match process.generations(&kafka) {
        Ok(generations) => (generations, None),
        // The rest is of interest all the more.
        Err(error @ KafkaError::Unavailable(_)) => {
            (Generations::of(Generation::new(FIRST_GENERATION)), Some(Failure::from(error)))
        }
        Err(error) => return Err(error.into()),
    };
    let pipeline = process.config.pipeline.as_str();
    let names = Names::new(pipeline, generations.current.number)?;
    let plan = process.plan(names.generation())?;
    let source = Seen::of(ask_source(process, &plan.slot));
    let head = source.here().map(|source| source.head);
    let log = Seen::of(away.map_or_else(|| log(&kafka, &names, head), Err));
    let stores = Stores::new(process, &[])?.read();
    let next = generations.next.map(|next| {
        let log = Names::new(pipeline, next.number).map_err(Failure::from);
        let source = process.plan(next.number).map_err(Failure::from);
        let source = source.and_then(|plan| ask_source(process, &plan.slot));
        NextLog {
            generation: next.number,
            slot: source.ok().and_then(|source| source.slot),
            log: Seen::of(log.and_then(|names| self::log(&kafka, &names, head))),
        }
    });
    let mut last_records = LastRecords { kafka: &kafka, pipeline, compared: HashMap::new() };
    let line = |store: Store| {
        let next = next.as_ref().filter(|next| store.generation == Some(next.generation));
        let log = next.map_or(&log, |next| &next.log).here();
        let lag = store_lag(&kafka, pipeline, &store, head, log);
        let last_record = log.and_then(|_| last_records.of(&store));
        StoreLine { lag, last_record, store }
    };
    let stores = stores.into_iter().map(line).collect();
    let report =
        Report { pipeline: plan.pipeline, generation: names.generation(), source, log, next, stores };
    if format.json {
        super::print_line(&report)
    } else {
        print(&report)
    }
    Ok(())
}

fn ask_source(process: &Process, slot: &str) -> Result<Source, Failure> {
    let client = process.connect(&process.source()?)?;
    let answer = process.runtime.block_on(source(&client, slot));
    Ok(answer.map_err(|error| SetupError::Failed { doing: "cannot ask the source".into(), error })?)
}

async fn source(client: &Client, slot: &str) -> Result<Source, tokio_postgres::Error> {
    const STATUS: &str =
        "SELECT pg_catalog.pg_current_wal_lsn()::text AS head, s.slot_name::text AS slot, s.active,
            r.sent_lsn::text AS sent, r.write_lsn::text AS received, s.confirmed_flush_lsn::text AS confirmed,
            coalesce(pg_wal_lsn_diff(pg_catalog.pg_current_wal_lsn(), s.restart_lsn), 0)::bigint AS retained,
            s.wal_status, s.safe_wal_size AS safe
        FROM (SELECT) AS always LEFT JOIN pg_catalog.pg_replication_slots s ON s.slot_name = $1
        LEFT JOIN pg_catalog.pg_stat_replication r ON r.pid = s.active_pid";
    let row = client.query_one(STATUS, &[&slot]).await?;
    let lsn = |column: &str| row.get::<_, Option<String>>(column).and_then(|text| text.parse::<Lsn>().ok());
    let name: Option<String> = row.get("slot");
    let slot = name.map(|name| Slot {
        name,
        active: row.get::<_, Option<bool>>("active").unwrap_or_default(),
        sent: lsn("sent"),
        received: lsn("received"),
        confirmed: lsn("confirmed"),
        retained_bytes: row.get("retained"),
        wal_status: row.get("wal_status"),
        safe_wal_bytes: row.get("safe"),
    });
    Ok(Source { head: lsn("head").unwrap_or_default(), slot })
}

fn log(kafka: &Connection, names: &Names, head: Option<Lsn>) -> Result<Log, Failure> {
    let ledger = kafka::read_ledger(kafka, names, ReadUntil::Committed)?;
    let progress = ledger
        .progress
        .ok_or_else(|| change::Refusal::new("the setup has not finished", "millrace setup"))?;
    let lag_bytes = head.map(|head| head.bytes_since(progress.end_lsn));
    let lag_seconds = lag_bytes.map(|bytes| if bytes == 0 { 0.0 } else { seconds_since(progress.time_ms) });
    let lag = Lag { lag_bytes, lag_seconds };
    let tables = TableProgress::by_name(ledger.tables.values());
    let tables = tables.iter().filter(|table| table.pending()).map(Reading::of).collect();
    let snapshot = progress.snapshot.map(|snapshot| Snapshot { waiting: snapshot.waiting, tables });
    Ok(Log { topic: names.log(), published: progress.end_lsn, end: progress.log_end, lag, snapshot })
}

/// Bytes behind the head, and the age of the first change that the store does not have.
fn store_lag(kafka: &Connection, pipeline: &str, store: &Store, head: Option<Lsn>, log: Option<&Log>) -> Lag {
    let lag_bytes = head.zip(store.lsn).map(|(head, lsn)| head.bytes_since(lsn));
    let lag_seconds = match (store.next_offset, log) {
        (Some(offset), Some(log)) if offset < log.end => {
            let names = store.generation.and_then(|generation| Names::new(pipeline, generation).ok());
            names.and_then(|names| committed_ms(kafka, &names, offset)).map(seconds_since)
        }
        (Some(_), Some(log)) => log.lag.lag_seconds,
        _ => None,
    };
    Lag { lag_bytes, lag_seconds }
}

/// The records that stores were left at, compared with the log. Stores that move together share one, which is read once.
struct LastRecords<'a> {
    kafka: &'a Connection,
    pipeline: &'a str,
    compared: HashMap<(u32, LastRecord), Option<&'static str>>,
}

impl LastRecords<'_> {
    /// What is to be said of the record that a store was left at, which a worker demands from the log when it starts.
    fn of(&mut self, store: &Store) -> Option<&'static str> {
        store.next_offset.filter(|offset| *offset > 1)?;
        let Some(last) = store.last else { return Some("its checkpoint does not name its last record") };
        let generation = store.generation?;
        let compare = || compare(self.kafka, self.pipeline, generation, last);
        *self.compared.entry((generation, last)).or_insert_with(compare)
    }
}

fn compare(kafka: &Connection, pipeline: &str, generation: u32, last: LastRecord) -> Option<&'static str> {
    let names = Names::new(pipeline, generation).ok()?;
    let end = Some(last.offset + 1);
    let mut reader = match RangeReader::open(kafka, &names, Start::Offset(last.offset), end) {
        Ok(reader) => reader,
        Err(FeedError::Refused(_)) => return Some("its last record is not in the log any more"),
        Err(_) => return None,
    };
    let mut batch = LogBatch::default();
    if reader.read(LAST_RECORD_WAIT, &mut batch).ok()? && batch.is_empty() {
        return None;
    }
    let found = (!batch.is_empty()).then(|| LastRecord::of(&batch.get(0))).flatten();
    (found != Some(last)).then_some("the log has other records than those it was built from")
}

/// When the record at `offset` was committed at the source.
fn committed_ms(kafka: &Connection, names: &Names, offset: i64) -> Option<i64> {
    #[derive(serde::Deserialize)]
    struct Envelope {
        source: Source,
    }
    #[derive(serde::Deserialize)]
    struct Source {
        ts_ms: i64,
    }
    let mut reader = RangeReader::open(kafka, names, Start::Offset(offset), None).ok()?;
    let mut batch = LogBatch::default();
    while reader.read(Duration::from_secs(2), &mut batch).ok()? && !batch.is_empty() {
        let records = (0..batch.len()).map(|place| batch.get(place));
        let found = records
            .filter(|record| !record.log)
            .find_map(|record| serde_json::from_slice::<Envelope>(record.value).ok());
        if let Some(envelope) = found {
            return Some(envelope.source.ts_ms);
        }
    }
    None
}

fn seconds_since(time_ms: i64) -> f64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    (i64::try_from(now.as_millis()).unwrap_or(i64::MAX) - time_ms).max(0) as f64 / 1000.0
}

fn print(report: &Report) {
    println!("pipeline {}, generation {}", report.pipeline, report.generation);
    let mut lines = table(&["", "LSN", "lag", "", "state"]);
    let head = report.source.here().map(|source| source.head);
    match &report.source {
        Seen::Here(source) => source_lines(&mut lines, source),
        Seen::Not { problem } => {
            lines.add_row(["Postgres", "-", "", "", problem]);
        }
    }
    log_lines(&mut lines, "log: published", &report.log);
    if let Some(NextLog { slot, log, .. }) = &report.next {
        match slot {
            Some(slot) => slot_line(&mut lines, "next slot", slot, head),
            None => drop(lines.add_row(["next slot", "-", "", "", "is not there"])),
        }
        log_lines(&mut lines, "next log", log);
    }
    let newest = report.next.as_ref().map_or(&report.log, |next| &next.log);
    for StoreLine { store, lag, last_record } in &report.stores {
        let mut state = match (&store.problem, &store.stopped, store.ready) {
            (Some(problem), _, _) => problem.clone(),
            (None, Some(Stopped { offset, reason }), _) => {
                format!("has stopped at offset {offset}: {reason}")
            }
            (None, None, true) => "ready".into(),
            (None, None, false) => "filling".into(),
        };
        if let Some(rebuild) = &store.rebuild {
            let end = newest.here().map_or_else(String::new, |log| format!(" of {}", log.end));
            let offset = rebuild.next_offset.unwrap_or(0);
            state.push_str(&format!(", being built anew: offset {offset}{end}"));
        }
        if !store.skipped.is_empty() {
            state.push_str(&format!(", without the skipped records {:?}", store.skipped));
        }
        if let Some(last_record) = last_record {
            state.push_str(&format!("; {last_record}"));
        }
        add(&mut lines, &store.store, store.lsn, *lag, state);
    }
    print_table(&lines);
}

fn log_lines(lines: &mut Table, what: &str, log: &Seen<Log>) {
    match log {
        Seen::Here(log) => {
            let state = format!("{} up to offset {}", log.topic, log.end);
            add(lines, what, Some(log.published), log.lag, state);
            if let Some(snapshot) = &log.snapshot {
                snapshot_lines(lines, snapshot);
            }
        }
        Seen::Not { problem } => {
            lines.add_row([what, "-", "", "", problem]);
        }
    }
}

fn snapshot_lines(lines: &mut Table, snapshot: &Snapshot) {
    let state = snapshot.waiting.as_deref().unwrap_or("tables are being read; no store is ready before");
    lines.add_row(["snapshot", "", "", "", state]);
    for reading in &snapshot.tables {
        lines.add_row([&format!("  {}", reading.table), "", "", "", &reading.describe()]);
    }
}

fn source_lines(lines: &mut Table, source: &Source) {
    let lag =
        |lsn: Option<Lsn>| Lag { lag_bytes: lsn.map(|lsn| source.head.bytes_since(lsn)), lag_seconds: None };
    add(lines, "Postgres: head", Some(source.head), Lag::default(), String::new());
    let Some(slot) = &source.slot else {
        lines.add_row(["slot", "-", "", "", "is gone: millrace check says what to do"]);
        return;
    };
    if slot.active {
        add(lines, "reader: sent", slot.sent, lag(slot.sent), String::new());
        add(lines, "reader: received", slot.received, lag(slot.received), String::new());
    } else {
        lines.add_row(["reader", "-", "", "", "no reader is connected"]);
    }
    slot_line(lines, "slot: confirmed", slot, Some(source.head));
}

fn slot_line(lines: &mut Table, what: &str, slot: &Slot, head: Option<Lsn>) {
    let lag_bytes = head.zip(slot.confirmed).map(|(head, lsn)| head.bytes_since(lsn));
    let mut state = format!("slot {} keeps {} of WAL", slot.name, bytes(slot.retained_bytes.unsigned_abs()));
    if let Some(status) = slot.wal_status.as_deref().filter(|status| *status != "reserved") {
        state.push_str(&format!(", {status}"));
    }
    if let Some(safe) = slot.safe_wal_bytes {
        state.push_str(&format!(", safe for {} more", bytes(safe.unsigned_abs())));
    }
    add(lines, what, slot.confirmed, Lag { lag_bytes, lag_seconds: None }, state);
}

fn add(lines: &mut Table, what: &str, lsn: Option<Lsn>, lag: Lag, state: String) {
    let lsn = lsn.map_or("-".into(), |lsn| lsn.to_string());
    let behind = lag.lag_bytes.map(bytes).unwrap_or_default();
    let late = lag.lag_seconds.map(|seconds| format!("{seconds:.1} s")).unwrap_or_default();
    lines.add_row([what, &lsn, &behind, &late, &state]);
}

/// As people read sizes.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut size = count as f64;
    let mut unit = 0;
    while size >= 1024.0 && unit + 1 < UNITS.len() {
        size /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{size:.1} {}", UNITS[unit]) }
}
