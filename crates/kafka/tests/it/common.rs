use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::time::Duration;

use change::{
    ChangeStamp, Column, Encoder, Kind, LedgerEntry, Lsn, Op, Position, Progress, RecordBatch,
    ReplicaIdentity, SchemaRef, TableSchema, Timeline, TupleBuf,
};
use change::{Datum, header};
use kafka::{Connection, Names, SetupRecord, SetupWriter, ensure_topics};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::{Headers, Message};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use testkit::services::Kafka;

pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// The broker that tests share and none harms.
pub(crate) fn shared() -> &'static Kafka {
    static KAFKA: OnceLock<Kafka> = OnceLock::new();
    KAFKA.get_or_init(Kafka::start)
}

pub(crate) fn connection(bootstrap: &str, properties: &[(&str, &str)]) -> Connection {
    let properties: BTreeMap<String, String> =
        properties.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
    Connection::new(bootstrap, properties).unwrap()
}

/// Topics of a pipeline, with the log's first record.
pub(crate) fn pipeline(kafka: &Kafka, name: &str) -> (Connection, Names) {
    pipeline_at(connection(&kafka.bootstrap(), &[]), name, 1)
}

/// The same with so many replicas.
pub(crate) fn pipeline_at(connection: Connection, name: &str, replicas: u16) -> (Connection, Names) {
    let names = Names::new(name, 1).unwrap();
    assert_eq!(ensure_topics(&connection, &names, Some(replicas)).unwrap(), []);
    let (mut setup, ledger) = SetupWriter::open(&connection, &names).unwrap();
    assert_eq!(ledger.log, None);
    setup
        .write(&[
            SetupRecord::LogHeader(format!("id-{name}")),
            SetupRecord::Generations(kafka::Generations::of(kafka::Generation::new(1))),
        ])
        .unwrap();
    (connection, names)
}

/// `count` rows of a table, from number `from` on, each a transaction of its own.
pub(crate) fn rows(from: u64, count: u64) -> RecordBatch {
    let mut encoder = Encoder::new("test", "db");
    let relation = encoder.relation(VERSION, &schema());
    let mut batch = RecordBatch::default();
    for number in from..from + count {
        let text = number.to_string();
        let row = TupleBuf::new([Datum::Text(&text)]);
        let after = Some(row.as_tuple());
        let images = change::RowImages { op: Op::Create, before: None, after, previous_key: None };
        encoder.row(&mut batch, &relation, &stamp(number), images).unwrap();
        batch.mark_commit(Lsn(number + 1));
    }
    batch
}

/// One record of about `size` bytes that does not compress.
pub(crate) fn large(size: usize) -> RecordBatch {
    let mut state = 88172645463325252u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    })
    .take(size)
    .collect();
    let mut batch = RecordBatch::default();
    Encoder::new("test", "db").message(&mut batch, &stamp(1), "large", &noise);
    batch
}

pub(crate) const VERSION: SchemaRef = SchemaRef { relation: 16384, version: 1 };

/// The ledger's record of it.
pub(crate) fn described() -> LedgerEntry {
    LedgerEntry::Schema(VERSION, schema())
}

pub(crate) fn schema() -> TableSchema {
    let column = Column {
        name: "id".into(),
        type_oid: 20,
        type_name: "bigint".into(),
        key: Some(1),
        collation: None,
        number: None,
        recorded: None,
    };
    TableSchema {
        relation: VERSION.relation,
        root: None,
        schema: "public".into(),
        table: "t".into(),
        identity: ReplicaIdentity::Full,
        columns: vec![column],
    }
}

fn stamp(number: u64) -> ChangeStamp {
    ChangeStamp {
        position: Position { lsn: Lsn(number), kind: Kind::Transaction, ordinal: 0 },
        lsn: Lsn(number),
        last_commit_lsn: Lsn(0),
        xid: Some(number as u32),
        commit_time_us: TIME_MS * 1000 + number as i64 * 1000,
        total_order: 1,
        collection_order: 1,
        now_us: 0,
    }
}

/// Commit time of row 0, milliseconds since the epoch: far ahead of the broker's clock, as a source's may be.
pub(crate) const TIME_MS: i64 = 2_000_000_000_000;

pub(crate) fn progress(end: u64) -> Progress {
    Progress {
        log: "id".into(),
        generation: 1,
        end_lsn: Lsn(end),
        position: Position { lsn: Lsn(end), kind: Kind::Transaction, ordinal: 0 },
        split: None,
        log_end: -1,
        timeline: Timeline { system_id: "7".into(), timeline: 1 },
        beat: (1, "nonce".into()),
        snapshot: None,
        time_ms: 0,
    }
}

/// A record as another program reads it.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) offset: i64,
    pub(crate) key: Option<Vec<u8>>,
    pub(crate) value: Option<Vec<u8>>,
    pub(crate) position: Option<String>,
    pub(crate) timestamp_ms: Option<i64>,
}

/// What a plain client sees in a topic; the code under test has no part in it.
pub(crate) fn seen(bootstrap: &str, topic: &str, isolation: &str) -> Vec<Seen> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", bootstrap)
        .set("group.id", "oracle")
        .set("isolation.level", isolation)
        .set("enable.auto.commit", "false")
        .set("enable.partition.eof", "true")
        .create()
        .unwrap();
    let mut place = TopicPartitionList::new();
    place.add_partition_offset(topic, 0, Offset::Beginning).unwrap();
    consumer.assign(&place).unwrap();
    let mut all = Vec::new();
    loop {
        match consumer.poll(PATIENCE).expect("the topic answers") {
            Ok(message) => all.push(Seen {
                offset: message.offset(),
                key: message.key().map(<[u8]>::to_vec),
                value: message.payload().map(<[u8]>::to_vec),
                position: message.headers().and_then(|headers| {
                    let header = headers.iter().find(|h| h.key == header::POSITION)?;
                    let text = std::str::from_utf8(header.value?).unwrap();
                    text.split(' ').next().map(str::to_owned)
                }),
                timestamp_ms: message.timestamp().to_millis(),
            }),
            Err(KafkaError::PartitionEOF(_)) => return all,
            Err(error) => panic!("{error}"),
        }
    }
}

/// Positions of the committed data records of a log, in order.
pub(crate) fn committed(bootstrap: &str, names: &Names) -> Vec<String> {
    seen(bootstrap, &names.log(), "read_committed").into_iter().filter_map(|record| record.position).collect()
}

/// Positions of rows as [`rows`] makes them.
pub(crate) fn positions(numbers: std::ops::Range<u64>) -> Vec<String> {
    numbers.map(|number| format!("0/{number:X}:t:0")).collect()
}
