//! Where the stores stand: read, decided, and made so, before the log is read.

use change::{Lsn, Refusal};
use tracing::{info, warn};

use crate::run::{Failure, Member, Role, Worker, WorkerError};
use crate::start::{Shown, Start, decide, decide_copy};
use crate::{Checkpoint, Control, Feed, LogState, Sink, SinkError, Stored};

impl Worker<'_> {
    /// Reads where the stores, or their copies, stand, and seeks to the hindmost.
    pub(crate) fn position(&mut self, feed: &mut dyn Feed, sink: &mut dyn Sink) -> Result<(), Failure> {
        let log = feed.log()?;
        for (version, table) in feed.tables() {
            if self.described.insert(version) {
                sink.describe(&table);
            }
        }
        self.stores = match self.role {
            Role::Worker => self.find_stores(&log, sink)?,
            Role::Builder => find_copies(&log, sink, self.control)?,
        };
        self.held = vec![None; self.stores.len()];
        self.given = false;
        let hindmost = self.stores.iter().flatten().min_by_key(|at| at.next_offset);
        let at = hindmost.map(|at| (at.next_offset, at.lsn));
        (self.next_offset, self.lsn) = at.unwrap_or((log.end, Lsn::ZERO));
        self.open = None;
        self.last = None;
        self.ready_at = None;
        self.restarted = None;
        // With no store to keep there is nothing to read.
        if at.is_some() {
            feed.seek(self.next_offset)?;
        }
        // Answers a reset: what follows from it is recorded in the stores by now.
        feed.commit(at.map_or(log.start, |(offset, _)| offset))?;
        self.member = Member::Positioned;
        match (self.role, at) {
            (Role::Builder, None) => self.done = true,
            (_, None) if self.done => info!("the stores have gone over to the next log"),
            (_, None) => info!("no store follows the log until it has been built"),
            (_, Some((offset, lsn))) => info!(offset, %lsn, "reading the log"),
        }
        self.control.moved(&self.stores);
        if let (Role::Worker, Some(handover)) = (self.role, self.control.handover()) {
            handover.positioned(&self.stores);
        }
        Ok(())
    }

    /// Swaps in the copies that were given, and has built what must be: beside the store, or in its place.
    fn find_stores(
        &mut self,
        log: &LogState,
        sink: &mut dyn Sink,
    ) -> Result<Vec<Option<Checkpoint>>, Failure> {
        self.swap_given(sink).map_err(unlocated)?;
        let stored = sink.load().map_err(unlocated)?;
        let copies = sink.copies().map_err(unlocated)?;
        let specs = sink.stores().to_vec();
        self.frozen = vec![None; specs.len()];
        // All or none: what is refused for one store leaves the others as they are.
        let starts: Result<Vec<Start>, Refusal> =
            specs.iter().zip(&stored).map(|(spec, stored)| decide(spec, stored, log)).collect();
        let mut stores = Vec::with_capacity(specs.len());
        let starts = starts.map_err(WorkerError::Refused)?;
        // Those that are still to be built are built from that log, wherever this worker is.
        let follows = |start: &Start| matches!(start, Start::Continue(_) | Start::Succeed(_));
        self.done = starts.contains(&Start::Left) && !starts.iter().any(follows);
        for (place, start) in starts.into_iter().enumerate() {
            let (beginning, reason, shown) = match start {
                Start::Fill { beginning, reason, shown } => (beginning, reason, shown),
                Start::Continue(checkpoint) => {
                    if checkpoint.definition != specs[place].definition {
                        warn!(
                            store = specs[place].name,
                            "the store stays in the form that it has: {REMOVED}"
                        );
                    }
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

/// Why a store is not built again in another form.
const REMOVED: &str =
    "retention has removed the beginning of the log; a new log would have it (millrace generation)";

/// The copies that are to be built, and where each stands.
fn find_copies(
    log: &LogState,
    sink: &mut dyn Sink,
    control: &dyn Control,
) -> Result<Vec<Option<Checkpoint>>, Failure> {
    let wanted = sink.copies().map_err(unlocated)?;
    let stored = sink.load().map_err(unlocated)?;
    let specs = sink.stores().to_vec();
    let mut stores = Vec::with_capacity(specs.len());
    for (place, spec) in specs.iter().enumerate() {
        if wanted[place].is_none() {
            stores.push(None);
            continue;
        }
        let (at, begins) = decide_copy(spec, &stored[place], log).map_err(WorkerError::Refused)?;
        let (store, generation, offset) = (&spec.name, log.generation, at.next_offset);
        match begins {
            None => info!(store, generation, offset, "the build goes on"),
            Some(reason) => {
                info!(store, generation, reason, "the build begins");
                sink.reset(place, &at).map_err(unlocated)?;
                control.reached("rebuild.begun");
            }
        }
        stores.push(Some(at));
    }
    Ok(stores)
}

/// No record is at fault.
fn unlocated(error: SinkError) -> Failure {
    Failure::of_sink(error, -1)
}
