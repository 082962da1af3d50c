//! The counters' sink on a real Redis.

#![allow(clippy::unwrap_used, reason = "a test that fails")]

mod bench;
mod content;
mod damage;
mod forms;
mod guard;
mod large;
mod outage;
mod proxy;
mod race;
mod rebuild;
mod rig;
