//! A transactional producer of which every call ends in time and every record is accounted for.
//!
//! The order that exactly-once rests on: a transaction is committed only when the brokers have acknowledged every batch
//! of it. Whatever else happens, the producer is dropped with its transaction open; the next one with the same
//! `transactional.id` aborts it while it starts, and fences this one.
//!
//! Lost connections are made again, and what was not answered is asked once more, with one exception: the commit. With
//! two of them on their way the later could end the next transaction. Whether the first took effect, the ledger tells.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use kafka_protocol::ResponseError;
use kafka_protocol::messages::add_partitions_to_txn_request::AddPartitionsToTxnTopic;
use kafka_protocol::messages::{
    AddPartitionsToTxnRequest, AddPartitionsToTxnResponse, EndTxnRequest, InitProducerIdRequest,
    ProducerId as ProducerNumber, TopicName, TransactionalId,
};
use kafka_protocol::protocol::StrBytes;

use crate::publisher::now_ms;
use crate::wire::batch::{Batch, Compression, ProducerId, Record};
use crate::wire::broker::WireError;
use crate::wire::cluster::{Coordinator, patiently};
use crate::wire::outbox::Outbox;
use crate::{Connection, KafkaError, Names};

/// How long a clean stop tries to abort what is open; a new producer does it anyway.
const ABORT_LIMIT: Duration = Duration::from_secs(1);

/// How long a coordinator may take over a request that may be repeated.
const BRIEF_LIMIT: Duration = Duration::from_secs(5);

// Versions of the requests. Every broker that Millrace supports (Kafka 3.6 and later) knows them.
const INIT_PRODUCER_ID: i16 = 1;
const ADD_PARTITIONS: i16 = 2;
const END_TXN: i16 = 2;

/// The answer while a transaction of the same id has not ended.
const UNENDED: ResponseError = ResponseError::ConcurrentTransactions;

/// The code that a partition has because of another's.
const OPERATION_NOT_ATTEMPTED: i16 = 55;

/// The key of a record that is never committed; see [`Turns::probe`].
const PROBE: &[u8] = b"probe";

pub(crate) struct Producer {
    outage: Duration,
    compression: Compression,
    transactional_id: TransactionalId,
    transaction_timeout: Duration,
    producer: ProducerId,
    /// `None` while the registrar has it.
    coordinator: Option<Coordinator>,
    registrar: Registrar,
    /// What came of the last registration. `None` once a failure was told: nothing can be done with this producer then.
    registered: Option<Result<(), KafkaError>>,
    outbox: Outbox,
    /// The topics that the coordinator knows the open transaction to write into.
    topics: Vec<StrBytes>,
    opened: Option<Instant>,
}

/// A log's two producers, of which each writes a transaction in its turn. A broker begins no transaction of a producer before
/// the last one has ended in all its topics, which takes about as long as a small transaction itself; of another producer it
/// does.
///
/// The next one's records are sent only when the commit of the last one was answered: from there on nothing can undo it.
/// So what is aborted has nothing behind it.
pub(crate) struct Turns {
    producers: [Producer; 2],
    turn: usize,
}

impl Turns {
    /// Fences every older writer of the log. Of two that start at once, one has the first producer in the end, with which
    /// every writer begins: the other writes nothing.
    pub(crate) fn start(connection: &Connection, names: &Names) -> Result<Self, KafkaError> {
        let [first, second] = names.transactional_ids();
        let producers = [Producer::start(connection, &first)?, Producer::start(connection, &second)?];
        Ok(Turns { producers, turn: 0 })
    }

    /// The producer whose turn it is.
    pub(crate) fn producer(&mut self) -> &mut Producer {
        &mut self.producers[self.turn]
    }

    /// Commits its transaction, of which every record is settled. The other writes the next.
    pub(crate) fn commit(&mut self) -> Result<(), KafkaError> {
        self.producer().commit()?;
        self.turn = 1 - self.turn;
        Ok(())
    }

    /// Writes a record into `topic`, aborts it, and returns the offset after it. A reader that gets as far as this offset
    /// has everything that earlier writers committed. A broker that is no longer the topic's leader, and does not know
    /// it, cannot take the record, and does not have it.
    pub(crate) fn probe(&mut self, topic: &str) -> Result<i64, KafkaError> {
        self.producers[0].probe(topic)
    }

