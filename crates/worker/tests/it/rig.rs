//! A log and stores in memory, and a worker's life between them.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use change::{Clock, Lsn, Progress, Refusal, ReplicaIdentity, SchemaRef, TableSchema};
use worker::{
    Change, Checkpoint, Control, Feed, FeedError, FeedEvent, LogBatch, LogState, Move, Role, Sink, SinkError,
    StoreSpec, Stored, Successor, Unfit, Worker, WorkerError,
};

pub(crate) const LOG: &str = "a";

/// The first record of a log, and a transaction of two changes, and of one, and of two.
pub(crate) const WRITTEN: [(i64, &str); 6] = [
    (0, ""),
    (2, "0/64:t:0 schema=1/1"),
    (3, "0/64:t:1 schema=1/1 commit=0/65"),
    (5, "0/66:t:0 schema=1/1 commit=0/67"),
    (7, "0/68:t:0 schema=1/1"),
    (8, "0/68:t:1 schema=1/1 commit=0/69"),
];

pub(crate) struct Log {
    pub(crate) records: Vec<(i64, String)>,
    pub(crate) start: i64,
    pub(crate) end: i64,
    pub(crate) next: i64,
    pub(crate) assigned: bool,
    pub(crate) progress: Option<Progress>,
    /// The log as it is after it was described once.
    pub(crate) later: Option<Box<Log>>,
    /// The generation of a later log.
    pub(crate) newer: Option<u32>,
}

impl Log {
    pub(crate) fn of(records: &[(i64, &str)]) -> Log {
        // Behind each transaction is a control record.
        let end = records.last().map_or(0, |(offset, _)| offset + 2);
        let records = records.iter().map(|(offset, header)| (*offset, (*header).to_owned())).collect();
        Log { records, start: 0, end, next: 0, assigned: false, progress: None, later: None, newer: None }
    }
}

impl Feed for Log {
    fn poll(&mut self, _: Duration, batch: &mut LogBatch) -> Result<FeedEvent, FeedError> {
        batch.clear();
        if !self.assigned {
            self.assigned = true;
            return Ok(FeedEvent::Assigned);
        }
        for (offset, header) in self.records.iter().filter(|(offset, _)| *offset >= self.next) {
            let (name, content) = if header.is_empty() {
                ("millrace.log", LOG)
            } else if header == "foreign" {
                ("written.by", "somebody")
            } else {
                ("millrace.position", header.as_str())
            };
            batch
                .push(*offset, b"{}", br#"{"ts_ms":1,"op":"c"}"#, [(name, content.as_bytes())])
                .expect("our header");
        }
        self.next = self.end.max(self.next);
        Ok(if batch.is_empty() { FeedEvent::Idle } else { FeedEvent::Records })
    }

    fn log(&mut self) -> Result<LogState, FeedError> {
        let (start, end) = (self.start, self.end);
        if let Some(later) = self.later.take() {
            *self = Log { assigned: self.assigned, ..*later };
        }
        let next = self.newer.map(|generation| Successor { generation, diverged: false });
        Ok(LogState { id: LOG.into(), generation: 1, diverged: false, start, end, group: None, next })
    }

    fn seek(&mut self, offset: i64) -> Result<(), FeedError> {
        assert!(offset >= self.start, "retention has removed it");
        self.next = offset;
        Ok(())
    }

    fn schema(&mut self, version: SchemaRef) -> Result<Arc<TableSchema>, FeedError> {
        let (schema, table) = ("public".into(), "t".into());
        let (relation, identity) = (version.relation, ReplicaIdentity::Full);
        Ok(Arc::new(TableSchema { relation, root: None, schema, table, identity, columns: Vec::new() }))
    }

    fn progress(&mut self) -> Result<Option<&Progress>, FeedError> {
        Ok(self.progress.as_ref())
    }

    fn commit(&mut self, _: i64) -> Result<(), FeedError> {
        Ok(())
    }
}

/// Stores that remember the offsets that were applied to them.
pub(crate) struct Store {
    pub(crate) specs: Vec<StoreSpec>,
    pub(crate) stored: Vec<Stored>,
    staged: Vec<Vec<i64>>,
    pub(crate) applied: Vec<Vec<i64>>,
    /// Records, by store and offset, that a store cannot take in; some of them are refused.
    pub(crate) poison: BTreeMap<(usize, i64), Option<Refusal>>,
    /// The copies that were asked for; `None` for a sink that keeps none.
    pub(crate) copies: Option<Vec<bool>>,
    /// Whether readers reach the stores through the process.
    pub(crate) serves: bool,
    /// Commits that fail before one succeeds.
    pub(crate) failures: usize,
    /// Where another worker leaves the first store before this one looks at it.
    pub(crate) moved_to: Option<Checkpoint>,
}

impl Store {
    pub(crate) fn at(checkpoints: &[Checkpoint]) -> Store {
        let specs =
            (0..checkpoints.len()).map(|n| StoreSpec { name: format!("s{n}"), definition: "d".into() });
        let none = vec![Vec::new(); checkpoints.len()];
        Store {
            specs: specs.collect(),
            stored: checkpoints.iter().cloned().map(Stored::At).collect(),
            staged: none.clone(),
            applied: none,
            poison: BTreeMap::new(),
            copies: Some(vec![false; checkpoints.len()]),
            serves: false,
            failures: 0,
            moved_to: None,
        }
    }

