//! The commands around a pipeline: what they make, refuse, print, and leave behind.

use std::time::{Duration, Instant};

use change::{LedgerEntry, SlotIntent, SlotState};
use kafka::{Connection, Names, SetupRecord, SetupWriter, ensure_topics};
use serde_json::Value;
use testkit::services::wait_until;

use crate::harness::{Pipeline, ROLES, Role, SOON, soon};

/// What a pipeline leaves at the source, as SQL sees it.
const TRACES: &str = "
    SELECT slot_name FROM pg_replication_slots UNION ALL SELECT pubname FROM pg_publication
    UNION ALL SELECT nspname FROM pg_namespace WHERE nspname = 'millrace'";

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
}

#[test]
fn h06_a_setup_killed_anywhere_is_completed_by_the_next_one() {
    let pipeline = Pipeline::new();
    let started = Instant::now();
    pipeline.succeed(&["setup"]);
    let whole = started.elapsed();
    pipeline.succeed(&["setup"]);
    const KILLS: u32 = 12;
    for kill in 0..KILLS {
        pipeline.succeed(&["teardown", "--yes"]);
        assert!(pipeline.postgres.sql("app", TRACES).is_empty(), "teardown leaves nothing");
        let mut setup = pipeline.process(&["setup"], "setup");
        // Not a synchronisation: the moments of the kills are spread over a whole setup.
        std::thread::sleep(whole * kill / KILLS);
        setup.kill();
        pipeline.succeed(&["setup"]);
        pipeline.succeed(&["check"]);
    }
}

#[test]
fn h06_every_half_made_state_is_completed() {
    let mut pipeline = Pipeline::new();
    let connection = Connection::new(&pipeline.kafka.bootstrap(), Default::default()).unwrap();
    let names = Names::new("mailbox", 1).unwrap();
    let slot = "SELECT pg_create_logical_replication_slot('millrace_mailbox_1', 'pgoutput')";
    for with_slot in [false, true] {
        ensure_topics(&connection, &names, None).unwrap();
        let (mut writer, _) = SetupWriter::open(&connection, &names).unwrap();
        let intent = SlotIntent { slot: "millrace_mailbox_1".into(), state: SlotState::Creating };
        let creating = SetupRecord::Ledger(LedgerEntry::Slot(intent));
        writer.write(&[creating, SetupRecord::LogHeader("half-made".into())]).unwrap();
        drop(writer);
        if with_slot {
            pipeline.postgres.sql("app", slot);
        }
        pipeline.succeed(&["setup"]);
        pipeline.succeed(&["check"]);
        if !with_slot {
            pipeline.succeed(&["teardown", "--yes"]);
        }
    }
    // The slot is not the half-made one: what came before this moment does not count, what comes does.
    ROLES.into_iter().for_each(|role| pipeline.spawn(role));
    pipeline.postgres.sql("app", "INSERT INTO emails (id, user_id) VALUES (1, 1)");
    pipeline.assert_stores_equal();
}

#[test]
fn h06_what_is_not_ours_is_refused() {
    let pipeline = Pipeline::new();
    let slot = "SELECT pg_create_logical_replication_slot('millrace_mailbox_1', 'pgoutput')";
    pipeline.postgres.sql("app", slot);
    let said = pipeline.refused(&["setup"]);
    assert!(
        said.contains("the ledger knows nothing of it") && said.contains("pg_drop_replication_slot"),
        "{said}"
    );
    // The remedy works.
    pipeline.postgres.sql("app", "SELECT pg_drop_replication_slot('millrace_mailbox_1')");
    pipeline.succeed(&["setup"]);

    pipeline.postgres.sql("app", "SELECT pg_drop_replication_slot('millrace_mailbox_1')");
    let said = pipeline.refused(&["setup"]);
    assert!(said.contains("is gone") && said.contains("millrace generation new"), "{said}");
    pipeline.succeed(&["teardown", "--yes"]);
    pipeline.succeed(&["setup"]);

    // What is published and not configured is taken out.
    pipeline.postgres.sql("app", "ALTER PUBLICATION millrace_mailbox ADD TABLE millrace.heartbeat");
    let said = pipeline.succeed(&["setup"]);
    assert!(said.contains("taken out of the publication: millrace.heartbeat"), "{said}");
    let count = "SELECT count(*) FROM pg_publication_rel";
    assert_eq!(pipeline.postgres.value("app", count), "3");
}

