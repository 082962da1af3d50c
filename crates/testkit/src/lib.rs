//! Test doubles, faults, and helpers that run real services.
