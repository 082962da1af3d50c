//! Power losses of the whole machine: everything ends at once, and each file of Kafka is without what was not flushed,
//! from another place on. Whatever is left, and in whatever order the processes come back: the stores come back by
//! themselves, or a process is refused and the remedy that it prints works. No store shows half a transaction meanwhile,
//! and none is wrong and says that it is ready.

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use testkit::services::Torn;

use crate::chaos::Sampler;
use crate::harness::{Pipeline, ROLES, Role, SOON, copy_directory, soon, tail};
use crate::mailbox::{Traffic, fill_points};

/// Power losses per run, the first of them [`CASES`]; `MILLRACE_POWER_LOSSES` overrides.
const LOSSES: usize = 8;
/// The longest that the stores may take to come back, with every remedy.
const BACK: Duration = SOON.saturating_mul(2);
/// An open transaction that the brokers do not end is refused after this time.
const EXTRA: &str = "[reader]\noutage_limit_ms = 8000\n";

/// What comes back without its end.
#[derive(Clone, Copy, Debug)]
struct Case {
    log: bool,
    ledger: bool,
    /// What brokers keep of transactions and of groups.
    transactions: bool,
    groups: bool,
    /// All of them lose what came after one and the same moment.
    together: bool,
    /// The slot, too, is where it was at that moment.
    slot: bool,
    /// The stores are as they were before the traffic.
    stores: bool,
}

/// The log is written again by a reader that knows of no loss.
const WRITTEN_AGAIN: Case = Case {
    log: true,
    ledger: true,
    transactions: true,
    groups: false,
    together: true,
    slot: true,
    stores: false,
};

/// Those that differ most in what follows.
const CASES: [Case; 4] = [
    WRITTEN_AGAIN,
    Case { stores: true, ..WRITTEN_AGAIN },
    Case { together: false, groups: true, ..WRITTEN_AGAIN },
    Case { log: false, ledger: false, together: false, slot: false, ..WRITTEN_AGAIN },
];

#[test]
#[ignore = "minutes; scripts/test --full runs it"]
fn stores_come_back_after_a_power_loss_or_a_remedy_brings_them_back() {
    let variable = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
    let seed = variable("MILLRACE_POWER_SEED").unwrap_or(1);
    let losses = variable("MILLRACE_POWER_LOSSES").map_or(LOSSES, |losses| losses as usize);
    eprintln!("replay with MILLRACE_POWER_SEED={seed}");
    let mut pipeline = Pipeline::running_with(EXTRA);
    fill_points(&pipeline.postgres);
    let sampler = Sampler::start(pipeline.redis.port());
    for number in 0..losses {
        let mut rng = StdRng::seed_from_u64(seed * 1000 + number as u64);
        let case = CASES.get(number).copied().unwrap_or_else(|| Case::random(&mut rng));
        eprintln!("power loss {number}: {case:?}");
        let start = Instant::now();
        lose_power(&mut pipeline, case, number as u64, &mut rng);
        eprintln!("  back after {:?}", start.elapsed());
    }
    assert!(sampler.stop() > 100, "the sampler looked");
}

impl Case {
    fn random(rng: &mut StdRng) -> Case {
        let mut often = || rng.random_bool(0.6);
        let [log, ledger, transactions, groups, together, slot, stores] = [(); 7].map(|()| often());
        Case { log, ledger, transactions, groups, together, slot, stores }
    }

    /// The topics that lose their ends.
    fn topics(self, generation: u32) -> Vec<String> {
        let log = format!("millrace.mailbox.{generation}");
        let all = [
            (self.log, log.clone()),
            (self.ledger, format!("{log}.ledger")),
            (self.transactions, "__transaction_state".to_owned()),
            (self.groups, "__consumer_offsets".to_owned()),
        ];
        all.into_iter().filter_map(|(lost, topic)| lost.then_some(topic)).collect()
    }
}

fn lose_power(pipeline: &mut Pipeline, case: Case, seed: u64, rng: &mut StdRng) {
    let older = case.stores.then(|| copy_stores(pipeline, seed));
    let traffic = Traffic::gentle(&pipeline.postgres, seed + 50, 1);
    thread::sleep(Duration::from_millis(rng.random_range(300..1500)));
    let generation = generation(pipeline);
    let topics = case.topics(generation);
    let mut flushed = batches(pipeline, &topics);
    if case.together {
        pipeline.kill(Role::Reader);
        soon("the last transaction has ended", || {
            thread::sleep(Duration::from_millis(200));
            std::mem::replace(&mut flushed, batches(pipeline, &topics)) == flushed
        });
    }
    let state = format!("pg_replslot/millrace_mailbox_{generation}/state");
    let state = pipeline.postgres.data_dir().join(state);
    let slot = fs::read(&state).expect("a slot");
    if case.together {
        pipeline.spawn(Role::Reader);
        flows(pipeline);
    }
    thread::sleep(Duration::from_millis(rng.random_range(200..1500)));
    pipeline.kafka.kill();
    ROLES.into_iter().for_each(|role| pipeline.kill(role));
    if case.slot {
        pipeline.postgres.kill();
        fs::write(&state, slot).expect("our own directory");
        pipeline.postgres.restart();
    }
    for (topic, flushed) in topics.iter().zip(flushed) {
        // Files are written to the disk at different times.
        let unflushed = pipeline.kafka.batches(topic).saturating_sub(flushed).clamp(1, 12);
        let more = if case.together { 0 } else { rng.random_range(0..unflushed) };
        let torn = [Torn::Between, Torn::Short, Torn::Zeros][rng.random_range(0..3)];
        let lost = pipeline.kafka.lose_batches_after(topic, flushed + more, torn);
        eprintln!("  {topic}: {lost} batches are lost after {flushed} and {more}, {torn:?}");
    }
    if let Some((redis, search)) = older {
        pipeline.redis.restore_from(&redis);
        fs::remove_dir_all(pipeline.search_directory()).expect("our directory");
        copy_directory(&search, &pipeline.search_directory());
    }

    let mut order = ROLES;
    order.shuffle(rng);
    let broker = rng.random_range(0..=1);
    eprintln!("  the broker comes before {:?} of {order:?}", order[broker]);
    for (place, role) in order.into_iter().enumerate() {
        if place == broker {
            pipeline.kafka.restart();
        }
        pipeline.spawn(role);
        // Long enough for a process to do something of its own, or not.
        thread::sleep(Duration::from_millis(rng.random_range(0..4000)));
    }
    follow_remedies(pipeline);
    traffic.stop();
    follow_remedies(pipeline);
    pipeline.succeed(&["verify"]);
    pipeline.assert_stores_equal();
}

