//! Makes and removes what a pipeline needs at the source: heartbeat table, publication, slot.
//!
//! Order matters, and each step can be repeated. The publication stands before the slot: decoding uses the
//! catalog as of each change, so a slot that is older than its publication would fail on the first one. Tables
//! enter the publication under a lock that keeps writers out (h22): a transaction that had already written the
//! table would stream only what it writes afterwards. The snapshot exported with the slot tells what is never streamed
//! (h21); the ledger keeps it, and the first round of the reader's snapshot must see all of it.

use std::time::Duration;

use change::{Lsn, Refusal, Snapshot, Timeline};
use relay::{PublishedTable, SourceError, TABLES_CHANGED};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Error, IsolationLevel};

use crate::plan::{Plan, Table, quote, quote_literal};
use crate::publication::Looks;
use crate::watch::Watch;
use crate::{ConnectionError, ReplicationConnection, catalog, check};

/// How often a table's lock is tried for, each time for [`LOCK_TIMEOUT`]; between two tries writers go on.
const LOCK_TRIES: u32 = 15;
/// How long writers of a table can be held up by one try.
const LOCK_TIMEOUT: &str = "2s";
/// Between two tries.
const LOCK_PAUSE: Duration = Duration::from_millis(500);

/// Why a step was not done.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The server did not do it; trying again may help.
    #[error("{doing}: {}", describe(error))]
    Failed {
        /// What was being done.
        doing: String,
        /// What the server said.
        error: Error,
    },
    /// The connection failed; trying again may help.
    #[error("{0}")]
    Unavailable(String),
    /// The operator has to do something first.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

impl From<ConnectionError> for SetupError {
    fn from(error: ConnectionError) -> Self {
        match SourceError::from(error) {
            SourceError::Unavailable(text) => SetupError::Unavailable(text),
            SourceError::Refused(refusal) => SetupError::Refused(refusal),
        }
    }
}

/// An error with the server's own words, which `Display` leaves out.
fn describe(error: &Error) -> String {
    match error.as_db_error() {
        Some(db) => db.to_string(),
        None => match std::error::Error::source(error) {
            Some(cause) => format!("{error}: {cause}"),
            None => error.to_string(),
        },
    }
}

impl SetupError {
    fn at(doing: &str) -> impl FnOnce(Error) -> SetupError + '_ {
        move |error| {
            if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) {
                return Refusal::new(
                    format!("{doing}: {}", describe(&error)),
                    "let postgres.admin_url name a role that owns the tables and may create in the database, \
                     or have a DBA run what `millrace setup --dry-run` prints",
                )
                .into();
            }
            SetupError::Failed { doing: doing.to_owned(), error }
        }
    }
}

/// The statements for the heartbeat table. Those that can be repeated are, so that a DBA's own run before is fine.
pub fn heartbeat_sql(plan: &Plan) -> Vec<String> {
    let role = quote(&plan.role);
    vec![
        "CREATE SCHEMA IF NOT EXISTS millrace".into(),
        "CREATE TABLE IF NOT EXISTS millrace.heartbeat (pipeline text PRIMARY KEY, beat bigint NOT NULL, \
         nonce text NOT NULL, at timestamptz NOT NULL)"
            .into(),
        format!(
            "INSERT INTO millrace.heartbeat (pipeline, beat, nonce, at) VALUES ({}, 0, '', now()) \
             ON CONFLICT (pipeline) DO NOTHING",
            quote_literal(&plan.heartbeat)
        ),
        format!("GRANT USAGE ON SCHEMA millrace TO {role}"),
        format!("GRANT SELECT, INSERT, UPDATE ON millrace.heartbeat TO {role}"),
    ]
}

