//! Log to store: applies whole source transactions to a derived store, each exactly once.
//!
//! ```text
//! Feed ──LogBatch──▶ run ──Change──▶ Sink::apply … Sink::commit (effect + checkpoint) ──▶ Feed::commit
//! ```
//!
//! The one rule: a store keeps its [`Checkpoint`] in the same atomic write as the effect, and a worker starts
//! from the checkpoints, never from the consumer group's offset. Whether a change is already in a store is
//! decided here and nowhere else; a sink may compare before it sets, but never skips.
//!
//! A worker continues only in the log that it left: the record that the checkpoint ends with is read again first, and
//! must be the same.
//!
//! To keep a store of your own, implement [`Sink`] and give it to [`run`].
//!
//! A record that one store cannot take in stops that store, and the others go on; with no store left the worker ends.
//!
//! A store that must be filled from the log's beginning never holds up the others: [`build`] fills a copy beside it,
//! with a feed of its own, and when that has caught up it takes the store's place ([`Handover`]). A sink that keeps no
//! copies is filled in place.
//!
//! *Invariant:* no Kafka, no store, no clock and no thread here. Adapters implement the two ports.

mod checkpoint;
mod continuity;
mod feed;
mod handover;
mod position;
mod run;
mod sink;
mod start;
mod stops;

pub use checkpoint::{Checkpoint, LastRecord, ParseLastRecordError, Stopped};
pub use feed::{Feed, FeedError, FeedEvent, GroupOffset, LogBatch, LogRecord, LogState, Successor};
pub use handover::Handover;
pub use run::{Control, Role, STAGES, Unfit, Worker, WorkerError, build, run};
pub use sink::{Change, Move, Sink, SinkError, StoreSpec, Stored};
