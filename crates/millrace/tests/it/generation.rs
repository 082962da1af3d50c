//! A new log beside the current one: readers see whole stores all the way, whatever is killed.

use std::fs;
use std::thread;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;

use crate::harness::{Pipeline, ROLES, Role, SOON, soon, tail};
use crate::mailbox::{Traffic, fill_points};
use crate::rebuild::{Sampler, assert_equal, long, offset};

/// The slots of the pipeline.
fn slots(pipeline: &Pipeline) -> String {
    let slots =
        "SELECT coalesce(string_agg(slot_name, ' ' ORDER BY slot_name), '') FROM pg_replication_slots";
    pipeline.postgres.value("app", slots)
}

/// Until the stores have gone over.
fn wait_for_new_log(pipeline: &Pipeline) {
    let mut command = pipeline.process(&["generation", "new", "--wait"], "generation");
    assert!(command.wait(SOON).success(), "{}", pipeline.log("generation"));
}

fn generation(pipeline: &Pipeline) -> String {
    let status = pipeline.succeed(&["status"]);
    status.lines().next().unwrap_or_default().to_owned()
}

/// Drops the slot of a log as soon as its reader's session has ended.
fn lose_slot(pipeline: &Pipeline, generation: u32) {
    soon("the slot is gone", || {
        let free = "SELECT count(*) FROM pg_replication_slots WHERE active";
        pipeline.postgres.value("app", free) == "0"
    });
    let lost = format!("SELECT pg_drop_replication_slot('millrace_mailbox_{generation}')");
    pipeline.postgres.sql("app", &lost);
}

#[test]
fn h04_a_pipeline_whose_slot_was_lost_comes_back_by_one_command() {
    let mut pipeline = long();
    let sampler = Sampler::of_counters(&pipeline);
    let traffic = Traffic::gentle(&pipeline.postgres, 11, 2);
    pipeline.kill(Role::Reader);
    lose_slot(&pipeline, 1);
    let said = pipeline.refused(&["reader"]);
    assert!(said.contains("millrace generation new"), "{said}");

    // Services that are started again and again do not mind when the command comes.
    let mut command = pipeline.process(&["generation", "new", "--wait"], "generation");
    soon("the next log is announced", || pipeline.succeed(&["status"]).contains("next log"));
    pipeline.spawn(Role::Reader);
    assert!(command.wait(SOON).success(), "{}", pipeline.log("generation"));
    let said = pipeline.log("generation");
    assert!(said.contains("being read: ") && said.contains("is the current one"), "{said}");
    soon("the reader goes on with it", || slots(&pipeline) == "millrace_mailbox_2");
    traffic.stop();
    assert!(sampler.stop() > 100);
    assert_equal(&mut pipeline);
    pipeline.assert_stores_equal();
    assert_eq!(generation(&pipeline), "pipeline mailbox, generation 2");

    let said = pipeline.succeed(&["generation", "retire", "--yes"]);
    assert!(said.contains("millrace.mailbox.1 is removed"), "{said}");
    assert!(said.contains("group millrace.mailbox.counters stands there at offset"), "{said}");
    let said = pipeline.succeed(&["generation", "retire"]);
    assert!(said.contains("no log but the current one, generation 2"), "{said}");
    ROLES.into_iter().for_each(|role| pipeline.kill(role));
    pipeline.succeed(&["teardown", "--yes"]);
    assert_eq!(slots(&pipeline), "");
}

/// While the old log still flows, its stores stay current until they are swapped.
#[test]
fn a_new_log_takes_the_place_of_one_that_flows_whatever_is_killed() {
    let mut rng = StdRng::seed_from_u64(5);
    let mut pipeline = long();
    let sampler = Sampler::of_counters(&pipeline);
    let traffic = Traffic::gentle(&pipeline.postgres, 12, 2);
    for stage in ["generation.topics", "generation.source", "generation.announced"] {
        pipeline.dies_at(stage, &["generation", "new"], "generation");
        assert_eq!(generation(&pipeline), "pipeline mailbox, generation 1");
    }
    // The old log goes on, and its stores with it, until theirs are built.
    soon("the copies are being filled", || offset(&pipeline, "millrace:mailbox:points:copy") > Some(0));
    let behind = offset(&pipeline, "millrace:mailbox:points");
    soon("the present counters move", || offset(&pipeline, "millrace:mailbox:points") > behind);
    assert_eq!(generation(&pipeline), "pipeline mailbox, generation 1");
    let mut kills = 0;
    while generation(&pipeline) != "pipeline mailbox, generation 2" {
        thread::sleep(Duration::from_millis(rng.random_range(0..3000)));
        // The flow of the old log is what readers see until then.
        let role = ROLES[rng.random_range(0..ROLES.len())];
        pipeline.restart(role);
        kills += 1;
        assert!(kills < 100, "it does not come to an end: {}", tail(&pipeline.log("reader")));
        pipeline.assert_alive();
    }
    eprintln!("{kills} kills");
    traffic.stop();
    assert!(sampler.stop() > 100);
    assert_equal(&mut pipeline);
    soon("the old slot is gone", || slots(&pipeline) == "millrace_mailbox_2");
    // And once more, killed where it changes hands.
    pipeline.kill(Role::Reader);
    pipeline.succeed(&["generation", "new"]);
    let reader = pipeline.process(&["reader"], "reader");
    for (role, command) in [(Role::Counters, "counters"), (Role::Search, "search")] {
        pipeline.kill(role);
        pipeline.dies_at("generation.left", &[command], command);
        pipeline.spawn(role);
    }
    drop(reader);
    pipeline.dies_at("generation.current", &["reader"], "reader");
    pipeline.spawn(Role::Reader);
    soon("the old slot is gone", || slots(&pipeline) == "millrace_mailbox_3");
    assert_equal(&mut pipeline);
    let log = pipeline.log("counters");
    assert!(log.contains("the stores have gone over to the next log"), "{}", tail(&log));
}

