use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use change::{Clock, Event, Headers, Kind, LedgerEntry, Lsn, Op, Position, Progress, Read, TableProgress};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use relay::{Limits, PublishError, RelayError, SourceError};
use worker::{Checkpoint, Handover, Role, Sink, Worker, WorkerError};

use super::broker::{Broker, SimFeed, SimPublisher, first_progress};
use super::history::{History, REWRITTEN, TABLES, Tables};
use super::reader::{Server, SimSource};
use super::store::{Part, Parts, SimSink, id_of, row};

/// How long a seed's life is.
const ROUNDS: usize = 30;
/// How long a worker waits for records that do not come.
const IDLE_POLL: Duration = Duration::from_millis(300);
/// How long a machine that lost power is away.
const RESTART: Duration = Duration::from_millis(10);
/// Polls within which undisturbed processes must have caught up.
const PATIENCE: u32 = 300;

/// Decides when something fails. Shared by all parts of a world; everything random comes from the seed.
#[derive(Clone, Debug)]
pub(crate) struct Faults {
    rng: Rc<RefCell<StdRng>>,
    calm: Rc<Cell<bool>>,
}

impl Faults {
    /// Whether this call fails.
    pub(crate) fn strike(&self) -> bool {
        !self.calm.get() && self.rng.borrow_mut().random_bool(0.01)
    }

    /// A coin.
    pub(crate) fn strike_often(&self) -> bool {
        self.rng.borrow_mut().random_bool(0.3)
    }

    /// The source's clients go on, sometimes.
    pub(crate) fn grow(&self, history: &mut History) {
        if !self.calm.get() && self.strike_often() {
            history.grow(&mut self.rng.borrow_mut());
        }
    }

    /// The same between two questions that are asked one after the other.
    pub(crate) fn grow_between(&self, history: &mut History) {
        if self.up_to(9) == 0 {
            self.grow(history);
        }
    }

    /// Between 0 and `most`.
    pub(crate) fn up_to(&self, most: usize) -> usize {
        self.rng.borrow_mut().random_range(0..=most)
    }
}

/// Every look at the clock takes a while.
struct SimClock(Cell<i64>);

impl Clock for SimClock {
    fn now_us(&self) -> i64 {
        self.0.set(self.0.get() + 50);
        self.0.get()
    }

    fn sleep(&self, duration: Duration) {
        self.0.set(self.0.get() + duration.as_micros() as i64);
    }
}

/// Stops a reader after so many looks, which is as good as killing it: nothing of it survives. Checks what it claims.
struct Countdown<'a> {
    left: Cell<u32>,
    world: &'a World,
}

impl relay::Control for Countdown<'_> {
    fn stop(&self) -> bool {
        self.left.set(self.left.get().saturating_sub(1));
        self.left.get() == 0
    }

    fn committed(&self, progress: &Progress, _: u64) {
        if progress.snapshot.is_none() && progress.split.is_none() {
            self.world.check_log(progress.end_lsn);
        }
    }
}

/// A worker and its builder.
struct Pair(Handover);

impl worker::Control for Pair {
    fn stop(&self) -> bool {
        false
    }

    fn handover(&self) -> Option<&Handover> {
        Some(&self.0)
    }
}

/// Whether a step was taken, rather than the log away or, where that may be, shorter than a store knows it.
fn went_on(step: Result<(), WorkerError>, shortened: bool) -> bool {
    match step {
        Ok(()) => true,
        Err(WorkerError::Feed(worker::FeedError::Unavailable(_))) => false,
        Err(WorkerError::Refused(refusal)) if shortened && refusal.what.contains("records were lost") => {
            false
        }
        // No store is left that can take in the log.
        Err(WorkerError::Poison { reason, .. }) if reason == "simulated" => false,
        Err(error) => panic!("the worker ended: {error}"),
    }
}

/// A source, a broker and a store, and the processes between them.
pub struct World {
    faults: Faults,
    clock: SimClock,
    server: Rc<RefCell<Server>>,
    broker: Rc<RefCell<Broker>>,
    parts: Rc<RefCell<Parts>>,
    /// How the parts are defined.
    definitions: [u32; 2],
    /// The record that a part, by place, cannot take in.
    poison: Rc<Cell<Option<(usize, i64)>>>,
    /// How far readers have seen each part come.
    shown: Rc<RefCell<[Lsn; 2]>>,
    /// Copies of the store to restore from.
    backups: Vec<Parts>,
    limits: Limits,
}

/// Lives one seed's life to its end.
///
/// # Panics
/// When a promise is broken; the message names the seed.
pub fn run_seed(seed: u64) {
    let mut world = World::new(seed);
    for _ in 0..ROUNDS {
        world.round();
    }
    world.settle();
}

