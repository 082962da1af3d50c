//! What is on its way to the partitions that one producer writes. A batch whose answer is lost with its connection is sent
//! again over the next one; the broker knows it by its sequence number, and takes it once.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::Bytes;
use change::Refusal;
use kafka_protocol::ResponseError as Code;
use kafka_protocol::messages::produce_request::{PartitionProduceData, TopicProduceData};
use kafka_protocol::messages::{ProduceRequest, ProduceResponse, TopicName, TransactionalId};
use kafka_protocol::protocol::StrBytes;

use super::batch::{Batch, Largest, ProducerId};
use super::broker::{Broker, WireError};
use super::cluster::{Cluster, Leader, judge, patiently};
use super::rejection::{alter, rejection};
use crate::KafkaError;

const PRODUCE: i16 = 7;
/// Of a partition's batches a broker remembers the last five, to know what is sent again.
const IN_FLIGHT_MAX: usize = 4;
/// More bytes on their way are waited for: large rows come in batches of their own.
const IN_FLIGHT_MAX_LEN: usize = 16 << 20;
/// Brokers end a connection over which more comes in one request (socket.request.max.bytes, 100 MiB).
pub(crate) const BATCH_MAX_LEN: usize = 95 << 20;
/// All replicas in sync must have it.
const ACKS_ALL: i16 = -1;

/// Of one producer.
pub(crate) struct Outbox {
    cluster: Cluster,
    outage: Duration,
    transactional_id: TransactionalId,
    producer: ProducerId,
    partitions: Vec<Partition>,
    /// What goes together, in order, and is not on its way.
    waiting: VecDeque<Vec<Sent>>,
    lanes: Vec<Lane>,
}

/// Partition 0 of a topic.
struct Partition {
    topic: StrBytes,
    /// Of the next record.
    sequence: i32,
    /// Offset after the last record that is known to be there.
    end: Option<i64>,
    /// The broker that takes its records, where that is known.
    leader: Option<Leader>,
}

/// The connection to one broker, and the requests that it has not answered.
struct Lane {
    node: i32,
    broker: Broker,
    requests: VecDeque<Vec<Sent>>,
}

/// A batch and its partition.
struct Sent {
    partition: usize,
    bytes: Bytes,
    count: i32,
    largest: Largest,
}

impl Outbox {
    pub(crate) fn new(
        cluster: Cluster,
        outage: Duration,
        transactional_id: TransactionalId,
        producer: ProducerId,
    ) -> Self {
        let (partitions, waiting, lanes) = (Vec::new(), VecDeque::new(), Vec::new());
        Outbox { cluster, outage, transactional_id, producer, partitions, waiting, lanes }
    }

    /// The number by which a topic is known here.
    pub(crate) fn partition(&mut self, topic: &str) -> usize {
        let known = self.partitions.iter().position(|partition| *partition.topic == *topic);
        known.unwrap_or_else(|| {
            let topic = StrBytes::from_string(topic.to_owned());
            self.partitions.push(Partition { topic, sequence: 0, end: None, leader: None });
            self.partitions.len() - 1
        })
    }

    /// Offset after a topic's last record that is known to be there; `None` for none of this producer's.
    pub(crate) fn end(&self, topic: &str) -> Option<i64> {
        self.partitions.iter().find(|partition| *partition.topic == *topic)?.end
    }

    /// Whether everything is known to be there.
    pub(crate) fn settled(&self) -> bool {
        self.waiting.is_empty() && self.lanes.iter().all(|lane| lane.requests.is_empty())
    }

