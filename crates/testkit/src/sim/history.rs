//! The source's write-ahead log, made as it goes, and the tables as they were after each transaction.
//!
//! A transaction is in the log as soon as it commits and visible to others only some time later, in any order, but
//! before anybody can touch what it touched (it holds its locks until then). Its xid says nothing of the order either.

use std::collections::{BTreeMap, BTreeSet};

use change::{Collation, Column, Description, Lsn, ReplicaIdentity, Snapshot, Storage, TableSchema};
use rand::Rng;
use rand::rngs::StdRng;

/// Rows by table and id.
pub(crate) type Tables = BTreeMap<(u32, i64), String>;

/// The tables' relation ids. The first has REPLICA IDENTITY FULL and a key that anybody can compare. The second is
/// published later, has the default identity, a key that only the server can compare, and values stored out of line.
pub(crate) const TABLES: [u32; 2] = [16384, 16385];

/// What each rewrite appends to a value.
pub(crate) const REWRITTEN: char = '~';

/// One row's change.
#[derive(Clone, Debug)]
pub(crate) enum RowEdit {
    Insert {
        table: u32,
        id: i64,
        value: String,
    },
    Update {
        table: u32,
        old: (i64, String),
        new: (i64, String),
    },
    Delete {
        table: u32,
        id: i64,
        value: String,
    },
    Truncate {
        tables: Vec<u32>,
    },
    Message,
    /// The second table enters the publication.
    Publish,
    /// ALTER PUBLICATION by hand: it leaves the first table's changes out, or has them again.
    Alter,
    /// ALTER TABLE ... ALTER COLUMN TYPE of the first table, which appends [`REWRITTEN`] to its values.
    Retype,
}

impl RowEdit {
    fn tables(&self) -> &[u32] {
        match self {
            RowEdit::Insert { table, .. } | RowEdit::Update { table, .. } | RowEdit::Delete { table, .. } => {
                std::slice::from_ref(table)
            }
            RowEdit::Truncate { tables } => tables,
            RowEdit::Message | RowEdit::Publish | RowEdit::Retype | RowEdit::Alter => &[],
        }
    }

    pub(crate) fn touches(&self, table: u32) -> bool {
        self.tables().contains(&table)
    }

    /// What of it is streamed when these tables are published.
    pub(crate) fn published(&self, published: &[u32]) -> Option<RowEdit> {
        match self {
            RowEdit::Truncate { tables } => {
                let tables: Vec<u32> = tables.iter().copied().filter(|t| published.contains(t)).collect();
                (!tables.is_empty()).then_some(RowEdit::Truncate { tables })
            }
            edit if edit.tables().iter().all(|table| published.contains(table)) => Some(edit.clone()),
            _ => None,
        }
    }

    /// What the edit locks: rows by table and id, or the whole table.
    fn locks(&self) -> Vec<(u32, Option<i64>)> {
        match self {
            RowEdit::Insert { table, id, .. } | RowEdit::Delete { table, id, .. } => {
                vec![(*table, Some(*id))]
            }
            RowEdit::Update { table, old, new } => vec![(*table, Some(old.0)), (*table, Some(new.0))],
            RowEdit::Truncate { tables } => tables.iter().map(|table| (*table, None)).collect(),
            RowEdit::Message => Vec::new(),
            RowEdit::Publish => vec![(TABLES[1], None)],
            RowEdit::Retype | RowEdit::Alter => vec![(TABLES[0], None)],
        }
    }

    /// Does it to the tables.
    fn apply(&self, tables: &mut Tables) {
        match self {
            RowEdit::Insert { table, id, value } => drop(tables.insert((*table, *id), value.clone())),
            RowEdit::Update { table, old, new } => {
                tables.remove(&(*table, old.0));
                tables.insert((*table, new.0), new.1.clone());
            }
            RowEdit::Delete { table, id, .. } => drop(tables.remove(&(*table, *id))),
            RowEdit::Truncate { tables: truncated } => tables.retain(|(t, _), _| !truncated.contains(t)),
            RowEdit::Retype => {
                tables
                    .iter_mut()
                    .filter(|((t, _), _)| *t == TABLES[0])
                    .for_each(|(_, value)| value.push(REWRITTEN));
            }
            RowEdit::Message | RowEdit::Publish | RowEdit::Alter => {}
        }
    }
}

/// One entry of the WAL that decoding yields.
#[derive(Clone, Debug)]
pub(crate) enum Entry {
    Transaction {
        commit_lsn: Lsn,
        end_lsn: Lsn,
        xid: u32,
        /// Whether the second table was published by then.
        published: bool,
        /// How often the first table had been retyped by its beginning.
        retyped: u32,
        /// Whether the publication left the first table's changes out.
        lossy: bool,
        edits: Vec<RowEdit>,
    },
    Message {
        lsn: Lsn,
    },
    /// Somebody else's WAL.
    Noise {
        end_lsn: Lsn,
    },
}

