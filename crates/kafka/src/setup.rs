//! What `setup` writes: a log's first record, and what the ledger and the generations topic say before a reader runs.

use std::ops::ControlFlow;

use change::{LedgerEntry, Refusal, header};
use rdkafka::message::{Header, Message, OwnedHeaders};
use relay::Ledger;
use serde::{Deserialize, Serialize};

use crate::ledger::{require_topics, topic_exists};
use crate::producer::{Outgoing, Producer};
use crate::publisher::send_entry;
use crate::reader::PartitionReader;
use crate::{Connection, KafkaError, Names, ReadUntil, read_ledger};

/// Key of the one record of the generations topic.
const CURRENT: &str = "current";
/// The format of its value that this version writes, and the newest that it reads.
const FORMAT: u32 = 1;

/// One thing that `setup` writes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SetupRecord {
    /// The log's first record, with the log's random id. Only into an empty log.
    LogHeader(String),
    /// A record of the ledger.
    Ledger(LedgerEntry),
    /// This generation is the pipeline's current one.
    CurrentGeneration,
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
        let producer = Producer::start(connection, names)?;
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
                SetupRecord::CurrentGeneration => self.send_generation()?,
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

    fn send_generation(&self) -> Result<(), KafkaError> {
        let current = Current { format: FORMAT, generation: self.names.generation(), log: self.names.log() };
        let value = serde_json::to_vec(&current).expect("a plain structure becomes JSON");
        self.producer.send(Outgoing {
            topic: &self.names.generations(),
            log: false,
            key: Some(CURRENT.as_bytes()),
            value: Some(&value),
            headers: None,
            timestamp_ms: None,
        })
    }
}

#[derive(Serialize, Deserialize)]
struct Current {
    format: u32,
    generation: u32,
    log: String,
}

/// The pipeline's current generation; `None` when `setup` has not made one.
pub fn current_generation(connection: &Connection, pipeline: &str) -> Result<Option<u32>, KafkaError> {
    let names = Names::new(pipeline, 1)?;
    if !topic_exists(&connection.inquirer()?, &names.generations(), connection.outage())? {
        return Ok(None);
    }
    let mut reader = PartitionReader::new(connection, &names, names.generations())?;
    let mut generation = None;
    reader.read_all(reader.bounds()?, |message| {
        if message.key() == Some(CURRENT.as_bytes()) {
            generation = Some(decode(message.topic(), message.payload().unwrap_or_default())?);
        }
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(generation)
}

fn decode(topic: &str, value: &[u8]) -> Result<u32, KafkaError> {
    let refuse = |what: String, remedy: &str| {
        KafkaError::Refused(Refusal::new(format!("topic \"{topic}\", record `{CURRENT}`: {what}"), remedy))
    };
    let current: Current = serde_json::from_slice(value)
        .map_err(|error| refuse(format!("cannot be read: {error}"), "was it written by something else?"))?;
    if current.format > FORMAT {
        let what = format!("format {}, of which this Millrace reads up to {FORMAT}", current.format);
        return Err(refuse(what, "run a Millrace at least as new as the one that wrote it"));
    }
    Ok(current.generation)
}
