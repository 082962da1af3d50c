//! Stores that stop at a record which they cannot take in, while the others go on.
//!
//! When a store refuses a record, what was staged is forgotten and all stores are read again from their checkpoints. The
//! store then follows the log up to the unit (source transaction, message or round) that holds the record. There its
//! checkpoint is marked as not ready and as [stopped](crate::Checkpoint::stopped), and the store stays as it is, with what
//! it shows.
//!
//! The mark is for people. A start does not go by it: it tries again, for the Millrace that runs now may be able to take
//! the record in, or may have been told to leave it out. So a kill at any place here only repeats the attempt.

use change::Refusal;
use tracing::info;

use crate::run::{CHECK_INTERVAL, Failure, Member, Role, Unfit, Worker, elapsed};
use crate::start::{Shown, Start};
use crate::{Checkpoint, Feed, LogState, Move, Sink, SinkError, Stopped, Stored, WorkerError};

/// Why a store cannot take in a record.
#[derive(Clone, Debug)]
pub(crate) enum Cause {
    /// The record cannot be applied.
    Poison(String),
    /// Going on could be wrong.
    Refused(Refusal),
}

impl Cause {
    fn reason(&self) -> &str {
        match self {
            Cause::Poison(reason) => reason,
            Cause::Refused(refusal) => &refusal.what,
        }
    }
}

/// No unit of the log begins there.
const NO_UNIT: i64 = -1;

/// Where a store stops, and why.
#[derive(Clone, Debug)]
pub(crate) struct Stop {
    /// Offset of the first record of the unit that holds the record; [`NO_UNIT`] where no record is at fault.
    pub(crate) unit: i64,
    /// The record, or the one that the store would have gone on with.
    pub(crate) record: Unfit,
    pub(crate) cause: Cause,
    /// What the store holds, once it has stopped.
    at: Option<Stored>,
}

impl Stop {
    /// A store that will stop where this unit begins.
    pub(crate) fn before(unit: i64, record: Unfit, cause: Cause) -> Self {
        Stop { unit, record, cause, at: None }
    }

    /// A store that cannot be used as it stands.
    pub(crate) fn as_it_is(stored: &Stored, refusal: Refusal) -> Self {
        let offset = stands(stored).map_or(-1, |at| at.next_offset);
        let record = Unfit { offset, key: None };
        Stop { unit: NO_UNIT, record, cause: Cause::Refused(refusal), at: Some(stored.clone()) }
    }

    /// The same for whoever is told.
    pub(crate) fn error(&self) -> WorkerError {
        match &self.cause {
            Cause::Poison(reason) => {
                WorkerError::Poison { offset: self.record.offset, reason: reason.clone() }
            }
            Cause::Refused(refusal) => WorkerError::Refused(refusal.clone()),
        }
    }
}

/// The stops of a worker's stores, by place.
#[derive(Debug, Default)]
pub(crate) struct Stops {
    places: Vec<Option<Stop>>,
    /// Where the next store is to stop.
    next: Option<i64>,
}

impl Stops {
    /// The store at this place will stop, or has stopped.
    pub(crate) fn set(&mut self, place: usize, stop: Stop) {
        self.places.resize(self.places.len().max(place + 1), None);
        self.places[place] = Some(stop);
        self.look();
    }

    /// The store at this place goes on.
    pub(crate) fn clear(&mut self, place: usize) {
        if let Some(stop) = self.places.get_mut(place) {
            *stop = None;
            self.look();
        }
    }

    /// Whether a store is to stop before a unit that begins at this offset. Asked for every unit.
    pub(crate) fn any_due(&self, unit: i64) -> bool {
        self.next.is_some_and(|next| next <= unit)
    }

    /// The stores that are to stop before a unit that begins at this offset.
    fn due(&self, unit: i64) -> Vec<usize> {
        let due = |place: &usize| self.coming(*place).is_some_and(|stop| stop.unit <= unit);
        (0..self.places.len()).filter(due).collect()
    }

    /// The stop at this place, if the store is still to come there.
    fn coming(&self, place: usize) -> Option<&Stop> {
        self.places.get(place)?.as_ref().filter(|stop| stop.at.is_none())
    }

    fn is_empty(&self) -> bool {
        self.places.iter().all(Option::is_none)
    }

    /// The stop at this place, if the store has stopped.
    pub(crate) fn get(&self, place: usize) -> Option<&Stop> {
        self.places.get(place)?.as_ref().filter(|stop| stop.at.is_some())
    }

