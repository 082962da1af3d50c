use std::time::Duration;

use change::{Datum, Lsn, Tuple};
use postgres::plan::{Plan, Table};
use postgres::{Config, PostgresSource, SourceOptions};
use relay::{RelayError, RowChange, Source, SourceError, WalEvent};
use testkit::services::{Postgres, wait_until};
use tokio::runtime::Runtime;

pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

pub(crate) fn config(url: &str) -> Config {
    Config::parse(url, &|_| None).unwrap()
}

/// What `setup` makes: heartbeat table, publication of these tables, slot.
pub(crate) fn set_up(server: &Postgres, tables: &str) {
    server.sql(
        "postgres",
        &format!(
            "CREATE SCHEMA millrace;
             CREATE TABLE millrace.heartbeat (pipeline text PRIMARY KEY, beat bigint, nonce text, at timestamptz);
             CREATE PUBLICATION millrace_t FOR TABLE {tables}"
        ),
    );
    create_slot(server, "millrace_t_1");
}

pub(crate) fn create_slot(server: &Postgres, name: &str) {
    server.sql("postgres", &format!("SELECT pg_create_logical_replication_slot('{name}', 'pgoutput')"));
}

pub(crate) fn options(tables: &[&str]) -> SourceOptions {
    SourceOptions {
        heartbeat: "t".into(),
        slot: "millrace_t_1".into(),
        publication: "millrace_t".into(),
        tables: tables.iter().map(|table| named(table)).collect(),
        queried: Vec::new(),
        snapshot_connections: 2,
    }
}

/// `public.a`
fn named(table: &str) -> Table {
    let (schema, name) = table.split_once('.').unwrap();
    Table { schema: schema.into(), name: name.into() }
}

/// What a pipeline of these tables is to have.
pub(crate) fn plan(tables: &[&str]) -> Plan {
    let table = |name: &&str| Table { schema: "public".into(), name: name.to_string() };
    Plan {
        heartbeat: "t".into(),
        pipeline: "t".into(),
        slot: "millrace_t_1".into(),
        publication: "millrace_t".into(),
        tables: tables.iter().map(table).collect(),
        queried: tables.iter().map(table).collect(),
        role: "postgres".into(),
        keyless_bytes: 1 << 20,
    }
}

/// A reader of its own, and what it has read.
pub(crate) struct Reader {
    pub(crate) source: PostgresSource,
    /// Relations by oid, as announced.
    pub(crate) names: Vec<(u32, String)>,
    pub(crate) runtime: Runtime,
}

/// An event as a test compares it.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Seen {
    pub(crate) text: String,
    /// Of a commit: its end.
    pub(crate) end_lsn: Option<Lsn>,
}

impl Reader {
    pub(crate) fn connect(server: &Postgres, options: SourceOptions) -> Result<Self, SourceError> {
        let runtime = runtime();
        let source = PostgresSource::connect(runtime.handle(), &config(&server.url("postgres")), options)?;
        Ok(Reader { source, names: Vec::new(), runtime })
    }

    pub(crate) fn start(server: &Postgres, tables: &[&str], from: Lsn) -> Self {
        let mut reader = Self::connect(server, options(tables)).unwrap();
        // The session of the reader before may still be ending.
        wait_until("the slot is free", PATIENCE, || (!reader.source.busy().unwrap()).then_some(()));
        reader.source.start(from).unwrap();
        reader
    }

    /// Events up to the transaction with the message `end`, which is not among them. Keepalives are left out.
    pub(crate) fn until_end(&mut self) -> Vec<Seen> {
        let mut seen: Vec<Seen> = Vec::new();
        let start = std::time::Instant::now();
        let Reader { source, names, .. } = self;
        while !seen.iter().rev().take(3).any(|event| event.text == "message end") {
            assert!(start.elapsed() < PATIENCE, "no end after {seen:?}");
            source
                .poll(Duration::from_millis(100), &mut |event| {
                    seen.extend(describe(names, &event));
                    Ok::<_, RelayError>(())
                })
                .unwrap();
        }
        let end = seen.iter().rposition(|event| event.text == "message end").unwrap();
        seen.truncate(end - 1);
        without_empty(seen)
    }
}

/// Versions before 15 send transactions that changed nothing of the publication.
fn without_empty(seen: Vec<Seen>) -> Vec<Seen> {
    let mut kept: Vec<Seen> = Vec::new();
    for event in seen {
        if event.text == "commit" && kept.last().is_some_and(|last| last.text == "begin") {
            kept.pop();
        } else {
            kept.push(event);
        }
    }
    kept
}

/// Emits the transaction that ends `until_end`.
pub(crate) fn end(server: &Postgres) {
    server.sql("postgres", "SELECT pg_logical_emit_message(true, 'end', '')");
}

fn describe(names: &mut Vec<(u32, String)>, event: &WalEvent<'_>) -> Option<Seen> {
    let name = |names: &[(u32, String)], oid: u32| {
        names.iter().rev().find(|(known, _)| *known == oid).expect("announced before").1.clone()
    };
    let mut end_lsn = None;
    let text = match event {
        WalEvent::Begin { commit_lsn, .. } => {
            assert!(commit_lsn.0 > 0);
            "begin".to_owned()
        }
        WalEvent::Relation(announced) => {
            names.push((announced.relation, announced.table.clone()));
            return None;
        }
        WalEvent::Row { relation, change, .. } => {
            let name = name(names, *relation);
            match change {
                RowChange::Insert { new } => format!("insert {name} {}", row(*new)),
                RowChange::Update { old: None, new } => format!("update {name} {}", row(*new)),
                RowChange::Update { old: Some(old), new } => {
                    format!("update {name} {} -> {}", row(*old), row(*new))
                }
                RowChange::Delete { old } => format!("delete {name} {}", row(*old)),
            }
        }
        WalEvent::Truncate { relations, .. } => {
            let list: Vec<String> = relations.iter().map(|oid| name(names, *oid)).collect();
            format!("truncate {}", list.join(" "))
        }
        WalEvent::Message { prefix, transactional, .. } => {
            format!("message{} {prefix}", if *transactional { "" } else { " outside" })
        }
        WalEvent::Commit { end_lsn: end, commit_lsn } => {
            assert!(end > commit_lsn);
            end_lsn = Some(*end);
            "commit".to_owned()
        }
        WalEvent::Keepalive { .. } => return None,
    };
    Some(Seen { text, end_lsn })
}

pub(crate) fn row(tuple: Tuple<'_>) -> String {
    let value = |datum| match datum {
        Datum::Null => "NULL".to_owned(),
        Datum::Unchanged => "(unchanged)".to_owned(),
        Datum::Text(text) => text.to_owned(),
    };
    tuple.iter().map(value).collect::<Vec<_>>().join(",")
}

pub(crate) fn texts(seen: &[Seen]) -> String {
    seen.iter().map(|event| event.text.as_str()).collect::<Vec<_>>().join("\n")
}

pub(crate) fn lsn(server: &Postgres, query: &str) -> Lsn {
    server.value("postgres", query).parse().unwrap()
}
