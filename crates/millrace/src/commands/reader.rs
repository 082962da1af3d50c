//! `millrace reader`: runs the relay, and again when that can help.
//!
//! While the current log has a successor, the same process fills that one as well, on a thread of its own; when every
//! store has gone over to it, it makes it the current one and gives up the slot of the old one. A log that cannot be
//! continued ends the reader only where nothing is to take its place.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use change::{Progress, TableProgress};
use kafka::{Connection, Generation, Generations, KafkaPublisher, Names, Problem};
use postgres::setup as source;
use postgres::{PostgresSource, SourceOptions};
use relay::{Control, PublishError, RelayError};

use super::service::Service;
use super::status::Reading;
use crate::failpoint;
use crate::failure::{Failure, Outcome};
use crate::logs::Logs;
use crate::stop::{Stop, SystemClock};
use crate::supervise::{Next, Supervisor};
use crate::telemetry::ReaderMetrics;
use crate::wiring::Process;

/// How the two relays are called.
const PARTS: [&str; 2] = ["reader", "reader of the next log"];
/// A log that was refused is tried again after this pause, while another one is there.
const REFUSED_PAUSE: Duration = Duration::from_secs(30);
/// Between two looks at what becomes of the next log.
const LOOK: Duration = Duration::from_secs(1);

/// Streams until told to stop, standing by while another reader holds the slot.
pub(crate) fn run(service: &Service, takeover: bool) -> Outcome {
    let logs = Logs::default();
    let metrics = ReaderMetrics::new(&service.telemetry);
    let ended = Stop::default();
    thread::scope(|scope| {
        let spawn = |name: &str| thread::Builder::new().name(name.to_owned());
        let failed = |error| {
            ended.set();
            Failure::Failed(anyhow!("cannot start a thread: {error}"))
        };
        spawn("generations")
            .spawn_scoped(scope, || logs.follow(&service.process, &ended, |_| {}))
            .map_err(failed)?;
        let next = spawn("next log").spawn_scoped(scope, || {
            let filled = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                fill_next(service, &logs, &ended);
            }));
            filled.unwrap_or_else(|_| service.stop.set());
        });
        next.map_err(failed)?;
        let outcome = stream(&Watch::new(service, &logs, Some(metrics), takeover));
        ended.set();
        outcome
    })
}

/// Runs the relay until told to stop, or its log is of no use any more.
fn stream(watch: &Watch<'_>) -> Outcome {
    let service = watch.service;
    let mut supervisor = Supervisor::new();
    loop {
        let started = Instant::now();
        let error = match attempt(watch) {
            Ok(()) if service.stop.is_set() || watch.of_next() => return Ok(()),
            // Another log is the current one.
            Ok(()) => continue,
            Err(error) => error,
        };
        if matches!(error, RelayError::Publish(PublishError::Fenced)) {
            // The newer reader was started for a reason; from here on this one only stands by.
            watch.takeover.set(false);
        }
        let reason = error.to_string();
        service.telemetry.tell(watch.part(), false, reason.clone());
        watch.metrics.iter().for_each(ReaderMetrics::restarted);
        watch.unsettled.set(true);
        match supervisor.after_relay(error, started, Instant::now()) {
            Next::End(failure) if watch.finds_successor() => {
                tracing::error!(
                    "the log ends here, and the next one takes its place: {}",
                    failure.to_string().trim_end()
                );
                if let Some(slot) = watch.slot() {
                    tracing::warn!(
                        "if it cannot be mended, the slot keeps WAL for nobody: SELECT pg_catalog.pg_drop_replication_slot('{slot}')"
                    );
                }
                // What was refused may be mended.
                let again = Instant::now() + REFUSED_PAUSE;
                while watch.of_use() && Instant::now() < again {
                    if service.stop.wait(LOOK) {
                        return Ok(());
                    }
                }
            }
            Next::End(failure) => return Err(failure),
            Next::Again(wait) => {
                tracing::warn!(part = watch.part(), reason, ?wait, "the reader begins again");
                if service.stop.wait(wait) {
                    return Ok(());
                }
            }
        }
    }
}

fn attempt(watch: &Watch<'_>) -> Result<(), RelayError> {
    let process = &watch.service.process;
    let kafka = process.kafka()?;
    let logs = process.generations(&kafka).map_err(PublishError::from)?;
    watch.logs.learned(logs);
    let generation = watch.next.map_or(logs.current.number, |next| next.number);
    watch.generation.set(generation);
    if !watch.of_use() {
        return Ok(());
    }
    let names = Names::new(process.config.pipeline.as_str(), generation)?;
    if watch.checked.replace(generation) != generation {
        check_topics(&kafka, &names)?;
    }
    let mut source = source_of(process, generation)?;
    let mut publisher = KafkaPublisher::new(kafka, names);
    let clock = SystemClock(watch.service.stop.clone());
    let limits = &process.config.reader.limits;
    let database = process.source()?.database().to_owned();
    let pipeline = process.config.pipeline.as_str();
    relay::run(&mut source, &mut publisher, &clock, watch, (pipeline, &database), limits)
}

