//! Rows as Postgres sends them, without a copy.
//!
//! A [`Tuple`] borrows the bytes of pgoutput's TupleData: a 16-bit column count, then for each column a kind
//! byte (`n` null, `u` unchanged TOAST value, `t` text) and, for text, a 32-bit length and the bytes. It is
//! checked once, when it is made, and then walked without any further check that can fail.
//! Source: <https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html>.

/// One column's value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Datum<'a> {
    /// SQL NULL; in an old tuple that holds only the key, every column that is not in the key.
    Null,
    /// An out-of-line value that the update did not change and Postgres did not send.
    Unchanged,
    /// The value's text, as the type's output function prints it under Millrace's session settings.
    Text(&'a str),
}

/// A [`Datum`] whose text was found to be UTF-8 when its tuple was made, and is not looked at again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum RawDatum<'a> {
    Null,
    Unchanged,
    Text(&'a [u8]),
}

/// The bytes are not a tuple.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TupleError {
    /// The bytes end inside the tuple.
    #[error("the tuple is cut short")]
    Truncated,
    /// A column's kind byte is none of `n`, `u`, `t`.
    #[error("unknown kind of column value: byte {0:#04x}")]
    UnknownKind(u8),
    /// A text value is not UTF-8.
    #[error("a column value is not UTF-8; the connection's client_encoding must be UTF8")]
    NotUtf8,
}

/// A row, borrowed from the message that carried it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tuple<'a> {
    columns: u16,
    body: &'a [u8],
}

impl<'a> Tuple<'a> {
    /// Takes one tuple off the front of `bytes`; gives it and what follows it.
    pub fn parse(bytes: &'a [u8]) -> Result<(Self, &'a [u8]), TupleError> {
        let (count, body) = bytes.split_first_chunk::<2>().ok_or(TupleError::Truncated)?;
        let columns = u16::from_be_bytes(*count);
        let mut rest = body;
        for _ in 0..columns {
            let (kind, after) = rest.split_first().ok_or(TupleError::Truncated)?;
            rest = match kind {
                b'n' | b'u' => after,
                b't' => {
                    let (length, after) = after.split_first_chunk::<4>().ok_or(TupleError::Truncated)?;
                    let length = u32::from_be_bytes(*length) as usize;
                    let (text, after) = after.split_at_checked(length).ok_or(TupleError::Truncated)?;
                    simdutf8::basic::from_utf8(text).map_err(|_| TupleError::NotUtf8)?;
                    after
                }
                other => return Err(TupleError::UnknownKind(*other)),
            };
        }
        Ok((Tuple { columns, body: &body[..body.len() - rest.len()] }, rest))
    }

    /// Number of columns.
    pub fn len(&self) -> usize {
        usize::from(self.columns)
    }

    /// Whether the tuple has no column at all; Postgres allows such tables.
    pub fn is_empty(&self) -> bool {
        self.columns == 0
    }

    /// The values, in the relation's order.
    pub fn iter(&self) -> TupleIter<'a> {
        TupleIter { left: self.columns, rest: self.body }
    }

    /// The values, their texts as bytes.
    pub(crate) fn raw(&self) -> RawIter<'a> {
        RawIter(self.iter())
    }

    /// The encoded values, for digests and copies.
    pub fn as_bytes(&self) -> &'a [u8] {
        self.body
    }
}

impl<'a> IntoIterator for Tuple<'a> {
    type Item = Datum<'a>;
    type IntoIter = TupleIter<'a>;

    fn into_iter(self) -> TupleIter<'a> {
        self.iter()
    }
}

/// Iterator over a [`Tuple`]'s values.
#[derive(Clone, Debug)]
pub struct TupleIter<'a> {
    left: u16,
    rest: &'a [u8],
}

impl<'a> TupleIter<'a> {
    /// Takes one value off.
    fn step(&mut self) -> Option<RawDatum<'a>> {
        self.left = self.left.checked_sub(1)?;
        let (kind, after) = self.rest.split_first()?;
        let (datum, after) = match kind {
            b't' => {
                let (length, after) = after.split_first_chunk::<4>()?;
                let (text, after) = after.split_at_checked(u32::from_be_bytes(*length) as usize)?;
                (RawDatum::Text(text), after)
            }
            b'u' => (RawDatum::Unchanged, after),
            _ => (RawDatum::Null, after),
        };
        self.rest = after;
        Some(datum)
    }
}

impl<'a> Iterator for TupleIter<'a> {
    type Item = Datum<'a>;

