//! Who drains the backlog, and how one knows that it is drained.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use change::{Lsn, Progress};
use clap::ValueEnum;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use tempfile::TempDir;
use testkit::services::{Debezium, Kafka, Postgres, Process};

use crate::backlog::{DATABASE, Shape};

/// How long anything may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(3600);
/// A process that does not come up in this time never does.
const START: Duration = Duration::from_secs(60);

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
    /// The same with what --program and --property say
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
    /// A plain consumer that parses each record and upserts a document
    Tantivy,
    /// Millrace's search worker
    Search,
}

/// What distinguishes [`Side::Other`] from [`Side::Reader`].
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Variant {
    /// Another build of Millrace, which the side `other` runs
    #[arg(long)]
    program: Option<PathBuf>,
    /// A librdkafka property, `NAME=VALUE`, that the side `other` has
    #[arg(long)]
    property: Vec<String>,
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
            Side::Tantivy => "tantivy",
            Side::Search => "search",
        }
    }

    /// Whether it is Millrace.
    pub(crate) fn is_ours(self) -> bool {
        matches!(self, Side::Reader | Side::Other | Side::Counters | Side::Search)
    }

    /// What it is compared with.
    pub(crate) fn limit(self) -> Side {
        match self {
            Side::Consumer | Side::Counters => Side::Consumer,
            Side::Redis => Side::Redis,
            Side::Tantivy | Side::Search => Side::Tantivy,
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
    pub(crate) variant: &'a Variant,
    /// Names slot, pipeline, topic and files.
    pub(crate) name: String,
    pub(crate) directory: TempDir,
}

/// What runs, until it is drained.
pub(crate) enum Running {
    /// Until it ends.
    Program(Process),
    /// Until its ledger has come to the LSN, which in a snapshot is the end of the snapshot.
    Reader(Process, BaseConsumer, Option<Lsn>),
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
                while let Some(record) = ledger.poll(Duration::ZERO) {
                    let record = match record {
                        Err(KafkaError::PartitionEOF(_)) => break,
                        record => record?,
                    };
                    if record.key() == Some(b"progress") {
                        let progress: Progress =
                            serde_json::from_slice(record.payload().unwrap_or_default())?;
                        match head {
                            Some(head) if progress.end_lsn >= *head => return Ok(true),
                            None if progress.snapshot.is_none() => return Ok(true),
                            _ => {}
                        }
                    }
                }
                Ok(false)
            }
            Running::Debezium(_, consumer, topic, records) => Ok(end(consumer, topic)? >= *records),
        }
    }
}

/// Millrace as it was built beside this program.
pub(crate) fn own_program() -> PathBuf {
    std::env::current_exe().map(|exe| exe.with_file_name("millrace")).unwrap_or_default()
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

/// Waits until a process has said something.
pub(crate) fn wait_for_log(log: &Path, text: &str) -> Result<()> {
    let said = crate::measure::until(START, || Ok(fs::read_to_string(log)?.contains(text)));
    said.with_context(|| fs::read_to_string(log).unwrap_or_default())
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
    fn config(&self) -> PathBuf {
        self.directory.path().join("millrace.toml")
    }

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
                let mut text = format!(
                    "pipeline = \"{}\"\n[postgres]\nurl = \"{}\"\ntables = [\"public.emails\"]\n\
                     [kafka]\nbootstrap = \"{}\"\n[kafka.properties]\n",
                    self.name,
                    self.postgres.url(DATABASE),
                    self.kafka.bootstrap()
                );
                for property in self.variant.property.iter().filter(|_| self.side == Side::Other) {
                    let (name, value) = property.split_once('=').context("--property takes NAME=VALUE")?;
                    text += &format!("{name:?} = {value:?}\n");
                }
                fs::write(self.config(), text)?;
                let setup = self.millrace(&["setup"]).output()?;
                anyhow::ensure!(setup.status.success(), "{}", String::from_utf8_lossy(&setup.stderr));
                if self.shape != Shape::Snapshot {
                    // The empty table is read, and the reader away.
                    let mut reader = self.spawn(&mut self.millrace(&["reader"]))?;
                    self.wait_for_log("the snapshot is complete")?;
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
        let program = self.variant.program.clone().filter(|_| self.side == Side::Other);
        let mut command = Command::new(program.unwrap_or_else(own_program));
        command.arg("--config").arg(self.config()).args(arguments).stdin(Stdio::null());
        command
    }

    fn spawn(&self, command: &mut Command) -> Result<Process> {
        let log = File::create(self.log())?;
        Ok(Process::spawn(command.stdout(log.try_clone()?).stderr(log)))
    }

    fn wait_for_log(&self, text: &str) -> Result<()> {
        wait_for_log(&self.log(), text)
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
                let ledger = consumer(self.kafka, &format!("millrace.{}.1.ledger", self.name))?;
                let head = (self.shape != Shape::Snapshot).then_some(head);
                Running::Reader(self.spawn(&mut self.millrace(&["reader"]))?, ledger, head)
            }
            Side::Producer | Side::Consumer | Side::Redis | Side::Counters | Side::Tantivy | Side::Search => {
                return self.misfit();
            }
            Side::Debezium => {
                let topic = format!("{}.public.emails", self.name);
                let mode = if self.shape == Shape::Snapshot { "initial_only" } else { "no_data" };
                let properties = DEBEZIUM.replace("NAME", &self.name).replace("MODE", mode);
                let debezium = Debezium::tuned(self.kafka, self.postgres, DATABASE, &properties);
                Running::Debezium(debezium, consumer(self.kafka, &topic)?, topic, i64::try_from(changes)?)
            }
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
