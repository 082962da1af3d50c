//! Groups of counters as Postgres prints them, in stores of an older version as well, and after ALTER TABLE; and tables
//! whose names need quotes.

use std::collections::BTreeMap;

use redis::Commands;

use crate::harness::{Pipeline, Role, soon};

const TABLES: &str = r#"
    CREATE TABLE "order items" (id int PRIMARY KEY, amount numeric(10,2), code char(4), note text,
        up text GENERATED ALWAYS AS (upper(note)) STORED);
    ALTER TABLE "order items" REPLICA IDENTITY FULL;
    CREATE TABLE "v1.2#a""b" (id int PRIMARY KEY);
    INSERT INTO "order items" VALUES (1, 1.50, 'ab', 'first'), (2, 100, 'abcd', 'second'), (3, 1.5, 'ab', 'third');
    INSERT INTO "v1.2#a""b" VALUES (1), (2)"#;

const NAMES: &str = r#""public.order items", 'public.v1.2#a"b'"#;

const COUNTERS: &str = r#"
[counters.amounts]
sql = 'SELECT amount, count(*) FROM public."order items" GROUP BY amount'
[counters.codes]
sql = '''SELECT code, sum(id) FROM public."order items" WHERE code <> 'x' GROUP BY code'''
[counters.others]
sql = 'SELECT id, count(*) FROM public."v1.2#a""b" GROUP BY id'
"#;

fn pipeline() -> Pipeline {
    let pipeline = Pipeline::new();
    pipeline.postgres.sql("app", TABLES);
    pipeline.configure_tables(NAMES, &stores(&pipeline, "text = [\"note\"]"));
    pipeline
}

fn stores(pipeline: &Pipeline, columns: &str) -> String {
    let directory = pipeline.search_directory();
    format!(
        "[redis]\nurl = \"{}\"\n{COUNTERS}[search]\ndirectory = \"{}\"\nlisten = \"{}\"\n\
         [search.indexes.items]\ntable = 'public.\"order items\"'\n{columns}\n",
        pipeline.redis.url(),
        directory.display(),
        pipeline.search_url().trim_start_matches("http://"),
    )
}

fn run(pipeline: &mut Pipeline) {
    pipeline.succeed(&["check"]);
    pipeline.succeed(&["setup"]);
    [Role::Reader, Role::Counters, Role::Search].into_iter().for_each(|role| pipeline.spawn(role));
    proven(pipeline);
}

fn proven(pipeline: &mut Pipeline) {
    pipeline.succeed(&["wait", "--timeout", "90s"]);
    pipeline.succeed(&["verify"]);
    pipeline.assert_alive();
}

fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(group, value)| (group.to_string(), value.to_string())).collect()
}

/// Makes a counter what an older version had made of it: groups in their shortest form, and no form in the checkpoint.
fn age(pipeline: &Pipeline, name: &str, groups: &[(&str, &str)]) {
    let mut redis = pipeline.redis.connect();
    let checkpoint = format!("millrace:mailbox:{name}");
    let definition: String = redis.hget(&checkpoint, "definition").expect("Redis answers");
    let (hash, form) = definition.split_once(':').expect("a form");
    assert!(!form.is_empty());
    let _: () = redis.hset(&checkpoint, "definition", hash).expect("Redis answers");
    for key in [name.to_owned(), format!("{checkpoint}:rows"), format!("{checkpoint}:nonnull")] {
        for (now, before) in groups {
            let value: Option<String> = redis.hget(&key, now).expect("Redis answers");
            if let Some(value) = value {
                let _: () = redis.hdel(&key, now).expect("Redis answers");
                let _: () = redis.hset(&key, before, value).expect("Redis answers");
            }
        }
    }
}

#[test]
fn h60_groups_are_found_by_what_postgres_prints_also_after_an_upgrade_and_alter_table() {
    let mut pipeline = pipeline();
    run(&mut pipeline);
    let amounts = map(&[("1.50", "2"), ("100.00", "1")]);
    let codes = map(&[("ab  ", "4"), ("abcd", "2")]);
    assert_eq!((pipeline.counter("amounts"), pipeline.counter("codes")), (amounts.clone(), codes.clone()));
    let untouched: String = pipeline.redis.connect().hget("millrace:mailbox:others", "definition").unwrap();
    assert!(!untouched.contains(':'), "a group of integers has no form: {untouched}");

    // A store of an older version is built again without a change of its table.
    pipeline.kill(Role::Counters);
    age(&pipeline, "amounts", &[("1.50", "1.5"), ("100.00", "100")]);
    age(&pipeline, "codes", &[("ab  ", "ab")]);
    assert_eq!(pipeline.counter("amounts"), map(&[("1.5", "2"), ("100", "1")]));
    pipeline.spawn(Role::Counters);
    soon("both are built again", || {
        pipeline.counter("amounts") == amounts && pipeline.counter("codes") == codes
    });
    let filled = pipeline.log("counters").matches("beginning store=\"counters.others\"").count();
    assert_eq!(filled, 1, "a counter without a form is not built again");
    proven(&mut pipeline);

    // This rewrites nothing, so that the log goes on with rows of both types.
    pipeline.postgres.sql("app", "ALTER TABLE \"order items\" ALTER amount TYPE numeric");
    pipeline.postgres.sql("app", "INSERT INTO \"order items\" VALUES (4, 1.500, 'x'), (5, 1.555, 'é')");
    let shortest = map(&[("1.5", "3"), ("1.555", "1"), ("100", "1")]);
    soon("amounts is built again", || pipeline.counter("amounts") == shortest);
    proven(&mut pipeline);
    // This does.
    pipeline
        .postgres
        .sql("app", "ALTER TABLE \"order items\" ALTER amount TYPE numeric(10,3), ALTER code TYPE char(6)");
    pipeline.postgres.sql("app", "DELETE FROM \"order items\" WHERE id = 2");
    let scaled = map(&[("1.500", "3"), ("1.555", "1")]);
    soon("amounts is built again", || pipeline.counter("amounts") == scaled);
    let wider = map(&[("ab    ", "4"), ("é     ", "5")]);
    soon("codes is built again", || pipeline.counter("codes") == wider);
    proven(&mut pipeline);
}

#[test]
fn tables_whose_names_need_quotes_and_a_generated_column() {
    let mut pipeline = pipeline();
    pipeline.configure_tables(NAMES, &stores(&pipeline, "text = [\"note\", \"up\"]"));
    let output = pipeline.millrace(&["check", "--json"]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains("names up of public.order items, a generated column, which the stream"), "{said}");
    assert!(said.contains(r#"\"public\".\"order items\" ALTER COLUMN \"up\" DROP EXPRESSION"#), "{said}");

    pipeline.configure_tables(NAMES, &stores(&pipeline, "text = [\"note\"]"));
    run(&mut pipeline);
    assert_eq!(pipeline.counter("others"), map(&[("1", "1"), ("2", "1")]));
    pipeline
        .postgres
        .sql("app", "INSERT INTO \"v1.2#a\"\"b\" VALUES (3); DELETE FROM \"order items\" WHERE id = 1");
    proven(&mut pipeline);
    let name = "public.v1.2#a\"b";
    let tail = ["tail", "--from-beginning", "--limit", "3", "--json", "--table", name];
    assert_eq!(pipeline.succeed(&tail).lines().count(), 3);
    let said = pipeline.succeed(&["snapshot", "public.\"v1.2#a\"\"b\""]);
    assert!(said.contains("is in the log: 2 rows were read"), "{said}");
}
