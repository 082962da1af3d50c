//! `millrace verify`: says "equal" of stores that are, whatever happens meanwhile, and finds what is planted.

use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

use crate::harness::{Pipeline, soon};
use crate::mailbox::{COUNTERS, Traffic, fill_points};

/// Runs `verify --json`; gives its exit code and lines.
fn verify(pipeline: &Pipeline, arguments: &[&str]) -> (i32, Vec<Value>) {
    let output = pipeline.millrace(&[&["verify", "--json"], arguments].concat());
    let lines = String::from_utf8_lossy(&output.stdout).into_owned();
    let lines = lines.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect();
    eprintln!("{}", String::from_utf8_lossy(&output.stderr));
    (output.status.code().expect("an exit code"), lines)
}

#[track_caller]
fn assert_equal(pipeline: &Pipeline) -> Vec<Value> {
    let (code, lines) = verify(pipeline, &[]);
    assert_eq!((code, lines.len()), (0, COUNTERS.len() + 1), "{lines:#?}");
    assert!(lines.iter().all(|line| line["differences"] == 0), "{lines:#?}");
    lines
}

fn filled() -> Pipeline {
    let pipeline = Pipeline::running();
    fill_points(&pipeline.postgres);
    pipeline.postgres.sql(
        "app",
        "INSERT INTO emails SELECT g, g % 7, 'inbox', 'me', 'subject ' || g, 'body', g % 2 = 0, g, '2026-01-01 10:00Z'
         FROM generate_series(1, 2000) g",
    );
    pipeline
}

#[test]
fn h50_equal_stores_are_equal_under_live_traffic() {
    let pipeline = filled();
    let traffic = Traffic::start(&pipeline.postgres, 11, 3);
    soon("some traffic", || traffic.committed.load(Ordering::Relaxed) > 50);
    for _ in 0..4 {
        assert_equal(&pipeline);
    }
    assert!(traffic.stop() > 50);
    // A transaction that is open for long, and one that is prepared. (Under the traffic above, its TRUNCATE would wait
    // for them, and everybody for it.)
    let open = pipeline.postgres.session("app");
    open.sql(
        "BEGIN; INSERT INTO emails SELECT g, 3, 'inbox', NULL, 's', 'b', false, 1, now()::timestamptz(0)
         FROM generate_series(3000, 3100) g; UPDATE emails SET folder = 'archive' WHERE id < 50",
    );
    let prepared = pipeline.postgres.session("app");
    prepared.sql("BEGIN; INSERT INTO emails (id, user_id, folder, is_read) VALUES (4000, 3, 'inbox', false)");
    prepared.sql("PREPARE TRANSACTION 'held'");
    pipeline
        .postgres
        .sql("app", "INSERT INTO emails (id, user_id, folder, is_read) VALUES (4001, 3, 'inbox', false)");
    assert_equal(&pipeline);
    let racing = std::thread::scope(|scope| {
        let verifying = scope.spawn(|| verify(&pipeline, &[]));
        open.sql("COMMIT");
        prepared.sql("COMMIT PREPARED 'held'");
        verifying.join().expect("it does not panic")
    });
    assert_eq!(racing.0, 0, "{:#?}", racing.1);
    let lines = assert_equal(&pipeline);
    let documents = lines.iter().find(|line| line["store"] == "search.emails").expect("the index");
    let rows = pipeline.postgres.value("app", "SELECT count(*) FROM emails");
    assert_eq!(documents["checked"].to_string(), rows);
}

#[test]
fn h50_h20_a_commit_that_the_log_has_before_other_sessions_see_it() {
    let pipeline = filled();
    assert_equal(&pipeline);
    let waiting = pipeline.postgres.session("app");
    pipeline.postgres.sql("app", "ALTER SYSTEM SET synchronous_standby_names = 'nobody'");
    pipeline.postgres.reload();
    // The setting holds from when the checkpointer has read it, which shows when a commit waits.
    let (probing, done) = (pipeline.postgres.session("app"), std::sync::Arc::new(AtomicBool::new(false)));
    let stop = done.clone();
    let probe = std::thread::spawn(move || {
        while !stop.load(Ordering::Relaxed) {
            probing.sql("SELECT pg_logical_emit_message(true, 'millrace', 'probe')");
        }
    });
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
    soon("commits wait for the standby", || pipeline.postgres.value("app", waits) != "0");
    // Does not return before the standby is given up.
    let commit = std::thread::spawn(move || {
        let changes = "UPDATE emails SET is_read = NOT is_read, subject = 'waiting' WHERE id < 50; DELETE FROM emails WHERE id = 77";
        waiting.sql(changes);
    });
    soon("the index has what no session sees", || {
        let document = pipeline.get("/indexes/emails/documents/1");
        document.is_some_and(|document| document["subject"] == "waiting")
    });
    let seen = pipeline.postgres.value("app", "SELECT subject FROM emails WHERE id = 1");
    assert_eq!(seen, "subject 1");
    assert_equal(&pipeline);
    let waited = pipeline.millrace(&["wait", "--lsn", "FFFF/0", "--timeout", "2s"]);
    assert_eq!(waited.status.code(), Some(1), "the time is up, standby or not");
    done.store(true, Ordering::Relaxed);
    pipeline.postgres.sql("app", "ALTER SYSTEM RESET synchronous_standby_names");
    pipeline.postgres.reload();
    commit.join().expect("it commits");
    probe.join().expect("it commits");
    assert_equal(&pipeline);
}

