//! What the ledger topic holds: a compacted JSON record per key, written by the reader and by `setup` only.
//!
//! | key | value |
//! | --- | --- |
//! | `progress` | [`Progress`]: the last thing that every Kafka transaction writes |
//! | `slot` | [`SlotIntent`]: written before the slot is made and again when it stands |
//! | `schema/RELATION/VERSION` | [`TableSchema`], in the same Kafka transaction as its first use or before |
//! | `table/RELATION` | [`TableProgress`]: how much of a table's snapshot the log holds |
//!
//! Every value carries `format`. A reader refuses a newer one rather than guess.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::{Description, Lsn, Position, SchemaRef, Snapshot, Storage, TableSchema};

/// The format written by this version.
const FORMAT: u32 = 1;

/// How far the log has come. "The log up to `log_end` is Postgres up to `end_lsn`", exactly.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Progress {
    /// The log's random id, as in its record 0.
    pub log: String,
    /// The log's generation.
    pub generation: u32,
    /// Everything committed below this LSN is in the log; where the slot restarts.
    pub end_lsn: Lsn,
    /// The last change in the log.
    pub position: Position,
    /// A source transaction of which the log holds the first part only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split: Option<Split>,
    /// Offset after the last data record that this Kafka transaction makes visible.
    pub log_end: i64,
    /// The server and its timeline.
    pub timeline: Timeline,
    /// Heartbeats written to the source so far, and the last one's random content.
    pub beat: (i64, String),
    /// While tables are being read; a log without it is complete.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<Box<SnapshotProgress>>,
    /// When this was written, milliseconds since the epoch.
    pub time_ms: i64,
}

/// A row's key: the key columns' values as text, in the key's order.
pub type Key = Vec<String>;

/// What decides, while tables are being read, which streamed changes belong into the log.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct SnapshotProgress {
    /// What was visible when the slot was made, until a later snapshot has seen all of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub genesis: Option<Snapshot>,
    /// Transactions of which changes were left to the snapshot, and which no snapshot has seen since.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unseen: Vec<u32>,
    /// The last round, until the stream has caught up with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<Window>,
    /// Why there is no round now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting: Option<String>,
    /// Below this LSN stores may lack something, for the catalog was not as it has to be; the highest one until it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distrusted: Option<Lsn>,
}

/// A round that the stream has not caught up with.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Window {
    /// The snapshot under which it was read.
    pub snapshot: Snapshot,
    /// Everything that the snapshot saw committed below this LSN.
    pub until: Lsn,
    /// What was read of which table.
    pub pieces: Vec<Piece>,
}

/// What a round read of a table: the keys after `after`, up to where the table's progress stands, and `keys`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Piece {
    /// The table.
    pub relation: u32,
    /// How far it had been read before.
    pub after: Read,
    /// Single keys that were read because the stream could not tell their rows.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub keys: BTreeSet<Key>,
}

/// How far a table has been read.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Read {
    /// Not at all.
    Nothing,
    /// Up to and including this key.
    UpTo(Key),
    /// To its end.
    All,
    /// It was taken out of the publication; what the log holds of it goes no further.
    Removed,
}