    fn next(&mut self) -> Option<Datum<'a>> {
        match self.step()? {
            RawDatum::Text(text) => simdutf8::basic::from_utf8(text).ok().map(Datum::Text),
            RawDatum::Unchanged => Some(Datum::Unchanged),
            RawDatum::Null => Some(Datum::Null),
        }
    }

    /// Passes over values without looking at their text.
    fn nth(&mut self, places: usize) -> Option<Datum<'a>> {
        for _ in 0..places {
            self.step()?;
        }
        self.next()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (usize::from(self.left), Some(usize::from(self.left)))
    }
}

impl ExactSizeIterator for TupleIter<'_> {}

/// Iterator over a [`Tuple`]'s values that does not look at their text.
pub(crate) struct RawIter<'a>(TupleIter<'a>);

impl<'a> Iterator for RawIter<'a> {
    type Item = RawDatum<'a>;

    fn next(&mut self) -> Option<RawDatum<'a>> {
        self.0.step()
    }
}

/// Builds a tuple from values, for sources that are not pgoutput (COPY, tests).
#[derive(Clone, Debug)]
pub struct TupleBuf {
    /// In pgoutput's form.
    bytes: Vec<u8>,
    columns: u16,
}

impl Default for TupleBuf {
    fn default() -> Self {
        TupleBuf { bytes: vec![0, 0], columns: 0 }
    }
}

impl TupleBuf {
    /// A tuple of these values.
    ///
    /// # Panics
    /// With more than 65,535 values, or a value longer than 4 GiB; Postgres allows neither.
    pub fn new<'a>(values: impl IntoIterator<Item = Datum<'a>>) -> Self {
        let mut tuple = TupleBuf::default();
        tuple.fill(values);
        tuple
    }

    /// Takes other values and keeps the memory.
    ///
    /// # Panics
    /// As [`new`](Self::new).
    pub fn fill<'a>(&mut self, values: impl IntoIterator<Item = Datum<'a>>) {
        self.clear();
        values.into_iter().for_each(|value| self.push(value));
    }

    /// Begins another tuple, of no values yet, and keeps the memory.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.bytes.extend_from_slice(&[0, 0]);
        self.columns = 0;
    }

    /// Appends a value.
    ///
    /// # Panics
    /// As [`new`](Self::new).
    pub fn push(&mut self, value: Datum<'_>) {
        let bytes = &mut self.bytes;
        match value {
            Datum::Null => bytes.push(b'n'),
            Datum::Unchanged => bytes.push(b'u'),
            Datum::Text(text) => {
                let length = u32::try_from(text.len()).expect("Postgres has values of at most 1 GiB");
                bytes.push(b't');
                bytes.extend_from_slice(&length.to_be_bytes());
                bytes.extend_from_slice(text.as_bytes());
            }
        }
        self.columns = self.columns.checked_add(1).expect("Postgres has at most 1,600 columns");
        bytes[..2].copy_from_slice(&self.columns.to_be_bytes());
    }

    /// The tuple, borrowed.
    pub fn as_tuple(&self) -> Tuple<'_> {
        Tuple { columns: self.columns, body: &self.bytes[2..] }
    }

    /// The tuple in pgoutput's form, count included.
    pub fn wire_bytes(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn walks_what_was_built_and_leaves_the_rest() {
        let values = [Datum::Text("42"), Datum::Null, Datum::Unchanged, Datum::Text(""), Datum::Text("é")];
        let built = TupleBuf::new(values);
        let wire = [built.wire_bytes(), b"tail"].concat();
        let (tuple, rest) = Tuple::parse(&wire).unwrap();
        assert_eq!((tuple.len(), rest), (5, &b"tail"[..]));
        assert_eq!(tuple.iter().collect::<Vec<_>>(), values);
        for (place, value) in values.into_iter().enumerate() {
            assert_eq!(tuple.iter().nth(place), Some(value));
        }
        assert_eq!(tuple.iter().nth(values.len()), None);
        assert_eq!(tuple, built.as_tuple());
    }

    #[test]
    fn damaged_bytes_are_errors() {
        let wire = TupleBuf::new([Datum::Text("hello"), Datum::Null]).wire_bytes().to_vec();
        for cut in 0..wire.len() {
            assert_eq!(Tuple::parse(&wire[..cut]), Err(TupleError::Truncated), "cut at {cut}");
        }
        assert_eq!(Tuple::parse(b"\0\x01b"), Err(TupleError::UnknownKind(b'b')));
        assert_eq!(Tuple::parse(b"\0\x01t\0\0\0\x01\xff"), Err(TupleError::NotUtf8));
    }
}
