//! From the source's events to records: positions, order numbers, schema versions.
//!
//! The records of the last change are held back while their transaction is open, because only the commit tells
//! that they are its last, and the last record carries the commit mark. So a Kafka transaction that splits a
//! source transaction ends before that change.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use change::{
    ChangeStamp, Clock, Encoder, Key, Kind, LedgerEntry, Lsn, NEW_LOG, Op, Position, RecordBatch, Refusal,
    RelationEncoder, RowImages, SchemaRef, Snapshot, Split, TableSchema, Tuple,
};
use xxhash_rust::xxh3::Xxh3;

use crate::resume::{Cursor, Plan, split_differs};
use crate::snapshot::{KeyOrder, Reading, Verdict};
use crate::{Announced, Described, RelayError, RowChange, SourceError, WalEvent};

/// Messages whose prefix starts so are Millrace's own and not for the log.
const OWN_PREFIX: &str = "millrace";

/// The prefix of the message in the transaction that changes the publication. Its content lists what is taken out:
/// `RELATION/ROW` for each table, by the object ids of the table and of its row in `pg_publication_rel`, blanks between.
pub const TABLES_CHANGED: &str = "millrace.tables";

/// The prefix of the message in the log that tells of a partition of which rows are still to be read.
const PARTITION_UNREAD: &str = "millrace.partition";

/// Changes of a transaction between two looks at the clock.
const CHANGES_PER_LOOK: u64 = 64;

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
    schema: TableSchema,
    /// Whether the log's ledger has this version of it, or will have it with the next commit.
    used: bool,
    encoder: RelationEncoder,
    key_order: KeyOrder,
    /// Place of its order numbers, which partitions share with their root: in the log they are one table.
    order: usize,
}

/// Events of a table in a transaction.
#[derive(Clone, Copy, Debug, Default)]
struct Order {
    transaction: u64,
    events: u64,
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
    /// As of one of the last [`CHANGES_PER_LOOK`] changes, microseconds since the epoch.
    now_us: i64,
    total_order: u64,
    messages: u64,
    /// Records made of it so far, sent ones included.
    records: u64,
    /// Ordinal and digest of the last change that made records; it is held back.
    held: Option<(u64, u64)>,
    /// The same of the one before: where a split would be.
    released: Option<(u64, u64)>,
    /// Tables that were described in it and compared with what the log has of them.
    compared: BTreeSet<u32>,
}

#[derive(Debug)]
pub(crate) struct Assembler {
    encoder: Encoder,
    cursor: Cursor,
    relations: HashMap<u32, Relation>,
    /// The last transaction's order numbers, and at which place those of a table are.
    orders: (Vec<Order>, HashMap<u32, usize>),
    /// The newest version of every relation, and those that the ledger does not have yet.
    versions: BTreeMap<u32, (SchemaRef, TableSchema)>,
    new_schemas: Vec<(SchemaRef, TableSchema)>,
    open: Option<OpenTransaction>,
    /// What the source knows of the table that the next event announces.
    described: Option<Described>,
    transactions: u64,
    last_commit_lsn: Lsn,
    end_lsn: Lsn,
    /// The stream has come to this LSN, at or above `end_lsn` with nothing of ours between.
    stream_lsn: Lsn,
    position: Position,
    batch: RecordBatch,
    held_records: usize,
    /// Which changes are left to the snapshot.
    pub(crate) reading: Reading,
}

impl Assembler {
    pub(crate) fn new(
        encoder: Encoder,
        cursor: Cursor,
        schemas: &BTreeMap<SchemaRef, TableSchema>,
        reach: Reach,
        reading: Reading,
    ) -> Self {
        // Ascending, so that the last version of a relation stays.
        let versions = schemas.iter().map(|(at, schema)| (at.relation, (*at, schema.clone()))).collect();
        Assembler {
            encoder,
            cursor,
            relations: HashMap::new(),
            orders: Default::default(),
            versions,
            new_schemas: Vec::new(),
            open: None,
            described: None,
            transactions: 0,
            last_commit_lsn: reach.end_lsn.max(reach.position.lsn),
            end_lsn: reach.end_lsn,
            stream_lsn: reach.end_lsn,
            position: reach.position,
            batch: RecordBatch::default(),
            held_records: 0,
            reading,
        }
    }

