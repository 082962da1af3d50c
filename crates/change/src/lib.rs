//! The vocabulary of Millrace and the format of its log.
//!
//! Everything that crosses the log is defined here, once: what a position is, how a row looks, how a change
//! becomes a Kafka record (key, headers, value) and how a record becomes a change again, and what the ledger
//! beside the log says. The producing half (`relay`) and the consuming half (`worker`) meet in this crate only.
//!
//! *Invariant:* no I/O, no clock, no async, no client library. Everything is a function of its arguments.

mod description;
mod envelope;
mod event;
mod json;
pub mod key;
mod ledger;
mod lsn;
mod members;
mod name;
mod oversize;
mod position;
mod record;
mod refusal;
mod schema;
mod snapshot;
mod tuple;

pub use description::{ColumnDescription, Description, Storage, TypeDescription};
pub use envelope::{ChangeStamp, Encoder, EnvelopeError, Op, RelationEncoder, RowImages, UNAVAILABLE};
pub use event::{Columns, Event, Field, column_names, fields, key_fields};
pub use ledger::{
    Key, LedgerEntry, LedgerError, Piece, Progress, Read, SlotIntent, SlotState, SnapshotProgress, Split,
    TableProgress, Timeline, Window,
};
pub use lsn::{Lsn, ParseLsnError};
pub use name::{TableNameError, parse_table_name, quoted_table_name, table_name};
pub use oversize::Oversize;
pub use position::{Kind, ParsePositionError, Position};
pub use record::{HeaderError, Headers, RecordBatch, RecordMeta, RecordRef, header};
pub use refusal::{NEW_LOG, Refusal};
pub use schema::{Collation, Column, Encoding, ReplicaIdentity, SchemaRef, TableSchema};
pub use snapshot::{ParseSnapshotError, Snapshot};
pub use tuple::{Datum, Tuple, TupleBuf, TupleError, TupleIter};

/// Where time comes from and passes, so that the simulator can hold it.
pub trait Clock {
    /// Microseconds since the Unix epoch.
    fn now_us(&self) -> i64;

    /// Waits.
    fn sleep(&self, duration: std::time::Duration);
}
