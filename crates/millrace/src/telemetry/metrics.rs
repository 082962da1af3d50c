//! The numbers of the reader and of the workers.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;

use change::{Lsn, Progress, TableProgress};
use worker::Checkpoint;

use super::{Telemetry, lock};

/// The reader's.
pub(crate) struct ReaderMetrics {
    lsn: Gauge,
    streaming: Gauge,
    records: Counter,
    transactions: Counter,
    restarts: Counter,
    snapshot_rows: Family<TableLabel, Gauge>,
    snapshot_bytes: Family<TableLabel, Gauge>,
    snapshot_estimated_rows: Family<TableLabel, Gauge>,
    snapshot_pending: Family<TableLabel, Gauge>,
}

/// Labels of a table's numbers.
#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct TableLabel {
    table: String,
}

impl ReaderMetrics {
    pub(crate) fn new(telemetry: &Telemetry) -> Self {
        let metrics = ReaderMetrics {
            lsn: Gauge::default(),
            streaming: Gauge::default(),
            records: Counter::default(),
            transactions: Counter::default(),
            restarts: Counter::default(),
            snapshot_rows: Family::default(),
            snapshot_bytes: Family::default(),
            snapshot_estimated_rows: Family::default(),
            snapshot_pending: Family::default(),
        };
        let mut registry = lock(&telemetry.registry);
        for (name, help, family) in [
            ("rows", "rows of the table that its snapshot has read", &metrics.snapshot_rows),
            ("bytes", "bytes of their values", &metrics.snapshot_bytes),
            ("estimated_rows", "rows that Postgres estimates; -1: unknown", &metrics.snapshot_estimated_rows),
            ("pending", "1 while rows of the table are still to be read", &metrics.snapshot_pending),
        ] {
            registry.register(format!("reader_snapshot_{name}"), help, family.clone());
        }
        registry.register(
            "reader_lsn_bytes",
            "the log is Postgres up to this LSN, as a number",
            metrics.lsn.clone(),
        );
        registry.register(
            "reader_streaming",
            "1 while streaming, 0 while standing by or trying again",
            metrics.streaming.clone(),
        );
        registry.register("reader_records", "records published to the log", metrics.records.clone());
        registry.register(
            "reader_kafka_transactions",
            "Kafka transactions committed",
            metrics.transactions.clone(),
        );
        registry.register("reader_restarts", "times the relay had to begin again", metrics.restarts.clone());
        metrics
    }

    pub(crate) fn committed(&self, progress: &Progress, records: u64) {
        self.lsn.set(number(progress.end_lsn));
        self.records.inc_by(records);
        self.transactions.inc();
        self.streaming.set(1);
    }

    pub(crate) fn read(&self, table: &TableProgress) {
        let label = TableLabel { table: table.name.clone() };
        let whole = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        self.snapshot_rows.get_or_create(&label).set(whole(table.rows));
        self.snapshot_bytes.get_or_create(&label).set(whole(table.bytes));
        self.snapshot_estimated_rows.get_or_create(&label).set(table.estimated_rows);
        self.snapshot_pending.get_or_create(&label).set(i64::from(table.pending()));
    }

    pub(crate) fn standing_by(&self) {
        self.streaming.set(0);
    }

    pub(crate) fn restarted(&self) {
        self.streaming.set(0);
        self.restarts.inc();
    }
}

/// Labels of a store's numbers.
#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct StoreLabel {
    store: String,
}

/// A worker's, per store.
#[derive(Clone)]
pub(crate) struct WorkerMetrics {
    lsn: Family<StoreLabel, Gauge>,
    offset: Family<StoreLabel, Gauge>,
    ready: Family<StoreLabel, Gauge>,
    delays: Counter,
    restarts: Counter,
}

impl WorkerMetrics {
    /// `worker` is `counters` or `search`, or the builder beside it: `counters_rebuild`, `search_rebuild`.
    pub(crate) fn new(telemetry: &Telemetry, worker: &'static str) -> Self {
        let metrics = WorkerMetrics {
            lsn: Family::default(),
            offset: Family::default(),
            ready: Family::default(),
            delays: Counter::default(),
            restarts: Counter::default(),
        };
        let mut registry = lock(&telemetry.registry);
        let registry = registry.sub_registry_with_prefix(worker);
        registry.register(
            "lsn_bytes",
            "the store is Postgres up to this LSN, as a number",
            metrics.lsn.clone(),
        );
        registry.register(
            "offset",
            "every record of the log below this offset is in the store",
            metrics.offset.clone(),
        );
        registry.register(
            "ready",
            "1 when the store has caught up since it was last empty",
            metrics.ready.clone(),
        );
        registry.register(
            "delays",
            "times the store could not be written and was tried again",
            metrics.delays.clone(),
        );
        registry.register("restarts", "times the worker had to begin again", metrics.restarts.clone());
        metrics
    }

    pub(crate) fn moved(&self, store: &str, checkpoint: &Checkpoint) {
        let label = StoreLabel { store: store.to_owned() };
        self.lsn.get_or_create(&label).set(number(checkpoint.lsn));
        self.offset.get_or_create(&label).set(checkpoint.next_offset);
        self.ready.get_or_create(&label).set(i64::from(checkpoint.ready));
    }

    /// The store does not follow the log.
    pub(crate) fn absent(&self, store: &str) {
        self.forget(store);
        self.ready.get_or_create(&StoreLabel { store: store.to_owned() }).set(0);
    }

    /// Nothing is to be said of the store.
    pub(crate) fn forget(&self, store: &str) {
        let label = StoreLabel { store: store.to_owned() };
        for family in [&self.lsn, &self.offset, &self.ready] {
            family.remove(&label);
        }
    }

    pub(crate) fn delayed(&self) {
        self.delays.inc();
    }

    pub(crate) fn restarted(&self) {
        self.restarts.inc();
    }
}

fn number(lsn: Lsn) -> i64 {
    i64::try_from(lsn.0).unwrap_or(i64::MAX)
}