#[test]
fn h22_a_table_enters_when_nobody_is_writing_it() {
    let mut pipeline = Pipeline::new();
    let mail =
        |id| format!("INSERT INTO emails (id, user_id, folder, is_read) VALUES ({id}, 1, 'inbox', false)");
    let writer = pipeline.postgres.session("app");
    writer.sql(&format!("BEGIN; {}", mail(1)));
    let mut setup = pipeline.process(&["setup"], "setup");
    soon("setup tries again", || pipeline.log("setup").contains("trying for its lock again"));
    // What it writes before the lock is granted is not in the stream: the snapshot has it.
    writer.sql(&format!("{}; COMMIT", mail(2)));
    assert!(setup.wait(SOON).success(), "{}", pipeline.log("setup"));
    pipeline.postgres.sql("app", &mail(3));
    ROLES.into_iter().for_each(|role| pipeline.spawn(role));
    pipeline.assert_stores_equal();
    assert_eq!(pipeline.counter("unread")["1"], "3");
}

#[test]
fn h21_rows_that_came_before_the_slot_are_read() {
    let mut pipeline = Pipeline::new();
    // A DBA's publication, and rows before the slot: nothing will ever stream them.
    let publication = "CREATE PUBLICATION millrace_mailbox FOR TABLE emails, users, points";
    pipeline.postgres.sql("app", publication);
    let mail = "INSERT INTO emails (id, user_id, folder, is_read) VALUES (1, 1, 'inbox', false)";
    pipeline.postgres.sql("app", mail);
    pipeline.succeed(&["setup"]);
    ROLES.into_iter().for_each(|role| pipeline.spawn(role));
    pipeline.succeed(&["wait", "--timeout", "60s"]);
    assert_eq!(pipeline.counter("unread")["1"], "1");
    pipeline.assert_stores_equal();
}

#[test]
fn a_table_is_added_while_the_reader_runs() {
    let mut pipeline = Pipeline::running();
    // All have read their configuration, which changes now.
    pipeline.succeed(&["wait", "--timeout", "60s"]);
    pipeline.postgres.sql("app", "CREATE TABLE notes (id bigint PRIMARY KEY, text text)");
    let config = pipeline.directory.path().join("millrace.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    let text = text.replace("\"public.points\"", "\"public.points\", \"public.notes\"")
        + "[counters.notes]\nsql = \"SELECT count(*) FROM public.notes\"\n";
    // Notes have their key for an old row, which does for count(*).
    // What else the configuration lacks and has more than the publication is not this command's business.
    let other = text.replace("\"public.users\"", "\"public.other\"");
    std::fs::write(&config, other).unwrap();
    let said = pipeline.succeed(&["snapshot", "public.notes"]);
    assert!(said.contains("Nothing was changed"), "{said}");
    pipeline.postgres.sql("app", "CREATE TABLE other (id int); INSERT INTO notes VALUES (1, 'one')");
    let said = pipeline.succeed(&["snapshot", "public.notes", "--yes"]);
    assert!(said.contains("is published"), "{said}");
    let published = "SELECT string_agg(tablename, ' ' ORDER BY tablename) FROM pg_publication_tables";
    assert_eq!(pipeline.postgres.value("app", published), "emails notes points users");
    std::fs::write(&config, text).unwrap();
    pipeline.postgres.sql("app", "INSERT INTO notes VALUES (2, 'two')");
    pipeline.restart(Role::Counters);
    pipeline.succeed(&["wait", "--store", "counters.notes", "--timeout", "60s"]);
    assert_eq!(pipeline.counter("notes").values().collect::<Vec<_>>(), ["2"]);
    assert!(pipeline.running_process(Role::Reader).ended().is_none());
    assert!(!pipeline.log("reader").contains("fenced"), "{}", pipeline.log("reader"));
    let said = pipeline.succeed(&["snapshot", "public.notes"]);
    // The second one was read or streamed.
    assert!(said.contains("is in the log: "), "{said}");

    // Taken out, changed meanwhile, and put back: the log ends its old rows and begins anew.
    let without = text_without(&config, ", \"public.notes\"");
    let with = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, without.split("[counters.notes]").next().unwrap()).unwrap();
    let said = pipeline.succeed(&["setup"]);
    assert!(said.contains("taken out of the publication: public.notes"), "{said}");
    pipeline
        .postgres
        .sql("app", "DELETE FROM notes WHERE id = 1; INSERT INTO notes VALUES (3, 'three'), (4, 'four')");
    pipeline.succeed(&["wait", "--timeout", "60s"]);
    std::fs::write(&config, with).unwrap();
    // Refused until the reader has taken note, which it does a moment after the change is in the log.
    soon("the table can be put back", || pipeline.millrace(&["setup"]).status.success());
    pipeline.restart(Role::Counters);
    soon("the table is in the log again", || pipeline.counter("notes").values().collect::<Vec<_>>() == ["3"]);
    assert!(pipeline.running_process(Role::Reader).ended().is_none());
}