fn batches(pipeline: &Pipeline, topics: &[String]) -> Vec<usize> {
    topics.iter().map(|topic| pipeline.kafka.batches(topic)).collect()
}

/// Waits until a change that is made now shows in the stores.
fn flows(pipeline: &Pipeline) {
    let before = pipeline.counter("points");
    soon("traffic flows", || pipeline.counter("points") != before);
}

/// Redis' data and the search directory as they are.
fn copy_stores(pipeline: &mut Pipeline, number: u64) -> (PathBuf, PathBuf) {
    let directory = pipeline.directory.path();
    let [redis, search] = ["redis", "search"].map(|name| directory.join(format!("older-{name}-{number}")));
    pipeline.redis.dump_to(&redis);
    pipeline.kill(Role::Search);
    copy_directory(&pipeline.search_directory(), &search);
    pipeline.spawn(Role::Search);
    (redis, search)
}

/// Does what each refused process asks for, and starts it again, until every store has what Postgres has now.
fn follow_remedies(pipeline: &mut Pipeline) {
    let start = Instant::now();
    let mut renewed = None;
    loop {
        let ended: Vec<Role> =
            ROLES.into_iter().filter(|role| pipeline.running_process(*role).ended().is_some()).collect();
        let caught_up = pipeline.millrace(&["wait", "--timeout", "3s"]).status.success();
        if ended.is_empty() && caught_up {
            return;
        }
        for role in ended {
            follow_remedy(pipeline, role);
        }
        // A reader goes on trying where the brokers may yet end a transaction.
        let generation = generation(pipeline);
        let last = pipeline.log("reader").lines().next_back().unwrap_or_default().to_owned();
        if last.contains("remedy: `millrace generation new`") && renewed != Some(generation) {
            eprintln!("  reader: {last}\n  {}", pipeline.succeed(&["generation", "new"]));
            renewed = Some(generation);
        }
        let status = pipeline.millrace(&["status"]).stdout;
        assert!(start.elapsed() < BACK, "not back in time:\n{}", String::from_utf8_lossy(&status));
    }
}

fn follow_remedy(pipeline: &mut Pipeline, role: Role) {
    let log = pipeline.log(role.command());
    let code = pipeline.running_process(role).ended().and_then(|status| status.code());
    assert_eq!(code, Some(3), "{role:?}: {}", tail(&log));
    let said = log.rsplit("error: ").next().unwrap_or_default();
    eprintln!("  {role:?}: {said}");
    let (_, remedy) = said.split_once("remedy: ").unwrap_or_else(|| panic!("no remedy: {said}"));
    // Found out before it is read, not by chance in the middle of it.
    let of_a_record = format!("topic {}, partition 0, offset", log_topic(pipeline));
    assert!(!said.contains(&of_a_record), "a log that a store was not left in is read");
    let verified = pipeline.millrace(&["verify", "--timeout", "1s"]);
    assert_ne!(verified.status.code(), Some(1), "{}", String::from_utf8_lossy(&verified.stdout));
    if let Some((_, abort)) = remedy.split_once(", then abort ") {
        let bootstrap = pipeline.kafka.bootstrap();
        let abort = abort.split(';').next().unwrap_or_default().split(' ');
        let arguments = ["--bootstrap-server", &bootstrap, "abort"].into_iter().chain(abort);
        let class = "org.apache.kafka.tools.TransactionsCommand";
        eprintln!("  {}", pipeline.kafka.tool(class, &arguments.collect::<Vec<_>>()));
    } else if remedy.contains("--reset-offsets --to-earliest") {
        let (group, topic) = (format!("millrace.mailbox.{}", role.command()), log_topic(pipeline));
        let bootstrap = pipeline.kafka.bootstrap();
        let place = ["--bootstrap-server", &bootstrap, "--group", &group, "--topic", &topic];
        let reset = ["--reset-offsets", "--to-earliest", "--execute"];
        let class = "org.apache.kafka.tools.consumer.group.ConsumerGroupCommand";
        eprintln!("  {}", pipeline.kafka.tool(class, &[&place[..], &reset[..]].concat()));
    } else {
        assert!(remedy.contains("millrace generation new"), "{said}");
        eprintln!("  {}", pipeline.succeed(&["generation", "new"]));
    }
    pipeline.spawn(role);
}

fn log_topic(pipeline: &Pipeline) -> String {
    format!("millrace.mailbox.{}", generation(pipeline))
}

/// The number of the current log.
fn generation(pipeline: &Pipeline) -> u32 {
    let status = pipeline.succeed(&["status"]);
    let first = status.lines().next().unwrap_or_default();
    first.rsplit(' ').next().and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("{status}"))
}
