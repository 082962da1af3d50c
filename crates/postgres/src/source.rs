//! Postgres as the relay's [`Source`].
//!
//! Two connections to one server: one for SQL (slot, publication, catalog, heartbeat), one that streams. The relay
//! calls from a plain thread and is blocked; what must go on meanwhile (status updates, reading ahead) is done by
//! the task of [`crate::stream`] on the runtime.
//!
//! At the border: events come in the server's order, each row after the relation that describes it, and nothing is
//! filtered. What cannot be understood is refused, never skipped.

use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use change::{Key, Lsn, NEW_LOG, Refusal, Snapshot, Timeline, Tuple};
use pgoutput::Message;
use relay::{
    Announced, AnnouncedColumn, Confirmed, Described, Heartbeat, Publication, ReadRequest, RelayError, Round,
    RoundEvent, RowChange, Source, SourceError, SourceState, Unchanged, WalEvent,
};
use tokio::runtime::{Handle, Runtime};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;

use crate::check::Finding;
use crate::config::{Config, Target};
use crate::connection::ReplicationConnection;
use crate::error::ConnectionError;
use crate::keys;
use crate::plan::Table;
use crate::preconditions::{self, Slot};
use crate::publication::{self, Look, Looks};
use crate::rounds::{self, Rounds};
use crate::session;
use crate::stream::{Frame, Piece, ReplicationStream};
use crate::tls::Tls;
use crate::types::Types;
use crate::watch::Watch;
use crate::{catalog, check};

/// How long a heartbeat waits for synchronous standbys before its local durability is enough.
const STANDBY_PATIENCE: Duration = Duration::from_secs(5);

/// How long a session that was told to end may hold on to the slot.
const TAKE_OVER_TIMEOUT: Duration = Duration::from_secs(30);

/// How often to look whether it has let go.
const TAKE_OVER_INTERVAL: Duration = Duration::from_millis(50);

/// How long asynchronous commits may take to become durable, how often to look, and after what time to write something
/// that is flushed at once: on an idle server the insert LSN may stand behind the header of a page not yet begun.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(30);
const FLUSH_INTERVAL: Duration = Duration::from_millis(2);
const FLUSH_NUDGE: Duration = Duration::from_millis(20);

/// Work of one `poll`, after which acknowledgements get their turn.
const POLL_WORK: Duration = Duration::from_millis(10);

const HEARTBEAT: &str = "SELECT beat, nonce FROM millrace.heartbeat WHERE pipeline = $1";

/// A beat only ever grows: a reader that was replaced and does not know it yet must not turn it back.
const BEAT: &str = "
INSERT INTO millrace.heartbeat AS h (pipeline, beat, nonce, at) VALUES ($1, $2, $3, now())
ON CONFLICT (pipeline) DO UPDATE SET beat = excluded.beat, nonce = excluded.nonce, at = excluded.at
WHERE h.beat < excluded.beat";

const TERMINATE: &str = "
SELECT pg_catalog.pg_terminate_backend(active_pid) FROM pg_catalog.pg_replication_slots
WHERE slot_name = $1 AND active_pid IS NOT NULL";

/// Which changes to read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SourceOptions {
    /// Key of its heartbeat.
    pub heartbeat: String,
    /// The replication slot.
    pub slot: String,
    /// The publication.
    pub publication: String,
    /// The configured tables; each must be in the publication.
    pub tables: Vec<Table>,
    /// Those of them that a store's query names.
    pub queried: Vec<Table>,
    /// Connections that read a snapshot at a time.
    pub snapshot_connections: usize,
}