fn text_without(path: &std::path::Path, part: &str) -> String {
    std::fs::read_to_string(path).expect("the configuration").replace(part, "")
}

#[test]
fn h29_a_table_that_was_out_of_the_publication_for_a_while_is_read_again() {
    let mut pipeline = Pipeline::running();
    pipeline.postgres.sql("app", "INSERT INTO points VALUES ('Ann', 1, 5), ('Bob', 2, 7)");
    pipeline.assert_stores_equal();
    pipeline.kill(Role::Reader);
    let meanwhile =
        "ALTER PUBLICATION millrace_mailbox DROP TABLE points; DELETE FROM points WHERE owner = 'Ann';
                     ALTER PUBLICATION millrace_mailbox ADD TABLE points; UPDATE points SET amount = 9";
    pipeline.postgres.sql("app", meanwhile);
    pipeline.spawn(Role::Reader);
    pipeline.succeed(&["wait", "--timeout", "60s"]);
    pipeline.assert_stores_equal();
    let log = pipeline.log("reader");
    assert!(
        log.contains("public.points is read anew: it was taken out of the publication and put back"),
        "{log}"
    );
}

#[test]
fn h29_a_table_made_anew_under_its_old_name_is_refused() {
    let mut pipeline = Pipeline::running();
    pipeline.postgres.sql("app", "INSERT INTO users VALUES (1, 'Ann', 'a@x')");
    pipeline.succeed(&["wait", "--timeout", "60s"]);
    let again =
        "CREATE TABLE new (LIKE users INCLUDING ALL); DROP TABLE users; ALTER TABLE new RENAME TO users";
    pipeline.postgres.sql("app", again);
    let said = pipeline.refused(&["setup"]);
    assert!(said.contains("earlier table public.users") && said.contains("begin a new log"), "{said}");
    // The reader that runs has noticed it too.
    let ended = |pipeline: &mut Pipeline| {
        let status = wait_until("the reader stops", SOON, || pipeline.running_process(Role::Reader).ended());
        assert_eq!(status.code(), Some(3), "{}", pipeline.log("reader"));
    };
    ended(&mut pipeline);
    let log = pipeline.log("reader");
    assert!(log.contains("public.users was dropped, and another table has its name now"), "{log}");
    // Published by hand, it is still another table.
    pipeline.postgres.sql("app", "ALTER PUBLICATION millrace_mailbox ADD TABLE users");
    pipeline.postgres.sql("app", "INSERT INTO users VALUES (1, 'Ann', 'a@x')");
    pipeline.spawn(Role::Reader);
    ended(&mut pipeline);
    assert_eq!(pipeline.log("reader").matches("begin a new log").count(), 2, "{}", pipeline.log("reader"));
}

