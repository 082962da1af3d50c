//! Sink: a full-text index per table, searched over HTTP.
