//! What the two workers share: they run on the log, and again when that can help; and beside each its builder, on a
//! thread of its own, while there is something to build.
//!
//! A worker follows the current log. When that is to get a successor, the builder builds every store from the new log,
//! and the worker goes over when they all have taken their places; or at once, where the current log cannot be followed
//! any more.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use kafka::{Generation, Generations, KafkaFeed, Names};
use worker::{Checkpoint, Control, FeedError, Handover, Sink, Unfit, WorkerError};

use super::service::Service;
use crate::failpoint;
use crate::failure::{Failure, Outcome};
use crate::logs::Logs;
use crate::stop::{Stop, SystemClock};
use crate::supervise::{self, Next, Supervisor};
use crate::telemetry::WorkerMetrics;

/// Between two looks whether something is to be built.
const LOOK: Duration = Duration::from_secs(1);
/// Between two looks whether this worker has the log.
const STEP: Duration = Duration::from_millis(50);

/// What a builder without work says of itself.
const NOTHING: &str = "nothing to build";

/// A sink over the stores that readers see, and one over the copies that are to take their places.
pub(crate) struct Sinks<'a> {
    pub(crate) stores: &'a mut dyn Sink,
    pub(crate) copies: &'a mut (dyn Sink + Send),
}

/// Keeps a sink's stores until told to stop. `names` are the worker's, `counters` or `search`, and its builder's.
pub(crate) fn run(service: &Service, names: [&'static str; 2], sinks: Sinks<'_>) -> Outcome {
    let [part, builder] = names;
    let stores: Vec<String> = sinks.stores.stores().iter().map(|store| store.name.clone()).collect();
    let handover = Handover::new(stores.len());
    let logs = Logs::default();
    let watch = |name| Watch {
        service,
        logs: &logs,
        generation: AtomicU32::new(0),
        worker: part,
        name,
        building: name != part,
        stores: stores.clone(),
        stopped: Mutex::default(),
        metrics: WorkerMetrics::new(&service.telemetry, name),
        handover: &handover,
    };
    let (worker, builder) = (watch(part), watch(builder));
    // Ends the builder when the worker has ended, for whatever reason; the other parts are the caller's to end.
    let ended = Stop::default();
    thread::scope(|scope| {
        let building = thread::Builder::new().name(builder.name.to_owned()).spawn_scoped(scope, || {
            let copies = sinks.copies;
            // A panic must not leave the worker running without it.
            let built = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                build_when_asked(&builder, copies, &ended)
            }));
            let panicked =
                |_| Err(Failure::Failed(anyhow!("{} panicked; the lines above say where", builder.name)));
            built.unwrap_or_else(panicked).inspect_err(|_| service.stop.set())
        });
        let failed = |error| Failure::Failed(anyhow!("cannot start a thread: {error}"));
        let building = building.map_err(failed)?;
        let following = thread::Builder::new().name("generations".to_owned());
        let follow = || logs.follow(&service.process, &ended, |_| handover.recall());
        following.spawn_scoped(scope, follow).map_err(|error| {
            ended.set();
            failed(error)
        })?;
        let outcome = keep(&worker, sinks.stores);
        ended.set();
        let built = building.join().unwrap_or_else(|_| Err(Failure::Failed(anyhow!("a builder panicked"))));
        outcome.and(built)
    })
}

/// The worker.
fn keep(watch: &Watch<'_>, sink: &mut dyn Sink) -> Outcome {
    let service = watch.service;
    let mut supervisor = Supervisor::new();
    // The generation that was left for the one after it.
    let mut left = None;
    loop {
        let started = Instant::now();
        let mut log = String::new();
        let generation = |logs: Generations| {
            if left == Some(logs.current.number) { logs.newest() } else { logs.current }
        };
        let error = match attempt(watch, sink, &mut log, generation) {
            Ok(()) if service.stop.is_set() => return Ok(()),
            Ok(()) => {
                failpoint::reached("generation.left");
                left = Some(watch.generation.load(Ordering::Relaxed));
                continue;
            }
            Err(error) => error,
        };
        let reason = error.to_string();
        match watch.ended(&mut supervisor, error, &log, started) {
            Next::End(failure) if watch.finds_successor() => {
                tracing::warn!(
                    part = watch.name,
                    "going over to the next log, from which the stores are being built: {}",
                    failure.to_string().trim_end()
                );
                left = Some(watch.generation.load(Ordering::Relaxed));
            }
            Next::End(failure) => return Err(failure),
            Next::Again(wait) => {
                tracing::warn!(part = watch.name, reason, ?wait, "the worker begins again");
                if service.stop.wait(wait) {
                    return Ok(());
                }
            }
        }
    }
}

