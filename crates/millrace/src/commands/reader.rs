//! `millrace reader`: runs the relay, and again when that can help.

use std::cell::Cell;
use std::time::{Duration, Instant};

use change::{Progress, TableProgress};
use kafka::{Connection, KafkaPublisher, Names, Problem};
use postgres::{PostgresSource, SourceOptions};
use relay::{Control, PublishError, RelayError};

use super::service::Service;
use super::status::Reading;
use crate::failpoint;
use crate::failure::Outcome;
use crate::stop::SystemClock;
use crate::supervise::{Next, Supervisor};
use crate::telemetry::ReaderMetrics;

const PART: &str = "reader";

/// Streams until told to stop, standing by while another reader holds the slot.
pub(crate) fn run(service: &Service, takeover: bool) -> Outcome {
    let watch = Watch {
        service,
        metrics: ReaderMetrics::new(&service.telemetry),
        takeover: Cell::new(takeover),
        unsettled: Cell::new(false),
        reading: Cell::new(false),
        told: Cell::new(None),
        checked: Cell::new(false),
    };
    let mut supervisor = Supervisor::new();
    loop {
        let started = Instant::now();
        let error = match attempt(service, &watch) {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        if matches!(error, RelayError::Publish(PublishError::Fenced)) {
            // The newer reader was started for a reason; from here on this one only stands by.
            watch.takeover.set(false);
        }
        service.telemetry.tell(PART, false, error.to_string());
        watch.metrics.restarted();
        watch.unsettled.set(true);
        let reason = error.to_string();
        match supervisor.after_relay(error, started, Instant::now()) {
            Next::End(failure) => return Err(failure),
            Next::Again(wait) => {
                tracing::warn!(reason, ?wait, "the reader begins again");
                if service.stop.wait(wait) {
                    return Ok(());
                }
            }
        }
    }
}

fn attempt(service: &Service, watch: &Watch<'_>) -> Result<(), RelayError> {
    let process = &service.process;
    let kafka = process.kafka()?;
    let names: Names = process.names(&kafka).map_err(PublishError::from)?;
    if !watch.checked.get() {
        check_topics(&kafka, &names)?;
        watch.checked.set(true);
    }
    let plan = process.plan(names.generation())?;
    let config = process.source()?;
    let database = config.database().to_owned();
    let options = SourceOptions {
        pipeline: plan.pipeline.clone(),
        slot: plan.slot.clone(),
        publication: plan.publication.clone(),
        tables: plan.tables.iter().map(ToString::to_string).collect(),
        snapshot_connections: process.config.snapshot.connections,
    };
    let mut source = PostgresSource::connect(process.runtime.handle(), &config, options)?;
    let mut publisher = KafkaPublisher::new(kafka, names);
    let clock = SystemClock(service.stop.clone());
    let limits = &process.config.reader.limits;
    relay::run(&mut source, &mut publisher, &clock, watch, (&plan.pipeline, &database), limits)
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
    metrics: ReaderMetrics,
    takeover: Cell<bool>,
    /// Whether the next commit is the first since the relay had to begin again.
    unsettled: Cell<bool>,
    /// Whether tables were being read at the last commit.
    reading: Cell<bool>,
    /// When it was last told how far they have been read.
    told: Cell<Option<Instant>>,
    /// Whether the topics' configuration was looked at.
    checked: Cell<bool>,
}

impl Control for Watch<'_> {
    fn stop(&self) -> bool {
        self.service.stop.is_set()
    }

    fn take_over(&self) -> bool {
        self.takeover.get()
    }

    fn standing_by(&self) {
        self.metrics.standing_by();
        if self.service.telemetry.tell(PART, true, "standing by: another reader holds the slot") {
            tracing::info!("standing by: another reader holds the slot");
        }
    }

    fn committed(&self, progress: &Progress, records: u64) {
        self.takeover.set(false);
        self.metrics.committed(progress, records);
        if self.service.telemetry.tell(PART, true, "streaming") || self.unsettled.take() {
            tracing::info!(lsn = %progress.end_lsn, "streaming");
        }
        let reading = progress.snapshot.is_some();
        if self.reading.replace(reading) && !reading {
            tracing::info!("the snapshot is complete");
        }
    }

    fn read(&self, tables: &mut dyn Iterator<Item = &TableProgress>) {
        let now = Instant::now();
        let due = self.told.get().is_none_or(|told| now.duration_since(told) >= TELL_INTERVAL);
        for table in tables {
            self.metrics.read(table);
            if due && table.pending() {
                self.told.set(Some(now));
                tracing::info!("reading {}: {}", table.name, Reading::of(table).describe());
            }
        }
    }

    fn reached(&self, stage: &str) {
        failpoint::reached(stage);
    }

    fn snapshot_waits(&self, reason: &str) {
        tracing::warn!(reason, "the snapshot waits");
    }
}
