use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use change::{LedgerEntry, SlotIntent, SlotState};
use kafka::{
    KafkaError, KafkaPublisher, Names, ReadUntil, SetupRecord, SetupWriter, generations, read_ledger,
};
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use relay::{PublishError, Publisher};
use testkit::services::wait_until;

use crate::common::*;

#[test]
fn a_transaction_shows_whole_or_not_at_all() {
    let (connection, names) = pipeline(shared(), "whole");
    let at = shared().bootstrap();
    let mut publisher = KafkaPublisher::new(connection, names.clone());
    let ledger = publisher.open().unwrap();
    assert_eq!((ledger.progress, ledger.log.as_deref()), (None, Some("id-whole")));

    let batch = rows(0, 10);
    publisher.send(&batch, 4).unwrap();
    publisher.send(&rows(4, 6), 6).unwrap();
    wait_until("the records are there, uncommitted", PATIENCE, || {
        (seen(&at, &names.log(), "read_uncommitted").len() == 11).then_some(())
    });
    assert_eq!(committed(&at, &names), positions(0..0));

    publisher.commit(&[], &mut progress(10)).unwrap();
    assert_eq!(committed(&at, &names), positions(0..10));
    let log = seen(&at, &names.log(), "read_committed");
    assert_eq!((&log[0].key, &log[0].value, log[0].offset), (&None, &None, 0));
    for (record, sent) in log[1..].iter().zip(batch.iter()) {
        assert_eq!(record.key.as_deref(), Some(sent.key));
        assert_eq!(record.value.as_deref(), Some(sent.value));
        assert_eq!(record.timestamp_ms, Some(sent.meta.timestamp_ms));
    }
}

#[test]
fn log_end_is_the_offset_after_the_last_data_record() {
    let (connection, names) = pipeline(shared(), "logend");
    let at = shared().bootstrap();
    let mut publisher = KafkaPublisher::new(connection.clone(), names.clone());
    publisher.open().unwrap();
    let last = || seen(&at, &names.log(), "read_committed").last().unwrap().offset + 1;
    let mut told = progress(1);
    publisher.commit(&[], &mut told).unwrap();
    assert_eq!(told.log_end, last(), "nothing but the log's first record");
    for (from, count) in [(0, 3), (3, 1), (4, 500)] {
        publisher.send(&rows(from, count), count as usize).unwrap();
        publisher.commit(&[], &mut told).unwrap();
        assert_eq!(told.log_end, last(), "after {count} records");
        let before = told.log_end;
        publisher.commit(&[], &mut told).unwrap();
        assert_eq!(told.log_end, before, "a commit without records moves nothing");
    }
    let told_so_far = || seen(&at, &names.ledger(), "read_committed").len();
    let once = told_so_far();
    assert_eq!(once, 1 + 3 * 2, "one for each commit: it is known before");
    // What nobody may do.
    let foreign: BaseProducer = ClientConfig::new().set("bootstrap.servers", &at).create().unwrap();
    foreign.send(BaseRecord::<(), str>::to(&names.log()).partition(0).payload("stray")).unwrap();
    foreign.flush(PATIENCE).unwrap();
    publisher.send(&rows(504, 2), 2).unwrap();
    publisher.commit(&[], &mut told).unwrap();
    assert_eq!(
        (told.log_end, told_so_far()),
        (last(), once + 2),
        "told once more where it was not as expected"
    );
    // What was sent and not committed leaves its offsets behind, and no trace in the log's end.
    publisher.send(&rows(900, 5), 5).unwrap();
    let before = told.log_end;
    let ledger = publisher.open().unwrap();
    assert_eq!(ledger.progress.as_ref().map(|progress| progress.log_end), Some(before));
    publisher.commit(&[], &mut told).unwrap();
    assert_eq!(told.log_end, before);
}

