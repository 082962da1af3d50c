//! Keys whose byte order is the order of the values: for numbers of any size and for points in time.
//!
//! Tantivy's own numbers are 64 bits wide: its floats cannot tell 2^53 from 2^53 + 1 and its dates end in 2262.
//! Postgres' bigint, numeric and timestamp go further, and a column may change its type without changing the
//! index. So every number is kept as a string: a class (negative, zero, positive, infinities and NaN, in
//! Postgres' order), the decimal exponent, the significant digits; for negative numbers all of it complemented.
//! Comparisons are exact, also between an integer column and a filter's fraction. A point in time is its number
//! of nanoseconds since 1970.

/// Significant digits that count. Numbers equal in all of them compare as equal.
const MAX_DIGITS: usize = 1_000;
/// Exponents are kept as six digits around this one; numeric's lie between -16,383 and 131,072.
const EXPONENT_ZERO: i64 = 500_000;
const MAX_EXPONENT: i64 = 999_999;

const NEGATIVE_INFINITY: &str = "1";
const NEGATIVE: char = '3';
const ZERO: &str = "5";
const POSITIVE: char = '7';
const INFINITY: &str = "8";
const NAN: &str = "9";
/// After a negative number's complemented digits: the shorter of two is the larger.
const AFTER_DIGITS: char = '~';

/// The key of a number written as Postgres writes it (or a client: `1.50`, `-3e10`). `None`: not a number.
pub(crate) fn number_key(text: &str) -> Option<String> {
    let (negative, magnitude) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    if magnitude.eq_ignore_ascii_case("infinity") || magnitude.eq_ignore_ascii_case("inf") {
        return Some(if negative { NEGATIVE_INFINITY } else { INFINITY }.to_owned());
    }
    if text.eq_ignore_ascii_case("nan") {
        return Some(NAN.to_owned());
    }
    let (exponent, digits) = decimal(magnitude)?;
    if digits.is_empty() {
        return Some(ZERO.to_owned());
    }
    let exponent = (exponent.saturating_add(EXPONENT_ZERO)).clamp(0, MAX_EXPONENT);
    let plain = format!("{exponent:06}{digits}");
    Some(if negative {
        let complement = plain.bytes().map(|digit| char::from(b'0' + b'9' - digit));
        std::iter::once(NEGATIVE).chain(complement).chain([AFTER_DIGITS]).collect()
    } else {
        format!("{POSITIVE}{plain}")
    })
}

/// Exponent and digits of `0.DIGITS × 10^exponent`, the first digit and the last not zero; no digits for zero.
fn decimal(text: &str) -> Option<(i64, String)> {
    let (mantissa, exponent) = match text.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, clamped_exponent(exponent)?),
        None => (text, 0),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let only_digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    if (whole.is_empty() && fraction.is_empty()) || !only_digits(whole) || !only_digits(fraction) {
        return None;
    }
    let digits = format!("{whole}{fraction}");
    let significant = digits.trim_start_matches('0');
    let leading = (digits.len() - significant.len()) as i64;
    let exponent = exponent.saturating_add(whole.len() as i64 - leading);
    let kept = &significant[..significant.len().min(MAX_DIGITS)];
    Some((exponent, kept.trim_end_matches('0').to_owned()))
}

/// An exponent's value; one too long for a number is as good as any that is out of range.
fn clamped_exponent(text: &str) -> Option<i64> {
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let size = digits.parse::<i64>().unwrap_or(i64::MAX / 4).min(i64::MAX / 4);
    Some(if text.starts_with('-') { -size } else { size })
}

/// The key of a date or timestamp as Postgres prints it, or as ISO 8601 with or without a zone (UTC then).
/// `None`: neither.
pub(crate) fn instant_key(text: &str) -> Option<String> {
    match text {
        "infinity" | "-infinity" => number_key(text),
        _ => number_key(&nanoseconds(text)?.to_string()),
    }
}

/// The same for what a filter says, where a bare integer is seconds since 1970.
pub(crate) fn filter_instant_key(text: &str) -> Option<String> {
    match text.parse::<i64>() {
        Ok(seconds) => number_key(&(i128::from(seconds) * 1_000_000_000).to_string()),
        Err(_) => instant_key(text),
    }
}

/// Nanoseconds since 1970-01-01 00:00 UTC, in the proleptic Gregorian calendar as Postgres has it.
fn nanoseconds(text: &str) -> Option<i128> {
    let (text, before_christ) = match text.strip_suffix(" BC") {
        Some(text) => (text, true),
        None => (text, false),
    };
    let (date, time) = match text.split_once(['T', ' ']) {
        Some((date, time)) => (date, Some(time)),
        None => (text.strip_suffix('Z').unwrap_or(text), None),
    };
    let mut parts = date.splitn(3, '-');
    let year = digits(parts.next()?, 4..=7)?;
    let (month, day) = (digits(parts.next()?, 2..=2)?, digits(parts.next()?, 2..=2)?);
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) || (before_christ && year == 0) {
        return None;
    }
    let year = if before_christ { 1 - year } else { year };
    let of_day = time.map_or(Some(0), time_nanoseconds)?;
    Some(i128::from(days(year, month, day)) * 86_400_000_000_000 + of_day)
}

/// Days from 1970-01-01 to a date. <https://howardhinnant.github.io/date_algorithms.html#days_from_civil>
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

