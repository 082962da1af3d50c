//! Writers that keep the mailbox busy until told to stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

use super::mailbox::{Done, Mailbox};

/// Connections that write at the same time.
pub(super) const WRITERS: usize = 4;
/// Between two transactions of a writer: people shall be able to watch.
const PAUSE: Duration = Duration::from_millis(25);

/// How many transactions there were.
#[derive(Clone, Copy, Debug)]
pub(super) struct SoFar {
    pub(super) committed: u64,
    pub(super) rolled_back: u64,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    committed: AtomicU64,
    rolled_back: AtomicU64,
}

/// The writers at work.
pub(super) struct Traffic {
    shared: Arc<Shared>,
    writers: Vec<JoinHandle<anyhow::Result<()>>>,
}

impl Traffic {
    pub(super) fn start(runtime: &Runtime, mailboxes: Vec<Mailbox>) -> Self {
        let shared = Arc::new(Shared::default());
        let writer = |mailbox| runtime.spawn(write(mailbox, shared.clone()));
        let writers = mailboxes.into_iter().map(writer).collect();
        Traffic { shared, writers }
    }

    pub(super) fn so_far(&self) -> SoFar {
        SoFar {
            committed: self.shared.committed.load(Ordering::Relaxed),
            rolled_back: self.shared.rolled_back.load(Ordering::Relaxed),
        }
    }

    /// An error when a writer has ended, which it does only for one.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        anyhow::ensure!(
            !self.writers.iter().any(JoinHandle::is_finished),
            "a writer of the mailbox has failed"
        );
        Ok(())
    }

    /// Lets every writer finish its transaction, and gives the first error of one.
    pub(super) async fn stop(self) -> anyhow::Result<()> {
        self.shared.stop.store(true, Ordering::Relaxed);
        for writer in self.writers {
            writer.await.context("a writer of the mailbox")?.context("the mailbox in Postgres")?;
        }
        Ok(())
    }
}

async fn write(mut mailbox: Mailbox, shared: Arc<Shared>) -> anyhow::Result<()> {
    while !shared.stop.load(Ordering::Relaxed) {
        let count = match mailbox.something().await? {
            Done::Committed => &shared.committed,
            Done::RolledBack => &shared.rolled_back,
        };
        count.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(PAUSE).await;
    }
    Ok(())
}
