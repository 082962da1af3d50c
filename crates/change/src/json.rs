//! From Postgres' text to JSON, appended to a buffer, and back.

use std::borrow::Cow;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::schema::Encoding;

/// Appends `text`, UTF-8, as a JSON string.
pub(crate) fn string(out: &mut Vec<u8>, text: impl AsRef<[u8]>) {
    out.push(b'"');
    escaped(out, text.as_ref());
    out.push(b'"');
}

/// Appends `text` as the inside of a JSON string: runs that need no escape are copied whole.
pub(crate) fn escaped(out: &mut Vec<u8>, text: &[u8]) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let mut rest = text;
    while let Some(at) = first_special(rest) {
        out.extend_from_slice(&rest[..at]);
        let byte = rest[at];
        rest = &rest[at + 1..];
        match byte {
            b'"' => out.extend_from_slice(b"\\\""),
            b'\\' => out.extend_from_slice(b"\\\\"),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            _ => {
                out.extend_from_slice(b"\\u00");
                out.push(HEX[usize::from(byte >> 4)]);
                out.push(HEX[usize::from(byte & 15)]);
            }
        }
    }
    out.extend_from_slice(rest);
}

/// Where the first byte stands that needs an escape.
fn first_special(bytes: &[u8]) -> Option<usize> {
    /// Bytes that are looked at together, without a branch, which becomes a few vector instructions.
    const BLOCK: usize = 32;
    let special = |byte: u8| (byte < 0x20) | (byte == b'"') | (byte == b'\\');
    let plain = |block: &&[u8]| !block.iter().fold(false, |any, byte| any | special(*byte));
    let skipped = bytes.chunks_exact(BLOCK).take_while(plain).count() * BLOCK;
    let found = bytes[skipped..].iter().position(|byte| special(*byte))?;
    Some(skipped + found)
}

/// Appends an unsigned number.
pub(crate) fn number(out: &mut Vec<u8>, value: impl itoa::Integer) {
    out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
}

/// Appends a value's text, UTF-8, as JSON in Debezium's form.
pub(crate) fn value(out: &mut Vec<u8>, encoding: Encoding, text: &[u8]) {
    match encoding {
        Encoding::Text => string(out, text),
        Encoding::Integer => out.extend_from_slice(text),
        Encoding::Boolean => out.extend_from_slice(if text == b"t" { b"true" } else { b"false" }),
        Encoding::Float if text.ends_with(b"N") || text.ends_with(b"y") => string(out, text),
        Encoding::Float => {
            out.extend_from_slice(text);
            if !text.contains(&b'.') && !text.contains(&b'e') {
                out.extend_from_slice(b".0");
            }
        }
        Encoding::Numeric => {
            let named = NUMERIC_NAMES.iter().find(|(postgres, _)| postgres.as_bytes() == text);
            string(out, named.map_or(text, |(_, debezium)| debezium.as_bytes()));
        }
        Encoding::Date | Encoding::Timestamp => time(out, text, "", 0),
        Encoding::TimestampTz { digits } => time(out, text, "+00", digits),
        Encoding::Time if text == LAST_MOMENT => string(out, text),
        Encoding::Time => {
            out.push(b'"');
            out.extend_from_slice(text);
            out.extend_from_slice(b"Z\"");
        }
        Encoding::Bytea => bytea(out, text),
    }
}

/// What Postgres and Debezium call a numeric that has no digits.
const NUMERIC_NAMES: [(&str, &str); 3] =
    [("NaN", "NAN"), ("Infinity", "POSITIVE_INFINITY"), ("-Infinity", "NEGATIVE_INFINITY")];

/// The end of a day, which ISO 8601 would take for its beginning.
const LAST_MOMENT: &[u8] = b"24:00:00";