/// The statements that bring a table into the publication, within one transaction. A transaction for each table: one
/// that held several tables' locks would hold up the writers of the first while it waits for the second.
pub fn publication_sql(plan: &Plan, table: &Table, exists: bool) -> Vec<String> {
    // Its partitions must be locked with it.
    let (name, locked, table) = (quote(&plan.publication), table.quoted(), table.only());
    let publish = if exists {
        format!("ALTER PUBLICATION {name} ADD TABLE {table}")
    } else {
        format!("CREATE PUBLICATION {name} FOR TABLE {table}")
    };
    vec![
        format!("SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'"),
        format!("LOCK TABLE {locked} IN SHARE ROW EXCLUSIVE MODE"),
        publish,
        announcement("''"),
    ]
}

/// Tells a running reader, in the stream, that the publication has changed; `content` is SQL.
fn announcement(content: &str) -> String {
    format!("SELECT pg_catalog.pg_logical_emit_message(true, {}, {content})", quote_literal(TABLES_CHANGED))
}

/// What of the publication's tables, given as SQL, is about to be taken out; see [`TABLES_CHANGED`].
fn taken_out(plan: &Plan, tables: &[String]) -> String {
    let names: Vec<String> =
        tables.iter().map(|table| format!("{}::regclass", quote_literal(table))).collect();
    format!(
        "(SELECT coalesce(string_agg(r.prrelid || '/' || r.oid, ' '), '') FROM pg_catalog.pg_publication_rel r
          JOIN pg_catalog.pg_publication p ON p.oid = r.prpubid
          WHERE p.pubname = {} AND r.prrelid IN ({}))",
        quote_literal(&plan.publication),
        names.join(", ")
    )
}

/// Everything but the slot, for a DBA to read or to run. `missing` are the tables that the publication lacks.
pub fn script(plan: &Plan, missing: &[Table], publication_exists: bool) -> String {
    let mut script = String::from("BEGIN;\n");
    for statement in heartbeat_sql(plan) {
        script.push_str(&format!("{statement};\n"));
    }
    script.push_str("COMMIT;\n");
    if !missing.is_empty() {
        script.push_str("-- The lock keeps out transactions that have already written the table.\n");
    }
    for (place, table) in missing.iter().enumerate() {
        script.push_str("BEGIN;\n");
        for statement in publication_sql(plan, table, publication_exists || place > 0) {
            script.push_str(&format!("{statement};\n"));
        }
        script.push_str("COMMIT;\n");
    }
    script.push_str("-- `millrace setup` makes the slot itself, for it needs the slot's snapshot:\n");
    script.push_str(&format!("-- {}\n", create_slot_command(plan)));
    script
}

/// Keeps a second `setup` of the same pipeline out, for as long as the connection lives.
pub async fn exclude_others(admin: &Client, plan: &Plan) -> Result<(), SetupError> {
    let doing = "cannot take the lock of setup";
    let key = format!("millrace setup {}", plan.pipeline);
    let row = admin
        .query_one("SELECT pg_catalog.pg_try_advisory_lock(pg_catalog.hashtextextended($1, 0))", &[&key])
        .await;
    if row.map_err(SetupError::at(doing))?.get(0) {
        return Ok(());
    }
    Err(Refusal::new(
        "another `millrace setup` or `teardown` of this pipeline is running",
        "wait for its end",
    )
    .into())
}

/// Makes the heartbeat table and its row.
pub async fn make_heartbeat(admin: &mut Client, plan: &Plan) -> Result<(), SetupError> {
    let doing = "cannot make the heartbeat table";
    // Applied by a DBA beforehand, it may be beyond the rights of this role, and needs none.
    if let Ok(finding) = check::heartbeat(admin, plan).await
        && finding.verdict == check::Verdict::Good
        && role_can_beat(admin, plan).await.map_err(SetupError::at(doing))?
    {
        return Ok(());
    }
    let transaction = admin.transaction().await.map_err(SetupError::at(doing))?;
    for statement in heartbeat_sql(plan) {
        transaction.batch_execute(&statement).await.map_err(SetupError::at(doing))?;
    }
    transaction.commit().await.map_err(SetupError::at(doing))
}

