//! Debezium's JSON envelope, written from rows in one pass; `event.rs` reads it.
//!
//! The form is that of Debezium's Postgres connector with `decimal.handling.mode=string`,
//! `time.precision.mode=isostring`, `interval.handling.mode=string`, `binary.handling.mode=base64`,
//! `hstore.handling.mode=json`, schemas off and `provide.transaction.metadata` on.
//! <https://debezium.io/documentation/reference/stable/connectors/postgresql.html>

use base64::Engine;

use crate::oversize::Oversize;
use crate::record::{Parts, RecordBatch, RecordMeta};
use crate::schema::{Encoding, ReplicaIdentity, SchemaRef, TableSchema};
use crate::tuple::RawDatum;
use crate::{Lsn, Position, Tuple, json};

/// What stands in `after` for a value that is not in the stream. The header `millrace.unchanged` says which
/// columns really have it, so that a literal of the same text is never mistaken.
pub const UNAVAILABLE: &str = "__debezium_unavailable_value";

/// Kind of a change: the envelope's `op`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    /// `c`: a row was born.
    Create,
    /// `u`: a row changed, its key did not.
    Update,
    /// `d`: a row died.
    Delete,
    /// `r`: a row was read by a snapshot.
    Read,
    /// `t`: the table was truncated.
    Truncate,
    /// `m`: a logical message.
    Message,
}

impl Op {
    fn code(self) -> &'static [u8] {
        match self {
            Op::Create => b"c",
            Op::Update => b"u",
            Op::Delete => b"d",
            Op::Read => b"r",
            Op::Truncate => b"t",
            Op::Message => b"m",
        }
    }

    /// Of the envelope's `op`, a JSON string.
    pub(crate) fn read(token: &str) -> Result<Self, EnvelopeError> {
        let all = [Op::Create, Op::Update, Op::Delete, Op::Read, Op::Truncate, Op::Message];
        let code = token.trim_matches('"').as_bytes();
        let known = all.into_iter().find(|op| op.code() == code);
        known.ok_or_else(|| EnvelopeError::NotAnEnvelope(format!("its `op` is {token}")))
    }
}

/// A row that does not fit its table.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum EnvelopeError {
    /// The row and the relation disagree on the number of columns.
    #[error("table {table} has {expected} columns but the row has {found}")]
    ColumnCount {
        /// `schema.table`.
        table: String,
        /// Columns of the relation.
        expected: usize,
        /// Columns of the row.
        found: usize,
    },
    /// The value is not an envelope.
    #[error("the record's value is not Debezium's envelope: {0}")]
    NotAnEnvelope(String),
}

/// What is said of a change beside its row.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ChangeStamp {
    /// Where it stands in the log's order.
    pub position: Position,
    /// The change's own LSN in the WAL.
    pub lsn: Lsn,
    /// End LSN of the transaction before this one, or LSN of the non-transactional message since then.
    pub last_commit_lsn: Lsn,
    /// The source transaction; `None` for a non-transactional message.
    pub xid: Option<u32>,
    /// Commit time at the source, microseconds since the epoch.
    pub commit_time_us: i64,
    /// Number of the event in its transaction, from 1.
    pub total_order: u64,
    /// Number of the event among those of its table in its transaction, from 1; messages count as a table.
    pub collection_order: u64,
    /// Now, microseconds since the epoch.
    pub now_us: i64,
}

/// What happened to a row, with what is known of it before and after.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RowImages<'a> {
    /// What happened.
    pub op: Op,
    /// What Postgres sent of the old row: all of it, its key, or nothing.
    pub before: Option<Tuple<'a>>,
    /// The new row.
    pub after: Option<Tuple<'a>>,
    /// The old row when this is the `c` half of a changed key.
    pub previous_key: Option<Tuple<'a>>,
}

/// Writes records of one pipeline.
#[derive(Clone, Debug)]
pub struct Encoder {
    pipeline: String,
    /// `"source":{…"ts_ms":`
    source_head: Vec<u8>,
    /// `,"db":…,"sequence":"[\"`
    source_middle: Vec<u8>,
    common: Common,
    oversize: Oversize,
}

