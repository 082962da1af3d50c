//! All of Millrace's processes and their servers, running.

use std::process::{Command, Stdio};

use anyhow::{Result, ensure};
use tempfile::TempDir;
use testkit::services::{Kafka, Postgres, Process, Redis, free_port};

use crate::backlog::{self, DATABASE};
use crate::sides::{COUNTERS, INDEXES, own_program};

pub(crate) struct Stack {
    /// By role. They end before their servers do, as fields are dropped in this order.
    pub(crate) processes: [(&'static str, Process); 3],
    pub(crate) postgres: Postgres,
    pub(crate) kafka: Kafka,
    pub(crate) redis: Redis,
    /// The port of the search API.
    pub(crate) search: u16,
    _directory: TempDir,
}

impl Stack {
    /// Makes the table, has `prepare` do what comes before the pipeline is set up, and returns when the stores are
    /// complete.
    pub(crate) fn start(
        pipeline: &str,
        prepare: impl FnOnce(&Postgres, &Kafka) -> Result<()>,
    ) -> Result<Stack> {
        let (postgres, kafka, redis) = (Postgres::start(), Kafka::tuned(), Redis::start());
        backlog::make_table(&postgres);
        backlog::keep_old_rows(&postgres);
        prepare(&postgres, &kafka)?;
        let (directory, search) = (tempfile::tempdir()?, free_port());
        let config = directory.path().join("millrace.toml");
        let text = format!(
            "pipeline = \"{pipeline}\"\n[postgres]\nurl = \"{}\"\ntables = [\"public.emails\"]\n\
             [kafka]\nbootstrap = \"{}\"\n[redis]\nurl = \"{}\"\n{COUNTERS}\
             [search]\ndirectory = \"{}\"\nlisten = \"127.0.0.1:{search}\"\n{INDEXES}",
            postgres.url(DATABASE),
            kafka.bootstrap(),
            redis.url(),
            directory.path().join("search").display()
        );
        std::fs::write(&config, text)?;
        let millrace = |arguments: &[&str]| {
            let mut command = Command::new(own_program());
            command.arg("--config").arg(&config).args(arguments).stdin(Stdio::null()).stdout(Stdio::null());
            command
        };
        ensure!(millrace(&["setup"]).status()?.success(), "millrace setup");
        let processes = ["reader", "counters", "search"]
            .map(|role| (role, Process::spawn(millrace(&[role]).stderr(Stdio::null()))));
        ensure!(millrace(&["wait", "--timeout", "90s"]).status()?.success(), "millrace wait");
        Ok(Stack { processes, postgres, kafka, redis, search, _directory: directory })
    }
}
