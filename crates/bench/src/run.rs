//! Every side, in every round.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use change::Lsn;
use testkit::services::{Kafka, Postgres};

use crate::Options;
use crate::backlog::{self, DATABASE, Shape};
use crate::measure::{Sample, Watched};
use crate::producer;
use crate::rounds::in_order;
use crate::sides::{PATIENCE, Place, Side};

/// Between two looks at what runs.
const LOOK: Duration = Duration::from_millis(20);

/// Settings of a server that has work to do.
const SETTINGS: &[(&str, &str)] = &[
    ("shared_buffers", "512MB"),
    ("max_wal_size", "32GB"),
    ("checkpoint_timeout", "1h"),
    ("max_replication_slots", "60"),
    ("max_wal_senders", "60"),
];

pub(crate) fn all(options: &Options) -> Result<Vec<Sample>> {
    let (postgres, kafka) = (Postgres::start_with(SETTINGS), Kafka::tuned());
    producer::warm_up(&kafka)?;
    backlog::make_table(&postgres);
    postgres.sql(DATABASE, "CREATE PUBLICATION bench FOR TABLE emails");
    let mut places = Vec::new();
    for round in 1..=options.rounds {
        for side in in_order(options.sides(), round) {
            let place = Place {
                postgres: &postgres,
                kafka: &kafka,
                shape: options.shape,
                side,
                build: options.build(side),
                name: format!("{}_{round}", side.name().replace(' ', "_")),
                directory: tempfile::tempdir()?,
            };
            places.push((round, place));
        }
    }
    if options.shape != Shape::Snapshot {
        eprintln!("making slots");
        places.iter().try_for_each(|(_, place)| place.prepare())?;
    }
    eprintln!("filling the table");
    let changes = backlog::fill(&postgres, options.shape, options.rows);
    let head = postgres.value(DATABASE, "SELECT pg_current_wal_insert_lsn()").parse()?;
    // An LSN that every side comes to.
    postgres.sql(DATABASE, "SELECT pg_logical_emit_message(true, 'bench', '')");
    let mut samples = Vec::new();
    let mut log = String::new();
    for (round, place) in &places {
        if options.shape == Shape::Snapshot {
            place.prepare()?;
        }
        let sample = match place.side {
            Side::Producer => producer::run(&kafka, &log, &place.name, *round, changes),
            _ => measure(place, *round, head, changes),
        };
        if place.side == Side::Reader {
            log = place.log_topic();
        }
        let sample = sample.with_context(|| format!("{} in round {round}", place.side.name()))?;
        eprintln!(
            "round {round}: {:<14} {:>9.0} rows/s, {:.1} s",
            sample.side,
            sample.rows_per_second(),
            sample.time.as_secs_f64()
        );
        samples.push(sample);
    }
    Ok(samples)
}

/// Watches a side until it is done, ends it, and counts.
fn measure(place: &Place<'_>, round: u32, head: Lsn, changes: u64) -> Result<Sample> {
    let mut running = place.start(head, changes)?;
    let session = place.postgres.session(DATABASE);
    let walsender = format!(
        "SELECT active_pid FROM pg_replication_slots WHERE active_pid IS NOT NULL AND slot_name LIKE '%{}%'",
        place.name
    );
    let mut own = Watched::born(running.id());
    let mut broker = Watched::new(place.kafka.id());
    let mut sender: Option<Watched> = None;
    let began = Instant::now();
    let mut begun = None;
    loop {
        if begun.is_none() && running.begun()? {
            begun = Some(Instant::now());
        }
        // Looked at before, for what ends is gone.
        own.look();
        if let Some(sender) = &mut sender {
            sender.look();
        } else if let Some(Some(process)) = session.sql(&walsender).first().map(|row| row[0].clone()) {
            sender = Some(Watched::born(process.parse()?));
        }
        if running.done()? {
            break;
        }
        anyhow::ensure!(began.elapsed() < PATIENCE, "not drained after {PATIENCE:?}");
        std::thread::sleep(LOOK);
    }
    let time = begun.unwrap_or(began).elapsed();
    own.look();
    broker.look();
    sender.iter_mut().for_each(Watched::look);
    drop(running);
    Ok(Sample {
        side: place.side.name(),
        round,
        rows: place.count(changes)?,
        time,
        own: own.used(),
        server: sender.map_or(Duration::ZERO, |sender| sender.used()),
        broker: broker.used(),
        peak_kib: own.peak_kib(),
    })
}
