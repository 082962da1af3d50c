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
//! *Invariant:* no Postgres, no Kafka, no clock and no thread here. Adapters implement the two ports.

mod assemble;
mod publisher;
pub mod resume;
mod run;
mod source;

pub use publisher::{Confirmed, Ledger, PublishError, Publisher};
pub use run::{Control, Limits, RelayError, run};
pub use source::{Heartbeat, RowChange, Source, SourceError, SourceState, WalEvent};
