//! Which logs the pipeline has, as the threads of a process know it.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use kafka::{Generations, GenerationsWatch, KafkaError};

use crate::stop::Stop;
use crate::wiring::Process;

/// Between two looks at the generations topic.
const LOOK: Duration = Duration::from_secs(1);
/// How long one look may take, and so an orderly end.
const PATIENCE: Duration = Duration::from_secs(2);

/// What the generations topic said last.
#[derive(Default)]
pub(crate) struct Logs(Mutex<Option<Generations>>);

impl Logs {
    /// `None` before anybody has looked.
    pub(crate) fn known(&self) -> Option<Generations> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note; gives whether it is news.
    pub(crate) fn learned(&self, generations: Generations) -> bool {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.replace(generations).is_some_and(|before| before != generations)
    }

    /// Asks the brokers now. Where they do not answer, what was known before stays.
    pub(crate) fn look(&self, process: &Process) {
        let found =
            process.kafka_briefly().map_err(KafkaError::from).and_then(|kafka| process.generations(&kafka));
        match found {
            Ok(found) => drop(self.learned(found)),
            Err(error) => tracing::debug!(%error, "cannot look at the generations"),
        }
    }

    /// Whether this log is of use, as far as is known.
    pub(crate) fn of_use(&self, generation: u32) -> bool {
        self.known().is_none_or(|known| known.get(generation).is_some())
    }

    /// Looks at the topic now and then until `stop`, and calls `changed` on every news. Brokers that are away are others'
    /// concern.
    pub(crate) fn follow(&self, process: &Process, stop: &Stop, changed: impl Fn(Generations)) {
        let pipeline = process.config.pipeline.as_str();
        let mut watch = None;
        while !stop.wait(LOOK) {
            let looked = (|| {
                let watch = match &mut watch {
                    Some(watch) => watch,
                    None => {
                        let kafka = process.kafka()?.with_outage_limit(PATIENCE);
                        watch.insert(GenerationsWatch::new(&kafka, pipeline)?)
                    }
                };
                watch.look()
            })();
            match looked {
                Ok(found) if self.learned(found) => changed(found),
                Ok(_) => {}
                Err(error) => {
                    tracing::debug!(%error, "cannot look at the generations");
                    watch = None;
                }
            }
        }
    }
}
