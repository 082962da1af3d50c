use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use std::time::Duration;

use change::{Clock, Event, Kind, Lsn, Position, Refusal, SchemaRef, TableSchema};
use foldhash::{HashMap, HashMapExt as _};
use tracing::{info, warn};

use crate::continuity::Continuity;
use crate::position::{Doubt, Replaced};
use crate::stops::{Cause, Stops, is_there};
use crate::{
    Change, Checkpoint, Feed, FeedError, FeedEvent, Handover, LastRecord, LogBatch, LogRecord, Move, Sink,
    SinkError, StoreSpec,
};

/// Longest wait for the next record; bounds how long an orderly stop takes.
const POLL: Duration = Duration::from_millis(100);
/// The same while a store changes hands and stands still, which takes several turns of the worker and of the builder.
const HANDOVER_POLL: Duration = Duration::from_millis(10);
/// While idle, the stores are looked at this often.
pub(crate) const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// The consumer group's offset is committed at most this often.
const GROUP_INTERVAL: Duration = Duration::from_secs(1);
/// A store stands still for its copy for at most so long; a copy that goes on needs no more than a commit.
const HOLD_LIMIT: Duration = Duration::from_secs(60);
/// Waits between tries while a store is away: doubled from the first to the last.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

/// Why the worker ended.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The feed failed.
    #[error("log: {0}")]
    Feed(#[from] FeedError),
    /// A record that no store can take in; none after it was. [`Control::skip`] can leave it out.
    #[error("the record at offset {offset} of the log cannot be applied: {reason}")]
    Poison {
        /// Its offset.
        offset: i64,
        /// What is wrong with it.
        reason: String,
    },
    /// Going on could be wrong.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// A record that a store cannot take in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unfit {
    /// Its offset.
    pub offset: i64,
    /// The row's key, as [`TableSchema::key_text`] writes it; `None` where it is not known.
    pub key: Option<String>,
}

/// What the worker is told and tells while it runs.
pub trait Control {
    /// Whether to end in order. Asked often.
    fn stop(&self) -> bool;

    /// Whether this record, which the store at this place of the sink's order cannot take in, is to be left out of the
    /// store. Its checkpoint records that for ever. Asked for again every second while the store is stopped.
    fn skip(&self, store: usize, record: &Unfit) -> bool {
        let _ = (store, record);
        false
    }

    /// The store has stopped, for this reason, or goes on. The other stores follow the log.
    fn stopped(&self, store: usize, why: Option<&WorkerError>) {
        let _ = (store, why);
    }

    /// The stores have come so far, in the sink's order; `None` for one that does not follow the log here.
    fn moved(&self, stores: &[Option<Checkpoint>]) {
        let _ = stores;
    }

    /// The stores cannot be written now; the worker tries again.
    fn delayed(&self, reason: &str) {
        let _ = reason;
    }

    /// A rebuild has come to one of [`STAGES`]; where tests end the process.
    fn reached(&self, stage: &str) {
        let _ = stage;
    }

    /// What the worker and its builder share; needed where the sink keeps copies.
    fn handover(&self) -> Option<&Handover> {
        None
    }
}

/// Where a crash would be in the middle of a rebuild, in the order in which it comes to them.
pub const STAGES: [&str; 5] =
    ["rebuild.requested", "rebuild.begun", "rebuild.caught_up", "rebuild.given", "rebuild.swapped"];

/// Runs the worker until it is told to stop or cannot go on, or all its stores have gone over to a later log.
///
/// After [`FeedError::Unavailable`] the caller drops the feed, waits, and calls again with a new one.
pub fn run(
    feed: &mut dyn Feed,
    sink: &mut dyn Sink,
    clock: &dyn Clock,
    control: &dyn Control,
) -> Result<(), WorkerError> {
    Worker::new(Role::Worker, clock, control).drive(feed, sink)
}

/// Builds the copies that are asked for, until all have been swapped in, or it is told to stop or cannot go on.
///
/// The feed belongs to no group, and the sink is the instance over the copies. Where a copy stands is in the copy:
/// whatever ends this, the next call goes on from there. To be called, and to go on, only while
/// [`Handover::may_build`]; and the worker takes the copies in only while it runs.
pub fn build(
    feed: &mut dyn Feed,
    copies: &mut dyn Sink,
    clock: &dyn Clock,
    control: &dyn Control,
) -> Result<(), WorkerError> {
    Worker::new(Role::Builder, clock, control).drive(feed, copies)
}

