//! The application: a mailbox with live traffic, and what SQL says of it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;
use testkit::services::{Postgres, Rows, Session};

use crate::harness::text;

pub(crate) const SCHEMA: &str = "
    CREATE TABLE emails (
        id bigint PRIMARY KEY, user_id bigint, folder text, sender text, subject text, body text,
        is_read boolean, size integer, sent_at timestamptz);
    ALTER TABLE emails REPLICA IDENTITY FULL;
    CREATE TABLE users (id bigint PRIMARY KEY, name text, email text);
    CREATE TABLE points (owner text, part integer, amount integer, PRIMARY KEY (owner, part));
    ALTER TABLE points REPLICA IDENTITY FULL;
    CREATE SEQUENCE email_ids;";

/// Counters and their SQL. `points` keeps an invariant: every transaction leaves its sum as it was.
pub(crate) const COUNTERS: [(&str, &str); 5] = [
    (
        "unread",
        "SELECT user_id, count(*) FROM public.emails WHERE NOT is_read AND folder = 'inbox' GROUP BY user_id",
    ),
    ("sizes", "SELECT folder, sum(size) FROM public.emails GROUP BY folder"),
    ("senders", "SELECT user_id, folder, count(sender) FROM public.emails GROUP BY user_id, folder"),
    ("mails", "SELECT count(*) FROM public.emails"),
    ("points", "SELECT owner, sum(amount) FROM public.points GROUP BY owner"),
];

/// What the sum of `points` always is.
pub(crate) const POINTS: i64 = 1000;

pub(crate) fn counters_toml() -> String {
    COUNTERS.iter().map(|(name, sql)| format!("[counters.{name}]\nsql = \"{sql}\"\n")).collect()
}

/// A counter's content by SQL: group columns joined as the documentation says.
pub(crate) fn answer(postgres: &Postgres, sql: &str) -> BTreeMap<String, String> {
    groups(postgres.sql("app", sql))
}

/// The answer of a counter's query as the counter has it.
pub(crate) fn groups(rows: Rows) -> BTreeMap<String, String> {
    rows.into_iter()
        .map(|mut row| {
            let value = row.pop().expect("an aggregate").unwrap_or_default();
            let escape = |part: Option<String>| match part {
                Some(part) => part.replace('\\', "\\\\").replace(':', "\\:"),
                None => "\\N".to_owned(),
            };
            (row.into_iter().map(escape).collect::<Vec<_>>().join(":"), value)
        })
        .collect()
}

/// The documents by SQL.
pub(crate) fn documents(postgres: &Postgres) -> BTreeMap<String, Vec<String>> {
    let sql = "SELECT id, user_id, folder, sender, subject, body, size, \
               to_char(sent_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"') FROM emails";
    let rows = postgres.sql("app", sql);
    rows.into_iter()
        .map(|row| {
            let values: Vec<String> = row.into_iter().map(|v| v.unwrap_or_else(|| "null".into())).collect();
            (values[0].clone(), values[1..].to_vec())
        })
        .collect()
}

/// The same of a document in the index.
pub(crate) fn fields_of(document: &Value) -> Vec<String> {
    let names = ["user_id", "folder", "sender", "subject", "body", "size", "sent_at"];
    names.iter().map(|name| text(&document[name])).collect()
}

/// What becomes of a transaction that the server refused; panics where that should not have been.
pub(crate) type Refused = fn(sql: &str, error: &tokio_postgres::Error);

/// Connections that write until dropped or stopped. They outlive crashes of the server.
pub(crate) struct Traffic {
    stop: Arc<AtomicBool>,
    pub(crate) committed: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Traffic {
    pub(crate) fn start(postgres: &Postgres, seed: u64, connections: u64) -> Self {
        Self::of(postgres, seed, connections, transaction, |_, _| ())
    }

    /// The same of transactions, not too many, that move points and add mails, and take nothing away.
    pub(crate) fn gentle(postgres: &Postgres, seed: u64, connections: u64) -> Self {
        let transaction = |rng: &mut StdRng| {
            let mail = "(nextval('email_ids') + 1000000, 2, 'inbox', 'me', 's', 'words', false, 1, NULL)";
            format!("BEGIN;{}INSERT INTO emails VALUES {mail};COMMIT;SELECT pg_sleep(0.005)", points(rng))
        };
        Self::of(postgres, seed, connections, transaction, |_, _| ())
    }

    /// Transactions of any kind, each a string of statements.
    pub(crate) fn of(
        postgres: &Postgres,
        seed: u64,
        connections: u64,
        transaction: fn(&mut StdRng) -> String,
        refused: Refused,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let committed = Arc::new(AtomicU64::new(0));
        let config = postgres.session_config("app");
        let threads = (0..connections)
            .map(|connection| {
                let (stop, committed, config) = (stop.clone(), committed.clone(), config.clone());
                let mut rng = StdRng::seed_from_u64(seed * 100 + connection);
                std::thread::spawn(move || {
                    let mut session = None;
                    while !stop.load(Ordering::Relaxed) {
                        let open = session.take().or_else(|| Session::connect(&config).ok());
                        let Some(open) = open else {
                            std::thread::sleep(std::time::Duration::from_millis(50));
                            continue;
                        };
                        let sql = transaction(&mut rng);
                        match open.try_sql(&sql) {
                            Ok(_) => drop(committed.fetch_add(1, Ordering::Relaxed)),
                            // A deadlock or a lost server; a rollback of ours is no error.
                            Err(error) if error.is_closed() || error.as_db_error().is_none() => continue,
                            Err(error) => {
                                refused(&sql, &error);
                                drop(open.try_sql("ROLLBACK"));
                            }
                        }
                        session = Some(open);
                    }
                })
            })
            .collect();
        Traffic { stop, committed, threads }
    }

    /// Stops writing and waits for the last transaction.
    pub(crate) fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().expect("the traffic does not panic");
        }
        self.committed.load(Ordering::Relaxed)
    }
}