    /// Takes in one event.
    pub(crate) fn take(&mut self, event: WalEvent<'_>, clock: &dyn Clock) -> Result<(), RelayError> {
        match event {
            WalEvent::Begin { commit_lsn, commit_time_us, xid } => {
                self.begin(commit_lsn, commit_time_us, xid)?;
            }
            WalEvent::Relation(announced) => self.relation(&announced)?,
            WalEvent::Row { lsn, relation, change } => self.row(lsn, relation, change, clock)?,
            WalEvent::Truncate { lsn, relations } => self.truncate(lsn, relations, clock)?,
            WalEvent::Message { lsn, transactional, prefix, content } => {
                self.message(lsn, transactional, prefix, content, clock)?;
            }
            WalEvent::Commit { commit_lsn, end_lsn } => {
                self.commit(commit_lsn, end_lsn)?;
                self.tell_gaps(clock.now_us());
            }
            // After a reconnect a keepalive may speak of less than is known.
            // While the rest of a split transaction is awaited, it alone may move the end.
            WalEvent::Keepalive { wal_end, .. } if self.open.is_none() && self.cursor.split().is_none() => {
                self.stream_lsn = self.stream_lsn.max(wal_end);
            }
            WalEvent::Keepalive { .. } => {}
        }
        Ok(())
    }

    /// How far the stream has come. What of it came without a change may hold DDL that no event told, so the log follows
    /// only after a look at the catalog: see [`follow`](Self::follow).
    pub(crate) fn stream_lsn(&self) -> Lsn {
        self.stream_lsn
    }

    /// Nothing that concerns us was committed below this LSN of the stream, but for what was assembled.
    pub(crate) fn follow(&mut self, stream_lsn: Lsn) {
        debug_assert!(stream_lsn <= self.stream_lsn, "the log does not overtake the stream");
        self.end_lsn = self.end_lsn.max(stream_lsn);
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
        // The rest of a split transaction is the next that the server is asked for. No store shows that LSN before it.
        let end_lsn = if split.is_some() { self.stream_lsn } else { self.end_lsn };
        Reach { end_lsn, position, split }
    }

    /// The records, and how many of them are not held back.
    pub(crate) fn ready(&self) -> (&RecordBatch, usize) {
        (&self.batch, self.batch.len() - self.held_records)
    }

    /// Forgets what [`ready`](Self::ready) gave: it was sent.
    pub(crate) fn sent(&mut self) {
        self.batch.keep_last(self.held_records);
    }

    /// What the ledger does not have yet.
    pub(crate) fn new_entries(&self) -> impl Iterator<Item = LedgerEntry> {
        let schemas = self.new_schemas.iter().map(|(at, schema)| LedgerEntry::Schema(*at, schema.clone()));
        schemas.chain(self.reading.entries())
    }

    /// Before the ledger is told how far the log has come.
    pub(crate) fn settle(&mut self) {
        if let Some(split) = self.reach().split {
            self.reading.settle(Some(split.ordinal));
        }
    }

    /// The ledger has it now.
    pub(crate) fn entries_committed(&mut self) {
        self.new_schemas.clear();
        self.reading.committed();
    }

    /// Whether the stream stands between two source transactions.
    pub(crate) fn between(&self) -> bool {
        self.open.is_none() && self.cursor.split().is_none()
    }

    /// The first position of a round that is read now. A message may stand above the end, and a round there already.
    pub(crate) fn begin_round(&self) -> Position {
        let above = self.position.kind != Kind::Transaction;
        let lsn = if above { self.end_lsn.max(self.position.lsn) } else { self.end_lsn };
        let ordinal = if (self.position.lsn, self.position.kind) == (lsn, Kind::Round) {
            self.position.ordinal + 1
        } else {
            0
        };
        Position { lsn, kind: Kind::Round, ordinal }
    }

