//! The worker's end of the log: one member of a consumer group, or a builder, that reads from where its store stands.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use change::{LedgerEntry, NEW_LOG, Progress, Refusal, SchemaRef, TableSchema};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::error::{KafkaError as ClientError, RDKafkaErrorCode as Code};
use rdkafka::message::{BorrowedMessage, Headers as _, Message};
use rdkafka::{Offset, TopicPartitionList};
use relay::Ledger;
use worker::{Feed, FeedError, FeedEvent, GroupOffset, LogBatch, LogState, Successor};

use crate::generations::generations;
use crate::ledger::{entry, read_ledger, require_topics};
use crate::membership::Membership;
use crate::reader::{Absence, Next, PartitionReader, explain, is_outage};
use crate::{Connection, KafkaError, Names, ReadUntil};

/// Records that a batch holds at most.
pub(crate) const BATCH_MAX_RECORDS: usize = 10_000;
/// Bytes after which a batch takes no further record.
pub(crate) const BATCH_MAX_BYTES: usize = 1 << 20;
/// The most that librdkafka fetches ahead (KiB).
const PREFETCH_KIB: &str = "4096";
/// Bytes that one fetch may bring; a larger record comes alone.
const FETCH_MAX_BYTES: &str = "1048576";
/// Records of the ledger taken in by one call.
const LEDGER_MAX_RECORDS: usize = 1_000;
/// How long the ledger may be late behind the log here, though it was written first.
const LEDGER_WAIT: Duration = Duration::from_secs(10);
/// One look of that wait.
const LEDGER_LOOK: Duration = Duration::from_millis(100);
/// How long leaving the group may hold up the caller. librdkafka may wait for brokers that are away.
const CLOSE_LIMIT: Duration = Duration::from_secs(3);
/// How long a member may be silent before the group gives the log to another.
pub(crate) const SESSION_TIMEOUT: Duration = Duration::from_secs(6);
/// What marks an offset in the group as committed by a worker.
const TAG: &str = "millrace:1";

/// The log and its ledger as one member of a consumer group reads them; see [`Feed`].
///
/// Joins the group by subscription, so that its tools see a live member, and has the log only while the group
/// gives it: a second member of the same group stands by. Or belongs to no group, and always has the log.
pub struct KafkaFeed {
    connection: Connection,
    names: Names,
    log: String,
    /// Whether it belongs to a group, where its place is committed.
    member: bool,
    /// `None` only while it is dropped.
    consumer: Option<BaseConsumer<Membership>>,
    ledger: PartitionReader,
    schemas: HashMap<SchemaRef, Arc<TableSchema>>,
    progress: Option<Progress>,
    absence: Absence,
    /// An error found behind records that had to be handed out first.
    owed: Option<FeedError>,
}

impl KafkaFeed {
    /// Joins `group` and begins to read the ledger.
    pub fn open(connection: &Connection, names: &Names, group: &str) -> Result<Self, FeedError> {
        Self::with(connection, names, Some(group))
    }

    /// Reads the log without a group, for a builder: who may build is decided by who has the log in its group.
    pub fn alone(connection: &Connection, names: &Names) -> Result<Self, FeedError> {
        Self::with(connection, names, None)
    }

    fn with(connection: &Connection, names: &Names, group: Option<&str>) -> Result<Self, FeedError> {
        require_topics(connection, names)?;
        let mut ledger = PartitionReader::follower(connection, names, names.ledger())?;
        ledger.seek(ledger.bounds()?.0)?;
        let consumer = match group {
            Some(group) => join(connection, names, group)?,
            None => {
                let consumer = consumer(connection, &names.no_group(), &[])?;
                consumer.context().given();
                consumer
            }
        };
        Ok(KafkaFeed {
            connection: connection.clone(),
            names: names.clone(),
            log: names.log(),
            member: group.is_some(),
            consumer: Some(consumer),
            ledger,
            schemas: HashMap::new(),
            progress: None,
            absence: Absence::new(connection),
            owed: None,
        })
    }

    fn consumer(&self) -> &BaseConsumer<Membership> {
        self.consumer.as_ref().expect("only the drop takes it")
    }

    /// Takes in what has come of the ledger, waiting at most `timeout` for the first of it.
    fn drain_ledger(&mut self, mut timeout: Duration) -> Result<(), FeedError> {
        for _ in 0..LEDGER_MAX_RECORDS {
            match self.ledger.next(std::mem::take(&mut timeout))? {
                Next::Record(message) => match entry(&message)? {
                    Some(LedgerEntry::Progress(progress)) => self.take_progress(progress),
                    Some(LedgerEntry::Schema(version, schema)) => {
                        self.schemas.entry(version).or_insert_with(|| Arc::new(schema));
                    }
                    Some(LedgerEntry::Slot(_) | LedgerEntry::Table(..)) | None => {}
                },
                Next::End => {}
                Next::Nothing => break,
            }
        }
        Ok(())
    }

