//! Tables that had rows before the pipeline, read while they change; and an oracle that shares no code with Millrace: a
//! second Postgres, subscribed to the same publication by Postgres' own logical replication.

use std::collections::BTreeMap;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;
use testkit::services::{Kafka, Postgres, Session};

use crate::harness::{Pipeline, Role, SOON, soon, text};
use crate::mailbox::{Traffic, fill_points};

/// What stands for a value that was not sent; the header `millrace.unchanged` says so.
const UNAVAILABLE: &str = "__debezium_unavailable_value";

/// Tables with every kind of key; each has the columns `id` (or two) and `v`, and what is said.
const TABLES: [(&str, &str); 9] = [
    ("t_big", "id bigint PRIMARY KEY, v text"),
    ("t_text", "id text COLLATE \"en-x-icu\" PRIMARY KEY, v text"),
    ("t_c", "id text COLLATE \"C\" PRIMARY KEY, v text"),
    ("t_uuid", "id uuid PRIMARY KEY, v text"),
    ("t_num", "id numeric PRIMARY KEY, v text"),
    ("t_pair", "v text, id varchar(20), part date, PRIMARY KEY (part, id)"),
    ("t_toast", "id int PRIMARY KEY, v text, n int"),
    ("t_index", "pk int PRIMARY KEY, id int NOT NULL UNIQUE, v text"),
    ("t_none", "id int, v text"),
];

/// What is done to the tables beside their columns.
const FINISH: &str = "
    ALTER TABLE t_none REPLICA IDENTITY FULL;
    ALTER TABLE t_index REPLICA IDENTITY USING INDEX t_index_id_key;
    ALTER TABLE t_toast ALTER v SET STORAGE EXTERNAL;
    ALTER TABLE t_c ADD gone int;
    ALTER TABLE t_c DROP gone;
    ALTER TABLE t_c REPLICA IDENTITY FULL;
    ALTER TABLE t_text ADD twice text GENERATED ALWAYS AS (v || v) STORED;";

fn make_tables(postgres: &Postgres) {
    let sql: String =
        TABLES.iter().map(|(name, columns)| format!("CREATE TABLE {name} ({columns});")).collect();
    postgres.sql("app", &(sql + FINISH));
}

/// One random statement, on one of the first so many tables.
fn statement(rng: &mut StdRng, tables: usize) -> String {
    let (table, _) = TABLES[rng.random_range(0..tables)];
    let n = rng.random_range(-40..40);
    let m = rng.random_range(-40..40);
    let key = |n: i32| match table {
        "t_text" | "t_c" => format!("'{}k\\{n}'", if n % 2 == 0 { "" } else { "Ä" }),
        "t_uuid" => format!("md5('{n}')::uuid"),
        "t_num" => format!("{n}.50"),
        _ => n.to_string(),
    };
    let at = |n: i32| match table {
        "t_pair" => format!("part = date '2025-01-01' + {} AND id = 'i{n}'", n / 8),
        _ => format!("id = {}", key(n)),
    };
    let value = match table {
        "t_toast" => format!("repeat('{}', 3000)", rng.random_range(0..10)),
        _ if rng.random_bool(0.1) => "NULL".to_owned(),
        _ => format!("E'v\\t{}\\n\\\\'", rng.random_range(0..1000)),
    };
    let insert = match table {
        "t_pair" => format!("(part, id, v) VALUES (date '2025-01-01' + {}, 'i{n}', {value})", n / 8),
        "t_index" => format!("(pk, id, v) VALUES ({m}, {n}, {value})"),
        _ => format!("(id, v) VALUES ({}, {value})", key(n)),
    };
    let conflict = if table == "t_none" { "" } else { "ON CONFLICT DO NOTHING" };
    match rng.random_range(0..20) {
        0..9 => format!("INSERT INTO {table} {insert} {conflict};"),
        9..12 => format!("UPDATE {table} SET v = {value} WHERE {};", at(n)),
        12 if table == "t_toast" => format!("UPDATE t_toast SET n = {m} WHERE {};", at(n)),
        12..16 => {
            let (set, new) = match table {
                "t_pair" => {
                    let part = format!("part = date '2025-01-01' + {}", m / 8);
                    (part.clone(), format!("{part} AND id = 'i{n}'"))
                }
                _ => (format!("id = {}", key(m)), at(m)),
            };
            format!(
                "UPDATE {table} SET {set} WHERE {} AND NOT EXISTS (SELECT FROM {table} o WHERE {new});",
                at(n)
            )
        }
        19 if rng.random_bool(0.03) => format!("TRUNCATE {table};"),
        _ => format!("DELETE FROM {table} WHERE {};", at(n)),
    }
}

