//! Rows that are too large for a record, and the columns that are omitted from them.
//!
//! For a table configured with "omit", the encoder replaces the largest non-key columns by a placeholder, in the old and in
//! the new row, until the record fits. The header [`millrace.omitted`](crate::header::OMITTED) lists them. Sizes are counted
//! before compression, so the choice does not depend on how well the data compresses.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use crate::RowImages;
use crate::envelope::{RelationEncoder, datum_json, resolve};
use crate::tuple::RawDatum;

/// Bytes of a record beside its rows and its key, at most: LSNs, times, names, each of at most 63 bytes that JSON may write
/// as six each.
const FRAME: usize = 4 << 10;
/// JSON writes a byte as at most so many, as in `\u0001`.
const GROWTH: usize = 6;
/// Size of the two placeholders for an omitted value, in bytes, at most.
const PLACEHOLDERS: usize = 96;

/// The tables from whose records columns may be omitted, and the size limit.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Oversize {
    /// Largest record, bytes of key, value and headers.
    pub record_max: usize,
    /// Schema and name of each table.
    pub tables: BTreeSet<(String, String)>,
}

impl Oversize {
    pub(crate) fn record_max(&self, schema: &str, table: &str) -> Option<usize> {
        let among = self.tables.iter().any(|(s, t)| (s.as_str(), t.as_str()) == (schema, table));
        among.then_some(self.record_max)
    }
}

impl RelationEncoder {
    /// Places of the columns to leave out, in the table's order; mostly none.
    pub(crate) fn to_omit(&self, images: &RowImages<'_>) -> Vec<usize> {
        let Some(max) = self.record_max else { return Vec::new() };
        let rows = || [images.before, images.after, images.previous_key].into_iter().flatten();
        let sent: usize = rows().map(|row| row.as_bytes().len()).sum();
        // In both images, and in the headers that name columns.
        let names = 4 * self.columns.iter().map(|column| column.name.len() + 1).sum::<usize>();
        // Each value stands in an image, those of a key in the record's key as well, and an old value where a new row lacks it.
        let roughly = FRAME + names + sent.saturating_mul(2 * GROWTH);
        if roughly <= max { Vec::new() } else { self.largest(images, FRAME + names, max) }
    }

