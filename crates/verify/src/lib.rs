//! Proof that a store equals Postgres.