    /// What a round's rows of this table are written with. The stream's rows go on under the version that the stream has
    /// come to.
    pub(crate) fn round_table(&mut self, mut schema: TableSchema) -> Result<RelationEncoder, RelayError> {
        self.name_as_known(&mut schema);
        let (at, new) = self.version(&schema)?;
        if new {
            self.use_version(at, &schema);
        }
        let encoder = self.encoder.relation(at, &schema);
        let renamed = match self.relations.get(&schema.relation) {
            Some(known) if known.schema.root != schema.root => known.schema.named_as(&schema),
            _ => return Ok(encoder),
        };
        // A partition that was described before the catalog showed whose it is.
        self.describe(renamed)?;
        Ok(encoder)
    }

    /// Ends the tables in the log of which it holds rows that count no more.
    pub(crate) fn end_stale(&mut self, visible: &Snapshot, now_us: i64) -> Result<(), RelayError> {
        let mut position = self.begin_round();
        let mut ended = BTreeSet::new();
        for relation in self.reading.end_stale(visible) {
            // What was never described has no rows there; a partitioned table's are its partitions'.
            let partition = || self.versions.values().find(|(_, known)| known.root == Some(relation));
            let Some((at, schema)) = self.versions.get(&relation).or_else(partition) else { continue };
            if !ended.insert(schema.family()) {
                continue;
            }
            let encoder = self.encoder.relation(*at, schema);
            self.round_row(&encoder, position, None, now_us)?;
            position.ordinal += 1;
        }
        if !ended.is_empty() {
            self.end_round();
        }
        Ok(())
    }

    /// The table begins again: its key cannot be compared any more with that up to which it was read.
    pub(crate) fn begin_again(&mut self, relation: u32, why: &str) {
        self.reading.begin_again(relation, self.ordinal(), why);
        if self.open.is_none() {
            self.reading.settle(None);
        }
    }

    /// Takes in a row of a round, or a table's end (`None`).
    pub(crate) fn round_row(
        &mut self,
        relation: &RelationEncoder,
        position: Position,
        row: Option<Tuple<'_>>,
        now_us: i64,
    ) -> Result<(), RelayError> {
        let stamp = self.stamp_of_round(position, now_us);
        match row {
            Some(row) => {
                let images = RowImages { op: Op::Read, before: None, after: Some(row), previous_key: None };
                let encoded = self.encoder.row(&mut self.batch, relation, &stamp, images);
                encoded.map_err(|e| protocol(e.to_string()))?;
            }
            None => self.encoder.truncate(&mut self.batch, relation, &stamp),
        }
        self.position = position;
        // It may be the round's last, which carries the mark.
        self.held_records = 1;
        Ok(())
    }

    fn stamp_of_round(&self, position: Position, now_us: i64) -> ChangeStamp {
        ChangeStamp {
            position,
            lsn: position.lsn,
            last_commit_lsn: self.last_commit_lsn,
            xid: None,
            commit_time_us: now_us,
            total_order: 0,
            collection_order: 0,
            now_us,
        }
    }

    /// Tells the stores of tables of which the log lacks something now that it had or should have.
    pub(crate) fn tell_gaps(&mut self, now_us: i64) -> bool {
        let gaps = self.reading.new_gaps();
        for family in &gaps {
            let version = self.versions.values().find(|(_, known)| known.family() == *family);
            // Of a table that was never described the log has no row, and no store knows it.
            let Some((at, schema)) = version else { continue };
            let encoder = self.encoder.relation(*at, schema);
            let position = self.begin_round();
            let stamp = self.stamp_of_round(position, now_us);
            self.encoder.table_message(&mut self.batch, &encoder, &stamp, PARTITION_UNREAD);
            self.position = position;
            self.end_round();
        }
        !gaps.is_empty()
    }

