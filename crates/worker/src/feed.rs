use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use change::{HeaderError, Headers, Lsn, Position, Progress, Refusal, SchemaRef, TableSchema, header};

/// The log as it is when the group gives it to us.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LogState {
    /// The log's random id, from its record 0.
    pub id: String,
    /// Its generation.
    pub generation: u32,
    /// Whether its source's history is another than that of the generations before.
    pub diverged: bool,
    /// The first offset that is still there.
    pub start: i64,
    /// The end offset (exclusive, control records included).
    pub end: i64,
    /// What the consumer group has committed, if anything.
    pub group: Option<GroupOffset>,
    /// The log that is to take its place, if there is one.
    pub next: Option<Successor>,
}

/// A log from which stores are built to go over to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Successor {
    /// Its generation.
    pub generation: u32,
    /// Whether its source's history is another one, so that a store cannot go over without going back.
    pub diverged: bool,
}

/// A consumer group's committed offset.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GroupOffset {
    /// The next offset to read, as the group sees it.
    pub offset: i64,
    /// Whether a worker wrote it, rather than a reset tool.
    pub ours: bool,
}

/// What [`Feed::poll`] found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FeedEvent {
    /// The batch holds at least one record.
    Records,
    /// Nothing came.
    Idle,
    /// The log is ours from now on: read the checkpoints and seek before the next poll.
    Assigned,
    /// The log is no longer ours (another instance has it): forget what is staged.
    Revoked,
}

/// Why the feed cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum FeedError {
    /// The brokers are away; trying again can help.
    #[error("{0}")]
    Unavailable(String),
    /// Another member has this one's place in the consumer group. It may be an earlier life of this very worker, whose
    /// last request comes late; so trying again can help.
    #[error("another worker on this host has taken this one's place")]
    Fenced,
    /// A record cannot be read.
    #[error("record at offset {offset} of the log cannot be read: {reason}")]
    Poison {
        /// Its offset.
        offset: i64,
        /// What is wrong.
        reason: String,
    },
    /// Going on could be wrong; only the operator can help.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// The log and its ledger, as one member of a consumer group reads them. Implemented by the Kafka adapter and by
/// the simulator. Only committed records are seen.
///
/// Methods block their caller for a bounded time. After an error the feed is dropped and a new one made.
pub trait Feed {
    /// Clears `batch` and fills it with what has arrived, in order, waiting at most `timeout` for the first.
    fn poll(&mut self, timeout: Duration, batch: &mut LogBatch) -> Result<FeedEvent, FeedError>;

    /// Describes the log; called after [`FeedEvent::Assigned`]. What [`progress`](Feed::progress) gives from then
    /// on is at least as new as this description.
    fn log(&mut self) -> Result<LogState, FeedError>;

    /// The next record polled is the first at or after `offset`.
    fn seek(&mut self, offset: i64) -> Result<(), FeedError>;

    /// A version of a table. The reader writes it to the ledger no later than its first use, so that waiting
    /// for it is bounded; one that cannot come any more is [`FeedError::Refused`].
    fn schema(&mut self, version: SchemaRef) -> Result<Arc<TableSchema>, FeedError>;

    /// All versions of tables that the ledger holds, in the order in which the reader wrote them; called after
    /// [`log`](Feed::log). A feed that does not know them returns none: the worker then meets each with its first
    /// change.
    fn tables(&mut self) -> Vec<(SchemaRef, Arc<TableSchema>)> {
        Vec::new()
    }

    /// The newest progress in the ledger that has arrived here; does not block.
    fn progress(&mut self) -> Result<Option<&Progress>, FeedError>;

    /// Commits the group's offset, tagged as ours. Does not wait: it is for other programs' lag displays.
    fn commit(&mut self, next_offset: i64) -> Result<(), FeedError>;
}

/// Records on their way to a sink, in one buffer that is reused from poll to poll.
#[derive(Clone, Debug, Default)]
pub struct LogBatch {
    bytes: Vec<u8>,
    entries: Vec<Entry>,
}

#[derive(Clone, Debug)]
struct Entry {
    offset: i64,
    position: Option<Position>,
    xid: Option<u32>,
    schema: Option<SchemaRef>,
    commit: Option<Lsn>,
    anew: bool,
    log: bool,
    key: Range<usize>,
    value: Range<usize>,
    unchanged: Range<usize>,
    omitted: Range<usize>,
    previous_key: Range<usize>,
}

