//! The broker's limit: the very records that the reader made, again, by a producer that does nothing else.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, Message, OwnedHeaders, OwnedMessage};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rdkafka::{ClientConfig, Timestamp};
use testkit::services::Kafka;

use crate::measure::{Sample, within};
use crate::sides::{self, PATIENCE, Side, is_row};

/// Bytes of a Kafka transaction: as the reader's.
const TRANSACTION_BYTES: usize = 32 << 20;
/// Records held in memory, and produced again and again.
const RECORDS_MAX: usize = 200_000;

/// Records with which a broker is warmed up, and their bytes.
const WARM_UP: (u64, usize) = (6_000_000, 1_000);

/// Produces `changes` records to `topic` as they stand in the log of a reader.
pub(crate) fn run(kafka: &Kafka, log: &str, topic: &str, round: u32, changes: u64) -> Result<Sample> {
    ensure!(
        !log.is_empty(),
        "the side `producer` repeats what a `reader` before it wrote: add `reader` to --sides"
    );
    let records = load(kafka, log)?;
    let producer = Bare::new(kafka, topic)?;
    within(kafka, Side::Producer, round, || {
        producer.transactions(records.iter().cycle().take(usize::try_from(changes)?))
    })
}

/// A new JVM compiles the broker while it works: that is not to be the cost of whoever comes first.
pub(crate) fn warm_up(kafka: &Kafka) -> Result<()> {
    const TOPIC: &str = "warm_up";
    eprintln!("warming the broker up");
    let (records, bytes) = WARM_UP;
    let value = |number: u64| {
        let word = number.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        format!("{{\"number\":{number},\"word\":\"{word:x}\",").repeat(bytes / 48).into_bytes()
    };
    let header = Header { key: "number", value: Some("0/16B3748:t:5 xid=745 schema=16384/3") };
    let record = |number: u64| {
        let headers = OwnedHeaders::new().insert(header.clone());
        let (key, now) = (number.to_string().into_bytes(), Timestamp::NotAvailable);
        OwnedMessage::new(Some(value(number)), Some(key), TOPIC.to_owned(), now, 0, 0, Some(headers))
    };
    let some: Vec<_> = (0..1_000).map(record).collect();
    Bare::new(kafka, TOPIC)?.transactions(some.iter().cycle().take(usize::try_from(records)?))?;
    let consumer = sides::consumer(kafka, TOPIC)?;
    loop {
        match consumer.poll(PATIENCE).context("the topic answers")? {
            Err(KafkaError::PartitionEOF(_)) => return Ok(()),
            record => record.map(drop)?,
        }
    }
}

/// A transactional producer with nothing around it.
struct Bare {
    topic: String,
    producer: BaseProducer,
}

impl Bare {
    fn new(kafka: &Kafka, topic: &str) -> Result<Self> {
        kafka.make_topic(topic);
        let producer: BaseProducer = ClientConfig::new()
            .set("bootstrap.servers", kafka.bootstrap())
            .set("transactional.id", topic)
            .set("compression.type", "lz4")
            .set("linger.ms", "5")
            .set("batch.size", "4194304")
            .set("batch.num.messages", "100000")
            .create()?;
        producer.init_transactions(PATIENCE)?;
        Ok(Bare { topic: topic.to_owned(), producer })
    }

    /// Produces the records in transactions as large as the reader's; gives their number.
    fn transactions<'a>(&self, records: impl Iterator<Item = &'a OwnedMessage>) -> Result<u64> {
        let (mut sent, mut bytes) = (0, 0);
        self.producer.begin_transaction()?;
        for record in records {
            if bytes >= TRANSACTION_BYTES {
                self.commit()?;
                self.producer.begin_transaction()?;
                bytes = 0;
            }
            bytes += self.send(record)?;
            sent += 1;
            if sent % 1_000 == 0 {
                self.producer.poll(Duration::ZERO);
            }
        }
        self.commit()?;
        Ok(sent)
    }

    fn send(&self, record: &OwnedMessage) -> Result<usize> {
        let (key, value) = (record.key().unwrap_or_default(), record.payload().unwrap_or_default());
        let mut outgoing = BaseRecord::to(&self.topic).partition(0).key(key).payload(value);
        outgoing.headers = record.headers().cloned();
        loop {
            match self.producer.send(outgoing) {
                Ok(()) => return Ok(key.len() + value.len()),
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), back)) => {
                    outgoing = back;
                    self.producer.poll(Duration::from_millis(1));
                }
                Err((error, _)) => bail!(error),
            }
        }
    }

    /// Polls until all is delivered, for the binding's own wait sleeps 100 ms at a time.
    fn commit(&self) -> Result<()> {
        let begun = Instant::now();
        while self.producer.in_flight_count() > 0 {
            self.producer.poll(Duration::from_millis(1));
            ensure!(begun.elapsed() < PATIENCE, "not delivered");
        }
        Ok(self.producer.commit_transaction(PATIENCE)?)
    }
}

fn load(kafka: &Kafka, log: &str) -> Result<Vec<OwnedMessage>> {
    let consumer = sides::consumer(kafka, log)?;
    let mut records = Vec::new();
    while records.len() < RECORDS_MAX {
        match consumer.poll(PATIENCE).context("the log answers")? {
            Ok(message) if is_row(&message)? => records.push(message.detach()),
            Ok(_) => {}
            Err(KafkaError::PartitionEOF(_)) => break,
            Err(error) => return Err(error.into()),
        }
    }
    ensure!(!records.is_empty(), "topic {log} has no rows");
    Ok(records)
}
