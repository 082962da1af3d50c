//! `millrace wait`: blocks until the stores have come to an LSN.

use std::thread;
use std::time::{Duration, Instant};

use change::Lsn;
use postgres::setup::SetupError;
use serde::Serialize;
use tokio_postgres::Client;

use super::stores::{Store, Stores};
use crate::cli::Format;
use crate::failure::{Failure, Outcome};
use crate::wiring::Process;

/// Between two looks at the stores, doubled from the first to the last.
const LOOK: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(100));
/// A source on which nothing happens is given something to send at this interval.
const NUDGE: Duration = Duration::from_secs(1);

#[derive(Serialize)]
struct Answer<'a> {
    lsn: Lsn,
    reached: bool,
    waited_ms: u64,
    stores: &'a [Store],
}

/// Waits; a time-out names the stores that lag and ends with 1.
pub(crate) fn execute(
    process: &Process,
    lsn: Option<Lsn>,
    wanted: &[String],
    timeout: Duration,
    format: Format,
) -> Outcome {
    let started = Instant::now();
    let mut stores = Stores::new(process, wanted)?;
    // With an LSN given, the source is only needed to wake it up.
    let source = process.source().map_err(Failure::from).and_then(|config| process.connect(&config));
    let (lsn, source) = match (lsn, source) {
        (Some(lsn), source) => (lsn, source.ok()),
        (None, Ok(client)) => (within(process, timeout, insert_lsn(&client))??, Some(client)),
        (None, Err(failure)) => return Err(failure),
    };
    let mut nudged: Option<Instant> = None;
    let mut pause = LOOK.0;
    loop {
        let found = stores.read();
        let reached = found.iter().all(|store| has(store, lsn));
        let left = timeout.saturating_sub(started.elapsed());
        if reached || left.is_zero() {
            return tell(lsn, &found, reached, started.elapsed(), format);
        }
        if let Some(client) = &source
            && nudged.is_none_or(|last| last.elapsed() >= NUDGE)
        {
            nudged = Some(Instant::now());
            match within(process, left, client.batch_execute(postgres::NUDGE)) {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "the source could not be woken up"),
                Err(_) => tracing::debug!("the source did not answer in time"),
            }
        }
        thread::sleep(pause.min(left));
        pause = (pause * 2).min(LOOK.1);
    }
}

/// Asks Postgres, for as long as there is time.
fn within<T>(process: &Process, left: Duration, query: impl Future<Output = T>) -> Result<T, Failure> {
    let answer = process.runtime.block_on(async { tokio::time::timeout(left, query).await });
    answer.map_err(|_| Failure::Failed(anyhow::anyhow!("Postgres does not answer within {left:.1?}")))
}

fn has(store: &Store, lsn: Lsn) -> bool {
    store.ready && store.lsn.is_some_and(|at| at >= lsn)
}

/// Whatever committed before this call is below it.
async fn insert_lsn(client: &Client) -> Result<Lsn, Failure> {
    let doing = "cannot ask for the current LSN";
    let row = client.query_one("SELECT pg_catalog.pg_current_wal_insert_lsn()::text", &[]).await;
    let text: String = row.map_err(|error| SetupError::Failed { doing: doing.into(), error })?.get(0);
    text.parse().map_err(|error| Failure::Failed(anyhow::Error::new(error).context(doing)))
}

fn tell(lsn: Lsn, stores: &[Store], reached: bool, waited: Duration, format: Format) -> Outcome {
    if format.json {
        let waited_ms = u64::try_from(waited.as_millis()).unwrap_or(u64::MAX);
        super::print_line(&Answer { lsn, reached, waited_ms, stores });
    }
    if reached {
        return Ok(());
    }
    for store in stores.iter().filter(|store| !has(store, lsn)) {
        let state = match (&store.problem, store.lsn, store.ready) {
            (Some(problem), _, _) => problem.clone(),
            (None, Some(at), true) => format!("stands at {at}, {} bytes behind", lsn.bytes_since(at)),
            (None, _, _) => "is being filled from the log's beginning".into(),
        };
        eprintln!("error: {} has not come to {lsn} within {waited:.1?}: {state}", store.store);
    }
    eprintln!("  remedy: see `millrace status`; or wait longer with --timeout");
    Err(Failure::Different)
}
