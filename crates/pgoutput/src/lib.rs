//! Sans-IO decoder of Postgres' pgoutput protocol, version 1.
//!
//! One payload of the replication stream's XLogData goes in, one [`Message`] comes out, which borrows from it.
//! Nothing is allocated and every byte is accounted for: what is left over after a message is an error, as is a
//! tag that version 1 does not have, because a misread message would be a lost change.
//!
//! *Invariant:* [`decode`] is a function of its bytes: no state, no I/O, no panic whatever the bytes are.
//!
//! Source: <https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html>, and
//! `src/backend/replication/logical/proto.c` of the server.

mod error;
mod message;
mod reader;

pub use error::DecodeError;
pub use message::{Column, Columns, Message, OldTuple, Relation, RelationOids, decode};
