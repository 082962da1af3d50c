//! Rows that transactions changed which a snapshot did not see, by their keys: what of them is to be expected.
//!
//! Only the last change of a row counts, and a row's changes become visible in the order of the log. So one entry
//! for a row is enough: when a later snapshot has seen its last change it has seen them all.

use std::collections::HashMap;

use change::{Encoding, Field, Op, Snapshot, key};

use crate::NotVerified;
use crate::rows::{Datum, RowRecord};

/// Images that are kept, in bytes of their values; of rows beyond that only the keys are, and they are looked at again.
const MAX_IMAGE_BYTES: usize = 64 << 20;
/// Rows that are remembered, so many bytes for each key with what belongs to it.
const MAX_ROWS: usize = 4_000_000;

/// A column as Postgres prints it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Value {
    Is(Option<String>),
    /// As in the row that the snapshot shows.
    Unchanged,
}

/// What the last change left of a row.
#[derive(Clone, PartialEq, Eq, Debug)]
enum State {
    Row(Vec<Value>),
    /// A row of which not all is known: some value is that of a row with another key, or there was no room.
    Unknown,
    Gone,
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct Touch {
    xid: u32,
    state: State,
}

/// What a document must be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Expectation {
    /// These values.
    Row(Vec<Option<String>>),
    /// Not there.
    Absent,
    /// Only a later snapshot can tell.
    Later,
}

/// A column of a document.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Attribute {
    pub(crate) name: String,
    pub(crate) encoding: Encoding,
}

/// The rows that are not as the snapshot shows them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Touched {
    rows: HashMap<String, Touch>,
    /// Who truncated the table last. Rows not in `rows` are gone then.
    truncated: Option<u32>,
    /// Bytes of the values in `rows`.
    bytes: usize,
}

impl State {
    fn bytes(&self) -> usize {
        let State::Row(values) = self else { return 0 };
        let length = |value: &Value| match value {
            Value::Is(Some(text)) => text.len(),
            _ => 0,
        };
        values.iter().map(length).sum()
    }
}

impl Touched {
    /// Forgets what a later snapshot sees by itself.
    pub(crate) fn advance(&mut self, snapshot: &Snapshot) {
        self.rows.retain(|_, touch| {
            let keep = !snapshot.saw(touch.xid);
            self.bytes -= if keep { 0 } else { touch.state.bytes() };
            keep
        });
        self.truncated = self.truncated.filter(|xid| !snapshot.saw(*xid));
    }

    /// Takes in the next change of the log that the snapshot did not see. The first `key_len` attributes are the
    /// key's.
    pub(crate) fn take(
        &mut self,
        xid: u32,
        row: &RowRecord<'_>,
        attributes: &[Attribute],
        key_len: usize,
    ) -> Result<(), NotVerified> {
        if row.op == Op::Truncate {
            self.rows.clear();
            self.bytes = 0;
            self.truncated = Some(xid);
            return Ok(());
        }
        let names: Vec<&str> = attributes.iter().map(|attribute| attribute.name.as_str()).collect();
        let values = row.key(&names[..key_len])?;
        if let Some(place) = values.iter().position(|value| *value == Field::Missing) {
            return Err(row.error(format!("its key has no `{}`", names[place])));
        }
        let texts: Vec<_> = values
            .iter()
            .zip(attributes)
            .map(|(value, attribute)| value.postgres_text(attribute.encoding))
            .collect();
        let id = key::join(texts.iter().map(|text| text.as_deref()));
        let state = match row.after(&names)? {
            None => State::Gone,
            Some(after) => self.state(&id, after, attributes, !row.record.previous_key.is_empty()),
        };
        self.keep(id, Touch { xid, state })
    }

    fn keep(&mut self, id: String, mut touch: Touch) -> Result<(), NotVerified> {
        if self.bytes + touch.state.bytes() > MAX_IMAGE_BYTES {
            touch.state = State::Unknown;
        }
        self.bytes += touch.state.bytes();
        if let Some(replaced) = self.rows.insert(id, touch) {
            self.bytes -= replaced.state.bytes();
        }
        if self.rows.len() > MAX_ROWS {
            let what = format!(
                "more than {MAX_ROWS} rows were changed by transactions that ended during the comparison"
            );
            return Err(NotVerified::new(what, "run `millrace verify` when less is changed at a time"));
        }
        Ok(())
    }

    fn state(&self, id: &str, after: Vec<Datum<'_>>, attributes: &[Attribute], moved: bool) -> State {
        let earlier = match self.rows.get(id) {
            // A value from before the key changed is that of the row that had the key.
            _ if moved => None,
            Some(Touch { state: State::Row(values), .. }) => Some(values),
            _ => None,
        };
        let hole = after.contains(&Datum::Unchanged);
        // The row did not exist in the snapshot under this key, so it shows nothing to take a value from.
        let unknown = moved
            || matches!(self.rows.get(id), Some(Touch { state: State::Unknown | State::Gone, .. }))
            || (self.truncated.is_some() && earlier.is_none());
        // Only a snapshot that saw the change knows what the row holds.
        if (hole && unknown) || after.contains(&Datum::Omitted) {
            return State::Unknown;
        }
        let value = |(place, (datum, attribute)): (usize, (Datum<'_>, &Attribute))| match datum {
            Datum::Known(field) => {
                Value::Is(field.postgres_text(attribute.encoding).map(|text| text.into_owned()))
            }
            Datum::Unchanged | Datum::Omitted => {
                earlier.map_or(Value::Unchanged, |values| values[place].clone())
            }
        };
        State::Row(after.into_iter().zip(attributes).enumerate().map(value).collect())
    }

    /// What the document of this id must be, given the row that the snapshot shows.
    pub(crate) fn expect(&self, id: &str, seen: Option<&[Option<String>]>) -> Expectation {
        match (self.rows.get(id), seen) {
            (None, Some(row)) if self.truncated.is_none() => Expectation::Row(row.to_vec()),
            (None, _) | (Some(Touch { state: State::Gone, .. }), _) => Expectation::Absent,
            (Some(Touch { state: State::Unknown, .. }), _) => Expectation::Later,
            (Some(Touch { state: State::Row(values), .. }), seen) => {
                let value = |(place, value): (usize, &Value)| match (value, seen) {
                    (Value::Is(text), _) => Some(text.clone()),
                    (Value::Unchanged, Some(row)) => Some(row[place].clone()),
                    (Value::Unchanged, None) => None,
                };
                let row: Option<Vec<_>> = values.iter().enumerate().map(value).collect();
                row.map_or(Expectation::Later, Expectation::Row)
            }
        }
    }
}
