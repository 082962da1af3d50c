//! Kafka records of the log: key and value bytes, and the headers that are ours.

use std::ops::Range;

use crate::lsn::cut;
use crate::{Lsn, Position, SchemaRef, json};

/// Names of the headers. Their values are ASCII text, but for the three that hold JSON.
pub mod header {
    /// The change's [`Position`](crate::Position), and what else there is of the three that follow:
    /// `0/16B3748:t:5 xid=745 schema=16384/3 commit=0/16B37A0`. On every record but the log's first. One header, because
    /// Kafka's client allocates for each of every record, where it is written and where it is read. A `t` of a transaction
    /// after which the table is read anew has ` anew=1` as well.
    pub const POSITION: &str = "millrace.position";
    /// The source transaction's top-level xid, 32 bits, decimal. On records of transactions. A header of its own in older
    /// logs, as the two that follow.
    pub const XID: &str = "millrace.xid";
    /// The [`SchemaRef`](crate::SchemaRef) under which the row was written: `16384/3`.
    pub const SCHEMA: &str = "millrace.schema";
    /// JSON array of the names of columns whose value in `after` is only a placeholder (unchanged TOAST).
    pub const UNCHANGED: &str = "millrace.unchanged";
    /// JSON array of the names of columns that were left out because the row is larger than a record may be: where `before`
    /// or `after` have a value of theirs, they hold a placeholder. An older value of such a column is not its value.
    pub const OMITTED: &str = "millrace.omitted";
    /// The end LSN. On the last record of a source transaction, message or snapshot round.
    pub const COMMIT: &str = "millrace.commit";
    /// The log's random id. On record 0 only, whose key and value are null.
    pub const LOG: &str = "millrace.log";
    /// JSON of the row's key before this transaction changed it. On the `c` half of a changed key.
    pub const PREVIOUS_KEY: &str = "millrace.previous_key";
}

/// What a record says beside its key and value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RecordMeta {
    /// Where it stands in the log's order.
    pub position: Position,
    /// The source transaction's xid.
    pub xid: Option<u32>,
    /// The schema its row follows.
    pub schema: Option<SchemaRef>,
    /// Commit time at the source, milliseconds since the epoch: Kafka's record timestamp.
    pub timestamp_ms: i64,
    /// End LSN, on the last record of a unit.
    pub commit: Option<Lsn>,
    /// Whether the table is read anew from here on.
    pub anew: bool,
}

#[derive(Clone, Debug)]
struct Entry {
    key: Range<usize>,
    value: Range<usize>,
    unchanged: Range<usize>,
    omitted: Range<usize>,
    previous_key: Range<usize>,
    meta: RecordMeta,
}

/// Records on their way to Kafka, in one buffer that is reused from batch to batch.
#[derive(Clone, Debug, Default)]
pub struct RecordBatch {
    pub(crate) bytes: Vec<u8>,
    entries: Vec<Entry>,
    /// True if a record has omitted columns.
    omits: bool,
}

/// Where the parts of a record that is being appended end; see [`RecordBatch::push`].
pub(crate) struct Parts {
    pub(crate) start: usize,
    pub(crate) key_end: usize,
    pub(crate) value_end: usize,
    pub(crate) unchanged_end: usize,
    pub(crate) omitted_end: usize,
}

impl RecordBatch {
    /// Number of records.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Bytes of keys, values and JSON headers.
    pub fn byte_len(&self) -> usize {
        self.bytes.len()
    }

