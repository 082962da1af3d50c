//! A partitioned table that is configured by its root (h31): partitions come, go and are emptied while it is written.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use testkit::services::wait_until;

use crate::harness::{Pipeline, ROLES, Role, soon};
use crate::mailbox::{POINTS, Traffic, fill_points};
use crate::snapshot::{all_is_published, replay, rows};

/// `points` in partitions, two of them below a third.
const PARTITIONED: &str = "
    DROP TABLE points;
    CREATE TABLE points (owner text, part integer, amount integer, PRIMARY KEY (owner, part)) PARTITION BY RANGE (part);
    CREATE TABLE points_a PARTITION OF points FOR VALUES FROM (-10) TO (10);
    CREATE TABLE points_b PARTITION OF points FOR VALUES FROM (10) TO (20) PARTITION BY RANGE (part);
    CREATE TABLE points_b1 PARTITION OF points_b FOR VALUES FROM (10) TO (15);
    CREATE TABLE points_b2 (amount integer, part integer NOT NULL, gone integer, owner text NOT NULL);
    ALTER TABLE points_b2 DROP gone;
    ALTER TABLE points_b ATTACH PARTITION points_b2 FOR VALUES FROM (15) TO (20);
    ALTER TABLE points_a REPLICA IDENTITY FULL;
    ALTER TABLE points_b1 REPLICA IDENTITY FULL;
    ALTER TABLE points_b2 REPLICA IDENTITY FULL;";

/// What is done, a transaction a line, each keeping the sum, and whether all rows must be read anew for it.
const STEPS: [(&str, &str, bool); 8] = [
    (
        "a partition is made and written at once",
        "CREATE TABLE points_c PARTITION OF points FOR VALUES FROM (20) TO (30); ALTER TABLE points_c REPLICA IDENTITY FULL
         INSERT INTO points VALUES ('new', 20, 100); UPDATE points SET amount = amount - 100 WHERE part = 3
         UPDATE points SET part = 21 WHERE part = 20
         UPDATE points SET part = 20 WHERE part = 21",
        false,
    ),
    (
        "a table with partitions and rows is attached, and rows move there",
        "CREATE TABLE points_d (LIKE points INCLUDING ALL) PARTITION BY RANGE (part)
         CREATE TABLE points_d1 PARTITION OF points_d FOR VALUES FROM (30) TO (33); ALTER TABLE points_d1 REPLICA IDENTITY FULL
         CREATE TABLE points_d2 PARTITION OF points_d FOR VALUES FROM (33) TO (40); ALTER TABLE points_d2 REPLICA IDENTITY FULL
         INSERT INTO points_d VALUES ('p', 30, 70), ('m', 31, -70), ('z', 36, 0)
         ALTER TABLE points ATTACH PARTITION points_d FOR VALUES FROM (30) TO (40)
         UPDATE points SET part = 32 WHERE part = 20
         UPDATE points SET amount = CASE part WHEN 30 THEN 71 ELSE 99 END WHERE part IN (30, 32)",
        false,
    ),
    (
        "a partition is detached, written, and attached again",
        "UPDATE points SET part = 20, amount = 100 WHERE part = 32; UPDATE points SET amount = 70 WHERE part = 30
         ALTER TABLE points DETACH PARTITION points_d
         UPDATE points_d SET amount = amount * 2
         ALTER TABLE points ATTACH PARTITION points_d FOR VALUES FROM (30) TO (40)",
        true,
    ),
    ("a partition is emptied", "TRUNCATE points_d", true),
    (
        "it has rows again",
        "INSERT INTO points VALUES ('p', 33, 7), ('m', 34, -7)
         INSERT INTO points VALUES ('m', 35, 0)",
        false,
    ),
    (
        "it is detached and goes on by itself",
        "ALTER TABLE points DETACH PARTITION points_d
         UPDATE points_d SET amount = 1",
        true,
    ),
    ("another is dropped", "UPDATE points SET part = -1 WHERE part = 20; DROP TABLE points_c", true),
    (
        "the whole table is emptied and filled",
        "TRUNCATE points; INSERT INTO points SELECT 'owner ' || g % 5, g, 50 FROM generate_series(0, 19) g",
        false,
    ),
];

