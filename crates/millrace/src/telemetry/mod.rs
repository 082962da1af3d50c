//! What operators see of a running process: log lines, `/health`, `/metrics`.

pub(crate) mod log;
mod metrics;
mod server;

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::Serialize;

pub(crate) use metrics::{ReaderMetrics, WorkerMetrics};
pub(crate) use server::serve;

/// How a part of the process does.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub(crate) struct Health {
    /// Whether it does what it should.
    pub(crate) ready: bool,
    /// In a few words.
    pub(crate) state: String,
}

/// What a process tells of itself: one for all its parts.
pub(crate) struct Telemetry {
    registry: Mutex<prometheus_client::registry::Registry>,
    parts: Mutex<BTreeMap<&'static str, Health>>,
}

impl Telemetry {
    pub(crate) fn new() -> Self {
        let registry = prometheus_client::registry::Registry::with_prefix("millrace");
        Telemetry { registry: Mutex::new(registry), parts: Mutex::default() }
    }

    /// Says how a part does; whether that is news.
    pub(crate) fn tell(&self, part: &'static str, ready: bool, state: impl Into<String>) -> bool {
        let health = Health { ready, state: state.into() };
        let before = lock(&self.parts).insert(part, health.clone());
        before != Some(health)
    }

    fn health(&self) -> BTreeMap<&'static str, Health> {
        lock(&self.parts).clone()
    }

    /// The metrics in Prometheus' text form.
    fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &lock(&self.registry));
        text
    }
}

/// A thread that panicked leaves plain values behind, which are still good.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
