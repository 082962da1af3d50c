//! The sink: stages documents, commits them with their checkpoint, and shows the commit to readers.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use change::{Op, Refusal, TableSchema};
use tantivy::directory::{Directory, DirectoryLock, Lock, MmapDirectory};
use worker::{Change, Checkpoint, Move, Sink, SinkError, StoreSpec, Stored};

use crate::Indexes;
use crate::definition::Binding;
use crate::document::{Draft, id_of};
use crate::index::{self, Found, OpenIndex};
use crate::indexes::{Shelf, View};
use crate::overlay::{Earlier, Overlay};
use crate::payload::Payload;

/// Staged changes that make a commit due whatever the time.
const DUE_CHANGES: usize = 50_000;
/// A commit is followed by a pause of this many times its own duration: some 5 % of the time go into commits.
const PAUSE_PER_COMMIT: u32 = 20;
/// Shortest pause between two commits, and the pause while a reader waits for an LSN.
const SHORTEST_PAUSE: Duration = Duration::from_millis(50);
/// With nothing staged a checkpoint stays in memory until it is this many records ahead of the disk...
const MEMORY_RECORDS: i64 = 100_000;
/// ...or this old: what a restart reads again at most.
const MEMORY_TIME: Duration = Duration::from_secs(30);
/// Least memory for a writer's thread, bytes; Tantivy's own bound.
const LEAST_HEAP_BYTES: usize = 15_000_000;
const LOCK_FILE: &str = ".millrace-search.lock";

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

/// Keeps the search indexes. See [`worker::Sink`] for the contract.
///
/// The directory is locked from `load` to `discard`, so that an instance which stands by can take over.
pub struct SearchSink {
    options: Options,
    specs: Vec<StoreSpec>,
    stores: Vec<Store>,
    lock: Option<DirectoryLock>,
    /// Whether the next `load` compares every checksum: at start, and after an error.
    thorough: bool,
    now_us: i64,
    /// When the last commit was, and what pause follows from its duration.
    committed_us: i64,
    pause: Duration,
}

impl SearchSink {
    /// A sink for the indexes; `serve` them from the same [`Indexes`].
    pub fn new(indexes: &Arc<Indexes>, options: Options) -> Result<SearchSink, Refusal> {
        if options.threads == 0 || options.heap_bytes / options.threads < LEAST_HEAP_BYTES {
            return Err(Refusal::new(
                format!("{} bytes are too few for {} writer threads", options.heap_bytes, options.threads),
                format!("set [search] heap_mb to at least {} for each thread", LEAST_HEAP_BYTES / 1_000_000),
            ));
        }
        let stores: Vec<Store> =
            indexes.shelves().iter().map(|shelf| Store::new(shelf.clone(), &options)).collect();
        let spec = |store: &Store| StoreSpec {
            name: format!("search.{}", store.shelf.definition.name),
            definition: store.shelf.definition.hash(),
        };
        Ok(SearchSink {
            specs: stores.iter().map(spec).collect(),
            stores,
            options,
            lock: None,
            thorough: true,
            now_us: 0,
            committed_us: 0,
            pause: Duration::ZERO,
        })
    }

    fn lock(&self) -> Result<DirectoryLock, SinkError> {
        let directory = &self.options.directory;
        let away = |error: &dyn std::error::Error| {
            SinkError::Unavailable(format!(
                "the search directory {} cannot be used: {error}",
                directory.display()
            ))
        };
        fs::create_dir_all(directory).map_err(|error| away(&error))?;
        let files = MmapDirectory::open(directory).map_err(|error| away(&error))?;
        let lock = Lock { filepath: LOCK_FILE.into(), is_blocking: false };
        match files.acquire_lock(&lock) {
            Ok(lock) => Ok(lock),
            Err(tantivy::directory::error::LockError::LockBusy) => Err(SinkError::Refused(Refusal::new(
                format!("another process keeps the search indexes in {}", directory.display()),
                "stop it, or give this one a [search] directory and a consumer group of its own",
            ))),
            Err(error) => Err(away(&error)),
        }
    }

