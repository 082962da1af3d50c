//! A transactional producer of which every call ends in time and every record is accounted for.
//!
//! The order that exactly-once rests on: a transaction is committed only when librdkafka has reported every record
//! of it delivered and none failed. Whatever else happens, the producer is dropped with its transaction open; the
//! next one with the same `transactional.id` aborts it while it starts (`init_transactions`).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rdkafka::error::{KafkaError as ClientError, RDKafkaError, RDKafkaErrorCode as Code};
use rdkafka::message::OwnedHeaders;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer as _};
use rdkafka::{ClientConfig, util::Timeout};

use crate::connection::fences;
use crate::deliveries::{Deliveries, LOG, OTHER, undelivered};
use crate::{Connection, KafkaError};

/// The largest record that the log's topic takes (bytes, as batched).
pub(crate) const RECORD_MAX_BYTES: u32 = 64 << 20;
/// The most that librdkafka holds on its way to the brokers (KiB); must hold the largest record.
const QUEUE_MAX_KIB: u32 = 128 << 10;
/// A request holds more than what the relay hands over in one go (bytes).
const BATCH_MAX_BYTES: u32 = 8 << 20;
/// The brokers abort a transaction that stays open for longer.
const TRANSACTION_MIN_TIMEOUT: Duration = Duration::from_secs(60);
/// How often a wait looks for a fatal error.
const LOOK: Duration = Duration::from_millis(100);
/// How long one call waits for delivery reports, which are taken in as they come. The binding spends the last
/// millisecond of each call turning round: short ones are most of what an idle process costs.
const REPORTS_WAIT: Duration = Duration::from_millis(500);
/// How long a clean stop tries to abort what is open; a new producer does it anyway.
const ABORT_LIMIT: Duration = Duration::from_secs(1);

/// A record to produce, to partition 0 of its topic.
pub(crate) struct Outgoing<'a> {
    pub(crate) topic: &'a str,
    /// Whether the topic is the log.
    pub(crate) log: bool,
    pub(crate) key: Option<&'a [u8]>,
    pub(crate) value: Option<&'a [u8]>,
    pub(crate) headers: Option<OwnedHeaders>,
    /// Milliseconds since the epoch; `None` for now.
    pub(crate) timestamp_ms: Option<i64>,
}

pub(crate) struct Producer {
    inner: Arc<BaseProducer<Deliveries>>,
    /// Takes in delivery reports until told to stop.
    reports: Option<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    outage: Duration,
    transaction_timeout: Duration,
    opened: Option<Instant>,
}

impl Producer {
    /// Starts a producer and fences every older one of the same id; returns when their transactions have ended.
    pub(crate) fn start(connection: &Connection, transactional_id: &str) -> Result<Self, KafkaError> {
        let config = configure(connection, transactional_id);
        let transaction_timeout = config.get("transaction.timeout.ms").and_then(|ms| ms.parse().ok());
        let inner: BaseProducer<Deliveries> = config
            .create_with_context(Deliveries::default())
            .map_err(|error| KafkaError::of("cannot make a Kafka producer", &error))?;
        let (inner, stop) = (Arc::new(inner), Arc::new(AtomicBool::new(false)));
        let (polled, stopped) = (inner.clone(), stop.clone());
        let reports = thread::Builder::new().name("kafka-reports".into()).spawn(move || {
            while !stopped.load(Ordering::Acquire) {
                polled.poll(REPORTS_WAIT);
            }
        });
        let reports = reports
            .map_err(|error| KafkaError::Unavailable(format!("cannot start a thread for Kafka: {error}")))?;
        let producer = Producer {
            inner,
            reports: Some(reports),
            stop,
            outage: connection.outage(),
            transaction_timeout: Duration::from_millis(transaction_timeout.unwrap_or(0)),
            opened: None,
        };
        producer
            .retry("cannot start Kafka transactions", |timeout| producer.inner.init_transactions(timeout))?;
        Ok(producer)
    }

