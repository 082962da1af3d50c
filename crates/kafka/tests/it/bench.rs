use std::time::{Duration, Instant};

use kafka::{KafkaFeed, KafkaPublisher};
use relay::Publisher;
use worker::{Feed, FeedEvent, LogBatch};

use crate::common::*;

/// `cargo test -p millrace-kafka -- --ignored --nocapture measured`
#[test]
#[ignore = "a measurement"]
fn measured() {
    let (connection, names) = pipeline(shared(), "measured");
    let mut publisher = KafkaPublisher::new(connection.clone(), names.clone());
    publisher.open().unwrap();
    let batch = rows(0, 50_000);
    let start = Instant::now();
    for _ in 0..4 {
        publisher.send(&batch, 50_000).unwrap();
        publisher.commit(&[], &mut progress(1)).unwrap();
    }
    let rate = 200_000.0 / start.elapsed().as_secs_f64();
    eprintln!("published {rate:.0} records/s of {} bytes", batch.byte_len() / 50_000);

    let mut feed = KafkaFeed::open(&connection, &names, &names.group("measure", None)).unwrap();
    let mut records = LogBatch::default();
    while feed.poll(Duration::from_secs(1), &mut records).unwrap() != FeedEvent::Assigned {}
    feed.seek(0).unwrap();
    let start = Instant::now();
    let mut count = 0;
    while count < 200_001 {
        feed.poll(Duration::from_secs(1), &mut records).unwrap();
        count += records.len();
    }
    eprintln!("fed {:.0} records/s", count as f64 / start.elapsed().as_secs_f64());

    for size in [1, 100, 5_000] {
        let (mut commits, mut arrivals) = (Vec::new(), Vec::new());
        for _ in 0..100 {
            let start = Instant::now();
            publisher.send(&batch, size).unwrap();
            publisher.commit(&[], &mut progress(1)).unwrap();
            commits.push(start.elapsed());
            let mut seen = 0;
            while seen < size {
                feed.poll(Duration::from_secs(1), &mut records).unwrap();
                seen += records.len();
            }
            arrivals.push(start.elapsed());
            std::thread::sleep(Duration::from_millis(5));
        }
        for (what, times) in [("committed", &mut commits), ("arrived", &mut arrivals)] {
            times.sort();
            eprintln!("{size} records {what}: p50 {:?} p99 {:?}", times[50], times[98]);
        }
    }
}
