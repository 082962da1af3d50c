//! What one store cannot take in stops that store: the others go on, and it shows what it has, until it is told to leave
//! the record out or there is a new log.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::harness::{Pipeline, Role, soon};

const TABLES: &str = "
    CREATE TABLE event (id int, day date, kind text, PRIMARY KEY (id, day)) PARTITION BY RANGE (day);
    ALTER TABLE event REPLICA IDENTITY FULL;
    CREATE TABLE event_1 PARTITION OF event FOR VALUES FROM ('2026-01-01') TO ('2026-02-01');
    ALTER TABLE event_1 REPLICA IDENTITY FULL;
    CREATE TABLE other (id int PRIMARY KEY, kind text);
    ALTER TABLE other REPLICA IDENTITY FULL;
    INSERT INTO event VALUES (1, '2026-01-01', 'first');
    INSERT INTO other VALUES (1, 'first')";

const COUNTERS: &str = "
[counters.event]
sql = 'SELECT kind, count(*) FROM public.event GROUP BY kind'
[counters.days]
sql = 'SELECT day, count(*) FROM public.event GROUP BY day'
[counters.other]
sql = 'SELECT kind, count(*) FROM public.other GROUP BY kind'
";

fn running() -> Pipeline {
    let mut pipeline = Pipeline::new();
    pipeline.postgres.sql("app", TABLES);
    let redis = format!("[redis]\nurl = \"{}\"\n{COUNTERS}", pipeline.redis.url());
    pipeline.configure_tables("\"public.event\", \"public.other\"", &redis);
    pipeline.succeed(&["setup"]);
    [Role::Reader, Role::Counters].into_iter().for_each(|role| pipeline.spawn(role));
    pipeline.succeed(&["wait", "--timeout", "60s"]);
    pipeline
}

fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(group, value)| (group.to_string(), value.to_string())).collect()
}

/// What `status` says of a store.
pub(crate) fn status(pipeline: &Pipeline, store: &str) -> Value {
    let status: Value = serde_json::from_str(&pipeline.succeed(&["status", "--json"])).expect("JSON");
    let mut stores = status["stores"].as_array().expect("stores").iter();
    stores.find(|found| found["store"] == store).expect("the store").clone()
}

#[test]
fn a_partition_without_old_rows_stops_only_the_counter_that_needs_them() {
    let mut pipeline = running();
    // A tool makes the next partition, whose identity is not its parent's. New rows need no old ones.
    pipeline.postgres.sql(
        "app",
        "CREATE TABLE event_2 PARTITION OF event FOR VALUES FROM ('2026-02-01') TO ('2026-03-01');
         INSERT INTO event VALUES (2, '2026-02-01', 'second')",
    );
    pipeline.succeed(&["wait", "--timeout", "60s"]);
    assert_eq!(pipeline.counter("event"), map(&[("first", "1"), ("second", "1")]));

    pipeline
        .postgres
        .sql("app", "UPDATE event SET kind = 'third' WHERE id = 2; INSERT INTO other VALUES (2, 'second')");
    let others = ["--store", "counters.other", "--store", "counters.days", "--timeout", "60s"];
    pipeline.succeed(&[&["wait"], &others[..]].concat());
    pipeline.succeed(&[&["verify"], &others[..]].concat());
    assert_eq!(pipeline.counter("other"), map(&[("first", "1"), ("second", "1")]));
    assert_eq!(pipeline.counter("event"), map(&[("first", "1"), ("second", "1")]), "it shows what it has");
    let event = status(&pipeline, "counters.event");
    assert_eq!(event["ready"], false, "{event}");
    let stopped = &event["stopped"];
    assert!(
        stopped["reason"].as_str().is_some_and(|reason| reason.contains("column kind is not part")),
        "{event}"
    );
    assert!(pipeline.log("counters").contains("the other stores go on"), "{}", pipeline.log("counters"));
    pipeline.assert_alive();

    // The running worker takes the remedy up.
    pipeline.postgres.sql("app", "ALTER TABLE event_2 REPLICA IDENTITY FULL");
    pipeline.succeed(&["generation", "new", "--wait"]);
    pipeline.succeed(&["wait", "--timeout", "60s"]);
    pipeline.succeed(&["verify"]);
    assert_eq!(pipeline.counter("event"), map(&[("first", "1"), ("third", "1")]));
    pipeline.assert_alive();
}

