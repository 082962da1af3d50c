//! Rows that were there before the stream: which streamed changes belong into the log while tables are being read.
//!
//! A table is read in rounds, in the order of its key, while its changes stream. A *round* is one short snapshot S of
//! Postgres, taken while the stream pauses between two transactions; it reads the keys from where the last round ended
//! up to some key, and its rows are published as births (`r`) in exactly one Kafka transaction, whose ledger record
//! holds S, the range, and an LSN below which everything that S saw has its commit record (the insert LSN, read
//! after S was taken). Until the stream has come to that LSN the round is the *window*.
//!
//! # What is published
//!
//! A change of transaction T to the key k, streamed while its table is read up to b:
//!
//! | k | T | the change is |
//! | --- | --- | --- |
//! | above b | | left out: a later round reads what becomes of the row |
//! | in the window's range | seen by S | left out: its effect is in the rows read |
//! | in the window's range | not seen by S | published |
//! | at most b, not in the window's range | | published |
//!
//! # Why every row is born once, and nothing is lost
//!
//! Take a row of the key k, and the round, with its snapshot S, that reads k's range.
//!
//! 1. *Before the round* all changes to k are left out. The round is taken only if S saw every transaction of which a
//!    change was left out ([`Reading::accepts`], h20). A commit reaches the stream before other sessions see it, and
//!    long before while a synchronous standby is missing, so this is a real condition: those transactions are kept,
//!    in the ledger too, until some snapshot has seen them.
//! 2. *The round* publishes the row as S saw it, or nothing if there is none.
//! 3. *After it* the changes of transactions that S saw are left out and those of others are published. Every
//!    transaction committed before the window's LSN is judged by S itself; none after it was seen by S.
//!
//! So the log holds k's row as of S, then each change that S did not see, in order: nothing twice, nothing missing.
//! What was committed before the slot existed is in no stream; the first round must see all that the snapshot exported
//! with the slot saw (h21). A table published later was locked against writers for that moment (h22), so whatever
//! was written before is visible to every snapshot after it.
//!
//! A change of the key is a death and a birth, each judged by its own key. Where only the birth is published it is
//! the row's first appearance in the log, so it must be whole: a value that Postgres did not send (unchanged TOAST) is
//! nowhere then. Such a key is *owed*: it counts as not read, and the next round reads it by itself (h27).
//!
//! A TRUNCATE is published always (h23), but for one of some partitions. If the window's snapshot saw it, the rows that the round read were born
//! after it and would die by it in the log: the table starts over. Else nothing of the table is alive after it, and
//! what is published from then on is complete up to b as before.
//!
//! A table can *begin again*: it was rewritten (h30), or its key is another one, so that what the log holds of it counts
//! no more. Its rows are ended there by a `t`, and it is read from its beginning. What was streamed of it until then is
//! dead by that `t`, so the next round must see it: it waits for every transaction that had begun by then, a heartbeat's
//! being the last of them ([`Reading::end_stale`]). Where a transaction that is being streamed is the cause, its next change
//! of the table becomes a `t` as well, which is marked, for no store may be shown after it ([`Reading::ends`]).
//!
//! *Invariant:* a decision depends on nothing but what the ledger holds and the stream says; so a restart, which
//! replays the stream from the ledger's end, decides alike. Therefore what an open transaction does to this state is
//! kept ahead of it, and reaches the ledger no earlier than the changes before it do ([`Reading::settle`]).
//!
//! # Partitions
//!
//! Each partition is a table here, read and judged by itself, and its records bear its root's name. What ends its rows in
//! the log ends its siblings': one that is detached, dropped, or emptied without the others lets all of them begin again.
//! While a new one is read the log lacks rows of a table that it has else; a message there tells the stores.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, HashMap};

use change::{
    Description, Key, LedgerEntry, Lsn, NEW_LOG, Piece, Read, Refusal, Snapshot, SnapshotProgress,
    TableProgress, Window,
};

use crate::Ledger;

mod order;
mod published;

pub(crate) use order::KeyOrder;

