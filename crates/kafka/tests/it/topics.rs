use kafka::{KafkaError, KafkaPublisher, Names, check_topics, delete_groups, delete_topics, ensure_topics};
use relay::{PublishError, Publisher};
use testkit::services::wait_until;

use crate::common::*;

fn topics_tool(args: &[&str]) -> String {
    let at = shared().bootstrap();
    let mut all = vec!["--bootstrap-server", &at];
    all.extend(args);
    shared().tool("org.apache.kafka.tools.TopicCommand", &all)
}

#[test]
fn h07_topics_are_made_once_and_as_they_should_be() {
    let connection = connection(&shared().bootstrap(), &[]);
    let names = Names::new("made", 1).unwrap();
    assert_eq!(check_topics(&connection, &names).unwrap().len(), 3);
    for _ in 0..2 {
        assert_eq!(ensure_topics(&connection, &names, None).unwrap(), []);
    }
    assert_eq!(check_topics(&connection, &names).unwrap(), []);
    let log = topics_tool(&["--describe", "--topic", &names.log()]);
    for wanted in ["PartitionCount: 1", "cleanup.policy=delete", "retention.ms=-1", "retention.bytes=-1"] {
        assert!(log.contains(wanted), "{wanted} in {log}");
    }
    let ledger = topics_tool(&["--describe", "--topic", &names.ledger()]);
    let compact = ["cleanup.policy=compact", "segment.bytes=16777216", "min.cleanable.dirty.ratio=0.1"];
    for wanted in compact.into_iter().chain(["PartitionCount: 1", "delete.retention.ms=60000"]) {
        assert!(ledger.contains(wanted), "{wanted} in {ledger}");
    }
}

#[test]
fn what_others_made_of_the_topics_is_named_with_its_remedy() {
    let connection = connection(&shared().bootstrap(), &[]);
    let names = Names::new("bad", 1).unwrap();
    let (log, ledger) = (names.log(), names.ledger());
    topics_tool(&["--create", "--topic", &log, "--partitions", "2", "--config", "retention.ms=1000"]);
    topics_tool(&["--create", "--topic", &ledger, "--partitions", "1", "--config", "cleanup.policy=delete"]);
    let problems = ensure_topics(&connection, &names, None).unwrap();
    let has = |fatal, what: &str, remedy: &str| {
        let found = problems.iter().any(|problem| {
            problem.fatal == fatal
                && problem.refusal.what.contains(what)
                && problem.refusal.remedy.contains(remedy)
        });
        assert!(found, "{what}, {remedy} in {problems:#?}");
    };
    has(true, &format!("\"{log}\" has 2 partitions"), "begin a new log");
    has(true, &format!("\"{ledger}\" has cleanup.policy=delete"), "--add-config cleanup.policy=compact");
    has(false, &format!("\"{log}\" has retention.ms=1000"), "--add-config retention.ms=-1");
    has(false, &format!("\"{log}\" has max.message.bytes"), "--add-config max.message.bytes=67108864");
}

/// Changes a setting of a topic, as an operator does.
fn configure(topic: &str, setting: &str) {
    let at = shared().bootstrap();
    let place = ["--bootstrap-server", &at, "--entity-type", "topics", "--entity-name", topic];
    let change = ["--alter", "--add-config", setting];
    shared().tool("kafka.admin.ConfigCommand", &[&place[..], &change].concat());
}

#[test]
fn what_a_topics_settings_forbid_is_refused_with_the_setting_that_mends_it() {
    let (connection, names) = pipeline(shared(), "forbids");
    let log = names.log();
    let write = |records: &change::RecordBatch, count| {
        let mut publisher = KafkaPublisher::new(connection.clone(), names.clone());
        publisher.open().unwrap();
        publisher.send(records, count).and_then(|()| publisher.commit(&[], &mut progress(1)))
    };
    let refused = |records: &change::RecordBatch, count| match write(records, count) {
        Err(PublishError::Refused(refusal)) => refusal,
        other => panic!("{other:?}"),
    };
    let found = |what: &str| {
        let problems = check_topics(&connection, &names).unwrap();
        problems.into_iter().any(|problem| problem.fatal && problem.refusal.what.contains(what))
    };
    assert!(write(&rows(0, 1), 1).is_ok() && !found(""));

    // The rows' time is years ahead of the broker's clock, and grows with their number. This one is of 1970.
    let old = rows(0u64.wrapping_sub(TIME_MS as u64), 1);
    let (after, before) = ("message.timestamp.after.max.ms", "message.timestamp.before.max.ms");
    configure(&log, &format!("{after}=3600000"));
    let refusal = refused(&rows(1, 1), 1);
    assert!(refusal.what.contains(&log) && refusal.remedy.contains(after), "{refusal}");
    assert!(found(after));
    configure(&log, &format!("{after}={},{before}=3600000", i64::MAX));
    let refusal = refused(&old, 1);
    assert!(refusal.what.contains(&log) && refusal.remedy.contains(before), "{refusal}");
    assert!(found(before) && !found(after));

    configure(&log, &format!("{before}={},segment.bytes=1048576", i64::MAX));
    assert!(write(&old, 1).is_ok() && !found(""));
    let refusal = refused(&large(3 << 20), 1);
    assert!(refusal.remedy.contains("segment.bytes=N"), "{refusal}");

    configure(&log, "cleanup.policy=compact,min.insync.replicas=2");
    assert!(found("cleanup.policy=compact"));
    assert!(found("min.insync.replicas=2 and replication factor 1"));
}

#[test]
fn h08_missing_topics_are_refused_with_what_mends_it() {
    let bare = connection(&shared().bootstrap(), &[]);
    let names = Names::new("nosuch", 1).unwrap();
    let opened = KafkaPublisher::new(bare, names).open();
    let Err(PublishError::Refused(refusal)) = opened else { panic!("{opened:?}") };
    assert_eq!(refusal.remedy, "millrace setup");

    let (connection, names) = pipeline(shared(), "lost");
    let at = shared().bootstrap();
    shared().tool(
        "org.apache.kafka.tools.TopicCommand",
        &["--bootstrap-server", &at, "--delete", "--topic", &names.log()],
    );
    wait_until("the deletion", PATIENCE, || {
        check_topics(&connection, &names).is_ok_and(|problems| problems.len() == 1).then_some(())
    });
    let opened = KafkaPublisher::new(connection, names.clone()).open();
    let Err(PublishError::Refused(refusal)) = opened else { panic!("{opened:?}") };
    assert!(refusal.what.contains(&names.log()), "{refusal}");
}

#[test]
fn teardown_removes_what_is_there_and_does_not_mind_what_is_not() {
    let (connection, names) = pipeline(shared(), "torn");
    let groups = [names.group("counters", None), names.group("search", None)];
    let mut feed = kafka::KafkaFeed::open(&connection, &names, &groups[0]).unwrap();
    crate::feed::until_assigned(&mut feed);
    let refused = delete_groups(&connection, &groups);
    assert!(matches!(&refused, Err(KafkaError::Refused(r)) if r.what.contains(&groups[0])), "{refused:?}");
    drop(feed);
    for _ in 0..2 {
        delete_groups(&connection, &groups).unwrap();
        delete_topics(&connection, &names, true).unwrap();
    }
    assert_eq!(check_topics(&connection, &names).unwrap().len(), 3);
}
