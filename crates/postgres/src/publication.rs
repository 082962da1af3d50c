//! The publication: what it has, and the one judgement of it, for setup, check, the reader's start and while it streams.
//!
//! A publication that leaves something out loses changes in silence, so whatever it could leave out is refused. What is
//! configured is compared with what is published by object ids and not by names (h29): a table that was dropped and made
//! again under its name is another table.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use change::{Lsn, NEW_LOG, Refusal, Snapshot};
use relay::{Announced, Described, PublishedTable, SourceError};
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Error, Statement};

use crate::catalog::{self, AnnouncedQueries};
use crate::check::Finding;
use crate::error::failed;
use crate::plan::{Table, quote};
use crate::rounds;
use crate::watch::{self, Watch};

/// The options, and whether schemas are published whole. Before Postgres 15 there are no such, nor row filters and column
/// lists, nor the columns that hold them.
const OPTIONS: &str = "
SELECT p.oid, p.xmin::text::int8, p.puballtables, p.pubviaroot,
       p.pubinsert AND p.pubupdate AND p.pubdelete AND p.pubtruncate,
       coalesce(pg_catalog.to_jsonb(p) ->> 'pubgencols', 'n') NOT IN ('n', 'false')
FROM pg_catalog.pg_publication p WHERE p.pubname = $1";

/// Its members, and the configured tables ($2 schemas, $3 names), each where the other has it.
const MEMBERS: &str = "
SELECT coalesce(r.prrelid, c.oid), r.prrelid IS NOT NULL, g.place,
       pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.relname),
       pg_catalog.to_jsonb(r) ->> 'prqual' IS NOT NULL OR pg_catalog.to_jsonb(r) ->> 'prattrs' IS NOT NULL,
       (SELECT pg_catalog.quote_ident(root.nspname) || '.' || pg_catalog.quote_ident(root.relname) FROM (ROOT) root
        WHERE root.oid <> r.prrelid)
FROM (SELECT r.* FROM pg_catalog.pg_publication_rel r
      JOIN pg_catalog.pg_publication p ON p.oid = r.prpubid AND p.pubname = $1) r
FULL JOIN (SELECT g.place, w.oid
           FROM unnest($2::text[], $3::text[]) WITH ORDINALITY g (schema, name, place)
           LEFT JOIN pg_catalog.pg_namespace s ON s.nspname = g.schema
           LEFT JOIN pg_catalog.pg_class w ON w.relnamespace = s.oid AND w.relname = g.name AND w.relkind IN ('r', 'p')
          ) g ON g.oid = r.prrelid
LEFT JOIN pg_catalog.pg_class c ON c.oid = coalesce(r.prrelid, g.oid)
LEFT JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
ORDER BY g.place, 1";

/// Schemas that it publishes whole; only where the catalog has such.
const SCHEMAS: &str = "
SELECT count(*) FROM pg_catalog.pg_publication_namespace s
JOIN pg_catalog.pg_publication p ON p.oid = s.pnpubid WHERE p.pubname = $1";

/// Its tables, or only the one with the object id $2. A partitioned one comes with its partitions, which are tables without a row in the publication: what tells
/// one attachment from another is who made it, all the way up.
const TABLES: &str = "
WITH RECURSIVE PUBLISHED, member AS (
    SELECT l.publication, l.relid FROM published l JOIN pg_catalog.pg_class c ON c.oid = l.relid
    LEFT JOIN pg_catalog.pg_publication_rel r ON r.prpubid = l.publication AND r.prrelid = l.relid
    WHERE c.relkind <> 'p' OR r.oid IS NOT NULL
)
SELECT m.relid, n.nspname::text, c.relname::text,
       CASE WHEN root.oid IS NULL OR root.oid = m.relid THEN coalesce(r.oid, m.publication)
            ELSE (1 + (pg_catalog.hashtextextended(
                (SELECT string_agg(i.xmin::text, ',' ORDER BY a.place)
                 FROM ANCESTORS
                 JOIN pg_catalog.pg_inherits i ON i.inhrelid = a.relid), r.oid::int8) & 1073741823))::oid
       END,
       own.reltuples::int8, (DESCRIPTION), root.oid
