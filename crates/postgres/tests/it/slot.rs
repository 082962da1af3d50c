//! Slots, publications, heartbeats and timelines: what is refused, and what is worth another try.

use std::time::Duration;

use change::{Lsn, Timeline};
use postgres::connection::ReplicationConnection;
use relay::{Heartbeat, Source, SourceError};
use testkit::services::{Postgres, wait_until};

use crate::support::*;

fn refusal<T>(result: Result<T, SourceError>) -> String {
    match result.map(drop).unwrap_err() {
        SourceError::Refused(refusal) => refusal.to_string(),
        other => panic!("expected a refusal, found {other:?}"),
    }
}

fn unavailable<T>(result: Result<T, SourceError>) -> String {
    match result.map(drop).unwrap_err() {
        SourceError::Unavailable(what) => what,
        other => panic!("expected `Unavailable`, found {other:?}"),
    }
}

#[test]
fn h10_a_slot_in_use_is_seen_and_can_be_taken_over() {
    let server = Postgres::start();
    server.sql("postgres", "CREATE TABLE a (id int PRIMARY KEY)");
    set_up(&server, "a");
    let mut second = Reader::connect(&server, options(&["public.a"])).unwrap();
    assert!(!second.source.busy().unwrap());
    let mut first = Reader::start(&server, &["public.a"], Lsn::ZERO);
    assert!(second.source.busy().unwrap());
    assert!(unavailable(second.source.start(Lsn::ZERO)).contains("in use by another session"));

    second.source.take_over().unwrap();
    assert!(!second.source.busy().unwrap());
    second.source.start(Lsn::ZERO).unwrap();
    let lost = loop {
        match first.source.poll(Duration::from_secs(10), &mut |_| Ok(())) {
            Ok(arrived) => assert!(arrived, "the first reader still lives"),
            Err(error) => break error,
        }
    };
    assert!(lost.to_string().contains("57P01"), "{lost}");
    server.sql("postgres", "INSERT INTO a VALUES (1)");
    end(&server);
    assert_eq!(texts(&second.until_end()), "begin\ninsert a 1\ncommit");

    // A source that is dropped frees the slot.
    drop(second);
    let mut third = Reader::connect(&server, options(&["public.a"])).unwrap();
    wait_until("a free slot", PATIENCE, || (!third.source.busy().unwrap()).then_some(()));
}

#[test]
fn what_would_lose_changes_is_refused() {
    let mut server = Postgres::start_with(&[("max_slot_wal_keep_size", "1MB"), ("max_wal_size", "32MB")]);
    server.sql("postgres", "CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int)");
    set_up(&server, "a");
    let with_slot = |slot: &str| {
        let options = postgres::SourceOptions { slot: slot.into(), ..options(&["public.a"]) };
        Reader::connect(&server, options).unwrap()
    };
    let mut none = with_slot("nowhere");
    assert!(refusal(none.source.busy()).contains("\"nowhere\" does not exist"));
    assert!(refusal(none.source.start(Lsn::ZERO)).contains("begin a new log"));
    server.sql("postgres", "SELECT pg_create_logical_replication_slot('other', 'test_decoding')");
    assert!(refusal(with_slot("other").source.busy()).contains("test_decoding"));
    server.sql("postgres", "SELECT pg_create_logical_replication_slot('two', 'pgoutput', false, true)");
    assert!(refusal(with_slot("two").source.busy()).contains("two_phase"));
    server.sql("postgres", "CREATE DATABASE app");
    server.sql("app", "SELECT pg_create_logical_replication_slot('there', 'pgoutput')");
    assert!(refusal(with_slot("there").source.busy()).contains("belongs to database \"app\""));

    // h29: the table is another one than the one that was published.
    let mut unpublished = Reader::connect(&server, options(&["public.a", "public.b"])).unwrap();
    let what = refusal(unpublished.source.start(Lsn::ZERO));
    assert!(what.contains("public.b is not in publication") && what.contains("millrace setup"), "{what}");
    server.sql("postgres", "ALTER TABLE a RENAME TO old; CREATE TABLE a (id int PRIMARY KEY)");
    assert!(refusal(with_slot("millrace_t_1").source.start(Lsn::ZERO)).contains("public.a is not in"));
    server.sql("postgres", "DROP TABLE a; ALTER TABLE old RENAME TO a");
    server.sql("postgres", "ALTER PUBLICATION millrace_t SET (publish = 'insert')");
    assert!(refusal(with_slot("millrace_t_1").source.start(Lsn::ZERO)).contains("all kinds of changes"));
    server.sql("postgres", "ALTER PUBLICATION millrace_t SET (publish = 'insert, update, delete, truncate')");

    // The WAL that the slot needs is removed under it.
    let lost = "SELECT coalesce(wal_status, '') FROM pg_replication_slots WHERE slot_name = 'millrace_t_1'";
    wait_until("loss of the slot", PATIENCE, || {
        server.sql("postgres", "INSERT INTO b SELECT 1; SELECT pg_switch_wal()");
        server.sql("postgres", "CHECKPOINT");
        (server.value("postgres", lost) == "lost").then_some(())
    });
    let mut source = with_slot("millrace_t_1");
    assert!(refusal(source.source.busy()).contains("was invalidated"));
    assert!(refusal(source.source.start(Lsn::ZERO)).contains("cannot be read"));
    assert!(server.stop_fast(PATIENCE));
    assert!(unavailable(source.source.busy()).contains("127.0.0.1"));
}