    /// Reads the ledger from its beginning, and keeps its schemas.
    fn whole_ledger(&mut self) -> Result<Ledger, FeedError> {
        let mut ledger = read_ledger(&self.connection, &self.names, ReadUntil::Committed)?;
        for (version, schema) in std::mem::take(&mut ledger.schemas) {
            self.schemas.entry(version).or_insert_with(|| Arc::new(schema));
        }
        Ok(ledger)
    }

    /// Keeps the newest progress: [`Feed::log`] may have read ahead of what arrives here.
    fn take_progress(&mut self, progress: Progress) {
        let place = |progress: &Progress| (progress.end_lsn, progress.position, progress.log_end);
        if self.progress.as_ref().is_none_or(|known| place(known) <= place(&progress)) {
            self.progress = Some(progress);
        }
    }

    /// Waits, for a bounded time, until the ledger holds what `find` looks for.
    fn await_ledger<T>(&mut self, find: impl Fn(&Self) -> Option<T>) -> Result<Option<T>, FeedError> {
        let start = Instant::now();
        loop {
            let found = find(self);
            if found.is_some() || start.elapsed() >= LEDGER_WAIT {
                return Ok(found);
            }
            self.drain_ledger(LEDGER_LOOK)?;
        }
    }

    fn fill(&mut self, timeout: Duration, batch: &mut LogBatch) -> Result<(), FeedError> {
        let mut wait = timeout;
        while batch.len() < BATCH_MAX_RECORDS && batch.byte_len() < BATCH_MAX_BYTES {
            let consumer = self.consumer.as_ref().expect("only the drop takes it");
            match consumer.poll(wait) {
                Some(Ok(message)) => {
                    self.absence.over();
                    push(batch, &message)?;
                }
                Some(Err(error)) if is_outage(&error) => self.absence.begun(),
                Some(Err(ClientError::MessageConsumption(Code::PollExceeded))) => {}
                Some(Err(error)) => return Err(self.explain(&error)),
                None => break,
            }
            wait = Duration::ZERO;
        }
        if batch.is_empty() {
            let consumer = self.consumer.as_ref().expect("only the drop takes it");
            self.absence.check(consumer.client(), &self.log)?;
        }
        Ok(())
    }

    fn explain(&self, error: &ClientError) -> FeedError {
        let consumer = self.consumer();
        explain(error, &self.log, consumer.client(), &consumer.context().reports).into()
    }
}

/// What a consumer group has committed for a log, if anything.
pub fn group_offset(
    connection: &Connection,
    names: &Names,
    group: &str,
) -> Result<Option<GroupOffset>, KafkaError> {
    committed(&consumer(connection, group, &[])?, &names.log(), connection.outage())
}

fn committed(
    consumer: &BaseConsumer<Membership>,
    log: &str,
    limit: Duration,
) -> Result<Option<GroupOffset>, KafkaError> {
    let mut asked = TopicPartitionList::new();
    asked.add_partition(log, 0);
    let committed = consumer
        .committed_offsets(asked, limit)
        .map_err(|error| KafkaError::of("cannot read the consumer group's offset", &error))?;
    Ok(committed.find_partition(log, 0).and_then(|element| match element.offset() {
        Offset::Offset(offset) => Some(GroupOffset { offset, ours: element.metadata() == TAG }),
        _ => None,
    }))
}

impl Feed for KafkaFeed {
    fn poll(&mut self, timeout: Duration, batch: &mut LogBatch) -> Result<FeedEvent, FeedError> {
        batch.clear();
        if let Some(error) = self.owed.take() {
            return Err(error);
        }
        if self.consumer().context().news_waiting() == 0 {
            match self.fill(timeout, batch) {
                Err(error) if batch.is_empty() => return Err(error),
                Err(error) => self.owed = Some(error),
                Ok(()) => {}
            }
        }
        self.drain_ledger(Duration::ZERO)?;
        if let Some(event) = self.consumer().context().news() {
            // What came before it is read again from the checkpoint, by whoever has the log then.
            batch.clear();
            self.owed = None;
            return Ok(event);
        }
        Ok(if batch.is_empty() { FeedEvent::Idle } else { FeedEvent::Records })
    }

    fn log(&mut self) -> Result<LogState, FeedError> {
        let (start, end) = PartitionReader::new(&self.connection, &self.names, self.names.log())?.bounds()?;
        let ledger = self.whole_ledger()?;
        if let Some(progress) = ledger.progress {
            self.take_progress(progress);
        }
        let id = ledger.log.ok_or_else(|| {
            Refusal::new(
                format!("topic \"{}\" does not hold the record that names the log", self.log),
                format!(
                    "millrace setup where it has not finished; else the topic was created anew, and {NEW_LOG}"
                ),
            )
        })?;
        let group = match self.member {
            true => committed(self.consumer(), &self.log, self.connection.outage())?,
            false => None,
        };
        let generation = self.names.generation();
        let known = generations(&self.connection, self.names.pipeline())?;
        let diverged = known.and_then(|known| known.get(generation)).is_some_and(|this| this.diverged);
        // Where this log is not current any more, the current one is its successor.
        let newest = known.map(|known| known.newest()).filter(|newest| newest.number > generation);
        let next = newest.map(|next| Successor { generation: next.number, diverged: next.diverged });
        Ok(LogState { id, generation, diverged, start, end, group, next })
    }

