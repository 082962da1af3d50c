//! What must hold at the source before a pipeline can run, each with what mends it.
//!
//! Everything here only reads. The questions are asked over the connection of the running role, because it is
//! that role's rights that count; `setup` asks the same ones before it changes anything.

use change::{NEW_LOG, TableSchema};
use tokio_postgres::{Client, Error, Row};

use crate::catalog::{self, Hidden};
use crate::keys;
use crate::plan::{Plan, Table, quote, quote_literal};
use crate::publication::{self, Publication};

/// The oldest server that works, as `server_version_num` has it.
const OLDEST_SERVER: i32 = 140_000;
/// Servers from this one on refuse updates of a published table whose replica identity has a generated column that the
/// publication does not publish. FULL has every column, also a virtual one, which no publication can publish.
const IDENTITY_CHECKED: i32 = 180_000;
/// Before this a walsender that has seen a table written keeps to it that the table is not published, when it becomes a
/// partition of one that is.
const ATTACHED_IS_STREAMED: i32 = 150_000;
/// Below this a short pause of ours ends the connection.
const SHORTEST_SENDER_TIMEOUT_MS: i64 = 10_000;

/// One thing that was looked at.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    /// What was found: `wal_level is replica, not logical`.
    pub what: String,
    /// Whether that is as it must be.
    pub verdict: Verdict,
    /// What to do about it, as text that can be pasted; empty when there is nothing to do.
    pub remedy: String,
}

/// What a [`Finding`] means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// As it must be.
    Good,
    /// Works, but an operator should know.
    Advice,
    /// The pipeline cannot run like this.
    Wrong,
}

impl Finding {
    /// As it must be.
    pub fn good(what: impl Into<String>) -> Self {
        Finding { what: what.into(), verdict: Verdict::Good, remedy: String::new() }
    }

    /// Not as it must be.
    pub fn wrong(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Finding { what: what.into(), verdict: Verdict::Wrong, remedy: remedy.into() }
    }

    /// Worth knowing.
    pub fn advice(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Finding { what: what.into(), verdict: Verdict::Advice, remedy: remedy.into() }
    }

    /// `good` when `holds`, else `wrong` and its remedy.
    pub fn check(
        holds: bool,
        good: impl Into<String>,
        wrong: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        if holds { Finding::good(good) } else { Finding::wrong(wrong, remedy) }
    }
}

/// The server's settings and the running role. `slot` is the pipeline's: where it stands, it needs no free place.
pub async fn server(client: &Client, slot: &str) -> Result<Vec<Finding>, Error> {
    const SETTINGS: &str = "SELECT pg_catalog.current_setting('server_version_num')::int AS version,
        pg_catalog.current_setting('server_version') AS version_name, pg_catalog.pg_is_in_recovery() AS standby,
        pg_catalog.current_setting('wal_level') AS wal_level, pg_catalog.current_setting('fsync') = 'on' AS fsync,
        pg_catalog.current_setting('server_encoding') AS encoding,
        pg_catalog.current_setting('max_replication_slots')::int AS slots_max,
        (SELECT count(*)::int FROM pg_catalog.pg_replication_slots WHERE slot_name <> $1) AS slots_used,
        pg_catalog.current_setting('max_wal_senders')::int AS senders_max,
        (SELECT count(*)::int FROM pg_catalog.pg_stat_replication WHERE pid NOT IN
            (SELECT active_pid FROM pg_catalog.pg_replication_slots WHERE slot_name = $1 AND active_pid IS NOT NULL)) AS senders_used,
        (SELECT setting::bigint FROM pg_catalog.pg_settings WHERE name = 'max_slot_wal_keep_size') AS keep_mb,
        (SELECT setting::bigint FROM pg_catalog.pg_settings WHERE name = 'wal_sender_timeout') AS sender_timeout_ms";
    let row = client.query_one(SETTINGS, &[&slot]).await?;
    let mut findings = settings(&row);
    findings.push(role(client).await?);
    Ok(findings)
}

