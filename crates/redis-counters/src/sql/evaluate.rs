//! What one row of the log adds to a counter.

use std::borrow::Cow;

use change::Field;

use super::bind::{Bound, BoundColumn, Condition, Side};
use super::definition::Aggregate;
use super::value::Value;

/// What a row adds to one group; a row that goes away takes the same from it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Contribution<'s> {
    /// The group's hash field; empty without GROUP BY.
    pub group: &'s str,
    /// Whether the aggregate's column is not NULL; true for `count(*)`.
    pub non_null: bool,
    /// What it adds to the sum; 0 for NULL and for counts.
    pub amount: i128,
}

/// Memory that is reused from row to row.
#[derive(Clone, Debug, Default)]
pub struct Scratch {
    fields: Vec<Field<'static>>,
    group: String,
}

/// The values of one row, at the places that [`Bound`] speaks of.
struct Row<'r> {
    columns: &'r [BoundColumn],
    fields: &'r [Field<'r>],
}

impl Bound {
    /// What the row (a JSON object of the log) adds to the counter, or `None` when WHERE is not true for it. The
    /// error says what is wrong with the row; it is no row of this version of the table.
    ///
    /// The row must hold real values in all [`referenced_columns`](super::Definition::referenced_columns). Under an
    /// identity other than FULL that is so for a deleted row and for the two rows of a changed key. An update that
    /// has no `before` changed none of them, and adds nothing. A column in the record's list of unchanged values
    /// holds a placeholder and no value.
    pub fn contribution<'s>(
        &self,
        row: &str,
        scratch: &'s mut Scratch,
    ) -> Result<Option<Contribution<'s>>, String> {
        let mut values: Vec<Field<'_>> = std::mem::take(&mut scratch.fields);
        self.found.read(row, &mut values).map_err(|error| error.to_string())?;
        let row = Row { columns: &self.columns, fields: &values };
        let found = self.evaluate(&row, &mut scratch.group)?;
        values.clear();
        // Nothing is left in it; collecting in place gives the memory back under the other lifetime.
        scratch.fields = values.into_iter().map(|_| Field::Missing).collect();
        Ok(found.map(|(non_null, amount)| Contribution { group: &scratch.group, non_null, amount }))
    }

    fn evaluate(&self, row: &Row<'_>, group: &mut String) -> Result<Option<(bool, i128)>, String> {
        row.check()?;
        if let Some(filter) = &self.filter
            && filter.evaluate(row)? != Some(true)
        {
            return Ok(None);
        }
        group.clear();
        for (order, (place, kind)) in self.group.iter().enumerate() {
            self.form.append(group, order, *kind, row.text(*place).as_deref());
        }
        let Some(place) = self.measured else { return Ok(Some((true, 0))) };
        let Some(text) = row.text(place) else { return Ok(Some((false, 0))) };
        let amount = match self.definition.aggregate() {
            Aggregate::Sum { .. } => text.parse::<i64>().map_err(|_| row.bad(place, &text))?,
            _ => 0,
        };
        Ok(Some((true, i128::from(amount))))
    }
}

impl<'r> Row<'r> {
    fn check(&self) -> Result<(), String> {
        let missing = |(field, column): (&Field<'_>, &BoundColumn)| {
            *field == Field::Missing && !column.recorded.is_empty()
        };
        match self.fields.iter().zip(self.columns).position(missing) {
            Some(place) => Err(format!("the row has no column {:?}", self.columns[place].recorded)),
            None => Ok(()),
        }
    }

    /// The value as Postgres prints it; `None` for NULL.
    fn text(&self, place: usize) -> Option<Cow<'r, str>> {
        self.fields[place].postgres_text(self.columns[place].encoding)
    }

    fn bad(&self, place: usize, text: &str) -> String {
        format!("column {:?} holds {text:?}, which is no value of its type", self.columns[place].recorded)
    }

    /// The value of one side of a comparison; `None` for NULL.
    fn value<'v>(&self, side: &'v Side) -> Result<Option<Value<'v>>, String>
    where
        'r: 'v,
    {
        let (place, read_as) = match side {
            Side::Literal(value) => return Ok(value.as_ref().map(Value::borrowed)),
            Side::Column { place, read_as } => (*place, *read_as),
        };
        let value = match self.text(place) {
            None => return Ok(None),
            Some(Cow::Borrowed(text)) => Value::read(read_as, text).ok_or_else(|| self.bad(place, text))?,
            Some(Cow::Owned(text)) => {
                Value::read(read_as, &text).map(Value::into_owned).ok_or_else(|| self.bad(place, &text))?
            }
        };
        Ok(Some(value))
    }
}

impl Condition {
    /// SQL's three truth values: `None` is unknown.
    fn evaluate(&self, row: &Row<'_>) -> Result<Option<bool>, String> {
        Ok(match self {
            Condition::All(parts) => all(parts, row)?,
            Condition::Any(parts) => any(parts.iter().map(|part| part.evaluate(row)))?,
            Condition::Not(inner) => not(true, inner.evaluate(row)?),
            Condition::Compare { left, op, right } => match (row.value(left)?, row.value(right)?) {
                (Some(left), Some(right)) => Some(op.holds(order(&left, &right)?)),
                _ => None,
            },
            Condition::In { column, list, negated } => match row.value(column)? {
                None => None,
                Some(value) => not(*negated, any(list.iter().map(|item| equal(row, &value, item)))?),
            },
            Condition::Like { column, pattern, negated } => {
                not(*negated, row.text(*column).map(|text| pattern.matches(&text)))
            }
            Condition::IsNull { column, negated } => Some((row.fields[*column] == Field::Null) != *negated),
            Condition::Is { condition, truth, negated } => {
                Some((condition.evaluate(row)? == *truth) != *negated)
            }
            Condition::Column(place) => match row.text(*place).as_deref() {
                None => None,
                Some("t") => Some(true),
                Some("f") => Some(false),
                Some(other) => return Err(row.bad(*place, other)),
            },
            Condition::Constant(value) => *value,
        })
    }
}

fn not(negated: bool, truth: Option<bool>) -> Option<bool> {
    truth.map(|truth| truth != negated)
}

/// False wins over unknown, unknown over true.
fn all(parts: &[Condition], row: &Row<'_>) -> Result<Option<bool>, String> {
    let mut result = Some(true);
    for part in parts {
        match part.evaluate(row)? {
            Some(false) => return Ok(Some(false)),
            None => result = None,
            Some(true) => {}
        }
    }
    Ok(result)
}

/// True wins over unknown, unknown over false.
fn any(parts: impl Iterator<Item = Result<Option<bool>, String>>) -> Result<Option<bool>, String> {
    let mut result = Some(false);
    for part in parts {
        match part? {
            Some(true) => return Ok(Some(true)),
            None => result = None,
            Some(false) => {}
        }
    }
    Ok(result)
}

fn equal(row: &Row<'_>, value: &Value<'_>, item: &Side) -> Result<Option<bool>, String> {
    match row.value(item)? {
        None => Ok(None),
        Some(item) => Ok(Some(order(value, &item)?.is_eq())),
    }
}

fn order(left: &Value<'_>, right: &Value<'_>) -> Result<std::cmp::Ordering, String> {
    // `bind` reads both sides as one type.
    left.compare(right).ok_or_else(|| format!("{left:?} does not compare with {right:?}"))
}