/// A primary server, a slot on it, and the stream once it has begun.
pub struct PostgresSource {
    runtime: Handle,
    target: Target,
    options: SourceOptions,
    client: Arc<Client>,
    /// Logged in and not yet streaming, and what drives it.
    replication: Option<(Runtime, ReplicationConnection)>,
    stream: Option<ReplicationStream>,
    /// Each relation as this session has announced it last.
    relations: HashMap<u32, Announced>,
    /// What is asked of the publication.
    looks: Looks,
    /// Whether the catalog is as the last look found it.
    watch: Watch,
    /// Tables that an earlier look has found.
    found: HashSet<u32>,
    /// The tables whose rows depend on types that can change without a word in the stream.
    types: Types,
    /// The transaction that is being taken.
    xid: u32,
    /// The relations of one TRUNCATE; kept for its memory.
    truncated: Vec<u32>,
    rounds: Rounds,
}

impl PostgresSource {
    /// Connects for SQL. Its methods must be called from a thread that is not one of `runtime`'s.
    pub fn connect(runtime: &Handle, config: &Config, options: SourceOptions) -> Result<Self, SourceError> {
        let (client, target) = runtime.block_on(catalog::connect_primary(config))?;
        let tls = Tls::new(&target.ssl).map_err(ConnectionError::from)?;
        if runtime.block_on(catalog::in_recovery(&client, &target))? {
            let what = format!("{target} is a standby; [postgres] url must name the primary");
            return Err(SourceError::Unavailable(what));
        }
        let prepare = async {
            Ok::<_, tokio_postgres::Error>((Looks::prepare(&client).await?, Types::prepare(&client).await?))
        };
        let prepared = runtime.block_on(catalog::answered(&target, async {
            prepare.await.map_err(|error| ConnectionError::from_client(&target, &error).into())
        }));
        let (looks, types) = prepared?;
        let watch = Watch::begin(&client, &options.publication);
        let watch = runtime.block_on(catalog::answered(&target, watch))?;
        Ok(PostgresSource {
            runtime: runtime.clone(),
            rounds: Rounds::new(runtime, &target, tls),
            target,
            options,
            client: Arc::new(client),
            replication: None,
            stream: None,
            relations: HashMap::new(),
            looks,
            watch,
            found: HashSet::new(),
            types,
            xid: 0,
            truncated: Vec::new(),
        })
    }

    /// Runs a query's future, bounded in time.
    fn query<T>(
        &self,
        query: impl Future<Output = Result<T, tokio_postgres::Error>>,
    ) -> Result<T, SourceError> {
        let query = async { query.await.map_err(|error| self.failed(&error)) };
        self.runtime.block_on(catalog::answered(&self.target, query))
    }

    fn failed(&self, error: &tokio_postgres::Error) -> SourceError {
        if error.code() == Some(&SqlState::UNDEFINED_TABLE)
            || error.code() == Some(&SqlState::INVALID_SCHEMA_NAME)
        {
            let what = format!("{}: {}", self.target, ConnectionError::from_client("heartbeat table", error));
            return Refusal::new(what, "run `millrace setup`").into();
        }
        ConnectionError::from_client(&self.target, error).into()
    }

    fn flush_lsn(&self) -> Result<Lsn, SourceError> {
        let flush = "SELECT pg_catalog.pg_current_wal_flush_lsn()::text";
        let row = self.query(self.client.query_one(flush, &[]))?;
        let text: String = row.try_get(0).map_err(|error| self.failed(&error))?;
        text.parse().map_err(|error| SourceError::Unavailable(format!("{error}")))
    }

    /// Waits until the WAL is durable up to `lsn` (h12): a snapshot sees what committed asynchronously, and after a
    /// crash of the server that never was.
    fn wait_for_flush(&self, lsn: Lsn) -> Result<(), SourceError> {
        let begun = Instant::now();
        let mut nudged = false;
        while self.flush_lsn()? < lsn {
            if begun.elapsed() >= FLUSH_TIMEOUT {
                let what = format!("the server's WAL is not flushed up to {lsn} within {FLUSH_TIMEOUT:?}");
                return Err(SourceError::Unavailable(what));
            }
            if begun.elapsed() >= FLUSH_NUDGE && !std::mem::replace(&mut nudged, true) {
                self.query(self.client.batch_execute(crate::NUDGE))?;
            }
            self.runtime.block_on(async { tokio::time::sleep(FLUSH_INTERVAL).await });
        }
        Ok(())
    }

