//! A running reader and its server: acknowledgements, signs of life, shutdown.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use change::{Clock, LedgerEntry, Lsn, Position, Progress, RecordBatch};
use postgres::PostgresSource;
use postgres::connection::ReplicationConnection;
use relay::{Control, Ledger, Limits, PublishError, Publisher, RelayError, Source};
use testkit::services::{Postgres, wait_until};

use crate::support::*;

/// A log that keeps nothing but its ledger, and can be away.
struct Nowhere {
    progress: Progress,
    away: Arc<AtomicBool>,
}

impl Publisher for Nowhere {
    fn open(&mut self) -> Result<Ledger, PublishError> {
        Ok(Ledger {
            progress: Some(self.progress.clone()),
            log: Some(self.progress.log.clone()),
            ..Ledger::default()
        })
    }

    fn begin(&mut self) -> Result<(), PublishError> {
        Ok(())
    }

    fn ready(&mut self) -> bool {
        true
    }

    fn append(&mut self, _: &RecordBatch, _: usize) -> Result<(), PublishError> {
        Ok(())
    }

    fn commit(&mut self, _: &[LedgerEntry], progress: &mut Progress) -> Result<(), PublishError> {
        while self.away.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.progress = progress.clone();
        Ok(())
    }
}

struct Now;

impl Clock for Now {
    fn now_us(&self) -> i64 {
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_micros() as i64
    }

    fn sleep(&self, duration: Duration) {
        std::thread::sleep(duration);
    }
}

struct Stop(Arc<AtomicBool>);

