//! Source to log: reads committed changes in order, makes records of them, and publishes them exactly once.
//!
//! ```text
//! Source ──WalEvent──▶ Assembler ──RecordBatch──▶ Publisher ──committed──▶ Source::acknowledge
//! ```
//!
//! The loop is [`run`]. The rule that makes it exactly once: a Kafka transaction holds records *and* the ledger's
//! progress, so both become visible or neither; the slot restarts at the ledger's end LSN and what the ledger
//! already covers is skipped ([`resume`]); the slot is acknowledged only after the Kafka transaction committed
//! ([`Confirmed`]).
//!
//! Rows that were there before the stream are read in rounds between two source transactions and published as births;
//! what makes that exact stands at the top of `snapshot.rs`.
//!
//! *Invariant:* no Postgres, no Kafka, no clock and no thread here. Adapters implement the two ports.

mod assemble;
mod claim;
mod deferred;
mod publisher;
pub mod resume;
mod rounds;
mod run;
mod snapshot;
mod source;

pub use assemble::TABLES_CHANGED;
pub use publisher::{Confirmed, Ledger, PublishError, Publisher};
pub use run::{Control, Limits, RelayError, STAGES, run};
pub use source::{
    Announced, AnnouncedColumn, Described, Heartbeat, Publication, PublishedTable, ReadRequest, Round,
    RoundEvent, RowChange, Source, SourceError, SourceState, Unchanged, WalEvent,
};
