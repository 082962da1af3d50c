//! Literals: as they are written, and the value they have when they meet a column, as Postgres resolves it.
//!
//! An untyped string takes the column's type. A number is an integer or a numeric. A cast says its own type.
//! Every literal becomes a value once, at bind time, so a bad one is refused at start and never met in a row.

use std::borrow::Cow;
use std::fmt;

use change::Refusal;
use sqlparser::ast::{CastKind, Expr, UnaryOperator, Value as SqlValue};

use super::column_type::{Family, Type};
use super::decimal::Decimal;
use super::time::Moment;
use super::value::Value;

/// A literal of the definition.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Literal {
    Null,
    Boolean(bool),
    /// Digits with an optional sign, point and exponent.
    Number(String),
    Text(String),
    Cast(Box<Literal>, Type),
}

impl Literal {
    /// Takes the expression as a literal; `None` when it is something else.
    pub(crate) fn of(expr: &Expr) -> Result<Option<Literal>, Refusal> {
        match expr {
            Expr::Nested(inner) => Literal::of(inner),
            Expr::Value(value) => Literal::plain(&value.value).map(Some),
            Expr::UnaryOp { op: op @ (UnaryOperator::Minus | UnaryOperator::Plus), expr: operand } => {
                let sign = if *op == UnaryOperator::Minus { "-" } else { "" };
                match operand.as_ref() {
                    Expr::Value(value) => match Literal::plain(&value.value)? {
                        Literal::Number(digits) => Ok(Some(Literal::Number(format!("{sign}{digits}")))),
                        _ => Err(not_a_constant(expr)),
                    },
                    _ => Err(not_a_constant(expr)),
                }
            }
            Expr::Cast {
                kind: CastKind::Cast | CastKind::DoubleColon,
                expr: inner,
                data_type,
                format: None,
            } => Literal::cast(expr, inner, &data_type.to_string()).map(Some),
            Expr::TypedString(typed) if !typed.uses_odbc_syntax => {
                let inner = Expr::Value(typed.value.clone());
                Literal::cast(expr, &inner, &typed.data_type.to_string()).map(Some)
            }
            _ => Ok(None),
        }
    }

    fn plain(value: &SqlValue) -> Result<Literal, Refusal> {
        match value {
            SqlValue::Null => Ok(Literal::Null),
            SqlValue::Boolean(value) => Ok(Literal::Boolean(*value)),
            SqlValue::Number(digits, false) if Decimal::parse_literal(digits).is_some() => {
                Ok(Literal::Number(digits.clone()))
            }
            SqlValue::SingleQuotedString(text) => Ok(Literal::Text(text.clone())),
            SqlValue::Placeholder(name) => Err(Refusal::new(
                format!("{name} is a parameter, and a counter has none"),
                "write the value itself",
            )),
            other => Err(Refusal::new(
                format!("{other} is a form of literal that a counter does not read"),
                "write a string as '…' (a quote inside it twice) and a number with decimal digits",
            )),
        }
    }

    fn cast(whole: &Expr, inner: &Expr, type_name: &str) -> Result<Literal, Refusal> {
        let kind = Type::named(type_name).ok_or_else(|| {
            Refusal::new(
                format!("{whole} casts to {type_name}, which a counter does not support"),
                "leave the cast out: a string literal takes the type of the column beside it; casts to \
                 boolean, smallint, integer, bigint, numeric, real, double precision, text, uuid, date, timestamp \
                 and timestamptz without a length are supported",
            )
        })?;
        let literal = match Literal::of(inner)? {
            Some(Literal::Cast(..)) | None => return Err(not_a_constant(whole)),
            Some(literal) => literal,
        };
        // Read once without a column, so that a wrong one is refused even beside a NULL.
        let cast = Literal::Cast(Box::new(literal), kind);
        cast.typed_value()
            .map_err(|why| Refusal::new(why, format!("write a value of type {kind} in place of {inner}")))?;
        Ok(cast)
    }