    pub(crate) fn checkpoint(&self, store: usize) -> &Checkpoint {
        match &self.stored[store] {
            Stored::At(at) => at,
            other => panic!("{other:?}"),
        }
    }
}

impl Sink for Store {
    fn stores(&self) -> &[StoreSpec] {
        &self.specs
    }

    fn serves(&self) -> bool {
        self.serves
    }

    fn wants(&self, _: usize, _: &TableSchema) -> bool {
        true
    }

    fn load(&mut self) -> Result<Vec<Stored>, SinkError> {
        if let Some(moved) = self.moved_to.take() {
            self.stored[0] = Stored::At(moved);
        }
        Ok(self.stored.clone())
    }

    fn reset(&mut self, store: usize, to: &Checkpoint) -> Result<(), SinkError> {
        self.applied[store].clear();
        self.stored[store] = Stored::At(to.clone());
        Ok(())
    }

    fn apply(&mut self, store: usize, change: &Change<'_>) -> Result<(), SinkError> {
        match self.poison.get(&(store, change.offset)) {
            None => {}
            Some(None) => return Err(SinkError::Poison("it is not what it should be".to_owned())),
            Some(Some(refusal)) => return Err(refusal.clone().into()),
        }
        self.staged[store].push(change.offset);
        Ok(())
    }

    fn due_in(&mut self, _: i64) -> Duration {
        Duration::ZERO
    }

    fn full(&self) -> bool {
        false
    }

    fn commit(&mut self, moves: &[Option<Move>]) -> Result<(), SinkError> {
        if let Some(left) = self.failures.checked_sub(1) {
            self.failures = left;
            return Err(SinkError::Unavailable("the disk is full".to_owned()));
        }
        for (place, step) in moves.iter().enumerate() {
            let Some(Move { from, to }) = step else { continue };
            assert_eq!(self.checkpoint(place), from);
            self.stored[place] = Stored::At(to.clone());
            let staged = std::mem::take(&mut self.staged[place]);
            self.applied[place].extend(staged);
        }
        Ok(())
    }

    fn discard(&mut self) {
        self.staged.iter_mut().for_each(Vec::clear);
    }

    fn check(&mut self) -> Result<(), SinkError> {
        Ok(())
    }

    fn copies(&mut self) -> Result<Vec<Option<Stored>>, SinkError> {
        let asked = self.copies.clone().unwrap_or_default();
        Ok((0..self.specs.len()).map(|n| asked.get(n)?.then_some(Stored::Empty)).collect())
    }

    fn rebuild(&mut self, store: usize, keep: bool) -> Result<bool, SinkError> {
        let Some(copies) = &mut self.copies else { return Ok(false) };
        assert!(keep, "what is shown stays");
        copies[store] = true;
        Ok(true)
    }
}

pub(crate) struct Still(pub(crate) Cell<i64>);

impl Clock for Still {
    fn now_us(&self) -> i64 {
        self.0.get()
    }

    fn sleep(&self, duration: Duration) {
        self.0.set(self.0.get() + duration.as_micros() as i64);
    }
}

/// What the worker is told, and what it told.
#[derive(Default)]
pub(crate) struct Told {
    /// Records, by store and offset, that are to be left out.
    pub(crate) skip: RefCell<BTreeSet<(usize, i64)>>,
    /// The stores that have stopped, and why.
    pub(crate) stopped: RefCell<BTreeMap<usize, String>>,
}

impl Control for Told {
    fn stop(&self) -> bool {
        false
    }

    fn skip(&self, store: usize, record: &Unfit) -> bool {
        self.skip.borrow().contains(&(store, record.offset))
    }

    fn stopped(&self, store: usize, why: Option<&WorkerError>) {
        match why {
            Some(error) => drop(self.stopped.borrow_mut().insert(store, error.to_string())),
            None => drop(self.stopped.borrow_mut().remove(&store)),
        }
    }
}

/// A worker's life, long enough to read all.
pub(crate) fn live(log: &mut Log, store: &mut Store) -> Result<(), WorkerError> {
    live_with(&Told::default(), log, store)
}

pub(crate) fn live_with(told: &Told, log: &mut Log, store: &mut Store) -> Result<(), WorkerError> {
    let clock = Still(Cell::new(0));
    let mut worker = Worker::new(Role::Worker, &clock, told);
    log.assigned = false;
    (0..12).try_for_each(|_| worker.step(log, store))
}

pub(crate) fn empty() -> Checkpoint {
    Checkpoint {
        log: LOG.into(),
        generation: 1,
        next_offset: 0,
        lsn: Lsn::ZERO,
        definition: "d".into(),
        ready: true,
        skipped: Vec::new(),
        last: None,
        stopped: None,
    }
}