/// Connections that change the tables.
fn change(postgres: &Postgres, seed: u64, connections: u64) -> Traffic {
    Traffic::of(postgres, seed, connections, |rng| transaction(rng, false), only_conflicts)
}

/// The same, every other transaction committing asynchronously.
fn change_asynchronously(postgres: &Postgres, seed: u64, connections: u64) -> Traffic {
    Traffic::of(postgres, seed, connections, |rng| transaction(rng, true), only_conflicts)
}

fn transaction(rng: &mut StdRng, asynchronous: bool) -> String {
    let mut sql = String::from("BEGIN;");
    if asynchronous && rng.random_bool(0.5) {
        sql += "SET LOCAL synchronous_commit = off;";
    }
    for _ in 0..rng.random_range(1..5) {
        sql += &statement(rng, TABLES.len());
    }
    sql += if rng.random_bool(0.1) { "ROLLBACK;" } else { "COMMIT;" };
    // Room for others.
    sql + &format!("SELECT pg_sleep(0.00{})", rng.random_range(0..3))
}

/// A deadlock, a key that is taken, a server that goes: of such a history's nature.
fn only_conflicts(sql: &str, error: &tokio_postgres::Error) {
    let code = error.code().map_or("", |code| code.code());
    assert!(["40P01", "23505", "57P01", "57P03"].contains(&code), "{sql}: {error:?}");
}

/// A second Postgres with the same tables, filled by Postgres itself.
struct Subscriber {
    postgres: Postgres,
}

impl Subscriber {
    fn start(source: &Postgres) -> Self {
        let postgres = Postgres::start();
        postgres.sql("postgres", "CREATE DATABASE app");
        make_tables(&postgres);
        let create = format!(
            "CREATE SUBSCRIPTION oracle CONNECTION 'host=127.0.0.1 port={} user=postgres dbname=app' \
             PUBLICATION millrace_mailbox",
            source.port()
        );
        postgres.sql("app", &create);
        Subscriber { postgres }
    }

    /// Tables that were published since are taken in too.
    fn refresh(&self) {
        self.postgres.sql("app", "ALTER SUBSCRIPTION oracle REFRESH PUBLICATION");
    }

    /// Waits until it has everything that the source has committed.
    fn catch_up(&self, source: &Postgres) {
        let head = source.value("app", "SELECT pg_current_wal_insert_lsn()");
        let copied = "SELECT count(*) FROM pg_subscription_rel WHERE srsubstate <> 'r'";
        soon("the subscriber has copied every table", || self.postgres.value("app", copied) == "0");
        source.sql("app", "SELECT pg_logical_emit_message(true, 'oracle', '')");
        let confirmed = format!(
            "SELECT confirmed_flush_lsn >= '{head}' FROM pg_replication_slots WHERE slot_name = 'oracle'"
        );
        soon("the subscriber has caught up", || source.value("app", &confirmed) == "t");
    }
}

/// A table's rows as text, sorted.
pub(crate) fn rows(postgres: &Postgres, table: &str) -> Vec<String> {
    let columns = columns(table).join(", ");
    let mut rows: Vec<String> = postgres
        .sql("app", &format!("SELECT {columns} FROM {table}"))
        .into_iter()
        .map(|row| row.into_iter().map(|v| v.unwrap_or_else(|| "null".into())).collect::<Vec<_>>().join("|"))
        .collect();
    rows.sort();
    rows
}

fn columns(table: &str) -> Vec<&'static str> {
    match table {
        "t_pair" => vec!["part", "id", "v"],
        "t_toast" => vec!["id", "v", "n"],
        "t_index" => vec!["pk", "id", "v"],
        "points" => vec!["owner", "part", "amount"],
        "emails" => vec!["id", "size"],
        _ => vec!["id", "v"],
    }
}