    /// Fails with [`KafkaError::Fenced`] if a newer writer has started. Every writer begins with the first producer, so
    /// that is the one to ask.
    pub(crate) fn confirm(&mut self, topic: &str) -> Result<(), KafkaError> {
        self.producers[0].confirm(topic)
    }

    /// Only the first of them.
    pub(crate) fn into_first(self) -> Producer {
        let [first, _] = self.producers;
        first
    }
}

impl Producer {
    /// Starts a producer and fences every older one of the same id; returns when their transactions have ended.
    pub(crate) fn start(connection: &Connection, transactional_id: &str) -> Result<Self, KafkaError> {
        let (cluster, outage) = (connection.cluster(), connection.outage());
        let transaction_timeout = connection.transaction_timeout();
        let transactional_id = TransactionalId(StrBytes::from_string(transactional_id.to_owned()));
        let mut coordinator = Coordinator::of(cluster.clone(), transactional_id.0.clone());
        let request = InitProducerIdRequest::default()
            .with_transactional_id(Some(transactional_id.clone()))
            .with_transaction_timeout_ms(i32::try_from(transaction_timeout.as_millis()).unwrap_or(i32::MAX));
        // A coordinator that has lost the end of its own topic asks the leaders for ever to end a transaction that they know to
        // have ended: another transactional id is the way out.
        let unended = format!(
            "cannot start Kafka transactions, for the last one of \"{}\" has not ended (where each of the log's topics has a \
             leader it never will; remedy: `millrace generation new`, while the reader runs)",
            transactional_id.0.as_str()
        );
        let started = patiently(outage, |deadline| {
            let answer = coordinator.ask(&request, INIT_PRODUCER_ID, briefly(deadline))?;
            let unended = Some(&unended).filter(|_| answer.error_code == UNENDED.code());
            let doing = unended.map_or("cannot start Kafka transactions", String::as_str);
            coordinator.judge(answer.error_code, doing)?;
            Ok(answer)
        })?;
        let producer = ProducerId { id: started.producer_id.0, epoch: started.producer_epoch };
        Ok(Producer {
            outage,
            compression: connection.compression(),
            outbox: Outbox::new(cluster, outage, transactional_id.clone(), producer),
            transactional_id,
            transaction_timeout,
            producer,
            coordinator: Some(coordinator),
            registrar: Registrar::start(outage)?,
            registered: Some(Ok(())),
            topics: Vec::new(),
            opened: None,
        })
    }

    /// An empty batch of records.
    pub(crate) fn batch(&self) -> Batch {
        Batch::new(self.compression)
    }

    /// Begins a transaction unless one is open, and has it write into these topics. Does not wait until it can.
    pub(crate) fn begin(&mut self, topics: &[&str]) -> Result<(), KafkaError> {
        self.opened.get_or_insert_with(Instant::now);
        let new = topics.iter().filter(|topic| !self.topics.iter().any(|known| **known == ***topic));
        let new: Vec<StrBytes> = new.map(|topic| StrBytes::from_string((*topic).to_owned())).collect();
        if new.is_empty() {
            return Ok(());
        }
        let request = self.registration(&new);
        let coordinator = self.begun()?;
        self.topics.extend(new);
        self.registrar.register(coordinator, request)
    }

    /// Asks the coordinator whether this producer may still write into `topic`. This begins a transaction if none is open,
    /// so the producer is to be dropped afterwards.
    fn confirm(&mut self, topic: &str) -> Result<(), KafkaError> {
        self.opened.get_or_insert_with(Instant::now);
        let request = self.registration(&[StrBytes::from_string(topic.to_owned())]);
        let mut coordinator = self.begun()?;
        let confirmed = register(&mut coordinator, &request, self.outage);
        self.coordinator = Some(coordinator);
        confirmed.map_err(|error| self.explain(error))
    }