/// Owed keys of a table at most.
const OWED_MAX: usize = 10_000;

/// What becomes of a streamed change.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Verdict {
    /// It belongs into the log.
    Publish,
    /// A round has read its effect, or will.
    LeaveOut,
}

/// How a key compares with the bound up to which a table was read, where only Postgres can tell.
pub(crate) type Answers = HashMap<(u32, Key, Key), Ordering>;

/// What a change does to the snapshot's own state.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Effect {
    Owe(u32, Key),
    /// The log's rows of the table are still to be ended.
    BeginAgain(u32),
    /// They were ended, with that change.
    Ended(u32),
    /// It was taken out of the publication.
    Withdrawn(u32),
}

/// The state of the snapshot: what the ledger holds of it, and what the stream has changed since.
#[derive(Debug, Default)]
pub(crate) struct Reading {
    tables: BTreeMap<u32, TableProgress>,
    genesis: Option<Snapshot>,
    unseen: BTreeSet<u32>,
    window: Option<Window>,
    /// See [`SnapshotProgress::distrusted`].
    distrusted: Option<Lsn>,
    /// Effects of the open transaction that the ledger may not have yet, and the ordinals of the changes they came with.
    ahead: BTreeMap<Effect, u64>,
    /// What the rows of tables mean that begin again with the open transaction. The ledger gets it together with their
    /// first version under these names: a worker names a version's columns by the description that it knows.
    described_ahead: BTreeMap<u32, Description>,
    /// Transactions that may have changed the publication, and are not known to be visible.
    republished: BTreeSet<u32>,
    /// Why there is no round, for whoever looks.
    waiting: Option<String>,
    active: bool,
    /// Tables whose progress the ledger does not have yet.
    changed: BTreeSet<u32>,
    /// The ledger's snapshot progress is not what it should be, and nothing else may bring a commit about.
    dirty: bool,
    /// What Postgres said about keys that only it can compare.
    answers: Answers,
    /// Tables, or partitions, whose log lacks rows or changes that nothing in it shows, and whether a message there tells.
    gaps: BTreeMap<u32, bool>,
    /// Tables that are not published any more, and the LSN from which on no change of theirs can come.
    leaving: BTreeMap<u32, Lsn>,
    /// Why tables begin again, by name, until that is logged.
    why: BTreeMap<String, String>,
}

/// Whether the log holds rows of the table.
fn begun(table: &TableProgress) -> bool {
    !matches!(table.read, Read::Nothing | Read::Removed)
}

impl Reading {
    pub(crate) fn new(ledger: &Ledger) -> Self {
        let mut reading = Reading { tables: ledger.tables.clone(), ..Reading::default() };
        let progress = ledger.progress.as_ref().and_then(|progress| progress.snapshot.clone());
        if let Some(progress) = progress {
            let SnapshotProgress { genesis, unseen, window, waiting, distrusted } = *progress;
            reading.genesis = genesis;
            reading.unseen = unseen.into_iter().collect();
            reading.window = window;
            reading.waiting = waiting;
            reading.distrusted = distrusted;
        }
        reading.note_active();
        reading
    }

    /// Whether anything is to be read, or the window is open. While not, every change is published.
    pub(crate) fn active(&self) -> bool {
        self.active
    }

    fn note_active(&mut self) {
        let partly = |table: &TableProgress| table.pending() || table.read == Read::Removed;
        self.active = self.window.is_some() || !self.ahead.is_empty() || self.tables.values().any(partly);
    }

    /// Whether the log holds every table whole.
    pub(crate) fn complete(&self) -> bool {
        self.window.is_none()
            && self.distrusted.is_none()
            && self.leaving.is_empty()
            && !self.tables.values().any(TableProgress::pending)
    }

    /// Whether the ledger must be told, however idle the stream is.
    pub(crate) fn dirty(&self) -> bool {
        self.dirty || !self.changed.is_empty()
    }

