//! Damage to the stores: each is detected and mended from the log, without anybody's help.

use std::fs;

use testkit::services::wait_until;

use crate::harness::{Pipeline, Role, SOON, copy_directory, soon};
use crate::mailbox::{Traffic, fill_points};

/// A running pipeline with something in it.
fn filled() -> Pipeline {
    let mut pipeline = Pipeline::running();
    fill_points(&pipeline.postgres);
    let traffic = Traffic::start(&pipeline.postgres, 7, 2);
    soon("some traffic", || traffic.committed.load(std::sync::atomic::Ordering::Relaxed) > 100);
    traffic.stop();
    pipeline.assert_stores_equal();
    pipeline
}

fn write_more(pipeline: &Pipeline) {
    pipeline.postgres.sql(
        "app",
        "INSERT INTO emails SELECT g, 3, 'inbox', 's', 't', 'b', false, 1, now()::timestamptz(0) \
         FROM generate_series(5000, 5040) g",
    );
}

#[test]
fn damaged_stores_are_mended_from_the_log() {
    let mut pipeline = filled();

    eprintln!("one hash deleted, idle");
    let mut redis = pipeline.redis.connect();
    redis::cmd("DEL").arg("unread").exec(&mut redis).expect("DEL");
    pipeline.assert_stores_equal();

    eprintln!("one group deleted, then more traffic");
    redis::cmd("HDEL").arg("senders").arg("3:inbox").exec(&mut redis).expect("HDEL");
    write_more(&pipeline);
    pipeline.assert_stores_equal();

    eprintln!("everything deleted");
    redis::cmd("FLUSHALL").exec(&mut redis).expect("FLUSHALL");
    pipeline.assert_stores_equal();

    eprintln!("an old dump restored");
    let dump = pipeline.directory.path().join("dump");
    pipeline.redis.dump_to(&dump);
    pipeline.postgres.sql("app", "DELETE FROM emails WHERE id % 3 = 0; UPDATE emails SET folder = 'inbox'");
    pipeline.assert_stores_equal();
    pipeline.redis.kill();
    pipeline.redis.restore_from(&dump);
    pipeline.assert_stores_equal();

    eprintln!("the index's directory deleted while the service runs");
    fs::remove_dir_all(pipeline.search_directory().join("emails")).expect("our directory");
    pipeline.postgres.sql("app", "UPDATE emails SET subject = 'changed' WHERE id % 2 = 0");
    pipeline.assert_stores_equal();

    eprintln!("the index's directory replaced by an old copy");
    pipeline.kill(Role::Search);
    let copy = pipeline.directory.path().join("copy");
    copy_directory(&pipeline.search_directory(), &copy);
    pipeline.spawn(Role::Search);
    pipeline.postgres.sql("app", "UPDATE emails SET subject = 'again' WHERE id % 2 = 1");
    pipeline.assert_stores_equal();
    pipeline.kill(Role::Search);
    fs::remove_dir_all(pipeline.search_directory()).expect("our directory");
    copy_directory(&copy, &pipeline.search_directory());
    pipeline.spawn(Role::Search);
    pipeline.assert_stores_equal();

    eprintln!("the index's files damaged");
    pipeline.kill(Role::Search);
    fs::write(pipeline.search_directory().join("emails/meta.json"), "{}").expect("our directory");
    pipeline.spawn(Role::Search);
    pipeline.assert_stores_equal();
}

#[test]
fn a_store_of_other_records_than_the_logs_is_built_again() {
    let mut pipeline = filled();
    pipeline.kill(Role::Counters);
    let mut redis = pipeline.redis.connect();
    let (lost, older) = ("millrace:mailbox:mails", "millrace:mailbox:unread");
    let last: String = redis::cmd("HGET").arg(lost).arg("last").query(&mut redis).expect("a record");
    // As if the log's end had been lost, and other records were there now.
    let (record, _) = last.rsplit_once(' ').expect("a digest");
    let other = format!("{record} 0123456789abcdef");
    redis::cmd("HSET").arg(lost).arg("last").arg(&other).exec(&mut redis).expect("HSET");
    redis::cmd("HDEL").arg(older).arg("last").exec(&mut redis).expect("HDEL");
    let status = pipeline.succeed(&["status", "--json"]);
    assert!(status.contains("\"the log has other records than those it was built from\""), "{status}");
    assert!(status.contains("\"its checkpoint does not name its last record\""), "{status}");
    pipeline.spawn(Role::Counters);
    soon("the store is built again", || {
        let now: Option<String> = redis::cmd("HGET").arg(lost).arg("last").query(&mut redis).expect("HGET");
        now.as_ref() == Some(&last)
    });
    let log = pipeline.log("counters");
    assert!(log.contains(&format!("expected the end of a unit, {other}, found {last}")), "{log}");
    write_more(&pipeline);
    pipeline.assert_stores_equal();
    let named: Option<String> = redis::cmd("HGET").arg(older).arg("last").query(&mut redis).expect("HGET");
    assert!(named.is_some(), "an older checkpoint is continued and names its record");
    assert!(!pipeline.succeed(&["status", "--json"]).contains("last_record"));
}

