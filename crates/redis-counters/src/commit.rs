//! A commit: read the changed groups, compute, write.
//!
//! 1. Read the groups' current values, on condition that every counter stands where the batch starts.
//! 2. Compute absolute new values, exactly, here (h41).
//! 3. One script: again on that condition, write the values and the new checkpoints of all counters. So a source
//!    transaction shows in all of them at once, or, whatever is killed, in none.
//!
//! A counter with more changed groups than a script should carry is built beside the live one first, in pieces,
//! and the script of step 3 puts it in place. What a crash leaves of that is under keys of its own, and the next
//! large commit, the next load and the next reset remove it.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};

use redis::ScriptInvocation;
use worker::{Checkpoint, SinkError};

use crate::deltas::{Delta, Deltas};
use crate::observation::Held;
use crate::shape::{Current, Group, Shape};
use crate::store::{Columns, Counter, Store, Wanted, checkpoint_fields};

/// Groups that a large commit reads and stages in one step.
const STEP_GROUPS: usize = 10_000;

/// One counter's part in a commit.
pub(crate) struct Moving<'a> {
    pub(crate) counter: &'a Counter,
    pub(crate) held: &'a Held,
    pub(crate) to: &'a Checkpoint,
    pub(crate) deltas: &'a Deltas,
}

/// Why a commit wrote nothing.
pub(crate) enum CommitError {
    Sink(SinkError),
    /// A group of the counter at this place of the commit cannot be right.
    Damaged(usize, String),
}

impl From<SinkError> for CommitError {
    fn from(error: SinkError) -> Self {
        CommitError::Sink(error)
    }
}

/// What one script may carry.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budget {
    pub(crate) groups: usize,
    pub(crate) bytes: usize,
}

enum Plan<'a> {
    Patch { replace: bool, patch: Patch<'a> },
    Swap { token: String },
}

/// Groups to set and to remove.
#[derive(Default)]
struct Patch<'a> {
    set: Vec<(&'a str, Group)>,
    gone: Vec<&'a str>,
    appeared: u64,
}

