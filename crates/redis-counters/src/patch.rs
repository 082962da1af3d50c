//! What becomes of some groups: absolute values, computed from what Redis has (h41).

use redis::ScriptInvocation;

use crate::deltas::Delta;
use crate::shape::{Current, Group, Shape};
use crate::store::Columns;

/// Groups to set and to remove.
#[derive(Default)]
pub(crate) struct Patch<'a> {
    pub(crate) set: Vec<(&'a str, Group)>,
    pub(crate) gone: Vec<&'a str>,
    pub(crate) appeared: u64,
}

impl<'a> Patch<'a> {
    /// Settles every group; without `current` each starts from nothing.
    pub(crate) fn new(
        shape: Shape,
        changes: &[(&'a str, Delta)],
        current: Option<&Columns>,
    ) -> Result<Self, String> {
        let mut patch = Patch::default();
        for (n, (group, delta)) in changes.iter().enumerate() {
            let now = current.map_or_else(Current::default, |columns| current_of(columns, n));
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

    /// How many groups there are after it, of so many before.
    pub(crate) fn groups_after(&self, before: u64) -> u64 {
        (before + self.appeared).saturating_sub(self.gone.len() as u64)
    }

    /// Fields that it writes.
    pub(crate) fn fields(&self, shape: Shape) -> usize {
        (self.set.len() + self.gone.len()) * shape.hashes()
    }

    /// The four counted lists of `commit.lua`.
    pub(crate) fn arguments(&self, call: &mut ScriptInvocation<'_>, shape: Shape) {
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

/// What Redis has of the `n`th group that was read.
pub(crate) fn current_of(columns: &Columns, n: usize) -> Current<'_> {
    let column = |place: usize| columns.get(place)?.get(n)?.as_deref();
    Current { value: column(0), rows: column(1), nonnull: column(2) }
}
