//! The pure parts of a row's way, without a server: from the bytes of the WAL to a record, and from a record to what a
//! counter asks of it. `cargo bench -p millrace-bench`.

use std::hint::black_box;

use change::{
    ChangeStamp, Column, Columns, Datum, Encoder, Event, Headers, Kind, Lsn, Op, Position, RecordBatch,
    RelationEncoder, ReplicaIdentity, RowImages, SchemaRef, TableSchema, TupleBuf, header,
};
use criterion::{Criterion, Throughput};
use pgoutput::{Message, decode};

/// Rows of a transaction.
const ROWS: u64 = 1_000;

/// The table of the other measurements; its rows are about 400 bytes.
fn schema() -> TableSchema {
    let columns = [
        ("id", 20),
        ("user_id", 20),
        ("folder", 25),
        ("sender", 25),
        ("subject", 25),
        ("body", 25),
        ("is_read", 16),
        ("sent_at", 1184),
    ];
    let column = |(name, type_oid): (&str, u32)| Column {
        name: name.into(),
        type_oid,
        type_name: format!("type {type_oid}"),
        key: (name == "id").then_some(1),
        collation: None,
        number: None,
        recorded: None,
    };
    TableSchema {
        relation: 16384,
        root: None,
        schema: "public".into(),
        table: "emails".into(),
        identity: ReplicaIdentity::Full,
        columns: columns.into_iter().map(column).collect(),
    }
}

/// An UPDATE as the walsender sends it, with the old row.
fn update() -> Vec<u8> {
    let body = "c4ca4238a0b923820dcc509a6f75849b ".repeat(9);
    let row = |is_read| {
        let texts = ["123456", "3456", "inbox", "sender456@example.org", "subject of the mail number 123456"];
        let rest = [body.as_str(), is_read, "2026-01-19 12:34:56+00"];
        TupleBuf::new(texts.into_iter().chain(rest).map(Datum::Text))
    };
    let (old, new) = (row("f"), row("t"));
    [&b"U"[..], &16384_u32.to_be_bytes(), b"O", old.wire_bytes(), b"N", new.wire_bytes()].concat()
}

fn write(wire: &[u8], encoder: &mut Encoder, relation: &RelationEncoder, batch: &mut RecordBatch) {
    batch.clear();
    for ordinal in 0..ROWS {
        let Ok(Message::Update { old: Some(old), new, .. }) = decode(wire) else { panic!("an update") };
        let stamp = ChangeStamp {
            position: Position { lsn: Lsn(0x16B_3748), kind: Kind::Transaction, ordinal },
            lsn: Lsn(0x16B_3000 + ordinal),
            last_commit_lsn: Lsn(0x16B_2000),
            xid: Some(745),
            commit_time_us: 1_737_290_096_123_456,
            total_order: ordinal + 1,
            collection_order: ordinal + 1,
            now_us: 1_737_290_096_200_000,
        };
        let images =
            RowImages { op: Op::Update, before: Some(old.tuple()), after: Some(new), previous_key: None };
        encoder.row(batch, relation, &stamp, images).expect("the row fits");
    }
}

/// Reads the two columns of a counter out of both rows of each record.
fn read(batch: &RecordBatch, columns: &Columns) {
    let mut values = Vec::with_capacity(2);
    for record in batch.iter() {
        let event = Event::decode(record.value).expect("an envelope");
        for row in [event.before, event.after].into_iter().flatten() {
            columns.read(row, &mut values).expect("a row");
            black_box(&values);
        }
    }
}

fn rows(criterion: &mut Criterion) {
    let (wire, mut encoder) = (update(), Encoder::new("mailbox", "app"));
    let relation = encoder.relation(SchemaRef { relation: 16384, version: 1 }, &schema());
    let mut batch = RecordBatch::default();
    write(&wire, &mut encoder, &relation, &mut batch);

    let mut group = criterion.benchmark_group("row");
    group.throughput(Throughput::Elements(ROWS));
    group.bench_function("WAL to record", |b| b.iter(|| write(&wire, &mut encoder, &relation, &mut batch)));
    let columns = Columns::new(["user_id", "is_read"].map(str::to_owned));
    group.bench_function("record to a counter's columns", |b| b.iter(|| read(black_box(&batch), &columns)));
    group.bench_function("headers", |b| {
        let mut scratch = Vec::new();
        b.iter(|| {
            for record in batch.iter() {
                record.headers(&mut scratch, |name, value| {
                    black_box((name, value));
                });
            }
        });
    });
    group.bench_function("headers, read", |b| {
        let value = b"0/16B3748:t:517 xid=745 schema=16384/1";
        b.iter(|| {
            for _ in 0..ROWS {
                let mut headers = Headers::default();
                headers.read(header::POSITION, black_box(value)).expect("our own");
                black_box(headers);
            }
        });
    });
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    rows(&mut criterion);
    criterion.final_summary();
}
