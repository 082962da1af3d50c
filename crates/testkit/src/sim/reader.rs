//! The source as a reader sees it: a slot on the simulated WAL.

use std::cell::RefCell;
use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use change::{Datum, Description, Key, Lsn, Read, Refusal, Snapshot, TableSchema, Timeline, TupleBuf};
use relay::{
    Announced, AnnouncedColumn, Confirmed, Described, Heartbeat, Publication, PublishedTable, ReadRequest,
    RelayError, Round, RoundEvent, RowChange, Source, SourceError, SourceState, TABLES_CHANGED, Unchanged,
    WalEvent,
};

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
    /// The next entry, what of it was delivered, and the first LSN wanted.
    next: usize,
    delivered: usize,
    from: Lsn,
    described: bool,
    /// What the last look found, and whether it was so when that was asked last.
    looked: Option<Catalog>,
    unchanged: bool,
}

/// What a look finds; see [`SimSource::catalog`].
type Catalog = (u32, bool, [Description; 2]);

impl SimSource {
    pub(crate) fn new(server: Rc<RefCell<Server>>, faults: Faults) -> Self {
        SimSource {
            server,
            faults,
            next: 0,
            delivered: 0,
            from: Lsn::ZERO,
            described: false,
            looked: None,
            unchanged: false,
        }
    }

    fn fail(&self) -> Result<(), SourceError> {
        if self.faults.strike() { Err(SourceError::Unavailable("simulated".into())) } else { Ok(()) }
    }

    /// How often the publication was altered, whether the second table is published, and what rows mean.
    fn catalog(history: &History) -> Catalog {
        (history.altered(), history.published_visibly(), TABLES.map(|table| history.description(table)))
    }

    /// A publication that leaves something out is refused until it is altered back.
    fn whole(&self, history: &History) -> Result<(), SourceError> {
        match history.altered() % 2 {
            0 => Ok(()),
            _ => Err(SourceError::Unavailable("the publication leaves something out".into())),
        }
    }

    fn deliver_edit(
        &self,
        edit: &RowEdit,
        lsn: Lsn,
        deliver: &mut dyn FnMut(WalEvent<'_>) -> Result<(), RelayError>,
    ) -> Result<(), RelayError> {
        match edit {
            RowEdit::Insert { table, id, value } => {
                let new = row(*id, Datum::Text(value));
                let change = RowChange::Insert { new: new.as_tuple() };
                deliver(WalEvent::Row { lsn, relation: *table, change })
            }
            RowEdit::Update { table, old, new } => {
                let full = *table == TABLES[0];
                let before = row(old.0, if full { Datum::Text(&old.1) } else { Datum::Null });
                let value = if old.1 == new.1 { Datum::Unchanged } else { Datum::Text(&new.1) };
                let after = row(new.0, value);
                let old = (full || old.0 != new.0).then(|| before.as_tuple());
                let change = RowChange::Update { old, new: after.as_tuple() };
                deliver(WalEvent::Row { lsn, relation: *table, change })
            }
            RowEdit::Delete { table, id, value } => {
                let full = *table == TABLES[0];
                let old = row(*id, if full { Datum::Text(value) } else { Datum::Null });
                let change = RowChange::Delete { old: old.as_tuple() };
                deliver(WalEvent::Row { lsn, relation: *table, change })
            }
            RowEdit::Truncate { tables } => deliver(WalEvent::Truncate { lsn, relations: tables }),
            // The next change of the table tells of it.
            RowEdit::Retype | RowEdit::Alter => Ok(()),
            RowEdit::Message | RowEdit::Publish => {
                let prefix = if matches!(edit, RowEdit::Publish) { TABLES_CHANGED } else { "millrace" };
                deliver(WalEvent::Message { lsn, transactional: true, prefix, content: b"x" })
            }
        }
    }
}

fn announced(schema: &TableSchema) -> Announced {
    let columns = schema.columns.iter().map(|column| AnnouncedColumn {
        name: column.name.clone(),
        type_oid: column.type_oid,
        modifier: -1,
        key: column.key.is_some(),
    });
    Announced {
        relation: schema.relation,
        schema: schema.schema.clone(),
        table: schema.table.clone(),
        identity: schema.identity,
        columns: columns.collect(),
    }
}

fn published(history: &History, relation: u32) -> PublishedTable {
    PublishedTable {
        relation,
        name: format!("public.t{relation}"),
        root: None,
        publication: relation + 1,
        estimated_rows: -1,
        description: history.description(relation),
        filled: true,
    }
}

fn row(id: i64, value: Datum<'_>) -> TupleBuf {
    TupleBuf::new([Datum::Text(&id.to_string()), value])
}

fn id(key: &Key) -> i64 {
    key[0].parse().expect("a key of the simulator")
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
        let mut server = self.server.borrow_mut();
        server.heartbeat = heartbeat.clone();
        server.history.beat();
        drop(server);
        self.fail()
    }

