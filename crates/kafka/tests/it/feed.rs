use std::sync::Arc;
use std::time::{Duration, Instant};

use change::Lsn;
use kafka::{Connection, KafkaFeed, KafkaPublisher, Names, RangeReader, Start};
use rdkafka::ClientConfig;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use relay::Publisher;
use testkit::services::wait_until;
use worker::{Feed, FeedError, FeedEvent, GroupOffset, LogBatch};

use crate::common::*;

const CONSUMER_GROUPS: &str = "org.apache.kafka.tools.consumer.group.ConsumerGroupCommand";

fn published(connection: &Connection, names: &Names, rows_: std::ops::Range<u64>) -> KafkaPublisher {
    let mut publisher = KafkaPublisher::new(connection.clone(), names.clone());
    publisher.open().unwrap();
    let count = rows_.end - rows_.start;
    publisher.send(&rows(rows_.start, count), count as usize).unwrap();
    publisher.commit(&[described()], &mut progress(rows_.end)).unwrap();
    publisher
}

pub(crate) fn until_assigned(feed: &mut KafkaFeed) {
    let mut batch = LogBatch::default();
    wait_until("the group gives the log", PATIENCE, || {
        match feed.poll(Duration::from_millis(100), &mut batch).unwrap() {
            FeedEvent::Assigned => Some(()),
            FeedEvent::Idle => None,
            event => panic!("{event:?} before the assignment"),
        }
    });
}

/// Polls until `count` data records have come.
pub(crate) fn read(feed: &mut KafkaFeed, count: usize) -> Vec<String> {
    let (mut batch, mut all) = (LogBatch::default(), Vec::new());
    wait_until("the records", PATIENCE, || {
        let event = feed.poll(Duration::from_millis(100), &mut batch).unwrap();
        assert!(matches!(event, FeedEvent::Records | FeedEvent::Idle), "{event:?}");
        let records = (0..batch.len()).map(|place| batch.get(place));
        all.extend(records.filter_map(|record| Some(record.position?.to_string())));
        (all.len() >= count).then_some(())
    });
    all
}

#[test]
fn a_feed_reads_from_where_it_is_told_and_from_nowhere_else() {
    let (connection, names) = pipeline(shared(), "told");
    let mut publisher = published(&connection, &names, 0..10);
    let mut feed = KafkaFeed::open(&connection, &names, &names.group("counters", None)).unwrap();
    until_assigned(&mut feed);
    let mut batch = LogBatch::default();
    for _ in 0..3 {
        assert_eq!(feed.poll(Duration::from_millis(100), &mut batch).unwrap(), FeedEvent::Idle);
    }
    let state = feed.log().unwrap();
    assert_eq!((state.id.as_str(), state.generation, state.start), ("id-told", 1, 0));
    assert_eq!(state.group, None);
    // The first record and its marker, ten records and theirs.
    assert_eq!(state.end, 13);

    feed.seek(0).unwrap();
    wait_until("the first record", PATIENCE, || {
        feed.poll(Duration::from_millis(100), &mut batch).unwrap();
        (!batch.is_empty()).then_some(())
    });
    let first = batch.get(0);
    assert!(first.log && first.offset == 0 && first.position.is_none());

    // Sought again while records are on their way: those are forgotten.
    feed.seek(5).unwrap();
    assert_eq!(read(&mut feed, 7), positions(3..10));
    publisher.send(&rows(10, 5), 5).unwrap();
    publisher.commit(&[], &mut progress(15)).unwrap();
    assert_eq!(read(&mut feed, 5), positions(10..15));
}

#[test]
fn a_record_comes_whole() {
    let (connection, names) = pipeline(shared(), "content");
    let _publisher = published(&connection, &names, 7..8);
    let mut feed = KafkaFeed::open(&connection, &names, &names.group("counters", None)).unwrap();
    until_assigned(&mut feed);
    feed.seek(1).unwrap();
    let mut batch = LogBatch::default();
    wait_until("the record", PATIENCE, || {
        feed.poll(Duration::from_millis(100), &mut batch).unwrap();
        (!batch.is_empty()).then_some(())
    });
    let (sent, record) = (rows(7, 1), batch.get(0));
    let sent = sent.iter().next().unwrap();
    assert_eq!((record.key, record.value), (sent.key, sent.value));
    assert_eq!(record.xid, Some(7));
    assert_eq!(record.schema, Some(VERSION));
    assert_eq!(record.commit, Some(Lsn(8)));
}

#[test]
fn the_ledger_arrives_beside_the_log() {
    let (connection, names) = pipeline(shared(), "beside");
    let mut publisher = published(&connection, &names, 0..1);
    let mut feed = KafkaFeed::open(&connection, &names, &names.group("counters", None)).unwrap();
    let first = feed.schema(VERSION).unwrap();
    assert_eq!(*first, schema());
    assert!(Arc::ptr_eq(&first, &feed.schema(VERSION).unwrap()));
    publisher.commit(&[], &mut progress(42)).unwrap();
    let mut batch = LogBatch::default();
    wait_until("the newest progress", PATIENCE, || {
        feed.poll(Duration::from_millis(10), &mut batch).unwrap();
        let end = feed.progress().unwrap().map(|progress| progress.end_lsn);
        (end == Some(Lsn(42))).then_some(())
    });
    let missing = change::SchemaRef { version: 9, ..VERSION };
    assert!(matches!(feed.schema(missing), Err(FeedError::Refused(_))));
}

