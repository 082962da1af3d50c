//! What a publisher says of a log when a power loss took the ends of Kafka's files, each from another place on.

use kafka::{Connection, KafkaPublisher, Names};
use relay::Publisher;
use testkit::services::{Kafka, Torn, wait_until};

use crate::common::*;

const COORDINATOR: &str = "__transaction_state";
/// The end of a transaction is a batch of its own, behind that of its records.
const END: usize = 1;
/// What the coordinator writes of a transaction: that it is open, that it will be committed, that it is.
const STATES: usize = 3;

#[test]
fn a_publisher_finds_out_that_log_and_ledger_end_with_different_transactions() {
    let mut kafka = Kafka::start();
    let [whole, by_ledger, by_log] = ["whole", "ledger", "log"].map(|name| written(&kafka, name));
    kafka.kill();
    lose_last(&kafka, &by_ledger.1.ledger(), END + 1);
    // The coordinator aborts what it does not know to be committed. The log is no shorter by that.
    lose_last(&kafka, &by_log.1.log(), END);
    lose_last(&kafka, COORDINATOR, STATES - 1);
    kafka.restart();
    assert_eq!(ends(whole), (23, 23));
    assert_eq!(ends(by_ledger), (12, 23), "a transaction that only the log has");
    assert_eq!(ends(by_log), (23, 22), "a transaction that only the ledger has");
}

/// Two transactions, of which nothing is under way any more.
fn written(kafka: &Kafka, name: &str) -> (Connection, Names) {
    let (connection, names) = pipeline(kafka, name);
    let mut publisher = KafkaPublisher::new(connection.clone(), names.clone());
    publisher.open().unwrap();
    for first in [0, 10] {
        let states = kafka.batches(COORDINATOR);
        publisher.send(&rows(first, 10), 10).unwrap();
        publisher.commit(&[described()], &mut progress(first + 10)).unwrap();
        wait_until("the transaction has ended in the files", PATIENCE, || {
            (kafka.batches(COORDINATOR) == states + STATES).then_some(())
        });
    }
    (connection, names)
}

fn lose_last(kafka: &Kafka, topic: &str, batches: usize) {
    let all = kafka.batches(topic);
    assert_eq!(kafka.lose_batches_after(topic, all - batches, Torn::Between), batches);
}

/// Where the log ends by its ledger, and where by its records.
fn ends((connection, names): (Connection, Names)) -> (i64, i64) {
    let ledger = KafkaPublisher::new(connection, names).open().unwrap();
    (ledger.progress.unwrap().log_end, ledger.data_end.unwrap())
}
