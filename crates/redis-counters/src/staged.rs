//! A change of a row, as one counter sees it.

use std::sync::Arc;

use change::{NEW_LOG, Op, Refusal, ReplicaIdentity, TableSchema};
use worker::{Change, SinkError};

use crate::deltas::{Deltas, Sign};
use crate::large::Large;
use crate::sql::{Bound, Definition, Form, Scratch, display_table};

/// A counter's definition and what the changes since the last commit did to it.
pub(crate) struct Staged {
    pub(crate) definition: Definition,
    pub(crate) deltas: Deltas,
    /// What was written early of a transaction that has not ended.
    pub(crate) large: Option<Large>,
    /// How the store's groups are written.
    form: Form,
    bound: Option<Binding>,
    scratch: Scratch,
}

/// The definition under the version of the table last seen.
struct Binding {
    schema: Arc<TableSchema>,
    bound: Bound,
    /// Whether an update or a delete tells all that the counter looks at.
    old_rows: Result<(), Box<Refusal>>,
}

/// A refusal that only a new log mends, for the old one has the change.
fn in_log(refusal: &Refusal, change: &Change<'_>) -> Refusal {
    let what = format!("{}; the log has such a change at offset {}", refusal.what, change.offset);
    Refusal::new(what, format!("{}; then {NEW_LOG}", refusal.remedy))
}

impl Staged {
    pub(crate) fn new(definition: Definition) -> Self {
        let (deltas, form, scratch) = (Deltas::default(), Form::default(), Scratch::default());
        Staged { definition, deltas, large: None, form, bound: None, scratch }
    }

    /// Forgets the changes.
    pub(crate) fn clear(&mut self) {
        self.deltas.clear();
        self.large = None;
    }

    /// From here on groups are written in this form: that of the store.
    pub(crate) fn write_in(&mut self, form: Form) {
        self.form = form;
        self.bound = None;
    }

    /// Whether the counter is about this table.
    pub(crate) fn wants(&self, schema: &TableSchema) -> bool {
        self.definition.table() == (schema.schema.as_str(), schema.table.as_str())
    }

    /// Adds the change to the deltas.
    pub(crate) fn apply(&mut self, change: &Change<'_>) -> Result<(), SinkError> {
        match change.event.op {
            Op::Message => return Ok(()),
            Op::Truncate => {
                self.deltas.truncate();
                return Ok(());
            }
            Op::Create | Op::Update | Op::Delete | Op::Read => {}
        }
        self.bind(change)?;
        self.check_old_row(change)?;
        if let (false, Some(Binding { bound, .. })) = (change.omitted.is_empty(), &self.bound) {
            change.demand(&format!("counters.{}", self.definition.name()), bound.recorded_columns())?;
        }
        let (before, after) = self.images(change)?;
        self.count(change, before, Sign::Minus)?;
        self.count(change, after, Sign::Plus)
    }

    fn bind(&mut self, change: &Change<'_>) -> Result<(), SinkError> {
        if self.bound.as_ref().is_some_and(|known| Arc::ptr_eq(&known.schema, change.schema)) {
            return Ok(());
        }
        let bound = self.definition.bind_new_rows(change.schema).map_err(|r| in_log(&r, change))?;
        let old_rows = self.definition.check_old_rows(change.schema).map_err(Box::new);
        let bound = bound.written_in(self.form.clone());
        self.bound = Some(Binding { schema: change.schema.clone(), bound, old_rows });
        Ok(())
    }

    /// A new row can be counted under any replica identity; one whose key changed may lack a value that only the old row
    /// had.
    fn check_old_row(&self, change: &Change<'_>) -> Result<(), SinkError> {
        let whole = matches!(change.event.op, Op::Create | Op::Read) && change.unchanged.is_empty();
        match &self.bound {
            Some(Binding { old_rows: Err(refusal), .. }) if !whole => Err(in_log(refusal, change).into()),
            _ => Ok(()),
        }
    }

    /// The rows that leave and enter the counter.
    ///
    /// Under a replica identity that is not FULL, `check_old_row` has made sure that the counter looks at nothing but the
    /// key, unless the row is new. An update, whose key stays, then changes nothing, whatever its images hold; and a new row whose
    /// key was not sent whole (unchanged TOAST in one of its columns) stands whole in the record's key.
    fn images<'a>(&self, change: &Change<'a>) -> Result<(Option<&'a str>, Option<&'a str>), SinkError> {
        let (before, after) = (change.event.before, change.event.after);
        let full = change.schema.identity == ReplicaIdentity::Full;
        let missing = |image: &str| self.poison(change, &format!("it has no {image} row"));
        match change.event.op {
            Op::Update if !full => Ok((None, None)),
            Op::Update | Op::Delete if before.is_none() => Err(self.no_old_row(change)),
            Op::Delete => Ok((before, None)),
            Op::Update => Ok((before, Some(after.ok_or_else(|| missing("new"))?))),
            _ if !change.unchanged.is_empty() && !full => {
                let key = std::str::from_utf8(change.key);
                Ok((None, Some(key.map_err(|e| self.poison(change, &format!("its key is not UTF-8: {e}")))?)))
            }
            _ => Ok((None, Some(after.ok_or_else(|| missing("new"))?))),
        }
    }

    fn count(&mut self, change: &Change<'_>, row: Option<&str>, sign: Sign) -> Result<(), SinkError> {
        let (Some(row), Some(Binding { bound, .. })) = (row, &self.bound) else { return Ok(()) };
        let added = match bound.contribution(row, &mut self.scratch) {
            Ok(Some(contribution)) => self.deltas.add(contribution, sign),
            Ok(None) => Some(()),
            Err(reason) => return Err(self.poison(change, &reason)),
        };
        added.ok_or_else(|| self.poison(change, "a sum of 128 bits overflows"))
    }

    /// A change of this counter's table that cannot be understood.
    fn poison(&self, change: &Change<'_>, reason: &str) -> SinkError {
        SinkError::Poison(format!(
            "counter `{}`: the change of {} at offset {} ({}) cannot be counted: {reason}",
            self.definition.name(),
            change.schema.full_name(),
            change.offset,
            change.position,
        ))
    }

    fn no_old_row(&self, change: &Change<'_>) -> SinkError {
        let table = change.schema.full_name();
        let what = format!(
            "counter `{}` needs the old row of a change of {table}, and the one at offset {} ({}) has none",
            self.definition.name(),
            change.offset,
            change.position,
        );
        let remedy = format!("{}; then {NEW_LOG}", change.schema.make_full(&display_table(change.schema)));
        SinkError::Refused(Refusal::new(what, remedy))
    }
}
