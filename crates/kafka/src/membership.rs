//! The feed's place in its consumer group: what the group gives and takes, without librdkafka acting on it.
//!
//! librdkafka would begin to read at the group's committed offset as soon as it is given the partition. A worker
//! reads from its store's checkpoint and from nowhere else, so an assignment is acknowledged with nothing to read;
//! [`crate::KafkaFeed`] assigns the partition itself when it is told where to begin.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError as ClientError, KafkaResult};
use rdkafka::types::RDKafkaRespErr;
use rdkafka::{ClientContext, TopicPartitionList};
use worker::FeedEvent;

use crate::connection::Reports;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Membership {
    pub(crate) reports: Reports,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    assigned: bool,
    news: VecDeque<FeedEvent>,
}

impl Membership {
    /// The oldest change of membership not told yet.
    pub(crate) fn news(&self) -> Option<FeedEvent> {
        self.state().news.pop_front()
    }

    /// How many changes of membership are not told yet.
    pub(crate) fn news_waiting(&self) -> usize {
        self.state().news.len()
    }

    /// Whether the partition is ours, as far as we know.
    pub(crate) fn assigned(&self) -> bool {
        self.state().assigned
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The partition is ours: the group says so, or there is no group.
    pub(crate) fn given(&self) {
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