fn settings(row: &Row) -> Vec<Finding> {
    let (slots_max, slots_used): (i32, i32) = (row.get("slots_max"), row.get("slots_used"));
    let (senders_max, senders_used): (i32, i32) = (row.get("senders_max"), row.get("senders_used"));
    let wal_level: String = row.get("wal_level");
    let version: String = row.get("version_name");
    vec![
        Finding::check(
            row.get::<_, i32>("version") >= OLDEST_SERVER,
            format!("Postgres {version}"),
            format!("Postgres {version} is older than 14"),
            "upgrade the server to Postgres 14 or later",
        ),
        Finding::check(
            !row.get::<_, bool>("standby"),
            "the server is a primary",
            "the server is a standby",
            "let postgres.url name the primary",
        ),
        Finding::check(
            wal_level == "logical",
            "wal_level is logical",
            format!("wal_level is {wal_level}, not logical"),
            "ALTER SYSTEM SET wal_level = logical; then restart the server",
        ),
        Finding::check(
            row.get("fsync"),
            "fsync is on",
            "fsync is off: after a crash the server may have lost what the log already holds",
            "ALTER SYSTEM SET fsync = on; SELECT pg_reload_conf();",
        ),
        Finding::check(
            row.get::<_, String>("encoding") != "SQL_ASCII",
            "the database's encoding is known",
            "the database's encoding is SQL_ASCII, so nobody knows what its text means",
            "dump and restore it into a database with ENCODING 'UTF8'",
        ),
        Finding::check(
            slots_used < slots_max,
            format!("replication slots: others use {slots_used} of {slots_max}"),
            format!("no replication slot is free: others use {slots_used} of {slots_max}"),
            format!("ALTER SYSTEM SET max_replication_slots = {}; then restart the server", slots_used + 4),
        ),
        Finding::check(
            senders_used < senders_max,
            format!("WAL senders: others use {senders_used} of {senders_max}"),
            format!("no WAL sender is free: others use {senders_used} of {senders_max}"),
            format!("ALTER SYSTEM SET max_wal_senders = {}; then restart the server", senders_used + 4),
        ),
        retention(row.get("keep_mb")),
        sender_timeout(row.get("sender_timeout_ms")),
    ]
}

fn retention(keep_mb: i64) -> Finding {
    match keep_mb {
        ..0 => Finding::advice(
            "max_slot_wal_keep_size is unlimited: while Kafka is away WAL grows until the disk is full",
            "ALTER SYSTEM SET max_slot_wal_keep_size = '50GB'; -- what the disk can spare; then SELECT pg_reload_conf();",
        ),
        _ => Finding::good(format!("max_slot_wal_keep_size is {keep_mb} MB")),
    }
}

fn sender_timeout(timeout_ms: i64) -> Finding {
    match timeout_ms {
        1..SHORTEST_SENDER_TIMEOUT_MS => Finding::advice(
            format!("wal_sender_timeout is {timeout_ms} ms: short pauses will end the stream"),
            "ALTER SYSTEM SET wal_sender_timeout = '60s'; SELECT pg_reload_conf();",
        ),
        0 => Finding::good("wal_sender_timeout is off"),
        _ => Finding::good(format!("wal_sender_timeout is {timeout_ms} ms")),
    }
}

/// Managed servers give the right to replicate by membership instead of the attribute.
async fn role(client: &Client) -> Result<Finding, Error> {
    const ROLE: &str = "SELECT rolname AS name, rolsuper OR rolreplication OR EXISTS (
            SELECT FROM pg_catalog.pg_roles managed WHERE managed.rolname IN ('rds_replication', 'cloudsqlsuperuser')
                AND pg_catalog.pg_has_role(r.oid, managed.oid, 'MEMBER')) AS replicates
        FROM pg_catalog.pg_roles r WHERE rolname = current_user";
    let row = client.query_one(ROLE, &[]).await?;
    let name: String = row.get("name");
    Ok(Finding::check(
        row.get("replicates"),
        format!("role {name} may replicate"),
        format!("role {name} may not replicate"),
        format!("ALTER ROLE {} REPLICATION; -- on Amazon RDS: GRANT rds_replication TO {0};", quote(&name)),
    ))
}