#[test]
fn planted_differences_of_every_kind_are_found() {
    let pipeline = filled();
    assert_equal(&pipeline);
    let key = |line: &Value| (line["store"].to_string(), line["key"].to_string());
    let differences = |lines: &[Value]| -> Vec<Value> {
        let mut found: Vec<Value> = lines.iter().filter(|line| line.get("key").is_some()).cloned().collect();
        found.sort_by_key(key);
        found
    };

    // In Redis, with as many groups as before: a wrong count, a missing and an extra group.
    let mut redis = pipeline.redis.connect();
    redis::cmd("HSET").arg("unread").arg("1").arg("9").exec(&mut redis).expect("HSET");
    redis::cmd("HDEL").arg("unread").arg("2").exec(&mut redis).expect("HDEL");
    redis::cmd("HSET").arg("unread").arg("99").arg("1").exec(&mut redis).expect("HSET");
    redis::cmd("SET").arg("mails").arg("2001").exec(&mut redis).expect("SET");
    let (code, lines) = verify(&pipeline, &["--store", "counters.unread", "--store", "counters.mails"]);
    assert_eq!(code, 1);
    let expected =
        pipeline.postgres.value("app", "SELECT count(*) FROM emails WHERE NOT is_read AND user_id = 1");
    let missing =
        pipeline.postgres.value("app", "SELECT count(*) FROM emails WHERE NOT is_read AND user_id = 2");
    assert_eq!(
        differences(&lines),
        [
            json!({"store": "counters.mails", "key": "", "source": "2000", "found": "2001"}),
            json!({"store": "counters.unread", "key": "1", "source": expected, "found": "9"}),
            json!({"store": "counters.unread", "key": "2", "source": missing, "found": null}),
            json!({"store": "counters.unread", "key": "99", "source": null, "found": "1"}),
        ]
    );
    let human = pipeline.millrace(&["verify", "--store", "counters.unread"]);
    let human = String::from_utf8_lossy(&human.stdout).into_owned();
    assert!(human.contains("DIFFERENCES") && human.contains(r#"1: Postgres has "#), "{human}");
    redis::cmd("HSET")
        .arg("unread")
        .arg("1")
        .arg(&expected)
        .arg("2")
        .arg(&missing)
        .exec(&mut redis)
        .expect("HSET");
    redis::cmd("HDEL").arg("unread").arg("99").exec(&mut redis).expect("HDEL");
    redis::cmd("SET").arg("mails").arg("2000").exec(&mut redis).expect("SET");
    assert_equal(&pipeline);

    // Behind the log's back.
    without_wal(
        &pipeline,
        "UPDATE emails SET subject = 'changed', size = NULL WHERE id = 10; DELETE FROM emails WHERE id = 20;
         INSERT INTO emails (id, user_id, folder) VALUES (5000, 7, 'archive')",
    );
    let (code, lines) = verify(&pipeline, &["--store", "search.emails"]);
    assert_eq!(code, 1);
    let found = differences(&lines);
    assert_eq!(found.len(), 3, "{found:#?}");
    assert_eq!(found[0]["key"], "10");
    assert_eq!(found[0]["source"], json!({"subject": "changed", "size": null}));
    assert_eq!(found[0]["found"], json!({"subject": "subject 10", "size": "10"}));
    assert_eq!((&found[1]["key"], &found[1]["source"]), (&json!("20"), &Value::Null));
    assert_eq!(found[1]["found"]["subject"], "subject 20");
    assert_eq!((&found[2]["key"], &found[2]["found"]), (&json!("5000"), &Value::Null));
    assert_eq!(found[2]["source"]["folder"], "archive");
    let summary = lines.last().expect("a summary");
    assert_eq!((&summary["differences"], &summary["checked"]), (&json!(3), &json!(2001)));
}

/// Changes the mails without a word in the WAL, so that no stream can tell: for its time the transaction takes the table for
/// an unlogged one.
fn without_wal(pipeline: &Pipeline, changes: &str) {
    let persistence =
        |kind: &str| format!("UPDATE pg_class SET relpersistence = '{kind}' WHERE oid = 'emails'::regclass");
    let (unlogged, logged) = (persistence("u"), persistence("p"));
    pipeline
        .postgres
        .sql("app", &format!("SET allow_system_table_mods = on; {unlogged}; {changes}; {logged}"));
}

#[test]
fn h28_what_cannot_be_compared_is_not_called_equal() {
    let mut pipeline = filled();
    assert_equal(&pipeline);
    pipeline.refused(&["verify", "--store", "counters.nosuch"]);
    // A worker that is gone leaves its stores behind.
    pipeline.kill(crate::harness::Role::Counters);
    pipeline.postgres.sql("app", "UPDATE emails SET is_read = true WHERE id = 3");
    let (code, lines) = verify(&pipeline, &["--store", "counters.unread", "--timeout", "1s"]);
    assert_eq!(code, 2, "{lines:#?}");
    assert!(lines[0]["error"].as_str().is_some_and(|error| error.contains("bytes behind")), "{lines:#?}");
    // A failure and a difference: the difference counts.
    without_wal(&pipeline, "DELETE FROM emails WHERE id = 20");
    let (code, lines) = verify(&pipeline, &["--timeout", "2s"]);
    assert_eq!(code, 1, "{lines:#?}");
}
