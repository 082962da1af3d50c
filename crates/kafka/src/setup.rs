//! What `setup` writes: a log's first record, and what the ledger and the generations topic say before a reader runs.

use change::{LedgerEntry, Refusal, header};
use relay::Ledger;

use crate::generations::{self, Generations};
use crate::ledger::{read_ledger_to, require_topics};
use crate::producer::{Producer, Turns};
use crate::publisher::{add_entry, add_now};
use crate::{Connection, KafkaError, Names};

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
        let mut producers = Turns::start(connection, names)?;
        let written = producers.probe(&names.ledger())?;
        let ledger = read_ledger_to(connection, names, written)?;
        let producer = producers.into_first();
        let writer = SetupWriter { names: names.clone(), producer, named: ledger.log.is_some() };
        Ok((writer, ledger))
    }

    /// Writes all of it in one Kafka transaction. After an error the writer must be opened again, which tells what
    /// was written.
    pub fn write(&mut self, records: &[SetupRecord]) -> Result<(), KafkaError> {
        let names = &self.names;
        for record in records {
            let mut batch = self.producer.batch();
            let topic = match record {
                SetupRecord::LogHeader(id) => {
                    if std::mem::replace(&mut self.named, true) {
                        return Err(KafkaError::Refused(Refusal::new(
                            format!("topic \"{}\" has its first record already", names.log()),
                            "millrace status",
                        )));
                    }
                    batch.header(header::LOG, id.as_bytes());
                    add_now(&mut batch, None, None);
                    names.log()
                }
                SetupRecord::Ledger(entry) => {
                    add_entry(&mut batch, entry);
                    names.ledger()
                }
                SetupRecord::Generations(all) => {
                    generations::add(&mut batch, names.pipeline(), all)?;
                    names.generations()
                }
            };
            self.producer.begin(&[&topic])?;
            self.producer.send([(&topic, batch)])?;
        }
        self.producer.settle()?;
        self.producer.commit()
    }
}
