//! What the two workers share: they run on the log, and again when that can help.

use std::time::Instant;

use kafka::KafkaFeed;
use worker::{Checkpoint, Control, FeedError, Sink, WorkerError};

use super::service::Service;
use crate::failure::Outcome;
use crate::stop::SystemClock;
use crate::supervise::{Next, Supervisor};
use crate::telemetry::WorkerMetrics;

/// Keeps a sink's stores until told to stop. `part` names the worker: `counters` or `search`.
pub(crate) fn run(service: &Service, part: &'static str, sink: &mut dyn Sink) -> Outcome {
    let watch = Watch {
        service,
        part,
        stores: sink.stores().iter().map(|store| store.name.clone()).collect(),
        metrics: WorkerMetrics::new(&service.telemetry, part),
    };
    let mut supervisor = Supervisor::new();
    loop {
        let started = Instant::now();
        let mut log = String::new();
        let error = match attempt(service, part, sink, &watch, &mut log) {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        let reason = error.to_string();
        service.telemetry.tell(part, false, reason.clone());
        watch.metrics.restarted();
        match supervisor.after_worker(error, part, &log, started, Instant::now()) {
            Next::End(failure) => return Err(failure),
            Next::Again(wait) => {
                tracing::warn!(part, reason, ?wait, "the worker begins again");
                if service.stop.wait(wait) {
                    return Ok(());
                }
            }
        }
    }
}

fn attempt(
    service: &Service,
    part: &str,
    sink: &mut dyn Sink,
    watch: &Watch<'_>,
    log: &mut String,
) -> Result<(), WorkerError> {
    let kafka = service.process.kafka()?;
    let names = service.process.names(&kafka).map_err(FeedError::from)?;
    *log = names.log();
    let mut feed = KafkaFeed::open(&kafka, &names, &names.group(part, None))?;
    worker::run(&mut feed, sink, &SystemClock(service.stop.clone()), watch)
}

/// Tells the worker what the process is told, and the operators what the worker tells.
struct Watch<'a> {
    service: &'a Service,
    part: &'static str,
    stores: Vec<String>,
    metrics: WorkerMetrics,
}

impl Control for Watch<'_> {
    fn stop(&self) -> bool {
        self.service.stop.is_set()
    }

    fn skip(&self, offset: i64) -> bool {
        self.service.skip.contains(&offset)
    }

    fn moved(&self, checkpoints: &[Checkpoint]) {
        for (store, checkpoint) in self.stores.iter().zip(checkpoints) {
            self.metrics.moved(store, checkpoint);
        }
        let ready = checkpoints.iter().all(|checkpoint| checkpoint.ready);
        let state = if ready { "following the log" } else { "filling from the log's beginning" };
        if self.service.telemetry.tell(self.part, ready, state) {
            tracing::info!(part = self.part, state);
        }
    }

    fn delayed(&self, reason: &str) {
        self.metrics.delayed();
        self.service.telemetry.tell(self.part, false, reason);
    }
}
