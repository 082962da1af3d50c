//! The source as a reader sees it: a slot on the simulated WAL.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use change::{Datum, Lsn, Timeline, TupleBuf};
use relay::{Confirmed, Heartbeat, RelayError, RowChange, Source, SourceError, SourceState, WalEvent};

use super::history::{Entry, History, RowEdit, TABLES, schema};
use super::world::Faults;

/// The server's durable state.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) history: History,
    pub(crate) confirmed_flush: Lsn,
    pub(crate) heartbeat: Heartbeat,
}

/// A connection that streams.
pub(crate) struct SimSource {
    server: Rc<RefCell<Server>>,
    faults: Faults,
    /// The next entry, and the first LSN wanted.
    next: usize,
    from: Lsn,
    described: bool,
}

impl SimSource {
    pub(crate) fn new(server: Rc<RefCell<Server>>, faults: Faults) -> Self {
        SimSource { server, faults, next: 0, from: Lsn::ZERO, described: false }
    }

    fn fail(&self) -> Result<(), SourceError> {
        if self.faults.strike() { Err(SourceError::Unavailable("simulated".into())) } else { Ok(()) }
    }

    fn deliver_edit(
        &self,
        edit: &RowEdit,
        lsn: Lsn,
        deliver: &mut dyn FnMut(WalEvent<'_>) -> Result<(), RelayError>,
    ) -> Result<(), RelayError> {
        let row = |id: i64, value: &str| TupleBuf::new([Datum::Text(&id.to_string()), Datum::Text(value)]);
        match edit {
            RowEdit::Insert { table, id, value } => {
                let new = row(*id, value);
                let change = RowChange::Insert { new: new.as_tuple() };
                deliver(WalEvent::Row { lsn, relation: *table, change })
            }
            RowEdit::Update { table, old, new } => {
                let (old, new) = (row(old.0, &old.1), row(new.0, &new.1));
                let change = RowChange::Update { old: Some(old.as_tuple()), new: new.as_tuple() };
                deliver(WalEvent::Row { lsn, relation: *table, change })
            }
            RowEdit::Delete { table, id, value } => {
                let old = row(*id, value);
                let change = RowChange::Delete { old: old.as_tuple() };
                deliver(WalEvent::Row { lsn, relation: *table, change })
            }
            RowEdit::Truncate { tables } => deliver(WalEvent::Truncate { lsn, relations: tables }),
            RowEdit::Message => {
                deliver(WalEvent::Message { lsn, transactional: true, prefix: "millrace", content: b"x" })
            }
        }
    }
}

impl Source for SimSource {
    fn busy(&mut self) -> Result<bool, SourceError> {
        Ok(false)
    }

    fn take_over(&mut self) -> Result<(), SourceError> {
        Ok(())
    }

    fn state(&mut self, _: &Timeline) -> Result<SourceState, SourceError> {
        let server = self.server.borrow();
        Ok(SourceState {
            confirmed_flush: server.confirmed_flush,
            flush_lsn: server.history.end,
            timeline: Timeline { system_id: "1".into(), timeline: 1 },
            switch_point: None,
            heartbeat: server.heartbeat.clone(),
        })
    }

    fn write_heartbeat(&mut self, heartbeat: &Heartbeat) -> Result<(), SourceError> {
        self.fail()?;
        self.server.borrow_mut().heartbeat = heartbeat.clone();
        self.fail()
    }

    /// Below what was acknowledged the server silently skips forward, as Postgres does. It may send more than it
    /// was asked for.
    fn start(&mut self, from: Lsn) -> Result<(), SourceError> {
        let confirmed = self.server.borrow().confirmed_flush;
        self.from = if self.faults.strike_often() { confirmed } else { from.max(confirmed) };
        self.next = 0;
        self.described = false;
        Ok(())
    }

    fn poll(
        &mut self,
        _: Duration,
        deliver: &mut dyn FnMut(WalEvent<'_>) -> Result<(), RelayError>,
    ) -> Result<bool, RelayError> {
        self.fail()?;
        let server = self.server.clone();
        let server = server.borrow();
        let last = server.history.entries.len().min(self.next + self.faults.up_to(4));
        let arrived = last > self.next;
        for entry in &server.history.entries[self.next..last] {
            self.next += 1;
            match entry {
                Entry::Noise { end_lsn } if *end_lsn >= self.from => {
                    deliver(WalEvent::Keepalive {
                        wal_end: *end_lsn,
                        reply_requested: self.faults.strike_often(),
                    })?;
                }
                Entry::Message { lsn } if *lsn >= self.from => {
                    deliver(WalEvent::Message {
                        lsn: *lsn,
                        transactional: false,
                        prefix: "app",
                        content: b"m",
                    })?;
                }
                Entry::Transaction { commit_lsn, end_lsn, xid, edits } if *commit_lsn >= self.from => {
                    let (commit_lsn, xid) = (*commit_lsn, *xid);
                    deliver(WalEvent::Begin { commit_lsn, commit_time_us: 0, xid })?;
                    if !self.described || self.faults.strike_often() {
                        self.described = true;
                        TABLES.iter().try_for_each(|table| deliver(WalEvent::Relation(schema(*table))))?;
                    }
                    for edit in edits {
                        self.fail()?;
                        self.deliver_edit(edit, commit_lsn, deliver)?;
                    }
                    deliver(WalEvent::Commit { commit_lsn, end_lsn: *end_lsn })?;
                }
                _ => {}
            }
        }
        Ok(arrived)
    }

    fn acknowledge(&mut self, confirmed: Confirmed) -> Result<(), SourceError> {
        let mut server = self.server.borrow_mut();
        server.confirmed_flush = server.confirmed_flush.max(confirmed.lsn());
        Ok(())
    }
}
