use std::time::Duration;

use change::{Lsn, Snapshot, TableSchema};
use tokio::runtime::Handle;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row, SimpleQueryMessage, SimpleQueryRow};

use crate::NotVerified;

/// Postgres, asked by SQL over one connection that has Millrace's session settings (TimeZone UTC, DateStyle ISO,
/// row_security off), so that values look as they do in the log.
pub struct Source {
    runtime: Handle,
    client: Client,
}

/// What was read in one snapshot.
pub(crate) struct Reading<T> {
    pub(crate) snapshot: Snapshot,
    /// The insert LSN, read after the snapshot was taken: all that it saw committed below.
    pub(crate) lsn: Lsn,
    pub(crate) found: T,
}

impl Source {
    /// Over this connection; `runtime` runs it, and must not be the caller's own.
    pub fn new(runtime: Handle, client: Client) -> Result<Self, NotVerified> {
        let source = Source { runtime, client };
        // The one setting that our literals need beside Millrace's own.
        source.rows("SET standard_conforming_strings = on")?;
        Ok(source)
    }

    /// Runs statements; gives the rows as the types print their values.
    pub(crate) fn rows(&self, sql: &str) -> Result<Vec<SimpleQueryRow>, NotVerified> {
        let messages = self.try_rows(sql).map_err(|error| NotVerified::postgres(sql, &error))?;
        Ok(messages)
    }

    /// The same, with the client's error.
    pub(crate) fn try_rows(&self, sql: &str) -> Result<Vec<SimpleQueryRow>, tokio_postgres::Error> {
        let messages = self.runtime.block_on(self.client.simple_query(sql))?;
        let row = |message| match message {
            SimpleQueryMessage::Row(row) => Some(row),
            _ => None,
        };
        Ok(messages.into_iter().filter_map(row).collect())
    }

    /// Runs one query with parameters.
    pub(crate) fn query(
        &self,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, NotVerified> {
        let rows = self.runtime.block_on(self.client.query(sql, parameters));
        rows.map_err(|error| NotVerified::postgres(sql, &error))
    }

    /// Reads within one snapshot. The table is locked ACCESS SHARE before the snapshot is taken: one truncated or
    /// rewritten in between would look empty (h24).
    pub(crate) fn read<T>(
        &self,
        table: &TableSchema,
        lock_timeout: Duration,
        read: impl FnOnce() -> Result<T, NotVerified>,
    ) -> Result<Reading<T>, NotVerified> {
        let begin = format!(
            "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL lock_timeout = {}; \
             LOCK TABLE {} IN ACCESS SHARE MODE",
            lock_timeout.as_millis().clamp(1, i32::MAX as u128),
            only(table)
        );
        let begun = self.try_rows(&begin).map_err(|error| match error.code() {
            Some(&SqlState::LOCK_NOT_AVAILABLE) => NotVerified::new(
                format!("table {} cannot be read: its lock was not to be had in {lock_timeout:.1?}", table.full_name()),
                "SELECT pid, mode, granted FROM pg_catalog.pg_locks WHERE relation = '...'::regclass shows who has it or waits for it",
            ),
            _ => NotVerified::postgres(&begin, &error),
        });
        let reading = begun.and_then(|_| {
            let snapshot = self.value("SELECT pg_catalog.pg_current_snapshot()::text")?;
            let snapshot =
                snapshot.parse().map_err(|error| NotVerified::source("taking a snapshot", error))?;
            let lsn = self.insert_lsn()?;
            let found = read()?;
            Ok(Reading { snapshot, lsn, found })
        });
        let ended = self.rows("ROLLBACK");
        let reading = reading?;
        ended?;
        Ok(reading)
    }

    /// See [`postgres::NUDGE`].
    pub(crate) fn nudge(&self) {
        if let Err(error) = self.try_rows(postgres::NUDGE) {
            // Not needed where others write.
            tracing::debug!(%error, "the source could not be woken up");
        }
    }

    fn insert_lsn(&self) -> Result<Lsn, NotVerified> {
        let lsn = self.value("SELECT pg_catalog.pg_current_wal_insert_lsn()::text")?;
        lsn.parse().map_err(|error| NotVerified::source("asking for the LSN", error))
    }

    fn value(&self, sql: &str) -> Result<String, NotVerified> {
        let rows = self.rows(sql)?;
        let value = rows.first().and_then(|row| text(row, 0));
        value.map(str::to_owned).ok_or_else(|| NotVerified::source(sql, "no answer"))
    }
}

/// A value as its type prints it; `None` for NULL.
pub(crate) fn text(row: &SimpleQueryRow, place: usize) -> Option<&str> {
    row.try_get(place).ok().flatten()
}

/// The table without its children, which are tables of their own: `ONLY "public"."emails"`. Partitions are none.
pub(crate) fn only(table: &TableSchema) -> String {
    let only = if table.partitioned() { "" } else { "ONLY " };
    format!("{only}{}.{}", identifier(&table.schema), identifier(&table.table))
}

/// An SQL identifier.
pub(crate) fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// An SQL literal of a type to be found out.
pub(crate) fn literal(value: Option<&str>) -> String {
    value.map_or_else(|| "NULL".to_owned(), |value| format!("'{}'", value.replace('\'', "''")))
}
