//! From when on the log may hold transactions that a snapshot does not see.
//!
//! Before the snapshot is taken, the clock is read, and then who holds an xid. A transaction that the snapshot does
//! not see either held an xid at that moment, and then it committed after it had begun (or was prepared); or it got
//! its xid after it, and then it committed after it. Either way its commit time is not before the earliest of these.
//! Whoever left the list since was seen by the snapshot.
//!
//! Another role's transactions show their xid but hide their beginning from a role without `pg_read_all_stats`. Most
//! end within milliseconds: those that hold an xid now are given a moment to end before the snapshot is taken, and
//! only if one does not, the log is read from its beginning.

use std::thread;
use std::time::{Duration, Instant};

use crate::source::{Source, text};
use crate::{From, NotVerified};

/// Commit times in the log may be a little before their true order, and the source's clock may be set back a little.
const MARGIN_MS: i64 = 10_000;
/// How long transactions of which the beginning is hidden are given to end.
const DRAIN: Duration = Duration::from_secs(3);
/// Between two looks at them.
const LOOK: Duration = Duration::from_millis(20);

/// Who holds an xid in this database: pid, xid, and when its transaction began.
const HOLDERS: &str =
    "SELECT pid::text || '/' || backend_xid::text, floor(extract(epoch FROM xact_start) * 1000)::bigint::text
    FROM pg_catalog.pg_stat_activity
    WHERE backend_xid IS NOT NULL AND (datid IS NULL OR datid = (SELECT oid FROM pg_catalog.pg_database
        WHERE datname = pg_catalog.current_database()))";
/// Asked after the holders, since PREPARE moves a transaction from there to here.
const PREPARED: &str = "SELECT floor(extract(epoch FROM min(prepared)) * 1000)::bigint::text
    FROM pg_catalog.pg_prepared_xacts WHERE database = pg_catalog.current_database()";
const NOW: &str = "SELECT floor(extract(epoch FROM pg_catalog.clock_timestamp()) * 1000)::bigint::text";

/// Where in the log the reading must begin for any snapshot that is taken after this call.
pub fn open(source: &Source) -> Result<From, NotVerified> {
    let now = source.rows(NOW)?;
    let mut since = number(now.first().and_then(|row| text(row, 0)))?;
    let mut hidden = Vec::new();
    for row in source.rows(HOLDERS)? {
        match text(&row, 1) {
            Some(began) => since = since.min(number(Some(began))?),
            None => hidden.extend(text(&row, 0).map(str::to_owned)),
        }
    }
    if let Some(prepared) = source.rows(PREPARED)?.first().and_then(|row| text(row, 0)) {
        since = since.min(number(Some(prepared))?);
    }
    if !ended(source, hidden)? {
        tracing::warn!(
            "a transaction of another role is open and hides when it began: reading the log from its beginning; \
             GRANT pg_read_all_stats to the role of postgres.url makes this quick"
        );
        return Ok(From::Beginning);
    }
    Ok(From::Time(since.saturating_sub(MARGIN_MS)))
}

/// Whether all of these ended in time.
fn ended(source: &Source, mut hidden: Vec<String>) -> Result<bool, NotVerified> {
    let asked = Instant::now();
    while !hidden.is_empty() {
        if asked.elapsed() >= DRAIN {
            return Ok(false);
        }
        thread::sleep(LOOK);
        let holders = source.rows(HOLDERS)?;
        hidden.retain(|one| holders.iter().any(|row| text(row, 0) == Some(one)));
    }
    Ok(true)
}

fn number(value: Option<&str>) -> Result<i64, NotVerified> {
    let parsed = value.and_then(|value| value.parse().ok());
    parsed.ok_or_else(|| NotVerified::source("asking for the time", format!("{value:?} is not a number")))
}
