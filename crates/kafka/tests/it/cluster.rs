//! Three brokers, of which one is cut off from the controller or frozen. Clients still reach it, and it does not know that
//! it is no longer the leader.

use std::time::{Duration, Instant};

use kafka::{Connection, KafkaFeed, KafkaPublisher, Names, group_offset};
use relay::{PublishError, Publisher};
use testkit::services::{KafkaCluster, wait_until};
use worker::{Feed, FeedError, FeedEvent, LogBatch};

use crate::common::*;
use crate::feed::{read, until_assigned};

/// In this time writer and reader have gone over to another broker.
const MOVED: Duration = Duration::from_secs(30);
/// How long the brokers may be away.
const OUTAGE: Duration = Duration::from_secs(6);
const NEW_PROCESSES: usize = 5;
/// A worker that is fenced more often ends.
const FENCED_LIMIT: usize = 3;
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

/// The broker that keeps the consumer group, and the one that keeps the writer's transactions, is cut off from the
/// controller. Clients still reach it, and it still takes itself for the one.
#[test]
#[ignore = "four servers; scripts/test --full runs it"]
fn writer_and_group_leave_a_coordinator_that_is_no_longer_one() {
    let cluster = KafkaCluster::start(BROKERS.len());
    let all = connection_to(&cluster.bootstrap(&BROKERS));
    let (_, names) = pipeline_at(all.clone(), "coordinator", 3);
    let group = names.group("counters", None);
    let mut worker = GroupMember::new(&all, &names, &group);
    let mut publisher = KafkaPublisher::new(all, names.clone());
    publisher.open().unwrap();
    let mut written_to = 0;
    write(&mut publisher, &mut written_to);
    worker.read_to(written_to);
    for topic in ["__consumer_offsets", "__transaction_state"] {
        let coordinator = cluster.leader(topic, 1);
        let others = others(coordinator);
        eprintln!("{topic}: {coordinator} is cut off");
        cluster.cut_off(coordinator);
        wait_until("another coordinator", PATIENCE, || {
            (cluster.leader(topic, others[0]) != coordinator).then_some(())
        });
        assert_eq!(cluster.leader(topic, coordinator), coordinator, "it knows of nothing");
        write(&mut publisher, &mut written_to);
        worker.read_to(written_to);
        let healthy = connection_to(&cluster.bootstrap(&others));
        worker.commit(&healthy);

        eprintln!("new processes, of which the writer is told of no other broker");
        let lone = connection_to(&cluster.bootstrap(&[coordinator]));
        publisher = KafkaPublisher::new(lone, names.clone());
        assert_eq!(written(&mut publisher), written_to, "the ledger is an old one");
        write(&mut publisher, &mut written_to);
        drop(worker);
        worker = GroupMember::new(&healthy, &names, &group);
        worker.read_to(written_to);
        worker.commit(&healthy);
        cluster.let_in(coordinator);
        wait_until("it follows again", PATIENCE, || {
            (cluster.leader(topic, coordinator) != coordinator).then_some(())
        });
    }
}

/// A worker as the group sees it, which reads from the log's beginning.
struct GroupMember {
    connection: Connection,
    names: Names,
    group: String,
    feed: KafkaFeed,
    next_offset: i64,
    seen: Vec<String>,
    fenced: usize,
}

impl GroupMember {
    fn new(connection: &Connection, names: &Names, group: &str) -> Self {
        let connection = connection.clone().with_host("here");
        let feed = KafkaFeed::open(&connection, names, group).unwrap();
        let (names, group) = (names.clone(), group.to_owned());
        GroupMember { connection, names, group, feed, next_offset: 0, seen: Vec::new(), fenced: 0 }
    }

    /// Takes in what comes, whatever the group takes and gives. A member that the former coordinator knew and the next one
    /// does not is fenced, and a worker begins again then, unless that happens often.
    fn poll(&mut self) {
        let mut batch = LogBatch::default();
        match self.feed.poll(Duration::from_millis(100), &mut batch) {
            Ok(FeedEvent::Assigned) => self.feed.seek(self.next_offset).unwrap(),
            Ok(_) => {}
            Err(FeedError::Fenced) => {
                self.fenced += 1;
                assert!(self.fenced <= FENCED_LIMIT);
                eprintln!("fenced");
                self.feed = KafkaFeed::open(&self.connection, &self.names, &self.group).unwrap();
            }
            Err(error) => panic!("{error}"),
        }
        for record in (0..batch.len()).map(|place| batch.get(place)) {
            self.next_offset = record.offset + 1;
            self.seen.extend(record.position.map(|position| position.to_string()));
        }
    }

    /// Reads until it has so many rows.
    fn read_to(&mut self, rows: u64) {
        let start = Instant::now();
        wait_until("the records", MOVED, || {
            self.poll();
            (self.seen.len() as u64 >= rows).then_some(())
        });
        assert_eq!(self.seen, positions(0..rows));
        eprintln!("read after {:?}", start.elapsed());
    }

    /// Commits its offset, once a second as a worker does, until others see it.
    fn commit(&mut self, others: &Connection) {
        let (start, mut commits) = (Instant::now(), 0);
        wait_until("the group's offset is where it was committed", MOVED, || {
            self.poll();
            if start.elapsed() >= Duration::from_secs(commits) {
                commits += 1;
                self.feed.commit(self.next_offset).unwrap();
            }
            let offset = group_offset(others, &self.names, &self.group).ok()??;
            (offset.offset == self.next_offset).then_some(())
        });
        eprintln!("committed after {:?}", start.elapsed());
    }
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
