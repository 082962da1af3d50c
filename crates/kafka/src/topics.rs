//! The topics of a pipeline: made once by `setup`, checked ever after.
//!
//! Whether a topic keeps what Millrace's promises rest on is decided by its configuration, which others can change;
//! so what exists is compared with what is wanted, and each difference comes with the command that mends it.

use std::collections::HashMap;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

use change::{NEW_LOG, Refusal};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError as ClientError, KafkaResult, RDKafkaErrorCode as Code};

use crate::connection::Reports;
use crate::ledger::topic_exists;
use crate::membership::{group_offset, session_timeout};
use crate::reader::PartitionReader;
use crate::wire::outbox::BATCH_MAX_LEN;
use crate::{Connection, KafkaError, Names};

/// Segments of compacted topics are closed at this size or age: only closed ones are compacted (h07).
const SEGMENT_BYTES: u32 = 16 << 20;
const SEGMENT_MS: u32 = 3_600_000;
/// The largest record of a log that `setup` makes (bytes, as batched).
pub const RECORD_MAX_BYTES: u32 = 64 << 20;
/// The largest record of the ledger (bytes, as batched); must fit a segment.
const LEDGER_RECORD_MAX_BYTES: u32 = 8 << 20;
/// How long the brokers may take over a topic.
const ADMIN_LIMIT: Duration = Duration::from_secs(30);
/// How often it is asked whether a new topic can be used.
const LOOK: Duration = Duration::from_millis(20);
/// From so many replicas on, one may be missing while two must have each record.
const SAFE_REPLICAS: usize = 3;

/// A topic that is not as it should be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Problem {
    /// Whether promises break with it; otherwise it is the operator's choice and worth a word.
    pub fatal: bool,
    /// What is the matter, and the command that mends it.
    pub refusal: Refusal,
}

/// What a topic's configuration must be.
struct Wanted {
    topic: String,
    config: Vec<(&'static str, String)>,
    /// Values that must hold for as long as the topic is used.
    fatal: &'static [&'static str],
    /// Values whose change is worth a word.
    advised: &'static [&'static str],
}

fn wanted(names: &Names) -> [Wanted; 3] {
    let compacted = || {
        vec![
            ("cleanup.policy", "compact".to_owned()),
            ("delete.retention.ms", "60000".to_owned()),
            ("message.timestamp.after.max.ms", i64::MAX.to_string()),
            ("message.timestamp.before.max.ms", i64::MAX.to_string()),
            ("message.timestamp.type", "CreateTime".to_owned()),
            ("min.cleanable.dirty.ratio", "0.1".to_owned()),
            ("segment.bytes", SEGMENT_BYTES.to_string()),
            ("segment.ms", SEGMENT_MS.to_string()),
            ("unclean.leader.election.enable", "false".to_owned()),
        ]
    };
    let mut ledger = compacted();
    ledger.push(("max.message.bytes", LEDGER_RECORD_MAX_BYTES.to_string()));
    let log = vec![
        ("cleanup.policy", "delete".to_owned()),
        ("max.message.bytes", RECORD_MAX_BYTES.to_string()),
        // A record has its commit's time by the source's clock, which need not agree with the brokers'; and a
        // transaction may be read long after its commit.
        ("message.timestamp.after.max.ms", i64::MAX.to_string()),
        ("message.timestamp.before.max.ms", i64::MAX.to_string()),
        ("message.timestamp.type", "CreateTime".to_owned()),
        ("retention.bytes", "-1".to_owned()),
        ("retention.ms", "-1".to_owned()),
        ("unclean.leader.election.enable", "false".to_owned()),
    ];
    let advised_log =
        &["max.message.bytes", "retention.bytes", "retention.ms", "unclean.leader.election.enable"];
    let advised = &["unclean.leader.election.enable"];
    let advised_ledger = &["max.message.bytes", "unclean.leader.election.enable"];
    [
        Wanted {
            topic: names.log(),
            config: log,
            fatal: &[
                "cleanup.policy",
                "message.timestamp.after.max.ms",
                "message.timestamp.before.max.ms",
                "message.timestamp.type",
            ],
            advised: advised_log,
        },
        Wanted { topic: names.ledger(), config: ledger, fatal: &["cleanup.policy"], advised: advised_ledger },
        Wanted { topic: names.generations(), config: compacted(), fatal: &["cleanup.policy"], advised },
    ]
}