/// What the stores hold of a history that the source does not have any more is not shown.
#[test]
fn h05_after_a_restore_the_stores_are_built_from_what_the_source_has() {
    let mut pipeline = Pipeline::running();
    fill_points(&pipeline.postgres);
    pipeline.assert_stores_equal();
    pipeline.kill(Role::Reader);
    pipeline.kill(Role::Search);
    // As a restored server would have it.
    pipeline.postgres.sql("app", "UPDATE millrace.heartbeat SET beat = beat - 1");
    let said = pipeline.refused(&["reader"]);
    assert!(said.contains("earlier point in time") && said.contains("millrace generation new"), "{said}");
    let lsn = change::Lsn(u64::MAX >> 1).to_string();
    redis::cmd("HSET")
        .arg("millrace:mailbox:points")
        .arg(&["lsn", lsn.as_str()])
        .exec(&mut pipeline.redis.connect())
        .expect("Redis answers");
    let meta = pipeline.search_directory().join("emails/meta.json");
    let mut index: Value = serde_json::from_slice(&fs::read(&meta).expect("an index")).expect("JSON");
    let mut payload: Value =
        serde_json::from_str(index["payload"].as_str().expect("a payload")).expect("JSON");
    payload["lsn"] = lsn.as_str().into();
    index["payload"] = payload.to_string().into();
    fs::write(&meta, index.to_string()).expect("our directory");
    pipeline.succeed(&["generation", "new"]);
    pipeline.spawn(Role::Search);
    soon("the counters are emptied", || pipeline.counter("points").is_empty());
    soon("the index is not shown", || pipeline.get("/health").is_none_or(|_| pipeline.documents().is_none()));
    pipeline.spawn(Role::Reader);
    wait_for_new_log(&pipeline);
    pipeline.assert_stores_equal();
    pipeline.succeed(&["verify"]);
}

/// A next log that is lost before it is the current one, one that was begun and never announced, and the topic that tells
/// which is current.
#[test]
fn a_new_log_that_is_lost_as_well_is_replaced_and_nothing_is_left_behind() {
    let mut pipeline = Pipeline::running();
    fill_points(&pipeline.postgres);
    pipeline.assert_stores_equal();
    pipeline.kill(Role::Reader);
    lose_slot(&pipeline, 1);
    pipeline.dies_at("setup.slot", &["generation", "new"], "generation");
    assert_eq!(slots(&pipeline), "millrace_mailbox_2");
    let said = pipeline.succeed(&["generation", "retire", "--yes"]);
    assert!(said.contains("slot millrace_mailbox_2"), "{said}");
    assert_eq!(slots(&pipeline), "");

    pipeline.succeed(&["generation", "new"]);
    pipeline.spawn(Role::Reader);
    soon("the next log is filled", || pipeline.succeed(&["status"]).contains("next slot"));
    pipeline.kill(Role::Reader);
    if slots(&pipeline) == "millrace_mailbox_2" {
        lose_slot(&pipeline, 2);
    }
    let said = pipeline.succeed(&["generation", "new"]);
    assert!(said.contains("generation 3"), "{said}");
    assert!(pipeline.succeed(&["generation", "new"]).contains("generation 3"), "it goes on");
    assert!(pipeline.succeed(&["generation", "new", "--again"]).contains("generation 4"));
    pipeline.spawn(Role::Reader);
    wait_for_new_log(&pipeline);
    soon("the other slots are gone", || slots(&pipeline) == "millrace_mailbox_4");
    pipeline.assert_stores_equal();

    ROLES.into_iter().for_each(|role| pipeline.kill(role));
    let bootstrap = pipeline.kafka.bootstrap();
    let delete = ["--bootstrap-server", &bootstrap, "--delete", "--topic", "millrace.mailbox"];
    pipeline.kafka.tool("org.apache.kafka.tools.TopicCommand", &delete);
    assert!(pipeline.refused(&["reader"]).contains("millrace setup"));
    pipeline.succeed(&["setup"]);
    assert_eq!(generation(&pipeline), "pipeline mailbox, generation 4");
    ROLES.into_iter().for_each(|role| pipeline.spawn(role));
    pipeline.postgres.sql("app", "UPDATE points SET amount = amount + 1");
    pipeline.assert_stores_equal();
}
