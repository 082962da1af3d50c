//! What is on its way to one partition. A batch whose answer is lost with its connection is sent again over the next
//! one; the broker knows it by its sequence number, and takes it once.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use change::Refusal;
use kafka_protocol::ResponseError as Code;
use kafka_protocol::messages::produce_request::{PartitionProduceData, TopicProduceData};
use kafka_protocol::messages::{ProduceRequest, TopicName, TransactionalId};
use kafka_protocol::protocol::StrBytes;

use super::batch::{Batch, Largest, ProducerId};
use super::broker::WireError;
use super::cluster::{Cluster, Link, Role, judge, patiently};
use crate::KafkaError;

const PRODUCE: i16 = 7;
/// Of a partition's batches a broker remembers the last five, to know what is sent again.
const IN_FLIGHT_MAX: usize = 4;
/// All replicas in sync must have it.
const ACKS_ALL: i16 = -1;

/// Partition 0 of a topic, as one producer writes it.
pub(crate) struct Partition {
    topic: StrBytes,
    link: Link,
    /// Of the next record.
    sequence: i32,
    in_flight: VecDeque<InFlight>,
    /// So many of them were sent over the present connection.
    sent: usize,
    /// Offset after the last record that is known to be there.
    end: Option<i64>,
    /// Whether the coordinator knows that the open transaction writes here.
    pub(crate) registered: bool,
}

struct InFlight {
    request: ProduceRequest,
    count: i32,
    largest: Largest,
}

impl Partition {
    pub(crate) fn new(topic: &str) -> Self {
        Partition {
            topic: StrBytes::from_string(topic.to_owned()),
            link: Link::to(Role::Leader(topic.to_owned())),
            sequence: 0,
            in_flight: VecDeque::new(),
            sent: 0,
            end: None,
            registered: false,
        }
    }

    pub(crate) fn topic(&self) -> &StrBytes {
        &self.topic
    }

    /// Offset after the last record that is known to be there; `None` for none of this producer's.
    pub(crate) fn end(&self) -> Option<i64> {
        self.end
    }

    pub(crate) fn settled(&self) -> bool {
        self.in_flight.is_empty()
    }

    /// Sends a batch; waits while too many are on their way.
    pub(crate) fn send(
        &mut self,
        cluster: &Cluster,
        outage: Duration,
        (transactional_id, producer): (&TransactionalId, ProducerId),
        batch: Batch,
    ) -> Result<(), KafkaError> {
        let written = batch.finish(producer, self.sequence);
        self.sequence = after(self.sequence, written.count);
        let data = PartitionProduceData::default().with_index(0).with_records(Some(written.bytes));
        let topic = TopicProduceData::default()
            .with_name(TopicName(self.topic.clone()))
            .with_partition_data(vec![data]);
        let request = ProduceRequest::default()
            .with_transactional_id(Some(transactional_id.clone()))
            .with_acks(ACKS_ALL)
            .with_timeout_ms(i32::try_from(outage.as_millis()).unwrap_or(i32::MAX))
            .with_topic_data(vec![topic]);
        self.in_flight.push_back(InFlight { request, count: written.count, largest: written.largest });
        patiently(outage, |deadline| self.attempt(|this| this.transmit(cluster, deadline)))?;
        self.settle_to(IN_FLIGHT_MAX, cluster, outage)
    }

    /// Waits until every batch is known to be there.
    pub(crate) fn settle(&mut self, cluster: &Cluster, outage: Duration) -> Result<(), KafkaError> {
        self.settle_to(0, cluster, outage)
    }

    fn settle_to(&mut self, count: usize, cluster: &Cluster, outage: Duration) -> Result<(), KafkaError> {
        while self.in_flight.len() > count {
            patiently(outage, |deadline| {
                self.attempt(|this| {
                    this.transmit(cluster, deadline)?;
                    this.acknowledge(deadline)
                })
            })?;
        }
        Ok(())
    }

    /// What fails is tried again over another connection, on which nothing was sent yet.
    fn attempt(
        &mut self,
        call: impl FnOnce(&mut Self) -> Result<(), WireError>,
    ) -> Result<(), WireError> {
        let done = call(self);
        if done.is_err() {
            self.link.reset();
            self.sent = 0;
        }
        done
    }

    /// Sends what was not sent over this connection.
    fn transmit(&mut self, cluster: &Cluster, deadline: Instant) -> Result<(), WireError> {
        if self.sent < self.in_flight.len() {
            let broker = self.link.broker(cluster, deadline)?;
            for batch in self.in_flight.iter().skip(self.sent) {
                broker.send(&batch.request, PRODUCE, deadline)?;
                self.sent += 1;
            }
        }
        Ok(())
    }

    /// Takes in the answer to the oldest batch.
    fn acknowledge(&mut self, deadline: Instant) -> Result<(), WireError> {
        let doing = || format!("topic \"{}\" did not take a batch of records", &*self.topic);
        let (Some(batch), Some(broker)) = (self.in_flight.front(), self.link.open()) else { return Ok(()) };
        let answer = broker.receive::<ProduceRequest>(PRODUCE, deadline)?;
        let topic = answer.responses.first();
        let partition = topic.and_then(|topic| topic.partition_responses.first());
        let partition = partition.ok_or_else(|| WireError::Again(doing()))?;
        let too_large = [Code::MessageTooLarge.code(), Code::RecordListTooLarge.code()];
        if too_large.contains(&partition.error_code) {
            return Err(batch.largest.refused(&self.topic).into());
        }
        judge(partition.error_code, doing)?;
        if partition.base_offset < 0 {
            let what = format!("topic \"{}\" took records and did not tell their offsets", &*self.topic);
            return Err(KafkaError::Unavailable(what).into());
        }
        self.end = Some(partition.base_offset + i64::from(batch.count));
        self.in_flight.pop_front();
        self.sent -= 1;
        Ok(())
    }
}

impl Largest {
    fn refused(&self, topic: &str) -> KafkaError {
        KafkaError::Refused(Refusal::new(
            format!("topic \"{topic}\" does not take a record of {} bytes, key {}", self.len, self.key),
            format!(
                "raise its limit: kafka-configs.sh --bootstrap-server BROKER --alter --entity-type topics \
                 --entity-name {topic} --add-config max.message.bytes=N"
            ),
        ))
    }
}

/// The sequence number so many records later: from 2147483647 on to 0.
fn after(sequence: i32, count: i32) -> i32 {
    ((i64::from(sequence) + i64::from(count)) & i64::from(i32::MAX)) as i32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequence_numbers_begin_again_after_the_greatest() {
        assert_eq!(after(0, 5), 5);
        assert_eq!(after(i32::MAX - 1, 1), i32::MAX);
        assert_eq!(after(i32::MAX, 1), 0);
        assert_eq!(after(i32::MAX - 2, 10), 7);
    }
}
