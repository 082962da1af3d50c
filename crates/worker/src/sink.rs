use std::sync::Arc;
use std::time::Duration;

use change::{Event, NEW_LOG, Position, Refusal, TableSchema};

use crate::Checkpoint;

/// One store of a sink: what has a checkpoint of its own (a counter, an index).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StoreSpec {
    /// Its name for people: `counters.unread`, `search.emails`.
    pub name: String,
    /// Hash of what defines it, and after a colon, where the sink has more than one, the form in which the content is
    /// written. The hash is fixed; the form may follow from the types of the tables, and change with
    /// [`Sink::describe`]. A store of another form goes on in its own, not ready, while a copy is built in this
    /// one; a store of another hash cannot go on.
    pub definition: String,
}

/// What a store was found to hold.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Stored {
    /// Nothing: it is to be filled from the log's beginning.
    Empty,
    /// Not what its checkpoint promises: it is to be emptied and filled again. Says why.
    Damaged(String),
    /// The log up to here.
    At(Checkpoint),
    /// Something that must not be touched, or that filling it again would not mend: only the operator can help.
    Refused {
        /// Why, and what helps.
        refusal: Refusal,
        /// Where it stands, if its checkpoint may be written.
        at: Option<Checkpoint>,
    },
}

/// One change of a row, as the log tells it.
#[derive(Clone, Copy, Debug)]
pub struct Change<'a> {
    /// Its record's offset.
    pub offset: i64,
    /// Its place in the log's order.
    pub position: Position,
    /// The table as of this change. The same `Arc` for every change under one version, so that comparing
    /// pointers tells whether prepared knowledge of it still holds.
    pub schema: &'a Arc<TableSchema>,
    /// The record's key: JSON.
    pub key: &'a [u8],
    /// What happened, with rows as JSON.
    pub event: Event<'a>,
    /// JSON array of the columns whose value in `after` is only a placeholder; empty for none.
    pub unchanged: &'a [u8],
    /// JSON array of the columns that were left out because the row is larger than a record may be, as
    /// [`recorded`](change::Column::recorded); empty for none. Their values are not known, in either image: a store that
    /// needs one refuses the change.
    pub omitted: &'a [u8],
    /// JSON of the row's key before this transaction changed it, on the `c` half of a changed key; else empty.
    pub previous_key: &'a [u8],
}

impl Change<'_> {
    /// Refuses the change if one of these columns, as [`recorded`](change::Column::recorded), was left out of it: the store
    /// needs their values.
    pub fn demand<'c>(
        &self,
        store: &str,
        columns: impl IntoIterator<Item = &'c str>,
    ) -> Result<(), SinkError> {
        let omitted = change::column_names(self.omitted);
        let omitted = omitted.map_err(|error| SinkError::Poison(error.to_string()))?;
        let Some(column) = columns.into_iter().find(|column| omitted.iter().any(|name| name == column))
        else {
            return Ok(());
        };
        let table = self.schema.full_name();
        let (row, skip) = match self.schema.key_text(self.key) {
            Some(key) => (format!("the row {key}"), format!("--key '{}'", key.replace('\'', "'\\''"))),
            None => ("a row".to_owned(), format!("--offset {}", self.offset)),
        };
        Err(Refusal::new(
            format!(
                "{store} needs `{column}` of {row} of {table}, and the record at offset {} does not have it: the row is \
                 larger than a record may be",
                self.offset
            ),
            format!(
                "millrace skip {store} {skip} --reason TEXT, which leaves it out; or raise max.message.bytes of the log's \
                 topic, and {NEW_LOG}"
            ),
        )
        .into())
    }
}

/// How one store's checkpoint moves in a commit.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Move {
    /// What the store must hold now; anything else is [`SinkError::Moved`].
    pub from: Checkpoint,
    /// What it holds afterwards.
    pub to: Checkpoint,
}

/// Why a sink cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// The store is away, or whether a write took effect is unknown. The worker reads the checkpoints again.
    #[error("{0}")]
    Unavailable(String),
    /// The store is not where this worker left it (restored, emptied, damaged, or another worker writes it). The
    /// worker reads the checkpoints again.
    #[error("{0}")]
    Moved(String),
    /// This change cannot be applied to the store, and none after it may be. From [`Sink::apply`] it stops the store, and
    /// the others go on; from another method it ends the worker.
    #[error("{0}")]
    Poison(String),
    /// Going on could be wrong; only the operator can help. From [`Sink::apply`] it stops the store, as `Poison` does.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// A kind of derived store. Implementations: Redis counters, Tantivy indexes, the simulator's, and yours.
