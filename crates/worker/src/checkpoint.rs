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
    /// The store's definition as its [`StoreSpec`](crate::StoreSpec) had it: another one needs another store.
    pub definition: String,
    /// Whether the store has caught up with the log since it was last empty. `wait` and `verify` need it.
    pub ready: bool,
    /// Offsets of the records below `next_offset` that could not be applied and were left out on the operator's word.
    pub skipped: Vec<i64>,
}

impl Checkpoint {
    /// Whether the store holds what this definition asks for, in whatever form.
    pub fn is_of(&self, definition: &str) -> bool {
        meaning(&self.definition) == meaning(definition)
    }

    /// Whether readers of a store at `shown` may be shown one at `self` instead without going back. Offsets compare
    /// within one log; between two logs only LSNs do.
    pub fn reaches(&self, shown: &Checkpoint) -> bool {
        let same_log = (&self.log, self.generation) == (&shown.log, shown.generation);
        self.lsn >= shown.lsn && (!same_log || self.next_offset >= shown.next_offset)
    }
}

/// What a definition says of a store's content: all but its form.
fn meaning(definition: &str) -> &str {
    definition.split_once(':').map_or(definition, |(meaning, _)| meaning)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h42_offsets_compare_within_a_log_and_lsns_between_two() {
        let at = |log: &str, next_offset, lsn| Checkpoint {
            log: log.into(),
            generation: 1,
            next_offset,
            lsn: Lsn(lsn),
            definition: "d".into(),
            ready: true,
            skipped: Vec::new(),
        };
        for (fresh, shown, reaches) in [
            (at("a", 5, 50), at("a", 5, 50), true),
            (at("a", 4, 50), at("a", 5, 50), false),
            (at("a", 5, 49), at("a", 5, 50), false),
            (at("b", 1, 50), at("a", 5, 50), true),
            (at("b", 9, 49), at("a", 5, 50), false),
        ] {
            assert_eq!(fresh.reaches(&shown), reaches, "{fresh:?} for {shown:?}");
        }
    }
}