    fn slot(&self) -> Result<(Slot, Lsn), SourceError> {
        let slot = self.query(Slot::read(&self.client, &self.options.slot))?;
        let confirmed_flush = preconditions::usable(&self.options.slot, slot.as_ref())?;
        match slot {
            Some(slot) => Ok((slot, confirmed_flush)),
            None => Err(SourceError::Unavailable("the slot vanished".into())),
        }
    }

    /// The connection that will stream.
    fn replication(&mut self) -> Result<(Runtime, ReplicationConnection), SourceError> {
        if let Some(known) = self.replication.take() {
            return Ok(known);
        }
        let runtime = session::runtime().map_err(|error| SourceError::Unavailable(error.to_string()))?;
        let connection = runtime.block_on(ReplicationConnection::connect_to(&self.target))?;
        Ok((runtime, connection))
    }

    /// Which history the server has, and how far: what [`Source::state`] gives but for the slot, which may be gone.
    pub fn history(&mut self, ledger: &Timeline) -> Result<SourceState, SourceError> {
        let (runtime, mut replication) = self.replication()?;
        let (timeline, _) = runtime.block_on(replication.identify_system())?;
        let switch_point = if timeline.system_id == ledger.system_id && timeline.timeline != ledger.timeline {
            runtime.block_on(replication.switch_point(timeline.timeline, ledger.timeline))?
        } else {
            None
        };
        self.replication = Some((runtime, replication));
        let row = self.query(self.client.query_opt(HEARTBEAT, &[&self.options.heartbeat]))?;
        let heartbeat = match row {
            Some(row) => Heartbeat {
                beat: row.try_get(0).map_err(|error| self.failed(&error))?,
                nonce: row.try_get(1).map_err(|error| self.failed(&error))?,
            },
            None => Heartbeat::default(),
        };
        let flush_lsn = self.flush_lsn()?;
        let confirmed_flush = Lsn::ZERO;
        Ok(SourceState { confirmed_flush, flush_lsn, timeline, switch_point, heartbeat })
    }

    /// What the server's refusal to stream means.
    fn not_started(&self, error: ConnectionError) -> SourceError {
        let slot = &self.options.slot;
        match error.server_error() {
            Some(server) if server.slot_is_active() => {
                SourceError::Unavailable(format!("slot \"{slot}\" is in use by another session: {error}"))
            }
            Some(server) if server.does_not_exist() || server.slot_is_unusable() => {
                Refusal::new(format!("slot \"{slot}\" cannot be read: {error}"), NEW_LOG).into()
            }
            _ => error.into(),
        }
    }

    /// What the end of a stream means.
    fn interrupted(&self, error: ConnectionError) -> SourceError {
        let refused = |what: String| Refusal::new(format!("{what}: {error}"), NEW_LOG).into();
        match error.server_error() {
            Some(server) if server.does_not_exist() => refused(format!(
                "publication \"{}\" does not exist where the slot stands",
                self.options.publication
            )),
            Some(server) if server.slot_is_unusable() => {
                refused(format!("slot \"{}\" cannot be read any further", self.options.slot))
            }
            _ => error.into(),
        }
    }

    /// Looks whether the types have changed of those tables of which a piece of the stream holds rows. Whatever was changed
    /// before these rows were written was committed before the piece came.
    fn suspect(&mut self, piece: &Piece) -> Result<(), SourceError> {
        let touched = self.types.touched(piece.frames());
        if touched.is_empty() {
            return Ok(());
        }
        let suspects = self.query(self.types.changed(&self.client, &touched))?;
        self.types.suspect(suspects);
        Ok(())
    }