/// Whether the tables exist, are of a kind that can be streamed, and may be read.
pub async fn tables(client: &Client, plan: &Plan) -> Result<Vec<Finding>, Error> {
    let mut findings = Vec::new();
    for table in &plan.tables {
        let found = match table.oid(client).await? {
            Some(oid) => partitioned(client, plan, table, oid).await?,
            None => None,
        };
        match found {
            Some(found) => findings.extend(found),
            None => findings.push(one_table(client, table).await?),
        }
    }
    Ok(findings)
}

/// Looks at the partitions of a table; `None` where it is none that has them.
async fn partitioned(
    client: &Client,
    plan: &Plan,
    table: &Table,
    oid: u32,
) -> Result<Option<Vec<Finding>>, Error> {
    let Some(root) = catalog::schema_of(client, oid).await?.filter(TableSchema::partitioned) else {
        return Ok(None);
    };
    let mut findings = Vec::new();
    let partitions = partitions(client, oid).await?;
    let version = "SELECT pg_catalog.current_setting('server_version_num')::int";
    if client.query_one(version, &[]).await?.get::<_, i32>(0) < ATTACHED_IS_STREAMED {
        let names: Vec<String> = partitions.iter().map(|(_, partition)| format!("\"{partition}\"")).collect();
        findings.push(Finding::wrong(
            format!(
                "table {table} is partitioned, and before Postgres 15 the changes of a partition that is attached while \
                 a reader is connected may not be streamed"
            ),
            format!("upgrade the server, or name the partitions in `postgres.tables`: {}", names.join(", ")),
        ));
        return Ok(Some(findings));
    }
    let key = |table: &TableSchema| table.key_columns().map(|column| column.name.clone()).collect::<Vec<_>>();
    for (relation, partition) in &partitions {
        let found = one_table(client, partition).await?;
        if found.verdict != Verdict::Good {
            findings.push(found);
        } else if plan.tables.contains(partition) {
            findings.push(Finding::wrong(
                format!("table {partition} is a partition of {table}, which is configured too"),
                format!("take {partition} out of `postgres.tables`"),
            ));
        } else if let Some(schema) = catalog::schema_of(client, *relation).await?
            && key(&schema) != key(&root)
        {
            findings.push(Finding::wrong(
                format!(
                    "partition {partition} of {table} has the key ({}), and the table itself ({})",
                    key(&schema).join(", "),
                    key(&root).join(", ")
                ),
                format!(
                    "ALTER TABLE {} ADD PRIMARY KEY (...); ALTER TABLE {} REPLICA IDENTITY DEFAULT; -- or FULL",
                    table.quoted(),
                    partition.quoted()
                ),
            ));
        }
    }
    if !readable(client, table).await? {
        let (schema, sql) = (quote(&table.schema), table.quoted());
        let what = format!("table {table} cannot be read by the role");
        findings.push(Finding::wrong(
            what,
            format!("GRANT USAGE ON SCHEMA {schema} TO ...; GRANT SELECT ON {sql} TO ...;"),
        ));
    }
    if findings.is_empty() {
        findings.push(Finding::good(format!(
            "table {table} can be streamed, with {} partitions",
            partitions.len()
        )));
    }
    Ok(Some(findings))
}