    /// Sends batches, those that one broker takes in one request; waits while too many requests are on their way.
    pub(crate) fn send(&mut self, batches: Vec<(usize, Batch)>) -> Result<(), KafkaError> {
        let group = batches.into_iter().map(|(partition, batch)| {
            let sequence = &mut self.partitions[partition].sequence;
            let written = batch.finish(self.producer, *sequence);
            *sequence = after(*sequence, written.count);
            Sent { partition, bytes: written.bytes, count: written.count, largest: written.largest }
        });
        let group: Vec<Sent> = group.collect();
        if let Some(sent) = group.iter().find(|sent| sent.bytes.len() > BATCH_MAX_LEN) {
            return Err(sent.refused(&self.partitions[sent.partition].topic, "max.message.bytes"));
        }
        self.waiting.push_back(group);
        self.patiently(|this, deadline| this.transmit(deadline))?;
        let in_flight = self.lanes.iter().flat_map(|lane| lane.requests.iter().flatten());
        let much = in_flight.map(|sent| sent.bytes.len()).sum::<usize>() > IN_FLIGHT_MAX_LEN;
        self.settle_to(if much { 0 } else { IN_FLIGHT_MAX })
    }

    /// Waits until everything is known to be there.
    pub(crate) fn settle(&mut self) -> Result<(), KafkaError> {
        self.settle_to(0)
    }

    /// Waits for what is on its way, but not for brokers that are away. Returns whether everything is known to be there.
    pub(crate) fn settle_quickly(&mut self, deadline: Instant) -> bool {
        while self.lanes.iter().any(|lane| !lane.requests.is_empty()) {
            if self.acknowledge(0, deadline).is_err() {
                return false;
            }
        }
        self.settled()
    }

    fn settle_to(&mut self, count: usize) -> Result<(), KafkaError> {
        while !self.waiting.is_empty() || self.lanes.iter().any(|lane| lane.requests.len() > count) {
            self.patiently(|this, deadline| {
                this.transmit(deadline)?;
                this.acknowledge(count, deadline)
            })?;
        }
        Ok(())
    }

    /// What fails is tried again over other connections.
    fn patiently(
        &mut self,
        mut call: impl FnMut(&mut Self, Instant) -> Result<(), WireError>,
    ) -> Result<(), KafkaError> {
        patiently(self.outage, |deadline| {
            let done = call(self, deadline);
            if done.is_err() {
                // In order, as a partition's batches are all in one lane: its leader is another only from here on.
                let unanswered: Vec<Vec<Sent>> =
                    self.lanes.drain(..).flat_map(|lane| lane.requests).collect();
                unanswered.into_iter().rev().for_each(|group| self.waiting.push_front(group));
                self.partitions.iter_mut().for_each(|partition| partition.leader = None);
            }
            if matches!(done, Err(WireError::Again(_))) {
                // The broker that named this leader may not know the next one.
                self.cluster.doubt();
            }
            done
        })
    }

    /// Sends what waits.
    fn transmit(&mut self, deadline: Instant) -> Result<(), WireError> {
        while let Some(group) = self.waiting.front_mut() {
            let Some(first) = group.first() else {
                self.waiting.pop_front();
                continue;
            };
            let Some(leader) = self.partitions[first.partition].leader.clone() else {
                self.find_leaders(deadline)?;
                continue;
            };
            // A connection is outlived by its login between two requests only.
            self.lanes.retain(|lane| !(lane.requests.is_empty() && lane.broker.expired()));
            let place = match self.lanes.iter().position(|lane| lane.node == leader.node) {
                Some(place) => place,
                None => {
                    let broker = self.cluster.connect(&leader.host, leader.port, deadline)?;
                    self.lanes.push(Lane { node: leader.node, broker, requests: VecDeque::new() });
                    self.lanes.len() - 1
                }
            };
            let lane = &mut self.lanes[place];
            // From here on they are the lane's, whatever happens.
            let partitions = &self.partitions;
            let of_lane = |sent: &mut Sent| {
                partitions[sent.partition].leader.as_ref().is_some_and(|leader| leader.node == lane.node)
            };
            let batches: Vec<Sent> = group.extract_if(.., of_lane).collect();
            let request = request(&self.transactional_id, self.outage, partitions, &batches);
            lane.requests.push_back(batches);
            lane.broker.send(&request, PRODUCE, deadline)?;
        }
        Ok(())
    }