#[test]
fn a_dba_prepares_and_a_role_without_rights_does_the_rest() {
    let pipeline = Pipeline::new();
    let migrations = concat!(env!("CARGO_MANIFEST_DIR"), "/../../migrations");
    let apply = |file: &str| {
        let sql = std::fs::read_to_string(format!("{migrations}/{file}")).unwrap();
        pipeline.postgres.sql("app", &sql);
    };
    pipeline.postgres.sql("app", "DROP TABLE emails, users, points");
    for file in [
        "010_demo.sql",
        "001_role.sql",
        "002_heartbeat.sql",
        "003_publication.sql",
        "001_role.sql",
        "002_heartbeat.sql",
    ] {
        apply(file);
    }
    let config = pipeline.directory.path().join("millrace.toml");
    let url = pipeline.postgres.url("app").replace("postgres@", "millrace@");
    let text = format!(
        "pipeline = \"mailbox\"\n[postgres]\nurl = \"{url}\"\ntables = [\"public.emails\", \"public.users\"]\n\
         [kafka]\nbootstrap = \"{}\"\n[redis]\nurl = \"{}\"\n\
         [counters.unread]\nsql = \"SELECT user_id, count(*) FROM public.emails WHERE NOT is_read GROUP BY user_id\"\n",
        pipeline.kafka.bootstrap(),
        pipeline.redis.url()
    );
    std::fs::write(&config, &text).unwrap();
    pipeline.succeed(&["check"]);
    pipeline.succeed(&["setup"]);
    pipeline.succeed(&["check"]);
    let mut run = pipeline.process(&["run"], "run");
    pipeline
        .postgres
        .sql("app", "INSERT INTO emails (user_id, is_read) VALUES (7, false), (7, true), (8, false)");
    let waited = pipeline.succeed(&["wait", "--timeout", "60s", "--json"]);
    assert_eq!(lines(&waited)[0]["reached"], true, "{waited}");
    let expected = [("7".to_owned(), "1".to_owned()), ("8".to_owned(), "1".to_owned())];
    assert_eq!(pipeline.counter("unread"), expected.into());
    // Without the right to alter anything, a missing table is refused with what to do.
    pipeline
        .postgres
        .sql("app", "CREATE TABLE notes (id bigint PRIMARY KEY); GRANT SELECT ON notes TO millrace");
    std::fs::write(&config, text.replace("\"public.users\"", "\"public.users\", \"public.notes\"")).unwrap();
    let said = pipeline.refused(&["setup"]);
    assert!(said.contains("admin_url") && said.contains("--dry-run"), "{said}");
    // What a dry run prints is what the DBA can run.
    let script = pipeline.succeed(&["setup", "--dry-run"]);
    assert!(script.contains("ADD TABLE ONLY \"public\".\"notes\""), "{script}");
    pipeline.postgres.sql("app", &script);
    pipeline.succeed(&["setup"]);
    run.signal("TERM");
    assert!(run.wait(SOON).success(), "{}", pipeline.log("run"));
}