/// The WAL and what it did.
#[derive(Debug)]
pub(crate) struct History {
    pub(crate) entries: Vec<Entry>,
    pub(crate) end: Lsn,
    /// The tables after the transaction whose commit record starts at the key.
    states: BTreeMap<Lsn, Tables>,
    tables: Tables,
    /// Whether the second table is published.
    pub(crate) published: bool,
    /// How often the first table was retyped.
    pub(crate) retyped: u32,
    /// Whether somebody alters the publication at times, which nobody does before the slot is there.
    pub(crate) alterable: bool,
    /// Whether the publication leaves the first table's changes out now; and transactions that began while it did.
    lossy: bool,
    tainted: BTreeSet<u32>,
    /// The next transaction id, those of transactions that run, and what the committed ones hold locked that others do
    /// not see yet.
    xid: u32,
    running: Vec<u32>,
    invisible: BTreeMap<u32, BTreeSet<(u32, Option<i64>)>>,
    next_id: i64,
    /// Ids that rows had, for other rows to have.
    left: Vec<(u32, i64)>,
}

impl History {
    pub(crate) fn new() -> Self {
        let states = BTreeMap::from([(Lsn::ZERO, Tables::new())]);
        History {
            entries: Vec::new(),
            end: Lsn(1000),
            states,
            tables: Tables::new(),
            published: false,
            retyped: 0,
            alterable: false,
            lossy: false,
            tainted: BTreeSet::new(),
            xid: 700,
            running: Vec::new(),
            invisible: BTreeMap::new(),
            next_id: 1,
            left: Vec::new(),
        }
    }

    /// The tables with everything that committed below `lsn`.
    pub(crate) fn at(&self, lsn: Lsn) -> &Tables {
        self.states.range(..lsn).next_back().map_or(&self.states[&Lsn::ZERO], |(_, tables)| tables)
    }

    /// The tables now.
    pub(crate) fn now(&self) -> &Tables {
        &self.tables
    }

    /// The tables with everything that a snapshot sees.
    pub(crate) fn seen_by(&self, snapshot: &Snapshot) -> Tables {
        let mut tables = Tables::new();
        for entry in &self.entries {
            if let Entry::Transaction { xid, edits, .. } = entry
                && snapshot.saw(*xid)
            {
                edits.iter().for_each(|edit| edit.apply(&mut tables));
            }
        }
        tables
    }

    /// What others see now; with `committed`, what they would see if all that has committed were visible.
    pub(crate) fn snapshot(&self, committed: bool) -> Snapshot {
        let mut open = self.running.clone();
        if !committed {
            open.extend(self.invisible.keys());
        }
        let last = (700..self.xid).rev().find(|xid| !open.contains(xid));
        let xmax = last.map_or(700, |last| last + 1);
        open.retain(|xid| *xid < xmax);
        open.sort_unstable();
        let xmin = open.first().copied().unwrap_or(xmax);
        let list: Vec<String> = open.iter().map(u32::to_string).collect();
        format!("{xmin}:{xmax}:{}", list.join(",")).parse().expect("a snapshot")
    }

    /// Some of what has committed becomes visible.
    pub(crate) fn reveal(&mut self, rng: &mut StdRng) {
        self.invisible.retain(|_, _| rng.random_bool(0.3));
    }

    /// All of it does, and what runs ends.
    pub(crate) fn reveal_all(&mut self) {
        self.running.clear();
        self.invisible.clear();
    }

    /// Appends a few entries.
    pub(crate) fn grow(&mut self, rng: &mut StdRng) {
        for _ in 0..rng.random_range(1..6) {
            match rng.random_range(0..10) {
                0 if self.alterable && rng.random_bool(0.1) => self.alter_publication(rng),
                0 => self.noise(rng),
                1 => self.message(rng),
                _ => self.transaction(rng),
            }
            if rng.random_bool(0.6) {
                self.reveal(rng);
            }
        }
    }

    /// Whether others see that the second table is published.
    pub(crate) fn published_visibly(&self) -> bool {
        let unseen = |entry: &Entry| match entry {
            Entry::Transaction { xid, edits, .. } => {
                self.invisible.contains_key(xid) && matches!(edits[..], [RowEdit::Publish])
            }
            _ => false,
        };
        self.published && !self.entries.iter().any(unseen)
    }

