//! kill -9 of everything, at random moments, under live traffic; and a reader that looks all the while.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::harness::{Pipeline, Role, soon, tail};
use crate::mailbox::{POINTS, Traffic, fill_points};

/// Kills per run.
const ROUNDS: u32 = 14;
/// Kills of the worker that keeps the counters.
const KILLS: u32 = 12;

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// How often to kill: `MILLRACE_CHAOS_ROUNDS`, or so often.
pub(crate) fn rounds(usually: u32) -> u32 {
    variable("MILLRACE_CHAOS_ROUNDS").map_or(usually, |rounds| rounds as u32)
}

#[test]
fn stores_equal_postgres_whatever_is_killed() {
    let seed = variable("MILLRACE_CHAOS_SEED").unwrap_or(1);
    eprintln!("replay with MILLRACE_CHAOS_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);

    let mut pipeline = Pipeline::running();
    fill_points(&pipeline.postgres);
    let sampler = Sampler::start(pipeline.redis.port());
    let traffic = Traffic::start(&pipeline.postgres, seed, 3);
    for round in 0..rounds(ROUNDS) {
        std::thread::sleep(Duration::from_millis(rng.random_range(50..1500)));
        let pause = Duration::from_millis(rng.random_range(0..400));
        match rng.random_range(0..8) {
            0 | 1 => kill(&mut pipeline, Role::Reader, pause),
            2 | 3 => kill(&mut pipeline, Role::Counters, pause),
            4 => kill(&mut pipeline, Role::Search, pause),
            5 => {
                pipeline.kafka.kill();
                std::thread::sleep(pause);
                pipeline.kafka.restart();
            }
            6 => {
                pipeline.redis.kill();
                std::thread::sleep(pause);
                pipeline.redis.restart();
            }
            _ => {
                pipeline.postgres.kill();
                std::thread::sleep(pause);
                pipeline.postgres.restart();
            }
        }
        pipeline.assert_alive();
        eprintln!("round {round}: {} transactions", traffic.committed.load(Ordering::Relaxed));
    }
    let committed = traffic.stop();
    assert!(committed > 100, "there was traffic: {committed}");
    pipeline.assert_stores_equal();
    let samples = sampler.stop();
    assert!(samples > 100, "the sampler looked: {samples}");
}

/// As often as it comes back to work, so that many kills fall between the effect and what else a commit does.
#[test]
fn a_worker_that_is_killed_in_every_commit_counts_nothing_twice() {
    let mut rng = StdRng::seed_from_u64(2);
    let mut pipeline = Pipeline::running();
    fill_points(&pipeline.postgres);
    let traffic = Traffic::start(&pipeline.postgres, 2, 2);
    for kill in 0..KILLS {
        let at = offset_of_sizes(&pipeline);
        soon("the counters move on", || offset_of_sizes(&pipeline) != at);
        std::thread::sleep(Duration::from_millis(rng.random_range(0..100)));
        pipeline.restart(Role::Counters);
        pipeline.assert_alive();
        eprintln!("kill {kill} after offset {at}");
    }
    traffic.stop();
    pipeline.assert_stores_equal();
    let filled = pipeline.log("counters").matches("filling from the log's beginning store=").count();
    assert_eq!(
        filled,
        5,
        "each counter was filled once, when it was new:\n{}",
        tail(&pipeline.log("counters"))
    );
}

fn offset_of_sizes(pipeline: &Pipeline) -> i64 {
    let mut redis = pipeline.redis.connect();
    let offset =
        redis::cmd("HGET").arg("millrace:mailbox:sizes").arg("offset").query::<Option<i64>>(&mut redis);
    offset.expect("Redis answers").unwrap_or(0)
}

fn kill(pipeline: &mut Pipeline, role: Role, pause: Duration) {
    pipeline.kill(role);
    std::thread::sleep(pause);
    pipeline.spawn(role);
}

/// Reads the counter `points` again and again: whatever moment it hits, the sum is what every transaction keeps.
pub(crate) struct Sampler {
    stop: Arc<AtomicBool>,
    samples: Arc<AtomicU64>,
    thread: std::thread::JoinHandle<()>,
}

impl Sampler {
    pub(crate) fn start(port: u16) -> Self {
        let (stop, samples) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counted) = (stop.clone(), samples.clone());
        let thread = std::thread::spawn(move || {
            let client = redis::Client::open(format!("redis://127.0.0.1:{port}/0")).expect("a URL");
            let mut connection = None;
            while !stopped.load(Ordering::Relaxed) {
                let mut open = match connection.take().or_else(|| client.get_connection().ok()) {
                    Some(open) => open,
                    None => {
                        std::thread::sleep(Duration::from_millis(20));
                        continue;
                    }
                };
                let Ok(values) = redis::cmd("HVALS").arg("points").query::<Vec<i64>>(&mut open) else {
                    continue;
                };
                connection = Some(open);
                // Before the first transaction there is nothing.
                if !values.is_empty() {
                    assert_eq!(
                        values.iter().sum::<i64>(),
                        POINTS,
                        "half a transaction is visible: {values:?}"
                    );
                    counted.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Sampler { stop, samples, thread }
    }

    pub(crate) fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("no half transaction was seen");
        self.samples.load(Ordering::Relaxed)
    }
}
