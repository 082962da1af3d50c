//! Reads rounds of a snapshot: chunks of tables in the order of their keys, by COPY, under one snapshot that several
//! connections share.
//!
//! Every connection has the tables' locks before the snapshot is taken or imported (h24): a TRUNCATE or a rewrite in
//! between would show an older snapshot an empty table. The locks are ACCESS SHARE, as SELECT's are, and last for the
//! round. A chunk is read ahead of what the relay takes, within bounds, so that several connections work at a time; but
//! rows are given in order, and a round that turns out larger than it should be ends after any of its rows.

use std::collections::HashMap;
use std::pin::pin;
use std::time::{Duration, Instant};

use change::{Description, Key, Lsn, Read, Snapshot, TableSchema};
use relay::{ReadRequest, RelayError, Round, RoundEvent, SourceError};
use tokio::runtime::Handle;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Error, Statement};

use crate::catalog;
use crate::config::Target;
use crate::copy::RowReader;
use crate::copy_out::{self, CopyOut, CopySession, Free};
use crate::error::{ConnectionError, failed};
use crate::keys::{self, KeySql};
use crate::plan::{self, quote, quote_literal};
use crate::session::Running;
use crate::tls::Tls;

/// How long a round waits for a table's lock: a statement that rewrites it holds it, or waits for it before us.
const LOCK_TIMEOUT: &str = "2s";
/// How long a connection waits for the locks of all tables of a round, while the stream pauses.
const LOCKS_TIMEOUT: &str = "5s";
/// How long a connection may take for a command, once the locks are there; much more than it needs.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a connection may take to end its part of a round.
const END_TIMEOUT: Duration = Duration::from_secs(1);
/// Connections are kept for so long after a round.
const REST: Duration = Duration::from_secs(30);
/// Rows of a chunk where nothing is known of their size.
const ROWS_FIRST: u64 = 1_000;
/// Rows of a chunk at most.
const ROWS_MAX: u64 = 1_000_000;
/// A round ends after so many times the bytes that it should have.
const OVERRUN: u64 = 2;

/// Connections for rounds, and what earlier rounds have taught.
pub(crate) struct Rounds {
    runtime: Handle,
    target: Target,
    tls: Tls,
    /// Takes the snapshot, and describes what the others read.
    leader: Option<Client>,
    /// What the leader is asked of each table, prepared there.
    description: Option<Statement>,
    readers: Vec<Reader>,
    used: Instant,
    /// Bytes of a row on average, by table.
    row_bytes: HashMap<u32, u64>,
    free: Free,
}

struct Reader {
    /// `None` while it copies.
    session: Option<CopySession>,
    running: Running,
}

/// What a round reads of one table.
struct Table {
    relation: u32,
    /// `ONLY "public"."emails"`
    sql: String,
}

/// What is visible to a statement that begins now, as text.
pub(crate) const VISIBLE: &str = "SELECT pg_catalog.pg_current_snapshot()::text";

/// What is visible to a statement that begins now.
pub(crate) async fn visible(client: &Client) -> Result<Snapshot, SourceError> {
    let row = client.query_one(VISIBLE, &[]).await;
    let row = row.map_err(|error| failed("cannot take a snapshot", &error))?;
    parse(row.get(0))
}

impl Rounds {
    pub(crate) fn new(runtime: &Handle, target: &Target, tls: Tls) -> Self {
        Rounds {
            runtime: runtime.clone(),
            target: target.clone(),
            tls,
            leader: None,
            description: None,
            readers: Vec::new(),
            used: Instant::now(),
            row_bytes: HashMap::new(),
            free: Free::default(),
        }
    }

