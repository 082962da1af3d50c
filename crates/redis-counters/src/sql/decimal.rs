//! Exact comparison of Postgres's `numeric`, of any size, on its text.
//!
//! A value is never converted: its digits are compared where they stand in the row. NaN equals NaN and is
//! greater than everything else, infinities included, as in Postgres.

use std::borrow::Cow;
use std::cmp::Ordering;

/// Digits before and after the decimal point that a literal may have; Postgres's own limits.
const MAX_INTEGER_DIGITS: usize = 131_072;
const MAX_FRACTION_DIGITS: usize = 16_383;

/// A numeric value. The digits have no leading zero before the point and no trailing zero after it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Decimal<'a> {
    Finite { negative: bool, integer: Cow<'a, str>, fraction: Cow<'a, str> },
    NegativeInfinity,
    Infinity,
    NaN,
}

impl<'a> Decimal<'a> {
    /// Reads what Postgres prints: an optional `-`, digits, an optional fraction; or a special value.
    pub(crate) fn parse(text: &'a str) -> Option<Self> {
        match text {
            "NaN" => return Some(Decimal::NaN),
            "Infinity" => return Some(Decimal::Infinity),
            "-Infinity" => return Some(Decimal::NegativeInfinity),
            _ => {}
        }
        let (negative, digits) = match text.strip_prefix('-') {
            Some(digits) => (true, digits),
            None => (false, text),
        };
        let (integer, fraction) = digits.split_once('.').unwrap_or((digits, ""));
        let all_digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
        if integer.len() + fraction.len() == 0 || !all_digits(integer) || !all_digits(fraction) {
            return None;
        }
        let integer = integer.trim_start_matches('0');
        let fraction = fraction.trim_end_matches('0');
        let negative = negative && !(integer.is_empty() && fraction.is_empty());
        Some(Decimal::Finite { negative, integer: Cow::Borrowed(integer), fraction: Cow::Borrowed(fraction) })
    }

    /// Reads a literal, which may also have a `+` and an exponent, and any case of the special values.
    pub(crate) fn parse_literal(text: &str) -> Option<Decimal<'static>> {
        let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
        if !unsigned.starts_with(|first: char| first.is_ascii_digit() || first == '.') {
            return special(text);
        }
        let (mantissa, exponent) = match text.split_once(['e', 'E']) {
            Some((mantissa, exponent)) => (mantissa, exponent.parse::<i32>().ok()?),
            None => (text, 0),
        };
        let mantissa = mantissa.strip_prefix('+').unwrap_or(mantissa);
        let Decimal::Finite { negative, integer, fraction } = Decimal::parse(mantissa)? else { return None };
        let (integer, fraction) = shift(&integer, &fraction, exponent)?;
        Some(Decimal::Finite { negative, integer: Cow::Owned(integer), fraction: Cow::Owned(fraction) })
    }

    /// The same value, borrowed from this one.
    pub(crate) fn borrowed(&self) -> Decimal<'_> {
        match self {
            Decimal::Finite { negative, integer, fraction } => Decimal::Finite {
                negative: *negative,
                integer: Cow::Borrowed(integer),
                fraction: Cow::Borrowed(fraction),
            },
            Decimal::NegativeInfinity => Decimal::NegativeInfinity,
            Decimal::Infinity => Decimal::Infinity,
            Decimal::NaN => Decimal::NaN,
        }
    }

    /// The same value, borrowing nothing.
    pub(crate) fn into_owned(self) -> Decimal<'static> {
        match self {
            Decimal::Finite { negative, integer, fraction } => Decimal::Finite {
                negative,
                integer: Cow::Owned(integer.into_owned()),
                fraction: Cow::Owned(fraction.into_owned()),
            },
            Decimal::NegativeInfinity => Decimal::NegativeInfinity,
            Decimal::Infinity => Decimal::Infinity,
            Decimal::NaN => Decimal::NaN,
        }
    }

    /// Postgres's order.
    pub(crate) fn compare(&self, other: &Decimal<'_>) -> Ordering {
        let rank = |value: &Decimal<'_>| match value {
            Decimal::NegativeInfinity => 0,
            Decimal::Finite { negative: true, .. } => 1,
            Decimal::Finite { negative: false, .. } => 2,
            Decimal::Infinity => 3,
            Decimal::NaN => 4,
        };
        match (self, other) {
            (
                Decimal::Finite { negative: a, integer: ai, fraction: af },
                Decimal::Finite { negative: b, integer: bi, fraction: bf },
            ) if a == b => {
                let size = ai.len().cmp(&bi.len()).then_with(|| ai.cmp(bi)).then_with(|| af.cmp(bf));
                if *a { size.reverse() } else { size }
            }
            _ => rank(self).cmp(&rank(other)),
        }
    }
}

