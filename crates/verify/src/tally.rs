//! A counter's groups as numbers, to be added to and taken from.

use std::collections::{BTreeMap, BTreeSet};

use tokio_postgres::SimpleQueryRow;

use crate::NotVerified;
use crate::counter::{Counter, Measure};
use crate::source::text;
use change::key;

/// What a group's rows come to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Count {
    pub(crate) rows: i128,
    pub(crate) values: i128,
    pub(crate) sum: i128,
}

/// The groups by their fields.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Tally {
    groups: BTreeMap<String, Count>,
    /// Groups that were added to or taken from since this was asked for.
    touched: Option<BTreeSet<String>>,
}

/// Whether rows come or go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Sign {
    Plus,
    Minus,
}

impl Tally {
    /// Takes in one row of the counter's query: the group's values, count of rows, count of values, sum.
    pub(crate) fn take(
        &mut self,
        counter: &Counter,
        sign: Sign,
        value: impl Fn(usize) -> Option<String>,
    ) -> Result<(), NotVerified> {
        let groups: Vec<Option<String>> = (0..counter.groups).map(&value).collect();
        let number = |place| match value(counter.groups + place) {
            None => Ok(0),
            Some(text) => text.parse::<i128>().map_err(|_| {
                let what = format!("{}: the query gives `{text}`, which is not an integer", counter.store);
                NotVerified::new(what, "")
            }),
        };
        let count = Count { rows: number(0)?, values: number(1)?, sum: number(2)? };
        self.add(key::join(groups.iter().map(Option::as_deref)), sign, count);
        Ok(())
    }

    /// The same for a row of the simple protocol.
    pub(crate) fn take_text(&mut self, counter: &Counter, row: &SimpleQueryRow) -> Result<(), NotVerified> {
        self.take(counter, Sign::Plus, |place| text(row, place).map(str::to_owned))
    }

    fn add(&mut self, field: String, sign: Sign, count: Count) {
        let sign = if sign == Sign::Plus { 1 } else { -1 };
        if let Some(touched) = &mut self.touched
            && !touched.contains(&field)
        {
            touched.insert(field.clone());
        }
        let group = self.groups.entry(field).or_default();
        // 128 bits hold the sum of all that a table can hold.
        group.rows += sign * count.rows;
        group.values += sign * count.values;
        group.sum += sign * count.sum;
    }

    pub(crate) fn clear(&mut self) {
        let groups = std::mem::take(&mut self.groups);
        if let Some(touched) = &mut self.touched {
            touched.extend(groups.into_keys());
        }
    }

    /// From here on it is remembered which groups change.
    pub(crate) fn watch(&mut self) {
        self.touched = Some(BTreeSet::new());
    }

    /// The groups that changed since then.
    pub(crate) fn touched(&mut self) -> BTreeSet<String> {
        self.touched.take().unwrap_or_default()
    }

    /// What the counter must hold of a group (h60): a value as long as it has rows; without GROUP BY always one.
    pub(crate) fn value(&self, counter: &Counter, group: &str) -> Option<String> {
        let grouped = counter.groups > 0;
        let count = match self.groups.get(group) {
            None if grouped || !group.is_empty() => return None,
            count => count.copied().unwrap_or_default(),
        };
        if grouped && count.rows == 0 {
            return None;
        }
        Some(match counter.measure {
            Measure::Rows => count.rows.to_string(),
            Measure::Values => count.values.to_string(),
            Measure::Sum if count.values == 0 => String::new(),
            Measure::Sum => count.sum.to_string(),
        })
    }

    /// Whether the group may have a value.
    pub(crate) fn knows(&self, counter: &Counter, group: &str) -> bool {
        self.groups.contains_key(group) || (counter.groups == 0 && group.is_empty())
    }

    /// The groups that may have a value.
    pub(crate) fn groups(&self, counter: &Counter) -> impl Iterator<Item = &str> {
        let alone = (counter.groups == 0 && self.groups.is_empty()).then_some("");
        self.groups.keys().map(String::as_str).chain(alone)
    }
}