/// What a record has in common with those before it, as it was last written.
#[derive(Clone, Debug, Default)]
struct Common {
    /// `"source":{…,"sequence":"[\"24023128\",\"`, of a commit time, of rows read or not, after a commit.
    source: Last<(i64, bool, Lsn)>,
    /// The times of a commit.
    commit: Last<i64>,
    /// `{"id":"745:24023128","total_order":`, of a transaction.
    transaction: Last<(u32, Lsn)>,
    /// The times of now.
    now: Last<i64>,
}

/// Bytes, and what they were written of.
#[derive(Clone, Debug)]
struct Last<T> {
    of: Option<T>,
    bytes: Vec<u8>,
}

impl<T> Default for Last<T> {
    fn default() -> Self {
        Last { of: None, bytes: Vec::new() }
    }
}

impl<T: PartialEq> Last<T> {
    fn append_to(&mut self, out: &mut Vec<u8>, of: T, write: impl FnOnce(&mut Vec<u8>)) {
        if self.of.as_ref() != Some(&of) {
            self.bytes.clear();
            write(&mut self.bytes);
            self.of = Some(of);
        }
        out.extend_from_slice(&self.bytes);
    }
}

/// The pieces of a table's records that never change, made once per version of the table.
#[derive(Clone, Debug)]
pub struct RelationEncoder {
    schema_ref: SchemaRef,
    table: String,
    pub(crate) full_identity: bool,
    pub(crate) columns: Vec<ColumnPieces>,
    /// Places of the key's columns, in the key's order.
    pub(crate) key: Vec<usize>,
    /// `"__dbz__physicalTableIdentifier":"mailbox.public.emails"}`
    key_tail: Vec<u8>,
    /// `,"schema":"public","table":"emails","txId":`
    source_tail: Vec<u8>,
    /// Bytes of a record from which on columns are left out; `None`: never.
    pub(crate) record_max: Option<usize>,
}

#[derive(Clone, Debug)]
pub(crate) struct ColumnPieces {
    /// `"name":`
    pub(crate) name: Vec<u8>,
    pub(crate) encoding: Encoding,
}

impl Encoder {
    /// For a pipeline and the database it reads.
    pub fn new(pipeline: &str, database: &str) -> Self {
        let mut source_head = b"\"source\":{\"version\":".to_vec();
        json::string(&mut source_head, env!("CARGO_PKG_VERSION"));
        source_head.extend_from_slice(b",\"connector\":\"postgresql\",\"name\":");
        json::string(&mut source_head, pipeline);
        source_head.extend_from_slice(b",\"ts_ms\":");
        let mut source_middle = b",\"db\":".to_vec();
        json::string(&mut source_middle, database);
        source_middle.extend_from_slice(b",\"sequence\":\"[\\\"");
        let (common, oversize) = (Common::default(), Oversize::default());
        Encoder { pipeline: pipeline.to_owned(), source_head, source_middle, common, oversize }
    }

    /// Leaves columns out of some tables' records that would be too large.
    #[must_use]
    pub fn omitting(self, oversize: Oversize) -> Self {
        Encoder { oversize, ..self }
    }

    /// The fixed pieces of a table's records.
    pub fn relation(&self, schema_ref: SchemaRef, schema: &TableSchema) -> RelationEncoder {
        let columns = schema.columns.iter().map(|column| {
            let mut name = Vec::new();
            json::string(&mut name, &column.name);
            name.push(b':');
            ColumnPieces { name, encoding: Encoding::of_column(column) }
        });
        RelationEncoder {
            schema_ref,
            table: schema.full_name(),
            full_identity: schema.identity == ReplicaIdentity::Full,
            columns: columns.collect(),
            key: schema.key_places(),
            key_tail: self.key_tail(&format!("{}.{}", schema.schema, schema.table)),
            source_tail: source_tail(&schema.schema, &schema.table),
            record_max: self.oversize.record_max(&schema.schema, &schema.table),
        }
    }

