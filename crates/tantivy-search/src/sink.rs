//! The sink: stages documents, commits them with their checkpoint, and shows the commit to readers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use change::{Refusal, TableSchema};
use tantivy::directory::DirectoryLock;
use worker::{Change, Checkpoint, Move, Sink, SinkError, StoreSpec, Stored};

use crate::store::{Role, Store, elapsed};
use crate::{Indexes, Options};

/// Staged changes that make a commit due whatever the time.
const DUE_CHANGES: usize = 100_000;
/// A commit is followed by a pause of this many times its own duration: at most a sixth of the time goes
/// into commits.
const PAUSE_PER_COMMIT: u32 = 5;
/// Shortest pause between two commits, and the pause while a reader waits for an LSN.
const SHORTEST_PAUSE: Duration = Duration::from_millis(50);
/// Longest pause between two commits of a copy.
const COPY_PAUSE: Duration = Duration::from_secs(3);
/// Least memory for a writer's thread, bytes; Tantivy's own bound.
const LEAST_HEAP_BYTES: usize = 15_000_000;

/// Keeps the search indexes. See [`worker::Sink`] for the contract.
///
/// The directory is locked from `load` to `discard`, so that an instance which stands by can take over.
pub struct SearchSink {
    indexes: Arc<Indexes>,
    options: Options,
    specs: Vec<StoreSpec>,
    stores: Vec<Store>,
    lock: Option<Arc<DirectoryLock>>,
    /// Whether the next `load` compares every checksum: at start, and after a failed commit...
    thorough: bool,
    /// ...unless that was done since the last good one: a full disk is no reason to read all of it in a loop.
    verified: bool,
    now_us: i64,
    /// When the last commit was, and what pause follows from its duration.
    committed_us: i64,
    pause: Duration,
    longest_pause: Duration,
}

impl SearchSink {
    /// A sink for the indexes; `serve` them from the same [`Indexes`].
    pub fn new(indexes: &Arc<Indexes>, options: Options) -> Result<SearchSink, Refusal> {
        Self::with(indexes, options, Role::Index)
    }

    /// The same for the copies of the indexes: what a builder fills.
    pub fn of_copies(indexes: &Arc<Indexes>, options: Options) -> Result<SearchSink, Refusal> {
        Self::with(indexes, options, Role::Copy)
    }

    fn with(indexes: &Arc<Indexes>, options: Options, role: Role) -> Result<SearchSink, Refusal> {
        if options.threads == 0 || options.heap_bytes / options.threads < LEAST_HEAP_BYTES {
            return Err(Refusal::new(
                format!("{} bytes are too few for {} writer threads", options.heap_bytes, options.threads),
                format!("set [search] heap_mb to at least {} for each thread", LEAST_HEAP_BYTES / 1_000_000),
            ));
        }
        let stores: Vec<Store> =
            indexes.shelves().iter().map(|shelf| Store::new(shelf.clone(), role, &options)).collect();
        // Nobody waits for what a copy shows.
        let longest_pause = if role == Role::Copy { COPY_PAUSE } else { options.commit_interval };
        let spec = |store: &Store| StoreSpec {
            name: format!("search.{}", store.shelf.definition.name),
            definition: store.shelf.definition.hash(),
        };
        Ok(SearchSink {
            indexes: indexes.clone(),
            specs: stores.iter().map(spec).collect(),
            stores,
            options,
            lock: None,
            thorough: true,
            verified: false,
            now_us: 0,
            committed_us: 0,
            pause: Duration::ZERO,
            longest_pause,
        })
    }

    fn staged(&self) -> usize {
        self.stores.iter().map(|store| store.staged).sum()
    }
}

impl Sink for SearchSink {
    fn stores(&self) -> &[StoreSpec] {
        &self.specs
    }

    fn serves(&self) -> bool {
        true
    }

    fn wants(&self, store: usize, schema: &TableSchema) -> bool {
        self.stores[store].shelf.definition.derives_from(schema)
    }

    fn load(&mut self) -> Result<Vec<Stored>, SinkError> {
        self.discard();
        self.lock = Some(self.indexes.lock(&self.options.directory)?);
        let thorough = self.thorough;
        let loaded: Result<_, _> =
            self.stores.iter_mut().map(|store| store.load(&self.options, thorough)).collect();
        if loaded.is_ok() {
            self.verified |= thorough;
            self.thorough = false;
        }
        loaded
    }

    fn reset(&mut self, store: usize, to: &Checkpoint) -> Result<(), SinkError> {
        self.stores[store].reset(&self.options, to)
    }

    fn apply(&mut self, store: usize, change: &Change<'_>) -> Result<(), SinkError> {
        self.stores[store].apply(change)
    }

    fn skip(&mut self, store: usize, change: &Change<'_>) -> Result<(), SinkError> {
        self.stores[store].skip(change)
    }

    fn due_in(&mut self, now_us: i64) -> Duration {
        self.now_us = now_us;
        let staged = self.staged();
        let awaited = || self.stores.iter().any(|store| store.staged > 0 && store.shelf.awaited());
        let pause = if awaited() { self.pause.min(SHORTEST_PAUSE) } else { self.pause };
        // With nothing staged a commit only moves a checkpoint in memory.
        if staged == 0 || staged >= DUE_CHANGES {
            return Duration::ZERO;
        }
        pause.saturating_sub(elapsed(self.committed_us, now_us))
    }

    fn full(&self) -> bool {
        self.staged() >= DUE_CHANGES || self.stores.iter().any(|store| store.overlay.full())
    }

    fn commit(&mut self, moves: &[Option<Move>]) -> Result<(), SinkError> {
        let begun = Instant::now();
        let mut written = false;
        for (store, step) in self.stores.iter_mut().zip(moves) {
            if let Some(step) = step {
                written |= store.commit(step, self.now_us).inspect_err(|_| self.thorough = !self.verified)?;
            }
        }
        if written {
            self.verified = false;
            let pause = (begun.elapsed() * PAUSE_PER_COMMIT).max(SHORTEST_PAUSE);
            self.pause = pause.min(self.longest_pause);
            self.committed_us = self.now_us;
        }
        Ok(())
    }

    fn discard(&mut self) {
        for store in &mut self.stores {
            store.close();
        }
        self.lock = None;
    }

    fn check(&mut self) -> Result<(), SinkError> {
        self.stores.iter().try_for_each(Store::check)
    }

    fn copies(&mut self) -> Result<Vec<Option<Stored>>, SinkError> {
        let directory = &self.options.directory;
        self.stores.iter_mut().map(|store| store.copy(directory)).collect()
    }

    fn rebuild(&mut self, store: usize, keep: bool) -> Result<bool, SinkError> {
        self.stores[store].rebuild(keep)?;
        Ok(true)
    }

    fn swap(&mut self, store: usize) -> Result<bool, SinkError> {
        // Nobody else may be at work in the directory.
        self.lock = Some(self.indexes.lock(&self.options.directory)?);
        self.stores[store].swap()
    }

    fn release(&mut self, store: usize) -> Result<(), SinkError> {
        self.stores[store].release()
    }
}
