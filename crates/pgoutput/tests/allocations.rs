//! From the bytes of the WAL to records of the log, and back to the values that a sink asks for, nothing is allocated for
//! a row: every buffer is reused. A single allocation among these would be one for each row of every user.

use change::{
    ChangeStamp, Column, Columns, Datum, Encoder, Event, Headers, Kind, Lsn, Op, Position, RecordBatch,
    RelationEncoder, ReplicaIdentity, RowImages, SchemaRef, TableSchema, TupleBuf,
};
use pgoutput::{Message, decode};

const ROWS: u64 = 1_000;

fn schema() -> TableSchema {
    let column = |(name, type_oid): (&str, u32)| Column {
        name: name.into(),
        type_oid,
        type_name: format!("type {type_oid}"),
        key: (name == "id").then_some(1),
        collation: None,
        number: None,
        recorded: None,
    };
    let columns =
        [("id", 20), ("user_id", 20), ("subject", 25), ("is_read", 16), ("size", 1700), ("sent_at", 1184)];
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
    let row = |is_read| {
        let sent_at = Datum::Text("2026-01-19 12:34:56+00");
        let values = ["1", "42", "a subject with a \"quote\" and a\nline"].map(Datum::Text);
        TupleBuf::new(values.into_iter().chain([Datum::Text(is_read), Datum::Null, sent_at]))
    };
    let (old, new) = (row("f"), row("t"));
    [&b"U"[..], &16384_u32.to_be_bytes(), b"O", old.wire_bytes(), b"N", new.wire_bytes()].concat()
}

fn write(wire: &[u8], encoder: &mut Encoder, relation: &RelationEncoder, batch: &mut RecordBatch) {
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

/// Reads what a counter by user would; gives how many rows have a user.
fn read(batch: &RecordBatch, columns: &Columns, scratch: &mut Vec<u8>) -> usize {
    let mut values = Vec::with_capacity(2);
    let mut users = 0;
    for record in batch.iter() {
        let mut positions = 0;
        record.headers(scratch, |name, value| {
            let mut headers = Headers::default();
            headers.read(name, value).expect("our own");
            positions += usize::from(headers.position.is_some());
        });
        assert_eq!(positions, 1);
        let event = Event::decode(record.value).expect("an envelope");
        for row in [event.before, event.after].into_iter().flatten() {
            columns.read(row, &mut values).expect("a row");
            users += usize::from(values[0].postgres_text(change::Encoding::Integer).as_deref() == Some("42"));
        }
    }
    users
}

#[test]
fn a_row_is_written_and_read_without_an_allocation() {
    let (wire, mut encoder) = (update(), Encoder::new("mailbox", "app"));
    let relation = encoder.relation(SchemaRef { relation: 16384, version: 1 }, &schema());
    let mut batch = RecordBatch::default();
    let mut scratch = Vec::with_capacity(64);
    // The buffers take their size.
    write(&wire, &mut encoder, &relation, &mut batch);
    batch.clear();

    let writing = allocation_counter::measure(|| write(&wire, &mut encoder, &relation, &mut batch));
    assert_eq!(batch.len() as u64, ROWS);
    assert_eq!(writing.count_total, 0, "allocations for {ROWS} rows written");
    let mut users = 0;
    let columns = Columns::new(["user_id", "is_read"].map(str::to_owned));
    let reading = allocation_counter::measure(|| users = read(&batch, &columns, &mut scratch));
    assert_eq!(users as u64, 2 * ROWS);
    assert_eq!(reading.count_total, 1, "allocations for {ROWS} rows read: the list of values, once");
}
