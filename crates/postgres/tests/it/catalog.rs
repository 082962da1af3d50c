//! What the catalog says of tables.

use change::{ReplicaIdentity, TableSchema};
use postgres::catalog::{connect, table_schema};
use testkit::services::Postgres;

use crate::support::*;

fn describe(schema: &TableSchema) -> String {
    let column = |c: &change::Column| {
        let collation = c.collation.as_ref().map_or(String::new(), |c| {
            let mark = |is: bool, text: &'static str| if is { text } else { "" };
            format!(" [{}{}{}]", c.name, mark(c.bytewise, " bytes"), mark(!c.deterministic, " loose"))
        });
        format!(
            "{}{} {}:{}{collation}",
            c.key.map_or(String::new(), |place| format!("{place}*")),
            c.name,
            c.type_oid,
            c.type_name
        )
    };
    let columns: Vec<String> = schema.columns.iter().map(column).collect();
    format!("{:?}: {}", schema.identity, columns.join(", "))
}

#[test]
fn schemas_have_base_types_collations_and_keys() {
    let server = Postgres::start();
    server.sql(
        "postgres",
        r#"CREATE DOMAIN price AS numeric(8,2); CREATE DOMAIN small_price AS price CHECK (value < 10);
           CREATE COLLATION loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
           CREATE TABLE d (b text COLLATE "C", a int, v varchar(40) COLLATE "en-x-icu", l text COLLATE loose,
                           p small_price, n numeric, t text, gone int, g int GENERATED ALWAYS AS (a + 1) STORED,
                           PRIMARY KEY (a, b));
           ALTER TABLE d DROP gone;
           CREATE TABLE f (LIKE d INCLUDING ALL); ALTER TABLE f REPLICA IDENTITY FULL;
           CREATE TABLE i (LIKE d INCLUDING ALL); ALTER TABLE i ALTER v SET NOT NULL;
           CREATE UNIQUE INDEX other ON i (v); ALTER TABLE i REPLICA IDENTITY USING INDEX other;
           CREATE TABLE n (LIKE d INCLUDING ALL); ALTER TABLE n REPLICA IDENTITY NOTHING;
           CREATE TABLE more (a int, b int, c int, PRIMARY KEY (c, b) INCLUDE (a));
           ALTER TABLE more REPLICA IDENTITY FULL;
           CREATE TABLE later (a int PRIMARY KEY DEFERRABLE); ALTER TABLE later REPLICA IDENTITY FULL;
           CREATE SCHEMA "Odd Name"; CREATE TABLE "Odd Name"."Ta""ble" ("Co lumn" timestamptz(3), e jsonb)"#,
    );
    let schema = |schema: &str, table: &str| {
        runtime().block_on(async {
            let client = connect(&config(&server.url("postgres"))).await.unwrap();
            table_schema(&client, schema, table).await.unwrap()
        })
    };
    let text = |table: &str| describe(&schema("public", table).unwrap());
    let rest = "l 25:text [loose loose], p 1700:numeric(8,2), n 1700:numeric, t 25:text [C.UTF-8 bytes]";
    let v = "v 1043:character varying(40) [en-x-icu]";
    let b = "b 25:text [C bytes]";
    assert_eq!(text("d"), format!("Default: 2*{b}, 1*a 23:integer, {v}, {rest}"));
    assert_eq!(text("f"), format!("Full: 2*{b}, 1*a 23:integer, {v}, {rest}"));
    assert_eq!(text("i"), format!("Index: {b}, a 23:integer, 1*{v}, {rest}"));
    assert_eq!(text("n"), format!("Nothing: {b}, a 23:integer, {v}, {rest}"));
    assert_eq!(text("more"), "Full: a 23:integer, 2*b 23:integer, 1*c 23:integer", "included is not key");
    assert_eq!(text("later"), "Full: a 23:integer", "two rows may share a deferrable key for a while");
    let odd = schema("Odd Name", "Ta\"ble").unwrap();
    assert_eq!(describe(&odd), "Default: Co lumn 1184:timestamp(3) with time zone, e 3802:jsonb");
    assert_eq!(odd.identity, ReplicaIdentity::Default);
    assert_eq!(schema("public", "none"), None);
    assert_eq!(schema("pg_catalog", "pg_tables"), None, "a view");
}

/// The server has other bytes than the UTF-8 that it sends us, and so another order.
#[test]
fn h26_text_is_compared_bytewise_only_where_the_database_is_utf8() {
    let server = Postgres::start();
    for (name, encoding, expected) in [("latin", "LATIN1", "[C]"), ("utf", "UTF8", "[C bytes]")] {
        let database = format!(
            "CREATE DATABASE {name} ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
        );
        server.sql("postgres", &database);
        server.sql(name, "CREATE TABLE t (a text PRIMARY KEY, b text COLLATE \"C\")");
        let schema = runtime().block_on(async {
            let client = connect(&config(&server.url(name))).await.unwrap();
            table_schema(&client, "public", "t").await.unwrap().unwrap()
        });
        assert_eq!(describe(&schema), format!("Default: 1*a 25:text {expected}, b 25:text {expected}"));
    }
}

#[test]
fn the_stream_and_the_catalog_agree_on_a_table() {
    let server = Postgres::start();
    server.sql(
        "postgres",
        "CREATE DOMAIN word AS varchar(12);
         CREATE TABLE a (id bigint PRIMARY KEY, w word, n numeric(5,1), t text, g int GENERATED ALWAYS AS (1) STORED);
         CREATE TABLE f (LIKE a INCLUDING ALL); ALTER TABLE f REPLICA IDENTITY FULL;
         CREATE TABLE nokey (x int); ALTER TABLE nokey REPLICA IDENTITY FULL",
    );
    set_up(&server, "a, f, nokey");
    server.sql(
        "postgres",
        "INSERT INTO a (id) VALUES (1); INSERT INTO f (id) VALUES (1); INSERT INTO nokey VALUES (1)",
    );
    let mut reader = Reader::start(&server, &["public.a"], change::Lsn::ZERO);
    let mut found = Vec::new();
    while found.len() < 3 {
        let arrived = relay::Source::poll(&mut reader.source, PATIENCE, &mut |event| {
            if let relay::WalEvent::Relation(announced) = event {
                found.push(announced);
            }
            Ok(())
        });
        assert!(arrived.unwrap());
    }
    let client = reader.runtime.block_on(connect(&config(&server.url("postgres")))).unwrap();
    for announced in found {
        let described = relay::Source::describe(&mut reader.source, &announced, 3).unwrap().unwrap();
        assert!(!described.outdated && described.published.is_some());
        let schema = described.schema;
        let asked = reader.runtime.block_on(table_schema(&client, &schema.schema, &schema.table)).unwrap();
        assert_eq!(asked, Some(schema));
    }
}
