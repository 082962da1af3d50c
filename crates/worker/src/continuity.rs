//! Whether the log goes on from where a store was left.
//!
//! The log's id does not tell. When a broker loses the end of its log (power loss before a flush, an unclean leader
//! election) the reader writes the lost changes again, under the same id, often at other offsets. A worker that sought
//! to its checkpoint's offset would then begin in the middle of a transaction, or leave changes out, or apply some twice.
//!
//! So each time a worker positions itself it reads again the record that it applied last, which is the one before the
//! checkpoint's offset:
//!
//! 1. It must be there, end a unit, and be the [`LastRecord`] that the checkpoint names. Then what follows it begins a
//!    unit, and the worker's check of the order demands a position above it.
//! 2. A checkpoint of an older version names no record. Then the record must be there and end a unit.
//! 3. Where retention has removed that record, the next one must have a position above it, in another unit.
//!
//! A store whose record has not come yet is not moved, and neither is its LSN. On an idle log the record comes at once,
//! or the ledger says that it is not there.

use std::fmt;

use change::{Kind, Position};

use crate::{Checkpoint, LastRecord, LogRecord};

/// The stores whose last record has not been read again yet.
#[derive(Debug, Default)]
pub(crate) struct Continuity {
    /// By the store's place; `None` once the log is known to continue it.
    awaited: Vec<Option<Awaited>>,
    /// Number of stores that are awaited.
    left: usize,
}

/// What the log must hold for one store.
#[derive(Clone, Copy, Debug)]
enum Awaited {
    /// The record at this offset, which ends a unit; and is this one, if the checkpoint names it.
    Last { offset: i64, record: Option<LastRecord> },
    /// From this offset on, changes above the position of a record that the log does not hold any more.
    Above { next_offset: i64, record: LastRecord },
}

/// The log does not go on from where a store was left.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Mismatch {
    /// The store's place.
    pub(crate) store: usize,
    expected: String,
    found: String,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Mismatch { expected, found, .. } = self;
        write!(
            f,
            "the log has other records now than those it was built from: expected {expected}, found {found}"
        )
    }
}

impl Continuity {
    /// Awaits the last record of each store, in a log that begins at `log_start`.
    pub(crate) fn of(stores: &[Option<Checkpoint>], log_start: i64) -> Self {
        let awaited: Vec<_> = stores.iter().map(|at| Awaited::by(at.as_ref()?, log_start)).collect();
        let left = awaited.iter().flatten().count();
        Continuity { awaited, left }
    }

    /// The offset to read from, where the first record to apply is at `next_offset`.
    pub(crate) fn from(&self, next_offset: i64) -> i64 {
        let offsets = self.awaited.iter().flatten().map(Awaited::offset);
        offsets.min().map_or(next_offset, |offset| offset.min(next_offset))
    }

    /// True while the last record of any store has not come.
    pub(crate) fn waits(&self) -> bool {
        self.left > 0
    }

    /// True while the store's last record has not come.
    pub(crate) fn awaits(&self, store: usize) -> bool {
        self.awaited.get(store).is_some_and(Option::is_some)
    }

    /// A store whose last record cannot come, as the ledger says that the log's records end before `log_end`.
    pub(crate) fn missing(&self, log_end: i64) -> Option<Mismatch> {
        self.awaited.iter().enumerate().find_map(|(store, place)| match place {
            Some(awaited @ Awaited::Last { offset, .. }) if *offset >= log_end => {
                let found = format!("no record from offset {log_end} on");
                Some(Mismatch { store, expected: awaited.to_string(), found })
            }
            _ => None,
        })
    }

    /// Compares the next record of the log with what is awaited. To be called for every record.
    pub(crate) fn check(&mut self, record: &LogRecord<'_>) -> Result<(), Mismatch> {
        if self.left == 0 {
            return Ok(());
        }
        for (store, place) in self.awaited.iter_mut().enumerate() {
            let Some(awaited) = place else { continue };
            if record.offset < awaited.offset() {
                continue;
            }
            if !awaited.met_by(record) {
                return Err(Mismatch { store, expected: awaited.to_string(), found: describe(record) });
            }
            *place = None;
            self.left -= 1;
        }
        Ok(())
    }
}

impl Awaited {
    /// What a store at this checkpoint awaits. Nothing, if it was left at the log's beginning, or if retention has
    /// removed a record that its checkpoint does not name.
    fn by(at: &Checkpoint, log_start: i64) -> Option<Awaited> {
        let (record, next_offset) = (at.last_record(), at.next_offset);
        let offset = next_offset - 1;
        match record {
            _ if next_offset <= 0 => None,
            record if offset >= log_start => Some(Awaited::Last { offset, record }),
            Some(record) => Some(Awaited::Above { next_offset, record }),
            None => None,
        }
    }

    /// The first offset at which the log can tell.
    fn offset(&self) -> i64 {
        match self {
            Awaited::Last { offset, .. } => *offset,
            Awaited::Above { next_offset, .. } => *next_offset,
        }
    }

    /// True if this first record at or after [`offset`](Self::offset) is as it must be.
    fn met_by(&self, record: &LogRecord<'_>) -> bool {
        match self {
            Awaited::Last { offset, record: last } => {
                let ends_unit = record.log || record.commit.is_some();
                let same = last.is_none_or(|last| LastRecord::of(record) == Some(last));
                record.offset == *offset && ends_unit && same
            }
            Awaited::Above { record: last, .. } => {
                record.position.is_some_and(|position| follows(position, last.position))
            }
        }
    }
}

