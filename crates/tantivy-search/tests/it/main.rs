//! The search sink and its HTTP side, at the port and over a real socket.

// The helpers are tests too, which clippy does not see.
#![allow(clippy::unwrap_used)]

mod api;
mod bench;
mod filters;
mod paging;
mod sink;