    /// What the ledger is to hold; `None` for a complete log.
    pub(crate) fn progress(&self) -> Option<Box<SnapshotProgress>> {
        let progress = || SnapshotProgress {
            genesis: self.genesis.clone(),
            unseen: self.unseen.iter().copied().collect(),
            window: self.window.clone(),
            waiting: self.waiting.clone(),
            distrusted: self.distrusted,
        };
        (!self.complete()).then(|| Box::new(progress()))
    }

    /// The tables' records that the ledger does not have yet.
    pub(crate) fn entries(&self) -> impl Iterator<Item = LedgerEntry> {
        self.changed.iter().filter_map(|at| Some(LedgerEntry::Table(*at, self.tables.get(at)?.clone())))
    }

    /// The ledger has it all now.
    pub(crate) fn committed(&mut self) {
        self.changed.clear();
        self.dirty = false;
        if self.complete() {
            self.unseen.clear();
            self.genesis = None;
            self.answers = Answers::new();
            self.gaps.clear();
        }
    }

    /// Every table, for displays.
    pub(crate) fn tables(&self) -> impl Iterator<Item = &TableProgress> {
        self.tables.values()
    }

    /// The tables that are this one in the log.
    fn family(&self, family: u32) -> impl Iterator<Item = (u32, &TableProgress)> {
        let tables = self.tables.iter().map(|(relation, table)| (*relation, table));
        tables
            .filter(move |(relation, table)| table.family(*relation) == family && table.read != Read::Removed)
    }

    /// The table, and those that are the same one in the log.
    fn relatives(&self, relation: u32) -> impl Iterator<Item = (u32, &TableProgress)> {
        self.family(self.tables.get(&relation).map_or(relation, |table| table.family(relation)))
    }

    /// Whether the table is one of a partitioned one.
    pub(crate) fn is_partition(&self, relation: u32) -> bool {
        self.tables.get(&relation).is_some_and(|table| table.root.is_some() && table.read != Read::Removed)
    }

    /// Whether the log holds rows of other partitions than these of the table of which this is one.
    pub(crate) fn has_others(&self, relation: u32, than: &[u32]) -> bool {
        let Some(root) = self.tables.get(&relation).and_then(|table| table.root) else { return false };
        // The root itself has no rows, and no event names it.
        self.family(root).any(|(other, table)| other != root && begun(table) && !than.contains(&other))
    }

    /// Whether every change of the table is published, whatever its key.
    pub(crate) fn settled(&self, relation: u32) -> bool {
        self.ahead.is_empty() && self.whole(relation)
    }

    /// Whether the table is read, and the stream has come to where that was.
    pub(crate) fn whole(&self, relation: u32) -> bool {
        let whole = |table: &TableProgress| table.read == Read::All && table.owed.is_empty();
        self.tables.get(&relation).is_some_and(whole) && self.piece(relation).is_none()
    }

    /// Whether [`judge`](Self::judge) needs no more answers for this key.
    pub(crate) fn decided(&self, relation: u32, order: &KeyOrder, key: &Key) -> bool {
        self.bounds(relation).all(|bound| self.compare_keys(relation, order, key, bound).is_some())
    }

    /// The keys up to which the table was read, now and before the window's round.
    pub(crate) fn bounds(&self, relation: u32) -> impl Iterator<Item = &Key> {
        let again = self.begins_again(relation);
        let now = self.tables.get(&relation).filter(|_| !again).map(|table| &table.read);
        let before = self.piece(relation).filter(|_| !again).map(|(_, piece)| &piece.after);
        [now, before].into_iter().flatten().filter_map(|read| match read {
            Read::UpTo(key) => Some(key),
            _ => None,
        })
    }

    fn compare_keys(&self, relation: u32, order: &KeyOrder, key: &Key, bound: &Key) -> Option<Ordering> {
        let asked = || self.answers.get(&(relation, key.clone(), bound.clone())).copied();
        order.compare(key, bound).or_else(asked)
    }

