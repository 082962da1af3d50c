//! What must hold of tables before they are published.

use postgres::catalog::connect;
use postgres::check::{self, Finding, Verdict};
use testkit::services::Postgres;

use crate::support::*;

fn check_tables(server: &Postgres, tables: &[&str]) -> Vec<Finding> {
    check_as("postgres", server, tables)
}

fn check_as(role: &str, server: &Postgres, tables: &[&str]) -> Vec<Finding> {
    runtime().block_on(async {
        let url = server.url("postgres").replace("postgres@", &format!("{role}@"));
        let client = connect(&config(&url)).await.unwrap();
        check::tables(&client, &plan(tables)).await.unwrap()
    })
}

fn version(server: &Postgres) -> u32 {
    server.value("postgres", "SHOW server_version_num").parse().unwrap()
}

#[test]
fn a_generated_column_in_the_key_is_refused_and_the_remedy_works() {
    let server = Postgres::start();
    server.sql(
        "postgres",
        "CREATE TABLE pk (a int, g int GENERATED ALWAYS AS (a % 2) STORED, b int NOT NULL, PRIMARY KEY (b, g));
         CREATE TABLE ix (LIKE pk INCLUDING GENERATED); ALTER TABLE ix ALTER g SET NOT NULL;
         CREATE UNIQUE INDEX ix_g ON ix (g); ALTER TABLE ix REPLICA IDENTITY USING INDEX ix_g;
         CREATE TABLE full_pk (LIKE pk INCLUDING ALL); ALTER TABLE full_pk REPLICA IDENTITY FULL;
         CREATE TABLE good (id int PRIMARY KEY, g int GENERATED ALWAYS AS (1) STORED);
         CREATE TABLE included (id int, g int GENERATED ALWAYS AS (1) STORED, PRIMARY KEY (id) INCLUDE (g))",
    );
    for finding in check_tables(&server, &["pk", "ix", "full_pk"]) {
        assert_eq!(finding.verdict, Verdict::Wrong, "{finding:?}");
        assert!(finding.what.contains("has the generated column \"g\" in its key"), "{finding:?}");
        assert!(finding.remedy.contains("REPLICA IDENTITY USING INDEX"), "{finding:?}");
    }
    server.sql(
        "postgres",
        "CREATE UNIQUE INDEX pk_b ON pk (b); ALTER TABLE pk REPLICA IDENTITY USING INDEX pk_b",
    );
    for finding in check_tables(&server, &["pk", "good", "included"]) {
        assert_eq!(finding.verdict, Verdict::Good, "{finding:?}");
    }
}

/// Said if and only if the server refuses the update.
#[test]
fn a_full_identity_with_a_generated_column_is_refused_where_the_server_refuses_its_updates() {
    let server = Postgres::start();
    server.sql(
        "postgres",
        "CREATE TABLE keyed (id int PRIMARY KEY, g int GENERATED ALWAYS AS (1) STORED);
         ALTER TABLE keyed REPLICA IDENTITY FULL;
         CREATE TABLE bag (id int, g int GENERATED ALWAYS AS (1) STORED); ALTER TABLE bag REPLICA IDENTITY FULL",
    );
    let mut tables = vec!["keyed", "bag"];
    if version(&server) >= 180_000 {
        let unstored =
            "CREATE TABLE unstored (id int PRIMARY KEY, g int GENERATED ALWAYS AS (id + 1) VIRTUAL);
                        ALTER TABLE unstored REPLICA IDENTITY FULL";
        server.sql("postgres", unstored);
        tables.push("unstored");
    }
    set_up(&server, &tables.join(", "));
    let session = server.session("postgres");
    for (table, finding) in tables.iter().zip(check_tables(&server, &tables)) {
        session.sql(&format!("INSERT INTO {table} VALUES (1)"));
        let updated = session.try_sql(&format!("UPDATE {table} SET id = 2")).is_ok();
        assert_eq!(updated, finding.verdict == Verdict::Good, "{finding:?}");
        if !updated {
            assert!(finding.remedy.contains("REPLICA IDENTITY"), "{finding:?}");
        }
    }
    server.sql("postgres", "ALTER TABLE keyed REPLICA IDENTITY DEFAULT; UPDATE keyed SET id = 3");
    assert_eq!(check_tables(&server, &["keyed"])[0].verdict, Verdict::Good);
}

#[test]
fn a_publication_of_generated_columns_is_refused() {
    let server = Postgres::start();
    if version(&server) < 180_000 {
        return;
    }
    server.sql(
        "postgres",
        "CREATE TABLE a (id int PRIMARY KEY, g int GENERATED ALWAYS AS (1) STORED);
         CREATE PUBLICATION millrace_t FOR TABLE a WITH (publish_generated_columns = stored)",
    );
    let findings = || {
        runtime().block_on(async {
            let client = connect(&config(&server.url("postgres"))).await.unwrap();
            check::publication(&client, &plan(&["a"])).await.unwrap().expect("it exists").findings
        })
    };
    let found = findings();
    assert!(found[0].what.contains("publishes generated columns"), "{found:?}");
    server.sql("postgres", &found[0].remedy);
    assert_eq!(findings(), []);
}

#[test]
fn operators_of_a_key_that_the_role_may_not_use_are_refused_and_the_remedy_works() {
    let server = Postgres::start();
    server.sql(
        "postgres",
        "CREATE ROLE reader LOGIN; CREATE SCHEMA ext; CREATE EXTENSION citext SCHEMA ext;
         CREATE TABLE a (id ext.citext PRIMARY KEY, other text); GRANT SELECT ON a TO reader",
    );
    let found = check_as("reader", &server, &["a"]);
    assert!(found[0].what.contains("operators of schema ext"), "{found:?}");
    server.sql("postgres", &found[0].remedy);
    assert_eq!(check_as("reader", &server, &["a"])[0].verdict, Verdict::Good);
}

#[test]
fn of_a_partitioned_table_the_partitions_are_looked_at() {
    let server = Postgres::start();
    server.sql(
        "postgres",
        "CREATE TABLE root (id int PRIMARY KEY) PARTITION BY RANGE (id);
         CREATE TABLE low PARTITION OF root FOR VALUES FROM (0) TO (10);
         CREATE TABLE high PARTITION OF root FOR VALUES FROM (10) TO (20) PARTITION BY RANGE (id);
         CREATE TABLE higher PARTITION OF high FOR VALUES FROM (15) TO (20);
         CREATE TABLE none (id int PRIMARY KEY) PARTITION BY RANGE (id);
         CREATE TABLE other (id int NOT NULL, n int NOT NULL UNIQUE) PARTITION BY LIST (n);
         CREATE TABLE other_1 PARTITION OF other (PRIMARY KEY (n)) FOR VALUES IN (1)",
    );
    let found = check_tables(&server, &["root", "none"]);
    if version(&server) < 150_000 {
        assert!(found[0].remedy.ends_with(r#""public.higher", "public.low""#), "{found:?}");
        return;
    }
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(found[0].what.ends_with("can be streamed, with 2 partitions"), "{found:?}");
    assert!(found[1].what.ends_with("with 0 partitions"), "{found:?}");
    let found = check_tables(&server, &["root", "low"]);
    assert!(
        found[0].what.contains("low is a partition of public.root, which is configured too"),
        "{found:?}"
    );
    let found = check_tables(&server, &["other"]);
    assert!(found[0].what.contains("has the key (n), and the table itself ()"), "{found:?}");
    server.sql("postgres", "ALTER TABLE low SET UNLOGGED");
    assert!(check_tables(&server, &["root"])[0].what.contains("low is unlogged"));
}
