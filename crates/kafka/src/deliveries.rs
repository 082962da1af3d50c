//! What became of the records handed to librdkafka: written by its polling thread, read by the publisher's.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use change::Refusal;
use rdkafka::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::{KafkaError as ClientError, RDKafkaErrorCode as Code};
use rdkafka::message::Message;
use rdkafka::producer::{DeliveryResult, ProducerContext};

use crate::KafkaError;
use crate::connection::Reports;

/// Bytes of a key that an error message shows.
const KEY_SHOWN_LEN: usize = 200;

/// Marks a record of the log, so that its offset counts.
pub(crate) const LOG: usize = 1;
/// Marks a record of any other topic.
pub(crate) const OTHER: usize = 0;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Deliveries {
    pub(crate) reports: Reports,
    outstanding: AtomicU64,
    /// Offset after the log's last delivered record; 0 for none yet.
    log_end: AtomicI64,
    /// The first record that was not delivered, or whose place is unknown.
    failure: Mutex<Option<KafkaError>>,
    moved: Condvar,
}

impl Deliveries {
    /// One more record is on its way. Called before it is handed over, so that its report cannot come first.
    pub(crate) fn sent(&self) {
        self.outstanding.fetch_add(1, Ordering::AcqRel);
    }

    /// The record was not handed over after all.
    pub(crate) fn unsent(&self) {
        self.outstanding.fetch_sub(1, Ordering::AcqRel);
    }

    pub(crate) fn outstanding(&self) -> u64 {
        self.outstanding.load(Ordering::Acquire)
    }

    pub(crate) fn log_end(&self) -> i64 {
        self.log_end.load(Ordering::Acquire)
    }

    pub(crate) fn take_failure(&self) -> Option<KafkaError> {
        self.failure().take()
    }

    /// Waits until reports have brought `outstanding` to 0, at most for `timeout`.
    pub(crate) fn wait(&self, timeout: Duration) {
        let guard = self.failure();
        if self.outstanding() > 0 {
            // Whether it ended by time or by notice shows in `outstanding`.
            let _ = self.moved.wait_timeout(guard, timeout);
        }
    }

    fn failure(&self) -> MutexGuard<'_, Option<KafkaError>> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn record(&self, error: KafkaError) {
        let mut failure = self.failure();
        if failure.is_none() {
            *failure = Some(error);
        }
    }
}

impl ClientContext for Deliveries {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        self.reports.line(level, facility, message);
    }

    fn error(&self, error: ClientError, reason: &str) {
        self.reports.keep(&error, reason);
    }
}

impl ProducerContext for Deliveries {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, topic: usize) {
        match result {
            // A retried duplicate is acknowledged without its offset when the broker has forgotten where it is.
            Ok(message) if topic == LOG && message.offset() < 0 => self.record(KafkaError::Unavailable(
                format!("topic \"{}\" took a record and did not tell its offset", message.topic()),
            )),
            Ok(message) if topic == LOG => {
                self.log_end.fetch_max(message.offset() + 1, Ordering::AcqRel);
            }
            Ok(_) => {}
            Err((error, message)) => {
                let size = message.payload().map_or(0, <[u8]>::len);
                self.record(undelivered(error, message.topic(), message.key().unwrap_or_default(), size));
            }
        }
        if self.outstanding.fetch_sub(1, Ordering::AcqRel) == 1 {
            // Under the lock, so that it cannot fall between a waiter's look and its wait.
            let _guard = self.failure();
            self.moved.notify_all();
        }
    }
}

/// What it means that a record was not taken.
pub(crate) fn undelivered(error: &ClientError, topic: &str, key: &[u8], size: usize) -> KafkaError {
    let too_large = [Code::MessageSizeTooLarge, Code::MessageBatchTooLarge];
    if error.rdkafka_error_code().is_some_and(|code| too_large.contains(&code)) {
        let key = String::from_utf8_lossy(&key[..key.len().min(KEY_SHOWN_LEN)]);
        return KafkaError::Refused(Refusal::new(
            format!("topic \"{topic}\" does not take a record of {size} bytes, key {key}"),
            format!(
                "raise its limit: kafka-configs.sh --bootstrap-server BROKER --alter --entity-type topics \
                 --entity-name {topic} --add-config max.message.bytes=N, with `message.max.bytes` in \
                 [kafka.properties] at least as high"
            ),
        ));
    }
    KafkaError::of(&format!("topic \"{topic}\" did not take a record"), error)
}
