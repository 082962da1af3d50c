use std::sync::Arc;

use crate::stop::Stop;
use crate::telemetry::Telemetry;
use crate::wiring::Process;

/// What every part of a running process has.
pub(crate) struct Service {
    pub(crate) process: Process,
    pub(crate) stop: Stop,
    pub(crate) telemetry: Arc<Telemetry>,
    /// Offsets of records that the worker leaves out if it cannot apply them.
    pub(crate) skip: Vec<i64>,
}