#[test]
fn log_end_is_exact_where_a_transaction_ends_behind_the_records_of_the_next() {
    const ENOUGH: usize = 5;
    let (connection, names) = pipeline(shared(), "overlap");
    let mut publisher = KafkaPublisher::new(connection, names.clone());
    publisher.open().unwrap();
    let (mut told, mut ends, mut sent, mut overlaps) = (progress(1), Vec::new(), 0, 0);
    let start = Instant::now();
    while overlaps < ENOUGH && start.elapsed() < Duration::from_secs(10) {
        let count = 1 + ends.len() as u64 % 3;
        publisher.send(&rows(sent, count), count as usize).unwrap();
        sent += count;
        publisher.commit(&[], &mut told).unwrap();
        let before = ends.last().map_or(0, |(_, end)| *end);
        overlaps += usize::from(told.log_end == before + count as i64);
        ends.push((sent, told.log_end));
    }
    eprintln!("{overlaps} overlaps in {} transactions", ends.len());
    let log = seen(&shared().bootstrap(), &names.log(), "read_committed");
    for (sent, end) in ends {
        assert_eq!(log[sent as usize].offset + 1, end, "after {sent} records");
    }
}

#[test]
fn a_ledger_that_grows_all_the_while_is_read_to_an_end() {
    let (connection, names) = pipeline(shared(), "growing");
    let mut publisher = KafkaPublisher::new(connection.clone(), names.clone());
    publisher.open().unwrap();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| read_ledger(&connection, &names, ReadUntil::Committed).unwrap());
        let start = Instant::now();
        for end in 1.. {
            publisher.commit(&[], &mut progress(end)).unwrap();
            if reader.is_finished() {
                break;
            }
            assert!(start.elapsed() < PATIENCE, "it waits for the end of what has none");
        }
    });
}

#[test]
fn the_ledger_comes_back_as_it_was_written() {
    let (connection, names) = pipeline(shared(), "ledger");
    let intent = SlotIntent { slot: "millrace_ledger_1".into(), state: SlotState::Creating };
    let (mut setup, _) = SetupWriter::open(&connection, &names).unwrap();
    setup.write(&[SetupRecord::Ledger(LedgerEntry::Slot(intent.clone()))]).unwrap();

    let mut publisher = KafkaPublisher::new(connection.clone(), names.clone());
    assert_eq!(publisher.open().unwrap().slot, Some(intent.clone()));
    let (mut first, mut second) = (progress(5), progress(9));
    publisher.send(&rows(0, 2), 2).unwrap();
    publisher.commit(&[described()], &mut first).unwrap();
    publisher.commit(&[], &mut second).unwrap();

    let read = read_ledger(&connection, &names, ReadUntil::Committed).unwrap();
    assert_eq!(read.progress.as_ref(), Some(&second));
    assert_eq!(read.slot, Some(intent));
    assert_eq!(read.schemas.into_iter().collect::<Vec<_>>(), [(VERSION, schema())]);
    assert!(read.log_end > second.log_end, "control records follow");
    assert_eq!(publisher.open().unwrap().progress, Some(second));
}

#[test]
fn setup_writes_the_first_record_once() {
    let (connection, names) = pipeline(shared(), "once");
    assert_eq!(
        generations(&connection, "once").unwrap(),
        Some(kafka::Generations::of(kafka::Generation::new(1)))
    );
    assert_eq!(generations(&connection, "neverwas").unwrap(), None);
    let (mut setup, ledger) = SetupWriter::open(&connection, &names).unwrap();
    assert_eq!(ledger.log.as_deref(), Some("id-once"));
    let again = setup.write(&[SetupRecord::LogHeader("another".into())]);
    assert!(matches!(again, Err(KafkaError::Refused(_))), "{again:?}");
    drop(setup);
    let ledger = read_ledger(&connection, &names, ReadUntil::TrueEnd).unwrap();
    assert_eq!(ledger.log.as_deref(), Some("id-once"));
}

#[test]
fn h03_a_newer_publisher_fences_an_older_one() {
    let (connection, names) = pipeline(shared(), "fence");
    let mut older = KafkaPublisher::new(connection.clone(), names.clone());
    older.open().unwrap();
    older.send(&rows(0, 5), 5).unwrap();
    older.commit(&[], &mut progress(5)).unwrap();
    older.send(&rows(100, 5), 5).unwrap();

    let mut newer = KafkaPublisher::new(connection, names.clone());
    let ledger = newer.open().unwrap();
    assert_eq!(ledger.progress.map(|progress| progress.end_lsn), Some(progress(5).end_lsn));

    let send = older.send(&rows(105, 5), 5);
    let commit = send.and_then(|()| older.commit(&[], &mut progress(110)));
    assert!(matches!(commit, Err(PublishError::Fenced)), "{commit:?}");
    newer.send(&rows(5, 5), 5).unwrap();
    newer.commit(&[], &mut progress(10)).unwrap();
    drop(older);
    assert_eq!(committed(&shared().bootstrap(), &names), positions(0..10));
}

