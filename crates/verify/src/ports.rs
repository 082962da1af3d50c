//! What is needed of the log and of the stores, and who is told what is found.

use std::time::Duration;

use change::Lsn;
use worker::{Checkpoint, LogRecord};

use crate::{Difference, NotVerified};

/// Where to begin to read the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum From {
    /// Its first record.
    Beginning,
    /// The first record at or after this offset.
    Offset(i64),
    /// The first record that committed at the source at or after this time, milliseconds since the epoch.
    Time(i64),
}

/// The log. Only committed records are seen.
pub trait Log {
    /// Its random id, as checkpoints name it.
    fn id(&self) -> &str;

    /// Gives `take` the records from `from` to before the offset `end`, in order. An error of `take` ends it.
    ///
    /// Records that retention has removed where reading was to begin are an error, never passed over.
    fn read(
        &mut self,
        from: From,
        end: i64,
        take: &mut dyn FnMut(&LogRecord<'_>) -> Result<(), NotVerified>,
    ) -> Result<(), NotVerified>;
}

/// Why a store cannot be read.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub struct StoreError(pub String);

/// A part of a counter's content, and the checkpoint of the same moment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Part {
    /// What the part is of.
    pub checkpoint: Option<Checkpoint>,
    /// Groups ("" without GROUP BY) and their values.
    pub groups: Vec<(String, String)>,
    /// Where the next part begins; `None` after the last.
    pub next: Option<String>,
}

/// One counter.
pub trait CounterStore {
    /// Where it stands; `None` when there is nothing.
    fn checkpoint(&mut self) -> Result<Option<Checkpoint>, StoreError>;

    /// A part of its content, from the beginning or from where the last part ended. Each part is of one moment, and the store
    /// moves on between them. A group may be in several parts, and one that is there all the time must be in one.
    fn part(&mut self, from: Option<&str>) -> Result<Part, StoreError>;

    /// The values of these groups and the checkpoint, both of one moment; `None` for a group that is not there.
    fn groups(&mut self, groups: &[String]) -> Result<(Option<Checkpoint>, Vec<Option<String>>), StoreError>;
}

/// Documents of one commit, each as JSON, and that commit's checkpoint.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Documents {
    /// What the documents are the state of.
    pub checkpoint: Checkpoint,
    /// The documents.
    pub documents: Vec<String>,
}

/// One search index.
pub trait DocumentStore {
    /// Where it stands; `None` when there is nothing. May wait for `wanted`, at most as long as `patience`.
    fn checkpoint(&mut self, wanted: Lsn, patience: Duration) -> Result<Option<Checkpoint>, StoreError>;

    /// The documents that have these ids; those that are not there are left out.
    fn fetch(&mut self, ids: &[String]) -> Result<Documents, StoreError>;

    /// At most `limit` documents that follow the id `after` in the order of ids, of which at least the columns of
    /// the key are given.
    fn page(&mut self, after: Option<&str>, limit: usize, key: &[&str]) -> Result<Documents, StoreError>;
}

/// Is told what is found, as it is found.
pub trait Observer {
    /// A difference: a defect.
    fn difference(&mut self, difference: Difference);

    /// `done` of `what` so far: `documents`, `records of the log`.
    fn progress(&mut self, store: &str, what: &str, done: u64) {
        let _ = (store, what, done);
    }
}