    /// The request that tells the coordinator that a transaction writes into these topics.
    fn registration(&self, topics: &[StrBytes]) -> AddPartitionsToTxnRequest {
        let added = topics.iter().map(|topic| {
            AddPartitionsToTxnTopic::default().with_name(TopicName(topic.clone())).with_partitions(vec![0])
        });
        AddPartitionsToTxnRequest::default()
            .with_v3_and_below_transactional_id(self.transactional_id.clone())
            .with_v3_and_below_producer_id(ProducerNumber(self.producer.id))
            .with_v3_and_below_producer_epoch(self.producer.epoch)
            .with_v3_and_below_topics(added.collect())
    }

    /// Whether the transaction has begun, or could not.
    pub(crate) fn ready(&mut self) -> bool {
        if self.coordinator.is_none()
            && let Some((coordinator, registered)) = self.registrar.look()
        {
            (self.coordinator, self.registered) = (Some(coordinator), Some(registered));
        }
        self.coordinator.is_some()
    }

    /// Sends batches to topics that the transaction [writes into](Self::begin), those that one broker takes in one
    /// request; waits while too many are on their way.
    pub(crate) fn send<const N: usize>(&mut self, batches: [(&str, Batch); N]) -> Result<(), KafkaError> {
        let coordinator = self.begun()?;
        self.coordinator = Some(coordinator);
        let batches =
            batches.into_iter().map(|(topic, batch)| (self.outbox.partition(topic), batch)).collect();
        self.outbox.send(batches).map_err(|error| self.explain(error))
    }

    /// Waits until every record sent is known to be there.
    pub(crate) fn settle(&mut self) -> Result<(), KafkaError> {
        self.outbox.settle().map_err(|error| self.explain(error))
    }

    /// Commits the open transaction, of which every record is settled.
    pub(crate) fn commit(&mut self) -> Result<(), KafkaError> {
        if !self.outbox.settled() {
            return Err(KafkaError::Unavailable(
                "records are on their way that a commit would leave out".into(),
            ));
        }
        self.finish(true)
    }

    /// See [`Turns::probe`].
    fn probe(&mut self, topic: &str) -> Result<i64, KafkaError> {
        let mut batch = self.batch();
        batch.push(&Record { key: Some(PROBE), value: None, timestamp_ms: now_ms() });
        self.begin(&[topic])?;
        self.send([(topic, batch)])?;
        self.settle()?;
        let end = self.written_end(topic);
        self.finish(false)?;
        end.ok_or_else(|| {
            KafkaError::Unavailable(format!("topic \"{topic}\" did not tell a record's offset"))
        })
    }

    /// Ends the open transaction. It is asked for once: see the top of this file.
    fn finish(&mut self, committed: bool) -> Result<(), KafkaError> {
        let request = self.end(committed);
        let mut coordinator = self.begun()?;
        let ended = patiently(self.outage, |deadline| {
            coordinator.connect(deadline)?;
            let answer = coordinator.ask(&request, END_TXN, deadline).map_err(|error| match error {
                WireError::Again(what) => {
                    KafkaError::Unavailable(format!("a Kafka transaction may have ended, or not: {what}"))
                        .into()
                }
                error => error,
            })?;
            coordinator.judge(answer.error_code, "cannot end a Kafka transaction")
        });
        self.coordinator = Some(coordinator);
        ended.map_err(|error| self.explain(error))?;
        self.opened = None;
        self.topics.clear();
        Ok(())
    }

    /// Offset after the last record of a topic that this producer wrote; `None` for none yet.
    pub(crate) fn written_end(&self, topic: &str) -> Option<i64> {
        self.outbox.end(topic)
    }

    fn end(&self, committed: bool) -> EndTxnRequest {
        EndTxnRequest::default()
            .with_transactional_id(self.transactional_id.clone())
            .with_producer_id(ProducerNumber(self.producer.id))
            .with_producer_epoch(self.producer.epoch)
            .with_committed(committed)
    }

    /// Waits until the transaction has begun, and takes the coordinator's connection, to be put back.
    fn begun(&mut self) -> Result<Coordinator, KafkaError> {
        let coordinator = match self.coordinator.take() {
            Some(coordinator) => coordinator,
            None => {
                let (coordinator, registered) = self.registrar.wait()?;
                self.registered = Some(registered);
                coordinator
            }
        };
        let error = match self.registered.take() {
            Some(Ok(())) => {
                self.registered = Some(Ok(()));
                return Ok(coordinator);
            }
            Some(Err(error)) => self.explain(error),
            None => KafkaError::Unavailable("a Kafka transaction could not begin".into()),
        };
        self.coordinator = Some(coordinator);
        Err(error)
    }