#[test]
fn h03_an_idle_older_publisher_is_fenced_too_whichever_of_its_producers_comes_next() {
    for turns in 1..=2 {
        let (connection, names) = pipeline(shared(), &format!("idlefence{turns}"));
        let mut older = KafkaPublisher::new(connection.clone(), names.clone());
        older.open().unwrap();
        for end in 1..=turns {
            older.commit(&[], &mut progress(end)).unwrap();
        }
        let mut newer = KafkaPublisher::new(connection, names.clone());
        newer.open().unwrap();
        let confirmed = older.confirm();
        assert!(matches!(confirmed, Err(PublishError::Fenced)), "{confirmed:?}");
        newer.confirm().unwrap();
        let commit = older.commit(&[], &mut progress(9));
        assert!(matches!(commit, Err(PublishError::Fenced)), "{commit:?}");
        newer.send(&rows(0, 1), 1).unwrap();
        newer.confirm().unwrap();
        let ledger = newer.open().unwrap();
        assert_eq!(ledger.progress.map(|progress| progress.end_lsn), Some(progress(turns).end_lsn));
    }
}

#[test]
fn h03_another_producers_open_transaction_is_not_taken_for_the_end() {
    let (connection, names) = pipeline(shared(), "hidden");
    let mut publisher = KafkaPublisher::new(connection.clone(), names.clone());
    publisher.open().unwrap();
    let foreign: BaseProducer = ClientConfig::new()
        .set("bootstrap.servers", shared().bootstrap())
        .set("transactional.id", "somebody else")
        .create()
        .unwrap();
    foreign.init_transactions(PATIENCE).unwrap();
    foreign.begin_transaction().unwrap();
    foreign.send(BaseRecord::<str, str>::to(&names.ledger()).partition(0).key("x").payload("y")).unwrap();
    wait_until("it is delivered", PATIENCE, || {
        foreign.poll(Duration::from_millis(10));
        (foreign.in_flight_count() == 0).then_some(())
    });
    // Committed, and hidden behind the foreign transaction.
    publisher.commit(&[], &mut progress(77)).unwrap();

    let start = Instant::now();
    let impatient = connection.clone().with_outage_limit(Duration::from_secs(1));
    let blocked = KafkaPublisher::new(impatient, names.clone()).open();
    let Err(PublishError::Refused(refusal)) = blocked else { panic!("{blocked:?}") };
    assert!(refusal.what.contains("open transaction"), "{refusal}");
    assert!(start.elapsed() < Duration::from_secs(10));

    foreign.abort_transaction(PATIENCE).unwrap();
    let ledger = KafkaPublisher::new(connection, names).open().unwrap();
    assert_eq!(ledger.progress.map(|progress| progress.end_lsn), Some(progress(77).end_lsn));
}

#[test]
fn an_overdue_transaction_is_not_taken_for_a_takeover() {
    let (_, names) = pipeline(shared(), "overdue");
    let at = shared().bootstrap();
    let hasty =
        connection(&at, &[("transaction.timeout.ms", "1500")]).with_outage_limit(Duration::from_secs(1));
    let mut publisher = KafkaPublisher::new(hasty, names.clone());
    publisher.open().unwrap();
    publisher.send(&rows(0, 5), 5).unwrap();
    let stable: BaseConsumer = ClientConfig::new().set("bootstrap.servers", &at).create().unwrap();
    wait_until("the broker aborts it", PATIENCE, || {
        // The first record and its marker, five records and theirs.
        (stable.fetch_watermarks(&names.log(), 0, PATIENCE).unwrap() == (0, 8)).then_some(())
    });
    let commit = publisher.commit(&[], &mut progress(5));
    assert!(matches!(commit, Err(PublishError::Unavailable(_))), "{commit:?}");
    assert_eq!(publisher.open().unwrap().progress, None);
    publisher.send(&rows(0, 5), 5).unwrap();
    publisher.commit(&[], &mut progress(5)).unwrap();
    assert_eq!(committed(&at, &names), positions(0..5));
}

