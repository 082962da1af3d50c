use std::fmt::Write as _;
use std::path::Path;

use expect_test::{Expect, expect};

use super::Config;

/// The design's example, whole.
const EXAMPLE: &str = r#"
pipeline = "mailbox"
[postgres]
url = "postgres://millrace:pg-secret@127.0.0.1:5432/app"
tables = ["public.emails", "public.users"]
[kafka]
bootstrap = "127.0.0.1:9092"
[kafka.properties]
"sasl.password" = "kafka-secret"
[redis]
url = "redis://:redis-secret@127.0.0.1:6379/0"
[counters.unread]
sql = "SELECT user_id, count(*) FROM public.emails WHERE NOT is_read AND folder = 'inbox' GROUP BY user_id"
[search]
directory = "/var/lib/millrace/search"
listen = "127.0.0.1:7700"
[search.indexes.emails]
table = "public.emails"
text = ["subject", "body"]
exact = ["user_id", "folder", "sender"]
number = []
date = ["sent_at"]
[telemetry.listen]
reader = "127.0.0.1:9201"
counters = "127.0.0.1:9202"
search = "127.0.0.1:9203"
"#;

/// The least that is a configuration.
const LEAST: &str = r#"pipeline = "mailbox"
[postgres]
url = "postgres://127.0.0.1/app"
tables = ["public.emails"]
[kafka]
bootstrap = "127.0.0.1:9092"
"#;

fn parse(text: &str, environment: &[(&str, &str)]) -> Result<Config, String> {
    let environment = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    Config::parse(Path::new("millrace.toml"), text, environment).map_err(|mistakes| {
        assert!(!mistakes.is_empty(), "refused without a reason");
        mistakes.iter().fold(String::new(), |mut all, mistake| {
            let _ = writeln!(all, "{mistake}");
            all
        })
    })
}

fn mistakes(text: &str, environment: &[(&str, &str)], expected: Expect) {
    expected.assert_eq(&parse(text, environment).expect_err("this is wrong"));
}

#[test]
fn the_contracts_example_is_read_whole_and_shows_no_secret() {
    let config = parse(EXAMPLE, &[]).unwrap();
    let shown = format!("{config:?}");
    assert!(!shown.contains("secret"), "{shown}");
    assert_eq!(config.postgres.url(), Ok("postgres://millrace:pg-secret@127.0.0.1:5432/app"));
    assert_eq!(config.postgres.admin_url(), config.postgres.url());
    assert_eq!(config.kafka.properties["sasl.password"].expose(), "kafka-secret");
    assert_eq!(config.counters[0].name, "unread");
    let search = config.search.unwrap();
    assert_eq!(search.indexes[0].exact, ["user_id", "folder", "sender"]);
    assert_eq!(search.listen.port(), 7700);
    assert_eq!(config.telemetry.counters.unwrap().port(), 9202);
    let shortest = [("MILLRACE_REDIS__LONGEST_SCRIPT_MS", "5")];
    for (environment, longest) in [(&[][..], 40), (&shortest[..], 5)] {
        let redis = parse(EXAMPLE, environment).unwrap().redis.unwrap();
        assert_eq!(redis.longest_script.as_millis(), longest);
    }
}

