//! How long after its COMMIT a change is in the stores, asked as an application would: take the LSN after the commit,
//! wait until the store has it.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
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
#[derive(Clone, Copy, Debug)]
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
        let toggle = "UPDATE users SET name = name WHERE id = 1";
        self.process.runtime.block_on(self.client.execute(toggle, &[])).context("Postgres")?;
        let (target, started) = (self.now()?, Instant::now());
        let counters = reach(&mut self.counters, target, started, TOO_LONG, &mut || Ok(()))?;
        let search = reach(&mut self.search, target, started, TOO_LONG, &mut || Ok(()))?;
        Ok(Latency { counters, search })
    }

    /// Waits until what a process is answerable for is there again; for the reader that is a counter.
    pub(super) fn reach(
        &mut self,
        role: &str,
        within: Duration,
        check: &mut dyn FnMut() -> anyhow::Result<()>,
    ) -> anyhow::Result<Duration> {
        let (target, started) = (self.now()?, Instant::now());
        let stores = if role == "search" { &mut self.search } else { &mut self.counters };
        match reach(stores, target, started, within, check)? {
            Some(time) => Ok(time),
            None => bail!("{role} has not come back within {} s; see its log", within.as_secs()),
        }
    }

    /// Waits until both stores have everything.
    pub(super) fn reach_all(
        &mut self,
        within: Duration,
        check: &mut dyn FnMut() -> anyhow::Result<()>,
    ) -> anyhow::Result<Duration> {
        let started = Instant::now();
        self.reach("counters", within, check)?;
        self.reach("search", within, check)?;
        Ok(started.elapsed())
    }

    fn now(&self) -> anyhow::Result<Lsn> {
        let query = "SELECT pg_current_wal_insert_lsn()::text";
        let row = self.process.runtime.block_on(self.client.query_one(query, &[])).context("Postgres")?;
        row.get::<_, &str>(0).parse().context("Postgres' LSN")
    }
}

fn reach(
    stores: &mut Stores,
    target: Lsn,
    started: Instant,
    within: Duration,
    check: &mut dyn FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<Option<Duration>> {
    loop {
        let reached = |store: &crate::commands::stores::Store| {
            store.ready && store.lsn.is_some_and(|lsn| lsn >= target)
        };
        if stores.read().iter().all(reached) {
            return Ok(Some(started.elapsed()));
        }
        check()?;
        if started.elapsed() >= within {
            return Ok(None);
        }
        std::thread::sleep(POLL);
    }
}