/// What the loop keeps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// The stores that readers see.
    Worker,
    /// Their copies, until they take the stores' places.
    Builder,
}

/// Whether the log is ours, and whether the feed stands where the stores do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Member {
    /// Another instance has the log.
    Waiting,
    /// The log is ours; where the stores stand is to be read.
    Assigned,
    /// Records that come continue the stores.
    Positioned,
}

/// Sorts errors by what follows from them.
pub(crate) enum Failure {
    /// Read the checkpoints and go on from there.
    Again(String),
    /// End.
    Final(WorkerError),
}

impl From<WorkerError> for Failure {
    fn from(error: WorkerError) -> Self {
        Failure::Final(error)
    }
}

impl From<FeedError> for Failure {
    fn from(error: FeedError) -> Self {
        Failure::Final(match error {
            FeedError::Refused(refusal) => WorkerError::Refused(refusal),
            error => WorkerError::Feed(error),
        })
    }
}

impl Failure {
    pub(crate) fn of_sink(error: SinkError, offset: i64) -> Self {
        match error {
            SinkError::Unavailable(reason) | SinkError::Moved(reason) => Failure::Again(reason),
            SinkError::Poison(reason) => Failure::Final(WorkerError::Poison { offset, reason }),
            SinkError::Refused(refusal) => Failure::Final(WorkerError::Refused(refusal)),
        }
    }
}

/// What is remembered of one version of a table.
struct Table {
    schema: Arc<TableSchema>,
    /// Places of the stores that derive from it.
    wanted: Vec<usize>,
}

/// The loop of [`run`] or [`build`], for a caller that takes its steps one by one, as the simulator does.
pub struct Worker<'a> {
    pub(crate) role: Role,
    pub(crate) clock: &'a dyn Clock,
    pub(crate) control: &'a dyn Control,
    pub(crate) member: Member,
    /// What each store durably holds; `None` for one that is left as it is.
    pub(crate) stores: Vec<Option<Checkpoint>>,
    /// Since when a store stands still, until its copy takes its place.
    pub(crate) held: Vec<Option<i64>>,
    /// What is shown of stores that do not follow the log.
    pub(crate) frozen: Vec<Option<Checkpoint>>,
    /// Whether a copy was given, and how that went is not known yet.
    pub(crate) given: bool,
    /// See [`done`](Self::done).
    pub(crate) done: bool,
    batch: LogBatch,
    tables: HashMap<SchemaRef, Table>,
    /// The versions of tables that the sink knows.
    pub(crate) described: HashSet<SchemaRef>,
    /// After the last whole unit that was taken: where a commit would put the stores.
    pub(crate) next_offset: i64,
    pub(crate) lsn: Lsn,
    /// The record before `next_offset`, if it is known.
    pub(crate) applied: Option<LastRecord>,
    /// Whether the log goes on from where each store was left.
    pub(crate) continuity: Continuity,
    /// Stores, by place, whose records the log does not hold any more.
    pub(crate) replaced: Vec<Option<Replaced>>,
    /// Stores that stop at a record, or have.
    pub(crate) stops: Stops,
    /// The unit of which a part was taken...
    pub(crate) open: Option<(Lsn, Kind)>,
    /// ...and the offset of its first record.
    pub(crate) unit: i64,
    /// The last change taken.
    pub(crate) last: Option<Position>,
    /// A store that is being filled is ready when it has come to this offset and this LSN. The offset alone would not do:
    /// rows that a snapshot read are newer than the LSN at which they stand in the log.
    pub(crate) ready_at: Option<(i64, Lsn)>,
    /// Offset of the last record of a table that is being read: until the ledger says that it has been, no store here is
    /// ready.
    pub(crate) restarted: Option<i64>,
    /// Records that a store, by place, could not take in and that are left out of it.
    pub(crate) skipped: BTreeMap<usize, BTreeSet<i64>>,
    /// When what is staged is to be committed.
    due_in: Duration,
    back_off: Duration,
    checked_at: i64,
    /// When it was asked whether stopped stores are to go on.
    pub(crate) asked_at: i64,
    /// How long the log has been idle since the stores' places were read, and until when that was measured.
    pub(crate) idle: (Duration, i64),
    /// A finding that ends the worker, or costs a store, if a second look confirms it.
    pub(crate) doubt: Option<Doubt>,
    group_at: i64,
}

