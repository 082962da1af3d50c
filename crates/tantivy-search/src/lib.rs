//! A full-text index per configured table, kept in Tantivy from the log and searched over HTTP.
//!
//! ```text
//! worker ──Change──▶ SearchSink ──commit (documents + checkpoint)──▶ View ──▶ HTTP: search, documents, health
//! ```
//!
//! The sink and the HTTP side meet in [`Indexes`] only: after every commit the sink publishes a view, a
//! searcher together with the checkpoint of exactly the commit it shows, and a request works on one view from
//! beginning to end. So an answer never mixes two commits, and the LSN it names is the LSN it shows.
//!
//! *Invariant:* no Kafka and no Postgres here. Nothing but this crate reads or writes an index's directory.

mod definition;
mod document;
mod filter;
mod highlight;
mod http;
mod index;
mod indexes;
mod listing;
mod options;
mod order;
mod overlay;
mod payload;
mod place;
mod query;
mod request;
mod sink;
mod store;

pub use definition::IndexDefinition;
pub use http::serve;
pub use indexes::Indexes;
pub use options::Options;
pub use request::{directories_of, rebuild_requested, request_rebuild};
pub use sink::SearchSink;
