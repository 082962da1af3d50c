//! From Postgres' text to JSON, appended to a buffer, and back.

use std::borrow::Cow;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::schema::Encoding;

/// Appends `text` as a JSON string.
pub(crate) fn string(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    escaped(out, text);
    out.push(b'"');
}

/// Appends `text` as the inside of a JSON string: runs that need no escape are copied whole.
pub(crate) fn escaped(out: &mut Vec<u8>, text: &str) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let bytes = text.as_bytes();
    let mut copied = 0;
    for (at, &byte) in bytes.iter().enumerate() {
        if byte >= 0x20 && byte != b'"' && byte != b'\\' {
            continue;
        }
        out.extend_from_slice(&bytes[copied..at]);
        copied = at + 1;
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
    out.extend_from_slice(&bytes[copied..]);
}

/// Appends an unsigned number.
pub(crate) fn number(out: &mut Vec<u8>, value: impl itoa::Integer) {
    out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
}

/// Appends a value's text as JSON in Debezium's form.
pub(crate) fn value(out: &mut Vec<u8>, encoding: Encoding, text: &str) {
    match encoding {
        Encoding::Text => string(out, text),
        Encoding::Integer => out.extend_from_slice(text.as_bytes()),
        Encoding::Boolean => out.extend_from_slice(if text == "t" { b"true" } else { b"false" }),
        Encoding::Float if text.ends_with(['N', 'y']) => string(out, text),
        Encoding::Float => out.extend_from_slice(text.as_bytes()),
        Encoding::Date => time(out, text, ""),
        Encoding::Timestamp => time(out, text, ""),
        Encoding::TimestampTz => time(out, text, "+00"),
        Encoding::Bytea => bytea(out, text),
    }
}

/// Appends a date or a timestamp as ISO 8601 in UTC. What has no such form (`infinity`, years BC or with an
/// offset that seconds have) keeps Postgres' text.
fn time(out: &mut Vec<u8>, text: &str, zone: &str) {
    match text.strip_suffix(zone) {
        Some(local) if local.as_bytes().last().is_some_and(u8::is_ascii_digit) => {
            out.push(b'"');
            match local.split_once(' ') {
                Some((date, time)) => {
                    out.extend_from_slice(date.as_bytes());
                    out.push(b'T');
                    out.extend_from_slice(time.as_bytes());
                }
                None => out.extend_from_slice(local.as_bytes()),
            }
            out.extend_from_slice(b"Z\"");
        }
        _ => string(out, text),
    }
}

fn bytea(out: &mut Vec<u8>, text: &str) {
    let Some(bytes) = text.strip_prefix("\\x").and_then(unhex) else { return string(out, text) };
    out.push(b'"');
    let start = out.len();
    out.resize(start + bytes.len().div_ceil(3) * 4, 0);
    let written = STANDARD.encode_slice(&bytes, &mut out[start..]).unwrap_or(0);
    out.truncate(start + written);
    out.push(b'"');
}

fn unhex(digits: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| (byte as char).to_digit(16).map(|value| value as u8);
    let bytes = digits.as_bytes();
    if !bytes.len().is_multiple_of(2) {
        return None;
    }
    bytes.chunks_exact(2).map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?)).collect()
}

/// The text that Postgres prints for a value which stands in the log as `json`, a string's content or the bare
/// token of a number or boolean. The inverse of [`value`].
pub(crate) fn postgres_text(encoding: Encoding, json: &str) -> Cow<'_, str> {
    let local = |json: &str| json.strip_suffix('Z').map(|local| local.replacen('T', " ", 1));
    match encoding {
        Encoding::Boolean => Cow::Borrowed(if json == "true" { "t" } else { "f" }),
        Encoding::Date | Encoding::Timestamp => local(json).map_or(Cow::Borrowed(json), Cow::Owned),
        Encoding::TimestampTz => {
            local(json).map_or(Cow::Borrowed(json), |local| Cow::Owned(format!("{local}+00")))
        }
        Encoding::Bytea => match STANDARD.decode(json) {
            Ok(bytes) => {
                let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
                Cow::Owned(format!("\\x{hex}"))
            }
            Err(_) => Cow::Borrowed(json),
        },
        Encoding::Integer | Encoding::Float | Encoding::Text => Cow::Borrowed(json),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn encode(encoding: Encoding, text: &str) -> String {
        let mut out = Vec::new();
        value(&mut out, encoding, text);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn values_have_debeziums_form() {
        let cases = [
            (Encoding::Boolean, "t", "true"),
            (Encoding::Boolean, "f", "false"),
            (Encoding::Integer, "-9223372036854775808", "-9223372036854775808"),
            (Encoding::Float, "1e+20", "1e+20"),
            (Encoding::Float, "NaN", "\"NaN\""),
            (Encoding::Float, "-Infinity", "\"-Infinity\""),
            (Encoding::Text, "12.50", "\"12.50\""),
            (Encoding::Date, "2025-01-19", "\"2025-01-19Z\""),
            (Encoding::Date, "infinity", "\"infinity\""),
            (Encoding::Date, "0044-03-15 BC", "\"0044-03-15 BC\""),
            (Encoding::Timestamp, "2025-01-19 12:34:56.5", "\"2025-01-19T12:34:56.5Z\""),
            (Encoding::TimestampTz, "2025-01-19 12:34:56+00", "\"2025-01-19T12:34:56Z\""),
            (Encoding::TimestampTz, "-infinity", "\"-infinity\""),
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