/// The builder: works while something is asked for and this worker has the log, of which there is one.
///
/// What it cannot build ends the process only where nothing else is kept: else the other stores go on.
fn build_when_asked(watch: &Watch<'_>, copies: &mut dyn Sink, ended: &Stop) -> Outcome {
    let service = watch.service;
    let mut supervisor = Supervisor::new();
    let mut looked: Option<Instant> = None;
    let keeps = |copies: &dyn Sink| watch.handover.keeps() || copies.serves();
    while !ended.wait(STEP) && !service.stop.is_set() {
        let lacking = watch.handover.lacking();
        let due = looked.is_none_or(|looked| lacking || looked.elapsed() >= LOOK);
        if !watch.handover.may_build() || !due {
            continue;
        }
        looked = Some(Instant::now());
        match copies.copies() {
            Ok(found) if found.iter().any(Option::is_some) => {}
            Ok(_) => {
                // Also what kept the last build from ending in order is over.
                service.telemetry.tell(watch.name, true, NOTHING);
                watch.handover.builder_left();
                continue;
            }
            // The worker meets the same, and says so.
            Err(error) => {
                tracing::debug!(%error, "cannot see whether a store is to be built");
                continue;
            }
        }
        let started = Instant::now();
        let mut log = String::new();
        let news = watch.logs.news();
        let Err(error) = attempt(watch, copies, &mut log, |logs| logs.newest()) else { continue };
        let reason = error.to_string();
        match watch.ended(&mut supervisor, error, &log, started) {
            Next::End(failure) if !keeps(copies) => return Err(failure),
            Next::End(failure) => {
                tracing::error!(
                    part = watch.name,
                    "the rebuild stands still, the other stores go on; restart when it is mended: {}",
                    failure.to_string().trim_end()
                );
                // A new log, or a record that is to be left out, can help.
                while watch.logs.news() == news {
                    if ended.wait(LOOK) {
                        return Ok(());
                    }
                    if !keeps(copies) {
                        return Err(failure);
                    }
                }
            }
            Next::Again(wait) => {
                tracing::warn!(part = watch.name, reason, ?wait, "the builder begins again");
                if ended.wait(wait) {
                    return Ok(());
                }
            }
        }
    }
    Ok(())
}

fn attempt(
    watch: &Watch<'_>,
    sink: &mut dyn Sink,
    log: &mut String,
    generation: impl Fn(Generations) -> Generation,
) -> Result<(), WorkerError> {
    let process = &watch.service.process;
    let kafka = process.kafka()?;
    let (logs, skips) = process.state(&kafka).map_err(FeedError::from)?;
    watch.logs.learned(logs);
    watch.logs.learned_skips(&skips);
    let generation = generation(logs).number;
    watch.generation.store(generation, Ordering::Relaxed);
    let names = Names::new(process.config.pipeline.as_str(), generation)?;
    *log = names.log();
    // Every store is tried again.
    watch.stopped.lock().unwrap_or_else(PoisonError::into_inner).clear();
    let clock = SystemClock(watch.service.stop.clone());
    if watch.building {
        worker::build(&mut KafkaFeed::alone(&kafka, &names)?, sink, &clock, watch)
    } else {
        let group = names.group(watch.worker, None);
        worker::run(&mut KafkaFeed::open(&kafka, &names, &group)?, sink, &clock, watch)
    }
}

/// Tells the worker or the builder what the process is told, and the operators what it tells.
struct Watch<'a> {
    service: &'a Service,
    /// `counters` or `search`.
    worker: &'static str,
    /// The same for the worker, another for its builder.
    name: &'static str,
    building: bool,
    logs: &'a Logs,
    /// The log that is followed, or was last.
    generation: AtomicU32,
    stores: Vec<String>,
    /// The stores that have stopped, and why.
    stopped: Mutex<BTreeMap<String, String>>,
    metrics: WorkerMetrics,
    handover: &'a Handover,
}