    /// Has so many connections to the server that read; fewer, but one, where it grants no more.
    pub(crate) fn connect(&mut self, count: usize) -> Result<(), SourceError> {
        self.used = Instant::now();
        if self.leader.as_ref().is_none_or(Client::is_closed) {
            let leader = self.runtime.block_on(catalog::connect_to(&self.target))?;
            let prepared = self.runtime.block_on(leader.prepare(&catalog::description_of("$1")));
            self.description = Some(prepared.map_err(|error| failed("cannot prepare a query", &error))?);
            self.leader = Some(leader);
        }
        self.readers.retain_mut(|reader| reader.session.as_mut().is_some_and(CopySession::rests));
        while self.readers.len() < count.max(1) {
            match CopySession::connect(&self.target) {
                Ok(session) => {
                    let running = session.running();
                    self.readers.push(Reader { session: Some(session), running });
                }
                Err(error) if self.readers.is_empty() => return Err(error.into()),
                Err(error) => {
                    tracing::debug!(%error, "a snapshot goes on with fewer connections");
                    break;
                }
            }
        }
        Ok(())
    }

    /// Gives the connections back when there was no round for a while.
    pub(crate) fn rest(&mut self) {
        if self.used.elapsed() >= REST {
            self.leader = None;
            self.readers.clear();
            self.free = Free::default();
        }
    }

    fn leader(&self) -> Result<&Client, SourceError> {
        let gone = || SourceError::Unavailable("there is no connection to read tables with".into());
        self.leader.as_ref().ok_or_else(gone)
    }

    /// What the leader is asked before rows are read, bounded in time.
    fn ask<T>(&self, query: impl AsyncFnOnce(&Client) -> Result<T, SourceError>) -> Result<T, SourceError> {
        let leader = self.leader()?;
        self.runtime.block_on(catalog::answered("a round of the snapshot", query(leader)))
    }

    /// Has every reader run a command.
    fn command(&mut self, command: &str) -> Result<(), ConnectionError> {
        let sessions = self.readers.iter_mut().filter_map(|reader| reader.session.as_mut());
        sessions.into_iter().try_for_each(|session| session.command(command, COMMAND_TIMEOUT))
    }

    /// Leaves the connections, with whatever runs there.
    fn abandon(&mut self) {
        let readers = std::mem::take(&mut self.readers);
        let leader = self.leader.take();
        self.runtime.block_on(async {
            let cancel = async {
                for Reader { running, .. } in &readers {
                    running.cancel(&self.target).await.map_err(|error| error.to_string())?;
                }
                match leader.map(|leader| leader.cancel_token()) {
                    Some(token) => token.cancel_query(self.tls.clone()).await.map_err(|e| e.to_string()),
                    None => Ok(()),
                }
            };
            let cancelled = tokio::time::timeout(END_TIMEOUT, cancel).await;
            if !matches!(cancelled, Ok(Ok(()))) {
                tracing::debug!("a chunk could not be cancelled; its connection ends with it");
            }
        });
    }

    /// Begins a round: locks, then the snapshot, then the others join it. `Err(reason)` where a lock is not to be had.
    fn begin(&mut self, tables: &[Table]) -> Result<Result<Begun, String>, SourceError> {
        let list: Vec<&str> = tables.iter().map(|table| table.sql.as_str()).collect();
        let list = list.join(", ");
        let begin = format!(
            "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'; \
             SET LOCAL statement_timeout = '{LOCKS_TIMEOUT}'; LOCK TABLE {list} IN ACCESS SHARE MODE; \
             SET LOCAL statement_timeout = 0"
        );
        let at = |error: Error| failed("cannot take a snapshot", &error);
        let led = self.ask(async |leader| Ok(leader.batch_execute(&begin).await))?;
        let led = led.map_err(|error| ConnectionError::from_client("cannot lock the tables to read", &error));
        if let Err(error) = led.and_then(|()| self.command(&begin)) {
            return not_locked(error, &list).map(Err);
        }
        let taken = "SELECT pg_catalog.pg_current_snapshot()::text, pg_catalog.pg_export_snapshot()";
        let row = self.ask(async |leader| leader.query_one(taken, &[]).await.map_err(at))?;
        let snapshot = parse(row.get(0))?;
        self.command(&format!("SET TRANSACTION SNAPSHOT {}", quote_literal(row.get(1))))?;
        let end = "SELECT pg_catalog.pg_current_wal_insert_lsn()::text";
        let row = self.ask(async |leader| leader.query_one(end, &[]).await.map_err(at))?;
        let until: String = row.get(0);
        let until = until.parse().map_err(|error| SourceError::Unavailable(format!("{error}")))?;
        Ok(Ok(Begun { snapshot, until }))
    }

