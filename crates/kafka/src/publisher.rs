use std::time::{SystemTime, UNIX_EPOCH};

use change::{LedgerEntry, Progress, RecordBatch};
use relay::{Ledger, PublishError, Publisher};

use crate::ledger::{read_ledger_to, require_topics};
use crate::producer::Turns;
use crate::topics::record_max;
use crate::wire::batch::{Batch, Record};
use crate::{Connection, KafkaError, Names};

/// Bytes of keys and values after which a batch ends, but for a record that is larger: readers take a batch as a whole. The
/// log's limit may be lower.
const BATCH_LEN: usize = 1 << 20;

/// The log's only writer.
///
/// A Kafka transaction holds records of the log and, last, the ledger's progress. [`Publisher::open`] fences every
/// older publisher before it reads the ledger, so nobody can write what it does not see.
pub struct KafkaPublisher {
    connection: Connection,
    names: Names,
    log: String,
    ledger: String,
    producers: Option<Turns>,
    /// Largest record that the log takes, once that was asked for.
    record_max: Option<usize>,
    /// Offset after the log's last committed data record.
    log_end: i64,
    /// Offset that the open transaction's first record has if every transaction before it has ended in the log, whether the
    /// last is expected to end behind this one's records instead, and how many of them were sent.
    first: i64,
    overlap: bool,
    sent: i64,
    /// The last records of the open transaction, which may go to the broker together with the ledger's.
    held: Option<Batch>,
    scratch: Vec<u8>,
}

impl KafkaPublisher {
    /// A publisher that has not contacted the brokers yet.
    pub fn new(connection: Connection, names: Names) -> Self {
        let (log, ledger) = (names.log(), names.ledger());
        KafkaPublisher {
            connection,
            names,
            log,
            ledger,
            producers: None,
            record_max: None,
            log_end: 0,
            first: 0,
            overlap: false,
            sent: 0,
            held: None,
            scratch: Vec::new(),
        }
    }

    /// Appends records and has all of them on their way, without a commit that would do so.
    pub fn send(&mut self, records: &RecordBatch, count: usize) -> Result<(), PublishError> {
        self.append_all(records, count)?;
        if let Some(batch) = self.held.take() {
            opened(&mut self.producers)?.producer().send([(&self.log, batch)])?;
        }
        Ok(())
    }

    /// Adds the records to the batch that is held, and sends it whenever it is full.
    fn append_all(&mut self, records: &RecordBatch, count: usize) -> Result<(), KafkaError> {
        let producer = opened(&mut self.producers)?.producer();
        producer.begin(&[&self.log, &self.ledger])?;
        let mut batch = self.held.take().unwrap_or_else(|| producer.batch());
        // Half, for records have headers too.
        let batch_len = self.record_max.map_or(BATCH_LEN, |max| BATCH_LEN.min(max / 2));
        for record in records.iter().take(count) {
            if !batch.is_empty() && batch.len() + record.key.len() + record.value.len() > batch_len {
                producer.send([(&self.log, std::mem::replace(&mut batch, producer.batch()))])?;
            }
            record.headers(&mut self.scratch, |name, value| batch.header(name, value));
            batch.push(&Record {
                key: Some(record.key),
                value: Some(record.value),
                timestamp_ms: record.meta.timestamp_ms,
            });
        }
        self.sent += count as i64;
        self.held = Some(batch).filter(|batch| !batch.is_empty());
        Ok(())
    }

