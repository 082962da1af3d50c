//! From a group's current value and its delta to the value that replaces it, exactly.
//!
//! A query's result alone does not tell when a group vanishes or a sum becomes NULL (h60), so hidden counts
//! stand beside it, where they are needed:
//!
//! | aggregate | rows of the group | values that are not NULL |
//! | --- | --- | --- |
//! | `count(*)` | the value itself | |
//! | `count(column)` | hidden, if grouped | the value itself |
//! | `sum(column)` | hidden, if grouped | hidden |
//!
//! Without GROUP BY there is one group, called "", which never vanishes. Sums are 128 bits wide: Postgres' own for
//! integers of 64 bits over any table it can hold.

use crate::deltas::Delta;

/// What a counter counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Aggregate {
    /// `count(*)`.
    Rows,
    /// `count(column)`.
    NonNull,
    /// `sum(column)`.
    Sum,
}

/// What a counter keeps in Redis.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Shape {
    pub(crate) aggregate: Aggregate,
    pub(crate) grouped: bool,
}

/// A group as Redis has it; `None` for a missing field.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Current<'a> {
    pub(crate) value: Option<&'a [u8]>,
    pub(crate) rows: Option<&'a [u8]>,
    pub(crate) nonnull: Option<&'a [u8]>,
}

/// A group as it is to be; hidden counts are written where the shape has them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Group {
    pub(crate) value: String,
    pub(crate) rows: i128,
    pub(crate) nonnull: i128,
}

impl Shape {
    /// Whether rows are counted in a hash of their own.
    pub(crate) fn hides_rows(self) -> bool {
        self.grouped && self.aggregate != Aggregate::Rows
    }

    /// Whether non-NULL values are.
    pub(crate) fn hides_nonnull(self) -> bool {
        self.aggregate == Aggregate::Sum
    }

    /// Hashes, or without GROUP BY keys, that hold a group's content: 1 to 3.
    pub(crate) fn hashes(self) -> usize {
        1 + usize::from(self.hides_rows()) + usize::from(self.hides_nonnull())
    }

    /// The value of an empty table without GROUP BY.
    pub(crate) fn initial(self) -> &'static str {
        if self.aggregate == Aggregate::Sum { "" } else { "0" }
    }

    /// The group after its delta; `None` when it vanishes.
    ///
    /// An error says why `current` and `delta` cannot both be right.
    pub(crate) fn settle(self, current: Current<'_>, delta: Delta) -> Result<Option<Group>, String> {
        let before = self.read(current)?;
        let after = before.plus(delta).ok_or("a count overflows 128 bits")?;
        let counted_rows = self.grouped || self.aggregate == Aggregate::Rows;
        let known = match (self.aggregate, counted_rows) {
            (Aggregate::Rows, _) => after.rows >= 0,
            (_, true) => after.nonnull >= 0 && after.nonnull <= after.rows,
            (_, false) => after.nonnull >= 0,
        };
        if !known {
            return Err(format!("it would hold {} rows, {} of them not NULL", after.rows, after.nonnull));
        }
        let sums = self.aggregate == Aggregate::Sum;
        if sums && after.nonnull == 0 && after.amount != 0 {
            return Err(format!("no value would be left and their sum would be {}", after.amount));
        }
        if self.grouped && after.rows == 0 {
            return Ok(None);
        }
        let value = match self.aggregate {
            Aggregate::Rows => after.rows.to_string(),
            Aggregate::NonNull => after.nonnull.to_string(),
            Aggregate::Sum if after.nonnull == 0 => String::new(),
            Aggregate::Sum => after.amount.to_string(),
        };
        Ok(Some(Group { value, rows: after.rows, nonnull: after.nonnull }))
    }

    fn read(self, current: Current<'_>) -> Result<Delta, String> {
        let Some(value) = current.value else {
            return if current.rows.is_none() && current.nonnull.is_none() {
                Ok(Delta::default())
            } else {
                Err("it has a hidden count but no value".to_owned())
            };
        };
        let mut read = Delta::default();
        if self.hides_rows() {
            read.rows = number(current.rows, "hidden count of rows")?;
        }
        match self.aggregate {
            Aggregate::Rows => read.rows = number(Some(value), "value")?,
            Aggregate::NonNull => read.nonnull = number(Some(value), "value")?,
            Aggregate::Sum => {
                read.nonnull = number(current.nonnull, "hidden count of values")?;
                match (value.is_empty(), read.nonnull) {
                    (true, 0) => {}
                    (true, _) | (false, 0) => {
                        return Err("its sum and its count of values disagree".to_owned());
                    }
                    (false, _) => read.amount = number(Some(value), "value")?,
                }
            }
        }
        Ok(read)
    }
}