impl Watch<'_> {
    /// Reports that the worker, or its builder, ended with an error, and returns what to do next. `log` is the topic that it
    /// followed.
    fn ended(&self, supervisor: &mut Supervisor, error: WorkerError, log: &str, started: Instant) -> Next {
        self.service.telemetry.tell(self.name, false, error.to_string());
        self.metrics.restarted();
        let stopped = self.stopped.lock().unwrap_or_else(PoisonError::into_inner);
        // The message names the store to skip a record for.
        let store = stopped.keys().next().map_or("STORE", String::as_str);
        supervisor.after_worker(error, self.worker, (store, log), started, Instant::now())
    }

    /// The same by what the brokers say now: a process that was frozen may be told of the next log last.
    fn finds_successor(&self) -> bool {
        self.logs.look(&self.service.process);
        self.has_successor()
    }

    /// Whether there is a later log than the one that was followed.
    fn has_successor(&self) -> bool {
        let generation = self.generation.load(Ordering::Relaxed);
        self.logs.known().is_some_and(|logs| logs.newest().number > generation)
    }
}

impl Control for Watch<'_> {
    fn stop(&self) -> bool {
        let over = if self.building {
            !self.handover.may_build() || self.has_successor()
        } else {
            !self.logs.of_use(self.generation.load(Ordering::Relaxed))
        };
        over || self.service.stop.is_set()
    }

    fn skip(&self, store: usize, record: &Unfit) -> bool {
        let generation = self.generation.load(Ordering::Relaxed);
        self.service.skip.contains(&record.offset) || self.logs.skips(generation, &self.stores[store], record)
    }

    fn stopped(&self, store: usize, why: Option<&WorkerError>) {
        let name = &self.stores[store];
        let mut stopped = self.stopped.lock().unwrap_or_else(PoisonError::into_inner);
        match why {
            Some(error) => {
                let log = Names::new(
                    self.service.process.config.pipeline.as_str(),
                    self.generation.load(Ordering::Relaxed),
                );
                let log = log.map(|names| names.log()).unwrap_or_default();
                let refusal = supervise::refusal_of(error, name, &log);
                let what = if self.building { "the copy stops; the store" } else { "the store stops, and" };
                tracing::error!(
                    part = self.name,
                    store = name,
                    "{what} shows what it has; the other stores go on: {}",
                    refusal.to_string().trim_end()
                );
                stopped.insert(name.clone(), refusal.what);
            }
            None => drop(stopped.remove(name)),
        }
    }

    fn moved(&self, stores: &[Option<Checkpoint>]) {
        for (store, checkpoint) in self.stores.iter().zip(stores) {
            match checkpoint {
                Some(checkpoint) => self.metrics.moved(store, checkpoint),
                None if self.building => self.metrics.forget(store),
                None => self.metrics.absent(store),
            }
        }
        let ready = stores.iter().all(|store| store.as_ref().is_some_and(|store| store.ready));
        let stopped = self.stopped.lock().unwrap_or_else(PoisonError::into_inner);
        let stopped = stopped.iter().next().map(|(store, reason)| format!("{store} has stopped: {reason}"));
        let (ready, state) = match (&stopped, self.building, ready) {
            (Some(reason), _, _) => (false, reason.as_str()),
            // The stores say what is missing; a build that goes on is as it should be.
            (None, true, _) if stores.iter().any(Option::is_some) => {
                (true, "building from the log's beginning")
            }
            (None, true, _) => (true, NOTHING),
            (None, false, true) => (true, "following the log"),
            (None, false, false) => (false, "filling from the log's beginning"),
        };
        if self.service.telemetry.tell(self.name, ready, state) {
            tracing::info!(part = self.name, state);
        }
    }

    fn reached(&self, stage: &str) {
        failpoint::reached(stage);
    }

    fn delayed(&self, reason: &str) {
        self.metrics.delayed();
        self.service.telemetry.tell(self.name, false, reason);
    }

    fn handover(&self) -> Option<&Handover> {
        Some(self.handover)
    }
}