async fn one_table(client: &Client, table: &Table) -> Result<Finding, Error> {
    const TABLE: &str = "SELECT c.oid, c.relkind::text AS kind, c.relpersistence::text AS persistence,
            c.relreplident::text AS identity, pg_catalog.has_table_privilege(c.oid, 'SELECT') AS readable,
            pg_catalog.row_security_active(c.oid) AS hides,
            EXISTS (SELECT FROM pg_catalog.pg_index i WHERE i.indrelid = c.oid AND i.indisprimary AND i.indimmediate) AS primary_key,
            (SELECT min(a.attname) FROM pg_catalog.pg_index i
             JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attgenerated <> ''
                 AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1])
             WHERE i.indrelid = c.oid AND CASE c.relreplident WHEN 'i' THEN i.indisreplident
                                               ELSE i.indisprimary AND i.indimmediate END)::text AS generated_key,
            (SELECT min(a.attname) FROM pg_catalog.pg_attribute a WHERE a.attrelid = c.oid AND a.attgenerated <> '')::text AS generated,
            pg_catalog.current_setting('server_version_num')::int AS version, current_user::text AS role
        FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = $1 AND c.relname = $2";
    let Some(row) = client.query_opt(TABLE, &[&table.schema, &table.name]).await? else {
        return Ok(Finding::wrong(
            format!("table {table} does not exist"),
            "create it, or correct `postgres.tables`; letters' case counts",
        ));
    };
    let sql = table.quoted();
    let role = quote(&row.get::<_, String>("role"));
    let kind: String = row.get("kind");
    let wrong = |what: String, remedy: String| Ok(Finding::wrong(format!("table {table} {what}"), remedy));
    if kind != "r" {
        return wrong(
            "is not an ordinary table".into(),
            "name the tables that it reads, in `postgres.tables`".into(),
        );
    }
    if row.get::<_, String>("persistence") != "p" {
        return wrong(
            "is unlogged: its changes are not in the WAL".into(),
            format!("ALTER TABLE {sql} SET LOGGED;"),
        );
    }
    if let Some((what, remedy)) = identity(&row, &sql) {
        return wrong(what, remedy);
    }
    if !row.get::<_, bool>("readable") || !schema_usable(client, &table.schema).await? {
        let schema = quote(&table.schema);
        let remedy = format!("GRANT USAGE ON SCHEMA {schema} TO {role}; GRANT SELECT ON {sql} TO {role};");
        return wrong(format!("cannot be read by role {role}"), remedy);
    }
    let operators = key_operators(client, row.get("oid")).await?;
    if let Some(Hidden { schema, .. }) = operators.into_iter().find(|hidden| !hidden.usable) {
        let what =
            format!("has a key that operators of schema {schema} order, which role {role} may not use");
        return wrong(what, format!("GRANT USAGE ON SCHEMA {schema} TO {role};"));
    }
    if row.get("hides") {
        let what = format!("has row security, which hides rows from role {role}");
        return wrong(what, format!("ALTER ROLE {role} BYPASSRLS;"));
    }
    Ok(Finding::good(format!("table {table} can be streamed")))
}

/// Tables of a store's query that have children by inheritance: the query sees the children's rows as well, and in the log
/// each table is by itself.
pub async fn inheritance(client: &Client, queried: &[Table]) -> Result<Vec<Finding>, Error> {
    const CHILDREN: &str = "SELECT string_agg(i.inhrelid::regclass::text, ', ' ORDER BY i.inhrelid)
        FROM pg_catalog.pg_inherits i JOIN pg_catalog.pg_class c ON c.oid = i.inhparent AND c.relkind = 'r'
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = $1 AND c.relname = $2";
    let mut findings = Vec::new();
    for table in queried {
        let row = client.query_one(CHILDREN, &[&table.schema, &table.name]).await?;
        let Some(children) = row.try_get::<_, Option<String>>(0)? else { continue };
        findings.push(Finding::wrong(
            format!("table {table} has children by inheritance ({children}), whose rows a query of it sees as well"),
            format!(
                "let the store name each child, a table of its own; or ALTER TABLE ... NO INHERIT {}; partitions of a \
                 partitioned table are no such children",
                table.quoted()
            ),
        ));
    }
    Ok(findings)
}

/// What is wrong with the old rows that a table's updates and deletes would bring, and the remedy.
fn identity(row: &Row, sql: &str) -> Option<(String, String)> {
    let identity: String = row.get("identity");
    if identity == "n" || (identity == "d" && !row.get::<_, bool>("primary_key")) {
        return Some((
            "has no replica identity: once published, its updates and deletes would fail".into(),
            format!(
                "ALTER TABLE {sql} REPLICA IDENTITY FULL; -- or add a primary key that is not deferrable"
            ),
        ));
    }
    if let Some(column) = row.get::<_, Option<String>>("generated_key") {
        return Some((
            format!(
                "has the generated column {} in its key: it is not in the stream, and without it rows have the same key",
                quote(&column)
            ),
            format!(
                "ALTER TABLE {sql} REPLICA IDENTITY USING INDEX ...; -- a unique one over columns that are NOT NULL and \
                 not generated; or give it a primary key of such columns"
            ),
        ));
    }
    let generated: Option<String> = row.get("generated");
    if let Some(column) =
        generated.filter(|_| identity == "f" && row.get::<_, i32>("version") >= IDENTITY_CHECKED)
    {
        let remedy = if row.get("primary_key") {
            format!("ALTER TABLE {sql} REPLICA IDENTITY DEFAULT;")
        } else {
            format!(
                "ALTER TABLE {sql} REPLICA IDENTITY USING INDEX ...; -- or add a primary key, and REPLICA IDENTITY DEFAULT"
            )
        };
        let what = format!(
            "has REPLICA IDENTITY FULL and the generated column {}: once published, its updates and deletes would fail",
            quote(&column)
        );
        return Some((what, remedy));
    }
    None
}

