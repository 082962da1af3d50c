use std::cmp::Ordering;
use std::time::Duration;

use change::{
    Description, Key, Lsn, Read, Refusal, ReplicaIdentity, Snapshot, Storage, TableSchema, Timeline, Tuple,
};

use crate::{Confirmed, RelayError};

/// One thing that the source's log says, in the order of its log.
#[derive(Clone, PartialEq, Debug)]
pub enum WalEvent<'a> {
    /// A committed transaction begins.
    Begin {
        /// LSN of its commit record.
        commit_lsn: Lsn,
        /// When it committed, microseconds since the Unix epoch.
        commit_time_us: i64,
        /// Its top-level transaction id.
        xid: u32,
    },
    /// What a relation looks like from here on. Comes before its first row, and again when it may have changed.
    Relation(Announced),
    /// A row changed.
    Row {
        /// The change's own LSN.
        lsn: Lsn,
        /// Object id of the relation; a [`WalEvent::Relation`] has told what it looks like.
        relation: u32,
        /// What happened to it.
        change: RowChange<'a>,
    },
    /// Tables were truncated by one statement.
    Truncate {
        /// The change's own LSN.
        lsn: Lsn,
        /// Object ids of the relations.
        relations: &'a [u32],
    },
    /// A logical message; when it is not transactional it stands outside any transaction.
    Message {
        /// The message's LSN.
        lsn: Lsn,
        /// Whether it belongs to the transaction around it.
        transactional: bool,
        /// Names whose message it is.
        prefix: &'a str,
        /// Anything.
        content: &'a [u8],
    },
    /// The transaction is complete.
    Commit {
        /// The same as in its `Begin`.
        commit_lsn: Lsn,
        /// The LSN after its commit record: where to resume.
        end_lsn: Lsn,
    },
    /// Nothing for us up to here.
    Keepalive {
        /// Everything committed below this LSN has been sent.
        wal_end: Lsn,
        /// The server wants an acknowledgement now (it is shutting down, or about to give up on us).
        reply_requested: bool,
    },
}

/// What the stream says of a table, which is not all that the log needs: see [`Source::describe`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Announced {
    /// Its object id.
    pub relation: u32,
    /// Its schema and its name as of the change.
    pub schema: String,
    /// See [`schema`](Self::schema).
    pub table: String,
    /// What an old row holds.
    pub identity: ReplicaIdentity,
    /// Its columns, in the order of its rows.
    pub columns: Vec<AnnouncedColumn>,
}

/// See [`Announced`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AnnouncedColumn {
    /// Its name.
    pub name: String,
    /// Object id of its type.
    pub type_oid: u32,
    /// Its type modifier; -1 for none.
    pub modifier: i32,
    /// Whether it is part of the replica identity; under FULL every column is.
    pub key: bool,
}

/// A table as the stream announced it, completed by the catalog, which is asked later than the change was made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Described {
    /// Its columns as the stream describes them, and what the catalog adds.
    pub schema: TableSchema,
    /// Whether the catalog lacks the table or one of these columns: then keys and collations are not known.
    pub outdated: bool,
    /// How it is published now; `None` if it is not any more.
    pub published: Option<PublishedTable>,
    /// See [`Publication::xmin`].
    pub xmin: u32,
}

/// What happened to one row.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum RowChange<'a> {
    /// INSERT.
    Insert {
        /// The new row.
        new: Tuple<'a>,
    },
    /// UPDATE.
    Update {
        /// The old row under REPLICA IDENTITY FULL; else its key, where it changed or is stored out of line.
        old: Option<Tuple<'a>>,
        /// The new row, perhaps with unchanged TOAST values left out.
        new: Tuple<'a>,
    },
    /// DELETE.
    Delete {
        /// The old row under REPLICA IDENTITY FULL, else its key with every other column null.
        old: Tuple<'a>,
    },
}

/// What the relay must know of the source before it may start there (see [`crate::resume`]).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SourceState {
    /// The slot's `confirmed_flush_lsn`.
    pub confirmed_flush: Lsn,
    /// `pg_current_wal_flush_lsn()`.
    pub flush_lsn: Lsn,
    /// Who the server is.
    pub timeline: Timeline,
    /// LSN at which the current timeline left the one that the ledger knows; `None` when it is the same one, or
    /// when the ledger's is not an ancestor.
    pub switch_point: Option<Lsn>,
    /// What the heartbeat table holds.
    pub heartbeat: Heartbeat,
}

/// The heartbeat table's row: a counter and a random text, new with every beat.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Heartbeat {
    /// Beats so far.
    pub beat: i64,
    /// The last beat's random text.
    pub nonce: String,
}

/// The publication as it was found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Publication {
    /// Its tables.
    pub tables: Vec<PublishedTable>,
    /// Why its tables cannot be followed: it leaves out changes, or rows, or columns.
    pub unfit: Option<Refusal>,
    /// `pg_publication.xmin`: another one for each time that it was altered.
    pub xmin: u32,
    /// The source's insert LSN, read afterwards: whatever was not found here has no change from this LSN on.
    pub until: Lsn,
    /// False where a committed transaction that may have changed one of the tables may not have been visible: it holds its
    /// locks until it is.
    pub settled: bool,
}

/// Whether the catalog is as it was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unchanged {
    /// Nothing has changed of what a look finds. False also where that cannot be told.
    pub unchanged: bool,
    /// How long the server took to say so.
    pub took: Duration,
}

/// A table of the publication.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PublishedTable {
    /// Its object id.
    pub relation: u32,
    /// `schema.table`; a partition's is its root's.
    pub name: String,
    /// See [`change::TableSchema::root`].
    pub root: Option<u32>,
    /// Tells apart the times that it was published, as object ids in `pg_publication_rel` do, and a partition attached.
    pub publication: u32,
    /// Rows that the server estimates; negative for unknown.
    pub estimated_rows: i64,
    /// What its rows mean.
    pub description: Description,
    /// False if it was not found before and had no row then, not even one of a transaction that runs.
    pub filled: bool,
}