    /// Appends the record of a row's change.
    pub fn row(
        &mut self,
        batch: &mut RecordBatch,
        relation: &RelationEncoder,
        stamp: &ChangeStamp,
        images: RowImages<'_>,
    ) -> Result<(), EnvelopeError> {
        let RowImages { op, before, after, previous_key } = images;
        for tuple in [before, after, previous_key].into_iter().flatten() {
            relation.check(tuple)?;
        }
        let old = before.or(previous_key);
        let omitted = relation.to_omit(&images);
        let start = batch.bytes.len();
        let out = &mut batch.bytes;
        match (after, old) {
            (Some(tuple), fallback) => relation.key(out, tuple, fallback),
            (None, Some(tuple)) => relation.key(out, tuple, None),
            (None, None) => relation.key_tail_only(out),
        }
        let key_end = out.len();

        let mut unchanged = Vec::new();
        out.extend_from_slice(b"{\"before\":");
        relation.image(out, before, None, &omitted, &mut Vec::new());
        out.extend_from_slice(b",\"after\":");
        relation.image(out, after, relation.fallback(&images), &omitted, &mut unchanged);
        out.push(b',');
        self.source(out, &relation.source_tail, stamp, op);
        out.push(b',');
        op_code(out, op);
        self.common.now.append_to(out, stamp.now_us, |out| {
            time_ms(out, stamp.now_us);
            times(out, stamp.now_us);
        });
        out.push(b'}');
        let value_end = out.len();

        if !unchanged.is_empty() {
            relation.names(out, &unchanged);
        }
        let unchanged_end = out.len();
        if !omitted.is_empty() {
            relation.names(out, &omitted);
        }
        let omitted_end = out.len();
        if let Some(tuple) = previous_key {
            relation.key(out, tuple, None);
        }
        let meta = meta(stamp, Some(relation.schema_ref));
        batch.push(Parts { start, key_end, value_end, unchanged_end, omitted_end }, meta);
        Ok(())
    }

    /// Appends the record of a TRUNCATE of one table.
    pub fn truncate(&mut self, batch: &mut RecordBatch, relation: &RelationEncoder, stamp: &ChangeStamp) {
        // Without a row nothing can fail to fit.
        let images = RowImages { op: Op::Truncate, before: None, after: None, previous_key: None };
        let _ = self.row(batch, relation, stamp, images);
    }

    /// Appends the record of a logical message.
    pub fn message(&mut self, batch: &mut RecordBatch, stamp: &ChangeStamp, prefix: &str, content: &[u8]) {
        self.message_of(batch, None, stamp, prefix, content);
    }

    /// Appends the record of a message that the stores of a table are to see.
    pub fn table_message(
        &mut self,
        batch: &mut RecordBatch,
        relation: &RelationEncoder,
        stamp: &ChangeStamp,
        prefix: &str,
    ) {
        self.message_of(batch, Some(relation.schema_ref), stamp, prefix, &[]);
    }

    fn message_of(
        &mut self,
        batch: &mut RecordBatch,
        schema: Option<SchemaRef>,
        stamp: &ChangeStamp,
        prefix: &str,
        content: &[u8],
    ) {
        let start = batch.bytes.len();
        let out = &mut batch.bytes;
        out.extend_from_slice(b"{\"prefix\":");
        json::string(out, prefix);
        out.push(b',');
        out.extend_from_slice(&self.key_tail("message"));
        let key_end = out.len();
        out.push(b'{');
        op_code(out, Op::Message);
        time_ms(out, stamp.now_us);
        out.push(b',');
        self.source(out, &source_tail("", ""), stamp, Op::Message);
        out.extend_from_slice(b",\"message\":{\"prefix\":");
        json::string(out, prefix);
        out.extend_from_slice(b",\"content\":");
        json::string(out, base64::engine::general_purpose::STANDARD.encode(content));
        out.extend_from_slice(b"}}");
        let value_end = out.len();
        let (unchanged_end, omitted_end) = (value_end, value_end);
        batch.push(Parts { start, key_end, value_end, unchanged_end, omitted_end }, meta(stamp, schema));
    }

    /// What a table's keys end with. Debezium puts the name of its topic there, in which some characters may not be.
    fn key_tail(&self, table: &str) -> Vec<u8> {
        let allowed = |c: char| if c.is_ascii_alphanumeric() || ".-".contains(c) { c } else { '_' };
        let topic: String = format!("{}.{table}", self.pipeline).chars().map(allowed).collect();
        let mut tail = b"\"__dbz__physicalTableIdentifier\":".to_vec();
        json::string(&mut tail, &topic);
        tail.push(b'}');
        tail
    }