async fn role_can_beat(admin: &Client, plan: &Plan) -> Result<bool, Error> {
    const RIGHTS: &str = "SELECT pg_catalog.has_schema_privilege($1, 'millrace', 'USAGE')
        AND pg_catalog.has_table_privilege($1, 'millrace.heartbeat', 'SELECT') AND pg_catalog.has_table_privilege($1, 'millrace.heartbeat', 'INSERT')
        AND pg_catalog.has_table_privilege($1, 'millrace.heartbeat', 'UPDATE')";
    Ok(admin.query_one(RIGHTS, &[&plan.role]).await?.get(0))
}

/// Brings `tables` into the publication, one after the other. It is made with the first where there is none.
pub async fn publish(
    admin: &mut Client,
    plan: &Plan,
    tables: &[Table],
    exists: bool,
) -> Result<(), SetupError> {
    for (place, table) in tables.iter().enumerate() {
        publish_one(admin, plan, table, exists || place > 0).await?;
    }
    Ok(())
}

/// Tries until the table's lock is had.
async fn publish_one(admin: &mut Client, plan: &Plan, table: &Table, exists: bool) -> Result<(), SetupError> {
    let doing = format!("cannot bring {table} into publication {}", plan.publication);
    for attempt in 1..=LOCK_TRIES {
        match try_publish(admin, plan, table, exists).await {
            Ok(()) => return Ok(()),
            Err(error) if error.code().is_some_and(catalog::locked) => {
                tracing::info!(%table, attempt, "the table is being written; trying for its lock again");
                tokio::time::sleep(LOCK_PAUSE).await;
            }
            Err(error) => return Err(SetupError::at(&doing)(error)),
        }
    }
    Err(Refusal::new(
        format!("{doing}: long transactions write it all the time"),
        "run `millrace setup` again when they have ended; \
         SELECT pid, xact_start, query FROM pg_stat_activity ORDER BY xact_start shows them",
    )
    .into())
}

async fn try_publish(admin: &mut Client, plan: &Plan, table: &Table, exists: bool) -> Result<(), Error> {
    let transaction = admin.transaction().await?;
    for statement in publication_sql(plan, table, exists) {
        transaction.batch_execute(&statement).await?;
    }
    transaction.commit().await
}

/// Takes tables out of the publication, given as SQL; what the log holds of them goes no further.
pub async fn withdraw(admin: &mut Client, plan: &Plan, tables: &[String]) -> Result<(), SetupError> {
    let doing = format!("cannot take tables out of publication {}", plan.publication);
    let at = || SetupError::at(&doing);
    let transaction = admin.transaction().await.map_err(at())?;
    let announced = announcement(&taken_out(plan, tables));
    // Without ONLY a parent would take its children along, which are tables of their own.
    let tables: Vec<String> = tables.iter().map(|table| format!("ONLY {table}")).collect();
    let drop = format!("ALTER PUBLICATION {} DROP TABLE {}", quote(&plan.publication), tables.join(", "));
    for statement in [announced, drop] {
        transaction.batch_execute(&statement).await.map_err(at())?;
    }
    transaction.commit().await.map_err(at())
}

/// The tables that the publication has, and its `pg_publication.xmin`.
pub async fn published(admin: &Client, plan: &Plan) -> Result<(Vec<PublishedTable>, u32), SetupError> {
    let at = || SetupError::at("cannot read the publication");
    let looks = Looks::prepare(admin).await.map_err(at())?;
    let look = async {
        let mut watch = Watch::begin(admin, &plan.publication).await?;
        looks.look(admin, &plan.publication, &plan.tables, &mut watch).await
    };
    match look.await {
        Ok(look) => Ok((look.tables, look.publication.map_or(0, |publication| publication.xmin))),
        Err(SourceError::Refused(refusal)) => Err(refusal.into()),
        Err(SourceError::Unavailable(what)) => Err(SetupError::Unavailable(what)),
    }
}

