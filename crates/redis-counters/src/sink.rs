use std::time::{Duration, Instant};

use change::{NEW_LOG, Op, Refusal, TableSchema};
use worker::{Change, Checkpoint, Move, Sink, SinkError, StoreSpec, Stored};

use crate::bounds::Bounds;
use crate::commit::{Budget, CommitError, Moving, commit};
use crate::connection::Server;
use crate::keys::Namespace;
use crate::large::{Large, LargeError, take_back};
use crate::observation::{Held, Judgement, exists, judge};
use crate::shape::{Aggregate, Shape};
use crate::sql::{self, Definition, Form};
use crate::staged::Staged;
use crate::store::{Counter, Store};

/// A commit of so many groups or more means a backlog. A pause follows it of this many times its own duration, so that
/// many changes of a group become one.
const LARGE_COMMIT: usize = 200;
const PAUSE_PER_COMMIT: u32 = 9;
const LONGEST_PAUSE: Duration = Duration::from_millis(200);

/// Counters in Redis, as a sink of the worker.
///
/// Every counter has a checkpoint; those that move in one [`Sink::commit`] move in one script.
pub struct CountersSink {
    store: Store,
    bounds: Bounds,
    specs: Vec<StoreSpec>,
    /// What this sink keeps: the counters, or their copies.
    counters: Vec<Counter>,
    copies: Vec<Copy>,
    staged: Vec<Staged>,
    known: Vec<Known>,
    /// As of the last poll, microseconds since the epoch; when the last commit was, and the pause that follows it.
    now_us: i64,
    committed_us: i64,
    pause: Duration,
}

/// A counter's copy, and how it was last seen.
struct Copy {
    counter: Counter,
    seen: String,
}

/// What is known of a counter in Redis.
#[derive(Clone, Debug, Default)]
struct Known {
    /// How it was last seen or written; empty before the first load.
    seen: String,
    /// What it holds, if it is whole.
    held: Option<Held>,
    /// What a commit found wrong with its content, until it is filled again.
    damage: Option<String>,
    /// Where that was: until it is past this offset again, a second time is the log's fault...
    suspect: Option<i64>,
    /// ...which filling it again does not mend.
    refused: Option<Refusal>,
}

impl CountersSink {
    /// Counters of these definitions. Connects with the first [`Sink::load`].
    pub fn new(
        server: &Server,
        space: Namespace,
        bounds: Bounds,
        definitions: Vec<Definition>,
    ) -> Result<Self, Refusal> {
        space.distinct(definitions.iter().map(Definition::name))?;
        let counter = |definition: &Definition, keys, shown| Counter {
            name: definition.name().to_owned(),
            keys,
            shape: shape(definition),
            shown,
        };
        let counters = definitions.iter().map(|d| counter(d, space.counter(d.name()), true)).collect();
        let copy =
            |d: &Definition| Copy { counter: counter(d, space.copy(d.name()), false), seen: String::new() };
        let copies = definitions.iter().map(copy).collect();
        let specs = definitions.iter().map(|definition| StoreSpec {
            name: format!("counters.{}", definition.name()),
            definition: definition.hash(),
        });
        let specs: Vec<StoreSpec> = specs.collect();
        let known = vec![Known::default(); specs.len()];
        let staged = definitions.into_iter().map(Staged::new).collect();
        let store = Store::new(server, space)?;
        Ok(CountersSink {
            store,
            bounds,
            specs,
            counters,
            copies,
            staged,
            known,
            now_us: 0,
            committed_us: 0,
            pause: Duration::ZERO,
        })
    }

    /// The same, for the copies of these counters: what a builder fills.
    pub fn of_copies(
        server: &Server,
        space: Namespace,
        bounds: Bounds,
        definitions: Vec<Definition>,
    ) -> Result<Self, Refusal> {
        let mut sink = Self::new(server, space, bounds, definitions)?;
        sink.counters = sink.copies.iter().map(|copy| copy.counter.clone()).collect();
        Ok(sink)
    }

