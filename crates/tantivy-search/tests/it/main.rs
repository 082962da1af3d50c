//! The search sink and its HTTP side, at the port and over a real socket.

mod api;
mod bench;
mod filters;
mod paging;
mod sink;
