//! The record format against Debezium's own: both read one history from one Postgres, and their records are compared
//! key by key, field by field, in order and in the form of every number.
//!
//! What differs and may stands in [`KNOWN`], with its reason. Any other difference fails the test, and so does an entry
//! that is no longer needed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;
use testkit::services::{Debezium, Kafka, Postgres};

use crate::harness::{Pipeline, Role, soon, tail};

/// How often a topic is read, each time until it was quiet for three seconds.
const ATTEMPTS: usize = 10;

/// Ours only, and written at times of its own.
const HEARTBEAT: &str = "\"schema\":\"millrace\"";

/// What differs, by the reason. A path begins with the table or the message's prefix; `*` stands for any name.
const KNOWN: &[(&str, &[&str])] = &[
    ("each names its own version", &["*.value.source.version"]),
    ("the time of processing", &["*.value.ts_ms", "*.value.ts_us", "*.value.ts_ns"]),
    (
        "ours is one for all of a transaction; in Debezium's stands each change's own LSN",
        &["*.value.transaction.id"],
    ),
    (
        "no commit, so no time of it: ours is when it was read, Debezium's that of the commit before",
        &["alone.value.source.ts_ms", "alone.value.source.ts_us", "alone.value.source.ts_ns"],
    ),
    ("Debezium has no key here; ours still names the table", &["loose.key", "truncate.key"]),
    (
        "ours is the identity; Debezium's is the primary key, which the stream does not have of a row that dies",
        &["indexed.key"],
    ),
    (
        "not in the stream: Debezium makes up a value where NULL is not allowed or is not the default",
        &[
            "indexed.value.before.id",
            "keyed.value.before.name",
            "keyed.value.before.age",
            "keyed.value.before.level",
            "keyed.value.before.seen",
        ],
    ),
    ("NULL, for which Debezium puts the column's default", &["keyed.value.after.level"]),
    ("unchanged and not in the stream: Debezium writes null, which is a value", &["keyed.value.after.raw"]),
    (
        "no date: Debezium writes one, for the infinite future even one long past",
        &[
            "kinds.value.after.at_infinite",
            "kinds.value.after.at_minus_infinite",
            "kinds.value.after.day_infinite",
            "kinds.value.after.day_minus_infinite",
        ],
    ),
    ("the end of the day, which Debezium takes for its beginning", &["kinds.value.after.clock_last"]),
    ("Debezium writes null", &["kinds.value.after.identifier"]),
    (
        "Debezium leaves the column out",
        &[
            "kinds.value.*.search",
            "kinds.value.*.area",
            "kinds.value.*.log_place",
            "kinds.value.*.regular_class",
            "kinds.value.*.composite",
        ],
    ),
    (
        "as Postgres prints it, and not yet in Debezium's form",
        &[
            "kinds.value.after.clock_zone",
            "kinds.value.after.span",
            "kinds.value.after.span_negative",
            "kinds.value.after.span_zero",
            "kinds.value.after.one_bit",
            "kinds.value.after.bits",
            "kinds.value.after.more_bits",
            "kinds.value.after.cash",
            "kinds.value.after.spot",
            "kinds.value.after.numbers",
            "kinds.value.after.texts",
            "kinds.value.after.flags",
            "kinds.value.after.days",
            "kinds.value.after.prices",
            "kinds.value.after.pairs",
        ],
    ),
];

