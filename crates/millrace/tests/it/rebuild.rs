//! Stores built anew beside those that readers see: nobody notices but by `status`, whatever is killed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use redis::Commands;
use serde_json::Value;
use testkit::services::wait_until;

use crate::chaos::rounds;
use crate::harness::{Pipeline, Role, SOON, soon, tail};
use crate::mailbox::{POINTS, Traffic, fill_points};

/// Mails that make the log long enough to be caught in the middle of a rebuild.
const MAILS: u64 = 30_000;
/// Kills per run.
const KILLS: u32 = 8;
/// A counter that never has a group.
const NOBODY: &str = "[counters.nobody]\nsql = \"SELECT user_id, count(*) FROM public.emails WHERE user_id = -1 GROUP BY user_id\"\n";

/// A running pipeline with a long log, all of it in the stores.
pub(crate) fn long() -> Pipeline {
    let mut pipeline = Pipeline::running_with(NOBODY);
    fill_points(&pipeline.postgres);
    for part in 0..MAILS / 10_000 {
        let first = 100_000 + part * 10_000;
        pipeline.postgres.sql(
            "app",
            &format!(
                "INSERT INTO emails SELECT g, g % 50, 'inbox', 'me@x.org', 'subject', 'words ' || g, false, 1, \
                 '2026-01-01 10:00:00Z' FROM generate_series({first}, {first} + 9999) g"
            ),
        );
    }
    pipeline.succeed(&["wait", "--timeout", "90s"]);
    pipeline.assert_alive();
    pipeline
}

/// What `verify` proves; the tests' own comparison would take long over so many mails.
pub(crate) fn assert_equal(pipeline: &mut Pipeline) {
    pipeline.succeed(&["wait", "--timeout", "90s"]);
    pipeline.succeed(&["verify"]);
    pipeline.assert_alive();
}

/// The keys that belong to copies.
fn copies(pipeline: &Pipeline) -> Vec<String> {
    let mut redis = pipeline.redis.connect();
    redis.keys::<_, Vec<String>>("millrace:mailbox:*:copy*").expect("Redis answers")
}

/// The offset of a checkpoint in Redis.
pub(crate) fn offset(pipeline: &Pipeline, key: &str) -> Option<i64> {
    let mut redis = pipeline.redis.connect();
    redis.hget::<_, _, Option<i64>>(key, "offset").expect("Redis answers")
}

/// The offset that a directory's last commit says.
fn offset_on_disk(pipeline: &Pipeline, directory: &str) -> Option<i64> {
    let meta = std::fs::read(pipeline.search_directory().join(directory).join("meta.json")).ok()?;
    let meta: Value = serde_json::from_slice(&meta).ok()?;
    let payload: Value = serde_json::from_str(meta["payload"].as_str()?).ok()?;
    payload["next_offset"].as_i64()
}

/// Runs a closure until told to stop; a closure that panics fails the test.
pub(crate) struct Sampler {
    stop: Arc<AtomicBool>,
    samples: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Sampler {
    fn start(mut sample: impl FnMut() + Send + 'static) -> Self {
        let (stop, samples) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counted) = (stop.clone(), samples.clone());
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                sample();
                counted.fetch_add(1, Ordering::Relaxed);
            }
        });
        Sampler { stop, samples, thread }
    }

    /// Counters that are there, whole, and never go back.
    pub(crate) fn of_counters(pipeline: &Pipeline) -> Self {
        let mut redis = pipeline.redis.connect();
        let mut last = ((0, 0), change::Lsn::ZERO);
        Self::start(move || {
            type Sample = (Vec<i64>, Option<i64>, (i64, i64, String, String));
            let mut all = redis::pipe();
            all.atomic().cmd("HVALS").arg("points").cmd("GET").arg("mails");
            all.cmd("HMGET").arg("millrace:mailbox:points").arg(&["generation", "offset", "lsn", "state"]);
            let (points, mails, (generation, offset, lsn, state)): Sample =
                all.query(&mut redis).expect("Redis answers");
            assert_eq!(points.iter().sum::<i64>(), POINTS, "never missing, never half: {points:?}");
            assert!(mails.is_some_and(|mails| mails >= MAILS as i64), "{mails:?} mails");
            assert_eq!(state, "ready");
            let lsn = lsn.parse().expect("an LSN");
            let place = (generation, offset);
            assert!(place >= last.0 && lsn >= last.1, "readers go back from {last:?} to {place:?}, {lsn}");
            last = (place, lsn);
        })
    }

    pub(crate) fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("every sample was good");
        self.samples.load(Ordering::Relaxed)
    }
}

