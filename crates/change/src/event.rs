//! The envelope as a worker reads it: what happened, and of the rows the columns that a sink names.

use std::borrow::Cow;
use std::sync::LazyLock;

use memchr::memmem::Finder;
use memchr::memrchr_iter;

use crate::members::{self, Members};
use crate::schema::Encoding;
use crate::{EnvelopeError, Op, json};

/// A record's value as read back; rows stay JSON until their [`fields`] are asked for.
#[derive(Clone, Copy, Debug)]
pub struct Event<'a> {
    /// What happened.
    pub op: Op,
    /// The old row as a JSON object, as far as Postgres sent it.
    pub before: Option<&'a str>,
    /// The new row as a JSON object.
    pub after: Option<&'a str>,
}

impl<'a> Event<'a> {
    /// Reads a record's value.
    pub fn decode(value: &'a [u8]) -> Result<Self, EnvelopeError> {
        let text = utf8(value)?;
        let mut members = Members::of(text)?;
        let (mut before, mut after) = rows_as_written(text).unzip();
        let mut op = last_op(text);
        while op.is_none() || before.is_none() || after.is_none() {
            let Some(member) = members.next()? else { break };
            if member.is("before")? {
                before = Some(member.value);
            } else if member.is("after")? {
                after = Some(member.value);
            } else if member.is("op")? {
                op = Some(member.value);
            }
        }
        let op = op.ok_or_else(|| EnvelopeError::NotAnEnvelope("it has no `op`".to_owned()))?;
        let there = |row: &&str| *row != "null";
        let op = Op::read(op)?;
        Ok(Event { op, before: before.filter(there), after: after.filter(there) })
    }
}

/// `before` and `after` of an envelope as [`Encoder`](crate::Encoder) writes it, found by what stands behind each, which costs a fraction
/// of looking at every value in between. A quote inside a string has a backslash before it, so that what is found are
/// names; and a row holds no objects that could have them.
fn rows_as_written(envelope: &str) -> Option<(&str, &str)> {
    static BEHIND_BEFORE: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("},\"after\":"));
    static BEHIND_AFTER: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("},\"source\":{"));
    /// The row at the front, and the rest.
    fn row<'a>(text: &'a str, behind: &Finder<'_>) -> Option<(&'a str, &'a str)> {
        let len = match text.as_bytes().first()? {
            b'{' => behind.find(text.as_bytes())? + 1,
            _ => text.starts_with("null").then_some(4)?,
        };
        text.split_at_checked(len)
    }
    let (before, rest) = row(envelope.strip_prefix("{\"before\":")?, &BEHIND_BEFORE)?;
    let (after, rest) = row(rest.strip_prefix(",\"after\":")?, &BEHIND_AFTER)?;
    rest.starts_with(",\"source\":{").then_some((before, after))
}

/// The envelope's `op` where it stands behind everything that is nested, as Debezium and [`Encoder`](crate::Encoder) write it: what lies
/// between it and the rows need not be read then.
fn last_op(envelope: &str) -> Option<&str> {
    const NAME: &[u8] = b",\"op\":";
    /// Where it has its p, which the names of the times have not.
    const P: usize = 3;
    /// Bytes from there on, at most: three times follow.
    const MAX_LEN: usize = 128;
    let start = envelope.len().saturating_sub(MAX_LEN);
    let tail = &envelope.as_bytes()[start..];
    // A quote inside a string has a backslash before it, so that this is a name; and no object ends behind it but one.
    let at = memrchr_iter(b'p', tail).find_map(|p| {
        let name = p.checked_sub(P)?;
        tail[name..].starts_with(NAME).then_some(start + name + NAME.len())
    })?;
    let rest = envelope.get(at..)?;
    (rest.find('}')? + 1 == rest.len()).then(|| rest.get(..3))?
}

/// One column's value in a row of the log.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Field<'a> {
    /// The row has no such column.
    #[default]
    Missing,
    /// SQL NULL.
    Null,
    /// A number or a boolean, as its JSON token.
    Bare(&'a str),
    /// A string's content.
    Text(Cow<'a, str>),
}

impl<'a> Field<'a> {
    fn read(token: &'a str) -> Result<Self, EnvelopeError> {
        Ok(match token.as_bytes().first() {
            Some(b'n') => Field::Null,
            Some(b'"') => Field::Text(members::string(token)?),
            _ => Field::Bare(token),
        })
    }

    /// The value as Postgres prints it; `None` for NULL and for a missing column.
    pub fn postgres_text(&self, encoding: Encoding) -> Option<Cow<'_, str>> {
        match self {
            Field::Missing | Field::Null => None,
            Field::Bare(token) => Some(json::postgres_text(encoding, token)),
            Field::Text(text) => Some(json::postgres_text(encoding, text)),
        }
    }
}

/// Columns that are read from row after row.
#[derive(Clone, Debug)]
pub struct Columns {
    names: Vec<String>,
    /// Of `"name":`.
    finders: Vec<Finder<'static>>,
}

