//! The committed records of a topic's partition 0 from an offset on, fetched ahead on a thread of their own.

use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use kafka_protocol::ResponseError as Code;
use kafka_protocol::messages::fetch_request::{FetchPartition, FetchTopic};
use kafka_protocol::messages::{BrokerId, FetchRequest, FetchResponse, TopicName};
use kafka_protocol::protocol::StrBytes;
use worker::{FeedError, LogBatch};

use super::broker::{Broker, WireError};
use super::cluster::{Cluster, Leader, judge, patiently};
use super::records::{Aborted, Encoded, Unreadable, batches};
use crate::{Connection, KafkaError};

/// The last with topics by name. The broker compares the epoch of what was read last with its own log.
const FETCH: i16 = 12;
/// The broker answers at once where there is something, and after so long where there is nothing.
const MAX_WAIT: Duration = Duration::from_millis(500);
/// Bytes that one answer may bring; a larger batch comes alone.
const ANSWER_LEN: i32 = 1 << 20;
/// Bytes of records after which a batch takes no further one of Kafka's; one of more is not filled again.
const BATCH_LEN: usize = 512 << 10;
const BATCH_KEPT_LEN: usize = 4 << 20;
/// Another broker is asked who leads the partition after this time in which nothing came, and after this time in any
/// case. A leader that was replaced, and does not know it, has nothing new and says no more than that.
const LOOK_IDLE: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_secs(60);
/// The same where records are known to be there that do not come.
const LOOK_BEHIND: Duration = Duration::from_secs(2);
/// The longest wait for that broker's answer.
const LOOK_LIMIT: Duration = Duration::from_secs(2);
/// Batches that wait to be taken.
const AHEAD: usize = 2;
/// Records of transactions that are not committed are not asked for.
const READ_COMMITTED: i8 = 1;
/// For no session of fetches, no log of a follower's, and no batch read before.
const NONE: i32 = -1;

/// The near end. Where it is dropped the thread ends, at the latest with the broker's next answer.
pub(crate) struct Fetch {
    batches: Receiver<Result<Passed, FeedError>>,
    used: Sender<LogBatch>,
    /// The log is known to hold committed records below this offset.
    log_end: Arc<AtomicI64>,
}

impl Fetch {
    pub(crate) fn start(connection: &Connection, topic: &str, offset: i64) -> Result<Self, KafkaError> {
        let log_end = Arc::new(AtomicI64::new(0));
        let (to, batches) = sync_channel(AHEAD);
        let (used, to_fill) = channel();
        let fetcher = Fetcher {
            cluster: connection.cluster(),
            outage: connection.outage(),
            topic: StrBytes::from_string(topic.to_owned()),
            offset,
            leader_epoch: NONE,
            asked: None,
            leader: None,
            heard: Instant::now(),
            looked: Instant::now(),
            filling: LogBatch::default(),
            to_fill,
            to,
            log_end: Arc::downgrade(&log_end),
        };
        thread::Builder::new()
            .name("kafka-fetch".into())
            .spawn(move || fetcher.run())
            .map_err(|error| KafkaError::Unavailable(format!("cannot start a thread: {error}")))?;
        Ok(Fetch { batches, used, log_end })
    }

    /// Says that the log holds committed records below this offset. Where they do not come, their leader is looked for.
    pub(crate) fn expect(&self, log_end: i64) {
        self.log_end.store(log_end, Ordering::Relaxed);
    }

    /// Puts the records that come next into `batch`, in exchange for its memory, waiting for them at most `timeout`, and
    /// returns the offset up to which all are read then; `None` where nothing came. After an error nothing more comes.
    pub(crate) fn next(&mut self, timeout: Duration, batch: &mut LogBatch) -> Result<Option<i64>, FeedError> {
        match self.batches.recv_timeout(timeout) {
            Ok(passed) => {
                let (records, next) = passed?;
                // That it is not wanted any more, the next call says.
                let _ = self.used.send(std::mem::replace(batch, records));
                Ok(Some(next))
            }
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => {
                Err(FeedError::Unavailable("the log is not fetched any more".to_owned()))
            }
        }
    }
}

