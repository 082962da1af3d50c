//! The tables of the test: columns of every supported type, rows with everything that could go wrong.

use change::{
    ChangeStamp, Collation, Column, Datum, Encoder, Kind, Lsn, Op, Position, RecordBatch, ReplicaIdentity,
    SchemaRef, TableSchema, TupleBuf,
};
use rand::prelude::*;
use testkit::services::Session;

use Family as K;

/// Rows of a table.
pub(crate) const ROWS: usize = 150;

/// A column of the test's tables: name, definition, object id of its type, values that it may hold.
pub(crate) struct Spec {
    pub(crate) name: &'static str,
    pub(crate) definition: &'static str,
    pub(crate) type_oid: u32,
    pub(crate) kind: Family,
}

/// Columns of one kind compare with each other and with the same literals.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Family {
    Boolean,
    Small,
    Integer,
    Big,
    Numeric,
    Real,
    Double,
    Text,
    Collated,
    Char,
    Uuid,
    Date,
    Timestamp,
    TimestampTz,
    Json,
}

const fn spec(name: &'static str, definition: &'static str, type_oid: u32, kind: Family) -> Spec {
    Spec { name, definition, type_oid, kind }
}

pub(crate) const SPECS: &[Spec] = &[
    spec("id", "bigint primary key", 20, K::Big),
    spec("b", "boolean", 16, K::Boolean),
    spec("b2", "boolean", 16, K::Boolean),
    spec("s", "smallint", 21, K::Small),
    spec("i", "integer", 23, K::Integer),
    spec("i2", "integer", 23, K::Integer),
    spec("l", "bigint", 20, K::Big),
    spec("n", "numeric", 1700, K::Numeric),
    spec("n2", "numeric(12,3)", 1700, K::Numeric),
    spec("r", "real", 700, K::Real),
    spec("d", "double precision", 701, K::Double),
    spec("t", "text COLLATE \"C\"", 25, K::Text),
    spec("Odd \"Name", "text COLLATE \"C\"", 25, K::Text),
    spec("v", "varchar(30) COLLATE \"C\"", 1043, K::Text),
    spec("u", "text COLLATE \"und-x-icu\"", 25, K::Collated),
    spec("c", "char(6) COLLATE \"C\"", 1042, K::Char),
    spec("c2", "char(9) COLLATE \"C\"", 1042, K::Char),
    spec("w", "uuid", 2950, K::Uuid),
    spec("day", "date", 1082, K::Date),
    spec("day2", "date", 1082, K::Date),
    spec("ts", "timestamp", 1114, K::Timestamp),
    spec("tz", "timestamptz", 1184, K::TimestampTz),
    spec("tz2", "timestamptz", 1184, K::TimestampTz),
    spec("j", "jsonb", 3802, K::Json),
];

/// Texts of values, few enough that columns and literals meet.
pub(crate) fn pool(kind: Family) -> &'static [&'static str] {
    const WORDS: &[&str] = &[
        "",
        "a",
        "b",
        "ab",
        "a b",
        "a:b",
        "a\\b",
        "\\",
        "\\N",
        "it's",
        "\"q\"",
        "50%",
        "a_b",
        "é",
        "éa",
        "日本",
        "z ",
        " z",
        "  ",
        "A",
        "Ab",
        "%",
        "_",
        "a\nb",
        "\u{1F600}",
        "null",
    ];
    match kind {
        K::Boolean => &["t", "f"],
        K::Small => &["-32768", "-5", "-1", "0", "1", "2", "7", "32767"],
        K::Integer => {
            &["-2147483648", "-32769", "-5", "-1", "0", "1", "2", "7", "32767", "40000", "2147483647"]
        }
        K::Big => &[
            "-9223372036854775808",
            "-5",
            "-1",
            "0",
            "1",
            "2",
            "7",
            "2147483648",
            "9007199254740993",
            "9223372036854775807",
        ],
        K::Numeric => &[
            "0",
            "0.000",
            "1",
            "1.0",
            "1.00",
            "-1",
            "-1.50",
            "1.5",
            "7",
            "99.999",
            "2",
            "0.1",
            "100",
            "100000000",
            "-0.001",
            "12.345",
        ],
        K::Real => {
            &["0", "-0", "1", "1.5", "0.1", "-1", "7", "1e20", "1e-20", "NaN", "Infinity", "-Infinity"]
        }
        K::Double => &[
            "0",
            "-0",
            "1",
            "1.5",
            "0.1",
            "-1",
            "7",
            "1e300",
            "1e-300",
            "0.10000000149011612",
            "NaN",
            "Infinity",
            "-Infinity",
        ],
        K::Text | K::Collated => WORDS,
        K::Char => {
            &["", "a", "b", "ab", "a b", "a:b", "a\\b", "é", "日本", "50%", "a_b", "A", " z", "abcdef"]
        }
        K::Uuid => &[
            "00000000-0000-0000-0000-000000000000",
            "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11",
            "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A12",
            "ffffffff-ffff-ffff-ffff-ffffffffffff",
        ],
        K::Date => &[
            "2024-02-29",
            "2024-03-01",
            "1999-12-31",
            "2000-01-01",
            "0044-03-15 BC",
            "infinity",
            "-infinity",
            "12024-01-01",
            "0001-01-01",
        ],
        K::Timestamp => &[
            "2024-02-29 00:00:00",
            "2024-02-29 12:34:56.5",
            "2024-02-29 12:34:56.500001",
            "1999-12-31 23:59:59.999999",
            "2000-01-01 00:00:00",
            "0044-03-15 10:00:00 BC",
            "infinity",
            "-infinity",
            "2024-02-29",
            "2024-03-01T10:00",
            "294276-12-30 00:00:00",
        ],
        K::TimestampTz => &[
            "2024-02-29 00:00:00Z",
            "2024-02-29 12:34:56.5+00",
            "2024-02-29 14:34:56.5+02",
            "1999-12-31 23:59:59-03:30",
            "2000-01-01T00:00:00Z",
            "0044-03-15 10:00:00+00 BC",
            "infinity",
            "-infinity",
            "2024-03-01 00:00+14",
        ],
        // No JSON null: jsonb_populate_recordset takes it for NULL.
        K::Json => &["1", "{}", "\"x\""],
    }
}

