//! A commit: read the changed groups, compute, write.
//!
//! 1. Read the groups' current values, on condition that every counter is where the batch starts.
//! 2. Compute absolute new values, exactly, here (h41).
//! 3. One script: again on that condition, write the values and the new checkpoints of all counters. So a source
//!    transaction shows in all of them at once, or, whatever is killed, in none.
//!
//! A counter with more changed groups than a script should write is written in pieces before ([`large`](crate::large)), and
//! the script of step 3 makes the result its content.

use redis::ScriptInvocation;
use worker::{Checkpoint, SinkError};

use crate::deltas::{Delta, Deltas};
use crate::large::{Large, LargeError};
use crate::observation::Held;
use crate::patch::Patch;
use crate::store::{Columns, Counter, Place, Store, Wanted, checkpoint_fields};

/// One counter's part in a commit.
pub(crate) struct Moving<'a> {
    pub(crate) counter: &'a Counter,
    pub(crate) held: &'a Held,
    pub(crate) to: &'a Checkpoint,
    pub(crate) deltas: &'a Deltas,
    /// What was written of it already.
    pub(crate) large: Option<Large>,
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

impl CommitError {
    fn of(error: LargeError, place: usize) -> Self {
        match error {
            LargeError::Sink(error) => CommitError::Sink(error),
            LargeError::Damaged(reason) => CommitError::Damaged(place, reason),
        }
    }
}

/// What one script may carry.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budget {
    pub(crate) groups: usize,
    pub(crate) bytes: usize,
    pub(crate) fields: usize,
}

/// How a counter's part comes into its keys.
enum Plan<'a> {
    Patch { replace: bool, patch: Patch<'a> },
    Large(Large),
}

/// A counter's plan, how the script is to find the counter, and what it then holds.
struct Step<'a> {
    plan: Plan<'a>,
    expected: String,
    after: Held,
}

