use change::{LedgerEntry, Progress, RecordBatch, RecordRef};
use rdkafka::message::{Header, OwnedHeaders};
use relay::{Ledger, PublishError, Publisher};

use crate::ledger::require_topics;
use crate::producer::{Outgoing, Producer};
use crate::{Connection, KafkaError, Names, ReadUntil, read_ledger};

/// The log's only writer.
///
/// A Kafka transaction holds records of the log and, last, the ledger's progress. [`Publisher::open`] fences every
/// older publisher before it reads the ledger, so nobody can write what it does not see.
pub struct KafkaPublisher {
    connection: Connection,
    names: Names,
    log: String,
    ledger: String,
    producer: Option<Producer>,
    /// Offset after the log's last committed data record.
    log_end: i64,
    /// Offset that the first record of the open transaction is expected to have, and how many were sent.
    first: i64,
    sent: i64,
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
            producer: None,
            log_end: 0,
            first: 0,
            sent: 0,
            scratch: Vec::new(),
        }
    }

    fn send_all(&mut self, batch: &RecordBatch, count: usize) -> Result<(), KafkaError> {
        let producer = opened(&mut self.producer)?;
        producer.begin()?;
        // librdkafka has one request of a partition on its way, and polls without a pause while more is queued.
        producer.settle()?;
        for record in batch.iter().take(count) {
            producer.send(Outgoing {
                topic: &self.log,
                log: true,
                key: Some(record.key),
                value: Some(record.value),
                headers: headers(&record, &mut self.scratch),
                timestamp_ms: Some(record.meta.timestamp_ms),
            })?;
            self.sent += 1;
        }
        Ok(())
    }

    fn commit_all(&mut self, entries: &[LedgerEntry], progress: &mut Progress) -> Result<(), KafkaError> {
        let producer = opened(&mut self.producer)?;
        producer.begin()?;
        for entry in entries {
            send_entry(producer, &self.ledger, entry)?;
        }
        // The records' offsets are known before they are delivered, and looked at afterwards: the last progress counts.
        progress.log_end = if self.sent > 0 { self.first + self.sent } else { self.log_end };
        send_entry(producer, &self.ledger, &LedgerEntry::Progress(progress.clone()))?;
        producer.settle()?;
        let log_end = producer.log_end().map_or(self.log_end, |end| end.max(self.log_end));
        if progress.log_end != log_end {
            progress.log_end = log_end;
            send_entry(producer, &self.ledger, &LedgerEntry::Progress(progress.clone()))?;
            producer.settle()?;
        }
        producer.commit()?;
        if self.sent > 0 {
            // The transaction's end takes an offset.
            (self.first, self.sent) = (log_end + 1, 0);
        }
        self.log_end = log_end;
        Ok(())
    }
}

impl Publisher for KafkaPublisher {
    fn open(&mut self) -> Result<Ledger, PublishError> {
        self.producer = None;
        require_topics(&self.connection, &self.names)?;
        let producer = Producer::start(&self.connection, &self.names.transactional_id())?;
        let ledger = read_ledger(&self.connection, &self.names, ReadUntil::TrueEnd)?;
        let header_end = i64::from(ledger.log.is_some());
        self.log_end = ledger.progress.as_ref().map_or(header_end, |progress| progress.log_end);
        (self.first, self.sent) = (ledger.log_end, 0);
        self.producer = Some(producer);
        Ok(ledger)
    }

    fn idle(&self) -> bool {
        self.producer.as_ref().is_none_or(Producer::idle)
    }

    fn send(&mut self, batch: &RecordBatch, count: usize) -> Result<(), PublishError> {
        Ok(self.send_all(batch, count)?)
    }

    fn commit(&mut self, entries: &[LedgerEntry], progress: &mut Progress) -> Result<(), PublishError> {
        Ok(self.commit_all(entries, progress)?)
    }
}

fn opened(producer: &mut Option<Producer>) -> Result<&mut Producer, KafkaError> {
    producer.as_mut().ok_or_else(|| KafkaError::Unavailable("the publisher is not open".into()))
}

/// Hands a ledger record to an open transaction.
pub(crate) fn send_entry(producer: &Producer, topic: &str, entry: &LedgerEntry) -> Result<(), KafkaError> {
    producer.send(Outgoing {
        topic,
        log: false,
        key: Some(entry.key().as_bytes()),
        value: Some(&entry.value()),
        headers: None,
        timestamp_ms: None,
    })
}

fn headers(record: &RecordRef<'_>, scratch: &mut Vec<u8>) -> Option<OwnedHeaders> {
    let mut headers = Some(OwnedHeaders::new_with_capacity(1));
    record.headers(scratch, |name, value| {
        headers = headers.take().map(|headers| headers.insert(Header { key: name, value: Some(value) }));
    });
    headers
}
