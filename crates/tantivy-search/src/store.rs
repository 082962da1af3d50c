//! One index as the sink keeps it: staged and committed documents, and what the table looks like.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use change::{NEW_LOG, Op, Refusal, ReplicaIdentity, TableSchema};
use worker::{Change, Checkpoint, Move, SinkError, Stored};

use crate::Options;
use crate::definition::Binding;
use crate::document::{Draft, id_of};
use crate::index::{self, Found, OpenIndex};
use crate::indexes::{Shelf, View};
use crate::overlay::{Earlier, Overlay};
use crate::payload::{self, Payload, PayloadError};
use crate::place;

/// With nothing staged a checkpoint stays in memory until it is this many records ahead of the disk...
const MEMORY_RECORDS: i64 = 100_000;
/// ...or this old: what a restart reads again at most.
const MEMORY_TIME: Duration = Duration::from_secs(30);

/// See the module.
pub(crate) struct Store {
    pub(crate) shelf: Arc<Shelf>,
    role: Role,
    path: PathBuf,
    /// `None` until it is loaded, and where there is nothing usable.
    open: Option<Box<OpenIndex>>,
    pub(crate) overlay: Overlay,
    /// Whether staged documents are remembered. Not where every record tells whole rows (REPLICA IDENTITY FULL): nobody
    /// asks for an earlier one then.
    remembers: bool,
    pub(crate) staged: usize,
    /// What the index is, at times ahead of the disk by records that changed nothing in it.
    current: Payload,
    /// What the copy was when it was last looked at.
    copy: Option<Payload>,
    /// When the disk's checkpoint was written.
    written_us: i64,
    /// The version of the table that changes came in last, and what it means here.
    bound: Option<(Arc<TableSchema>, Arc<Binding>)>,
}

/// What a store keeps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Role {
    /// The index that readers see.
    Index,
    /// The copy that is to take its place.
    Copy,
}

/// What is known of an index that is not there.
fn nothing() -> Payload {
    let checkpoint = Checkpoint {
        log: String::new(),
        generation: 0,
        next_offset: 0,
        lsn: change::Lsn::ZERO,
        definition: String::new(),
        ready: false,
        skipped: Vec::new(),
        last: None,
        stopped: None,
    };
    Payload::empty(&checkpoint, None)
}

impl Store {
    pub(crate) fn new(shelf: Arc<Shelf>, role: Role, options: &Options) -> Store {
        let index = options.directory.join(&shelf.definition.name);
        let path = if role == Role::Copy { place::copy_of(&index) } else { index };
        Store {
            shelf,
            role,
            path,
            open: None,
            overlay: Overlay::new(&options.directory),
            remembers: false,
            staged: 0,
            current: nothing(),
            copy: None,
            written_us: 0,
            bound: None,
        }
    }

    pub(crate) fn load(&mut self, options: &Options, thorough: bool) -> Result<Stored, SinkError> {
        if self.role == Role::Index {
            place::settle(&self.path)?;
        }
        Ok(match index::open(&self.path, &self.shelf.layout, options, thorough)? {
            Found::Open(open) => {
                self.opened(open);
                Stored::At(self.current.checkpoint.clone())
            }
            Found::Empty => self.unusable(Stored::Empty),
            Found::Damaged(reason) => self.unusable(Stored::Damaged(reason)),
            Found::Foreign(found) => {
                let (payload, view) = *found;
                self.show(view);
                let at = payload.checkpoint.clone();
                self.current = payload;
                Stored::At(at)
            }
        })
    }

    pub(crate) fn reset(&mut self, options: &Options, to: &Checkpoint) -> Result<(), SinkError> {
        self.close();
        self.show(None);
        let open = index::create(&self.path, &self.shelf.layout, options, to)?;
        self.opened(open);
        Ok(())
    }

    /// See [`worker::Sink::copies`].
    pub(crate) fn copy(&mut self, directory: &std::path::Path) -> Result<Option<Stored>, SinkError> {
        let name = &self.shelf.definition.name;
        let path = place::copy_of(&directory.join(name));
        self.copy = None;
        if !path.is_dir() {
            return Ok(None);
        }
        match index::read_payload(&path)? {
            Ok(payload) => {
                self.copy = Some(payload.clone());
                Ok(Some(Stored::At(payload.checkpoint)))
            }
            Err(PayloadError::Newer(format)) => Err(payload::newer(name, format).into()),
            Err(PayloadError::Unreadable(_)) => Ok(Some(Stored::Empty)),
        }
    }

