//! What the stream says of changes.

use change::{Datum, Lsn};
use relay::{RelayError, RowChange, Source, WalEvent};
use testkit::services::{Postgres, wait_until};

use crate::support::*;

#[test]
fn every_committed_change_in_order_and_the_rest_again_after_a_resume() {
    let server = Postgres::start();
    server.sql(
        "postgres",
        "CREATE TABLE a (id int PRIMARY KEY, note text);
         CREATE TABLE f (id int PRIMARY KEY, note text); ALTER TABLE f REPLICA IDENTITY FULL;
         CREATE TABLE big (id int PRIMARY KEY, n int, body text); ALTER TABLE big ALTER body SET STORAGE EXTERNAL;
         CREATE TABLE hidden (id int)",
    );
    set_up(&server, "a, f, big");
    let run = |statements| server.sql("postgres", statements);
    run("INSERT INTO a VALUES (1, 'one'), (2, NULL)");
    run("BEGIN; UPDATE a SET note = 'uno' WHERE id = 1; UPDATE a SET id = 3 WHERE id = 2; COMMIT");
    run("BEGIN; INSERT INTO a VALUES (10, 'never'); ROLLBACK");
    run("BEGIN; INSERT INTO a VALUES (11, 'kept'); SAVEPOINT s; INSERT INTO a VALUES (12, 'undone');
         ROLLBACK TO s; INSERT INTO f VALUES (1, 'é, \"'); RELEASE s; COMMIT");
    run("INSERT INTO hidden VALUES (1)");
    run("UPDATE f SET note = 'two'; DELETE FROM f");
    run("INSERT INTO big VALUES (1, 1, repeat('x', 5000))");
    run("UPDATE big SET n = 2");
    run("SELECT pg_logical_emit_message(false, 'outside', 'o')");
    run("DELETE FROM a WHERE id = 3; TRUNCATE a, f");
    end(&server);

    let mut reader = Reader::start(&server, &["public.a", "public.f", "public.big"], Lsn::ZERO);
    let seen = reader.until_end();
    let long = "x".repeat(5000);
    let expected = format!(
        "begin\ninsert a 1,one\ninsert a 2,NULL\ncommit\n\
         begin\nupdate a 1,uno\nupdate a 2,NULL -> 3,NULL\ncommit\n\
         begin\ninsert a 11,kept\ninsert f 1,é, \"\ncommit\n\
         begin\nupdate f 1,é, \" -> 1,two\ndelete f 1,two\ncommit\n\
         begin\ninsert big 1,1,{long}\ncommit\n\
         begin\nupdate big 1,2,(unchanged)\ncommit\n\
         message outside outside\n\
         begin\ndelete a 3,NULL\ntruncate a f\ncommit"
    );
    assert_eq!(texts(&seen), expected);
    drop(reader);

    // Resuming at the end of each transaction sends exactly what came after it.
    for (i, event) in seen.iter().enumerate() {
        let Some(end_lsn) = event.end_lsn else { continue };
        let mut reader = Reader::start(&server, &["public.a"], end_lsn);
        assert_eq!(texts(&reader.until_end()), texts(&seen[i + 1..]), "from {end_lsn}");
    }
}

#[test]
fn h13_rows_of_a_prepared_transaction_come_when_it_is_committed() {
    let server = Postgres::start();
    server.sql("postgres", "CREATE TABLE a (id int PRIMARY KEY)");
    set_up(&server, "a");
    server.sql("postgres", "BEGIN; INSERT INTO a VALUES (1); PREPARE TRANSACTION 'p'");
    server.sql("postgres", "INSERT INTO a VALUES (2)");
    end(&server);
    let mut reader = Reader::start(&server, &["public.a"], Lsn::ZERO);
    assert_eq!(texts(&reader.until_end()), "begin\ninsert a 2\ncommit");
    drop(reader);
    // All that is before here is acknowledged, the PREPARE too.
    let reached = lsn(&server, "SELECT pg_current_wal_insert_lsn()");
    let free = "SELECT NOT active FROM pg_replication_slots WHERE slot_name = 'millrace_t_1'";
    wait_until("a free slot", PATIENCE, || (server.value("postgres", free) == "t").then_some(()));
    server.sql("postgres", &format!("SELECT pg_replication_slot_advance('millrace_t_1', '{reached}')"));
    server.sql("postgres", "COMMIT PREPARED 'p'");
    end(&server);
    let mut reader = Reader::start(&server, &["public.a"], reached);
    assert_eq!(texts(&reader.until_end()), "begin\ninsert a 1\ncommit");
}

#[test]
fn h14_every_type_arrives_as_its_text_whatever_the_session_defaults_are() {
    let server = Postgres::start();
    server.sql(
        "postgres",
        "ALTER DATABASE postgres SET timezone = 'Asia/Kathmandu';
         ALTER DATABASE postgres SET datestyle = 'SQL, DMY';
         ALTER DATABASE postgres SET intervalstyle = 'iso_8601';
         ALTER DATABASE postgres SET extra_float_digits = -5;
         ALTER DATABASE postgres SET bytea_output = 'escape';
         ALTER DATABASE postgres SET statement_timeout = '1s'",
    );
    let samples = [
        ("boolean", "t"),
        ("smallint", "-32768"),
        ("integer", "2147483647"),
        ("bigint", "-9223372036854775808"),
        ("real", "0.1"),
        ("double precision", "0.30000000000000004"),
        ("double precision", "-Infinity"),
        ("numeric", "123456789012345678901234567890.1234567890"),
        ("numeric(10,2)", "1.50"),
        ("numeric", "NaN"),
        ("text", "zwölf Boxkämpfer"),
        ("text", ""),
        ("varchar(5)", "abc"),
        ("char(5)", "ab   "),
        ("bytea", "\\x00ff5c"),
        ("date", "2024-02-29"),
        ("date", "infinity"),
        ("time", "12:34:56.789"),
        ("timetz", "12:34:56+05:45"),
        ("timestamp", "2024-02-29 12:34:56.5"),
        ("timestamptz", "2024-02-29 12:34:56.5+00"),
        ("interval", "1 year 2 mons 3 days 04:05:06.7"),
        ("uuid", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"),
        ("json", "{\"a\": 1,  \"b\":null}"),
        ("jsonb", "{\"a\": 1, \"b\": null}"),
        ("inet", "192.168.0.1/24"),
        ("macaddr", "08:00:2b:01:02:03"),
        ("point", "(0.1,2)"),
        ("bit(3)", "101"),
        ("int4range", "[1,5)"),
        ("integer[]", "{1,NULL,3}"),
        ("money", "$1.00"),
        ("xml", "<a/>"),
        ("pg_lsn", "16/B374D848"),
        ("mood", "happy"),
        ("positive", "7"),
        ("pair", "(1,x)"),
    ];
    let columns: Vec<String> =
        samples.iter().enumerate().map(|(i, (kind, _))| format!("c{i} {kind}")).collect();
    let values: Vec<String> =
        samples.iter().map(|(kind, value)| format!("'{}'::{kind}", value.replace('\'', "''"))).collect();
    server.sql(
        "postgres",
        &format!(
            "CREATE TYPE mood AS ENUM ('sad', 'happy'); CREATE DOMAIN positive AS int CHECK (value > 0);
             CREATE TYPE pair AS (a int, b text);
             CREATE TABLE every (id serial PRIMARY KEY, {})",
            columns.join(", ")
        ),
    );
    set_up(&server, "every");
    let session = server.session("postgres");
    session.sql("SET timezone = 'UTC'; SET datestyle = 'ISO'");
    session.sql(&format!("INSERT INTO every VALUES (1, {})", values.join(", ")));
    end(&server);

    let mut reader = Reader::connect(&server, options(&["public.every"])).unwrap();
    reader.source.start(Lsn::ZERO).unwrap();
    let mut found: Vec<String> = Vec::new();
    let deadline = std::time::Instant::now() + PATIENCE;
    while found.is_empty() && std::time::Instant::now() < deadline {
        reader
            .source
            .poll(PATIENCE, &mut |event| {
                if let WalEvent::Row { change: RowChange::Insert { new }, .. } = event {
                    let text = |datum| match datum {
                        Datum::Text(text) => text.to_owned(),
                        other => panic!("{other:?}"),
                    };
                    found = new.iter().skip(1).map(text).collect();
                }
                Ok::<_, RelayError>(())
            })
            .unwrap();
    }
    let expected: Vec<&str> = samples.iter().map(|(_, value)| *value).collect();
    assert_eq!(found, expected);
}

#[test]
fn ddl_in_mid_stream_gives_the_new_shape_and_a_dropped_table_its_last_one() {
    let server = Postgres::start();
    server.sql(
        "postgres",
        "CREATE DOMAIN label AS varchar(9); CREATE TABLE a (id int PRIMARY KEY, l label); CREATE TABLE b (id int)",
    );
    set_up(&server, "a, b");
    server.sql("postgres", "INSERT INTO a VALUES (1, 'x')");
    server.sql("postgres", "ALTER TABLE a ADD n numeric(4,1) DEFAULT 1.5; INSERT INTO a VALUES (2, 'y')");
    server.sql("postgres", "ALTER TABLE a DROP l; UPDATE a SET n = 2 WHERE id = 1");
    server.sql("postgres", "DROP TABLE a");
    end(&server);
    let mut reader = Reader::connect(&server, options(&["public.b"])).unwrap();
    reader.source.start(Lsn::ZERO).unwrap();
    let mut seen = Vec::new();
    let mut tables = Vec::new();
    while seen.last().is_none_or(|last| last != "end") {
        let arrived = reader.source.poll(PATIENCE, &mut |event| {
            match event {
                WalEvent::Relation(announced) => tables.push((seen.len() + tables.len(), announced)),
                WalEvent::Row {
                    change: RowChange::Insert { new } | RowChange::Update { new, .. }, ..
                } => {
                    seen.push(row(new));
                }
                WalEvent::Message { .. } => seen.push("end".into()),
                _ => {}
            }
            Ok(())
        });
        assert!(arrived.unwrap(), "nothing more after {seen:?}");
    }
    for (place, announced) in tables {
        let described = reader.source.describe(&announced, 3).unwrap().unwrap();
        assert!(described.outdated && described.published.is_none());
        let column = |c: &change::Column| {
            format!("{}{} {}", if c.key.is_some() { "*" } else { "" }, c.name, c.type_name)
        };
        let columns: Vec<String> = described.schema.columns.iter().map(column).collect();
        seen.insert(place, format!("{}: {}", described.schema.full_name(), columns.join(", ")));
    }
    assert_eq!(
        seen,
        [
            "public.a: *id integer, l character varying(9)",
            "1,x",
            "public.a: *id integer, l character varying(9), n numeric(4,1)",
            "2,y,1.5",
            "public.a: *id integer, n numeric(4,1)",
            "1,2.0",
            "end"
        ]
    );
}