    /// Begins a transaction unless one is open.
    pub(crate) fn begin(&mut self) -> Result<(), KafkaError> {
        if self.opened.is_none() {
            self.inner
                .begin_transaction()
                .map_err(|error| self.explain("cannot begin a Kafka transaction", &error))?;
            self.opened = Some(Instant::now());
        }
        Ok(())
    }

    /// Hands a record to librdkafka, which copies it; waits while its queue is full.
    pub(crate) fn send(&self, outgoing: Outgoing<'_>) -> Result<(), KafkaError> {
        let opaque = if outgoing.log { LOG } else { OTHER };
        let mut record = BaseRecord::<[u8], [u8], usize>::with_opaque_to(outgoing.topic, opaque).partition(0);
        record.key = outgoing.key;
        record.payload = outgoing.value;
        record.timestamp = outgoing.timestamp_ms;
        record.headers = outgoing.headers;
        let mut patience = None;
        loop {
            self.deliveries().sent();
            let Err((error, back)) = self.inner.send(record) else { return Ok(()) };
            self.deliveries().unsent();
            if error.rdkafka_error_code() != Some(Code::QueueFull) {
                let size = outgoing.value.map_or(0, <[u8]>::len);
                return Err(match self.fatal() {
                    Some(fatal) => fatal,
                    None => undelivered(&error, outgoing.topic, outgoing.key.unwrap_or_default(), size),
                });
            }
            record = back;
            self.check()?;
            self.deliveries().wait(Duration::from_millis(1));
            let patience = patience.get_or_insert_with(|| Patience::new(self.outage));
            patience.spend(self.deliveries().outstanding(), || self.away("its queue stays full"))?;
        }
    }

    /// Whether every record sent is known to be delivered, or not to be.
    pub(crate) fn idle(&self) -> bool {
        self.deliveries().outstanding() == 0
    }

    /// Waits until every record sent is known to be delivered.
    pub(crate) fn settle(&self) -> Result<(), KafkaError> {
        let mut patience = Patience::new(self.outage);
        while self.deliveries().outstanding() > 0 {
            self.deliveries().wait(LOOK);
            self.check()?;
            patience.spend(self.deliveries().outstanding(), || self.away("records are not acknowledged"))?;
        }
        self.check()
    }

    /// Commits the open transaction, of which every record is settled.
    pub(crate) fn commit(&mut self) -> Result<(), KafkaError> {
        // The last report is freed a moment after it was told; until then librdkafka's binding would sleep 100 ms.
        let mut patience = Patience::new(self.outage);
        while self.inner.in_flight_count() > 0 {
            thread::yield_now();
            self.check()?;
            let waiting = u64::from(self.inner.in_flight_count().unsigned_abs());
            patience.spend(waiting, || self.away("its reports are not taken in"))?;
        }
        self.retry("cannot commit a Kafka transaction", |timeout| self.inner.commit_transaction(timeout))?;
        self.opened = None;
        Ok(())
    }

    /// Offset after the log's last record delivered by this producer; `None` for none yet.
    pub(crate) fn log_end(&self) -> Option<i64> {
        Some(self.deliveries().log_end()).filter(|end| *end > 0)
    }

    fn deliveries(&self) -> &Deliveries {
        self.inner.client().context()
    }

    /// Calls a transaction function until it neither times out nor asks to be called again.
    fn retry(
        &self,
        doing: &str,
        mut call: impl FnMut(Timeout) -> Result<(), ClientError>,
    ) -> Result<(), KafkaError> {
        let start = Instant::now();
        loop {
            let left = self.outage.saturating_sub(start.elapsed()).max(LOOK);
            let Err(error) = call(Timeout::After(left)) else { return Ok(()) };
            let retriable = matches!(&error, ClientError::Transaction(error) if may_retry(error));
            if !retriable || start.elapsed() >= self.outage {
                return Err(self.explain(doing, &error));
            }
            thread::sleep(LOOK);
        }
    }