impl fmt::Display for Awaited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Awaited::Last { record: Some(record), .. } => write!(f, "the end of a unit, {record}"),
            Awaited::Last { offset, record: None } => write!(f, "the end of a unit at offset {offset}"),
            Awaited::Above { record, .. } => write!(f, "what comes after {record}"),
        }
    }
}

/// True if a unit that begins with `position` can come after one that ends with `last`. Several rounds of a snapshot
/// can have one LSN, and their ordinals go on.
fn follows(position: Position, last: Position) -> bool {
    let same_unit = (position.lsn, position.kind) == (last.lsn, last.kind);
    position > last && (!same_unit || position.kind == Kind::Round)
}

fn describe(record: &LogRecord<'_>) -> String {
    let ends = if record.commit.is_some() || record.log { "which ends a unit" } else { "within a unit" };
    match LastRecord::of(record) {
        Some(named) => format!("{named}, {ends}"),
        None => format!("the record at offset {}, {ends}", record.offset),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::LogBatch;

    /// A log of one record, `offset position commit?`.
    fn batch(offset: i64, header: &str) -> LogBatch {
        let mut batch = LogBatch::default();
        let headers = [("millrace.position", header.as_bytes())];
        batch.push(offset, b"k", b"value", headers).unwrap();
        batch
    }

    fn named(offset: i64, header: &str) -> Option<LastRecord> {
        LastRecord::of(&batch(offset, header).get(0))
    }

    fn at(next_offset: i64, last: Option<LastRecord>) -> Option<Checkpoint> {
        Some(Checkpoint { next_offset, last, ..Checkpoint::beginning("a", 1, "d") })
    }

    const END: &str = "0/64:t:3 commit=0/65";

    #[test]
    fn the_last_record_must_be_the_same_and_end_its_unit() {
        let last = named(41, END);
        for (offset, header, met) in [
            (41, END, true),
            (41, "0/64:t:3", false),
            (41, "0/64:t:2 commit=0/65", false),
            (41, "0/63:t:3 commit=0/65", false),
            (42, "0/66:t:0 commit=0/67", false),
        ] {
            let mut continuity = Continuity::of(&[at(42, last)], 0);
            assert_eq!(continuity.from(42), 41);
            assert_eq!(continuity.check(&batch(offset, header).get(0)).is_ok(), met, "{offset} {header}");
            assert_eq!(continuity.awaits(0), !met);
        }
    }

    #[test]
    fn the_same_change_written_at_another_time_is_another_record() {
        let last = named(41, END).map(|last| LastRecord { digest: last.digest ^ 1, ..last });
        let mismatch = Continuity::of(&[at(42, last)], 0).check(&batch(41, END).get(0)).unwrap_err();
        let text = mismatch.to_string();
        let records = [last, named(41, END)].map(|record| record.unwrap().to_string());
        assert!(records.iter().all(|record| text.contains(record)), "{text}");
    }

    #[test]
    fn a_checkpoint_of_an_older_version_demands_the_end_of_a_unit() {
        let old = || Continuity::of(&[at(42, None)], 0);
        assert!(old().check(&batch(41, END).get(0)).is_ok());
        assert!(old().check(&batch(41, "0/64:t:3").get(0)).is_err());
        assert!(old().check(&batch(42, END).get(0)).is_err());
        let mut first = LogBatch::default();
        first.push(0, b"", b"", [("millrace.log", &b"a"[..])]).unwrap();
        assert!(
            Continuity::of(&[at(1, None)], 0).check(&first.get(0)).is_ok(),
            "the record that names the log"
        );
    }

    #[test]
    fn where_retention_has_removed_the_record_the_next_one_is_above_it() {
        let last = named(41, END);
        for (header, met) in
            [("0/66:t:0", true), ("0/64:t:4", false), ("0/64:r:0", false), ("0/63:t:9 commit=0/64", false)]
        {
            let mut continuity = Continuity::of(&[at(42, last)], 42);
            assert_eq!(continuity.from(42), 42);
            assert_eq!(continuity.check(&batch(43, header).get(0)).is_ok(), met, "{header}");
        }
        let round = named(41, "0/64:r:3 commit=0/64");
        let next = |header| Continuity::of(&[at(42, round)], 42).check(&batch(42, header).get(0)).is_ok();
        assert!(next("0/64:r:4") && !next("0/64:r:3"), "ordinals of rounds go on");
        assert!(!Continuity::of(&[at(42, None)], 42).awaits(0), "nothing is known");
    }

    #[test]
    fn the_ledger_tells_when_the_record_is_not_there() {
        let continuity = Continuity::of(&[None, at(42, named(41, END))], 0);
        assert_eq!(continuity.missing(42), None);
        assert_eq!(continuity.missing(41).map(|mismatch| mismatch.store), Some(1));
        assert_eq!(Continuity::of(&[at(42, named(41, END))], 42).missing(41), None, "retention removed it");
    }

    #[test]
    fn stores_at_different_places_are_checked_where_each_was_left() {
        let ahead = named(44, "0/70:t:0 commit=0/71");
        let stores = [at(45, ahead), None, at(42, named(41, END)), at(0, None)];
        let mut continuity = Continuity::of(&stores, 0);
        assert_eq!(continuity.from(0), 0);
        assert_eq!(continuity.from(42), 41);
        continuity.check(&batch(41, END).get(0)).unwrap();
        assert!(continuity.awaits(0) && !continuity.awaits(2) && !continuity.awaits(3));
        continuity.check(&batch(42, "0/66:t:0 commit=0/67").get(0)).unwrap();
        let mismatch = continuity.check(&batch(45, "0/72:t:0 commit=0/73").get(0)).unwrap_err();
        assert_eq!(mismatch.store, 0, "the log has no record at offset 44");
    }
}
