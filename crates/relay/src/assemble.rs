//! From the source's events to records: positions, order numbers, schema versions.
//!
//! The records of the last change are held back while their transaction is open, because only the commit tells
//! that they are its last, and the last record carries the commit mark. So a Kafka transaction that splits a
//! source transaction ends before that change.

use std::collections::{BTreeMap, HashMap};

use change::{
    ChangeStamp, Clock, Encoder, Kind, Lsn, NEW_LOG, Op, Position, RecordBatch, Refusal, RelationEncoder,
    RowImages, SchemaRef, Split, TableSchema,
};
use xxhash_rust::xxh3::Xxh3;

use crate::resume::{Cursor, Plan, split_differs};
use crate::{RelayError, RowChange, SourceError, WalEvent};

/// Messages whose prefix starts so are Millrace's own and not for the log.
const OWN_PREFIX: &str = "millrace";

/// How far the assembled records reach.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Reach {
    /// Everything committed below this LSN has been assembled.
    pub(crate) end_lsn: Lsn,
    /// The last change that is not held back.
    pub(crate) position: Position,
    /// The open transaction, when some of its changes are not held back.
    pub(crate) split: Option<Split>,
}

#[derive(Debug)]
struct Relation {
    encoder: RelationEncoder,
    /// Events of this table in the current transaction, and which transaction that was.
    order: (u64, u64),
}

#[derive(Debug)]
struct OpenTransaction {
    /// Distinguishes transactions within this session.
    number: u64,
    commit_lsn: Lsn,
    commit_time_us: i64,
    xid: u32,
    plan: Plan,
    /// Changes seen so far: the next one's ordinal.
    ordinal: u64,
    total_order: u64,
    messages: u64,
    /// Records made of it so far, sent ones included.
    records: u64,
    /// Ordinal and digest of the last change that made records; it is held back.
    held: Option<(u64, u64)>,
    /// The same of the one before: where a split would be.
    released: Option<(u64, u64)>,
}

#[derive(Debug)]
pub(crate) struct Assembler {
    encoder: Encoder,
    cursor: Cursor,
    relations: HashMap<u32, Relation>,
    /// The newest version of every relation, and those that the ledger does not have yet.
    versions: BTreeMap<u32, (SchemaRef, TableSchema)>,
    new_schemas: Vec<(SchemaRef, TableSchema)>,
    open: Option<OpenTransaction>,
    transactions: u64,
    last_commit_lsn: Lsn,
    end_lsn: Lsn,
    position: Position,
    batch: RecordBatch,
    held_records: usize,
}

impl Assembler {
    pub(crate) fn new(
        encoder: Encoder,
        cursor: Cursor,
        schemas: &BTreeMap<SchemaRef, TableSchema>,
        reach: Reach,
    ) -> Self {
        // Ascending, so that the last version of a relation stays.
        let versions = schemas.iter().map(|(at, schema)| (at.relation, (*at, schema.clone()))).collect();
        Assembler {
            encoder,
            cursor,
            relations: HashMap::new(),
            versions,
            new_schemas: Vec::new(),
            open: None,
            transactions: 0,
            last_commit_lsn: reach.end_lsn.max(reach.position.lsn),
            end_lsn: reach.end_lsn,
            position: reach.position,
            batch: RecordBatch::default(),
            held_records: 0,
        }
    }

    /// Takes in one event.
    pub(crate) fn take(&mut self, event: WalEvent<'_>, clock: &dyn Clock) -> Result<(), RelayError> {
        match event {
            WalEvent::Begin { commit_lsn, commit_time_us, xid } => {
                self.begin(commit_lsn, commit_time_us, xid)?;
            }
            WalEvent::Relation(schema) => self.relation(schema)?,
            WalEvent::Row { lsn, relation, change } => self.row(lsn, relation, change, clock)?,
            WalEvent::Truncate { lsn, relations } => self.truncate(lsn, relations, clock)?,
            WalEvent::Message { lsn, transactional, prefix, content } => {
                self.message(lsn, transactional, prefix, content, clock)?;
            }
            WalEvent::Commit { commit_lsn, end_lsn } => self.commit(commit_lsn, end_lsn)?,
            // After a reconnect a keepalive may speak of less than is known.
            // While the rest of a split transaction is awaited, it alone may move the end.
            WalEvent::Keepalive { wal_end, .. } if self.open.is_none() && self.cursor.split().is_none() => {
                self.end_lsn = self.end_lsn.max(wal_end);
            }
            WalEvent::Keepalive { .. } => {}
        }
        Ok(())
    }

