//! What a batch of changes does to one counter, summed per group before Redis hears of it.

use foldhash::HashMap;

use crate::sql::Contribution;

/// How much a group grows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Delta {
    pub(crate) rows: i128,
    pub(crate) nonnull: i128,
    pub(crate) amount: i128,
}

/// Whether a row comes or goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Sign {
    Plus,
    Minus,
}

/// What one entry of the map costs beside its group's text.
const ENTRY_BYTES: usize = 96;

/// A counter's staged changes.
#[derive(Debug, Default)]
pub(crate) struct Deltas {
    groups: HashMap<String, Delta>,
    bytes: usize,
    truncated: bool,
}

impl Delta {
    /// The sum; `None` when it does not fit.
    pub(crate) fn plus(self, other: Delta) -> Option<Delta> {
        Some(Delta {
            rows: self.rows.checked_add(other.rows)?,
            nonnull: self.nonnull.checked_add(other.nonnull)?,
            amount: self.amount.checked_add(other.amount)?,
        })
    }

    fn of(row: Contribution<'_>, sign: Sign) -> Option<Delta> {
        let delta = Delta { rows: 1, nonnull: i128::from(row.non_null), amount: row.amount };
        match sign {
            Sign::Plus => Some(delta),
            Sign::Minus => {
                Some(Delta { rows: -1, nonnull: -delta.nonnull, amount: row.amount.checked_neg()? })
            }
        }
    }
}

impl Deltas {
    /// Adds or takes away one row. `None` when a sum no longer fits 128 bits.
    pub(crate) fn add(&mut self, row: Contribution<'_>, sign: Sign) -> Option<()> {
        let delta = Delta::of(row, sign)?;
        if let Some(sum) = self.groups.get_mut(row.group) {
            *sum = sum.plus(delta)?;
            return Some(());
        }
        self.bytes += row.group.len() + ENTRY_BYTES;
        self.groups.insert(row.group.to_owned(), delta);
        Some(())
    }

    /// The table was emptied: what was is forgotten, what follows counts from zero.
    pub(crate) fn truncate(&mut self) {
        self.clear();
        self.truncated = true;
    }

    /// Whether the counter starts from zero.
    pub(crate) fn truncated(&self) -> bool {
        self.truncated
    }

    /// The groups that change, in an order that stays while nothing is added.
    pub(crate) fn changed(&self) -> impl Iterator<Item = (&str, Delta)> {
        let changed = self.groups.iter().filter(|(_, delta)| **delta != Delta::default());
        changed.map(|(group, delta)| (group.as_str(), *delta))
    }

    /// Groups held, changed in the end or not.
    pub(crate) fn len(&self) -> usize {
        self.groups.len()
    }

    /// Memory held, about.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.groups.clear();
        // One enormous transaction must not keep its memory for good.
        self.groups.shrink_to(KEPT_GROUPS);
        self.bytes = 0;
        self.truncated = false;
    }
}

/// Room for this many groups is kept between commits.
const KEPT_GROUPS: usize = 100_000;

#[cfg(test)]
mod tests {
    use super::*;

    fn row(group: &str, amount: i128) -> Contribution<'_> {
        Contribution { group, non_null: true, amount }
    }

    #[test]
    fn rows_that_come_and_go_leave_nothing() {
        let mut deltas = Deltas::default();
        deltas.add(row("a", 5), Sign::Plus).unwrap();
        deltas.add(row("a", 5), Sign::Minus).unwrap();
        deltas.add(row("b", 2), Sign::Plus).unwrap();
        let changed: Vec<_> = deltas.changed().collect();
        assert_eq!(changed, [("b", Delta { rows: 1, nonnull: 1, amount: 2 })]);
    }

    #[test]
    fn a_truncate_forgets_what_was_before_it_only() {
        let mut deltas = Deltas::default();
        deltas.add(row("a", 1), Sign::Minus).unwrap();
        deltas.truncate();
        deltas.add(row("b", 1), Sign::Plus).unwrap();
        assert!(deltas.truncated());
        assert_eq!(deltas.changed().map(|(group, _)| group).collect::<Vec<_>>(), ["b"]);
    }
}
