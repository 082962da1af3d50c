//! What `setup` writes: a log's first record, and what the ledger and the generations topic say before a reader runs.

use change::{LedgerEntry, Refusal, header};
use rdkafka::message::{Header, OwnedHeaders};
use relay::Ledger;

use crate::generations::{self, Generations};
use crate::ledger::require_topics;
use crate::producer::{Outgoing, Producer};
use crate::publisher::send_entry;
use crate::{Connection, KafkaError, Names, ReadUntil, read_ledger};

/// One thing that `setup` writes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SetupRecord {
    /// The log's first record, with the log's random id. Only into an empty log.
    LogHeader(String),
    /// A record of the ledger.
    Ledger(LedgerEntry),
    /// The pipeline's generations.
    Generations(Generations),
}

/// Writes to a log and its ledger as their only writer: readers and older setups are fenced.
pub struct SetupWriter {
    names: Names,
    producer: Producer,
    /// Whether the log has its first record.
    named: bool,
}

impl SetupWriter {
    /// Fences every other writer of this log, and reads its ledger to the true end.
    pub fn open(connection: &Connection, names: &Names) -> Result<(Self, Ledger), KafkaError> {
        require_topics(connection, names)?;
        let producer = Producer::start(connection, &names.transactional_id())?;
        let ledger = read_ledger(connection, names, ReadUntil::TrueEnd)?;
        let writer = SetupWriter { names: names.clone(), producer, named: ledger.log.is_some() };
        Ok((writer, ledger))
    }

    /// Writes all of it in one Kafka transaction. After an error the writer must be opened again, which tells what
    /// was written.
    pub fn write(&mut self, records: &[SetupRecord]) -> Result<(), KafkaError> {
        self.producer.begin()?;
        for record in records {
            match record {
                SetupRecord::LogHeader(id) => self.send_header(id)?,
                SetupRecord::Ledger(entry) => send_entry(&self.producer, &self.names.ledger(), entry)?,
                SetupRecord::Generations(all) => {
                    generations::send(&self.producer, self.names.pipeline(), all)?;
                }
            }
        }
        self.producer.settle()?;
        self.producer.commit()
    }

    fn send_header(&mut self, id: &str) -> Result<(), KafkaError> {
        if std::mem::replace(&mut self.named, true) {
            return Err(KafkaError::Refused(Refusal::new(
                format!("topic \"{}\" has its first record already", self.names.log()),
                "millrace status",
            )));
        }
        self.producer.send(Outgoing {
            topic: &self.names.log(),
            log: true,
            key: None,
            value: None,
            headers: Some(OwnedHeaders::new().insert(Header { key: header::LOG, value: Some(id) })),
            timestamp_ms: None,
        })
    }
}