impl<'a> Worker<'a> {
    /// A loop that has read nothing yet.
    pub fn new(role: Role, clock: &'a dyn Clock, control: &'a dyn Control) -> Self {
        Worker {
            role,
            clock,
            control,
            member: Member::Waiting,
            stores: Vec::new(),
            held: Vec::new(),
            frozen: Vec::new(),
            given: false,
            done: false,
            batch: LogBatch::default(),
            tables: HashMap::new(),
            described: HashSet::new(),
            next_offset: 0,
            lsn: Lsn::ZERO,
            applied: None,
            continuity: Continuity::default(),
            replaced: Vec::new(),
            stops: Stops::default(),
            open: None,
            unit: 0,
            last: None,
            ready_at: None,
            restarted: None,
            skipped: BTreeMap::new(),
            due_in: POLL,
            back_off: BACK_OFF.0,
            checked_at: clock.now_us(),
            asked_at: 0,
            idle: (Duration::ZERO, 0),
            doubt: None,
            group_at: 0,
        }
    }

    fn drive(mut self, feed: &mut dyn Feed, sink: &mut dyn Sink) -> Result<(), WorkerError> {
        sink.discard();
        while !self.control.stop() && !self.done() {
            self.step(feed, sink)?;
        }
        self.finish(feed, sink)
    }

    /// One poll and what follows from it. After an error nothing but a drop.
    pub fn step(&mut self, feed: &mut dyn Feed, sink: &mut dyn Sink) -> Result<(), WorkerError> {
        let mut batch = std::mem::take(&mut self.batch);
        match feed.poll(self.patience(), &mut batch)? {
            FeedEvent::Assigned => self.member = Member::Assigned,
            FeedEvent::Revoked => self.revoked(sink),
            FeedEvent::Records | FeedEvent::Idle => {}
        }
        let turned = self.turn(feed, sink, &batch);
        self.batch = batch;
        match turned {
            Ok(()) => Ok(()),
            Err(Failure::Final(error)) => Err(error),
            Err(Failure::Again(reason)) => {
                self.again(sink, &reason);
                Ok(())
            }
        }
    }

    /// Whether a builder has nothing left to build, or a worker's stores have all gone over to a later log.
    pub fn done(&self) -> bool {
        self.done
    }

    /// Not for long while a commit waits for its time, so that it is not late.
    fn patience(&self) -> Duration {
        match self.member {
            Member::Assigned => Duration::ZERO,
            Member::Positioned => {
                let changes_hands = self.control.handover().is_some_and(Handover::under_way);
                self.due_in.min(if changes_hands { HANDOVER_POLL } else { POLL })
            }
            Member::Waiting => POLL,
        }
    }

    /// What one poll brings about.
    fn turn(&mut self, feed: &mut dyn Feed, sink: &mut dyn Sink, batch: &LogBatch) -> Result<(), Failure> {
        match self.member {
            Member::Waiting => return Ok(()),
            // What this batch holds is read again from where the stores stand.
            Member::Assigned => return self.position(feed, sink),
            Member::Positioned => {}
        }
        let whole = batch.whole();
        for place in 0..whole {
            self.take(feed, sink, batch.get(place))?;
            if self.open.is_none() && sink.full() {
                self.commit(feed, sink)?;
            }
        }
        if self.open.is_none() {
            self.follow_ledger(feed)?;
            self.commit_when_due(feed, sink)?;
            self.hand_over(feed, sink)?;
            self.go_on_if_told(feed, sink)?;
            if self.member == Member::Assigned {
                // What is left of this batch is read again.
                return Ok(());
            }
        }
        for place in whole..batch.len() {
            self.take(feed, sink, batch.get(place))?;
        }
        if !batch.is_empty() {
            return Ok(());
        }
        self.miss_last_records(feed)?;
        self.check(sink)
    }

