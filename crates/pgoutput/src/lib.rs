//! Sans-IO decoder of Postgres' pgoutput protocol.