    /// The records, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = RecordRef<'_>> {
        self.entries.iter().map(|entry| RecordRef {
            key: &self.bytes[entry.key.clone()],
            value: &self.bytes[entry.value.clone()],
            unchanged: &self.bytes[entry.unchanged.clone()],
            omitted: &self.bytes[entry.omitted.clone()],
            previous_key: &self.bytes[entry.previous_key.clone()],
            meta: entry.meta,
        })
    }

    /// Those of the first `count` records that lack columns for their size.
    pub fn omitting(&self, count: usize) -> impl Iterator<Item = RecordRef<'_>> {
        let count = if self.omits { count } else { 0 };
        self.iter().take(count).filter(|record| !record.omitted.is_empty())
    }

    /// Closes the record whose bytes stand at the end of the buffer, from `parts.start`: key, value, names of
    /// unchanged columns and of omitted ones, previous key.
    pub(crate) fn push(&mut self, parts: Parts, meta: RecordMeta) {
        self.entries.push(Entry {
            key: parts.start..parts.key_end,
            value: parts.key_end..parts.value_end,
            unchanged: parts.value_end..parts.unchanged_end,
            omitted: parts.unchanged_end..parts.omitted_end,
            previous_key: parts.omitted_end..self.bytes.len(),
            meta,
        });
        self.omits |= parts.omitted_end > parts.unchanged_end;
    }

    /// Marks the last record as the end of its unit. Returns whether there was one.
    pub fn mark_commit(&mut self, end_lsn: Lsn) -> bool {
        match self.entries.last_mut() {
            Some(last) => {
                last.meta.commit = Some(end_lsn);
                true
            }
            None => false,
        }
    }

    /// Marks the last record as one after which its table is read anew.
    pub fn mark_anew(&mut self) {
        if let Some(last) = self.entries.last_mut() {
            last.meta.anew = true;
        }
    }

    /// Forgets every record but the last `count`, which may still become the end of their unit.
    pub fn keep_last(&mut self, count: usize) {
        let drop = self.entries.len().saturating_sub(count);
        let Some(first) = self.entries.get(drop) else { return self.clear() };
        let start = first.key.start;
        self.bytes.copy_within(start.., 0);
        self.bytes.truncate(self.bytes.len() - start);
        self.entries.drain(..drop);
        for entry in &mut self.entries {
            let Entry { key, value, unchanged, omitted, previous_key, .. } = entry;
            for range in [key, value, unchanged, omitted, previous_key] {
                *range = range.start - start..range.end - start;
            }
        }
        self.omits &= self.entries.iter().any(|entry| !entry.omitted.is_empty());
    }

    /// Forgets every record and keeps the memory.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.entries.clear();
        self.omits = false;
    }
}

/// One record of a batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RecordRef<'a> {
    /// JSON: Debezium's key and the physical table identifier.
    pub key: &'a [u8],
    /// JSON: Debezium's envelope.
    pub value: &'a [u8],
    /// Content of the header `millrace.unchanged`; empty for none.
    pub unchanged: &'a [u8],
    /// Content of the header `millrace.omitted`; empty for none.
    pub omitted: &'a [u8],
    /// Content of the header `millrace.previous_key`; empty for none.
    pub previous_key: &'a [u8],
    /// The rest.
    pub meta: RecordMeta,
}

impl RecordRef<'_> {
    /// Gives each header's name and value to `visit`, in a fixed order. `scratch` is reused between calls.
    pub fn headers(&self, scratch: &mut Vec<u8>, mut visit: impl FnMut(&'static str, &[u8])) {
        scratch.clear();
        self.meta.position.append_to(scratch);
        if let Some(xid) = self.meta.xid {
            scratch.extend_from_slice(b" xid=");
            json::number(scratch, xid);
        }
        if let Some(SchemaRef { relation, version }) = self.meta.schema {
            scratch.extend_from_slice(b" schema=");
            json::number(scratch, relation);
            scratch.push(b'/');
            json::number(scratch, version);
        }
        if let Some(commit) = self.meta.commit {
            scratch.extend_from_slice(b" commit=");
            commit.append_to(scratch);
        }
        if self.meta.anew {
            scratch.extend_from_slice(b" anew=1");
        }
        visit(header::POSITION, scratch);
        if !self.unchanged.is_empty() {
            visit(header::UNCHANGED, self.unchanged);
        }
        if !self.omitted.is_empty() {
            visit(header::OMITTED, self.omitted);
        }
        if !self.previous_key.is_empty() {
            visit(header::PREVIOUS_KEY, self.previous_key);
        }
    }
}

/// The text before the first space, and what is behind it, if there is one.
fn part(text: &str) -> (&str, Option<&str>) {
    cut(text, b' ').map_or((text, None), |(part, rest)| (part, Some(rest)))
}

/// A header of ours that cannot be read.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("header `{name}` holds `{value}`, which is not what this version of Millrace writes")]
pub struct HeaderError {
    /// Its name.
    pub name: String,
    /// What it holds, lossily.
    pub value: String,
}

/// The headers of one record as read back.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Headers<'a> {
    /// See [`header::POSITION`].
    pub position: Option<Position>,
    /// See [`header::XID`].
    pub xid: Option<u32>,
    /// See [`header::SCHEMA`].
    pub schema: Option<SchemaRef>,
    /// See [`header::COMMIT`].
    pub commit: Option<Lsn>,
    /// See [`header::POSITION`].
    pub anew: bool,
    /// See [`header::LOG`].
    pub log: Option<&'a str>,
    /// See [`header::UNCHANGED`]; empty for none.
    pub unchanged: &'a [u8],
    /// See [`header::OMITTED`]; empty for none.
    pub omitted: &'a [u8],
    /// See [`header::PREVIOUS_KEY`]; empty for none.
    pub previous_key: &'a [u8],
}