/// Appends a date or a timestamp as ISO 8601 in UTC, with `digits` digits of a second's fraction or as many as there
/// are. What has no such form (`infinity`) keeps Postgres' text.
fn time(out: &mut Vec<u8>, text: &[u8], zone: &str, digits: usize) {
    let (text_of_era, before_christ) = match text.strip_suffix(b" BC") {
        Some(rest) => (rest, true),
        None => (text, false),
    };
    let text_of_era = std::str::from_utf8(text_of_era).unwrap_or_default();
    let local = text_of_era.strip_suffix(zone).filter(|local| local.ends_with(|c: char| c.is_ascii_digit()));
    let Some((year, rest)) = local.and_then(|local| local.split_once('-')) else { return string(out, text) };
    out.push(b'"');
    iso_year(out, year, before_christ);
    out.push(b'-');
    let (date, time) = rest.split_once(' ').unwrap_or((rest, ""));
    out.extend_from_slice(date.as_bytes());
    if !time.is_empty() {
        out.push(b'T');
        out.extend_from_slice(time.as_bytes());
        let fraction = time.split_once('.').map(|(_, fraction)| fraction.len());
        if fraction.is_none() && digits > 0 {
            out.push(b'.');
        }
        out.resize(out.len() + digits.saturating_sub(fraction.unwrap_or(0)), b'0');
    }
    out.extend_from_slice(b"Z\"");
}

/// ISO 8601 has a year 0, a sign before the years before it, and one before years of more than four digits.
fn iso_year(out: &mut Vec<u8>, year: &str, before_christ: bool) {
    match year.parse::<u32>() {
        Ok(0 | 1) if before_christ => out.extend_from_slice(b"0000"),
        Ok(year) if before_christ => out.extend_from_slice(format!("-{:04}", year - 1).as_bytes()),
        _ => {
            if year.len() > 4 {
                out.push(b'+');
            }
            out.extend_from_slice(year.as_bytes());
        }
    }
}

/// The inverse of [`time`]; `None` where it kept Postgres' text.
fn postgres_time(json: &str, zone: &str) -> Option<String> {
    let iso = json.strip_suffix('Z')?;
    let iso = if iso.contains('.') { iso.trim_end_matches('0').trim_end_matches('.') } else { iso };
    let before_christ = iso.starts_with('-') || iso.starts_with("0000");
    let (year, rest) = iso.trim_start_matches(['+', '-']).split_once('-')?;
    let local = rest.replacen('T', " ", 1);
    Some(if before_christ {
        format!("{:04}-{local}{zone} BC", year.parse::<u32>().ok()?.checked_add(1)?)
    } else {
        format!("{year}-{local}{zone}")
    })
}

fn bytea(out: &mut Vec<u8>, text: &[u8]) {
    let Some(bytes) = text.strip_prefix(b"\\x").and_then(unhex) else { return string(out, text) };
    out.push(b'"');
    let start = out.len();
    out.resize(start + bytes.len().div_ceil(3) * 4, 0);
    let written = STANDARD.encode_slice(&bytes, &mut out[start..]).unwrap_or(0);
    out.truncate(start + written);
    out.push(b'"');
}

fn unhex(digits: &[u8]) -> Option<Vec<u8>> {
    let digit = |byte: u8| (byte as char).to_digit(16).map(|value| value as u8);
    if !digits.len().is_multiple_of(2) {
        return None;
    }
    digits.chunks_exact(2).map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?)).collect()
}