/// The names of the tables that the publication lists, its own and what others put there.
pub async fn members(admin: &Client, plan: &Plan) -> Result<Vec<Table>, SetupError> {
    const MEMBERS: &str = "SELECT n.nspname::text, c.relname::text FROM pg_catalog.pg_publication p
        JOIN pg_catalog.pg_publication_rel r ON r.prpubid = p.oid JOIN pg_catalog.pg_class c ON c.oid = r.prrelid
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE p.pubname = $1";
    let rows = admin.query(MEMBERS, &[&plan.publication]).await;
    let rows = rows.map_err(SetupError::at("cannot read the publication"))?;
    Ok(rows.iter().map(|row| Table { schema: row.get(0), name: row.get(1) }).collect())
}

/// The names of this database's slots.
pub async fn slots(client: &Client) -> Result<Vec<String>, SetupError> {
    const SLOTS: &str = "SELECT slot_name::text FROM pg_catalog.pg_replication_slots WHERE database = pg_catalog.current_database()";
    let rows = client.query(SLOTS, &[]).await.map_err(SetupError::at("cannot read the slots"))?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Drops the slot where it exists. Refuses while a reader holds it.
pub async fn drop_slot(admin: &Client, name: &str) -> Result<(), SetupError> {
    const DROP: &str = "SELECT pg_catalog.pg_drop_replication_slot(slot_name) FROM pg_catalog.pg_replication_slots WHERE slot_name = $1";
    match admin.execute(DROP, &[&name]).await {
        Ok(_) => Ok(()),
        Err(error) if error.code() == Some(&SqlState::OBJECT_IN_USE) => Err(Refusal::new(
            format!("slot {name} is in use: {}", describe(&error)),
            "stop the reader of this pipeline, or wait until an interrupted `millrace setup` is over; then run this again",
        )
        .into()),
        Err(error) => Err(SetupError::at(&format!("cannot drop slot {name}"))(error)),
    }
}

/// Removes publication and heartbeat; the table and the schema go with the last pipeline.
pub async fn remove(admin: &mut Client, plan: &Plan) -> Result<(), SetupError> {
    let doing = "cannot remove the publication and the heartbeat";
    let at = || SetupError::at(doing);
    let publication = format!("DROP PUBLICATION IF EXISTS {}", quote(&plan.publication));
    admin.batch_execute(&publication).await.map_err(at())?;
    let exists = "SELECT pg_catalog.to_regclass('millrace.heartbeat') IS NOT NULL";
    if !admin.query_one(exists, &[]).await.map_err(at())?.get::<_, bool>(0) {
        return Ok(());
    }
    let transaction = admin.transaction().await.map_err(at())?;
    // Of every generation.
    let delete = "DELETE FROM millrace.heartbeat WHERE pg_catalog.split_part(pipeline, '.', 1) = $1";
    transaction.execute(delete, &[&plan.pipeline]).await.map_err(at())?;
    let last = "SELECT NOT EXISTS (SELECT FROM millrace.heartbeat)";
    if transaction.query_one(last, &[]).await.map_err(at())?.get(0) {
        // No CASCADE: whatever else somebody keeps in that schema stays, and so does the schema.
        transaction.batch_execute("DROP TABLE millrace.heartbeat").await.map_err(at())?;
        let others = "SELECT NOT EXISTS (SELECT FROM pg_catalog.pg_class WHERE relnamespace = 'millrace'::regnamespace)";
        if transaction.query_one(others, &[]).await.map_err(at())?.get(0) {
            transaction.batch_execute("DROP SCHEMA millrace").await.map_err(at())?;
        }
    }
    transaction.commit().await.map_err(at())
}

/// A slot just made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NewSlot {
    /// Every transaction that commits from here on is streamed.
    pub consistent_point: Lsn,
    /// `pg_current_snapshot()` under the snapshot exported with the slot.
    pub snapshot: Snapshot,
    /// The server.
    pub timeline: Timeline,
}

/// The options' old form, which every server from 14 on understands.
fn create_slot_command(plan: &Plan) -> String {
    format!("CREATE_REPLICATION_SLOT {} LOGICAL pgoutput EXPORT_SNAPSHOT", quote(&plan.slot))
}