/// Replays the log from its beginning, as any other program could. Panics when a row is born twice, or changes or dies
/// without a birth, or from values that it never had.
pub(crate) fn replay(kafka: &Kafka) -> BTreeMap<String, Vec<String>> {
    let printed = kafka.tool(
        "org.apache.kafka.tools.consumer.ConsoleConsumer",
        &[
            "--bootstrap-server",
            &kafka.bootstrap(),
            "--topic",
            "millrace.mailbox.1",
            "--from-beginning",
            "--timeout-ms",
            "10000",
            "--isolation-level",
            "read_committed",
            "--property",
            "print.key=true",
            "--property",
            "print.headers=true",
        ],
    );
    let mut tables: BTreeMap<String, BTreeMap<String, Vec<Value>>> = BTreeMap::new();
    let mut buried: BTreeMap<(String, String), Value> = BTreeMap::new();
    for line in printed.lines().filter(|line| line.contains("millrace.position:")) {
        let mut parts = line.splitn(3, '\t');
        let mut part = || parts.next().expect("headers, key and value");
        let (headers, key, value) = (part(), part(), part());
        let value: Value = serde_json::from_str(value).unwrap_or_else(|e| panic!("{e}: {line}"));
        let op = value["op"].as_str().expect("an operation");
        if op == "m" {
            continue;
        }
        let name = value["source"]["table"].as_str().expect("a table").to_owned();
        let keyless = name == "t_none";
        let table = tables.entry(name.clone()).or_default();
        // A table without a key is a bag of rows.
        let key_of = |image: &Value| if keyless { image.to_string() } else { key.to_owned() };
        match op {
            "c" | "r" => {
                let mut row = value["after"].clone();
                if headers.contains("millrace.unchanged:") {
                    let from = headers.split("millrace.previous_key:").nth(1).expect("a row that moved");
                    let old = &buried[&(name.clone(), from.to_owned())];
                    fill(&mut row, old);
                }
                let living = table.entry(key_of(&row)).or_default();
                assert!(keyless || living.is_empty(), "born twice: {line}");
                living.push(row);
            }
            "u" => {
                let before = key_of(&value["before"]);
                let living = table.get_mut(&before).filter(|rows| !rows.is_empty());
                let old =
                    living.unwrap_or_else(|| panic!("changed without a birth: {line}")).pop().expect("a row");
                assert_was(&value["before"], &old, line);
                let mut row = value["after"].clone();
                if headers.contains("millrace.unchanged:") {
                    fill(&mut row, &old);
                }
                table.entry(key_of(&row)).or_default().push(row);
            }
            "d" => {
                let before = key_of(&value["before"]);
                let living = table.get_mut(&before).filter(|rows| !rows.is_empty());
                let old =
                    living.unwrap_or_else(|| panic!("died without a birth: {line}")).pop().expect("a row");
                assert_was(&value["before"], &old, line);
                buried.insert((name, key.to_owned()), old);
            }
            "t" => table.clear(),
            other => panic!("{other}"),
        }
    }
    let sorted = |(name, rows): (String, BTreeMap<String, Vec<Value>>)| {
        let line = |row: &Value| {
            let value = |column: &&str| text(&row[*column]).trim_end_matches('Z').to_owned();
            columns(&name).iter().map(value).collect::<Vec<_>>().join("|")
        };
        let mut lines: Vec<String> = rows.values().flatten().map(line).collect();
        lines.sort();
        (name.clone(), lines)
    };
    tables.into_iter().map(sorted).collect()
}

/// What an event says of the row before it is what the log had of it (h30).
fn assert_was(before: &Value, row: &Value, line: &str) {
    for (name, value) in before.as_object().into_iter().flatten() {
        let told = !value.is_null() && value != UNAVAILABLE;
        assert!(!told || row[name] == *value, "{name} was {}: {line}", row[name]);
    }
}

/// Puts the old values where a new row has none.
fn fill(row: &mut Value, old: &Value) {
    for (name, value) in row.as_object_mut().expect("a row") {
        if value == UNAVAILABLE {
            *value = old[name].clone();
        }
    }
}

/// A pipeline over the tables, `[snapshot] round_kb` as small as it goes unless `extra` says otherwise.
fn configure(pipeline: &Pipeline, tables: usize, extra: &str) {
    let names: Vec<String> = TABLES[..tables].iter().map(|(name, _)| format!("\"public.{name}\"")).collect();
    pipeline.configure_tables(&names.join(", "), extra);
}

