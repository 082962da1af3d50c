//! Reads a ledger, and what of the log the ledger speaks about.
//!
//! After older publishers were fenced, the ledger must be read to its *true* end: a committed record may stand
//! behind another producer's open transaction, and a reader of committed records then sees the partition end
//! before it, without any sign of it (h03). So the true end is asked for first (as `read_uncommitted`), then the
//! stable end must reach it, and only then does "nothing more is committed" mean that all has been read.

use std::ops::ControlFlow;
use std::time::Duration;

use change::{Headers, LedgerEntry, LedgerError, NEW_LOG, Refusal, SchemaRef, header};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::message::{BorrowedMessage, Headers as _, Message};
use relay::Ledger;

use crate::connection::Reports;
use crate::reader::{PartitionReader, watermarks};
use crate::{Connection, KafkaError, Names};

/// How often the stable end is asked for while it has to move.
const LOOK: Duration = Duration::from_millis(50);

/// A client that does not see what should be there is replaced by a new one after this time.
const NEW_CLIENT: Duration = Duration::from_secs(1);
/// A log that ends before where the ledger says for this long has lost records.
const LOST_AFTER: Duration = Duration::from_secs(10);

/// How far [`read_ledger`] reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReadUntil {
    /// Whatever is committed now; for those who only look.
    Committed,
    /// The end of what was ever written, waiting for open transactions to end. Refuses when one does not.
    TrueEnd,
}

/// Reads the ledger and the log's id and end. Takes part in nothing and fences nobody.
pub fn read_ledger(connection: &Connection, names: &Names, until: ReadUntil) -> Result<Ledger, KafkaError> {
    read_ledger_in_order(connection, names, until).map(|(ledger, _)| ledger)
}

/// Reads the ledger to its true end, which is not before `written`: a record there was [written](crate::producer::Turns::probe)
/// by the caller. For whoever has fenced the older writers and goes on from what it reads.
pub(crate) fn read_ledger_to(
    connection: &Connection,
    names: &Names,
    written: i64,
) -> Result<Ledger, KafkaError> {
    read(connection, names, Some(written)).map(|(ledger, _)| ledger)
}

/// The same, and the versions of tables in the order in which the ledger has them.
pub(crate) fn read_ledger_in_order(
    connection: &Connection,
    names: &Names,
    until: ReadUntil,
) -> Result<(Ledger, Vec<SchemaRef>), KafkaError> {
    read(connection, names, (until == ReadUntil::TrueEnd).then_some(0))
}

/// Where `written` is there, reads to the true end, which is not before it.
fn read(
    connection: &Connection,
    names: &Names,
    written: Option<i64>,
) -> Result<(Ledger, Vec<SchemaRef>), KafkaError> {
    require_topics(connection, names)?;
    let (mut reader, log) = match written {
        Some(written) => {
            let reader = stable_reader(connection, names, names.ledger(), written)?;
            (reader, stable_reader(connection, names, names.log(), 0)?)
        }
        None => (
            PartitionReader::new(connection, names, names.ledger())?,
            PartitionReader::new(connection, names, names.log())?,
        ),
    };
    let (mut ledger, mut order) = (Ledger::default(), Vec::new());
    reader.read_all(reader.bounds()?, |message| {
        match entry(message)? {
            Some(LedgerEntry::Progress(progress)) => ledger.progress = Some(progress),
            Some(LedgerEntry::Slot(intent)) => ledger.slot = Some(intent),
            Some(LedgerEntry::Schema(version, schema)) => {
                ledger.schemas.insert(version, schema);
                order.push(version);
            }
            Some(LedgerEntry::Table(relation, table)) => {
                ledger.tables.insert(relation, table);
            }
            None => {}
        }
        Ok(ControlFlow::Continue(()))
    })?;
    // After the ledger, so that the log's end is never before the one that the ledger tells.
    let told = ledger.progress.as_ref().map_or(0, |progress| progress.log_end);
    // Whoever only looks need not wait.
    let told = written.map_or(0, |_| told);
    (ledger.log_end, ledger.data_end) = ends(connection, names, told)?;
    let bounds = log.bounds()?;
    ledger.log = log_id(log, bounds)?.or_else(|| {
        // Retention has taken the log's first record; a topic created anew would begin at 0.
        ledger.progress.as_ref().filter(|_| bounds.0 > 0).map(|progress| progress.log.clone())
    });
    Ok((ledger, order))
}