    /// The round has no more rows.
    pub(crate) fn end_round(&mut self) {
        self.batch.mark_commit(self.end_lsn);
        self.held_records = 0;
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
            now_us: 0,
            total_order: 0,
            messages: 0,
            records: 0,
            held: None,
            released,
            compared: BTreeSet::new(),
        });
        Ok(())
    }

    fn commit(&mut self, commit_lsn: Lsn, end_lsn: Lsn) -> Result<(), RelayError> {
        let open = self.open.take().filter(|open| open.commit_lsn == commit_lsn);
        let open =
            open.ok_or_else(|| protocol(format!("COMMIT at {commit_lsn} of a transaction not open")))?;
        self.held_records = 0;
        self.reading.settle(None);
        if open.plan == Plan::Skip {
            return Ok(());
        }
        if open.records > 0 {
            self.batch.mark_commit(end_lsn);
        } else if let Plan::From { ordinal: 1.., .. } = open.plan {
            return Err(split_differs(commit_lsn, open.ordinal).into());
        }
        self.stream_lsn = self.stream_lsn.max(end_lsn);
        if open.ordinal == 0 {
            // Older servers announce the end of transactions without changes, which may be DDL.
            return Ok(());
        }
        self.last_commit_lsn = end_lsn;
        self.end_lsn = self.end_lsn.max(end_lsn);
        let ordinal = open.held.map_or(0, |(ordinal, _)| ordinal);
        self.position = Position { lsn: commit_lsn, kind: Kind::Transaction, ordinal };
        Ok(())
    }

    /// The table of the next event, as the source described it when it was asked for it.
    fn relation(&mut self, announced: &Announced) -> Result<(), RelayError> {
        let relation = announced.relation;
        let described = self.described.take().filter(|described| described.schema.relation == relation);
        let mut described =
            described.ok_or_else(|| protocol(format!("relation {relation} was not described")))?;
        let newest = self.versions.get(&relation).map(|(_, newest)| newest);
        // While the table is read, the newest version may be a round's, which is ahead of the stream.
        let streamed = self.relations.get(&relation).map(|known| &known.schema);
        let streamed = streamed.or(newest.filter(|_| self.reading.whole(relation)));
        if let (Some(streamed), Some(published)) = (streamed, &described.published) {
            described.schema = described.schema.numbered_since(streamed, &published.description);
        }
        if let Some(newest) = newest.filter(|_| described.outdated) {
            described.schema = described.schema.completed_from(newest);
        }
        let breaks = |known: Option<&TableSchema>| described.schema.breaks(known?);
        // Against the newest as well: a round may have begun the table again since the stream told of it.
        // If columns are swapped, or one has another type, is written, and all is as before, only the stream shows it.
        let broken = breaks(newest).filter(|_| breaks(streamed).is_some());
        self.name_as_known(&mut described.schema);
        self.reading.announced(&described, self.xid());
        if let Some(open) = self.open.as_mut().filter(|open| open.plan != Plan::Skip) {
            let first = open.compared.insert(relation);
            let compared = if first { self.reading.compare(&described)? } else { None };
            if let Some(why) = compared.or(broken) {
                self.reading.begin_again(relation, self.ordinal(), &why);
            }
        }
        self.reading.rekeyed(relation, &described.schema.key_signature(), self.ordinal());
        self.describe(described.schema)
    }

    /// A table keeps the name that it has in the log, whatever it is called for a while: its object id is what is published.
    fn name_as_known(&self, schema: &mut TableSchema) {
        let relation = schema.relation;
        match self.versions.get(&relation) {
            // Whose partition it is was asked now, and it may have been detached since.
            Some((_, known))
                if schema.root == known.root
                    || (schema.root.is_none() && self.reading.is_partition(relation)) =>
            {
                *schema = schema.named_as(known);
            }
            Some(_) => {}
            None => {
                if let Some((namespace, table)) = self.reading.log_name(relation) {
                    (schema.schema, schema.table) = (namespace, table);
                }
            }
        }
    }

    /// What the stream's rows of a table are written with.
    fn describe(&mut self, schema: TableSchema) -> Result<(), RelayError> {
        let (at, new) = self.version(&schema)?;
        let encoder = self.encoder.relation(at, &schema);
        let (orders, places) = &mut self.orders;
        let order = *places.entry(schema.family()).or_insert_with(|| {
            orders.push(Order::default());
            orders.len() - 1
        });
        let key_order = KeyOrder::of(&schema);
        self.relations.insert(schema.relation, Relation { schema, used: !new, encoder, key_order, order });
        Ok(())
    }

    /// The table's version that looks like this, and whether the ledger lacks it. A version reaches the ledger with its first
    /// record: of a table whose changes are all left out it may be described before much is known of it.
    fn version(&self, schema: &TableSchema) -> Result<(SchemaRef, bool), RelayError> {
        let relation = schema.relation;
        let name = (&schema.schema, &schema.table);
        let another =
            |known: &TableSchema| known.family() != schema.family() && (&known.schema, &known.table) == name;
        if self.versions.values().any(|(_, known)| another(known)) {
            let what =
                format!("{} is another table than the one whose rows the log holds", schema.full_name());
            return Err(Refusal::new(what, NEW_LOG).into());
        }
        Ok(match self.versions.get(&relation) {
            Some((at, known)) if known == schema => (*at, false),
            known => {
                let version = known.map_or(1, |(at, _)| at.version + 1);
                (SchemaRef { relation, version }, true)
            }
        })
    }

    fn use_version(&mut self, at: SchemaRef, schema: &TableSchema) {
        self.versions.insert(at.relation, (at, schema.clone()));
        self.new_schemas.push((at, schema.clone()));
    }

    /// The first record under a table's version is about to be made.
    fn use_relation(&mut self, relation: u32) -> Result<(), RelayError> {
        let known = self.relations.get_mut(&relation).ok_or_else(|| unknown_relation(relation))?;
        if !std::mem::replace(&mut known.used, true) {
            let schema = known.schema.clone();
            // A round may have made the same one since.
            let (at, new) = self.version(&schema)?;
            if new {
                self.use_version(at, &schema);
            }
            let encoder = self.encoder.relation(at, &schema);
            self.relations.entry(relation).and_modify(|known| known.encoder = encoder);
        }
        Ok(())
    }

    /// The table that this event announces, and the transaction: the source is to describe it.
    pub(crate) fn to_describe<'e>(&self, event: &'e WalEvent<'_>) -> Option<(&'e Announced, u32)> {
        match event {
            WalEvent::Relation(announced) if self.described.is_none() => Some((announced, self.xid())),
            _ => None,
        }
    }

    /// What [`to_describe`](Self::to_describe) asked for.
    pub(crate) fn described(&mut self, described: Described) {
        self.described = Some(described);
    }

    /// Whether it is known what becomes of the event. It is not where only Postgres can compare a row's key with the key
    /// up to which its table was read, or describe the table that it announces.
    pub(crate) fn decided(&self, event: &WalEvent<'_>) -> bool {
        if self.to_describe(event).is_some() {
            return false;
        }
        self.questions(event).is_none_or(|(relation, known, keys)| {
            keys.iter().all(|key| self.reading.decided(relation, &known.key_order, key))
        })
    }

    /// The keys of a row's change that [`decided`](Self::decided) looks at.
    pub(crate) fn undecided(&self, event: &WalEvent<'_>) -> Vec<(u32, Key)> {
        let undecided = |(relation, known, keys): (u32, &Relation, Vec<Key>)| {
            let keys = keys.into_iter().filter(|key| !self.reading.decided(relation, &known.key_order, key));
            keys.map(|key| (relation, key)).collect()
        };
        self.questions(event).map(undecided).unwrap_or_default()
    }

    fn questions(&self, event: &WalEvent<'_>) -> Option<(u32, &Relation, Vec<Key>)> {
        let WalEvent::Row { relation, change, .. } = event else { return None };
        if !self.reading.active() || self.reading.bounds(*relation).next().is_none() {
            return None;
        }
        let known = self.relations.get(relation)?;
        let halves = halves(&known.encoder, *change);
        let keys = halves.iter().flatten().filter_map(|images| key_of(&known.encoder, images));
        Some((*relation, known, keys.collect()))
    }

    fn row(
        &mut self,
        lsn: Lsn,
        relation: u32,
        change: RowChange<'_>,
        clock: &dyn Clock,
    ) -> Result<(), RelayError> {
        let known = self.relations.get(&relation).ok_or_else(|| unknown_relation(relation))?;
        let mut halves = halves(&known.encoder, change);
        let count = halves.iter().flatten().count() as u64;
        if self.reading.active() && !self.reading.settled(relation) && self.is_new() {
            if self.reading.ends(relation, self.ordinal()) {
                self.reading.left_out(relation, self.xid());
                return self.end_rows(lsn, &[relation], count, || digest(relation, change), clock);
            }
            self.judge(relation, &mut halves)?;
        }
        let records = halves.iter().flatten().count() as u64;
        self.pass_over(relation, if self.is_new() { count - records } else { count })?;
        let Some(mut stamp) = self.change(lsn, (count, records), || digest(relation, change), clock)? else {
            return Ok(());
        };
        self.use_relation(relation)?;
        for images in halves.into_iter().flatten() {
            self.number(&mut stamp, relation)?;
            let known = self.relations.get(&relation).ok_or_else(|| unknown_relation(relation))?;
            self.encoder
                .row(&mut self.batch, &known.encoder, &stamp, images)
                .map_err(|e| protocol(e.to_string()))?;
        }
        Ok(())
    }

    /// Whether the next change of the open transaction is not in the log yet.
    fn is_new(&self) -> bool {
        self.open.as_ref().is_some_and(
            |open| matches!(open.plan, Plan::From { ordinal: first, .. } if open.ordinal >= first),
        )
    }

    fn xid(&self) -> u32 {
        self.open.as_ref().map_or(0, |open| open.xid)
    }

    /// That of the open transaction's next change.
    fn ordinal(&self) -> u64 {
        self.open.as_ref().map_or(0, |open| open.ordinal)
    }

    /// Takes away the halves of a row's change that are left to the snapshot.
    fn judge(&mut self, relation: u32, halves: &mut [Option<RowImages<'_>>; 2]) -> Result<(), RelayError> {
        let xid = self.xid();
        let known = self.relations.get(&relation).ok_or_else(|| unknown_relation(relation))?;
        let mut owed = None;
        let mut alive = false;
        for half in halves.iter_mut() {
            let Some(images) = half else { continue };
            let key = key_of(&known.encoder, images);
            let verdict = self.reading.judge(relation, &known.key_order, key.as_ref(), xid);
            let verdict =
                verdict.ok_or_else(|| protocol(format!("a key of relation {relation} is undecided")))?;
            match (verdict, images.after, images.previous_key) {
                // The row that died under its old key is not in the log: what it held cannot be taken from there.
                (Verdict::Publish, Some(new), Some(old))
                    if !alive && known.encoder.lacks_values(new, old) =>
                {
                    owed = key;
                    *half = None;
                }
                (Verdict::Publish, ..) => alive = true,
                (Verdict::LeaveOut, ..) => {
                    *half = None;
                    self.reading.left_out(relation, xid);
                }
            }
        }
        if let Some(key) = owed {
            self.reading.left_out(relation, xid);
            self.reading.owe(relation, key, self.ordinal())?;
        }
        Ok(())
    }

    fn truncate(&mut self, lsn: Lsn, relations: &[u32], clock: &dyn Clock) -> Result<(), RelayError> {
        let digest = || {
            let mut hash = Xxh3::new();
            relations.iter().for_each(|relation| hash.update(&relation.to_be_bytes()));
            hash.digest()
        };
        let mut ended = Vec::new();
        let mut families = BTreeSet::new();
        for relation in relations {
            let known = self.relations.get(relation).ok_or_else(|| unknown_relation(*relation))?;
            if families.insert(known.schema.family()) {
                ended.push(*relation);
            }
            if self.is_new() && self.reading.has_others(*relation, relations) {
                // What ends its rows ends theirs.
                self.reading.begin_again(*relation, self.ordinal(), "a partition was emptied");
                self.reading.left_out(*relation, self.xid());
            }
        }
        if self.reading.active() && self.is_new() {
            let (xid, ordinal) = (self.xid(), self.ordinal());
            for relation in relations {
                self.reading.ends(*relation, ordinal);
                self.reading.truncated(*relation, xid);
            }
        }
        self.end_rows(lsn, &ended, relations.len() as u64, digest, clock)
    }

    /// The open transaction's next change, which has `count` events, ends the rows of these tables in the log.
    fn end_rows(
        &mut self,
        lsn: Lsn,
        relations: &[u32],
        count: u64,
        digest: impl FnOnce() -> u64,
        clock: &dyn Clock,
    ) -> Result<(), RelayError> {
        if !self.is_new() {
            relations.iter().try_for_each(|relation| self.pass_over(*relation, 1))?;
        }
        let counts = (count, relations.len() as u64);
        let Some(mut stamp) = self.change(lsn, counts, digest, clock)? else { return Ok(()) };
        for relation in relations {
            self.use_relation(*relation)?;
            self.number(&mut stamp, *relation)?;
            let known = self.relations.get(relation).ok_or_else(|| unknown_relation(*relation))?;
            self.encoder.truncate(&mut self.batch, &known.encoder, &stamp);
            if self.reading.begins_again(*relation) {
                self.batch.mark_anew();
            }
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
        if prefix == TABLES_CHANGED {
            self.reading.republished([self.xid()]);
            if self.is_new() {
                for (relation, publication) in taken_out(content) {
                    self.reading.withdrawn(relation, publication, self.ordinal());
                }
            }
        }
        if transactional {
            let digest = || {
                let mut hash = Xxh3::new();
                hash.update(prefix.as_bytes());
                hash.update(content);
                hash.digest()
            };
            // Counted even when it is ours: ordinals are those of the stream.
            let count = u64::from(!own);
            let Some(mut stamp) = self.change(lsn, (count, count), digest, clock)? else { return Ok(()) };
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

    /// Counts one change of the open transaction, which has `count` events of which `records` become records. Gives the
    /// stamp to make them with, or nothing when the log has them already or there are none to make. The order numbers
    /// count the others too, so that they do not depend on what a snapshot had read.
    fn change(
        &mut self,
        lsn: Lsn,
        (count, records): (u64, u64),
        digest: impl FnOnce() -> u64,
        clock: &dyn Clock,
    ) -> Result<Option<ChangeStamp>, RelayError> {
        let open =
            self.open.as_mut().ok_or_else(|| protocol(format!("change at {lsn} outside a transaction")))?;
        let ordinal = open.ordinal;
        if ordinal.is_multiple_of(CHANGES_PER_LOOK) {
            open.now_us = clock.now_us();
        }
        open.ordinal += 1;
        let Plan::From { ordinal: first, digest: expected } = open.plan else { return Ok(None) };
        if ordinal < first {
            open.total_order += count;
            if ordinal + 1 == first && digest() != expected {
                return Err(split_differs(open.commit_lsn, ordinal).into());
            }
            return Ok(None);
        }
        open.total_order += count - records;
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
            now_us: open.now_us,
        }))
    }

    /// Gives the next event of the open transaction its order numbers.
    fn number(&mut self, stamp: &mut ChangeStamp, relation: u32) -> Result<(), RelayError> {
        if let Some(open) = &mut self.open {
            open.total_order += 1;
            stamp.total_order = open.total_order;
        }
        stamp.collection_order = self.count(relation, 1)?;
        Ok(())
    }

    /// Counts events of the open transaction of which nothing is written.
    fn pass_over(&mut self, relation: u32, events: u64) -> Result<(), RelayError> {
        if events > 0 {
            self.count(relation, events)?;
        }
        Ok(())
    }

    /// Counts events of a table, and gives how many the open transaction has had.
    fn count(&mut self, relation: u32, events: u64) -> Result<u64, RelayError> {
        let known = self.relations.get(&relation).ok_or_else(|| unknown_relation(relation))?;
        let transaction = self.open.as_ref().map_or(0, |open| open.number);
        let order = &mut self.orders.0[known.order];
        if order.transaction != transaction {
            *order = Order { transaction, events: 0 };
        }
        order.events += events;
        Ok(order.events)
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

/// The key of one half of a change; `None` for a table without a key.
fn key_of(encoder: &RelationEncoder, images: &RowImages<'_>) -> Option<Key> {
    let RowImages { before, after, previous_key, .. } = images;
    let tuple: Tuple<'_> = (*after).or(*before)?;
    encoder.keyed().then(|| encoder.key_of(tuple, (*before).or(*previous_key)))?
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

/// What a message of [`TABLES_CHANGED`] lists.
fn taken_out(content: &[u8]) -> impl Iterator<Item = (u32, u32)> {
    let words = std::str::from_utf8(content).unwrap_or_default().split_ascii_whitespace();
    words.filter_map(|word| {
        let (relation, publication) = word.split_once('/')?;
        Some((relation.parse().ok()?, publication.parse().ok()?))
    })
}

fn unknown_relation(relation: u32) -> RelayError {
    protocol(format!("a change of relation {relation}, which was not described"))
}

/// The source broke the protocol: a new connection starts over from what is durable.
fn protocol(what: String) -> RelayError {
    RelayError::Source(SourceError::Unavailable(what))
}
