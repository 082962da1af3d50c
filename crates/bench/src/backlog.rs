//! What there is to drain.

use clap::ValueEnum;
use testkit::services::Postgres;

use crate::sides::Side;

/// The database that holds it.
pub(crate) const DATABASE: &str = "app";

/// Rows of an inserting and of an updating transaction, where they are batches.
const BATCHES: (u64, u64) = (1_000, 100);

/// How the rows are divided into transactions.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Shape {
    /// Inserts in transactions of 1,000 rows, updates in transactions of 100
    Batches,
    /// A transaction for each row
    Singles,
    /// All inserts in one transaction, all updates in another
    One,
    /// Rows that were there before: a snapshot
    Snapshot,
    /// The log of `batches`: what the stores' workers drain
    Stores,
    /// No backlog: a row in a transaction at a steady rate, and how long until it is visible
    Steady,
    /// No change at all: what the processes take at rest
    Idle,
}

impl Shape {
    /// The sides that fit, in the order in which they run.
    pub(crate) fn sides(self) -> &'static [Side] {
        match self {
            Shape::Steady | Shape::Idle => &[Side::Reader, Side::Counters, Side::Search],
            Shape::Stores => &[
                Side::Consumer,
                Side::Redis,
                Side::Counters,
                Side::OtherCounters,
                Side::Tantivy,
                Side::Search,
                Side::OtherSearch,
            ],
            Shape::Batches | Shape::Singles | Shape::One | Shape::Snapshot => {
                &[Side::Limit, Side::Again, Side::Reader, Side::Other, Side::Producer, Side::Debezium]
            }
        }
    }
}

/// The table; its rows are about 400 bytes.
pub(crate) fn make_table(postgres: &Postgres) {
    postgres.sql("postgres", &format!("CREATE DATABASE {DATABASE}"));
    postgres.sql(
        DATABASE,
        "CREATE TABLE emails (id bigint PRIMARY KEY, user_id bigint, folder text, sender text, subject text, body text,
                              is_read boolean, sent_at timestamptz)",
    );
}

/// Counters by a column that is not the key need old values.
pub(crate) fn keep_old_rows(postgres: &Postgres) {
    postgres.sql(DATABASE, "ALTER TABLE emails REPLICA IDENTITY FULL");
}

/// Fills the table; gives the number of row changes.
pub(crate) fn fill(postgres: &Postgres, shape: Shape, rows: u64) -> u64 {
    let insert = "INSERT INTO emails SELECT g, g % 10000, CASE g % 3 WHEN 0 THEN 'inbox' WHEN 1 THEN 'archive' ELSE 'spam' END,
        'sender' || (g % 1000) || '@example.org', 'subject of the mail number ' || g, repeat(md5(g::text) || ' ', 9),
        g % 2 = 0, '2026-01-01Z'::timestamptz + g * interval '1 second'
        FROM generate_series(at + 1, least(at + step, last)) g;";
    let update = "UPDATE emails SET is_read = NOT is_read WHERE id > at AND id <= least(at + step, last);";
    let (inserted, updated) = match shape {
        Shape::Batches | Shape::Stores => BATCHES,
        Shape::Singles | Shape::Steady => (1, 1),
        Shape::One | Shape::Snapshot | Shape::Idle => (rows, rows),
    };
    let mut changes = 0;
    for (statement, step) in [(insert, inserted), (update, updated)] {
        if shape == Shape::Snapshot && changes > 0 {
            break;
        }
        postgres.sql(
            DATABASE,
            &format!(
                "DO $$ DECLARE at bigint := 0; step bigint := {step}; last bigint := {rows};
                 BEGIN WHILE at < last LOOP {statement} COMMIT; at := at + step; END LOOP; END $$"
            ),
        );
        changes += rows;
    }
    postgres.sql(DATABASE, "VACUUM ANALYZE emails");
    postgres.sql(DATABASE, "CHECKPOINT");
    changes
}