    fn staged(&self) -> usize {
        self.stores.iter().map(|store| store.staged).sum()
    }
}

impl Sink for SearchSink {
    fn stores(&self) -> &[StoreSpec] {
        &self.specs
    }

    fn wants(&self, schema: &TableSchema) -> bool {
        self.stores.iter().any(|store| store.shelf.definition.derives_from(schema))
    }

    fn load(&mut self) -> Result<Vec<Stored>, SinkError> {
        self.discard();
        self.lock = Some(self.lock()?);
        let thorough = self.thorough;
        let loaded: Result<_, _> =
            self.stores.iter_mut().map(|store| store.load(&self.options, thorough)).collect();
        self.thorough = loaded.is_err();
        loaded
    }

    fn reset(&mut self, store: usize, to: &Checkpoint) -> Result<(), SinkError> {
        self.stores[store].reset(&self.options, to)
    }

    fn apply(&mut self, live: &[bool], change: &Change<'_>) -> Result<(), SinkError> {
        for (store, live) in self.stores.iter_mut().zip(live) {
            if *live && store.shelf.definition.derives_from(change.schema) {
                store.apply(change)?;
            }
        }
        Ok(())
    }

    fn due(&mut self, now_us: i64) -> bool {
        self.now_us = now_us;
        let staged = self.staged();
        let awaited = || self.stores.iter().any(|store| store.staged > 0 && store.shelf.awaited());
        let pause = if awaited() { self.pause.min(SHORTEST_PAUSE) } else { self.pause };
        // With nothing staged a commit only moves a checkpoint in memory.
        staged == 0 || staged >= DUE_CHANGES || elapsed(self.committed_us, now_us) >= pause
    }

    fn full(&self) -> bool {
        self.staged() >= DUE_CHANGES || self.stores.iter().any(|store| store.overlay.full())
    }

    fn commit(&mut self, moves: &[Option<Move>]) -> Result<(), SinkError> {
        let begun = Instant::now();
        let mut written = false;
        for (store, step) in self.stores.iter_mut().zip(moves) {
            if let Some(step) = step {
                written |= store.commit(step, self.now_us).inspect_err(|_| self.thorough = true)?;
            }
        }
        if written {
            let pause = (begun.elapsed() * PAUSE_PER_COMMIT).max(SHORTEST_PAUSE);
            self.pause = pause.min(self.options.commit_interval);
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
        self.stores.iter().filter_map(|store| store.open.as_ref()).try_for_each(|open| open.check())
    }
}

/// One index as the sink keeps it.
struct Store {
    shelf: Arc<Shelf>,
    /// `None` until it is loaded, and where there is nothing usable.
    open: Option<Box<OpenIndex>>,
    overlay: Overlay,
    staged: usize,
    /// What the index is, at times ahead of the disk by records that changed nothing in it.
    current: Payload,
    /// When the disk's checkpoint was written.
    written_us: i64,
    /// The version of the table that changes came in last, and what it means here.
    bound: Option<(Arc<TableSchema>, Arc<Binding>)>,
}

impl Store {
    fn new(shelf: Arc<Shelf>, options: &Options) -> Store {
        let nothing = Checkpoint {
            log: String::new(),
            generation: 0,
            next_offset: 0,
            lsn: change::Lsn::ZERO,
            definition: String::new(),
            ready: false,
        };
        Store {
            shelf,
            open: None,
            overlay: Overlay::new(&options.directory),
            staged: 0,
            current: Payload::empty(&nothing),
            written_us: 0,
            bound: None,
        }
    }

    fn load(&mut self, options: &Options, thorough: bool) -> Result<Stored, SinkError> {
        let Shelf { definition, layout, .. } = &*self.shelf;
        let found = index::open(definition, layout, options, thorough);
        Ok(match found? {
            Found::Open(open) => {
                self.opened(open);
                Stored::At(self.current.checkpoint.clone())
            }
            Found::Empty => self.unusable(Stored::Empty),
            Found::Damaged(reason) => self.unusable(Stored::Damaged(reason)),
            Found::Foreign(checkpoint) => self.unusable(Stored::At(checkpoint)),
        })
    }

