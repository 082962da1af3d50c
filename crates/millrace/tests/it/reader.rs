//! Readers against each other, and against a source that changed behind their back.

use std::time::Duration;

use testkit::services::wait_until;

use crate::harness::{Pipeline, ROLES, Role, SOON, soon};
use crate::mailbox::{Traffic, fill_points};

/// Takeovers in a row; each meets the older reader somewhere else.
const TAKEOVERS: usize = 3;

#[test]
fn h10_a_second_reader_stands_by_and_takes_over() {
    let mut pipeline = Pipeline::running();
    fill_points(&pipeline.postgres);
    pipeline.assert_stores_equal();
    let mut second = pipeline.process(&["reader"], "second");
    soon("the second stands by", || pipeline.log("second").contains("standing by"));
    let traffic = Traffic::start(&pipeline.postgres, 3, 2);
    pipeline.kill(Role::Reader);
    let before = pipeline.counter("mails");
    soon("the second carries on", || pipeline.counter("mails") != before);
    assert!(second.ended().is_none());

    // A third one takes over; the second is fenced and stands by again.
    let mut third = pipeline.process(&["reader", "--takeover"], "third");
    let before = pipeline.counter("mails");
    soon("the third carries on", || pipeline.counter("mails") != before);
    traffic.stop();
    pipeline.assert_stores_equal();
    assert!(second.ended().is_none(), "a fenced reader stands by:\n{}", pipeline.log("second"));
    assert!(third.ended().is_none());

    third.signal("TERM");
    assert!(third.wait(SOON).success(), "an orderly end:\n{}", pipeline.log("third"));
    pipeline.postgres.sql("app", "INSERT INTO emails (id, user_id) VALUES (90000, 1)");
    pipeline.assert_stores_equal();
}

#[test]
fn h10_a_reader_that_slept_through_a_takeover_adds_nothing_to_the_log() {
    let mut pipeline = Pipeline::running();
    fill_points(&pipeline.postgres);
    let traffic = Traffic::start(&pipeline.postgres, 5, 3);
    for _ in 0..TAKEOVERS {
        soon("the older streams", || streams(&pipeline.log("reader")));
        let before = pipeline.counter("points");
        soon("traffic flows", || pipeline.counter("points") != before);
        // Most likely in the middle of a Kafka transaction.
        pipeline.running_process(Role::Reader).signal("STOP");
        let said = pipeline.log("newer").len();
        let newer = pipeline.process(&["reader", "--takeover"], "newer");
        soon("the newer streams", || streams(&pipeline.log("newer")[said..]));
        pipeline.running_process(Role::Reader).signal("CONT");
        soon("the older stands by", || !streams(&pipeline.log("reader")));
        // The older one's turn again.
        drop(newer);
    }
    traffic.stop();
    pipeline.assert_stores_equal();
}

/// Whether a reader streamed, and not stood by, when it last said which. (It may begin again for reasons of its own.)
fn streams(log: &str) -> bool {
    log.rfind("INFO streaming lsn") > log.rfind("standing by")
}

#[test]
fn h10_a_reader_that_is_fenced_again_and_again_ends_with_exit_code_4() {
    let pipeline = Pipeline::new();
    pipeline.succeed(&["setup"]);
    let mut reader = pipeline.process(&["reader"], "reader");
    let fenced = || pipeline.log("reader").matches("the reader begins again").count();
    let status = wait_until("the reader gives up", SOON, || {
        let before = fenced();
        soon("it streams", || pipeline.log("reader").matches("streaming").count() > 2 * before);
        // On a busy machine it may begin again in between.
        soon("it is fenced", || {
            pipeline.kafka.fence("millrace.mailbox.1");
            pipeline.postgres.sql("app", "INSERT INTO users (id) SELECT coalesce(max(id), 0) + 1 FROM users");
            std::thread::sleep(Duration::from_millis(500));
            fenced() > before || reader.ended().is_some()
        });
        reader.ended()
    });
    let log = pipeline.log("reader");
    assert_eq!(status.code(), Some(4), "{log}");
    assert!(log.contains("fenced 4 times within 300 s by another `millrace reader`"), "{log}");
    assert_eq!(log.matches("has taken over").count(), 3, "not at the first time: {log}");
}

