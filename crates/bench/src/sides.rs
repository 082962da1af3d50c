//! Who drains the backlog, and how one knows that it is drained.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use change::Lsn;
use clap::ValueEnum;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use tempfile::TempDir;
use testkit::services::{Debezium, Kafka, Postgres, Process};

use crate::backlog::{DATABASE, Shape};
use crate::ledger::Ledger;
use crate::measure::until;
use crate::program::Build;

/// How long anything may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(3600);
/// A process that does not come up in this time never does.
pub(crate) const START: Duration = Duration::from_secs(60);

/// Debezium's settings: what its documentation says for throughput.
const DEBEZIUM: &str = "
topic.prefix=NAME
slot.name=NAME
publication.name=bench
publication.autocreate.mode=disabled
table.include.list=public.emails
snapshot.mode=MODE
snapshot.fetch.size=10240
max.batch.size=8192
max.queue.size=32768
poll.interval.ms=10
provide.transaction.metadata=true
decimal.handling.mode=string
time.precision.mode=isostring
producer.override.linger.ms=5
producer.override.batch.size=1048576
producer.override.buffer.memory=134217728
producer.override.compression.type=lz4
";

/// Counters of all rows and of 10,000 groups.
pub(crate) const COUNTERS: &str = "[counters.total]\nsql = \"SELECT count(*) FROM public.emails\"\n\
    [counters.unread]\nsql = \"SELECT user_id, count(*) FROM public.emails WHERE NOT is_read GROUP BY user_id\"\n";

/// The index of the mails' text.
pub(crate) const INDEXES: &str =
    "[search.indexes.emails]\ntable = \"public.emails\"\ntext = [\"subject\", \"body\"]\n";

/// One of those who drain.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Side {
    /// pg_recvlogical to /dev/null; of a snapshot, psql's COPY
    Limit,
    /// The same once more: what differs between the two is noise
    Again,
    /// Millrace's reader, exactly once to Kafka
    Reader,
    /// The reader of the build that --program and --property name
    Other,
    /// Debezium, tuned, to Kafka
    Debezium,
    /// A bare librdkafka producer of the records that the reader made, in transactions as large
    Producer,
    /// A plain consumer that counts
    Consumer,
    /// A plain pipeline of increments into Redis, one for each change
    Redis,
    /// Millrace's worker of counters: one of all rows, one of 10,000 groups
    Counters,
    /// The worker of counters of the other build
    OtherCounters,
    /// A plain consumer that parses each record and upserts a document
    Tantivy,
    /// Millrace's search worker
    Search,
    /// The search worker of the other build
    OtherSearch,
}

impl Side {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Side::Limit => "limit",
            Side::Again => "limit again",
            Side::Reader => "reader",
            Side::Other => "other",
            Side::Debezium => "debezium",
            Side::Producer => "producer",
            Side::Consumer => "consumer",
            Side::Redis => "redis",
            Side::Counters => "counters",
            Side::OtherCounters => "other counters",
            Side::Tantivy => "tantivy",
            Side::Search => "search",
            Side::OtherSearch => "other search",
        }
    }

    /// True for Millrace itself, of any build.
    pub(crate) fn is_ours(self) -> bool {
        matches!(self, Side::Reader | Side::Counters | Side::Search) || self.own().is_some()
    }

    /// For a side of the other build, the side of this build that does the same.
    pub(crate) fn own(self) -> Option<Side> {
        match self {
            Side::Other => Some(Side::Reader),
            Side::OtherCounters => Some(Side::Counters),
            Side::OtherSearch => Some(Side::Search),
            _ => None,
        }
    }

    /// What it is compared with.
    pub(crate) fn limit(self) -> Side {
        match self {
            Side::Consumer | Side::Counters | Side::OtherCounters => Side::Consumer,
            Side::Redis => Side::Redis,
            Side::Tantivy | Side::Search | Side::OtherSearch => Side::Tantivy,
            _ => Side::Limit,
        }
    }
}

