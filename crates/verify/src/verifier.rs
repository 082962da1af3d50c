use std::fmt;
use std::thread;
use std::time::{Duration, Instant};

use change::Lsn;
use serde::Serialize;
use serde_json::Value;
use worker::Checkpoint;

use crate::counter::{self, Counter};
use crate::documents::{self, Index};
use crate::{CounterStore, DocumentStore, Log, Observer, Source, StoreError};

/// Between two looks at a store, doubled from the first to the last.
const LOOK: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(100));
/// A store that is behind for so long may wait for a source on which nothing happens: it is woken up this often.
const NUDGE: Duration = Duration::from_millis(100);
const NUDGE_AGAIN: Duration = Duration::from_secs(2);

/// One thing that is not as in Postgres.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Difference {
    /// `counters.unread`, `search.emails`.
    pub store: String,
    /// The group's field, or the document's id.
    pub key: String,
    /// What Postgres says: a counter's value, or the values of the attributes that differ; null for nothing.
    pub source: Value,
    /// What the store says.
    pub found: Value,
}

/// A store that was compared to the end.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Verified {
    /// `counters.unread`, `search.emails`.
    pub store: String,
    /// Where the store stood.
    pub lsn: Lsn,
    /// Groups or documents that were compared.
    pub checked: u64,
    /// How many of them differ.
    pub differences: u64,
}

/// Why a store could not be compared to the end. Nothing is said of whether it is equal.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NotVerified {
    /// What happened, to what.
    pub what: String,
    /// What to do about it; empty where trying again is all.
    pub remedy: String,
}

impl fmt::Display for NotVerified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        if self.remedy.is_empty() { Ok(()) } else { write!(f, "\n  remedy: {}", self.remedy) }
    }
}

impl std::error::Error for NotVerified {}

impl NotVerified {
    /// Puts the two together.
    pub fn new(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        NotVerified { what: what.into(), remedy: remedy.into() }
    }

    /// A record of the log that cannot be read.
    pub(crate) fn record(offset: i64, reason: impl fmt::Display) -> Self {
        NotVerified::new(format!("the record at offset {offset} of the log cannot be read: {reason}"), "")
    }

    pub(crate) fn source(doing: &str, reason: impl fmt::Display) -> Self {
        NotVerified::new(format!("Postgres: {doing}: {reason}"), "")
    }

    pub(crate) fn postgres(sql: &str, error: &tokio_postgres::Error) -> Self {
        /// A statement may name thousands of keys.
        const SHOWN: usize = 160;
        let shown: String = sql.chars().take(SHOWN).collect();
        let reason = match error.as_db_error() {
            Some(db) => db.to_string(),
            None => std::error::Error::source(error)
                .map_or(error.to_string(), |cause| format!("{error}: {cause}")),
        };
        NotVerified::source(&shown, reason)
    }

    pub(crate) fn store(store: &str, error: &StoreError) -> Self {
        NotVerified::new(format!("{store} cannot be read: {error}"), "")
    }
}

/// Compares stores with Postgres, one after the other.
pub struct Verifier<'a> {
    pub(crate) source: &'a Source,
    pub(crate) log: &'a mut dyn Log,
    pub(crate) observer: &'a mut dyn Observer,
    /// How long a store may take to come to where it is compared.
    pub(crate) timeout: Duration,
}

impl<'a> Verifier<'a> {
    /// `timeout` is how long a store may take, each time, to come to where Postgres stands.
    pub fn new(
        source: &'a Source,
        log: &'a mut dyn Log,
        observer: &'a mut dyn Observer,
        timeout: Duration,
    ) -> Self {
        Verifier { source, log, observer, timeout }
    }

    /// Compares a counter.
    pub fn counter(
        &mut self,
        counter: &Counter,
        store: &mut dyn CounterStore,
    ) -> Result<Verified, NotVerified> {
        counter::verify(self, counter, store)
    }