    fn commit_all(&mut self, entries: &[LedgerEntry], progress: &mut Progress) -> Result<(), KafkaError> {
        let turns = opened(&mut self.producers)?;
        let producer = turns.producer();
        producer.begin(&[&self.ledger])?;
        // The records' offsets are known before they are delivered, and looked at afterwards: the last progress counts.
        let end = self.first + self.sent;
        progress.log_end = if self.sent > 0 { end - i64::from(self.overlap) } else { self.log_end };
        let mut batch = producer.batch();
        for entry in entries {
            add_entry(&mut batch, entry);
            if batch.len() > BATCH_LEN {
                producer.send([(&self.ledger, std::mem::replace(&mut batch, producer.batch()))])?;
            }
        }
        add_entry(&mut batch, &LedgerEntry::Progress(progress.clone()));
        match self.held.take() {
            Some(held) => producer.send([(&self.log, held), (&self.ledger, batch)])?,
            None => producer.send([(&self.ledger, batch)])?,
        }
        producer.settle()?;
        let log_end = producer.written_end(&self.log).map_or(self.log_end, |end| end.max(self.log_end));
        if progress.log_end != log_end {
            progress.log_end = log_end;
            let mut batch = producer.batch();
            add_entry(&mut batch, &LedgerEntry::Progress(progress.clone()));
            producer.send([(&self.ledger, batch)])?;
            producer.settle()?;
        }
        turns.commit()?;
        if self.sent > 0 {
            self.overlap = log_end + 1 == end;
            // The transaction's end takes an offset, and that of the last one where it comes behind.
            (self.first, self.sent) = (log_end + 1 + i64::from(self.overlap), 0);
        }
        self.log_end = log_end;
        Ok(())
    }
}

impl Publisher for KafkaPublisher {
    fn open(&mut self) -> Result<Ledger, PublishError> {
        (self.producers, self.held) = (None, None);
        require_topics(&self.connection, &self.names)?;
        let mut producers = Turns::start(&self.connection, &self.names)?;
        let written = producers.probe(&self.ledger)?;
        let ledger = read_ledger_to(&self.connection, &self.names, written)?;
        let header_end = i64::from(ledger.log.is_some());
        self.log_end = ledger.progress.as_ref().map_or(header_end, |progress| progress.log_end);
        (self.first, self.overlap, self.sent) = (ledger.log_end, false, 0);
        self.producers = Some(producers);
        Ok(ledger)
    }

    fn record_max(&mut self) -> Result<Option<usize>, PublishError> {
        if self.record_max.is_none() {
            self.record_max = record_max(&self.connection, &self.names)?;
        }
        Ok(self.record_max)
    }

    fn begin(&mut self) -> Result<(), PublishError> {
        // The ledger's record comes with the commit; the coordinator is told of both at once.
        Ok(opened(&mut self.producers)?.producer().begin(&[&self.log, &self.ledger])?)
    }

    fn ready(&mut self) -> bool {
        self.producers.as_mut().is_none_or(|turns| turns.producer().ready())
    }

    fn append(&mut self, records: &RecordBatch, count: usize) -> Result<(), PublishError> {
        Ok(self.append_all(records, count)?)
    }

    fn commit(&mut self, entries: &[LedgerEntry], progress: &mut Progress) -> Result<(), PublishError> {
        Ok(self.commit_all(entries, progress)?)
    }

    fn confirm(&mut self) -> Result<(), PublishError> {
        let ledger = &self.ledger;
        Ok(self.producers.as_mut().map_or(Ok(()), |turns| turns.confirm(ledger))?)
    }
}

fn opened(producers: &mut Option<Turns>) -> Result<&mut Turns, KafkaError> {
    producers.as_mut().ok_or_else(|| KafkaError::Unavailable("the publisher is not open".into()))
}

/// Adds a ledger record.
pub(crate) fn add_entry(batch: &mut Batch, entry: &LedgerEntry) {
    add_now(batch, Some(entry.key().as_bytes()), Some(&entry.value()));
}

/// Adds a record of this moment.
pub(crate) fn add_now(batch: &mut Batch, key: Option<&[u8]>, value: Option<&[u8]>) {
    batch.push(&Record { key, value, timestamp_ms: now_ms() });
}

/// Milliseconds since the epoch.
pub(crate) fn now_ms() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_millis()).unwrap_or(i64::MAX)
}
