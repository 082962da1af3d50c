//! Test doubles, faults, and helpers that run real services.

pub mod services;
pub mod sim;
