//! The promises, tested on real processes: real Postgres, Kafka and Redis, and the binary as users run it.

mod alter;
mod chaos;
mod commands;
mod debezium;
mod faults;
mod freeze;
mod generation;
mod groups;
mod harness;
mod mailbox;
mod mirror;
mod older;
mod oversize;
mod partitions;
mod power_loss;
mod reader;
mod rebuild;
mod snapshot;
mod soak;
mod stops;
mod tidy;
mod verify;
