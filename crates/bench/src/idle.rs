//! What the processes take while nothing happens.

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::backlog::{self, Shape};
use crate::measure::{Watched, peak_kib};
use crate::producer;
use crate::sides::Side;
use crate::stack::Stack;

/// Rows in the stores.
const ROWS: u64 = 10_000;
/// After the stores are complete, before it is measured.
const REST: Duration = Duration::from_secs(10);
/// For how long it is measured.
const MEASURED: Duration = Duration::from_secs(60);

/// One process at rest.
pub(crate) struct Rest {
    pub(crate) process: &'static str,
    /// Percent of a core.
    pub(crate) cpu: f64,
    pub(crate) peak_kib: u64,
}

pub(crate) fn run() -> Result<Vec<Rest>> {
    let stack = Stack::start("idle", &[Side::Counters, Side::Search], |postgres, kafka| {
        backlog::fill(postgres, Shape::Snapshot, ROWS);
        producer::warm_up(kafka)
    })?;
    thread::sleep(REST);
    let beside = [("broker", stack.kafka.id()), ("Redis", stack.redis.id())];
    let all = stack.processes.iter().map(|(role, process)| (*role, process.id())).chain(beside);
    let mut watched: Vec<_> = all.map(|(name, id)| (name, id, Watched::new(id))).collect();
    thread::sleep(MEASURED);
    let rest = watched.iter_mut().map(|(process, id, watched)| {
        watched.look();
        let cpu = watched.used().as_secs_f64() / MEASURED.as_secs_f64() * 100.0;
        Rest { process, cpu, peak_kib: peak_kib(*id) }
    });
    let rest: Vec<Rest> = rest.collect();
    ensure!(rest.iter().all(|rest| rest.peak_kib > 0), "a process has ended");
    Ok(rest)
}
