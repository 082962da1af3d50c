//! Millrace's processes and their servers, running.

use std::process::Stdio;

use anyhow::{Result, ensure};
use tempfile::TempDir;
use testkit::services::{Kafka, Postgres, Process, Redis, free_port};

use crate::backlog;
use crate::program::Build;
use crate::sides::{COUNTERS, INDEXES, Side};

pub(crate) struct Stack {
    /// By role. They end before their servers do, as fields are dropped in this order.
    pub(crate) processes: Vec<(&'static str, Process)>,
    pub(crate) postgres: Postgres,
    pub(crate) kafka: Kafka,
    pub(crate) redis: Redis,
    /// The port of the search API.
    pub(crate) search: u16,
    _directory: TempDir,
}

impl Stack {
    /// Makes the table, has `prepare` do what comes before `build` sets the pipeline up, and returns when the stores are
    /// complete. The counters' and the search worker are among the processes where they are among the `sides`.
    pub(crate) fn start(
        build: Build<'_>,
        pipeline: &str,
        sides: &[Side],
        prepare: impl FnOnce(&Postgres, &Kafka) -> Result<()>,
    ) -> Result<Stack> {
        let (postgres, kafka, redis) = (Postgres::start(), Kafka::tuned(), Redis::start());
        backlog::make_table(&postgres);
        backlog::keep_old_rows(&postgres);
        prepare(&postgres, &kafka)?;
        let (directory, search) = (tempfile::tempdir()?, free_port());
        let mut stores = String::new();
        let mut roles = vec!["reader"];
        if sides.contains(&Side::Counters) {
            stores += &format!("[redis]\nurl = \"{}\"\n{COUNTERS}", redis.url());
            roles.push("counters");
        }
        if sides.contains(&Side::Search) {
            let directory = directory.path().join("search");
            stores += &format!(
                "[search]\ndirectory = \"{}\"\nlisten = \"127.0.0.1:{search}\"\n{INDEXES}",
                directory.display()
            );
            roles.push("search");
        }
        build.configure(directory.path(), pipeline, &postgres, &kafka, &stores)?;
        let millrace = |arguments: &[&str]| {
            let mut command = build.command(directory.path(), arguments);
            command.stdout(Stdio::null());
            command
        };
        ensure!(millrace(&["setup"]).status()?.success(), "millrace setup");
        let spawn = |role| (role, Process::spawn(millrace(&[role]).stderr(Stdio::null())));
        let processes = roles.into_iter().map(spawn).collect();
        ensure!(millrace(&["wait", "--timeout", "90s"]).status()?.success(), "millrace wait");
        Ok(Stack { processes, postgres, kafka, redis, search, _directory: directory })
    }
}