/// How much of a table's snapshot is in the log.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TableProgress {
    /// `schema.table`; a partition's is its root's.
    pub name: String,
    /// See [`TableSchema::root`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<u32>,
    /// Its row of `pg_publication_rel`, which another one follows when the table is published anew, and how a partition is
    /// attached; 0 before it is known.
    pub publication: u32,
    /// How far it has been read.
    pub read: Read,
    /// The key in whose order it is read; see [`TableSchema::key_signature`]. Empty before its first round.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub key: Vec<String>,
    /// Keys whose rows the stream could not tell (a value left out of a row that moved here from where nothing had been
    /// read); the next round reads them.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub owed: BTreeSet<Key>,
    /// Whether the log holds rows of it that count no more: a `t` will end them before its next round.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stale: bool,
    /// Where its rows were when it was last looked at, as an older version wrote it, which kept no more than that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage: Option<Storage>,
    /// What its rows meant when it was last looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<Box<Description>>,
    /// Names that no column has any more, and the numbers of the columns that had them. Rows in the log have values under
    /// these names, so the table begins again when another column gets one.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub former: BTreeSet<(i16, String)>,
    /// `pg_publication.xmin` when it was last looked at: another one tells that the publication was altered since. 0
    /// before it is known.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub publication_xmin: u32,
    /// Rows read so far.
    pub rows: u64,
    /// Bytes of their values.
    pub bytes: u64,
    /// Rows that Postgres estimated; negative for unknown.
    pub estimated_rows: i64,
    /// When its first round was read, milliseconds since the epoch; 0 before.
    #[serde(default)]
    pub begun_ms: i64,
}

impl TableProgress {
    /// Of a table of which nothing is known.
    pub fn new(name: String, publication: u32, read: Read) -> Self {
        TableProgress {
            name,
            root: None,
            publication,
            read,
            key: Vec::new(),
            owed: BTreeSet::new(),
            stale: false,
            storage: None,
            description: None,
            former: BTreeSet::new(),
            publication_xmin: 0,
            rows: 0,
            bytes: 0,
            estimated_rows: -1,
            begun_ms: 0,
        }
    }

    /// Which table it is in the log, given its relation; see [`TableSchema::family`].
    pub fn family(&self, relation: u32) -> u32 {
        self.root.unwrap_or(relation)
    }

    /// Why the rows that the log holds do not mean any more what they meant; `None` if they still do.
    pub fn breaks(&self, now: &Description) -> Option<String> {
        if let Some(why) = self.former.iter().find_map(|(number, name)| now.reassigned(name, *number)) {
            return Some(why);
        }
        match (&self.description, self.storage) {
            (Some(before), _) => now.breaks(before),
            (None, Some(before)) if now.storage.rewritten(before) => {
                Some("its rows were rewritten".to_owned())
            }
            (None, _) => None,
        }
    }

    /// Takes note of what its rows mean. Returns whether that is new.
    pub fn describe(&mut self, now: &Description) -> bool {
        let known = self.description.as_deref() == Some(now);
        if !known {
            let before = self.description.replace(Box::new(now.clone()));
            if self.read == Read::Nothing {
                self.former.clear();
            } else {
                let columns = before.into_iter().flat_map(|before| before.columns);
                let names = columns.map(|column| (column.number, column.name));
                self.former.extend(names.filter(|(_, name)| now.columns.iter().all(|now| now.name != *name)));
            }
            self.storage = None;
        }
        !known
    }

    /// The tables as they are named: of partitions their sum.
    pub fn by_name<'a>(tables: impl Iterator<Item = &'a TableProgress>) -> Vec<TableProgress> {
        let mut sums: BTreeMap<&str, TableProgress> = BTreeMap::new();
        for table in tables {
            match sums.entry(&table.name) {
                Entry::Vacant(first) => drop(first.insert(table.clone())),
                Entry::Occupied(mut sum) if sum.get().read == Read::Removed => {
                    drop(sum.insert(table.clone()))
                }
                Entry::Occupied(_) if table.read == Read::Removed => {}
                Entry::Occupied(mut sum) => sum.get_mut().add(table),
            }
        }
        sums.into_values().collect()
    }

    fn add(&mut self, other: &TableProgress) {
        if !self.pending() {
            self.read = other.read.clone();
            self.owed = other.owed.clone();
        }
        self.rows += other.rows;
        self.bytes += other.bytes;
        if other.estimated_rows > 0 {
            self.estimated_rows = other.estimated_rows.saturating_add(self.estimated_rows.max(0));
        }
        let begun = [self.begun_ms, other.begun_ms].into_iter().filter(|begun| *begun > 0);
        self.begun_ms = begun.min().unwrap_or(0);
    }

    /// Whether rows are still to be read.
    pub fn pending(&self) -> bool {
        matches!(self.read, Read::Nothing | Read::UpTo(_)) || !self.owed.is_empty()
    }
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// Where a source transaction was split between two Kafka transactions.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Split {
    /// Its commit LSN.
    pub commit_lsn: Lsn,
    /// Ordinal of the last change that the log holds.
    pub ordinal: u64,
    /// Digest of that change as decoded: the source must send the same one again.
    pub digest: u64,
}

