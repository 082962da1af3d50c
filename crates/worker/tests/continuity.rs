//! A worker continues only in the log that it left: what it does at a log that has another content under the same id.

use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

use change::{Clock, Lsn, Position, Progress, ReplicaIdentity, SchemaRef, TableSchema, Timeline};
use worker::{
    Change, Checkpoint, Control, Feed, FeedError, FeedEvent, LastRecord, LogBatch, LogState, Move, Role,
    Sink, SinkError, StoreSpec, Stored, Worker, WorkerError,
};

const LOG: &str = "a";

/// The first record of a log, and a transaction of two changes, and of one, and of two.
const WRITTEN: [(i64, &str); 6] = [
    (0, ""),
    (2, "0/64:t:0 schema=1/1"),
    (3, "0/64:t:1 schema=1/1 commit=0/65"),
    (5, "0/66:t:0 schema=1/1 commit=0/67"),
    (7, "0/68:t:0 schema=1/1"),
    (8, "0/68:t:1 schema=1/1 commit=0/69"),
];

/// The same changes after the broker lost all from offset 4 on, and one after them.
const WRITTEN_AGAIN: [(i64, &str); 7] = [
    (0, ""),
    (2, "0/64:t:0 schema=1/1"),
    (3, "0/64:t:1 schema=1/1 commit=0/65"),
    (4, "0/66:t:0 schema=1/1 commit=0/67"),
    (5, "0/68:t:0 schema=1/1"),
    (6, "0/68:t:1 schema=1/1 commit=0/69"),
    (8, "0/6A:t:0 schema=1/1 commit=0/6B"),
];

struct Log {
    records: Vec<(i64, String)>,
    start: i64,
    end: i64,
    next: i64,
    assigned: bool,
    progress: Option<Progress>,
    /// The log as it is after it was described once.
    later: Option<Box<Log>>,
}

