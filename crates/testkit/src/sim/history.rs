//! The source's write-ahead log, made as it goes, and the tables as they were after each transaction.

use std::collections::BTreeMap;

use change::{Collation, Column, Lsn, ReplicaIdentity, TableSchema};
use rand::Rng;
use rand::rngs::StdRng;

/// Rows by table and id.
pub(crate) type Tables = BTreeMap<(u32, i64), String>;

/// The tables' relation ids.
pub(crate) const TABLES: [u32; 2] = [16384, 16385];

/// One row's change.
#[derive(Clone, Debug)]
pub(crate) enum RowEdit {
    Insert { table: u32, id: i64, value: String },
    Update { table: u32, old: (i64, String), new: (i64, String) },
    Delete { table: u32, id: i64, value: String },
    Truncate { tables: Vec<u32> },
    Message,
}

/// One entry of the WAL that decoding yields.
#[derive(Clone, Debug)]
pub(crate) enum Entry {
    Transaction {
        commit_lsn: Lsn,
        end_lsn: Lsn,
        xid: u32,
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
    xid: u32,
    next_id: i64,
}

impl History {
    pub(crate) fn new() -> Self {
        let states = BTreeMap::from([(Lsn::ZERO, Tables::new())]);
        let (entries, tables) = (Vec::new(), Tables::new());
        History { entries, end: Lsn(1000), states, tables, xid: 700, next_id: 1 }
    }

    /// The tables with everything that committed below `lsn`.
    pub(crate) fn at(&self, lsn: Lsn) -> &Tables {
        self.states.range(..lsn).next_back().map_or(&self.states[&Lsn::ZERO], |(_, tables)| tables)
    }

    /// The tables now.
    pub(crate) fn now(&self) -> &Tables {
        &self.tables
    }

    /// Appends a few entries.
    pub(crate) fn grow(&mut self, rng: &mut StdRng) {
        for _ in 0..rng.random_range(1..6) {
            match rng.random_range(0..10) {
                0 => self.noise(rng),
                1 => self.message(rng),
                _ => self.transaction(rng),
            }
        }
    }

    fn noise(&mut self, rng: &mut StdRng) {
        self.end = Lsn(self.end.0 + rng.random_range(1..200));
        self.entries.push(Entry::Noise { end_lsn: self.end });
    }

    /// The next commit record can have a message's LSN; the next message cannot.
    fn message(&mut self, rng: &mut StdRng) {
        if matches!(self.entries.last(), Some(Entry::Message { lsn }) if *lsn == self.end) {
            self.end = Lsn(self.end.0 + 1);
        }
        self.entries.push(Entry::Message { lsn: self.end });
        if rng.random_bool(0.5) {
            self.end = Lsn(self.end.0 + 1);
        }
    }

    fn transaction(&mut self, rng: &mut StdRng) {
        let size = if rng.random_bool(0.1) { rng.random_range(10..60) } else { rng.random_range(1..6) };
        let edits = (0..size).filter_map(|_| self.edit(rng)).collect();
        self.xid += 1;
        let commit_lsn = Lsn(self.end.0 + if rng.random_bool(0.3) { 0 } else { rng.random_range(0..100) });
        // A commit record has a length.
        self.end = Lsn(commit_lsn.0 + rng.random_range(1..30));
        self.states.insert(commit_lsn, self.tables.clone());
        self.entries.push(Entry::Transaction { commit_lsn, end_lsn: self.end, xid: self.xid, edits });
    }

    fn edit(&mut self, rng: &mut StdRng) -> Option<RowEdit> {
        let table = TABLES[rng.random_range(0..2)];
        let value = format!("v\"{}\\", rng.random_range(0..1000));
        let existing: Vec<(u32, i64)> = self.tables.keys().filter(|(t, _)| *t == table).copied().collect();
        let kind = if existing.is_empty() { 0 } else { rng.random_range(0..100) };
        let pick = |rng: &mut StdRng| existing[rng.random_range(0..existing.len())].1;
        Some(match kind {
            0..40 => {
                self.next_id += 1;
                self.tables.insert((table, self.next_id), value.clone());
                RowEdit::Insert { table, id: self.next_id, value }
            }
            40..75 => {
                let id = pick(rng);
                let before = self.tables.remove(&(table, id))?;
                let new_id = if rng.random_bool(0.25) {
                    self.next_id += 1;
                    self.next_id
                } else {
                    id
                };
                self.tables.insert((table, new_id), value.clone());
                RowEdit::Update { table, old: (id, before), new: (new_id, value) }
            }
            75..95 => {
                let id = pick(rng);
                let value = self.tables.remove(&(table, id))?;
                RowEdit::Delete { table, id, value }
            }
            95..97 => {
                let tables = if rng.random_bool(0.5) { TABLES.to_vec() } else { vec![table] };
                self.tables.retain(|(t, _), _| !tables.contains(t));
                RowEdit::Truncate { tables }
            }
            _ => RowEdit::Message,
        })
    }
}

/// What the tables look like: an id and a text, REPLICA IDENTITY FULL.
pub(crate) fn schema(table: u32) -> TableSchema {
    let column = |name: &str, type_oid, type_name: &str, key, collation| Column {
        name: name.into(),
        type_oid,
        type_name: type_name.into(),
        key,
        collation,
    };
    let collation = Collation { name: "C".into(), deterministic: true, bytewise: true };
    TableSchema {
        relation: table,
        schema: "public".into(),
        table: format!("t{table}"),
        identity: ReplicaIdentity::Full,
        columns: vec![
            column("id", 20, "bigint", Some(1), None),
            column("value", 25, "text", None, Some(collation)),
        ],
    }
}