FROM member m
JOIN pg_catalog.pg_class own ON own.oid = m.relid
LEFT JOIN LATERAL (ROOT) root ON true
JOIN pg_catalog.pg_class c ON c.oid = coalesce(root.oid, m.relid)
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_catalog.pg_publication_rel r ON r.prpubid = m.publication AND r.prrelid = c.oid
WHERE $2 = 0::oid OR m.relid = $2
ORDER BY m.relid";

/// For $2 of [`TABLES`].
const EVERY: u32 = 0;

/// Whether a transaction that has committed may not be visible yet, and holds such a lock. Only one that waits for a
/// synchronous standby takes longer for that than the way to us does. Where the role may not see what others wait for,
/// every holder may be such a one.
const HIDDEN_CHANGE: &str = "
SELECT EXISTS (
    SELECT FROM pg_catalog.pg_locks l LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
    WHERE ALTERING AND (a.wait_event = 'SyncRep' OR a.state IS NULL AND ENDS))
   AND pg_catalog.current_setting('synchronous_standby_names') <> ''";

/// Transactions that hold such a lock, and could be committing.
const COMMITTING: &str = "
SELECT coalesce(array_agg(DISTINCT l.virtualtransaction), '{}')
FROM pg_catalog.pg_locks l LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
WHERE ALTERING AND (a.state IS NULL AND ENDS OR a.state = 'active' AND a.wait_event_type IS DISTINCT FROM 'Lock')";

fn of_holders(sql: &str) -> String {
    sql.replace("ALTERING", watch::ALTERING).replace("ENDS", watch::ENDS)
}

/// Whether one of these transactions goes on.
const GOES_ON: &str =
    "SELECT EXISTS (SELECT FROM pg_catalog.pg_locks WHERE virtualtransaction = ANY ($1::text[]))";

/// A commit reaches the stream before other sessions see it. How long it may take from there until it is seen, where
/// nothing is waited for and the machine is busy; a transaction that goes on for longer had not committed.
const COMMIT_PATIENCE: Duration = Duration::from_millis(50);
/// Between two looks at it.
const COMMIT_INTERVAL: Duration = Duration::from_millis(5);

/// Whether a table has no file to speak of.
const EMPTY: &str = "SELECT pg_catalog.pg_relation_size($1::oid::regclass) = 0";

/// The publication as it is.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Publication {
    /// Configured tables that it lacks.
    pub missing: Vec<Table>,
    /// Tables that it has and that are not configured, as SQL.
    pub surplus: Vec<String>,
    /// Everything else that is wrong with it.
    pub findings: Vec<Finding>,
    /// `pg_publication.xmin`.
    pub(crate) xmin: u32,
}

impl Publication {
    /// Refuses one that leaves out anything of the tables that it has.
    pub(crate) fn demand_whole(&self) -> Result<(), Refusal> {
        match self.findings.first() {
            Some(Finding { what, remedy, .. }) => Err(Refusal::new(what.clone(), remedy.clone())),
            None => Ok(()),
        }
    }

    /// Refuses one that lacks a configured table as well.
    pub(crate) fn demand_tables(&self, name: &str) -> Result<(), Refusal> {
        self.demand_whole()?;
        match self.missing.first() {
            Some(table) => {
                let what = format!("table {table} is not in publication \"{name}\", or does not exist");
                let remedy = "run `millrace setup`; for a table that was dropped, take it out of `postgres.tables` first";
                Err(Refusal::new(what, remedy))
            }
            None => Ok(()),
        }
    }
}

/// What is asked at every look, prepared once.
pub(crate) struct Looks {
    options: Statement,
    members: Statement,
    schemas: Option<Statement>,
    tables: Statement,
    hidden: Statement,
    committing: Statement,
    goes_on: Statement,
    until: Statement,
    visible: Statement,
    announced: AnnouncedQueries,
}

/// What one look found.
pub(crate) struct Look {
    /// `None` where there is no such publication.
    pub(crate) publication: Option<Publication>,
    pub(crate) tables: Vec<PublishedTable>,
    /// The insert LSN after it.
    pub(crate) until: Lsn,
    pub(crate) settled: bool,
}

