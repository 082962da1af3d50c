//! Which logs the pipeline has, as the threads of a process know it.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use kafka::{Generations, GenerationsWatch, KafkaError, Records, Skip};
use worker::Unfit;

use crate::stop::Stop;
use crate::wiring::Process;

/// Between two looks at the generations topic.
const LOOK: Duration = Duration::from_secs(1);
/// How long one look may take, and so an orderly end.
const PATIENCE: Duration = Duration::from_secs(2);

/// What the generations topic said last.
#[derive(Default)]
pub(crate) struct Logs(Mutex<Known>);

#[derive(Default)]
struct Known {
    /// `None` before anybody has looked.
    generations: Option<Generations>,
    skips: Vec<Skip>,
    /// Counts what was news.
    news: u64,
}

impl Logs {
    /// `None` before anybody has looked.
    pub(crate) fn known(&self) -> Option<Generations> {
        self.lock().generations
    }

    /// Whether the store is to leave out this record of that log.
    pub(crate) fn skips(&self, generation: u32, store: &str, record: &Unfit) -> bool {
        let meant = |records: &Records| match records {
            Records::At(offset) => *offset == record.offset,
            Records::OfRow(key) => record.key.as_ref() == Some(key),
        };
        let asked =
            |skip: &Skip| (skip.generation, &*skip.store) == (generation, store) && meant(&skip.records);
        self.lock().skips.iter().any(asked)
    }

    /// A number that is another one after every news.
    pub(crate) fn news(&self) -> u64 {
        self.lock().news
    }

    /// Takes note; gives whether it is news.
    pub(crate) fn learned(&self, generations: Generations) -> bool {
        let mut known = self.lock();
        let news = known.generations.replace(generations).is_some_and(|before| before != generations);
        known.news += u64::from(news);
        news
    }

    /// Takes note of the records that are to be left out.
    pub(crate) fn learned_skips(&self, skips: &[Skip]) {
        let mut known = self.lock();
        if known.skips != skips {
            known.skips = skips.to_vec();
            known.news += 1;
        }
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
                let found = watch.look()?;
                self.learned_skips(watch.skips());
                Ok::<_, kafka::KafkaError>(found)
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

    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        // Plain values, good whatever happened to who held them.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