impl World {
    /// A world in which nothing has happened.
    pub fn new(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let limits = Limits {
            send_bytes: rng.random_range(1..4000),
            commit_bytes: rng.random_range(1..20_000),
            commit_interval: Duration::from_micros(rng.random_range(100..5_000)),
            busy_bytes: rng.random_range(1..10_000),
            pause: Duration::from_micros(rng.random_range(0..100)),
            busy_pause: Duration::from_micros(rng.random_range(0..400)),
            idle_interval: Duration::from_micros(200),
            heartbeat_interval: Duration::from_millis(rng.random_range(1..100)),
            ..Limits::default()
        };
        let mut history = History::new();
        for _ in 0..rng.random_range(0..4) {
            history.grow(&mut rng);
        }
        let consistent_point = history.end;
        history.alterable = true;
        let progress = first_progress(consistent_point, history.snapshot(true));
        let table = TableProgress::new(format!("public.t{}", TABLES[0]), TABLES[0] + 1, Read::Nothing);
        let table = LedgerEntry::Table(TABLES[0], TableProgress { publication_xmin: 1, ..table });
        let faults = Faults { rng: Rc::new(RefCell::new(rng)), calm: Rc::new(Cell::new(false)) };
        let server =
            Server { history, confirmed_flush: consistent_point, heartbeat: relay::Heartbeat::default() };
        World {
            faults,
            clock: SimClock(Cell::new(0)),
            server: Rc::new(RefCell::new(server)),
            broker: Rc::new(RefCell::new(Broker::new(progress, table))),
            parts: Rc::default(),
            definitions: [1, 1],
            poison: Rc::default(),
            shown: Rc::default(),
            backups: vec![Parts::default()],
            limits,
        }
    }

    fn round(&mut self) {
        match self.faults.up_to(11) {
            0..=2 => self.server.borrow_mut().history.grow(&mut self.faults.rng.borrow_mut()),
            10 => self.server.borrow_mut().history.reveal(&mut self.faults.rng.borrow_mut()),
            11 if self.faults.strike_often() => {
                self.server.borrow_mut().history.publish(&mut self.faults.rng.borrow_mut());
            }
            3..=5 => self.relay(1 + self.faults.up_to(30) as u32),
            6..=8 => self.worker(1 + self.faults.up_to(30) as u32),
            _ => self.meddle(),
        }
    }

    /// A backup is taken or restored, the store is emptied in part, or a rebuild is asked for in one of the ways.
    fn meddle(&mut self) {
        let mut parts = self.parts.borrow_mut();
        let part = self.faults.up_to(1);
        match self.faults.up_to(11) {
            11 => {
                let offset = self.broker.borrow().end();
                let record = (part, offset - self.faults.up_to(20) as i64);
                self.poison.set(Some(record).filter(|_| !self.faults.strike_often()));
            }
            0 | 1 => self.backups.push(parts.clone()),
            2 => {
                *parts = self.backups[self.faults.up_to(self.backups.len() - 1)].clone();
                *self.shown.borrow_mut() = Default::default();
            }
            3 => {
                parts[part] = Part::default();
                self.shown.borrow_mut()[part] = Lsn::ZERO;
            }
            4 => self.definitions[part] += 1,
            5 => self.broker.borrow_mut().reset_group(),
            6 => self.broker.borrow_mut().cut_off(self.faults.strike_often(), self.faults.strike_often()),
            9 | 10 => {
                drop(parts);
                self.lose_power();
            }
            _ => drop(parts[part].copy.get_or_insert_default()),
        }
    }

    /// The machine of broker and source loses power: log and ledger fall back together, and the slot, whose place
    /// Postgres writes with its checkpoints only, to no more than the ledger has.
    fn lose_power(&mut self) {
        let (transactions, gap) = (1 + self.faults.up_to(4), self.faults.up_to(3));
        let lost = self.broker.borrow_mut().fall_back(transactions, gap);
        let Some((end, lsn, former)) = lost else { return };
        let mut server = self.server.borrow_mut();
        server.confirmed_flush = server.confirmed_flush.min(lsn);
        let former = Rc::new(former);
        let mut parts = self.parts.borrow_mut();
        let all = parts.iter_mut().chain(self.backups.iter_mut().flatten());
        all.for_each(|part| part.log_fell_back(end, &former));
        self.clock.sleep(RESTART);
    }

    /// Whether a store holds more than the log does.
    fn shortened(&self) -> bool {
        let end = self.broker.borrow().end();
        let beyond = |part: &Part| {
            let at = part.checkpoint.as_ref();
            part.former.is_some() && at.is_some_and(|at| at.next_offset > end)
        };
        self.parts.borrow().iter().any(beyond)
    }

