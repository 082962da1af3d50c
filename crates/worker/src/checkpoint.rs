use change::Lsn;
use serde::{Deserialize, Serialize};

/// How far a store has come: kept in the store, in the same atomic write as the effect.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Checkpoint {
    /// The log's random id, as in its record 0.
    pub log: String,
    /// The log's generation.
    pub generation: u32,
    /// Every record below this offset is in the store, and none at or above it.
    pub next_offset: i64,
    /// The store is Postgres up to this LSN.
    pub lsn: Lsn,
    /// Hash of the store's definition: another definition needs another store.
    pub definition: String,
    /// Whether the store has caught up with the log since it was last empty. `wait` and `verify` need it.
    pub ready: bool,
    /// Offsets of the records below `next_offset` that could not be applied and were left out on the operator's word.
    pub skipped: Vec<i64>,
}
