//! Where the stores stand: read, decided, and made so, before the log is read.

use std::time::Duration;

use change::{Lsn, Refusal};
use tracing::{info, warn};

use crate::continuity::{Continuity, Mismatch};
use crate::run::{Failure, Member, Role, Worker, WorkerError, elapsed};
use crate::start::{Shown, Start, check_group, decide, decide_copy};
use crate::stops::{Stop, move_alone};
use crate::{Checkpoint, Feed, LogState, Sink, SinkError, StoreSpec, Stored};

/// A record that the ledger does not know is missing if it does not come within this time. The ledger may be late behind
/// the log, by as long as the brokers take to end a transaction in both.
const MISSING_AFTER: Duration = Duration::from_secs(10);

/// The part of one idle poll that counts as waiting. A process that was frozen has not waited meanwhile: what came in
/// that time may not be here yet.
const IDLE_STEP: Duration = Duration::from_secs(1);

/// A log that ends before a store for longer than this has lost records. A broker that was cut off from the others, and
/// that clients still reach, has an old end until they find the new leader.
const BEYOND_AFTER: Duration = Duration::from_secs(10);

/// What the stores were when the log first seemed not to be theirs.
#[derive(Debug)]
pub(crate) struct Doubt {
    stored: Vec<Stored>,
    since_us: i64,
}

/// A store that the log does not continue, although it has the id in the store's checkpoint.
#[derive(Clone, Debug)]
pub(crate) struct Replaced {
    at: Checkpoint,
    reason: String,
}

