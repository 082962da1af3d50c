//! Whether the catalog is as the last look at it found it, asked before each commit that claims an LSN.
//!
//! A look reads and compares everything; this asks only whether any row that a look depends on is another one than it was,
//! by `xmin`: each version of a row has that of the transaction that wrote it. What changes nothing for us (a GRANT) is found
//! as well, and costs a look.

use std::sync::Arc;
use std::time::{Duration, Instant};

use relay::{SourceError, Unchanged};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Error, Row, Statement};

use crate::catalog;
use crate::error::failed;

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

/// What [`DIGESTS`] is about, for the publication $1: its tables and the partitioned ones between; those of them whose columns
/// are not those of another one of them, and the composite types of their columns; their schemas; their types. The columns of
/// a partition change with its parent's only.
const WATCHED: &str = "
WITH RECURSIVE member (relid) AS (
    SELECT g.relid FROM pg_catalog.pg_publication p
    JOIN LATERAL pg_catalog.pg_get_publication_tables(p.pubname) g ON true WHERE p.pubname = $1
    UNION
    SELECT coalesce(t.relid, r.prrelid) FROM pg_catalog.pg_publication p
    JOIN pg_catalog.pg_publication_rel r ON r.prpubid = p.oid
    LEFT JOIN LATERAL pg_catalog.pg_partition_tree(r.prrelid) t ON true WHERE p.pubname = $1
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
SELECT w.tables, w.described, w.schemas, w.types, DIGESTS
FROM (SELECT
    (SELECT coalesce(array_agg(relid), '{}') FROM member) AS tables,
    (SELECT coalesce(array_agg(relid), '{}')
     FROM (SELECT relid FROM top UNION ALL SELECT typrelid FROM type WHERE typrelid <> 0) d) AS described,
    (SELECT coalesce(array_agg(DISTINCT c.relnamespace), '{}')
     FROM member m JOIN pg_catalog.pg_class c ON c.oid = m.relid) AS schemas,
    (SELECT coalesce(array_agg(oid), '{}') FROM type) AS types) w";

/// Whether somebody holds a lock without which none of the relations $1 is altered, no type, and no publication: one that
/// keeps readers out of it, or of something else together with one that keeps it from being altered.
pub(crate) const HELD: &str = "
    FROM pg_catalog.pg_locks l LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
    WHERE l.granted AND l.pid <> pg_catalog.pg_backend_pid()
      AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
      AND (l.locktype = 'relation' AND l.mode = 'AccessExclusiveLock'
           AND (l.relation = ANY ($1) OR EXISTS (
               SELECT FROM pg_catalog.pg_locks o
               WHERE o.virtualtransaction = l.virtualtransaction AND o.locktype = 'relation' AND o.relation = ANY ($1)
                 AND o.mode NOT IN ('AccessShareLock', 'RowShareLock', 'RowExclusiveLock')))
           OR l.locktype = 'object' AND l.classid IN ('pg_catalog.pg_type'::regclass, 'pg_catalog.pg_publication'::regclass)
              AND l.mode IN ('ExclusiveLock', 'AccessExclusiveLock'))";

/// What a look depends on, and how it was then.
#[derive(Default, Debug)]
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

    /// Those on which an alteration holds a lock.
    fn relations(&self) -> Vec<u32> {
        self.tables.iter().chain(&self.described).copied().collect()
    }
}

/// What one question found out.
struct Answer {
    /// An alteration may be committing: whether it has done so is to be waited for.
    held: bool,
    same: bool,
    took: Duration,
}

/// What is asked, prepared once.
#[derive(Clone)]
struct Questions {
    publication: String,
    held: Statement,
    watched: Statement,
    digests: Statement,
}

impl Questions {
    /// Locks first: who has let go of one is visible to the statement after it.
    async fn ask(self, client: Arc<Client>, known: Arc<Watched>) -> Result<Answer, Error> {
        let begun = Instant::now();
        let relations = known.relations();
        let locks: [&(dyn ToSql + Sync); 1] = [&relations];
        let Watched { tables, described, schemas, types, .. } = &*known;
        let of: [&(dyn ToSql + Sync); 5] = [&self.publication, tables, described, schemas, types];
        let (held, digests) =
            tokio::try_join!(client.query_one(&self.held, &locks), client.query_one(&self.digests, &of))?;
        let same = digests.try_get::<_, Vec<Option<i64>>>(0)? == known.digests;
        Ok(Answer { held: held.try_get(0)?, same, took: begun.elapsed() })
    }
}

/// Watches the catalog between two looks.
pub(crate) struct Watch {
    questions: Questions,
    known: Arc<Watched>,
    asked: Option<JoinHandle<Result<Answer, Error>>>,
}

impl Watch {
    pub(crate) async fn begin(client: &Client, publication: &str) -> Result<Self, Error> {
        let whole = "SELECT pg_catalog.to_regclass('pg_catalog.pg_publication_namespace') IS NOT NULL";
        let schemas = if client.query_one(whole, &[]).await?.try_get(0)? { WHOLE_SCHEMAS } else { "NULL" };
        let digests = DIGESTS.replace("SCHEMAS", schemas);
        let own = ["tables", "described", "schemas", "types"].into_iter().zip(["$2", "$3", "$4", "$5"]);
        let of_watched =
            own.fold(digests.clone(), |sql, (name, parameter)| sql.replace(parameter, &format!("w.{name}")));
        let watched = WATCHED.replace("PARTS", catalog::PARTS).replace("DIGESTS", &of_watched);
        let questions = Questions {
            publication: publication.to_owned(),
            held: client.prepare(&format!("SELECT EXISTS (SELECT {HELD})")).await?,
            watched: client.prepare(&watched).await?,
            digests: client.prepare(&format!("SELECT {digests}")).await?,
        };
        let mut watch = Watch { questions, known: Arc::default(), asked: None };
        watch.renew(client).await?;
        Ok(watch)
    }

    /// Takes note of how everything is, before a look.
    pub(crate) async fn renew(&mut self, client: &Client) -> Result<(), Error> {
        let row = client.query_one(&self.questions.watched, &[&self.questions.publication]).await?;
        self.known = Arc::new(Watched::read(&row)?);
        Ok(())
    }

    /// The relations that a look depends on.
    pub(crate) fn relations(&self) -> Vec<u32> {
        self.known.relations()
    }

    /// Begins to ask whether everything is as it was.
    pub(crate) fn ask(&mut self, runtime: &Handle, client: &Arc<Client>) {
        let asked = self.questions.clone().ask(client.clone(), self.known.clone());
        self.asked = Some(runtime.spawn(asked));
    }

    /// Waits for the answer. Where an alteration holds its locks `settles` waits for it to become visible, and says whether
    /// it has.
    pub(crate) async fn answer(
        &mut self,
        client: &Arc<Client>,
        settles: impl AsyncFnOnce(&[u32]) -> Result<bool, Error>,
    ) -> Result<Unchanged, SourceError> {
        let at = |error: &Error| failed("cannot ask whether the catalog has changed", error);
        let answer = match self.asked.take() {
            Some(asked) => asked.await.map_err(|error| SourceError::Unavailable(error.to_string()))?,
            None => self.questions.clone().ask(client.clone(), self.known.clone()).await,
        };
        let Answer { held, mut same, took } = answer.map_err(|error| at(&error))?;
        if held && same {
            let again = async {
                let settled = settles(&self.known.relations()).await?;
                Ok(settled && self.questions.clone().ask(client.clone(), self.known.clone()).await?.same)
            };
            same = again.await.map_err(|error| at(&error))?;
        }
        Ok(Unchanged { unchanged: same, took })
    }
}