fn number(text: Option<&[u8]>, what: &str) -> Result<i128, String> {
    let text = text.ok_or_else(|| format!("its {what} is missing"))?;
    let parsed = std::str::from_utf8(text).ok().and_then(|text| text.parse().ok());
    parsed.ok_or_else(|| format!("its {what} is `{}`, not a number", String::from_utf8_lossy(text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn current<'a>(value: &'a str, rows: &'a str, nonnull: &'a str) -> Current<'a> {
        let some = |text: &'a str| (text != "-").then_some(text.as_bytes());
        Current { value: some(value), rows: some(rows), nonnull: some(nonnull) }
    }

    fn delta(rows: i128, nonnull: i128, amount: i128) -> Delta {
        Delta { rows, nonnull, amount }
    }

    #[test]
    fn h60_groups_stay_and_vanish_with_their_rows() {
        let sum = Shape { aggregate: Aggregate::Sum, grouped: true };
        let value = |settled: Result<Option<Group>, String>| settled.unwrap().map(|group| group.value);
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(value(sum.settle(current("-", "-", "-"), delta(1, 1, 0))), some("0"), "a sum of 0 stays");
        assert_eq!(
            value(sum.settle(current("5", "2", "1"), delta(-1, -1, -5))),
            some(""),
            "only NULL is left"
        );
        assert_eq!(value(sum.settle(current("", "1", "0"), delta(1, 1, -3))), some("-3"));
        assert_eq!(value(sum.settle(current("", "1", "0"), delta(-1, 0, 0))), None);
        let count = Shape { aggregate: Aggregate::NonNull, grouped: true };
        assert_eq!(value(count.settle(current("1", "2", "-"), delta(-1, -1, 0))), some("0"));
        assert_eq!(value(count.settle(current("0", "1", "-"), delta(-1, 0, 0))), None);
        let alone = Shape { aggregate: Aggregate::Sum, grouped: false };
        assert_eq!(value(alone.settle(current("5", "-", "1"), delta(-1, -1, -5))), some(""));
        let wide = i128::from(i64::MAX) * 3;
        assert_eq!(
            value(sum.settle(current("-", "-", "-"), delta(3, 3, wide))),
            some("27670116110564327421")
        );
    }

    #[test]
    fn what_cannot_be_right_is_told() {
        let count = Shape { aggregate: Aggregate::Rows, grouped: true };
        let sum = Shape { aggregate: Aggregate::Sum, grouped: true };
        for (shape, current, delta) in [
            (count, current("1", "-", "-"), delta(-2, 0, 0)),
            (count, current("x", "-", "-"), delta(1, 0, 0)),
            (sum, current("-", "1", "-"), delta(1, 1, 1)),
            (sum, current("5", "-", "1"), delta(1, 1, 1)),
            (sum, current("", "1", "1"), delta(1, 1, 1)),
            (sum, current("5", "1", "1"), delta(-1, -1, -4)),
            (sum, current("5", "1", "1"), delta(0, 1, 4)),
            (sum, current("5", "1", "1"), delta(-2, -2, -5)),
        ] {
            assert!(shape.settle(current, delta).is_err(), "{shape:?} {current:?} {delta:?}");
        }
    }
}