    /// Observes every counter, judges it, and claims those whose owner's entry is lost.
    fn observe(&mut self) -> Result<Vec<Judgement>, SinkError> {
        let counters: Vec<&Counter> = self.counters.iter().collect();
        let all = self.store.observe(&counters, true)?;
        let mut judgements = Vec::with_capacity(all.len());
        for (place, mut seen) in all.into_iter().enumerate() {
            let (counter, definition) = (&self.counters[place], &self.specs[place].definition);
            let judged = |text: &str, store: &Store| {
                judge(text, &counter.name, &store.space, counter.shape, definition)
            };
            let mut judgement = judged(&seen.text, &self.store);
            if judgement == Judgement::Torn {
                tracing::info!(counter = counter.name, "taking back a large commit that was interrupted");
                take_back(&mut self.store, counter, &seen.text)?;
                seen = self.store.observe(&[counter], true)?.remove(0);
                judgement = judged(&seen.text, &self.store);
            }
            let ours = !matches!(judgement, Judgement::Refused(_));
            judgements.push(judgement);
            if seen.leftover && ours {
                self.store.clear_staging(counter)?;
            }
            self.known[place].seen = seen.text;
        }
        Ok(judgements)
    }

    /// The whole staged memory: groups and bytes.
    fn size(&self) -> (usize, usize) {
        let deltas = || self.staged.iter().map(|staged| &staged.deltas);
        (deltas().map(|deltas| deltas.len()).sum(), deltas().map(|deltas| deltas.bytes()).sum())
    }

    /// Fields of Redis that what is staged changes, at most.
    fn fields(&self) -> usize {
        let fields = |(staged, counter): (&Staged, &Counter)| staged.deltas.len() * counter.shape.hashes();
        self.staged.iter().zip(&self.counters).map(fields).sum()
    }

    /// Writes what is staged of a transaction that has not ended, until no more is held than may be.
    fn relieve(&mut self, offset: i64) -> Result<(), SinkError> {
        loop {
            let (groups, bytes) = self.size();
            if groups <= self.bounds.held_groups && bytes <= self.bounds.held_bytes {
                return Ok(());
            }
            let grouped = |place: &usize| self.counters[*place].shape.grouped;
            let largest =
                (0..self.staged.len()).filter(grouped).max_by_key(|place| self.staged[*place].deltas.bytes());
            let Some(place) = largest else { return Ok(()) };
            self.write_early(place, offset)?;
        }
    }

    fn write_early(&mut self, place: usize, offset: i64) -> Result<(), SinkError> {
        let (counter, staged, known) =
            (&self.counters[place], &mut self.staged[place], &mut self.known[place]);
        let Some(held) = &known.held else {
            return Err(SinkError::Moved(format!("counter `{}` has not been loaded", counter.name)));
        };
        let mut large = match staged.large.take() {
            Some(large) => large,
            None => Large::begin(&mut self.store, counter, held, &staged.deltas)?,
        };
        let written = large.write(&mut self.store, counter, held, &staged.deltas);
        known.seen = large.expected(&self.store.space, counter, held);
        staged.deltas.clear();
        staged.large = Some(large);
        match written {
            Ok(()) => Ok(()),
            Err(LargeError::Sink(error)) => Err(error),
            Err(LargeError::Damaged(reason)) => Err(self.damaged(place, reason, offset + 1)),
        }
    }

    /// The table was emptied: what was written early is of rows that are gone.
    fn abandon(&mut self, place: usize) -> Result<(), SinkError> {
        let (counter, known) = (&self.counters[place], &mut self.known[place]);
        let (Some(large), Some(held)) = (self.staged[place].large.take(), &known.held) else { return Ok(()) };
        large.abandon(&mut self.store, counter, held)?;
        known.seen = held.expected(&self.store.space, counter.shape);
        Ok(())
    }

    /// Says that a counter's content is wrong: it is filled again, once.
    fn damaged(&mut self, place: usize, reason: String, offset: i64) -> SinkError {
        let name = &self.counters[place].name;
        let known = &mut self.known[place];
        let what = format!("counter `{name}`: {reason}");
        if known.suspect.is_some() && known.damage.is_none() {
            let what = format!("{what}, again after it was filled from the log's beginning");
            let remedy = format!("its table was changed in a way that no change in the log tells: {NEW_LOG}");
            known.refused = Some(Refusal::new(what.clone(), remedy));
            return SinkError::Moved(what);
        }
        known.damage = Some(reason);
        known.suspect = Some(offset);
        SinkError::Moved(what)
    }
}

/// How a store's groups are written. A store in a form that is not known has been judged to be of another definition.
fn form_of(checkpoint: &Checkpoint) -> Form {
    Form::read(&checkpoint.definition).unwrap_or_default()
}

fn shape(definition: &Definition) -> Shape {
    let aggregate = match definition.aggregate() {
        sql::Aggregate::CountRows => Aggregate::Rows,
        sql::Aggregate::Count { .. } => Aggregate::NonNull,
        sql::Aggregate::Sum { .. } => Aggregate::Sum,
    };
    Shape { aggregate, grouped: definition.grouped() }
}