impl Looks {
    pub(crate) async fn prepare(client: &Client) -> Result<Self, Error> {
        let root = catalog::root().replace("$1", "m.relid").replace("$2", "$1");
        let ancestors = catalog::ANCESTORS.replace("$1", "m.relid");
        let tables = TABLES
            .replace("DESCRIPTION", &catalog::description_of("m.relid"))
            .replace("ROOT", &root)
            .replace("ANCESTORS", &ancestors)
            .replace("PUBLISHED", catalog::PUBLISHED);
        let members =
            MEMBERS.replace("ROOT", &catalog::root().replace("$1", "r.prrelid").replace("$2", "$1"));
        let schemas = match may_have_schemas(client).await? {
            true => Some(client.prepare(SCHEMAS).await?),
            false => None,
        };
        Ok(Looks {
            options: client.prepare(OPTIONS).await?,
            members: client.prepare(&members).await?,
            schemas,
            tables: client.prepare(&tables).await?,
            hidden: client.prepare(&of_holders(HIDDEN_CHANGE)).await?,
            committing: client.prepare(&of_holders(COMMITTING)).await?,
            goes_on: client.prepare(GOES_ON).await?,
            until: client.prepare("SELECT pg_catalog.pg_current_wal_insert_lsn()::text").await?,
            visible: client.prepare(rounds::VISIBLE).await?,
            announced: AnnouncedQueries::prepare(client).await?,
        })
    }

    /// Reads and judges the publication; `None` when there is none of that name.
    pub(crate) async fn judge(
        &self,
        client: &Client,
        name: &str,
        wanted: &[Table],
    ) -> Result<Option<Publication>, Error> {
        let (schemas, names): (Vec<&str>, Vec<&str>) =
            wanted.iter().map(|table| (table.schema.as_str(), table.name.as_str())).unzip();
        let Some(row) = client.query_opt(&self.options, &[&name]).await? else { return Ok(None) };
        let xmin: i64 = row.try_get(1)?;
        let mut found =
            Publication { xmin: u32::try_from(xmin).unwrap_or_default(), ..Publication::default() };
        let whole_schemas: i64 = match &self.schemas {
            Some(schemas) => client.query_one(schemas, &[&name]).await?.try_get(0)?,
            None => 0,
        };
        found.findings = wrong_options(name, &row, whole_schemas > 0)?;
        if row.try_get::<_, bool>(2)? {
            return Ok(Some(found));
        }
        for row in client.query(&self.members, &[&name, &schemas, &names]).await? {
            let (listed, place): (bool, Option<i64>) = (row.try_get(1)?, row.try_get(2)?);
            let wanted = place.and_then(|place| wanted.get(usize::try_from(place - 1).ok()?));
            match (wanted, listed) {
                (Some(table), false) => found.missing.push(table.clone()),
                (None, _) => found.surplus.push(row.try_get(3)?),
                (Some(table), true) => {
                    if row.try_get(4)? {
                        found.findings.push(held_back(name, table));
                    }
                    if let Some(root) = row.try_get::<_, Option<String>>(5)? {
                        found.findings.push(in_another(table, &root));
                    }
                }
            }
        }
        Ok(Some(found))
    }

    /// A table as it was announced, completed by the catalog. Under one snapshot: half of a change would show else, a
    /// partition without its key or without its root. All is asked at once and answered in order: what is visible, then
    /// locks, then the catalog. `None` while the committed transaction `xid` may have altered the table and is not visible.
    pub(crate) async fn describe(
        &self,
        client: &Client,
        name: &str,
        announced: &Announced,
        xid: u32,
    ) -> Result<Option<Described>, SourceError> {
        let relation = announced.relation;
        let by_name: [&(dyn ToSql + Sync); 1] = [&name];
        let of_table: [&(dyn ToSql + Sync); 2] = [&name, &relation];
        let asked = tokio::try_join!(
            client.query_one(&self.visible, &[]),
            self.announced.locked(client, relation),
            client.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"),
            self.announced.ask(client, name, announced),
            client.query_opt(&self.options, &by_name),
            client.query_opt(&self.tables, &of_table),
            client.batch_execute("COMMIT"),
        );
        let at = |error: Error| failed("cannot describe a table", &error);
        let (visible, locked, (), completion, options, table, ()) = asked.map_err(at)?;
        let visible: Snapshot = rounds::parse(visible.try_get(0).map_err(at)?)?;
        if locked && !visible.saw(xid) {
            return Ok(None);
        }
        let (schema, outdated) = catalog::complete(announced, completion).map_err(at)?;
        let xmin = options.map(|row| row.try_get::<_, i64>(1)).transpose().map_err(at)?;
        let xmin = xmin.and_then(|xmin| u32::try_from(xmin).ok()).unwrap_or_default();
        let published = table.as_ref().map(published_table).transpose()?;
        Ok(Some(Described { schema, outdated, published, xmin }))
    }