    /// Whether a source transaction is open.
    pub(crate) fn mid_transaction(&self) -> bool {
        self.open.is_some()
    }

    /// Where the log will stand once the records that are not held back are in it.
    pub(crate) fn reach(&self) -> Reach {
        let split = match &self.open {
            Some(OpenTransaction { commit_lsn, released: Some((ordinal, digest)), .. }) => {
                Some(Split { commit_lsn: *commit_lsn, ordinal: *ordinal, digest: *digest })
            }
            Some(_) => None,
            None => self.cursor.split().cloned(),
        };
        let position = match &split {
            Some(split) => {
                Position { lsn: split.commit_lsn, kind: Kind::Transaction, ordinal: split.ordinal }
            }
            None => self.position,
        };
        Reach { end_lsn: self.end_lsn, position, split }
    }

    /// The records, and how many of them are not held back.
    pub(crate) fn ready(&self) -> (&RecordBatch, usize) {
        (&self.batch, self.batch.len() - self.held_records)
    }

    /// Forgets what [`ready`](Self::ready) gave: it was sent.
    pub(crate) fn sent(&mut self) {
        self.batch.keep_last(self.held_records);
    }

    /// Schemas that the ledger does not have yet.
    pub(crate) fn new_schemas(&self) -> &[(SchemaRef, TableSchema)] {
        &self.new_schemas
    }

    /// The ledger has them now.
    pub(crate) fn schemas_committed(&mut self) {
        self.new_schemas.clear();
    }

    fn begin(&mut self, commit_lsn: Lsn, commit_time_us: i64, xid: u32) -> Result<(), RelayError> {
        if self.open.is_some() {
            return Err(protocol(format!("BEGIN of the transaction at {commit_lsn} inside another")));
        }
        let plan = self.cursor.transaction(commit_lsn)?;
        self.transactions += 1;
        let released = match plan {
            Plan::From { ordinal, digest } if ordinal > 0 => Some((ordinal - 1, digest)),
            _ => None,
        };
        self.open = Some(OpenTransaction {
            number: self.transactions,
            commit_lsn,
            commit_time_us,
            xid,
            plan,
            ordinal: 0,
            total_order: 0,
            messages: 0,
            records: 0,
            held: None,
            released,
        });
        Ok(())
    }

    fn commit(&mut self, commit_lsn: Lsn, end_lsn: Lsn) -> Result<(), RelayError> {
        let open = self.open.take().filter(|open| open.commit_lsn == commit_lsn);
        let open =
            open.ok_or_else(|| protocol(format!("COMMIT at {commit_lsn} of a transaction not open")))?;
        self.held_records = 0;
        if open.plan == Plan::Skip {
            return Ok(());
        }
        if open.records > 0 {
            self.batch.mark_commit(end_lsn);
        } else if let Plan::From { ordinal: 1.., .. } = open.plan {
            return Err(split_differs(commit_lsn, open.ordinal).into());
        }
        self.last_commit_lsn = end_lsn;
        self.end_lsn = self.end_lsn.max(end_lsn);
        let ordinal = open.held.map_or(0, |(ordinal, _)| ordinal);
        self.position = Position { lsn: commit_lsn, kind: Kind::Transaction, ordinal };
        Ok(())
    }

