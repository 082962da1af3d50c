//! Three brokers, of which one is cut off from the controller or frozen. Clients still reach it, and it does not know that
//! it is no longer the leader.

use std::time::{Duration, Instant};

use kafka::{Connection, KafkaFeed, KafkaPublisher, Names};
use relay::{PublishError, Publisher};
use testkit::services::{KafkaCluster, wait_until};
use worker::{Feed, FeedEvent, LogBatch};

use crate::common::*;
use crate::feed::{read, until_assigned};

/// In this time writer and reader have gone over to another broker.
const MOVED: Duration = Duration::from_secs(30);
/// How long the brokers may be away.
const OUTAGE: Duration = Duration::from_secs(6);
const NEW_PROCESSES: usize = 5;
const BROKERS: [usize; 3] = [1, 2, 3];

/// One story, as three brokers cost seconds.
#[test]
#[ignore = "four servers; scripts/test --full runs it"]
fn writer_and_reader_leave_a_broker_that_is_no_longer_the_leader() {
    let cluster = KafkaCluster::start(BROKERS.len());
    let (_, names) = pipeline_at(connection(&cluster.bootstrap(&BROKERS), &[]), "cut", 3);
    let mut from = 0;

    eprintln!("cut off from the controller");
    let leader = cluster.leader(&names.log(), 1);
    let others = others(leader);
    // The one that is cut off is asked first.
    let connection = connection_to(&cluster.bootstrap(&[leader, others[0], others[1]]));
    let mut publisher = KafkaPublisher::new(connection.clone(), names.clone());
    publisher.open().unwrap();
    write(&mut publisher, &mut from);
    let mut feed = KafkaFeed::alone(&connection, &names).unwrap();
    until_assigned(&mut feed);
    feed.seek(0).unwrap();
    assert_eq!(read(&mut feed, 10), positions(0..10));
    cluster.cut_off(leader);
    let next = wait_until("another leader", PATIENCE, || {
        Some(cluster.leader(&names.log(), others[0])).filter(|now| *now != leader)
    });
    assert_eq!(cluster.leader(&names.log(), leader), leader, "it knows of nothing");
    moved(&cluster, &names, &others, &mut publisher, &mut feed, &mut from);

    // New processes that are told of no other broker. They must not go on from what that one has of the ledger. Which
    // broker a client library asks is chance, hence several.
    for _ in 0..NEW_PROCESSES {
        let lone = connection_to(&cluster.bootstrap(&[leader]));
        publisher = KafkaPublisher::new(lone, names.clone());
        assert_eq!(written(&mut publisher), from, "the ledger is an old one");
    }
    moved(&cluster, &names, &others, &mut publisher, &mut feed, &mut from);
    cluster.let_in(leader);
    wait_until("it follows again", PATIENCE, || (cluster.leader(&names.log(), leader) == next).then_some(()));

    eprintln!("frozen");
    let leader = cluster.leader(&names.log(), others[0]);
    cluster.pause(leader);
    moved(&cluster, &names, &self::others(leader), &mut publisher, &mut feed, &mut from);
    cluster.resume(leader);
    write(&mut publisher, &mut from);
}

/// A third of the outage limit is waited for a silent broker.
fn connection_to(bootstrap: &str) -> Connection {
    connection(bootstrap, &[]).with_outage_limit(OUTAGE)
}

fn others(leader: usize) -> Vec<usize> {
    BROKERS.into_iter().filter(|broker| *broker != leader).collect()
}

/// Ten more rows come into the log and to the feed in time.
fn moved(
    cluster: &KafkaCluster,
    names: &Names,
    healthy: &[usize],
    publisher: &mut KafkaPublisher,
    feed: &mut KafkaFeed,
    from: &mut u64,
) {
    let start = Instant::now();
    let first = *from;
    write(publisher, from);
    eprintln!("written after {:?}", start.elapsed());
    assert_eq!(committed(&cluster.bootstrap(healthy), names), positions(0..*from));
    let start = Instant::now();
    let (mut batch, mut all) = (LogBatch::default(), Vec::new());
    wait_until("the records", MOVED, || {
        let event = feed.poll(Duration::from_millis(100), &mut batch).unwrap();
        assert!(matches!(event, FeedEvent::Records | FeedEvent::Idle), "{event:?}");
        let records = (0..batch.len()).map(|place| batch.get(place));
        all.extend(records.filter_map(|record| Some(record.position?.to_string())));
        (all.len() >= 10).then_some(())
    });
    eprintln!("read after {:?}", start.elapsed());
    assert_eq!(all, positions(first..*from));
}

/// Writes ten rows as the reader does: whatever fails is tried again from where the ledger says.
fn write(publisher: &mut KafkaPublisher, from: &mut u64) {
    let (end, start) = (*from + 10, Instant::now());
    loop {
        assert!(start.elapsed() < MOVED, "{:?}", start.elapsed());
        let sent = publisher
            .send(&rows(*from, 10), 10)
            .and_then(|()| publisher.commit(&[described()], &mut progress(end)));
        let error = match sent {
            Ok(()) => break,
            Err(error @ PublishError::Unavailable(_)) => error,
            Err(other) => panic!("{other}"),
        };
        eprintln!("{error}");
        if written(publisher) == end {
            break;
        }
    }
    *from = end;
}

/// Opens a publisher, as often as it takes, and returns how far the ledger says that the log is.
fn written(publisher: &mut KafkaPublisher) -> u64 {
    let start = Instant::now();
    loop {
        match publisher.open() {
            Ok(ledger) => return ledger.progress.map_or(0, |progress| progress.end_lsn.0),
            Err(PublishError::Unavailable(what)) => eprintln!("{what}"),
            Err(other) => panic!("{other}"),
        }
        assert!(start.elapsed() < MOVED, "{:?}", start.elapsed());
    }
}
