//! A store with two parts, each a table's rows with a checkpoint in the same atomic write, and a copy of each while one
//! is built.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use change::{Field, Op, TableSchema, fields};
use worker::{Change, Checkpoint, Move, Sink, SinkError, StoreSpec, Stored};

use super::broker::Former;
use super::history::TABLES;
use super::world::Faults;

/// One part's durable content.
#[derive(Clone, Debug, Default)]
pub(crate) struct Part {
    pub(crate) rows: BTreeMap<i64, String>,
    pub(crate) checkpoint: Option<Checkpoint>,
    /// What is to take its place.
    pub(crate) copy: Option<Box<Part>>,
    /// Set where some of what it holds is of records that the log has lost.
    pub(crate) former: Option<Rc<Former>>,
}

impl Part {
    /// The log is what it was up to `end` only.
    pub(crate) fn log_fell_back(&mut self, end: i64, former: &Rc<Former>) {
        if self.checkpoint.as_ref().is_some_and(|at| at.next_offset > end) {
            self.former.get_or_insert_with(|| former.clone());
        }
        if let Some(copy) = &mut self.copy {
            copy.log_fell_back(end, former);
        }
    }
}

/// The durable content.
pub(crate) type Parts = [Part; 2];

#[derive(Clone, Debug)]
enum Edit {
    Put(i64, String),
    /// Another column changed; there is none, so nothing.
    Keep(i64),
    /// The value of a row that moved here from another id in this transaction.
    Carry(i64, i64),
    Drop(i64),
    Clear,
}

/// A worker's access to it.
pub(crate) struct SimSink {
    parts: Rc<RefCell<Parts>>,
    faults: Faults,
    specs: Vec<StoreSpec>,
    /// Whether it is the builder's.
    of_copies: bool,
    staged: [Vec<Edit>; 2],
    /// The record that a part, by place, cannot take in.
    poison: Rc<Cell<Option<(usize, i64)>>>,
    /// Called with the content after each commit and each swap.
    observe: Rc<dyn Fn(&Parts)>,
}

impl SimSink {
    /// Over the parts, whose definitions are these.
    pub(crate) fn new(
        parts: Rc<RefCell<Parts>>,
        faults: Faults,
        definitions: [u32; 2],
        poison: Rc<Cell<Option<(usize, i64)>>>,
        observe: Rc<dyn Fn(&Parts)>,
    ) -> Self {
        let spec = |(table, definition): (&u32, u32)| StoreSpec {
            name: format!("sim.{table}"),
            definition: definition.to_string(),
        };
        let specs = TABLES.iter().zip(definitions).map(spec).collect();
        SimSink { parts, faults, specs, of_copies: false, staged: [Vec::new(), Vec::new()], poison, observe }
    }

    /// The same over the copies.
    pub(crate) fn of_copies(self) -> Self {
        SimSink { of_copies: true, ..self }
    }

    /// What this sink keeps, where it is there.
    fn kept<'p>(&self, part: &'p mut Part) -> Option<&'p mut Part> {
        if self.of_copies { part.copy.as_deref_mut() } else { Some(part) }
    }

    fn fail(&self) -> Result<(), SinkError> {
        if self.faults.strike() { Err(SinkError::Unavailable("simulated".into())) } else { Ok(()) }
    }
}

pub(crate) fn row(json: Option<&str>) -> (i64, String) {
    let mut out = Vec::new();
    fields(json.expect("an image"), &["id", "value"], &mut out).expect("a row");
    let id = match &out[0] {
        Field::Bare(id) => id.parse().expect("an integer"),
        Field::Text(id) => id.parse().expect("an integer"),
        other => panic!("not the row that was written: {other:?}"),
    };
    match &out[1] {
        Field::Text(value) => (id, value.to_string()),
        _ => (id, String::new()),
    }
}

pub(crate) fn id_of(key: &[u8]) -> i64 {
    let key: serde_json::Value = serde_json::from_slice(key).expect("a key");
    key["id"].as_str().expect("a numeric id").parse().expect("an integer")
}

impl Sink for SimSink {
    fn stores(&self) -> &[StoreSpec] {
        &self.specs
    }

    fn wants(&self, store: usize, table: &TableSchema) -> bool {
        TABLES[store] == table.relation
    }

    fn load(&mut self) -> Result<Vec<Stored>, SinkError> {
        self.fail()?;
        self.discard();
        let mut parts = self.parts.borrow_mut();
        let checkpoint = |part| self.kept(part).and_then(|part| part.checkpoint.clone());
        Ok(parts.iter_mut().map(|part| checkpoint(part).map_or(Stored::Empty, Stored::At)).collect())
    }

    fn reset(&mut self, store: usize, to: &Checkpoint) -> Result<(), SinkError> {
        self.fail()?;
        let empty = Part { checkpoint: Some(to.clone()), ..Part::default() };
        let part = &mut self.parts.borrow_mut()[store];
        if self.of_copies {
            part.copy = Some(Box::new(empty));
        } else {
            *part = empty;
        }
        self.fail()
    }