    fn take(
        &mut self,
        frame: Frame<'_>,
        deliver: &mut dyn FnMut(WalEvent<'_>) -> Result<(), RelayError>,
    ) -> Result<(), RelayError> {
        let (lsn, payload) = match frame {
            Frame::Data { lsn, payload } => (lsn, payload),
            Frame::Keepalive { wal_end, reply_requested } => {
                return deliver(WalEvent::Keepalive { wal_end, reply_requested });
            }
        };
        let message = pgoutput::decode(payload).map_err(|error| misread(lsn, &error.to_string()))?;
        if let Message::Insert { relation, .. }
        | Message::Update { relation, .. }
        | Message::Delete { relation, .. } = message
            && self.types.suspected(relation)
            && let Some(announced) = self.relations.get(&relation)
        {
            // As the server does when the table itself was altered.
            deliver(WalEvent::Relation(announced.clone()))?;
        }
        deliver(match message {
            Message::Insert { relation, new } => {
                self.check(lsn, relation, new)?;
                WalEvent::Row { lsn, relation, change: RowChange::Insert { new } }
            }
            Message::Update { relation, old, new } => {
                let old = old.map(pgoutput::OldTuple::tuple);
                self.check(lsn, relation, new)?;
                self.check(lsn, relation, old.unwrap_or(new))?;
                WalEvent::Row { lsn, relation, change: RowChange::Update { old, new } }
            }
            Message::Delete { relation, old } => {
                let old = old.tuple();
                self.check(lsn, relation, old)?;
                WalEvent::Row { lsn, relation, change: RowChange::Delete { old } }
            }
            Message::Begin { commit_lsn, commit_time_us, xid } => {
                self.xid = xid;
                WalEvent::Begin { commit_lsn, commit_time_us, xid }
            }
            Message::Commit { commit_lsn, end_lsn, .. } => {
                self.watch.committed(self.xid, commit_lsn, end_lsn);
                WalEvent::Commit { commit_lsn, end_lsn }
            }
            Message::Truncate { relations, .. } => {
                self.truncated.clear();
                self.truncated.extend(relations.iter());
                WalEvent::Truncate { lsn, relations: &self.truncated }
            }
            Message::Message { transactional, lsn, prefix, content } => {
                WalEvent::Message { lsn, transactional, prefix, content }
            }
            Message::Relation(relation) => {
                let announced = announced(&relation);
                self.relations.insert(relation.oid, announced.clone());
                WalEvent::Relation(announced)
            }
            // Types come with their relation; where a change was first made is nobody's concern.
            Message::Type { .. } | Message::Origin { .. } => return Ok(()),
        })
    }

    /// A row must fit the relation that was announced for it.
    fn check(&self, lsn: Lsn, relation: u32, tuple: Tuple<'_>) -> Result<(), RelayError> {
        match self.relations.get(&relation).map(|announced| announced.columns.len()) {
            Some(columns) if columns == tuple.len() => Ok(()),
            Some(columns) => {
                let what =
                    format!("a row of {} columns of relation {relation}, which has {columns}", tuple.len());
                Err(misread(lsn, &what))
            }
            None => Err(misread(lsn, &format!("a row of relation {relation}, which was not announced"))),
        }
    }
}

fn announced(relation: &pgoutput::Relation<'_>) -> Announced {
    let columns = relation.columns.iter().map(|column| AnnouncedColumn {
        name: column.name.to_owned(),
        type_oid: column.type_oid,
        modifier: column.type_modifier,
        key: column.key,
    });
    let schema = if relation.namespace.is_empty() { "pg_catalog" } else { relation.namespace };
    Announced {
        relation: relation.oid,
        schema: schema.to_owned(),
        table: relation.name.to_owned(),
        identity: relation.identity,
        columns: columns.collect(),
    }
}

fn no_publication(name: &str) -> Refusal {
    Refusal::new(format!("publication \"{name}\" does not exist"), "run `millrace setup`")
}

fn misread(lsn: Lsn, what: &str) -> RelayError {
    let what = format!("the change at {lsn} cannot be understood: {what}");
    Refusal::new(what, "nothing was skipped; report this with the server's version").into()
}

impl Source for PostgresSource {
    fn busy(&mut self) -> Result<bool, SourceError> {
        Ok(self.slot()?.0.active)
    }