/// Creates those of the log, the ledger and the generations topic that do not exist, and checks those that do.
/// `replication`: number of replicas; `None` for the brokers' default. Returns when all can be used.
pub fn ensure_topics(
    connection: &Connection,
    names: &Names,
    replication: Option<u16>,
) -> Result<Vec<Problem>, KafkaError> {
    each_topic(connection, names, |inquirer, missing| {
        create(connection, missing, replication)?;
        wait_until_usable(inquirer, &missing.topic)?;
        Ok(None)
    })
}

/// Checks the log, the ledger and the generations topic, and changes nothing. A missing one is a problem.
pub fn check_topics(connection: &Connection, names: &Names) -> Result<Vec<Problem>, KafkaError> {
    each_topic(connection, names, |_, missing| {
        let what = format!("topic \"{}\" does not exist", missing.topic);
        Ok(Some(Problem { fatal: true, refusal: Refusal::new(what, "millrace setup") }))
    })
}

/// Checks those of the topics that exist; for a reader, which finds out about the others by itself.
pub fn compare_topics(connection: &Connection, names: &Names) -> Result<Vec<Problem>, KafkaError> {
    each_topic(connection, names, |_, _| Ok(None))
}

/// Compares each topic that exists with what it must be, and does `absent` about each that does not.
fn each_topic(
    connection: &Connection,
    names: &Names,
    absent: impl Fn(&BaseConsumer<Reports>, &Wanted) -> Result<Option<Problem>, KafkaError>,
) -> Result<Vec<Problem>, KafkaError> {
    let inquirer = connection.inquirer()?;
    let mut problems = Vec::new();
    for wanted in wanted(names) {
        if topic_exists(&inquirer, &wanted.topic, connection.outage())? {
            problems.extend(compare(connection, &inquirer, &wanted)?);
        } else {
            problems.extend(absent(&inquirer, &wanted)?);
        }
    }
    Ok(problems)
}

/// Deletes the log and the ledger of this generation, and with `generations` the topic that names the current one.
/// Those that do not exist are no error.
pub fn delete_topics(connection: &Connection, names: &Names, generations: bool) -> Result<(), KafkaError> {
    let mut topics = vec![names.log(), names.ledger()];
    topics.extend(generations.then(|| names.generations()));
    let topics: Vec<&str> = topics.iter().map(String::as_str).collect();
    let admin = admin(connection)?;
    let doing = "cannot delete topics";
    let results = wait(admin.delete_topics(&topics, &options())).map_err(|e| KafkaError::of(doing, &e))?;
    tolerate(doing, results, &[Code::UnknownTopicOrPartition, Code::UnknownTopic])
}

/// Whether a generation's log is there.
pub fn log_exists(connection: &Connection, names: &Names) -> Result<bool, KafkaError> {
    topic_exists(&connection.inquirer()?, &names.log(), connection.outage())
}

/// The first offset of a log that is still there.
pub fn log_start(connection: &Connection, names: &Names) -> Result<i64, KafkaError> {
    Ok(PartitionReader::new(connection, names, names.log())?.bounds()?.0)
}

/// The consumer groups that stand somewhere in a log, and where.
pub fn groups_of(connection: &Connection, names: &Names) -> Result<Vec<(String, i64)>, KafkaError> {
    let all = connection
        .inquirer()?
        .fetch_group_list(None, connection.outage())
        .map_err(|error| KafkaError::of("cannot list the consumer groups", &error))?;
    let mut found = Vec::new();
    for group in all.groups() {
        if let Some(at) = group_offset(connection, names, group.name())? {
            found.push((group.name().to_owned(), at.offset));
        }
    }
    Ok(found)
}

/// Deletes consumer groups with their offsets. Those that do not exist are no error; one with a member is refused, when
/// the session of a worker that has just ended is over.
pub fn delete_groups(connection: &Connection, groups: &[String]) -> Result<(), KafkaError> {
    let groups: Vec<&str> = groups.iter().map(String::as_str).collect();
    let admin = admin(connection)?;
    let doing = "cannot delete consumer groups";
    let started = Instant::now();
    loop {
        let results =
            wait(admin.delete_groups(&groups, &options())).map_err(|e| KafkaError::of(doing, &e))?;
        let member = results.iter().find_map(|result| match result {
            Err((group, Code::NonEmptyGroup)) => Some(group),
            _ => None,
        });
        let Some(group) = member else { return tolerate(doing, results, &[Code::GroupIdNotFound]) };
        if started.elapsed() > session_timeout(connection) + LOOK {
            let what = format!("consumer group \"{group}\" has a member: a worker runs");
            return Err(KafkaError::Refused(Refusal::new(what, "stop the worker first")));
        }
        std::thread::sleep(LOOK);
    }
}

