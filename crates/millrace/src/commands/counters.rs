//! `millrace counters`: keeps the counters in Redis.

use redis_counters::{Bounds, CountersSink};

use super::service::Service;
use super::worker;
use crate::failure::Outcome;

/// Counts until told to stop.
pub(crate) fn run(service: &Service) -> Outcome {
    let (server, space) = service.process.redis()?;
    let definitions = service.process.config.counters.iter().map(|counter| counter.definition.clone());
    let mut sink = CountersSink::new(&server, space, Bounds::default(), definitions.collect())?;
    worker::run(service, "counters", &mut sink)
}