    fn take_over(&mut self) -> Result<(), SourceError> {
        let deadline = Instant::now() + TAKE_OVER_TIMEOUT;
        while self.slot()?.0.active {
            if Instant::now() >= deadline {
                return Err(SourceError::Unavailable(format!(
                    "the session that holds slot \"{}\" does not end",
                    self.options.slot
                )));
            }
            self.query(self.client.query(TERMINATE, &[&self.options.slot])).map_err(|error| match error {
                SourceError::Refused(refusal) => {
                    let remedy = "GRANT pg_signal_backend to the role, or end the other reader by hand";
                    SourceError::Refused(Refusal::new(refusal.what, remedy))
                }
                other => other,
            })?;
            self.runtime.block_on(async { tokio::time::sleep(TAKE_OVER_INTERVAL).await });
        }
        Ok(())
    }

    fn state(&mut self, ledger: &Timeline) -> Result<SourceState, SourceError> {
        let (_, confirmed_flush) = self.slot()?;
        Ok(SourceState { confirmed_flush, ..self.history(ledger)? })
    }

    fn write_heartbeat(&mut self, heartbeat: &Heartbeat) -> Result<(), SourceError> {
        self.rounds.rest();
        let tls = Tls::new(&self.target.ssl).map_err(ConnectionError::from)?;
        let written = self.query(async {
            let values: [&(dyn ToSql + Sync); 3] =
                [&self.options.heartbeat, &heartbeat.beat, &heartbeat.nonce];
            let write = self.client.execute(BEAT, &values);
            tokio::pin!(write);
            match tokio::time::timeout(STANDBY_PATIENCE, &mut write).await {
                Ok(written) => written,
                Err(_) => {
                    // A cancelled wait for a standby leaves a commit that is durable here; anything else fails.
                    tracing::warn!("a heartbeat waits for a synchronous standby: going on without it");
                    self.client.cancel_token().cancel_query(tls).await?;
                    write.await
                }
            }
        })?;
        if written == 0 {
            let what = format!("heartbeat {} was overtaken by another reader's", heartbeat.beat);
            return Err(SourceError::Unavailable(what));
        }
        Ok(())
    }

    fn start(&mut self, from: Lsn) -> Result<(), SourceError> {
        let options = &self.options;
        let name = &options.publication;
        let judged = self.query(self.looks.judge(&self.client, name, &options.tables))?;
        judged.ok_or_else(|| no_publication(name))?.demand_tables(name)?;
        let (runtime, mut replication) = self.replication()?;
        let patience = runtime.block_on(replication.wal_sender_timeout())?;
        let (slot, publication) = (&self.options.slot, &self.options.publication);
        let streaming = runtime
            .block_on(replication.start_replication(slot, publication, from))
            .map_err(|error| self.not_started(error))?;
        tracing::info!(server = %self.target, slot, %from, "streaming");
        self.relations.clear();
        let stream = ReplicationStream::spawn(runtime, from, streaming, patience);
        self.stream = Some(stream.map_err(|error| SourceError::Unavailable(error.to_string()))?);
        Ok(())
    }