    /// What becomes of a change to the row `key` by the transaction `xid`; `None` before it is
    /// [`decided`](Self::decided).
    pub(crate) fn judge(
        &self,
        relation: u32,
        order: &KeyOrder,
        key: Option<&Key>,
        xid: u32,
    ) -> Option<Verdict> {
        let publish = |yes| Some(if yes { Verdict::Publish } else { Verdict::LeaveOut });
        let Some(table) = self.tables.get(&relation) else { return publish(false) };
        let owed = |key: &Key| table.owed.contains(key) || self.owes_ahead(relation, key);
        if self.begins_again(relation) || key.is_some_and(owed) {
            return publish(false);
        }
        let bound = match self.piece(relation) {
            Some((snapshot, piece)) => {
                let seen = snapshot.saw(xid);
                if key.is_some_and(|key| piece.keys.contains(key)) {
                    return publish(!seen);
                }
                if seen { &piece.after } else { &table.read }
            }
            None => &table.read,
        };
        match (bound, key) {
            (Read::All, _) => publish(true),
            (Read::Nothing | Read::Removed, _) | (Read::UpTo(_), None) => publish(false),
            (Read::UpTo(bound), Some(key)) => {
                publish(self.compare_keys(relation, order, key, bound)?.is_le())
            }
        }
    }

    /// Whether it does so with the open transaction.
    pub(crate) fn begins_again(&self, relation: u32) -> bool {
        let ahead = |effect| self.ahead.contains_key(&effect);
        !self.ahead.is_empty() && (ahead(Effect::BeginAgain(relation)) || ahead(Effect::Ended(relation)))
    }

    /// Whether the open transaction's change of this ordinal is to end the table's rows in the log, instead of what it does:
    /// the first after the table began again is.
    pub(crate) fn ends(&mut self, relation: u32, ordinal: u64) -> bool {
        if self.ahead.is_empty() || !self.ahead.contains_key(&Effect::BeginAgain(relation)) {
            return false;
        }
        let relations: Vec<u32> = self.relatives(relation).map(|(relation, _)| relation).collect();
        for relation in relations {
            if self.ahead.remove(&Effect::BeginAgain(relation)).is_some() {
                self.ahead.insert(Effect::Ended(relation), ordinal);
            }
        }
        true
    }

    fn owes_ahead(&self, relation: u32, key: &Key) -> bool {
        !self.ahead.is_empty() && self.ahead.contains_key(&Effect::Owe(relation, key.clone()))
    }

    fn piece(&self, relation: u32) -> Option<(&Snapshot, &Piece)> {
        let window = self.window.as_ref()?;
        let piece = window.pieces.iter().find(|piece| piece.relation == relation)?;
        Some((&window.snapshot, piece))
    }

    /// What Postgres said; kept until the next answers.
    pub(crate) fn answered(&mut self, answers: Answers) {
        self.answers = answers;
    }

    /// A change of this transaction was left out. What the window's snapshot has seen, later ones see as well.
    pub(crate) fn left_out(&mut self, relation: u32, xid: u32) {
        let unread = |table: &TableProgress| table.root.is_some() && table.read == Read::Nothing;
        if self.tables.get(&relation).is_some_and(unread)
            && !self.gaps.contains_key(&relation)
            && self.has_others(relation, &[])
        {
            self.gaps.insert(relation, false);
        }
        if !self.window.as_ref().is_some_and(|window| window.snapshot.saw(xid)) {
            self.unseen.insert(xid);
        }
    }

    /// How many transactions no snapshot has seen of which changes were left out.
    pub(crate) fn unseen(&self) -> usize {
        self.unseen.len()
    }