    /// `"source":{…},"transaction":{…}`
    fn source(&mut self, out: &mut Vec<u8>, source_tail: &[u8], stamp: &ChangeStamp, op: Op) {
        let Encoder { source_head, source_middle, common, .. } = self;
        let (commit_us, read) = (stamp.commit_time_us, op == Op::Read);
        common.source.append_to(out, (commit_us, read, stamp.last_commit_lsn), |out| {
            out.extend_from_slice(source_head);
            json::number(out, commit_us.div_euclid(1000));
            // Rows are read in chunks between streamed transactions, which is what Debezium calls incremental.
            let snapshot = if read { "incremental" } else { "false" };
            out.extend_from_slice(b",\"snapshot\":");
            json::string(out, snapshot);
            out.extend_from_slice(source_middle);
            json::number(out, stamp.last_commit_lsn.0);
            out.extend_from_slice(b"\\\",\\\"");
        });
        json::number(out, stamp.lsn.0);
        out.extend_from_slice(b"\\\"]\"");
        common.commit.append_to(out, commit_us, |out| times(out, commit_us));
        out.extend_from_slice(source_tail);
        match stamp.xid {
            Some(xid) => json::number(out, xid),
            None => out.extend_from_slice(b"null"),
        }
        out.extend_from_slice(b",\"lsn\":");
        json::number(out, stamp.lsn.0);
        out.extend_from_slice(b",\"xmin\":null},\"transaction\":");
        let Some(xid) = stamp.xid else { return out.extend_from_slice(b"null") };
        let lsn = stamp.position.lsn;
        common.transaction.append_to(out, (xid, lsn), |out| {
            out.extend_from_slice(b"{\"id\":\"");
            json::number(out, xid);
            out.push(b':');
            json::number(out, lsn.0);
            out.extend_from_slice(b"\",\"total_order\":");
        });
        json::number(out, stamp.total_order);
        out.extend_from_slice(b",\"data_collection_order\":");
        json::number(out, stamp.collection_order);
        out.push(b'}');
    }
}

/// `"op":"c"`
fn op_code(out: &mut Vec<u8>, op: Op) {
    out.extend_from_slice(b"\"op\":\"");
    out.extend_from_slice(op.code());
    out.push(b'"');
}

/// `,"ts_ms":…`
fn time_ms(out: &mut Vec<u8>, us: i64) {
    out.extend_from_slice(b",\"ts_ms\":");
    json::number(out, us.div_euclid(1000));
}

/// `,"ts_us":…,"ts_ns":…`
fn times(out: &mut Vec<u8>, us: i64) {
    out.extend_from_slice(b",\"ts_us\":");
    json::number(out, us);
    out.extend_from_slice(b",\"ts_ns\":");
    json::number(out, us.saturating_mul(1000));
}

fn source_tail(schema: &str, table: &str) -> Vec<u8> {
    let mut tail = b",\"schema\":".to_vec();
    json::string(&mut tail, schema);
    tail.extend_from_slice(b",\"table\":");
    json::string(&mut tail, table);
    tail.extend_from_slice(b",\"txId\":");
    tail
}

fn meta(stamp: &ChangeStamp, schema: Option<SchemaRef>) -> RecordMeta {
    let timestamp_ms = stamp.commit_time_us.div_euclid(1000);
    RecordMeta { position: stamp.position, xid: stamp.xid, schema, timestamp_ms, commit: None, anew: false }
}

impl RelationEncoder {
    /// Which version of the table this writes.
    pub fn schema_ref(&self) -> SchemaRef {
        self.schema_ref
    }

    /// Whether the table's rows have a key.
    pub fn keyed(&self) -> bool {
        !self.key.is_empty()
    }

    /// The key of a row, values that were not sent coming from the old row; `None` where one is nowhere, or null.
    pub fn key_of(&self, tuple: Tuple<'_>, old: Option<Tuple<'_>>) -> Option<crate::Key> {
        let value = |place: &usize| match resolve(
            tuple.raw().nth(*place)?,
            old.and_then(|old| old.raw().nth(*place)),
        ) {
            RawDatum::Text(text) => String::from_utf8(text.to_vec()).ok(),
            RawDatum::Null | RawDatum::Unchanged => None,
        };
        self.key.iter().map(value).collect()
    }