#[test]
fn h43_a_reset_by_a_tool_is_told_from_a_commit_of_ours() {
    let (connection, names) = pipeline(shared(), "whose");
    let _publisher = published(&connection, &names, 0..10);
    let group = names.group("counters", None);
    let mut feed = KafkaFeed::open(&connection, &names, &group).unwrap();
    until_assigned(&mut feed);
    feed.commit(11).unwrap();
    let mut batch = LogBatch::default();
    wait_until("the committed offset", PATIENCE, || {
        feed.poll(Duration::from_millis(10), &mut batch).unwrap();
        feed.log().unwrap().group.map(|group| assert_eq!(group, GroupOffset { offset: 11, ours: true }))
    });
    // The group looks alive to the tools.
    let at = shared().bootstrap();
    let tool = |args: &[&str]| {
        let mut all = vec!["--bootstrap-server", &at, "--group", &group];
        all.extend(args);
        shared().tool(CONSUMER_GROUPS, &all)
    };
    let topic = names.log();
    let live = tool(&["--describe"]);
    assert!(live.contains("millrace"), "{live}");
    let reset = ["--reset-offsets", "--to-earliest", "--topic", &topic, "--execute"];
    let refused = tool(&reset);
    assert!(refused.contains("inactive") || refused.contains("Stable"), "{refused}");

    drop(feed);
    tool(&reset);
    let mut feed = KafkaFeed::open(&connection, &names, &group).unwrap();
    until_assigned(&mut feed);
    assert_eq!(feed.log().unwrap().group, Some(GroupOffset { offset: 0, ours: false }));
}

#[test]
fn a_second_member_stands_by() {
    let (connection, names) = pipeline(shared(), "second");
    let _publisher = published(&connection, &names, 0..3);
    let group = names.group("search", None);
    let mut first = KafkaFeed::open(&connection, &names, &group).unwrap();
    until_assigned(&mut first);
    first.seek(0).unwrap();
    assert_eq!(read(&mut first, 3), positions(0..3));

    let mut second = KafkaFeed::open(&connection, &names, &group).unwrap();
    let mut batch = LogBatch::default();
    // The group is balanced anew: it takes the log from the first and gives it to one of the two.
    let (mut first_has, mut second_has, mut rebalanced) = (true, false, false);
    wait_until("the new balance", PATIENCE, || {
        for (feed, has) in [(&mut first, &mut first_has), (&mut second, &mut second_has)] {
            match feed.poll(Duration::from_millis(50), &mut batch).unwrap() {
                FeedEvent::Assigned => *has = true,
                FeedEvent::Revoked => {
                    *has = false;
                    rebalanced = true;
                }
                FeedEvent::Records | FeedEvent::Idle => {}
            }
            assert!(!rebalanced || *has || batch.is_empty(), "records without the log");
        }
        (rebalanced && (first_has || second_has)).then_some(())
    });
    assert!(first_has != second_has);
    let (owner, mut spare) = if first_has { (first, second) } else { (second, first) };
    for _ in 0..5 {
        assert_eq!(spare.poll(Duration::from_millis(50), &mut batch).unwrap(), FeedEvent::Idle);
    }
    drop(owner);
    until_assigned(&mut spare);
    spare.seek(0).unwrap();
    assert_eq!(read(&mut spare, 3), positions(0..3));
}

#[test]
fn an_offset_that_is_no_longer_there_is_looked_up_again() {
    let (connection, names) = pipeline(shared(), "range");
    let _publisher = published(&connection, &names, 0..10);
    cut(&names, 6);
    for (name, offset) in [("low", 3), ("high", 100)] {
        let mut feed = KafkaFeed::open(&connection, &names, &names.group(name, None)).unwrap();
        until_assigned(&mut feed);
        let state = feed.log().unwrap();
        // The first record is gone; the ledger still knows the log.
        assert_eq!((state.start, state.id.as_str()), (6, "id"));
        feed.seek(offset).unwrap();
        let mut batch = LogBatch::default();
        // Not refused: a worker that was frozen asks for what another one has applied and retention removed since.
        let reason =
            wait_until("the error", PATIENCE, || match feed.poll(Duration::from_millis(100), &mut batch) {
                Ok(FeedEvent::Idle) => None,
                Err(FeedError::Unavailable(reason)) => Some(reason),
                other => panic!("{other:?}"),
            });
        assert!(reason.contains(&names.log()), "{reason}");
    }
    let range = RangeReader::open(&connection, &names, Start::Offset(3), None).map(drop);
    assert!(matches!(range, Err(FeedError::Refused(_))), "{range:?}");
}