impl Sink for CountersSink {
    fn stores(&self) -> &[StoreSpec] {
        &self.specs
    }

    fn wants(&self, store: usize, schema: &TableSchema) -> bool {
        self.staged[store].wants(schema)
    }

    fn describe(&mut self, table: &TableSchema) -> bool {
        let mut changed = false;
        for (staged, spec) in self.staged.iter().zip(&mut self.specs).filter(|(s, _)| s.wants(table)) {
            // What is refused is refused to the first change under this version.
            let Ok(bound) = staged.definition.bind_new_rows(table) else { continue };
            let definition = bound.stamp();
            changed |= spec.definition != definition;
            spec.definition = definition;
        }
        changed
    }

    fn load(&mut self) -> Result<Vec<Stored>, SinkError> {
        self.discard();
        let mut judgements = self.observe()?;
        let unclaimed = |judgement: &Judgement| matches!(judgement, Judgement::Unclaimed(_));
        if judgements.iter().any(unclaimed) {
            for (counter, _) in self.counters.iter().zip(&judgements).filter(|(_, j)| unclaimed(j)) {
                self.store.claim(counter)?;
            }
            judgements = self.observe()?;
        }
        let mut all = Vec::with_capacity(judgements.len());
        for ((known, staged), judgement) in self.known.iter_mut().zip(&mut self.staged).zip(judgements) {
            known.held = None;
            all.push(match judgement {
                Judgement::Empty => Stored::Empty,
                Judgement::Damaged(reason) => Stored::Damaged(reason),
                Judgement::Other(checkpoint) => Stored::At(checkpoint),
                Judgement::Refused(refusal) => Stored::Refused { refusal, at: None },
                Judgement::Unclaimed(_) => {
                    return Err(SinkError::Moved("a counter lost its owner while it was read".to_owned()));
                }
                Judgement::Torn => {
                    return Err(SinkError::Moved("another worker writes a counter's copy".to_owned()));
                }
                Judgement::At(_) if known.damage.is_some() => {
                    Stored::Damaged(known.damage.clone().unwrap_or_default())
                }
                Judgement::At(held) => {
                    staged.write_in(form_of(&held.checkpoint));
                    known.held = Some(held.clone());
                    let at = held.checkpoint;
                    match known.refused.clone() {
                        Some(refusal) => Stored::Refused { refusal, at: Some(at) },
                        None => Stored::At(at),
                    }
                }
            });
        }
        Ok(all)
    }

    fn reset(&mut self, store: usize, to: &Checkpoint) -> Result<(), SinkError> {
        if self.known[store].seen.is_empty() {
            self.load()?;
        }
        let (counter, known) = (&self.counters[store], &mut self.known[store]);
        let held = Held { checkpoint: to.clone(), groups: u64::from(!counter.shape.grouped) };
        self.staged[store].clear();
        self.staged[store].write_in(form_of(to));
        self.store.reset(counter, &known.seen, &held)?;
        let seen = held.expected(&self.store.space, counter.shape);
        *known = Known { seen, held: Some(held), suspect: known.suspect, ..Known::default() };
        Ok(())
    }

    fn apply(&mut self, store: usize, change: &Change<'_>) -> Result<(), SinkError> {
        if change.event.op == Op::Truncate {
            self.abandon(store)?;
        }
        let staged = &mut self.staged[store];
        staged.apply(change)?;
        // While every counter holds its part of what may be held, all do.
        let (groups, bytes) = (staged.deltas.len(), staged.deltas.bytes());
        let part = self.counters.len();
        if groups <= self.bounds.held_groups / part && bytes <= self.bounds.held_bytes / part {
            return Ok(());
        }
        self.relieve(change.offset)
    }

    fn due_in(&mut self, now_us: i64) -> Duration {
        self.now_us = now_us;
        let since = u64::try_from(now_us - self.committed_us).map_or(Duration::MAX, Duration::from_micros);
        self.pause.saturating_sub(since)
    }

    fn full(&self) -> bool {
        let (groups, bytes) = self.size();
        groups >= self.bounds.script_groups
            || bytes >= self.bounds.script_bytes
            || self.fields() >= self.store.writing.enough()
    }

