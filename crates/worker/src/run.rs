use change::Refusal;

use crate::{FeedError, SinkError};

/// Why the worker ended.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The feed failed.
    #[error("log: {0}")]
    Feed(#[from] FeedError),
    /// The sink failed.
    #[error("store: {0}")]
    Sink(#[from] SinkError),
    /// Going on could be wrong.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// What others may know.
pub struct Status;
/// How it ended.
pub enum Outcome {}
/// The loop.
pub fn run() {}
