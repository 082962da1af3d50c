use std::path::PathBuf;
use std::time::Duration;

/// How indexes are kept.
#[derive(Clone, Debug)]
pub struct Options {
    /// Holds a directory per index. Only one process may use it.
    pub directory: PathBuf,
    /// Longest time that a change stays staged while others keep coming; with little to do it is far less.
    pub commit_interval: Duration,
    /// Memory of an index's writer, bytes; at least 15,000,000 for each thread.
    pub heap_bytes: usize,
    /// Threads of an index's writer.
    pub threads: usize,
}

impl Options {
    /// The defaults: a commit at least every second, 50 MB, one thread.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        let commit_interval = Duration::from_secs(1);
        Options { directory: directory.into(), commit_interval, heap_bytes: 50_000_000, threads: 1 }
    }
}