    /// Compares a search index.
    pub fn index(&mut self, index: &Index, store: &mut dyn DocumentStore) -> Result<Verified, NotVerified> {
        documents::verify(self, index, store)
    }

    /// Waits until the store has come to `wanted`.
    pub(crate) fn reach(
        &self,
        expected: &Expected<'_>,
        wanted: Lsn,
        mut checkpoint: impl FnMut(Duration) -> Result<Option<Checkpoint>, StoreError>,
    ) -> Result<(), NotVerified> {
        let started = Instant::now();
        let (mut pause, mut nudge) = (LOOK.0, NUDGE);
        loop {
            // Asked before the store is, so that the last look is at the very end.
            let left = self.timeout.saturating_sub(started.elapsed());
            let found = checkpoint(left.min(NUDGE));
            let reason = match &found {
                Ok(Some(at)) => match expected.judge(self.log.id(), at, wanted)? {
                    None => return Ok(()),
                    Some(reason) => reason,
                },
                Ok(None) => "nothing is there yet".to_owned(),
                Err(error) => error.to_string(),
            };
            if left.is_zero() {
                return Err(NotVerified::new(
                    format!("{}: not come to {wanted} within {:.1?}: {reason}", expected.store, self.timeout),
                    "see `millrace status`; or wait longer with --timeout",
                ));
            }
            if started.elapsed() >= nudge {
                self.source.nudge();
                nudge = started.elapsed() + NUDGE_AGAIN;
            }
            thread::sleep(pause.min(left));
            pause = (pause * 2).min(LOOK.1);
        }
    }
}

/// What a store's checkpoint must be of.
pub(crate) struct Expected<'a> {
    pub(crate) store: &'a str,
    pub(crate) definition: &'a str,
}

impl Expected<'_> {
    /// Why the store is not yet where it can be compared; an error when it never will be.
    pub(crate) fn judge(
        &self,
        log: &str,
        at: &Checkpoint,
        wanted: Lsn,
    ) -> Result<Option<String>, NotVerified> {
        if at.definition != self.definition {
            return Err(self.other(at));
        }
        if at.log != log {
            let what =
                format!("{}: the store follows log {} and the pipeline's is {log}", self.store, at.log);
            return Err(NotVerified::new(what, "start the worker, which says what to do"));
        }
        Ok(if !at.ready {
            Some(format!("it is being filled from the log's beginning, and stands at {}", at.lsn))
        } else if at.lsn < wanted {
            Some(format!("it stands at {}, {} bytes behind", at.lsn, wanted.bytes_since(at.lsn)))
        } else {
            None
        })
    }

    /// Of a store of another definition, or one in whose form its table would not print its groups.
    fn other(&self, at: &Checkpoint) -> NotVerified {
        let store = self.store;
        if at.is_of(self.definition) {
            return NotVerified::new(
                format!(
                    "{store}: the types of its table ask for another form of its groups than the store has"
                ),
                "the worker builds it again; after ALTER TABLE it does so with the table's next change",
            );
        }
        NotVerified::new(
            format!("{store}: the store was made under another definition"),
            "start the worker with this configuration, which fills it anew",
        )
    }

    /// The checkpoint that a part of the store was read with; an error if there is none, or it went back.
    pub(crate) fn there(
        &self,
        log: &str,
        at: Option<Checkpoint>,
        wanted: Lsn,
    ) -> Result<Checkpoint, NotVerified> {
        let at = at.ok_or_else(|| NotVerified::new(format!("{}: its checkpoint is gone", self.store), ""))?;
        self.demand(log, &at, wanted)?;
        Ok(at)
    }

    /// The same of what was read together with a checkpoint after it had been reached.
    pub(crate) fn demand(&self, log: &str, at: &Checkpoint, wanted: Lsn) -> Result<(), NotVerified> {
        match self.judge(log, at, wanted)? {
            None => Ok(()),
            Some(reason) => {
                Err(NotVerified::new(format!("{}: gone back meanwhile: {reason}", self.store), ""))
            }
        }
    }
}