    fn seek(&mut self, offset: i64) -> Result<(), FeedError> {
        if !self.consumer().context().assigned() {
            // The group has taken the log back meanwhile; the next poll tells.
            return Ok(());
        }
        let mut place = TopicPartitionList::new();
        place
            .add_partition_offset(&self.log, 0, Offset::Offset(offset))
            .and_then(|()| self.consumer().assign(&place))
            .map_err(|error| self.explain(&error))
    }

    fn schema(&mut self, version: SchemaRef) -> Result<Arc<TableSchema>, FeedError> {
        if let Some(schema) = self.await_ledger(|feed| feed.schemas.get(&version).cloned())? {
            return Ok(schema);
        }
        // It has not come. Whether it is not there, or cannot be read now, only a whole look tells.
        self.whole_ledger()?;
        let known = self.schemas.get(&version).cloned();
        known.ok_or_else(|| {
            let what = format!(
                "topic \"{}\" does not hold schema {version}, which the log uses",
                self.names.ledger()
            );
            let remedy = format!("if the ledger was created anew or has lost records, {NEW_LOG}");
            Refusal::new(what, remedy).into()
        })
    }

    fn progress(&mut self) -> Result<Option<&Progress>, FeedError> {
        self.drain_ledger(Duration::ZERO)?;
        Ok(self.progress.as_ref())
    }

    fn commit(&mut self, next_offset: i64) -> Result<(), FeedError> {
        if !self.member || !self.consumer().context().assigned() {
            return Ok(());
        }
        let mut offsets = TopicPartitionList::new();
        offsets.add_partition(&self.log, 0).set_metadata(TAG);
        let told = offsets
            .set_partition_offset(&self.log, 0, Offset::Offset(next_offset))
            .and_then(|()| self.consumer().commit(&offsets, CommitMode::Async));
        if let Err(error) = told {
            tracing::debug!(%error, "the consumer group's offset was not committed; lag tools show an older one");
        }
        Ok(())
    }
}

impl Drop for KafkaFeed {
    fn drop(&mut self) {
        let Some(consumer) = self.consumer.take() else { return };
        let (done, closed) = mpsc::channel::<()>();
        let closing = std::thread::Builder::new().name("kafka-close".into()).spawn(move || {
            drop(consumer);
            drop(done);
        });
        // Left to itself past the limit: it owns nothing but the consumer, and ends with it or with the process.
        if closing.is_ok() && closed.recv_timeout(CLOSE_LIMIT) == Err(mpsc::RecvTimeoutError::Timeout) {
            tracing::debug!("the consumer group was left without a goodbye");
        }
    }
}

fn join(connection: &Connection, names: &Names, group: &str) -> Result<BaseConsumer<Membership>, KafkaError> {
    let session = SESSION_TIMEOUT.as_millis().to_string();
    let mut settings = vec![
        ("group.protocol", "classic"),
        ("partition.assignment.strategy", "range"),
        ("heartbeat.interval.ms", "1500"),
        ("session.timeout.ms", session.as_str()),
    ];
    let instance = connection.host().map(|host| format!("{group}@{host}"));
    settings.extend(instance.as_deref().map(|instance| ("group.instance.id", instance)));
    let consumer = consumer(connection, group, &settings)?;
    consumer
        .subscribe(&[&names.log()])
        .map_err(|error| KafkaError::of(&format!("cannot join consumer group \"{group}\""), &error))?;
    Ok(consumer)
}

fn consumer(
    connection: &Connection,
    group: &str,
    settings: &[(&str, &str)],
) -> Result<BaseConsumer<Membership>, KafkaError> {
    let mut config = connection.client(&[
        ("fetch.error.backoff.ms", "100"),
        ("fetch.min.bytes", "1"),
        ("fetch.queue.backoff.ms", "5"),
        ("fetch.wait.max.ms", "100"),
        ("max.partition.fetch.bytes", FETCH_MAX_BYTES),
        ("queued.max.messages.kbytes", PREFETCH_KIB),
    ]);
    config
        .set("group.id", group)
        .set("isolation.level", "read_committed")
        .set("enable.auto.commit", "false")
        .set("auto.offset.reset", "error");
    for (name, value) in settings {
        config.set(*name, *value);
    }
    config
        .create_with_context(Membership::default())
        .map_err(|error| KafkaError::of("cannot make a Kafka consumer", &error))
}

/// Appends a record of the log.
pub(crate) fn push(batch: &mut LogBatch, message: &BorrowedMessage<'_>) -> Result<(), FeedError> {
    let key = message.key().unwrap_or_default();
    let value = message.payload().unwrap_or_default();
    let headers = message.headers().map(|all| all.iter()).into_iter().flatten();
    batch
        .push(message.offset(), key, value, headers.map(|h| (h.key, h.value.unwrap_or_default())))
        .map_err(|error| FeedError::Poison { offset: message.offset(), reason: error.to_string() })
}
