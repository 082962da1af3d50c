use std::collections::BTreeMap;

use change::{
    LedgerEntry, Lsn, Progress, RecordBatch, Refusal, SchemaRef, SlotIntent, TableProgress, TableSchema,
};

/// An LSN that is safe to acknowledge: the log's Kafka transaction up to it has committed. Only this crate makes
/// one, and only after [`Publisher::commit`] returned.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Confirmed(Lsn);

impl Confirmed {
    pub(crate) fn after_commit(progress: &Progress) -> Self {
        Confirmed(progress.end_lsn)
    }

    /// The LSN.
    pub fn lsn(self) -> Lsn {
        self.0
    }
}

/// What the ledger and the log hold, read to their true end after older publishers were fenced.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Ledger {
    /// How far the log has come; `None` when `setup` has not finished.
    pub progress: Option<Progress>,
    /// What `setup` did about the slot.
    pub slot: Option<SlotIntent>,
    /// Every version of every table.
    pub schemas: BTreeMap<SchemaRef, TableSchema>,
    /// How much of each table's snapshot is in the log.
    pub tables: BTreeMap<u32, TableProgress>,
    /// The random id in the log's record 0; `None` when the log is empty.
    pub log: Option<String>,
    /// The log's end offset (exclusive, control records included).
    pub log_end: i64,
    /// Offset after the log's last committed record of ours, looked for from the last one that `progress` names on. `None`
    /// where nobody is going to continue the log.
    pub data_end: Option<i64>,
}

/// Why the publisher cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// A newer publisher of the same log has taken over. Nothing this one had open becomes visible.
    #[error("fenced: a newer reader of this pipeline has taken over")]
    Fenced,
    /// The brokers are away or slow; whether an open commit took effect is unknown, and opening again will tell.
    #[error("{0}")]
    Unavailable(String),
    /// Going on could lose changes; only the operator can help.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// The log's only writer. Implemented by the Kafka adapter and by the simulator.
///
/// Methods block their caller for a bounded time. After any error the publisher is dropped and a new one opened.
pub trait Publisher {
    /// Fences every older publisher of this log, then reads the ledger to its true end.
    fn open(&mut self) -> Result<Ledger, PublishError>;

    /// Largest record that the log takes, bytes of key, value and headers; `None` where this login may not ask.
    fn record_max(&mut self) -> Result<Option<usize>, PublishError> {
        Ok(None)
    }

    /// Begins a transaction unless one is open, without waiting until it has begun. It is to be committed soon.
    fn begin(&mut self) -> Result<(), PublishError>;

    /// Whether the transaction has begun, so that nothing waits for it any more; true where none is open.
    fn ready(&mut self) -> bool;

    /// Appends the first `count` records of `batch` to the open transaction; begins one when there is none. The
    /// records' bytes are free for reuse when this returns; the last may go to the brokers with the commit only.
    fn append(&mut self, batch: &RecordBatch, count: usize) -> Result<(), PublishError>;

    /// Commits the open transaction (or one of its own, when nothing was sent) with these entries and `progress`
    /// in the ledger. Sets `progress.log_end` to the offset after the log's last data record, this transaction's
    /// included. All of it becomes visible, or none.
    fn commit(&mut self, entries: &[LedgerEntry], progress: &mut Progress) -> Result<(), PublishError>;

    /// Fails with [`PublishError::Fenced`] if a newer publisher of this log has been opened. Sends nothing that becomes
    /// visible. A publisher that is not open, or whose log has no other writers, returns at once.
    fn confirm(&mut self) -> Result<(), PublishError> {
        Ok(())
    }
}