#[test]
fn h31_a_partitioned_table_is_one_table_whatever_becomes_of_its_partitions() {
    let mut pipeline = Pipeline::new();
    pipeline.postgres.sql("app", PARTITIONED);
    fill_points(&pipeline.postgres);
    pipeline.configure("[snapshot]\nround_kb = 1\n");
    if pipeline.postgres.value("app", "SELECT current_setting('server_version_num')::int < 150000") == "t" {
        let said = pipeline.refused(&["setup"]);
        let names = r#""public.points_a", "public.points_b1", "public.points_b2""#;
        assert!(said.contains("before Postgres 15") && said.contains(names), "{said}");
        return;
    }
    pipeline.succeed(&["setup"]);
    pipeline.dies_at("round.committed", &["reader"], "reader");
    ROLES.into_iter().for_each(|role| pipeline.spawn(role));
    pipeline.succeed(&["wait", "--timeout", "90s"]);
    let sampler = Sampler::start(&pipeline);
    let anew = |pipeline: &Pipeline| pipeline.log("reader").matches("public.points is read anew").count();
    for (place, (what, sql, again)) in STEPS.into_iter().enumerate() {
        let before = anew(&pipeline);
        let traffic = Traffic::gentle(&pipeline.postgres, place as u64, 2);
        thread::sleep(Duration::from_millis(200));
        // Some of it happens while nobody looks.
        let away = place % 3 == 2;
        if away {
            pipeline.kill(Role::Reader);
        }
        sql.lines().for_each(|transaction| drop(pipeline.postgres.sql("app", transaction)));
        thread::sleep(Duration::from_millis(300));
        if away {
            pipeline.spawn(Role::Reader);
        }
        if again {
            soon(what, || anew(&pipeline) > before);
        }
        traffic.stop();
        eprintln!("{what}");
        pipeline.assert_stores_equal();
        assert_eq!(anew(&pipeline) > before, again, "{what}");
    }
    assert!(sampler.stop() > 100);
    assert!(pipeline.succeed(&["verify"]).contains("points"));
    all_is_published(&pipeline);
    assert_eq!(replay(&pipeline.kafka)["points"], rows(&pipeline.postgres, "points"));
}

/// Looks at the counter of points; whenever it is said to be ready, it is whole.
struct Sampler {
    stop: Arc<AtomicBool>,
    ready: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Sampler {
    fn start(pipeline: &Pipeline) -> Self {
        let (stop, ready) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counted) = (stop.clone(), ready.clone());
        let mut redis = pipeline.redis.connect();
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let mut both = redis::pipe();
                both.atomic().cmd("HGETALL").arg("points");
                both.cmd("HMGET").arg("millrace:mailbox:points").arg(&["state", "lsn"]);
                let (points, (state, lsn)): (BTreeMap<String, i64>, (String, String)) =
                    both.query(&mut redis).expect("Redis answers");
                if state == "ready" {
                    assert_eq!(points.values().sum::<i64>(), POINTS, "at {lsn}: {points:?}");
                    counted.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Sampler { stop, ready, thread }
    }

    fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("what is ready is whole");
        self.ready.load(Ordering::Relaxed)
    }
}

/// Two tables, one of which becomes a partition of the other.
const ATTACHED: &str = "
    CREATE TABLE event (id int, day int, PRIMARY KEY (id, day)) PARTITION BY RANGE (day);
    CREATE TABLE event_1 PARTITION OF event FOR VALUES FROM (0) TO (10);
    CREATE TABLE event_2 PARTITION OF event FOR VALUES FROM (10) TO (20);
    CREATE TABLE old (id int, day int NOT NULL, PRIMARY KEY (id, day));
    ALTER TABLE event_1 REPLICA IDENTITY FULL; ALTER TABLE event_2 REPLICA IDENTITY FULL; ALTER TABLE old REPLICA IDENTITY FULL;
    INSERT INTO event VALUES (1, 1), (2, 11); INSERT INTO old VALUES (3, 21), (4, 22)";

fn with_events() -> Option<Pipeline> {
    with_tables(ATTACHED)
}

fn with_tables(sql: &str) -> Option<Pipeline> {
    let mut pipeline = Pipeline::new();
    if pipeline.postgres.value("app", "SELECT current_setting('server_version_num')::int < 150000") == "t" {
        return None;
    }
    pipeline.postgres.sql("app", sql);
    let counters = "[counters.event]\nsql = 'SELECT day, count(*) FROM public.event GROUP BY day'\n\
                    [counters.old]\nsql = 'SELECT day, count(*) FROM public.old GROUP BY day'\n";
    let redis = format!("[redis]\nurl = \"{}\"\n{counters}", pipeline.redis.url());
    pipeline.configure_tables("\"public.event\", \"public.old\"", &redis);
    pipeline.succeed(&["setup"]);
    [Role::Reader, Role::Counters].into_iter().for_each(|role| pipeline.spawn(role));
    pipeline.succeed(&["wait", "--timeout", "60s"]);
    Some(pipeline)
}