impl<'a> Headers<'a> {
    /// Takes in one header; those of others are ignored.
    pub fn read(&mut self, name: &str, value: &'a [u8]) -> Result<(), HeaderError> {
        let error =
            || HeaderError { name: name.to_owned(), value: String::from_utf8_lossy(value).into_owned() };
        let text = || std::str::from_utf8(value).map_err(|_| error());
        match name {
            header::POSITION => self.read_position(text()?).ok_or_else(error)?,
            header::XID => self.xid = Some(text()?.parse().map_err(|_| error())?),
            header::SCHEMA => self.schema = Some(text()?.parse().map_err(|_| error())?),
            header::COMMIT => self.commit = Some(text()?.parse().map_err(|_| error())?),
            header::LOG => self.log = Some(text()?),
            header::UNCHANGED => self.unchanged = value,
            header::OMITTED => self.omitted = value,
            header::PREVIOUS_KEY => self.previous_key = value,
            _ => {}
        }
        Ok(())
    }

    /// What this version does not know may matter, and is an error.
    fn read_position(&mut self, text: &str) -> Option<()> {
        let (position, mut rest) = part(text);
        self.position = Some(position.parse().ok()?);
        while let Some((next, behind)) = rest.map(part) {
            rest = behind;
            match cut(next, b'=')? {
                ("xid", xid) => self.xid = Some(xid.parse().ok()?),
                ("schema", schema) => self.schema = Some(schema.parse().ok()?),
                ("commit", commit) => self.commit = Some(commit.parse().ok()?),
                ("anew", "1") => self.anew = true,
                _ => return None,
            }
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Kind;

    fn read(headers: &[(&str, &'static [u8])]) -> Result<Headers<'static>, HeaderError> {
        let mut read = Headers::default();
        headers.iter().try_for_each(|(name, value)| read.read(name, value))?;
        Ok(read)
    }

    proptest! {
        #[test]
        fn headers_come_back(
            lsn: u64, ordinal: u64, kind in 0..3_usize,
            xid: Option<u32>, schema: Option<(u32, u32)>, commit: Option<u64>, anew: bool,
        ) {
            let kind = [Kind::Message, Kind::Round, Kind::Transaction][kind];
            let position = Position { lsn: Lsn(lsn), kind, ordinal };
            let schema = schema.map(|(relation, version)| SchemaRef { relation, version });
            let commit = commit.map(Lsn);
            let meta = RecordMeta { position, xid, schema, timestamp_ms: 0, commit, anew };
            let (unchanged, omitted, previous_key) = (&b"[]"[..], &b"[\"a\"]"[..], &b"{}"[..]);
            let record = RecordRef { key: b"", value: b"", unchanged, omitted, previous_key, meta };
            let mut all = Vec::new();
            record.headers(&mut Vec::new(), |name, value| all.push((name, value.to_vec())));
            let mut read = Headers::default();
            for (name, value) in &all {
                read.read(name, value).unwrap();
            }
            let expected = Headers {
                position: Some(position), xid, schema, commit, anew, log: None, unchanged, omitted, previous_key,
            };
            prop_assert_eq!(read, expected);
        }
    }

    #[test]
    fn older_logs_have_a_header_for_each() {
        let old = read(&[
            ("millrace.position", b"0/16B3748:t:5"),
            ("millrace.xid", b"745"),
            ("millrace.schema", b"16384/3"),
            ("millrace.commit", b"0/16B37A0"),
        ]);
        let new = read(&[("millrace.position", b"0/16B3748:t:5 xid=745 schema=16384/3 commit=0/16B37A0")]);
        assert!(old.is_ok());
        assert_eq!(old, new);
    }

    #[test]
    fn what_a_later_version_may_add_is_refused() {
        for value in [
            &b"0/16B3748:t:5 more=1"[..],
            b"0/16B3748:t:5 anew=0",
            b"0/16B3748:t:5 xid",
            b"0/16B3748:t:5 ",
            b"xid=745",
        ] {
            assert!(read(&[("millrace.position", value)]).is_err(), "{}", String::from_utf8_lossy(value));
        }
    }
}
