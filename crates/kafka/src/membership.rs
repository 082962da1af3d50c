//! The feed's place in its consumer group: what the group gives and takes, and the offset that it keeps for others to see.
//!
//! librdkafka would begin to read at the group's committed offset as soon as it is given the partition. A worker
//! reads from its store's checkpoint and from nowhere else, so an assignment is acknowledged with nothing to read;
//! [`crate::KafkaFeed`] fetches the log itself when it is told where to begin.

use std::collections::VecDeque;
use std::sync::mpsc;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError as ClientError, KafkaResult, RDKafkaErrorCode as Code};
use rdkafka::types::RDKafkaRespErr;
use rdkafka::{ClientConfig, ClientContext, Offset, TopicPartitionList};
use worker::{FeedError, FeedEvent, GroupOffset};

use crate::connection::Reports;
use crate::reader::{Absence, LEADERS_MS, explain, is_outage};
use crate::{Connection, KafkaError, Names};

/// How long leaving the group may hold up the caller. librdkafka may wait for brokers that are away.
const CLOSE_LIMIT: Duration = Duration::from_secs(3);
/// How long a member may be silent before the group gives the log to another, unless configured otherwise (ms).
const SESSION_TIMEOUT_MS: &str = "6000";
const HEARTBEAT_MS: &str = "1500";
/// How often it is asked who keeps the group (ms): a broker that was cut off from the others goes on answering.
const COORDINATOR_MS: (&str, &str) = ("coordinator.query.interval.ms", "10000");
/// How long a member that is alive may be busy with one commit before the group gives the log to another (ms), which would
/// begin it from scratch. A transaction that changes millions of groups of a large counter takes minutes.
const LONGEST_COMMIT: (&str, &str) = ("max.poll.interval.ms", "3600000");
/// What marks an offset in the group as committed by a worker.
const TAG: &str = "millrace:1";

/// A member of a consumer group.
pub(crate) struct Member {
    /// `None` only while it is dropped.
    consumer: Option<BaseConsumer<Membership>>,
    topic: String,
    absence: Absence,
    outage: Duration,
}

impl Member {
    pub(crate) fn join(connection: &Connection, names: &Names, group: &str) -> Result<Self, KafkaError> {
        let mut settings =
            vec![("group.protocol", "classic"), ("partition.assignment.strategy", "range"), LONGEST_COMMIT];
        let instance = connection.host().map(|host| format!("{group}@{host}"));
        settings.extend(instance.as_deref().map(|instance| ("group.instance.id", instance)));
        let consumer = consumer(connection, group, &settings)?;
        let topic = names.log();
        consumer
            .subscribe(&[&topic])
            .map_err(|error| KafkaError::of(&format!("cannot join consumer group \"{group}\""), &error))?;
        let (absence, outage) = (Absence::new(connection), connection.outage());
        Ok(Member { consumer: Some(consumer), topic, absence, outage })
    }

    fn consumer(&self) -> &BaseConsumer<Membership> {
        self.consumer.as_ref().expect("only the drop takes it")
    }

    /// What the group gives or takes next, waiting for it at most `timeout`.
    pub(crate) fn news(&mut self, timeout: Duration) -> Result<Option<FeedEvent>, FeedError> {
        match self.consumer().poll(timeout) {
            Some(Err(error)) if is_outage(&error) => self.absence.begun(),
            Some(Err(ClientError::MessageConsumption(Code::PollExceeded))) | Some(Ok(_)) | None => {}
            Some(Err(error)) => {
                let consumer = self.consumer();
                let reports = &consumer.context().reports;
                return Err(explain(&error, &self.topic, consumer.client(), reports).into());
            }
        }
        Ok(self.consumer().context().news())
    }

    /// Nothing is read: fails where the brokers have been away for too long.
    pub(crate) fn idle(&mut self) -> Result<(), FeedError> {
        let consumer = self.consumer.as_ref().expect("only the drop takes it");
        Ok(self.absence.check(consumer.client(), &self.topic)?)
    }

    /// Something is read.
    pub(crate) fn busy(&mut self) {
        self.absence.over();
    }

    /// Whether the partition is ours, as far as we know.
    pub(crate) fn assigned(&self) -> bool {
        self.consumer().context().assigned()
    }

