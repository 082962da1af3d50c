//! `millrace counters`: keeps the counters in Redis.

use redis_counters::{Bounds, CountersSink};

use super::service::Service;
use super::worker::{self, Sinks};
use crate::failure::Outcome;

/// Counts until told to stop.
pub(crate) fn run(service: &Service) -> Outcome {
    let (server, space) = service.process.redis()?;
    let definitions = || {
        let counters = service.process.config.counters.iter();
        counters.map(|counter| counter.definition.clone()).collect()
    };
    let mut stores = CountersSink::new(&server, space.clone(), Bounds::default(), definitions())?;
    let mut copies = CountersSink::of_copies(&server, space, Bounds::default(), definitions())?;
    let names = ["counters", "counters_rebuild"];
    worker::run(service, names, Sinks { stores: &mut stores, copies: &mut copies })
}
