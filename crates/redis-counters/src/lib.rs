//! Sink: counters defined in SQL, kept in Redis.
//!
//! ```text
//! Change ─▶ staged (sql: what a row adds) ─▶ deltas per group ─▶ commit: read, compute, one script ─▶ Redis
//! ```
//!
//! Redis holds exactly what each query returns, and beside it, written by the same script, the checkpoint that says
//! how far. What holds at the borders:
//!
//! - Only a compare-and-set on the checkpoint writes. It also compares the value's type and number of groups, so
//!   that a deleted, evicted or overwritten key is found by the next commit, load or check, and nothing is written.
//! - Every type and permission is checked before a script's first write, so no write fails half-way.
//! - A key that is not ours (by the hash of owners) is never written or deleted.
//!
//! *Invariant:* whether a change is already counted is not decided here; the worker says where a store stands.
//!
//! The Redis user needs [`ACL_COMMANDS`].

mod bounds;
mod commit;
mod connection;
mod deltas;
mod keys;
mod large;
mod observation;
mod pace;
mod patch;
mod read;
mod shape;
mod sink;
pub mod sql;
mod staged;
mod store;

pub use bounds::Bounds;
pub use connection::{ACL_COMMANDS, LONGEST_SCRIPT, Server};
pub use keys::Namespace;
pub use read::{Counters, Part};
pub use sink::CountersSink;
