//! Proof that a store equals Postgres, while everything keeps running.
//!
//! ```text
//! Postgres' answer in one snapshot ──(+ what of the log the snapshot did not see)──▶ must equal ◀── the store at an offset
//! ```
//!
//! A store is Postgres as of an offset of the log, and no snapshot is ever exactly there. So the snapshot's answer
//! is rolled forward. Let O be the offset in the store's checkpoint, read in one piece with its content, and P the
//! snapshot.
//!
//! 1. After P is taken, the insert LSN is read, and O is read only when the store has come to that LSN. So whatever
//!    P saw is below O (a transaction is visible only after its commit record was written).
//! 2. Below O there may be transactions that P did not see: those that committed later, and those whose commit
//!    record was in the log before other sessions saw them (h20, h50). Their records carry the xid; P says which
//!    xids it saw. Applied to P's answer in the order of the log, they give Postgres as of O.
//! 3. Each of them held an xid before P was taken, in which case it committed after it began, or got one later. So
//!    none committed before the [window](window): the earlier of the moment *before* P and the earliest start of a
//!    transaction that held an xid then. The log is read from the first record of that time.
//! 4. What a snapshot saw, later ones see as well, and a row's changes become visible in the order of the log. So
//!    documents can be checked in chunks with a snapshot each, while the log is read only once.
//!
//! 5. A counter's content is read in parts, for a large one would hold the store up, and the store moves on between them.
//!    Where no transaction of the log touched a group between the first part's offset and the last one's, the group must be the
//!    same in all of that time, and any part tells its value. All others, and all that seem to differ, are read again,
//!    some at a time, each time together with an offset, to which the answer is then rolled forward.
//!
//! Postgres itself evaluates a counter's query, over the table and over the images of rows in the log; nothing of
//! the worker's evaluation is used.
//!
//! *Invariants:* nothing is paused, locked against writers, or written, but for an empty logical message that wakes
//! an idle source. No Kafka, Redis or HTTP here: the log and the stores are reached by the [`ports`].
//!
//! *Limits:* xids are compared within 2³¹ of the snapshot's, so the window must not hold more transactions than
//! that. The publication must not hold back rows or columns, which `millrace check` looks at.

mod counter;
mod documents;
mod ports;
mod rollforward;
mod rows;
mod source;
mod tally;
mod touched;
mod verifier;
pub mod window;

pub use counter::{Counter, Measure};
pub use documents::Index;
pub use ports::{CounterStore, DocumentStore, Documents, From, Log, Observer, Part, StoreError};
pub use source::Source;
pub use verifier::{Difference, NotVerified, Verified, Verifier};
