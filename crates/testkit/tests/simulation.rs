//! Thousands of seeded lives of a pipeline with faults everywhere. `MILLRACE_SEED=17` replays one.

use std::panic::catch_unwind;

use testkit::sim::run_seed;

/// Seeds per run; `MILLRACE_SEEDS` overrides.
const SEEDS: u64 = 2_000;

#[test]
fn every_seed_keeps_the_promises() {
    if let Some(seed) = number("MILLRACE_SEED") {
        return run_seed(seed);
    }
    let seeds = number("MILLRACE_SEEDS").unwrap_or(SEEDS);
    let failed: Vec<u64> =
        (0..seeds).filter(|seed| catch_unwind(|| run_seed(*seed)).is_err()).take(3).collect();
    assert!(
        failed.is_empty(),
        "broken by seeds {failed:?}; replay with: MILLRACE_SEED={} cargo test -p millrace-testkit --test simulation",
        failed[0]
    );
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}
