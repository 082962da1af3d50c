//! Which broker to ask for what, and what its error codes mean to us.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use change::Refusal;
use kafka_protocol::ResponseError as Code;
use kafka_protocol::messages::metadata_request::MetadataRequestTopic;
use kafka_protocol::messages::metadata_response::{
    MetadataResponseBroker, MetadataResponsePartition, MetadataResponseTopic,
};
use kafka_protocol::messages::{FindCoordinatorRequest, MetadataRequest, MetadataResponse, TopicName};
use kafka_protocol::protocol::{Request, StrBytes};

use super::broker::{Broker, WireError};
use super::security::Security;
use crate::KafkaError;

/// The first that names a partition's leader epoch.
const METADATA: i16 = 7;
const FIND_COORDINATOR: i16 = 1;
/// Of what is asked a coordinator for: a transaction.
const TRANSACTION_KEY: i8 = 1;
/// The port where a bootstrap server names none.
const PORT: u16 = 9092;
/// Between two tries: longer by a fifth each time, from the first to the last. The first are short, as a broker that has
/// committed a transaction takes a millisecond or some to end it, and begins no other before.
const RETRY: (Duration, Duration) = (Duration::from_micros(500), Duration::from_millis(200));
/// Before another connection is made.
const RECONNECT: Duration = Duration::from_millis(20);
/// One try may take so much of all the time there is: a broker that keeps silent leaves time for another.
const TRIES: u32 = 3;
/// A coordinator that is busy for longer is looked for again, at another broker. Usually it takes some milliseconds to
/// end a transaction.
const BUSY_LIMIT: Duration = Duration::from_secs(1);
/// After so long without success it is told.
const TELL_AFTER: Duration = Duration::from_secs(1);

/// The brokers.
///
/// A broker that is cut off from the controller, but not from its clients, does not know that another broker has become
/// the leader in its place. It goes on naming itself as the leader, and cannot do what needs the other brokers. So after
/// a failure the broker that was asked for the leader is asked last, and a leader of an earlier epoch is not believed.
#[derive(Clone)]
pub(crate) struct Cluster {
    bootstrap: Vec<Address>,
    known: Arc<Mutex<Known>>,
    security: Security,
    client_id: String,
}

type Address = (String, u16);

/// What the brokers' answers have told. Shared by everything that was cloned from one [`Cluster`].
struct Known {
    /// Bootstrap servers, and the brokers that the last answer named, in the order in which they are asked.
    brokers: Vec<Address>,
    /// True once an answer has named the brokers.
    named: bool,
    /// The latest epoch in which partition 0 of a topic had a leader.
    epochs: HashMap<StrBytes, i32>,
}

impl Cluster {
    /// Brokers at `host:port,...`.
    pub(crate) fn new(bootstrap: &str, security: Security, client_id: &str) -> Result<Self, Refusal> {
        let parse = |server: &str| {
            let server = server.trim();
            // As librdkafka takes it: a protocol may stand before it.
            let server = server.split_once("://").map_or(server, |(_, rest)| rest);
            let bracketed = server.strip_prefix('[').and_then(|rest| rest.split_once(']'));
            let (host, port) = match bracketed.or_else(|| Some(server.split_at(server.find(':')?))) {
                Some((host, port)) => (host, port),
                None => (server, ""),
            };
            let port = match port.strip_prefix(':') {
                Some(port) => port.parse().ok()?,
                None => PORT,
            };
            (!host.is_empty()).then(|| (host.to_owned(), port))
        };
        let bootstrap = bootstrap.split(',').map(parse).collect::<Option<Vec<_>>>().ok_or_else(|| {
            Refusal::new(
                format!("kafka.bootstrap is `{bootstrap}`"),
                "write it as `host:port`, several by comma",
            )
        })?;
        let known = Known { brokers: bootstrap.clone(), named: false, epochs: HashMap::new() };
        let known = Arc::new(Mutex::new(known));
        Ok(Cluster { bootstrap, known, security, client_id: client_id.to_owned() })
    }

