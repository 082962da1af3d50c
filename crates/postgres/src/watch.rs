//! Detects changes of the catalog between two looks, before each commit that claims an LSN.
//!
//! A look reads and compares everything. This check is cheaper; steps 2 and 3 run only if step 1 leaves a doubt:
//!
//! 1. What has become visible since? A transaction that the stream has told of, and whose commit record has no room for an
//!    invalidation, has changed nothing in the catalog: every change of it has at least one. If there are only such, and none
//!    runs, nothing has changed, and nothing else is asked.
//! 2. Does one that runs hold a lock for an alteration? It may have committed, and not be visible yet.
//! 3. Is any row that a look depends on another one than it was, by `xmin`? Each version of a row has that of the transaction
//!    that wrote it. What changes nothing for us (a GRANT) is found as well, and costs a look.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use change::{Lsn, Snapshot};
use relay::{SourceError, Unchanged};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Error, Row, Statement};

use crate::catalog;
use crate::error::failed;
use crate::{publication, rounds};

/// The shortest commit record with an invalidation, in bytes, where `wal_level` is `logical`: 24 and 2 of headers, the time
/// (8), what it has (4), the database (8), how many invalidations (4), and one (16).
const INVALIDATES: u64 = 66;

/// Bound on the transactions remembered as plain. Beyond it, others count as unknown.
const PLAIN_MAX: usize = 10_000;

/// The current snapshot, and the distance from the first normal xid (3) to the next one to be assigned.
const VISIBLE: &str = "SELECT pg_catalog.pg_current_snapshot()::text, pg_catalog.age('3'::pg_catalog.xid)";

/// Digests of the rows of the catalog that belong to the publication $1, the relations $2, the columns of the relations $3,
/// the schemas $4 and the types $5.
const DIGESTS: &str = "ARRAY[
    (SELECT sum(pg_catalog.hashtext(x.xmin::text)) FROM pg_catalog.pg_class x WHERE x.oid = ANY ($2)),
    (SELECT sum(pg_catalog.hashtext(x.xmin::text)) FROM pg_catalog.pg_attribute x
     WHERE x.attrelid = ANY ($3) AND x.attnum > 0),
    (SELECT sum(pg_catalog.hashtext(x.xmin::text)) FROM pg_catalog.pg_index x WHERE x.indrelid = ANY ($2)),
    (SELECT sum(pg_catalog.hashtext(x.xmin::text)) FROM pg_catalog.pg_inherits x WHERE x.inhparent = ANY ($2)),
    (SELECT sum(pg_catalog.hashtext(x.xmin::text)) FROM pg_catalog.pg_inherits x WHERE x.inhrelid = ANY ($2)),
    (SELECT sum(pg_catalog.hashtext(x.xmin::text)) FROM pg_catalog.pg_enum x WHERE x.enumtypid = ANY ($5)),
    (SELECT sum(pg_catalog.hashtext(x.xmin::text)) FROM pg_catalog.pg_namespace x WHERE x.oid = ANY ($4)),
    (SELECT sum(pg_catalog.hashtext(x.xmin::text)) FROM pg_catalog.pg_publication x WHERE x.pubname = $1),
    (SELECT sum(pg_catalog.hashtext(x.xmin::text)) FROM pg_catalog.pg_publication_rel x
     JOIN pg_catalog.pg_publication p ON p.oid = x.prpubid AND p.pubname = $1),
    SCHEMAS]";

/// Schemas that it publishes whole; only where the catalog has such.
const WHOLE_SCHEMAS: &str = "
    (SELECT sum(pg_catalog.hashtext(x.xmin::text)) FROM pg_catalog.pg_publication_namespace x
     JOIN pg_catalog.pg_publication p ON p.oid = x.pnpubid AND p.pubname = $1)";

/// The parameters of [`DIGESTS`] for the publication $1: its tables with all partitions; the relations whose columns count,
/// which are the tables without a parent among them and the composite types of their columns; their schemas; their types. The columns of
/// a partition change with its parent's only.
const WATCHED: &str = "
WITH RECURSIVE PUBLISHED, member AS (
    SELECT relid FROM published
), top AS (
    SELECT m.relid FROM member m WHERE NOT EXISTS (
        SELECT FROM pg_catalog.pg_inherits i JOIN member p ON p.relid = i.inhparent WHERE i.inhrelid = m.relid)
), reached (oid) AS (
    SELECT a.atttypid FROM pg_catalog.pg_attribute a JOIN top ON top.relid = a.attrelid
    WHERE a.attnum > 0 AND NOT a.attisdropped AND a.atttypid >= 16384
    UNION
    PARTS
), type AS (
    SELECT t.oid, t.typrelid FROM reached JOIN pg_catalog.pg_type t ON t.oid = reached.oid
)
SELECT w.tables, w.described, w.schemas, w.types, DIGESTS, pg_catalog.pg_current_snapshot()::text
FROM (SELECT
    (SELECT coalesce(array_agg(relid), '{}') FROM member) AS tables,
    (SELECT coalesce(array_agg(relid), '{}')
     FROM (SELECT relid FROM top UNION ALL SELECT typrelid FROM type WHERE typrelid <> 0) d) AS described,
    (SELECT coalesce(array_agg(DISTINCT c.relnamespace), '{}')
     FROM member m JOIN pg_catalog.pg_class c ON c.oid = m.relid) AS schemas,
    (SELECT coalesce(array_agg(oid), '{}') FROM type) AS types) w";