/// Moves the counters, all or nothing; gives what each then holds.
pub(crate) fn commit(
    store: &mut Store,
    moving: &[Moving<'_>],
    budget: Budget,
) -> Result<Vec<Held>, CommitError> {
    let expected: Vec<String> =
        moving.iter().map(|m| m.held.expected(&store.space, m.counter.shape)).collect();
    let large = beyond(moving, budget);
    let mut patches = patch_all(store, moving, &expected, &large)?.into_iter();
    let mut plans = Vec::with_capacity(moving.len());
    for (place, part) in moving.iter().enumerate() {
        let (plan, groups) = if large[place] {
            let (token, groups) = stage(store, part, &expected[place]).map_err(|e| e.at(place))?;
            (Plan::Swap { token }, groups)
        } else {
            let patch = patches.next().unwrap_or_default();
            let groups = patch.groups_after(part);
            (Plan::Patch { replace: part.deltas.truncated(), patch }, groups)
        };
        plans.push((plan, Held { checkpoint: part.to.clone(), groups }));
    }
    let counters: Vec<&Counter> = moving.iter().map(|part| part.counter).collect();
    store.commit(&counters, |call| arguments(call, moving, &expected, &plans))?;
    Ok(plans.into_iter().map(|(_, held)| held).collect())
}

/// Which counters do not fit into the script: the smallest go first.
fn beyond(moving: &[Moving<'_>], budget: Budget) -> Vec<bool> {
    let mut order: Vec<usize> = (0..moving.len()).collect();
    order.sort_by_key(|place| moving[*place].deltas.len());
    let mut left = budget;
    let mut large = vec![false; moving.len()];
    for place in order {
        let deltas = moving[place].deltas;
        match (left.groups.checked_sub(deltas.len()), left.bytes.checked_sub(deltas.bytes())) {
            (Some(groups), Some(bytes)) => left = Budget { groups, bytes },
            // Without GROUP BY there is nothing to build beside.
            _ => large[place] = moving[place].counter.shape.grouped,
        }
    }
    large
}

/// The patches of all counters that fit into the script, read together.
fn patch_all<'a>(
    store: &mut Store,
    moving: &[Moving<'a>],
    expected: &[String],
    large: &[bool],
) -> Result<Vec<Patch<'a>>, CommitError> {
    let small: Vec<usize> = (0..moving.len()).filter(|place| !large[*place]).collect();
    let changes: Vec<Vec<(&'a str, Delta)>> = small.iter().map(|place| moving[*place].changes()).collect();
    let reads = |n: usize| !changes[n].is_empty() && !moving[small[n]].deltas.truncated();
    let wanted: Vec<Wanted<'_>> = (0..small.len())
        .filter(|n| reads(*n))
        .map(|n| Wanted {
            counter: moving[small[n]].counter,
            expected: &expected[small[n]],
            groups: changes[n].iter().map(|(group, _)| *group).collect(),
        })
        .collect();
    let mut columns = if wanted.is_empty() { Vec::new() } else { store.read(&wanted)? }.into_iter();
    let mut patches = Vec::with_capacity(small.len());
    for (n, place) in small.iter().enumerate() {
        let current = if reads(n) { columns.next() } else { None };
        let patch = Patch::new(moving[*place].counter.shape, &changes[n], current.as_ref());
        patches.push(patch.map_err(|reason| CommitError::Damaged(*place, reason))?);
    }
    Ok(patches)
}

enum StageError {
    Sink(SinkError),
    Damaged(String),
}

impl From<SinkError> for StageError {
    fn from(error: SinkError) -> Self {
        StageError::Sink(error)
    }
}

impl StageError {
    fn at(self, place: usize) -> CommitError {
        match self {
            StageError::Sink(error) => CommitError::Sink(error),
            StageError::Damaged(reason) => CommitError::Damaged(place, reason),
        }
    }
}

/// Builds the counter's new value beside the live one; gives the token and the number of its groups.
fn stage(store: &mut Store, part: &Moving<'_>, expected: &str) -> Result<(String, u64), StageError> {
    let (counter, truncated) = (part.counter, part.deltas.truncated());
    let token = format!("{:016x}", RandomState::new().build_hasher().finish());
    store.stage(counter, |call| {
        call.arg("begin").arg(&token).arg(if truncated { "empty" } else { "copy" });
        call.arg(&counter.name).arg(expected);
    })?;
    let mut groups = if truncated { 0 } else { part.held.groups };
    for changes in part.changes().chunks(STEP_GROUPS) {
        let current = match truncated {
            true => None,
            false => {
                let names = changes.iter().map(|(group, _)| *group).collect();
                store.read(&[Wanted { counter, expected, groups: names }])?.pop()
            }
        };
        let patch = Patch::new(counter.shape, changes, current.as_ref()).map_err(StageError::Damaged)?;
        store.stage(counter, |call| {
            call.arg("more").arg(&token);
            patch.arguments(call, counter.shape);
        })?;
        groups = (groups + patch.appeared).saturating_sub(patch.gone.len() as u64);
    }
    Ok((token, groups))
}

fn arguments(
    call: &mut ScriptInvocation<'_>,
    moving: &[Moving<'_>],
    expected: &[String],
    plans: &[(Plan<'_>, Held)],
) {
    call.arg(moving.len());
    for (part, expected) in moving.iter().zip(expected) {
        call.arg(&part.counter.name).arg(expected);
    }
    for (plan, held) in plans {
        match plan {
            Plan::Swap { token } => call.arg(token).arg(held.groups),
            Plan::Patch { .. } => call.arg("").arg(0),
        };
    }
    for (part, (plan, held)) in moving.iter().zip(plans) {
        match plan {
            Plan::Swap { .. } => drop(call.arg("swap")),
            Plan::Patch { replace, patch } => {
                let shape = part.counter.shape;
                call.arg(if *replace { "replace" } else { "patch" }).arg(if shape.grouped {
                    "h"
                } else {
                    "s"
                });
                patch.arguments(call, shape);
            }
        }
        checkpoint_fields(call, held);
    }
}

impl<'a> Moving<'a> {
    /// The groups to compute. Without GROUP BY a truncated counter is written even when nothing follows.
    fn changes(&self) -> Vec<(&'a str, Delta)> {
        let mut changes: Vec<_> = self.deltas.changed().collect();
        if changes.is_empty() && self.deltas.truncated() && !self.counter.shape.grouped {
            changes.push(("", Delta::default()));
        }
        changes
    }
}

impl<'a> Patch<'a> {
    /// Settles every group; without `current` each starts from nothing.
    fn new(shape: Shape, changes: &[(&'a str, Delta)], current: Option<&Columns>) -> Result<Self, String> {
        let mut patch = Patch::default();
        for (n, (group, delta)) in changes.iter().enumerate() {
            let column = |place: usize| {
                let column = current.and_then(|columns| columns.get(place));
                column.and_then(|column| column.get(n)).and_then(Option::as_deref)
            };
            let now = Current { value: column(0), rows: column(1), nonnull: column(2) };
            let settled = shape.settle(now, *delta);
            match settled.map_err(|reason| format!("its group `{group}` cannot be right: {reason}"))? {
                Some(to) => {
                    patch.appeared += u64::from(now.value.is_none());
                    patch.set.push((group, to));
                }
                None if now.value.is_some() => patch.gone.push(group),
                None => {}
            }
        }
        Ok(patch)
    }

    fn groups_after(&self, part: &Moving<'_>) -> u64 {
        if !part.counter.shape.grouped {
            return 1;
        }
        let before = if part.deltas.truncated() { 0 } else { part.held.groups };
        (before + self.appeared).saturating_sub(self.gone.len() as u64)
    }

    /// The four counted lists of `commit.lua`.
    fn arguments(&self, call: &mut ScriptInvocation<'_>, shape: Shape) {
        if shape.grouped {
            call.arg(self.set.len() * 2);
            for (group, to) in &self.set {
                call.arg(group).arg(&to.value);
            }
        } else {
            call.arg(self.set.len());
            for (_, to) in &self.set {
                call.arg(&to.value);
            }
        }
        let mut hidden = |wanted: bool, count: fn(&Group) -> i128| {
            call.arg(if wanted { self.set.len() * 2 } else { 0 });
            for (group, to) in self.set.iter().filter(|_| wanted) {
                call.arg(group).arg(count(to).to_string());
            }
        };
        hidden(shape.hides_rows(), |to| to.rows);
        hidden(shape.hides_nonnull(), |to| to.nonnull);
        call.arg(self.gone.len());
        for group in &self.gone {
            call.arg(group);
        }
    }
}
