//! From the configuration to the adapters: who is connected to what, under which names.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context;
use change::Refusal;
use kafka::{Connection, Generations, KafkaError, Names};
use postgres::plan::{Plan, Table};
use postgres::setup::SetupError;
use redis_counters::{Counters, Namespace, Server};
use tokio::runtime::Runtime;
use tokio_postgres::Client;

use crate::config::Config;
use crate::failure::Failure;

/// The generation that `setup` makes first.
pub(crate) const FIRST_GENERATION: u32 = 1;

/// How long a command that only looks waits for brokers that are away.
const BRIEF_PATIENCE: Duration = Duration::from_secs(8);

/// A process: its configuration and its runtime. Dropped last, it ends every task.
pub(crate) struct Process {
    pub(crate) config: Config,
    pub(crate) runtime: Runtime,
}

impl Process {
    pub(crate) fn new(config: Config) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            // HTTP and a few idle connections; the work is on threads of its own.
            .worker_threads(1)
            .thread_name("tokio")
            .enable_all()
            .build()
            .context("cannot start the runtime")?;
        Ok(Process { config, runtime })
    }

    /// The brokers, for a command that somebody waits for.
    pub(crate) fn kafka_briefly(&self) -> Result<Connection, Refusal> {
        let patience = self.config.reader.outage_limit.min(BRIEF_PATIENCE);
        Ok(self.kafka()?.with_outage_limit(patience))
    }

    /// The brokers.
    pub(crate) fn kafka(&self) -> Result<Connection, Refusal> {
        let kafka = &self.config.kafka;
        let plain =
            |(key, value): (&String, &crate::config::Secret)| (key.clone(), value.expose().to_owned());
        let properties: BTreeMap<String, String> = kafka.properties.iter().map(plain).collect();
        let connection = Connection::new(&kafka.bootstrap, properties)?;
        let host = gethostname::gethostname().to_string_lossy().into_owned();
        Ok(connection.with_outage_limit(self.config.reader.outage_limit).with_host(host))
    }

    /// The names of the current generation; refused where there is none.
    pub(crate) fn names(&self, kafka: &Connection) -> Result<Names, KafkaError> {
        let pipeline = self.config.pipeline.as_str();
        Ok(Names::new(pipeline, self.generations(kafka)?.current.number)?)
    }

    /// The pipeline's generations; refused where there is none.
    pub(crate) fn generations(&self, kafka: &Connection) -> Result<Generations, KafkaError> {
        Ok(self.state(kafka)?.0)
    }

    /// The same, and the records that stores are to leave out.
    pub(crate) fn state(&self, kafka: &Connection) -> Result<(Generations, Vec<kafka::Skip>), KafkaError> {
        let pipeline = self.config.pipeline.as_str();
        Ok(kafka::state(kafka, pipeline)?.ok_or_else(|| kafka::not_set_up(pipeline))?)
    }

    /// Where the source is, for the running role.
    pub(crate) fn source(&self) -> Result<postgres::Config, Refusal> {
        parse_url(self.config.postgres.url()?, "url")
    }

    /// Where the source is, for whoever may change it.
    pub(crate) fn admin(&self) -> Result<postgres::Config, Refusal> {
        parse_url(self.config.postgres.admin_url()?, "admin_url")
    }

    /// A connection for queries.
    pub(crate) fn connect(&self, config: &postgres::Config) -> Result<Client, Failure> {
        Ok(self.runtime.block_on(postgres::catalog::connect(config)).map_err(SetupError::from)?)
    }

    /// What the source is to have.
    pub(crate) fn plan(&self, generation: u32) -> Result<Plan, Refusal> {
        let pipeline = &self.config.pipeline;
        Ok(Plan {
            pipeline: pipeline.to_string(),
            heartbeat: pipeline.heartbeat(generation),
            slot: pipeline.slot(generation),
            publication: pipeline.publication(),
            tables: self.config.postgres.tables.clone(),
            queried: self.queried(),
            role: self.source()?.user().to_owned(),
            keyless_bytes: self.config.snapshot.keyless_bytes,
        })
    }

    /// The tables that a counter or an index names.
    fn queried(&self) -> Vec<Table> {
        let counters = self.config.counters.iter().map(|counter| counter.definition.table());
        let indexes = self.config.search.iter().flat_map(|search| &search.indexes);
        let indexes = indexes.map(|index| (index.schema.as_str(), index.table.as_str()));
        let table = |(schema, name): (&str, &str)| Table { schema: schema.to_owned(), name: name.to_owned() };
        counters.chain(indexes).map(table).collect()
    }

    /// The workers that are configured.
    pub(crate) fn workers(&self) -> Vec<&'static str> {
        let search = self.config.search.as_ref().is_some_and(|search| !search.indexes.is_empty());
        let counters = !self.config.counters.is_empty();
        [("counters", counters), ("search", search)]
            .into_iter()
            .filter_map(|(name, is)| is.then_some(name))
            .collect()
    }

    /// Where counters are kept; refused where none is configured.
    pub(crate) fn redis(&self) -> Result<(Server, Namespace), Refusal> {
        let Some(redis) = &self.config.redis else {
            return Err(Refusal::new(
                "no Redis is configured",
                "write a section [redis] with `url`, and a section [counters.NAME] for each counter",
            ));
        };
        let space = Namespace::new(redis.prefix.clone(), self.config.pipeline.as_str());
        let mut server = Server::new(redis.url.expose());
        server.longest_script = redis.longest_script;
        Ok((server, space))
    }

    /// The counters, to look at.
    pub(crate) fn counters(&self) -> Result<Counters, Refusal> {
        let (server, space) = self.redis()?;
        Counters::new(&server, space)
    }
}

fn parse_url(url: &str, key: &str) -> Result<postgres::Config, Refusal> {
    postgres::Config::from_env(url).map_err(|error| {
        Refusal::new(
            format!("`postgres.{key}` cannot be used: {error}"),
            "write it as in postgres://user@host:5432/database?sslmode=verify-full",
        )
    })
}

impl From<KafkaError> for Failure {
    fn from(error: KafkaError) -> Self {
        match error {
            KafkaError::Refused(refusal) => refusal.into(),
            KafkaError::Fenced => Failure::Fenced(error.to_string()),
            KafkaError::Unavailable(_) => Failure::Failed(anyhow::Error::new(error).context("Kafka")),
        }
    }
}

impl From<SetupError> for Failure {
    fn from(error: SetupError) -> Self {
        match error {
            SetupError::Refused(refusal) => refusal.into(),
            error => Failure::Failed(anyhow::Error::new(error).context("Postgres")),
        }
    }
}

impl From<worker::FeedError> for Failure {
    fn from(error: worker::FeedError) -> Self {
        match error {
            worker::FeedError::Refused(refusal) => refusal.into(),
            error => Failure::Failed(anyhow::Error::new(error).context("Kafka")),
        }
    }
}

impl From<worker::SinkError> for Failure {
    fn from(error: worker::SinkError) -> Self {
        match error {
            worker::SinkError::Refused(refusal) => refusal.into(),
            error => Failure::Failed(anyhow::Error::new(error)),
        }
    }
}