    fn apply(&mut self, store: usize, change: &Change<'_>) -> Result<(), SinkError> {
        self.fail()?;
        if self.poison.get() == Some((store, change.offset)) {
            return Err(SinkError::Poison("simulated".into()));
        }
        let event = &change.event;
        self.staged[store].push(match event.op {
            Op::Create | Op::Read | Op::Update => {
                let (id, value) = row(event.after);
                match (change.unchanged, change.previous_key) {
                    ([], _) => Edit::Put(id, value),
                    (_, []) => Edit::Keep(id),
                    (_, previous) => Edit::Carry(id_of(previous), id),
                }
            }
            Op::Delete => Edit::Drop(row(event.before).0),
            Op::Truncate => Edit::Clear,
            Op::Message => return Ok(()),
        });
        Ok(())
    }

    fn due_in(&mut self, _: i64) -> Duration {
        if self.faults.strike_often() { Duration::ZERO } else { Duration::from_micros(1) }
    }

    fn full(&self) -> bool {
        self.staged.iter().map(Vec::len).sum::<usize>() > 10
    }

    fn commit(&mut self, moves: &[Option<Move>]) -> Result<(), SinkError> {
        self.fail()?;
        let mut parts = self.parts.borrow_mut();
        for (part, step) in parts.iter_mut().zip(moves) {
            let at = self.kept(part).and_then(|part| part.checkpoint.clone());
            if step.as_ref().is_some_and(|step| at.as_ref() != Some(&step.from)) {
                return Err(SinkError::Moved("simulated: not where it was left".into()));
            }
        }
        let mut all_staged = std::mem::take(&mut self.staged);
        for ((part, step), staged) in parts.iter_mut().zip(moves).zip(&mut all_staged) {
            let Some(step) = step else {
                assert!(staged.is_empty(), "a store that stays has nothing staged");
                continue;
            };
            let part = self.kept(part).expect("it stands where the step begins");
            let moves = (step.from.next_offset, step.from.lsn) != (step.to.next_offset, step.to.lsn);
            let goes_on = moves || !staged.is_empty();
            assert!(part.former.is_none() || !goes_on, "continued in a log that it did not leave: {step:?}");
            let mut dropped = BTreeMap::new();
            for edit in staged.drain(..) {
                match edit {
                    Edit::Put(id, value) => drop(part.rows.insert(id, value)),
                    Edit::Keep(id) => assert!(part.rows.contains_key(&id), "a row without a birth"),
                    Edit::Carry(old, new) => {
                        let value: &String = dropped.get(&old).expect("the row that moved was there");
                        drop(part.rows.insert(new, value.clone()));
                    }
                    Edit::Drop(id) => drop(part.rows.remove(&id).map(|value| dropped.insert(id, value))),
                    Edit::Clear => part.rows.clear(),
                }
            }
            part.checkpoint = Some(step.to.clone());
        }
        (self.observe)(&parts);
        drop(parts);
        // It took effect, and the worker does not learn of it.
        self.fail()
    }

    fn discard(&mut self) {
        self.staged.iter_mut().for_each(Vec::clear);
    }

    fn check(&mut self) -> Result<(), SinkError> {
        self.fail()
    }

    fn copies(&mut self) -> Result<Vec<Option<Stored>>, SinkError> {
        self.fail()?;
        let stored = |part: &Part| part.checkpoint.clone().map_or(Stored::Empty, Stored::At);
        Ok(self.parts.borrow().iter().map(|part| part.copy.as_deref().map(stored)).collect())
    }

    fn rebuild(&mut self, store: usize, keep: bool) -> Result<bool, SinkError> {
        self.fail()?;
        let part = &mut self.parts.borrow_mut()[store];
        part.copy.get_or_insert_default();
        if !keep {
            (part.rows, part.checkpoint, part.former) = Default::default();
        }
        self.fail()?;
        Ok(true)
    }

    fn swap(&mut self, store: usize) -> Result<bool, SinkError> {
        self.fail()?;
        let mut parts = self.parts.borrow_mut();
        let part = &mut parts[store];
        let copy = part.copy.as_ref().and_then(|copy| copy.checkpoint.as_ref());
        let (Some(copy), shown) = (copy, &part.checkpoint) else {
            return Err(SinkError::Moved("simulated: the copy is gone".into()));
        };
        if shown.as_ref().is_some_and(|shown| !copy.reaches(shown)) {
            return Ok(false);
        }
        assert!(copy.ready, "what has not caught up is not shown");
        if let Some(copy) = part.copy.take() {
            *part = *copy;
        }
        (self.observe)(&parts);
        drop(parts);
        self.fail()?;
        Ok(true)
    }
}