#[test]
fn h11_postgres_stops_fast_with_and_without_kafka() {
    let mut pipeline = Pipeline::running();
    fill_points(&pipeline.postgres);
    pipeline.assert_stores_equal();
    assert!(pipeline.postgres.stop_fast(Duration::from_secs(20)), "with everything up");
    pipeline.postgres.restart();
    pipeline.postgres.sql("app", "INSERT INTO emails (id, user_id) VALUES (1, 1)");
    pipeline.assert_stores_equal();

    pipeline.kafka.kill();
    pipeline.postgres.sql("app", "INSERT INTO emails (id, user_id) VALUES (2, 1)");
    assert!(pipeline.postgres.stop_fast(Duration::from_secs(60)), "with Kafka away");
    pipeline.postgres.restart();
    pipeline.kafka.restart();
    pipeline.assert_stores_equal();
}

#[test]
fn an_idle_source_lets_the_slot_advance_and_ends_in_order() {
    let mut pipeline = Pipeline::running();
    fill_points(&pipeline.postgres);
    pipeline.assert_stores_equal();
    pipeline.postgres.sql("postgres", "CREATE DATABASE other");
    pipeline
        .postgres
        .sql("other", "CREATE TABLE t AS SELECT repeat('x', 1000) FROM generate_series(1, 20000)");
    let written = pipeline.postgres.value("app", "SELECT pg_current_wal_lsn()");
    let behind = format!(
        "SELECT confirmed_flush_lsn < '{written}' FROM pg_replication_slots WHERE slot_name = 'millrace_mailbox_1'"
    );
    soon("the slot passes other databases' WAL", || pipeline.postgres.value("app", &behind) == "f");
    pipeline.succeed(&["wait", "--lsn", &written, "--timeout", "30s"]);
    pipeline.succeed(&["wait", "--timeout", "30s"]);
    for role in ROLES {
        pipeline.running_process(role).signal("TERM");
    }
    for role in ROLES {
        let status = wait_until("orderly end", SOON, || pipeline.running_process(role).ended());
        assert!(status.success(), "{role:?}: {status}\n{}", pipeline.log(role.command()));
    }
}

#[test]
fn a_stop_does_not_wait_for_servers_that_do_not_answer() {
    let mut pipeline = Pipeline::running();
    fill_points(&pipeline.postgres);
    pipeline.assert_stores_equal();
    pipeline.kafka.pause();
    pipeline.postgres.sql("app", "INSERT INTO emails (id, user_id) VALUES (1, 1)");
    std::thread::sleep(Duration::from_secs(1));
    for role in ROLES {
        pipeline.running_process(role).signal("TERM");
    }
    for role in ROLES {
        wait_until("an end", Duration::from_secs(20), || pipeline.running_process(role).ended());
    }
    pipeline.kafka.resume();
    ROLES.into_iter().for_each(|role| pipeline.restart(role));
    pipeline.assert_stores_equal();
}

#[test]
fn h04_h05_a_source_that_lost_its_slot_or_its_past_is_refused() {
    let mut pipeline = Pipeline::running();
    fill_points(&pipeline.postgres);
    pipeline.assert_stores_equal();
    pipeline.kill(Role::Reader);

    pipeline.postgres.sql("app", "UPDATE millrace.heartbeat SET beat = beat - 1");
    let said = pipeline.refused(&["reader"]);
    assert!(said.contains("earlier point in time") && said.contains("remedy"), "{said}");
    pipeline.postgres.sql("app", "UPDATE millrace.heartbeat SET beat = beat + 2");

    let slot = "'millrace_mailbox_1'";
    pipeline.postgres.sql(
        "app",
        &format!("INSERT INTO emails (id) VALUES (1); SELECT pg_replication_slot_advance({slot}, pg_current_wal_lsn())"),
    );
    let said = pipeline.refused(&["reader"]);
    assert!(said.contains("in neither"), "{said}");

    pipeline.postgres.sql("app", &format!("SELECT pg_drop_replication_slot({slot})"));
    let said = pipeline.refused(&["reader"]);
    assert!(said.contains("millrace_mailbox_1") && said.contains("remedy"), "{said}");
}