    /// The value to compare with a column of this type; `Ok(None)` for NULL. Numbers of the exact family come
    /// as integers where they are, else as numeric. The error says why Postgres, or we, do not compare the two.
    pub(crate) fn value_for(&self, column: Type) -> Result<Option<Value<'static>>, String> {
        let mismatch = || format!("{self} does not compare with type {column}");
        match (self, column.family()) {
            (Literal::Null, _) => Ok(None),
            (Literal::Boolean(value), Family::Boolean) => Ok(Some(Value::Boolean(*value))),
            (Literal::Text(text), _) => read_text(column, text).map(Some),
            (Literal::Number(digits), Family::ExactNumber) => exact(digits).map(Some),
            (Literal::Number(digits), Family::Float) => float::<f64>(digits).map(Some),
            (Literal::Cast(inner, kind), family) => {
                let value = self.typed_value()?;
                match (kind.family(), family) {
                    (a, b) if a == b => Ok(value),
                    (Family::ExactNumber, Family::Float) => match inner.as_ref() {
                        Literal::Number(digits) | Literal::Text(digits) => float::<f64>(digits).map(Some),
                        _ => Ok(None),
                    },
                    (Family::Date, Family::Timestamp) => match inner.as_ref() {
                        Literal::Text(text) => read_text(Type::Timestamp, text).map(Some),
                        _ => Ok(None),
                    },
                    _ => Err(mismatch()),
                }
            }
            _ => Err(mismatch()),
        }
    }

    /// The value of a cast by itself; of anything else, nothing.
    fn typed_value(&self) -> Result<Option<Value<'static>>, String> {
        let Literal::Cast(inner, kind) = self else { return Ok(None) };
        match (inner.as_ref(), kind.family()) {
            (Literal::Null, _) => Ok(None),
            (Literal::Boolean(value), Family::Boolean) => Ok(Some(Value::Boolean(*value))),
            (Literal::Text(text), _) => read_text(*kind, text).map(Some),
            (Literal::Number(digits), Family::ExactNumber | Family::Float) => {
                read_text(*kind, digits).map(Some)
            }
            _ => Err(format!("type {kind} has no such cast here: write the value as a string, '…'::{kind}")),
        }
    }
}

/// A number as Postgres types it: integer where it is written as one and fits 64 bits, else numeric.
fn exact(digits: &str) -> Result<Value<'static>, String> {
    match digits.parse() {
        Ok(value) => Ok(Value::Integer(value)),
        Err(_) => read_text(Type::Numeric, digits),
    }
}

/// What the type's input function makes of the text, for the forms that mean the same in every session.
fn read_text(kind: Type, text: &str) -> Result<Value<'static>, String> {
    match kind {
        Type::Boolean => boolean(text),
        Type::SmallInt => integer(text, kind, i64::from(i16::MIN)..=i64::from(i16::MAX)),
        Type::Integer => integer(text, kind, i64::from(i32::MIN)..=i64::from(i32::MAX)),
        Type::BigInt => integer(text, kind, i64::MIN..=i64::MAX),
        Type::Numeric => {
            let value = Decimal::parse_literal(text).map(Value::Numeric);
            value.ok_or_else(|| format!("'{text}' is not a value of type numeric"))
        }
        Type::Real => float::<f32>(text),
        Type::Double => float::<f64>(text),
        Type::Text => Ok(Value::Text(Cow::Owned(text.to_owned()))),
        Type::Char => Ok(Value::Text(Cow::Owned(text.trim_end_matches(' ').to_owned()))),
        Type::Uuid => uuid(text),
        Type::Date => match Moment::parse(text) {
            Some(moment @ (Moment::Past | Moment::Future | Moment::At { micros: None, .. }))
                if moment.fits_date() =>
            {
                Ok(Value::Time(moment.days()))
            }
            _ => Err(format!("'{text}' is not a date of the form '2025-01-19'")),
        },
        Type::Timestamp | Type::TimestampTz => timestamp(kind, text),
    }
}