/// The log's end, and that of its committed records, which should not be before the one in the ledger. If they are,
/// records were lost, or the broker that answered is no longer the log's leader. The log can be as long as it should be
/// and lack records: when a broker loses the end of a transaction, the transaction may be aborted, which adds an offset.
fn ends(connection: &Connection, names: &Names, expected: i64) -> Result<(i64, Option<i64>), KafkaError> {
    let mut waited = Duration::ZERO;
    loop {
        // New clients each time, as they may have turned to the wrong broker.
        let end = watermarks(&connection.inquirer()?, &names.log(), connection.outage())?.1;
        let data_end = match expected {
            0 => None,
            _ => Some(data_end(PartitionReader::new(connection, names, names.log())?, expected)?),
        };
        if end.min(data_end.unwrap_or(end)) >= expected || waited >= LOST_AFTER {
            return Ok((end, data_end));
        }
        std::thread::sleep(NEW_CLIENT);
        waited += NEW_CLIENT;
    }
}

/// Offset after the log's last committed record of ours. Before `expected` nothing but the last record is looked for;
/// without it the end is before `expected`.
fn data_end(mut log: PartitionReader, expected: i64) -> Result<i64, KafkaError> {
    let (start, stable) = log.bounds()?;
    // What retention has removed was there.
    let mut end = if start >= expected { expected } else { expected - 1 };
    log.read_all((start.max(expected - 1), stable), |message| {
        if is_ours(message) {
            end = message.offset() + 1;
        }
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(end)
}

/// True for a change, and for the record that names the log.
fn is_ours(message: &BorrowedMessage<'_>) -> bool {
    let Some(headers) = message.headers() else { return false };
    headers.iter().any(|header| [header::POSITION, header::LOG].contains(&header.key))
}

/// A reader of a topic, which sees its true end. That is not before `written`.
///
/// The same client has to be used for reading: another one may ask a broker that is no longer the topic's leader. For the
/// same reason a client that does not see the end is replaced now and then.
fn stable_reader(
    connection: &Connection,
    names: &Names,
    topic: String,
    written: i64,
) -> Result<PartitionReader, KafkaError> {
    let limit = connection.outage();
    let end = watermarks(&connection.inquirer()?, &topic, limit)?.1.max(written);
    let mut reader = PartitionReader::new(connection, names, topic)?;
    // Looks are counted, not time: a process that was frozen has not looked meanwhile.
    let (mut waited, mut replaced) = (Duration::ZERO, Duration::ZERO);
    loop {
        let stable = reader.bounds()?.1;
        if stable >= end {
            return Ok(reader);
        }
        if waited >= limit {
            return Err(KafkaError::Refused(hidden(reader.topic(), (stable, end), limit)));
        }
        std::thread::sleep(LOOK);
        waited += LOOK;
        if waited - replaced >= NEW_CLIENT {
            replaced = waited;
            reader = PartitionReader::new(connection, names, reader.topic().to_owned())?;
        }
    }
}

/// Another producer's transaction hides the records from `stable` to `end`.
fn hidden(topic: &str, (stable, end): (i64, i64), limit: Duration) -> Refusal {
    Refusal::new(
        format!(
            "topic \"{topic}\" has records up to {end}, of which those from {stable} on are hidden by an open \
             transaction of another producer, for {limit:?} now"
        ),
        format!(
            "find it and abort it: kafka-transactions.sh --bootstrap-server BROKER describe-producers \
             --topic {topic} --partition 0, then abort --topic {topic} --partition 0 --start-offset {stable}; \
             only Millrace may write to this topic"
        ),
    )
}

/// The entry in a record of the ledger; `None` for a tombstone, which this version does not write.
pub(crate) fn entry(message: &BorrowedMessage<'_>) -> Result<Option<LedgerEntry>, KafkaError> {
    let (Some(key), Some(value)) = (message.key(), message.payload()) else { return Ok(None) };
    LedgerEntry::decode(key, value).map(Some).map_err(|error| {
        let place = format!("topic \"{}\", offset {}: {error}", message.topic(), message.offset());
        let remedy = match error {
            LedgerError::Newer { .. } => "run a Millrace at least as new as the one that wrote it",
            LedgerError::Malformed { .. } => NEW_LOG,
        };
        KafkaError::Refused(Refusal::new(place, remedy))
    })
}

/// The id in the log's first committed record; `None` when there is none, or it is gone.
///
/// That record is record 0, but for a `setup` that was killed in its transaction: the aborted attempt keeps its
/// offset.
fn log_id(mut log: PartitionReader, bounds: (i64, i64)) -> Result<Option<String>, KafkaError> {
    let mut id = None;
    log.read_all(bounds, |first| {
        id = named(first, bounds.0)?;
        Ok(ControlFlow::Break(()))
    })?;
    Ok(id)
}

fn named(first: &BorrowedMessage<'_>, start: i64) -> Result<Option<String>, KafkaError> {
    let mut headers = Headers::default();
    let readable = first.headers().is_none_or(|all| {
        all.iter().all(|header| headers.read(header.key, header.value.unwrap_or_default()).is_ok())
    });
    match headers.log {
        Some(id) if readable => Ok(Some(id.to_owned())),
        _ if start > 0 => Ok(None),
        _ => Err(KafkaError::Refused(Refusal::new(
            format!(
                "topic \"{}\" does not begin with the record that names a log of Millrace",
                first.topic()
            ),
            format!("if nobody else uses this topic, {NEW_LOG}"),
        ))),
    }
}

/// Refuses unless the log and the ledger exist.
pub(crate) fn require_topics(connection: &Connection, names: &Names) -> Result<(), KafkaError> {
    let inquirer = connection.inquirer()?;
    let (log, ledger) = (names.log(), names.ledger());
    let timeout = connection.outage();
    let missing = |topic: &str| topic_exists(&inquirer, topic, timeout).map(|exists| !exists);
    let used = |topic: &str| watermarks(&inquirer, topic, timeout).map(|(_, end)| end > 0);
    let (what, was_used) = match (missing(&log)?, missing(&ledger)?) {
        (false, false) => return Ok(()),
        (true, true) => (format!("topics \"{log}\" and \"{ledger}\" do not exist"), false),
        (true, false) => (format!("topic \"{log}\" does not exist, its ledger does"), used(&ledger)?),
        (false, true) => (format!("topic \"{ledger}\" does not exist, its log does"), used(&log)?),
    };
    let remedy = if was_used { NEW_LOG } else { "millrace setup" };
    Err(KafkaError::Refused(Refusal::new(what, remedy)))
}

/// Whether the brokers know a topic.
pub(crate) fn topic_exists(
    inquirer: &BaseConsumer<Reports>,
    topic: &str,
    timeout: Duration,
) -> Result<bool, KafkaError> {
    let doing = format!("cannot ask about topic \"{topic}\"");
    let metadata = inquirer
        .fetch_metadata(Some(topic), timeout)
        .map_err(|error| KafkaError::of(&doing, &error).with_report(inquirer.context()))?;
    let found = metadata.topics().iter().find(|found| found.name() == topic);
    match found.and_then(|found| found.error()).map(RDKafkaErrorCode::from) {
        None => Ok(found.is_some_and(|found| !found.partitions().is_empty())),
        Some(RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic) => Ok(false),
        Some(code) => Err(KafkaError::of(&doing, &rdkafka::error::KafkaError::MetadataFetch(code))),
    }
}
