//! Kafka's protocol, as far as the log's writer speaks it.
//!
//! librdkafka reads (and answers every question); the log is written without it. A change passes through its queues as a
//! message of its own, allocated with its headers and freed, which costs more than all else that a reader does; and
//! its transactions wait for fixed times. Here a batch is written once, as the broker keeps it.

pub(crate) mod batch;
pub(crate) mod broker;
pub(crate) mod cluster;
pub(crate) mod outbox;
mod scram;
pub(crate) mod security;
