//! A seeded simulator over the ports of relay and worker.
//!
//! One thread, no clock but its own: a [`World`] holds a source with its write-ahead log, a broker with
//! transactions, and a store, each of which fails when the seed says so: connections break between any two
//! messages, a commit's outcome is unknown to who asked for it, processes die at any call, a store is restored
//! from an old copy or emptied. The code under test is the real relay and the real worker.
//!
//! The oracle shares no code with them: the source keeps the tables as they were after each transaction, and
//! whenever the store commits it must equal the tables at the LSN that its checkpoint claims.

mod broker;
mod history;
mod reader;
mod store;
mod world;

pub use world::{World, run_seed};