#[test]
fn h12_and_everything_else_that_is_wrong_is_said_at_once_with_its_remedy() {
    let pipeline = Pipeline::new();
    pipeline.postgres.sql("postgres", "ALTER SYSTEM SET fsync = off");
    pipeline.postgres.reload();
    pipeline.postgres.sql(
        "app",
        "ALTER TABLE emails REPLICA IDENTITY DEFAULT; ALTER TABLE users DROP CONSTRAINT users_pkey;
         DROP TABLE points; CREATE TABLE points (owner text, amount integer) PARTITION BY LIST (owner);
         CREATE TABLE points_a PARTITION OF points FOR VALUES IN ('a')",
    );
    redis::cmd("CONFIG")
        .arg(&["SET", "maxmemory-policy", "allkeys-lru"])
        .exec(&mut pipeline.redis.connect())
        .unwrap();
    let output = pipeline.millrace(&["check", "--json"]);
    assert_eq!(output.status.code(), Some(3));
    let found = lines(&String::from_utf8_lossy(&output.stdout));
    let wrong: Vec<&Value> = found.iter().filter(|finding| finding["verdict"] == "wrong").collect();
    for (part, remedy) in [
        ("table public.users has no replica identity", "REPLICA IDENTITY FULL"),
        ("table public.points_a has no replica identity", "REPLICA IDENTITY FULL"),
        ("counter \"unread\"", "REPLICA IDENTITY FULL"),
        ("maxmemory-policy", "noeviction"),
        ("fsync is off", "fsync = on"),
    ] {
        let has = |finding: &&&Value| finding["what"].as_str().is_some_and(|what| what.contains(part));
        let finding = wrong.iter().find(has).unwrap_or_else(|| panic!("nothing says {part}: {wrong:#?}"));
        assert!(finding["remedy"].as_str().is_some_and(|text| text.contains(remedy)), "{finding}");
    }
    // setup refuses the same and changes nothing.
    let said = pipeline.refused(&["setup"]);
    assert!(said.contains("points_a has no replica") && said.contains("maxmemory-policy"), "{said}");
    assert!(pipeline.postgres.sql("app", TRACES).is_empty());
}