    /// See [`worker::Sink::rebuild`].
    pub(crate) fn rebuild(&mut self, keep: bool) -> Result<(), SinkError> {
        place::request(&self.path)?;
        if !keep {
            self.close();
            self.unusable(());
            // The copy would have to come past what it holds, which may be of another history.
            index::remove_directory(&self.path)?;
        }
        Ok(())
    }

    /// See [`worker::Sink::swap`]. What is shown can be ahead of the disk, and what was put back there ahead of what is
    /// shown; readers go behind neither.
    pub(crate) fn swap(&mut self) -> Result<bool, SinkError> {
        self.close();
        let Ok(found) = index::read_payload(&place::copy_of(&self.path))? else { return Ok(false) };
        if self.copy.as_ref() != Some(&found) {
            return Err(SinkError::Moved(format!("the copy of {} goes on being built", self.path.display())));
        }
        let on_disk = index::read_payload(&self.path)?.ok();
        let mut shown = on_disk.iter().chain([&self.current]);
        if !shown.all(|shown| found.checkpoint.reaches(&shown.checkpoint)) {
            return Ok(false);
        }
        place::swap(&self.path)?;
        self.shelf.publish_copy(None);
        Ok(true)
    }

    /// See [`worker::Sink::release`].
    pub(crate) fn release(&mut self) -> Result<(), SinkError> {
        let current = self.current.clone();
        if let Some(open) = &mut self.open
            && *open.payload() != current
        {
            open.commit(current)?;
        }
        self.close();
        Ok(())
    }

    fn opened(&mut self, open: Box<OpenIndex>) {
        let index = Some(self.shelf.definition.clone());
        self.current = Payload { index, ..open.payload().clone() };
        self.open = Some(open);
        self.publish();
    }

    fn unusable<T>(&mut self, stored: T) -> T {
        self.current = nothing();
        self.show(None);
        stored
    }

    /// Readers keep the last commit.
    pub(crate) fn close(&mut self) {
        self.open = None;
        self.overlay.clear();
        self.staged = 0;
        self.bound = None;
    }

    fn publish(&self) {
        let view = |open: &OpenIndex| View {
            searcher: open.searcher().clone(),
            payload: self.current.clone(),
            layout: self.shelf.layout.clone(),
        };
        self.show(self.open.as_deref().map(view));
    }

    fn show(&self, mut view: Option<View>) {
        match self.role {
            Role::Index => self.shelf.publish(view),
            Role::Copy => {
                // Nobody is to rely on it before it has taken the index's place.
                view.iter_mut().for_each(|view| view.payload.checkpoint.ready = false);
                self.shelf.publish_copy(view);
            }
        }
    }

    pub(crate) fn apply(&mut self, change: &Change<'_>) -> Result<(), SinkError> {
        if change.event.op == Op::Truncate {
            self.open()?.truncate()?;
            self.overlay.truncate();
            // An empty index takes what comes under any key.
            (self.current.key, self.bound) = (Vec::new(), None);
            self.staged += 1;
            return Ok(());
        }
        let binding = self.bind(change.schema)?;
        match change.event.op {
            Op::Create | Op::Read | Op::Update => {
                if !change.omitted.is_empty() {
                    let store = format!("search.{}", self.shelf.definition.name);
                    change.demand(&store, binding.attributes.iter().map(AsRef::as_ref))?;
                }
                self.upsert(change, &binding)?;
            }
            Op::Delete => {
                let id = id_of(change.key, binding.key()).map_err(|reason| self.poison("a row", &reason))?;
                self.open()?.delete(&id)?;
                if self.remembers {
                    self.overlay.delete(&id).map_err(|error| self.spill_failed(&error))?;
                }
            }
            Op::Message | Op::Truncate => return Ok(()),
        }
        self.staged += 1;
        Ok(())
    }