impl Columns {
    /// Those called `names`.
    pub fn new(names: impl IntoIterator<Item = String>) -> Self {
        let names: Vec<String> = names.into_iter().collect();
        let finder = |name: &String| {
            let mut member = Vec::new();
            json::string(&mut member, name);
            member.push(b':');
            Finder::new(&member).into_owned()
        };
        Columns { finders: names.iter().map(finder).collect(), names }
    }

    /// The same as [`fields`], found by their names in a row that [`Encoder`](crate::Encoder) wrote, which costs a fraction of passing over
    /// every value before them. A quote inside a string has a backslash before it, so that what is found behind `{` or `,`
    /// is a name; and a row holds no objects that could have such names.
    pub fn read<'a>(&self, row: &'a str, out: &mut Vec<Field<'a>>) -> Result<(), EnvelopeError> {
        out.clear();
        for finder in &self.finders {
            let named = |at: &usize| matches!(row.as_bytes()[..*at].last(), Some(b'{' | b','));
            let Some(at) = finder.find_iter(row.as_bytes()).find(named) else {
                return fields(row, &self.names, out);
            };
            out.push(Field::read(members::value_at(row, at + finder.needle().len())?)?);
        }
        Ok(())
    }
}

/// Reads the columns called `names` out of a row, a JSON object, into `out` in the same order. The others are skipped
/// unread.
pub fn fields<'a>(
    row: &'a str,
    names: &[impl AsRef<str>],
    out: &mut Vec<Field<'a>>,
) -> Result<(), EnvelopeError> {
    out.clear();
    out.resize(names.len(), Field::Missing);
    let mut members = Members::of(row)?;
    let mut missing = names.len();
    while missing > 0
        && let Some(member) = members.next()?
    {
        for (name, field) in names.iter().zip(&mut *out) {
            if member.is(name.as_ref())? {
                missing -= usize::from(*field == Field::Missing);
                *field = Field::read(member.value)?;
            }
        }
    }
    Ok(())
}

/// The same for a record's key, or for the header `millrace.previous_key`.
pub fn key_fields<'a>(
    key: &'a [u8],
    names: &[impl AsRef<str>],
    out: &mut Vec<Field<'a>>,
) -> Result<(), EnvelopeError> {
    fields(utf8(key)?, names, out)
}

/// The columns that a header [`UNCHANGED`](crate::header::UNCHANGED) or [`OMITTED`](crate::header::OMITTED) names; none
/// where it is empty.
pub fn column_names(header: &[u8]) -> Result<Vec<String>, EnvelopeError> {
    if header.is_empty() {
        return Ok(Vec::new());
    }
    serde_json::from_slice(header)
        .map_err(|error| EnvelopeError::NotAnEnvelope(format!("a header does not name columns: {error}")))
}

fn utf8(bytes: &[u8]) -> Result<&str, EnvelopeError> {
    simdutf8::basic::from_utf8(bytes).map_err(|e| EnvelopeError::NotAnEnvelope(e.to_string()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    fn row() -> impl Strategy<Value = Value> {
        let value = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<String>().prop_map(Value::from),
            "[{},:\"\\\\]{0,3}(after|source|op)[{},:\"\\\\]{0,3}".prop_map(Value::from),
        ];
        let name = prop_oneof![Just("after".to_owned()), Just("source".to_owned()), any::<String>()];
        let row = prop::collection::btree_map(name, value, 0..5);
        prop_oneof![Just(Value::Null), row.prop_map(|row| Value::Object(row.into_iter().collect()))]
    }

    /// What stands behind the `op` is not read, nor missed.
    #[test]
    fn an_envelope_cut_short_is_an_error() {
        let whole = r#"{"before":null,"after":{"id":1},"source":{"lsn":1},"op":"u","ts_ms":1}"#;
        let read = |end: usize| Event::decode(&whole.as_bytes()[..end]);
        let behind_op = whole.find(",\"ts_ms").unwrap();
        for end in 0..behind_op {
            assert!(read(end).is_err(), "{}", &whole[..end]);
        }
        for end in behind_op..=whole.len() {
            assert_eq!(read(end).unwrap().after, Some(r#"{"id":1}"#));
        }
    }

    proptest! {
        #[test]
        fn rows_are_found_whole_whatever_they_hold(before in row(), after in row(), spaced: bool) {
            let (before, after) = (before.to_string(), after.to_string());
            let space = if spaced { " " } else { "" };
            let text = format!(
                r#"{{"before":{space}{before},"after":{after},"source":{{"lsn":1}},"op":"u","ts_ms":1}}"#
            );
            let there = |row: &str| (row != "null").then(|| row.to_owned());
            prop_assert_eq!(rows_as_written(&text).is_some(), !spaced);
            let event = Event::decode(text.as_bytes()).unwrap();
            prop_assert_eq!(event.before.map(str::to_owned), there(&before));
            prop_assert_eq!(event.after.map(str::to_owned), there(&after));
            let names = ["after", "source", "op"];
            let columns = Columns::new(names.map(str::to_owned));
            for row in [event.before, event.after].into_iter().flatten() {
                let (mut found, mut expected) = (Vec::new(), Vec::new());
                columns.read(row, &mut found).unwrap();
                fields(row, &names, &mut expected).unwrap();
                prop_assert_eq!(found, expected);
            }
        }
    }
}