    /// The first failure so far, if any.
    fn check(&self) -> Result<(), KafkaError> {
        match self.fatal().or_else(|| self.deliveries().take_failure()) {
            None => Ok(()),
            Some(KafkaError::Fenced) => Err(self.fenced()),
            Some(error) => Err(error.with_report(&self.deliveries().reports)),
        }
    }

    fn fatal(&self) -> Option<KafkaError> {
        let (code, reason) = self.inner.client().fatal_error()?;
        if fences(code) {
            return Some(self.fenced());
        }
        Some(KafkaError::Unavailable(format!("the Kafka producer cannot go on: {reason}")))
    }

    fn explain(&self, doing: &str, error: &ClientError) -> KafkaError {
        if let Some(fatal) = self.fatal() {
            return fatal;
        }
        match KafkaError::of(doing, error) {
            KafkaError::Fenced => self.fenced(),
            other => other.with_report(&self.deliveries().reports),
        }
    }

    /// The brokers fence a producer also when they abort its overdue transaction; nobody has taken over then.
    fn fenced(&self) -> KafkaError {
        match self.opened {
            Some(opened) if opened.elapsed() >= self.transaction_timeout => KafkaError::Unavailable(format!(
                "a Kafka transaction was open for {:?} and the brokers aborted it (transaction.timeout.ms)",
                opened.elapsed()
            )),
            _ => KafkaError::Fenced,
        }
    }

    fn away(&self, what: &str) -> KafkaError {
        let text = format!("Kafka has been away for {:?}: {what}", self.outage);
        KafkaError::Unavailable(text).with_report(&self.deliveries().reports)
    }
}

impl Drop for Producer {
    fn drop(&mut self) {
        if self.opened.is_some() && self.inner.client().fatal_error().is_none() {
            // Readers need not wait for the next producer then. Where it fails, they do.
            let _ = self.inner.abort_transaction(ABORT_LIMIT);
        }
        self.stop.store(true, Ordering::Release);
        // It can only have panicked, and says so by itself.
        let _ = self.reports.take().map(JoinHandle::join);
    }
}

fn may_retry(error: &RDKafkaError) -> bool {
    !error.is_fatal()
        && !error.txn_requires_abort()
        && (error.is_retriable() || error.code() == Code::OperationTimedOut)
}

fn configure(connection: &Connection, transactional_id: &str) -> ClientConfig {
    let outage = connection.outage();
    let record_max = RECORD_MAX_BYTES.to_string();
    let queue_max = QUEUE_MAX_KIB.to_string();
    let batch_max = BATCH_MAX_BYTES.to_string();
    let transaction = (outage * 2).max(TRANSACTION_MIN_TIMEOUT).as_millis().to_string();
    let mut config = connection.client(&[
        ("compression.type", "lz4"),
        // What is handed over in one go becomes one request, not a small one and a second that waits for it.
        ("linger.ms", "1"),
        ("batch.size", &batch_max),
        ("batch.num.messages", "100000"),
        ("message.max.bytes", &record_max),
        ("queue.buffering.max.kbytes", &queue_max),
        ("retry.backoff.ms", "50"),
        ("transaction.timeout.ms", &transaction),
    ]);
    config
        .set("transactional.id", transactional_id)
        .set("enable.idempotence", "true")
        .set("acks", "all")
        .set("message.timeout.ms", outage.as_millis().to_string());
    config
}

/// Gives up when something that should move has not for a time.
struct Patience {
    limit: Duration,
    since: Instant,
    seen: u64,
}

impl Patience {
    fn new(limit: Duration) -> Self {
        Patience { limit, since: Instant::now(), seen: u64::MAX }
    }

    fn spend(&mut self, now: u64, error: impl FnOnce() -> KafkaError) -> Result<(), KafkaError> {
        if now != self.seen {
            *self = Patience { seen: now, ..Patience::new(self.limit) };
        }
        if self.since.elapsed() >= self.limit { Err(error()) } else { Ok(()) }
    }
}
