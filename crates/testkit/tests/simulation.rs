//! Thousands of seeded lives of a pipeline with faults everywhere. `MILLRACE_SEED=17` replays one.

use std::num::NonZero;
use std::panic::catch_unwind;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use testkit::sim::run_seed;

/// Seeds per run; `MILLRACE_SEEDS` overrides.
const SEEDS: u64 = 2_000;
/// After so many that fail no more are begun.
const FAILURES: usize = 3;

#[test]
fn every_seed_keeps_the_promises() {
    if let Some(seed) = number("MILLRACE_SEED") {
        return run_seed(seed);
    }
    let seeds = number("MILLRACE_SEEDS").unwrap_or(SEEDS);
    let (next, failed) = (AtomicU64::new(0), Mutex::new(Vec::new()));
    let broken = || failed.lock().unwrap_or_else(PoisonError::into_inner);
    let run = || loop {
        let seed = next.fetch_add(1, Ordering::Relaxed);
        if seed >= seeds || broken().len() >= FAILURES {
            break;
        }
        if catch_unwind(|| run_seed(seed)).is_err() {
            broken().push(seed);
        }
    };
    thread::scope(|scope| {
        (0..thread::available_parallelism().map_or(1, NonZero::get)).for_each(|_| drop(scope.spawn(run)));
    });
    let failed = broken();
    assert!(
        failed.is_empty(),
        "broken by seeds {failed:?}; replay with: MILLRACE_SEED={} cargo test -p millrace-testkit --test simulation",
        failed[0]
    );
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}