    fn reset(&mut self, options: &Options, to: &Checkpoint) -> Result<(), SinkError> {
        self.close();
        self.shelf.publish(None);
        let open = index::create(&self.shelf.definition, &self.shelf.layout, options, to)?;
        self.opened(open);
        Ok(())
    }

    fn opened(&mut self, open: Box<OpenIndex>) {
        self.current = open.payload().clone();
        self.open = Some(open);
        self.publish();
    }

    fn unusable(&mut self, stored: Stored) -> Stored {
        self.shelf.publish(None);
        stored
    }

    /// Readers keep the last commit.
    fn close(&mut self) {
        self.open = None;
        self.overlay.clear();
        self.staged = 0;
        self.bound = None;
    }

    fn publish(&self) {
        let view =
            |open: &Box<OpenIndex>| View { searcher: open.searcher().clone(), payload: self.current.clone() };
        self.shelf.publish(self.open.as_ref().map(view));
    }

    fn apply(&mut self, change: &Change<'_>) -> Result<(), SinkError> {
        let binding = self.bind(change.schema)?;
        match change.event.op {
            Op::Create | Op::Read | Op::Update => self.upsert(change, &binding)?,
            Op::Delete => {
                let id = id_of(change.key, binding.key()).map_err(|reason| self.poison("a row", &reason))?;
                self.open()?.delete(&id)?;
                self.overlay.delete(&id).map_err(|error| self.spill_failed(&error))?;
            }
            Op::Truncate => {
                self.open()?.truncate()?;
                self.overlay.truncate();
            }
            Op::Message => return Ok(()),
        }
        self.staged += 1;
        Ok(())
    }

    fn upsert(&mut self, change: &Change<'_>, binding: &Binding) -> Result<(), SinkError> {
        let earlier;
        let mut draft = Draft::read(change, binding).map_err(|reason| self.poison("a row", &reason))?;
        let row = format!("row `{}`", draft.id);
        if !draft.holes.is_empty() {
            earlier = self.earlier(&draft.id, change, binding)?.ok_or_else(|| self.nowhere(&row))?;
            draft.fill(binding, &earlier).map_err(|reason| self.poison(&row, &reason))?;
        }
        let json = draft.json(binding);
        let document =
            draft.terms(binding, &self.shelf.layout, &json).map_err(|reason| self.poison(&row, &reason))?;
        self.open()?.upsert(&draft.id, document)?;
        let remembered = self.overlay.upsert(&draft.id, json);
        remembered.map_err(|error| self.spill_failed(&error))
    }

    /// The document that a change's unchanged TOAST values are taken from: that of the row under its old key.
    fn earlier(&self, id: &str, change: &Change<'_>, binding: &Binding) -> Result<Option<String>, SinkError> {
        let old;
        let (id, found) = if change.previous_key.is_empty() {
            (id, self.overlay.row(id))
        } else {
            old =
                id_of(change.previous_key, binding.key()).map_err(|reason| self.poison("a row", &reason))?;
            (old.as_str(), self.overlay.former_row(&old))
        };
        match found.map_err(|error| self.spill_failed(&error))? {
            Earlier::Staged(json) => Ok(Some(json)),
            Earlier::Committed => self.open()?.document(id),
            Earlier::Gone => Ok(None),
        }
    }

