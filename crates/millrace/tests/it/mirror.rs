//! The example of a sink of one's own keeps its promise too.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::Duration;

use testkit::services::{Postgres, Process};

use crate::harness::{Pipeline, soon, tail};
use crate::mailbox::{Traffic, fill_points};

const ROUNDS: usize = 8;
const SOURCE: &str = "SELECT id::text, user_id::text, folder, subject, body, is_read::text FROM emails";
const MIRROR: &str = "SELECT row->>'id', row->>'user_id', row->>'folder', row->>'subject', row->>'body', \
                      row->>'is_read' FROM mirror";

/// `cargo test` builds it beside the tests; a test that is run alone needs `cargo build --example mirror` first.
fn program() -> PathBuf {
    let tests = std::env::current_exe().expect("our path");
    let profile = tests.ancestors().nth(2).expect("target/PROFILE/deps/it");
    profile.join("examples/mirror")
}

fn spawn(pipeline: &Pipeline, target: &Postgres) -> Process {
    let path = pipeline.directory.path().join("mirror.log");
    let log = File::options().create(true).append(true).open(path).expect("a log");
    let mut command = Command::new(program());
    command.args([&pipeline.kafka.bootstrap(), "mailbox", "public.emails", &target.url("postgres")]);
    Process::spawn(command.stdin(Stdio::null()).stderr(log))
}

#[test]
fn a_table_is_mirrored_whatever_is_killed() {
    let pipeline = Pipeline::running();
    fill_points(&pipeline.postgres);
    let mut target = Postgres::start();
    let mut mirror = spawn(&pipeline, &target);
    let traffic = Traffic::start(&pipeline.postgres, 11, 2);
    for round in 0..ROUNDS {
        let before = traffic.committed.load(Ordering::Relaxed);
        soon("more traffic", || traffic.committed.load(Ordering::Relaxed) > before + 50);
        std::thread::sleep(Duration::from_millis(300));
        if round % 2 == 0 {
            mirror.kill();
            mirror = spawn(&pipeline, &target);
        } else {
            target.kill();
            target.restart();
        }
    }
    traffic.stop();
    let sorted = |server: &Postgres, database: &str, query: &str| {
        let mut rows = server.sql(database, query);
        rows.sort();
        rows
    };
    soon("the mirror's table is there", || {
        target.value("postgres", "SELECT to_regclass('mirror') IS NOT NULL") == "t"
    });
    let assert_equal = |mirror: &mut Process| {
        let source = sorted(&pipeline.postgres, "app", SOURCE);
        assert!(!source.is_empty());
        let start = std::time::Instant::now();
        while sorted(&target, "postgres", MIRROR) != source {
            let log = pipeline.log("mirror");
            assert!(mirror.ended().is_none(), "the mirror ended: {}", tail(&log));
            assert!(start.elapsed() < crate::harness::SOON, "the mirror differs: {}", tail(&log));
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    assert_equal(&mut mirror);
    // It goes over to a new log by itself.
    pipeline.succeed(&["generation", "new", "--wait"]);
    pipeline.postgres.sql("app", "DELETE FROM emails WHERE id % 2 = 0");
    assert_equal(&mut mirror);
}
