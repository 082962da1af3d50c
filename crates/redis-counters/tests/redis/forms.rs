//! Groups are written as Postgres prints their values, and never in two forms in one store.

use std::sync::Arc;

use change::{Collation, Column, Op, ReplicaIdentity, TableSchema};
use redis_counters::sql::Definition;
use redis_counters::{Bounds, CountersSink, Namespace, Server};
use testkit::services::Redis;
use worker::{Checkpoint, Sink, Stored};

use crate::rig::{Rig, hash, map, refusal};

const COUNTERS: [(&str, &str); 3] = [
    ("amounts", "SELECT amount, count(*) FROM public.sales GROUP BY amount"),
    ("codes", "SELECT shop, code, sum(shop) FROM public.sales WHERE code <> 'x' GROUP BY shop, code"),
    ("shops", "SELECT shop, count(*) FROM public.sales GROUP BY shop"),
];

/// The table with these types of `amount` and `code`.
fn sales(amount: &str, code: &str) -> Arc<TableSchema> {
    let bytes = Collation { name: "C".into(), deterministic: true, bytewise: true };
    let column = |name: &str, type_oid, type_name: &str, collation| Column {
        name: name.into(),
        type_oid,
        type_name: type_name.into(),
        key: None,
        collation,
        number: None,
        recorded: None,
    };
    Arc::new(TableSchema {
        relation: 16_500,
        root: None,
        schema: "public".into(),
        table: "sales".into(),
        identity: ReplicaIdentity::Full,
        columns: vec![
            column("shop", 23, "integer", None),
            column("amount", 1700, amount, None),
            column("code", 1042, code, Some(bytes)),
        ],
    })
}

/// A sink, or the builder's, that was told of these versions.
fn rig(redis: &Redis, copies: bool, versions: &[&Arc<TableSchema>]) -> Rig {
    let server = Server::new(redis.url());
    let definitions = COUNTERS.iter().map(|(name, sql)| Definition::parse(name, sql).unwrap()).collect();
    let new = if copies { CountersSink::of_copies } else { CountersSink::new };
    let mut sink = new(&server, Namespace::new("", "p"), Bounds::default(), definitions).unwrap();
    for version in versions {
        sink.describe(version);
    }
    Rig::over(sink)
}