    /// A row came to this key, by the open transaction's change of this ordinal, without a value that is nowhere in the
    /// log.
    pub(crate) fn owe(&mut self, relation: u32, key: Key, ordinal: u64) -> Result<(), Refusal> {
        let Some(table) = self.tables.get(&relation) else { return Ok(()) };
        if table.owed.len() + self.ahead.len() >= OWED_MAX {
            let what = format!(
                "more than {OWED_MAX} rows of {} changed their keys while it is being read, each without a value that \
                 Postgres does not send",
                table.name
            );
            let quoted = match change::parse_table_name(&table.name) {
                Ok((schema, name)) => change::quoted_table_name(&schema, &name),
                Err(_) => table.name.clone(),
            };
            let remedy =
                format!("ALTER TABLE {quoted} REPLICA IDENTITY FULL; before such an update; then {NEW_LOG}");
            return Err(Refusal::new(what, remedy));
        }
        self.ahead.entry(Effect::Owe(relation, key)).or_insert(ordinal);
        self.active = true;
        Ok(())
    }

    /// The table's key is this one now. Where it was read in the order of another, how far it was read means nothing any
    /// more, and it begins again. A table that has been read is told by its description.
    pub(crate) fn rekeyed(&mut self, relation: u32, key: &[String], ordinal: u64) {
        let in_window = self.piece(relation).is_some();
        let another = |table: &TableProgress| {
            (table.pending() || in_window) && !table.key.is_empty() && table.key != key
        };
        if self.tables.get(&relation).is_some_and(another) {
            self.begin_again(relation, ordinal, "its rows have another key");
        }
    }

    /// The table begins again, with the open transaction's change of this ordinal. What ends its rows ends those of its
    /// siblings.
    pub(crate) fn begin_again(&mut self, relation: u32, ordinal: u64, why: &str) {
        if let Some(table) = self.tables.get(&relation).filter(|_| !self.begins_again(relation)) {
            self.why.entry(table.name.clone()).or_insert_with(|| why.to_owned());
        }
        let relations: Vec<u32> = self
            .relatives(relation)
            .filter(|(_, table)| begun(table))
            .map(|(relation, _)| relation)
            .collect();
        for relation in relations {
            if !self.begins_again(relation) {
                self.ahead.insert(Effect::BeginAgain(relation), ordinal);
                self.active = true;
            }
        }
    }

    /// What the open transaction did counts for the ledger too, as far as the ledger will hold the transaction: up to its
    /// change `until`, or all of it.
    pub(crate) fn settle(&mut self, until: Option<u64>) {
        if self.ahead.is_empty() {
            return;
        }
        // What is still to be ended is so with a change behind the split.
        let ended = |effect: &Effect| !matches!(effect, Effect::BeginAgain(_));
        let settles = |(effect, at): &(Effect, u64)| until.is_none_or(|until| *at <= until && ended(effect));
        let (settled, ahead) = std::mem::take(&mut self.ahead).into_iter().partition(settles);
        self.ahead = ahead;
        for effect in BTreeMap::into_keys(settled) {
            match effect {
                Effect::Owe(relation, key) => {
                    if let Some(table) = self.tables.get_mut(&relation) {
                        table.owed.insert(key);
                        self.changed.insert(relation);
                    }
                }
                // What its siblings had until then is ended once more, where it is told what the next round must see.
                Effect::BeginAgain(relation) | Effect::Ended(relation) => {
                    self.reads_anew(relation, Read::Nothing);
                    if let Some(table) = self.tables.get_mut(&relation) {
                        table.stale = true;
                        if let Some(now) = self.described_ahead.remove(&relation) {
                            table.describe(&now);
                        }
                    }
                }
                Effect::Withdrawn(relation) => {
                    let family: Vec<u32> = self.family(relation).map(|(relation, _)| relation).collect();
                    family.into_iter().for_each(|relation| self.reads_anew(relation, Read::Removed));
                }
            }
        }
        self.note_active();
    }

    /// Why the table of this name begins again.
    pub(crate) fn take_why(&mut self, name: &str) -> Option<String> {
        self.why.remove(name)
    }

    /// The tables of which the log holds rows that count no more.
    pub(crate) fn stale(&self) -> impl Iterator<Item = &TableProgress> {
        self.tables.values().filter(|table| table.stale)
    }

    /// Whether there are any: their end is to be told before a change of them is left out of the log.
    pub(crate) fn has_stale(&self) -> bool {
        self.active && self.stale().next().is_some()
    }

