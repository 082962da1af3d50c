//! Rows of the log, as far as they are asked for.

use change::{Event, Field, Op, TableSchema};
use worker::LogRecord;

use crate::NotVerified;

/// One record about the table that is looked at.
pub(crate) struct RowRecord<'a> {
    pub(crate) op: Op,
    pub(crate) record: LogRecord<'a>,
    event: Event<'a>,
}

/// A column's value in an image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Datum<'a> {
    Known(Field<'a>),
    /// Not in the log: as it was before the change.
    Unchanged,
    /// Not in the log, for the row's size.
    Omitted,
}

impl<'a> RowRecord<'a> {
    /// Reads a record of `table`; `None` for one of something else.
    pub(crate) fn read(table: &TableSchema, record: &LogRecord<'a>) -> Result<Option<Self>, NotVerified> {
        if record.schema.is_none_or(|schema| schema.relation != table.relation) {
            return Ok(None);
        }
        let event = Event::decode(record.value).map_err(|e| NotVerified::record(record.offset, e))?;
        Ok(Some(RowRecord { op: event.op, record: *record, event }))
    }

    /// The values of `columns` in the row that the change removed; `None` when it removed none.
    ///
    /// An update that does not move the key may come without the old row. Of the columns that are asked for it then
    /// holds only those of the key, or whoever asks is refused.
    pub(crate) fn before(&self, columns: &[&str]) -> Result<Option<Vec<Field<'a>>>, NotVerified> {
        let omitted = self.names(self.record.omitted)?;
        match (self.op, self.event.before) {
            (Op::Update | Op::Delete, Some(_)) if columns.iter().any(|column| among(&omitted, column)) => {
                Err(self.lacks(&omitted.join(", ")))
            }
            (Op::Update | Op::Delete, Some(row)) => Ok(Some(self.fields(row, columns)?)),
            (Op::Update, None) => self.key(columns).and_then(|key| {
                let missing = columns.iter().zip(&key).find(|(_, value)| **value == Field::Missing);
                match missing {
                    Some((column, _)) => {
                        Err(self.error(format!("it does not hold the old value of `{column}`")))
                    }
                    None => Ok(Some(key)),
                }
            }),
            (Op::Delete, None) => Err(self.error("it has no `before`")),
            _ => Ok(None),
        }
    }

    /// The values of `columns` in the row that the change left behind; `None` when it left none.
    pub(crate) fn after(&self, columns: &[&str]) -> Result<Option<Vec<Datum<'a>>>, NotVerified> {
        let Some(row) = self.event.after else {
            return match self.op {
                Op::Create | Op::Update | Op::Read => Err(self.error("it has no `after`")),
                _ => Ok(None),
            };
        };
        let unchanged = self.names(self.record.unchanged)?;
        let omitted = self.names(self.record.omitted)?;
        // A key that is stored out of line is whole in the record's key.
        let key = self.key(columns)?;
        let value = |((column, field), key): ((&&str, Field<'a>), Field<'a>)| {
            if among(&omitted, column) {
                Datum::Omitted
            } else if !among(&unchanged, column) {
                Datum::Known(field)
            } else if key != Field::Missing {
                Datum::Known(key)
            } else {
                Datum::Unchanged
            }
        };
        Ok(Some(columns.iter().zip(self.fields(row, columns)?).zip(key).map(value).collect()))
    }

    /// The values that the record's key has of `columns`.
    pub(crate) fn key(&self, columns: &[&str]) -> Result<Vec<Field<'a>>, NotVerified> {
        let mut found = Vec::new();
        change::key_fields(self.record.key, columns, &mut found).map_err(|e| self.error(e))?;
        Ok(found)
    }

    /// The columns that a header names.
    fn names(&self, header: &[u8]) -> Result<Vec<String>, NotVerified> {
        change::column_names(header).map_err(|e| self.error(e))
    }

    /// A later snapshot sees the row by itself.
    pub(crate) fn lacks(&self, columns: &str) -> NotVerified {
        let what = format!(
            "the record at offset {} of the log, which was written meanwhile, lacks {columns}: the row is larger than a \
             record may be",
            self.record.offset
        );
        NotVerified::new(what, "run `millrace verify` again")
    }

    pub(crate) fn error(&self, reason: impl std::fmt::Display) -> NotVerified {
        NotVerified::record(self.record.offset, reason)
    }

    fn fields(&self, row: &'a str, columns: &[&str]) -> Result<Vec<Field<'a>>, NotVerified> {
        let mut found = Vec::new();
        change::fields(row, columns, &mut found).map_err(|e| self.error(e))?;
        Ok(found)
    }
}

fn among(names: &[String], column: &str) -> bool {
    names.iter().any(|name| name == column)
}