    /// The stop that a store may have come to before it was read again: forgotten unless the store is as it was left.
    pub(crate) fn reread(&mut self, place: usize, stored: &Stored) -> Option<&Stop> {
        let Some(Some(stop)) = self.places.get(place) else { return None };
        let keeps = match (&stop.at, stored) {
            (Some(at), stored) => at == stored,
            // It is still to come there.
            (None, Stored::At(at)) => at.next_offset <= stop.unit,
            (None, _) => false,
        };
        if !keeps {
            self.clear(place);
        }
        self.get(place)
    }

    /// Places of the stores that have stopped.
    pub(crate) fn all(&self) -> impl Iterator<Item = usize> {
        (0..self.places.len()).filter(|place| self.get(*place).is_some())
    }

    /// What a worker ends with whose stores have all stopped.
    pub(crate) fn first_error(&self) -> Option<WorkerError> {
        self.all().find_map(|place| self.get(place)).map(Stop::error)
    }

    fn look(&mut self) {
        let coming = self.places.iter().flatten().filter(|stop| stop.at.is_none());
        self.next = coming.map(|stop| stop.unit).min();
    }
}

impl Worker<'_> {
    /// A record that no Millrace wrote says nothing, and could be anything: every store stops at it until told to leave it
    /// out.
    pub(crate) fn take_foreign(&mut self, offset: i64) -> Result<(), Failure> {
        let reason = "it has no header `millrace.position`: it was not written by Millrace".to_owned();
        let unfit = Unfit { offset, key: None };
        self.cannot_take_in((0..self.stores.len()).collect(), &unfit, &Cause::Poison(reason))
    }

    /// Of a record that these stores cannot take in, as far as they follow the log here: each leaves it out, if told to, or
    /// stops before its unit. What is staged is forgotten, and the unit is read again.
    pub(crate) fn cannot_take_in(
        &mut self,
        stores: Vec<usize>,
        record: &Unfit,
        cause: &Cause,
    ) -> Result<(), Failure> {
        let (offset, reason) = (record.offset, cause.reason());
        let mut done = Vec::new();
        for store in stores {
            let left_out = self.skipped.get(&store).is_some_and(|skipped| skipped.contains(&offset));
            if left_out || !is_there(self.stores[store].as_ref(), self.held[store], offset) {
                continue;
            }
            if self.control.skip(store, record) {
                self.skipped.entry(store).or_default().insert(offset);
                done.push(format!("the record at offset {offset} is skipped, as told: {reason}"));
            } else {
                self.stops.set(store, Stop::before(self.unit, record.clone(), cause.clone()));
                done.push(format!("a store stops at the record at offset {offset}: {reason}"));
            }
        }
        done.pop().map_or(Ok(()), |what| Err(Failure::Again(what)))
    }

    /// Stops the stores that are to stop before the unit that begins at this offset, when all before it is in them.
    pub(crate) fn stop_before(
        &mut self,
        feed: &mut dyn Feed,
        sink: &mut dyn Sink,
        unit: i64,
    ) -> Result<(), Failure> {
        self.commit(feed, sink)?;
        for place in self.stops.due(unit) {
            self.stop(sink, place)?;
        }
        self.tell_moved();
        self.end_without_stores(sink)
    }

    fn stop(&mut self, sink: &mut dyn Sink, place: usize) -> Result<(), Failure> {
        let Some(stop) = self.stops.coming(place).cloned() else { return Ok(()) };
        let Some(from) = self.stores[place].clone() else {
            self.stops.clear(place);
            return Ok(());
        };
        let at = mark(sink, place, from, &stop).map_err(|error| Failure::of_sink(error, self.next_offset))?;
        self.stores[place] = None;
        self.frozen[place] = Some(at.clone());
        self.stops.set(place, Stop { at: Some(Stored::At(at)), ..stop });
        self.control.stopped(place, self.stops.get(place).map(Stop::error).as_ref());
        Ok(())
    }

    /// What becomes of a store for which this was decided: it may have stopped before, or stops now.
    pub(crate) fn or_stopped(
        &mut self,
        sink: &mut dyn Sink,
        place: usize,
        stored: &Stored,
        start: Result<Start, Refusal>,
        log: &LogState,
    ) -> Result<Start, SinkError> {
        let had_stopped = self.stops.get(place).is_some();
        let start = match start {
            Err(refusal) => {
                let mut stop = Stop::as_it_is(stored, refusal);
                let mut at = None;
                if let Some(from) = stands(stored) {
                    let marked = mark(sink, place, from.clone(), &stop)?;
                    stop.at = Some(Stored::At(marked.clone()));
                    at = Some(marked);
                }
                self.stops.set(place, stop);
                Start::Stopped(at)
            }
            Ok(start) => {
                let stops = self.stops.reread(place, stored).is_some();
                match start {
                    Start::Continue(at) if stops => Start::Stopped(Some(at)),
                    Start::Succeed(at) if stops => {
                        let beginning = Checkpoint::beginning(&log.id, log.generation, &at.definition);
                        let reason = "it has stopped, and there is a new log".to_owned();
                        Start::Fill { beginning, reason, shown: Shown::Stopped(at) }
                    }
                    Start::Fill { beginning, reason, shown: Shown::Current(at) } if stops => {
                        Start::Fill { beginning, reason, shown: Shown::Stopped(at) }
                    }
                    start => start,
                }
            }
        };
        if !matches!(start, Start::Stopped(_)) && had_stopped {
            // It goes on, or waits for its copy.
            self.stops.clear(place);
            self.control.stopped(place, None);
        } else if !had_stopped && let Some(stop) = self.stops.get(place) {
            self.control.stopped(place, Some(&stop.error()));
        }
        Ok(start)
    }

    /// Ends a worker whose stores have all stopped, unless it serves them, and a builder of which only such copies are left.
    pub(crate) fn end_without_stores(&self, sink: &dyn Sink) -> Result<(), Failure> {
        let left = match self.role {
            Role::Worker => sink.serves() || self.stops.all().count() < self.stores.len(),
            Role::Builder => self.stores.iter().any(Option::is_some),
        };
        match self.stops.first_error() {
            Some(error) if !left => Err(Failure::Final(error)),
            _ => Ok(()),
        }
    }

    /// Lets stores go on whose record is to be left out after all.
    pub(crate) fn go_on_if_told(&mut self, feed: &mut dyn Feed, sink: &mut dyn Sink) -> Result<(), Failure> {
        let now = self.clock.now_us();
        if self.stops.is_empty() || elapsed(self.asked_at, now) < CHECK_INTERVAL {
            return Ok(());
        }
        self.asked_at = now;
        let told = |place: &usize| {
            let stop = self.stops.get(*place).filter(|stop| stop.unit != NO_UNIT);
            stop.is_some_and(|stop| self.control.skip(*place, &stop.record))
        };
        let told: Vec<usize> = self.stops.all().filter(told).collect();
        if told.is_empty() {
            return Ok(());
        }
        self.commit(feed, sink)?;
        for place in told {
            info!(store = sink.stores()[place].name, "a store that had stopped goes on, as told");
            self.stops.clear(place);
            self.control.stopped(place, None);
        }
        self.member = Member::Assigned;
        Ok(())
    }
}