/// The text that Postgres prints for a value which stands in the log as `json`, a string's content or the bare
/// token of a number or boolean. The inverse of [`value`].
pub(crate) fn postgres_text(encoding: Encoding, json: &str) -> Cow<'_, str> {
    let or_same = |text: Option<String>| text.map_or(Cow::Borrowed(json), Cow::Owned);
    match encoding {
        Encoding::Boolean => Cow::Borrowed(if json == "true" { "t" } else { "f" }),
        Encoding::Float => Cow::Borrowed(json.strip_suffix(".0").unwrap_or(json)),
        Encoding::Numeric => {
            let named = NUMERIC_NAMES.iter().find(|(_, debezium)| *debezium == json);
            Cow::Borrowed(named.map_or(json, |(postgres, _)| postgres))
        }
        Encoding::Date | Encoding::Timestamp => or_same(postgres_time(json, "")),
        Encoding::TimestampTz { .. } => or_same(postgres_time(json, "+00")),
        Encoding::Time => Cow::Borrowed(json.strip_suffix('Z').unwrap_or(json)),
        Encoding::Bytea => match STANDARD.decode(json) {
            Ok(bytes) => {
                let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
                Cow::Owned(format!("\\x{hex}"))
            }
            Err(_) => Cow::Borrowed(json),
        },
        Encoding::Integer | Encoding::Text => Cow::Borrowed(json),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn encode(encoding: Encoding, text: &str) -> String {
        let mut out = Vec::new();
        value(&mut out, encoding, text.as_bytes());
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn values_have_debeziums_form() {
        const ZONED: Encoding = Encoding::TimestampTz { digits: 6 };
        let cases = [
            (Encoding::Boolean, "t", "true"),
            (Encoding::Boolean, "f", "false"),
            (Encoding::Integer, "-9223372036854775808", "-9223372036854775808"),
            (Encoding::Float, "1e+20", "1e+20"),
            (Encoding::Float, "-0.5", "-0.5"),
            (Encoding::Float, "-10", "-10.0"),
            (Encoding::Float, "NaN", "\"NaN\""),
            (Encoding::Float, "-Infinity", "\"-Infinity\""),
            (Encoding::Numeric, "12.50", "\"12.50\""),
            (Encoding::Numeric, "NaN", "\"NAN\""),
            (Encoding::Numeric, "-Infinity", "\"NEGATIVE_INFINITY\""),
            (Encoding::Date, "2025-01-19", "\"2025-01-19Z\""),
            (Encoding::Date, "infinity", "\"infinity\""),
            (Encoding::Date, "0044-03-15 BC", "\"-0043-03-15Z\""),
            (Encoding::Date, "0001-01-01 BC", "\"0000-01-01Z\""),
            (Encoding::Date, "20250-01-19", "\"+20250-01-19Z\""),
            (Encoding::Time, "12:34:00", "\"12:34:00Z\""),
            (Encoding::Time, "24:00:00", "\"24:00:00\""),
            (Encoding::Timestamp, "2025-01-19 12:34:56.5", "\"2025-01-19T12:34:56.5Z\""),
            (Encoding::Timestamp, "2025-01-19 10:00:00", "\"2025-01-19T10:00:00Z\""),
            (Encoding::Timestamp, "4713-01-01 00:00:00.05 BC", "\"-4712-01-01T00:00:00.05Z\""),
            (ZONED, "2025-01-19 12:34:56+00", "\"2025-01-19T12:34:56.000000Z\""),
            (ZONED, "2025-01-19 12:34:56.123456+00", "\"2025-01-19T12:34:56.123456Z\""),
            (ZONED, "20250-01-19 12:34:50.5+00", "\"+20250-01-19T12:34:50.500000Z\""),
            (ZONED, "0044-03-15 10:00:00+00 BC", "\"-0043-03-15T10:00:00.000000Z\""),
            (Encoding::TimestampTz { digits: 3 }, "2025-01-19 12:34:56.5+00", "\"2025-01-19T12:34:56.500Z\""),
            (Encoding::TimestampTz { digits: 0 }, "2025-01-19 12:34:00+00", "\"2025-01-19T12:34:00Z\""),
            (ZONED, "-infinity", "\"-infinity\""),
            (Encoding::Bytea, "\\x", "\"\""),
            (Encoding::Bytea, "\\x00ff10", "\"AP8Q\""),
        ];
        for (encoding, text, json) in cases {
            assert_eq!(encode(encoding, text), json);
            let bare = json.trim_matches('"');
            assert_eq!(postgres_text(encoding, bare), text, "back from {json}");
        }
    }

    proptest! {
        #[test]
        fn strings_survive(text in any::<String>()) {
            let back: String = serde_json::from_str(&encode(Encoding::Text, &text)).unwrap();
            prop_assert_eq!(back, text);
        }

        #[test]
        fn bytes_survive(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
            let text = format!("\\x{hex}");
            let json: String = serde_json::from_str(&encode(Encoding::Bytea, &text)).unwrap();
            prop_assert_eq!(postgres_text(Encoding::Bytea, &json), text);
        }
    }
}
