//! Adapter to Kafka: transactional publisher, ledger, feed, topics.
