use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use change::{
    ChangeStamp, Column, Datum, Encoder, Kind, Lsn, Op, Position, RecordBatch, ReplicaIdentity, SchemaRef,
    TableSchema, Tuple, TupleBuf,
};
use testkit::services::{Postgres, Session};
use tokio::runtime::Runtime;
use verify::{
    Counter, CounterStore, Difference, DocumentStore, Documents, From, Index, Log, NotVerified, Observer,
    Part, Source, StoreError, Verified, Verifier,
};
use worker::{Checkpoint, LogBatch, LogRecord};

const TABLE: &str = "CREATE TABLE mails (id bigint PRIMARY KEY, user_id bigint, folder text, is_read boolean,
    size integer, at timestamptz, day date, body text); ALTER TABLE mails REPLICA IDENTITY FULL";

pub(crate) type Row = Vec<Option<String>>;

/// A real Postgres with one table, and a log that the test writes.
pub(crate) struct Rig {
    pub(crate) postgres: Postgres,
    pub(crate) session: Session,
    pub(crate) runtime: Runtime,
    pub(crate) table: TableSchema,
    pub(crate) log: Journal,
}

impl Rig {
    pub(crate) fn new() -> Self {
        let postgres = Postgres::start_with(&[("timezone", "UTC"), ("max_prepared_transactions", "5")]);
        let session = postgres.session("postgres");
        session.sql(TABLE);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let table = table(&session);
        let log = Journal::new(&table);
        Rig { postgres, session, runtime: runtime.expect("a runtime"), table, log }
    }

    pub(crate) fn source_as(&self, role: &str) -> Source {
        let mut config = self.postgres.session_config("postgres");
        config.user(role);
        let (client, connection) =
            self.runtime.block_on(config.connect(tokio_postgres::NoTls)).expect("connects");
        self.runtime.spawn(connection);
        Source::new(self.runtime.handle().clone(), client).expect("a source")
    }

    /// Where a store stands that has all of the log.
    pub(crate) fn checkpoint(&self) -> Checkpoint {
        let lsn = self.session.sql("SELECT pg_current_wal_insert_lsn()")[0][0].clone().expect("an LSN");
        Checkpoint {
            log: "log".into(),
            generation: 1,
            next_offset: self.log.end(),
            lsn: lsn.parse().expect("an LSN"),
            definition: "definition".into(),
            ready: true,
            skipped: Vec::new(),
            last: None,
            stopped: None,
        }
    }

    /// The row of a mail as the stream would send it.
    pub(crate) fn row(&self, id: u64) -> Row {
        row(&self.session, id)
    }

    /// Commits statements as one transaction of their own; the log gets what `write` makes of its xid.
    pub(crate) fn commit(&self, statements: &str, write: impl FnOnce(&Journal, u32)) {
        let xid =
            xid(&self.session.sql(&format!("BEGIN; SELECT pg_current_xact_id(); {statements}; COMMIT")));
        write(&self.log, xid);
    }

