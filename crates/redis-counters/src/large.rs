//! A commit of more groups than one script should write: one transaction can change all of a counter's.
//!
//! It is written in pieces, each a script that does not hold Redis for long, and becomes the counter's content in the one
//! short script of the commit. There are two ways:
//!
//! - **Beside.** What readers see stays as it is. It is copied to the staging keys, the copy is changed, and the commit renames
//!   it. The live keys cannot change under the copy: whoever changes them moves the checkpoint, which every piece and the
//!   commit compare. A crash leaves keys that the next load removes.
//! - **In place**, for the copy that is to take a counter's place, which nobody reads. A fill changes a part of it again and
//!   again, and copying all of it each time would take a time that grows with the square of its size. The checkpoint says
//!   `torn` meanwhile, what each group was is kept under the staging keys, and a load takes the change back.
//!
//! Either way a piece reads what the pieces before it wrote. So one transaction need not be held in memory: what is held of it
//! can be written early, as often as need be.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};

use redis::ScriptInvocation;
use worker::SinkError;

use crate::deltas::{Delta, Deltas};
use crate::keys::Namespace;
use crate::observation::{Held, state_before};
use crate::patch::{Patch, current_of};
use crate::shape::Current;
use crate::store::{Columns, Counter, Place, Store, Wanted};

/// Bytes of groups that one piece carries.
const PIECE_BYTES: usize = 1 << 20;
/// A copy that is not larger than this part of what changes is built beside: that writes each group once.
const SMALL_PART: u64 = 4;
/// The cursor before the first piece of a hash and after the last.
const START: &str = "0";

/// A large commit under way.
#[derive(Debug)]
pub(crate) struct Large {
    token: String,
    way: Way,
    /// Groups that the content has so far.
    groups: u64,
    /// Whether anything was changed.
    changed: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    Beside,
    InPlace,
}

/// Why a piece was not written.
pub(crate) enum LargeError {
    Sink(SinkError),
    /// A group of the counter cannot be right.
    Damaged(String),
}

impl From<SinkError> for LargeError {
    fn from(error: SinkError) -> Self {
        LargeError::Sink(error)
    }
}

impl Large {
    /// Begins with the counter as it is, or with nothing if its table was emptied.
    pub(crate) fn begin(
        store: &mut Store,
        counter: &Counter,
        held: &Held,
        deltas: &Deltas,
    ) -> Result<Self, SinkError> {
        let emptied = deltas.truncated();
        let small = held.groups <= deltas.len() as u64 / SMALL_PART;
        let way = if counter.shown || emptied || small { Way::Beside } else { Way::InPlace };
        let groups = if emptied { 0 } else { held.groups };
        let large = Large { token: token(), way, groups, changed: false };
        let expected = held.expected(&store.space, counter.shape);
        match way {
            Way::Beside => {
                store.stage(counter, 0, |call| {
                    call.arg("begin").arg(&large.token).arg(&counter.name).arg(&expected);
                })?;
                if groups > 0 {
                    large.copy(store, counter, &expected)?;
                }
            }
            Way::InPlace => {
                store.tear(counter, 0, |call| {
                    call.arg("begin").arg(&large.token).arg(&counter.name).arg(&expected);
                    call.arg(held.torn_state());
                })?;
            }
        }
        Ok(large)
    }

