//! Which broker to ask for what, and what its error codes mean to us.

use std::time::{Duration, Instant};

use change::Refusal;
use kafka_protocol::ResponseError as Code;
use kafka_protocol::messages::metadata_request::MetadataRequestTopic;
use kafka_protocol::messages::metadata_response::MetadataResponseTopic;
use kafka_protocol::messages::{FindCoordinatorRequest, MetadataRequest, TopicName};
use kafka_protocol::protocol::{Request, StrBytes};

use super::broker::{Broker, WireError};
use super::security::Security;
use crate::KafkaError;

const METADATA: i16 = 4;
const FIND_COORDINATOR: i16 = 1;
/// Of what is asked a coordinator for: a transaction.
const TRANSACTION_KEY: i8 = 1;
/// The port where a bootstrap server names none.
const PORT: u16 = 9092;
/// Between two tries: longer by a fifth each time, from the first to the last. The first are short, as a broker that has
/// committed a transaction takes a millisecond or some to end it, and begins no other before.
const RETRY: (Duration, Duration) = (Duration::from_micros(500), Duration::from_millis(200));
/// After so long without success it is told.
const TELL_AFTER: Duration = Duration::from_secs(1);

/// The brokers.
#[derive(Clone)]
pub(crate) struct Cluster {
    bootstrap: Vec<(String, u16)>,
    security: Security,
    client_id: String,
}

impl Cluster {
    /// Brokers at `host:port,...`.
    pub(crate) fn new(bootstrap: &str, security: Security, client_id: &str) -> Result<Self, Refusal> {
        let parse = |server: &str| {
            let server = server.trim();
            // As librdkafka takes it: a protocol may stand before it.
            let server = server.split_once("://").map_or(server, |(_, rest)| rest);
            let (host, port) = match server.rsplit_once(':') {
                Some((host, port)) if !host.ends_with(':') => (host, port.parse().ok()?),
                _ => (server, PORT),
            };
            let host = host.trim_start_matches('[').trim_end_matches(']');
            (!host.is_empty()).then(|| (host.to_owned(), port))
        };
        let bootstrap = bootstrap.split(',').map(parse).collect::<Option<Vec<_>>>().ok_or_else(|| {
            Refusal::new(
                format!("kafka.bootstrap is `{bootstrap}`"),
                "write it as `host:port`, several by comma",
            )
        })?;
        Ok(Cluster { bootstrap, security, client_id: client_id.to_owned() })
    }

    pub(super) fn connect(&self, host: &str, port: u16, deadline: Instant) -> Result<Broker, WireError> {
        Broker::connect((host, port), &self.security, &self.client_id, deadline)
    }

    fn any(&self, deadline: Instant) -> Result<Broker, WireError> {
        let mut last = WireError::Again("no bootstrap server".to_owned());
        for (host, port) in &self.bootstrap {
            match self.connect(host, *port, deadline) {
                Err(error @ WireError::Again(_)) => last = error,
                done => return done,
            }
        }
        Err(last)
    }

    /// The brokers that lead partition 0 of each of these topics.
    pub(super) fn leaders(&self, topics: Vec<StrBytes>, deadline: Instant) -> Result<Vec<Leader>, WireError> {
        let asked = topics.iter().map(|topic| {
            MetadataRequestTopic::default().with_name(Some(TopicName(topic.clone())))
        });
        let request = MetadataRequest::default()
            .with_topics(Some(asked.collect()))
            .with_allow_auto_topic_creation(false);
        let found = self.any(deadline)?.ask(&request, METADATA, deadline)?;
        let leader = |topic: &StrBytes| {
            let doing = || format!("topic \"{}\" has no leader", &**topic);
            let missing = || WireError::Again(doing());
            let named = |found: &&MetadataResponseTopic| found.name.as_ref().is_some_and(|name| name.0 == *topic);
            let topic = found.topics.iter().find(named).ok_or_else(missing)?;
            judge(topic.error_code, doing)?;
            let partition = topic.partitions.iter().find(|partition| partition.partition_index == 0);
            let partition = partition.ok_or_else(missing)?;
            judge(partition.error_code, doing)?;
            let broker = found.brokers.iter().find(|broker| broker.node_id == partition.leader_id);
            let broker = broker.ok_or_else(missing)?;
            Ok(Leader { node: broker.node_id.0, host: broker.host.clone(), port: port(broker.port)? })
        };
        topics.iter().map(leader).collect()
    }
}