/// A column each: name, type, value.
const KINDS: &[(&str, &str, &str)] = &[
    ("yes", "boolean", "true"),
    ("no", "boolean", "false"),
    ("small", "smallint", "-32768"),
    ("normal", "integer", "2147483647"),
    ("big", "bigint", "-9223372036854775808"),
    ("object", "oid", "4294967295"),
    ("single", "real", "1.1"),
    ("single_whole", "real", "3"),
    ("single_large", "real", "1e30"),
    ("single_nan", "real", "'NaN'"),
    ("double", "double precision", "0.1"),
    ("double_whole", "double precision", "-42"),
    ("double_zero", "double precision", "'-0'"),
    ("double_large", "double precision", "123456789012345"),
    ("double_larger", "double precision", "1e300"),
    ("double_tiny", "double precision", "1.5e-7"),
    ("double_small", "double precision", "0.0001"),
    ("double_nan", "double precision", "'NaN'"),
    ("double_infinite", "double precision", "'Infinity'"),
    ("double_minus_infinite", "double precision", "'-Infinity'"),
    ("price", "numeric(10,2)", "12.5"),
    ("price_whole", "numeric(10,0)", "12"),
    ("plain", "numeric", "12345678901234567890.123456789000"),
    ("plain_zero", "numeric", "0"),
    ("plain_large", "numeric", "1e30"),
    ("plain_tiny", "numeric", "0.000000000001"),
    ("plain_nan", "numeric", "'NaN'"),
    ("plain_infinite", "numeric", "'Infinity'"),
    ("plain_minus_infinite", "numeric", "'-Infinity'"),
    ("note", "text", r#"E'a "quote", a \\ slash /, é 😀,\na line\ttab \x01\x1f\x7f \u2028 <&>'"#),
    ("empty", "text", "''"),
    ("short", "varchar(10)", "'ab'"),
    ("padded", "char(5)", "'ab'"),
    ("letter", "\"char\"", "'x'"),
    ("identifier", "name", "'pg_class'"),
    ("at", "timestamp", "'2025-01-19 12:34:56.123456'"),
    ("at_whole", "timestamp", "'2025-01-19 12:34:56'"),
    ("at_minute", "timestamp", "'2025-01-19 12:34:00'"),
    ("at_midnight", "timestamp", "'2025-01-19'"),
    ("at_half", "timestamp", "'2025-01-19 12:34:56.5'"),
    ("at_milli", "timestamp", "'2025-01-19 12:34:56.120'"),
    ("at_micro", "timestamp", "'2025-01-19 12:34:56.000001'"),
    ("at_rounded", "timestamp(3)", "'2025-01-19 12:34:56.123456'"),
    ("at_old", "timestamp", "'0101-01-01 00:00:00'"),
    ("at_before_epoch", "timestamp", "'1969-12-31 23:59:59.999999'"),
    ("at_bc", "timestamp", "'0044-03-15 10:00:00 BC'"),
    ("at_far", "timestamp", "'20250-01-19 12:34:56'"),
    ("at_infinite", "timestamp", "'infinity'"),
    ("at_minus_infinite", "timestamp", "'-infinity'"),
    ("seen", "timestamptz", "'2025-01-19 12:34:56.123456+02'"),
    ("seen_whole", "timestamptz", "'2025-01-19 12:34:56+00'"),
    ("seen_minute", "timestamptz", "'2025-01-19 12:34:00+00'"),
    ("seen_half", "timestamptz", "'2025-01-19 12:34:56.5+00'"),
    ("seen_none", "timestamptz(0)", "'2025-01-19 12:34:56.5+00'"),
    ("seen_three", "timestamptz(3)", "'2025-01-19 12:34:56.5+00'"),
    ("seen_three_whole", "timestamptz(3)", "'2025-01-19 12:34:56+00'"),
    ("at_none", "timestamp(0)", "'2025-01-19 12:34:56+00'"),
    ("seen_bc", "timestamptz", "'0044-03-15 10:00:00+00 BC'"),
    ("seen_far", "timestamptz", "'20250-01-19 12:34:56+00'"),
    ("seen_infinite", "timestamptz", "'infinity'"),
    ("seen_minus_infinite", "timestamptz", "'-infinity'"),
    ("day", "date", "'2025-01-19'"),
    ("day_old", "date", "'0001-01-01'"),
    ("day_bc", "date", "'0044-03-15 BC'"),
    ("day_far", "date", "'20250-01-19'"),
    ("day_infinite", "date", "'infinity'"),
    ("day_minus_infinite", "date", "'-infinity'"),
    ("clock", "time", "'12:34:56.123456'"),
    ("clock_whole", "time", "'12:34:56'"),
    ("clock_minute", "time", "'12:34:00'"),
    ("clock_midnight", "time", "'00:00:00'"),
    ("clock_half", "time", "'12:34:56.5'"),
    ("clock_rounded", "time(3)", "'12:34:56.123456'"),
    ("clock_last", "time", "'24:00:00'"),
    ("clock_zone", "timetz", "'12:34:56.5+02'"),
    ("span", "interval", "'1 year 2 months 3 days 04:05:06.789'"),
    ("span_negative", "interval", "'-1 day -00:00:01'"),
    ("span_zero", "interval", "'0'"),
    ("code", "uuid", "'6F1C0A0E-0000-4000-8000-000000000001'"),
    ("plain_json", "json", r#"'{"b": 1,  "a": [1, null], "b": "é"}'"#),
    ("binary_json", "jsonb", r#"'{"b": 1.10,  "a": [1, null], "b": "é"}'"#),
    ("json_null", "jsonb", "'null'"),
    ("raw", "bytea", r"'\x00ff10'"),
    ("raw_empty", "bytea", r"'\x'"),
    ("mood", "mood", "'very happy'"),
    ("domain_integer", "positive", "7"),
    ("domain_price", "price", "7"),
    ("markup", "xml", "'<a b=\"c\">d</a>'"),
    ("address", "inet", "'192.168.0.1/24'"),
    ("network", "cidr", "'10.0.0.0/8'"),
    ("hardware", "macaddr", "'08:00:2b:01:02:03'"),
    ("hardware_long", "macaddr8", "'08:00:2b:01:02:03:04:05'"),
    ("words", "tsvector", "'a fat cat'"),
    ("search", "tsquery", "'fat & cat'"),
    ("one_bit", "bit(1)", "B'1'"),
    ("bits", "bit(10)", "B'1000000011'"),
    ("more_bits", "varbit(10)", "B'101'"),
    ("cash", "money", "1234.5"),
    ("spot", "point", "'(1,2.5)'"),
    ("area", "box", "'(1,1),(0,0)'"),
    ("numbers", "integer[]", "'{1,NULL,3}'"),
    ("texts", "text[]", r#"'{a,NULL,"b c"}'"#),
    ("flags", "boolean[]", "'{t,f}'"),
    ("days", "date[]", "'{2025-01-19}'"),
    ("prices", "numeric(10,2)[]", "'{1.5,2}'"),
    ("range", "int4range", "'[1,5)'"),
    ("time_range", "tsrange", "'[2025-01-19 00:00:00,2025-01-20 00:00:00)'"),
    ("pairs", "hstore", "'a=>1, b=>NULL'"),
    ("any_case", "citext", "'MiXed'"),
    ("tree", "ltree", "'top.science'"),
    ("log_place", "pg_lsn", "'0/16B3748'"),
    ("regular_class", "regclass", "'pg_class'"),
    ("composite", "complex", "'(1,2)'"),
];

const TYPES: &str = "
    CREATE EXTENSION hstore; CREATE EXTENSION citext; CREATE EXTENSION ltree;
    CREATE TYPE mood AS ENUM ('sad', 'very happy');
    CREATE TYPE complex AS (re integer, im integer);
    CREATE DOMAIN positive AS integer CHECK (VALUE > 0);
    CREATE DOMAIN price AS numeric(10,2);";

/// One table for each way that rows are identified.
const TABLES: &str = "
    CREATE TABLE keyed (
        id bigint PRIMARY KEY, name text NOT NULL, age integer NOT NULL DEFAULT 18, level integer DEFAULT 1,
        seen timestamptz NOT NULL DEFAULT '2025-01-19 00:00:00+00', body text, raw bytea,
        twice integer GENERATED ALWAYS AS (age * 2) STORED);
    ALTER TABLE keyed ALTER body SET STORAGE EXTERNAL, ALTER raw SET STORAGE EXTERNAL;
    CREATE TABLE whole (id bigint PRIMARY KEY, name text NOT NULL, body text);
    ALTER TABLE whole REPLICA IDENTITY FULL, ALTER body SET STORAGE EXTERNAL;
    CREATE TABLE composite (b text, v integer, a integer, PRIMARY KEY (a, b));
    CREATE TABLE loose (a integer, b text);
    ALTER TABLE loose REPLICA IDENTITY FULL;
    CREATE TABLE indexed (id integer PRIMARY KEY, code integer NOT NULL UNIQUE, name text);
    ALTER TABLE indexed REPLICA IDENTITY USING INDEX indexed_code_key;
    CREATE TABLE \"Name$\" (\"the \"\"id\"\"\" integer PRIMARY KEY, \"a.b\" text);";

/// The first commit that Debezium sees; of the ones after it knows which came before.
const FIRST: &str = "the first one";
const LAST: &str = "the last one";

const HISTORY: &[&str] = &[
    // Rows of all types, and none of their values.
    "INSERT INTO kinds (id) VALUES (2)",
    "UPDATE kinds SET yes = false WHERE id = 1",
    "DELETE FROM kinds WHERE id = 1",
    // The identity is the key: values that do not change and are stored apart are not in the stream.
    "INSERT INTO keyed VALUES (1, 'a', 20, NULL, '2025-01-19 12:00:00+00', repeat('x', 3000), decode(repeat('00', 3000), 'hex'))",
    "INSERT INTO keyed (id, name, body) VALUES (2, 'b', '__debezium_unavailable_value')",
    "UPDATE keyed SET name = 'b' WHERE id = 1",
    "UPDATE keyed SET id = 3 WHERE id = 1",
    "UPDATE keyed SET id = 2 WHERE id = 2",
    "DELETE FROM keyed WHERE id = 3",
    // The identity is the whole row.
    "INSERT INTO whole VALUES (1, 'a', repeat('x', 3000)), (2, 'b', NULL)",
    "UPDATE whole SET name = 'b' WHERE id = 1",
    "UPDATE whole SET id = 3, name = 'c' WHERE id = 1",
    "DELETE FROM whole",
    // Keys of two columns, none, those of an index, and names that need quotes.
    "INSERT INTO composite VALUES ('x', 1, 1), ('y', 2, 2)",
    "UPDATE composite SET v = 3 WHERE a = 1",
    "UPDATE composite SET b = 'z' WHERE a = 1",
    "DELETE FROM composite",
    "INSERT INTO loose VALUES (1, 'a'), (1, 'a'), (NULL, NULL)",
    "UPDATE loose SET b = 'b' WHERE a = 1",
    "DELETE FROM loose",
    "INSERT INTO indexed VALUES (1, 10, 'a')",
    "UPDATE indexed SET name = 'b'",
    "UPDATE indexed SET code = 20",
    "DELETE FROM indexed",
    r#"INSERT INTO "Name$" VALUES (1, 'a')"#,
    r#"UPDATE "Name$" SET "the ""id""" = 2"#,
    // Transactions of several tables, with what was rolled back in between.
    "BEGIN; INSERT INTO whole VALUES (1, 'a', NULL); INSERT INTO loose VALUES (1, 'a'); SAVEPOINT s; \
     INSERT INTO loose VALUES (2, 'b'); ROLLBACK TO s; UPDATE whole SET id = 2; \
     UPDATE whole SET name = 'b'; INSERT INTO loose VALUES (3, 'c'); COMMIT",
    "BEGIN; INSERT INTO whole VALUES (9, 'gone', NULL); ROLLBACK",
    "TRUNCATE whole",
    "BEGIN; INSERT INTO whole VALUES (4, 'd'); TRUNCATE whole, composite; INSERT INTO whole VALUES (5, 'e'); COMMIT",
    // Messages.
    "SELECT pg_logical_emit_message(false, 'alone', 'hello')",
    "BEGIN; INSERT INTO loose VALUES (6, 'f'); SELECT pg_logical_emit_message(true, 'within', '\\x00ff'::bytea); \
     INSERT INTO loose VALUES (7, 'g'); COMMIT",
    "SELECT pg_logical_emit_message(true, 'only', '')",
    // Another shape.
    // With a default, or where it was emptied a moment before, the table would be read anew, which Debezium does not do.
    "ALTER TABLE loose ADD c integer",
    "INSERT INTO loose VALUES (8, 'h', 5)",
    "ALTER TABLE loose RENAME c TO d",
    "UPDATE loose SET d = 6 WHERE a = 8",
    "ALTER TABLE loose DROP d",
];

#[test]
#[ignore = "a peer; scripts/test --full runs it"]
fn debeziums_records_are_like_ours() {
    let mut pipeline = Pipeline::new();
    make_tables(&pipeline.postgres);
    configure(&pipeline);
    pipeline.succeed(&["setup"]);
    pipeline.spawn(Role::Reader);
    let debezium = start_debezium(&pipeline);

    let session = pipeline.postgres.session("app");
    let (names, values): (Vec<_>, Vec<_>) = KINDS.iter().map(|(name, _, value)| (*name, *value)).unzip();
    session.sql(&format!("INSERT INTO loose VALUES (0, '{FIRST}')"));
    session.sql(&format!("INSERT INTO kinds (id, {}) VALUES (1, {})", names.join(", "), values.join(", ")));
    HISTORY.iter().for_each(|statements| drop(session.sql(statements)));
    session.sql(&format!("INSERT INTO loose VALUES (9, '{LAST}')"));

    let ours = read(&pipeline.kafka, "millrace.mailbox.1", || pipeline.log("reader"));
    let theirs = read(&pipeline.kafka, "debezium", || debezium.log());
    let subjects = |records: &[Record]| records.iter().map(Record::subject).collect::<Vec<_>>();
    assert_eq!(subjects(&ours), subjects(&theirs), "not the same records");

    let differences: Differences = ours.iter().zip(&theirs).flat_map(|(a, b)| compare(a, b)).collect();
    let known = |path: &str| KNOWN.iter().find(|(_, known)| known.iter().any(|known| covers(known, path)));
    let mut unknown = String::new();
    for (path, (ours, theirs)) in &differences {
        let shown = format!("{path}\n  ours       {ours}\n  Debezium's {theirs}\n");
        match known(path) {
            Some((reason, _)) => println!("{shown}  {reason}"),
            None => unknown += &shown,
        }
    }
    assert!(unknown.is_empty(), "the records are not like Debezium's:\n{unknown}");
    let needed = |known: &&&str| differences.keys().any(|path| covers(known, path));
    let obsolete: Vec<_> = KNOWN.iter().flat_map(|(_, paths)| *paths).filter(|path| !needed(path)).collect();
    assert!(obsolete.is_empty(), "no difference any more: {obsolete:?}");
}

/// Whether what is known of a path holds for another one: the same, or one below it.
fn covers(known: &str, path: &str) -> bool {
    let mut parts = path.split('.');
    known.split('.').all(|known| parts.next().is_some_and(|part| known == "*" || known == part))
}

fn make_tables(postgres: &Postgres) {
    let columns: Vec<String> = KINDS.iter().map(|(name, kind, _)| format!("{name} {kind}")).collect();
    let kinds = format!("CREATE TABLE kinds (id integer PRIMARY KEY, {});", columns.join(", "));
    postgres.sql("app", &[TYPES, &kinds, TABLES].concat());
}

fn configure(pipeline: &Pipeline) {
    let tables = ["kinds", "keyed", "whole", "composite", "loose", "indexed", "Name$"];
    let tables: Vec<String> = tables.iter().map(|table| format!("\"public.{table}\"")).collect();
    let text = format!(
        "pipeline = \"mailbox\"\n[postgres]\nurl = \"{}\"\ntables = [{}]\n[kafka]\nbootstrap = \"{}\"\n",
        pipeline.postgres.url("app"),
        tables.join(", "),
        pipeline.kafka.bootstrap(),
    );
    fs::write(pipeline.directory.path().join("millrace.toml"), text).expect("our directory");
}

/// All of Debezium's records go to one topic of one partition, which keeps their order; the router that does it adds
/// to each key which table it is of.
fn start_debezium(pipeline: &Pipeline) -> Debezium {
    let bootstrap = pipeline.kafka.bootstrap();
    pipeline.kafka.tool(
        "org.apache.kafka.tools.TopicCommand",
        &["--bootstrap-server", &bootstrap, "--create", "--topic", "debezium", "--partitions", "1"],
    );
    let slot = "SELECT pg_create_logical_replication_slot('debezium', 'pgoutput')";
    pipeline.postgres.sql("app", slot);
    let debezium = Debezium::start(
        &pipeline.kafka,
        &pipeline.postgres,
        "app",
        "topic.prefix=mailbox\n\
         slot.name=debezium\n\
         publication.name=millrace_mailbox\n\
         publication.autocreate.mode=disabled\n\
         snapshot.mode=no_data\n\
         schema.exclude.list=millrace\n\
         skipped.operations=none\n\
         tombstones.on.delete=false\n\
         decimal.handling.mode=string\n\
         time.precision.mode=isostring\n\
         interval.handling.mode=string\n\
         binary.handling.mode=base64\n\
         hstore.handling.mode=json\n\
         provide.transaction.metadata=true\n\
         transforms=data,together\n\
         transforms.data.type=org.apache.kafka.connect.transforms.Filter\n\
         transforms.data.predicate=transaction\n\
         predicates=transaction\n\
         predicates.transaction.type=org.apache.kafka.connect.transforms.predicates.TopicNameMatches\n\
         predicates.transaction.pattern=mailbox.transaction\n\
         transforms.together.type=io.debezium.transforms.ByLogicalTableRouter\n\
         transforms.together.topic.regex=.*\n\
         transforms.together.topic.replacement=debezium\n",
    );
    let active = "SELECT active FROM pg_replication_slots WHERE slot_name = 'debezium'";
    soon("Debezium streams", || pipeline.postgres.value("app", active) == "t");
    debezium
}

/// Key and value of a record, as they came.
struct Record {
    key: String,
    value: String,
}

impl Record {
    /// What it is about: a table, a TRUNCATE, or a message by its prefix.
    fn subject(&self) -> String {
        let value: Value = serde_json::from_str(&self.value).expect("the value is JSON");
        let name = match value["op"].as_str() {
            Some("t") => return "truncate".into(),
            Some("m") => &value["message"]["prefix"],
            _ => &value["source"]["table"],
        };
        name.as_str().expect("every record has a subject").to_owned()
    }

    /// Path and token of everything in it that is no object, in the order of the text.
    fn leaves(&self) -> Vec<(String, String)> {
        let mut leaves = Vec::new();
        flatten("key", &self.key, &mut leaves);
        flatten("value", &self.value, &mut leaves);
        leaves
    }
}

/// What a topic holds between the first and the last row of the history, by Kafka's own consumer.
fn read(kafka: &Kafka, topic: &str, log: impl Fn() -> String) -> Vec<Record> {
    let bootstrap = kafka.bootstrap();
    let mut arguments = vec!["--bootstrap-server", &bootstrap, "--topic", topic, "--from-beginning"];
    arguments.extend(["--timeout-ms", "3000", "--isolation-level", "read_committed"]);
    arguments.extend(["--property", "print.key=true"]);
    for _ in 0..ATTEMPTS {
        let printed = kafka.tool("org.apache.kafka.tools.consumer.ConsoleConsumer", &arguments);
        let Some((history, _)) = printed.split_once(LAST) else { continue };
        let (_, history) = history.split_once(FIRST).unwrap_or_default();
        let records = history.lines().filter_map(|line| line.split_once('\t'));
        let whole = records.filter(|(_, value)| value.ends_with('}') && !value.contains(HEARTBEAT));
        return whole.map(|(key, value)| Record { key: key.into(), value: value.into() }).collect();
    }
    panic!("topic {topic} does not hold the whole history:\n{}", tail(&log()));
}

/// Every difference: its path, our token and Debezium's.
type Differences = BTreeMap<String, (String, String)>;

fn compare(ours: &Record, theirs: &Record) -> Differences {
    let subject = ours.subject();
    let (ours, theirs) = (ours.leaves(), theirs.leaves());
    let mut found = Differences::new();
    let mut differs = |path: &str, ours: &str, theirs: &str| {
        found.insert(format!("{subject}.{path}"), (ours.to_owned(), theirs.to_owned()));
    };
    let token = |leaves: &[(String, String)], path: &str| {
        let leaf = leaves.iter().find(|(other, _)| other == path);
        leaf.map_or_else(|| "nothing".to_owned(), |(_, token)| token.clone())
    };
    let paths: BTreeSet<&String> = ours.iter().chain(&theirs).map(|(path, _)| path).collect();
    for path in paths {
        let (ours, theirs) = (token(&ours, path), token(&theirs, path));
        if !same(&ours, &theirs) {
            differs(path, &ours, &theirs);
        }
    }
    // The order of what both have.
    for part in ["key", "value"] {
        let common = |leaves: &[(String, String)], others: &[(String, String)]| {
            let both = |path: &&str| others.iter().any(|(other, _)| other == path);
            let paths = leaves.iter().map(|(path, _)| path.as_str()).filter(|path| path.starts_with(part));
            paths.filter(both).collect::<Vec<_>>().join(" ")
        };
        let (ours, theirs) = (common(&ours, &theirs), common(&theirs, &ours));
        if ours != theirs {
            differs(&format!("{part} order"), &ours, &theirs);
        }
    }
    found
}

/// Numbers must be of one form, strings of one content.
fn same(a: &str, b: &str) -> bool {
    let string = |token: &str| serde_json::from_str::<String>(token).ok();
    let float = |token: &str| token.contains(['.', 'e', 'E']).then(|| token.parse::<f64>().ok()).flatten();
    a == b || (string(a).is_some() && string(a) == string(b)) || (float(a).is_some() && float(a) == float(b))
}

fn flatten(path: &str, token: &str, leaves: &mut Vec<(String, String)>) {
    if !token.starts_with('{') {
        return leaves.push((path.to_owned(), token.to_owned()));
    }
    let Object(fields) =
        serde_json::from_str(token).unwrap_or_else(|e| panic!("{path} is no JSON: {e}: {token}"));
    for (name, value) in fields {
        flatten(&format!("{path}.{name}"), value.get(), leaves);
    }
}

/// An object's fields in the order of the text.
struct Object(Vec<(String, Box<RawValue>)>);

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;

        impl<'de> Visitor<'de> for Fields {
            type Value = Object;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(Object(fields))
            }
        }

        deserializer.deserialize_map(Fields)
    }
}