    /// Takes in one record.
    fn take(
        &mut self,
        feed: &mut dyn Feed,
        sink: &mut dyn Sink,
        record: LogRecord<'_>,
    ) -> Result<(), Failure> {
        let offset = record.offset;
        self.continuity.check(&record).map_err(|mismatch| self.left_behind(&mismatch))?;
        if offset < self.next_offset {
            if offset + 1 == self.next_offset {
                // What the hindmost store was left at: the next record follows it.
                self.applied = LastRecord::of(&record);
                self.last = record.position;
            }
            return Ok(());
        }
        if record.log {
            self.next_offset = offset + 1;
            return Ok(());
        }
        if self.open.is_none() {
            if self.stops.any_due(offset) {
                self.stop_before(feed, sink, offset)?;
            }
            self.unit = offset;
        }
        if record.position.is_none() {
            return self.take_foreign(offset);
        }
        self.check_order(&record)?;
        if let Some(version) = record.schema {
            self.apply(feed, sink, version, record)?;
        }
        if let Some(end_lsn) = record.commit {
            self.open = None;
            self.next_offset = offset + 1;
            self.lsn = self.lsn.max(end_lsn);
            self.applied = LastRecord::of(&record);
        }
        Ok(())
    }

    /// A unit ends with its mark and nowhere else, and positions only grow. Anything else is not a log of ours.
    fn check_order(&mut self, record: &LogRecord<'_>) -> Result<(), WorkerError> {
        let poison = |reason| WorkerError::Feed(FeedError::Poison { offset: record.offset, reason });
        let Some(position) = record.position else { return Ok(()) };
        let unit = (position.lsn, position.kind);
        // On an idle source several rounds of a snapshot stand at one LSN, their ordinals going on.
        let again = |last: Position| {
            self.open.is_none()
                && unit == (last.lsn, last.kind)
                && (last.kind != Kind::Round || position == last)
        };
        if self.open.is_some_and(|open| open != unit) {
            return Err(poison(format!("{position} begins while the unit before it has no end mark")));
        }
        if self.last.is_some_and(|last| position < last || again(last)) {
            return Err(poison(format!("{position} comes after {}", self.last.unwrap_or(position))));
        }
        self.open = Some(unit);
        self.last = Some(position);
        Ok(())
    }