/// What only a column without a length takes.
pub(crate) const WIDE_NUMERICS: &[&str] = &[
    "NaN",
    "Infinity",
    "-Infinity",
    "123456789012345678901234567890.5",
    "1e-30",
    "9223372036854775808",
    "1e40",
];

pub(crate) fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

pub(crate) fn ident(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

pub(crate) fn schema() -> TableSchema {
    let column = |spec: &Spec| {
        let collation = match spec.kind {
            K::Text | K::Char => Some(("C", true)),
            K::Collated => Some(("und-x-icu", false)),
            _ => None,
        };
        Column {
            name: spec.name.to_owned(),
            type_oid: spec.type_oid,
            type_name: spec.definition.to_owned(),
            key: (spec.name == "id").then_some(1),
            number: None,
            recorded: None,
            collation: collation.map(|(name, bytewise)| Collation {
                name: name.to_owned(),
                deterministic: true,
                bytewise,
            }),
        }
    };
    TableSchema {
        relation: 16_384,
        root: None,
        schema: "public".to_owned(),
        table: "mails".to_owned(),
        identity: ReplicaIdentity::Full,
        columns: SPECS.iter().map(column).collect(),
    }
}

pub(crate) fn create_table(session: &Session, rng: &mut StdRng) {
    let columns: Vec<_> = SPECS.iter().map(|s| format!("{} {}", ident(s.name), s.definition)).collect();
    session.sql(&format!("DROP TABLE IF EXISTS mails; CREATE TABLE mails ({})", columns.join(", ")));
    let nulls = rng.random_range(0.02..0.4);
    let rows: Vec<_> = (0..ROWS)
        .map(|id| {
            let value = |rng: &mut StdRng, spec: &Spec| match spec.name {
                "id" => id.to_string(),
                _ if rng.random_bool(nulls) => "NULL".to_owned(),
                "n" if rng.random_bool(0.2) => quote(WIDE_NUMERICS.choose(rng).expect("there is one")),
                _ => quote(pool(spec.kind).choose(rng).expect("there is one")),
            };
            let values: Vec<_> = SPECS.iter().map(|spec| value(rng, spec)).collect();
            format!("({})", values.join(", "))
        })
        .collect();
    session.sql(&format!("INSERT INTO mails VALUES {}", rows.join(", ")));
}

/// The table's rows as records of the log.
pub(crate) fn log_of(session: &Session, schema: &TableSchema) -> RecordBatch {
    let mut encoder = Encoder::new("mailbox", "app");
    let relation = encoder.relation(SchemaRef { relation: schema.relation, version: 1 }, schema);
    let lsn = Lsn(0x1000);
    let stamp = ChangeStamp {
        position: Position { lsn, kind: Kind::Transaction, ordinal: 0 },
        lsn,
        last_commit_lsn: lsn,
        xid: Some(7),
        commit_time_us: 0,
        total_order: 1,
        collection_order: 1,
        now_us: 0,
    };
    let mut batch = RecordBatch::default();
    for row in session.sql(&format!("SELECT * FROM {}", schema.table)) {
        let tuple = TupleBuf::new(row.iter().map(|value| value.as_deref().map_or(Datum::Null, Datum::Text)));
        let after = Some(tuple.as_tuple());
        let images = change::RowImages { op: Op::Create, before: None, after, previous_key: None };
        encoder.row(&mut batch, &relation, &stamp, images).expect("the row fits its table");
    }
    batch
}