    /// Whether the first table was rewritten by a transaction that committed between these LSNs.
    pub(crate) fn rewritten(&self, from: Lsn, to: Lsn) -> bool {
        let rewrites = |entry: &Entry| match entry {
            Entry::Transaction { commit_lsn, edits, .. } => {
                (from..to).contains(commit_lsn) && edits.iter().any(|edit| matches!(edit, RowEdit::Retype))
            }
            _ => false,
        };
        self.entries.iter().any(rewrites)
    }

    /// Where a table's rows are, as others see it.
    pub(crate) fn storage(&self, table: u32) -> Storage {
        let mut storage = Storage { file: 1, columns: 1 };
        for entry in &self.entries {
            let Entry::Transaction { xid, edits, .. } = entry else { continue };
            if self.invisible.contains_key(xid) {
                continue;
            }
            for edit in edits {
                let retyped = table == TABLES[0] && matches!(edit, RowEdit::Retype);
                storage.file +=
                    i64::from(retyped || matches!(edit, RowEdit::Truncate { .. }) && edit.touches(table));
                storage.columns += i64::from(retyped);
            }
        }
        storage
    }

    /// What a table's rows mean, as others see it.
    pub(crate) fn description(&self, table: u32) -> Description {
        Description {
            storage: self.storage(table),
            schema: "public".into(),
            table: format!("t{table}"),
            persistence: "p".into(),
            ..Description::default()
        }
    }

    /// Whether this transaction is not visible, and holds a lock that keeps readers out.
    pub(crate) fn locks_out(&self, xid: u32) -> bool {
        self.invisible.get(&xid).is_some_and(|held| held.contains(&(TABLES[0], None)))
    }

    /// Whether any does.
    pub(crate) fn hides_a_change(&self) -> bool {
        self.invisible.values().any(|held| held.contains(&(TABLES[0], None)))
    }

    /// A transaction of nobody's table, over and visible.
    pub(crate) fn beat(&mut self) {
        self.xid += 1;
    }

    /// What holds a lock that keeps readers out becomes visible, for they wait for it.
    pub(crate) fn unlock(&mut self) {
        self.invisible.retain(|_, held| !held.contains(&(TABLES[0], None)));
    }

    /// Publishes the second table, whose writers are locked out for that moment.
    pub(crate) fn publish(&mut self, rng: &mut StdRng) {
        if !self.published {
            self.published = true;
            self.commit(rng, vec![RowEdit::Publish], self.retyped);
        }
    }

    /// The publication is altered, and altered back some time later.
    fn alter_publication(&mut self, rng: &mut StdRng) {
        self.lossy = true;
        self.commit(rng, vec![RowEdit::Alter], self.retyped);
        for _ in 0..rng.random_range(0..4) {
            self.transaction(rng);
        }
        self.commit(rng, vec![RowEdit::Alter], self.retyped);
        self.lossy = false;
        self.tainted = self.running.iter().copied().collect();
    }

    /// How often the publication was altered, as others see it.
    pub(crate) fn altered(&self) -> u32 {
        let visible = |entry: &&Entry| match entry {
            Entry::Transaction { xid, edits, .. } => {
                !self.invisible.contains_key(xid) && matches!(edits[..], [RowEdit::Alter])
            }
            _ => false,
        };
        self.entries.iter().filter(visible).count() as u32
    }

    /// Whether changes of the first table by transactions that committed between these LSNs are not in the stream.
    pub(crate) fn lost(&self, from: Lsn, to: Lsn) -> bool {
        let loses = |entry: &Entry| match entry {
            Entry::Transaction { commit_lsn, lossy: true, edits, .. } => {
                (from..to).contains(commit_lsn) && edits.iter().any(|edit| edit.touches(TABLES[0]))
            }
            _ => false,
        };
        self.entries.iter().any(loses)
    }

    fn noise(&mut self, rng: &mut StdRng) {
        self.end = Lsn(self.end.0 + rng.random_range(1..200));
        self.entries.push(Entry::Noise { end_lsn: self.end });
    }

    /// A message has the LSN of its record's end, where the next commit record may start.
    fn message(&mut self, rng: &mut StdRng) {
        self.end = Lsn(self.end.0 + rng.random_range(1..50));
        self.entries.push(Entry::Message { lsn: self.end });
    }

    fn transaction(&mut self, rng: &mut StdRng) {
        let size = if rng.random_bool(0.1) { rng.random_range(10..60) } else { rng.random_range(1..6) };
        let retyped = self.retyped;
        let mut edits: Vec<RowEdit> = (0..size).filter_map(|_| self.edit(rng)).collect();
        if rng.random_bool(0.02) {
            // Nothing in this transaction tells of it.
            edits.push(self.retype());
        }
        self.commit(rng, edits, retyped);
    }

