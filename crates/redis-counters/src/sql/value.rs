//! Values as they are compared: read from a row's text or from a literal's.

use std::borrow::Cow;
use std::cmp::Ordering;

use super::column_type::Type;
use super::decimal::Decimal;
use super::time::Moment;

/// One value, not NULL. Two values that meet in a comparison are of the same variant: `bind` sees to it.
#[derive(Clone, PartialEq, Debug)]
pub(crate) enum Value<'a> {
    Boolean(bool),
    Integer(i64),
    Numeric(Decimal<'a>),
    Float(f64),
    /// Text, `character(n)` without its trailing blanks, uuid in its canonical form: ordered by bytes.
    Text(Cow<'a, str>),
    /// Days or microseconds.
    Time(i64),
}

impl<'a> Value<'a> {
    /// Reads the text that Postgres prints for a value of the type; `None` if it is not such a text. An integer
    /// may be read as numeric.
    pub(crate) fn read(kind: Type, text: &'a str) -> Option<Value<'a>> {
        Some(match kind {
            Type::Boolean => Value::Boolean(match text {
                "t" => true,
                "f" => false,
                _ => return None,
            }),
            Type::SmallInt | Type::Integer | Type::BigInt => Value::Integer(text.parse().ok()?),
            Type::Numeric => Value::Numeric(Decimal::parse(text)?),
            Type::Real => Value::Float(f64::from(text.parse::<f32>().ok()?)),
            Type::Double => Value::Float(text.parse().ok()?),
            Type::Text | Type::Uuid => Value::Text(Cow::Borrowed(text)),
            Type::Char => Value::Text(Cow::Borrowed(text.trim_end_matches(' '))),
            Type::Date => Value::Time(Moment::parse(text)?.days()),
            Type::Timestamp | Type::TimestampTz => Value::Time(Moment::parse(text)?.micros()?),
        })
    }

    /// The same value, borrowed from this one.
    pub(crate) fn borrowed(&self) -> Value<'_> {
        match self {
            Value::Boolean(value) => Value::Boolean(*value),
            Value::Integer(value) => Value::Integer(*value),
            Value::Numeric(value) => Value::Numeric(value.borrowed()),
            Value::Float(value) => Value::Float(*value),
            Value::Text(text) => Value::Text(Cow::Borrowed(text)),
            Value::Time(value) => Value::Time(*value),
        }
    }

    /// The same value, borrowing nothing.
    pub(crate) fn into_owned(self) -> Value<'static> {
        match self {
            Value::Boolean(value) => Value::Boolean(value),
            Value::Integer(value) => Value::Integer(value),
            Value::Numeric(value) => Value::Numeric(value.into_owned()),
            Value::Float(value) => Value::Float(value),
            Value::Text(text) => Value::Text(Cow::Owned(text.into_owned())),
            Value::Time(value) => Value::Time(value),
        }
    }

    /// Postgres's order within a type. Values of different variants do not meet.
    pub(crate) fn compare(&self, other: &Value<'_>) -> Option<Ordering> {
        Some(match (self, other) {
            (Value::Boolean(a), Value::Boolean(b)) => a.cmp(b),
            (Value::Integer(a), Value::Integer(b)) | (Value::Time(a), Value::Time(b)) => a.cmp(b),
            (Value::Numeric(a), Value::Numeric(b)) => a.compare(b),
            (Value::Float(a), Value::Float(b)) => compare_floats(*a, *b),
            (Value::Text(a), Value::Text(b)) => a.as_bytes().cmp(b.as_bytes()),
            _ => return None,
        })
    }
}

/// NaN equals NaN and is greater than every other value; the zeros are equal.
fn compare_floats(a: f64, b: f64) -> Ordering {
    a.partial_cmp(&b).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_as_in_postgres() {
        let nan = f64::NAN;
        assert_eq!(compare_floats(nan, nan), Ordering::Equal);
        assert_eq!(compare_floats(nan, f64::INFINITY), Ordering::Greater);
        assert_eq!(compare_floats(1.0, nan), Ordering::Less);
        assert_eq!(compare_floats(0.0, -0.0), Ordering::Equal);
        // A real is widened, so it is not the double of the same digits.
        assert_ne!(Value::read(Type::Real, "0.1"), Value::read(Type::Double, "0.1"));
    }
}
