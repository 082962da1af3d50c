//! What the processes take while nothing happens.

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::Options;
use crate::backlog::{self, Shape};
use crate::measure::Watched;
use crate::producer;
use crate::program::Build;
use crate::rounds::{Column, Figures};
use crate::stack::Stack;

/// Rows in the stores.
const ROWS: u64 = 10_000;
/// After the stores are complete, before it is measured.
const REST: Duration = Duration::from_secs(10);
/// For how long it is measured.
const MEASURED: Duration = Duration::from_secs(60);

/// What is measured of each process.
pub(crate) const COLUMNS: [Column; 2] = [("% of a core", 2), ("peak MiB", 0)];

pub(crate) fn run(options: &Options, build: Build<'_>) -> Result<Vec<Figures>> {
    let stack = Stack::start(build, "idle", &options.sides(), |postgres, kafka| {
        backlog::fill(postgres, Shape::Snapshot, ROWS);
        producer::warm_up(kafka)
    })?;
    thread::sleep(REST);
    let beside = [("broker", stack.kafka.id()), ("Redis", stack.redis.id())];
    let all = stack.processes.iter().map(|(role, process)| (*role, process.id())).chain(beside);
    let mut watched: Vec<_> = all.map(|(name, id)| (name, Watched::new(id))).collect();
    thread::sleep(MEASURED);
    let rest = watched.iter_mut().map(|(subject, watched)| {
        watched.look();
        ensure!(watched.peak_kib() > 0, "{subject} has ended");
        let cpu = watched.used().as_secs_f64() / MEASURED.as_secs_f64() * 100.0;
        Ok(Figures { build: build.name(), subject, values: vec![cpu, watched.peak_kib() as f64 / 1024.0] })
    });
    rest.collect()
}
