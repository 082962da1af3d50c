//! The adapter against real brokers. Tests share one; those that harm a broker have their own.

// Helpers of tests may fail as tests do.
#![allow(clippy::unwrap_used)]

mod bench;
mod cluster;
mod common;
mod feed;
mod outage;
mod power_loss;
mod publisher;
mod security;
mod topics;
