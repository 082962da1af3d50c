//! Where a store is in the log, and the record that it was left at.

use std::fmt;
use std::str::FromStr;

use change::{Lsn, ParsePositionError, Position};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use xxhash_rust::xxh3::xxh3_64;

use crate::LogRecord;

/// How far a store has come: kept in the store, in the same atomic write as the effect.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Checkpoint {
    /// The log's random id, as in its record 0. Followed by `-replaced` where that log does not hold the records any more
    /// that the store was built from.
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
    /// The last record of the last unit in the store. `None` for a store without one, and where an older version
    /// wrote the checkpoint. Read it through [`last_record`](Self::last_record).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<LastRecord>,
    /// Why the store has stopped where it is. An older version moves `next_offset` and may leave this behind, which then
    /// says nothing: read it through [`stopped_at`](Self::stopped_at).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped: Option<Stopped>,
}

/// The record at which a store has stopped.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Stopped {
    /// Its offset.
    pub offset: i64,
    /// Why the store cannot take it in: one line of at most [`REASON_CHARS`](Self::REASON_CHARS) characters.
    pub reason: String,
}

impl Stopped {
    /// Longest reason that is kept.
    pub const REASON_CHARS: usize = 500;

    /// Shortens the reason and brings it on one line.
    pub fn new(offset: i64, reason: &str) -> Self {
        let plain = reason.chars().map(|c| if c.is_control() { ' ' } else { c });
        Stopped { offset, reason: plain.take(Self::REASON_CHARS).collect() }
    }
}

/// Follows the log's id in the checkpoint of a store whose records the log does not hold any more.
const REPLACED: &str = "-replaced";

impl Checkpoint {
    /// The checkpoint of a store that holds nothing of a log yet.
    pub(crate) fn beginning(log: &str, generation: u32, definition: &str) -> Checkpoint {
        Checkpoint {
            log: log.to_owned(),
            generation,
            next_offset: 0,
            lsn: Lsn::ZERO,
            definition: definition.to_owned(),
            ready: false,
            skipped: Vec::new(),
            last: None,
            stopped: None,
        }
    }

    /// The record at which the store has stopped, and why.
    pub fn stopped_at(&self) -> Option<&Stopped> {
        self.stopped.as_ref().filter(|stopped| stopped.offset >= self.next_offset)
    }

    /// The record before `next_offset`, if the checkpoint names it. An older version moves `next_offset` and may
    /// leave `last` behind, which then says nothing.
    pub fn last_record(&self) -> Option<LastRecord> {
        self.last.filter(|last| last.offset + 1 == self.next_offset)
    }

    /// The checkpoint of the same store once the log is known to hold other records than those in the store. It names
    /// another log, so that no version continues it and its offsets are not compared with the log's.
    pub(crate) fn replaced(&self) -> Checkpoint {
        Checkpoint { log: format!("{}{REPLACED}", self.log), ready: false, ..self.clone() }
    }

    /// True if this is a [`replaced`](Self::replaced) checkpoint of that log.
    pub(crate) fn was_replaced_in(&self, log: &str) -> bool {
        self.log.strip_suffix(REPLACED) == Some(log)
    }

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

/// A record of the log, as a checkpoint remembers it. Written `41 0/16B3748:t:5 9f86d081884c7d65`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct LastRecord {
    /// Its offset.
    pub offset: i64,
    /// Its place in the order of the source's changes.
    pub position: Position,
    /// XXH3 of its value. The value holds the time at which the reader wrote it, so the same change written a second
    /// time has another digest.
    pub digest: u64,
}

impl LastRecord {
    /// The record as it is in the log; `None` for the record that names the log, which has no position.
    pub fn of(record: &LogRecord<'_>) -> Option<LastRecord> {
        let digest = || xxh3_64(record.value);
        record.position.map(|position| LastRecord { offset: record.offset, position, digest: digest() })
    }
}

impl fmt::Display for LastRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {:016x}", self.offset, self.position, self.digest)
    }
}

/// The text is not a record of the form `41 0/16B3748:t:5 9f86d081884c7d65`.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("`{0}` does not name a record: expected its offset, position and digest")]
pub struct ParseLastRecordError(pub String);

impl FromStr for LastRecord {
    type Err = ParseLastRecordError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (offset, rest) = text.split_once(' ')?;
            let (position, digest) = rest.split_once(' ')?;
            let position: Result<Position, ParsePositionError> = position.parse();
            Some(LastRecord {
                offset: offset.parse().ok().filter(|offset| *offset >= 0)?,
                position: position.ok()?,
                digest: u64::from_str_radix(digest, 16).ok()?,
            })
        };
        parse().ok_or_else(|| ParseLastRecordError(text.to_owned()))
    }
}

impl Serialize for LastRecord {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for LastRecord {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
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
    fn a_record_is_written_as_text_and_read_back() {
        let text = "41 0/16B3748:t:5 9f86d081884c7d65";
        let record: LastRecord = text.parse().unwrap();
        assert_eq!((record.offset, record.digest), (41, 0x9f86_d081_884c_7d65));
        assert_eq!(record.to_string(), text);
        for wrong in
            ["", "41", "41 0/16B3748:t:5", "-1 0/1:t:5 0", "x 0/1:t:5 0", "41 0/1:x:5 0", "41 0/1:t:5 z"]
        {
            assert!(wrong.parse::<LastRecord>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_record_that_an_older_version_left_behind_says_nothing() {
        let last = "41 0/16B3748:t:5 9f86d081884c7d65".parse().ok();
        let at = |next_offset| Checkpoint { next_offset, last, ..Checkpoint::beginning("a", 1, "d") };
        assert_eq!(at(42).last_record(), last);
        assert_eq!(at(50).last_record(), None);
    }

    #[test]
    fn h42_offsets_of_a_log_whose_records_were_replaced_do_not_compare() {
        let at = |next_offset| Checkpoint { next_offset, ..Checkpoint::beginning("a", 1, "d") };
        assert!(!at(4).reaches(&at(5)));
        assert!(at(4).reaches(&at(5).replaced()));
        assert!(at(5).replaced().was_replaced_in("a") && !at(5).was_replaced_in("a"));
    }

    #[test]
    fn h42_offsets_compare_within_a_log_and_lsns_between_two() {
        let at = |log: &str, next_offset, lsn| Checkpoint {
            next_offset,
            lsn: Lsn(lsn),
            ..Checkpoint::beginning(log, 1, "d")
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
