//! A broker with one log, one ledger and transactions: what is committed is seen, in order; an open transaction
//! hides what follows it; a newer producer's epoch ends the older one's transaction. It can lose its latest transactions,
//! of log and ledger together, as brokers do that lose power before they have flushed.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use change::{
    Headers, Kind, LedgerEntry, Lsn, Progress, RecordBatch, SchemaRef, Snapshot, SnapshotProgress,
    TableSchema, Timeline, header,
};
use relay::{Ledger, PublishError, Publisher};
use worker::{Feed, FeedError, FeedEvent, GroupOffset, LogBatch, LogState};

use super::world::Faults;

/// A record of the log, its headers rendered.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub(crate) key: Vec<u8>,
    pub(crate) value: Vec<u8>,
    pub(crate) headers: Vec<(&'static str, Vec<u8>)>,
}

impl Record {
    /// Where it stands, if it tells that a table is read anew: a snapshot's round made it, or it is marked so.
    fn reads_anew(&self) -> Option<Lsn> {
        let mut headers = Headers::default();
        self.headers.iter().for_each(|(name, value)| headers.read(name, value).expect("our headers"));
        let position = headers.position?;
        (headers.anew || position.kind == Kind::Round).then_some(position.lsn)
    }
}

#[derive(Clone, Debug)]
enum Slot {
    /// Of a transaction that committed.
    Committed(Record),
    /// Of the open transaction.
    Open(Record),
    /// Aborted, or a control record.
    Hidden,
}

/// The broker's durable state.
#[derive(Debug)]
pub(crate) struct Broker {
    slots: Vec<Slot>,
    /// The ledger's committed records, as compaction leaves them.
    ledger: BTreeMap<Vec<u8>, Vec<u8>>,
    epoch: u64,
    group: Option<GroupOffset>,
    /// Where the log is complete, by table, as far as the ledger says.
    complete: BTreeMap<u32, Vec<Complete>>,
    /// Where the last round stands.
    read: Lsn,
    /// The broker after each transaction.
    past: Vec<Past>,
    /// What consumers of a broker that is cut off see: the end of the log, and the newest progress in the ledger.
    cut_off: (Option<i64>, Option<Progress>),
}

/// What is left when all after a transaction is lost.
#[derive(Clone, Debug)]
struct Past {
    slots: usize,
    ledger: BTreeMap<Vec<u8>, Vec<u8>>,
    read: Lsn,
    /// Number of places where the log became complete.
    complete: usize,
}

/// What was known of a log whose end is lost: stores that hold some of that are judged by it.
#[derive(Clone, Debug)]
pub(crate) struct Former {
    complete: BTreeMap<u32, Vec<Complete>>,
}

impl Former {
    /// See [`Broker::complete_at`].
    pub(crate) fn complete_at(&self, table: u32, offset: i64, lsn: Lsn) -> Option<Lsn> {
        complete_at(&self.complete, table, offset, lsn)
    }
}

fn complete_at(complete: &BTreeMap<u32, Vec<Complete>>, table: u32, offset: i64, lsn: Lsn) -> Option<Lsn> {
    let here = |known: &&Complete| {
        known.from.0 <= offset && known.from.1 <= lsn && known.until.is_none_or(|until| offset <= until)
    };
    complete.get(&table)?.iter().find(here).map(|known| known.read)
}

/// Where the log holds a table whole: from this offset and LSN on, up to the record with which it is read anew.
#[derive(Clone, Copy, Debug)]
struct Complete {
    from: (i64, Lsn),
    until: Option<i64>,
    /// Not before this LSN it was read.
    read: Lsn,
}

impl Broker {
    pub(crate) fn new(progress: Progress, table: LedgerEntry) -> Self {
        let first = Record {
            key: Vec::new(),
            value: Vec::new(),
            headers: vec![(header::LOG, progress.log.clone().into_bytes())],
        };
        let entry = LedgerEntry::Progress(progress);
        let mut broker = Broker {
            slots: vec![Slot::Committed(first), Slot::Hidden],
            ledger: [entry, table].map(|entry| (entry.key().into_bytes(), entry.value())).into(),
            epoch: 0,
            group: None,
            complete: BTreeMap::new(),
            read: Lsn::ZERO,
            past: Vec::new(),
            cut_off: (None, None),
        };
        broker.remember();
        broker
    }