#[test]
fn a_publication_dropped_under_the_stream_is_refused() {
    let server = Postgres::start();
    server.sql("postgres", "CREATE TABLE a (id int PRIMARY KEY)");
    set_up(&server, "a");
    let mut reader = Reader::start(&server, &["public.a"], Lsn::ZERO);
    server.sql("postgres", "DROP PUBLICATION millrace_t");
    server.sql("postgres", "INSERT INTO a VALUES (1)");
    let error = loop {
        match reader.source.poll(Duration::from_secs(20), &mut |_| Ok(())) {
            Ok(arrived) => assert!(arrived, "nothing was said"),
            Err(error) => break error,
        }
    };
    assert!(matches!(&error, relay::RelayError::Source(SourceError::Refused(_))), "{error:?}");
    assert!(error.to_string().contains("publication \"millrace_t\""), "{error}");
}

#[test]
fn h05_state_and_heartbeat_and_a_new_timeline() {
    let mut server = Postgres::start();
    server.sql("postgres", "CREATE TABLE a (id int PRIMARY KEY)");
    set_up(&server, "a");
    let system_id = server.value("postgres", "SELECT system_identifier FROM pg_control_system()");
    let ledger = Timeline { system_id, timeline: 1 };
    let mut reader = Reader::connect(&server, options(&["public.a"])).unwrap();
    let state = reader.source.state(&ledger).unwrap();
    assert_eq!((&state.timeline, state.switch_point, state.heartbeat), (&ledger, None, Heartbeat::default()));
    let confirmed = lsn(&server, "SELECT confirmed_flush_lsn FROM pg_replication_slots");
    assert_eq!(state.confirmed_flush, confirmed);

    let beat = |beat, nonce: &str| Heartbeat { beat, nonce: nonce.into() };
    reader.source.write_heartbeat(&beat(2, "x")).unwrap();
    let after = reader.source.state(&ledger).unwrap();
    assert_eq!(after.heartbeat, beat(2, "x"));
    assert!(after.flush_lsn > state.flush_lsn, "the beat is flushed");
    // A reader that was replaced and does not know it must not turn the beat back.
    assert!(unavailable(reader.source.write_heartbeat(&beat(2, "y"))).contains("overtaken"));
    assert_eq!(reader.source.state(&ledger).unwrap().heartbeat, beat(2, "x"));
    server.sql("postgres", "DROP TABLE millrace.heartbeat");
    assert!(refusal(reader.source.write_heartbeat(&beat(3, "z"))).contains("millrace setup"));
    drop(reader);

    // Archive recovery ends at once, on a new timeline.
    assert!(server.stop_fast(PATIENCE));
    std::fs::write(server.data_dir().join("recovery.signal"), "").unwrap();
    let conf = server.data_dir().join("postgresql.conf");
    let text = std::fs::read_to_string(&conf).unwrap();
    std::fs::write(&conf, text + "restore_command = 'false'\n").unwrap();
    let uid = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(server.data_dir()).unwrap());
    std::os::unix::fs::chown(server.data_dir().join("recovery.signal"), Some(uid), None).unwrap();
    server.restart();
    let runtime = runtime();
    let found = wait_until("promotion", PATIENCE, || {
        let config = config(&server.url("postgres"));
        let mut connection = runtime.block_on(ReplicationConnection::connect(&config)).ok()?;
        let (timeline, _) = runtime.block_on(connection.identify_system()).ok()?;
        let switch = (timeline.timeline == 2).then(|| runtime.block_on(connection.switch_point(2, 1)))?;
        assert_eq!(timeline.system_id, ledger.system_id);
        Some(switch.unwrap())
    });
    let flush = lsn(&server, "SELECT pg_current_wal_flush_lsn()");
    assert!(found.is_some_and(|switch| switch >= after.flush_lsn && switch <= flush), "{found:?}");
}

#[test]
fn a_heartbeat_does_not_wait_for_ever_for_a_standby() {
    let server = Postgres::start();
    server.sql("postgres", "CREATE TABLE a (id int PRIMARY KEY)");
    set_up(&server, "a");
    server.sql("postgres", "ALTER SYSTEM SET synchronous_standby_names = 'nobody'");
    server.reload();
    wait_until("setting", PATIENCE, || {
        (server.value("postgres", "SHOW synchronous_standby_names") == "nobody").then_some(())
    });
    let mut reader = Reader::connect(&server, options(&["public.a"])).unwrap();
    let beat = Heartbeat { beat: 1, nonce: "n".into() };
    reader.source.write_heartbeat(&beat).unwrap();
    assert_eq!(server.value("postgres", "SELECT nonce FROM millrace.heartbeat"), "n");
}
