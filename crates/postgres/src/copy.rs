//! COPY's text format, which prints values as the stream does: a row a line, columns between tabs.
//! <https://www.postgresql.org/docs/current/sql-copy.html>

use std::ops::Range;

use change::{Datum, TupleBuf};

/// The bytes are not what COPY prints.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum CopyError {
    #[error("a row of {found} columns where {expected} were asked for")]
    ColumnCount { expected: usize, found: usize },
    #[error("a row that is not UTF-8")]
    NotUtf8,
}

/// Makes tuples of rows; reused from row to row.
#[derive(Debug, Default)]
pub(crate) struct RowReader {
    tuple: TupleBuf,
    /// Values without their escapes.
    plain: String,
    values: Vec<Option<Range<usize>>>,
}

impl RowReader {
    /// Reads a row of so many columns, its line's end left out.
    pub(crate) fn read(&mut self, line: &[u8], columns: usize) -> Result<&TupleBuf, CopyError> {
        let line = std::str::from_utf8(line).map_err(|_| CopyError::NotUtf8)?;
        self.plain.clear();
        self.values.clear();
        // A table without columns has empty lines.
        if columns > 0 || !line.is_empty() {
            for field in line.split('\t') {
                self.field(field);
            }
        }
        if self.values.len() != columns {
            return Err(CopyError::ColumnCount { expected: columns, found: self.values.len() });
        }
        let value = |range: &Option<Range<usize>>| match range {
            Some(range) => Datum::Text(&self.plain[range.clone()]),
            None => Datum::Null,
        };
        self.tuple.fill(self.values.iter().map(value));
        Ok(&self.tuple)
    }

    fn field(&mut self, field: &str) {
        if field == "\\N" {
            return self.values.push(None);
        }
        let start = self.plain.len();
        let mut rest = field;
        while let Some((before, escaped)) = rest.split_once('\\') {
            self.plain.push_str(before);
            let mut chars = escaped.chars();
            // COPY prints these and no others: a backslash before anything else stands for it.
            match chars.next() {
                Some('b') => self.plain.push('\u{8}'),
                Some('f') => self.plain.push('\u{c}'),
                Some('n') => self.plain.push('\n'),
                Some('r') => self.plain.push('\r'),
                Some('t') => self.plain.push('\t'),
                Some('v') => self.plain.push('\u{b}'),
                Some(other) => self.plain.push(other),
                None => {}
            }
            rest = chars.as_str();
        }
        self.plain.push_str(rest);
        self.values.push(Some(start..self.plain.len()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str, columns: usize) -> Result<Vec<String>, CopyError> {
        let mut reader = RowReader::default();
        let show = |datum| match datum {
            Datum::Text(text) => format!("{text:?}"),
            other => format!("{other:?}"),
        };
        reader.read(line.as_bytes(), columns).map(|tuple| tuple.as_tuple().iter().map(show).collect())
    }

    #[test]
    fn values_come_back_as_they_were() {
        assert_eq!(read("1\té\t\\N\t", 4).unwrap(), ["\"1\"", "\"é\"", "Null", "\"\""]);
        assert_eq!(
            read("a\\tb\\nc\\\\N\t\\\\N\t\\b\\f\\r\\v", 3).unwrap(),
            ["\"a\\tb\\nc\\\\N\"", "\"\\\\N\"", "\"\\u{8}\\u{c}\\r\\u{b}\""]
        );
        assert_eq!(read("", 0).unwrap(), [""; 0]);
        assert_eq!(read("", 1).unwrap(), ["\"\""]);
    }

    #[test]
    fn other_bytes_are_errors() {
        assert_eq!(read("a\tb", 3), Err(CopyError::ColumnCount { expected: 3, found: 2 }));
        assert_eq!(RowReader::default().read(b"\xff", 1).unwrap_err(), CopyError::NotUtf8);
    }
}
