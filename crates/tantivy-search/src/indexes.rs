//! What the sink and the HTTP side share: for each index, the view of its last commit.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use change::{Lsn, Refusal};
use tantivy::Searcher;
use tokio::sync::watch;

use crate::definition::{IndexDefinition, Role};
use crate::index::Layout;
use crate::payload::Payload;

/// One commit of an index, to be read: the documents and the checkpoint that belongs to exactly them.
pub(crate) struct View {
    pub(crate) searcher: Searcher,
    pub(crate) payload: Payload,
}

/// One index, as both sides know it.
pub(crate) struct Shelf {
    pub(crate) definition: IndexDefinition,
    pub(crate) layout: Arc<Layout>,
    /// `None` while there is nothing to read: not opened yet, or to be filled again.
    view: watch::Sender<Option<Arc<View>>>,
    waiting: AtomicUsize,
}

/// The configured indexes. Made once, given to the sink and to [`crate::serve`].
pub struct Indexes {
    shelves: Vec<Arc<Shelf>>,
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
            let layout = Arc::new(Layout::new(&definition));
            let view = watch::Sender::new(None);
            shelves.push(Arc::new(Shelf { definition, layout, view, waiting: AtomicUsize::new(0) }));
        }
        Ok(Arc::new(Indexes { shelves }))
    }

    pub(crate) fn shelves(&self) -> &[Arc<Shelf>] {
        &self.shelves
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

    /// Names of the attributes that a document has, in its order.
    pub(crate) fn attributes<'a>(&'a self, view: &'a View) -> Vec<&'a str> {
        let mut names: Vec<&str> = view.payload.key.iter().map(String::as_str).collect();
        let rest: Vec<&str> =
            self.definition.columns().into_iter().filter(|name| !names.contains(name)).collect();
        names.extend(rest);
        names
    }

    /// The first role in which a column can be filtered, with its place among the definition's roles.
    pub(crate) fn filterable(&self, column: &str) -> Option<(Role, usize)> {
        let mut roles = self.definition.roles().enumerate();
        roles
            .find(|(_, (role, name))| *role != Role::Text && *name == column)
            .map(|(place, (role, _))| (role, place))
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