#[test]
fn a_record_that_cannot_be_read_is_named_after_those_before_it() {
    let (connection, names) = pipeline(shared(), "poison");
    drop(published(&connection, &names, 0..3));
    let foreign: BaseProducer =
        ClientConfig::new().set("bootstrap.servers", shared().bootstrap()).create().unwrap();
    let headers =
        OwnedHeaders::new().insert(Header { key: change::header::POSITION, value: Some("nonsense") });
    foreign
        .send(BaseRecord::<str, str>::to(&names.log()).partition(0).payload("{}").headers(headers))
        .unwrap();
    foreign.flush(PATIENCE).unwrap();

    let mut feed = KafkaFeed::open(&connection, &names, &names.group("counters", None)).unwrap();
    until_assigned(&mut feed);
    feed.seek(0).unwrap();
    assert_eq!(read(&mut feed, 3), positions(0..3));
    let mut batch = LogBatch::default();
    let error =
        wait_until("the poison", PATIENCE, || feed.poll(Duration::from_millis(100), &mut batch).err());
    assert!(matches!(error, FeedError::Poison { offset: 6, .. }), "{error}");

    // Whoever reads a stretch of the log does not take it for its end.
    let mut reader = RangeReader::open(&connection, &names, Start::Beginning, None).unwrap();
    let mut all = Vec::new();
    let error = loop {
        match reader.read(PATIENCE, &mut batch) {
            Ok(true) => all.extend((0..batch.len()).filter_map(|place| batch.get(place).position)),
            Ok(false) => panic!("the end after {all:?}"),
            Err(error) => break error,
        }
    };
    assert_eq!(all.len(), 3);
    assert!(matches!(error, FeedError::Poison { offset: 6, .. }), "{error}");
}

/// Deletes the records of a log before `offset`, as retention does.
fn cut(names: &Names, offset: i64) {
    let file = tempfile::NamedTempFile::new().unwrap();
    let plan = format!(
        r#"{{"version":1,"partitions":[{{"topic":"{}","partition":0,"offset":{offset}}}]}}"#,
        names.log()
    );
    std::fs::write(file.path(), plan).unwrap();
    let at = shared().bootstrap();
    let path = file.path().to_str().unwrap();
    shared().tool(
        "org.apache.kafka.tools.DeleteRecordsCommand",
        &["--bootstrap-server", &at, "--offset-json-file", path],
    );
}

#[test]
fn aborted_records_are_never_fed() {
    let (connection, names) = pipeline(shared(), "aborted");
    let mut publisher = KafkaPublisher::new(connection.clone(), names.clone());
    for round in 0..3 {
        publisher.open().unwrap();
        publisher.send(&rows(1000 + round, 50), 50).unwrap();
        publisher.open().unwrap();
        publisher.send(&rows(round * 10, 10), 10).unwrap();
        publisher.commit(&[], &mut progress(round)).unwrap();
    }
    let mut feed = KafkaFeed::open(&connection, &names, &names.group("counters", None)).unwrap();
    until_assigned(&mut feed);
    feed.seek(0).unwrap();
    assert_eq!(read(&mut feed, 30), positions(0..30));
}

#[test]
fn a_range_is_read_to_its_end_and_no_further() {
    let (connection, names) = pipeline(shared(), "stretch");
    let mut publisher = published(&connection, &names, 0..10);
    let read = |start, end| {
        let mut reader = RangeReader::open(&connection, &names, start, end).unwrap();
        let (mut batch, mut all, clock) = (LogBatch::default(), Vec::new(), Instant::now());
        while reader.read(Duration::from_millis(200), &mut batch).unwrap() {
            all.extend((0..batch.len()).filter_map(|place| Some(batch.get(place).position?.to_string())));
            assert!(clock.elapsed() < PATIENCE);
        }
        all
    };
    assert_eq!(read(Start::Beginning, None), positions(0..10));
    assert_eq!(read(Start::Offset(4), Some(7)), positions(2..5));
    // The end is a control record.
    assert_eq!(read(Start::Offset(4), Some(12)), positions(2..10));
    assert_eq!(read(Start::Offset(12), Some(13)), positions(0..0));
    assert_eq!(read(Start::Time(TIME_MS + 6), None), positions(6..10));
    assert_eq!(read(Start::Time(TIME_MS + 60), None), positions(0..0));

    // An end that is not there yet is waited for.
    let mut reader = RangeReader::open(&connection, &names, Start::Offset(11), Some(15)).unwrap();
    let (mut batch, mut all) = (LogBatch::default(), Vec::new());
    for _ in 0..3 {
        assert!(reader.read(Duration::from_millis(50), &mut batch).unwrap());
        all.extend((0..batch.len()).filter_map(|place| Some(batch.get(place).position?.to_string())));
    }
    assert_eq!(all, positions(9..10));
    publisher.send(&rows(10, 1), 1).unwrap();
    publisher.commit(&[], &mut progress(11)).unwrap();
    let clock = Instant::now();
    while reader.read(Duration::from_millis(50), &mut batch).unwrap() {
        all.extend((0..batch.len()).filter_map(|place| Some(batch.get(place).position?.to_string())));
        assert!(clock.elapsed() < PATIENCE);
    }
    assert_eq!(all, positions(9..11));
}
