//! COPY's text format, which prints values as the stream does: a row a line, columns between tabs.
//! <https://www.postgresql.org/docs/current/sql-copy.html>

use change::{Datum, TupleBuf};
use memchr::{memchr, memchr_iter};

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
    /// A value without its escapes.
    plain: String,
}

impl RowReader {
    /// Reads a row of so many columns, its line's end left out.
    pub(crate) fn read(&mut self, line: &[u8], columns: usize) -> Result<&TupleBuf, CopyError> {
        let line = simdutf8::basic::from_utf8(line).map_err(|_| CopyError::NotUtf8)?;
        self.tuple.clear();
        // A table without columns has empty lines.
        if columns > 0 || !line.is_empty() {
            let escapes = memchr(b'\\', line.as_bytes()).is_some();
            let mut start = 0;
            for end in memchr_iter(b'\t', line.as_bytes()).chain([line.len()]) {
                self.field(&line[start..end], escapes);
                start = end + 1;
            }
        }
        let found = self.tuple.as_tuple().len();
        if found == columns {
            Ok(&self.tuple)
        } else {
            Err(CopyError::ColumnCount { expected: columns, found })
        }
    }

    /// Takes in a value of a line in which there are `escapes`.
    fn field(&mut self, field: &str, escapes: bool) {
        if !escapes || !field.contains('\\') {
            return self.tuple.push(Datum::Text(field));
        }
        if field == "\\N" {
            return self.tuple.push(Datum::Null);
        }
        self.plain.clear();
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
        self.tuple.push(Datum::Text(&self.plain));
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