impl Worker<'_> {
    /// Reads where the stores, or their copies, stand, and seeks to the record that was applied last to the hindmost.
    pub(crate) fn position(&mut self, feed: &mut dyn Feed, sink: &mut dyn Sink) -> Result<(), Failure> {
        let log = feed.log()?;
        for (version, table) in feed.tables() {
            if self.described.insert(version) {
                sink.describe(&table);
            }
        }
        self.frozen = vec![None; sink.stores().len()];
        self.stores = match self.role {
            Role::Worker => self.find_stores(&log, sink)?,
            Role::Builder => self.find_copies(&log, sink)?,
        };
        self.continuity = Continuity::of(&self.stores, log.start);
        self.idle = (Duration::ZERO, self.clock.now_us());
        self.doubt = None;
        self.held = vec![None; self.stores.len()];
        self.given = false;
        let hindmost = self.stores.iter().flatten().min_by_key(|at| at.next_offset);
        let at = hindmost.map(|at| (at.next_offset, at.lsn));
        self.applied = hindmost.and_then(Checkpoint::last_record);
        (self.next_offset, self.lsn) = at.unwrap_or((log.end, Lsn::ZERO));
        self.open = None;
        self.last = None;
        self.ready_at = None;
        self.restarted = None;
        // With no store to keep there is nothing to read.
        if at.is_some() {
            feed.seek(self.continuity.from(self.next_offset))?;
        }
        // Answers a reset: what follows from it is recorded in the stores by now.
        feed.commit(at.map_or(log.start, |(offset, _)| offset))?;
        self.end_without_stores(sink)?;
        self.member = Member::Positioned;
        match (self.role, at) {
            (Role::Builder, None) => self.done = true,
            (_, None) if self.done => info!("the stores have gone over to the next log"),
            (Role::Worker, None) => info!("no store follows the log until it has been built"),
            (_, Some((offset, lsn))) => info!(offset, %lsn, "reading the log"),
        }
        self.control.moved(&self.stores);
        if let (Role::Worker, Some(handover)) = (self.role, self.control.handover()) {
            let lacks = |place: usize| self.stores[place].is_none() && self.stops.get(place).is_none();
            handover.positioned(&self.stores, (0..self.stores.len()).any(lacks));
        }
        Ok(())
    }

    /// Swaps in the copies that were given, and has built what must be: beside the store, or in its place.
    fn find_stores(
        &mut self,
        log: &LogState,
        sink: &mut dyn Sink,
    ) -> Result<Vec<Option<Checkpoint>>, Failure> {
        check_group(log).map_err(WorkerError::Refused)?;
        self.swap_given(sink).map_err(unlocated)?;
        let stored = sink.load().map_err(unlocated)?;
        let copies = sink.copies().map_err(unlocated)?;
        let specs = sink.stores().to_vec();
        let start_of = |(place, spec): (usize, &StoreSpec)| {
            decide(spec, &stored[place], log, self.why_replaced(place, &stored[place]))
        };
        let starts: Vec<Result<Start, Refusal>> = specs.iter().enumerate().map(start_of).collect();
        self.confirm(&stored, log, &starts)?;
        let starts: Result<Vec<Start>, SinkError> = (starts.into_iter().enumerate())
            .map(|(place, start)| self.or_stopped(sink, place, &stored[place], start, log))
            .collect();
        let starts = starts.map_err(unlocated)?;
        let mut stores = Vec::with_capacity(specs.len());
        // Those that are still to be built are built from that log, wherever this worker is.
        let follows = |start: &Start| matches!(start, Start::Continue(_) | Start::Succeed(_));
        self.done = starts.contains(&Start::Left) && !starts.iter().any(follows);
        for (place, start) in starts.into_iter().enumerate() {
            let (beginning, reason, shown) = match start {
                Start::Fill { beginning, reason, shown } => (beginning, reason, shown),
                Start::Continue(checkpoint) => {
                    stores.push(Some(checkpoint));
                    continue;
                }
                Start::Succeed(checkpoint) => {
                    // A sink without copies goes over when its log is not the current one any more.
                    sink.rebuild(place, true).map_err(unlocated)?;
                    stores.push(Some(checkpoint));
                    continue;
                }
                Start::Left => {
                    stores.push(None);
                    continue;
                }
                Start::Stopped(at) => {
                    self.frozen[place] = at;
                    stores.push(None);
                    continue;
                }
            };
            let store = &specs[place].name;
            if copies[place].is_none() {
                warn!(store, reason, "filling from the log's beginning");
            }
            // Recorded before the group's offset, which may be what asks for it, is overwritten (h43).
            stores.push(if sink.rebuild(place, shown != Shown::Nothing).map_err(unlocated)? {
                self.control.reached("rebuild.requested");
                match shown {
                    Shown::Current(checkpoint) => Some(checkpoint),
                    Shown::Frozen(checkpoint) => {
                        let shown = freeze(place, checkpoint, &specs, log, sink).map_err(unlocated)?;
                        self.frozen[place] = Some(shown);
                        None
                    }
                    Shown::Stopped(checkpoint) => {
                        self.frozen[place] = Some(checkpoint);
                        None
                    }
                    Shown::Nothing => None,
                }
            } else if log.next.is_some() {
                // It keeps no copies: it is built when the next log is the current one, and not from this one before.
                if shown == Shown::Nothing && stored[place] != Stored::At(beginning.clone()) {
                    sink.reset(place, &beginning).map_err(unlocated)?;
                }
                None
            } else {
                sink.reset(place, &beginning).map_err(unlocated)?;
                Some(beginning)
            });
        }
        Ok(stores)
    }

    /// The copies that are to be built, and where each stands.
    fn find_copies(
        &mut self,
        log: &LogState,
        sink: &mut dyn Sink,
    ) -> Result<Vec<Option<Checkpoint>>, Failure> {
        let wanted = sink.copies().map_err(unlocated)?;
        let stored = sink.load().map_err(unlocated)?;
        self.confirm(&stored, log, &[])?;
        let specs = sink.stores().to_vec();
        let mut stores = Vec::with_capacity(specs.len());
        for (place, spec) in specs.iter().enumerate() {
            if wanted[place].is_none() {
                stores.push(None);
                continue;
            }
            if let Stored::Refused { refusal, .. } = &stored[place] {
                self.stops.set(place, Stop::as_it_is(&stored[place], refusal.clone()));
            }
            if self.stops.reread(place, &stored[place]).is_some() {
                stores.push(None);
                continue;
            }
            let replaced = self.why_replaced(place, &stored[place]);
            let decided = decide_copy(spec, &stored[place], log, replaced);
            let (at, begins) = decided.map_err(WorkerError::Refused)?;
            let (store, generation, offset) = (&spec.name, log.generation, at.next_offset);
            match begins {
                None => info!(store, generation, offset, "the build goes on"),
                Some(reason) => {
                    info!(store, generation, reason, "the build begins");
                    sink.reset(place, &at).map_err(unlocated)?;
                    self.control.reached("rebuild.begun");
                }
            }
            stores.push(Some(at));
        }
        Ok(stores)
    }

    /// Has log and stores read again before a store is refused, or is taken to be ahead of the log.
    ///
    /// The log was read before the stores. If this process was frozen in between, another worker has moved the stores to
    /// places that this log did not have. If the second look finds the stores where the first one did, the log that was
    /// read between the two is the one that they belong to.
    fn confirm(
        &mut self,
        stored: &[Stored],
        log: &LogState,
        starts: &[Result<Start, Refusal>],
    ) -> Result<(), Failure> {
        // What has stopped was confirmed before.
        let goes_on = |place: &usize| self.stops.get(*place).is_none();
        let places: Vec<usize> = (0..stored.len()).filter(goes_on).collect();
        let ahead = places.iter().any(|place| is_ahead(&stored[*place], log));
        let refusal = places.iter().find_map(|place| starts.get(*place)?.as_ref().err());
        if refusal.is_none() && !ahead {
            return Ok(());
        }
        let now = self.clock.now_us();
        let first = self.doubt.as_ref().filter(|doubt| doubt.stored == stored).map(|doubt| doubt.since_us);
        if first.is_some_and(|since| !ahead || elapsed(since, now) >= BEYOND_AFTER) {
            return Ok(());
        }
        if first.is_none() {
            self.doubt = Some(Doubt { stored: stored.to_vec(), since_us: now });
        }
        Err(Failure::Again(match refusal {
            Some(refusal) if !ahead => refusal.what.clone(),
            _ => format!("a store is further than offset {}, where the log ended when it was read", log.end),
        }))
    }

    /// Remembers that the log does not go on from where a store was left, and has the stores read again: that decides
    /// what becomes of it.
    pub(crate) fn left_behind(&mut self, mismatch: &Mismatch) -> Failure {
        let (place, reason) = (mismatch.store, mismatch.to_string());
        self.replaced.resize(self.stores.len().max(self.replaced.len()), None);
        self.replaced[place] = self.stores[place].clone().map(|at| Replaced { at, reason: reason.clone() });
        Failure::Again(reason)
    }

    /// On an idle log: gives up waiting for a record that a store was left at and that the log does not hold.
    pub(crate) fn miss_last_records(&mut self, feed: &mut dyn Feed) -> Result<(), Failure> {
        if !self.continuity.waits() {
            return Ok(());
        }
        let now = self.clock.now_us();
        let (waited, since) = self.idle;
        self.idle = (waited + elapsed(since, now).min(IDLE_STEP), now);
        if self.idle.0 < MISSING_AFTER {
            return Ok(());
        }
        let log_end = feed.progress()?.map(|progress| progress.log_end);
        let missing = log_end.and_then(|log_end| self.continuity.missing(log_end));
        missing.map_or(Ok(()), |mismatch| Err(self.left_behind(&mismatch)))
    }

    /// Why the log is known not to continue a store that is where it was when that was found out.
    fn why_replaced(&self, place: usize, stored: &Stored) -> Option<&str> {
        let replaced = self.replaced.get(place)?.as_ref()?;
        (*stored == Stored::At(replaced.at.clone())).then_some(replaced.reason.as_str())
    }

    fn swap_given(&self, sink: &mut dyn Sink) -> Result<(), SinkError> {
        let given = self.control.handover().map(|handover| handover.given()).unwrap_or_default();
        if given.is_empty() {
            return Ok(());
        }
        let copies = sink.copies()?;
        for place in given {
            let spec = sink.stores()[place].clone();
            let Some(Stored::At(copy)) = &copies[place] else { continue };
            // A copy of another form is better than none, and the next one is asked for when it is loaded.
            if !copy.ready || !copy.is_of(&spec.definition) {
                continue;
            }
            let (store, offset, lsn) = (spec.name, copy.next_offset, copy.lsn);
            if sink.swap(place)? {
                self.control.reached("rebuild.swapped");
                info!(store, offset, %lsn, "the store that was built has taken the place of the one shown");
            } else {
                warn!(store, offset, %lsn, "the store that was built is behind the one shown: it goes on");
            }
        }
        Ok(())
    }
}

/// True if the store was built from more of this very log than the log is said to have.
fn is_ahead(store: &Stored, log: &LogState) -> bool {
    match store {
        Stored::At(at) => (&at.log, at.generation) == (&log.id, log.generation) && at.next_offset > log.end,
        Stored::Empty | Stored::Damaged(_) | Stored::Refused { .. } => false,
    }
}

/// What goes on being shown of a store that does not follow the log. If the log has the id in the store's checkpoint,
/// but cannot continue it, the checkpoint is changed to say so: the copy that is to take the store's place could
/// never come to an offset that the log may not have.
fn freeze(
    place: usize,
    from: Checkpoint,
    specs: &[StoreSpec],
    log: &LogState,
    sink: &mut dyn Sink,
) -> Result<Checkpoint, SinkError> {
    let same_log = (&from.log, from.generation) == (&log.id, log.generation);
    if !same_log || !from.is_of(&specs[place].definition) {
        return Ok(from);
    }
    let to = from.replaced();
    move_alone(sink, place, from, &to)?;
    Ok(to)
}

/// No record is at fault.
fn unlocated(error: SinkError) -> Failure {
    Failure::of_sink(error, -1)
}
