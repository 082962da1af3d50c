//! The HTTP side, in the shape of Meilisearch's API, so that its clients work.
//!
//! | route | answer |
//! | --- | --- |
//! | `GET`, `POST /indexes/{index}/search` | hits |
//! | `GET /indexes/{index}/documents/{id}` | a document |
//! | `GET /indexes/{index}/documents`, `POST …/documents/fetch` | documents in the order of their ids, or those of given ids, with the checkpoint they belong to |
//! | `GET /indexes`, `GET /indexes/{index}` | what there is, and where it stands |
//! | `GET /health` | whether every index is filled |
//!
//! What is ours: `min_lsn` waits, at most `timeout` milliseconds, until the index shows that LSN; `lsn` in an
//! answer is what it shows. Searches run on blocking threads, a bounded number at a time.

mod answer;
mod documents;
mod error;
mod params;
mod search;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::{get, post};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};

use crate::Indexes;
use crate::http::error::ApiError;
use crate::http::params::Wait;
use crate::indexes::{NotReached, Shelf, View};

/// Longest request body, bytes.
const MAX_BODY_BYTES: usize = 1 << 20;
/// Requests that may stand in line for a thread; more are turned away.
const MAX_QUEUED: usize = 1_000;
/// Searches at a time for each processor.
const SEARCHES_PER_CPU: usize = 2;
/// After the shutdown began, requests have this long to end.
const DRAIN: Duration = Duration::from_secs(5);

/// Serves the API until `shutdown` completes; then takes no new request and ends those under way. Requests that
/// wait for an LSN end at once.
pub async fn serve(
    listener: TcpListener,
    indexes: Arc<Indexes>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let (stopping, stopped) = watch::channel(false);
    let router = router(Arc::new(State::new(indexes, stopped.clone())));
    let server = axum::serve(listener, router).with_graceful_shutdown(async move {
        shutdown.await;
        stopping.send_replace(true);
    });
    let drained = async move {
        stop_of(stopped).await;
        tokio::time::sleep(DRAIN).await;
    };
    tokio::select! {
        served = server.into_future() => served,
        () = drained => Ok(()),
    }
}

async fn stop_of(mut stopped: watch::Receiver<bool>) {
    // A closed channel means the same.
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

fn router(state: Arc<State>) -> Router {
    Router::new()
        .route("/health", get(answer::health))
        .route("/indexes", get(answer::indexes))
        .route("/indexes/{index}", get(answer::index))
        .route("/indexes/{index}/search", get(search::get).post(search::post))
        .route("/indexes/{index}/documents", get(documents::list))
        .route("/indexes/{index}/documents/fetch", post(documents::fetch))
        .route("/indexes/{index}/documents/{id}", get(documents::one))
        .fallback(|| async { ApiError::no_route() })
        .method_not_allowed_fallback(|| async { ApiError::wrong_method() })
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(state)
}

/// What the handlers share.
struct State {
    indexes: Arc<Indexes>,
    /// Permits for standing in line, and for being served.
    queue: Arc<Semaphore>,
    running: Arc<Semaphore>,
    stopped: watch::Receiver<bool>,
}

impl State {
    fn new(indexes: Arc<Indexes>, stopped: watch::Receiver<bool>) -> State {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let running = cpus * SEARCHES_PER_CPU;
        State {
            indexes,
            queue: Arc::new(Semaphore::new(running + MAX_QUEUED)),
            running: Arc::new(Semaphore::new(running)),
            stopped,
        }
    }

    fn shelf(&self, index: &str) -> Result<&Arc<Shelf>, ApiError> {
        self.indexes.get(index).ok_or_else(|| ApiError::index_not_found(index))
    }

    /// The commit that a request is answered from. Without an LSN to wait for: the last one.
    async fn view(&self, shelf: &Shelf, wait: &Wait, filling: Filling) -> Result<Arc<View>, ApiError> {
        let name = &shelf.definition.name;
        let Some(lsn) = wait.lsn else {
            let usable = |view: &Arc<View>| filling == Filling::Shown || view.payload.is_whole();
            let view = shelf.view().or_else(|| shelf.copy());
            return view.filter(usable).ok_or_else(|| ApiError::not_ready(name));
        };
        let reached = tokio::select! {
            reached = shelf.reached(lsn, wait.timeout) => reached,
            () = stop_of(self.stopped.clone()) => return Err(ApiError::stopping()),
        };
        reached.map_err(|why| match why {
            NotReached::NotReady => ApiError::not_ready(name),
            NotReached::At(at) => ApiError::lsn_not_reached(name, lsn, at, wait.timeout),
        })
    }

    /// Runs work that may take long on a thread of its own, when it is its turn.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let Ok(_in_line) = self.queue.clone().try_acquire_owned() else { return Err(ApiError::too_many()) };
        let turn = self.running.clone().acquire_owned().await.map_err(|error| ApiError::internal(&error))?;
        let done = tokio::task::spawn_blocking(move || {
            // Also when the client has gone: the permit bounds threads, not clients.
            let _turn = turn;
            work()
        });
        done.await.map_err(|error| ApiError::internal(&error))?
    }
}

/// Whether a request may see an index that is still being filled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Filling {
    Shown,
    Refused,
}
