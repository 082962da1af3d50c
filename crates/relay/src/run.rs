use change::Refusal;

use crate::{PublishError, SourceError};

/// Why the relay ended.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// The source failed.
    #[error("source: {0}")]
    Source(#[from] SourceError),
    /// The publisher failed.
    #[error("log: {0}")]
    Publish(#[from] PublishError),
    /// Going on could lose changes.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// Bounds.
pub struct Limits;
/// How it ended.
pub enum Outcome {}
/// The loop.
pub fn run() {}