/// One record of the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LogRecord<'a> {
    /// Its offset.
    pub offset: i64,
    /// Whether it is record 0, which names the log and has nothing else.
    pub log: bool,
    /// Where it stands in the log's order; on every record but the first.
    pub position: Option<Position>,
    /// The source transaction.
    pub xid: Option<u32>,
    /// The version of the table its row follows.
    pub schema: Option<SchemaRef>,
    /// End LSN, on the last record of a unit.
    pub commit: Option<Lsn>,
    /// Whether the table is read anew from here on.
    pub anew: bool,
    /// JSON key.
    pub key: &'a [u8],
    /// JSON envelope.
    pub value: &'a [u8],
    /// JSON array of unchanged columns; empty for none.
    pub unchanged: &'a [u8],
    /// JSON array of columns that were left out for the row's size; empty for none.
    pub omitted: &'a [u8],
    /// JSON of the key before it changed; empty for none.
    pub previous_key: &'a [u8],
}

impl LogBatch {
    /// Forgets the records and keeps the memory.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.entries.clear();
    }

    /// Forgets the records at the offset `end` and after it.
    pub fn cut(&mut self, end: i64) {
        while self.entries.pop_if(|entry| entry.offset >= end).is_some() {}
    }

    /// Number of records.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Bytes held.
    pub fn byte_len(&self) -> usize {
        self.bytes.len()
    }

    /// Adds a record.
    pub fn push<'h>(
        &mut self,
        offset: i64,
        key: &[u8],
        value: &[u8],
        headers: impl IntoIterator<Item = (&'h str, &'h [u8])>,
    ) -> Result<(), HeaderError> {
        let mut keep = |bytes: &[u8]| {
            let start = self.bytes.len();
            self.bytes.extend_from_slice(bytes);
            start..self.bytes.len()
        };
        let (key, value) = (keep(key), keep(value));
        let headers: Vec<_> =
            headers.into_iter().map(|(name, content)| (keep(name.as_bytes()), keep(content))).collect();
        self.push_at(offset, key, value, headers)
    }

    /// Where the bytes of records to come are put; see [`push_at`](Self::push_at).
    pub fn bytes_mut(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    /// Adds a record whose parts lie in [`bytes_mut`](Self::bytes_mut) already: key, value, names and contents of the
    /// headers.
    ///
    /// # Panics
    /// When one of them does not.
    pub fn push_at(
        &mut self,
        offset: i64,
        key: Range<usize>,
        value: Range<usize>,
        headers: impl IntoIterator<Item = (Range<usize>, Range<usize>)>,
    ) -> Result<(), HeaderError> {
        let mut read = Headers::default();
        let (mut unchanged, mut omitted, mut previous_key) = (0..0, 0..0, 0..0);
        for (name, content) in headers {
            match std::str::from_utf8(&self.bytes[name]) {
                Ok(header::UNCHANGED) => unchanged = content,
                Ok(header::OMITTED) => omitted = content,
                Ok(header::PREVIOUS_KEY) => previous_key = content,
                Ok(name) => read.read(name, &self.bytes[content])?,
                // Not one of ours.
                Err(_) => {}
            }
        }
        let entry = Entry {
            offset,
            position: read.position,
            xid: read.xid,
            schema: read.schema,
            commit: read.commit,
            anew: read.anew,
            log: read.log.is_some(),
            key,
            value,
            unchanged,
            omitted,
            previous_key,
        };
        self.entries.push(entry);
        Ok(())
    }

    /// The record at `place`.
    ///
    /// # Panics
    /// When there is none.
    pub fn get(&self, place: usize) -> LogRecord<'_> {
        let entry = &self.entries[place];
        LogRecord {
            offset: entry.offset,
            log: entry.log,
            position: entry.position,
            xid: entry.xid,
            schema: entry.schema,
            commit: entry.commit,
            anew: entry.anew,
            key: &self.bytes[entry.key.clone()],
            value: &self.bytes[entry.value.clone()],
            unchanged: &self.bytes[entry.unchanged.clone()],
            omitted: &self.bytes[entry.omitted.clone()],
            previous_key: &self.bytes[entry.previous_key.clone()],
        }
    }

    /// Number of records up to and including the last one that ends a unit.
    pub fn whole(&self) -> usize {
        self.entries.iter().rposition(|entry| entry.commit.is_some() || entry.log).map_or(0, |last| last + 1)
    }
}