/// Where a side works in one round.
pub(crate) struct Place<'a> {
    pub(crate) postgres: &'a Postgres,
    pub(crate) kafka: &'a Kafka,
    pub(crate) shape: Shape,
    pub(crate) side: Side,
    /// The build of Millrace that runs, where it is Millrace.
    pub(crate) build: Build<'a>,
    /// Names slot, pipeline, topic and files.
    pub(crate) name: String,
    pub(crate) directory: TempDir,
}

/// What runs, until it is drained.
pub(crate) enum Running {
    /// Until it ends.
    Program(Process),
    /// Until its ledger has come to the LSN, which in a snapshot is the end of the snapshot.
    Reader(Process, Ledger, Option<Lsn>),
    /// Until the topic has so many records.
    Debezium(Debezium, BaseConsumer, String, i64),
}

impl Running {
    pub(crate) fn id(&self) -> u32 {
        match self {
            Running::Program(process) | Running::Reader(process, ..) => process.id(),
            Running::Debezium(debezium, ..) => debezium.id(),
        }
    }

    /// Whether anything has come to the destination; where a clock begins that leaves out the time to start.
    pub(crate) fn begun(&mut self) -> Result<bool> {
        match self {
            Running::Program(_) | Running::Reader(..) => Ok(true),
            Running::Debezium(_, consumer, topic, _) => Ok(end(consumer, topic)? > 0),
        }
    }

    pub(crate) fn done(&mut self) -> Result<bool> {
        match self {
            Running::Program(process) => match process.ended() {
                Some(status) if !status.success() => bail!("it ended with {status}"),
                status => Ok(status.is_some()),
            },
            Running::Reader(process, ledger, head) => {
                anyhow::ensure!(process.ended().is_none(), "the reader ended");
                ledger.has_reached(*head)
            }
            Running::Debezium(_, consumer, topic, records) => Ok(end(consumer, topic)? >= *records),
        }
    }
}

/// Reads a topic from its beginning.
pub(crate) fn consumer(kafka: &Kafka, topic: &str) -> Result<BaseConsumer> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", kafka.bootstrap())
        .set("group.id", "bench")
        .set("enable.auto.commit", "false")
        .set("enable.partition.eof", "true")
        .set("isolation.level", "read_committed")
        .set("fetch.queue.backoff.ms", "5")
        .create()?;
    let mut place = TopicPartitionList::new();
    place.add_partition_offset(topic, 0, Offset::Beginning)?;
    consumer.assign(&place)?;
    Ok(consumer)
}

/// Whether a record tells of a row that is there.
pub(crate) fn is_row(message: &BorrowedMessage<'_>) -> Result<bool> {
    let value = std::str::from_utf8(message.payload().unwrap_or_default())?;
    let is = |op: &str| value.contains(&format!("\"op\":\"{op}\""));
    Ok(["c", "u", "r"].into_iter().any(is))
}

/// Records of a topic.
fn end(consumer: &BaseConsumer, topic: &str) -> Result<i64> {
    Ok(consumer.fetch_watermarks(topic, 0, START)?.1)
}

