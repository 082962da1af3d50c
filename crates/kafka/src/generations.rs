//! The generations topic: which log of a pipeline is current, and which is to take its place.
//!
//! One record, under the key `current`; other programs may read it as well:
//!
//! ```json
//! {"format":1, "generation":1, "log":"millrace.mailbox.1",
//!  "next":{"generation":2, "log":"millrace.mailbox.2"}}
//! ```
//!
//! `next` is there while stores are being built from a log that will be the current one. A consumer of its own can do as
//! Millrace's workers do: read the next log from its beginning, and go over to it when it has come as far (by LSN).
//!
//! The topic's other records are requests to the workers: see `skips.rs`.

use std::ops::ControlFlow;

use change::Refusal;
use rdkafka::message::{BorrowedMessage, Message};
use serde::{Deserialize, Serialize};

use crate::ledger::topic_exists;
use crate::producer::Producer;
use crate::publisher::add_now;
use crate::reader::PartitionReader;
use crate::skips::{self, Skip};
use crate::wire::batch::Batch;
use crate::{Connection, KafkaError, Names};

/// Key of the one record of the generations topic.
const CURRENT: &str = "current";
/// The format of its value that this version writes, and the newest that it reads.
const FORMAT: u32 = 1;

/// The logs of a pipeline that are of use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Generations {
    /// The log that is read.
    pub current: Generation,
    /// The log that is being filled, and from which the stores are being built, to be the current one.
    pub next: Option<Generation>,
}

/// One log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Generation {
    /// Its number, from 1.
    pub number: u32,
    /// Whether the source's history is another one than that of the logs before (it was restored to an earlier point, or
    /// is another server): their LSNs mean nothing in this one.
    pub diverged: bool,
}

impl Generation {
    /// One that goes on where the logs before were.
    pub fn new(number: u32) -> Self {
        Generation { number, diverged: false }
    }
}

impl Generations {
    /// Of a pipeline that has one log.
    pub fn of(current: Generation) -> Self {
        Generations { current, next: None }
    }

    /// The newest log, from which stores are built.
    pub fn newest(&self) -> Generation {
        self.next.unwrap_or(self.current)
    }

    /// The log of this number, if it is of use.
    pub fn get(&self, number: u32) -> Option<Generation> {
        [Some(self.current), self.next].into_iter().flatten().find(|generation| generation.number == number)
    }
}

#[derive(Serialize, Deserialize)]
struct Current {
    format: u32,
    #[serde(flatten)]
    log: Log,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    next: Option<Log>,
}

#[derive(Serialize, Deserialize)]
struct Log {
    generation: u32,
    log: String,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    diverged: bool,
}

/// Adds the record to a batch for the generations topic.
pub(crate) fn add(batch: &mut Batch, pipeline: &str, generations: &Generations) -> Result<(), KafkaError> {
    let log = |of: Generation| {
        let log = Names::new(pipeline, of.number)?.log();
        Ok::<_, Refusal>(Log { generation: of.number, log, diverged: of.diverged })
    };
    let next = generations.next.map(log).transpose()?;
    let current = Current { format: FORMAT, log: log(generations.current)?, next };
    let value = serde_json::to_vec(&current).expect("a plain structure becomes JSON");
    add_now(batch, Some(CURRENT.as_bytes()), Some(&value));
    Ok(())
}

/// Writes the record. The caller sees to it that nobody else does.
pub fn write_generations(
    connection: &Connection,
    pipeline: &str,
    generations: &Generations,
) -> Result<(), KafkaError> {
    let topic = Names::new(pipeline, generations.current.number)?.generations();
    write(connection, &topic, &topic, |batch| add(batch, pipeline, generations))
}

/// Writes a batch into the topic, in a transaction of its own under this `transactional.id`.
pub(crate) fn write(
    connection: &Connection,
    transactional_id: &str,
    topic: &str,
    fill: impl FnOnce(&mut Batch) -> Result<(), KafkaError>,
) -> Result<(), KafkaError> {
    let mut producer = Producer::start(connection, transactional_id)?;
    let mut batch = producer.batch();
    fill(&mut batch)?;
    producer.begin(&[topic])?;
    producer.send([(topic, batch)])?;
    producer.settle()?;
    producer.commit()
}