/// Moves the counters, all or nothing; gives what each then holds.
pub(crate) fn commit(
    store: &mut Store,
    moving: &mut [Moving<'_>],
    budget: Budget,
) -> Result<Vec<Held>, CommitError> {
    let beyond = beyond(moving, budget);
    let larges: Vec<Option<Large>> = moving.iter_mut().map(|part| part.large.take()).collect();
    let moving = &*moving;
    let mut patches = patch_all(store, moving, &beyond)?.into_iter();
    let mut steps = Vec::with_capacity(moving.len());
    for ((place, part), large) in moving.iter().enumerate().zip(larges) {
        let step = match beyond[place] {
            true => write_large(store, part, large).map_err(|error| CommitError::of(error, place))?,
            false => part.patched(store, patches.next().unwrap_or_default()),
        };
        steps.push(step);
    }
    let counters: Vec<&Counter> = moving.iter().map(|part| part.counter).collect();
    let fields = steps.iter().zip(&counters).map(|(step, counter)| step.fields(counter)).sum();
    store.commit(&counters, fields, |call| arguments(call, moving, &steps))?;
    Ok(steps.into_iter().map(|step| step.after).collect())
}

/// Which counters do not fit into the script: the smallest go first.
fn beyond(moving: &[Moving<'_>], budget: Budget) -> Vec<bool> {
    let mut order: Vec<usize> = (0..moving.len()).collect();
    order.sort_by_key(|place| moving[*place].deltas.len());
    let mut left = budget;
    let mut large = vec![false; moving.len()];
    for place in order {
        let Moving { deltas, counter, large: begun, .. } = &moving[place];
        let groups = left.groups.checked_sub(deltas.len());
        let bytes = left.bytes.checked_sub(deltas.bytes());
        let fields = left.fields.checked_sub(deltas.len() * counter.shape.hashes());
        match (groups, bytes, fields) {
            (Some(groups), Some(bytes), Some(fields)) if begun.is_none() => {
                left = Budget { groups, bytes, fields };
            }
            // Without GROUP BY there is nothing to write in pieces.
            _ => large[place] = counter.shape.grouped,
        }
    }
    large
}

/// The patches of all counters that fit into the script, read together.
fn patch_all<'a>(
    store: &mut Store,
    moving: &[Moving<'a>],
    beyond: &[bool],
) -> Result<Vec<Patch<'a>>, CommitError> {
    let small: Vec<usize> = (0..moving.len()).filter(|place| !beyond[*place]).collect();
    let changes: Vec<Vec<(&'a str, Delta)>> = small.iter().map(|place| moving[*place].changes()).collect();
    let mut current: Vec<Option<Columns>> = vec![None; small.len()];
    let mut reading = Reading::new(store);
    for (n, place) in small.iter().enumerate() {
        let part = &moving[*place];
        if !changes[n].is_empty() && !part.deltas.truncated() {
            reading.want(n, part, changes[n].iter().map(|(group, _)| *group), &mut current)?;
        }
    }
    reading.read(&mut current)?;
    let mut patches = Vec::with_capacity(small.len());
    for ((place, changes), current) in small.iter().zip(&changes).zip(&current) {
        let patch = Patch::new(moving[*place].counter.shape, changes, current.as_ref());
        patches.push(patch.map_err(|reason| CommitError::Damaged(*place, reason))?);
    }
    Ok(patches)
}

/// Groups of several counters that are read by one script, before there are too many for one.
struct Reading<'s, 'a> {
    store: &'s mut Store,
    most: usize,
    fields: usize,
    wanted: Vec<(usize, &'a Counter, String, Vec<&'a str>)>,
}

impl<'s, 'a> Reading<'s, 'a> {
    fn new(store: &'s mut Store) -> Self {
        let most = store.writing.enough();
        Reading { store, most, fields: 0, wanted: Vec::new() }
    }

    /// Wants groups of the `n`th counter.
    fn want(
        &mut self,
        n: usize,
        part: &Moving<'a>,
        groups: impl Iterator<Item = &'a str>,
        into: &mut [Option<Columns>],
    ) -> Result<(), SinkError> {
        let expected = part.held.expected(&self.store.space, part.counter.shape);
        let mut groups = groups.peekable();
        while groups.peek().is_some() {
            let room = self.most.saturating_sub(self.fields) / part.counter.shape.hashes();
            if room == 0 && self.fields > 0 {
                self.read(into)?;
                continue;
            }
            let now: Vec<&str> = groups.by_ref().take(room.max(1)).collect();
            self.fields += now.len() * part.counter.shape.hashes();
            self.wanted.push((n, part.counter, expected.clone(), now));
        }
        Ok(())
    }

    /// Reads what is wanted.
    fn read(&mut self, into: &mut [Option<Columns>]) -> Result<(), SinkError> {
        if self.wanted.is_empty() {
            return Ok(());
        }
        let wanted = self.wanted.iter().map(|(_, counter, expected, groups)| Wanted {
            counter,
            expected,
            token: "",
            from: Place::Live,
            groups,
        });
        let found = self.store.read(&wanted.collect::<Vec<_>>())?;
        for ((n, ..), found) in self.wanted.iter().zip(found) {
            match &mut into[*n] {
                Some(columns) => columns.iter_mut().zip(found).for_each(|(all, more)| all.extend(more)),
                none => *none = Some(found),
            }
        }
        self.wanted.clear();
        self.fields = 0;
        Ok(())
    }
}

/// Writes the counter's changes in pieces.
fn write_large<'a>(
    store: &mut Store,
    part: &Moving<'_>,
    begun: Option<Large>,
) -> Result<Step<'a>, LargeError> {
    let Moving { counter, held, to, deltas, .. } = part;
    let mut large = match begun {
        Some(large) => large,
        None => Large::begin(store, counter, held, deltas)?,
    };
    large.write(store, counter, held, deltas)?;
    let expected = large.expected(&store.space, counter, held);
    let after = Held { checkpoint: (*to).clone(), groups: large.groups() };
    Ok(Step { plan: Plan::Large(large), expected, after })
}

fn arguments(call: &mut ScriptInvocation<'_>, moving: &[Moving<'_>], steps: &[Step<'_>]) {
    call.arg(moving.len());
    for (part, step) in moving.iter().zip(steps) {
        call.arg(&part.counter.name).arg(&step.expected);
    }
    for step in steps {
        match &step.plan {
            Plan::Large(large) => large.head(call),
            Plan::Patch { .. } => drop(call.arg("").arg("")),
        }
    }
    for (part, step) in moving.iter().zip(steps) {
        match &step.plan {
            Plan::Large(large) => drop(call.arg(large.how())),
            Plan::Patch { replace, patch } => {
                let shape = part.counter.shape;
                call.arg(if *replace { "replace" } else { "patch" });
                call.arg(if shape.grouped { "h" } else { "s" });
                patch.arguments(call, shape);
            }
        }
        checkpoint_fields(call, &step.after);
    }
}

impl Step<'_> {
    /// Fields that the script writes for it.
    fn fields(&self, counter: &Counter) -> usize {
        match &self.plan {
            Plan::Patch { patch, .. } => patch.fields(counter.shape),
            Plan::Large(_) => 0,
        }
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

    fn patched(&self, store: &Store, patch: Patch<'a>) -> Step<'a> {
        let replace = self.deltas.truncated();
        let groups = match self.counter.shape.grouped {
            true => patch.groups_after(if replace { 0 } else { self.held.groups }),
            false => 1,
        };
        Step {
            plan: Plan::Patch { replace, patch },
            expected: self.held.expected(&store.space, self.counter.shape),
            after: Held { checkpoint: self.to.clone(), groups },
        }
    }
}