/// The source of a generation's log.
pub(crate) fn source_of(process: &Process, generation: u32) -> Result<PostgresSource, RelayError> {
    let plan = process.plan(generation)?;
    let options = SourceOptions {
        heartbeat: plan.heartbeat,
        slot: plan.slot,
        publication: plan.publication,
        tables: plan.tables,
        queried: plan.queried,
        snapshot_connections: process.config.snapshot.connections,
    };
    Ok(PostgresSource::connect(process.runtime.handle(), &process.source()?, options)?)
}

/// Fills the next log whenever there is one, and gives up the slots of logs that are of no use any more.
fn fill_next(service: &Service, logs: &Logs, ended: &Stop) {
    let mut retired = None;
    while !ended.wait(LOOK) {
        let Some(known) = logs.known() else { continue };
        if retired != Some(known) && drop_slots(&service.process, &known) {
            retired = Some(known);
        }
        let Some(next) = known.next else { continue };
        tracing::info!(generation = next.number, "filling the next log");
        let complete = AtomicBool::new(false);
        thread::scope(|scope| {
            let filling = scope.spawn(|| {
                let watch = Watch {
                    next: Some(next),
                    complete: Some(&complete),
                    ..Watch::new(service, logs, None, false)
                };
                stream(&watch)
            });
            while !filling.is_finished() && !ended.wait(LOOK) {
                if complete.load(Ordering::Relaxed)
                    && let Err(error) = take_over(&service.process, logs, next)
                {
                    tracing::warn!(%error, "the next log is not made the current one yet");
                }
            }
            match filling.join() {
                Ok(Ok(())) => {}
                Ok(Err(failure)) => {
                    tracing::error!("the next log cannot be filled: {}", failure.to_string().trim_end());
                    // What was refused may be mended.
                    let again = Instant::now() + REFUSED_PAUSE;
                    let of_use = || logs.known().and_then(|known| known.next) == Some(next);
                    while of_use() && Instant::now() < again && !ended.wait(LOOK) {}
                }
                Err(panic) => std::panic::resume_unwind(panic),
            }
        });
        service.telemetry.tell(PARTS[1], true, "there is no next log");
    }
}

/// Makes the next log the current one, if every worker has gone over to it.
fn take_over(process: &Process, logs: &Logs, next: Generation) -> Result<(), Failure> {
    let kafka = process.kafka_briefly()?;
    let names = Names::new(process.config.pipeline.as_str(), next.number)?;
    for worker in process.workers() {
        let offset = kafka::group_offset(&kafka, &names, &names.group(worker, None))?;
        // A worker whose stores stand still until they are built has the log's beginning for its place.
        if !offset.is_some_and(|group| group.ours && group.offset > 0) {
            return Ok(());
        }
    }
    let client = process.connect(&process.source()?)?;
    process.runtime.block_on(source::exclude_others(&client, &process.plan(next.number)?))?;
    if process.generations(&kafka)?.next == Some(next) {
        let current = Generations::of(next);
        kafka::write_generations(&kafka, process.config.pipeline.as_str(), &current)?;
        logs.learned(current);
        tracing::info!(generation = next.number, "the stores have gone over: this log is the current one");
        failpoint::reached("generation.current");
    }
    Ok(())
}

/// Drops the slots of other logs, which keep WAL for nobody. Gives whether none is left.
fn drop_slots(process: &Process, known: &Generations) -> bool {
    let dropped = (|| {
        let others: Vec<u32> =
            (1..known.newest().number).filter(|number| known.get(*number).is_none()).collect();
        if others.is_empty() {
            return Ok(());
        }
        let client = process.connect(&process.source()?)?;
        for number in others {
            process.runtime.block_on(source::drop_slot(&client, &process.plan(number)?.slot))?;
        }
        Ok::<_, Failure>(())
    })();
    if let Err(error) = &dropped {
        tracing::debug!(%error, "the slot of an earlier log cannot be dropped yet");
    }
    dropped.is_ok()
}

/// Refuses topics that would lose what is written to them, and warns of what an operator chose and should know.
fn check_topics(kafka: &Connection, names: &Names) -> Result<(), RelayError> {
    let problems = match kafka::compare_topics(kafka, names) {
        Ok(problems) => problems,
        // Brokers need not let the running role read configurations; `setup` has looked.
        Err(error) => {
            tracing::debug!(%error, "the topics' configuration was not compared");
            return Ok(());
        }
    };
    for Problem { fatal, refusal } in problems {
        if fatal {
            return Err(refusal.into());
        }
        tracing::warn!("{}; remedy: {}", refusal.what, refusal.remedy);
    }
    Ok(())
}