#[test]
fn events_of_a_transaction_are_numbered_by_the_table_that_their_records_name() {
    let Some(pipeline) = with_events() else { return };
    pipeline.postgres.sql(
        "app",
        "BEGIN; INSERT INTO event VALUES (5, 5), (6, 15); INSERT INTO old VALUES (7, 23); UPDATE event SET id = 8 WHERE id = 1;
         INSERT INTO event VALUES (9, 9); COMMIT",
    );
    pipeline.succeed(&["wait", "--timeout", "60s"]);
    let mut orders = Vec::new();
    soon("the log has them", || {
        let tail = pipeline.process(&["tail", "--from-beginning", "--json"], "orders");
        thread::sleep(Duration::from_secs(1));
        drop(tail);
        let log = pipeline.log("orders");
        let records = log.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        let order = |record: serde_json::Value| {
            let value = &record["value"];
            let number = |name| value["transaction"][name].as_u64();
            Some((
                number("total_order")?,
                value["source"]["table"].as_str()?.to_owned(),
                number("data_collection_order")?,
            ))
        };
        orders = records.filter_map(order).collect();
        orders.dedup();
        orders.len() >= 6
    });
    let expected =
        [(1, "event", 1), (2, "event", 2), (3, "old", 1), (4, "event", 3), (5, "event", 4), (6, "event", 5)];
    let expected = expected.map(|(total, table, order)| (total, table.to_owned(), order));
    assert_eq!(orders, expected);
}

/// Its changes are the root's in the log, so that a store of its own name would never change again.
#[test]
fn a_configured_table_that_becomes_a_partition_of_a_configured_one_is_refused_until_it_is_the_others_alone() {
    let Some(mut pipeline) = with_events() else { return };
    pipeline.postgres.sql(
        "app",
        "BEGIN; INSERT INTO old VALUES (5, 23);
         ALTER TABLE event ATTACH PARTITION old FOR VALUES FROM (20) TO (30); INSERT INTO event VALUES (6, 24); COMMIT",
    );
    let status =
        wait_until("a refusal", Duration::from_secs(60), || pipeline.running_process(Role::Reader).ended());
    let log = pipeline.log("reader");
    assert_eq!(status.code(), Some(3), "{log}");
    assert!(log.contains("table public.old is a partition of public.event"), "{log}");
    let check = pipeline.refused(&["setup"]);
    assert!(check.contains("table public.old is a partition of public.event"), "{check}");
    // Detached, it goes on.
    pipeline.postgres.sql("app", "ALTER TABLE event DETACH PARTITION old; INSERT INTO old VALUES (7, 23)");
    pipeline.spawn(Role::Reader);
    pipeline.succeed(&["wait", "--timeout", "60s"]);
    pipeline.succeed(&["verify"]);
    // The first remedy.
    pipeline.postgres.sql("app", "ALTER TABLE event ATTACH PARTITION old FOR VALUES FROM (20) TO (30); INSERT INTO event VALUES (8, 24)");
    wait_until("a refusal", Duration::from_secs(60), || pipeline.running_process(Role::Reader).ended());
    pipeline.kill(Role::Counters);
    let counters = "[counters.event]\nsql = 'SELECT day, count(*) FROM public.event GROUP BY day'\n";
    let redis = format!("[redis]\nurl = \"{}\"\n{counters}", pipeline.redis.url());
    pipeline.configure_tables("\"public.event\"", &redis);
    pipeline.succeed(&["setup"]);
    [Role::Reader, Role::Counters].into_iter().for_each(|role| pipeline.spawn(role));
    pipeline.postgres.sql("app", "UPDATE event SET id = id + 100");
    pipeline.succeed(&["wait", "--timeout", "60s"]);
    pipeline.succeed(&["verify"]);
    assert_eq!(
        pipeline.counter("event").values().map(|count| count.parse::<u32>().unwrap_or(0)).sum::<u32>(),
        8
    );
    pipeline.assert_alive();
}

/// The former root's rows end in the log, though nothing was said of them.
#[test]
fn a_partition_that_moves_to_another_configured_table_leaves_the_first_one() {
    let sql = ATTACHED.replace(
        "CREATE TABLE old (id int, day int NOT NULL, PRIMARY KEY (id, day));",
        "CREATE TABLE old (id int, day int, PRIMARY KEY (id, day)) PARTITION BY RANGE (day);
         CREATE TABLE old_1 PARTITION OF old FOR VALUES FROM (20) TO (30); ALTER TABLE old_1 REPLICA IDENTITY FULL;",
    );
    let Some(mut pipeline) = with_tables(&sql) else { return };
    for (from, to, id) in [("event", "old", 100), ("old", "event", 101)] {
        pipeline.postgres.sql(
            "app",
            &format!(
                "BEGIN; ALTER TABLE {from} DETACH PARTITION event_2;
                 ALTER TABLE {to} ATTACH PARTITION event_2 FOR VALUES FROM (10) TO (20);
                 INSERT INTO {to} VALUES ({id}, 12); COMMIT"
            ),
        );
        pipeline.succeed(&["wait", "--timeout", "60s"]);
        pipeline.succeed(&["verify"]);
    }
    assert_eq!(pipeline.counter("event").get("12").map(String::as_str), Some("2"));
    pipeline.assert_alive();
}