    /// The tables of which the log holds rows that count no more; they are ended there now. With their rows end those that
    /// were streamed by transactions which the next round may not see: it waits for whatever is not `visible`.
    pub(crate) fn end_stale(&mut self, visible: &Snapshot) -> Vec<u32> {
        self.unseen.extend(visible.in_progress());
        let stale: Vec<u32> =
            self.tables.iter().filter(|(_, table)| table.stale).map(|(relation, _)| *relation).collect();
        for relation in &stale {
            self.tables.entry(*relation).and_modify(|table| table.stale = false);
            self.changed.insert(*relation);
        }
        stale
    }

    /// A TRUNCATE by this transaction is being published.
    pub(crate) fn truncated(&mut self, relation: u32, xid: u32) {
        if self.piece(relation).is_some_and(|(snapshot, _)| snapshot.saw(xid)) {
            self.reads_anew(relation, Read::Nothing);
        }
        if self.tables.get(&relation).is_some_and(TableProgress::pending) {
            self.changed.insert(relation);
            self.left_out(relation, xid);
        }
    }

    /// Nothing of the table counts as read any more.
    fn reads_anew(&mut self, relation: u32, read: Read) {
        let Some(table) = self.tables.get_mut(&relation) else { return };
        table.read = read;
        table.owed.clear();
        // Nor is anything owed of rows that are read with the others.
        self.ahead.retain(|effect, _| !matches!(effect, Effect::Owe(owes, _) if *owes == relation));
        table.key.clear();
        table.former.clear();
        (table.rows, table.bytes) = (0, 0);
        self.changed.insert(relation);
        self.gaps.remove(&relation);
        if let Some(window) = &mut self.window {
            window.pieces.retain(|piece| piece.relation != relation);
        }
        self.note_active();
    }

    /// Whether the window ends where the stream has come to. The last one ends where the log has: its rows are newer than
    /// the LSN at which they stand, and a store that has them all is ready at the log's LSN.
    pub(crate) fn window_ends(&self, stream_lsn: Lsn, log_lsn: Lsn) -> bool {
        let Some(window) = &self.window else { return false };
        window.until <= log_lsn || (window.until <= stream_lsn && self.pending().next().is_some())
    }

    /// Closes the window that [ends here](Self::window_ends), and gives whether there was one.
    pub(crate) fn close_window(&mut self, stream_lsn: Lsn, log_lsn: Lsn) -> bool {
        let caught_up = self.window_ends(stream_lsn, log_lsn);
        if caught_up {
            self.window = None;
            self.dirty = true;
            self.note_active();
        }
        caught_up
    }

    /// Whether there is something to read, and no window open.
    pub(crate) fn may_read(&self) -> bool {
        self.window.is_none() && self.pending().next().is_some()
    }

    /// Takes note of what a snapshot saw; gives whether a round may be read under it.
    pub(crate) fn accepts(&mut self, snapshot: &Snapshot) -> bool {
        self.unseen.retain(|xid| !snapshot.saw(*xid));
        if self.genesis.as_ref().is_some_and(|genesis| snapshot.sees_all_of(genesis)) {
            self.genesis = None;
        }
        self.unseen.is_empty() && self.genesis.is_none()
    }

    /// Says why there is no round.
    pub(crate) fn waits(&mut self, reason: String) {
        if self.waiting.as_ref() != Some(&reason) {
            self.waiting = Some(reason);
            self.dirty = true;
        }
    }

    /// The tables of which something is to be read, in the order in which to read them.
    pub(crate) fn pending(&self) -> impl Iterator<Item = (u32, &TableProgress)> {
        self.tables.iter().filter(|(_, table)| table.pending()).map(|(at, table)| (*at, table))
    }