    /// Whether a store that was defined anew is further than the log, which has lost what was there. Its content is not
    /// compared with the log any more, so that its copy takes its place only when the log has come there again.
    fn redefined_beyond(&self) -> bool {
        let end = self.broker.borrow().data_end();
        let beyond = |(part, definition): (&Part, u32)| {
            let at = part.checkpoint.as_ref().filter(|at| at.definition != definition.to_string());
            part.former.is_some() && at.is_some_and(|at| at.log == "simulated" && at.next_offset > end)
        };
        self.parts.borrow().iter().zip(self.definitions).any(beyond)
    }

    /// A reader's life of so many polls.
    fn relay(&self, polls: u32) {
        let mut source = SimSource::new(self.server.clone(), self.faults.clone());
        let mut publisher = SimPublisher::new(self.broker.clone(), self.faults.clone());
        let control = Countdown { left: Cell::new(polls + 1), world: self };
        let names = ("sim", "app");
        match relay::run(&mut source, &mut publisher, &self.clock, &control, names, &self.limits) {
            Ok(()) => {}
            Err(
                RelayError::Source(SourceError::Unavailable(_))
                | RelayError::Publish(PublishError::Unavailable(_)),
            ) if !self.faults.calm.get() => {}
            Err(error) => panic!("the reader ended: {error}"),
        }
        assert!(self.server.borrow().confirmed_flush <= self.durable(), "acknowledged before it was durable");
    }

    /// What the ledger says is in the log.
    fn durable(&self) -> Lsn {
        let mut publisher = SimPublisher::new(self.broker.clone(), self.faults.clone());
        let ledger = relay::Publisher::open(&mut publisher).expect("opening does not fail");
        ledger.progress.expect("there always is one").end_lsn
    }

