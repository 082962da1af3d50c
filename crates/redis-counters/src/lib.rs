//! Sink: counters defined in SQL, kept in Redis.
