//! How to reach the brokers, and what their errors mean to us.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use change::Refusal;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{BaseConsumer, ConsumerContext};
use rdkafka::error::{KafkaError as ClientError, RDKafkaErrorCode as Code};
use rdkafka::{ClientConfig, ClientContext};

use crate::reader::LEADERS_MS;
use crate::wire::batch::Compression;
use crate::wire::cluster::Cluster;
use crate::wire::security::Security;

/// How long the brokers may be away before a call gives up, unless configured otherwise.
const OUTAGE_LIMIT: Duration = Duration::from_secs(30);
/// The brokers abort a transaction that stays open for longer, unless configured otherwise.
const TRANSACTION_MIN_TIMEOUT: Duration = Duration::from_secs(60);
const CLIENT_ID: &str = "millrace";

/// Properties that carry exactly-once, or that belong to one client and not to the next.
const OURS: &[&str] = &[
    "acks",
    "auto.commit.enable",
    "auto.offset.reset",
    "bootstrap.servers",
    "client.rack",
    "delivery.report.only.error",
    "delivery.timeout.ms",
    "enable.auto.commit",
    "enable.auto.offset.store",
    "enable.idempotence",
    "enable.partition.eof",
    "group.id",
    "group.instance.id",
    "group.protocol",
    "isolation.level",
    "log.queue",
    "message.timeout.ms",
    "metadata.broker.list",
    "partition.assignment.strategy",
    "request.required.acks",
    "transactional.id",
];

/// Where the brokers are and how to talk to them.
#[derive(Clone)]
pub struct Connection {
    bootstrap: String,
    properties: BTreeMap<String, String>,
    cluster: Cluster,
    compression: Compression,
    transaction_timeout: Option<Duration>,
    outage: Duration,
    host: Option<String>,
}

/// Properties may hold passwords, and are not shown.
impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("bootstrap", &self.bootstrap).finish_non_exhaustive()
    }
}

impl Connection {
    /// Brokers at `bootstrap` (`host:port,...`), with any librdkafka properties but those that exactly-once rests
    /// on. What writes and reads the log itself keeps to those of TLS and logins, to `client.id`, `compression.type` and
    /// `transaction.timeout.ms`, and not to others; of those, what it could not keep to is refused.
    pub fn new(bootstrap: &str, properties: BTreeMap<String, String>) -> Result<Self, Refusal> {
        if let Some(key) = properties.keys().find(|key| OURS.contains(&key.as_str())) {
            return Err(Refusal::new(
                format!("[kafka.properties] sets `{key}`, which Millrace must set itself to be exactly-once"),
                format!("remove `{key}` from [kafka.properties]"),
            ));
        }
        let get = |name: &str| properties.get(name).map(String::as_str);
        let client_id = get("client.id").unwrap_or(CLIENT_ID);
        let cluster = Cluster::new(bootstrap, Security::new(&properties)?, client_id)?;
        let compression = get("compression.type").or_else(|| get("compression.codec"));
        let compression = compression.map_or(Ok(Compression::default()), Compression::parse)?;
        let timeout = get("transaction.timeout.ms").map(|text| {
            text.parse().map(Duration::from_millis).map_err(|_| {
                Refusal::new(
                    format!("[kafka.properties] has transaction.timeout.ms `{text}`"),
                    "write a number of milliseconds",
                )
            })
        });
        Ok(Connection {
            bootstrap: bootstrap.to_owned(),
            transaction_timeout: timeout.transpose()?,
            cluster,
            compression,
            properties,
            outage: OUTAGE_LIMIT,
            host: None,
        })
    }

    /// How long the brokers may be away before a call gives up with [`KafkaError::Unavailable`].
    pub fn with_outage_limit(mut self, outage: Duration) -> Self {
        self.outage = outage;
        self
    }

    /// The host's name. A worker that was killed and starts again on the same host then has its place in the
    /// consumer group at once, rather than when the group finds the dead one silent (static membership).
    pub fn with_host(mut self, host: impl Into<String>) -> Self {
        self.host = Some(host.into());
        self
    }

    pub(crate) fn host(&self) -> Option<&str> {
        self.host.as_deref()
    }

    /// `host:port,...`
    pub fn bootstrap(&self) -> &str {
        &self.bootstrap
    }

    pub(crate) fn outage(&self) -> Duration {
        self.outage
    }

    pub(crate) fn cluster(&self) -> Cluster {
        self.cluster.clone()
    }

    pub(crate) fn compression(&self) -> Compression {
        self.compression
    }

    pub(crate) fn transaction_timeout(&self) -> Duration {
        self.transaction_timeout.unwrap_or_else(|| (self.outage * 2).max(TRANSACTION_MIN_TIMEOUT))
    }