    /// Copies what is live.
    fn copy(&self, store: &mut Store, counter: &Counter, expected: &str) -> Result<(), SinkError> {
        let shape = counter.shape;
        let there = [true, shape.hides_rows(), shape.hides_nonnull()];
        for (which, _) in there.iter().enumerate().filter(|(_, there)| **there) {
            store.copying.restart();
            let mut cursor = START.to_owned();
            loop {
                let fields = store.copying.piece();
                cursor = store.stage_copy(counter, fields, |call| {
                    call.arg("copy").arg(&self.token).arg(&counter.name).arg(expected);
                    call.arg(which + 1).arg(&cursor).arg(fields);
                })?;
                if cursor == START {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Writes changes.
    pub(crate) fn write(
        &mut self,
        store: &mut Store,
        counter: &Counter,
        held: &Held,
        deltas: &Deltas,
    ) -> Result<(), LargeError> {
        let changes: Vec<(&str, Delta)> = deltas.changed().collect();
        let mut rest = &changes[..];
        while !rest.is_empty() {
            let per_group = counter.shape.hashes() + usize::from(self.way == Way::InPlace);
            let (piece, later) = rest.split_at(length_of_piece(rest, store.writing.piece() / per_group));
            self.write_piece(store, counter, held, piece)?;
            rest = later;
        }
        self.changed |= !changes.is_empty();
        Ok(())
    }

    fn write_piece(
        &mut self,
        store: &mut Store,
        counter: &Counter,
        held: &Held,
        changes: &[(&str, Delta)],
    ) -> Result<(), LargeError> {
        let expected = self.expected(&store.space, counter, held);
        let groups: Vec<&str> = changes.iter().map(|(group, _)| *group).collect();
        let from = if self.way == Way::Beside { Place::Staged } else { Place::Live };
        let wanted = Wanted { counter, expected: &expected, token: &self.token, from, groups: &groups };
        let columns = store.read(&[wanted])?.pop();
        let patch = Patch::new(counter.shape, changes, columns.as_ref()).map_err(LargeError::Damaged)?;
        let fields = patch.fields(counter.shape);
        match self.way {
            Way::Beside => store.stage(counter, fields, |call| {
                call.arg("more").arg(&self.token);
                patch.arguments(call, counter.shape);
            })?,
            Way::InPlace => {
                store.tear(counter, fields + groups.len(), |call| {
                    call.arg("more").arg(&self.token).arg(&counter.name).arg(&expected);
                    call.arg(if self.changed { "again" } else { "once" });
                    what_was(call, &groups, columns.as_ref());
                    patch.arguments(call, counter.shape);
                })?;
            }
        }
        self.groups = patch.groups_after(self.groups);
        Ok(())
    }

    /// How the scripts see the counter meanwhile.
    pub(crate) fn expected(&self, space: &Namespace, counter: &Counter, held: &Held) -> String {
        match self.way {
            Way::Beside => held.expected(space, counter.shape),
            Way::InPlace => held.expected_torn(space, counter.shape, self.groups),
        }
    }

    /// Groups that the content has.
    pub(crate) fn groups(&self) -> u64 {
        self.groups
    }

    /// The counter's token and groups in the head of `commit.lua`'s arguments.
    pub(crate) fn head(&self, call: &mut ScriptInvocation<'_>) {
        call.arg(&self.token);
        match self.way {
            Way::Beside => call.arg(self.groups),
            Way::InPlace => call.arg(""),
        };
    }

    /// How `commit.lua` makes it the counter's content.
    pub(crate) fn how(&self) -> &'static str {
        match self.way {
            Way::Beside => "swap",
            Way::InPlace => "finish",
        }
    }

    /// Takes back what was changed: the table was emptied after it.
    pub(crate) fn abandon(&self, store: &mut Store, counter: &Counter, held: &Held) -> Result<(), SinkError> {
        match self.way {
            Way::Beside => store.clear_staging(counter),
            Way::InPlace => take_back(store, counter, &self.expected(&store.space, counter, held)),
        }
    }
}

/// Takes back what was changed of a torn counter that was seen as `seen`. Whatever ends it, it can be begun again.
pub(crate) fn take_back(store: &mut Store, counter: &Counter, seen: &str) -> Result<(), SinkError> {
    let Some(state) = state_before(seen) else { return Ok(()) };
    let token = token();
    store.tear(counter, 0, |call| {
        call.arg("undo").arg(&token).arg(&counter.name).arg(seen);
    })?;
    let mut cursor = START.to_owned();
    loop {
        let fields = store.writing.piece();
        let groups = fields.div_ceil(counter.shape.hashes() + 1);
        cursor = store.tear(counter, fields, |call| {
            call.arg("back").arg(&token).arg(&cursor).arg(groups);
        })?;
        if cursor == START {
            break;
        }
    }
    store.tear(counter, 0, |call| {
        call.arg("undone").arg(&token).arg(state);
    })?;
    Ok(())
}

/// How many of these changes one script carries, of at most `most`.
fn length_of_piece(changes: &[(&str, Delta)], most: usize) -> usize {
    let mut bytes = 0;
    let fits = |(group, _): &&(&str, Delta)| {
        bytes += group.len();
        bytes <= PIECE_BYTES
    };
    changes.iter().take(most).take_while(fits).count().max(1)
}

/// A counted list of groups and what Redis has of each, as `tear.lua` reads it: value, rows and nonnull on a line each, empty
/// for what is not there, else after a `=`.
fn what_was(call: &mut ScriptInvocation<'_>, groups: &[&str], columns: Option<&Columns>) {
    call.arg(groups.len() * 2);
    for (n, group) in groups.iter().enumerate() {
        let now = columns.map_or_else(Current::default, |columns| current_of(columns, n));
        let mut lines = Vec::new();
        for (place, part) in [now.value, now.rows, now.nonnull].into_iter().enumerate() {
            if place > 0 {
                lines.push(b'\n');
            }
            if let Some(part) = part {
                lines.push(b'=');
                lines.extend_from_slice(part);
            }
        }
        call.arg(group).arg(lines);
    }
}

/// Nobody else's.
fn token() -> String {
    format!("{:016x}", RandomState::new().build_hasher().finish())
}
