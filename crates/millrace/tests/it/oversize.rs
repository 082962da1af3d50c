//! A row that is larger than a record may be: refused with the choice that there is, or in the log without its largest
//! columns, for which only those stores stop that need them.

use std::time::Duration;

use serde_json::Value;
use testkit::services::wait_until;

use crate::harness::{Pipeline, Role, soon};

/// Bytes of a batch of the log.
const MAX_MESSAGE_BYTES: usize = 200_000;

const TABLE: &str = "
    CREATE TABLE files (id int PRIMARY KEY, kind text, body text);
    ALTER TABLE files REPLICA IDENTITY FULL;
    CREATE FUNCTION noise(bytes int) RETURNS text LANGUAGE sql AS
        $$ SELECT string_agg(md5(g::text), '') FROM generate_series(1, bytes / 32) g $$;
    INSERT INTO files VALUES (1, 'note', 'small'), (2, 'scan', noise(600000))";

fn configure(pipeline: &Pipeline, oversize: &str) {
    let stores = format!(
        "[postgres.oversize]\n\"public.files\" = \"{oversize}\"\n[redis]\nurl = \"{}\"\n\
         [counters.kinds]\nsql = 'SELECT kind, count(*) FROM public.files GROUP BY kind'\n\
         [search]\ndirectory = \"{}\"\nlisten = \"127.0.0.1:{}\"\n\
         [search.indexes.files]\ntable = \"public.files\"\ntext = [\"body\"]\nexact = [\"kind\"]\n\
         [search.indexes.kinds]\ntable = \"public.files\"\nexact = [\"kind\"]\n",
        pipeline.redis.url(),
        pipeline.search_directory().display(),
        pipeline.search_url().rsplit(':').next().unwrap_or_default(),
    );
    pipeline.configure_tables("\"public.files\"", &stores);
}

fn document(pipeline: &Pipeline, index: &str, id: u32) -> Option<Value> {
    pipeline.get(&format!("/indexes/{index}/documents/{id}"))
}

#[test]
fn a_row_larger_than_a_record_is_refused_or_goes_on_without_its_largest_column() {
    let mut pipeline = Pipeline::new();
    pipeline.postgres.sql("app", TABLE);
    configure(&pipeline, "refuse");
    pipeline.succeed(&["setup"]);
    let bootstrap = pipeline.kafka.bootstrap();
    let topic =
        ["--bootstrap-server", &bootstrap, "--entity-type", "topics", "--entity-name", "millrace.mailbox.1"];
    let limit = format!("max.message.bytes={MAX_MESSAGE_BYTES}");
    pipeline
        .kafka
        .tool("kafka.admin.ConfigCommand", &[&topic[..], &["--alter", "--add-config", &limit]].concat());

    let check = String::from_utf8_lossy(&pipeline.millrace(&["check", "--json"]).stdout).into_owned();
    assert!(check.contains("the row 2 of public.files becomes a record of about 1.1 MB"), "{check}");
    pipeline.spawn(Role::Reader);
    let end = || pipeline.running_process(Role::Reader).ended();
    let status = wait_until("a refusal", Duration::from_secs(60), end);
    let log = pipeline.log("reader");
    assert_eq!(status.code(), Some(3), "{log}");
    assert!(log.contains("key {\"id\":2,") && log.contains("[postgres.oversize]"), "{log}");

    configure(&pipeline, "omit");
    [Role::Reader, Role::Counters, Role::Search].into_iter().for_each(|role| pipeline.spawn(role));
    let whole = ["--store", "counters.kinds", "--store", "search.kinds", "--timeout", "60s"];
    pipeline.succeed(&[&["wait"], &whole[..]].concat());
    pipeline.succeed(&[&["verify"], &whole[..]].concat());
    assert!(pipeline.log("reader").contains("without these columns"), "{}", pipeline.log("reader"));
    let tail = pipeline.succeed(&["tail", "--from-beginning", "--limit", "2", "--json"]);
    assert!(tail.contains(r#""omitted":["body"]"#), "{tail}");

    // The index of the bodies has none of the second row, and says why.
    let status = pipeline.succeed(&["status", "--json"]);
    assert!(status.contains("search.files needs `body` of the row 2 of public.files"), "{status}");
    pipeline.succeed(&["skip", "search.files", "--key", "2", "--reason", "a scan"]);
    soon("the row is there without its body", || {
        document(&pipeline, "files", 2)
            .is_some_and(|found| found["body"].is_null() && found["kind"] == "scan")
    });
    pipeline.succeed(&["wait", "--timeout", "60s"]);
    let different = pipeline.millrace(&["verify", "--store", "search.files"]);
    assert_eq!(different.status.code(), Some(1));
    let said = String::from_utf8_lossy(&different.stdout).into_owned();
    assert!(said.contains("search.files") && said.contains('2') && said.len() < 100_000, "{said}");

    // Later records of the row are left out without being asked for again, as long as the log cannot have the column.
    pipeline.postgres.sql("app", "UPDATE files SET kind = 'letter' WHERE id = 2");
    pipeline.succeed(&["wait", "--timeout", "60s"]);
    pipeline.succeed(&[&["verify"], &whole[..]].concat());
    assert_eq!(document(&pipeline, "files", 2).map(|found| found["kind"].clone()), Some("letter".into()));
    pipeline
        .postgres
        .sql("app", "UPDATE files SET body = 'short' WHERE id = 2; UPDATE files SET kind = 'x' WHERE id = 1");
    pipeline.postgres.sql("app", "UPDATE files SET kind = 'letter' WHERE id = 2");
    pipeline.succeed(&["wait", "--timeout", "60s"]);
    pipeline.succeed(&["verify"]);
    assert_eq!(document(&pipeline, "files", 2).map(|found| found["body"].clone()), Some("short".into()));
    pipeline.assert_alive();
}
