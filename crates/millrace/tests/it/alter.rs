//! The catalog changes under the stream: what no row event tells is noticed, read again or refused, and no store that
//! says it is ready is wrong meanwhile.

use std::collections::BTreeMap;
use std::time::Duration;

use change::Lsn;
use testkit::services::Session;

use crate::harness::{Pipeline, ROLES, Role, SOON, soon};
use crate::stops::status;

/// Tables, and what happens to each: statements that change what its rows mean, a transaction a line, then what follows.
const ALTERED: [(&str, &str, &str, &str); 9] = [
    (
        "a new column takes the place of an old one",
        "CREATE TABLE item (id int PRIMARY KEY, price int, name text); ALTER TABLE item REPLICA IDENTITY FULL;
         INSERT INTO item SELECT g, g, 'n' || g FROM generate_series(1, 4) g",
        "ALTER TABLE item ADD COLUMN price_cents int
         UPDATE item SET price_cents = price * 100
         ALTER TABLE item DROP COLUMN price; ALTER TABLE item RENAME price_cents TO price",
        "UPDATE item SET name = name || '!' WHERE id = 1; DELETE FROM item WHERE id = 2",
    ),
    (
        "a column is dropped and added, and two swap their names",
        "CREATE TABLE dropped (id int PRIMARY KEY, secret text, a text, b text); ALTER TABLE dropped REPLICA IDENTITY FULL;
         INSERT INTO dropped SELECT g, 'secret' || g, 'a' || g, 'b' || g FROM generate_series(1, 3) g",
        "ALTER TABLE dropped DROP COLUMN secret
         ALTER TABLE dropped ADD COLUMN secret text
         ALTER TABLE dropped RENAME a TO x; ALTER TABLE dropped RENAME b TO a; ALTER TABLE dropped RENAME x TO b",
        "UPDATE dropped SET id = id WHERE id = 1; DELETE FROM dropped WHERE id = 2",
    ),
    (
        "a label is renamed",
        "CREATE TYPE mood AS ENUM ('sad', 'happy'); CREATE DOMAIN moods AS mood[];
         CREATE TABLE feeling (id int PRIMARY KEY, m mood, many moods); ALTER TABLE feeling REPLICA IDENTITY FULL;
         INSERT INTO feeling VALUES (1, 'happy', '{sad,happy}'), (2, 'sad', '{}'), (3, 'happy', NULL)",
        "ALTER TYPE mood RENAME VALUE 'happy' TO 'glad'",
        "DELETE FROM feeling WHERE id = 1; UPDATE feeling SET m = 'sad' WHERE id = 3",
    ),
    (
        "two labels change places, with a row between",
        "CREATE TYPE side AS ENUM ('left', 'right');
         CREATE TABLE sides (id int PRIMARY KEY, s side); ALTER TABLE sides REPLICA IDENTITY FULL;
         INSERT INTO sides VALUES (1, 'left'), (2, 'right'), (3, 'left')",
        "ALTER TYPE side RENAME VALUE 'left' TO 'x'; ALTER TYPE side RENAME VALUE 'right' TO 'left'; \
         UPDATE sides SET id = 4 WHERE id = 3; ALTER TYPE side RENAME VALUE 'x' TO 'right'",
        "DELETE FROM sides WHERE id = 1",
    ),
    (
        "a composite type has one more attribute",
        "CREATE TYPE pair AS (a int, b text); CREATE TABLE pairs (id int PRIMARY KEY, c pair);
         INSERT INTO pairs VALUES (1, '(1,x)'), (2, '(2,y)')",
        "ALTER TYPE pair ADD ATTRIBUTE z int",
        "UPDATE pairs SET c = '(3,z,9)' WHERE id = 1",
    ),
    (
        "types change without a rewrite",
        "CREATE TABLE typed (id int PRIMARY KEY, net cidr, n int, at timestamptz DEFAULT '2026-01-01 10:00Z');
         INSERT INTO typed VALUES (1, '10.0.0.1/32', -1), (2, '10.0.0.2/32', -2)",
        "ALTER TABLE typed ALTER net TYPE inet
         ALTER TABLE typed ALTER n TYPE oid",
        "UPDATE typed SET n = 7 WHERE id = 2",
    ),
    (
        "a generated column becomes a plain one",
        "CREATE TABLE made (id int PRIMARY KEY, a text, up text GENERATED ALWAYS AS (upper(a)) STORED);
         INSERT INTO made (id, a) VALUES (1, 'x'), (2, 'y')",
        "ALTER TABLE made ALTER up DROP EXPRESSION",
        "UPDATE made SET a = 'z' WHERE id = 1",
    ),
    (
        "another primary key",
        "CREATE TABLE keyed (id int, other int NOT NULL, v text, CONSTRAINT by_id PRIMARY KEY (id));
         ALTER TABLE keyed REPLICA IDENTITY FULL; INSERT INTO keyed VALUES (1, 11, 'a'), (2, 12, 'b')",
        "ALTER TABLE keyed DROP CONSTRAINT by_id, ADD PRIMARY KEY (other)",
        "UPDATE keyed SET id = 9, v = 'c' WHERE other = 12; DELETE FROM keyed WHERE other = 11",
    ),
    (
        "a partition is unlogged for a while",
        "CREATE TABLE parts (id int, p int, v text, PRIMARY KEY (id, p)) PARTITION BY LIST (p);
         CREATE TABLE parts_1 PARTITION OF parts FOR VALUES IN (1); ALTER TABLE parts_1 REPLICA IDENTITY FULL;
         INSERT INTO parts VALUES (1, 1, 'a'), (2, 1, 'b')",
        "ALTER TABLE parts_1 SET UNLOGGED
         UPDATE parts SET v = 'unseen' WHERE id = 1
         ALTER TABLE parts_1 SET LOGGED",
        "UPDATE parts SET v = 'seen' WHERE id = 2",
    ),
];