#[test]
fn h42_readers_see_whole_counters_all_through_a_rebuild_under_load() {
    let mut pipeline = long();
    let sampler = Sampler::of_counters(&pipeline);
    let traffic = Traffic::gentle(&pipeline.postgres, 5, 2);
    // How far the present counters come while there are copies.
    let kept_up = Arc::new(AtomicI64::new(0));
    let (advanced, mut redis, mut began) = (kept_up.clone(), pipeline.redis.connect(), None);
    let meanwhile = Sampler::start(move || {
        let shown = "millrace:mailbox:points";
        let (copies, offset): (bool, i64) = redis::pipe()
            .atomic()
            .exists(format!("{shown}:copy"))
            .hget(shown, "offset")
            .query(&mut redis)
            .expect("Redis answers");
        if copies {
            advanced.store(offset - *began.get_or_insert(offset), Ordering::Relaxed);
        }
        thread::sleep(Duration::from_millis(5));
    });
    let said = pipeline.succeed(&["rebuild", "counters"]);
    assert!(said.contains("counters.points: its worker builds it anew"), "{said}");
    let again = pipeline.succeed(&["rebuild", "points", "--json"]);
    assert_eq!(again.trim(), r#"{"store":"counters.points","requested":false}"#);
    soon("status shows it", || {
        let status = pipeline.succeed(&["status", "--json"]);
        let status: Value = serde_json::from_str(&status).expect("JSON");
        let mut stores = status["stores"].as_array().expect("stores").iter();
        stores.any(|store| store["ready"] == true && store["rebuild"]["next_offset"].is_i64())
    });
    let progress = pipeline.succeed(&["rebuild", "counters", "--wait", "--json"]);
    let done = progress.matches(r#""done":true"#).count();
    assert_eq!(done, 6, "{progress}");
    assert!(progress.contains("records_per_second") || progress.lines().count() < 24, "{progress}");
    traffic.stop();
    meanwhile.stop();
    assert!(kept_up.load(Ordering::Relaxed) > 0, "the present counters keep up meanwhile");
    assert!(sampler.stop() > 100);
    assert_eq!(copies(&pipeline), [""; 0], "nothing is left");
    assert_equal(&mut pipeline);
    let log = pipeline.log("counters");
    let swaps = log.matches("the store that was built has taken the place").count();
    assert_eq!(swaps, 12, "six when new, six anew: {}", tail(&log));
    let said = pipeline.refused(&["rebuild", "nothing"]);
    assert!(said.contains("search.emails") && said.contains("counters.nobody"), "{said}");
}

#[test]
fn h43_a_rebuild_goes_on_after_every_kill() {
    let mut rng = StdRng::seed_from_u64(3);
    let mut pipeline = long();
    let sampler = Sampler::of_counters(&pipeline);
    let traffic = Traffic::gentle(&pipeline.postgres, 6, 2);
    // Before: the request waits for the worker.
    pipeline.kill(Role::Counters);
    pipeline.succeed(&["rebuild", "counters"]);
    pipeline.spawn(Role::Counters);
    let copy = "millrace:mailbox:points:copy";
    let (mut reached, mut in_the_fill) = (0, 0);
    wait_until("the copy begins", SOON, || offset(&pipeline, copy).filter(|offset| *offset > 0));
    for kill in 0..rounds(KILLS) {
        thread::sleep(Duration::from_millis(rng.random_range(0..700)));
        pipeline.kill(Role::Counters);
        let Some(at) = offset(&pipeline, copy) else { break };
        eprintln!("kill {kill} at offset {at} of the copy");
        in_the_fill += usize::from(at > reached);
        assert!(at >= reached, "the copy goes on from {reached}, not from {at}");
        reached = at;
        pipeline.spawn(Role::Counters);
        // Until it goes on, or is done: so that every life gets somewhere.
        soon("the build goes on", || offset(&pipeline, copy).is_none_or(|at| at > reached));
    }
    pipeline.spawn(Role::Counters);
    soon("the rebuild ends", || copies(&pipeline).is_empty());
    traffic.stop();
    assert!(in_the_fill > 1, "killed in the middle: {in_the_fill}");
    assert!(sampler.stop() > 100);
    assert_equal(&mut pipeline);
    let log = pipeline.log("counters");
    assert_eq!(log.matches("the build begins store=\"counters.points\"").count(), 2, "{}", tail(&log));
}

/// The stages are where a kill by chance comes seldom.
#[test]
fn h43_a_rebuild_is_completed_wherever_it_was_killed() {
    let mut pipeline = Pipeline::running();
    fill_points(&pipeline.postgres);
    pipeline.assert_stores_equal();
    let index = pipeline.search_directory().join("emails");
    for (role, command) in [(Role::Counters, "counters"), (Role::Search, "search")] {
        for stage in worker::STAGES {
            pipeline.kill(role);
            if stage == "rebuild.requested" {
                // Damaged, so that it is the worker itself that asks.
                match role {
                    Role::Counters => pipeline.redis.connect().del::<_, ()>("points").expect("Redis answers"),
                    _ => std::fs::remove_dir_all(&index).expect("an index"),
                }
            } else {
                pipeline.succeed(&["rebuild", command]);
            }
            pipeline.dies_at(stage, &[command], command);
            pipeline
                .postgres
                .sql("app", "INSERT INTO emails (id) SELECT coalesce(max(id), 0) + 1 FROM emails");
            pipeline.spawn(role);
            pipeline.succeed(&["rebuild", command, "--wait"]);
            pipeline.assert_stores_equal();
        }
    }
}

#[test]
fn h43_a_group_reset_rebuilds_and_a_reset_elsewhere_is_refused() {
    let mut pipeline = long();
    pipeline.running_process(Role::Counters).signal("TERM");
    let status = wait_until("the worker ends", SOON, || pipeline.running_process(Role::Counters).ended());
    assert!(status.success(), "{status}");
    let reset = |pipeline: &Pipeline, to: &[&str]| {
        let tool = "org.apache.kafka.tools.consumer.group.ConsumerGroupCommand";
        let bootstrap = pipeline.kafka.bootstrap();
        let mut args = vec!["--bootstrap-server", &*bootstrap, "--group", "millrace.mailbox.counters"];
        args.extend(["--reset-offsets", "--topic", "millrace.mailbox.1", "--execute"]);
        args.extend(to);
        soon("the group is empty, and reset", || {
            !pipeline.kafka.tool(tool, &args).contains("Error: Assignments can only be reset")
        });
    };
    reset(&pipeline, &["--to-offset", "17"]);
    let said = pipeline.refused(&["counters"]);
    assert!(said.contains("reset to offset 17") && said.contains("--to-earliest"), "{said}");
    assert!(copies(&pipeline).is_empty());
    let before = offset(&pipeline, "millrace:mailbox:points");

    let sampler = Sampler::of_counters(&pipeline);
    reset(&pipeline, &["--to-earliest"]);
    pipeline.spawn(Role::Counters);
    soon("the rebuild is recorded", || copies(&pipeline).iter().any(|key| key.contains(":points:")));
    assert!(offset(&pipeline, "millrace:mailbox:points") >= before, "readers keep what they see");
    // Whether or not the group's offset was overwritten by now: the request is in the store.
    pipeline.restart(Role::Counters);
    soon("the rebuild ends", || copies(&pipeline).is_empty());
    assert!(sampler.stop() > 100);
    assert_equal(&mut pipeline);
    let log = pipeline.log("counters");
    let begun = log.matches("store=\"counters.points\" reason=\"the consumer group was reset").count();
    assert_eq!(begun, 1, "{}", tail(&log));
}

#[test]
fn a_changed_definition_is_rebuilt_alone_and_holds_up_nobody() {
    let mut pipeline = long();
    let config = pipeline.directory.path().join("millrace.toml");
    let text = std::fs::read_to_string(&config).expect("our file");
    let changed = text.replace(
        "\"SELECT count(*) FROM public.emails\"",
        "\"SELECT count(*) FROM public.emails WHERE folder = 'inbox' OR folder IS NULL\"",
    );
    assert_ne!(text, changed);
    // And one that is new.
    let added = "[counters.folders]\nsql = \"SELECT folder, count(*) FROM public.emails GROUP BY folder\"\n";
    std::fs::write(&config, changed + added).expect("our file");
    let before = pipeline.counter("mails");
    let traffic = Traffic::gentle(&pipeline.postgres, 8, 2);
    pipeline.restart(Role::Counters);
    let last = offset(&pipeline, "millrace:mailbox:points");
    soon("the others go on while it is built", || {
        let moved = offset(&pipeline, "millrace:mailbox:points") > last;
        moved && offset(&pipeline, "millrace:mailbox:mails:copy").is_some_and(|offset| offset > 0)
    });
    let status = pipeline.succeed(&["status", "--json"]);
    if !copies(&pipeline).is_empty() {
        let status: Value = serde_json::from_str(&status).expect("JSON");
        let mut stores = status["stores"].as_array().expect("stores").iter();
        let frozen = stores.find(|store| store["store"] == "counters.mails").expect("it is configured");
        assert!(frozen["ready"] == false && !frozen["rebuild"].is_null(), "{frozen}");
    }
    while !copies(&pipeline).is_empty() {
        let frozen = pipeline.counter("mails");
        if !copies(&pipeline).is_empty() {
            assert_eq!(frozen, before, "the old content stays until the swap");
        }
        pipeline.assert_alive();
    }
    traffic.stop();
    assert_equal(&mut pipeline);
    let log = pipeline.log("counters");
    let built: BTreeMap<&str, usize> = ["mails", "folders", "points", "unread"]
        .map(|name| (name, log.matches(&format!("the build begins store=\"counters.{name}\"")).count()))
        .into();
    assert_eq!(built, BTreeMap::from([("folders", 1), ("mails", 2), ("points", 1), ("unread", 1)]));
}

/// What stands in the search directory, but for the lock.
fn directories(pipeline: &Pipeline) -> Vec<String> {
    let entries = std::fs::read_dir(pipeline.search_directory()).expect("it is there");
    let names = entries.map(|entry| entry.expect("ours").file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = names.filter(|name| !name.starts_with('.')).collect();
    names.sort();
    names
}

#[test]
fn h42_no_request_fails_while_an_index_is_swapped() {
    let mut pipeline = long();
    let url = format!("{}/indexes/emails", pipeline.search_url());
    let (mut last, mut total) = (change::Lsn::ZERO, 0);
    let sampler = Sampler::start(move || {
        let ask = |path: &str| -> Value {
            let answer = ureq::get(format!("{url}/{path}")).call();
            answer.expect("no request fails").body_mut().read_json().expect("JSON")
        };
        let hits = ask("search?q=words&limit=3&filter=folder%20%3D%20inbox");
        let lsn = hits["lsn"].as_str().expect("an LSN").parse().expect("an LSN");
        let found = hits["estimatedTotalHits"].as_u64().expect("a number");
        // Mails only come in this test, and each with these words.
        assert!(lsn >= last && found >= total.max(MAILS), "back from {total} at {last} to {found} at {lsn}");
        (last, total) = (lsn, found);
        let page = ask("documents?limit=1");
        assert!(page["total"].as_u64() >= Some(total), "{page}");
    });
    pipeline.succeed(&["rebuild", "search"]);
    soon("the build goes on", || offset_on_disk(&pipeline, "emails.copy").is_some_and(|offset| offset > 0));
    let mut id = 1_000_000;
    while directories(&pipeline) != ["emails"] {
        id += 1;
        pipeline.postgres.sql(
            "app",
            &format!("INSERT INTO emails VALUES ({id}, 1, 'inbox', 'me', 's', 'words', false, 1, NULL)"),
        );
        pipeline.assert_alive();
    }
    pipeline.succeed(&["wait", "--timeout", "60s"]);
    assert!(sampler.stop() > 20);
    assert!(id > 1_000_003, "there was traffic");
    assert_equal(&mut pipeline);
}

#[test]
fn h43_an_index_goes_on_being_built_after_every_kill() {
    let mut rng = StdRng::seed_from_u64(4);
    let mut pipeline = long();
    let traffic = Traffic::gentle(&pipeline.postgres, 9, 2);
    // Other fields: the old ones are served until then.
    let config = pipeline.directory.path().join("millrace.toml");
    let text = std::fs::read_to_string(&config).expect("our file");
    pipeline.kill(Role::Search);
    std::fs::write(&config, text.replace("\"folder\", \"sender\"", "\"folder\", \"sender\", \"is_read\""))
        .expect("our file");
    pipeline.spawn(Role::Search);
    let copy = pipeline.search_directory().join("emails.copy");
    soon("the copy is asked for", || copy.exists());
    // Some lives end before they have begun, some in the fill, some around the swap.
    let (mut reached, mut in_the_fill, mut unbegun) = (0, 0, 0);
    for kill in 0..rounds(KILLS) {
        if let Some(page) = pipeline.get("/indexes/emails/documents?limit=1") {
            assert!(page["total"].as_u64() >= Some(MAILS), "the old index is shown: {page}");
        }
        if kill % 2 == 1 {
            soon("the build goes on", || {
                !copy.exists() || offset_on_disk(&pipeline, "emails.copy").is_some_and(|at| at > reached)
            });
        } else {
            thread::sleep(Duration::from_millis(rng.random_range(0..2500)));
        }
        pipeline.kill(Role::Search);
        let at = offset_on_disk(&pipeline, "emails.copy");
        eprintln!("kill {kill} at offset {at:?} of the copy: {:?}", directories(&pipeline));
        assert!(at.is_none_or(|at| at >= reached), "the copy goes on from {reached}, not from {at:?}");
        pipeline.spawn(Role::Search);
        match at {
            Some(at) => {
                in_the_fill += usize::from(at > reached);
                reached = at;
            }
            // Asked for, and nothing of it kept yet.
            None if copy.exists() => unbegun += 1,
            None => break,
        }
    }
    soon("the rebuild ends", || directories(&pipeline) == ["emails"]);
    traffic.stop();
    pipeline.succeed(&["wait", "--timeout", "60s"]);
    assert!(in_the_fill > 0, "killed in the middle");
    assert_eq!(directories(&pipeline), ["emails"]);
    assert_equal(&mut pipeline);
    let log = pipeline.log("search");
    let begun = log.matches("the build begins store=\"search.emails\"").count();
    assert!((2..=2 + unbegun).contains(&begun), "{begun} times: {}", tail(&log));
}
