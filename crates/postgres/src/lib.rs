//! Adapter to Postgres: replication connection, slot, publication, catalog.
//!
//! | module | knows |
//! | --- | --- |
//! | [`config`] | connection strings, environment and files as libpq users expect them |
//! | [`tls`] | what `sslmode` means |
//! | `session` | logging in and running commands in Postgres' own protocol |
//! | [`connection`] | the commands of replication |
//! | `stream` | the streaming socket: reading ahead within bounds, answering always |
//! | [`catalog`] | SQL connections, and tables as rows of the stream need them |
//! | [`check`] | what must hold before a pipeline can be set up
//! | [`setup`] | making it: publication, heartbeat table, slot
//! | `rounds`, `copy_out`, `copy` | chunks of tables under a shared snapshot
//! | [`source`] | all of it as the relay's `Source` |
//!
//! *Invariant:* nothing here decides what is in the log; the relay does. Nothing acknowledges but what it was told.

mod authentication;
pub mod catalog;
pub mod check;
pub mod config;
pub mod connection;
mod conninfo;
mod copy;
mod copy_out;
mod error;
mod keys;
mod passfile;
pub mod plan;
mod preconditions;
pub mod publication;
mod rounds;
mod session;
pub mod setup;
pub mod source;
mod stream;
pub mod tls;
mod types;
mod watch;
mod widest;

pub use config::Config;
pub use connection::ReplicationConnection;
pub use error::{ConnectionError, ServerError};
pub use source::{PostgresSource, SourceOptions};
pub use widest::widest_rows;

/// Writes a few bytes of WAL, so that a source on which nothing happens has something to send: its insert LSN may stand
/// after the last byte that was sent (behind the header of the next page, say). The reader passes over messages of this
/// prefix. Flushed at the source, and not waiting for a synchronous standby, which may be missing. One statement, so
/// that no failure leaves a transaction open.
pub const NUDGE: &str = "SELECT pg_catalog.set_config('synchronous_commit', 'local', true), \
                         pg_catalog.pg_logical_emit_message(true, 'millrace', '')";