fn insert(rig: &mut Rig, table: &Arc<TableSchema>, amount: &str, code: &str) {
    let row = format!(r#"{{"shop":7,"amount":"{amount}","code":"{code}"}}"#);
    rig.raw(table, Op::Create, None, Some(&row)).unwrap();
}

fn delete(rig: &mut Rig, table: &Arc<TableSchema>, amount: &str, code: &str) {
    let row = format!(r#"{{"shop":7,"amount":"{amount}","code":"{code}"}}"#);
    rig.raw(table, Op::Delete, Some(&row), None).unwrap();
}

/// The counters whose checkpoints are not of the form that the sink would have.
fn outdated(rig: &mut Rig) -> Vec<String> {
    let found = rig.load().unwrap();
    rig.offset = rig.at.iter().map(|at| at.next_offset).max().unwrap();
    let differs = |stored: &Stored, definition: &str| match stored {
        Stored::At(at) => at.definition != definition && at.is_of(definition),
        other => panic!("{other:?}"),
    };
    let stores = rig.sink.stores().iter().zip(&found);
    stores.filter(|(spec, at)| differs(at, &spec.definition)).map(|(spec, _)| spec.name.clone()).collect()
}

/// Has copies of everything built by replaying `rows`, and swaps them in.
fn build(redis: &Redis, worker: &mut Rig, table: &Arc<TableSchema>, rows: &[(&str, &str)]) {
    (0..COUNTERS.len()).for_each(|place| assert!(worker.sink.rebuild(place, true).unwrap()));
    let mut builder = rig(redis, true, &[table]);
    builder.load().unwrap();
    rows.iter().for_each(|(amount, code)| insert(&mut builder, table, amount, code));
    builder.offset = worker.offset;
    builder.commit().unwrap();
    worker.sink.copies().unwrap();
    (0..COUNTERS.len()).for_each(|place| assert!(worker.sink.swap(place).unwrap()));
}

#[test]
fn h60_groups_have_their_scale_and_their_blanks() {
    let redis = Redis::start();
    let table = sales("numeric(10,2)", "character(4)");
    let mut rig = rig(&redis, false, &[&table]);
    rig.load().unwrap();
    for (amount, code) in [("1.50", "ab  "), ("100.00", "abcd"), ("1.50", "日本  "), ("0.10", "x   ")] {
        insert(&mut rig, &table, amount, code);
    }
    rig.commit().unwrap();
    assert_eq!(hash(&redis, "amounts"), map(&[("0.10", "1"), ("1.50", "2"), ("100.00", "1")]));
    let codes = [("7:ab  ", "7"), ("7:abcd", "7"), ("7:日本  ", "7")];
    assert_eq!(hash(&redis, "codes"), map(&codes), "x is compared without its blanks");
    delete(&mut rig, &table, "100.00", "abcd");
    rig.commit().unwrap();
    assert_eq!(hash(&redis, "amounts"), map(&[("0.10", "1"), ("1.50", "2")]));
    assert_eq!(outdated(&mut rig), [""; 0]);
}

#[test]
fn a_store_of_an_older_version_goes_on_as_it_is_until_its_copy_is_there() {
    let redis = Redis::start();
    let table = sales("numeric(10,2)", "character(4)");
    // Older versions had no forms: their sink was told of no table.
    let mut old = rig(&redis, false, &[]);
    old.load().unwrap();
    insert(&mut old, &table, "1.50", "ab  ");
    old.commit().unwrap();
    assert_eq!(hash(&redis, "amounts"), map(&[("1.5", "1")]));

    let mut worker = rig(&redis, false, &[&table]);
    assert_eq!(outdated(&mut worker), ["counters.amounts", "counters.codes"], "shops has no form");
    insert(&mut worker, &table, "1.50", "ab  ");
    worker.commit().unwrap();
    assert_eq!(hash(&redis, "amounts"), map(&[("1.5", "2")]), "not in two forms");
    assert_eq!(hash(&redis, "codes"), map(&[("7:ab", "14")]));

    build(&redis, &mut worker, &table, &[("1.50", "ab  "), ("1.50", "ab  ")]);
    assert_eq!(outdated(&mut worker), [""; 0]);
    insert(&mut worker, &table, "1.50", "ab  ");
    worker.commit().unwrap();
    assert_eq!(hash(&redis, "amounts"), map(&[("1.50", "3")]));
    assert_eq!(hash(&redis, "codes"), map(&[("7:ab  ", "21")]));
}

#[test]
fn an_altered_column_does_not_bring_a_second_form_into_a_store() {
    let redis = Redis::start();
    let priced = sales("numeric(10,2)", "character(4)");
    let mut worker = rig(&redis, false, &[&priced]);
    worker.load().unwrap();
    insert(&mut worker, &priced, "1.50", "ab  ");
    worker.commit().unwrap();

    // Rewrites nothing: rows that are there go on to print 1.50.
    let free = sales("numeric", "character(4)");
    assert!(worker.sink.describe(&free), "the worker is to look again");
    assert!(!worker.sink.describe(&free));
    assert_eq!(outdated(&mut worker), ["counters.amounts"]);
    insert(&mut worker, &free, "1.5", "ab  ");
    insert(&mut worker, &free, "1.555", "ab  ");
    worker.commit().unwrap();
    assert_eq!(hash(&redis, "amounts"), map(&[("1.50", "2"), ("1.555", "1")]));

    let rows = [("1.50", "ab  "), ("1.5", "ab  "), ("1.555", "ab  ")];
    build(&redis, &mut worker, &free, &rows);
    assert_eq!(outdated(&mut worker), [""; 0]);
    assert_eq!(hash(&redis, "amounts"), map(&[("1.5", "2"), ("1.555", "1")]));
    // Only the precision changed: the form is the same.
    assert!(!worker.sink.describe(&sales("numeric", "character(4)")));
    assert!(worker.sink.describe(&sales("numeric(10,3)", "character(4)")));
    assert!(!worker.sink.describe(&sales("numeric(12,3)", "character(4)")));
}

#[test]
fn a_form_of_a_newer_version_is_refused() {
    let redis = Redis::start();
    let mut worker = rig(&redis, false, &[&sales("numeric(10,2)", "character(4)")]);
    worker.load().unwrap();
    let definition = worker.sink.stores()[0].definition.clone();
    let newer = Checkpoint { definition: format!("{definition},z9"), ..worker.beginning(0) };
    worker.sink.reset(0, &newer).unwrap();
    assert!(refusal(&worker.sink.load().unwrap()).remedy.contains("upgrade"));
}