fn port(port: i32) -> Result<u16, WireError> {
    port.try_into().map_err(|_| WireError::Again(format!("a broker at port {port}")))
}

/// A broker that takes a partition's records.
#[derive(Clone)]
pub(super) struct Leader {
    pub(super) node: i32,
    pub(super) host: StrBytes,
    pub(super) port: u16,
}

/// The coordinator of a `transactional.id`, over a connection that is made anew when it is lost.
pub(crate) struct Coordinator {
    cluster: Cluster,
    transactional_id: StrBytes,
    broker: Option<Broker>,
}

impl Coordinator {
    /// One that has not been looked for.
    pub(crate) fn of(cluster: Cluster, transactional_id: StrBytes) -> Self {
        Coordinator { cluster, transactional_id, broker: None }
    }

    /// The connection, if there is one.
    pub(crate) fn connected(&mut self) -> Option<&mut Broker> {
        self.broker.as_mut()
    }

    /// Asks it. Where that fails, the next request goes over another connection.
    pub(crate) fn ask<R: Request>(
        &mut self,
        request: &R,
        version: i16,
        deadline: Instant,
    ) -> Result<R::Response, WireError> {
        if self.broker.as_ref().is_some_and(Broker::expired) {
            self.broker = None;
        }
        let broker = match &mut self.broker {
            Some(broker) => broker,
            none => {
                let request = FindCoordinatorRequest::default()
                    .with_key(self.transactional_id.clone())
                    .with_key_type(TRANSACTION_KEY);
                let found = self.cluster.any(deadline)?.ask(&request, FIND_COORDINATOR, deadline)?;
                judge(found.error_code, || "transactions have no coordinator".to_owned())?;
                none.insert(self.cluster.connect(&found.host, port(found.port)?, deadline)?)
            }
        };
        let answer = broker.ask(request, version, deadline);
        if answer.is_err() {
            self.broker = None;
        }
        answer
    }

    /// What the code in one of its answers means. Where it may be the wrong coordinator, the next request finds another.
    pub(crate) fn judge(&mut self, code: i16, doing: &str) -> Result<(), WireError> {
        let judged = judge(code, || doing.to_owned());
        if judged.is_err() && code != Code::ConcurrentTransactions.code() {
            self.broker = None;
        }
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
        | Code::TransactionalIdAuthorizationFailed => KafkaError::unauthorized(format!("{}: {code}", doing())),
        code if code == Code::ConcurrentTransactions || code.is_retriable() => {
            return Err(WireError::Again(format!("{}: {code}", doing())));
        }
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
        let what = match call(start + outage) {
            Ok(value) => return Ok(value),
            Err(WireError::Kafka(error)) => return Err(error),
            Err(WireError::Again(what)) => what,
        };
        if start.elapsed() + pause >= outage {
            return Err(KafkaError::Unavailable(format!("Kafka has been away for {outage:?}: {what}")));
        }
        if start.elapsed() >= TELL_AFTER && !std::mem::replace(&mut told, true) {
            tracing::warn!(reason = what, limit = ?outage, "Kafka is away; trying again");
        }
        std::thread::sleep(pause);
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

    #[test]
    fn bootstrap_servers_are_read_as_librdkafka_reads_them() {
        let at = |host: &str, port| (host.to_owned(), port);
        assert_eq!(parsed("a:1, b"), Some(vec![at("a", 1), at("b", 9092)]));
        assert_eq!(parsed("SASL_SSL://a:1"), Some(vec![at("a", 1)]));
        assert_eq!(parsed("[::1]:9"), Some(vec![at("::1", 9)]));
        assert_eq!(parsed("a:x"), None);
        assert_eq!(parsed(""), None);
    }
}
