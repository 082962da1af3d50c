//! Millrace's processes and their servers, running.

use std::iter;
use std::process::{Command, Stdio};

use anyhow::{Result, ensure};
use tempfile::TempDir;
use testkit::services::{Kafka, Postgres, Process, Redis, free_port};

use crate::backlog::{self, DATABASE};
use crate::sides::{COUNTERS, INDEXES, own_program};

/// A process that keeps a store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Worker {
    Counters,
    Search,
}

impl Worker {
    fn role(self) -> &'static str {
        match self {
            Worker::Counters => "counters",
            Worker::Search => "search",
        }
    }
}

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
    /// Makes the table, has `prepare` do what comes before the pipeline is set up, and returns when the stores are
    /// complete: those of the `workers`.
    pub(crate) fn start(
        pipeline: &str,
        workers: &[Worker],
        prepare: impl FnOnce(&Postgres, &Kafka) -> Result<()>,
    ) -> Result<Stack> {
        let (postgres, kafka, redis) = (Postgres::start(), Kafka::tuned(), Redis::start());
        backlog::make_table(&postgres);
        backlog::keep_old_rows(&postgres);
        prepare(&postgres, &kafka)?;
        let (directory, search) = (tempfile::tempdir()?, free_port());
        let config = directory.path().join("millrace.toml");
        let mut text = format!(
            "pipeline = \"{pipeline}\"\n[postgres]\nurl = \"{}\"\ntables = [\"public.emails\"]\n\
             [kafka]\nbootstrap = \"{}\"\n",
            postgres.url(DATABASE),
            kafka.bootstrap()
        );
        for worker in workers {
            text += &match worker {
                Worker::Counters => format!("[redis]\nurl = \"{}\"\n{COUNTERS}", redis.url()),
                Worker::Search => format!(
                    "[search]\ndirectory = \"{}\"\nlisten = \"127.0.0.1:{search}\"\n{INDEXES}",
                    directory.path().join("search").display()
                ),
            };
        }
        std::fs::write(&config, text)?;
        let millrace = |arguments: &[&str]| {
            let mut command = Command::new(own_program());
            command.arg("--config").arg(&config).args(arguments).stdin(Stdio::null()).stdout(Stdio::null());
            command
        };
        ensure!(millrace(&["setup"]).status()?.success(), "millrace setup");
        let roles = iter::once("reader").chain(workers.iter().map(|worker| worker.role()));
        let spawn = |role| (role, Process::spawn(millrace(&[role]).stderr(Stdio::null())));
        let processes = roles.map(spawn).collect();
        ensure!(millrace(&["wait", "--timeout", "90s"]).status()?.success(), "millrace wait");
        Ok(Stack { processes, postgres, kafka, redis, search, _directory: directory })
    }
}