    fn remember(&mut self) {
        let complete = self.complete.values().map(Vec::len).sum();
        let (slots, ledger, read) = (self.slots.len(), self.ledger.clone(), self.read);
        self.past.push(Past { slots, ledger, read, complete });
    }

    /// The end offset.
    pub(crate) fn end(&self) -> i64 {
        self.slots.len() as i64
    }

    /// Loses the latest transactions, so many or more, if there are as many. Offsets may be left out before the next.
    /// Says up to which offset the log is as it was, up to which LSN the ledger goes, and what was known before.
    ///
    /// That tables have been read is not lost by itself, without a record of the log: a store does not notice that.
    pub(crate) fn fall_back(&mut self, transactions: usize, gap: usize) -> Option<(i64, Lsn, Former)> {
        let former = Former { complete: self.complete.clone() };
        let most = self.past.len().checked_sub(transactions)?;
        let known = |end: i64| self.complete.values().flatten().filter(|known| known.from.0 <= end).count();
        let left = (1..=most).rev().find(|left| {
            let Past { slots, complete, .. } = &self.past[left - 1];
            known(*slots as i64) == *complete
        })?;
        self.past.truncate(left);
        let Past { slots, ledger, read, .. } = self.past[left - 1].clone();
        self.slots.truncate(slots);
        (self.ledger, self.read) = (ledger, read);
        let end = self.end();
        for known in self.complete.values_mut() {
            known.retain(|known| known.from.0 <= end);
            known.iter_mut().for_each(|known| known.until = known.until.filter(|until| *until < end));
        }
        self.slots.extend(std::iter::repeat_n(Slot::Hidden, gap));
        self.epoch += 1;
        self.rejoin();
        Some((end, self.progress()?.end_lsn, former))
    }

    /// The leader of the log, or of the ledger, is cut off from the other brokers, and not from its consumers.
    pub(crate) fn cut_off(&mut self, log: bool, ledger: bool) {
        self.cut_off = (log.then(|| self.stable()), self.progress().filter(|_| ledger));
    }

    /// Consumers find the brokers that lead now.
    pub(crate) fn rejoin(&mut self) {
        self.cut_off = (None, None);
    }

    /// Up to where consumers see the log: nothing past an open transaction.
    fn stable(&self) -> i64 {
        self.slots.iter().rposition(|slot| !matches!(slot, Slot::Open(_))).map_or(0, |last| last as i64 + 1)
    }

    /// `--reset-offsets --to-earliest`.
    pub(crate) fn reset_group(&mut self) {
        self.group = Some(GroupOffset { offset: 0, ours: false });
    }

    fn abort(&mut self) {
        for slot in self.slots.iter_mut().rev() {
            match slot {
                Slot::Open(_) => *slot = Slot::Hidden,
                _ => break,
            }
        }
    }

    fn commit(&mut self, ledger: Vec<LedgerEntry>) {
        let mut read_anew = None;
        for (offset, slot) in self.slots.iter_mut().enumerate().rev() {
            match slot {
                Slot::Open(record) => {
                    if let Some(lsn) = record.reads_anew() {
                        read_anew = Some(offset as i64);
                        self.read = self.read.max(lsn);
                    }
                    *slot = Slot::Committed(record.clone());
                }
                _ => break,
            }
        }
        for complete in self.complete.values_mut().filter_map(|known| known.last_mut()) {
            complete.until = complete.until.or(read_anew);
        }
        self.slots.push(Slot::Hidden);
        self.ledger.extend(ledger.into_iter().map(|entry| (entry.key().into_bytes(), entry.value())));
        if let Some(Progress { snapshot: None, log_end, end_lsn, .. }) = self.progress() {
            for table in self.read_ledger().tables.into_keys() {
                let known = self.complete.entry(table).or_default();
                if known.last().is_none_or(|last| last.until.is_some()) {
                    known.push(Complete { from: (log_end, end_lsn), until: None, read: self.read });
                }
            }
        }
        self.remember();
    }

