//! A record that one store cannot take in stops that store; the others go on.

use std::cell::Cell;
use std::time::Duration;

use change::{Clock, Refusal};
use worker::{Role, Stored, Worker, WorkerError};

use crate::rig::{Log, Still, Store, Told, WRITTEN, empty, live_with};

/// Two stores, of which the first cannot take in the second change of a transaction.
fn poisoned() -> (Log, Store) {
    let mut store = Store::at(&[empty(), empty()]);
    store.poison.insert((0, 8), None);
    (Log::of(&WRITTEN), store)
}

#[test]
fn a_store_stops_before_the_transaction_that_it_cannot_take_in_and_the_others_go_on() {
    let ((mut log, mut store), told) = (poisoned(), Told::default());
    live_with(&told, &mut log, &mut store).unwrap();
    assert_eq!(store.applied, [vec![2, 3, 5], vec![2, 3, 5, 7, 8]], "whole transactions only");
    let stopped = store.checkpoint(0);
    assert_eq!((stopped.next_offset, stopped.ready), (6, false), "it stands after the last whole one");
    let said = stopped.stopped_at().expect("why it stopped");
    assert_eq!((said.offset, said.reason.as_str()), (8, "it is not what it should be"));
    assert!(store.checkpoint(1).stopped.is_none() && store.checkpoint(1).ready);
    assert_eq!(told.stopped.borrow().keys().collect::<Vec<_>>(), [&0]);
}

#[test]
fn the_next_worker_tries_again() {
    let ((mut log, mut store), told) = (poisoned(), Told::default());
    live_with(&told, &mut log, &mut store).unwrap();
    live_with(&told, &mut log, &mut store).unwrap();
    assert_eq!(store.applied[0], [2, 3, 5]);
    store.poison.clear();
    live_with(&told, &mut log, &mut store).unwrap();
    assert_eq!(store.applied, [vec![2, 3, 5, 7, 8], vec![2, 3, 5, 7, 8]]);
    assert!(store.checkpoint(0).stopped.is_none());
}

#[test]
fn a_stopped_store_goes_on_when_it_is_told_to_leave_the_record_out() {
    let ((mut log, mut store), told) = (poisoned(), Told::default());
    let clock = Still(Cell::new(0));
    let mut worker = Worker::new(Role::Worker, &clock, &told);
    (0..12).try_for_each(|_| worker.step(&mut log, &mut store)).unwrap();
    assert!(store.checkpoint(0).stopped.is_some());
    told.skip.borrow_mut().extend([(0, 5), (0, 8)]);
    clock.sleep(Duration::from_secs(1));
    (0..12).try_for_each(|_| worker.step(&mut log, &mut store)).unwrap();
    assert_eq!(store.applied, [vec![2, 3, 5, 7], vec![2, 3, 5, 7, 8]]);
    assert_eq!(store.checkpoint(0).skipped, [8], "only what it could not take in");
    assert!(store.checkpoint(0).stopped.is_none() && store.checkpoint(1).skipped.is_empty());
    assert!(told.stopped.borrow().is_empty());
}

#[test]
fn the_worker_ends_when_no_store_is_left() {
    let ((mut log, mut store), told) = (poisoned(), Told::default());
    let refusal = Refusal::new("the table has no key", "give it one");
    store.poison.insert((1, 5), Some(refusal.clone()));
    match live_with(&told, &mut log, &mut store).unwrap_err() {
        WorkerError::Poison { offset: 8, .. } => {}
        other => panic!("{other}"),
    }
    assert_eq!(store.applied, [vec![2, 3, 5], vec![2, 3]], "each stops at its own place");
    assert_eq!(
        store.checkpoint(1).stopped_at().map(|said| said.reason.as_str()),
        Some("the table has no key")
    );
    assert!(store.stored.iter().all(|at| matches!(at, Stored::At(at) if !at.ready)));
    // With a later log to go over to, they wait for their copies.
    log.newer = Some(2);
    live_with(&told, &mut log, &mut store).unwrap();
    assert_eq!(store.copies, Some(vec![true, true]));
    assert_eq!(store.applied, [vec![2, 3, 5], vec![2, 3]]);
}

#[test]
fn a_worker_that_serves_its_stores_stays_when_all_have_stopped() {
    let ((mut log, mut store), told) = (poisoned(), Told::default());
    store.poison.insert((1, 5), None);
    store.serves = true;
    let clock = Still(Cell::new(0));
    let mut worker = Worker::new(Role::Worker, &clock, &told);
    (0..20).try_for_each(|_| worker.step(&mut log, &mut store)).unwrap();
    assert_eq!(told.stopped.borrow().len(), 2);
    assert_eq!(store.applied, [vec![2, 3, 5], vec![2, 3]]);
    told.skip.borrow_mut().extend([(0, 8), (1, 5)]);
    clock.sleep(Duration::from_secs(1));
    (0..20).try_for_each(|_| worker.step(&mut log, &mut store)).unwrap();
    assert_eq!(store.applied, [vec![2, 3, 5, 7], vec![2, 3, 7, 8]], "each goes on from its own place");
    assert!(told.stopped.borrow().is_empty());
}

#[test]
fn a_store_that_is_refused_where_it_stands_leaves_the_others_alone() {
    let mut beyond = empty();
    beyond.next_offset = 40;
    let mut store = Store::at(&[beyond, empty()]);
    let told = Told::default();
    live_with(&told, &mut Log::of(&WRITTEN), &mut store).unwrap();
    assert_eq!(store.applied, [vec![], vec![2, 3, 5, 7, 8]]);
    let stopped = store.checkpoint(0);
    assert_eq!((stopped.next_offset, stopped.ready), (40, false));
    assert!(told.stopped.borrow()[&0].contains("records were lost"));
}

#[test]
fn a_record_of_somebody_else_stops_all_until_they_are_told_to_leave_it_out() {
    let mut log = Log::of(&WRITTEN);
    log.records.insert(3, (4, "foreign".to_owned()));
    let (mut store, told) = (Store::at(&[empty(), empty()]), Told::default());
    assert!(matches!(live_with(&told, &mut log, &mut store), Err(WorkerError::Poison { offset: 4, .. })));
    told.skip.borrow_mut().insert((1, 4));
    live_with(&told, &mut log, &mut store).unwrap();
    assert_eq!(store.applied, [vec![2, 3], vec![2, 3, 5, 7, 8]]);
    assert_eq!(store.checkpoint(1).skipped, [4]);
}

#[test]
fn a_store_that_cannot_be_written_is_tried_less_and_less_often() {
    let (mut log, mut store) = (Log::of(&WRITTEN), Store::at(&[empty()]));
    store.failures = 9;
    let (clock, told) = (Still(Cell::new(0)), Told::default());
    let mut worker = Worker::new(Role::Worker, &clock, &told);
    (0..40).try_for_each(|_| worker.step(&mut log, &mut store)).unwrap();
    assert_eq!(store.applied, [vec![2, 3, 5, 7, 8]]);
    // 50 ms, doubled each time up to 5 s.
    let waited = Duration::from_micros(clock.0.get().unsigned_abs());
    assert!(
        waited >= Duration::from_millis(50 + 100 + 200 + 400 + 800 + 1600 + 3200 + 5000 + 5000),
        "{waited:?}"
    );
}
