//! What a worker does at logs and stores in memory.

mod continuity;
mod rig;
mod stops;