    /// Below what was acknowledged the server silently skips forward, as Postgres does. It may send more than it
    /// was asked for.
    fn start(&mut self, from: Lsn) -> Result<(), SourceError> {
        let confirmed = self.server.borrow().confirmed_flush;
        self.from = if self.faults.strike_often() { confirmed } else { from.max(confirmed) };
        (self.next, self.delivered) = (0, 0);
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
        let mut budget = if self.faults.strike_often() { 1 } else { self.faults.up_to(30) };
        let arrived = self.next < server.history.entries.len() && budget > 0;
        while let Some(entry) = server.history.entries.get(self.next).filter(|_| budget > 0) {
            match entry {
                Entry::Noise { end_lsn } if *end_lsn >= self.from => {
                    deliver(WalEvent::Keepalive {
                        wal_end: *end_lsn,
                        reply_requested: self.faults.strike_often(),
                    })?;
                }
                Entry::Message { lsn } if *lsn > self.from => {
                    deliver(WalEvent::Message {
                        lsn: *lsn,
                        transactional: false,
                        prefix: "app",
                        content: b"m",
                    })?;
                }
                Entry::Transaction { commit_lsn, end_lsn, xid, published, retyped, lossy, edits }
                    if *commit_lsn >= self.from =>
                {
                    let tables = &TABLES[usize::from(*lossy)..1 + usize::from(*published)];
                    let (commit_lsn, xid) = (*commit_lsn, *xid);
                    if self.delivered == 0 {
                        deliver(WalEvent::Begin { commit_lsn, commit_time_us: 0, xid })?;
                    }
                    for (place, edit) in edits.iter().enumerate().skip(self.delivered) {
                        if budget == 0 {
                            return Ok(true);
                        }
                        budget -= 1;
                        let before = |edit: &&RowEdit| matches!(edit, RowEdit::Retype);
                        let retyped = retyped + edits[..place].iter().filter(before).count() as u32;
                        let describe = !std::mem::replace(&mut self.described, true);
                        for table in tables {
                            if describe || self.faults.strike_often() || edit.touches(*table) {
                                deliver(WalEvent::Relation(announced(&schema(*table, retyped))))?;
                            }
                        }
                        if let Some(edit) = edit.published(tables) {
                            self.fail()?;
                            self.deliver_edit(&edit, commit_lsn, deliver)?;
                        }
                        self.delivered = place + 1;
                    }
                    deliver(WalEvent::Commit { commit_lsn, end_lsn: *end_lsn })?;
                }
                _ => {}
            }
            budget = budget.saturating_sub(1);
            self.next += 1;
            self.delivered = 0;
        }
        if self.next == server.history.entries.len() {
            deliver(WalEvent::Keepalive { wal_end: server.history.end, reply_requested: false })?;
        }
        Ok(arrived)
    }

    fn published(&mut self) -> Result<Publication, SourceError> {
        self.fail()?;
        let history = &mut self.server.borrow_mut().history;
        // The catalog goes on changing between two questions.
        let settled = !history.hides_a_change();
        self.looked = Some(Self::catalog(history));
        self.faults.grow_between(history);
        self.whole(history)?;
        let xmin = 1 + history.altered();
        self.faults.grow_between(history);
        let count = if history.published_visibly() { 2 } else { 1 };
        let tables: Vec<PublishedTable> =
            TABLES[..count].iter().map(|table| published(history, *table)).collect();
        self.faults.grow_between(history);
        Ok(Publication { tables, unfit: None, xmin, until: history.end, settled })
    }

    fn ask_unchanged(&mut self) {
        let history = &mut self.server.borrow_mut().history;
        let settled = !history.hides_a_change();
        self.faults.grow_between(history);
        self.unchanged = settled && self.looked == Some(Self::catalog(history));
    }

