//! Real Postgres, Kafka, Redis and Debezium, started for a test on free ports in a temporary directory, and stopped with it.
//!
//! `scripts/install` brings what they need. Copies of the test suite run side by side.

mod cluster;
mod debezium;
mod kafka;
mod lending;
mod postgres;
mod power_loss;
mod process;
mod redis;

pub use cluster::KafkaCluster;
pub use debezium::Debezium;
pub use kafka::Kafka;
pub use lending::LentKafka;
pub use postgres::{Postgres, Rows, Session};
pub use power_loss::Torn;
pub use process::{Process, free_port, wait_until};
pub use redis::Redis;