    fn poll(
        &mut self,
        timeout: Duration,
        deliver: &mut dyn FnMut(WalEvent<'_>) -> Result<(), RelayError>,
    ) -> Result<bool, RelayError> {
        let mut wait = timeout;
        let mut begun = None;
        loop {
            let Some(stream) = &mut self.stream else {
                return Err(SourceError::Unavailable("the stream has not begun".into()).into());
            };
            let Some(piece) = stream.receive(wait).map_err(|error| self.interrupted(error))? else {
                return Ok(begun.is_some());
            };
            begun.get_or_insert_with(Instant::now);
            self.suspect(&piece)?;
            for frame in piece.frames() {
                self.take(frame, deliver)?;
            }
            if begun.is_some_and(|begun| begun.elapsed() >= POLL_WORK) {
                return Ok(true);
            }
            wait = Duration::ZERO;
        }
    }

    fn published(&mut self) -> Result<Publication, SourceError> {
        let name = &self.options.publication;
        let look = self.looks.look(&self.client, name, &self.options.tables, &mut self.watch);
        let look = self.runtime.block_on(catalog::answered(&self.target, look))?;
        let Look { publication, mut tables, until, settled } = look;
        let publication = publication.ok_or_else(|| no_publication(name))?;
        let mut unfit = publication.demand_whole().err();
        if unfit.is_none() && tables.iter().any(|table| !table.description.children.is_empty()) {
            let findings = self.query(check::inheritance(&self.client, &self.options.queried))?;
            unfit =
                findings.into_iter().next().map(|Finding { what, remedy, .. }| Refusal::new(what, remedy));
        }
        self.runtime.block_on(publication::note_new(&self.client, &mut tables, &mut self.found));
        Ok(Publication { tables, unfit, xmin: publication.xmin, until, settled })
    }

    fn ask_unchanged(&mut self) {
        self.watch.ask(&self.runtime, &self.client);
    }

    fn unchanged(&mut self) -> Result<Unchanged, SourceError> {
        let settled = async |relations: &[u32]| self.looks.settled(&self.client, relations).await;
        let answer = self.watch.answer(&self.client, settled);
        self.runtime.block_on(catalog::answered(&self.target, answer))
    }

    fn absence(&mut self, relation: u32, name: &str) -> Result<Option<Refusal>, SourceError> {
        let Some(table) = self.options.tables.iter().find(|table| table.to_string() == name) else {
            return Ok(None);
        };
        let publication = &self.options.publication;
        self.query(publication::absence(&self.client, publication, relation, table)).map(Some)
    }

    fn describe(&mut self, announced: &Announced, xid: u32) -> Result<Option<Described>, SourceError> {
        if self.types.has(announced.relation) && self.query(self.types.held(&self.client))? {
            return Ok(None);
        }
        let described = self.looks.describe(&self.client, &self.options.publication, announced, xid);
        let described = self.runtime.block_on(catalog::answered(&self.target, described))?;
        if let Some(published) = described.as_ref().and_then(|described| described.published.as_ref()) {
            self.types.note(announced.relation, &published.description.types);
        }
        Ok(described)
    }

    fn visible(&mut self) -> Result<Snapshot, SourceError> {
        self.runtime.block_on(catalog::answered(&self.target, rounds::visible(&self.client)))
    }

    fn read(
        &mut self,
        tables: &[ReadRequest],
        bytes: u64,
        accept: &mut dyn FnMut(&Snapshot) -> bool,
        deliver: &mut dyn FnMut(RoundEvent<'_>) -> Result<(), RelayError>,
    ) -> Result<Round, RelayError> {
        let connections = self.options.snapshot_connections;
        self.rounds.connect(connections)?;
        let publication = &self.options.publication;
        let round = rounds::read(&mut self.rounds, publication, tables, bytes, accept, deliver)?;
        if let Round::Taken { until, .. } = &round {
            self.wait_for_flush(*until)?;
        }
        Ok(round)
    }

    fn compare(
        &mut self,
        relation: u32,
        keys: &[Key],
        bound: &Key,
    ) -> Result<Option<Vec<Ordering>>, SourceError> {
        let compared = keys::compare(&self.client, relation, keys, bound);
        self.runtime.block_on(catalog::answered(&self.target, compared))
    }

    fn acknowledge(&mut self, confirmed: Confirmed) -> Result<(), SourceError> {
        match &self.stream {
            Some(stream) => {
                stream.acknowledge(confirmed.lsn());
                Ok(())
            }
            None => Err(SourceError::Unavailable("the stream has not begun".into())),
        }
    }
}