/// Fails with the first result that is an error, but for those in `fine`.
fn tolerate(
    doing: &str,
    results: Vec<Result<String, (String, Code)>>,
    fine: &[Code],
) -> Result<(), KafkaError> {
    let bad = results.into_iter().filter_map(Result::err).find(|(_, code)| !fine.contains(code));
    bad.map_or(Ok(()), |(name, code)| {
        Err(KafkaError::of(&format!("{doing}: \"{name}\""), &ClientError::AdminOp(code)))
    })
}

fn create(connection: &Connection, wanted: &Wanted, replication: Option<u16>) -> Result<(), KafkaError> {
    // The protocol's way to ask for the brokers' default.
    let replicas = replication.map_or(-1, i32::from);
    let mut topic = NewTopic::new(&wanted.topic, 1, TopicReplication::Fixed(replicas));
    for (key, value) in &wanted.config {
        topic = topic.set(key, value);
    }
    if replication.is_some_and(|replicas| usize::from(replicas) >= SAFE_REPLICAS) {
        topic = topic.set("min.insync.replicas", "2");
    }
    let doing = format!("cannot create topic \"{}\"", wanted.topic);
    let admin = admin(connection)?;
    let results =
        wait(admin.create_topics([&topic], &options())).map_err(|error| KafkaError::of(&doing, &error))?;
    match results.into_iter().find_map(Result::err) {
        None | Some((_, Code::TopicAlreadyExists)) => Ok(()),
        Some((_, code @ (Code::InvalidReplicationFactor | Code::PolicyViolation | Code::InvalidConfig))) => {
            Err(KafkaError::Refused(Refusal::new(
                format!("{doing}: {code}"),
                "choose a replication factor that the cluster allows (Millrace needs Kafka 3.6 or later), or create \
                 the topic by hand and run setup again",
            )))
        }
        Some((_, code)) => Err(KafkaError::of(&doing, &ClientError::AdminOp(code))),
    }
}

fn wait_until_usable(inquirer: &BaseConsumer<Reports>, topic: &str) -> Result<(), KafkaError> {
    let start = Instant::now();
    loop {
        let metadata = inquirer.fetch_metadata(Some(topic), ADMIN_LIMIT);
        let led = metadata.is_ok_and(|metadata| {
            let partition = metadata.topics().first().and_then(|topic| topic.partitions().first());
            partition.is_some_and(|partition| partition.leader() >= 0 && partition.error().is_none())
        });
        if led {
            return Ok(());
        }
        if start.elapsed() >= ADMIN_LIMIT {
            let text = format!("topic \"{topic}\" was created and has no leader after {ADMIN_LIMIT:?}");
            return Err(KafkaError::Unavailable(text));
        }
        std::thread::sleep(LOOK);
    }
}

fn compare(
    connection: &Connection,
    inquirer: &BaseConsumer<Reports>,
    wanted: &Wanted,
) -> Result<Vec<Problem>, KafkaError> {
    let topic = &wanted.topic;
    let found = describe(connection, topic)?;
    let replicas = shape(connection, inquirer, topic)?;
    let mut problems = Vec::new();
    if replicas.len() != 1 {
        let what =
            format!("topic \"{topic}\" has {} partitions; its order needs exactly one", replicas.len());
        problems.push(Problem { fatal: true, refusal: Refusal::new(what, NEW_LOG) });
    }
    for (key, value) in &wanted.config {
        let (fatal, advised) = (wanted.fatal.contains(key), wanted.advised.contains(key));
        if (fatal || advised) && found.get(*key).is_some_and(|found| worse(key, found, value)) {
            let what = format!("topic \"{topic}\" has {key}={}, not {value}", found[*key]);
            problems
                .push(Problem { fatal, refusal: Refusal::new(what, alter(connection, topic, key, value)) });
        }
    }
    let in_sync: usize = found.get("min.insync.replicas").and_then(|n| n.parse().ok()).unwrap_or(1);
    if let Some(count) = replicas.first().filter(|count| **count < in_sync) {
        let what = format!(
            "topic \"{topic}\" has min.insync.replicas={in_sync} and replication factor {count}: it takes no record"
        );
        let remedy = alter(connection, topic, "min.insync.replicas", &count.to_string());
        problems.push(Problem { fatal: true, refusal: Refusal::new(what, remedy) });
    }
    if replicas.first().is_some_and(|count| *count >= SAFE_REPLICAS) && in_sync < 2 {
        let what = format!("topic \"{topic}\" takes records that only one replica has: losing it loses them");
        let remedy = alter(connection, topic, "min.insync.replicas", "2");
        problems.push(Problem { fatal: false, refusal: Refusal::new(what, remedy) });
    }
    Ok(problems)
}