    /// Ends the round's transactions. What still runs there is ended with its connection.
    fn end(&mut self) {
        if let Some(leader) = self.leader.take() {
            let rollback =
                async { tokio::time::timeout(END_TIMEOUT, leader.batch_execute("ROLLBACK")).await };
            if matches!(self.runtime.block_on(rollback), Ok(Ok(()))) {
                self.leader = Some(leader);
            }
        }
        self.readers.retain_mut(|reader| {
            let session = reader.session.as_mut();
            session.is_some_and(|session| session.command("ROLLBACK", END_TIMEOUT).is_ok())
        });
    }
}

/// Why tables are not locked, where that may change.
fn not_locked(error: ConnectionError, list: &str) -> Result<String, SourceError> {
    let Some(server) = error.server_error() else { return Err(error.into()) };
    let state = SqlState::from_code(&server.code);
    match state {
        _ if state == SqlState::QUERY_CANCELED || catalog::locked(&state) => {
            Ok(format!("waiting for the lock of {list}"))
        }
        SqlState::UNDEFINED_TABLE => Ok("a table was dropped".into()),
        SqlState::INSUFFICIENT_PRIVILEGE => {
            let said = &server.message;
            Ok(format!("{said}: GRANT the role SELECT on it (`millrace check` prints how)"))
        }
        _ => Err(error.into()),
    }
}

struct Begun {
    snapshot: Snapshot,
    until: Lsn,
}

/// A part of a table that one connection reads.
struct Chunk {
    /// Which of the readers.
    place: usize,
    copy: CopyOut,
    /// Its rows, unless the table ends before; `None` where nobody knows.
    limit: Option<u64>,
}

