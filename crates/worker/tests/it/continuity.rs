//! A worker continues only in the log that it left: what it does at a log that has another content under the same id.

use std::cell::Cell;
use std::time::Duration;

use change::{Clock, Lsn, Position, Progress, Timeline};
use worker::{Checkpoint, LastRecord, Role, Stored, Worker, WorkerError};

use crate::rig::{LOG, Log, Still, Store, Told, WRITTEN, empty, live};

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
fn where_the_logs_beginning_is_gone_the_store_stops() {
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
    let at = store.checkpoint(0);
    assert_eq!((at.next_offset, at.ready, &store.copies), (left.next_offset, false, &Some(vec![false])));
    assert!(at.stopped_at().is_some_and(|stopped| stopped.reason == refusal.what));
}

#[test]
fn a_store_is_not_moved_before_its_last_record_has_come() {
    let left = left_after(4);
    let mut store = Store::at(std::slice::from_ref(&left));
    // It was lost, only control records are in its place, and the ledger goes on.
    let mut log = Log::of(&WRITTEN[..3]);
    (log.end, log.progress) = (20, Some(progress(0x99, 4)));
    let clock = Still(Cell::new(0));
    let told = Told::default();
    let mut worker = Worker::new(Role::Worker, &clock, &told);
    (0..8).for_each(|_| worker.step(&mut log, &mut store).unwrap());
    clock.sleep(Duration::from_secs(9));
    (0..8).for_each(|_| worker.step(&mut log, &mut store).unwrap());
    drop(worker);
    assert_eq!(store.checkpoint(0), &left, "the ledger may be late");
    // It is not.
    let mut worker = Worker::new(Role::Worker, &clock, &told);
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
    let (clock, told) = (Still(Cell::new(0)), Told::default());
    let step = |worker: &mut Worker<'_>, log: &mut Log, store: &mut Store, steps: usize| {
        (0..steps).try_for_each(|_| worker.step(log, store))
    };
    // A broker that was cut off answered; then the others do.
    let (mut log, mut store) = (Log::of(&WRITTEN[..4]), Store::at(std::slice::from_ref(&left)));
    let mut worker = Worker::new(Role::Worker, &clock, &told);
    step(&mut worker, &mut log, &mut store, 7).unwrap();
    log = Log { assigned: true, ..Log::of(&WRITTEN) };
    step(&mut worker, &mut log, &mut store, 3).unwrap();
    assert_eq!((store.checkpoint(0), &store.copies), (&left, &Some(vec![false])));
    drop(worker);
    // The records were lost.
    let (mut log, mut store) = (Log::of(&WRITTEN[..4]), Store::at(std::slice::from_ref(&left)));
    let mut worker = Worker::new(Role::Worker, &clock, &told);
    step(&mut worker, &mut log, &mut store, 7).unwrap();
    let refused = step(&mut worker, &mut log, &mut store, 7);
    let lost = |error: &WorkerError| error.to_string().contains("records were lost");
    assert!(refused.as_ref().is_err_and(lost), "{refused:?}");
    assert_eq!((store.checkpoint(0).next_offset, store.checkpoint(0).ready), (left.next_offset, false));
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
    assert_eq!(store.checkpoint(0).next_offset, left.next_offset);
    assert!(store.applied[0].is_empty());
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

#[test]
fn a_store_in_another_form_follows_the_log_and_is_not_ready() {
    for (wanted, ready) in [("d", true), ("d:n2", false)] {
        let mut store = Store::at(&[Checkpoint { ready: true, ..left_after(4) }]);
        store.specs[0].definition = wanted.to_owned();
        live(&mut Log::of(&WRITTEN), &mut store).unwrap();
        assert_eq!((store.checkpoint(0).next_offset, store.checkpoint(0).ready), (9, ready), "{wanted}");
        assert_eq!(store.copies, Some(vec![!ready]), "a copy in the form is built");
    }
}