    /// `host:port,...` of all brokers that are known.
    pub(crate) fn addresses(&self) -> String {
        let known = self.known();
        let address = |(host, port): &Address| match host.contains(':') {
            true => format!("[{host}]:{port}"),
            false => format!("{host}:{port}"),
        };
        known.brokers.iter().map(address).collect::<Vec<_>>().join(",")
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has another broker asked next. For a caller that was sent to a broker that did not do what it should.
    pub(super) fn doubt(&self) {
        let brokers = &mut self.known().brokers;
        if !brokers.is_empty() {
            brokers.rotate_left(1);
        }
    }

    pub(super) fn connect(&self, host: &str, port: u16, deadline: Instant) -> Result<Broker, WireError> {
        Broker::connect((host, port), &self.security, &self.client_id, deadline)
    }

    /// Asks the brokers, until one answers. That one is the first to be asked the next time.
    fn ask<R: Request>(
        &self,
        request: &R,
        version: i16,
        deadline: Instant,
    ) -> Result<R::Response, WireError> {
        let mut last = WireError::Again("no bootstrap server".to_owned());
        let brokers = self.known().brokers.clone();
        for (tried, (host, port)) in brokers.iter().enumerate() {
            // None may take the time of those behind it.
            let left = deadline.saturating_duration_since(Instant::now());
            let deadline = Instant::now() + left / u32::try_from(brokers.len() - tried).unwrap_or(1);
            let broker = self.connect(host, *port, deadline);
            match broker.and_then(|mut broker| broker.ask(request, version, deadline)) {
                Err(error @ (WireError::Again(_) | WireError::Busy(_))) => last = error,
                done => {
                    self.known().prefer(&brokers[tried]);
                    return done;
                }
            }
        }
        Err(last)
    }

    /// Has the brokers named, unless they have been: the only bootstrap server may be the wrong one to ask for more.
    fn learn_brokers(&self, deadline: Instant) -> Result<(), WireError> {
        if self.known().named {
            return Ok(());
        }
        let found =
            self.ask(&MetadataRequest::default().with_topics(Some(Vec::new())), METADATA, deadline)?;
        self.known().learn(&self.bootstrap, &found);
        Ok(())
    }

    /// The brokers that lead partition 0 of each of these topics.
    pub(super) fn leaders(&self, topics: Vec<StrBytes>, deadline: Instant) -> Result<Vec<Leader>, WireError> {
        let asked = topics
            .iter()
            .map(|topic| MetadataRequestTopic::default().with_name(Some(TopicName(topic.clone()))));
        let request = MetadataRequest::default()
            .with_topics(Some(asked.collect()))
            .with_allow_auto_topic_creation(false);
        let found = self.ask(&request, METADATA, deadline)?;
        let mut known = self.known();
        known.learn(&self.bootstrap, &found);
        let mut leader = |topic: &StrBytes| {
            let doing = || format!("topic \"{}\" has no leader", &**topic);
            let missing = || WireError::Again(doing());
            let named =
                |found: &&MetadataResponseTopic| found.name.as_ref().is_some_and(|name| name.0 == *topic);
            let described = found.topics.iter().find(named).ok_or_else(missing)?;
            judge(described.error_code, doing)?;
            let partition = described.partitions.iter().find(|partition| partition.partition_index == 0);
            let partition = partition.ok_or_else(missing)?;
            judge(partition.error_code, doing)?;
            known.demand_latest(topic, partition)?;
            let broker = found.brokers.iter().find(|broker| broker.node_id == partition.leader_id);
            let broker = broker.ok_or_else(missing)?;
            Ok(Leader {
                node: broker.node_id.0,
                epoch: partition.leader_epoch,
                host: broker.host.clone(),
                port: port(broker.port)?,
            })
        };
        let leaders = topics.iter().map(&mut leader).collect();
        drop(known);
        if matches!(leaders, Err(WireError::Again(_))) {
            self.doubt();
        }
        leaders
    }
}

impl Known {
    /// Has this broker asked first.
    fn prefer(&mut self, broker: &Address) {
        if let Some(place) = self.brokers.iter().position(|known| known == broker) {
            self.brokers[..=place].rotate_right(1);
        }
    }

    /// Takes in the brokers that an answer names, without changing the order of those known before.
    fn learn(&mut self, bootstrap: &[Address], found: &MetadataResponse) {
        let address =
            |broker: &MetadataResponseBroker| Some((broker.host.to_string(), port(broker.port).ok()?));
        let named: Vec<Address> = found.brokers.iter().filter_map(address).collect();
        self.brokers.retain(|known| named.contains(known) || bootstrap.contains(known));
        let new = named.into_iter().filter(|named| !self.brokers.contains(named)).collect::<Vec<_>>();
        self.brokers.extend(new);
        self.named = true;
    }