    fn commit(&mut self, moves: &[Option<Move>]) -> Result<(), SinkError> {
        let mut moving = Vec::with_capacity(moves.len());
        let mut places = Vec::with_capacity(moves.len());
        let taken =
            |(staged, step): (&mut Staged, &Option<Move>)| step.as_ref().and_then(|_| staged.large.take());
        let larges: Vec<Option<Large>> = self.staged.iter_mut().zip(moves).map(taken).collect();
        for ((place, step), large) in moves.iter().enumerate().zip(larges) {
            let Some(step) = step else { continue };
            let counter = &self.counters[place];
            let held = self.known[place].held.as_ref().filter(|held| held.checkpoint == step.from);
            let Some(held) = held else {
                let (name, at) = (&counter.name, step.from.next_offset);
                return Err(SinkError::Moved(format!("counter `{name}` was not left at offset {at}")));
            };
            moving.push(Moving { counter, held, to: &step.to, deltas: &self.staged[place].deltas, large });
            places.push(place);
        }
        if moving.is_empty() {
            return Ok(());
        }
        let begun = Instant::now();
        // A batch is committed once it has reached the bounds, and what reached them may have brought much.
        let budget = Budget {
            groups: self.bounds.script_groups * 2,
            bytes: self.bounds.script_bytes * 2,
            fields: self.store.writing.most(),
        };
        match commit(&mut self.store, &mut moving, budget) {
            Ok(all) => {
                self.pause = match self.size().0 {
                    LARGE_COMMIT.. => (begun.elapsed() * PAUSE_PER_COMMIT).min(LONGEST_PAUSE),
                    _ => Duration::ZERO,
                };
                self.committed_us = self.now_us;
                for (place, held) in places.into_iter().zip(all) {
                    self.staged[place].deltas.clear();
                    self.known[place].seen = held.expected(&self.store.space, self.counters[place].shape);
                    let offset = held.checkpoint.next_offset;
                    self.known[place].suspect = self.known[place].suspect.filter(|suspect| offset < *suspect);
                    self.known[place].held = Some(held);
                }
                Ok(())
            }
            Err(CommitError::Sink(error)) => Err(error),
            Err(CommitError::Damaged(place, reason)) => {
                let offset = moving[place].to.next_offset;
                Err(self.damaged(places[place], reason, offset))
            }
        }
    }

    fn discard(&mut self) {
        self.staged.iter_mut().for_each(Staged::clear);
    }

    fn check(&mut self) -> Result<(), SinkError> {
        let counters: Vec<&Counter> = self.counters.iter().collect();
        let all = self.store.observe(&counters, false)?;
        for ((counter, known), seen) in self.counters.iter().zip(&self.known).zip(all) {
            // What does not follow the log may change as it likes.
            if known.held.is_some() && known.seen != seen.text {
                let seen = seen.text.replace('\n', " ");
                let what =
                    format!("counter `{}` was changed behind our back; Redis has: {seen}", counter.name);
                return Err(SinkError::Moved(what));
            }
        }
        Ok(())
    }

    fn copies(&mut self) -> Result<Vec<Option<Stored>>, SinkError> {
        let counters: Vec<&Counter> = self.copies.iter().map(|copy| &copy.counter).collect();
        let all = self.store.observe(&counters, false)?;
        let mut found = Vec::with_capacity(all.len());
        for ((copy, spec), seen) in self.copies.iter_mut().zip(&self.specs).zip(all) {
            copy.seen = seen.text;
            if !exists(&copy.seen) {
                found.push(None);
                continue;
            }
            let Counter { name, shape, .. } = &copy.counter;
            let judgement = judge(&copy.seen, name, &self.store.space, *shape, &spec.definition);
            found.push(Some(match judgement {
                Judgement::At(held) | Judgement::Unclaimed(held) => Stored::At(held.checkpoint),
                Judgement::Other(checkpoint) => Stored::At(checkpoint),
                Judgement::Damaged(reason) => Stored::Damaged(reason),
                Judgement::Empty => Stored::Empty,
                Judgement::Refused(refusal) => Stored::Refused { refusal, at: None },
                Judgement::Torn => Stored::Damaged("it is being written".to_owned()),
            }));
        }
        Ok(found)
    }

    fn rebuild(&mut self, store: usize, keep: bool) -> Result<bool, SinkError> {
        let (counter, copy, known) = (&self.counters[store], &self.copies[store], &mut self.known[store]);
        self.store.rebuild(counter, &copy.counter, &known.seen, keep)?;
        if !keep {
            // The copy is another content; a second damage at the same place is found there.
            *known = Known { suspect: known.suspect, ..Known::default() };
        }
        Ok(true)
    }

    fn swap(&mut self, store: usize) -> Result<bool, SinkError> {
        let (counter, copy) = (&self.counters[store], &self.copies[store]);
        self.store.swap(counter, &copy.counter, &copy.seen)
    }
}
