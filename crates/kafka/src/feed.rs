//! The worker's end of the log: one member of a consumer group, or a builder, that reads from where its store stands.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use change::{Description, LedgerEntry, NEW_LOG, Progress, Refusal, SchemaRef, TableProgress, TableSchema};
use relay::Ledger;
use worker::{Feed, FeedError, FeedEvent, LogBatch, LogState, Successor};

use crate::generations::generations;
use crate::ledger::{entry, read_ledger_in_order, require_topics};
use crate::membership::Member;
use crate::reader::{Next, PartitionReader};
use crate::wire::fetch::Fetch;
use crate::{Connection, Names, ReadUntil};

/// Records of the ledger taken in by one call.
const LEDGER_MAX_RECORDS: usize = 1_000;
/// How long the ledger may be late behind the log here, though it was written first.
const LEDGER_WAIT: Duration = Duration::from_secs(10);
/// One look of that wait.
const LEDGER_LOOK: Duration = Duration::from_millis(100);

/// The log and its ledger as one member of a consumer group reads them; see [`Feed`].
///
/// Joins the group by subscription, so that its tools see a live member, and has the log only while the group
/// gives it: a second member of the same group stands by. Or belongs to no group, and always has the log.
pub struct KafkaFeed {
    connection: Connection,
    names: Names,
    place: Place,
    /// From where it was told to begin; `None` while it has not been.
    log: Option<Fetch>,
    ledger: PartitionReader,
    schemas: BTreeMap<SchemaRef, Arc<TableSchema>>,
    /// The newest description of each relation, with its columns' present names.
    tables: HashMap<u32, Box<Description>>,
    /// Those of the last look at the whole ledger, in its order.
    described: Vec<SchemaRef>,
    progress: Option<Progress>,
    /// Offset of the last record that was polled.
    polled: i64,
}

/// By what right the log is read.
enum Place {
    Member(Member),
    /// Nobody's; and whether that the log is ours was told.
    Alone {
        told: bool,
    },
}

impl KafkaFeed {
    /// Joins `group` and begins to read the ledger.
    pub fn open(connection: &Connection, names: &Names, group: &str) -> Result<Self, FeedError> {
        Self::with(connection, names, Some(group))
    }

    /// Reads the log without a group, for a builder: who may build is decided by who has the log in its group.
    pub fn alone(connection: &Connection, names: &Names) -> Result<Self, FeedError> {
        Self::with(connection, names, None)
    }

    fn with(connection: &Connection, names: &Names, group: Option<&str>) -> Result<Self, FeedError> {
        require_topics(connection, names)?;
        let mut ledger = PartitionReader::follower(connection, names, names.ledger())?;
        ledger.seek(ledger.bounds()?.0)?;
        let place = match group {
            Some(group) => Place::Member(Member::join(connection, names, group)?),
            None => Place::Alone { told: false },
        };
        Ok(KafkaFeed {
            connection: connection.clone(),
            names: names.clone(),
            place,
            log: None,
            ledger,
            schemas: BTreeMap::new(),
            tables: HashMap::new(),
            described: Vec::new(),
            progress: None,
            polled: 0,
        })
    }

    /// Takes in what has come of the ledger, waiting at most `timeout` for the first of it.
    fn drain_ledger(&mut self, mut timeout: Duration) -> Result<(), FeedError> {
        for _ in 0..LEDGER_MAX_RECORDS {
            match self.ledger.next(std::mem::take(&mut timeout))? {
                Next::Record(message) => match entry(&message)? {
                    Some(LedgerEntry::Progress(progress)) => self.take_progress(progress),
                    Some(LedgerEntry::Schema(version, schema)) => self.take_schema(version, schema),
                    Some(LedgerEntry::Table(relation, table)) => self.take_table(relation, table),
                    Some(LedgerEntry::Slot(_)) | None => {}
                },
                Next::End => {}
                Next::Nothing => break,
            }
        }
        Ok(())
    }

    /// Reads the ledger from its beginning, and keeps its schemas.
    fn whole_ledger(&mut self) -> Result<Ledger, FeedError> {
        let (mut ledger, order) = read_ledger_in_order(&self.connection, &self.names, ReadUntil::Committed)?;
        self.described = order;
        for (version, schema) in std::mem::take(&mut ledger.schemas) {
            self.take_schema(version, schema);
        }
        for (relation, table) in std::mem::take(&mut ledger.tables) {
            self.take_table(relation, table);
        }
        Ok(ledger)
    }

    fn take_schema(&mut self, version: SchemaRef, schema: TableSchema) {
        self.schemas.entry(version).or_insert_with(|| Arc::new(schema));
    }

    /// Keeps what the table's columns are called now.
    fn take_table(&mut self, relation: u32, table: TableProgress) {
        if let Some(description) = table.description {
            self.tables.insert(relation, description);
        }
    }

    /// A version with the names that its columns have now, which is how the stores' definitions name them.
    fn present(&self, version: SchemaRef) -> Option<Arc<TableSchema>> {
        let schema = self.schemas.get(&version)?;
        let Some(now) = self.tables.get(&version.relation) else { return Some(schema.clone()) };
        let newest = SchemaRef { version: u32::MAX, ..version };
        let later: Vec<&TableSchema> =
            self.schemas.range(version..=newest).skip(1).map(|(_, schema)| schema.as_ref()).collect();
        Some(Arc::new(TableSchema::clone(schema).with_present_names(&later, now)))
    }

