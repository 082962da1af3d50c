//! `millrace tail`: prints the log as it flows.

use std::io::{BufWriter, ErrorKind, Write};
use std::time::Duration;

use anyhow::Context;
use change::{Lsn, Position};
use kafka::{RangeReader, ReadUntil, Start};
use postgres::plan::Table;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use worker::{LogBatch, LogRecord};

use crate::cli::Format;
use crate::failure::{Failure, Outcome};
use crate::stop::Stop;
use crate::wiring::Process;

/// How often a quiet log is asked whether to end.
const POLL: Duration = Duration::from_millis(200);

/// Prints until told to stop, until `limit` records were printed, or until nobody reads.
pub(crate) fn execute(
    process: &Process,
    from_beginning: bool,
    table: Option<&Table>,
    limit: Option<u64>,
    format: Format,
) -> Outcome {
    let stop = Stop::on_signals(&process.runtime).context("cannot listen to signals")?;
    let kafka = process.kafka_briefly()?;
    let names = process.names(&kafka)?;
    let start = if from_beginning {
        Start::Beginning
    } else {
        Start::Offset(kafka::read_ledger(&kafka, &names, ReadUntil::Committed)?.log_end)
    };
    let mut reader = RangeReader::open(&kafka, &names, start, Some(i64::MAX))?;
    let mut batch = LogBatch::default();
    let mut out = BufWriter::new(std::io::stdout().lock());
    let mut left = limit.unwrap_or(u64::MAX);
    while left > 0 && !stop.is_set() {
        reader.read(POLL, &mut batch)?;
        let shown = (0..batch.len()).map(|place| batch.get(place)).filter(|record| !record.log);
        for record in shown {
            let line = Line::of(&record);
            if table.is_some_and(|table| !line.is_of(table)) {
                continue;
            }
            let printed = if format.json { line.json(&mut out) } else { line.human(&mut out) };
            match printed {
                Ok(()) => left -= 1,
                Err(error) => return broken_pipe(error),
            }
            if left == 0 {
                break;
            }
        }
        if let Err(error) = out.flush() {
            return broken_pipe(error);
        }
    }
    Ok(())
}

/// `head` and its like close our output when they have enough.
fn broken_pipe(error: std::io::Error) -> Outcome {
    if error.kind() == ErrorKind::BrokenPipe {
        return Ok(());
    }
    Err(Failure::Failed(anyhow::Error::new(error).context("cannot print")))
}

/// What is read of an envelope to print it.
#[derive(Deserialize)]
struct Envelope<'a> {
    op: &'a str,
    #[serde(borrow, default)]
    before: Option<&'a RawValue>,
    #[serde(borrow, default)]
    after: Option<&'a RawValue>,
    #[serde(borrow)]
    source: Source<'a>,
}

#[derive(Deserialize)]
struct Source<'a> {
    #[serde(borrow, default)]
    schema: std::borrow::Cow<'a, str>,
    #[serde(borrow, default)]
    table: std::borrow::Cow<'a, str>,
}

impl Envelope<'_> {
    fn table(&self) -> String {
        change::table_name(&self.source.schema, &self.source.table)
    }
}

/// One record.
struct Line<'a> {
    record: LogRecord<'a>,
    /// Or why the record has none: it is shown all the same, since it may be what is looked for.
    envelope: Result<Envelope<'a>, String>,
}

impl<'a> Line<'a> {
    fn of(record: &LogRecord<'a>) -> Self {
        let envelope = serde_json::from_slice(record.value);
        Line { record: *record, envelope: envelope.map_err(|error| format!("not an envelope: {error}")) }
    }

    fn is_of(&self, table: &Table) -> bool {
        let Ok(Envelope { source, .. }) = &self.envelope else { return false };
        source.schema == table.schema && source.table == table.name
    }

    fn human(&self, out: &mut impl Write) -> std::io::Result<()> {
        let position = self.record.position.unwrap_or(Position::START);
        write!(out, "{:>8}  {position}  ", self.record.offset)?;
        let envelope = match &self.envelope {
            Ok(envelope) => envelope,
            Err(problem) => return writeln!(out, "{problem}"),
        };
        write!(out, "{}  {}", envelope.op, envelope.table())?;
        for (mark, row) in [('-', envelope.before), ('+', envelope.after)] {
            if let Some(row) = row.filter(|row| row.get() != "null") {
                write!(out, "  {mark}{}", row.get())?;
            }
        }
        if !self.record.omitted.is_empty() {
            write!(out, "  without {}", String::from_utf8_lossy(self.record.omitted))?;
        }
        if self.record.commit.is_some() {
            write!(out, "  ;")?;
        }
        writeln!(out)
    }

    fn json(&self, out: &mut impl Write) -> std::io::Result<()> {
        #[derive(Serialize)]
        struct Json<'a> {
            offset: i64,
            position: Option<Position>,
            #[serde(skip_serializing_if = "Option::is_none")]
            xid: Option<u32>,
            #[serde(skip_serializing_if = "Option::is_none")]
            commit: Option<Lsn>,
            key: Option<&'a RawValue>,
            value: Option<&'a RawValue>,
            #[serde(skip_serializing_if = "Option::is_none")]
            unchanged: Option<&'a RawValue>,
            #[serde(skip_serializing_if = "Option::is_none")]
            omitted: Option<&'a RawValue>,
            #[serde(skip_serializing_if = "Option::is_none")]
            problem: Option<&'a str>,
        }
        let LogRecord { offset, position, xid, commit, key, value, unchanged, omitted, .. } = self.record;
        let raw = |bytes: &'a [u8]| serde_json::from_slice(bytes).ok();
        let problem = self.envelope.as_ref().err().map(String::as_str);
        let (key, value, unchanged, omitted) = (raw(key), raw(value), raw(unchanged), raw(omitted));
        let json = Json { offset, position, xid, commit, key, value, unchanged, omitted, problem };
        serde_json::to_writer(&mut *out, &json)?;
        writeln!(out)
    }
}