    /// Waits until what may be in the stream already and alters one of these relations is visible. Returns false where it
    /// waits for a standby.
    pub(crate) async fn settled(&self, client: &Client, relations: &[u32]) -> Result<bool, Error> {
        let begun = Instant::now();
        let committing: Vec<String> = client.query_one(&self.committing, &[&relations]).await?.try_get(0)?;
        while !committing.is_empty()
            && begun.elapsed() < COMMIT_PATIENCE
            && client.query_one(&self.goes_on, &[&committing]).await?.try_get(0)?
        {
            tokio::time::sleep(COMMIT_INTERVAL).await;
        }
        Ok(!client.query_one(&self.hidden, &[&relations]).await?.try_get::<_, bool>(0)?)
    }

    /// Looks at everything once. What is asked first is answered first: locks before the catalog, and the LSN at last.
    pub(crate) async fn look(
        &self,
        client: &Client,
        name: &str,
        wanted: &[Table],
        watch: &mut Watch,
    ) -> Result<Look, SourceError> {
        let at = |error: &Error| failed("cannot look at the publication", error);
        let settled = self.settled(client, &watch.relations()).await.map_err(|error| at(&error))?;
        watch.renew(client).await?;
        let asked = async {
            let publication = self.judge(client, name, wanted).await?;
            let rows = client.query(&self.tables, &[&name, &EVERY]).await?;
            let until: String = client.query_one(&self.until, &[]).await?.try_get(0)?;
            Ok((publication, rows, until))
        };
        let asked: Result<_, Error> = asked.await;
        let (publication, rows, until) = asked.map_err(|error| at(&error))?;
        let mut tables = Vec::new();
        for row in &rows {
            tables.push(published_table(row)?);
        }
        let until = until.parse().map_err(|error| SourceError::Unavailable(format!("{error}")))?;
        Ok(Look { publication, tables, until, settled })
    }
}

/// Whether a publication may have whole schemas: from Postgres 15 on.
pub(crate) async fn may_have_schemas(client: &Client) -> Result<bool, Error> {
    let there = "SELECT pg_catalog.to_regclass('pg_catalog.pg_publication_namespace') IS NOT NULL";
    client.query_one(there, &[]).await?.try_get(0)
}

fn published_table(row: &tokio_postgres::Row) -> Result<PublishedTable, SourceError> {
    let at = |error: Error| failed("cannot look at the publication", &error);
    let description: String = row.try_get(5).map_err(at)?;
    let name = Table { schema: row.try_get(1).map_err(at)?, name: row.try_get(2).map_err(at)? };
    Ok(PublishedTable {
        relation: row.try_get(0).map_err(at)?,
        name: name.to_string(),
        publication: row.try_get(3).map_err(at)?,
        estimated_rows: row.try_get(4).map_err(at)?,
        description: catalog::parse_description(&description)?,
        root: row.try_get(6).map_err(at)?,
        filled: true,
    })
}

fn held_back(name: &str, table: &Table) -> Finding {
    let (publication, table_sql) = (quote(name), table.quoted());
    Finding::wrong(
        format!("publication {name} holds back rows or columns of {table}"),
        format!(
            "take the WHERE clause or column list away: ALTER PUBLICATION {publication} DROP TABLE {table_sql}; then run \
             `millrace setup`, and start the reader: it reads the table again"
        ),
    )
}