#[test]
fn the_environment_alone_is_enough_and_wins_over_the_file() {
    let all = [
        ("MILLRACE_PIPELINE", "mailbox"),
        ("MILLRACE_POSTGRES__URL", "postgres://db/app"),
        ("MILLRACE_POSTGRES__TABLES", "public.emails, public.users"),
        ("MILLRACE_KAFKA__BOOTSTRAP", "k:9092"),
        ("MILLRACE_KAFKA__REPLICATION_FACTOR", "3"),
        ("MILLRACE_KAFKA__PROPERTIES__SECURITY_PROTOCOL", "SSL"),
        ("MILLRACE_CONFIG", "the command line's"),
        ("MILLRACE_SERVICE_HOST", "10.0.0.1"),
        ("MILLRACE_PORT_9201_TCP_ADDR", "10.0.0.1"),
        ("HOME", "/root"),
    ];
    let config = parse("", &all).unwrap();
    assert_eq!(config.postgres.tables.len(), 2);
    assert_eq!(config.kafka.replication_factor, Some(3));
    assert_eq!(config.kafka.properties["security.protocol"].expose(), "SSL");

    let over = [("MILLRACE_PIPELINE", "other"), ("MILLRACE_POSTGRES__TABLES", r#"["a.b"]"#)];
    let config = parse(LEAST, &over).unwrap();
    assert_eq!((config.pipeline.as_str(), config.postgres.tables[0].to_string()), ("other", "a.b".into()));
}

#[test]
fn secrets_come_from_files() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("url");
    std::fs::write(&file, "postgres://from-file/app\n").unwrap();
    let path = file.to_str().unwrap();
    let text = LEAST.replace("url = \"postgres://127.0.0.1/app\"", &format!("url_file = {path:?}"));
    assert_eq!(parse(&text, &[]).unwrap().postgres.url(), Ok("postgres://from-file/app"));
    // A variable wins over the file, whichever of the two spellings either uses.
    let config = parse(LEAST, &[("MILLRACE_POSTGRES__URL_FILE", path)]).unwrap();
    assert_eq!(config.postgres.url(), Ok("postgres://from-file/app"));
    let config = parse(&text, &[("MILLRACE_POSTGRES__URL", "postgres://env/app")]).unwrap();
    assert_eq!(config.postgres.url(), Ok("postgres://env/app"));

    mistakes(
        &LEAST.replace("url =", "url_file = \"/nowhere/at/all\"\nurl ="),
        &[],
        expect![[r#"
            millrace.toml:3: both `postgres.url` and `postgres.url_file` are given
              remedy: keep one of them
        "#]],
    );
    mistakes(
        &LEAST.replace("url = \"postgres://127.0.0.1/app\"", "url_file = \"/nowhere/at/all\""),
        &[],
        expect![[r#"
            millrace.toml:3: `postgres.url_file` names the file /nowhere/at/all: No such file or directory (os error 2)
              remedy: name a file that this user can read
        "#]],
    );
}

#[test]
fn unknown_keys_are_refused_with_the_nearest_name() {
    mistakes(
        &format!(
            "{LEAST}[telemetri]\n[search]\ndirectory='x'\nlisten='1.2.3.4:5'\nheap_md = 3\n[search.indexes.e]\ntable='public.emails'\nfields = ['a']\ntext=['b']"
        ),
        &[("MILLRACE_POSTGRES__TABELS", "public.emails"), ("MILLRACE_LOGLEVEL", "debug")],
        expect![[r#"
            environment variable MILLRACE_POSTGRES__TABELS: no key `postgres.tabels`
              remedy: did you mean `postgres.tables`?
            millrace.toml:14: unknown key `search.indexes.e.fields`
              remedy: remove this key; here are possible: `table`, `text`, `exact`, `number`, `date`
            millrace.toml:11: unknown key `search.heap_md`
              remedy: did you mean `search.heap_mb`?
            environment variable MILLRACE_LOGLEVEL: no key `loglevel`
              remedy: remove this variable; here are possible: `pipeline`, `postgres`, `kafka`, `redis`, `counters`, `search`, `reader`, `snapshot`, `telemetry`
            millrace.toml:7: unknown key `telemetri`
              remedy: did you mean `telemetry`?
        "#]],
    );
}

#[test]
fn what_is_missing_says_where_to_write_it() {
    mistakes(
        "[search]\nlisten = '127.0.0.1:7700'",
        &[],
        expect![[r#"
        millrace.toml: `pipeline` is missing
          remedy: write `pipeline = "mailbox"`, or set MILLRACE_PIPELINE
        millrace.toml: `postgres.tables` is missing
          remedy: write `tables = ["public.emails"]` under [postgres], or set MILLRACE_POSTGRES__TABLES
        millrace.toml: `kafka.bootstrap` is missing
          remedy: write `bootstrap = "127.0.0.1:9092"` under [kafka], or set MILLRACE_KAFKA__BOOTSTRAP
        millrace.toml:1: `search.directory` is missing
          remedy: write `directory = "/var/lib/millrace/search"` under [search], or set MILLRACE_SEARCH__DIRECTORY
    "#]],
    );
    mistakes(
        &format!("{LEAST}[counters.unread]\nsql = 'SELECT count(*) FROM public.emails'"),
        &[],
        expect![[r#"
            millrace.toml: `redis.url` is missing
              remedy: write `url = "redis://127.0.0.1:6379/0"` under [redis], or set MILLRACE_REDIS__URL
        "#]],
    );
}

#[test]
fn wrong_types_and_wrong_values_are_refused() {
    mistakes(
        r#"
pipeline = "Mail Box"
kafka = 7
[postgres]
url = 5432
tables = ["emails", "public.emails", "public.emails", "\"public\".x", "a.b.c", 3]
[reader]
batch_kb = 0
commit_interval_ms = "soon"
[telemetry.listen]
reader = "localhost"
"#,
        &[],
        expect![[r#"
            millrace.toml:2: `Mail Box` is not a name for a pipeline
              remedy: a letter a-z, then up to 31 of a-z, 0-9 and _, as in mailbox
            millrace.toml:5: `postgres.url` is an integer, not a string
              remedy: give it a string
            millrace.toml:6: `postgres.tables` is an integer, not an array of strings
              remedy: give it an array of strings
            millrace.toml:3: `kafka` is an integer, not a table
              remedy: write it as a section: [kafka]
            millrace.toml:3: `kafka.bootstrap` is missing
              remedy: write `bootstrap = "127.0.0.1:9092"` under [kafka], or set MILLRACE_KAFKA__BOOTSTRAP
            millrace.toml:8: `reader.batch_kb` is 0
              remedy: choose a number from 64 to 1048576
            millrace.toml:9: `reader.commit_interval_ms` is a string, not an integer
              remedy: give it an integer
            millrace.toml:11: `telemetry.listen.reader` is `localhost`, which is no address to listen on
              remedy: write IP:PORT, as in 127.0.0.1:7700 or [::1]:7700 or 0.0.0.0:7700
        "#]],
    );
    mistakes(
        LEAST,
        &[("MILLRACE_POSTGRES__TABLES", "[1")],
        expect![[r#"
        environment variable MILLRACE_POSTGRES__TABLES: `postgres.tables` is not an array in TOML's form
          remedy: write ["a", "b"], or a,b
    "#]],
    );
    mistakes(
        LEAST,
        &[("MILLRACE_PIPELINE__NAME", "x")],
        expect![[r#"
        environment variable MILLRACE_PIPELINE__NAME: no key `name` can stand here: millrace.toml:1 has a value, not a table
          remedy: unset MILLRACE_PIPELINE__NAME
    "#]],
    );
    mistakes(
        "pipeline = mailbox\n",
        &[],
        expect![[r#"
        millrace.toml:1: not TOML: string values must be quoted, expected literal string
          remedy: mend the line; the form is described at https://toml.io
    "#]],
    );
    mistakes(
        "pipeline = 'a'\npipeline = 'b'\n",
        &[],
        expect![[r#"
        millrace.toml:2: not TOML: duplicate key
          remedy: mend the line; the form is described at https://toml.io
    "#]],
    );
}

#[test]
fn tables_may_have_any_name() {
    let text = LEAST.replace(
        "[\"public.emails\"]",
        r#"["public.order items", 'public.table_with_pk.1#2/3', 'public.a"b', '"my.schema"."order items"']"#,
    );
    let stores = r#"
[redis]
url = "redis://r"
[counters.orders]
sql = 'SELECT count(*) FROM public."order items"'
[counters.quoted]
sql = 'SELECT count(*) FROM "my.schema"."order items"'
[search]
directory = "d"
listen = "[::1]:0"
[search.indexes.pk]
table = "public.table_with_pk.1#2/3"
text = ["a"]
[search.indexes.ab]
table = 'public."a""b"'
text = ["a"]
"#;
    let config = parse(&format!("{text}{stores}"), &[]).unwrap();
    let tables = config.postgres.tables.iter();
    let parts: Vec<_> = tables.map(|table| (table.schema.as_str(), table.name.as_str())).collect();
    assert_eq!(
        parts,
        [
            ("public", "order items"),
            ("public", "table_with_pk.1#2/3"),
            ("public", "a\"b"),
            ("my.schema", "order items")
        ]
    );
    assert_eq!(config.search.unwrap().indexes[0].table, "a\"b");
    let variable = [("MILLRACE_POSTGRES__TABLES", r#"['public.order items', 'public.a"b']"#)];
    assert_eq!(parse(LEAST, &variable).unwrap().postgres.tables[1].name, "a\"b");

    let text = LEAST.replace(
        "[\"public.emails\"]",
        r#"["emails", "\"public\".emails", "public.emails", "public.", 'public."x', 'public.a"b']"#,
    );
    mistakes(
        &text,
        &[],
        expect![[r#"
            millrace.toml:4: `emails` does not name a table
              remedy: write the schema too, as in public.emails
            millrace.toml:4: table public.emails is named twice
              remedy: name it once
            millrace.toml:4: `public.` does not name a table
              remedy: write schema.table, as in public.emails
            millrace.toml:4: `public."x` does not name a table
              remedy: write schema.table, or a part in double quotes as in SQL: "my.schema"."order items"
        "#]],
    );
    mistakes(
        &format!(
            "{}[redis]\nurl = 'redis://r'\n[counters.a]\nsql = 'SELECT count(*) FROM public.\"order items\"'",
            LEAST.replace("\"public.emails\"", "'public.a\"b'")
        ),
        &[],
        expect![[r#"
            millrace.toml:10: counter a names public.order items, which is not in `postgres.tables`
              remedy: add it: tables = ["public.a\"b", "public.order items"]
        "#]],
    );
}

#[test]
fn stores_fit_the_pipeline() {
    mistakes(
        &format!(
            "{LEAST}[redis]\nurl = 'redis://r'\n\
             [counters.Unread]\nsql = 'SELECT count(*) FROM public.emails'\n\
             [counters.users]\nsql = 'SELECT count(*) FROM public.users'\n\
             [counters.broken]\nsql = 'SELEKT'\n\
             [search]\ndirectory = 'd'\nlisten = '[::1]:0'\n\
             [search.indexes.users]\ntable = 'public.users'\ntext = ['name']\n\
             [search.indexes.empty]\ntable = 'public.emails'\n\
             [search.indexes.twice]\ntable = 'public.emails'\ntext = ['a']\nexact = ['a']\n"
        ),
        &[],
        expect![[r#"
            millrace.toml:10: `Unread` is not a name for a counter
              remedy: a letter a-z, then up to 63 of a-z, 0-9, _ and -, as in unread
            millrace.toml:14: counter "broken": not SQL that can be read: sql parser error: Expected: an SQL statement, found: SELEKT at Line: 1, Column: 1
              remedy: write SELECT [group columns,] count(*) or count(column) or sum(column) FROM one table [WHERE condition] [GROUP BY the group columns]
            millrace.toml:12: counter users names public.users, which is not in `postgres.tables`
              remedy: add it: tables = ["public.emails", "public.users"]
            millrace.toml:22: the search index `empty` of public.emails has no columns
              remedy: [search.indexes.empty]: name at least one under `text`
            millrace.toml:19: index users names public.users, which is not in `postgres.tables`
              remedy: add it: tables = ["public.emails", "public.users"]
        "#]],
    );
}