    /// Fails if a later leader of the partition is known than the one that was named.
    fn demand_latest(
        &mut self,
        topic: &StrBytes,
        named: &MetadataResponsePartition,
    ) -> Result<(), WireError> {
        let epoch = self.epochs.entry(topic.clone()).or_insert(named.leader_epoch);
        if named.leader_epoch < *epoch {
            return Err(WireError::Again(format!(
                "broker {} is named as the leader of topic \"{}\" in epoch {}, which ended: there was one in epoch {epoch}",
                named.leader_id.0, &**topic, named.leader_epoch
            )));
        }
        *epoch = named.leader_epoch;
        Ok(())
    }
}

fn port(port: i32) -> Result<u16, WireError> {
    port.try_into().map_err(|_| WireError::Again(format!("a broker at port {port}")))
}

/// A broker that takes a partition's records.
#[derive(Clone)]
pub(super) struct Leader {
    pub(super) node: i32,
    /// The number of its leadership; -1 where the brokers do not count.
    pub(super) epoch: i32,
    pub(super) host: StrBytes,
    pub(super) port: u16,
}

/// The coordinator of a `transactional.id`, over a connection that is made anew when it is lost.
pub(crate) struct Coordinator {
    cluster: Cluster,
    transactional_id: StrBytes,
    broker: Option<Broker>,
    /// Since when it has been busy with the transaction before.
    busy: Option<Instant>,
}

impl Coordinator {
    /// One that has not been looked for.
    pub(crate) fn of(cluster: Cluster, transactional_id: StrBytes) -> Self {
        Coordinator { cluster, transactional_id, broker: None, busy: None }
    }

    /// The connection, if there is one.
    pub(crate) fn connected(&mut self) -> Option<&mut Broker> {
        self.broker.as_mut()
    }

    /// Finds it and connects, where there is no connection.
    pub(crate) fn connect(&mut self, deadline: Instant) -> Result<&mut Broker, WireError> {
        if self.broker.as_ref().is_some_and(Broker::expired) {
            self.broker = None;
        }
        match &mut self.broker {
            Some(broker) => Ok(broker),
            none => {
                self.cluster.learn_brokers(deadline)?;
                let request = FindCoordinatorRequest::default()
                    .with_key(self.transactional_id.clone())
                    .with_key_type(TRANSACTION_KEY);
                let found = self.cluster.ask(&request, FIND_COORDINATOR, deadline)?;
                let connected = judge(found.error_code, || "transactions have no coordinator".to_owned())
                    .and_then(|()| self.cluster.connect(&found.host, port(found.port)?, deadline));
                match connected {
                    Ok(broker) => Ok(none.insert(broker)),
                    Err(error) => {
                        // Another broker may know a later coordinator.
                        self.cluster.doubt();
                        Err(error)
                    }
                }
            }
        }
    }

    /// Has the next request look for the coordinator again, at another broker.
    fn lose(&mut self) {
        self.broker = None;
        self.cluster.doubt();
    }

    /// Asks it. Where that fails, the next request goes over another connection.
    pub(crate) fn ask<R: Request>(
        &mut self,
        request: &R,
        version: i16,
        deadline: Instant,
    ) -> Result<R::Response, WireError> {
        let answer = self.connect(deadline)?.ask(request, version, deadline);
        if answer.is_err() {
            self.lose();
        }
        answer
    }