    /// Of a row that the log does not have whole the document holds the rest. So no later change takes a value from a
    /// document that is older than this one.
    pub(crate) fn skip(&mut self, change: &Change<'_>) -> Result<(), SinkError> {
        if change.omitted.is_empty() || change.event.after.is_none() {
            return Ok(());
        }
        let binding = self.bind(change.schema)?;
        self.upsert(change, &binding)?;
        self.staged += 1;
        Ok(())
    }

    fn upsert(&mut self, change: &Change<'_>, binding: &Binding) -> Result<(), SinkError> {
        let earlier;
        let mut draft = Draft::read(change, binding).map_err(|reason| self.poison("a row", &reason))?;
        if !draft.holes.is_empty() {
            self.remember()?;
            earlier = self.earlier(&draft.id, change, binding)?.ok_or_else(|| self.nowhere(&draft.row()))?;
            draft.fill(binding, &earlier).map_err(|reason| self.poison(&draft.row(), &reason))?;
        }
        let json = draft.json(binding);
        let document = draft.terms(binding, &self.shelf.layout, &json);
        let document = document.map_err(|reason| self.poison(&draft.row(), &reason))?;
        self.open()?.upsert(&draft.id, document)?;
        if !self.remembers {
            return Ok(());
        }
        let remembered = self.overlay.upsert(&draft.id, json);
        remembered.map_err(|error| self.spill_failed(&error))
    }

    /// From here on staged documents are remembered. Those that were not are staged again.
    fn remember(&mut self) -> Result<(), SinkError> {
        if std::mem::replace(&mut self.remembers, true) || self.staged == 0 {
            return Ok(());
        }
        let name = &self.shelf.definition.name;
        Err(SinkError::Moved(format!("the search index `{name}` is to remember what is staged from now on")))
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
        if let Some((known, binding)) = &self.bound
            && Arc::ptr_eq(known, schema)
        {
            return Ok(binding.clone());
        }
        if schema.identity != ReplicaIdentity::Full {
            self.remember()?;
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
                format!("change the key back, or {NEW_LOG}"),
            )));
        }
        let mut seen: BTreeSet<String> = self.current.seen.iter().cloned().collect();
        for attribute in &binding.attributes {
            if attribute.present() {
                seen.insert(attribute.name.clone());
            } else if !attribute.known && seen.contains(&attribute.name) {
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

    /// See [`worker::Sink::check`].
    pub(crate) fn check(&self) -> Result<(), SinkError> {
        self.open.as_ref().map_or(Ok(()), |open| open.check())
    }

    /// Returns whether anything was written to disk.
    pub(crate) fn commit(&mut self, step: &Move, now_us: i64) -> Result<bool, SinkError> {
        if self.current.checkpoint != step.from {
            let Checkpoint { next_offset, lsn, .. } = &self.current.checkpoint;
            return Err(SinkError::Moved(format!(
                "the search index `{}` stands at offset {next_offset} ({lsn}), not where this worker left it",
                self.shelf.definition.name
            )));
        }
        let same = self.staged == 0 && step.to.next_offset == step.from.next_offset;
        let kept = !step.to.ready && same && self.current.is_whole();
        let next = Payload { checkpoint: step.to.clone(), kept, ..self.current.clone() };
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
        let (at, on_disk) = (&next.checkpoint, &disk.checkpoint);
        let other = (at.ready, &at.log, &at.stopped) != (on_disk.ready, &on_disk.log, &on_disk.stopped);
        Ok(other || records >= MEMORY_RECORDS || aged)
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
        let (name, table) = (&definition.name, definition.table_name());
        SinkError::Poison(format!("{row} of {table} does not fit the search index `{name}`: {reason}"))
    }

    fn nowhere(&self, row: &str) -> SinkError {
        let definition = &self.shelf.definition;
        let table = change::quoted_table_name(&definition.schema, &definition.table);
        self.poison(
            row,
            &format!(
                "an unchanged TOAST value stands neither in the log nor in an earlier document; \
                 remedy: ALTER TABLE {table} REPLICA IDENTITY FULL, and {NEW_LOG}"
            ),
        )
    }
}

/// Time since then, in microseconds of the worker's clock.
pub(crate) fn elapsed(since_us: i64, now_us: i64) -> Duration {
    // A clock set back must not stop commits.
    now_us
        .checked_sub(since_us)
        .and_then(|us| u64::try_from(us).ok())
        .map_or(Duration::MAX, Duration::from_micros)
}