    fn commit(&mut self, rng: &mut StdRng, edits: Vec<RowEdit>, retyped: u32) {
        for _ in 0..rng.random_range(1..3) {
            self.running.push(self.xid);
            self.xid += 1;
        }
        let xid = self.running.swap_remove(rng.random_range(0..self.running.len()));
        let locks: BTreeSet<_> = edits.iter().flat_map(RowEdit::locks).collect();
        let meets = |held: &BTreeSet<(u32, Option<i64>)>| {
            held.iter().any(|(table, row)| {
                locks.iter().any(|(t, r)| table == t && (row.is_none() || r.is_none() || row == r))
            })
        };
        self.invisible.retain(|_, held| !meets(held));
        let commit_lsn = Lsn(self.end.0 + if rng.random_bool(0.3) { 0 } else { rng.random_range(0..100) });
        // A commit record has a length.
        self.end = Lsn(commit_lsn.0 + rng.random_range(1..30));
        self.states.insert(commit_lsn, self.tables.clone());
        self.invisible.insert(xid, locks);
        let published = self.published;
        let lossy = self.lossy || (self.tainted.remove(&xid) && rng.random_bool(0.5));
        self.entries.push(Entry::Transaction {
            commit_lsn,
            end_lsn: self.end,
            xid,
            published,
            retyped,
            lossy,
            edits,
        });
    }

    fn retype(&mut self) -> RowEdit {
        self.retyped += 1;
        RowEdit::Retype.apply(&mut self.tables);
        RowEdit::Retype
    }

    fn edit(&mut self, rng: &mut StdRng) -> Option<RowEdit> {
        let table = TABLES[rng.random_range(0..2)];
        let value = format!("v\"{}\\", rng.random_range(0..1000));
        let existing: Vec<(u32, i64)> = self.tables.keys().filter(|(t, _)| *t == table).copied().collect();
        let kind = if existing.is_empty() { 0 } else { rng.random_range(0..100) };
        let pick = |rng: &mut StdRng| existing[rng.random_range(0..existing.len())].1;
        // Below and above all ids there are, and between them: rows move into ranges that were read and out of them.
        let mut free = |rng: &mut StdRng| {
            self.next_id += 1;
            let again = self.left.iter().rposition(|left| left.0 == table && !self.tables.contains_key(left));
            if let Some(again) = again.filter(|_| rng.random_bool(0.3)) {
                return self.left.remove(again).1;
            }
            loop {
                let id = rng.random_range(-200..200 + self.next_id);
                if !self.tables.contains_key(&(table, id)) {
                    return id;
                }
            }
        };
        let edit = match kind {
            0..40 => RowEdit::Insert { table, id: free(rng), value },
            40..75 => {
                let id = pick(rng);
                let before = self.tables.get(&(table, id))?.clone();
                let new_id = if rng.random_bool(0.4) { free(rng) } else { id };
                let new = if rng.random_bool(0.4) { before.clone() } else { value };
                RowEdit::Update { table, old: (id, before), new: (new_id, new) }
            }
            75..95 => {
                let id = pick(rng);
                RowEdit::Delete { table, id, value: self.tables.get(&(table, id))?.clone() }
            }
            95..97 => {
                let tables = if rng.random_bool(0.5) { TABLES.to_vec() } else { vec![table] };
                RowEdit::Truncate { tables }
            }
            97 => return Some(self.retype()),
            _ => RowEdit::Message,
        };
        if let RowEdit::Update { old: (id, _), .. } | RowEdit::Delete { id, .. } = &edit {
            self.left.push((table, *id));
        }
        edit.apply(&mut self.tables);
        Some(edit)
    }
}

/// What the tables look like: an id and a text.
pub(crate) fn schema(table: u32, retyped: u32) -> TableSchema {
    let column = |name: &str, type_oid, type_name: &str, key, collation| Column {
        name: name.into(),
        type_oid,
        type_name: type_name.into(),
        key,
        collation,
        number: None,
        recorded: None,
    };
    let first = table == TABLES[0];
    let (id_oid, id_type) = if first { (20, "bigint") } else { (1700, "numeric") };
    let collation = Collation { name: "C".into(), deterministic: true, bytewise: true };
    TableSchema {
        relation: table,
        root: None,
        schema: "public".into(),
        table: format!("t{table}"),
        identity: if first { ReplicaIdentity::Full } else { ReplicaIdentity::Default },
        columns: vec![
            column("id", id_oid, id_type, Some(1), None),
            if first && retyped % 2 == 1 {
                column("value", 1043, "character varying", None, Some(collation))
            } else {
                column("value", 25, "text", None, Some(collation))
            },
        ],
    }
}
