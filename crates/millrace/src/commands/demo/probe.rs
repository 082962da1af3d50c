//! How long after its COMMIT a change is in the stores, asked as an application would: take the LSN after the commit,
//! wait until the store has it.

use std::time::{Duration, Instant};

use anyhow::Context;
use change::Lsn;
use tokio_postgres::Client;

use crate::commands::stores::Stores;
use crate::failure::Failure;
use crate::wiring::Process;

/// Between two looks at a store.
const POLL: Duration = Duration::from_millis(2);
/// Above this a measurement is given up: something is being restarted.
const TOO_LONG: Duration = Duration::from_secs(5);

/// What was measured last; `None`: not in time.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Latency {
    pub(super) counters: Option<Duration>,
    pub(super) search: Option<Duration>,
}

/// Asks Postgres for LSNs and the stores whether they have them.
pub(super) struct Probe<'a> {
    process: &'a Process,
    client: Client,
    counters: Stores,
    search: Stores,
}

impl<'a> Probe<'a> {
    pub(super) fn new(process: &'a Process) -> Result<Self, Failure> {
        Ok(Probe {
            process,
            client: process.connect(&process.admin()?)?,
            counters: Stores::new(process, &["counters.unread".to_owned()])?,
            search: Stores::new(process, &["search.emails".to_owned()])?,
        })
    }

    /// Commits a change and takes the time until each store has it.
    pub(super) fn measure(&mut self) -> anyhow::Result<Latency> {
        let change = "UPDATE public.users SET name = name WHERE id = 1";
        self.process.runtime.block_on(self.client.execute(change, &[])).context("Postgres")?;
        let (target, started) = (self.now()?, Instant::now());
        let mut time = |role| loop {
            if self.has(role, target) {
                return Some(started.elapsed());
            }
            if started.elapsed() >= TOO_LONG {
                return None;
            }
            std::thread::sleep(POLL);
        };
        Ok(Latency { counters: time("counters"), search: time("search") })
    }

    /// Waits until both stores have all that Postgres has now; `check` may end the waiting.
    pub(super) fn reach_all(
        &mut self,
        within: Duration,
        mut check: impl FnMut() -> anyhow::Result<()>,
    ) -> anyhow::Result<Duration> {
        let (target, started) = (self.now()?, Instant::now());
        while !(self.has("counters", target) && self.has("search", target)) {
            check()?;
            anyhow::ensure!(
                started.elapsed() < within,
                "the stores have not caught up within {} s",
                within.as_secs()
            );
            std::thread::sleep(POLL);
        }
        Ok(started.elapsed())
    }

    /// Whether what a process is answerable for has come so far; of the reader that is seen by a counter.
    pub(super) fn has(&mut self, role: &str, target: Lsn) -> bool {
        let stores = if role == "search" { &mut self.search } else { &mut self.counters };
        stores.read().iter().all(|store| store.ready && store.lsn.is_some_and(|lsn| lsn >= target))
    }

    /// Everything committed so far is below this.
    pub(super) fn now(&self) -> anyhow::Result<Lsn> {
        let query = "SELECT pg_current_wal_insert_lsn()::text";
        let row = self.process.runtime.block_on(self.client.query_one(query, &[])).context("Postgres")?;
        row.get::<_, &str>(0).parse().context("Postgres' LSN")
    }
}
