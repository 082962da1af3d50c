//! Two hosts keep one pipeline. A process that is frozen (a paused machine, SIGSTOP) finds another one at its work when
//! it goes on, and stands by or takes its place; it is never told that records are missing.

use std::process::Command;
use std::time::Duration;

use testkit::services::{Process, wait_until};

use crate::harness::{Pipeline, Role, SOON, soon};
use crate::mailbox::{Traffic, fill_points};

const HOSTS: [&str; 2] = ["host-a", "host-b"];
/// What is kept by two processes, of which one works.
const PARTS: [&str; 2] = ["reader", "counters"];

/// The same part on each host.
struct Pair {
    part: &'static str,
    processes: [Process; 2],
}

impl Pair {
    fn start(pipeline: &Pipeline, part: &'static str) -> Pair {
        let processes = HOSTS.map(|host| pipeline.process_on(host, &[part], &log_of(part, host)));
        Pair { part, processes }
    }

    /// True for each host whose process has begun to work, and has not logged that it stopped.
    fn has_begun(&self, pipeline: &Pipeline) -> [bool; 2] {
        HOSTS.map(|host| {
            let log = pipeline.log(&log_of(self.part, host));
            let (begins, ends) = match self.part {
                "reader" => ("INFO streaming lsn", "standing by: another reader"),
                _ => ("reading the log", "the consumer group has taken the log away"),
            };
            log.rfind(begins) > log.rfind(ends)
        })
    }

    /// The host whose process works, if it is one of them.
    fn works(&self, pipeline: &Pipeline) -> Option<usize> {
        match self.has_begun(pipeline) {
            [true, false] => Some(0),
            [false, true] => Some(1),
            _ => None,
        }
    }

    fn wait_for_one(&self, pipeline: &Pipeline) -> usize {
        wait_until(&format!("one {} works", self.part), SOON, || self.works(pipeline))
    }
}

fn log_of(part: &str, host: &str) -> String {
    format!("{part}-{host}")
}

#[test]
fn a_frozen_process_finds_its_place_and_is_never_refused() {
    let namespace = Command::new("unshare").args(["--uts", "true"]).status();
    assert!(
        namespace.as_ref().is_ok_and(|status| status.success()),
        "this test gives processes host names of their own and must run as root: unshare --uts: {namespace:?}"
    );
    let mut pipeline = Pipeline::new();
    // The server gives up a silent reader, as it does after a minute where nothing is configured.
    pipeline.postgres.sql("app", "ALTER SYSTEM SET wal_sender_timeout = '3s'");
    pipeline.postgres.sql("app", "SELECT pg_reload_conf()");
    pipeline.configure(
        "[kafka.properties]\n\"session.timeout.ms\" = \"2000\"\n\"heartbeat.interval.ms\" = \"500\"\n",
    );
    pipeline.succeed(&["setup"]);
    fill_points(&pipeline.postgres);
    pipeline.spawn(Role::Search);
    let mut pairs = PARTS.map(|part| Pair::start(&pipeline, part));
    pipeline.succeed(&["wait", "--timeout", "90s"]);
    let frozen = pairs.each_ref().map(|pair| pair.wait_for_one(&pipeline));
    let traffic = Traffic::gentle(&pipeline.postgres, 11, 2);
    flows(&pipeline, "at the beginning");

    for (pair, host) in pairs.iter().zip(frozen) {
        pair.processes[host].signal("STOP");
    }
    for (pair, host) in pairs.iter().zip(frozen) {
        soon("the other one works too", || pair.has_begun(&pipeline) == [true, true]);
        assert!(pair.works(&pipeline).is_none(), "{} on {} was silent", pair.part, HOSTS[host]);
    }
    flows(&pipeline, "while the first ones are frozen");
    for (pair, host) in pairs.iter().zip(frozen) {
        pair.processes[host].signal("CONT");
    }
    // Both take themselves for the one that works now, until the group and the server tell.
    std::thread::sleep(Duration::from_secs(2));
    let works = pairs.each_ref().map(|pair| pair.wait_for_one(&pipeline));
    flows(&pipeline, "when the first ones are back");
    for (pair, host) in pairs.iter_mut().zip(works) {
        pair.processes[host].kill();
    }
    flows(&pipeline, "when those that worked are killed");
    traffic.stop();
    pipeline.assert_stores_equal();
    for (pair, killed) in pairs.iter_mut().zip(works) {
        let ended = pair.processes[1 - killed].ended();
        let log = pipeline.log(&log_of(pair.part, HOSTS[1 - killed]));
        assert!(ended.is_none(), "{} on {} ended: {ended:?}\n{log}", pair.part, HOSTS[1 - killed]);
        assert!(!log.contains("records were lost") && !log.contains("remedy"), "{log}");
    }
}

/// Waits until a change that is made now shows in the stores.
fn flows(pipeline: &Pipeline, when: &str) {
    let before = pipeline.counter("points");
    soon(&format!("traffic flows {when}"), || pipeline.counter("points") != before);
}