    fn relation(&mut self, schema: TableSchema) -> Result<(), RelayError> {
        let relation = schema.relation;
        let name = (&schema.schema, &schema.table);
        let another =
            |known: &TableSchema| known.relation != relation && (&known.schema, &known.table) == name;
        if self.versions.values().any(|(_, known)| another(known)) {
            let what =
                format!("{} is another table than the one whose rows the log holds", schema.full_name());
            return Err(Refusal::new(what, NEW_LOG).into());
        }
        let at = match self.versions.get(&relation) {
            Some((at, known)) if *known == schema => *at,
            known => {
                let version = known.map_or(1, |(at, _)| at.version + 1);
                let at = SchemaRef { relation, version };
                self.versions.insert(relation, (at, schema.clone()));
                self.new_schemas.push((at, schema.clone()));
                at
            }
        };
        let encoder = self.encoder.relation(at, &schema);
        let order = self.relations.get(&relation).map_or((0, 0), |known| known.order);
        self.relations.insert(relation, Relation { encoder, order });
        Ok(())
    }

    fn row(
        &mut self,
        lsn: Lsn,
        relation: u32,
        change: RowChange<'_>,
        clock: &dyn Clock,
    ) -> Result<(), RelayError> {
        let known = self.relations.get(&relation).ok_or_else(|| unknown_relation(relation))?;
        let halves = halves(&known.encoder, change);
        let count = halves.iter().flatten().count() as u64;
        let Some(mut stamp) = self.change(lsn, count, || digest(relation, change), clock)? else {
            return Ok(());
        };
        for images in halves.into_iter().flatten() {
            self.number(&mut stamp, relation)?;
            let known = self.relations.get(&relation).ok_or_else(|| unknown_relation(relation))?;
            self.encoder
                .row(&mut self.batch, &known.encoder, &stamp, images)
                .map_err(|e| protocol(e.to_string()))?;
        }
        Ok(())
    }

    fn truncate(&mut self, lsn: Lsn, relations: &[u32], clock: &dyn Clock) -> Result<(), RelayError> {
        let digest = || {
            let mut hash = Xxh3::new();
            relations.iter().for_each(|relation| hash.update(&relation.to_be_bytes()));
            hash.digest()
        };
        let Some(mut stamp) = self.change(lsn, relations.len() as u64, digest, clock)? else { return Ok(()) };
        for relation in relations {
            self.number(&mut stamp, *relation)?;
            let known = self.relations.get(relation).ok_or_else(|| unknown_relation(*relation))?;
            self.encoder.truncate(&mut self.batch, &known.encoder, &stamp);
        }
        Ok(())
    }

    fn message(
        &mut self,
        lsn: Lsn,
        transactional: bool,
        prefix: &str,
        content: &[u8],
        clock: &dyn Clock,
    ) -> Result<(), RelayError> {
        let own = prefix.starts_with(OWN_PREFIX);
        if transactional {
            let digest = || {
                let mut hash = Xxh3::new();
                hash.update(prefix.as_bytes());
                hash.update(content);
                hash.digest()
            };
            // Counted even when it is ours: ordinals are those of the stream.
            let Some(mut stamp) = self.change(lsn, u64::from(!own), digest, clock)? else { return Ok(()) };
            if let Some(open) = &mut self.open {
                open.total_order += 1;
                open.messages += 1;
                stamp.total_order = open.total_order;
                stamp.collection_order = open.messages;
            }
            self.encoder.message(&mut self.batch, &stamp, prefix, content);
        } else if !own && !self.cursor.has_message(lsn) {
            let position = Position { lsn, kind: Kind::Message, ordinal: 0 };
            let now_us = clock.now_us();
            self.last_commit_lsn = lsn;
            let stamp = ChangeStamp {
                position,
                lsn,
                last_commit_lsn: self.last_commit_lsn,
                xid: None,
                commit_time_us: now_us,
                total_order: 1,
                collection_order: 1,
                now_us,
            };
            self.encoder.message(&mut self.batch, &stamp, prefix, content);
            self.batch.mark_commit(lsn);
            self.position = position;
        }
        Ok(())
    }