    fn unchanged(&mut self) -> Result<Unchanged, SourceError> {
        self.fail()?;
        Ok(Unchanged { unchanged: self.unchanged, took: Duration::ZERO })
    }

    fn absence(&mut self, _: u32, _: &str) -> Result<Option<Refusal>, SourceError> {
        Ok(None)
    }

    fn describe(&mut self, announced: &Announced, xid: u32) -> Result<Option<Described>, SourceError> {
        self.fail()?;
        let history = &mut self.server.borrow_mut().history;
        self.whole(history)?;
        if history.locks_out(xid) {
            return Ok(None);
        }
        self.faults.grow_between(history);
        let retyped = u32::from(announced.columns[1].type_oid == 1043);
        Ok(Some(Described {
            schema: schema(announced.relation, retyped),
            outdated: false,
            published: Some(published(history, announced.relation)),
            xmin: 1 + history.altered(),
        }))
    }

    fn visible(&mut self) -> Result<Snapshot, SourceError> {
        self.fail()?;
        Ok(self.server.borrow().history.snapshot(false))
    }

    fn read(
        &mut self,
        tables: &[ReadRequest],
        _: u64,
        accept: &mut dyn FnMut(&Snapshot) -> bool,
        deliver: &mut dyn FnMut(RoundEvent<'_>) -> Result<(), RelayError>,
    ) -> Result<Round, RelayError> {
        self.fail()?;
        let (snapshot, rows, until, descriptions, retyped) = {
            let mut server = self.server.borrow_mut();
            server.history.unlock();
            let snapshot = server.history.snapshot(false);
            let descriptions = TABLES.map(|table| (table, server.history.description(table)));
            let retyped = server.history.retyped;
            let rows = server.history.seen_by(&snapshot);
            // The world goes on while a round is read.
            self.faults.grow(&mut server.history);
            (snapshot, rows, server.history.end, BTreeMap::from(descriptions), retyped)
        };
        if !accept(&snapshot) {
            return Ok(Round::NotNow("simulated".into()));
        }
        for table in tables.iter().filter(|table| table.after.is_some() || !table.keys.is_empty()) {
            let before = table.description.as_ref();
            if let Some(why) = before.and_then(|before| descriptions[&table.relation].breaks(before)) {
                return Ok(Round::Broken(table.relation, why));
            }
        }
        let mut budget = self.faults.up_to(8);
        for ReadRequest { relation, after, only_keys, keys, .. } in tables {
            let schema = schema(*relation, retyped);
            deliver(RoundEvent::Table { schema, description: Box::new(descriptions[relation].clone()) })?;
            let mut give = |id: i64, value: &str| {
                self.fail()?;
                deliver(RoundEvent::Row(row(id, Datum::Text(value)).as_tuple()))
            };
            for id in keys.iter().map(id) {
                if let Some(value) = rows.get(&(*relation, id)) {
                    give(id, value)?;
                }
            }
            let after = after.as_ref().map_or(i64::MIN, |key| id(key) + 1);
            let mut last = None;
            let mut range = rows.range((*relation, after)..=(*relation, i64::MAX));
            let end = loop {
                if *only_keys {
                    break Read::All;
                }
                match (budget, range.next()) {
                    (_, None) => break Read::All,
                    (0, Some(_)) => {
                        break last.map_or(Read::Nothing, |id: i64| Read::UpTo(vec![id.to_string()]));
                    }
                    (_, Some(((_, id), value))) => {
                        give(*id, value)?;
                        last = Some(*id);
                        budget -= 1;
                    }
                }
            };
            let end = match (end, after) {
                (Read::Nothing, after) if after > i64::MIN => Read::UpTo(vec![(after - 1).to_string()]),
                (end, _) => end,
            };
            deliver(RoundEvent::End(end))?;
        }
        Ok(Round::Taken { snapshot, until })
    }

    fn compare(&mut self, _: u32, keys: &[Key], bound: &Key) -> Result<Option<Vec<Ordering>>, SourceError> {
        self.fail()?;
        Ok(Some(keys.iter().map(|key| id(key).cmp(&id(bound))).collect()))
    }

    fn acknowledge(&mut self, confirmed: Confirmed) -> Result<(), SourceError> {
        let mut server = self.server.borrow_mut();
        server.confirmed_flush = server.confirmed_flush.max(confirmed.lsn());
        Ok(())
    }
}