    /// What a version of the table means for this index; refuses one under which it would be wrong.
    fn bind(&mut self, schema: &Arc<TableSchema>) -> Result<Arc<Binding>, SinkError> {
        if let Some((known, binding)) = &self.bound {
            if Arc::ptr_eq(known, schema) {
                return Ok(binding.clone());
            }
        }
        let binding = Arc::new(Binding::new(&self.shelf.definition, schema)?);
        let name = &self.shelf.definition.name;
        let key: Vec<String> = binding.key().iter().map(|column| column.name.clone()).collect();
        if !self.current.key.is_empty() && self.current.key != key {
            return Err(SinkError::Refused(Refusal::new(
                format!(
                    "the key of {} changed from ({}) to ({}), so the documents of `{name}` would have other ids",
                    schema.full_name(),
                    self.current.key.join(", "),
                    key.join(", ")
                ),
                "change the key back, or begin a new log: `millrace teardown`, then `millrace setup`",
            )));
        }
        let mut seen: BTreeSet<String> = self.current.seen.iter().cloned().collect();
        for attribute in &binding.attributes {
            if attribute.present {
                seen.insert(attribute.name.clone());
            } else if seen.contains(&attribute.name) {
                return Err(SinkError::Refused(Refusal::new(
                    format!("column `{}` of {} was dropped or renamed", attribute.name, schema.full_name()),
                    format!("take it out of [search.indexes.{name}], which fills the index again"),
                )));
            }
        }
        self.current.key = key;
        self.current.seen = seen.into_iter().collect();
        self.bound = Some((schema.clone(), binding.clone()));
        Ok(binding)
    }

    /// Returns whether anything was written to disk.
    fn commit(&mut self, step: &Move, now_us: i64) -> Result<bool, SinkError> {
        if self.current.checkpoint != step.from {
            let Checkpoint { next_offset, lsn, .. } = &self.current.checkpoint;
            return Err(SinkError::Moved(format!(
                "the search index `{}` stands at offset {next_offset} ({lsn}), not where this worker left it",
                self.shelf.definition.name
            )));
        }
        let next = Payload { checkpoint: step.to.clone(), ..self.current.clone() };
        let write = self.staged > 0 || self.disk_is_far_behind(&next, now_us)?;
        if write {
            self.open_mut()?.commit(next.clone())?;
            self.overlay.clear();
            self.staged = 0;
            self.written_us = now_us;
        }
        self.current = next;
        self.publish();
        Ok(write)
    }

    /// Whether a checkpoint that only moved past records of others is worth a write. The LSN alone never is: the
    /// ledger tells it again.
    fn disk_is_far_behind(&self, next: &Payload, now_us: i64) -> Result<bool, SinkError> {
        let disk = self.open()?.payload();
        let records = next.checkpoint.next_offset - disk.checkpoint.next_offset;
        let aged = records > 0 && elapsed(self.written_us, now_us) >= MEMORY_TIME;
        Ok(next.checkpoint.ready != disk.checkpoint.ready || records >= MEMORY_RECORDS || aged)
    }

    fn open(&self) -> Result<&OpenIndex, SinkError> {
        self.open.as_deref().ok_or_else(|| self.closed())
    }

    fn open_mut(&mut self) -> Result<&mut OpenIndex, SinkError> {
        let closed = self.closed();
        self.open.as_deref_mut().ok_or(closed)
    }

    fn closed(&self) -> SinkError {
        SinkError::Unavailable(format!("the search index `{}` is not open", self.shelf.definition.name))
    }

    fn spill_failed(&self, error: &std::io::Error) -> SinkError {
        let name = &self.shelf.definition.name;
        SinkError::Unavailable(format!(
            "what is staged for the search index `{name}` cannot be spilled: {error}"
        ))
    }

    fn poison(&self, row: &str, reason: &str) -> SinkError {
        let definition = &self.shelf.definition;
        let (name, schema, table) = (&definition.name, &definition.schema, &definition.table);
        SinkError::Poison(format!(
            "{row} of {schema}.{table} does not fit the search index `{name}`: {reason}"
        ))
    }

    fn nowhere(&self, row: &str) -> SinkError {
        let (schema, table) = (&self.shelf.definition.schema, &self.shelf.definition.table);
        self.poison(
            row,
            &format!(
                "an unchanged TOAST value stands neither in the log nor in an earlier document; \
                 remedy: ALTER TABLE {schema}.{table} REPLICA IDENTITY FULL, and begin a new log"
            ),
        )
    }
}

fn elapsed(since_us: i64, now_us: i64) -> Duration {
    // A clock set back must not stop commits.
    now_us
        .checked_sub(since_us)
        .and_then(|us| u64::try_from(us).ok())
        .map_or(Duration::MAX, Duration::from_micros)
}
