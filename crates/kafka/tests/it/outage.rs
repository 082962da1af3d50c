use std::thread;
use std::time::{Duration, Instant};

use kafka::{KafkaFeed, KafkaPublisher};
use relay::{PublishError, Publisher};
use testkit::services::{Kafka, wait_until};
use worker::{Feed, FeedError, FeedEvent, LogBatch};

use crate::common::*;
use crate::feed::{read, until_assigned};

/// How long the broker may be away in these tests.
const LIMIT: Duration = Duration::from_secs(3);
/// What a call may take beyond that before it counts as hanging.
const GRACE: Duration = Duration::from_secs(12);

/// One story, as a broker of one's own costs seconds: publishers and feeds through kill -9, outage and pause.
#[test]
fn a_killed_broker_loses_nothing_and_an_absent_one_is_reported_in_time() {
    let mut broker = Kafka::start();
    let (patient, names) = pipeline(&broker, "outage");
    let impatient = patient.clone().with_outage_limit(LIMIT);
    let mut publisher = KafkaPublisher::new(patient.clone(), names.clone());
    publisher.open().unwrap();
    publisher.send(&rows(0, 10), 10).unwrap();
    publisher.commit(&[described()], &mut progress(10)).unwrap();
    let mut feed = KafkaFeed::open(&patient, &names, &names.group("counters", None)).unwrap();
    until_assigned(&mut feed);
    feed.seek(0).unwrap();
    assert_eq!(read(&mut feed, 10), positions(0..10));

    // Killed in the middle of a transaction and back within the limit.
    publisher.send(&rows(10, 10), 10).unwrap();
    broker.restart();
    publisher.send(&rows(20, 10), 10).unwrap();
    let mut next = 30;
    match publisher.commit(&[], &mut progress(30)) {
        Ok(()) => {}
        Err(PublishError::Unavailable(_)) => {
            // The next publisher knows whether it was committed.
            let end = publisher.open().unwrap().progress.unwrap().end_lsn.0;
            if end == 10 {
                next = 10;
            }
        }
        Err(other) => panic!("{other}"),
    }
    publisher.send(&rows(next, 40 - next), (40 - next) as usize).unwrap();
    publisher.commit(&[], &mut progress(40)).unwrap();
    assert_eq!(committed(&broker.bootstrap(), &names), positions(0..40));
    assert_eq!(read_through(&mut feed, 30), positions(10..40));
    drop(feed);

    // Killed between two transactions: what goes into the dead connections is sent again.
    broker.restart();
    publisher.send(&rows(40, 10), 10).unwrap();
    publisher.commit(&[], &mut progress(50)).unwrap();
    assert_eq!(committed(&broker.bootstrap(), &names), positions(0..50));

    // Silent for longer than one try; then it answers what was sent, and what was sent again.
    let mut publisher = KafkaPublisher::new(impatient.clone(), names.clone());
    publisher.open().unwrap();
    publisher.send(&rows(50, 10), 10).unwrap();
    broker.pause();
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(LIMIT / 2);
            broker.resume();
        });
        publisher.send(&rows(60, 10), 10).unwrap();
        publisher.commit(&[], &mut progress(70)).unwrap();
    });
    assert_eq!(committed(&broker.bootstrap(), &names), positions(0..70));

    // Away for longer than the limit.
    let mut feed = KafkaFeed::open(&impatient, &names, &names.group("search", None)).unwrap();
    until_assigned(&mut feed);
    feed.seek(0).unwrap();
    read(&mut feed, 70);
    publisher.send(&rows(70, 10), 10).unwrap();
    broker.pause();
    reported(|| publisher.commit(&[], &mut progress(80)));
    broker.kill();
    reported(|| publisher.open().map(drop));
    let mut batch = LogBatch::default();
    let start = Instant::now();
    let error = wait_until("the feed's report", LIMIT + GRACE, || {
        feed.poll(Duration::from_millis(100), &mut batch).err()
    });
    assert!(matches!(error, FeedError::Unavailable(_)), "{error}");
    let opened = KafkaFeed::open(&impatient, &names, "millrace.outage.other").map(drop);
    assert!(matches!(opened, Err(FeedError::Unavailable(_))), "{opened:?}");
    drop(feed);
    drop(publisher);
    assert!(start.elapsed() < 3 * (LIMIT + GRACE));

    // And back.
    broker.restart();
    let mut publisher = KafkaPublisher::new(patient, names.clone());
    let ledger = wait_until("the publisher opens", PATIENCE, || publisher.open().ok());
    assert_eq!(ledger.progress.unwrap().end_lsn.0, 70);
    publisher.send(&rows(70, 10), 10).unwrap();
    publisher.commit(&[], &mut progress(80)).unwrap();
    assert_eq!(committed(&broker.bootstrap(), &names), positions(0..80));
}

fn reported(call: impl FnOnce() -> Result<(), PublishError>) {
    let start = Instant::now();
    let result = call();
    assert!(matches!(result, Err(PublishError::Unavailable(_))), "{result:?}");
    assert!(start.elapsed() < LIMIT + GRACE, "{:?}", start.elapsed());
}

/// Reads on, through a loss of the group's place where there is one.
fn read_through(feed: &mut KafkaFeed, count: usize) -> Vec<String> {
    let (mut batch, mut all, mut next) = (LogBatch::default(), Vec::new(), None);
    wait_until("the records", PATIENCE, || {
        match feed.poll(Duration::from_millis(100), &mut batch).unwrap() {
            FeedEvent::Assigned => feed.seek(next.unwrap_or(12)).unwrap(),
            FeedEvent::Revoked | FeedEvent::Idle => {}
            FeedEvent::Records => {
                for record in (0..batch.len()).map(|place| batch.get(place)) {
                    next = Some(record.offset + 1);
                    all.push(record.position.unwrap().to_string());
                }
            }
        }
        (all.len() >= count).then_some(())
    });
    all
}