/// The child of the next test: sends and never commits.
#[test]
#[ignore = "started by another test"]
fn child_that_is_killed_in_its_transaction() {
    let Ok(bootstrap) = std::env::var("TEST_BOOTSTRAP") else { return };
    let names = Names::new("killed", 1).unwrap();
    let mut publisher = KafkaPublisher::new(connection(&bootstrap, &[]), names);
    publisher.open().unwrap();
    publisher.send(&rows(50, 20), 20).unwrap();
    std::thread::sleep(Duration::from_secs(120));
}

#[test]
fn a_publisher_killed_in_its_transaction_leaves_nothing() {
    let (connection, names) = pipeline(shared(), "killed");
    let at = shared().bootstrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "publisher::child_that_is_killed_in_its_transaction", "--ignored"])
        .env("TEST_BOOTSTRAP", &at)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    wait_until("its records are there, uncommitted", PATIENCE, || {
        (seen(&at, &names.log(), "read_uncommitted").len() == 21).then_some(())
    });
    child.kill().unwrap();
    child.wait().unwrap();

    let mut publisher = KafkaPublisher::new(connection, names.clone());
    assert_eq!(publisher.open().unwrap().progress, None);
    publisher.send(&rows(0, 2), 2).unwrap();
    publisher.commit(&[], &mut progress(2)).unwrap();
    assert_eq!(committed(&at, &names), positions(0..2));
}

#[test]
fn a_hundred_thousand_records_keep_their_order() {
    let (_, names) = pipeline(shared(), "order");
    // A queue far smaller than the batch: sending waits for delivery, and goes on.
    let small = connection(&shared().bootstrap(), &[("queue.buffering.max.messages", "5000")]);
    let mut publisher = KafkaPublisher::new(small, names.clone());
    publisher.open().unwrap();
    for part in 0..5 {
        publisher.send(&rows(part * 20_000, 20_000), 20_000).unwrap();
        publisher.commit(&[], &mut progress(part)).unwrap();
    }
    assert_eq!(committed(&shared().bootstrap(), &names), positions(0..100_000));
}

#[test]
fn a_record_too_large_for_the_topic_is_refused_by_name() {
    let (connection_, names) = pipeline(shared(), "large");
    let topic = names.log();
    shared().tool(
        "kafka.admin.ConfigCommand",
        &[
            "--bootstrap-server",
            &shared().bootstrap(),
            "--alter",
            "--entity-type",
            "topics",
            "--entity-name",
            &topic,
            "--add-config",
            "max.message.bytes=100000",
        ],
    );
    let local = connection(&shared().bootstrap(), &[("message.max.bytes", "100000")]);
    for connection in [connection_, local] {
        let mut publisher = KafkaPublisher::new(connection, names.clone());
        publisher.open().unwrap();
        assert!((90_000..100_000).contains(&publisher.record_max().unwrap().unwrap()));
        let sent = publisher.send(&large(200_000), 1);
        let result = sent.and_then(|()| publisher.commit(&[], &mut progress(1)));
        let Err(PublishError::Refused(refusal)) = result else { panic!("{result:?}") };
        assert!(refusal.what.contains(&topic) && refusal.what.contains("large"), "{refusal}");
        assert!(refusal.remedy.contains("max.message.bytes"), "{refusal}");
        assert!(refusal.remedy.contains("[postgres.oversize]"), "{refusal}");
    }
    assert_eq!(committed(&shared().bootstrap(), &names), positions(0..0));
    // Many that fit one by one are not put together until they do not.
    let mut publisher = KafkaPublisher::new(
        connection(&shared().bootstrap(), &[("compression.type", "none")]),
        names.clone(),
    );
    publisher.open().unwrap();
    publisher.record_max().unwrap();
    publisher.send(&rows(0, 5_000), 5_000).unwrap();
    publisher.commit(&[], &mut progress(1)).unwrap();
    assert_eq!(committed(&shared().bootstrap(), &names), positions(0..5_000));
}