/// A table whose rows are another one's in the log: nothing there has its name.
fn in_another(table: &Table, root: &str) -> Finding {
    let sql = table.quoted();
    Finding::wrong(
        format!(
            "table {table} is a partition of {root}, which is published too: its changes are those of {root} in the log"
        ),
        format!(
            "take {table} out of `postgres.tables`, and {root} for it in the stores, run `millrace setup` and start the reader; or \
             ALTER TABLE {root} DETACH PARTITION {sql}; and start the reader"
        ),
    )
}

/// What the publication's own options leave out.
fn wrong_options(name: &str, row: &tokio_postgres::Row, whole_schemas: bool) -> Result<Vec<Finding>, Error> {
    let publication = quote(name);
    let mut findings = Vec::new();
    if row.try_get(2)? {
        let remedy = format!("DROP PUBLICATION {publication}; then run `millrace setup`");
        findings.push(Finding::wrong(format!("publication {name} is FOR ALL TABLES"), remedy));
        return Ok(findings);
    }
    let mut wrong = |what: String, statement: String| {
        let remedy = format!("{statement}; then start the reader: it reads the tables again");
        findings.push(Finding::wrong(what, remedy));
    };
    if !row.try_get::<_, bool>(4)? {
        wrong(
            format!("publication {name} does not publish all kinds of changes"),
            format!("ALTER PUBLICATION {publication} SET (publish = 'insert, update, delete, truncate')"),
        );
    }
    if row.try_get(3)? {
        wrong(
            format!("publication {name} publishes by partition root"),
            format!("ALTER PUBLICATION {publication} SET (publish_via_partition_root = false)"),
        );
    }
    if row.try_get(5)? {
        wrong(
            format!("publication {name} publishes generated columns, which a snapshot does not read"),
            format!("ALTER PUBLICATION {publication} SET (publish_generated_columns = none)"),
        );
    }
    if whole_schemas {
        wrong(
            format!("publication {name} publishes whole schemas"),
            format!("ALTER PUBLICATION {publication} DROP TABLES IN SCHEMA ...; -- each of them"),
        );
    }
    Ok(findings)
}

/// Reads and judges the publication; `None` when there is none of that name.
pub async fn judge(client: &Client, name: &str, wanted: &[Table]) -> Result<Option<Publication>, Error> {
    Looks::prepare(client).await?.judge(client, name, wanted).await
}

/// Takes note of tables that were not there at an earlier look, and whether they have rows.
pub(crate) async fn note_new(client: &Client, tables: &mut [PublishedTable], known: &mut HashSet<u32>) {
    for table in tables.iter_mut().filter(|table| known.insert(table.relation)) {
        // A lock that is not to be had soon is no reason to wait.
        let asked = tokio::time::timeout(EMPTY_PATIENCE, async {
            client.batch_execute("BEGIN; SET LOCAL lock_timeout = '50ms'").await?;
            let empty = client.query_one(EMPTY, &[&table.relation]).await;
            client.batch_execute("ROLLBACK").await?;
            empty?.try_get::<_, bool>(0)
        });
        table.filled = !matches!(asked.await, Ok(Ok(true)));
    }
}

/// How long it may take to find out whether a table is empty.
const EMPTY_PATIENCE: Duration = Duration::from_secs(5);

/// Why a table that was published is not any more.
pub(crate) async fn absence(
    client: &Client,
    publication: &str,
    relation: u32,
    table: &Table,
) -> Result<Refusal, Error> {
    let now = catalog::name_of(client, relation).await?;
    let other = table.oid(client).await?;
    Ok(match (now, other) {
        (Some(now), _) if now == *table => Refusal::new(
            format!("table {table} was taken out of publication \"{publication}\" by hand"),
            "run `millrace setup` and start the reader: it reads the table again; or take it out of `postgres.tables`",
        ),
        (Some(now), _) => Refusal::new(
            format!("table {table} was renamed to {now} and taken out of publication \"{publication}\""),
            format!("rename it back and run `millrace setup`; or correct `postgres.tables` and {NEW_LOG}"),
        ),
        (None, Some(_)) => {
            Refusal::new(format!("table {table} was dropped, and another table has its name now"), NEW_LOG)
        }
        (None, None) => Refusal::new(
            format!("table {table} was dropped; the log has all that was committed before"),
            "take it out of `postgres.tables` and run `millrace setup`",
        ),
    })
}