#[test]
fn a_stopped_store_goes_on_when_it_is_told_to_skip_the_record() {
    let mut pipeline = running();
    pipeline.postgres.sql(
        "app",
        "ALTER TABLE other REPLICA IDENTITY DEFAULT; UPDATE other SET kind = 'lost' WHERE id = 1;
         ALTER TABLE other REPLICA IDENTITY FULL; INSERT INTO other VALUES (2, 'second')",
    );
    let mut offset = None;
    soon("the counter stops", || {
        offset = status(&pipeline, "counters.other")["stopped"]["offset"].as_i64();
        offset.is_some()
    });
    // Killed, it stops at the same place again.
    pipeline.kill(Role::Counters);
    pipeline.spawn(Role::Counters);
    pipeline.postgres.sql("app", "INSERT INTO event VALUES (3, '2026-01-02', 'first')");
    soon("the others go on", || pipeline.counter("event") == map(&[("first", "2")]));
    assert_eq!(pipeline.counter("other"), map(&[("first", "1")]));

    let offset = offset.unwrap_or_default().to_string();
    let unknown = pipeline.refused(&["skip", "counters.none", "--offset", &offset, "--reason", "a test"]);
    assert!(unknown.contains("there is no store `counters.none`"), "{unknown}");
    pipeline.succeed(&["skip", "other", "--offset", &offset, "--reason", "a test"]);
    let skipped: Vec<i64> = offset.parse().into_iter().collect();
    soon("it goes on without the record", || {
        let other = status(&pipeline, "counters.other");
        other["ready"] == true
            && other["skipped"] == Value::from(skipped.clone())
            && other["stopped"].is_null()
    });
    assert_eq!(pipeline.counter("other"), map(&[("first", "1"), ("second", "1")]));
    pipeline.assert_alive();
}

#[test]
fn a_search_process_whose_only_index_has_stopped_goes_on_serving_it() {
    let mut pipeline = Pipeline::new();
    pipeline.postgres.sql(
        "app",
        "CREATE TABLE page (id int PRIMARY KEY, title text); INSERT INTO page VALUES (1, 'first')",
    );
    let search = format!(
        "[search]\ndirectory = \"{}\"\nlisten = \"{}\"\n\
         [search.indexes.page]\ntable = \"public.page\"\nexact = [\"title\"]\n",
        pipeline.search_directory().display(),
        pipeline.search_url().trim_start_matches("http://"),
    );
    pipeline.configure_tables("\"public.page\"", &search);
    pipeline.succeed(&["setup"]);
    [Role::Reader, Role::Search].into_iter().for_each(|role| pipeline.spawn(role));
    pipeline.succeed(&["wait", "--timeout", "60s"]);

    // Other programs may write into the topic, which no store can make anything of.
    pipeline.kafka.append("millrace.mailbox.1", "", "{}", &[]);
    pipeline.postgres.sql("app", "INSERT INTO page VALUES (2, 'second')");
    let mut stopped = Value::Null;
    soon("the index stops", || {
        stopped = status(&pipeline, "search.page")["stopped"].clone();
        stopped["offset"].is_i64()
    });
    let title = |id| pipeline.get(&format!("/indexes/page/documents/{id}")).map(|page| page["title"].clone());
    assert_eq!((title(1), title(2)), (Some("first".into()), None), "it shows what it has");
    let offset = stopped["offset"].to_string();
    pipeline.succeed(&["skip", "page", "--offset", &offset, "--reason", "a test"]);
    pipeline.succeed(&["wait", "--timeout", "60s"]);
    pipeline.succeed(&["verify"]);
    pipeline.assert_alive();
}
