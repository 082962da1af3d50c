//! Adapter to Kafka, and the only home of its client library and its protocol.
//!
//! ```text
//! relay ──▶ KafkaPublisher ══ log + ledger ══▶ KafkaFeed ──▶ worker
//!              SetupWriter                      RangeReader, read_ledger
//! ```
//!
//! [`KafkaPublisher`] writes the log and its ledger in Kafka transactions; [`KafkaFeed`] reads both as a member of
//! a consumer group. [`ensure_topics`] and [`SetupWriter`] make a new log, [`read_ledger`] and [`RangeReader`] look
//! at one without taking part in anything.
//!
//! *Invariants:* one writer per log: opening a publisher fences every older one, in both of its `transactional.id`s
//! (h03, h10). They take turns, and a transaction's records follow only when the last one's commit was answered.
//! Whoever reads, reads committed records only. Nothing here creates a topic but [`ensure_topics`].
//!
//! The log and its ledger are written by [`wire`], and the log is read by it, which tells why; the rest is librdkafka's, on
//! threads of its own.
//! Every call blocks its caller for a bounded time.

mod connection;
mod feed;
mod generations;
mod ledger;
mod membership;
mod names;
mod producer;
mod publisher;
mod reader;
mod setup;
mod skips;
mod tail;
mod topics;
mod wire;

pub use connection::{Connection, KafkaError};
pub use feed::KafkaFeed;
pub use generations::{
    Generation, Generations, GenerationsWatch, generations, not_set_up, state, write_generations,
};
pub use ledger::{ReadUntil, read_ledger};
pub use membership::group_offset;
pub use names::Names;
pub use publisher::KafkaPublisher;
pub use setup::{SetupRecord, SetupWriter};
pub use skips::{Records, Skip, request_skip};
pub use tail::{RangeReader, Start};
pub use topics::{
    Problem, RECORD_MAX_BYTES, check_topics, compare_topics, delete_groups, delete_topics, ensure_topics,
    groups_of, log_exists, log_start, record_max,
};