impl Log {
    fn of(records: &[(i64, &str)]) -> Log {
        // Behind each transaction is a control record.
        let end = records.last().map_or(0, |(offset, _)| offset + 2);
        let records = records.iter().map(|(offset, header)| (*offset, (*header).to_owned())).collect();
        Log { records, start: 0, end, next: 0, assigned: false, progress: None, later: None }
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
        Ok(LogState { id: LOG.into(), generation: 1, diverged: false, start, end, group: None, next: None })
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
struct Store {
    specs: Vec<StoreSpec>,
    stored: Vec<Stored>,
    staged: Vec<Vec<i64>>,
    applied: Vec<Vec<i64>>,
    /// The copies that were asked for; `None` for a sink that keeps none.
    copies: Option<Vec<bool>>,
    /// Where another worker leaves the first store before this one looks at it.
    moved_to: Option<Checkpoint>,
}

impl Store {
    fn at(checkpoints: &[Checkpoint]) -> Store {
        let specs =
            (0..checkpoints.len()).map(|n| StoreSpec { name: format!("s{n}"), definition: "d".into() });
        let none = vec![Vec::new(); checkpoints.len()];
        Store {
            specs: specs.collect(),
            stored: checkpoints.iter().cloned().map(Stored::At).collect(),
            staged: none.clone(),
            applied: none,
            copies: Some(vec![false; checkpoints.len()]),
            moved_to: None,
        }
    }

    fn checkpoint(&self, store: usize) -> &Checkpoint {
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

    fn wants(&self, _: &TableSchema) -> bool {
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

    fn apply(&mut self, live: &[bool], change: &Change<'_>) -> Result<(), SinkError> {
        let staged = self.staged.iter_mut().zip(live).filter(|(_, live)| **live);
        staged.for_each(|(staged, _)| staged.push(change.offset));
        Ok(())
    }

    fn due_in(&mut self, _: i64) -> Duration {
        Duration::ZERO
    }

    fn full(&self) -> bool {
        false
    }

    fn commit(&mut self, moves: &[Option<Move>]) -> Result<(), SinkError> {
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

struct Still(Cell<i64>);

impl Clock for Still {
    fn now_us(&self) -> i64 {
        self.0.get()
    }

    fn sleep(&self, duration: Duration) {
        self.0.set(self.0.get() + duration.as_micros() as i64);
    }
}

struct Unwatched;

impl Control for Unwatched {
    fn stop(&self) -> bool {
        false
    }
}

/// A worker's life, long enough to read all.
fn live(log: &mut Log, store: &mut Store) -> Result<(), WorkerError> {
    let clock = Still(Cell::new(0));
    let mut worker = Worker::new(Role::Worker, &clock, &Unwatched);
    log.assigned = false;
    (0..8).try_for_each(|_| worker.step(log, store))
}

fn empty() -> Checkpoint {
    Checkpoint {
        log: LOG.into(),
        generation: 1,
        next_offset: 0,
        lsn: Lsn::ZERO,
        definition: "d".into(),
        ready: true,
        skipped: Vec::new(),
        last: None,
    }
}

/// What a worker leaves that has read the first so many records.
fn left_after(records: usize) -> Checkpoint {
    let mut store = Store::at(&[empty()]);
    live(&mut Log::of(&WRITTEN[..records]), &mut store).expect("nothing is wrong");
    store.checkpoint(0).clone()
}

fn progress(end_lsn: u64, log_end: i64) -> Progress {
    Progress {
        log: LOG.into(),
        generation: 1,
        end_lsn: Lsn(end_lsn),
        position: Position::START,
        split: None,
        log_end,
        timeline: Timeline { system_id: "1".into(), timeline: 1 },
        beat: (0, String::new()),
        snapshot: None,
        time_ms: 0,
    }
}

#[test]
fn the_checkpoint_names_the_last_record_and_the_store_goes_on_after_it() {
    let left = left_after(4);
    let last = left.last_record().unwrap();
    assert_eq!((last.offset, last.position.to_string()), (5, "0/66:t:0".into()));
    let mut store = Store::at(&[left, empty()]);
    live(&mut Log::of(&WRITTEN), &mut store).unwrap();
    assert_eq!(store.applied, [vec![7, 8], vec![2, 3, 5, 7, 8]], "each from where it was");
    assert!(store.stored.iter().all(|at| matches!(at, Stored::At(at) if at.next_offset == 9)));
    assert_eq!(store.checkpoint(0).last, store.checkpoint(1).last);
}

#[test]
fn a_store_of_what_the_log_has_lost_is_frozen_and_built_again() {
    // At offset 6 the log goes on in the middle of a transaction.
    let left = left_after(4);
    let mut store = Store::at(std::slice::from_ref(&left));
    live(&mut Log::of(&WRITTEN_AGAIN), &mut store).unwrap();
    assert!(store.applied[0].is_empty(), "nothing follows what the log does not hold");
    assert_eq!(store.copies, Some(vec![true]), "a copy is asked for");
    let frozen = store.checkpoint(0).clone();
    assert_eq!((frozen.lsn, frozen.next_offset, frozen.ready), (left.lsn, left.next_offset, false));
    assert_ne!(frozen.log, LOG, "no worker continues it");
    let copy = Checkpoint { next_offset: 5, lsn: left.lsn, ..empty() };
    assert!(copy.reaches(&frozen), "offsets of the lost records mean nothing");
    // The next worker knows it without reading.
    live(&mut Log::of(&WRITTEN_AGAIN), &mut store).unwrap();
    assert_eq!((store.applied[0].len(), store.checkpoint(0)), (0, &frozen));
}

#[test]
fn only_the_stores_that_the_log_does_not_continue_are_built_again() {
    let mut store = Store::at(&[left_after(6), left_after(3), left_after(4)]);
    live(&mut Log::of(&WRITTEN_AGAIN), &mut store).unwrap();
    assert_eq!(store.applied, [vec![], vec![4, 5, 6, 8], vec![]]);
    assert_eq!(store.copies, Some(vec![true, false, true]));
    assert_eq!(store.checkpoint(1).next_offset, 9);
}

#[test]
fn a_sink_without_copies_is_filled_in_place() {
    let mut store = Store::at(&[left_after(4)]);
    store.copies = None;
    live(&mut Log::of(&WRITTEN_AGAIN), &mut store).unwrap();
    assert_eq!(store.applied, [vec![2, 3, 4, 5, 6, 8]]);
    assert_eq!(store.checkpoint(0).log, LOG);
}

#[test]
fn a_log_without_its_beginning_is_refused_and_nothing_is_changed() {
    let left = left_after(4);
    let mut store = Store::at(std::slice::from_ref(&left));
    let mut log = Log::of(&WRITTEN_AGAIN[1..]);
    log.start = 2;
    let refusal = match live(&mut log, &mut store).unwrap_err() {
        WorkerError::Refused(refusal) => refusal,
        other => panic!("{other}"),
    };
    for part in ["s0", "expected the end of a unit, 5 0/66:t:0", "found 5 0/68:t:0", "within a unit"] {
        assert!(refusal.what.contains(part), "{part} is not in {refusal}");
    }
    assert_eq!((store.checkpoint(0), &store.copies), (&left, &Some(vec![false])));
}

#[test]
fn a_store_is_not_moved_before_its_last_record_has_come() {
    let left = left_after(4);
    let mut store = Store::at(std::slice::from_ref(&left));
    // It was lost, only control records are in its place, and the ledger goes on.
    let mut log = Log::of(&WRITTEN[..3]);
    (log.end, log.progress) = (20, Some(progress(0x99, 4)));
    let clock = Still(Cell::new(0));
    let mut worker = Worker::new(Role::Worker, &clock, &Unwatched);
    (0..8).for_each(|_| worker.step(&mut log, &mut store).unwrap());
    clock.sleep(Duration::from_secs(9));
    (0..8).for_each(|_| worker.step(&mut log, &mut store).unwrap());
    drop(worker);
    assert_eq!(store.checkpoint(0), &left, "the ledger may be late");
    // It is not.
    let mut worker = Worker::new(Role::Worker, &clock, &Unwatched);
    log.assigned = false;
    (0..8).for_each(|_| worker.step(&mut log, &mut store).unwrap());
    // A process that was frozen for an hour has not waited for an hour.
    clock.sleep(Duration::from_secs(3600));
    (0..8).for_each(|_| worker.step(&mut log, &mut store).unwrap());
    assert_eq!((store.checkpoint(0), &store.copies), (&left, &Some(vec![false])));
    for _ in 0..12 {
        clock.sleep(Duration::from_secs(1));
        worker.step(&mut log, &mut store).unwrap();
    }
    assert_eq!((store.checkpoint(0).lsn, &store.copies), (left.lsn, &Some(vec![true])));
}

#[test]
fn a_worker_that_was_frozen_goes_on_where_another_one_left_the_store() {
    // It knows the log's end of the time before, and the store's place of the time after.
    let mut log = Log::of(&WRITTEN[..4]);
    log.later = Some(Box::new(Log::of(&WRITTEN)));
    let mut store = Store::at(&[left_after(3)]);
    store.moved_to = Some(left_after(6));
    live(&mut log, &mut store).unwrap();
    assert_eq!((&store.applied, &store.copies), (&vec![vec![]], &Some(vec![false])));
    assert_eq!(store.checkpoint(0), &left_after(6));
}

#[test]
fn a_log_that_ends_before_a_store_is_looked_at_again_before_it_is_refused() {
    let left = left_after(6);
    let clock = Still(Cell::new(0));
    let step = |worker: &mut Worker<'_>, log: &mut Log, store: &mut Store, steps: usize| {
        (0..steps).try_for_each(|_| worker.step(log, store))
    };
    // A broker that was cut off answered; then the others do.
    let (mut log, mut store) = (Log::of(&WRITTEN[..4]), Store::at(std::slice::from_ref(&left)));
    let mut worker = Worker::new(Role::Worker, &clock, &Unwatched);
    step(&mut worker, &mut log, &mut store, 7).unwrap();
    log = Log { assigned: true, ..Log::of(&WRITTEN) };
    step(&mut worker, &mut log, &mut store, 3).unwrap();
    assert_eq!((store.checkpoint(0), &store.copies), (&left, &Some(vec![false])));
    drop(worker);
    // The records were lost.
    let (mut log, mut store) = (Log::of(&WRITTEN[..4]), Store::at(std::slice::from_ref(&left)));
    let mut worker = Worker::new(Role::Worker, &clock, &Unwatched);
    step(&mut worker, &mut log, &mut store, 7).unwrap();
    let refused = step(&mut worker, &mut log, &mut store, 7);
    let lost = |error: &WorkerError| error.to_string().contains("records were lost");
    assert!(refused.as_ref().is_err_and(lost), "{refused:?}");
    assert_eq!(store.checkpoint(0), &left);
}

#[test]
fn where_retention_has_removed_the_last_record_the_next_unit_is_above_it() {
    let left = left_after(4);
    let cut = |records: &[(i64, &str)]| {
        let mut log = Log::of(records);
        log.start = 6;
        log
    };
    let mut store = Store::at(std::slice::from_ref(&left));
    live(&mut cut(&WRITTEN[4..]), &mut store).unwrap();
    assert_eq!(store.applied, [vec![7, 8]]);
    let mut store = Store::at(std::slice::from_ref(&left));
    let below = [(7, "0/66:t:1 schema=1/1 commit=0/67"), (8, "0/68:t:0 schema=1/1 commit=0/69")];
    assert!(matches!(live(&mut cut(&below), &mut store), Err(WorkerError::Refused(_))));
    assert_eq!(store.checkpoint(0), &left);
}

#[test]
fn an_older_versions_checkpoint_is_continued_and_then_names_its_record() {
    let named = left_after(4);
    let stale: Option<LastRecord> = left_after(3).last;
    for last in [None, stale] {
        let old = Checkpoint { last, ..named.clone() };
        let mut store = Store::at(std::slice::from_ref(&old));
        live(&mut Log::of(&WRITTEN[..4]), &mut store).unwrap();
        assert_eq!(store.checkpoint(0), &named, "named although nothing new came");
        let mut store = Store::at(std::slice::from_ref(&old));
        live(&mut Log::of(&WRITTEN), &mut store).unwrap();
        assert_eq!(store.applied, [vec![7, 8]]);
        let mut store = Store::at(&[old]);
        live(&mut Log::of(&WRITTEN_AGAIN), &mut store).unwrap();
        assert!(store.applied[0].is_empty(), "no unit ends before its offset");
    }
}