    /// What the group has committed, if anything.
    pub(crate) fn committed(&self) -> Result<Option<GroupOffset>, KafkaError> {
        committed(self.consumer(), &self.topic, self.outage)
    }

    /// Commits an offset as ours. Does not wait.
    pub(crate) fn commit(&self, next_offset: i64) {
        let mut offsets = TopicPartitionList::new();
        offsets.add_partition(&self.topic, 0).set_metadata(TAG);
        let told = offsets
            .set_partition_offset(&self.topic, 0, Offset::Offset(next_offset))
            .and_then(|()| self.consumer().commit(&offsets, CommitMode::Async));
        if let Err(error) = told {
            tracing::debug!(%error, "the consumer group's offset was not committed; lag tools show an older one");
        }
    }
}

impl Drop for Member {
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

/// What a consumer group has committed for a log, if anything.
pub fn group_offset(
    connection: &Connection,
    names: &Names,
    group: &str,
) -> Result<Option<GroupOffset>, KafkaError> {
    committed(&consumer(connection, group, &[])?, &names.log(), connection.outage())
}

/// How long a member may be silent before the group gives the log to another.
pub(crate) fn session_timeout(connection: &Connection) -> Duration {
    let configured = client(connection);
    let milliseconds = configured.get("session.timeout.ms").and_then(|text| text.parse().ok());
    Duration::from_millis(milliseconds.unwrap_or_default())
}

fn client(connection: &Connection) -> ClientConfig {
    connection.client(&[
        LEADERS_MS,
        COORDINATOR_MS,
        ("session.timeout.ms", SESSION_TIMEOUT_MS),
        ("heartbeat.interval.ms", HEARTBEAT_MS),
    ])
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

fn consumer(
    connection: &Connection,
    group: &str,
    settings: &[(&str, &str)],
) -> Result<BaseConsumer<Membership>, KafkaError> {
    let mut config = client(connection);
    config.set("group.id", group).set("enable.auto.commit", "false").set("auto.offset.reset", "error");
    for (name, value) in settings {
        config.set(*name, *value);
    }
    config
        .create_with_context(Membership::default())
        .map_err(|error| KafkaError::of("cannot make a Kafka consumer", &error))
}

/// What librdkafka tells of the group.
#[derive(Debug, Default)]
struct Membership {
    reports: Reports,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    assigned: bool,
    news: VecDeque<FeedEvent>,
}

impl Membership {
    /// The oldest change of membership not told yet.
    fn news(&self) -> Option<FeedEvent> {
        self.state().news.pop_front()
    }

    fn assigned(&self) -> bool {
        self.state().assigned
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn given(&self) {
        let mut state = self.state();
        state.assigned = true;
        state.news.push_back(FeedEvent::Assigned);
    }

    fn taken(&self) {
        let mut state = self.state();
        // Nothing is taken from a member that had nothing; and an assignment that nobody has heard of yet is
        // forgotten rather than told after the fact.
        if std::mem::take(&mut state.assigned) && state.news.pop_back() != Some(FeedEvent::Assigned) {
            state.news.push_back(FeedEvent::Revoked);
        }
    }
}

impl ClientContext for Membership {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        self.reports.line(level, facility, message);
    }

    fn error(&self, error: ClientError, reason: &str) {
        self.reports.keep(&error, reason);
    }
}

impl ConsumerContext for Membership {
    fn rebalance(
        &self,
        consumer: &BaseConsumer<Self>,
        event: RDKafkaRespErr,
        partitions: &mut TopicPartitionList,
    ) {
        let done = match event {
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS => {
                if partitions.count() > 0 {
                    self.given();
                }
                consumer.assign(&TopicPartitionList::new())
            }
            _ => {
                if consumer.assignment_lost() {
                    tracing::warn!(
                        "the consumer group took the log away: this worker was silent for too long"
                    );
                }
                self.taken();
                consumer.unassign()
            }
        };
        if let Err(error) = done {
            tracing::warn!(%error, "the consumer group's assignment could not be acknowledged");
        }
    }

    fn commit_callback(&self, result: KafkaResult<()>, _offsets: &TopicPartitionList) {
        if let Err(error) = result {
            tracing::debug!(%error, "the consumer group's offset was not committed; lag tools show an older one");
        }
    }
}
