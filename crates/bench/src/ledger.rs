//! How far a reader is, from its ledger. A log message would do for one build only: another may word it differently.

use std::time::Duration;

use anyhow::Result;
use change::{Lsn, Progress};
use rdkafka::consumer::BaseConsumer;
use rdkafka::error::KafkaError;
use rdkafka::message::Message;
use testkit::services::Kafka;

use crate::sides;

/// The ledger of a log, read from its beginning.
pub(crate) struct Ledger {
    consumer: BaseConsumer,
}

impl Ledger {
    /// The ledger of the log in the topic `log`.
    pub(crate) fn of(kafka: &Kafka, log: &str) -> Result<Ledger> {
        Ok(Ledger { consumer: sides::consumer(kafka, &format!("{log}.ledger"))? })
    }

    /// True once a progress record has reached `head`; without one, once the snapshot is complete.
    pub(crate) fn has_reached(&self, head: Option<Lsn>) -> Result<bool> {
        while let Some(record) = self.consumer.poll(Duration::ZERO) {
            let record = match record {
                Err(KafkaError::PartitionEOF(_)) => break,
                record => record?,
            };
            if record.key() != Some(b"progress") {
                continue;
            }
            let progress: Progress = serde_json::from_slice(record.payload().unwrap_or_default())?;
            if head.map_or(progress.snapshot.is_none(), |head| progress.end_lsn >= head) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