    /// Whether a new row lacks a value that the log holds nowhere else, unless it holds the old row.
    pub fn lacks_values(&self, new: Tuple<'_>, old: Tuple<'_>) -> bool {
        let mut olds = old.raw();
        new.raw().any(|new| {
            let old = olds.next().filter(|_| self.full_identity);
            resolve(new, old) == RawDatum::Unchanged
        })
    }

    /// Whether two rows of this table have the same key. A placeholder stands for an equal value.
    pub fn same_key(&self, old: Tuple<'_>, new: Tuple<'_>) -> bool {
        self.key.iter().all(|place| {
            let new = new.raw().nth(*place);
            new == Some(RawDatum::Unchanged) || new == old.raw().nth(*place)
        })
    }

    /// The row that has the values which a new row lacks. Only a full old row holds values; in a key-only one the other
    /// columns' nulls mean nothing.
    pub(crate) fn fallback<'a>(&self, images: &RowImages<'a>) -> Option<Tuple<'a>> {
        images.before.or(images.previous_key).filter(|_| self.full_identity)
    }

    fn check(&self, tuple: Tuple<'_>) -> Result<(), EnvelopeError> {
        if tuple.len() == self.columns.len() {
            return Ok(());
        }
        let (expected, found) = (self.columns.len(), tuple.len());
        Err(EnvelopeError::ColumnCount { table: self.table.clone(), expected, found })
    }

    fn key(&self, out: &mut Vec<u8>, tuple: Tuple<'_>, fallback: Option<Tuple<'_>>) {
        out.push(b'{');
        for place in &self.key {
            let column = &self.columns[*place];
            let datum = tuple.raw().nth(*place).unwrap_or(RawDatum::Null);
            let old = fallback.and_then(|old| old.raw().nth(*place));
            out.extend_from_slice(&column.name);
            datum_json(out, column.encoding, resolve(datum, old));
            out.push(b',');
        }
        out.extend_from_slice(&self.key_tail);
    }

    fn key_tail_only(&self, out: &mut Vec<u8>) {
        out.push(b'{');
        out.extend_from_slice(&self.key_tail);
    }

    fn image(
        &self,
        out: &mut Vec<u8>,
        tuple: Option<Tuple<'_>>,
        fallback: Option<Tuple<'_>>,
        omitted: &[usize],
        unchanged: &mut Vec<usize>,
    ) {
        let Some(tuple) = tuple else { return out.extend_from_slice(b"null") };
        let mut old = fallback.map(|old| old.raw());
        let mut separator = b'{';
        for (place, (column, datum)) in self.columns.iter().zip(tuple.raw()).enumerate() {
            out.push(separator);
            separator = b',';
            out.extend_from_slice(&column.name);
            let datum = match resolve(datum, old.as_mut().and_then(Iterator::next)) {
                RawDatum::Text(_) if omitted.contains(&place) => RawDatum::Unchanged,
                datum => datum,
            };
            if datum == RawDatum::Unchanged && !omitted.contains(&place) {
                unchanged.push(place);
            }
            datum_json(out, column.encoding, datum);
        }
        if separator == b'{' {
            out.push(b'{');
        }
        out.push(b'}');
    }

    fn names(&self, out: &mut Vec<u8>, places: &[usize]) {
        for (n, place) in places.iter().enumerate() {
            out.push(if n == 0 { b'[' } else { b',' });
            let name = &self.columns[*place].name;
            out.extend_from_slice(&name[..name.len() - 1]);
        }
        out.push(b']');
    }
}

/// The old value where the new one was not sent.
pub(crate) fn resolve<'a>(datum: RawDatum<'a>, old: Option<RawDatum<'a>>) -> RawDatum<'a> {
    match (datum, old) {
        (RawDatum::Unchanged, Some(old @ RawDatum::Text(_))) => old,
        (datum, _) => datum,
    }
}

pub(crate) fn datum_json(out: &mut Vec<u8>, encoding: Encoding, datum: RawDatum<'_>) {
    match datum {
        RawDatum::Null => out.extend_from_slice(b"null"),
        RawDatum::Text(text) => json::value(out, encoding, text),
        RawDatum::Unchanged if encoding == Encoding::Bytea => {
            json::string(out, base64::engine::general_purpose::STANDARD.encode(UNAVAILABLE));
        }
        RawDatum::Unchanged => json::string(out, UNAVAILABLE),
    }
}