/// A random transaction as one string of statements: several tables, savepoints, sometimes a rollback.
fn transaction(rng: &mut StdRng) -> String {
    let mut sql = String::from("BEGIN;");
    let statements = if rng.random_bool(0.02) { 200 } else { rng.random_range(1..6) };
    for n in 0..statements {
        if rng.random_bool(0.15) {
            sql += &format!("SAVEPOINT s{n};{}", statement(rng));
            sql +=
                &if rng.random_bool(0.5) { format!("ROLLBACK TO s{n};") } else { format!("RELEASE s{n};") };
        } else {
            sql += &statement(rng);
        }
    }
    sql += &points(rng);
    sql + if rng.random_bool(0.1) { "ROLLBACK" } else { "COMMIT" }
}

fn statement(rng: &mut StdRng) -> String {
    const FOLDERS: [&str; 5] = ["'inbox'", "'archive'", "'a:b\\c'", "NULL", "'spam'"];
    let folder = FOLDERS[rng.random_range(0..FOLDERS.len())];
    let user = rng.random_range(1..20);
    // Any one mail, without waiting for others' locks.
    let one = format!(
        "id = (SELECT id FROM emails WHERE id >= {} ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED)",
        rng.random_range(0..500)
    );
    match rng.random_range(0..20) {
        0..8 => {
            let body =
                if rng.random_bool(0.1) { "repeat(md5(random()::text), 200)" } else { "'short text \"q\"'" };
            format!(
                "INSERT INTO emails VALUES (nextval('email_ids') % 600, {user}, {folder}, {}, 'subject {user}', \
                 {body}, {}, {}, '2026-01-0{} 10:00:00Z') ON CONFLICT DO NOTHING;",
                if rng.random_bool(0.2) { "NULL" } else { "'me@x.org'" },
                ["true", "false", "NULL"][rng.random_range(0..3)],
                if rng.random_bool(0.1) { "NULL".into() } else { rng.random_range(-5..1000).to_string() },
                rng.random_range(1..9),
            )
        }
        8..11 => format!("UPDATE emails SET is_read = NOT is_read WHERE {one};"),
        11..13 => format!("UPDATE emails SET folder = {folder} WHERE {one};"),
        13..15 => format!("UPDATE emails SET user_id = {user} WHERE {one};"),
        15 => format!(
            "UPDATE emails SET id = id + 600 WHERE {one} AND NOT EXISTS (SELECT FROM emails e WHERE e.id = emails.id + 600);"
        ),
        16..18 => format!("DELETE FROM emails WHERE {one};"),
        18 => format!(
            "INSERT INTO users VALUES ({user}, 'n', 'e') ON CONFLICT (id) DO UPDATE SET name = users.name || 'x';"
        ),
        _ if rng.random_bool(0.02) => "TRUNCATE emails, users;".into(),
        _ => format!("UPDATE users SET email = 'e{user}' WHERE id = {user};"),
    }
}

/// Moves points between two owners, in one row each; or splits a row.
fn points(rng: &mut StdRng) -> String {
    let (part, other) = (rng.random_range(0..10), rng.random_range(10..20));
    let amount = rng.random_range(1..50);
    format!(
        "UPDATE points SET amount = amount - {amount} WHERE part = {part};\
         UPDATE points SET amount = amount + {amount} WHERE part = {other};"
    )
}

/// Gives every part of `points` its row: owners 0 to 4, parts 0 to 19, one transaction.
pub(crate) fn fill_points(postgres: &Postgres) {
    postgres.sql(
        "app",
        &format!(
            "INSERT INTO points SELECT 'owner ' || g % 5, g, {POINTS} / 20 FROM generate_series(0, 19) g"
        ),
    );
}
