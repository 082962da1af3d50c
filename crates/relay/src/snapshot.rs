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
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};

use change::{
    Description, Key, LedgerEntry, Lsn, NEW_LOG, Piece, Read, Refusal, Snapshot, SnapshotProgress,
    TableProgress, TableSchema, Window,
};

use crate::{Described, Ledger, Publication, PublishedTable};

mod order;

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

/// Why a table that is published as `found` begins again. Refuses one that has another name than its rows in the log.
fn why_again(known: &TableProgress, found: &PublishedTable, xmin: u32) -> Result<Option<String>, Refusal> {
    if known.publication == 0 {
        return Ok(known.breaks(&found.description));
    }
    if known.publication != found.publication {
        let why = match found.root {
            None => "it was taken out of the publication and put back",
            Some(_) => "a partition was attached again, or is published by itself",
        };
        return Ok(Some(why.to_owned()));
    }
    if known.name != found.name {
        let what = format!(
            "table {} has the name {} now, and its rows in the log have the old one",
            known.name, found.name
        );
        let remedy = format!("rename it back, or correct `postgres.tables` and {NEW_LOG}");
        return Err(Refusal::new(what, remedy));
    }
    if known.publication_xmin != 0 && known.publication_xmin != xmin {
        return Ok(Some(
            "the publication was altered, and what it left out meanwhile is not known".to_owned(),
        ));
    }
    Ok(known.breaks(&found.description))
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

    /// Compares what is published with what is known. Unless the stream is `between` two transactions only new tables are
    /// taken in: the rest of a split one goes on as it began, and what is to be refused is so at the next look.
    ///
    /// Returns whether no store is to be ready before the log has passed this look; or why the reader has to end, and the
    /// tables that this concerns.
    pub(crate) fn reconcile(
        &mut self,
        look: &Publication,
        between: bool,
    ) -> Result<bool, (Refusal, Vec<u32>)> {
        let mut refused = look.unfit.clone().filter(|_| between);
        let mut concerned: Vec<u32> = Vec::new();
        if refused.is_some() {
            concerned.extend(self.there());
        }
        for found in look.tables.iter().filter(|_| look.unfit.is_none()) {
            if let Err(refusal) = self.take_in(found, look.xmin, between) {
                concerned.push(found.relation);
                refused.get_or_insert(refusal);
            }
        }
        if let Some(refusal) = refused {
            // The reader commits before it ends, and the ledger then needs the other changes that this look found.
            self.settle(None);
            return Err((refusal, concerned));
        }
        let mut awaited = false;
        if between {
            let leaving = !self.leaving.is_empty();
            self.note_absent(look);
            awaited = (look.settled && self.trust(look.until)) || (!leaving && !self.leaving.is_empty());
            self.settle(None);
        }
        self.note_active();
        Ok(awaited)
    }

    /// Changes of these tables may be missing from the log. Their stores become not ready, until the log has passed the
    /// first look that is not refused.
    pub(crate) fn distrust(&mut self, concerned: &[u32]) {
        for relation in concerned {
            self.gaps.entry(*relation).or_insert(false);
        }
        self.distrusted = Some(Lsn(u64::MAX));
        self.dirty = true;
    }

    /// The same of every table.
    pub(crate) fn distrust_all(&mut self) {
        self.distrust(&self.there());
    }

    /// Whether no store is ready, until a look has found all in order.
    pub(crate) fn distrusts(&self) -> bool {
        self.distrusted == Some(Lsn(u64::MAX))
    }

    /// The tables that have not left the log.
    fn there(&self) -> Vec<u32> {
        let there = self.tables.iter().filter(|(_, table)| table.read != Read::Removed);
        there.map(|(relation, _)| *relation).collect()
    }

    /// The log is right from `until` on. Returns whether it was not to be trusted before.
    fn trust(&mut self, until: Lsn) -> bool {
        let distrusted = self.distrusted.as_mut().filter(|distrusted| **distrusted == Lsn(u64::MAX));
        distrusted.map(|distrusted| *distrusted = until).is_some()
    }

    /// The log has come to this LSN.
    pub(crate) fn came_to(&mut self, log_lsn: Lsn) {
        if self.distrusted.is_some_and(|until| until <= log_lsn) {
            self.distrusted = None;
            self.dirty = true;
        }
    }

    fn take_in(&mut self, found: &PublishedTable, xmin: u32, between: bool) -> Result<(), Refusal> {
        let PublishedTable { relation, root, publication, estimated_rows, description, .. } = found;
        let begin = |stale| TableProgress {
            root: *root,
            estimated_rows: *estimated_rows,
            description: Some(Box::new(description.clone())),
            publication_xmin: xmin,
            stale,
            ..TableProgress::new(found.name.clone(), *publication, Read::Nothing)
        };
        // What the log held of a partition that was detached has ended with all of its root's rows.
        let ended = root.is_some() && self.family(root.unwrap_or(*relation)).next().is_some();
        // A table that has become a partition is another one in the log, where nothing has its old name any more.
        let other = |known: &TableProgress| {
            known.family(*relation) == *relation && root.is_some_and(|root| root != *relation)
        };
        let known = self.tables.get_mut(relation);
        if known.is_some() && !between {
            return Ok(());
        }
        let former_root = known.as_ref().and_then(|known| known.root).filter(|former| Some(*former) != *root);
        let why = match known.filter(|known| !other(known)) {
            None => {
                self.tables.insert(*relation, begin(false));
                self.note_unread(found);
                None
            }
            Some(known) if known.read == Read::Removed => {
                *known = begin(!ended);
                self.note_unread(found);
                None
            }
            Some(known) => {
                let why = why_again(known, found, xmin)?;
                let described = known.describe(description);
                let attached = (known.publication, known.root, known.publication_xmin);
                if why.is_none() && !described && attached == (*publication, *root, xmin) {
                    return Ok(());
                }
                // A transaction that runs may have lost changes too: the first round waits for it as for those before a `t`.
                known.stale |= why.is_some() && known.read == Read::Nothing;
                found.name.clone_into(&mut known.name);
                known.estimated_rows = *estimated_rows;
                (known.publication, known.root, known.publication_xmin) = (*publication, *root, xmin);
                why
            }
        };
        self.changed.insert(*relation);
        if let Some(why) = why {
            self.begin_again(*relation, 0, &why);
        }
        if let Some(former) = former_root.filter(|former| former != relation) {
            self.begin_again(former, 0, "a partition was detached or dropped");
        }
        Ok(())
    }

    /// The log lacks the rows of a partition that came, or came back, while it has those of others: stores are told so.
    fn note_unread(&mut self, found: &PublishedTable) {
        if found.filled && self.has_others(found.relation, &[]) {
            self.gaps.entry(found.relation).or_insert(false);
        }
    }

    /// Tables that are not published any more. A look is of now and the stream of some time ago: what was committed before
    /// they went is still to come, up to the LSN that was read after the look. Until then the log lacks what it does not
    /// know of, and stores are told so.
    fn note_absent(&mut self, look: &Publication) {
        let published: BTreeSet<u32> = look.tables.iter().map(|found| found.relation).collect();
        self.leaving.retain(|relation, _| !published.contains(relation));
        // One that only the stream has told of may be published by a transaction that is not visible yet.
        let looked_at = |table: &TableProgress| table.publication != 0 || self.republished.is_empty();
        let known = self.tables.iter().filter(|(_, table)| table.read != Read::Removed && looked_at(table));
        let absent: Vec<u32> = known.map(|(relation, _)| *relation).collect();
        for relation in absent.into_iter().filter(|relation| !published.contains(relation)) {
            if let Entry::Vacant(leaving) = self.leaving.entry(relation) {
                leaving.insert(look.until);
                self.gaps.entry(relation).or_insert(false);
            }
        }
    }

    /// The stream has come to `end_lsn`: tables of which no change can follow leave the log. Returns those that were taken
    /// away and of which nothing was said in the stream.
    pub(crate) fn depart(&mut self, end_lsn: Lsn) -> Vec<u32> {
        let due: Vec<u32> = self
            .leaving
            .iter()
            .filter(|(_, until)| **until <= end_lsn)
            .map(|(relation, _)| *relation)
            .collect();
        let mut unsaid = Vec::new();
        let mut roots = BTreeSet::new();
        for relation in &due {
            let Some(table) = self.tables.get(relation).filter(|table| table.read != Read::Removed) else {
                continue;
            };
            match table.root.filter(|root| root != relation) {
                None => unsaid.push(*relation),
                // A partition was detached or dropped: of its rows no change tells.
                Some(root) if table.read != Read::Nothing && self.stays(root) => drop(roots.insert(root)),
                Some(_) => {}
            }
        }
        for relation in due {
            self.leaving.remove(&relation);
            if let Some(table) = self.tables.get_mut(&relation).filter(|table| table.read != Read::Removed) {
                table.stale |= table.root.is_some_and(|root| roots.contains(&root));
                self.reads_anew(relation, Read::Removed);
            }
            self.dirty = true;
        }
        roots.into_iter().for_each(|root| self.begin_again(root, 0, "a partition was detached or dropped"));
        self.settle(None);
        self.note_active();
        unsaid
    }

    /// The tables' names.
    pub(crate) fn names(&self) -> BTreeMap<u32, String> {
        self.tables.iter().map(|(relation, table)| (*relation, table.name.clone())).collect()
    }

    fn stays(&self, relation: u32) -> bool {
        let table = self.tables.get(&relation);
        table.is_some_and(|table| table.read != Read::Removed) && !self.leaving.contains_key(&relation)
    }

    /// The first LSN at which [`depart`](Self::depart) has something to do.
    pub(crate) fn next_departure(&self) -> Option<Lsn> {
        self.leaving.values().min().copied()
    }

    /// The table was taken out of the publication by a command of ours, in the open transaction: this row of
    /// `pg_publication_rel` is gone.
    pub(crate) fn withdrawn(&mut self, relation: u32, publication: u32, ordinal: u64) {
        if self.tables.get(&relation).is_some_and(|table| table.publication == publication) {
            self.ahead.insert(Effect::Withdrawn(relation), ordinal);
        }
    }

    /// The stream tells of a table, in this transaction, which it does when the table may have changed: it may have been
    /// published, put back, or altered.
    pub(crate) fn announced(&mut self, described: &Described, xid: u32) {
        self.republished.insert(xid);
        let TableSchema { relation, root, .. } = described.schema;
        if let Entry::Vacant(unknown) = self.tables.entry(relation) {
            let name = described.schema.full_name();
            unknown.insert(TableProgress { root, ..TableProgress::new(name, 0, Read::Nothing) });
            self.changed.insert(relation);
            if described.published.is_none() {
                // Nothing tells any more of which table it was a partition.
                let roots = self.tables.iter().filter(|(at, table)| table.root == Some(**at) && begun(table));
                let roots: Vec<u32> = roots.map(|(at, _)| *at).collect();
                self.gaps.extend(roots.into_iter().map(|root| (root, false)));
            }
            self.note_active();
        }
    }

    /// Why the table begins again with the open transaction, as it is published now; takes note of that. The server
    /// describes a table again when it or the publication was altered, so nothing that follows an ALTER is in the log before.
    pub(crate) fn compare(&mut self, described: &Described) -> Result<Option<String>, Refusal> {
        let relation = described.schema.relation;
        let again = self.begins_again(relation);
        let (Some(table), Some(found)) = (self.tables.get_mut(&relation), &described.published) else {
            return Ok(None);
        };
        if begun(table) && !again {
            let why = why_again(table, found, described.xmin)?;
            if why.is_some() {
                self.described_ahead.insert(relation, found.description.clone());
                return Ok(why);
            }
        }
        if table.describe(&found.description) {
            self.changed.insert(relation);
        }
        Ok(None)
    }

    /// Schema and name under which the log has a table, as far as the ledger has them apart.
    pub(crate) fn log_name(&self, relation: u32) -> Option<(String, String)> {
        let family = self.tables.get(&relation)?.family(relation);
        let Description { schema, table, .. } = self.tables.get(&family)?.description.as_deref()?;
        Some((schema.clone(), table.clone()))
    }

    /// These transactions may have changed the publication.
    pub(crate) fn republished(&mut self, xids: impl IntoIterator<Item = u32>) {
        self.republished.extend(xids);
    }

    /// Whether the publication is to be looked at again once others see what changed it.
    pub(crate) fn awaits_publication(&self) -> bool {
        !self.republished.is_empty()
    }

    /// The tables of which the log is to tell now that it lacks something, by the relation under whose name they are there.
    pub(crate) fn new_gaps(&mut self) -> BTreeSet<u32> {
        let untold = self.gaps.iter_mut().filter(|(_, told)| !**told);
        let untold: Vec<u32> = untold.map(|(relation, told)| (*relation, *told = true).0).collect();
        untold.into_iter().map(|at| self.tables.get(&at).map_or(at, |table| table.family(at))).collect()
    }

    /// Whether a look, or the stream, has found what the log does not say yet.
    pub(crate) fn has_something_to_say(&self, stream_lsn: Lsn) -> bool {
        self.has_stale()
            || self.gaps.values().any(|told| !told)
            || self.next_departure().is_some_and(|until| until <= stream_lsn)
    }

    /// Whether something that may have changed the publication is visible since this snapshot.
    pub(crate) fn sees_publication(&mut self, snapshot: &Snapshot) -> bool {
        let awaited = self.republished.len();
        self.republished.retain(|xid| !snapshot.saw(*xid));
        self.republished.len() < awaited
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
    use change::{ColumnDescription, ReplicaIdentity};

    use super::*;

    /// Its rows are in the log under its root's name: they end there, and it is read anew under its own.
    #[test]
    fn h31_a_partition_that_is_published_by_itself_begins_again() {
        let known = |root| TableProgress {
            root,
            description: Some(Box::default()),
            ..TableProgress::new("public.root".into(), 1, Read::All)
        };
        let tables = [(5, known(Some(5))), (7, known(Some(5))), (8, known(Some(5)))].into();
        let mut reading = Reading::new(&Ledger { tables, ..Ledger::default() });
        let alone = PublishedTable {
            relation: 7,
            name: "public.leaf".into(),
            root: None,
            publication: 2,
            estimated_rows: -1,
            description: Description::default(),
            filled: true,
        };
        reading.reconcile(&look(vec![alone]), true).unwrap();
        let table = &reading.tables[&7];
        assert_eq!((&table.read, table.stale, table.root), (&Read::Nothing, true, None));
        assert_eq!(reading.depart(Lsn(100)), [5], "and nobody has said so");
        assert_eq!(reading.tables[&8].read, Read::Removed);
    }

    fn look(tables: Vec<PublishedTable>) -> Publication {
        Publication { tables, unfit: None, xmin: 1, until: Lsn(100), settled: true }
    }

    fn plain(relation: u32) -> PublishedTable {
        PublishedTable {
            relation,
            name: format!("public.t{relation}"),
            root: None,
            publication: 1,
            estimated_rows: -1,
            description: Description::default(),
            filled: true,
        }
    }

    fn read(tables: impl IntoIterator<Item = (u32, Option<u32>)>) -> Reading {
        let known = |(relation, root)| {
            let table = TableProgress::new(format!("public.t{relation}"), 1, Read::All);
            (relation, TableProgress { root, description: Some(Box::default()), ..table })
        };
        let tables = tables.into_iter().map(known).collect();
        Reading::new(&Ledger { tables, ..Ledger::default() })
    }

    #[test]
    fn h29_what_was_committed_before_a_table_left_is_published() {
        let mut reading = read([(7, None), (8, None)]);
        reading.reconcile(&look(vec![plain(8)]), true).unwrap();
        let verdict = |reading: &Reading| reading.judge(7, &KeyOrder::default(), None, 700);
        assert_eq!(reading.depart(Lsn(99)), [0; 0]);
        assert_eq!(verdict(&reading), Some(Verdict::Publish));
        assert!(!reading.complete() && reading.new_gaps() == [7].into(), "and no store is shown meanwhile");
        assert_eq!(reading.depart(Lsn(100)), [7]);
        assert_eq!(verdict(&reading), Some(Verdict::LeaveOut));
        assert!(reading.complete());
    }

    #[test]
    fn h29_a_table_that_a_command_of_ours_takes_out_leaves_with_that_transaction() {
        let mut reading = read([(7, None)]);
        reading.reconcile(&look(vec![]), true).unwrap();
        reading.withdrawn(7, 2, 3);
        reading.settle(None);
        assert_eq!(reading.tables[&7].read, Read::All, "it was put back since");
        reading.withdrawn(7, 1, 3);
        reading.settle(Some(2));
        assert_eq!(reading.tables[&7].read, Read::All);
        reading.settle(None);
        assert_eq!(reading.tables[&7].read, Read::Removed);
        assert_eq!(reading.depart(Lsn(100)), [0; 0]);
    }

    #[test]
    fn h29_a_publication_that_was_altered_and_altered_back_reads_its_tables_again_once() {
        let mut reading = read([(7, None)]);
        reading.reconcile(&look(vec![plain(7)]), true).unwrap();
        assert!(reading.complete(), "an older ledger does not have it: it is taken note of");
        let altered = || Publication { xmin: 2, ..look(vec![plain(7)]) };
        reading.reconcile(&altered(), true).unwrap();
        assert!(reading.tables[&7].stale && !reading.complete());
        reading.end_stale(&"5:5:".parse().unwrap());
        reading.reconcile(&altered(), true).unwrap();
        assert!(!reading.tables[&7].stale);
    }

    #[test]
    fn a_table_that_has_another_name_now_is_refused() {
        let mut reading = read([(7, None)]);
        let renamed = PublishedTable { name: "public.t_old".into(), ..plain(7) };
        assert!(reading.reconcile(&look(vec![renamed.clone()]), false).is_ok(), "not within a transaction");
        let (refusal, concerned) = reading.reconcile(&look(vec![renamed, plain(8)]), true).unwrap_err();
        assert!(refusal.what.contains("public.t7 has the name public.t_old now"), "{refusal}");
        reading.distrust(&concerned);
        assert!(!reading.complete() && reading.new_gaps() == [7].into());
        let mut reading = Reading { distrusted: reading.progress().unwrap().distrusted, ..read([(7, None)]) };
        assert!(reading.reconcile(&look(vec![plain(7)]), true).unwrap(), "renamed back");
        reading.came_to(Lsn(99));
        assert!(!reading.complete());
        reading.came_to(Lsn(100));
        assert!(reading.complete() && reading.dirty());
    }

    #[test]
    fn h31_a_partition_that_is_published_by_itself_ends_the_rows_of_its_former_root() {
        let mut reading = read([(5, Some(5)), (7, Some(5)), (8, Some(5))]);
        let of = |relation, root| PublishedTable { root, ..plain(relation) };
        let look =
            look(vec![of(5, Some(5)), of(7, Some(5)), PublishedTable { publication: 2, ..of(8, None) }]);
        reading.reconcile(&look, true).unwrap();
        let pending = |relation: u32| reading.tables[&relation].read == Read::Nothing;
        assert!(pending(7) && pending(8), "{:?}", reading.tables);
    }

    #[test]
    fn h31_a_partition_with_rows_that_is_attached_is_a_gap_until_it_is_read() {
        let mut reading = read([(5, Some(5)), (7, Some(5))]);
        let of = |relation, filled| PublishedTable {
            name: "public.t5".into(),
            root: Some(5),
            filled,
            ..plain(relation)
        };
        let named = |mut table: PublishedTable, name: &str| {
            table.name = name.into();
            table
        };
        let known = || vec![named(of(5, true), "public.t5"), named(of(7, true), "public.t7")];
        reading.reconcile(&look([known(), vec![of(8, false)]].concat()), true).unwrap();
        assert!(reading.new_gaps().is_empty(), "it is empty");
        reading.reconcile(&look([known(), vec![of(8, false), of(9, true)]].concat()), true).unwrap();
        assert_eq!(reading.new_gaps(), [5].into());
        assert!(!reading.complete());
    }

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

    /// A worker names the columns of the new version by it. After a kill it must be seen again that the table begins again.
    #[test]
    fn h30_what_its_rows_mean_then_reaches_the_ledger_with_the_same_change() {
        let column =
            |number, name: &str| ColumnDescription { number, name: name.to_owned(), ..Default::default() };
        let named = |names: [&str; 2]| Description {
            columns: vec![column(1, names[0]), column(2, names[1])],
            ..Description::default()
        };
        let mut table = TableProgress::new("public.t7".into(), 1, Read::All);
        table.describe(&named(["a", "b"]));
        let mut reading = Reading::new(&Ledger { tables: [(7, table)].into(), ..Ledger::default() });
        let schema = TableSchema {
            relation: 7,
            root: None,
            schema: "public".into(),
            table: "t7".into(),
            identity: ReplicaIdentity::Full,
            columns: Vec::new(),
        };
        let swapped = PublishedTable { description: named(["b", "a"]), ..plain(7) };
        let described = Described { schema, outdated: false, published: Some(swapped), xmin: 0 };
        let why = reading.compare(&described).unwrap().unwrap();
        reading.begin_again(7, 3, &why);
        assert!(reading.ends(7, 6));
        for (settled, names) in [(5, ["a", "b"]), (6, ["b", "a"])] {
            reading.settle(Some(settled));
            assert_eq!(reading.tables[&7].description.as_deref(), Some(&named(names)));
        }
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
