//! The processes that keep running: reader, counters, search, each alone or all in one process.
//!
//! Every part has a thread of its own, because its ports block. One that fails ends the others in order; a signal
//! ends all of them.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, anyhow};
use change::Refusal;

use super::service::Service;
use super::{counters, reader, search};
use crate::failure::{Failure, Outcome};
use crate::stop::Stop;
use crate::telemetry::{self, Telemetry};
use crate::wiring::Process;

/// One part.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Part {
    Reader { takeover: bool },
    Counters,
    Search,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Part::Reader { .. } => "reader",
            Part::Counters => "counters",
            Part::Search => "search",
        }
    }

    fn listen(self, process: &Process) -> Option<SocketAddr> {
        let telemetry = &process.config.telemetry;
        match self {
            Part::Reader { .. } => telemetry.reader,
            Part::Counters => telemetry.counters,
            Part::Search => telemetry.search,
        }
    }

    fn run(self, service: &Service) -> Outcome {
        match self {
            Part::Reader { takeover } => reader::run(service, takeover),
            Part::Counters => counters::run(service),
            Part::Search => search::run(service),
        }
    }
}

/// `millrace reader`.
pub(crate) fn reader(process: Process, takeover: bool) -> Outcome {
    run(process, &[Part::Reader { takeover }], Vec::new())
}

/// `millrace counters`.
pub(crate) fn counters(process: Process, skip: Vec<i64>) -> Outcome {
    if process.config.counters.is_empty() {
        return Err(
            Refusal::new("no counter is configured", "write a section [counters.NAME] with `sql`").into()
        );
    }
    run(process, &[Part::Counters], skip)
}

/// `millrace search`.
pub(crate) fn search(process: Process, skip: Vec<i64>) -> Outcome {
    if process.config.search.as_ref().is_none_or(|search| search.indexes.is_empty()) {
        let remedy = "write a section [search], and [search.indexes.NAME] for each index";
        return Err(Refusal::new("no search index is configured", remedy).into());
    }
    run(process, &[Part::Search], skip)
}

/// `millrace run`: what is configured of them.
pub(crate) fn all(process: Process, takeover: bool) -> Outcome {
    let mut parts = vec![Part::Reader { takeover }];
    if !process.config.counters.is_empty() {
        parts.push(Part::Counters);
    }
    if process.config.search.as_ref().is_some_and(|search| !search.indexes.is_empty()) {
        parts.push(Part::Search);
    }
    run(process, &parts, Vec::new())
}

fn run(process: Process, parts: &[Part], skip: Vec<i64>) -> Outcome {
    let stop = Stop::on_signals(&process.runtime).context("cannot listen to signals")?;
    let telemetry = Arc::new(Telemetry::new());
    for part in parts {
        telemetry.tell(part.name(), false, "starting");
    }
    let addresses = parts.iter().filter_map(|part| part.listen(&process));
    telemetry::serve(&process.runtime, addresses, &telemetry)?;
    let service = Service { process, stop, telemetry, skip };
    let first: Mutex<Option<Failure>> = Mutex::new(None);
    let keep = |part: Part, outcome: Outcome| {
        let Err(failure) = outcome else { return };
        service.stop.set();
        let mut first = first.lock().unwrap_or_else(PoisonError::into_inner);
        match *first {
            None => *first = Some(failure),
            Some(_) => tracing::error!(part = part.name(), "{}", failure.to_string().trim_end()),
        }
    };
    thread::scope(|scope| {
        let start = |part: Part| {
            let thread = thread::Builder::new().name(part.name().to_owned());
            let (service, keep) = (&service, &keep);
            let started = thread.spawn_scoped(scope, move || {
                // A panic must not leave the other parts running alone.
                let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| part.run(service)));
                let panicked =
                    |_| Err(Failure::Failed(anyhow!("{} panicked; the lines above say where", part.name())));
                keep(part, outcome.unwrap_or_else(panicked));
            });
            if let Err(error) = started {
                keep(part, Err(Failure::Failed(anyhow!("cannot start a thread: {error}"))));
            }
        };
        parts.iter().copied().for_each(start);
    });
    match first.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(failure) => Err(failure),
        None => {
            tracing::info!("ended in order");
            Ok(())
        }
    }
}