const LOG: &str = "millrace.mailbox.1";

/// The header values of a record that continues the log: position, schema of `emails`, LSN.
fn next_in_log(pipeline: &Pipeline) -> (String, String, String) {
    let lsn = pipeline.postgres.value("app", "SELECT pg_current_wal_lsn()");
    let emails = pipeline.postgres.value("app", "SELECT 'emails'::regclass::oid");
    (format!("{lsn}:t:1"), format!("{emails}/1"), lsn)
}

#[test]
fn h40_a_transaction_without_its_end_is_not_applied() {
    let mut pipeline = filled();
    let before = pipeline.counter("mails");
    let (position, schema, _) = next_in_log(&pipeline);
    let headers = [("millrace.position", &*position), ("millrace.schema", &*schema)];
    let row = r#"{"id":9000,"user_id":1,"folder":"inbox","sender":null,"subject":"s","body":"b",
                  "is_read":false,"size":1,"sent_at":null}"#;
    let value = format!(r#"{{"before":null,"after":{row},"source":{{}},"op":"c"}}"#);
    pipeline.kafka.append(LOG, r#"{"id":9000}"#, &value, &headers);
    write_more(&pipeline);
    for role in [Role::Counters, Role::Search] {
        let status = wait_until("the worker stops", SOON, || pipeline.running_process(role).ended());
        let log = pipeline.log(role.command());
        assert_eq!(status.code(), Some(3), "{log}");
        assert!(log.contains("begins while the unit before it has no end mark"), "{log}");
        assert!(!log.contains("millrace skip"), "what is no log of ours cannot be skipped: {log}");
    }
    assert_eq!(pipeline.counter("mails"), before);
}

#[test]
fn a_poison_record_stops_the_stores_until_it_is_skipped() {
    let mut pipeline = filled();
    let workers = [Role::Counters, Role::Search];
    workers.into_iter().for_each(|role| pipeline.kill(role));
    let (position, schema, lsn) = next_in_log(&pipeline);
    let headers =
        [("millrace.position", &*position), ("millrace.schema", &*schema), ("millrace.commit", &*lsn)];
    pipeline.kafka.append(LOG, "{\"id\":1}", "{\"op\":\"c\",\"after\":", &headers);
    write_more(&pipeline);
    let tail = pipeline.process(&["tail", "--from-beginning"], "tail");
    soon("tail shows it and what follows", || {
        let shown = pipeline.log("tail");
        shown.split_once("not an envelope").is_some_and(|(_, rest)| rest.contains("\"id\":5040"))
    });
    drop(tail);
    for role in workers {
        // Of another table is one counter, which goes on; the index is served, though there is no other.
        pipeline.spawn(role);
        let stops = if role == Role::Counters { 4 } else { 1 };
        let skip = format!("millrace skip {}.", role.command());
        soon("the others stop", || pipeline.log(role.command()).matches(&skip).count() == stops);
        pipeline.assert_alive();
        pipeline.kill(role);
        let said = pipeline.log(role.command());
        let offset = said.split("--offset ").nth(1).and_then(|rest| rest.split(' ').next());
        let offset = offset.unwrap_or_else(|| panic!("{said}")).to_owned();
        assert!(said.contains(&format!("topic {LOG}, partition 0, offset {offset}: ")), "{said}");
        // What cannot be applied is left out, and nothing else is.
        let skip =
            pipeline.process(&[role.command(), "--skip-record", &offset, "--skip-record", "3"], "skip");
        let named = format!("\"skipped\":[{offset}]");
        soon("the stores are past it", || {
            let status = pipeline.succeed(&["status", "--json"]);
            let status: serde_json::Value = serde_json::from_str(&status).expect("JSON");
            let stores = status["stores"].as_array().expect("stores").iter();
            let of_emails = |name: &str| name.starts_with(role.command()) && name != "counters.points";
            let mut ours = stores.filter(|store| store["store"].as_str().is_some_and(of_emails));
            ours.all(|store| store.to_string().contains(&named) && store["ready"] == true)
        });
        drop(skip);
        pipeline.spawn(role);
    }
    pipeline.assert_stores_equal();
}

#[test]
fn of_two_workers_on_a_host_one_ends_with_exit_code_4() {
    let mut pipeline = filled();
    let mut second = pipeline.process(&["counters"], "second");
    let status = wait_until("one gives up", SOON, || {
        second.ended().or_else(|| pipeline.running_process(Role::Counters).ended())
    });
    let logs = pipeline.log("counters") + &pipeline.log("second");
    assert_eq!(status.code(), Some(4), "{logs}");
    assert!(logs.contains("another `millrace counters`"), "{logs}");
    if second.ended().is_none() {
        pipeline.kill(Role::Counters);
    }
    write_more(&pipeline);
    pipeline.assert_stores_equal();
}