fn snapshot_is_complete(pipeline: &Pipeline) -> bool {
    let status: Value = serde_json::from_str(&pipeline.succeed(&["status", "--json"])).expect("JSON");
    status["log"]["published"].is_string() && status["log"]["snapshot"].is_null()
}

/// Waits for the end of the snapshot, with the processes alive.
fn complete_snapshot(pipeline: &mut Pipeline) {
    soon("the snapshot is complete", || {
        pipeline.assert_alive();
        snapshot_is_complete(pipeline)
    });
}

/// Waits until the log has what was committed so far.
pub(crate) fn all_is_published(pipeline: &Pipeline) {
    let head = pipeline.postgres.value("app", "SELECT pg_current_wal_insert_lsn()");
    pipeline.postgres.sql("app", "SELECT pg_logical_emit_message(true, 'oracle', '')");
    soon("the log has everything", || {
        let status: Value = serde_json::from_str(&pipeline.succeed(&["status", "--json"])).expect("JSON");
        let published = text(&status["log"]["published"]);
        pipeline.postgres.value("app", &format!("SELECT pg_lsn '{published}' > '{head}'")) == "t"
    });
}

/// After the histories: the log replayed from its first record is what Postgres' own subscriber has.
fn assert_log_equals(pipeline: &Pipeline, subscriber: &Subscriber, tables: usize) {
    subscriber.catch_up(&pipeline.postgres);
    all_is_published(pipeline);
    let mut replayed = replay(&pipeline.kafka);
    for (table, _) in &TABLES[..tables] {
        let expected = rows(&subscriber.postgres, table);
        assert_eq!(rows(&pipeline.postgres, table), expected, "the oracle's own {table}");
        assert_eq!(replayed.remove(*table).unwrap_or_default(), expected, "{table} in the log");
    }
}