    /// Counts one change of the open transaction that makes `records` records. Gives the stamp to make them
    /// with, or nothing when the log has them already or there are none to make.
    fn change(
        &mut self,
        lsn: Lsn,
        records: u64,
        digest: impl FnOnce() -> u64,
        clock: &dyn Clock,
    ) -> Result<Option<ChangeStamp>, RelayError> {
        let open =
            self.open.as_mut().ok_or_else(|| protocol(format!("change at {lsn} outside a transaction")))?;
        let ordinal = open.ordinal;
        open.ordinal += 1;
        let Plan::From { ordinal: first, digest: expected } = open.plan else { return Ok(None) };
        if ordinal < first {
            open.total_order += records;
            if ordinal + 1 == first && digest() != expected {
                return Err(split_differs(open.commit_lsn, ordinal).into());
            }
            return Ok(None);
        }
        if records == 0 {
            return Ok(None);
        }
        open.records += records;
        open.released = open.held.or(open.released);
        open.held = Some((ordinal, digest()));
        self.held_records = records as usize;
        Ok(Some(ChangeStamp {
            position: Position { lsn: open.commit_lsn, kind: Kind::Transaction, ordinal },
            lsn,
            last_commit_lsn: self.last_commit_lsn,
            xid: Some(open.xid),
            commit_time_us: open.commit_time_us,
            total_order: 0,
            collection_order: 0,
            now_us: clock.now_us(),
        }))
    }

    /// Gives the next event of the open transaction its order numbers.
    fn number(&mut self, stamp: &mut ChangeStamp, relation: u32) -> Result<(), RelayError> {
        let known = self.relations.get_mut(&relation).ok_or_else(|| unknown_relation(relation))?;
        if let Some(open) = &mut self.open {
            open.total_order += 1;
            stamp.total_order = open.total_order;
            if known.order.0 != open.number {
                known.order = (open.number, 0);
            }
        }
        known.order.1 += 1;
        stamp.collection_order = known.order.1;
        Ok(())
    }
}

/// The records to make of a row's change: a changed key is a death and a birth, everything else one record.
fn halves<'a>(relation: &RelationEncoder, change: RowChange<'a>) -> [Option<RowImages<'a>>; 2] {
    let one = |op, before, after| [Some(RowImages { op, before, after, previous_key: None }), None];
    match change {
        RowChange::Insert { new } => one(Op::Create, None, Some(new)),
        RowChange::Delete { old } => one(Op::Delete, Some(old), None),
        RowChange::Update { old: Some(old), new } if !relation.same_key(old, new) => [
            Some(RowImages { op: Op::Delete, before: Some(old), after: None, previous_key: None }),
            Some(RowImages { op: Op::Create, before: None, after: Some(new), previous_key: Some(old) }),
        ],
        RowChange::Update { old, new } => one(Op::Update, old, Some(new)),
    }
}

fn digest(relation: u32, change: RowChange<'_>) -> u64 {
    let (kind, old, new) = match change {
        RowChange::Insert { new } => (b'I', None, Some(new)),
        RowChange::Update { old, new } => (b'U', old, Some(new)),
        RowChange::Delete { old } => (b'D', Some(old), None),
    };
    let mut hash = Xxh3::new();
    hash.update(&relation.to_be_bytes());
    hash.update(&[kind]);
    for tuple in [old, new] {
        let bytes = tuple.map_or(&[][..], |tuple| tuple.as_bytes());
        hash.update(&(bytes.len() as u64).to_be_bytes());
        hash.update(bytes);
    }
    hash.digest()
}

fn unknown_relation(relation: u32) -> RelayError {
    protocol(format!("a change of relation {relation}, which was not described"))
}

/// The source broke the protocol: a new connection starts over from what is durable.
fn protocol(what: String) -> RelayError {
    RelayError::Source(SourceError::Unavailable(what))
}
