//! Rounds of a snapshot against a real server: what is read of a table, and when nothing is.

use std::cmp::Ordering;

use change::{Key, Read};
use relay::{ReadRequest, RelayError, Round, RoundEvent, Source};
use testkit::services::Postgres;

use crate::support::*;

fn request(relation: u32, after: Option<Key>, key: &[String]) -> ReadRequest {
    ReadRequest {
        relation,
        key: key.to_vec(),
        description: None,
        storage: None,
        after,
        only_keys: false,
        keys: Vec::new(),
    }
}

fn oid(server: &Postgres, table: &str) -> u32 {
    server.value("postgres", &format!("SELECT '{table}'::regclass::oid")).parse().unwrap()
}

/// A reader of tables whose slot nobody streams.
fn reader(server: &Postgres, tables: &str) -> Reader {
    set_up(server, tables);
    Reader::connect(server, options(&[])).unwrap()
}

/// Reads rows of one table; gives them as text, and how the round ended and the table's reading.
fn round(
    reader: &mut Reader,
    request: ReadRequest,
    bytes: u64,
) -> (Round, Vec<String>, Vec<String>, Option<Read>) {
    let (mut rows, mut key, mut end) = (Vec::new(), Vec::new(), None);
    let taken = reader
        .source
        .read(&[request], bytes, &mut |_| true, &mut |event| {
            match event {
                RoundEvent::Table { schema, .. } => key = schema.key_signature(),
                RoundEvent::Row(tuple) => rows.push(row(tuple)),
                RoundEvent::End(read) => end = Some(read),
            }
            Ok::<_, RelayError>(())
        })
        .unwrap();
    (taken, rows, key, end)
}

/// Why nothing is read of a table now.
fn not_now(reader: &mut Reader, relation: u32) -> String {
    match round(reader, request(relation, None, &[]), 1) {
        (Round::NotNow(reason), rows, ..) if rows.is_empty() => reason,
        other => panic!("{other:?}"),
    }
}

/// Reads a table to its end in rounds as small as they go.
fn read_in_rounds(reader: &mut Reader, relation: u32) -> (Vec<String>, Vec<Key>, Vec<String>) {
    let (mut rows, mut bounds, mut signature) = (Vec::new(), Vec::new(), Vec::new());
    loop {
        let (taken, more, key, end) = round(reader, request(relation, bounds.last().cloned(), &signature), 1);
        assert!(matches!(taken, Round::Taken { .. }), "{taken:?}");
        rows.extend(more);
        signature = key;
        match end {
            Some(Read::UpTo(key)) => bounds.push(key),
            Some(Read::All) => return (rows, bounds, signature),
            other => panic!("{other:?}"),
        }
    }
}

/// What ORDER BY means and what `>` means must be one order, wherever the operators are.
#[test]
fn h26_keys_are_ordered_by_their_types_own_operators() {
    let server = Postgres::start();
    server.sql(
        "postgres",
        r#"CREATE SCHEMA "Far away"; CREATE EXTENSION citext SCHEMA "Far away";
           CREATE DOMAIN "Far away".word AS "Far away".citext;
           CREATE TYPE "Far away".pair AS (a int, b text);
           CREATE TYPE mood AS ENUM ('z', 'y', 'x');
           CREATE TABLE ci (id "Far away".citext PRIMARY KEY);
           CREATE TABLE mixed (n int, id "Far away".word, PRIMARY KEY (n, id));
           CREATE TABLE composite (id "Far away".pair PRIMARY KEY);
           CREATE TABLE enum (m mood, c char(3), v varchar(2), PRIMARY KEY (m, c, v));
           INSERT INTO ci SELECT CASE WHEN g % 2 = 0 THEN chr(65 + g) ELSE chr(97 + g) END FROM generate_series(0, 25) g;
           INSERT INTO mixed SELECT g % 2, id FROM ci, generate_series(0, 1) g;
           INSERT INTO composite SELECT (g, 'it''s "g"')::"Far away".pair FROM generate_series(-4, 9) g;
           INSERT INTO enum SELECT m, c, 'v' FROM unnest(enum_range(NULL::mood)) m, unnest('{a,b,abc}'::text[]) c"#,
    );
    let tables = ["ci", "mixed", "composite", "enum"];
    let mut reader = reader(&server, &tables.join(", "));
    for table in tables {
        let (rows, bounds, signature) = read_in_rounds(&mut reader, oid(&server, table));
        let all = server.sql("postgres", &format!("SELECT * FROM {table} ORDER BY {table}"));
        let all: Vec<String> =
            all.into_iter().map(|row| row.into_iter().flatten().collect::<Vec<_>>().join(",")).collect();
        assert_eq!(rows, all, "{table}");
        assert!(bounds.len() > 3, "{table} was read in several rounds");
        let bound = &bounds[bounds.len() / 2];
        let compared = reader.source.compare(oid(&server, table), &bounds, bound).unwrap();
        let expected: Vec<Ordering> = (0..bounds.len())
            .map(|place| if place <= bounds.len() / 2 { Ordering::Less } else { Ordering::Greater })
            .collect();
        assert_eq!(compared, Some(expected), "{table}");
        // Single rows, as the stream names them.
        let wanted = ReadRequest {
            only_keys: true,
            keys: bounds.clone(),
            ..request(oid(&server, table), None, &signature)
        };
        let (taken, single, ..) = round(&mut reader, wanted, 1);
        assert!(matches!(taken, Round::Taken { .. }), "{taken:?}");
        assert_eq!(single.len(), bounds.len(), "{table}");
    }
}

