//! How tables enter the publication, and leave it.

use postgres::catalog::connect;
use postgres::plan::{Plan, Table};
use postgres::setup::{members, publish, withdraw};
use testkit::services::{Postgres, wait_until};

use crate::support::*;

const PUBLISHED: &str =
    "SELECT string_agg(r.prrelid::regclass::text, ' ' ORDER BY r.oid) FROM pg_publication_rel r";

fn table(name: &str) -> Table {
    Table { schema: "public".into(), name: name.into() }
}

/// A table that is locked for long holds up no writer of another one, and none of those that entered before it.
#[test]
fn h22_each_table_enters_in_a_transaction_of_its_own() {
    let server = Postgres::start();
    server.sql("postgres", "CREATE TABLE a (id int PRIMARY KEY); CREATE TABLE b (id int PRIMARY KEY)");
    let writer = server.session("postgres");
    writer.sql("BEGIN; INSERT INTO b VALUES (1)");
    let url = config(&server.url("postgres"));
    let publishing = std::thread::spawn(move || {
        runtime().block_on(async {
            let mut admin = connect(&url).await.unwrap();
            publish(&mut admin, &plan(&[]), &[table("a"), table("b")], false).await
        })
    });
    let a_alone = || (server.value("postgres", PUBLISHED) == "a").then_some(());
    wait_until("the first table is published", PATIENCE, a_alone);
    server.sql("postgres", "SET lock_timeout = '10ms'; INSERT INTO a VALUES (1)");
    writer.sql("COMMIT");
    publishing.join().unwrap().unwrap();
    assert_eq!(server.value("postgres", PUBLISHED), "a b");
}

#[test]
fn a_parent_leaves_without_its_children() {
    let server = Postgres::start();
    server
        .sql("postgres", "CREATE TABLE parent (id int PRIMARY KEY); CREATE TABLE child () INHERITS (parent)");
    let (plan, tables): (Plan, _) = (plan(&[]), [table("parent"), table("child")]);
    let listed = runtime().block_on(async {
        let mut admin = connect(&config(&server.url("postgres"))).await.unwrap();
        publish(&mut admin, &plan, &tables, false).await.unwrap();
        withdraw(&mut admin, &plan, &["public.parent".into()]).await.unwrap();
        members(&admin, &plan).await.unwrap()
    });
    assert_eq!(listed, [table("child")]);
}
