//! Adapter to Postgres: replication connection, slot, publication, catalog.