/// A server's identity: two servers never share both parts without sharing history up to the switch.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Timeline {
    /// `IDENTIFY_SYSTEM`'s systemid.
    pub system_id: String,
    /// The current timeline.
    pub timeline: u32,
}

/// How far `setup` has come with the slot.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SlotIntent {
    /// The slot's name.
    pub slot: String,
    /// Whether it stands.
    pub state: SlotState,
}

/// See [`SlotIntent`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SlotState {
    /// About to be created: a slot of that name, if there is one, is half-made and unused.
    Creating,
    /// Created; the log starts at this LSN.
    Created {
        /// The slot's consistent point.
        consistent_point: Lsn,
        /// `pg_current_snapshot()` under the snapshot exported with the slot.
        snapshot: Snapshot,
    },
}

/// One record of the ledger.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LedgerEntry {
    /// Key `progress`.
    Progress(Progress),
    /// Key `slot`.
    Slot(SlotIntent),
    /// Key `schema/RELATION/VERSION`.
    Schema(SchemaRef, TableSchema),
    /// Key `table/RELATION`.
    Table(u32, TableProgress),
}

/// A record of the ledger that cannot be read.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LedgerError {
    /// It was written by a newer version.
    #[error(
        "the ledger's record `{key}` has format {format}; this Millrace reads up to {FORMAT}: upgrade it"
    )]
    Newer {
        /// The record's key.
        key: String,
        /// Its format.
        format: u32,
    },
    /// It is damaged, or not Millrace's.
    #[error("the ledger's record `{key}` cannot be read: {reason}")]
    Malformed {
        /// The record's key, lossily.
        key: String,
        /// What is wrong.
        reason: String,
    },
}

#[derive(Serialize, Deserialize)]
struct Stamped<T> {
    format: u32,
    #[serde(flatten)]
    content: T,
}

impl LedgerEntry {
    /// The record's key.
    pub fn key(&self) -> String {
        match self {
            LedgerEntry::Progress(_) => "progress".into(),
            LedgerEntry::Slot(_) => "slot".into(),
            LedgerEntry::Schema(version, _) => format!("schema/{version}"),
            LedgerEntry::Table(relation, _) => format!("table/{relation}"),
        }
    }

    /// The record's value: JSON.
    pub fn value(&self) -> Vec<u8> {
        fn json<T: Serialize>(content: T) -> Vec<u8> {
            serde_json::to_vec(&Stamped { format: FORMAT, content }).expect("plain structures become JSON")
        }
        match self {
            LedgerEntry::Progress(progress) => json(progress),
            LedgerEntry::Slot(intent) => json(intent),
            LedgerEntry::Schema(_, schema) => json(schema),
            LedgerEntry::Table(_, progress) => json(progress),
        }
    }