fn special(text: &str) -> Option<Decimal<'static>> {
    let is = |name: &str| text.eq_ignore_ascii_case(name);
    if is("nan") {
        Some(Decimal::NaN)
    } else if is("infinity") || is("+infinity") {
        Some(Decimal::Infinity)
    } else if is("-infinity") {
        Some(Decimal::NegativeInfinity)
    } else {
        None
    }
}

/// Moves the decimal point by `exponent` places to the right.
fn shift(integer: &str, fraction: &str, exponent: i32) -> Option<(String, String)> {
    let digits = format!("{integer}{fraction}");
    let significant = digits.trim_matches('0');
    if significant.is_empty() {
        return Some((String::new(), String::new()));
    }
    let leading = digits.len() - digits.trim_start_matches('0').len();
    // Where the point stands, counted from the first significant digit.
    let point = i64::try_from(integer.len()).ok()? - i64::try_from(leading).ok()? + i64::from(exponent);
    let places = i64::try_from(significant.len()).ok()?;
    if point > MAX_INTEGER_DIGITS as i64 || places - point > MAX_FRACTION_DIGITS as i64 {
        return None;
    }
    if point <= 0 {
        return Some((String::new(), format!("{}{significant}", "0".repeat(usize::try_from(-point).ok()?))));
    }
    let point = usize::try_from(point).ok()?;
    match significant.split_at_checked(point) {
        Some((integer, fraction)) => Some((integer.to_owned(), fraction.to_owned())),
        None => Some((format!("{significant:0<point$}"), String::new())),
    }
}

/// `1.50` to `1.5`, `1.00` to `1`: what Postgres's `trim_scale` prints, so that equal values are one group.
pub(crate) fn trim_scale(text: &str) -> &str {
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordered_as_in_postgres() {
        let ascending = [
            "-Infinity",
            "-1e30",
            "-100",
            "-99.99",
            "-1.5",
            "-1.25",
            "-1",
            "-.5",
            "0",
            "0.0001",
            "1e-3",
            "0.5",
            "0.51",
            "1",
            "1.05",
            "1.5",
            "9",
            "10",
            "99.99",
            "100",
            "12345678901234567890",
            "1e30",
            "Infinity",
            "NaN",
        ];
        let values: Vec<_> = ascending.iter().map(|text| Decimal::parse_literal(text).unwrap()).collect();
        for (i, a) in values.iter().enumerate() {
            for (j, b) in values.iter().enumerate() {
                assert_eq!(a.compare(b), i.cmp(&j), "{} against {}", ascending[i], ascending[j]);
            }
        }
    }

    #[test]
    fn equal_values_in_different_clothes() {
        let same = [
            ("1", "1.000"),
            ("0", "-0.00"),
            ("1e3", "1000"),
            ("12.5e-1", "1.25"),
            ("+7.", "7"),
            ("00.5e1", "5"),
            (".001e3", "1"),
        ];
        for (a, b) in same {
            let (a, b) = (Decimal::parse_literal(a).unwrap(), Decimal::parse_literal(b).unwrap());
            assert_eq!(a.compare(&b), Ordering::Equal, "{a:?} {b:?}");
            assert_eq!(a, b);
        }
    }

    #[test]
    fn not_numbers() {
        for text in
            ["", "-", ".", "1.2.3", "1e", "0x10", "1_000", " 1", "abc", "--1", "1e999999", "1e-999999", "+-1"]
        {
            assert_eq!(Decimal::parse_literal(text), None, "{text}");
        }
    }

    #[test]
    fn trimmed_scale() {
        for (text, trimmed) in
            [("1.00", "1"), ("100", "100"), ("0.00", "0"), ("1.050", "1.05"), ("NaN", "NaN")]
        {
            assert_eq!(trim_scale(text), trimmed);
        }
    }
}
