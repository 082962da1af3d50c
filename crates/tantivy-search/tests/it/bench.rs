//! A table, its log as the reader would write it, and a sink that is driven as the worker drives it.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use change::{
    ChangeStamp, Column, Datum, Encoder, Event, Kind, Lsn, Op, Oversize, Position, RecordBatch,
    RelationEncoder, ReplicaIdentity, SchemaRef, TableSchema, Tuple, TupleBuf, header,
};
use serde_json::Value;
use tantivy_search::{IndexDefinition, Indexes, Options, SearchSink};
use worker::{Change, Checkpoint, LogBatch, Move, Sink, SinkError, Stored};

pub(crate) const INT8: u32 = 20;
pub(crate) const TEXT: u32 = 25;
pub(crate) const BOOL: u32 = 16;
pub(crate) const TIMESTAMPTZ: u32 = 1184;
pub(crate) const NUMERIC: u32 = 1700;
pub(crate) const FLOAT8: u32 = 701;

/// A table of text form: `id! int8` is a key column.
pub(crate) fn table(columns: &[(&str, u32)]) -> Arc<TableSchema> {
    let column = |(place, (name, type_oid)): (u16, &(&str, u32))| Column {
        name: name.trim_end_matches('!').to_owned(),
        type_oid: *type_oid,
        type_name: format!("type {type_oid}"),
        key: name.ends_with('!').then_some(place),
        collation: None,
        number: None,
        recorded: None,
    };
    Arc::new(TableSchema {
        relation: 16384,
        root: None,
        schema: "public".into(),
        table: "emails".into(),
        identity: ReplicaIdentity::Default,
        columns: (1..).zip(columns).map(column).collect(),
    })
}

pub(crate) fn emails() -> Arc<TableSchema> {
    table(&[
        ("id!", INT8),
        ("folder", TEXT),
        ("subject", TEXT),
        ("body", TEXT),
        ("is_read", BOOL),
        ("size", NUMERIC),
        ("sent_at", TIMESTAMPTZ),
    ])
}

pub(crate) fn definition() -> IndexDefinition {
    let names = |names: &[&str]| names.iter().map(|name| name.to_string()).collect();
    IndexDefinition {
        name: "emails".into(),
        schema: "public".into(),
        table: "emails".into(),
        text: names(&["subject", "body"]),
        exact: names(&["folder", "is_read"]),
        number: names(&["size"]),
        date: names(&["sent_at"]),
    }
}

pub(crate) fn start_of(definition: &IndexDefinition) -> Checkpoint {
    Checkpoint {
        log: "the log".into(),
        generation: 1,
        next_offset: 0,
        lsn: Lsn::ZERO,
        definition: definition.hash(),
        ready: false,
        skipped: Vec::new(),
        last: None,
        stopped: None,
    }
}

/// A value of a row: `~` is NULL, `?` is unchanged TOAST, anything else is text.
fn datum(text: &str) -> Datum<'_> {
    match text {
        "~" => Datum::Null,
        "?" => Datum::Unchanged,
        text => Datum::Text(text),
    }
}

pub(crate) fn row(values: &[&str]) -> TupleBuf {
    TupleBuf::new(values.iter().map(|text| datum(text)))
}

/// Bytes of a record, from which on columns are left out of it.
pub(crate) const RECORD_MAX: usize = 1 << 20;

pub(crate) struct Bench {
    pub(crate) indexes: Arc<Indexes>,
    pub(crate) sink: SearchSink,
    pub(crate) schema: Arc<TableSchema>,
    relation: RelationEncoder,
    encoder: Encoder,
    pub(crate) at: Checkpoint,
    next: (i64, u64),
    /// Whether changes that are refused are left out, as the operator said.
    pub(crate) skips: bool,
}

impl Bench {
    pub(crate) fn new(directory: &Path) -> Bench {
        Bench::of(directory, definition(), emails())
    }

    /// Opens the directory, and empties the index when the sink says that it must be.
    pub(crate) fn of(directory: &Path, definition: IndexDefinition, schema: Arc<TableSchema>) -> Bench {
        let start = start_of(&definition);
        let indexes = Indexes::new(vec![definition]).unwrap();
        let options = Options { heap_bytes: 15_000_000, ..Options::new(directory) };
        let sink = SearchSink::new(&indexes, options).unwrap();
        let tables = [(schema.schema.clone(), schema.table.clone())].into();
        let encoder = Encoder::new("mailbox", "app").omitting(Oversize { record_max: RECORD_MAX, tables });
        let relation = encoder.relation(SchemaRef { relation: 16384, version: 1 }, &schema);
        let (at, next, skips) = (start, (0, 0), false);
        let mut bench = Bench { indexes, sink, schema, relation, encoder, at, next, skips };
        bench.load();
        bench
    }

    /// As the worker does when it starts and after an error.
    pub(crate) fn load(&mut self) -> Stored {
        let stored = self.sink.load().unwrap().remove(0);
        match &stored {
            Stored::At(checkpoint) => self.at = checkpoint.clone(),
            _ => {
                self.at = Checkpoint { definition: self.at.definition.clone(), ..start_of(&definition()) };
                self.sink.reset(0, &self.at).unwrap();
            }
        }
        self.next = (self.at.next_offset, self.at.lsn.0);
        stored
    }

    pub(crate) fn alter(&mut self, schema: Arc<TableSchema>) {
        self.relation = self.encoder.relation(SchemaRef { relation: 16384, version: 2 }, &schema);
        self.schema = schema;
    }

