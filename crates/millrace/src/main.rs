//! Millrace.
fn main() {}