    /// A worker's life of so many polls, and its builder's beside it.
    fn worker(&self, polls: u32) {
        let (server, broker, shown) = (self.server.clone(), self.broker.clone(), self.shown.clone());
        let observe = Rc::new(move |parts: &Parts| {
            check_prefix(&server.borrow().history, &broker.borrow(), parts);
            for (part, shown) in parts.iter().zip(&mut *shown.borrow_mut()) {
                let at = part.checkpoint.as_ref().map_or(*shown, |at| at.lsn);
                assert!(at >= *shown, "readers go back from {shown} to {at}");
                *shown = at;
            }
        });
        let sink = || {
            SimSink::new(
                self.parts.clone(),
                self.faults.clone(),
                self.definitions,
                self.poison.clone(),
                observe.clone(),
            )
        };
        let feed = || SimFeed::new(self.broker.clone(), self.faults.clone());
        let pair = Pair(Handover::new(TABLES.len()));
        let (mut sink, mut copies, mut log) = (sink(), sink().of_copies(), feed());
        let mut worker = Worker::new(Role::Worker, &self.clock, &pair);
        let mut builder: Option<(Worker<'_>, SimFeed)> = None;
        for _ in 0..polls {
            if self.faults.calm.get() {
                // Where nothing happens, a poll takes its time.
                self.clock.sleep(IDLE_POLL);
            }
            if !went_on(worker.step(&mut log, &mut sink), self.shortened()) {
                return;
            }
            // What the process of the builder does; see `millrace`.
            if !pair.0.may_build() || builder.as_ref().is_some_and(|(builder, _)| builder.done()) {
                builder = None;
            } else if let Some((step, own)) = &mut builder {
                if !went_on(step.step(own, &mut copies), false) {
                    builder = None;
                }
            } else if copies.copies().is_ok_and(|found| found.iter().any(Option::is_some)) {
                copies.discard();
                builder = Some((Worker::new(Role::Builder, &self.clock, &pair), feed().alone()));
            } else if pair.0.lacking() {
                pair.0.builder_left();
            }
        }
        // A killed process ends nothing in order; some do.
        if self.faults.strike_often() {
            let _ = went_on(worker.finish(&mut log, &mut sink), false);
        }
    }

    /// Without further faults everything arrives, once.
    fn settle(&mut self) {
        self.faults.calm.set(true);
        self.poison.set(None);
        self.broker.borrow_mut().rejoin();
        self.server.borrow_mut().history.reveal_all();
        self.relay(PATIENCE);
        while self.redefined_beyond() {
            self.server.borrow_mut().history.grow(&mut self.faults.rng.borrow_mut());
            self.server.borrow_mut().history.reveal_all();
            self.relay(PATIENCE);
        }
        if self.shortened() {
            // As the refusal says.
            self.broker.borrow_mut().reset_group();
        }
        self.worker(PATIENCE);
        self.check_log(self.server.borrow().history.end);
        let (server, broker) = (self.server.borrow(), self.broker.borrow());
        assert!(broker.complete(TABLES[0]) && broker.complete(TABLES[1]) == server.history.published);
        let parts = self.parts.borrow();
        check_prefix(&server.history, &broker, &parts);
        for (part, table) in parts.iter().zip(TABLES) {
            assert_eq!(
                part.rows,
                published(&server.history, server.history.now(), table),
                "table {table} at the end"
            );
            let checkpoint = part.checkpoint.as_ref().expect("a checkpoint");
            let definition = self.definitions[usize::from(table != TABLES[0])];
            assert_eq!(checkpoint.definition, definition.to_string(), "under its present definition");
            assert!(checkpoint.ready, "caught up, so ready");
            assert!(part.copy.is_none(), "what was built has taken its place");
        }
    }

    /// In the log every row is born once, changes and dies only while it lives, and what is left is what the source had at
    /// this LSN.
    fn check_log(&self, lsn: Lsn) {
        let broker = self.broker.borrow();
        let server = self.server.borrow();
        let mut rows = Tables::new();
        let mut last: Option<(Position, bool)> = None;
        let mut buried = Tables::new();
        for (offset, record) in broker.committed_from(1) {
            let mut headers = Headers::default();
            record.headers.iter().for_each(|(name, value)| headers.read(name, value).expect("our headers"));
            let position = headers.position.expect("every record has one");
            if let Some((last, ended)) = last {
                let order = if ended { position > last } else { position >= last };
                assert!(order, "{position} after {last}");
                let same = (position.lsn, position.kind) == (last.lsn, last.kind);
                assert!(
                    same != ended || (same && ended && position.kind == Kind::Round),
                    "a unit ends with its mark"
                );
            }
            last = Some((position, headers.commit.is_some()));
            let Some(schema) = headers.schema else { continue };
            let event = Event::decode(&record.value).expect("an envelope");
            let table = schema.relation;
            match event.op {
                Op::Create | Op::Read => {
                    let (id, mut value) = row(event.after);
                    if !headers.unchanged.is_empty() {
                        let previous = (table, id_of(headers.previous_key));
                        value = buried.get(&previous).expect("the row that moved was there").clone();
                    }
                    assert_eq!(rows.insert((table, id), value), None, "born twice: {table} {id} at {offset}");
                }
                Op::Update => {
                    let (id, value) = row(event.after);
                    let known = rows.get_mut(&(table, id)).expect("changed without a birth");
                    if table == TABLES[0] {
                        assert_eq!(row(event.before), (id, known.clone()), "changed from what it never was");
                    }
                    if headers.unchanged.is_empty() {
                        *known = value;
                    }
                }
                Op::Delete => {
                    let (id, before) = row(event.before);
                    let value = rows.remove(&(table, id)).expect("died without a birth");
                    if table == TABLES[0] {
                        assert_eq!(before, value, "died as what it never was");
                    }
                    buried.insert((table, id), value);
                }
                Op::Truncate => rows.retain(|(t, _), _| *t != table),
                Op::Message => {}
            }
        }
        for table in TABLES.into_iter().filter(|table| broker.complete(*table)) {
            let found: BTreeMap<i64, String> =
                rows.iter().filter(|((t, _), _)| *t == table).map(|((_, id), v)| (*id, v.clone())).collect();
            assert_eq!(
                found,
                published(&server.history, server.history.at(lsn), table),
                "the log's table {table} at {lsn}"
            );
        }
    }
}

/// A table's rows, where it is published.
fn published(history: &History, tables: &Tables, table: u32) -> BTreeMap<i64, String> {
    if table == TABLES[1] && !history.published {
        return BTreeMap::new();
    }
    tables.iter().filter(|((t, _), _)| *t == table).map(|((_, id), value)| (*id, value.clone())).collect()
}

/// What a store shows that has come to where the log became complete is what the source was at the LSN that the store
/// claims; before, it is not ready (h28).
fn check_prefix(history: &History, broker: &Broker, parts: &Parts) {
    for (part, table) in parts.iter().zip(TABLES) {
        let Some(Checkpoint { next_offset, lsn, ready, .. }) = part.checkpoint else { continue };
        let read = match &part.former {
            Some(former) => former.complete_at(table, next_offset, lsn),
            None => broker.complete_at(table, next_offset, lsn),
        };
        if let Some(read) = read {
            let mut expected = published(history, history.at(lsn), table);
            let mut found = part.rows.clone();
            if found == expected {
                continue;
            }
            assert!(!ready, "ready at {lsn} with {found:?} of table {table}, not {expected:?}");
            if table == TABLES[0] && history.lost(read, lsn) {
                continue;
            }
            if table == TABLES[0] && history.rewritten(read, lsn) {
                let stem = |value: &mut String| value.truncate(value.trim_end_matches(REWRITTEN).len());
                expected.values_mut().chain(found.values_mut()).for_each(stem);
            }
            assert_eq!(found, expected, "table {table} at {lsn}");
        } else {
            // The second table's store is as complete as can be before that table is published.
            assert!(!ready || table == TABLES[1], "ready before all is read, at offset {next_offset}");
        }
    }
}
