//! What the worker and the builder of one process tell each other.
//!
//! A store changes hands in four steps, so that it never stands still for longer than the copy is behind it:
//!
//! 1. The copy has caught up, and come to where the store was when that was first seen: only a copy that goes on will come
//!    to where the store is held. The builder asks the worker to hold it.
//! 2. The worker commits, leaves the store where it is, and says where that is.
//! 3. The builder brings the copy there or past it, lets go of it, and gives it.
//! 4. The worker swaps, between two turns of its own, and reads where its stores stand.
//!
//! Nothing here is needed for safety: the store itself compares the two checkpoints in the atomic step that swaps.
//! A worker that reads its stores again for another reason forgets what was asked, and the builder asks again.

use std::sync::{Mutex, MutexGuard, PoisonError};

use change::Lsn;

use crate::Checkpoint;

/// See the module. One for a worker and its builder, which run on threads of their own.
#[derive(Debug)]
pub struct Handover(Mutex<State>);

#[derive(Debug)]
struct State {
    /// Whether the log is this worker's, and it has looked at its stores.
    positioned: bool,
    /// Whether a store that shows nothing, or something that does not follow the log, waits for its copy.
    lacking: bool,
    /// Whether a store does follow the log.
    keeps: bool,
    /// Whether the worker is to look at its stores again.
    recalled: bool,
    /// How far the stores that follow the log are.
    shown: Vec<Option<Lsn>>,
    stores: Vec<Step>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Step {
    None,
    /// The copy is to come here first.
    Sighted(Lsn),
    Asked,
    Held(Option<Checkpoint>),
    Given,
}

impl Handover {
    /// For so many stores.
    pub fn new(stores: usize) -> Self {
        let (stores, shown) = (vec![Step::None; stores], vec![None; stores]);
        Handover(Mutex::new(State {
            positioned: false,
            lacking: false,
            keeps: false,
            recalled: false,
            shown,
            stores,
        }))
    }

    /// Whether a builder may write: only beside a worker that has the log, or two would build.
    pub fn may_build(&self) -> bool {
        self.state().positioned
    }

    /// Whether a store waits for its copy.
    pub fn lacking(&self) -> bool {
        self.state().lacking
    }

    /// Whether any store follows the log, whatever becomes of the copies.
    pub fn keeps(&self) -> bool {
        self.state().keeps
    }

    /// Whether a store is about to change hands: who has its part in that does not sleep for long.
    pub(crate) fn under_way(&self) -> bool {
        let asked = |step: &Step| matches!(step, Step::Asked | Step::Held(_) | Step::Given);
        self.state().stores.iter().any(asked)
    }

    /// Nothing is being built: the worker looks again at stores that wait for that, and lets go of those it holds.
    pub fn builder_left(&self) {
        let mut state = self.state();
        state.recalled |= state.lacking || state.stores.iter().any(|step| *step != Step::None);
    }

    /// The log has got a successor, or has it no more: the worker looks again at what becomes of its stores.
    pub fn recall(&self) {
        self.state().recalled = true;
    }

    /// The worker has read where its stores stand, and whether any that does not follow the log waits for its copy.
    pub(crate) fn positioned(&self, stores: &[Option<Checkpoint>], lacking: bool) {
        let mut state = self.state();
        state.stores.fill(Step::None);
        state.positioned = true;
        state.recalled = false;
        state.lacking = lacking;
        drop(state);
        self.moved(stores);
    }

    /// The worker's stores have come so far.
    pub(crate) fn moved(&self, stores: &[Option<Checkpoint>]) {
        let mut state = self.state();
        state.keeps = stores.iter().any(Option::is_some);
        state.shown = stores.iter().map(|store| store.as_ref().map(|at| at.lsn)).collect();
    }

    /// The worker does not know where its stores stand, or the log is another's.
    pub(crate) fn lost(&self) {
        let mut state = self.state();
        state.stores.fill(Step::None);
        state.positioned = false;
    }

    /// Whether the worker is to read where its stores stand.
    pub(crate) fn recalled(&self) -> bool {
        let state = self.state();
        state.recalled || state.stores.contains(&Step::Given)
    }

    /// The stores that the builder asks for.
    pub(crate) fn asked(&self) -> Vec<usize> {
        self.places(&Step::Asked)
    }

    /// The worker leaves this store here.
    pub(crate) fn held(&self, store: usize, at: Option<Checkpoint>) {
        self.state().stores[store] = Step::Held(at);
    }

    /// The stores whose copies are to take their place.
    pub(crate) fn given(&self) -> Vec<usize> {
        self.places(&Step::Given)
    }

    /// Asks for a store whose copy has come to `lsn`; says where it is held, once it is.
    pub(crate) fn ask(&self, store: usize, lsn: Lsn) -> Option<Option<Checkpoint>> {
        let mut state = self.state();
        let shown = state.shown[store];
        let step = &mut state.stores[store];
        match step {
            Step::Held(at) => return Some(at.clone()),
            Step::None => *step = shown.map_or(Step::Asked, Step::Sighted),
            Step::Sighted(sighted) if *sighted <= lsn => *step = Step::Asked,
            Step::Sighted(_) | Step::Asked | Step::Given => {}
        }
        None
    }

    /// Gives the copy of a store that is held; `false` when it no longer is.
    pub(crate) fn give(&self, store: usize) -> bool {
        let step = &mut self.state().stores[store];
        let held = matches!(step, Step::Held(_));
        if held {
            *step = Step::Given;
        }
        held
    }

    fn places(&self, wanted: &Step) -> Vec<usize> {
        let state = self.state();
        (0..state.stores.len()).filter(|store| state.stores[*store] == *wanted).collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Plain values, good whatever happened to who held them.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
