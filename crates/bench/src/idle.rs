//! What the processes take while nothing happens.

use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use testkit::services::{Kafka, Postgres, Process, Redis, free_port};

use crate::backlog::{self, Shape};
use crate::measure::{Watched, peak_kib};
use crate::{producer, sides};

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
    let (postgres, kafka, redis) = (Postgres::start(), Kafka::tuned(), Redis::start());
    producer::warm_up(&kafka)?;
    backlog::make_table(&postgres);
    backlog::keep_old_rows(&postgres);
    backlog::fill(&postgres, Shape::Snapshot, ROWS);
    let directory = tempfile::tempdir()?;
    let config = directory.path().join("millrace.toml");
    let text = sides::config_of_all("idle", (&postgres, &kafka, &redis), directory.path(), free_port());
    std::fs::write(&config, text)?;
    let millrace = |arguments: &[&str]| {
        let mut command = Command::new(sides::own_program());
        command.arg("--config").arg(&config).args(arguments).stdin(Stdio::null()).stdout(Stdio::null());
        command
    };
    ensure!(millrace(&["setup"]).status()?.success(), "millrace setup");
    let roles = ["reader", "counters", "search"];
    let processes = roles.map(|role| Process::spawn(millrace(&[role]).stderr(Stdio::null())));
    ensure!(millrace(&["wait", "--timeout", "90s"]).status()?.success(), "millrace wait");
    thread::sleep(REST);
    let beside = [("broker", kafka.id()), ("Redis", redis.id())];
    let all = roles.into_iter().zip(processes.iter().map(Process::id)).chain(beside);
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