    fn apply(
        &mut self,
        feed: &mut dyn Feed,
        sink: &mut dyn Sink,
        version: SchemaRef,
        record: LogRecord<'_>,
    ) -> Result<(), Failure> {
        let offset = record.offset;
        let table = match self.tables.entry(version) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => {
                let schema = feed.schema(version)?;
                let wanted = (0..self.stores.len()).filter(|store| sink.wants(*store, &schema)).collect();
                if self.described.insert(version) && sink.describe(&schema) {
                    let table = schema.full_name();
                    return Err(Failure::Again(format!(
                        "the types of {table} ask for another form of a store"
                    )));
                }
                unknown.insert(Table { schema, wanted })
            }
        };
        let Table { schema, wanted } = table;
        let Some(position) = record.position.filter(|_| !wanted.is_empty()) else { return Ok(()) };
        let event = match Event::decode(record.value) {
            Ok(event) => event,
            Err(error) => {
                let (stores, unfit) = (wanted.clone(), Unfit { offset, key: schema.key_text(record.key) });
                return self.cannot_take_in(stores, &unfit, &Cause::Poison(error.to_string()));
            }
        };
        if position.kind == Kind::Round || record.anew {
            self.restarted = Some(offset);
            self.ready_at = None;
        }
        let LogRecord { key, unchanged, omitted, previous_key, .. } = record;
        let change = Change { offset, position, schema, key, event, unchanged, omitted, previous_key };
        let (stores, held, skipped) = (&self.stores, &self.held, &self.skipped);
        let stage = |store: &usize| {
            if !is_there(stores[*store].as_ref(), held[*store], offset) {
                None
            } else if skipped.get(store).is_some_and(|skipped| skipped.contains(&offset)) {
                let unfit =
                    |error: &SinkError| !matches!(error, SinkError::Poison(_) | SinkError::Refused(_));
                sink.skip(*store, &change).err().filter(unfit).map(|error| (*store, error))
            } else {
                sink.apply(*store, &change).err().map(|error| (*store, error))
            }
        };
        let Some((store, error)) = wanted.iter().find_map(stage) else { return Ok(()) };
        let cause = match error {
            SinkError::Poison(reason) => Cause::Poison(reason),
            SinkError::Refused(refusal) => Cause::Refused(refusal),
            error => return Err(Failure::of_sink(error, offset)),
        };
        let unfit = Unfit { offset, key: schema.key_text(key) };
        self.cannot_take_in(vec![store], &unfit, &cause)
    }

    /// Takes the ledger's LSN when the log up to the ledger's offset was taken.
    fn follow_ledger(&mut self, feed: &mut dyn Feed) -> Result<(), Failure> {
        let Some(progress) = feed.progress()? else { return Ok(()) };
        // Until every table has been read there is nothing to catch up with (h28).
        // A ledger that ends before this record does not tell of what the log has lost since.
        let known = progress.log_end >= self.next_offset && progress.log_end > self.restarted.unwrap_or(0);
        if progress.snapshot.is_none() && known {
            self.ready_at.get_or_insert((progress.log_end, progress.end_lsn));
        }
        if progress.log_end <= self.next_offset {
            self.lsn = self.lsn.max(progress.end_lsn);
        }
        Ok(())
    }

    /// Takes the LSN of a store whose place was passed. It is greater than that of the log's records if it came from a
    /// ledger that has fallen back since.
    fn follow_siblings(&mut self) {
        for (place, at) in self.stores.iter().enumerate() {
            if let Some(at) = at
                && at.next_offset <= self.next_offset
                && !self.continuity.awaits(place)
            {
                self.lsn = self.lsn.max(at.lsn);
            }
        }
    }

    /// Whether a store that was filled up to here may be shown.
    fn caught_up(&self) -> bool {
        self.ready_at.is_some_and(|(at, lsn)| self.next_offset >= at && self.lsn >= lsn)
    }

    fn moves(&self, specs: &[StoreSpec]) -> Vec<Option<Move>> {
        let caught_up = self.caught_up();
        let move_of = |(place, from): (usize, &Option<Checkpoint>)| {
            let stays = self.held[place].is_some() || self.continuity.awaits(place);
            let from = from.as_ref().filter(|_| !stays)?;
            // One in another form does not hold what a query of today answers: its copy will.
            let in_form = from.definition == specs[place].definition;
            let mut to = Checkpoint {
                next_offset: self.next_offset,
                lsn: self.lsn,
                ready: in_form && ((from.ready && self.restarted.is_none()) || caught_up),
                last: self.applied,
                stopped: None,
                ..from.clone()
            };
            if let Some(skipped) = self.skipped.get(&place)
                && from.next_offset < to.next_offset
            {
                to.skipped.extend(skipped.range(from.next_offset..to.next_offset));
            }
            // A store ahead of the hindmost stays where it is.
            let moves = to.next_offset >= from.next_offset && to.lsn >= from.lsn && to != *from;
            moves.then(|| Move { from: from.clone(), to })
        };
        self.stores.iter().enumerate().map(move_of).collect()
    }

    fn commit_when_due(&mut self, feed: &mut dyn Feed, sink: &mut dyn Sink) -> Result<(), Failure> {
        let due_in = sink.due_in(self.clock.now_us());
        self.due_in = if due_in.is_zero() { POLL } else { due_in };
        if due_in.is_zero() { self.commit(feed, sink) } else { Ok(()) }
    }

    /// Effects and checkpoints move together; the group's offset follows.
    pub(crate) fn commit(&mut self, feed: &mut dyn Feed, sink: &mut dyn Sink) -> Result<(), Failure> {
        self.follow_siblings();
        let moves = self.moves(sink.stores());
        if moves.iter().all(Option::is_none) {
            return Ok(());
        }
        sink.commit(&moves).map_err(|error| Failure::of_sink(error, self.next_offset))?;
        for (store, moved) in self.stores.iter_mut().zip(moves) {
            if let Some(Move { to, .. }) = moved {
                *store = Some(to);
            }
        }
        // Reading a store that cannot be written, for its disk is full, is no sign that it can be again.
        self.back_off = BACK_OFF.0;
        self.tell_moved();
        if self.caught_up() {
            self.restarted = None;
        }
        let now = self.clock.now_us();
        self.checked_at = now;
        if elapsed(self.group_at, now) >= GROUP_INTERVAL {
            self.group_at = now;
            feed.commit(self.next_offset)?;
        }
        Ok(())
    }

    /// Tells where the stores are now.
    pub(crate) fn tell_moved(&self) {
        self.control.moved(&self.stores);
        if let (Role::Worker, Some(handover)) = (self.role, self.control.handover()) {
            handover.moved(&self.stores);
        }
    }

    /// This side's part in a store's change of hands; see [`Handover`].
    fn hand_over(&mut self, feed: &mut dyn Feed, sink: &mut dyn Sink) -> Result<(), Failure> {
        let Some(handover) = self.control.handover() else { return Ok(()) };
        match self.role {
            Role::Worker => self.hold(handover, feed, sink),
            Role::Builder => self.give(handover, sink),
        }
    }

    /// Leaves the stores that the builder asks for where they are, and takes in the copies that it gives.
    fn hold(&mut self, handover: &Handover, feed: &mut dyn Feed, sink: &mut dyn Sink) -> Result<(), Failure> {
        let now = self.clock.now_us();
        let late = self.held.iter().flatten().any(|since| elapsed(*since, now) >= HOLD_LIMIT);
        if late {
            warn!("the copy of a store does not come to where the store is held: the store goes on");
        }
        if late || handover.recalled() {
            self.commit(feed, sink)?;
            self.member = Member::Assigned;
            return Ok(());
        }
        for place in handover.asked() {
            // Nothing may be staged for a store that stays.
            self.commit(feed, sink)?;
            self.held[place].get_or_insert(now);
            let shown = self.stores[place].as_ref().or(self.frozen[place].as_ref());
            handover.held(place, shown.cloned());
        }
        Ok(())
    }

    /// Gives the copies that have come to where the stores are held.
    fn give(&mut self, handover: &Handover, sink: &mut dyn Sink) -> Result<(), Failure> {
        if self.given {
            if handover.given().is_empty() {
                self.member = Member::Assigned;
            }
            return Ok(());
        }
        for place in 0..self.stores.len() {
            let known = !self.continuity.awaits(place);
            let whole = |copy: &&Checkpoint| known && copy.ready && copy.next_offset == self.next_offset;
            let Some(copy) = self.stores[place].as_ref().filter(whole) else { continue };
            self.control.reached("rebuild.caught_up");
            let Some(shown) = handover.ask(place, copy.lsn) else { continue };
            if shown.is_none_or(|shown| copy.reaches(&shown)) {
                sink.release(place).map_err(|error| Failure::of_sink(error, self.next_offset))?;
                self.stores[place] = None;
                self.given = true;
                handover.give(place);
                self.control.reached("rebuild.given");
            }
        }
        Ok(())
    }

    /// Looks now and then whether the stores still are where they were left.
    fn check(&mut self, sink: &mut dyn Sink) -> Result<(), Failure> {
        let now = self.clock.now_us();
        if elapsed(self.checked_at, now) < CHECK_INTERVAL {
            return Ok(());
        }
        self.checked_at = now;
        sink.check().map_err(|error| Failure::of_sink(error, self.next_offset))
    }

    fn revoked(&mut self, sink: &mut dyn Sink) {
        info!("the consumer group has taken the log away; standing by until it gives it back");
        self.member = Member::Waiting;
        self.control.handover().inspect(|handover| handover.lost());
        sink.discard();
    }

    /// What a store holds is not known any more: forget what is staged and read it again after a while.
    fn again(&mut self, sink: &mut dyn Sink, reason: &str) {
        warn!(reason, wait = ?self.back_off, "reading the store's checkpoint again");
        self.control.delayed(reason);
        sink.discard();
        self.member = Member::Assigned;
        self.clock.sleep(self.back_off);
        self.back_off = (self.back_off * 2).min(BACK_OFF.1);
    }

    /// Commits what is whole and ends.
    pub fn finish(mut self, feed: &mut dyn Feed, sink: &mut dyn Sink) -> Result<(), WorkerError> {
        if self.member != Member::Positioned || self.open.is_some() {
            return Ok(());
        }
        self.group_at = 0;
        match self.commit(feed, sink) {
            Ok(()) => Ok(feed.commit(self.next_offset)?),
            Err(Failure::Final(error)) => Err(error),
            // The next start reads it again.
            Err(Failure::Again(reason)) => {
                warn!(reason, "the last commit is left to the next start");
                Ok(())
            }
        }
    }
}

/// However it ends: nobody knows of its stores then.
impl Drop for Worker<'_> {
    fn drop(&mut self) {
        let Some(handover) = self.control.handover() else { return };
        match self.role {
            Role::Worker => handover.lost(),
            Role::Builder => handover.builder_left(),
        }
    }
}

pub(crate) fn elapsed(since_us: i64, now_us: i64) -> Duration {
    Duration::from_micros(u64::try_from(now_us - since_us).unwrap_or(0))
}
