//! Which broker to ask for what, and what its error codes mean to us.

use std::time::{Duration, Instant};

use change::Refusal;
use kafka_protocol::ResponseError as Code;
use kafka_protocol::messages::metadata_request::MetadataRequestTopic;
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
/// Between two tries: doubled from the first to the last. The first is short, as a broker that has committed a
/// transaction takes a millisecond or two to end it, and begins no other before.
const RETRY: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(200));
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

    fn connect(&self, host: &str, port: u16, deadline: Instant) -> Result<Broker, WireError> {
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

    fn coordinator(&self, transactional_id: &str, deadline: Instant) -> Result<Broker, WireError> {
        let request = FindCoordinatorRequest::default()
            .with_key(StrBytes::from_string(transactional_id.to_owned()))
            .with_key_type(TRANSACTION_KEY);
        let found = self.any(deadline)?.ask(&request, FIND_COORDINATOR, deadline)?;
        judge(found.error_code, || format!("no coordinator of transactions `{transactional_id}`"))?;
        self.connect(&found.host, port(found.port)?, deadline)
    }

    fn leader(&self, topic: &str, deadline: Instant) -> Result<Broker, WireError> {
        let asked = MetadataRequestTopic::default()
            .with_name(Some(TopicName(StrBytes::from_string(topic.to_owned()))));
        let request = MetadataRequest::default()
            .with_topics(Some(vec![asked]))
            .with_allow_auto_topic_creation(false);
        let found = self.any(deadline)?.ask(&request, METADATA, deadline)?;
        let doing = || format!("topic \"{topic}\" has no leader");
        let topic = found.topics.first().ok_or_else(|| WireError::Again(doing()))?;
        judge(topic.error_code, doing)?;
        let partition = topic.partitions.iter().find(|partition| partition.partition_index == 0);
        let partition = partition.ok_or_else(|| WireError::Again(doing()))?;
        judge(partition.error_code, doing)?;
        let leader = found.brokers.iter().find(|broker| broker.node_id == partition.leader_id);
        let leader = leader.ok_or_else(|| WireError::Again(doing()))?;
        self.connect(&leader.host, port(leader.port)?, deadline)
    }
}

fn port(port: i32) -> Result<u16, WireError> {
    port.try_into().map_err(|_| WireError::Again(format!("a broker at port {port}")))
}

/// Whom a [`Link`] leads to.
pub(crate) enum Role {
    /// The coordinator of a `transactional.id`.
    Coordinator(String),
    /// The leader of partition 0 of a topic.
    Leader(String),
}

/// A connection that is made anew when it is lost.
pub(crate) struct Link {
    role: Role,
    broker: Option<Broker>,
}

impl Link {
    pub(crate) fn to(role: Role) -> Self {
        Link { role, broker: None }
    }

    /// The connection, made where there is none.
    pub(crate) fn broker(&mut self, cluster: &Cluster, deadline: Instant) -> Result<&mut Broker, WireError> {
        if self.broker.as_ref().is_some_and(|broker| broker.expired() && !broker.waiting()) {
            self.broker = None;
        }
        match &mut self.broker {
            Some(broker) => Ok(broker),
            none => {
                let broker = match &self.role {
                    Role::Coordinator(id) => cluster.coordinator(id, deadline)?,
                    Role::Leader(topic) => cluster.leader(topic, deadline)?,
                };
                Ok(none.insert(broker))
            }
        }
    }

    /// The connection, if there is one.
    pub(crate) fn open(&mut self) -> Option<&mut Broker> {
        self.broker.as_mut()
    }

    /// Has the next request go over another connection.
    pub(crate) fn reset(&mut self) {
        self.broker = None;
    }

    /// Asks over the connection, which is lost where that fails.
    pub(crate) fn ask<R: Request>(
        &mut self,
        cluster: &Cluster,
        request: &R,
        version: i16,
        deadline: Instant,
    ) -> Result<R::Response, WireError> {
        let answer = self.broker(cluster, deadline)?.ask(request, version, deadline);
        if answer.is_err() {
            self.reset();
        }
        answer
    }
}

/// What an error code means; `doing` says what failed.
pub(crate) fn judge(code: i16, doing: impl FnOnce() -> String) -> Result<(), WireError> {
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
        pause = (pause * 3 / 2).min(RETRY.1);
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