/// Whether a value that was found will not do; a higher limit than ours will.
fn worse(key: &str, found: &str, wanted: &str) -> bool {
    if key == "max.message.bytes" {
        return found.parse::<u64>().ok() < wanted.parse().ok();
    }
    found != wanted
}

fn alter(connection: &Connection, topic: &str, key: &str, value: &str) -> String {
    format!(
        "kafka-configs.sh --bootstrap-server {} --alter --entity-type topics --entity-name {topic} \
         --add-config {key}={value}",
        connection.bootstrap()
    )
}

/// Largest record that the log takes, bytes of key, value and headers before compression; `None` where this login may not
/// ask.
pub fn record_max(connection: &Connection, names: &Names) -> Result<Option<usize>, KafkaError> {
    let described = match describe(connection, &names.log()) {
        Err(KafkaError::Refused(_)) => return Ok(None),
        described => described?,
    };
    let bytes = described.get("max.message.bytes").and_then(|bytes| bytes.parse::<usize>().ok());
    // What a batch has beside a record, and what the compression of the incompressible adds.
    Ok(bytes.map(|bytes| bytes.min(BATCH_MAX_LEN)).map(|bytes| (bytes - bytes / 128).saturating_sub(1 << 10)))
}

/// Number of replicas of each partition.
fn shape(
    connection: &Connection,
    inquirer: &BaseConsumer<Reports>,
    topic: &str,
) -> Result<Vec<usize>, KafkaError> {
    let metadata = inquirer
        .fetch_metadata(Some(topic), connection.outage())
        .map_err(|error| KafkaError::of(&format!("cannot ask about topic \"{topic}\""), &error))?;
    let partitions = metadata.topics().first().map(|topic| topic.partitions()).unwrap_or_default();
    Ok(partitions.iter().map(|partition| partition.replicas().len()).collect())
}

fn describe(connection: &Connection, topic: &str) -> Result<HashMap<String, String>, KafkaError> {
    let doing = format!("cannot read the configuration of topic \"{topic}\"");
    let admin = admin(connection)?;
    let results = wait(admin.describe_configs([&ResourceSpecifier::Topic(topic)], &options()))
        .map_err(|error| KafkaError::of(&doing, &error))?;
    let mut config = HashMap::new();
    for result in results {
        let resource = result.map_err(|code| KafkaError::of(&doing, &ClientError::AdminOp(code)))?;
        config.extend(resource.entries.into_iter().filter_map(|entry| Some((entry.name, entry.value?))));
    }
    Ok(config)
}

fn admin(connection: &Connection) -> Result<AdminClient<Reports>, KafkaError> {
    connection
        .client(&[])
        .create_with_context(Reports::default())
        .map_err(|error| KafkaError::of("cannot make a Kafka client", &error))
}

fn options() -> AdminOptions {
    AdminOptions::new().request_timeout(Some(ADMIN_LIMIT)).operation_timeout(Some(ADMIN_LIMIT))
}

/// Waits on this thread; librdkafka answers every request within its timeout.
fn wait<T>(answer: impl Future<Output = KafkaResult<T>>) -> KafkaResult<T> {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut answer = pin!(answer);
    loop {
        match answer.as_mut().poll(&mut context) {
            Poll::Ready(answer) => return answer,
            Poll::Pending => std::thread::park(),
        }
    }
}