    /// Not before which LSN the table was read of which a store that stands here has all.
    pub(crate) fn complete_at(&self, table: u32, offset: i64, lsn: Lsn) -> Option<Lsn> {
        complete_at(&self.complete, table, offset, lsn)
    }

    /// Whether the log holds a table whole to its end.
    pub(crate) fn complete(&self, table: u32) -> bool {
        let whole = |known: &Vec<Complete>| known.last().is_some_and(|last| last.until.is_none());
        self.complete.get(&table).is_some_and(whole)
    }

    /// The offset after the last record.
    pub(crate) fn data_end(&self) -> i64 {
        let last = self.slots.iter().rposition(|slot| matches!(slot, Slot::Committed(_) | Slot::Open(_)));
        last.map_or(0, |last| last as i64 + 1)
    }

    /// The records that a consumer may see.
    pub(crate) fn committed_from(&self, offset: i64) -> impl Iterator<Item = (i64, &Record)> {
        self.slots.iter().enumerate().skip(offset as usize).filter_map(|(offset, slot)| match slot {
            Slot::Committed(record) => Some((offset as i64, record)),
            _ => None,
        })
    }

    fn progress(&self) -> Option<Progress> {
        let value = self.ledger.get(&b"progress"[..])?;
        match LedgerEntry::decode(b"progress", value) {
            Ok(LedgerEntry::Progress(progress)) => Some(progress),
            other => panic!("the simulator wrote it: {other:?}"),
        }
    }

    fn read_ledger(&self) -> Ledger {
        let mut ledger = Ledger::default();
        for (key, value) in &self.ledger {
            match LedgerEntry::decode(key, value).expect("the simulator wrote it") {
                LedgerEntry::Progress(progress) => ledger.progress = Some(progress),
                LedgerEntry::Schema(at, schema) => drop(ledger.schemas.insert(at, schema)),
                LedgerEntry::Table(at, table) => drop(ledger.tables.insert(at, table)),
                LedgerEntry::Slot(_) => {}
            }
        }
        ledger
    }
}

/// A producer.
pub(crate) struct SimPublisher {
    pub(crate) broker: Rc<RefCell<Broker>>,
    pub(crate) faults: Faults,
    epoch: u64,
    /// How often it was asked whether the open transaction has begun.
    looks: u32,
}

impl SimPublisher {
    pub(crate) fn new(broker: Rc<RefCell<Broker>>, faults: Faults) -> Self {
        SimPublisher { broker, faults, epoch: 0, looks: 0 }
    }

    fn fail(&self) -> Result<(), PublishError> {
        if self.broker.borrow().epoch != self.epoch {
            return Err(PublishError::Fenced);
        }
        if self.faults.strike() { Err(PublishError::Unavailable("simulated".into())) } else { Ok(()) }
    }
}

impl Publisher for SimPublisher {
    fn open(&mut self) -> Result<Ledger, PublishError> {
        let mut broker = self.broker.borrow_mut();
        broker.epoch += 1;
        self.epoch = broker.epoch;
        broker.abort();
        let mut ledger = broker.read_ledger();
        ledger.log = ledger.progress.as_ref().map(|progress| progress.log.clone());
        ledger.log_end = broker.slots.len() as i64;
        ledger.data_end = Some(broker.data_end());
        Ok(ledger)
    }

    fn begin(&mut self) -> Result<(), PublishError> {
        self.looks = 0;
        self.fail()
    }

    fn ready(&mut self) -> bool {
        self.looks += 1;
        self.looks >= self.broker.borrow().slots.len() as u32 % 5
    }

    fn append(&mut self, batch: &RecordBatch, count: usize) -> Result<(), PublishError> {
        for record in batch.iter().take(count) {
            self.fail()?;
            let mut headers = Vec::new();
            record.headers(&mut Vec::new(), |name, value| headers.push((name, value.to_vec())));
            let record = Record { key: record.key.to_vec(), value: record.value.to_vec(), headers };
            self.broker.borrow_mut().slots.push(Slot::Open(record));
        }
        Ok(())
    }

    fn commit(&mut self, entries: &[LedgerEntry], progress: &mut Progress) -> Result<(), PublishError> {
        self.fail()?;
        let mut broker = self.broker.borrow_mut();
        progress.log_end = broker.data_end();
        broker.commit([entries, &[LedgerEntry::Progress(progress.clone())]].concat());
        drop(broker);
        // It took effect, and the producer does not learn of it.
        if self.faults.strike() { Err(PublishError::Unavailable("simulated".into())) } else { Ok(()) }
    }
}