impl Place<'_> {
    /// What a reader writes.
    pub(crate) fn log_topic(&self) -> String {
        format!("millrace.{}.1", self.name)
    }

    fn log(&self) -> PathBuf {
        self.directory.path().join("log")
    }

    /// Makes the slot; a side that follows an LSN is behind it from here on.
    pub(crate) fn prepare(&self) -> Result<()> {
        match self.side {
            Side::Limit | Side::Again if self.shape == Shape::Snapshot => {}
            Side::Limit | Side::Again => self.make_slot(),
            Side::Debezium => {
                // The message is the backlog's end: Debezium waits for its topic, and what came before with it.
                for topic in ["public.emails", "transaction", "message"] {
                    self.kafka.make_topic(&format!("{}.{topic}", self.name));
                }
                if self.shape != Shape::Snapshot {
                    self.make_slot();
                }
            }
            Side::Reader | Side::Other => {
                let directory = self.directory.path();
                self.build.configure(directory, &self.name, self.postgres, self.kafka, "")?;
                let setup = self.millrace(&["setup"]).output()?;
                anyhow::ensure!(setup.status.success(), "{}", String::from_utf8_lossy(&setup.stderr));
                if self.shape != Shape::Snapshot {
                    // The empty table is read, and the reader away.
                    let mut reader = self.spawn(&mut self.millrace(&["reader"]))?;
                    let ledger = Ledger::of(self.kafka, &self.log_topic())?;
                    until(START, || ledger.has_reached(None))
                        .with_context(|| fs::read_to_string(self.log()).unwrap_or_default())?;
                    reader.signal("TERM");
                    reader.wait(START);
                }
            }
            Side::Producer => {}
            _ => return self.misfit(),
        }
        Ok(())
    }

    fn misfit<T>(&self) -> Result<T> {
        bail!("side {} belongs to the shape `stores`", self.side.name())
    }

    fn make_slot(&self) {
        self.postgres.sql(
            DATABASE,
            &format!("SELECT pg_create_logical_replication_slot('{}', 'pgoutput')", self.name),
        );
    }

    fn millrace(&self, arguments: &[&str]) -> Command {
        self.build.command(self.directory.path(), arguments)
    }

    fn spawn(&self, command: &mut Command) -> Result<Process> {
        let log = File::create(self.log())?;
        Ok(Process::spawn(command.stdout(log.try_clone()?).stderr(log)))
    }

    /// Starts the side; it is to come to `head`, through so many row changes.
    pub(crate) fn start(&self, head: Lsn, changes: u64) -> Result<Running> {
        Ok(match self.side {
            Side::Limit | Side::Again if self.shape == Shape::Snapshot => {
                let mut copy = self.client("psql");
                copy.args(["-qAtX", "-c", "COPY emails TO STDOUT"]);
                Running::Program(Process::spawn(copy.stdout(Stdio::null())))
            }
            Side::Limit | Side::Again => {
                let mut receive = self.client("pg_recvlogical");
                receive.args(["--start", "--no-loop", "-f", "/dev/null", "--slot", &self.name]);
                receive.args(["-o", "proto_version=1", "-o", "publication_names=bench"]);
                receive.arg(format!("--endpos={head}"));
                Running::Program(self.spawn(&mut receive)?)
            }
            Side::Reader | Side::Other => {
                let ledger = Ledger::of(self.kafka, &self.log_topic())?;
                let head = (self.shape != Shape::Snapshot).then_some(head);
                Running::Reader(self.spawn(&mut self.millrace(&["reader"]))?, ledger, head)
            }
            Side::Debezium => {
                let topic = format!("{}.public.emails", self.name);
                let mode = if self.shape == Shape::Snapshot { "initial_only" } else { "no_data" };
                let properties = DEBEZIUM.replace("NAME", &self.name).replace("MODE", mode);
                let debezium = Debezium::tuned(self.kafka, self.postgres, DATABASE, &properties);
                Running::Debezium(debezium, consumer(self.kafka, &topic)?, topic, i64::try_from(changes)?)
            }
            _ => return self.misfit(),
        })
    }

    fn client(&self, program: &str) -> Command {
        let mut command = self.postgres.program(program);
        let port = self.postgres.port().to_string();
        command.args(["-h", "127.0.0.1", "-p", &port, "-U", "postgres", "-d", DATABASE]);
        command
    }

    /// Counts the row changes that stand at the destination.
    pub(crate) fn count(&self, changes: u64) -> Result<u64> {
        let topic = match self.side {
            // It writes nothing down.
            Side::Limit | Side::Again => return Ok(changes),
            Side::Reader | Side::Other => self.log_topic(),
            Side::Debezium => format!("{}.public.emails", self.name),
            _ => return self.misfit(),
        };
        let consumer = consumer(self.kafka, &topic)?;
        let mut rows = 0;
        loop {
            match consumer.poll(START) {
                None => bail!("topic {topic} does not answer"),
                Some(Err(KafkaError::PartitionEOF(_))) => return Ok(rows),
                Some(Err(error)) => return Err(error.into()),
                Some(Ok(message)) => rows += u64::from(is_row(&message)?),
            }
        }
    }
}