#[test]
fn the_log_replayed_from_its_beginning_is_what_postgres_own_subscriber_has() {
    let seed = std::env::var("MILLRACE_SNAPSHOT_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    eprintln!("replay with MILLRACE_SNAPSHOT_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let mut pipeline = Pipeline::new();
    make_tables(&pipeline.postgres);
    let changes = change_asynchronously(&pipeline.postgres, seed, 4);
    std::thread::sleep(Duration::from_millis(1500));
    // All but the last two; those come while everything runs.
    let first = TABLES.len() - 2;
    configure(&pipeline, first, "[snapshot]\nround_kb = 1\n");
    pipeline.succeed(&["setup"]);
    let subscriber = Subscriber::start(&pipeline.postgres);
    pipeline.spawn(Role::Reader);
    for round in 0..6 {
        std::thread::sleep(Duration::from_millis(rng.random_range(100..1200)));
        if rng.random_bool(0.7) {
            pipeline.restart(Role::Reader);
        } else {
            pipeline.postgres.kill();
            pipeline.postgres.restart();
        }
        eprintln!("crash {round}");
        if round == 2 {
            configure(&pipeline, TABLES.len(), "[snapshot]\nround_kb = 1\n");
            pipeline.succeed(&["setup"]);
            subscriber.refresh();
        }
    }
    // A TRUNCATE ends what was read of a table, and on a slow machine they come faster than the rounds.
    let complete = (0..60).any(|_| {
        std::thread::sleep(Duration::from_millis(500));
        snapshot_is_complete(&pipeline)
    });
    eprintln!("the snapshot is complete under load: {complete}");
    let committed = changes.stop();
    eprintln!("{committed} transactions");
    assert!(committed > 200, "there were changes: {committed}");
    complete_snapshot(&mut pipeline);
    assert_log_equals(&pipeline, &subscriber, TABLES.len());
}

/// The mailbox is full when the pipeline comes, and its users go on.
#[test]
fn a_full_mailbox_gets_its_stores_while_it_is_used() {
    let mut pipeline = Pipeline::new();
    fill_points(&pipeline.postgres);
    let before = Traffic::start(&pipeline.postgres, 7, 3);
    soon("there are mails", || pipeline.postgres.value("app", "SELECT count(*) > 200 FROM emails") == "t");
    before.stop();
    let traffic = Traffic::start(&pipeline.postgres, 8, 3);
    pipeline.configure("[snapshot]\nround_kb = 16\n");
    pipeline.succeed(&["setup"]);
    let mut process = pipeline.process(&["run"], "run");
    pipeline.succeed(&["wait", "--timeout", "90s"]);
    let verified = pipeline.succeed(&["verify", "--json"]);
    assert_eq!(verified.matches("\"differences\":0").count(), 6, "{verified}");
    traffic.stop();
    pipeline.assert_stores_equal();
    process.signal("TERM");
    assert!(process.wait(SOON).success(), "{}", pipeline.log("run"));
}

/// kill -9 at every named stage, in turn, each with the rounds before and after it.
#[test]
fn h25_a_reader_killed_at_any_stage_of_a_snapshot_reads_nothing_twice() {
    let mut pipeline = Pipeline::new();
    make_tables(&pipeline.postgres);
    let changes = change(&pipeline.postgres, 3, 2);
    std::thread::sleep(Duration::from_millis(1000));
    configure(&pipeline, TABLES.len(), "[snapshot]\nround_kb = 1\n");
    pipeline.succeed(&["setup"]);
    let subscriber = Subscriber::start(&pipeline.postgres);
    for stage in relay::STAGES {
        pipeline.dies_at(stage, &["reader"], "reader");
        eprintln!("killed at {stage}");
    }
    pipeline.spawn(Role::Reader);
    complete_snapshot(&mut pipeline);
    changes.stop();
    assert_log_equals(&pipeline, &subscriber, TABLES.len());
}

/// A session that commits and waits for a standby that is not there: its change is in the stream, and nobody sees it.
#[test]
fn h20_the_snapshot_waits_visibly_for_a_missing_standby_and_the_stream_goes_on() {
    let mut pipeline = Pipeline::new();
    make_tables(&pipeline.postgres);
    pipeline
        .postgres
        .sql("app", "INSERT INTO t_big SELECT g, repeat('old', 50) FROM generate_series(1, 500) g");
    configure(&pipeline, 2, "[snapshot]\nround_kb = 1\n");
    pipeline.succeed(&["setup"]);
    let subscriber = Subscriber::start(&pipeline.postgres);
    pipeline.dies_at("round.committed", &["reader"], "reader");
    pipeline.postgres.sql("app", "ALTER SYSTEM SET synchronous_standby_names = 'missing'");
    pipeline.postgres.reload();
    let config = pipeline.postgres.session_config("app");
    let waiting = std::thread::spawn(move || {
        let session = Session::connect(&config).expect("a session");
        session.sql("UPDATE t_big SET v = 'new' WHERE id >= 250; INSERT INTO t_text VALUES ('x', 'y')")
    });
    soon("the commit waits for the standby", || {
        let waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
        pipeline.postgres.value("app", waits) != "0"
    });
    pipeline.spawn(Role::Reader);
    soon("the snapshot waits visibly", || {
        pipeline.assert_alive();
        pipeline.succeed(&["status", "--json"]).contains("synchronous_standby_names")
    });
    assert!(!snapshot_is_complete(&pipeline));
    // A reader that begins again must not have forgotten what it waits for.
    pipeline.restart(Role::Reader);
    std::thread::sleep(Duration::from_secs(3));
    assert!(!snapshot_is_complete(&pipeline));
    // The stream goes on: what commits without waiting is in the log.
    pipeline.postgres.sql("app", "SET synchronous_commit = local; INSERT INTO t_big VALUES (-1, 'local')");
    let tail = ["tail", "--from-beginning", "--json", "--table", "public.t_big"];
    let mut process = pipeline.process(&tail, "tail");
    soon("the change is in the log", || pipeline.log("tail").contains("\"local\""));
    process.kill();
    pipeline.postgres.sql("app", "ALTER SYSTEM RESET synchronous_standby_names");
    pipeline.postgres.reload();
    waiting.join().expect("its commit ends");
    complete_snapshot(&mut pipeline);
    assert_log_equals(&pipeline, &subscriber, 2);
}

/// Rows that a snapshot sees and a crash of the server undoes: they were committed asynchronously.
#[test]
fn h12_a_snapshot_publishes_nothing_that_a_crash_takes_back() {
    let mut pipeline = Pipeline::new();
    make_tables(&pipeline.postgres);
    // So that nothing but a wait of ours makes a commit durable for a while.
    pipeline.postgres.sql("app", "ALTER SYSTEM SET wal_writer_delay = '10s'");
    pipeline.postgres.reload();
    configure(&pipeline, 2, "");
    pipeline.succeed(&["setup"]);
    for round in 0..4 {
        let session = pipeline.postgres.session("app");
        session.sql("SET synchronous_commit = off");
        for id in 0..50 {
            session.sql(&format!("INSERT INTO t_big VALUES ({}, 'volatile')", round * 50 + id));
        }
        pipeline.spawn(Role::Reader);
        std::thread::sleep(Duration::from_millis(40 * round));
        pipeline.postgres.kill();
        pipeline.kill(Role::Reader);
        pipeline.postgres.restart();
    }
    let subscriber = Subscriber::start(&pipeline.postgres);
    pipeline.spawn(Role::Reader);
    complete_snapshot(&mut pipeline);
    assert_log_equals(&pipeline, &subscriber, 2);
}

/// A long transaction is open, a table is rewritten and truncated while the reader wants to read it.
#[test]
fn h24_a_table_that_is_locked_is_waited_for_while_the_stream_goes_on() {
    let mut pipeline = Pipeline::new();
    make_tables(&pipeline.postgres);
    pipeline
        .postgres
        .sql("app", "INSERT INTO t_big SELECT g, repeat('old', 50) FROM generate_series(1, 300) g");
    configure(&pipeline, 3, "[snapshot]\nround_kb = 1\n");
    pipeline.succeed(&["setup"]);
    let subscriber = Subscriber::start(&pipeline.postgres);
    subscriber.catch_up(&pipeline.postgres);
    let open = pipeline.postgres.session("app");
    open.sql("BEGIN; INSERT INTO t_text VALUES ('of a long transaction', 'x')");
    pipeline.dies_at("round.committed", &["reader"], "reader");
    let truncating = pipeline.postgres.session("app");
    truncating.sql("BEGIN; TRUNCATE t_big; INSERT INTO t_big SELECT g, 'new' FROM generate_series(1, 100) g");
    pipeline.spawn(Role::Reader);
    soon("the snapshot waits visibly", || {
        pipeline.succeed(&["status", "--json"]).contains("waiting for the lock of ONLY")
    });
    pipeline.postgres.sql("app", "INSERT INTO t_c (id, v) VALUES ('s', 'streamed or read')");
    truncating.sql("COMMIT");
    complete_snapshot(&mut pipeline);
    open.sql("COMMIT");
    assert_log_equals(&pipeline, &subscriber, 3);
}

#[test]
fn h25_a_large_table_without_a_key_needs_consent() {
    let pipeline = Pipeline::new();
    make_tables(&pipeline.postgres);
    let fill = "INSERT INTO t_none SELECT g, repeat('x', 1000) FROM generate_series(1, 3000) g";
    pipeline.postgres.sql("app", fill);
    configure(&pipeline, TABLES.len(), "[snapshot]\nkeyless_mb = 1\n");
    let said = pipeline.refused(&["setup"]);
    assert!(
        said.contains("public.t_none has no primary key and 3 MB") && said.contains("keyless_mb = 4"),
        "{said}"
    );
    configure(&pipeline, TABLES.len(), "[snapshot]\nkeyless_mb = 4\n");
    pipeline.succeed(&["setup"]);
}

/// In the middle of being read a table gets another key, and another one a new column.
#[test]
fn h33_a_table_whose_key_changes_while_it_is_read_starts_over() {
    let mut pipeline = Pipeline::new();
    make_tables(&pipeline.postgres);
    pipeline.postgres.sql(
        "app",
        "INSERT INTO t_index SELECT 1000 - g, g, repeat('old', 50) FROM generate_series(1, 300) g;
         INSERT INTO t_none SELECT g % 50, 'bag' FROM generate_series(1, 100) g",
    );
    configure(&pipeline, TABLES.len(), "[snapshot]\nround_kb = 1\n");
    pipeline.succeed(&["setup"]);
    let subscriber = Subscriber::start(&pipeline.postgres);
    subscriber.catch_up(&pipeline.postgres);
    // Tables are read in the order of their object ids; all before it are empty.
    pipeline.dies_at("round.committed", &["reader"], "reader");
    pipeline.dies_at("window.closed", &["reader"], "reader");
    assert!(pipeline.succeed(&["snapshot", "public.t_index"]).contains("is being read: "));
    let rekey = "ALTER TABLE t_index REPLICA IDENTITY DEFAULT; ALTER TABLE t_none ADD extra text";
    subscriber.postgres.sql("app", rekey);
    pipeline.postgres.sql("app", rekey);
    pipeline.postgres.sql(
        "app",
        "UPDATE t_index SET pk = pk + 1000 WHERE id % 3 = 0; DELETE FROM t_index WHERE id % 5 = 0;
         UPDATE t_index SET v = 'new' WHERE id % 7 = 0; INSERT INTO t_none VALUES (7, 'bag', 'extra')",
    );
    pipeline.spawn(Role::Reader);
    complete_snapshot(&mut pipeline);
    pipeline
        .postgres
        .sql("app", "UPDATE t_index SET v = 'newer' WHERE id % 11 = 0; DELETE FROM t_none WHERE id = 7");
    assert_log_equals(&pipeline, &subscriber, TABLES.len());
}

/// Rows that DDL changes are in no event: the table is read anew, and nothing is ready meanwhile.
#[test]
fn h30_a_rewritten_table_is_read_anew() {
    let mut pipeline = Pipeline::running();
    fill_points(&pipeline.postgres);
    pipeline.postgres.sql(
        "app",
        "INSERT INTO emails SELECT g, g % 7, 'inbox', 'me', 's', 'b', false, g, '2026-01-01 10:00Z'
         FROM generate_series(1, 500) g",
    );
    pipeline.assert_stores_equal();
    let traffic = Traffic::start(&pipeline.postgres, 9, 2);
    pipeline.postgres.sql("app", "ALTER TABLE emails ALTER size TYPE bigint USING size::bigint * 1000");
    let read = |pipeline: &Pipeline| pipeline.succeed(&["snapshot", "public.emails"]);
    soon("the table is read anew", || !read(&pipeline).contains("is in the log: 0 rows"));
    // A type that is wider and needs no rewrite changes nothing.
    pipeline.succeed(&["wait", "--timeout", "60s"]);
    traffic.stop();
    pipeline.assert_stores_equal();
    let before = read(&pipeline);
    pipeline
        .postgres
        .sql("app", "ALTER TABLE points ALTER owner TYPE varchar; UPDATE points SET amount = amount");
    pipeline.assert_stores_equal();
    assert_eq!(read(&pipeline), before);
    assert!(read(&pipeline).contains("is in the log"), "{before}");
    assert!(pipeline.succeed(&["snapshot", "public.points"]).contains("in the log: 0 rows"));

    // Another file of the same rows is nothing.
    let restarts = |pipeline: &Pipeline| pipeline.log("reader").matches("public.emails is read anew").count();
    let before = restarts(&pipeline);
    pipeline.postgres.sql("app", "VACUUM FULL emails");
    pipeline.postgres.sql("app", "UPDATE emails SET size = size + 1");
    pipeline.succeed(&["wait", "--timeout", "60s"]);
    assert_eq!(restarts(&pipeline), before);

    // A rewrite that leaves the type as it is, and a default that older rows have without being written.
    for ddl in [
        "ALTER TABLE emails ALTER folder TYPE text USING upper(folder)",
        "ALTER TABLE emails ADD COLUMN label text DEFAULT 'none'",
    ] {
        let before = restarts(&pipeline);
        pipeline.postgres.sql("app", &format!("{ddl}; UPDATE emails SET size = size + 1"));
        soon("the table is read anew", || restarts(&pipeline) > before);
        pipeline.assert_stores_equal();
    }
}

/// A commit that waits for a standby is in the stream long before anybody sees that it rewrote a table.
#[test]
fn h30_what_is_changed_with_a_rewrite_waits_until_the_rewrite_is_visible() {
    let mut pipeline = Pipeline::running();
    pipeline.postgres.sql(
        "app",
        "INSERT INTO emails SELECT g, g % 7, 'inbox', 'me', 's', 'b', false, g, '2026-01-01 10:00Z'
         FROM generate_series(1, 500) g",
    );
    pipeline.assert_stores_equal();
    pipeline.postgres.sql("app", "ALTER SYSTEM SET synchronous_standby_names = 'missing'");
    pipeline.postgres.reload();
    let config = pipeline.postgres.session_config("app");
    let waiting = std::thread::spawn(move || {
        let session = Session::connect(&config).expect("a session");
        session.sql(
            "BEGIN; UPDATE emails SET size = size + 1 WHERE id % 2 = 0;
             ALTER TABLE emails ALTER size TYPE integer USING size * 1000;
             UPDATE emails SET size = size + 1; DELETE FROM emails WHERE id % 10 = 0; COMMIT",
        )
    });
    let waits = |pipeline: &Pipeline| pipeline.log("reader").matches("the stream waits").count();
    soon("the stream waits", || waits(&pipeline) == 1);
    pipeline.restart(Role::Reader);
    soon("the stream waits again", || waits(&pipeline) == 2);
    pipeline.postgres.sql("app", "ALTER SYSTEM RESET synchronous_standby_names");
    pipeline.postgres.reload();
    waiting.join().expect("its commit ends");
    pipeline.assert_stores_equal();
    assert!(pipeline.log("reader").contains("public.emails is read anew"));
    let counters = pipeline.log("counters");
    assert!(!counters.contains("cannot be right"), "{counters}");
    assert_eq!(replay(&pipeline.kafka)["emails"], rows(&pipeline.postgres, "emails"));
}

/// Partitions that are configured one by one, and the tables of an inheritance tree: rows go from one to the other, one
/// is emptied, one is detached, and one that is not configured takes rows and gives some back.
#[test]
fn partitions_and_children_are_tables_of_their_own() {
    let mut pipeline = Pipeline::new();
    pipeline.postgres.sql(
        "app",
        "CREATE TABLE events (id int, v text, part int, PRIMARY KEY (id, part)) PARTITION BY LIST (part);
         CREATE TABLE events_1 PARTITION OF events FOR VALUES IN (1);
         CREATE TABLE events_2 PARTITION OF events FOR VALUES IN (2);
         CREATE TABLE events_3 PARTITION OF events FOR VALUES IN (3);
         CREATE TABLE parent (id int PRIMARY KEY, v text); CREATE TABLE child (PRIMARY KEY (id)) INHERITS (parent);
         INSERT INTO events SELECT g, repeat('old', 50), g % 3 + 1 FROM generate_series(1, 600) g;
         INSERT INTO parent SELECT g, 'parent' FROM generate_series(1, 100) g;
         INSERT INTO child SELECT g, 'child' FROM generate_series(51, 150) g",
    );
    let tables = ["events_1", "events_2", "parent", "child"];
    let names = tables.map(|table| format!("\"public.{table}\"")).join(", ");
    pipeline.configure_tables(&names, "[snapshot]\nround_kb = 1\n");
    pipeline.succeed(&["setup"]);
    pipeline.dies_at("round.committed", &["reader"], "reader");
    // Both are partly read.
    let moves = "UPDATE events SET part = part % 3 + 1, v = 'moved' WHERE id % 5 = 0;
                 UPDATE parent SET v = v || '!' WHERE id % 4 = 0; DELETE FROM ONLY parent WHERE id % 7 = 0;
                 UPDATE child SET id = id + 1000 WHERE id % 9 = 0";
    pipeline.postgres.sql("app", moves);
    pipeline.spawn(Role::Reader);
    complete_snapshot(&mut pipeline);
    pipeline.postgres.sql(
        "app",
        &format!("{moves}; TRUNCATE events_2; INSERT INTO events VALUES (1001, 'new', 1), (1002, 'new', 2)"),
    );
    pipeline.postgres.sql("app", "ALTER TABLE events DETACH PARTITION events_1");
    pipeline.postgres.sql(
        "app",
        "UPDATE events_1 SET v = 'detached' WHERE id % 2 = 0; DELETE FROM events_1 WHERE id % 11 = 0;
         UPDATE events SET part = 2, v = 'home' WHERE id % 3 = 0; TRUNCATE ONLY parent; INSERT INTO parent VALUES (1, 'p')",
    );
    pipeline.assert_alive();
    all_is_published(&pipeline);
    let mut replayed = replay(&pipeline.kafka);
    for table in tables {
        let expected = rows(&pipeline.postgres, &format!("ONLY {table}"));
        assert!(!expected.is_empty(), "{table}");
        assert_eq!(replayed.remove(table).unwrap_or_default(), expected, "{table}");
    }
    assert!(replayed.is_empty(), "{replayed:?}");
}