/// The pipeline's generations; `None` when `setup` has not made one.
pub fn generations(connection: &Connection, pipeline: &str) -> Result<Option<Generations>, KafkaError> {
    Ok(state(connection, pipeline)?.map(|(generations, _)| generations))
}

/// The same, and the records that stores are to leave out.
pub fn state(
    connection: &Connection,
    pipeline: &str,
) -> Result<Option<(Generations, Vec<Skip>)>, KafkaError> {
    let names = Names::new(pipeline, 1)?;
    if !topic_exists(&connection.inquirer()?, &names.generations(), connection.outage())? {
        return Ok(None);
    }
    let mut reader = PartitionReader::new(connection, &names, names.generations())?;
    let bounds = reader.bounds()?;
    let (generations, skips) = read(&mut reader, bounds)?;
    Ok(generations.map(|generations| (generations, skips)))
}

fn read(
    reader: &mut PartitionReader,
    bounds: (i64, i64),
) -> Result<(Option<Generations>, Vec<Skip>), KafkaError> {
    let (mut found, mut skips) = (None, Vec::new());
    reader.read_all(bounds, |message| {
        found = decode(message)?.or(found.take());
        if let Some(skip) = skips::decode(message) {
            skips::take_in(&mut skips, skip);
        }
        Ok(ControlFlow::Continue(()))
    })?;
    Ok((found, skips))
}

/// Follows the generations topic.
pub struct GenerationsWatch {
    reader: PartitionReader,
    end: i64,
    known: Generations,
    skips: Vec<Skip>,
}

impl GenerationsWatch {
    /// Reads what the topic holds now; refused where the pipeline has no log.
    pub fn new(connection: &Connection, pipeline: &str) -> Result<Self, KafkaError> {
        let names = Names::new(pipeline, 1)?;
        let (known, skips) = state(connection, pipeline)?.ok_or_else(|| not_set_up(pipeline))?;
        let reader = PartitionReader::new(connection, &names, names.generations())?;
        Ok(GenerationsWatch { reader, end: 0, known, skips })
    }

    /// What the topic says. Asks the brokers for its end only, unless that has moved.
    pub fn look(&mut self) -> Result<Generations, KafkaError> {
        let bounds = self.reader.bounds()?;
        if bounds.1 != self.end {
            let (known, skips) = read(&mut self.reader, bounds)?;
            self.known = known.unwrap_or(self.known);
            self.skips = skips;
            self.reader.rest()?;
            self.end = bounds.1;
        }
        Ok(self.known)
    }

    /// The records that stores are to leave out, as of the last look.
    pub fn skips(&self) -> &[Skip] {
        &self.skips
    }
}

/// The refusal where there is no log.
pub fn not_set_up(pipeline: &str) -> Refusal {
    Refusal::new(format!("pipeline {pipeline} is not set up"), "millrace setup")
}

fn decode(message: &BorrowedMessage<'_>) -> Result<Option<Generations>, KafkaError> {
    if message.key() != Some(CURRENT.as_bytes()) {
        return Ok(None);
    }
    let refuse = |what: String, remedy: &str| {
        let place = format!("topic \"{}\", record `{CURRENT}`: {what}", message.topic());
        KafkaError::Refused(Refusal::new(place, remedy))
    };
    let current: Current = serde_json::from_slice(message.payload().unwrap_or_default())
        .map_err(|error| refuse(format!("cannot be read: {error}"), "was it written by something else?"))?;
    if current.format > FORMAT {
        let what = format!("format {}, of which this Millrace reads up to {FORMAT}", current.format);
        return Err(refuse(what, "run a Millrace at least as new as the one that wrote it"));
    }
    let generation = |log: Log| Generation { number: log.generation, diverged: log.diverged };
    Ok(Some(Generations { current: generation(current.log), next: current.next.map(generation) }))
}