#[test]
fn status_wait_and_tail_tell_programs_where_everything_stands() {
    let mut pipeline = Pipeline::running();
    pipeline.postgres.sql("app", "INSERT INTO users VALUES (1, 'Ann', 'a@x'), (2, 'Bob', 'b@x')");
    pipeline.postgres.sql("app", "UPDATE users SET name = 'Anna' WHERE id = 1");
    let written = pipeline.postgres.value("app", "SELECT pg_current_wal_insert_lsn()");
    pipeline.succeed(&["wait", "--lsn", &written, "--timeout", "60s"]);

    let status = &lines(&pipeline.succeed(&["status", "--json"]))[0];
    assert_eq!(status["source"]["slot"]["active"], true, "{status:#}");
    assert!(status["log"]["lag_bytes"].is_u64(), "{status:#}");
    let stores = status["stores"].as_array().unwrap();
    assert_eq!(stores.len(), 6, "{status:#}");
    assert!(
        stores.iter().all(|store| store["ready"] == true && store["lag_seconds"].is_number()),
        "{status:#}"
    );
    let shown = pipeline.succeed(&["status"]);
    assert!(shown.contains("counters.unread") && shown.contains("search.emails"), "{shown}");

    let arguments = ["tail", "--from-beginning", "--limit", "3", "--json", "--table", "public.users"];
    let tail = lines(&pipeline.succeed(&arguments));
    let ops: Vec<&Value> = tail.iter().map(|line| &line["value"]["op"]).collect();
    assert_eq!(ops, ["c", "c", "u"]);
    assert!(tail[0]["commit"].is_null() && tail[1]["commit"].is_string(), "{tail:#?}");
    let human = pipeline.succeed(&["tail", "--from-beginning", "--limit", "1"]);
    assert!(human.contains("public.users") && human.contains("Ann"), "{human}");

    pipeline.kill(Role::Search);
    pipeline.postgres.sql("app", "INSERT INTO users VALUES (3, 'Cem', 'c@x')");
    let output = pipeline.millrace(&["wait", "--timeout", "500ms"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("search.emails") && !said.contains("counters."), "{said}");
    pipeline.succeed(&["wait", "--store", "counters.mails", "--timeout", "60s"]);
    let said = pipeline.refused(&["wait", "--store", "counters.nails"]);
    assert!(said.contains("counters.mails"), "{said}");
}

#[test]
fn teardown_asks_waits_for_the_reader_and_leaves_nothing() {
    let mut pipeline = Pipeline::running();
    pipeline.postgres.sql("app", "INSERT INTO users VALUES (1, 'Ann', 'a@x')");
    pipeline.succeed(&["wait", "--timeout", "60s"]);
    let said = pipeline.refused(&["teardown"]);
    assert!(said.contains("--yes"), "{said}");
    let said = pipeline.refused(&["teardown", "--yes"]);
    assert!(said.contains("stop the worker first"), "{said}");
    pipeline.kill(Role::Counters);
    pipeline.kill(Role::Search);
    // A killed member stays in its group until its session ends, which is waited for.
    let said = pipeline.refused(&["teardown", "--yes"]);
    assert!(said.contains("stop the reader"), "{said}");
    pipeline.postgres.sql("app", "UPDATE users SET name = 'Anna'");
    ROLES.into_iter().for_each(|role| pipeline.restart(role));
    pipeline.succeed(&["wait", "--timeout", "60s"]);
    ROLES.into_iter().for_each(|role| pipeline.kill(role));
    pipeline.succeed(&["teardown", "--yes"]);
    assert!(pipeline.postgres.sql("app", TRACES).is_empty());
    assert_eq!(pipeline.postgres.value("app", "SELECT count(*) FROM users"), "1");
    let keys: Vec<String> = redis::cmd("KEYS").arg("*").query(&mut pipeline.redis.connect()).unwrap();
    assert!(keys.is_empty(), "{keys:?}");
    assert!(!pipeline.search_directory().join("emails").exists());
    let topics = pipeline.kafka.tool(
        "org.apache.kafka.tools.TopicCommand",
        &["--bootstrap-server", pipeline.kafka.bootstrap().as_str(), "--list"],
    );
    assert!(!topics.contains("millrace"), "{topics}");
    // Again: nothing to do is no error.
    pipeline.succeed(&["teardown", "--yes"]);
}

#[test]
fn health_and_metrics_are_served() {
    let mut pipeline = Pipeline::new();
    let port = testkit::services::free_port();
    pipeline.configure(&format!(
        "[telemetry.listen]\nreader = \"127.0.0.1:{port}\"\ncounters = \"127.0.0.1:{port}\"\n"
    ));
    pipeline.succeed(&["setup"]);
    let mut run = pipeline.process(&["--log-format", "json", "run"], "run");
    let get = |path: &str| {
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(Duration::from_secs(5)))
            .build()
            .into();
        let mut answer = agent.get(format!("http://127.0.0.1:{port}{path}")).call().ok()?;
        Some((answer.status().as_u16(), answer.body_mut().read_to_string().ok()?))
    };
    soon("all parts are well", || get("/health").is_some_and(|(status, _)| status == 200));
    pipeline.postgres.sql("app", "INSERT INTO users VALUES (1, 'Ann', 'a@x')");
    pipeline.succeed(&["wait", "--timeout", "60s"]);
    let (_, metrics) = get("/metrics").expect("it serves");
    for name in [
        "millrace_reader_records_total 1",
        "millrace_counters_ready{store=\"counters.mails\"} 1",
        "millrace_search_lsn_bytes",
    ] {
        assert!(metrics.contains(name), "{name} in\n{metrics}");
    }
    pipeline.kafka.kill();
    soon("the absence of Kafka shows", || get("/health").is_some_and(|(status, _)| status == 503));
    pipeline.kafka.restart();
    soon("it recovers alone", || get("/health").is_some_and(|(status, _)| status == 200));
    run.signal("TERM");
    assert!(run.wait(SOON).success(), "{}", pipeline.log("run"));
    for line in pipeline.log("run").lines() {
        assert!(serde_json::from_str::<Value>(line).is_ok(), "not JSON: {line}");
    }
}