    /// Keeps the newest progress: [`Feed::log`] may have read ahead of what arrives here.
    fn take_progress(&mut self, progress: Progress) {
        let place = |progress: &Progress| (progress.end_lsn, progress.position, progress.log_end);
        if self.progress.as_ref().is_none_or(|known| place(known) <= place(&progress)) {
            self.progress = Some(progress);
        }
    }

    /// Waits, for a bounded time, until the ledger holds what `find` looks for.
    fn await_ledger<T>(&mut self, find: impl Fn(&Self) -> Option<T>) -> Result<Option<T>, FeedError> {
        let start = Instant::now();
        loop {
            let found = find(self);
            if found.is_some() || start.elapsed() >= LEDGER_WAIT {
                return Ok(found);
            }
            self.drain_ledger(LEDGER_LOOK)?;
        }
    }
}

impl Feed for KafkaFeed {
    fn poll(&mut self, timeout: Duration, batch: &mut LogBatch) -> Result<FeedEvent, FeedError> {
        batch.clear();
        // Where the log is not read, something else is waited for.
        let wait = if self.log.is_some() { Duration::ZERO } else { timeout };
        let news = match &mut self.place {
            Place::Member(member) => member.news(wait)?,
            Place::Alone { told: true } => {
                thread::sleep(wait);
                None
            }
            Place::Alone { told } => {
                *told = true;
                Some(FeedEvent::Assigned)
            }
        };
        if news.is_some() {
            // What comes is read again from the checkpoint, by whoever has the log then.
            self.log = None;
        }
        let read = match &mut self.log {
            Some(log) => log.next(timeout, batch)?.is_some(),
            None => false,
        };
        if let Place::Member(member) = &mut self.place {
            if read { member.busy() } else { member.idle()? }
        }
        if let Some(last) = batch.len().checked_sub(1) {
            self.polled = batch.get(last).offset;
        }
        self.drain_ledger(Duration::ZERO)?;
        if let (Some(log), Some(progress)) = (&self.log, &self.progress) {
            log.expect(progress.log_end);
        }
        Ok(news.unwrap_or(if batch.is_empty() { FeedEvent::Idle } else { FeedEvent::Records }))
    }

    fn log(&mut self) -> Result<LogState, FeedError> {
        let log = self.names.log();
        let (start, end) = PartitionReader::new(&self.connection, &self.names, log.clone())?.bounds()?;
        let ledger = self.whole_ledger()?;
        if let Some(progress) = ledger.progress {
            self.take_progress(progress);
        }
        let id = ledger.log.ok_or_else(|| {
            Refusal::new(
                format!("topic \"{log}\" does not hold the record that names the log"),
                format!(
                    "millrace setup where it has not finished; else the topic was created anew, and {NEW_LOG}"
                ),
            )
        })?;
        let group = match &self.place {
            Place::Member(member) => member.committed()?,
            Place::Alone { .. } => None,
        };
        let generation = self.names.generation();
        let known = generations(&self.connection, self.names.pipeline())?;
        let diverged = known.and_then(|known| known.get(generation)).is_some_and(|this| this.diverged);
        // Where this log is not current any more, the current one is its successor.
        let newest = known.map(|known| known.newest()).filter(|newest| newest.number > generation);
        let next = newest.map(|next| Successor { generation: next.number, diverged: next.diverged });
        Ok(LogState { id, generation, diverged, start, end, group, next })
    }

    fn seek(&mut self, offset: i64) -> Result<(), FeedError> {
        // Where the group has taken the log back meanwhile, the next poll tells.
        let ours = match &self.place {
            Place::Member(member) => member.assigned(),
            Place::Alone { .. } => true,
        };
        self.log = match ours {
            true => Some(Fetch::start(&self.connection, &self.names.log(), offset)?),
            false => None,
        };
        Ok(())
    }

    fn schema(&mut self, version: SchemaRef) -> Result<Arc<TableSchema>, FeedError> {
        if let Some(schema) = self.await_ledger(|feed| feed.present(version))? {
            return Ok(schema);
        }
        // It has not come. Whether it is not there, or cannot be read now, only a whole look tells.
        self.whole_ledger()?;
        if let Some(schema) = self.present(version) {
            return Ok(schema);
        }
        let what =
            format!("topic \"{}\" does not hold schema {version}, which the log uses", self.names.ledger());
        // The reader writes a schema to the ledger before the progress that covers the schema's first record.
        match &self.progress {
            Some(progress) if progress.log_end > self.polled => {
                let remedy = format!("if the ledger was created anew or has lost records, {NEW_LOG}");
                Err(Refusal::new(what, remedy).into())
            }
            _ => Err(FeedError::Unavailable(format!(
                "{what}; the ledger is behind the log, and is waited for"
            ))),
        }
    }

    fn tables(&mut self) -> Vec<(SchemaRef, Arc<TableSchema>)> {
        let known = |version: &SchemaRef| Some((*version, self.present(*version)?));
        self.described.iter().filter_map(known).collect()
    }

    fn progress(&mut self) -> Result<Option<&Progress>, FeedError> {
        self.drain_ledger(Duration::ZERO)?;
        Ok(self.progress.as_ref())
    }

    fn commit(&mut self, next_offset: i64) -> Result<(), FeedError> {
        match &self.place {
            Place::Member(member) if member.assigned() => member.commit(next_offset),
            _ => {}
        }
        Ok(())
    }
}
