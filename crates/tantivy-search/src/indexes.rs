//! What the sink and the HTTP side share: for each index, the view of its last commit.

use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use change::{Lsn, Refusal};
use tantivy::Searcher;
use tantivy::directory::error::LockError;
use tantivy::directory::{Directory, DirectoryLock, Lock, MmapDirectory};
use tokio::sync::watch;
use worker::SinkError;

use crate::definition::IndexDefinition;
use crate::index::Layout;
use crate::payload::Payload;

const LOCK_FILE: &str = ".millrace-search.lock";

/// One commit of an index, to be read: the documents and the checkpoint that belongs to exactly them.
pub(crate) struct View {
    pub(crate) searcher: Searcher,
    pub(crate) payload: Payload,
    /// Of the definition it was made under, which another may have replaced in the configuration.
    pub(crate) layout: Arc<Layout>,
}

/// One index, as both sides know it.
pub(crate) struct Shelf {
    pub(crate) definition: IndexDefinition,
    pub(crate) layout: Arc<Layout>,
    /// `None` while there is nothing to read: not opened yet, or to be filled again.
    view: watch::Sender<Option<Arc<View>>>,
    /// The copy that is being built to take the index's place.
    copy: Mutex<Option<Arc<View>>>,
    waiting: AtomicUsize,
}

/// The configured indexes. Made once, given to the sink and to [`crate::serve`].
pub struct Indexes {
    shelves: Vec<Arc<Shelf>>,
    /// Held by whichever sink of this process works in the directory.
    lock: Mutex<Weak<DirectoryLock>>,
}

/// How a wait for an LSN ended before it was reached.
pub(crate) enum NotReached {
    /// The index is being filled.
    NotReady,
    /// It stands here.
    At(Lsn),
}

impl Indexes {
    /// Takes the definitions, whose names must differ.
    pub fn new(definitions: Vec<IndexDefinition>) -> Result<Arc<Indexes>, Refusal> {
        let mut shelves: Vec<Arc<Shelf>> = Vec::new();
        for definition in definitions {
            definition.validate()?;
            if shelves.iter().any(|shelf| shelf.definition.name == definition.name) {
                let what = format!("two search indexes are called `{}`", definition.name);
                return Err(Refusal::new(what, "rename one of them under [search.indexes]"));
            }
            let layout = Arc::new(Layout::new(definition.clone()));
            let view = watch::Sender::new(None);
            let (copy, waiting) = (Mutex::default(), AtomicUsize::new(0));
            shelves.push(Arc::new(Shelf { definition, layout, view, copy, waiting }));
        }
        Ok(Arc::new(Indexes { shelves, lock: Mutex::default() }))
    }

    pub(crate) fn shelves(&self) -> &[Arc<Shelf>] {
        &self.shelves
    }

    /// Keeps other processes out of the directory for as long as any sink of this one holds the answer.
    pub(crate) fn lock(&self, directory: &std::path::Path) -> Result<Arc<DirectoryLock>, SinkError> {
        let mut held = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lock) = held.upgrade() {
            return Ok(lock);
        }
        let away = |error: &dyn std::error::Error| {
            let directory = directory.display();
            SinkError::Unavailable(format!("the search directory {directory} cannot be used: {error}"))
        };
        fs::create_dir_all(directory).map_err(|error| away(&error))?;
        let files = MmapDirectory::open(directory).map_err(|error| away(&error))?;
        match files.acquire_lock(&Lock { filepath: LOCK_FILE.into(), is_blocking: false }) {
            Ok(lock) => {
                let lock = Arc::new(lock);
                *held = Arc::downgrade(&lock);
                Ok(lock)
            }
            Err(LockError::LockBusy) => Err(SinkError::Refused(Refusal::new(
                format!("another process keeps the search indexes in {}", directory.display()),
                "stop it, or give this one a [search] directory and a consumer group of its own",
            ))),
            Err(error) => Err(away(&error)),
        }
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Arc<Shelf>> {
        self.shelves.iter().find(|shelf| shelf.definition.name == name)
    }
}

impl Shelf {
    /// Shows a commit to readers from now on, or nothing.
    pub(crate) fn publish(&self, view: Option<View>) {
        self.view.send_replace(view.map(Arc::new));
    }

    /// The last commit, also of an index that is being filled.
    pub(crate) fn view(&self) -> Option<Arc<View>> {
        self.view.borrow().clone()
    }

    /// Shows how far the copy is, or that there is none.
    pub(crate) fn publish_copy(&self, view: Option<View>) {
        *self.copy.lock().unwrap_or_else(PoisonError::into_inner) = view.map(Arc::new);
    }

    /// The last commit of the copy that is being built.
    pub(crate) fn copy(&self) -> Option<Arc<View>> {
        self.copy.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether somebody waits for a commit.
    pub(crate) fn awaited(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// The last commit of a filled index, once it shows `lsn`. Cancel safe.
    pub(crate) async fn reached(&self, lsn: Lsn, timeout: Duration) -> Result<Arc<View>, NotReached> {
        let there = |view: &Option<Arc<View>>| {
            view.as_ref()
                .is_some_and(|view| view.payload.checkpoint.ready && view.payload.checkpoint.lsn >= lsn)
        };
        let mut views = self.view.subscribe();
        let _waiting = Waiting::new(&self.waiting);
        let waited = tokio::time::timeout(timeout, views.wait_for(there)).await;
        if let Ok(Ok(view)) = &waited
            && let Some(view) = &**view
        {
            return Ok(view.clone());
        }
        drop(waited);
        match self.view().map(|view| view.payload.checkpoint.clone()) {
            Some(checkpoint) if checkpoint.ready => Err(NotReached::At(checkpoint.lsn)),
            _ => Err(NotReached::NotReady),
        }
    }
}

impl View {
    /// Names of the attributes that a document has, in its order.
    pub(crate) fn attributes(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.payload.key.iter().map(String::as_str).collect();
        let columns = self.layout.definition.columns();
        let rest: Vec<&str> = columns.into_iter().filter(|name| !names.contains(name)).collect();
        names.extend(rest);
        names
    }
}

/// Counts as waiting while it lives.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Waiting(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
