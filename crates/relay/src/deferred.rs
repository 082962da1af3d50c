//! Events that wait for Postgres to compare keys (h26) or to tell of a rewrite (h30), or for a round, and everything behind
//! them.

use std::collections::{HashMap, VecDeque};

use change::{Key, Lsn, Tuple, TupleBuf};

use crate::{Announced, RowChange, WalEvent};

/// Events in the stream's order, copied out of its buffers.
#[derive(Debug, Default)]
pub(crate) struct Deferred {
    events: VecDeque<Event>,
}

/// A [`WalEvent`] that owns what it says.
#[derive(Debug)]
enum Event {
    Begin { commit_lsn: Lsn, commit_time_us: i64, xid: u32 },
    Relation(Announced),
    Row { lsn: Lsn, relation: u32, kind: RowKind, old: Option<TupleBuf>, new: Option<TupleBuf> },
    Truncate { lsn: Lsn, relations: Vec<u32> },
    Message { lsn: Lsn, transactional: bool, prefix: String, content: Vec<u8> },
    Commit { commit_lsn: Lsn, end_lsn: Lsn },
    Keepalive { wal_end: Lsn, reply_requested: bool },
}

#[derive(Clone, Copy, Debug)]
enum RowKind {
    Insert,
    Update,
    Delete,
}

impl Deferred {
    pub(crate) fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    pub(crate) fn push(&mut self, event: WalEvent<'_>) {
        let copy = |tuple: Tuple<'_>| TupleBuf::new(tuple.iter());
        self.events.push_back(match event {
            WalEvent::Begin { commit_lsn, commit_time_us, xid } => {
                Event::Begin { commit_lsn, commit_time_us, xid }
            }
            WalEvent::Relation(announced) => Event::Relation(announced),
            WalEvent::Row { lsn, relation, change } => {
                let (kind, old, new) = match change {
                    RowChange::Insert { new } => (RowKind::Insert, None, Some(new)),
                    RowChange::Update { old, new } => (RowKind::Update, old, Some(new)),
                    RowChange::Delete { old } => (RowKind::Delete, Some(old), None),
                };
                Event::Row { lsn, relation, kind, old: old.map(copy), new: new.map(copy) }
            }
            WalEvent::Truncate { lsn, relations } => Event::Truncate { lsn, relations: relations.to_vec() },
            WalEvent::Message { lsn, transactional, prefix, content } => {
                Event::Message { lsn, transactional, prefix: prefix.to_owned(), content: content.to_vec() }
            }
            WalEvent::Commit { commit_lsn, end_lsn } => Event::Commit { commit_lsn, end_lsn },
            WalEvent::Keepalive { wal_end, reply_requested } => Event::Keepalive { wal_end, reply_requested },
        });
    }

    /// The first of them.
    pub(crate) fn first(&self) -> Option<WalEvent<'_>> {
        self.events.front().and_then(Event::view)
    }

    /// The keys of what waits, by table, as far as the tables stay as they are.
    pub(crate) fn keys(
        &self,
        undecided: impl Fn(&WalEvent<'_>) -> Vec<(u32, Key)>,
    ) -> HashMap<u32, Vec<Key>> {
        let mut keys = HashMap::<u32, Vec<Key>>::new();
        let events = self.events.iter().filter_map(Event::view);
        let events = events.take_while(|event| !matches!(event, WalEvent::Relation(_)));
        for (relation, key) in events.flat_map(|event| undecided(&event)) {
            keys.entry(relation).or_default().push(key);
        }
        for keys in keys.values_mut() {
            keys.sort_unstable();
            keys.dedup();
        }
        keys
    }

    /// Gives the events to `take`, in order, until it says no. Gives whether it took any.
    pub(crate) fn drain<E>(
        &mut self,
        mut take: impl FnMut(WalEvent<'_>) -> Result<bool, E>,
    ) -> Result<bool, E> {
        let waited = self.events.len();
        while let Some(event) = self.first() {
            if !take(event)? {
                break;
            }
            self.events.pop_front();
        }
        Ok(self.events.len() < waited)
    }
}

impl Event {
    /// The event, borrowed. `None` never: a row's change has the images that its kind has.
    fn view(&self) -> Option<WalEvent<'_>> {
        Some(match self {
            Event::Begin { commit_lsn, commit_time_us, xid } => {
                WalEvent::Begin { commit_lsn: *commit_lsn, commit_time_us: *commit_time_us, xid: *xid }
            }
            Event::Relation(announced) => WalEvent::Relation(announced.clone()),
            Event::Row { lsn, relation, kind, old, new } => {
                let (old, new) = (old.as_ref().map(TupleBuf::as_tuple), new.as_ref().map(TupleBuf::as_tuple));
                let change = match kind {
                    RowKind::Insert => RowChange::Insert { new: new? },
                    RowKind::Update => RowChange::Update { old, new: new? },
                    RowKind::Delete => RowChange::Delete { old: old? },
                };
                WalEvent::Row { lsn: *lsn, relation: *relation, change }
            }
            Event::Truncate { lsn, relations } => WalEvent::Truncate { lsn: *lsn, relations },
            Event::Message { lsn, transactional, prefix, content } => {
                WalEvent::Message { lsn: *lsn, transactional: *transactional, prefix, content }
            }
            Event::Commit { commit_lsn, end_lsn } => {
                WalEvent::Commit { commit_lsn: *commit_lsn, end_lsn: *end_lsn }
            }
            Event::Keepalive { wal_end, reply_requested } => {
                WalEvent::Keepalive { wal_end: *wal_end, reply_requested: *reply_requested }
            }
        })
    }
}