    /// What the code in one of its answers means. Where it may be the wrong coordinator, the next request finds another.
    pub(crate) fn judge(&mut self, code: i16, doing: &str) -> Result<(), WireError> {
        let judged = judge(code, || doing.to_owned());
        let busy = matches!(judged, Err(WireError::Busy(_)));
        let since = *self.busy.get_or_insert_with(Instant::now);
        // A coordinator that was cut off from the other brokers does not come to the end of what it began.
        let stuck = busy && since.elapsed() >= BUSY_LIMIT;
        if stuck || matches!(judged, Err(WireError::Again(_))) {
            self.lose();
        }
        self.busy = Some(since).filter(|_| busy && !stuck);
        judged
    }
}

/// What an error code means; `doing` says what failed.
pub(super) fn judge(code: i16, doing: impl FnOnce() -> String) -> Result<(), WireError> {
    let Some(code) = Code::try_from_code(code) else { return Ok(()) };
    let error = match code {
        Code::InvalidProducerEpoch | Code::ProducerFenced => KafkaError::Fenced,
        Code::TopicAuthorizationFailed
        | Code::ClusterAuthorizationFailed
        | Code::TransactionalIdAuthorizationFailed => {
            KafkaError::unauthorized(format!("{}: {code}", doing()))
        }
        Code::InvalidTransactionTimeout => KafkaError::Refused(Refusal::new(
            format!("{}: {code}", doing()),
            "set transaction.timeout.ms in [kafka.properties] to no more than the brokers' transaction.max.timeout.ms",
        )),
        Code::UnsupportedVersion => KafkaError::Refused(Refusal::new(
            format!("{}: {code}", doing()),
            "Millrace needs Kafka 3.6 or later, or a service that keeps to its protocol",
        )),
        Code::ConcurrentTransactions => return Err(WireError::Busy(format!("{}: {code}", doing()))),
        code if code.is_retriable() => return Err(WireError::Again(format!("{}: {code}", doing()))),
        code => KafkaError::Unavailable(format!("{}: {code}", doing())),
    };
    Err(error.into())
}

/// Calls until it works, trying again does not help, or the brokers have been away for `outage`.
pub(crate) fn patiently<T>(
    outage: Duration,
    mut call: impl FnMut(Instant) -> Result<T, WireError>,
) -> Result<T, KafkaError> {
    let start = Instant::now();
    let (mut pause, mut told) = (RETRY.0, false);
    loop {
        let (state, what, wait) = match call((start + outage).min(Instant::now() + outage / TRIES)) {
            Ok(value) => return Ok(value),
            Err(WireError::Kafka(error)) => return Err(error),
            Err(WireError::Busy(what)) => ("busy", what, pause),
            Err(WireError::Again(what)) => ("away", what, pause.max(RECONNECT)),
        };
        if start.elapsed() + wait >= outage {
            return Err(KafkaError::Unavailable(format!("Kafka has been {state} for {outage:?}: {what}")));
        }
        if start.elapsed() >= TELL_AFTER && !std::mem::replace(&mut told, true) {
            tracing::warn!(reason = what, limit = ?outage, "Kafka is {state}; trying again");
        }
        std::thread::sleep(wait);
        pause = (pause * 6 / 5).min(RETRY.1);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn parsed(bootstrap: &str) -> Option<Vec<(String, u16)>> {
        let security = Security::new(&BTreeMap::new()).unwrap();
        Cluster::new(bootstrap, security, "test").ok().map(|cluster| cluster.bootstrap)
    }

    fn cluster(bootstrap: &str) -> Cluster {
        Cluster::new(bootstrap, Security::new(&BTreeMap::new()).unwrap(), "test").unwrap()
    }

    fn order(cluster: &Cluster) -> String {
        let known = cluster.known();
        known.brokers.iter().map(|(host, _)| host.as_str()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_broker_whose_word_led_to_a_failure_is_asked_last() {
        let cluster = cluster("a:1,b:1,c:1");
        cluster.known().prefer(&("b".to_owned(), 1));
        assert_eq!((order(&cluster), cluster.addresses()), ("b a c".to_owned(), "b:1,a:1,c:1".to_owned()));
        cluster.doubt();
        assert_eq!(order(&cluster), "a c b");
    }

    #[test]
    fn brokers_that_an_answer_names_are_known_for_as_long_as_answers_name_them() {
        let cluster = cluster("a:1,b:1");
        let answer = |hosts: &[&'static str]| {
            let named = |host: &&'static str| {
                MetadataResponseBroker::default().with_host(StrBytes::from_static_str(host)).with_port(1)
            };
            MetadataResponse::default().with_brokers(hosts.iter().map(named).collect())
        };
        for (hosts, expected) in [(&["b", "c", "d"][..], "a b c d"), (&["d", "e"], "a b d e")] {
            cluster.known().learn(&cluster.bootstrap, &answer(hosts));
            assert_eq!(order(&cluster), expected);
        }
    }

    #[test]
    fn a_leader_whose_time_is_over_is_not_believed() {
        let cluster = cluster("a:1");
        let named = |topic: &'static str, epoch| {
            let partition = MetadataResponsePartition::default().with_leader_epoch(epoch);
            cluster.known().demand_latest(&StrBytes::from_static_str(topic), &partition).is_ok()
        };
        assert!(named("t", 5) && named("t", 5) && named("t", 6) && !named("t", 5) && named("t", 6));
        assert!(named("other", 1), "each topic has epochs of its own");
    }

    #[test]
    fn bootstrap_servers_are_read_as_librdkafka_reads_them() {
        let at = |host: &str, port| (host.to_owned(), port);
        assert_eq!(parsed("a:1, b"), Some(vec![at("a", 1), at("b", 9092)]));
        assert_eq!(parsed("SASL_SSL://a:1"), Some(vec![at("a", 1)]));
        assert_eq!(parsed("[::1]:9,[fe80::1]"), Some(vec![at("::1", 9), at("fe80::1", 9092)]));
        assert_eq!(parsed("a:x"), None);
        assert_eq!(parsed(""), None);
    }
}