/// The tables that hold a partitioned table's rows.
async fn partitions(client: &Client, root: u32) -> Result<Vec<(u32, Table)>, Error> {
    const LEAVES: &str =
        "SELECT c.oid, n.nspname::text, c.relname::text FROM pg_catalog.pg_partition_tree($1::oid::regclass) t
        JOIN pg_catalog.pg_class c ON c.oid = t.relid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        WHERE t.isleaf AND c.relkind <> 'p' ORDER BY 2, 3";
    let leaves = client.query(LEAVES, &[&root]).await?;
    Ok(leaves.iter().map(|row| (row.get(0), Table { schema: row.get(1), name: row.get(2) })).collect())
}

async fn readable(client: &Client, table: &Table) -> Result<bool, Error> {
    const READABLE: &str = "SELECT pg_catalog.has_schema_privilege($1, 'USAGE') AND pg_catalog.has_table_privilege($2, 'SELECT')";
    Ok(client.query_one(READABLE, &[&table.schema, &table.quoted()]).await?.get(0))
}

/// Schemas with operators of the table's key that a statement would not find by their names alone.
async fn key_operators(client: &Client, table: u32) -> Result<Vec<Hidden>, Error> {
    match catalog::schema_of(client, table).await? {
        Some(schema) => catalog::hidden_operators(client, &keys::types_of(&schema)).await,
        None => Ok(Vec::new()),
    }
}

async fn schema_usable(client: &Client, schema: &str) -> Result<bool, Error> {
    let row = client.query_one("SELECT pg_catalog.has_schema_privilege($1, 'USAGE')", &[&schema]).await?;
    Ok(row.get(0))
}

/// Compares the publication with the plan; `None` when there is none.
pub async fn publication(client: &Client, plan: &Plan) -> Result<Option<Publication>, Error> {
    publication::judge(client, &plan.publication, &plan.tables).await
}

/// The slot as it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Slot {
    /// Whether a reader holds it.
    pub active: bool,
    /// What makes it unusable, and the remedy; `None` for a good one.
    pub wrong: Option<Finding>,
}

/// Reads the slot; `None` when there is none of that name.
pub async fn slot(client: &Client, name: &str) -> Result<Option<Slot>, Error> {
    const SLOT: &str = "SELECT active, temporary, coalesce(plugin, '')::text AS plugin, two_phase,
            coalesce(wal_status, '') AS wal_status,
            coalesce(database, '')::text AS database, pg_catalog.current_database()::text AS here
        FROM pg_catalog.pg_replication_slots WHERE slot_name = $1";
    let Some(row) = client.query_opt(SLOT, &[&name]).await? else { return Ok(None) };
    let drop = format!("SELECT pg_drop_replication_slot({}); then run `millrace setup`", quote_literal(name));
    let (plugin, database): (String, String) = (row.get("plugin"), row.get("database"));
    let wrong = if row.get("temporary") || plugin != "pgoutput" {
        Some(Finding::wrong(format!("slot {name} is not a permanent one of pgoutput"), drop))
    } else if database != row.get::<_, String>("here") {
        Some(Finding::wrong(
            format!("slot {name} belongs to database {database}"),
            "give this pipeline another name: slots are the whole server's",
        ))
    } else if row.get("two_phase") {
        // Its PREPARE is acknowledged before COMMIT PREPARED, whose rows then never come (h13).
        Some(Finding::wrong(format!("slot {name} is a two-phase slot"), drop))
    } else if row.get::<_, String>("wal_status") == "lost" {
        Some(Finding::wrong(
            format!(
                "slot {name} is lost: the server removed WAL that it needs, so the log cannot be completed"
            ),
            NEW_LOG,
        ))
    } else {
        None
    };
    Ok(Some(Slot { active: row.get("active"), wrong }))
}