/// Records, or none where only markers stood, and the offset after them.
type Passed = (LogBatch, i64);

/// The far end.
struct Fetcher {
    cluster: Cluster,
    outage: Duration,
    topic: StrBytes,
    /// Of the next record that is wanted.
    offset: i64,
    /// Of the last batch that came.
    leader_epoch: i32,
    /// The connection over which an answer is owed.
    asked: Option<Broker>,
    /// Whom it leads to, as far as is known.
    leader: Option<Leader>,
    /// When records came last, and when it was last asked who leads the partition.
    heard: Instant,
    looked: Instant,
    filling: LogBatch,
    to_fill: Receiver<LogBatch>,
    to: SyncSender<Result<Passed, FeedError>>,
    /// See [`Fetch::expect`]. Gone with the near end.
    log_end: Weak<AtomicI64>,
}

/// What the broker has from one offset on.
struct Answer {
    from: i64,
    batches: Vec<Encoded>,
    aborted: Aborted,
}

impl Fetcher {
    fn run(mut self) {
        loop {
            let answer = patiently(self.outage, |deadline| self.answer(deadline));
            match answer.map_err(FeedError::from).and_then(|answer| self.hand_over(answer)) {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    // Where nobody reads any more, nobody misses it.
                    let _ = self.to.send(Err(error));
                    return;
                }
            }
        }
    }

    /// What comes next. What follows that is asked for, and comes while this is taken apart.
    fn answer(&mut self, deadline: Instant) -> Result<Answer, WireError> {
        let Some(log_end) = self.log_end.upgrade() else {
            return Err(KafkaError::Unavailable("nobody reads any more".to_owned()).into());
        };
        self.look_for_leader(log_end.load(Ordering::Relaxed));
        let answer = self.next_answer(deadline);
        if matches!(answer, Err(WireError::Again(_))) {
            // The broker that named this leader may not know the next one.
            self.leader = None;
            self.cluster.doubt();
        }
        answer
    }

    fn next_answer(&mut self, deadline: Instant) -> Result<Answer, WireError> {
        let mut broker = match self.asked.take() {
            Some(broker) => broker,
            None => {
                let leader = match self.leader.take() {
                    Some(leader) => leader,
                    None => self.cluster.leaders(vec![self.topic.clone()], deadline)?.remove(0),
                };
                let mut broker = self.cluster.connect(&leader.host, leader.port, deadline)?;
                self.leader = Some(leader);
                self.ask(&mut broker, deadline)?;
                broker
            }
        };
        let response = broker.receive::<FetchRequest>(FETCH, deadline)?;
        let answer = self.take_in(response)?;
        if !answer.batches.is_empty() {
            self.heard = Instant::now();
        }
        // Where that fails, the next try is over another connection.
        if !broker.expired() && self.ask(&mut broker, deadline).is_ok() {
            self.asked = Some(broker);
        }
        Ok(answer)
    }

    /// Asks another broker now and then who leads the partition, and turns to a new leader. Where none answers, the
    /// present leader is read on.
    fn look_for_leader(&mut self, log_end: i64) {
        let Some(leader) = &self.leader else { return };
        let idle = self.heard.elapsed().min(self.looked.elapsed());
        let behind = log_end > self.offset && idle >= LOOK_BEHIND;
        if !behind && idle < LOOK_IDLE && self.looked.elapsed() < LOOK {
            return;
        }
        self.looked = Instant::now();
        self.cluster.doubt();
        let found = self.cluster.leaders(vec![self.topic.clone()], self.looked + LOOK_LIMIT);
        let Some(found) = found.ok().and_then(|mut leaders| leaders.pop()) else { return };
        if found.epoch > leader.epoch {
            tracing::info!(
                topic = &*self.topic,
                broker = found.node,
                epoch = found.epoch,
                "the log has a new leader"
            );
            self.asked = None;
            self.leader = Some(found);
        }
    }

    fn ask(&self, broker: &mut Broker, deadline: Instant) -> Result<(), WireError> {
        let partition = FetchPartition::default()
            .with_partition(0)
            .with_current_leader_epoch(self.leader.as_ref().map_or(NONE, |leader| leader.epoch))
            .with_fetch_offset(self.offset)
            .with_last_fetched_epoch(self.leader_epoch)
            .with_partition_max_bytes(ANSWER_LEN);
        let topic =
            FetchTopic::default().with_topic(TopicName(self.topic.clone())).with_partitions(vec![partition]);
        let request = FetchRequest::default()
            .with_replica_id(BrokerId(NONE))
            .with_max_wait_ms(MAX_WAIT.as_millis() as i32)
            .with_min_bytes(1)
            .with_max_bytes(ANSWER_LEN)
            .with_isolation_level(READ_COMMITTED)
            .with_session_epoch(NONE)
            .with_topics(vec![topic]);
        broker.send(&request, FETCH, deadline)
    }

    fn take_in(&mut self, response: FetchResponse) -> Result<Answer, WireError> {
        let doing = || format!("cannot read topic \"{}\"", &*self.topic);
        judge(response.error_code, doing)?;
        let partition = response.responses.into_iter().flat_map(|topic| topic.partitions).next();
        let partition = partition.ok_or_else(|| WireError::Again(doing()))?;
        // Another leader's log is another from somewhere before here on.
        let diverged = partition.diverging_epoch.end_offset >= 0;
        if diverged || partition.error_code == Code::OffsetOutOfRange.code() {
            // Not refused: while this process was frozen, retention may have passed this place, which another worker has
            // left long ago. Where the stores are is read again, and decides.
            let what = format!(
                "topic \"{}\" does not hold offset {} as it was read before",
                &*self.topic, self.offset
            );
            return Err(KafkaError::Unavailable(what).into());
        }
        judge(partition.error_code, doing)?;
        let records = partition.records.unwrap_or_default();
        let again = |what: String| WireError::Again(format!("{}: {what}", doing()));
        let cut = !records.is_empty();
        let batches = batches(records).map_err(again)?;
        if batches.is_empty() && cut {
            return Err(again("a batch came in part".to_owned()));
        }
        let from = self.offset;
        if let Some(last) = batches.last() {
            self.offset = from.max(last.end);
            self.leader_epoch = last.leader_epoch;
        }
        Ok(Answer {
            from,
            batches,
            aborted: Aborted::new(partition.aborted_transactions.unwrap_or_default()),
        })
    }

    /// Whether all of it was taken.
    fn hand_over(&mut self, mut answer: Answer) -> Result<bool, FeedError> {
        let mut passed = answer.from;
        for batch in answer.batches {
            if !answer.aborted.committed(&batch) {
                continue;
            }
            match batch.append_to(&mut self.filling, answer.from) {
                Ok(()) if self.filling.byte_len() < BATCH_LEN => {}
                Ok(()) => {
                    passed = batch.end;
                    if !self.pass_on(passed) {
                        return Ok(false);
                    }
                }
                Err(Unreadable { offset, reason }) => {
                    // Those before it, and not as if it had been read.
                    self.pass_on(offset);
                    return Err(FeedError::Poison { offset, reason });
                }
            }
        }
        Ok(passed >= self.offset || self.pass_on(self.offset))
    }

    fn pass_on(&mut self, next: i64) -> bool {
        let mut empty = self.to_fill.try_recv().unwrap_or_default();
        if empty.byte_len() > BATCH_KEPT_LEN {
            empty = LogBatch::default();
        }
        empty.clear();
        self.to.send(Ok((std::mem::replace(&mut self.filling, empty), next))).is_ok()
    }
}
