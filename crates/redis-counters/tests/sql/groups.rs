//! A group is found by the text that Postgres prints for its value, for every type with a modifier.

use std::collections::BTreeSet;

use change::{Collation, Column, Event, ReplicaIdentity, TableSchema};
use redis_counters::sql::{Definition, Scratch};
use testkit::services::{Postgres, Session};

use crate::rows::log_of;

/// Types with values of theirs; those from the second list need Postgres 15.
const TYPES: &[(&str, &[&str])] = &[
    ("numeric(10,2)", &["1.5", "1.50", "100", "0", "-0.05", "12345678.9", "NaN"]),
    ("numeric(6,0)", &["1", "100", "0", "-7"]),
    ("numeric(6)", &["1", "100", "-7"]),
    ("char(4)", &["", "a", "ab", "a b", " ab", "abcd", "é", "日本", "a:b", "\\N"]),
    ("char", &["", "x", "日"]),
    ("price", &["1.5", "2"]),
    ("code", &["a", "abc"]),
];
const SINCE_15: &[(&str, &[&str])] =
    &[("numeric(3,-2)", &["12345", "100", "0", "-149"]), ("numeric(2,5)", &["0.0001", "0.00012", "0"])];
/// Equal values print differently, and the shortest text stands for them.
const SHORTEST: &[(&str, &[&str], &[&str])] = &[
    ("numeric", &["1.50", "1.5", "100.00", "1e3"], &["1.5", "100", "1000"]),
    ("bpchar", &["ab", "ab  ", ""], &["ab", ""]),
];

/// The table `grouped` as the stream would describe it.
fn schema(session: &Session) -> TableSchema {
    // Of a domain its base type with the domain's modifier, as the reader has it.
    let rows = session.sql(
        "SELECT attname, coalesce(nullif(t.typbasetype, 0), t.oid),
             CASE WHEN t.typtype = 'd' THEN format_type(t.typbasetype, nullif(t.typtypmod, -1))
                  ELSE format_type(t.oid, nullif(atttypmod, -1)) END
         FROM pg_attribute JOIN pg_type t ON t.oid = atttypid
         WHERE attrelid = 'grouped'::regclass AND attnum > 0 ORDER BY attnum",
    );
    let text = |row: &[Option<String>], place: usize| row[place].clone().expect("not null");
    let column = |row: &Vec<Option<String>>| Column {
        name: text(row, 0),
        type_oid: text(row, 1).parse().expect("an oid"),
        type_name: text(row, 2),
        key: None,
        collation: Some(Collation { name: "C".into(), deterministic: true, bytewise: true }),
        number: None,
        recorded: None,
    };
    TableSchema {
        relation: 16_384,
        root: None,
        schema: "public".into(),
        table: "grouped".into(),
        identity: ReplicaIdentity::Full,
        columns: rows.iter().map(column).collect(),
    }
}

/// The groups of a table with one column of this type, as `contribution` names them and as `select_sql` does.
fn groups_of(session: &Session, type_name: &str, values: &[&str]) -> [BTreeSet<String>; 2] {
    session.sql(&format!("DROP TABLE IF EXISTS grouped; CREATE TABLE grouped (v {type_name})"));
    for value in values {
        session.sql(&format!("INSERT INTO grouped VALUES ('{value}')"));
    }
    let schema = schema(session);
    let sql = "SELECT v, count(*) FROM grouped GROUP BY v";
    let bound = Definition::parse("c", sql).and_then(|definition| definition.bind(&schema)).expect("good");
    let (log, mut scratch) = (log_of(session, &schema), Scratch::default());
    let written = log.iter().map(|record| {
        let row = Event::decode(record.value).expect("an envelope").after.expect("a row");
        let contribution = bound.contribution(row, &mut scratch).expect("a good row").expect("a row");
        change::key::split(contribution.group, 1).expect("a key").remove(0).expect("not null")
    });
    let written = written.collect();
    let selected = session.sql(&bound.select_sql("grouped"));
    [written, selected.into_iter().map(|row| row[0].clone().expect("not null")).collect()]
}

#[test]
fn h60_groups_are_named_as_postgres_prints_them() {
    let server = Postgres::start();
    let session = server.session("postgres");
    session.sql("CREATE DOMAIN price AS numeric(8,3); CREATE DOMAIN code AS char(5)");
    let version = session.sql("SHOW server_version_num")[0][0].clone().expect("a version");
    let later = if version.as_str() >= "150000" { SINCE_15 } else { &[] };
    for (type_name, values) in TYPES.iter().chain(later) {
        let [written, selected] = groups_of(&session, type_name, values);
        // `GROUP BY v` prints nothing else than `v` does: of equal values every one prints the same.
        let printed = session.sql("SELECT DISTINCT format('%s', v) FROM grouped");
        let printed = printed.into_iter().map(|row| row[0].clone().expect("not null")).collect();
        assert_eq!(written, printed, "{type_name}");
        assert_eq!(selected, printed, "{type_name}: select_sql");
    }
    for (type_name, values, shortest) in SHORTEST {
        let expected: BTreeSet<String> = shortest.iter().map(|text| (*text).to_owned()).collect();
        assert_eq!(groups_of(&session, type_name, values), [expected.clone(), expected], "{type_name}");
    }
}