fn boolean(text: &str) -> Result<Value<'static>, String> {
    match text.to_ascii_lowercase().as_str() {
        "t" | "true" | "yes" | "y" | "on" | "1" => Ok(Value::Boolean(true)),
        "f" | "false" | "no" | "n" | "off" | "0" => Ok(Value::Boolean(false)),
        _ => Err(format!("'{text}' is not a value of type boolean: write TRUE or FALSE")),
    }
}

fn integer(text: &str, kind: Type, range: std::ops::RangeInclusive<i64>) -> Result<Value<'static>, String> {
    match text.parse() {
        Ok(value) if range.contains(&value) => Ok(Value::Integer(value)),
        _ => Err(format!("'{text}' is not a value of type {kind}")),
    }
}

/// A float of the precision of `F`. Postgres refuses what overflows or underflows, and so do we.
fn float<F: std::str::FromStr + Into<f64>>(text: &str) -> Result<Value<'static>, String> {
    let error = || format!("'{text}' is not a value of the floating-point type, or out of its range");
    let exact = Decimal::parse_literal(text).ok_or_else(error)?;
    let value: f64 = text.parse::<F>().map_err(|_| error())?.into();
    let vanished = match exact {
        Decimal::Finite { integer, fraction, .. } => {
            value.is_infinite() || (value == 0.0 && !(integer.is_empty() && fraction.is_empty()))
        }
        _ => false,
    };
    if vanished { Err(error()) } else { Ok(Value::Float(value)) }
}

fn uuid(text: &str) -> Result<Value<'static>, String> {
    let lower = text.to_ascii_lowercase();
    let places = lower.bytes().enumerate();
    let canonical = lower.len() == 36
        && places.into_iter().all(|(place, byte)| match place {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => byte.is_ascii_hexdigit(),
        });
    if canonical {
        return Ok(Value::Text(Cow::Owned(lower)));
    }
    Err(format!("'{text}' is not a uuid of the form 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'"))
}

fn timestamp(kind: Type, text: &str) -> Result<Value<'static>, String> {
    let form = match kind {
        Type::TimestampTz => "2025-01-19 12:34:56Z",
        _ => "2025-01-19 12:34:56",
    };
    let error = || format!("'{text}' is not a {kind} of the form '{form}'");
    let moment = Moment::parse(text).filter(|moment| moment.fits_timestamp()).ok_or_else(error)?;
    if let Moment::At { offset, .. } = moment {
        match (kind, offset) {
            (Type::TimestampTz, None) => {
                return Err(format!(
                    "'{text}' has no time zone, so its meaning depends on the session's TimeZone: write an \
                     offset, '{form}'"
                ));
            }
            (Type::Timestamp, Some(_)) => {
                return Err(format!("'{text}' has a time zone, which type timestamp ignores: leave it out"));
            }
            _ => {}
        }
    }
    moment.micros().map(Value::Time).ok_or_else(error)
}

fn not_a_constant(expr: &Expr) -> Refusal {
    Refusal::new(
        format!("{expr} is not a plain literal"),
        "write the value itself, with at most one cast: '…'::type, CAST(-5 AS bigint)",
    )
}

impl fmt::Display for Literal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Literal::Null => f.write_str("NULL"),
            Literal::Boolean(true) => f.write_str("TRUE"),
            Literal::Boolean(false) => f.write_str("FALSE"),
            Literal::Number(digits) => f.write_str(digits),
            Literal::Text(text) => f.write_str(&quote_literal(text)),
            Literal::Cast(inner, kind) => write!(f, "CAST({inner} AS {kind})"),
        }
    }
}

/// `it's` to `'it''s'`, for `standard_conforming_strings = on`, the default since Postgres 9.1.
pub(crate) fn quote_literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}
