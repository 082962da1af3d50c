//! `millrace search`: keeps the indexes and serves them over HTTP.

use anyhow::Context;
use tantivy_search::{Indexes, Options, SearchSink};
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use super::service::Service;
use super::worker::{self, Sinks};
use crate::failure::Outcome;

/// Indexes and answers until told to stop.
pub(crate) fn run(service: &Service) -> Outcome {
    let Some(search) = &service.process.config.search else { return Ok(()) };
    let indexes = Indexes::new(search.indexes.clone())?;
    let mut options = Options::new(&search.directory);
    options.commit_interval = search.commit_interval;
    options.heap_bytes = search.heap;
    let mut stores = SearchSink::new(&indexes, options.clone())?;
    let mut copies = SearchSink::of_copies(&indexes, options)?;
    let runtime = &service.process.runtime;
    let listener = runtime
        .block_on(TcpListener::bind(search.listen))
        .with_context(|| format!("cannot serve searches at {}", search.listen))?;
    tracing::info!(address = %search.listen, "serving searches");
    // Its sender's end, however it comes, is what ends the server.
    let (running, stopped) = oneshot::channel::<()>();
    let server = runtime.spawn(tantivy_search::serve(listener, indexes, async {
        let _ = stopped.await;
    }));
    let sinks = Sinks { stores: &mut stores, copies: &mut copies };
    let outcome = worker::run(service, ["search", "search_rebuild"], sinks);
    drop(running);
    let served = runtime.block_on(server).context("the search server panicked")?;
    outcome.and(served.context("the search server failed").map_err(Into::into))
}