    /// A client's properties: `preferred` where the user has none of that name, then the user's.
    pub(crate) fn client(&self, preferred: &[(&str, &str)]) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("client.id", CLIENT_ID).set("reconnect.backoff.max.ms", "1000");
        for (key, value) in preferred {
            config.set(*key, *value);
        }
        for (key, value) in &self.properties {
            config.set(key, value);
        }
        // Also those that the bootstrap servers have named: one of them may be away, or know nothing new.
        config.set("bootstrap.servers", self.cluster.addresses());
        config
    }

    /// A client for questions that are neither reads nor writes: metadata and true end offsets.
    pub(crate) fn inquirer(&self) -> Result<BaseConsumer<Reports>, KafkaError> {
        let mut config = self.client(&[LEADERS_MS]);
        config.set("isolation.level", "read_uncommitted");
        config
            .create_with_context(Reports::default())
            .map_err(|error| KafkaError::of("cannot make a Kafka client", &error))
    }
}

/// Why Kafka did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum KafkaError {
    /// A newer publisher of the same log has taken over.
    #[error("fenced: a newer publisher of this log has taken over")]
    Fenced,
    /// The brokers are away or slow; trying again can help.
    #[error("{0}")]
    Unavailable(String),
    /// Only the operator can help.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

impl KafkaError {
    /// What a client's error means; `doing` says what failed: `cannot read topic "x"`.
    pub(crate) fn of(doing: &str, error: &ClientError) -> Self {
        let refuse = |remedy: &str| KafkaError::Refused(Refusal::new(format!("{doing}: {error}"), remedy));
        if matches!(error, ClientError::ClientConfig(..) | ClientError::ClientCreation(_)) {
            return refuse("correct [kafka] and [kafka.properties]");
        }
        match error.rdkafka_error_code() {
            Some(
                Code::TopicAuthorizationFailed
                | Code::GroupAuthorizationFailed
                | Code::ClusterAuthorizationFailed,
            ) => KafkaError::unauthorized(format!("{doing}: {error}")),
            Some(Code::SaslAuthenticationFailed | Code::Authentication) => {
                refuse("correct the user and password in [kafka.properties]")
            }
            _ => KafkaError::Unavailable(format!("{doing}: {error}")),
        }
    }

    /// What was refused for want of a right.
    pub(crate) fn unauthorized(what: String) -> Self {
        let remedy =
            "let Millrace's Kafka user do this (kafka-acls), for all names that begin with `millrace.`";
        KafkaError::Refused(Refusal::new(what, remedy))
    }

    /// The same with what the client last said of its connections, where that is known.
    pub(crate) fn with_report(self, reports: &Reports) -> Self {
        match (self, reports.last()) {
            (KafkaError::Unavailable(text), Some(last)) => {
                KafkaError::Unavailable(format!("{text} ({last})"))
            }
            (error, _) => error,
        }
    }
}

impl From<KafkaError> for relay::PublishError {
    fn from(error: KafkaError) -> Self {
        match error {
            KafkaError::Fenced => relay::PublishError::Fenced,
            KafkaError::Unavailable(text) => relay::PublishError::Unavailable(text),
            KafkaError::Refused(refusal) => relay::PublishError::Refused(refusal),
        }
    }
}

impl From<KafkaError> for worker::FeedError {
    fn from(error: KafkaError) -> Self {
        match error {
            KafkaError::Refused(refusal) => worker::FeedError::Refused(refusal),
            KafkaError::Fenced => worker::FeedError::Fenced,
            other => worker::FeedError::Unavailable(other.to_string()),
        }
    }
}

/// Listens to a client: librdkafka's log lines become debug events, and the last error is kept for the message of
/// the call that fails because of it.
#[derive(Debug, Default)]
pub(crate) struct Reports {
    last: Mutex<Option<String>>,
}

impl Reports {
    pub(crate) fn last(&self) -> Option<String> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn keep(&self, error: &ClientError, reason: &str) {
        tracing::debug!(%error, reason, "Kafka client");
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason.to_owned());
    }

    pub(crate) fn line(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        tracing::debug!(?level, facility, message, "librdkafka");
    }
}

impl ClientContext for Reports {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        self.line(level, facility, message);
    }

    fn error(&self, error: ClientError, reason: &str) {
        self.keep(&error, reason);
    }
}

impl ConsumerContext for Reports {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn properties_that_exactly_once_rests_on_are_refused_by_name() {
        for key in ["transactional.id", "acks", "isolation.level", "enable.auto.commit", "group.id"] {
            let properties = BTreeMap::from([(key.to_owned(), "1".to_owned())]);
            let refusal = Connection::new("127.0.0.1:9092", properties).unwrap_err();
            assert!(refusal.what.contains(key) && refusal.remedy.contains(key), "{refusal}");
        }
        let fine = BTreeMap::from([("security.protocol".to_owned(), "ssl".to_owned())]);
        assert_eq!(
            Connection::new("127.0.0.1:9092", fine).unwrap().client(&[]).get("security.protocol"),
            Some("ssl")
        );
    }
}