/// Locks without which none of the relations $1 is altered, no type, and no publication: one that keeps readers out of it, or
/// of something else together with one that keeps it from being altered. Those of a prepared transaction have no process.
pub(crate) const ALTERING: &str = "l.granted AND l.pid IS DISTINCT FROM pg_catalog.pg_backend_pid()
    AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
    AND (l.locktype = 'relation' AND l.mode = 'AccessExclusiveLock'
         AND (l.relation = ANY ($1) OR EXISTS (
             SELECT FROM pg_catalog.pg_locks o
             WHERE o.virtualtransaction = l.virtualtransaction AND o.locktype = 'relation' AND o.relation = ANY ($1)
               AND o.mode NOT IN ('AccessShareLock', 'RowShareLock', 'RowExclusiveLock')))
         OR l.locktype = 'object' AND l.classid IN ('pg_catalog.pg_type'::regclass, 'pg_catalog.pg_publication'::regclass)
            AND l.mode IN ('ExclusiveLock', 'AccessExclusiveLock'))";

/// For a lock whose holder's state is unknown: false if the holder is a prepared transaction that no session commits now.
pub(crate) const ENDS: &str = "(l.pid IS NOT NULL OR EXISTS (
    SELECT FROM pg_catalog.pg_stat_activity w
    WHERE w.datid = l.database
      AND (w.state IS NULL
           OR w.state = 'active' AND w.query ~* '^([[:space:]]|/[*].*[*]/)*commit[[:space:]]+prepared')))";

/// The catalog rows that a look depends on, and their digests at that time.
#[derive(Debug)]
struct Watched {
    tables: Vec<u32>,
    described: Vec<u32>,
    schemas: Vec<u32>,
    types: Vec<u32>,
    digests: Vec<Option<i64>>,
}

impl Watched {
    fn read(row: &Row) -> Result<Self, Error> {
        Ok(Watched {
            tables: row.try_get(0)?,
            described: row.try_get(1)?,
            schemas: row.try_get(2)?,
            types: row.try_get(3)?,
            digests: row.try_get(4)?,
        })
    }

    /// The relations on which an ALTER takes a lock.
    fn relations(&self) -> Vec<u32> {
        self.tables.iter().chain(&self.described).copied().collect()
    }
}

/// The result of one check.
struct Answer {
    /// An ALTER holds its locks, and may have committed.
    held: bool,
    same: bool,
    /// The snapshot taken first.
    visible: Snapshot,
    took: Duration,
}

/// The prepared statements.
#[derive(Clone)]
struct Questions {
    publication: String,
    visible: Statement,
    held: Statement,
    watched: Statement,
    digests: Statement,
}

impl Questions {
    /// Compares the catalog with `known`, the state under the snapshot `seen`. Transactions in `plain` have not changed it.
    async fn ask(
        self,
        client: Arc<Client>,
        known: Arc<Watched>,
        seen: Snapshot,
        plain: BTreeSet<u32>,
    ) -> Result<Answer, SourceError> {
        let begun = Instant::now();
        let row = client.query_one(&self.visible, &[]).await.map_err(at)?;
        let visible = rounds::parse(row.try_get(0).map_err(at)?)?;
        let next = (3 + i64::from(row.try_get::<_, i32>(1).map_err(at)?)) as u32;
        let strangers = visible.ended_since(&seen).any(|xid| !plain.contains(&xid));
        let (mut held, mut same) = (false, true);
        if strangers || visible.any_open(next) {
            // Locks first: who has let go of one is visible to the statement after it.
            (held, same) =
                tokio::try_join!(self.held(&client, &known), self.same(&client, &known)).map_err(at)?;
        }
        Ok(Answer { held, same, visible, took: begun.elapsed() })
    }

    async fn held(&self, client: &Client, known: &Watched) -> Result<bool, Error> {
        client.query_one(&self.held, &[&known.relations()]).await?.try_get(0)
    }