/// Whether the record at this offset is for a store: it follows the log there, and does not stand still for its copy.
pub(crate) fn is_there(at: Option<&Checkpoint>, held: Option<i64>, offset: i64) -> bool {
    held.is_none() && at.is_some_and(|at| offset >= at.next_offset)
}

/// The checkpoint of a store that has one that may be written.
fn stands(stored: &Stored) -> Option<&Checkpoint> {
    match stored {
        Stored::At(at) | Stored::Refused { at: Some(at), .. } => Some(at),
        Stored::Empty | Stored::Damaged(_) | Stored::Refused { at: None, .. } => None,
    }
}

/// Marks the store's checkpoint: as not ready, and with why it has stopped.
fn mark(sink: &mut dyn Sink, place: usize, from: Checkpoint, stop: &Stop) -> Result<Checkpoint, SinkError> {
    let stopped = Some(Stopped::new(stop.record.offset, stop.cause.reason()));
    let to = Checkpoint { ready: false, stopped, ..from.clone() };
    if to != from {
        move_alone(sink, place, from, &to)?;
    }
    Ok(to)
}

/// Gives one store another checkpoint, with nothing staged.
pub(crate) fn move_alone(
    sink: &mut dyn Sink,
    place: usize,
    from: Checkpoint,
    to: &Checkpoint,
) -> Result<(), SinkError> {
    let mut moves = vec![None; sink.stores().len()];
    moves[place] = Some(Move { from, to: to.clone() });
    sink.commit(&moves)
}