/// A snapshot's progress is logged this often.
const TELL_INTERVAL: Duration = Duration::from_secs(5);

/// Tells the relay what the process is told, and the operators what the relay tells.
struct Watch<'a> {
    service: &'a Service,
    logs: &'a Logs,
    /// The log that this relay fills, where that is the next one; else it fills the current one.
    next: Option<Generation>,
    /// Set when the next log is complete.
    complete: Option<&'a AtomicBool>,
    metrics: Option<ReaderMetrics>,
    takeover: Cell<bool>,
    /// The log that is filled now.
    generation: Cell<u32>,
    /// Whether the next commit is the first since the relay had to begin again.
    unsettled: Cell<bool>,
    /// Whether tables were being read at the last commit.
    reading: Cell<bool>,
    /// When it was last told how far they have been read.
    told: Cell<Option<Instant>>,
    /// The log of which the topics' configuration was looked at.
    checked: Cell<u32>,
}

impl<'a> Watch<'a> {
    fn new(service: &'a Service, logs: &'a Logs, metrics: Option<ReaderMetrics>, takeover: bool) -> Self {
        Watch {
            service,
            logs,
            next: None,
            complete: None,
            metrics,
            takeover: Cell::new(takeover),
            generation: Cell::new(0),
            unsettled: Cell::new(false),
            reading: Cell::new(false),
            told: Cell::new(None),
            checked: Cell::new(0),
        }
    }

    /// The slot of the log that is filled.
    fn slot(&self) -> Option<String> {
        self.service.process.plan(self.generation.get()).ok().map(|plan| plan.slot)
    }

    fn of_next(&self) -> bool {
        self.next.is_some()
    }

    fn part(&self) -> &'static str {
        PARTS[usize::from(self.of_next())]
    }

    /// Whether the log that is filled is still what it was.
    fn of_use(&self) -> bool {
        let Some(known) = self.logs.known() else { return true };
        match self.next {
            Some(next) => known.next == Some(next),
            None => known.current.number == self.generation.get(),
        }
    }

    /// The same by what the brokers say now: a process that was frozen may be told of the next log last.
    fn finds_successor(&self) -> bool {
        self.logs.look(&self.service.process);
        self.succeeded()
    }

    /// Whether another log is to take the place of this one.
    fn succeeded(&self) -> bool {
        let later = |known: Generations| known.newest().number > self.generation.get();
        !self.of_next() && self.logs.known().is_some_and(later)
    }
}

impl Control for Watch<'_> {
    fn stop(&self) -> bool {
        self.service.stop.is_set() || !self.of_use()
    }

    fn take_over(&self) -> bool {
        self.takeover.get()
    }

    fn standing_by(&self) {
        self.metrics.iter().for_each(ReaderMetrics::standing_by);
        if self.service.telemetry.tell(self.part(), true, "standing by: another reader holds the slot") {
            tracing::info!("standing by: another reader holds the slot");
        }
    }

    fn committed(&self, progress: &Progress, records: u64) {
        self.takeover.set(false);
        self.metrics.iter().for_each(|metrics| metrics.committed(progress, records));
        if self.service.telemetry.tell(self.part(), true, "streaming") || self.unsettled.take() {
            tracing::info!(lsn = %progress.end_lsn, generation = self.generation.get(), "streaming");
        }
        let reading = progress.snapshot.is_some();
        self.complete.inspect(|complete| complete.store(!reading, Ordering::Relaxed));
        if self.reading.replace(reading) && !reading {
            tracing::info!("the snapshot is complete");
        }
    }

    fn read(&self, tables: &mut dyn Iterator<Item = &TableProgress>) {
        let now = Instant::now();
        let due = self.told.get().is_none_or(|told| now.duration_since(told) >= TELL_INTERVAL);
        for table in &TableProgress::by_name(tables) {
            self.metrics.iter().for_each(|metrics| metrics.read(table));
            if due && table.pending() {
                self.told.set(Some(now));
                tracing::info!("reading {}: {}", table.name, Reading::of(table).describe());
            }
        }
    }

    fn reads_anew(&self, table: &str, why: &str) {
        tracing::warn!("{table} is read anew: {why}");
    }

    fn left(&self, table: &str) {
        tracing::info!("{table} is not published any more; the log has what was committed before");
    }

    fn omitted(&self, key: &str, columns: &str) {
        tracing::warn!(
            key,
            columns,
            "a row is larger than a record may be, and is in the log without these columns"
        );
    }

    fn not_visible(&self, consequence: &str) {
        let reason = "a committed transaction that may have altered a table is not visible: it waits for a synchronous \
                      standby (synchronous_standby_names), or another one holds the lock";
        tracing::warn!(reason, "{consequence}");
    }

    fn reached(&self, stage: &str) {
        failpoint::reached(stage);
    }

    fn snapshot_waits(&self, reason: &str) {
        tracing::warn!(reason, "the snapshot waits");
    }
}