    fn find_leaders(&mut self, deadline: Instant) -> Result<(), WireError> {
        let topics = self.partitions.iter().map(|partition| partition.topic.clone()).collect();
        let leaders = self.cluster.leaders(topics, deadline)?;
        for (partition, leader) in self.partitions.iter_mut().zip(leaders) {
            partition.leader.get_or_insert(leader);
        }
        Ok(())
    }

    /// Takes in the answer to the oldest request of each lane that has more than `count`.
    fn acknowledge(&mut self, count: usize, deadline: Instant) -> Result<(), WireError> {
        for lane in self.lanes.iter_mut().filter(|lane| lane.requests.len() > count) {
            let answer = lane.broker.receive::<ProduceRequest>(PRODUCE, deadline)?;
            for sent in lane.requests.front().into_iter().flatten() {
                let partition = &mut self.partitions[sent.partition];
                partition.end = Some(sent.taken(&partition.topic, &answer)?);
            }
            lane.requests.pop_front();
        }
        Ok(())
    }
}

impl Sent {
    /// The offset after it, if the answer says that it was taken.
    fn taken(&self, topic: &StrBytes, answer: &ProduceResponse) -> Result<i64, WireError> {
        let doing = || format!("topic \"{}\" did not take a batch of records", &**topic);
        let of_topic = answer.responses.iter().find(|answer| answer.name.0 == *topic);
        let partition = of_topic.and_then(|of_topic| of_topic.partition_responses.first());
        let partition = partition.ok_or_else(|| WireError::Again(doing()))?;
        match Code::try_from_code(partition.error_code) {
            None => {}
            Some(Code::MessageTooLarge) => return Err(self.refused(topic, "max.message.bytes").into()),
            Some(Code::RecordListTooLarge) => return Err(self.refused(topic, "segment.bytes").into()),
            Some(code) => match rejection(code, topic) {
                Some(refusal) => return Err(KafkaError::Refused(refusal).into()),
                None => judge(partition.error_code, doing)?,
            },
        }
        if partition.base_offset < 0 {
            let what = format!("topic \"{}\" took records and did not tell their offsets", &**topic);
            return Err(KafkaError::Unavailable(what).into());
        }
        Ok(partition.base_offset + i64::from(self.count))
    }

    /// It is larger than this setting of the topic allows.
    fn refused(&self, topic: &str, setting: &str) -> KafkaError {
        let Largest { len, key } = &self.largest;
        let what = match self.count {
            1 => format!("a record of {len} bytes, key {key}"),
            count => format!(
                "{count} records of {} bytes together, of which the largest has {len} bytes and the key {key}",
                self.bytes.len()
            ),
        };
        KafkaError::Refused(Refusal::new(
            format!("topic \"{topic}\" does not take {what}"),
            format!(
                "raise its limit: {} (max.message.bytes at most {BATCH_MAX_LEN}); or have the largest columns of such rows left \
                 out, with [postgres.oversize] \"schema.table\" = \"omit\" in the configuration",
                alter(topic, &format!("{setting}=N"))
            ),
        ))
    }
}

fn request(
    transactional_id: &TransactionalId,
    outage: Duration,
    partitions: &[Partition],
    batches: &[Sent],
) -> ProduceRequest {
    let topics = batches.iter().map(|sent| {
        let data = PartitionProduceData::default().with_index(0).with_records(Some(sent.bytes.clone()));
        let topic = TopicName(partitions[sent.partition].topic.clone());
        TopicProduceData::default().with_name(topic).with_partition_data(vec![data])
    });
    ProduceRequest::default()
        .with_transactional_id(Some(transactional_id.clone()))
        .with_acks(ACKS_ALL)
        .with_timeout_ms(i32::try_from(outage.as_millis()).unwrap_or(i32::MAX))
        .with_topic_data(topics.collect())
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