    pub(crate) fn verify(
        &self,
        verify: impl FnOnce(&mut Verifier<'_>) -> Result<Verified, NotVerified>,
    ) -> (Result<Verified, NotVerified>, Vec<Difference>) {
        self.verify_over(&self.source_as("postgres"), verify)
    }

    pub(crate) fn verify_over(
        &self,
        source: &Source,
        verify: impl FnOnce(&mut Verifier<'_>) -> Result<Verified, NotVerified>,
    ) -> (Result<Verified, NotVerified>, Vec<Difference>) {
        let mut found = Found(Vec::new());
        let mut log = self.log.clone();
        let result = verify(&mut Verifier::new(source, &mut log, &mut found, Duration::from_secs(2)));
        (result, found.0)
    }
}

/// A connection to the server, for a transaction that a test holds open.
pub(crate) fn row(session: &Session, id: u64) -> Row {
    session.sql(&format!("SELECT * FROM mails WHERE id = {id}")).into_iter().next().expect("the row")
}

/// The xid that a batch of statements asked for first.
pub(crate) fn xid(rows: &[Row]) -> u32 {
    rows[0][0].as_deref().and_then(|text| text.parse::<u64>().ok()).expect("an xid") as u32
}

struct Found(Vec<Difference>);

impl Observer for Found {
    fn difference(&mut self, difference: Difference) {
        self.0.push(difference);
    }
}

fn table(session: &Session) -> TableSchema {
    let rows = session.sql(
        "SELECT attname, atttypid, format_type(atttypid, atttypmod) FROM pg_attribute
         WHERE attrelid = 'mails'::regclass AND attnum > 0 ORDER BY attnum",
    );
    let text = |row: &Row, place: usize| row[place].clone().expect("not null");
    let column = |row: &Row| Column {
        name: text(row, 0),
        type_oid: text(row, 1).parse().expect("an oid"),
        type_name: text(row, 2),
        key: (text(row, 0) == "id").then_some(1),
        collation: None,
        number: None,
        recorded: None,
    };
    let relation = session.sql("SELECT 'mails'::regclass::oid")[0][0].clone().expect("an oid");
    TableSchema {
        relation: relation.parse().expect("an oid"),
        root: None,
        schema: "public".into(),
        table: "mails".into(),
        identity: ReplicaIdentity::Full,
        columns: rows.iter().map(column).collect(),
    }
}

/// A log in memory.
#[derive(Clone)]
pub(crate) struct Journal {
    inner: Rc<RefCell<Records>>,
    table: TableSchema,
}

#[derive(Default)]
struct Records {
    batch: LogBatch,
    times: Vec<i64>,
    /// Offset of the first record that retention has left.
    start: i64,
}

impl Journal {
    fn new(table: &TableSchema) -> Self {
        Journal { inner: Rc::default(), table: table.clone() }
    }

    pub(crate) fn end(&self) -> i64 {
        self.inner.borrow().times.len() as i64
    }

    pub(crate) fn remove_below(&self, offset: i64) {
        self.inner.borrow_mut().start = offset;
    }

    pub(crate) fn insert(&self, xid: u32, new: &Row) {
        self.write(xid, now_ms(), Op::Create, None, Some(new), None);
    }

    pub(crate) fn update(&self, xid: u32, old: Option<&Row>, new: &[Datum<'_>]) {
        let old = old.map(tuple);
        let new = TupleBuf::new(new.iter().copied());
        self.write_tuples(xid, now_ms(), Op::Update, old.as_ref(), Some(&new), None);
    }

    pub(crate) fn delete(&self, xid: u32, old: &Row) {
        self.write(xid, now_ms(), Op::Delete, Some(old), None, None);
    }

    pub(crate) fn truncate(&self, xid: u32) {
        self.write(xid, now_ms(), Op::Truncate, None, None, None);
    }

    pub(crate) fn write(
        &self,
        xid: u32,
        time_ms: i64,
        op: Op,
        old: Option<&Row>,
        new: Option<&Row>,
        previous_key: Option<&Row>,
    ) {
        let (old, new, previous_key) = (old.map(tuple), new.map(tuple), previous_key.map(tuple));
        self.write_tuples(xid, time_ms, op, old.as_ref(), new.as_ref(), previous_key.as_ref());
    }

    pub(crate) fn write_tuples(
        &self,
        xid: u32,
        time_ms: i64,
        op: Op,
        old: Option<&TupleBuf>,
        new: Option<&TupleBuf>,
        previous_key: Option<&TupleBuf>,
    ) {
        // Key-only old rows need an encoder that does not take their nulls for values.
        let mut schema = self.table.clone();
        if new.is_some_and(|new| new.as_tuple().iter().any(|datum| datum == Datum::Unchanged)) {
            schema.identity = ReplicaIdentity::Default;
        }
        let mut encoder = Encoder::new("mailbox", "postgres");
        let relation = encoder.relation(SchemaRef { relation: schema.relation, version: 1 }, &schema);
        let offset = self.end();
        let stamp = ChangeStamp {
            position: Position { lsn: Lsn(offset as u64), kind: Kind::Transaction, ordinal: 0 },
            lsn: Lsn(offset as u64),
            last_commit_lsn: Lsn::ZERO,
            xid: Some(xid),
            commit_time_us: time_ms * 1000,
            total_order: 1,
            collection_order: 1,
            now_us: time_ms * 1000,
        };
        let mut batch = RecordBatch::default();
        fn borrow(tuple: Option<&TupleBuf>) -> Option<Tuple<'_>> {
            tuple.map(TupleBuf::as_tuple)
        }
        let images = change::RowImages {
            op,
            before: borrow(old),
            after: borrow(new),
            previous_key: borrow(previous_key),
        };
        encoder.row(&mut batch, &relation, &stamp, images).expect("a row of the table");
        let mut records = self.inner.borrow_mut();
        for record in batch.iter() {
            let mut headers: Vec<(&str, Vec<u8>)> = Vec::new();
            record.headers(&mut Vec::new(), |name, value| headers.push((name, value.to_vec())));
            let headers = headers.iter().map(|(name, value)| (*name, value.as_slice()));
            records.batch.push(offset, record.key, record.value, headers).expect("our own headers");
            records.times.push(time_ms);
        }
    }
}

pub(crate) fn now_ms() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.expect("after 1970").as_millis() as i64
}

fn tuple(row: &Row) -> TupleBuf {
    TupleBuf::new(row.iter().map(|value| value.as_deref().map_or(Datum::Null, Datum::Text)))
}

impl Log for Journal {
    fn id(&self) -> &str {
        "log"
    }