/// How much a table holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Size {
    /// Rows, as the server estimates; 0 for unknown.
    pub rows: u64,
    /// Bytes, TOAST included and indexes not.
    pub bytes: u64,
    /// Bytes of its largest part, it or a partition, where nothing tells rows apart.
    pub keyless_bytes: u64,
}

/// How much a table holds; nothing where it does not exist.
pub async fn size(client: &Client, table: &Table) -> Result<Size, Error> {
    const SIZE: &str = "SELECT coalesce(sum(greatest(l.reltuples, 0)), 0)::int8, coalesce(sum(pg_catalog.pg_table_size(l.oid)), 0)::int8,
            coalesce(max(pg_catalog.pg_table_size(l.oid)) FILTER (WHERE l.relreplident = 'f' AND NOT EXISTS (
                SELECT FROM pg_catalog.pg_index i WHERE i.indrelid = l.oid AND i.indisprimary AND i.indimmediate)), 0)::int8
        FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        JOIN pg_catalog.pg_class l ON l.oid = c.oid OR l.oid IN (SELECT t.relid FROM pg_catalog.pg_partition_tree(c.oid) t)
        WHERE n.nspname = $1 AND c.relname = $2";
    let row = client.query_one(SIZE, &[&table.schema, &table.name]).await?;
    let number = |place| row.get::<_, i64>(place).unsigned_abs();
    Ok(Size { rows: number(0), bytes: number(1), keyless_bytes: number(2) })
}

/// Tables without a key that are larger than a round may be: nothing tells one part of them from another, so that they
/// are read in one piece (h25).
pub async fn too_large(client: &Client, plan: &Plan, tables: &[Table]) -> Result<Vec<Finding>, Error> {
    let mut findings = Vec::new();
    for table in tables {
        let Size { keyless_bytes: bytes, .. } = size(client, table).await?;
        if bytes > plan.keyless_bytes {
            findings.push(Finding::wrong(
                format!(
                    "table {table} has no primary key and {} MB: its rows can only be read in one piece, for which all \
                     other changes wait",
                    bytes >> 20
                ),
                format!(
                    "ALTER TABLE {} ADD PRIMARY KEY (...); -- or allow it: [snapshot] keyless_mb = {}",
                    table.quoted(),
                    (bytes >> 20) + 1
                ),
            ));
        }
    }
    Ok(findings)
}

/// Whether the heartbeat table stands and the running role may use it.
pub async fn heartbeat(client: &Client, plan: &Plan) -> Result<Finding, Error> {
    const TABLE: &str = "SELECT pg_catalog.has_table_privilege(c.oid, 'SELECT') AND pg_catalog.has_table_privilege(c.oid, 'INSERT')
            AND pg_catalog.has_table_privilege(c.oid, 'UPDATE')
            AND pg_catalog.has_schema_privilege(n.oid, 'USAGE') AS usable, current_user::text AS role
        FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = 'millrace' AND c.relname = 'heartbeat' AND c.relkind = 'r'";
    let missing =
        |what: &str| Finding::wrong(what, "run `millrace setup`, or apply migrations/002_heartbeat.sql");
    let Some(row) = client.query_opt(TABLE, &[]).await? else {
        return Ok(missing("the heartbeat table millrace.heartbeat does not exist"));
    };
    if !row.get::<_, bool>("usable") {
        let role = quote(&row.get::<_, String>("role"));
        return Ok(Finding::wrong(
            format!("role {role} may not read and write millrace.heartbeat"),
            format!(
                "GRANT USAGE ON SCHEMA millrace TO {role}; GRANT SELECT, INSERT, UPDATE ON millrace.heartbeat TO {role};"
            ),
        ));
    }
    let beats =
        client.query_opt("SELECT FROM millrace.heartbeat WHERE pipeline = $1", &[&plan.heartbeat]).await?;
    Ok(match beats {
        Some(_) => Finding::good("the heartbeat table is in place"),
        None => missing("millrace.heartbeat has no row for this pipeline"),
    })
}