    /// Reads a record back.
    pub fn decode(key: &[u8], value: &[u8]) -> Result<LedgerEntry, LedgerError> {
        let name = String::from_utf8_lossy(key).into_owned();
        let malformed = |reason: String| LedgerError::Malformed { key: name.clone(), reason };

        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        let Format { format } = serde_json::from_slice(value).map_err(|e| malformed(e.to_string()))?;
        if format > FORMAT {
            return Err(LedgerError::Newer { key: name, format });
        }
        fn content<'a, T: Deserialize<'a>>(value: &'a [u8]) -> Result<T, String> {
            serde_json::from_slice::<Stamped<T>>(value).map(|s| s.content).map_err(|e| e.to_string())
        }
        match name.as_str() {
            "progress" => content(value).map(LedgerEntry::Progress),
            "slot" => content(value).map(LedgerEntry::Slot),
            other => match other.split_once('/').map(|(kind, of)| (kind, of.parse().ok(), of.parse().ok())) {
                Some(("schema", Some(version), _)) => {
                    content(value).map(|schema| LedgerEntry::Schema(version, schema))
                }
                Some(("table", _, Some(relation))) => {
                    content(value).map(|progress| LedgerEntry::Table(relation, progress))
                }
                _ => Err("no such kind of record".to_owned()),
            },
        }
        .map_err(malformed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ColumnDescription;

    #[test]
    fn h30_a_name_that_a_column_had_some_time_ago_is_remembered() {
        let described = |columns: &[(i16, &str)]| {
            let column = |(number, name): &(i16, &str)| ColumnDescription {
                number: *number,
                name: (*name).to_owned(),
                ..ColumnDescription::default()
            };
            Description { columns: columns.iter().map(column).collect(), ..Description::default() }
        };
        let why = Some("column a is another one than before".to_owned());
        let mut table = TableProgress::new("public.t".into(), 1, Read::All);
        for columns in [&[(1, "id"), (2, "a")][..], &[(1, "id")], &[(1, "id"), (3, "b")]] {
            assert_eq!(table.breaks(&described(columns)), None);
            table.describe(&described(columns));
        }
        assert_eq!(
            table.breaks(&described(&[(1, "id"), (4, "a")])),
            why,
            "it was dropped, and another one is added"
        );
        assert_eq!(table.breaks(&described(&[(1, "id"), (3, "a")])), why, "another one is renamed");

        let mut table = TableProgress::new("public.t".into(), 1, Read::All);
        table.describe(&described(&[(1, "a")]));
        table.describe(&described(&[(1, "b")]));
        assert_eq!(table.breaks(&described(&[(1, "a")])), None, "it is renamed back");
        assert_eq!(table.breaks(&described(&[(1, "b"), (2, "a")])), why);
        // What is read anew has the present names alone.
        table.read = Read::Nothing;
        table.describe(&described(&[(1, "b"), (2, "a")]));
        assert_eq!(table.breaks(&described(&[(1, "b"), (2, "a")])), None);
    }

    #[test]
    fn a_newer_format_is_refused() {
        let error = LedgerEntry::decode(b"progress", br#"{"format":2,"whatever":1}"#).unwrap_err();
        assert_eq!(error, LedgerError::Newer { key: "progress".into(), format: 2 });
    }

    #[test]
    fn a_snapshots_progress_comes_back() {
        let table = TableProgress {
            read: Read::UpTo(vec!["é".into(), "7".into()]),
            owed: [vec!["x".into(), "1".into()]].into(),
            ..TableProgress::new("public.t".into(), 9, Read::Nothing)
        };
        let entry = LedgerEntry::Table(16384, table);
        assert_eq!(LedgerEntry::decode(entry.key().as_bytes(), &entry.value()), Ok(entry.clone()));
        let window = Window {
            snapshot: "5:7:6".parse().unwrap(),
            until: Lsn(77),
            pieces: vec![Piece { relation: 16384, after: Read::Nothing, keys: [vec!["x".into()]].into() }],
        };
        let snapshot =
            SnapshotProgress { unseen: vec![3], window: Some(window), ..SnapshotProgress::default() };
        let text = serde_json::to_string(&snapshot).unwrap();
        assert_eq!(serde_json::from_str::<SnapshotProgress>(&text).unwrap(), snapshot);
    }

    #[test]
    fn what_is_not_ours_is_refused() {
        let empty = r#"{"format":1}"#;
        for (key, value) in [("progress", "{}"), ("else", empty), ("schema/x", empty), ("table/1", empty)] {
            let error = LedgerEntry::decode(key.as_bytes(), value.as_bytes()).unwrap_err();
            assert!(matches!(error, LedgerError::Malformed { .. }), "{error}");
        }
    }
}