    fn read(
        &mut self,
        from: From,
        end: i64,
        take: &mut dyn FnMut(&LogRecord<'_>) -> Result<(), NotVerified>,
    ) -> Result<(), NotVerified> {
        let records = self.inner.borrow();
        let first = match from {
            From::Beginning => 0,
            From::Offset(offset) => offset,
            From::Time(time) => {
                records.times.iter().position(|at| *at >= time).unwrap_or(records.times.len()) as i64
            }
        };
        if first < records.start {
            return Err(NotVerified::new("the log was partly removed", ""));
        }
        (first..end).try_for_each(|offset| take(&records.batch.get(offset as usize)))
    }
}

/// A counter's query, from what stands after FROM.
pub(crate) fn counter(
    rig: &Rig,
    columns: &[&str],
    groups: usize,
    measure: verify::Measure,
    sql: &'static str,
) -> Counter {
    Counter {
        store: "counters.c".into(),
        definition: "definition".into(),
        table: rig.table.clone(),
        columns: columns.iter().map(|name| name.to_string()).collect(),
        groups,
        measure,
        query: Box::new(move |from| sql.replace("FROM mails", &format!("FROM {from}"))),
    }
}

pub(crate) fn index(rig: &Rig) -> Index {
    Index {
        store: "search.mails".into(),
        definition: "definition".into(),
        table: rig.table.clone(),
        columns: ["user_id", "folder", "is_read", "at", "day", "body"].map(str::to_owned).to_vec(),
    }
}

/// A store: its content, and something that happens when it is first asked where it stands.
pub(crate) struct Store<'a, T> {
    pub(crate) at: Checkpoint,
    pub(crate) content: T,
    pub(crate) then: Option<Box<dyn FnOnce() -> (Checkpoint, T) + 'a>>,
    /// Happens between the first part of a counter and the second.
    pub(crate) between: Option<Box<dyn FnOnce() -> (Checkpoint, T) + 'a>>,
}

impl<'a, T> Store<'a, T> {
    pub(crate) fn new(at: Checkpoint, content: T) -> Self {
        Store { at, content, then: None, between: None }
    }

    /// The store has nothing until it is asked; then this happens.
    pub(crate) fn later(content: T, then: impl FnOnce() -> (Checkpoint, T) + 'a) -> Self {
        let at = Checkpoint {
            log: "log".into(),
            generation: 1,
            next_offset: 0,
            lsn: Lsn::ZERO,
            definition: "definition".into(),
            ready: true,
            skipped: Vec::new(),
            last: None,
            stopped: None,
        };
        Store { at, content, then: Some(Box::new(then)), between: None }
    }

    fn moved(&mut self) -> Option<Checkpoint> {
        if let Some(then) = self.then.take() {
            (self.at, self.content) = then();
        }
        Some(self.at.clone())
    }
}

impl CounterStore for Store<'_, BTreeMap<String, String>> {
    fn checkpoint(&mut self) -> Result<Option<Checkpoint>, StoreError> {
        Ok(self.moved())
    }

    /// Two groups at a time, in their order.
    fn part(&mut self, from: Option<&str>) -> Result<Part, StoreError> {
        if from.is_some()
            && let Some(between) = self.between.take()
        {
            (self.at, self.content) = between();
        }
        let after = |group: &str| from.is_none_or(|from| group > from);
        let rest = self.content.iter().filter(|(group, _)| after(group));
        let groups: Vec<_> = rest.map(|(group, value)| (group.clone(), value.clone())).take(2).collect();
        let next = groups.last().filter(|_| groups.len() == 2).map(|(group, _)| group.clone());
        Ok(Part { checkpoint: Some(self.at.clone()), groups, next })
    }

    fn groups(&mut self, groups: &[String]) -> Result<(Option<Checkpoint>, Vec<Option<String>>), StoreError> {
        let values = groups.iter().map(|group| self.content.get(group).cloned()).collect();
        Ok((Some(self.at.clone()), values))
    }
}

impl DocumentStore for Store<'_, BTreeMap<String, String>> {
    fn checkpoint(&mut self, _wanted: Lsn, _patience: Duration) -> Result<Option<Checkpoint>, StoreError> {
        Ok(self.moved())
    }

    fn fetch(&mut self, ids: &[String]) -> Result<Documents, StoreError> {
        let documents = ids.iter().filter_map(|id| self.content.get(id).cloned()).collect();
        Ok(Documents { checkpoint: self.at.clone(), documents })
    }

    fn page(&mut self, after: Option<&str>, limit: usize, _key: &[&str]) -> Result<Documents, StoreError> {
        let after = |id: &str| after.is_none_or(|after| id > after);
        let documents = self.content.iter().filter(|(id, _)| after(id)).take(limit);
        Ok(Documents { checkpoint: self.at.clone(), documents: documents.map(|(_, d)| d.clone()).collect() })
    }
}
