//! The record format, byte for byte. A change here is a change of the contract with everybody who reads the log.
//! `UPDATE_EXPECT=1 cargo test -p millrace-change --test golden` rewrites the file.

use std::fmt::Write as _;

use change::{
    ChangeStamp, Column, Datum, Encoder, Event, Field, Kind, Lsn, Op, Position, RecordBatch, ReplicaIdentity,
    RowImages, SchemaRef, TableSchema, TupleBuf, fields,
};
use expect_test::expect_file;

fn schema(identity: ReplicaIdentity) -> TableSchema {
    let column = |(name, type_oid, type_name): (&str, u32, &str)| Column {
        name: name.into(),
        type_oid,
        type_name: type_name.into(),
        key: (name == "id").then_some(1),
        collation: None,
        number: None,
        recorded: None,
    };
    let columns = [
        ("id", 20, "bigint"),
        ("ok", 16, "boolean"),
        ("ratio", 701, "double precision"),
        ("price", 1700, "numeric(10,2)"),
        ("note \"é\"", 25, "text"),
        ("at", 1114, "timestamp without time zone"),
        ("seen", 1184, "timestamp with time zone"),
        ("day", 1082, "date"),
        ("code", 2950, "uuid"),
        ("extra", 3802, "jsonb"),
        ("raw", 17, "bytea"),
    ];
    let columns = columns.into_iter().map(column).collect();
    TableSchema {
        relation: 16384,
        root: None,
        schema: "public".into(),
        table: "things".into(),
        identity,
        columns,
    }
}

const ROW: [Datum<'static>; 11] = [
    Datum::Text("1"),
    Datum::Text("t"),
    Datum::Text("1.5e-07"),
    Datum::Text("12.50"),
    Datum::Text("a \"quote\", a \\ and a\nline"),
    Datum::Text("2025-01-19 12:34:56.123456"),
    Datum::Text("2025-01-19 12:34:56+00"),
    Datum::Text("2025-01-19"),
    Datum::Text("6f1c0a0e-0000-4000-8000-000000000001"),
    Datum::Text("{\"a\": [1, null]}"),
    Datum::Text("\\x00ff10"),
];

fn changed(values: &[(usize, Datum<'static>)]) -> TupleBuf {
    let mut row = ROW;
    values.iter().for_each(|(place, value)| row[*place] = *value);
    TupleBuf::new(row)
}

fn stamp(ordinal: u64) -> ChangeStamp {
    ChangeStamp {
        position: Position { lsn: Lsn(0x16B_3748), kind: Kind::Transaction, ordinal },
        lsn: Lsn(0x16B_3000 + ordinal),
        last_commit_lsn: Lsn(0x16B_2000),
        xid: Some(745),
        commit_time_us: 1_737_290_096_123_456,
        total_order: ordinal + 1,
        collection_order: ordinal + 1,
        now_us: 1_737_290_096_200_000,
    }
}

/// Every kind of record, as one batch.
fn records() -> RecordBatch {
    let mut encoder = Encoder::new("mailbox", "app");
    let full = encoder.relation(SchemaRef { relation: 16384, version: 1 }, &schema(ReplicaIdentity::Full));
    let keyed =
        encoder.relation(SchemaRef { relation: 16384, version: 2 }, &schema(ReplicaIdentity::Default));
    let mut batch = RecordBatch::default();
    let (row, nulls) =
        (TupleBuf::new(ROW), changed(&[(1, Datum::Null), (4, Datum::Null), (10, Datum::Null)]));
    let holes = changed(&[(4, Datum::Unchanged), (10, Datum::Unchanged)]);
    let moved = changed(&[(0, Datum::Text("2")), (4, Datum::Unchanged)]);
    let mut key = [Datum::Null; 11];
    key[0] = Datum::Text("1");
    let key = TupleBuf::new(key);
    let (row, nulls, holes) = (Some(row.as_tuple()), Some(nulls.as_tuple()), Some(holes.as_tuple()));
    let (moved, key) = (Some(moved.as_tuple()), Some(key.as_tuple()));
    let cases = [
        (&full, Op::Create, None, row, None),
        (&full, Op::Update, row, nulls, None),
        (&full, Op::Update, row, holes, None),
        (&keyed, Op::Update, None, holes, None),
        (&keyed, Op::Delete, key, None, None),
        (&keyed, Op::Create, None, moved, key),
    ];
    for (n, (relation, op, before, after, previous_key)) in cases.into_iter().enumerate() {
        let images = RowImages { op, before, after, previous_key };
        encoder.row(&mut batch, relation, &stamp(n as u64), images).expect("the row fits");
    }
    encoder.truncate(&mut batch, &full, &stamp(6));
    encoder.message(&mut batch, &ChangeStamp { xid: None, ..stamp(7) }, "app", b"hello");
    batch.mark_commit(Lsn(0x16B_3780));
    batch
}

#[test]
fn records_are_as_documented() {
    let mut text = String::new();
    for record in records().iter() {
        let (key, value) = (std::str::from_utf8(record.key), std::str::from_utf8(record.value));
        writeln!(text, "key    {}\nvalue  {}", key.expect("JSON"), value.expect("JSON")).expect("a String");
        record.headers(&mut Vec::new(), |name, value| {
            writeln!(text, "header {name}: {}", String::from_utf8_lossy(value)).expect("a String");
        });
        serde_json::from_slice::<serde_json::Value>(record.value).expect("the value is JSON");
        text.push('\n');
    }
    expect_file!["golden/records.txt"].assert_eq(&text);
}

#[test]
fn rows_come_back_as_postgres_printed_them() {
    let schema = schema(ReplicaIdentity::Full);
    let batch = records();
    let event = Event::decode(batch.iter().next().expect("a record").value).expect("an envelope");
    let names: Vec<&str> = schema.columns.iter().map(|column| column.name.as_str()).collect();
    let mut row = Vec::new();
    fields(event.after.expect("a new row"), &names, &mut row).expect("a row");
    for ((field, column), datum) in row.iter().zip(&schema.columns).zip(ROW) {
        let Datum::Text(printed) = datum else { panic!("every value is a text") };
        let back = field.postgres_text(change::Encoding::of(column.type_oid));
        assert_eq!(back.as_deref(), Some(printed), "{}", column.name);
    }
    let mut missing = Vec::new();
    fields(event.after.expect("a new row"), &["none"], &mut missing).expect("a row");
    assert_eq!(missing, [Field::Missing]);
}
