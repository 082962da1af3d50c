//! Kafka's protocol, as far as the log is written and read.
//!
//! librdkafka does the rest: groups, topics, the ledger's readers, every question. A change passes through its queues as a
//! message of its own, allocated with its headers and freed, which costs more than all else that a reader does, and half
//! as much as all that a worker does; and its transactions wait for fixed times. Here a batch is written once, as the
//! broker keeps it, and read where it was decompressed.

pub(crate) mod batch;
pub(crate) mod broker;
pub(crate) mod cluster;
pub(crate) mod fetch;
pub(crate) mod outbox;
mod records;
mod rejection;
mod scram;
pub(crate) mod security;