const STORES: &str = "
[counters.price]
sql = \"SELECT sum(price) FROM public.item\"
[counters.by_price]
sql = \"SELECT price, count(*) FROM public.item GROUP BY price\"
[counters.secret]
sql = \"SELECT secret, count(*) FROM public.dropped GROUP BY secret\"
[counters.keyed]
sql = \"SELECT v, count(*) FROM public.keyed GROUP BY v\"
[counters.parts]
sql = \"SELECT v, count(*) FROM public.parts GROUP BY v\"
[search.indexes.item]
table = \"public.item\"
text = [\"name\"]
number = [\"price\"]
[search.indexes.dropped]
table = \"public.dropped\"
exact = [\"secret\", \"a\", \"b\"]
[search.indexes.feeling]
table = \"public.feeling\"
exact = [\"m\", \"many\"]
[search.indexes.sides]
table = \"public.sides\"
exact = [\"s\"]
[search.indexes.pairs]
table = \"public.pairs\"
exact = [\"c\"]
[search.indexes.typed]
table = \"public.typed\"
exact = [\"net\", \"n\", \"at\"]
[search.indexes.made]
table = \"public.made\"
exact = [\"a\"]
";

/// A pipeline of these tables and stores, with a short heartbeat.
fn pipeline_of(setup: &str, tables: &[&str], stores: &str) -> Pipeline {
    let pipeline = Pipeline::new();
    pipeline.postgres.sql("app", setup);
    configure(&pipeline, tables, stores);
    pipeline
}

fn configure(pipeline: &Pipeline, tables: &[&str], stores: &str) {
    let names: Vec<String> = tables.iter().map(|table| format!("\"public.{table}\"")).collect();
    let listen = pipeline.search_url().replace("http://", "");
    let search = match stores.contains("[search.indexes") {
        true => format!(
            "[search]\ndirectory = \"{}\"\nlisten = \"{listen}\"\n",
            pipeline.search_directory().display()
        ),
        false => String::new(),
    };
    let extra = format!(
        "[reader]\nheartbeat_interval_ms = 2000\n[redis]\nurl = \"{}\"\n{search}{stores}",
        pipeline.redis.url()
    );
    pipeline.configure_tables(&names.join(", "), &extra);
}

fn start(pipeline: &mut Pipeline, roles: &[Role]) {
    pipeline.succeed(&["setup"]);
    roles.iter().for_each(|role| pipeline.spawn(*role));
    pipeline.succeed(&["wait", "--timeout", "90s"]);
}

/// What is ready at this LSN is right at it.
fn right(pipeline: &mut Pipeline, what: &str) {
    right_of(pipeline, what, &[]);
}

/// The same, of these stores alone.
fn right_of(pipeline: &mut Pipeline, what: &str, stores: &[String]) {
    let stores: Vec<&str> = stores.iter().flat_map(|store| ["--store", store]).collect();
    pipeline.succeed(&[&["wait", "--timeout", "90s"], &stores[..]].concat());
    let output = pipeline.millrace(&[&["verify"], &stores[..]].concat());
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{what}: {said}");
    pipeline.assert_alive();
}

/// The stores of [`STORES`] over a table.
fn stores_of(table: &str) -> Vec<String> {
    let names = |block: &str| block.contains(&format!("public.{table}"));
    let name = |block: &str| block.split(']').next().map(|name| name.replace("search.indexes.", "search."));
    STORES.split("\n[").filter(|block| names(block)).filter_map(name).collect()
}

#[test]
fn h30_what_gives_rows_another_meaning_is_read_again() {
    let setup: Vec<&str> = ALTERED.iter().map(|(_, setup, ..)| *setup).collect();
    let tables = ["item", "dropped", "feeling", "sides", "pairs", "typed", "made", "keyed", "parts"];
    let mut pipeline = pipeline_of(&setup.join(";"), &tables, STORES);
    start(&mut pipeline, &ROLES);
    for ((what, _, changes, follows), table) in ALTERED.into_iter().zip(tables) {
        let stores = stores_of(table);
        assert!(!stores.is_empty(), "{table}");
        for line in changes.lines() {
            pipeline.postgres.sql("app", line);
        }
        // Nothing follows in the stream, and no store may say that it has come so far.
        right_of(&mut pipeline, what, &stores);
        pipeline.postgres.sql("app", follows);
        right_of(&mut pipeline, what, &stores);
    }
    // The same with everything in one backlog.
    pipeline.kill(Role::Reader);
    pipeline.postgres.sql(
        "app",
        "ALTER TYPE mood RENAME VALUE 'sad' TO 'blue'; UPDATE feeling SET m = 'glad' WHERE id = 2",
    );
    pipeline.postgres.sql(
        "app",
        "ALTER TABLE item RENAME name TO x; ALTER TABLE item ADD name text; UPDATE item SET name = 'y'",
    );
    // For a while only, of which the catalog has no values any more.
    pipeline
        .postgres
        .sql("app", "ALTER TYPE side RENAME VALUE 'left' TO 'x'; UPDATE sides SET s = 'x' WHERE id = 2");
    pipeline.postgres.sql("app", "ALTER TYPE side RENAME VALUE 'x' TO 'left'");
    pipeline
        .postgres
        .sql("app", "ALTER TYPE pair ADD ATTRIBUTE y int; UPDATE pairs SET c = '(5,q,1,2)' WHERE id = 2");
    pipeline.postgres.sql("app", "ALTER TYPE pair DROP ATTRIBUTE y");
    let retyped = "SET timezone = 'UTC'; ALTER TABLE typed ALTER at TYPE";
    pipeline.postgres.sql("app", &format!("{retyped} timestamp; UPDATE typed SET n = 8 WHERE id = 1"));
    pipeline.postgres.sql("app", &format!("{retyped} timestamptz"));
    pipeline.spawn(Role::Reader);
    right(&mut pipeline, "a backlog");
    let log = pipeline.log("reader");
    for reason in [
        "label happy of an enum was renamed",
        "column price is another one",
        "its rows have another key",
        "label left of an enum was renamed",
        "column at has another type",
    ] {
        assert!(log.contains(reason), "{reason}");
    }
}

/// What changes rows without a word in the stream, in a transaction that has written, or before another one that brings the
/// log further: a store that is ready behind it has seen it.
#[test]
fn h30_no_lsn_is_claimed_before_what_changed_below_it_is_in_the_log() {
    let setup =
        "CREATE TABLE silent (id serial PRIMARY KEY, a text); CREATE TABLE beside (id serial PRIMARY KEY);
        ALTER TABLE silent REPLICA IDENTITY FULL;
        INSERT INTO silent (a) SELECT 'r0' FROM generate_series(1, 5)";
    let stores = "[counters.silent]\nsql = \"SELECT a, count(*) FROM public.silent GROUP BY a\"\n\
        [counters.beside]\nsql = \"SELECT count(*) FROM public.beside\"\n";
    let mut pipeline = pipeline_of(setup, &["silent", "beside"], stores);
    start(&mut pipeline, &[Role::Reader, Role::Counters]);
    let session = pipeline.postgres.session("app");
    let mut redis = pipeline.redis.connect();
    for k in 1..=8 {
        // With this change the reader looks at the catalog, and not again for a while. It has been told of the table, too.
        std::thread::sleep(Duration::from_millis(400));
        session.sql("INSERT INTO silent (a) VALUES ('x'); INSERT INTO beside DEFAULT VALUES");
        std::thread::sleep(Duration::from_millis(10 * k));
        let alters =
            format!("ALTER TABLE silent DROP a; ALTER TABLE silent ADD a text NOT NULL DEFAULT 'r{k}'");
        match k % 3 {
            0 => drop(session.sql(&format!("BEGIN; INSERT INTO silent (a) VALUES ('lost'); {alters}"))),
            1 => drop(session.sql(&format!("BEGIN; INSERT INTO beside DEFAULT VALUES; {alters}"))),
            _ => {
                session.sql(&alters);
                session.sql("BEGIN; INSERT INTO beside DEFAULT VALUES");
            }
        }
        let lsn = session.sql("SELECT pg_current_wal_insert_lsn()")[0][0].clone();
        let lsn: Lsn = lsn.and_then(|lsn| lsn.parse().ok()).expect("an LSN");
        session.sql("COMMIT");
        let expected = BTreeMap::from([(format!("r{k}"), (5 + k + k / 3).to_string())]);
        soon("the store is ready", || {
            let mut both = redis::pipe();
            both.atomic().cmd("HGETALL").arg("silent");
            both.cmd("HMGET").arg("millrace:mailbox:silent").arg(&["lsn", "state"]);
            let (content, (at, state)): (BTreeMap<String, String>, (String, String)) =
                both.query(&mut redis).expect("Redis answers");
            let there = state == "ready" && at.parse::<Lsn>().is_ok_and(|at| at >= lsn);
            assert!(!there || content == expected, "ready at {at} with {content:?}, not {expected:?}");
            there
        });
    }
    // While it waits for a standby, perhaps for hours, the log goes on, and no store is ready.
    let config = pipeline.postgres.session_config("app");
    let commit = |sql: &str| {
        let (config, sql) = (config.clone(), sql.to_owned());
        std::thread::spawn(move || Session::connect(&config).expect("a session").sql(&sql))
    };
    for (round, value) in ["hidden", "prepared"].into_iter().enumerate() {
        let alters =
            format!("ALTER TABLE silent DROP a; ALTER TABLE silent ADD a text NOT NULL DEFAULT '{value}'");
        if value == "prepared" {
            session.sql(&format!("BEGIN; {alters}; PREPARE TRANSACTION 'silent'"));
        }
        pipeline.postgres.sql("app", "ALTER SYSTEM SET synchronous_standby_names = 'missing'");
        pipeline.postgres.reload();
        let mut state_behind_another_commit = || {
            let before = pipeline.counter("beside");
            let beside = commit("INSERT INTO beside DEFAULT VALUES");
            soon("the log goes on", || pipeline.counter("beside") != before);
            let state: String = redis::cmd("HGET")
                .arg("millrace:mailbox:silent")
                .arg("state")
                .query(&mut redis)
                .expect("Redis answers");
            (state, beside)
        };
        let first = (value == "prepared").then(|| {
            let (state, beside) = state_behind_another_commit();
            assert_eq!(state, "ready", "it is not committed");
            beside
        });
        let hidden = commit(if value == "prepared" { "COMMIT PREPARED 'silent'" } else { &alters });
        std::thread::sleep(Duration::from_millis(300));
        let (state, beside) = state_behind_another_commit();
        assert_ne!(state, "ready", "{value}");
        assert_eq!(pipeline.log("reader").matches("no store is ready").count(), round + 1);
        pipeline.postgres.sql("app", "ALTER SYSTEM RESET synchronous_standby_names");
        pipeline.postgres.reload();
        for session in [hidden, beside].into_iter().chain(first) {
            session.join().expect("its commit ends");
        }
        right(&mut pipeline, "a standby was missing");
        assert_eq!(pipeline.counter("silent"), BTreeMap::from([(value.to_owned(), "15".to_owned())]));
    }
}

/// Each step by itself leaves every row as it is, and the reader has looked at the catalog between two of them.
#[test]
fn h30_a_name_that_a_column_had_some_time_ago_is_not_anothers() {
    let setup =
        "CREATE TABLE slow (id int PRIMARY KEY, a text, b text); ALTER TABLE slow REPLICA IDENTITY FULL;
        INSERT INTO slow VALUES (1, 'a', 'b'), (2, 'c', 'd')";
    let stores = "[counters.a]\nsql = \"SELECT a, count(*) FROM public.slow GROUP BY a\"\n";
    let mut pipeline = pipeline_of(setup, &["slow"], stores);
    start(&mut pipeline, &[Role::Reader, Role::Counters]);
    for (gone, taken) in
        [("DROP a", "ADD a text"), ("DROP a", "RENAME b TO a"), ("RENAME a TO other", "ADD a text")]
    {
        pipeline.postgres.sql("app", "UPDATE slow SET a = 'a' || id");
        pipeline.postgres.sql("app", &format!("ALTER TABLE slow {gone}"));
        pipeline.succeed(&["wait", "--timeout", "90s"]);
        pipeline.postgres.sql("app", &format!("ALTER TABLE slow {taken}"));
        right(&mut pipeline, taken);
    }
}

#[test]
fn h30_what_leaves_rows_as_they_are_costs_nothing() {
    let setup = "CREATE TYPE mood AS ENUM ('sad', 'happy');
        CREATE TABLE cheap (id int PRIMARY KEY, a text, b varchar(5), gone int, m mood); ALTER TABLE cheap REPLICA IDENTITY FULL;
        INSERT INTO cheap VALUES (1, 'a', 'b', 1, 'sad'), (2, 'c', 'd', 2, 'happy')";
    let stores = "[counters.a]\nsql = \"SELECT a, count(*) FROM public.cheap GROUP BY a\"\n";
    let mut pipeline = pipeline_of(setup, &["cheap"], stores);
    start(&mut pipeline, &[Role::Reader, Role::Counters]);
    for change in [
        "ALTER TABLE cheap ADD COLUMN more int",
        "ALTER TABLE cheap DROP COLUMN gone",
        "ALTER TABLE cheap RENAME b TO title",
        "ALTER TABLE cheap ALTER title TYPE varchar(50)",
        "ALTER TABLE cheap ALTER title TYPE text",
        "ALTER TYPE mood ADD VALUE 'so'",
        "VACUUM FULL cheap",
        "CLUSTER cheap USING cheap_pkey",
        "ANALYZE cheap",
        "ALTER TABLE cheap RENAME a TO t; UPDATE cheap SET t = t || '?' WHERE id = 2; ALTER TABLE cheap RENAME t TO a",
    ] {
        pipeline.postgres.sql("app", change);
        pipeline.postgres.sql("app", "UPDATE cheap SET a = a || '!' WHERE id = 1");
        right(&mut pipeline, change);
        assert!(!pipeline.log("reader").contains("is read anew"), "{change}");
    }
    // The catalog is as before, and only the stream tells what was written.
    let swap = "ALTER TABLE cheap RENAME a TO t; ALTER TABLE cheap RENAME title TO a; ALTER TABLE cheap RENAME t TO title";
    pipeline.postgres.sql("app", &format!("{swap}; UPDATE cheap SET a = 'swapped' WHERE id = 1; {swap}"));
    right(&mut pipeline, "swapped, written, swapped back");
}

/// What was committed before a table went is in the log, however late it is read.
#[test]
fn h29_what_was_committed_before_a_table_was_dropped_is_in_the_log() {
    let setup = "CREATE TABLE gone (id int PRIMARY KEY, v text); ALTER TABLE gone REPLICA IDENTITY FULL;
        INSERT INTO gone VALUES (1, 'a');
        CREATE TABLE other (id bigserial PRIMARY KEY, v text); ALTER TABLE other REPLICA IDENTITY FULL";
    let stores = "[counters.n]\nsql = \"SELECT count(*) FROM public.other\"\n";
    let mut pipeline = pipeline_of(setup, &["gone", "other"], stores);
    start(&mut pipeline, &[Role::Reader, Role::Counters]);
    pipeline.running_process(Role::Reader).signal("STOP");
    for _ in 0..5 {
        pipeline
            .postgres
            .sql("app", "INSERT INTO other (v) SELECT 'x' || g FROM generate_series(1, 10000) g");
    }
    pipeline.postgres.sql("app", "INSERT INTO gone VALUES (2, 'b'), (3, 'c')");
    pipeline.postgres.sql("app", "UPDATE gone SET v = 'd' WHERE id = 2");
    pipeline.postgres.sql("app", "DROP TABLE gone");
    pipeline.running_process(Role::Reader).signal("CONT");
    let status = pipeline.running_process(Role::Reader).wait(SOON);
    assert_eq!(status.code(), Some(3), "{}", pipeline.log("reader"));
    assert!(pipeline.log("reader").contains("table public.gone was dropped; the log has all"));
    let log = crate::snapshot::replay(&pipeline.kafka);
    assert_eq!(log["gone"].len(), 3, "{:?}", log["gone"]);
    assert!(log["gone"].iter().any(|row| row.contains('d')), "{:?}", log["gone"]);
    // The remedy works, and the other table goes on.
    configure(&pipeline, &["other"], stores);
    start(&mut pipeline, &[Role::Reader]);
    pipeline.postgres.sql("app", "INSERT INTO other (v) VALUES ('y')");
    right(&mut pipeline, "without the table");
}

/// The reader ends with a refusal that says so, and the remedy works.
#[test]
fn h29_a_publication_that_leaves_something_out_is_refused() {
    let setup = "CREATE TABLE t (id int PRIMARY KEY, v text); ALTER TABLE t REPLICA IDENTITY FULL; INSERT INTO t VALUES (1, 'a')";
    let stores = "[counters.n]\nsql = \"SELECT v, count(*) FROM public.t GROUP BY v\"\n";
    let mut pipeline = pipeline_of(setup, &["t"], stores);
    start(&mut pipeline, &[Role::Reader, Role::Counters]);
    let newer =
        pipeline.postgres.value("app", "SELECT current_setting('server_version_num')::int >= 150000") == "t";
    let alter = |what: &str| format!("ALTER PUBLICATION millrace_mailbox {what}");
    let mut cases = vec![
        (
            "SET (publish = 'insert')",
            "does not publish all kinds of changes",
            "SET (publish = 'insert, update, delete, truncate')",
        ),
        (
            "SET (publish_via_partition_root)",
            "publishes by partition root",
            "SET (publish_via_partition_root = false)",
        ),
        ("DROP TABLE t", "was taken out of publication", ""),
    ];
    if newer {
        cases.push(("SET TABLE t WHERE (id > 5)", "holds back rows or columns", "DROP TABLE t"));
        cases.push((
            "ADD TABLES IN SCHEMA public",
            "publishes whole schemas",
            "DROP TABLES IN SCHEMA public",
        ));
    }
    for (broken, said, mended) in cases {
        pipeline.postgres.sql("app", &alter(broken));
        pipeline.postgres.sql("app", "UPDATE t SET v = v || '?'");
        let exit = pipeline.running_process(Role::Reader).wait(SOON);
        assert_eq!(exit.code(), Some(3), "{broken}");
        let log = pipeline.log("reader");
        assert!(log.contains(said), "{broken}: {log}");
        // Until the reader looked, the store took in others' commits above this one.
        soon(broken, || status(&pipeline, "counters.n")["ready"] == false);
        if !mended.is_empty() {
            pipeline.postgres.sql("app", &alter(mended));
        }
        start(&mut pipeline, &[Role::Reader]);
        right(&mut pipeline, broken);
    }
    // Altered, and altered back before anybody looks.
    let read = |pipeline: &Pipeline| pipeline.log("reader").matches("the publication was altered").count();
    let before = read(&pipeline);
    pipeline.postgres.sql(
        "app",
        &format!(
            "{}; UPDATE t SET v = 'unseen'; {}; DELETE FROM t WHERE v = 'none'",
            alter("SET (publish = 'insert')"),
            alter("SET (publish = 'insert, update, delete, truncate')")
        ),
    );
    right(&mut pipeline, "altered and altered back");
    pipeline.postgres.sql("app", "UPDATE t SET v = 'seen'");
    right(&mut pipeline, "altered and altered back");
    assert_eq!(read(&pipeline), before + 1, "once");
}

#[test]
fn a_table_that_is_replaced_by_another_is_refused_and_a_new_log_has_it() {
    let setup = "CREATE TABLE t (id int PRIMARY KEY, v text); ALTER TABLE t REPLICA IDENTITY FULL; INSERT INTO t VALUES (1, 'a');
        CREATE TABLE other (id int PRIMARY KEY, v text); ALTER TABLE other REPLICA IDENTITY FULL";
    let stores = "[counters.n]\nsql = \"SELECT v, count(*) FROM public.t GROUP BY v\"\n\
                  [counters.m]\nsql = \"SELECT v, count(*) FROM public.other GROUP BY v\"\n";
    let mut pipeline = pipeline_of(setup, &["t", "other"], stores);
    start(&mut pipeline, &[Role::Reader, Role::Counters]);
    // Renamed for the time of one transaction, which writes it.
    pipeline.postgres.sql(
        "app",
        "BEGIN; ALTER TABLE t RENAME TO away; INSERT INTO away VALUES (2, 'b'); ALTER TABLE away RENAME TO t; COMMIT",
    );
    right(&mut pipeline, "renamed, written, renamed back");
    // Renamed for longer, noticed by a look or in the middle of a transaction that writes it.
    for writes in ["", "INSERT INTO other VALUES (1, 'x'); INSERT INTO away VALUES (3, 'c');"] {
        pipeline.postgres.sql("app", &format!("BEGIN; ALTER TABLE t RENAME TO away; {writes} COMMIT"));
        let exit = pipeline.running_process(Role::Reader).wait(SOON);
        assert_eq!(exit.code(), Some(3));
        soon("its store is told", || status(&pipeline, "counters.n")["ready"] == false);
        pipeline.postgres.sql("app", "ALTER TABLE away RENAME TO t");
        start(&mut pipeline, &[Role::Reader]);
        right(&mut pipeline, "renamed back");
    }
    pipeline.postgres.sql(
        "app",
        "BEGIN; CREATE TABLE t_new (LIKE t INCLUDING ALL); ALTER TABLE t_new REPLICA IDENTITY FULL;
         INSERT INTO t_new VALUES (1, 'new'); ALTER TABLE t RENAME TO t_old; ALTER TABLE t_new RENAME TO t; COMMIT",
    );
    let exit = pipeline.running_process(Role::Reader).wait(SOON);
    assert_eq!(exit.code(), Some(3));
    let log = pipeline.log("reader");
    assert!(log.contains("public.t has the name public.t_old now"), "{log}");
    pipeline.succeed(&["generation", "new"]);
    pipeline.spawn(Role::Reader);
    soon("the store follows the new table", || pipeline.counter("n").keys().eq(["new"]));
    pipeline.postgres.sql("app", "INSERT INTO t VALUES (9, 'new9')");
    right(&mut pipeline, "the new table");
}

/// A look may notice a new name only after the rounds that found it.
#[test]
fn h29_rows_that_are_read_while_a_table_is_renamed_have_its_name_in_the_log() {
    let setup = "CREATE TABLE t (id int PRIMARY KEY, v text); ALTER TABLE t REPLICA IDENTITY FULL;
        INSERT INTO t SELECT g, repeat('x', 500) FROM generate_series(1, 400) g";
    let stores = "[counters.n]\nsql = \"SELECT count(*) FROM public.t\"\n[snapshot]\nround_kb = 1\n";
    let mut pipeline = pipeline_of(setup, &["t"], stores);
    start(&mut pipeline, &[Role::Reader, Role::Counters]);
    pipeline.postgres.sql("app", "ALTER TABLE t ALTER id TYPE bigint");
    soon("it is read again", || pipeline.log("reader").contains("public.t is read anew"));
    std::thread::sleep(Duration::from_millis(300));
    pipeline.postgres.sql("app", "ALTER TABLE t RENAME TO away");
    let exit = pipeline.running_process(Role::Reader).wait(SOON);
    assert_eq!(exit.code(), Some(3));
    assert_eq!(status(&pipeline, "counters.n")["ready"], false, "renamed in the middle of the snapshot");
    pipeline
        .postgres
        .sql("app", "ALTER TABLE away RENAME TO t; UPDATE t SET v = 'renamed back' WHERE id % 7 = 0");
    start(&mut pipeline, &[Role::Reader]);
    right(&mut pipeline, "renamed back");
}

const PARTITIONED: &str = "
    CREATE TABLE p (id bigint, k int, v text, PRIMARY KEY (id, k)) PARTITION BY LIST (k); ALTER TABLE p REPLICA IDENTITY FULL;
    CREATE TABLE p0 PARTITION OF p FOR VALUES IN (0); ALTER TABLE p0 REPLICA IDENTITY FULL; INSERT INTO p VALUES (0, 0, 'v')";

const PARTITIONED_STORES: &str = "
[counters.k]
sql = \"SELECT k, count(*) FROM public.p GROUP BY k\"
[search.indexes.p]
table = \"public.p\"
text = [\"v\"]
";

fn make_partition(k: u32) -> String {
    format!(
        "BEGIN; CREATE TABLE p{k} PARTITION OF p FOR VALUES IN ({k}); ALTER TABLE p{k} REPLICA IDENTITY FULL;
         INSERT INTO p SELECT g, {k}, 'v' || g FROM generate_series(1, 300) g; COMMIT"
    )
}

/// A partition that is made, given its identity and filled in one transaction; the last one while a standby is missing.
#[test]
fn h31_partitions_that_are_made_and_filled_at_once_are_whole_whenever_a_store_says_so() {
    let mut pipeline = pipeline_of(PARTITIONED, &["p"], PARTITIONED_STORES);
    if pipeline.postgres.value("app", "SELECT current_setting('server_version_num')::int < 150000") == "t" {
        return;
    }
    start(&mut pipeline, &ROLES);
    for k in 1..=40 {
        pipeline.postgres.sql("app", &make_partition(k));
        pipeline.postgres.sql("app", &format!("DELETE FROM p WHERE k = {k} AND id > 200"));
    }
    right(&mut pipeline, "partitions");
    pipeline.postgres.sql("app", "ALTER SYSTEM SET synchronous_standby_names = 'missing'");
    pipeline.postgres.reload();
    let config = pipeline.postgres.session_config("app");
    let waiting =
        std::thread::spawn(move || Session::connect(&config).expect("a session").sql(&make_partition(50)));
    soon("the stream waits", || pipeline.log("reader").contains("the stream waits"));
    std::thread::sleep(Duration::from_millis(300));
    assert!(!pipeline.counter("k").contains_key("50"));
    pipeline.postgres.sql("app", "ALTER SYSTEM RESET synchronous_standby_names");
    pipeline.postgres.reload();
    waiting.join().expect("its commit ends");
    // At once, not after a while.
    pipeline.succeed(&["wait", "--timeout", "60s"]);
    assert_eq!(pipeline.counter("k").get("50").map(String::as_str), Some("300"));
    right(&mut pipeline, "a standby was missing");
}

#[test]
fn h31_a_partition_that_may_not_be_read_keeps_its_stores_from_being_ready() {
    let mut pipeline = pipeline_of(
        &format!("CREATE ROLE runs LOGIN REPLICATION; {PARTITIONED}; GRANT SELECT ON p, p0 TO runs"),
        &["p"],
        PARTITIONED_STORES,
    );
    if pipeline.postgres.value("app", "SELECT current_setting('server_version_num')::int < 150000") == "t" {
        return;
    }
    let admin = pipeline.postgres.url("app");
    pipeline.set_url(&admin.replace("postgres@", "runs@"), &admin);
    start(&mut pipeline, &ROLES);
    pipeline.postgres.sql(
        "app",
        "CREATE TABLE p7 (LIKE p INCLUDING ALL); ALTER TABLE p7 REPLICA IDENTITY FULL; INSERT INTO p7 VALUES (1, 7, 'x'), (2, 7, 'y');
         ALTER TABLE p ATTACH PARTITION p7 FOR VALUES IN (7)",
    );
    let waited = pipeline.millrace(&["wait", "--timeout", "5s"]);
    assert_eq!(waited.status.code(), Some(1), "not ready");
    pipeline.postgres.sql("app", "GRANT SELECT ON p7 TO runs");
    right(&mut pipeline, "granted");
    assert_eq!(pipeline.counter("k").get("7").map(String::as_str), Some("2"));
}

#[test]
fn a_query_of_a_table_with_children_is_refused() {
    let setup = "CREATE TABLE parent (id int PRIMARY KEY, v text); ALTER TABLE parent REPLICA IDENTITY FULL";
    let stores = "[counters.n]\nsql = \"SELECT v, count(*) FROM public.parent GROUP BY v\"\n";
    let mut pipeline = pipeline_of(setup, &["parent"], stores);
    start(&mut pipeline, &[Role::Reader, Role::Counters]);
    pipeline
        .postgres
        .sql("app", "CREATE TABLE child (extra int) INHERITS (parent); INSERT INTO child VALUES (1, 'c', 0)");
    let status = pipeline.running_process(Role::Reader).wait(SOON);
    assert_eq!(status.code(), Some(3));
    let said = pipeline.refused(&["setup"]);
    assert!(said.contains("public.parent has children by inheritance (public.child)"), "{said}");
}

#[test]
fn h30_a_renamed_column_that_a_store_then_names_is_filled_from_the_right_values() {
    let stores = |name: &str| {
        format!(
            "[counters.owners]\nsql = \"SELECT {name}, count(*) FROM public.mail GROUP BY {name}\"\n\
             [search.indexes.mail]\ntable = \"public.mail\"\ntext = [\"subject\"]\nnumber = [\"{name}\"]\n"
        )
    };
    let setup = "CREATE TABLE mail (id int PRIMARY KEY, subject text, owner int, sender int);
        ALTER TABLE mail REPLICA IDENTITY FULL;
        INSERT INTO mail SELECT g, 'subject ' || g, g % 2, 100 + g FROM generate_series(1, 6) g";
    let mut pipeline = pipeline_of(setup, &["mail"], &stores("owner"));
    start(&mut pipeline, &ROLES);
    // The rows are not read again, and those of the log have the old name.
    pipeline.postgres.sql("app", "ALTER TABLE mail RENAME owner TO holder");
    pipeline.postgres.sql("app", "UPDATE mail SET sender = 0 WHERE id = 1");
    soon("both stores stop", || {
        ["counters", "search"].iter().all(|role| pipeline.log(role).contains("owner"))
    });
    [Role::Counters, Role::Search].into_iter().for_each(|role| pipeline.kill(role));
    configure(&pipeline, &["mail"], &stores("holder"));
    [Role::Counters, Role::Search].into_iter().for_each(|role| pipeline.spawn(role));
    right(&mut pipeline, "renamed");

    // Another column takes the name. Before it come rows without it, which are dead by then.
    pipeline
        .postgres
        .sql("app", "ALTER TABLE mail RENAME holder TO was; ALTER TABLE mail RENAME sender TO holder");
    right(&mut pipeline, "renamed over each other");
    pipeline.succeed(&["rebuild", "owners", "mail", "--wait"]);
    right(&mut pipeline, "and built anew");
    let read_anew = pipeline.log("reader").matches("is read anew").count();
    assert_eq!(read_anew, 1, "only where a name changed hands");
}