/// `12:34[:56[.789]][Z|±HH[[:]MM[:SS]]]` as nanoseconds after midnight UTC.
fn time_nanoseconds(text: &str) -> Option<i128> {
    let (clock, offset) = match text.find(['Z', '+', '-']) {
        Some(at) => (&text[..at], zone_seconds(&text[at..])?),
        None => (text, 0),
    };
    let (clock, fraction) = clock.split_once('.').unwrap_or((clock, "0"));
    let seconds = clock_seconds(clock)?;
    if fraction.is_empty() || !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let nanos: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    Some(i128::from(seconds - offset) * 1_000_000_000 + nanos.parse::<i128>().ok()?)
}

fn zone_seconds(text: &str) -> Option<i64> {
    if text == "Z" {
        return Some(0);
    }
    let (sign, rest) = (if text.starts_with('-') { -1 } else { 1 }, text.get(1..)?);
    match rest.len() {
        2 => Some(sign * digits(rest, 2..=2)? * 3600),
        4 => Some(sign * (digits(rest.get(..2)?, 2..=2)? * 3600 + digits(rest.get(2..)?, 2..=2)? * 60)),
        _ => Some(sign * clock_seconds(rest)?),
    }
}

fn clock_seconds(text: &str) -> Option<i64> {
    let mut parts = text.split(':');
    let (hours, minutes) = (digits(parts.next()?, 2..=2)?, digits(parts.next()?, 2..=2)?);
    let seconds = parts.next().map_or(Some(0), |part| digits(part, 2..=2))?;
    let valid = parts.next().is_none() && hours <= 24 && minutes < 60 && seconds <= 60;
    valid.then_some(hours * 3600 + minutes * 60 + seconds)
}

fn digits(text: &str, length: std::ops::RangeInclusive<usize>) -> Option<i64> {
    let valid = length.contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    valid.then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn numbers_stand_in_postgres_order() {
        let ordered = [
            "-Infinity",
            "-1e300",
            "-9223372036854775808",
            "-100",
            "-10.5",
            "-10",
            "-9.99",
            "-1",
            "-0.5",
            "-1e-300",
            "0",
            "1e-300",
            "0.00012",
            "0.5",
            "0.55",
            "1",
            "9.99",
            "10",
            "10.5",
            "99",
            "100",
            "9007199254740992",
            "9007199254740993",
            "9223372036854775807",
            "1e300",
            "Infinity",
            "NaN",
        ];
        let keys: Vec<String> = ordered.iter().map(|text| number_key(text).unwrap()).collect();
        for pair in keys.windows(2) {
            assert!(pair[0] < pair[1], "{pair:?}");
        }
    }

    #[test]
    fn equal_numbers_have_one_key() {
        for (a, b) in
            [("1", "1.000"), ("-0", "0.0"), ("1e3", "1000"), ("007", "7"), ("12.5", "125e-1"), ("+3", "3")]
        {
            assert_eq!(number_key(a), number_key(b), "{a} {b}");
        }
        for text in ["", "-", ".", "1.2.3", "0x10", "1e", "e5", "1_000", "--1", "five", "½"] {
            assert_eq!(number_key(text), None, "{text}");
        }
        assert!(number_key("1e99999999999999999999").is_some());
    }

    #[test]
    fn instants_stand_in_order() {
        let ordered = [
            "-infinity",
            "4713-01-01 00:00:00 BC",
            "0044-03-15 BC",
            "0001-12-31 23:59:59 BC",
            "0001-01-01",
            "1969-12-31 23:59:59.999999",
            "1970-01-01",
            "1970-01-01 00:00:00.000001",
            "2000-02-29",
            "2000-03-01",
            "2025-01-19 12:34:56.5+00",
            "2262-04-12",
            "9999-12-31",
            "10000-01-01",
            "294276-12-31 23:59:59.999999",
            "5874897-12-31",
            "infinity",
        ];
        let keys: Vec<String> = ordered.iter().map(|text| instant_key(text).expect(text)).collect();
        for (pair, texts) in keys.windows(2).zip(ordered.windows(2)) {
            assert!(pair[0] < pair[1], "{texts:?}");
        }
    }

    #[test]
    fn an_instant_can_be_written_in_several_ways() {
        let same = [
            "2025-01-19 12:34:56+00",
            "2025-01-19T12:34:56Z",
            "2025-01-19T14:34:56+02:00",
            "2025-01-19 08:04:56-0430",
        ];
        for text in same {
            assert_eq!(nanoseconds(text), Some(1_737_290_096_000_000_000), "{text}");
        }
        assert_eq!(filter_instant_key("1737290096"), instant_key(same[0]));
        assert_eq!(instant_key("2025-01-19Z"), instant_key("2025-01-19T00:00:00Z"));
        for text in
            ["", "yesterday", "2025-1-1", "2025-13-01", "2025-01-19T25:00", "2025-01-19T", "19.01.2025", "é"]
        {
            assert_eq!(instant_key(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn integers_compare_as_their_keys(a in any::<i64>(), b in any::<i64>()) {
            let key = |n: i64| number_key(&n.to_string()).unwrap();
            prop_assert_eq!(a.cmp(&b), key(a).cmp(&key(b)));
        }

        #[test]
        fn fractions_compare_as_their_keys(a in any::<i32>(), b in any::<i32>(), scale in 0u32..9) {
            let text = |n: i32| {
                let (n, unit) = (i64::from(n), 10i64.pow(scale));
                let sign = if n < 0 { "-" } else { "" };
                format!("{sign}{}.{:0width$}", n.abs() / unit, n.abs() % unit, width = scale.max(1) as usize)
            };
            prop_assert_eq!(a.cmp(&b), number_key(&text(a)).unwrap().cmp(&number_key(&text(b)).unwrap()));
        }

        #[test]
        fn nothing_panics(text in "\\PC*") {
            let _ = (number_key(&text), filter_instant_key(&text));
        }
    }
}