impl Control for Stop {
    fn stop(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// The real relay on a thread of its own.
struct Running {
    stop: Arc<AtomicBool>,
    away: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Result<(), RelayError>>,
}

/// Begins at the slot's start.
fn run_relay(server: &Postgres) -> Running {
    let (stop, away) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let control = Stop(stop.clone());
    let log_away = away.clone();
    let config = config(&server.url("postgres"));
    let end_lsn = lsn(server, "SELECT confirmed_flush_lsn FROM pg_replication_slots");
    let thread = std::thread::spawn(move || {
        let runtime = runtime();
        let mut connection = runtime.block_on(ReplicationConnection::connect(&config)).unwrap();
        let (timeline, _) = runtime.block_on(connection.identify_system()).unwrap();
        let progress = Progress {
            log: "log".into(),
            generation: 1,
            end_lsn,
            position: Position::START,
            split: None,
            log_end: 0,
            timeline,
            beat: (0, String::new()),
            snapshot: None,
            time_ms: 0,
        };
        let mut publisher = Nowhere { progress, away: log_away };
        let mut source = PostgresSource::connect(runtime.handle(), &config, options(&["public.a"])).unwrap();
        relay::run(&mut source, &mut publisher, &Now, &control, ("t", "postgres"), &Limits::default())
    });
    Running { stop, away, thread }
}

fn prepared(conf: &[(&str, &str)]) -> Postgres {
    let server = Postgres::start_with(conf);
    server.sql("postgres", "CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE hidden (id int)");
    set_up(&server, "a");
    server
}

fn confirmed(server: &Postgres) -> Lsn {
    lsn(server, "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = 'millrace_t_1'")
}

#[test]
fn the_slot_follows_what_is_published_and_what_is_not_and_shutdown_is_not_blocked() {
    let mut server = prepared(&[]);
    let relay = run_relay(&server);
    for table in ["a", "hidden"] {
        server.sql("postgres", &format!("INSERT INTO {table} SELECT generate_series(1, 1000)"));
        let written = lsn(&server, "SELECT pg_current_wal_lsn()");
        wait_until(&format!("acknowledgement of {table}"), PATIENCE, || {
            (confirmed(&server) >= written).then_some(())
        });
    }
    // h11: the last thing that the server asks is that its own shutdown be acknowledged.
    assert!(server.stop_fast(Duration::from_secs(20)));
    let end = relay.thread.join().unwrap();
    assert!(matches!(&end, Err(RelayError::Source(relay::SourceError::Unavailable(_)))), "{end:?}");
}

#[test]
fn an_orderly_end_acknowledges_everything_and_frees_the_slot() {
    let server = prepared(&[]);
    let relay = run_relay(&server);
    wait_until("stream", PATIENCE, || {
        (server.value("postgres", "SELECT active FROM pg_replication_slots") == "t").then_some(())
    });
    server.sql("postgres", "INSERT INTO a VALUES (1)");
    let written = lsn(&server, "SELECT pg_current_wal_lsn()");
    wait_until("acknowledgement", PATIENCE, || (confirmed(&server) >= written).then_some(()));
    relay.stop.store(true, Ordering::Relaxed);
    relay.thread.join().unwrap().unwrap();
    wait_until("free slot", PATIENCE, || {
        (server.value("postgres", "SELECT active FROM pg_replication_slots") == "f").then_some(())
    });
}

#[test]
fn h11_a_log_that_is_away_blocks_shutdown_until_it_is_back() {
    let mut server = prepared(&[]);
    let relay = run_relay(&server);
    server.sql("postgres", "INSERT INTO a VALUES (1)");
    let written = lsn(&server, "SELECT pg_current_wal_lsn()");
    wait_until("first acknowledgement", PATIENCE, || (confirmed(&server) >= written).then_some(()));
    relay.away.store(true, Ordering::Relaxed);
    server.sql("postgres", "INSERT INTO a VALUES (2)");
    // The proof that the test above can fail: nothing is acknowledged that the log does not have.
    assert!(!server.stop_fast(Duration::from_secs(3)));
    relay.away.store(false, Ordering::Relaxed);
    assert!(server.stop_fast(PATIENCE));
    assert!(relay.thread.join().unwrap().is_err());
}

#[test]
fn without_acknowledgement_the_slot_stays() {
    let mut server = prepared(&[]);
    let before = confirmed(&server);
    let mut reader = Reader::start(&server, &["public.a"], Lsn::ZERO);
    server.sql("postgres", "INSERT INTO a VALUES (1)");
    end(&server);
    reader.until_end();
    drop(reader);
    server.restart();
    assert_eq!(confirmed(&server), before);
}

#[test]
fn the_link_lives_while_nobody_polls() {
    let server = prepared(&[("wal_sender_timeout", "1s")]);
    let mut reader = Reader::start(&server, &["public.a"], Lsn::ZERO);
    // More than may be in flight and than sockets hold.
    server.sql("postgres", "INSERT INTO a SELECT generate_series(1, 400000)");
    let started = server.value("postgres", "SELECT clock_timestamp()");
    let alive = format!(
        "SELECT count(*) FROM pg_stat_replication WHERE reply_time > timestamptz '{started}' + interval '4 s'"
    );
    wait_until("signs of life after several timeouts", PATIENCE, || {
        (server.value("postgres", &alive) == "1").then_some(())
    });
    end(&server);
    assert_eq!(reader.until_end().len(), 400_002);
}

#[test]
fn a_lost_server_is_worth_another_try() {
    let mut server = prepared(&[]);
    let mut reader = Reader::start(&server, &["public.a"], Lsn::ZERO);
    server.sql("postgres", "INSERT INTO a VALUES (1)");
    end(&server);
    assert_eq!(texts(&reader.until_end()), "begin\ninsert a 1\ncommit");
    server.kill();
    let error = loop {
        match reader.source.poll(PATIENCE, &mut |_| Ok(())) {
            Ok(arrived) => assert!(arrived, "the loss went unnoticed"),
            Err(error) => break error,
        }
    };
    assert!(matches!(&error, RelayError::Source(relay::SourceError::Unavailable(_))), "{error:?}");
    drop(reader);
    server.restart();
    let mut reader = Reader::start(&server, &["public.a"], Lsn::ZERO);
    assert_eq!(texts(&reader.until_end()), "begin\ninsert a 1\ncommit");
}