///
/// Calls come from one thread, in this order: `load`, then for each store that is not usable `reset`, then
/// `apply` for the changes in log order and `commit` now and then, always between two source transactions.
/// After an error that does not end the worker: `discard`, and `load` again.
///
/// The last four methods are for a sink that can build a copy beside a store; one that leaves them as they are has
/// its stores emptied and filled in place. Such a sink has two instances, each on a thread of its own: the worker's,
/// over the stores, and the builder's, over the copies, for which `reset` makes the copy and the rest means the copy.
pub trait Sink {
    /// The stores, in an order that never changes; the other methods speak of them by their place in it.
    fn stores(&self) -> &[StoreSpec];

    /// Whether readers reach what the stores show through this process: then it stays for them, also when every store has
    /// stopped.
    fn serves(&self) -> bool {
        false
    }

    /// Whether the store derives from this table.
    fn wants(&self, store: usize, schema: &TableSchema) -> bool;

    /// A version of a table: all that the ledger holds, in its order, before [`load`](Sink::load), and each newer one
    /// before its first change. Returns true if a store's [definition](StoreSpec::definition) is another one now.
    fn describe(&mut self, table: &TableSchema) -> bool {
        let _ = table;
        false
    }

    /// Reads what each store holds, as it is now. Forgets anything remembered.
    fn load(&mut self) -> Result<Vec<Stored>, SinkError>;

    /// Empties a store and gives it the checkpoint `to`, atomically: from here on it is the log up to there.
    fn reset(&mut self, store: usize, to: &Checkpoint) -> Result<(), SinkError>;

    /// Stages a change of a table that the store [wants](Sink::wants). Nothing of it may be visible to readers before
    /// `commit`.
    fn apply(&mut self, store: usize, change: &Change<'_>) -> Result<(), SinkError>;

    /// The store was told to leave this change out, which [`apply`](Sink::apply) refused. A store whose later changes build
    /// on this one may stage what it can of it.
    fn skip(&mut self, store: usize, change: &Change<'_>) -> Result<(), SinkError> {
        let _ = (store, change);
        Ok(())
    }

    /// How much longer what is staged may wait for its commit (`now_us`: microseconds since the epoch). Called at the
    /// end of a poll; zero, which means now, for a store that commits cheaply.
    fn due_in(&mut self, now_us: i64) -> Duration;

    /// Whether so much is staged that it should be committed at the next end of a source transaction.
    fn full(&self) -> bool;

    /// Makes what is staged visible and durable together with the new checkpoints, all or nothing per store,
    /// and for stores that move together all or nothing together where the store can. `moves` has a place per
    /// store, `None` for a store that stays. When only LSNs move, a store may keep that in memory.
    ///
    /// After `load`, with nothing staged, a move can give a store's checkpoint another `log` and make it not ready: the
    /// log does not hold the records any more that the store was built from. That must be durable.
    fn commit(&mut self, moves: &[Option<Move>]) -> Result<(), SinkError>;

    /// Forgets what is staged.
    fn discard(&mut self);

    /// Checks, cheaply, that the stores still are where they were left. Called now and then while idle.
    fn check(&mut self) -> Result<(), SinkError>;

    /// The copies that are being built, or are to be: `None` for a store that has none. Does not disturb them.
    fn copies(&mut self) -> Result<Vec<Option<Stored>>, SinkError> {
        Ok(vec![None; self.stores().len()])
    }

    /// Records durably that a copy of the store, as `load` found it, is to be built. A copy that is there stays as
    /// it is. What the store shows goes on being shown if it is to be kept, and else goes away in the same step.
    /// `false` if this sink keeps no copies.
    fn rebuild(&mut self, store: usize, keep: bool) -> Result<bool, SinkError> {
        let _ = (store, keep);
        Ok(false)
    }

    /// Puts the copy in the store's place, and removes what was there, in one atomic and durable step; only if the
    /// copy is what [`copies`](Sink::copies) found last and [reaches](Checkpoint::reaches) what the store shows.
    /// Says whether it did. The store is loaded again before it is used.
    fn swap(&mut self, store: usize) -> Result<bool, SinkError> {
        let _ = store;
        Ok(false)
    }

    /// Makes durable where a copy stands that was committed, and lets go of it until the next `load`.
    fn release(&mut self, store: usize) -> Result<(), SinkError> {
        let _ = store;
        Ok(())
    }
}