/// Makes the slot. `replication` is a connection of the running role.
pub async fn create_slot(
    replication: &mut ReplicationConnection,
    admin: &mut Client,
    plan: &Plan,
) -> Result<NewSlot, SetupError> {
    let (timeline, _) = replication.identify_system().await?;
    let (consistent_point, name) = slot_and_snapshot(replication, admin, plan).await?;
    match look_under(admin, &name).await {
        Ok(snapshot) => Ok(NewSlot { consistent_point, snapshot, timeline }),
        Err(error) => {
            drop_slot(admin, &plan.slot).await?;
            Err(error)
        }
    }
}

async fn slot_and_snapshot(
    replication: &mut ReplicationConnection,
    admin: &Client,
    plan: &Plan,
) -> Result<(Lsn, String), SetupError> {
    let created = match replication.command(&create_slot_command(plan)).await {
        Ok(created) => created,
        Err(ConnectionError::Io { error, .. }) if error.kind() == std::io::ErrorKind::TimedOut => {
            return Err(SetupError::Unavailable(held_up(admin).await));
        }
        Err(error) => return Err(error.into()),
    };
    let field = |place: usize| std::str::from_utf8(created.first()?.get(place)?.as_ref()?).ok();
    match (field(1).and_then(|lsn| lsn.parse().ok()), field(2)) {
        (Some(consistent_point), Some(snapshot)) => Ok((consistent_point, snapshot.to_owned())),
        _ => Err(SetupError::Unavailable(
            "CREATE_REPLICATION_SLOT gave no consistent point and snapshot".into(),
        )),
    }
}

/// What a new slot waits for: a transaction that ran when it was begun, or one that was prepared and forgotten.
async fn held_up(admin: &Client) -> String {
    const PREPARED: &str =
        "SELECT gid, database::text, prepared::text FROM pg_catalog.pg_prepared_xacts ORDER BY prepared";
    let prepared = admin.query(PREPARED, &[]).await.unwrap_or_default();
    let statement = |row: &tokio_postgres::Row| {
        let (gid, database, since): (String, String, String) = (row.get(0), row.get(1), row.get(2));
        format!(
            "in database {}: ROLLBACK PREPARED {}; -- or COMMIT PREPARED; prepared {since}",
            quote(&database),
            quote_literal(&gid)
        )
    };
    let statements: Vec<String> = prepared.iter().map(statement).collect();
    let running = "SELECT pid, xact_start, query FROM pg_stat_activity WHERE backend_xid IS NOT NULL ORDER BY xact_start";
    if statements.is_empty() {
        return format!(
            "the slot waits for transactions that ran when it was begun; run the same command again when they have ended: {running}"
        );
    }
    format!(
        "the slot waits for transactions that ran when it was begun. Prepared ones end only by hand ({}); running ones: {running}. \
         Run the same command again when they have ended",
        statements.join("; ")
    )
}

/// What the exported snapshot sees.
async fn look_under(admin: &mut Client, name: &str) -> Result<Snapshot, SetupError> {
    let at = || SetupError::at("cannot look under the slot's snapshot");
    let transaction =
        admin.build_transaction().isolation_level(IsolationLevel::RepeatableRead).read_only(true);
    let transaction = transaction.start().await.map_err(at())?;
    let import = format!("SET TRANSACTION SNAPSHOT {}", quote_literal(name));
    transaction.batch_execute(&import).await.map_err(at())?;
    let row =
        transaction.query_one("SELECT pg_catalog.pg_current_snapshot()::text", &[]).await.map_err(at())?;
    transaction.rollback().await.map_err(at())?;
    let text: String = row.get(0);
    text.parse().map_err(|error| SetupError::Unavailable(format!("{error}")))
}

/// What the heartbeat table holds for this pipeline: the count and the random text of the last beat.
pub async fn read_heartbeat(client: &Client, plan: &Plan) -> Result<(i64, String), SetupError> {
    let doing = "cannot read millrace.heartbeat";
    let query = "SELECT beat, nonce FROM millrace.heartbeat WHERE pipeline = $1";
    let row = client.query_one(query, &[&plan.heartbeat]).await.map_err(SetupError::at(doing))?;
    Ok((row.get(0), row.get(1)))
}