    /// The rows of a round are in the log's open transaction.
    pub(crate) fn round(&mut self, snapshot: Snapshot, until: Lsn, pieces: Vec<ReadPiece>, begun_ms: i64) {
        let mut window = Window { snapshot, until, pieces: Vec::new() };
        for ReadPiece { relation, read, key, description, rows, bytes } in pieces {
            let Some(table) = self.tables.get_mut(&relation) else { continue };
            table.rows += rows;
            table.bytes += bytes;
            table.describe(&description);
            table.key = key;
            if table.begun_ms == 0 {
                table.begun_ms = begun_ms;
            }
            let after = std::mem::replace(&mut table.read, read);
            let keys = std::mem::take(&mut table.owed);
            window.pieces.push(Piece { relation, after, keys });
            self.changed.insert(relation);
        }
        self.window = Some(window);
        self.waiting = None;
        self.dirty = true;
        self.note_active();
    }
}

/// What a round read of a table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct ReadPiece {
    pub(crate) relation: u32,
    /// How far the table is read now.
    pub(crate) read: Read,
    pub(crate) key: Vec<String>,
    pub(crate) description: Box<Description>,
    pub(crate) rows: u64,
    pub(crate) bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rest of a split transaction must still find that the table's rows are to be ended.
    #[test]
    fn h30_a_table_that_begins_again_reaches_the_ledger_with_the_change_that_ends_it() {
        let table = TableProgress::new("public.t".into(), 1, Read::All);
        let mut reading = Reading::new(&Ledger { tables: [(7, table)].into(), ..Ledger::default() });
        reading.begin_again(7, 3, "a test");
        reading.settle(Some(5));
        assert_eq!(
            reading.tables[&7].read,
            Read::All,
            "the log ends before the change that will end the rows"
        );
        assert!(reading.ends(7, 6) && !reading.ends(7, 7), "the first change ends them, and no other");
        reading.settle(Some(5));
        assert_eq!(reading.tables[&7].read, Read::All);
        assert_eq!(reading.judge(7, &KeyOrder::default(), None, 700), Some(Verdict::LeaveOut));
        reading.settle(Some(6));
        assert_eq!(reading.tables[&7].read, Read::Nothing);
    }

    /// The change that is held back comes again after a kill, and must be judged as before.
    #[test]
    fn h27_what_an_open_transaction_owes_reaches_the_ledger_with_its_change() {
        let table = TableProgress::new("public.t".into(), 1, Read::UpTo(vec!["5".into()]));
        let mut reading = Reading::new(&Ledger { tables: [(7, table)].into(), ..Ledger::default() });
        let key = vec!["3".to_owned()];
        reading.owe(7, key.clone(), 4).unwrap();
        let order = KeyOrder::default();
        assert_eq!(reading.judge(7, &order, Some(&key), 700), Some(Verdict::LeaveOut), "for what follows it");
        let owed = |reading: &Reading| match reading.entries().next() {
            Some(LedgerEntry::Table(_, table)) => table.owed.contains(&key),
            _ => false,
        };
        reading.settle(Some(3));
        assert!(!owed(&reading), "the log ends before it");
        assert_eq!(reading.judge(7, &order, Some(&key), 700), Some(Verdict::LeaveOut));
        reading.settle(Some(4));
        assert!(owed(&reading));
        reading.owe(7, vec!["4".to_owned()], 9).unwrap();
        reading.settle(None);
        assert_eq!(reading.tables[&7].owed.len(), 2);
    }

    #[test]
    fn h27_nothing_is_owed_of_rows_that_a_truncate_ended_later_in_the_transaction() {
        let table = TableProgress::new("public.t".into(), 1, Read::UpTo(vec!["5".into()]));
        let mut reading = Reading::new(&Ledger { tables: [(7, table)].into(), ..Ledger::default() });
        let pieces = vec![Piece { relation: 7, after: Read::Nothing, keys: BTreeSet::new() }];
        reading.window = Some(Window { snapshot: "9:9:".parse().unwrap(), until: Lsn(100), pieces });
        reading.owe(7, vec!["3".to_owned()], 4).unwrap();
        reading.truncated(7, 8);
        reading.settle(None);
        assert_eq!(reading.tables[&7].read, Read::Nothing);
        assert!(reading.tables[&7].owed.is_empty(), "it would be read twice");
    }
}