/// Each lack is told with what mends it, which is then done; the reader's connections outlive it.
#[test]
fn what_the_role_may_not_read_is_waited_for() {
    let server = Postgres::start();
    server.sql(
        "postgres",
        "CREATE ROLE reader LOGIN REPLICATION; CREATE SCHEMA ext; CREATE EXTENSION citext SCHEMA ext;
         GRANT USAGE ON SCHEMA ext TO reader;
         CREATE TABLE mails (id ext.citext PRIMARY KEY); INSERT INTO mails VALUES ('B'), ('a')",
    );
    set_up(&server, "mails");
    let url = server.url("postgres").replace("postgres@", "reader@");
    let runtime = runtime();
    let source = postgres::PostgresSource::connect(runtime.handle(), &config(&url), options(&[])).unwrap();
    let mut reader = Reader { source, names: Vec::new(), runtime };
    let mails = oid(&server, "mails");
    let reason = not_now(&mut reader, mails);
    assert!(reason.contains("table mails") && reason.contains("GRANT"), "{reason}");
    server.sql(
        "postgres",
        "GRANT SELECT ON mails TO reader; REVOKE USAGE ON SCHEMA ext FROM reader;
         ALTER TABLE mails ENABLE ROW LEVEL SECURITY",
    );
    let reason = not_now(&mut reader, mails);
    assert!(reason.contains("row security") && reason.contains("public.mails"), "{reason}");
    server.sql("postgres", "ALTER ROLE reader BYPASSRLS");
    let reason = not_now(&mut reader, mails);
    assert!(reason.contains("GRANT USAGE ON SCHEMA ext"), "{reason}");
    server.sql("postgres", "GRANT USAGE ON SCHEMA ext TO reader");
    assert_eq!(read_in_rounds(&mut reader, mails).0, ["a", "B"]);
    let locked = server.session("postgres");
    locked.sql("BEGIN; LOCK TABLE mails");
    let reason = not_now(&mut reader, mails);
    assert!(reason.contains("waiting for the lock of ONLY"), "{reason}");
    locked.sql("COMMIT");
    assert_eq!(read_in_rounds(&mut reader, mails).0, ["a", "B"]);
}

/// Between two rounds a server may end sessions that rest.
#[test]
fn connections_that_were_lost_meanwhile_are_made_again() {
    let server = Postgres::start();
    server.sql(
        "postgres",
        "CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t SELECT generate_series(1, 5000)",
    );
    let mut reader = reader(&server, "t");
    let (relation, mut after, mut signature, mut all) = (oid(&server, "t"), None, Vec::new(), Vec::new());
    loop {
        let (taken, rows, key, end) = round(&mut reader, request(relation, after, &signature), 6_000);
        assert!(matches!(taken, Round::Taken { .. }), "{taken:?}");
        all.extend(rows);
        signature = key;
        match end {
            Some(Read::UpTo(key)) => after = Some(key),
            _ => break,
        }
        let ended = server.sql(
            "postgres",
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE query = 'ROLLBACK' AND state = 'idle'",
        );
        assert!(!ended.is_empty(), "nothing was ended");
    }
    assert_eq!(all, (1..=5000).map(|id| id.to_string()).collect::<Vec<_>>());
}
