//! The adapter against a real server.

#![allow(clippy::unwrap_used)] // helpers of tests, which the lint does not see

mod catalog;
mod check;
mod login;
mod presets;
mod publication;
mod rounds;
mod running;
mod slot;
mod stream;
mod support;
