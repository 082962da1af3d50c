//! The proof on a real Postgres, with a log and stores that the tests write themselves: so every schedule can be had,
//! and every kind of difference.

mod counters;
mod documents;
mod rig;
mod windows;