    /// The largest columns without which a record has at most `max` bytes, `frame` being those beside the values.
    fn largest(&self, images: &RowImages<'_>, frame: usize, max: usize) -> Vec<usize> {
        let mut scratch = Vec::new();
        let mut sizes: Vec<usize> = vec![0; self.columns.len()];
        let mut add = |row: Option<crate::Tuple<'_>>, fallback: Option<crate::Tuple<'_>>| {
            let mut old = fallback.map(|old| old.raw());
            let values = row.into_iter().flat_map(|row| row.raw());
            for ((size, column), datum) in sizes.iter_mut().zip(&self.columns).zip(values) {
                let datum = resolve(datum, old.as_mut().and_then(Iterator::next));
                if matches!(datum, RawDatum::Text(_)) {
                    scratch.clear();
                    datum_json(&mut scratch, column.encoding, datum);
                    *size += scratch.len();
                }
            }
        };
        add(images.before, None);
        add(images.after, self.fallback(images));
        let in_key: usize = self.key.iter().map(|place| sizes[*place]).sum();
        // The record's key repeats the key columns, and the previous key may be added.
        let mut total = frame + sizes.iter().sum::<usize>() + 2 * in_key;
        let mut places: Vec<usize> = (0..sizes.len()).filter(|place| !self.key.contains(place)).collect();
        places.sort_by_key(|place| Reverse(sizes[*place]));
        let mut omitted = Vec::new();
        for place in places {
            if total <= max || sizes[place] <= PLACEHOLDERS {
                break;
            }
            total -= sizes[place] - PLACEHOLDERS;
            omitted.push(place);
        }
        omitted.sort_unstable();
        omitted
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;
    use crate::{
        ChangeStamp, Column, Datum, Encoder, Event, Lsn, Op, Position, RecordBatch, ReplicaIdentity,
        SchemaRef, TableSchema, TupleBuf, UNAVAILABLE, column_names,
    };

    /// Of the placeholder's base64.
    const BYTEA: u32 = 17;

    fn schema(identity: ReplicaIdentity) -> TableSchema {
        let column = |(name, type_oid): (&str, u32)| Column {
            name: name.into(),
            type_oid,
            type_name: "text".into(),
            key: (name == "id").then_some(1),
            collation: None,
            number: None,
            recorded: None,
        };
        let columns = [("id", 25), ("a", 25), ("b", 3802), ("c", BYTEA), ("d", 25)].map(column).into();
        let (schema, table) = ("public".into(), "files".into());
        TableSchema { relation: 1, root: None, schema, table, identity, columns }
    }

    fn stamp() -> ChangeStamp {
        ChangeStamp {
            position: Position::START,
            lsn: Lsn(u64::MAX),
            last_commit_lsn: Lsn(u64::MAX),
            xid: Some(u32::MAX),
            commit_time_us: i64::MAX,
            total_order: u64::MAX,
            collection_order: u64::MAX,
            now_us: i64::MAX,
        }
    }

    /// What becomes of an update: its size, its two rows, and the names of the columns that it lacks.
    fn encoded(
        mut encoder: Encoder,
        identity: ReplicaIdentity,
        rows: [&TupleBuf; 2],
    ) -> (usize, [Value; 2], Vec<String>) {
        let relation = encoder.relation(SchemaRef { relation: 1, version: 1 }, &schema(identity));
        let mut batch = RecordBatch::default();
        let [before, after] = rows.map(|row| Some(row.as_tuple()));
        let images = RowImages { op: Op::Update, before, after, previous_key: None };
        encoder.row(&mut batch, &relation, &stamp(), images).unwrap();
        let record = batch.iter().next().unwrap();
        let event = Event::decode(record.value).unwrap();
        let rows = [event.before, event.after].map(|row| serde_json::from_str(row.unwrap()).unwrap());
        assert_eq!(batch.omitting(1).count(), usize::from(!record.omitted.is_empty()));
        (batch.byte_len(), rows, column_names(record.omitted).unwrap())
    }

    /// Values of which many are large.
    fn value() -> impl Strategy<Value = Option<String>> {
        let text = prop_oneof!["[a-z]{0,9}", "[\u{1}\"é]{1,9}"];
        prop_oneof![
            1 => Just(None),
            4 => (text, 0..2_000_usize).prop_map(|(text, times)| Some(text.repeat(times))),
        ]
    }

    proptest! {
        #[test]
        fn a_record_is_as_large_as_it_may_be_and_lacks_only_what_it_names(
            rows in prop::collection::vec(prop::collection::vec(value(), 4), 2),
            unchanged: [bool; 4], full: bool, record_max in 5_000..100_000_usize,
        ) {
            let row = |values: &[Option<String>], holes: [bool; 4]| {
                let values = values.iter().zip(holes).map(|(value, hole)| match value {
                    _ if hole => Datum::Unchanged,
                    Some(text) => Datum::Text(text),
                    None => Datum::Null,
                });
                TupleBuf::new([Datum::Text("key")].into_iter().chain(values))
            };
            // Columns of bytes hold hexadecimal digits.
            let mut rows = rows;
            rows.iter_mut().for_each(|row| row[2] = row[2].as_ref().map(|text| format!("\\x{}", "ab".repeat(text.len()))));
            let (before, after) = (row(&rows[0], [false; 4]), row(&rows[1], unchanged));
            let identity = if full { ReplicaIdentity::Full } else { ReplicaIdentity::Default };
            let plain = Encoder::new("mailbox", "app");
            let tables: BTreeSet<_> = [("public".to_owned(), "files".to_owned())].into();
            let omitting = plain.clone().omitting(Oversize { record_max, tables });
            let (len, whole, none) = encoded(plain, identity, [&before, &after]);
            prop_assert!(none.is_empty());
            let (bounded, rest, omitted) = encoded(omitting, identity, [&before, &after]);
            prop_assert!(bounded <= record_max, "{bounded} > {record_max}, without {omitted:?}");
            prop_assert!(omitted.is_empty() || len + FRAME > record_max, "{omitted:?} of {len} are left out");
            for (whole, rest) in whole.iter().zip(&rest) {
                for (name, value) in whole.as_object().unwrap() {
                    let found = rest[name].as_str();
                    let placeholder = found.is_some_and(|found| found == UNAVAILABLE || found.starts_with("X19k"));
                    if omitted.contains(name) {
                        prop_assert!(value.is_null() && rest[name].is_null() || placeholder, "{name}: {found:?}");
                    } else {
                        prop_assert_eq!(value, &rest[name]);
                    }
                }
            }
        }
    }
}
