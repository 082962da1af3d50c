//! A store with two parts, each a table's rows with a checkpoint in the same atomic write.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use change::{Field, Op, TableSchema, fields};
use worker::{Change, Checkpoint, Move, Sink, SinkError, StoreSpec, Stored};

use super::history::TABLES;
use super::world::Faults;

/// One part's durable content.
#[derive(Clone, Debug, Default)]
pub(crate) struct Part {
    pub(crate) rows: BTreeMap<i64, String>,
    pub(crate) checkpoint: Option<Checkpoint>,
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
    staged: [Vec<Edit>; 2],
    /// Called with the content after each commit.
    observe: Rc<dyn Fn(&Parts)>,
}

impl SimSink {
    pub(crate) fn new(parts: Rc<RefCell<Parts>>, faults: Faults, observe: Rc<dyn Fn(&Parts)>) -> Self {
        let spec = |table: &u32| StoreSpec { name: format!("sim.{table}"), definition: "1".into() };
        let specs = TABLES.iter().map(spec).collect();
        SimSink { parts, faults, specs, staged: [Vec::new(), Vec::new()], observe }
    }

    fn fail(&self) -> Result<(), SinkError> {
        if self.faults.strike() { Err(SinkError::Unavailable("simulated".into())) } else { Ok(()) }
    }
}

pub(crate) fn row(json: Option<&serde_json::value::RawValue>) -> (i64, String) {
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

    fn wants(&self, _: &TableSchema) -> bool {
        true
    }

    fn load(&mut self) -> Result<Vec<Stored>, SinkError> {
        self.fail()?;
        self.discard();
        let stored = |part: &Part| part.checkpoint.clone().map_or(Stored::Empty, Stored::At);
        Ok(self.parts.borrow().iter().map(stored).collect())
    }

    fn reset(&mut self, store: usize, to: &Checkpoint) -> Result<(), SinkError> {
        self.fail()?;
        self.parts.borrow_mut()[store] = Part { rows: BTreeMap::new(), checkpoint: Some(to.clone()) };
        self.fail()
    }

    fn apply(&mut self, live: &[bool], change: &Change<'_>) -> Result<(), SinkError> {
        self.fail()?;
        let store = TABLES.iter().position(|table| *table == change.schema.relation).expect("a known table");
        if !live[store] {
            return Ok(());
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

    fn due(&mut self, _: i64) -> bool {
        self.faults.strike_often()
    }

    fn full(&self) -> bool {
        self.staged.iter().map(Vec::len).sum::<usize>() > 10
    }

    fn commit(&mut self, moves: &[Option<Move>]) -> Result<(), SinkError> {
        self.fail()?;
        let mut parts = self.parts.borrow_mut();
        for (part, step) in parts.iter().zip(moves) {
            if step.as_ref().is_some_and(|step| part.checkpoint.as_ref() != Some(&step.from)) {
                return Err(SinkError::Moved("simulated: not where it was left".into()));
            }
        }
        for ((part, step), staged) in parts.iter_mut().zip(moves).zip(&mut self.staged) {
            let Some(step) = step else {
                assert!(staged.is_empty(), "a store that stays has nothing staged");
                continue;
            };
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
}