/// A consumer.
pub(crate) struct SimFeed {
    broker: Rc<RefCell<Broker>>,
    faults: Faults,
    next: i64,
    assigned: bool,
    /// Whether it belongs to the group.
    member: bool,
    schemas: BTreeMap<SchemaRef, Arc<TableSchema>>,
    progress: Option<Progress>,
}

impl SimFeed {
    pub(crate) fn new(broker: Rc<RefCell<Broker>>, faults: Faults) -> Self {
        let schemas = BTreeMap::new();
        SimFeed { broker, faults, next: 0, assigned: false, member: true, schemas, progress: None }
    }

    /// One that belongs to no group.
    pub(crate) fn alone(self) -> Self {
        SimFeed { member: false, ..self }
    }

    fn fail(&self) -> Result<(), FeedError> {
        if self.faults.strike() { Err(FeedError::Unavailable("simulated".into())) } else { Ok(()) }
    }
}

impl Feed for SimFeed {
    fn poll(&mut self, _: Duration, batch: &mut LogBatch) -> Result<FeedEvent, FeedError> {
        self.fail()?;
        batch.clear();
        if !self.assigned {
            self.assigned = true;
            return Ok(FeedEvent::Assigned);
        }
        if self.faults.up_to(9) == 0 {
            self.broker.borrow_mut().rejoin();
        }
        let broker = self.broker.borrow();
        let count = self.faults.up_to(20);
        let stable = broker.cut_off.0.unwrap_or_else(|| broker.stable());
        for (offset, record) in broker.committed_from(self.next) {
            if offset >= stable || batch.len() == count {
                break;
            }
            let headers = record.headers.iter().map(|(name, value)| (*name, value.as_slice()));
            batch.push(offset, &record.key, &record.value, headers).expect("the simulator wrote it");
            self.next = offset + 1;
        }
        Ok(if batch.is_empty() { FeedEvent::Idle } else { FeedEvent::Records })
    }

    fn log(&mut self) -> Result<LogState, FeedError> {
        self.fail()?;
        let broker = self.broker.borrow();
        let id = broker.progress().map_or_else(String::new, |progress| progress.log);
        let end = broker.end();
        let group = broker.group.filter(|_| self.member);
        Ok(LogState { id, generation: 1, diverged: false, start: 0, end, group, next: None })
    }

    fn seek(&mut self, offset: i64) -> Result<(), FeedError> {
        self.next = offset;
        Ok(())
    }

    fn schema(&mut self, version: SchemaRef) -> Result<Arc<TableSchema>, FeedError> {
        if let Some(schema) = self.schemas.get(&version) {
            return Ok(schema.clone());
        }
        let ledger = self.broker.borrow().read_ledger();
        let schema =
            ledger.schemas.get(&version).expect("a schema is in the ledger before its first row").clone();
        Ok(self.schemas.entry(version).or_insert(Arc::new(schema)).clone())
    }

    fn progress(&mut self) -> Result<Option<&Progress>, FeedError> {
        self.fail()?;
        let broker = self.broker.borrow();
        self.progress = broker.cut_off.1.clone().or_else(|| broker.progress());
        drop(broker);
        Ok(self.progress.as_ref())
    }

    fn commit(&mut self, next_offset: i64) -> Result<(), FeedError> {
        if self.member {
            self.broker.borrow_mut().group = Some(GroupOffset { offset: next_offset, ours: true });
        }
        Ok(())
    }
}

/// The progress that a setup writes.
pub(crate) fn first_progress(consistent_point: Lsn, genesis: Snapshot) -> Progress {
    Progress {
        log: "simulated".into(),
        generation: 1,
        end_lsn: consistent_point,
        position: change::Position::START,
        split: None,
        log_end: 1,
        timeline: Timeline { system_id: "1".into(), timeline: 1 },
        beat: (0, String::new()),
        snapshot: Some(Box::new(SnapshotProgress { genesis: Some(genesis), ..SnapshotProgress::default() })),
        time_ms: 0,
    }
}