    pub(crate) fn insert(&mut self, values: &[&str]) {
        self.send(Op::Create, None, Some(&row(values)), None).unwrap();
    }

    pub(crate) fn update(&mut self, values: &[&str]) {
        self.send(Op::Update, None, Some(&row(values)), None).unwrap();
    }

    pub(crate) fn delete(&mut self, values: &[&str]) {
        self.send(Op::Delete, Some(&row(values)), None, None).unwrap();
    }

    /// An update of the key: the old row dies, the new one is born.
    pub(crate) fn rekey(&mut self, old: &[&str], new: &[&str]) {
        self.delete(old);
        self.send(Op::Create, None, Some(&row(new)), Some(&row(old))).unwrap();
    }

    pub(crate) fn truncate(&mut self) {
        self.send(Op::Truncate, None, None, None).unwrap();
    }

    /// Writes a change as the reader does, reads it as the worker does, and gives it to the sink.
    pub(crate) fn send(
        &mut self,
        op: Op,
        before: Option<&TupleBuf>,
        after: Option<&TupleBuf>,
        previous_key: Option<&TupleBuf>,
    ) -> Result<(), SinkError> {
        let (offset, lsn) = (self.next.0, self.next.1 + 8);
        self.next = (offset + 1, lsn);
        let position = Position { lsn: Lsn(lsn), kind: Kind::Transaction, ordinal: 0 };
        let stamp = ChangeStamp {
            position,
            lsn: Lsn(lsn),
            last_commit_lsn: Lsn::ZERO,
            xid: Some(7),
            commit_time_us: 0,
            total_order: 1,
            collection_order: 1,
            now_us: 0,
        };
        let mut records = RecordBatch::default();
        let (before, after) = (before.map(as_tuple), after.map(as_tuple));
        let images = change::RowImages { op, before, after, previous_key: previous_key.map(as_tuple) };
        self.encoder.row(&mut records, &self.relation, &stamp, images).unwrap();
        let record = records.iter().next().unwrap();
        let mut log = LogBatch::default();
        let headers = [
            (header::UNCHANGED, record.unchanged),
            (header::OMITTED, record.omitted),
            (header::PREVIOUS_KEY, record.previous_key),
        ];
        let headers = headers.into_iter().filter(|(_, content)| !content.is_empty());
        log.push(offset, record.key, record.value, headers).unwrap();
        let record = log.get(0);
        let change = Change {
            offset,
            position,
            schema: &self.schema,
            key: record.key,
            event: Event::decode(record.value).unwrap(),
            unchanged: record.unchanged,
            omitted: record.omitted,
            previous_key: record.previous_key,
        };
        let applied = self.sink.apply(0, &change);
        if applied.is_err() && self.skips { self.sink.skip(0, &change) } else { applied }
    }

    /// Commits what was sent, ready.
    pub(crate) fn commit(&mut self) {
        self.try_commit().unwrap();
    }

    pub(crate) fn try_commit(&mut self) -> Result<(), SinkError> {
        let to =
            Checkpoint { next_offset: self.next.0, lsn: Lsn(self.next.1), ready: true, ..self.at.clone() };
        self.sink.commit(&[Some(Move { from: self.at.clone(), to: to.clone() })])?;
        self.at = to;
        Ok(())
    }

    /// Records of other tables pass by.
    pub(crate) fn pass(&mut self, records: i64) {
        self.next = (self.next.0 + records, self.next.1 + 8 * records as u64);
    }
}

fn as_tuple(row: &TupleBuf) -> Tuple<'_> {
    row.as_tuple()
}

/// The API on a real socket, for as long as it lives.
pub(crate) struct Server {
    address: SocketAddr,
    agent: ureq::Agent,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<io::Result<()>>>,
}

impl Server {
    pub(crate) fn start(indexes: &Arc<Indexes>) -> Server {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let indexes = indexes.clone();
        let thread = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener)?;
                let shutdown = async { drop(stopped.await) };
                tantivy_search::serve(listener, indexes, shutdown).await
            })
        });
        let agent = ureq::Agent::config_builder().http_status_as_error(false).build().new_agent();
        Server { address, agent, stop: Some(stop), thread: Some(thread) }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn get(&self, path: &str) -> (u16, Value) {
        let url = format!("http://{}{path}", self.address);
        answer(self.agent.get(url).call().unwrap())
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        self.post_text(path, &body.to_string())
    }

    pub(crate) fn post_text(&self, path: &str, body: &str) -> (u16, Value) {
        let url = format!("http://{}{path}", self.address);
        answer(self.agent.post(url).header("content-type", "application/json").send(body).unwrap())
    }

    /// The ids of the hits of a search, in order.
    pub(crate) fn hits(&self, body: Value) -> Vec<i64> {
        let (status, answer) = self.post("/indexes/emails/search", &body);
        assert_eq!(status, 200, "{body}: {answer}");
        answer["hits"].as_array().unwrap().iter().map(|hit| hit["id"].as_i64().unwrap()).collect()
    }

    pub(crate) fn stop(mut self) -> io::Result<()> {
        drop(self.stop.take());
        self.thread.take().unwrap().join().unwrap()
    }
}

fn answer(mut response: ureq::http::Response<ureq::Body>) -> (u16, Value) {
    let text = response.body_mut().read_to_string().unwrap();
    let json = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error} in {text}"));
    (response.status().as_u16(), json)
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
    }
}