/// What the caller of [`read`] is told.
pub(crate) type Deliver<'a> = &'a mut dyn FnMut(RoundEvent<'_>) -> Result<(), RelayError>;

/// Reads a round; see [`relay::Source::read`]. Called on a thread that is not the runtime's.
pub(crate) fn read(
    rounds: &mut Rounds,
    publication: &str,
    requests: &[ReadRequest],
    budget: u64,
    accept: &mut dyn FnMut(&Snapshot) -> bool,
    deliver: Deliver<'_>,
) -> Result<Round, RelayError> {
    ending(rounds, |rounds| {
        let tables = rounds.ask(async |leader| names(leader, requests).await)?;
        if tables.len() < requests.len() {
            return Ok(Round::NotNow("a table was dropped".into()));
        }
        let Begun { snapshot, until } = match rounds.begin(&tables)? {
            Ok(begun) => begun,
            Err(reason) => return Ok(Round::NotNow(reason)),
        };
        if !accept(&snapshot) {
            return Ok(Round::NotNow("waiting for a transaction to become visible".into()));
        }
        let mut described = Vec::new();
        for (table, request) in tables.iter().zip(requests) {
            let Some(prepared) = rounds.description.clone() else {
                return Err(
                    SourceError::Unavailable("there is no connection to read tables with".into()).into()
                );
            };
            let asked = rounds.ask(async |leader| describe(leader, &prepared, publication, table).await);
            let now = match asked? {
                Ok(now) => now,
                Err(reason) => return Ok(Round::NotNow(reason)),
            };
            if let Some(why) = breaks(request, &now) {
                return Ok(Round::Broken(request.relation, why));
            }
            described.push(now);
        }
        // Where the leader has found the operators of the keys, the readers do.
        let path = rounds.ask(search_path)?;
        let same = format!("SELECT pg_catalog.set_config('search_path', {}, true)", quote_literal(&path));
        rounds.command(&same).map_err(SourceError::from)?;
        let mut bytes = 0;
        for ((table, request), described) in tables.iter().zip(requests).zip(described) {
            if bytes >= budget && bytes > 0 {
                break;
            }
            let mut reading = TableReading { rounds, table, budget: (budget - bytes).max(1), bytes: 0 };
            reading.read(request, described, deliver)?;
            bytes += reading.bytes;
        }
        Ok(Round::Taken { snapshot, until })
    })
}

/// Why what was read of a table before cannot be gone on with.
fn breaks(request: &ReadRequest, now: &Described) -> Option<String> {
    if request.after.is_none() && request.keys.is_empty() {
        return None;
    }
    if now.schema.key_signature() != request.key {
        return Some("its rows have another key".to_owned());
    }
    match (&request.description, request.storage) {
        (Some(before), _) => now.description.breaks(before),
        (None, Some(before)) if now.description.storage.rewritten(before) => {
            Some("its rows were rewritten".to_owned())
        }
        (None, _) => None,
    }
}

/// Does a round's work and ends its transactions, whatever came of it.
fn ending(
    rounds: &mut Rounds,
    work: impl FnOnce(&mut Rounds) -> Result<Round, RelayError>,
) -> Result<Round, RelayError> {
    let taken = work(rounds);
    if taken.is_err() {
        rounds.abandon();
    }
    rounds.end();
    taken
}

/// The tables as SQL; fewer than asked for when one was dropped.
async fn names(client: &Client, requests: &[ReadRequest]) -> Result<Vec<Table>, SourceError> {
    let mut tables = Vec::new();
    for ReadRequest { relation, .. } in requests {
        let name = catalog::name_of(client, *relation).await;
        if let Some(name) = name.map_err(|error| failed("cannot look a table up", &error))? {
            tables.push(Table { relation: *relation, sql: name.only() });
        }
    }
    Ok(tables)
}

/// What a table looks like under the round's snapshot.
struct Described {
    schema: TableSchema,
    description: Box<Description>,
    key: KeySql,
}

/// Looks at a table under the round's snapshot; `Err(reason)` where its rows cannot be told rightly now.
async fn describe(
    leader: &Client,
    prepared: &Statement,
    publication: &str,
    table: &Table,
) -> Result<Result<Described, String>, SourceError> {
    let at = |error: &Error| failed("cannot describe a table", error);
    let gone = || SourceError::Unavailable(format!("table {} was dropped or renamed", table.sql));
    let schema = catalog::schema_of(leader, table.relation).await.map_err(|e| at(&e))?;
    // The lock was taken by name.
    let named = |schema: &TableSchema| plan::Table::of(schema).only() == table.sql;
    let mut schema = schema.filter(named).ok_or_else(gone)?;
    catalog::name_by_root(leader, publication, &mut schema).await.map_err(|e| at(&e))?;
    let hides = leader.query_one("SELECT pg_catalog.row_security_active($1::oid)", &[&table.relation]).await;
    if hides.map_err(|e| at(&e))?.get(0) {
        let name = schema.full_name();
        return Ok(Err(format!("row security hides rows of {name} from the role: ALTER ROLE ... BYPASSRLS")));
    }
    let found = catalog::find_operators(leader, &keys::types_of(&schema)).await;
    if let Err(schemas) = found.map_err(|e| at(&e))? {
        return Ok(Err(keys::hidden(&schema.full_name(), &schemas)));
    }
    let json =
        catalog::description(leader, prepared, table.relation).await.map_err(|e| at(&e))?.ok_or_else(gone)?;
    let description = catalog::parse_description(&json)?;
    if description.persistence == "u" {
        let sql = plan::Table { schema: description.schema, name: description.table }.quoted();
        return Ok(Err(format!(
            "{sql} is unlogged, its changes are not in the WAL: ALTER TABLE {sql} SET LOGGED"
        )));
    }
    let key = KeySql::of(leader, &schema).await.map_err(|e| at(&e))?;
    Ok(Ok(Described { schema, description: Box::new(description), key }))
}

/// Where the leader looks for what is named without a schema.
async fn search_path(leader: &Client) -> Result<String, SourceError> {
    let row = leader.query_one("SELECT pg_catalog.current_setting('search_path')", &[]).await;
    Ok(row.map_err(|error| failed("cannot describe a table", &error))?.get(0))
}

struct TableReading<'a> {
    rounds: &'a mut Rounds,
    table: &'a Table,
    budget: u64,
    bytes: u64,
}