/// What to read of a table in a round of a snapshot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReadRequest {
    /// The table.
    pub relation: u32,
    /// The key in whose order it has been read; empty before its first round.
    pub key: Vec<String>,
    /// What its rows meant then, and where they were for older versions.
    pub description: Option<Box<Description>>,
    /// See [`change::TableProgress::storage`].
    pub storage: Option<Storage>,
    /// Its rows after this key are wanted, in the key's order; `None`: from the first. A table without a key is read
    /// whole, whatever its size.
    pub after: Option<Key>,
    /// Whether it has been read to its end, so that only `keys` are wanted.
    pub only_keys: bool,
    /// Single rows that are wanted as well.
    pub keys: Vec<Key>,
}

/// One thing that a round reads.
#[derive(Clone, PartialEq, Debug)]
pub enum RoundEvent<'a> {
    /// A table, as it looks under the round's snapshot; its rows follow.
    Table {
        /// Its columns and its key.
        schema: TableSchema,
        /// What its rows mean.
        description: Box<Description>,
    },
    /// A row of that table, whole.
    Row(Tuple<'a>),
    /// No more rows of that table in this round; so far it has been read now.
    End(Read),
}

/// How a round ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Round {
    /// It was read.
    Taken {
        /// Its snapshot.
        snapshot: Snapshot,
        /// Everything that the snapshot saw committed below this LSN, and is durable at the source.
        until: Lsn,
    },
    /// Nothing was read; says why.
    NotNow(String),
    /// Nothing was read: the rows of this table that were read before do not mean any more what they meant, or are in the
    /// order of another key (h30). Says why.
    Broken(u32, String),
}

/// Why the source cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The connection failed or the server is away; trying again can help.
    #[error("{0}")]
    Unavailable(String),
    /// Going on could lose changes; only the operator can help.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// A stream of committed changes that can be resumed at an LSN. Implemented by the Postgres adapter and by the
/// simulator.
///
/// Methods block their caller; none panics. After an `Unavailable` the source is dropped and a new one made.
pub trait Source {
    /// Whether another reader holds the slot. The relay stands by while this is so.
    fn busy(&mut self) -> Result<bool, SourceError>;

    /// Ends the session that holds the slot, after its publisher was fenced. Returns when the slot is free.
    fn take_over(&mut self) -> Result<(), SourceError>;

    /// Reads what [`crate::resume::check`] decides on. `ledger` is the server that the ledger knows.
    fn state(&mut self, ledger: &Timeline) -> Result<SourceState, SourceError>;

    /// Writes the heartbeat row and returns when the write is durable at the source.
    fn write_heartbeat(&mut self, heartbeat: &Heartbeat) -> Result<(), SourceError>;

    /// Begins to stream at `from`: every transaction whose commit record starts at or after it, in commit order.
    fn start(&mut self, from: Lsn) -> Result<(), SourceError>;

    /// Gives `deliver` what has arrived, in order, waiting at most `timeout` for the first of it, and returns
    /// whether there was anything. Returns early enough that acknowledgements stay prompt (some 10 ms of work).
    /// An error of `deliver` ends the call at once and is passed on.
    fn poll(
        &mut self,
        timeout: Duration,
        deliver: &mut dyn FnMut(WalEvent<'_>) -> Result<(), RelayError>,
    ) -> Result<bool, RelayError>;

    /// Looks at the publication.
    fn published(&mut self) -> Result<Publication, SourceError>;

    /// Begins to ask whether the catalog is as the last look at the publication found it. Does not block.
    fn ask_unchanged(&mut self);

    /// Waits for the answer to the last question. It holds for everything that had been delivered when it was asked.
    fn unchanged(&mut self) -> Result<Unchanged, SourceError>;

    /// Says why a table is not published any more, and what to do; `None` for one that is not configured.
    fn absence(&mut self, relation: u32, name: &str) -> Result<Option<Refusal>, SourceError>;

    /// Completes what the stream says of a table by what the catalog knows, under one snapshot that sees the committed
    /// transaction `xid`; `None` while that transaction may have changed the table and is not visible yet.
    fn describe(&mut self, announced: &Announced, xid: u32) -> Result<Option<Described>, SourceError>;

    /// What is visible now.
    fn visible(&mut self) -> Result<Snapshot, SourceError>;

    /// Reads rows of these tables, in this order, under one snapshot, until about `bytes` of them were read: first each
    /// table's single keys, then its range. `accept` decides on the snapshot before anything is read under it. Blocks
    /// for as long as that takes; an error of `deliver` ends the call at once and is passed on.
    ///
    /// No lock that writers could wait for is held, and the snapshot ends with the call.
    fn read(
        &mut self,
        tables: &[ReadRequest],
        bytes: u64,
        accept: &mut dyn FnMut(&Snapshot) -> bool,
        deliver: &mut dyn FnMut(RoundEvent<'_>) -> Result<(), RelayError>,
    ) -> Result<Round, RelayError>;

    /// How each key compares with `bound`, by the operators and collations of the table's key columns; `None` when these
    /// are others now, so that the two cannot be compared.
    fn compare(
        &mut self,
        relation: u32,
        keys: &[Key],
        bound: &Key,
    ) -> Result<Option<Vec<Ordering>>, SourceError>;

    /// Lets the server forget everything below this LSN. Does not block; keeps the link alive whether called or
    /// not, also while the relay is busy elsewhere.
    fn acknowledge(&mut self, confirmed: Confirmed) -> Result<(), SourceError>;
}
