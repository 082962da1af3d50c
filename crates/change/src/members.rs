//! Reading the members of a JSON object one by one, without building values.
//!
//! A worker wants a few columns of a row and nothing of the rest, so what is passed over is only searched for its end:
//! that it is well-formed inside is not checked. The log's JSON is whole, for Kafka checks every batch's checksum.

use std::borrow::Cow;

use memchr::{memchr2, memchr3};

use crate::EnvelopeError;

/// The members of an object, in their order.
pub(crate) struct Members<'a> {
    text: &'a str,
    at: usize,
}

/// A member's name, unread, and its value.
pub(crate) struct Member<'a> {
    /// With its quotes and escapes.
    name: &'a str,
    /// One JSON value.
    pub(crate) value: &'a str,
}

impl Member<'_> {
    pub(crate) fn is(&self, name: &str) -> Result<bool, EnvelopeError> {
        let inner = &self.name[1..self.name.len() - 1];
        if inner.len() <= name.len() || !inner.contains('\\') {
            // An escape is longer than what it stands for.
            return Ok(inner == name && !inner.contains('\\'));
        }
        Ok(string(self.name)? == name)
    }
}

impl<'a> Members<'a> {
    /// Those of the object that `text` is.
    pub(crate) fn of(text: &'a str) -> Result<Self, EnvelopeError> {
        let mut members = Members { text, at: 0 };
        members.space();
        members.expect(b'{')?;
        Ok(members)
    }

    pub(crate) fn next(&mut self) -> Result<Option<Member<'a>>, EnvelopeError> {
        self.space();
        match self.peek() {
            Some(b'}') => {
                self.at += 1;
                self.space();
                return if self.at == self.text.len() { Ok(None) } else { Err(self.error()) };
            }
            Some(b',') => self.at += 1,
            _ => {}
        }
        self.space();
        let name = self.value()?;
        if !name.starts_with('"') {
            return Err(self.error());
        }
        self.space();
        self.expect(b':')?;
        self.space();
        let value = self.value()?;
        Ok(Some(Member { name, value }))
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn space(&mut self) {
        while let Some(b' ' | b'\t' | b'\n' | b'\r') = self.peek() {
            self.at += 1;
        }
    }

    fn expect(&mut self, byte: u8) -> Result<(), EnvelopeError> {
        if self.peek() != Some(byte) {
            return Err(self.error());
        }
        self.at += 1;
        Ok(())
    }

    /// The value that begins here, of whatever kind.
    fn value(&mut self) -> Result<&'a str, EnvelopeError> {
        let rest = &self.text.as_bytes()[self.at..];
        let length = match rest.first() {
            Some(b'"') => string_len(rest),
            Some(b'{' | b'[') => nested_len(rest),
            _ => memchr3(b',', b'}', b']', rest).filter(|length| *length > 0),
        };
        let value = length.and_then(|length| self.text.get(self.at..self.at + length));
        let value = value.ok_or_else(|| self.error())?;
        self.at += value.len();
        Ok(value.trim_ascii_end())
    }

    fn error(&self) -> EnvelopeError {
        EnvelopeError::NotAnEnvelope(format!("not a JSON object: byte {} is not as expected", self.at))
    }
}

/// The value that begins at a byte of an object.
pub(crate) fn value_at(text: &str, at: usize) -> Result<&str, EnvelopeError> {
    let mut members = Members { text, at };
    members.space();
    members.value()
}

/// The content of a JSON string, given with its quotes.
pub(crate) fn string(token: &str) -> Result<Cow<'_, str>, EnvelopeError> {
    let inner = token.get(1..token.len().saturating_sub(1)).unwrap_or_default();
    if !inner.contains('\\') {
        return Ok(Cow::Borrowed(inner));
    }
    serde_json::from_str(token).map(Cow::Owned).map_err(|e| EnvelopeError::NotAnEnvelope(e.to_string()))
}

/// Length of the string at the front, quotes included.
fn string_len(bytes: &[u8]) -> Option<usize> {
    /// Names and small values end within so many bytes, sooner than a search by vectors has begun.
    const SHORT: usize = 16;
    let mut at = 1;
    for byte in bytes.get(1..)?.iter().take(SHORT) {
        match byte {
            b'"' => return Some(at + 1),
            b'\\' => break,
            _ => at += 1,
        }
    }
    loop {
        at += memchr2(b'"', b'\\', bytes.get(at..)?)?;
        if bytes[at] == b'"' {
            return Some(at + 1);
        }
        at += 2;
    }
}

/// Length of the object or array at the front.
fn nested_len(bytes: &[u8]) -> Option<usize> {
    let mut depth = 0;
    let mut at = 0;
    loop {
        match bytes.get(at)? {
            b'"' => at += string_len(&bytes[at..])?,
            b'{' | b'[' => {
                depth += 1;
                at += 1;
            }
            b'}' | b']' => {
                depth -= 1;
                at += 1;
                if depth == 0 {
                    return Some(at);
                }
            }
            _ => at += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    fn read(text: &str) -> Result<Vec<(String, Value)>, String> {
        let mut members = Members::of(text).map_err(|e| e.to_string())?;
        let mut all = Vec::new();
        while let Some(Member { name, value }) = members.next().map_err(|e| e.to_string())? {
            let value = serde_json::from_str(value).map_err(|e| e.to_string())?;
            all.push((string(name).map_err(|e| e.to_string())?.into_owned(), value));
        }
        Ok(all)
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<String>().prop_map(Value::from),
            "[\\\\\"{}\\[\\],:]{0,6}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 12, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(any::<String>(), inner, 0..4)
                    .prop_map(|all| Value::Object(all.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn reads_what_a_complete_parser_reads(
            all in prop::collection::btree_map(any::<String>(), value(), 0..5), pretty: bool
        ) {
            let object = Value::Object(all.clone().into_iter().collect());
            let text = if pretty { format!("{object:#}") } else { object.to_string() };
            prop_assert_eq!(read(&text), Ok(all.into_iter().collect()));
        }

        #[test]
        fn damaged_text_is_an_error_or_passed_over(text in "[{}\\[\\]\",:\\\\a1 é]{0,24}") {
            let _ = read(&text);
        }
    }

    #[test]
    fn names_are_compared_without_their_escapes() {
        let text = r#"{"x\"y":1,"ab":2,"\u0061b":3}"#;
        let mut members = Members::of(text).unwrap();
        let found = [r#"x"y"#, "ab", "ab"].map(|name| {
            let member = members.next().unwrap().unwrap();
            (member.is(name).unwrap(), member.is(r#"x\"y"#).unwrap(), member.is("a").unwrap())
        });
        assert_eq!(found, [(true, false, false); 3]);
    }

    #[test]
    fn what_is_cut_short_is_an_error() {
        let text = r#"{"a":{"b":["}"]},"c":"\"","d":1}"#;
        assert!(read(text).is_ok());
        for cut in 0..text.len() {
            assert!(read(&text[..cut]).is_err(), "{}", &text[..cut]);
        }
        assert!(read("[]").is_err() && read("{} x").is_err() && read("").is_err());
    }
}