impl TableReading<'_> {
    fn read(
        &mut self,
        request: &ReadRequest,
        Described { schema, description, key }: Described,
        deliver: Deliver<'_>,
    ) -> Result<(), RelayError> {
        let places = schema.key_places();
        let columns: Vec<String> = schema.columns.iter().map(|column| quote(&column.name)).collect();
        let select = format!("SELECT {} FROM {}", columns.join(", "), self.table.sql);
        let count = columns.len();
        deliver(RoundEvent::Table { schema, description })?;
        if !request.keys.is_empty() && !key.is_empty() {
            let list: Vec<String> = request.keys.iter().map(|one| key.row_of(one)).collect();
            let sql = format!("{select} WHERE {} IN ({})", key.row(), list.join(", "));
            let chunk = self.chunk(0, sql, None)?;
            self.rows(chunk, count, &[], u64::MAX, deliver)?;
        }
        let end = if request.only_keys {
            Read::All
        } else if key.is_empty() {
            // Nothing tells one part of it from another (h25).
            let chunk = self.chunk(0, select, None)?;
            self.rows(chunk, count, &[], u64::MAX, deliver)?;
            Read::All
        } else {
            self.range(&select, &key, &places, count, request.after.as_ref(), deliver)?
        };
        deliver(RoundEvent::End(end))
    }

    /// Reads the keys after `after` in chunks, one per connection.
    fn range(
        &mut self,
        select: &str,
        key: &KeySql,
        places: &[usize],
        columns: usize,
        after: Option<&Key>,
        deliver: Deliver<'_>,
    ) -> Result<Read, RelayError> {
        let connections = self.rounds.readers.len() as u64;
        let known = self.rounds.row_bytes.get(&self.table.relation);
        let rows =
            known.map_or(ROWS_FIRST, |each| (self.budget / connections / each.max(&1)).clamp(1, ROWS_MAX));
        let borders = self.rounds.runtime.block_on(self.borders(key, after, rows, connections - 1))?;
        let mut lower = after.cloned();
        let mut chunks = Vec::new();
        let uppers = borders.into_iter().map(Some).chain([None]);
        for (place, upper) in uppers.enumerate() {
            let bound =
                |operator: &str, bound: &Key| format!("{} {operator} {}", key.row(), key.row_of(bound));
            let bounds: Vec<String> = lower
                .iter()
                .map(|lower| bound(">", lower))
                .chain(upper.iter().map(|upper| bound("<=", upper)))
                .collect();
            let limit = if upper.is_none() { format!(" LIMIT {rows}") } else { String::new() };
            let sql = format!(
                "{select}{}{} ORDER BY {}{limit}",
                if bounds.is_empty() { "" } else { " WHERE " },
                bounds.join(" AND "),
                key.columns(),
            );
            lower = upper;
            chunks.push(self.chunk(place, sql, Some(rows))?);
        }
        let most = self.budget.saturating_mul(OVERRUN);
        let mut last = after.cloned();
        for chunk in chunks {
            let (count, key, whole) = self.rows(chunk, columns, places, most, deliver)?;
            last = key.or(last);
            if !whole {
                // The rows are larger than those before; what the other connections read is read again.
                self.rounds.abandon();
                break;
            }
            if count < rows {
                return Ok(Read::All);
            }
        }
        Ok(last.map_or(Read::Nothing, Read::UpTo))
    }

    /// The keys that divide what is to be read among the connections: every so many rows, as far as there are.
    async fn borders(
        &self,
        key: &KeySql,
        after: Option<&Key>,
        rows: u64,
        count: u64,
    ) -> Result<Vec<Key>, SourceError> {
        let mut borders: Vec<Key> = Vec::new();
        while (borders.len() as u64) < count {
            let lower = borders.last().or(after);
            let sql = format!(
                "COPY (SELECT {0} FROM {1}{2} ORDER BY {0} OFFSET {3} LIMIT 1) TO STDOUT",
                key.columns(),
                self.table.sql,
                lower
                    .map(|lower| format!(" WHERE {} > {}", key.row(), key.row_of(lower)))
                    .unwrap_or_default(),
                rows - 1
            );
            let line = copy_line(self.rounds.leader()?, &sql).await;
            let Some(line) = line.map_err(|error| failed("cannot divide a table", &error))? else { break };
            let mut reader = RowReader::default();
            let tuple = reader.read(&line, key.len()).map_err(|error| unreadable(&error))?;
            let key = tuple.as_tuple().iter().map(text).collect::<Option<Key>>();
            borders.push(key.ok_or_else(|| SourceError::Unavailable("a key is null".into()))?);
        }
        Ok(borders)
    }

    /// Begins to read on one of the connections.
    fn chunk(&mut self, place: usize, select: String, limit: Option<u64>) -> Result<Chunk, SourceError> {
        let session = self.rounds.readers.get_mut(place).and_then(|reader| reader.session.take());
        let copy = match session {
            Some(session) => session.copy(&select, self.rounds.free.clone()),
            None => Err(std::io::ErrorKind::NotConnected.into()),
        };
        let failed = |error| SourceError::Unavailable(format!("cannot read a table: {error}"));
        Ok(Chunk { place, copy: copy.map_err(failed)?, limit })
    }

    /// Gives the rows of a chunk. Returns their number, the last one's key, and whether these were all.
    fn rows(
        &mut self,
        chunk: Chunk,
        columns: usize,
        key: &[usize],
        most: u64,
        deliver: Deliver<'_>,
    ) -> Result<(u64, Option<Key>, bool), RelayError> {
        let mut reader = RowReader::default();
        let (mut rows, mut last) = (0, None);
        let begun = self.bytes;
        while let Ok(piece) = chunk.copy.pieces.recv() {
            let piece = piece.map_err(SourceError::from)?;
            let mut messages = &piece[..];
            while let Some((line, rest)) = copy_out::row(messages) {
                messages = rest;
                let tuple = reader.read(line, columns).map_err(|error| unreadable(&error))?.as_tuple();
                deliver(RoundEvent::Row(tuple))?;
                rows += 1;
                self.bytes += line.len() as u64;
                let over = self.bytes >= most;
                if !key.is_empty() && (over || rest.is_empty()) {
                    last = key.iter().map(|place| text(tuple.iter().nth(*place)?)).collect();
                }
                if over && chunk.limit != Some(rows) {
                    self.learn(rows, self.bytes - begun);
                    return Ok((rows, last, false));
                }
            }
            self.rounds.free.give(piece);
        }
        let ended = || SourceError::Unavailable("reading a table ended before its end".into());
        self.rounds.readers[chunk.place].session = Some(chunk.copy.finish().ok_or_else(ended)?);
        self.learn(rows, self.bytes - begun);
        Ok((rows, last, true))
    }

    fn learn(&mut self, rows: u64, bytes: u64) {
        if let Some(each) = bytes.checked_div(rows) {
            self.rounds.row_bytes.insert(self.table.relation, each.max(1));
        }
    }
}

/// The first line of a COPY.
async fn copy_line(client: &Client, sql: &str) -> Result<Option<Vec<u8>>, Error> {
    use futures_util::StreamExt as _;
    let mut rows = pin!(client.copy_out(sql).await?);
    let mut first = None;
    while let Some(row) = rows.next().await {
        let row = row?;
        first.get_or_insert_with(|| row.strip_suffix(b"\n").unwrap_or(&row).to_vec());
    }
    Ok(first)
}

fn text(datum: change::Datum<'_>) -> Option<String> {
    match datum {
        change::Datum::Text(text) => Some(text.to_owned()),
        _ => None,
    }
}

pub(crate) fn parse(text: &str) -> Result<Snapshot, SourceError> {
    text.parse().map_err(|error| SourceError::Unavailable(format!("{error}")))
}

fn unreadable(error: &crate::copy::CopyError) -> SourceError {
    SourceError::Unavailable(format!("COPY gave {error}"))
}