    async fn same(&self, client: &Client, known: &Watched) -> Result<bool, Error> {
        let Watched { tables, described, schemas, types, digests } = known;
        let of: [&(dyn ToSql + Sync); 5] = [&self.publication, tables, described, schemas, types];
        Ok(client.query_one(&self.digests, &of).await?.try_get::<_, Vec<Option<i64>>>(0)? == *digests)
    }
}

fn at(error: Error) -> SourceError {
    failed("cannot ask whether the catalog has changed", &error)
}

/// Watches the catalog between two looks.
pub(crate) struct Watch {
    questions: Questions,
    known: Arc<Watched>,
    /// A snapshot under which the catalog was as `known`.
    seen: Snapshot,
    /// Transactions since then that have not changed the catalog.
    plain: BTreeSet<u32>,
    asked: Option<JoinHandle<Result<Answer, SourceError>>>,
}

impl Watch {
    pub(crate) async fn begin(client: &Client, publication: &str) -> Result<Self, SourceError> {
        let whole = publication::may_have_schemas(client).await.map_err(at)?;
        let digests = DIGESTS.replace("SCHEMAS", if whole { WHOLE_SCHEMAS } else { "NULL" });
        let own = ["tables", "described", "schemas", "types"].into_iter().zip(["$2", "$3", "$4", "$5"]);
        let of_watched =
            own.fold(digests.clone(), |sql, (name, parameter)| sql.replace(parameter, &format!("w.{name}")));
        let watched = WATCHED
            .replace("PUBLISHED", catalog::PUBLISHED)
            .replace("PARTS", catalog::PARTS)
            .replace("DIGESTS", &of_watched);
        let held = format!("SELECT EXISTS (SELECT FROM pg_catalog.pg_locks l WHERE {ALTERING})");
        let questions = Questions {
            publication: publication.to_owned(),
            visible: client.prepare(VISIBLE).await.map_err(at)?,
            held: client.prepare(&held).await.map_err(at)?,
            watched: client.prepare(&watched).await.map_err(at)?,
            digests: client.prepare(&format!("SELECT {digests}")).await.map_err(at)?,
        };
        let (known, seen) = Self::look(&questions, client).await?;
        Ok(Watch { questions, known, seen, plain: BTreeSet::new(), asked: None })
    }

    async fn look(questions: &Questions, client: &Client) -> Result<(Arc<Watched>, Snapshot), SourceError> {
        let row = client.query_one(&questions.watched, &[&questions.publication]).await.map_err(at)?;
        Ok((Arc::new(Watched::read(&row).map_err(at)?), rounds::parse(row.try_get(5).map_err(at)?)?))
    }

    /// Records the present state. Called before a look reads the catalog, so that no later change is missed.
    pub(crate) async fn renew(&mut self, client: &Client) -> Result<(), SourceError> {
        let (known, seen) = Self::look(&self.questions, client).await?;
        self.known = known;
        self.saw(seen);
        Ok(())
    }

    fn saw(&mut self, visible: Snapshot) {
        self.plain.retain(|xid| !visible.saw(*xid));
        self.seen = visible;
    }

    /// Called for each transaction of the stream; its commit record lies between the two LSNs.
    pub(crate) fn committed(&mut self, xid: u32, commit_lsn: Lsn, end_lsn: Lsn) {
        if end_lsn.0.saturating_sub(commit_lsn.0) < INVALIDATES && self.plain.len() < PLAIN_MAX {
            self.plain.insert(xid);
        }
    }

    /// The relations that a look depends on.
    pub(crate) fn relations(&self) -> Vec<u32> {
        self.known.relations()
    }

    fn question(&self, client: &Arc<Client>) -> impl Future<Output = Result<Answer, SourceError>> + use<> {
        let (known, seen, plain) = (self.known.clone(), self.seen.clone(), self.plain.clone());
        self.questions.clone().ask(client.clone(), known, seen, plain)
    }

    /// Starts a check.
    pub(crate) fn ask(&mut self, runtime: &Handle, client: &Arc<Client>) {
        self.asked = Some(runtime.spawn(self.question(client)));
    }

    /// Waits for the result of the check. If an ALTER holds its locks, `settles` waits for it to become visible and returns
    /// whether it has.
    pub(crate) async fn answer(
        &mut self,
        client: &Arc<Client>,
        settles: impl AsyncFnOnce(&[u32]) -> Result<bool, Error>,
    ) -> Result<Unchanged, SourceError> {
        let answer = match self.asked.take() {
            Some(asked) => asked.await.map_err(|error| SourceError::Unavailable(error.to_string()))?,
            None => self.question(client).await,
        };
        let Answer { held, mut same, visible, took } = answer?;
        if held && same {
            same = settles(&self.known.relations()).await.map_err(at)?
                && self.questions.same(client, &self.known).await.map_err(at)?;
        }
        if same {
            self.saw(visible);
        }
        Ok(Unchanged { unchanged: same, took })
    }
}