    /// The brokers fence a producer also when they abort its overdue transaction; nobody has taken over then.
    fn explain(&self, error: KafkaError) -> KafkaError {
        match (error, self.opened) {
            (KafkaError::Fenced, Some(opened)) if opened.elapsed() >= self.transaction_timeout => {
                KafkaError::Unavailable(format!(
                    "a Kafka transaction was open for {:?} and the brokers aborted it (transaction.timeout.ms)",
                    opened.elapsed()
                ))
            }
            (error, _) => error,
        }
    }
}

impl Drop for Producer {
    fn drop(&mut self) {
        // Readers need not wait for the next producer then. Where it fails, they do. Not while records are on their
        // way: those that came after the abort would begin a transaction that nobody ends.
        let deadline = Instant::now() + ABORT_LIMIT;
        if self.opened.is_some() && self.outbox.settle_quickly(deadline) {
            let request = self.end(false);
            if let Some(broker) = self.coordinator.as_mut().and_then(Coordinator::connected) {
                let _ = broker.ask(&request, END_TXN, deadline);
            }
        }
    }
}

type Registration = (Coordinator, AddPartitionsToTxnRequest);
type Registered = (Coordinator, Result<(), KafkaError>);

/// A thread that tells the coordinator what a transaction writes into, again and again while the last transaction is
/// ending, so that the relay can go on meanwhile. Ends with the producer, or when its last request has.
struct Registrar {
    requests: Sender<Registration>,
    answers: Receiver<Registered>,
}

impl Registrar {
    fn start(outage: Duration) -> Result<Self, KafkaError> {
        let (requests, asked) = channel::<Registration>();
        let (done, answers) = channel();
        let work = move || {
            for (mut coordinator, request) in asked {
                let registered = register(&mut coordinator, &request, outage);
                if done.send((coordinator, registered)).is_err() {
                    return;
                }
            }
        };
        match thread::Builder::new().name("kafka-begin".into()).spawn(work) {
            Ok(_) => Ok(Registrar { requests, answers }),
            Err(error) => Err(KafkaError::Unavailable(format!("cannot start a thread for Kafka: {error}"))),
        }
    }

    fn register(
        &self,
        coordinator: Coordinator,
        request: AddPartitionsToTxnRequest,
    ) -> Result<(), KafkaError> {
        self.requests.send((coordinator, request)).map_err(|_| gone())
    }

    /// The answer, if it has come.
    fn look(&self) -> Option<Registered> {
        self.answers.try_recv().ok()
    }

    fn wait(&self) -> Result<Registered, KafkaError> {
        self.answers.recv().map_err(|_| gone())
    }
}

/// Registers what a transaction writes into. Asks again while the last transaction of the producer is ending.
fn register(
    coordinator: &mut Coordinator,
    request: &AddPartitionsToTxnRequest,
    outage: Duration,
) -> Result<(), KafkaError> {
    patiently(outage, |deadline| {
        let answer = coordinator.ask(request, ADD_PARTITIONS, briefly(deadline))?;
        coordinator.judge(first_error(&answer), "cannot begin a Kafka transaction")
    })
}

/// The deadline of one request that may be repeated: a coordinator that was cut off from the other brokers never answers
/// it, and leaves time to find the next one.
fn briefly(deadline: Instant) -> Instant {
    deadline.min(Instant::now() + BRIEF_LIMIT)
}

fn gone() -> KafkaError {
    KafkaError::Unavailable("the thread that begins Kafka transactions has ended".into())
}

fn first_error(answer: &AddPartitionsToTxnResponse) -> i16 {
    let codes = answer
        .results_by_topic_v3_and_below
        .iter()
        .flat_map(|topic| &topic.results_by_partition)
        .map(|partition| partition.partition_error_code)
        .filter(|code| *code != 0);
    // The cause, not what was left undone because of it.
    codes.min_by_key(|code| *code == OPERATION_NOT_ATTEMPTED).unwrap_or(0)
}
