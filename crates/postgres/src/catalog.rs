//! What the catalog knows of tables that the stream does not say, and the connection to ask it.
//!
//! A Relation message names columns, types and key flags as they were when the change was made; that outranks the
//! catalog, which is asked *now*. The catalog adds what a message lacks: base types of domains, printed type
//! names, collations, and the order of the key, which under REPLICA IDENTITY FULL is the primary key. A table
//! dropped since then loses nothing but that: types outlive it, and what cannot be found stays as the message says.

use std::future::Future;
use std::time::Duration;

use change::{Collation, Column, Description, ReplicaIdentity, TableSchema};
use relay::{Announced, SourceError};
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row, Statement};

use crate::config::{ChannelBinding, Config, ConfigError, Host, Target};
use crate::error::ConnectionError;
use crate::plan::Table;
use crate::session::{NEWER_SETTINGS, attempts, session_options};
use crate::tls::Tls;

/// Resolves columns given as parallel arrays ($2 names, $3 types, $4 type modifiers) of relation $1, whose key is the
/// replica identity's index ($5) or the primary key. What the supported versions keep in different catalog columns is
/// read through `to_jsonb`.
const RESOLVE: &str = "
WITH RECURSIVE given AS (
    SELECT name, type, modifier, place
    FROM unnest($2::text[], $3::oid[], $4::int4[]) WITH ORDINALITY AS g (name, type, modifier, place)
), base AS (
    SELECT place, type, modifier, 0 AS depth FROM given
    UNION ALL
    SELECT b.place, t.typbasetype, t.typtypmod, b.depth + 1
    FROM base b JOIN pg_catalog.pg_type t ON t.oid = b.type AND t.typtype = 'd'
)
SELECT b.type,
       CASE WHEN bt.oid IS NULL THEN NULL ELSE pg_catalog.format_type(b.type, nullif(b.modifier, -1)) END,
       c.collname::text,
       c.collisdeterministic,
       c.collprovider::text,
       coalesce(pg_catalog.to_jsonb(c) ->> 'colllocale', pg_catalog.to_jsonb(c) ->> 'colliculocale', c.collcollate::text),
       coalesce(pg_catalog.to_jsonb(d) ->> 'datlocprovider', 'c'),
       CASE WHEN coalesce(pg_catalog.to_jsonb(d) ->> 'datlocprovider', 'c') = 'c' THEN d.datcollate::text
            ELSE coalesce(pg_catalog.to_jsonb(d) ->> 'datlocale', pg_catalog.to_jsonb(d) ->> 'daticulocale') END,
       pg_catalog.array_position((p.indkey::int2[])[0:p.indnkeyatts - 1], a.attnum),
       pg_catalog.pg_encoding_to_char(d.encoding) = 'UTF8',
       a.attname IS NULL,
       a.attnum
FROM given g
JOIN LATERAL (SELECT type, modifier FROM base WHERE place = g.place ORDER BY depth DESC LIMIT 1) b ON true
JOIN pg_catalog.pg_database d ON d.datname = pg_catalog.current_database()
LEFT JOIN pg_catalog.pg_type bt ON bt.oid = b.type
LEFT JOIN pg_catalog.pg_type t ON t.oid = g.type
LEFT JOIN pg_catalog.pg_attribute a
       ON a.attrelid = $1 AND a.attname = g.name AND NOT a.attisdropped
LEFT JOIN pg_catalog.pg_collation c
       ON c.oid = coalesce(CASE WHEN a.atttypid = g.type THEN a.attcollation END, t.typcollation)
LEFT JOIN pg_catalog.pg_index p
       ON p.indrelid = $1 AND CASE WHEN $5 THEN p.indisreplident ELSE p.indisprimary AND p.indimmediate END
ORDER BY g.place";

/// Columns of relation $1 as the stream would send them. Generated columns are not in the stream.
const COLUMNS: &str = "
SELECT a.attname::text, a.atttypid, a.atttypmod,
       coalesce(a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1]), false)
FROM pg_catalog.pg_class r
JOIN pg_catalog.pg_attribute a ON a.attrelid = r.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
LEFT JOIN pg_catalog.pg_index i
       ON i.indrelid = r.oid
      AND CASE r.relreplident WHEN 'd' THEN i.indisprimary AND i.indimmediate WHEN 'i' THEN i.indisreplident ELSE false END
WHERE r.oid = $1
ORDER BY a.attnum";

/// A partitioned table has no rows; the least of its partitions' identities is what every old row has.
const RELATION: &str = "
SELECT n.nspname::text, r.relname::text,
       coalesce((SELECT CASE WHEN bool_and(leaf.relreplident = 'f') THEN 'f' ELSE 'd' END
                 FROM pg_catalog.pg_partition_tree(r.oid) t JOIN pg_catalog.pg_class leaf ON leaf.oid = t.relid
                 WHERE t.isleaf AND r.relkind = 'p' HAVING count(*) > 0), r.relreplident::text),
       r.relkind = 'p'
FROM pg_catalog.pg_class r JOIN pg_catalog.pg_namespace n ON n.oid = r.relnamespace
WHERE r.oid = $1 AND r.relkind IN ('r', 'p')";

/// The table $1 and those above it whose partition it is. `pg_partition_ancestors` looks at the catalog of the moment, and
/// a statement at that of its snapshot: there a partition that has just been dropped is a table still, and would have no root.
pub(crate) const ANCESTORS: &str = "(
    WITH RECURSIVE up (relid, place) AS (
        SELECT $1::oid, 1
        UNION ALL
        SELECT i.inhparent, up.place + 1 FROM up
        JOIN pg_catalog.pg_class child ON child.oid = up.relid AND child.relispartition
        JOIN pg_catalog.pg_inherits i ON i.inhrelid = up.relid AND NOT i.inhdetachpending
    ) SELECT relid, place FROM up) a";

/// What the publication $1 lists, and all partitions below, as recursive tables of a WITH. Unlike the server's functions it
/// waits for no lock: `pg_partition_tree` waits while a table is altered, and from Postgres 16 on
/// `pg_get_publication_tables` does.
pub(crate) const PUBLISHED: &str = "published (publication, relid) AS (
    SELECT p.oid, r.prrelid FROM pg_catalog.pg_publication p
    JOIN pg_catalog.pg_publication_rel r ON r.prpubid = p.oid WHERE p.pubname = $1
    UNION
    SELECT published.publication, i.inhrelid FROM published
    JOIN pg_catalog.pg_inherits i ON i.inhparent = published.relid AND NOT i.inhdetachpending
    JOIN pg_catalog.pg_class c ON c.oid = i.inhrelid AND c.relispartition
)";

/// The partitioned table above $1, or itself, which publication $2 lists; of several the uppermost.
const ROOT: &str = "
SELECT c.oid, n.nspname::text, c.relname::text
FROM ANCESTORS
JOIN pg_catalog.pg_publication_rel r ON r.prrelid = a.relid
JOIN pg_catalog.pg_publication p ON p.oid = r.prpubid AND p.pubname = $2
JOIN pg_catalog.pg_class c ON c.oid = a.relid AND c.relkind = 'p'
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
ORDER BY a.place DESC LIMIT 1";

/// [`ROOT`] as a statement.
pub(crate) fn root() -> String {
    ROOT.replace("ANCESTORS", ANCESTORS)
}

/// The schemas of those operators by which base types ($1) are ordered that a statement would not find: `>` would
/// silently be another type's, that of text for `citext`. And whether the role may use them.
const HIDDEN_OPERATORS: &str = "
SELECT DISTINCT pg_catalog.quote_ident(n.nspname), pg_catalog.has_schema_privilege(n.oid, 'USAGE')
FROM pg_catalog.pg_opclass c
JOIN pg_catalog.pg_am m ON m.oid = c.opcmethod AND m.amname = 'btree'
JOIN pg_catalog.pg_amop o
  ON o.amopfamily = c.opcfamily AND o.amoplefttype = c.opcintype AND o.amoprighttype = c.opcintype
JOIN pg_catalog.pg_operator p ON p.oid = o.amopopr
JOIN pg_catalog.pg_namespace n ON n.oid = p.oprnamespace
WHERE c.opcdefault AND c.opcintype = ANY ($1::oid[]) AND NOT pg_catalog.pg_operator_is_visible(p.oid)
ORDER BY 1";

/// Adds schemas ($1, quoted) to the transaction's search path. At its end, so that whatever is found stays what it is.
const SEARCH_ALSO: &str = "
SELECT pg_catalog.set_config(
    'search_path', pg_catalog.concat_ws(', ', nullif(pg_catalog.current_setting('search_path'), ''), $1::text), true)";

/// How long a query of the catalog may take.
const QUERY_TIMEOUT: Duration = Duration::from_secs(30);

/// A column before the catalog was asked.
struct Bare {
    name: String,
    type_oid: u32,
    modifier: i32,
    key: bool,
}

/// Connects for SQL, with the session settings that every connection of Millrace has. Of several servers the first
/// that is a primary is taken. The connection's own task ends with the client.
pub async fn connect(config: &Config) -> Result<Client, ConnectionError> {
    connect_primary(config).await.map(|(client, _)| client)
}

/// The same, and which server it was.
pub(crate) async fn connect_primary(config: &Config) -> Result<(Client, Target), ConnectionError> {
    let mut last = ConfigError::Malformed("no server is named".into()).into();
    let several = config.targets().len() > 1;
    for target in config.targets() {
        match connect_to(target).await {
            Ok(client) if several && in_recovery(&client, target).await? => {
                // It may be promoted, or the primary come back.
                let error = std::io::Error::other("is a standby, and no server named answers as a primary");
                last = ConnectionError::Io { server: target.to_string(), error };
            }
            Ok(client) => return Ok((client, target.clone())),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Whether the server is a standby.
pub(crate) async fn in_recovery(client: &Client, target: &Target) -> Result<bool, ConnectionError> {
    let row = client.query_one("SELECT pg_catalog.pg_is_in_recovery()", &[]).await;
    row.and_then(|row| row.try_get(0)).map_err(|error| ConnectionError::from_client(target, &error))
}

pub(crate) async fn connect_to(target: &Target) -> Result<Client, ConnectionError> {
    let tls = Tls::new(&target.ssl)?;
    let mut last = ConfigError::Malformed("no way to connect".into()).into();
    for encrypt in attempts(target.ssl.mode) {
        let config = client_config(target, *encrypt);
        match tokio::time::timeout(target.connect_timeout, config.connect(tls.clone())).await {
            Ok(Ok((client, connection))) => {
                let server = target.to_string();
                // Its owner is the client: it ends when the client is dropped, and its error is the client's too.
                tokio::spawn(async move {
                    if let Err(error) = connection.await {
                        tracing::debug!(server, %error, "connection ended");
                    }
                });
                let set = client.batch_execute(NEWER_SETTINGS);
                match tokio::time::timeout(target.connect_timeout, set).await {
                    Ok(Ok(())) => return Ok(client),
                    Ok(Err(error)) => last = ConnectionError::from_client(target, &error),
                    Err(_) => last = timed_out(target),
                }
            }
            Ok(Err(error)) => last = ConnectionError::from_client(target, &error),
            Err(_) => last = timed_out(target),
        }
    }
    Err(last)
}

fn timed_out(target: &Target) -> ConnectionError {
    let what = format!("no connection within {} s", target.connect_timeout.as_secs());
    let error = std::io::Error::new(std::io::ErrorKind::TimedOut, what);
    ConnectionError::Io { server: target.to_string(), error }
}

/// The target as tokio-postgres has it.
fn client_config(target: &Target, encrypt: bool) -> tokio_postgres::Config {
    use tokio_postgres::config::{ChannelBinding as Binding, SslMode, SslNegotiation};
    let mut config = tokio_postgres::Config::new();
    match &target.host {
        Host::Tcp(host) => config.host(host),
        Host::Unix(dir) => config.host_path(dir),
    };
    if let Some(address) = target.hostaddr {
        config.hostaddr(address);
    }
    if let Some(password) = &target.password {
        config.password(password.reveal());
    }
    config
        .port(target.port)
        .user(&target.user)
        .dbname(&target.database)
        .application_name(&target.application_name)
        .options(session_options(target))
        .connect_timeout(target.connect_timeout)
        .keepalives(target.keepalive.is_some())
        .keepalives_idle(target.keepalive.unwrap_or_default())
        .ssl_negotiation(if target.ssl.direct { SslNegotiation::Direct } else { SslNegotiation::Postgres })
        .channel_binding(match target.channel_binding {
            ChannelBinding::Disable => Binding::Disable,
            ChannelBinding::Prefer => Binding::Prefer,
            ChannelBinding::Require => Binding::Require,
        })
        .ssl_mode(match (encrypt, target.ssl.mode >= crate::config::SslMode::Require) {
            (false, _) => SslMode::Disable,
            (true, false) => SslMode::Prefer,
            (true, true) => SslMode::Require,
        });
    config
}

/// What the stream's rows of a table look like now; `None` when there is no such table. Both names unquoted.
pub async fn table_schema(
    client: &Client,
    schema: &str,
    table: &str,
) -> Result<Option<TableSchema>, tokio_postgres::Error> {
    let table = Table { schema: schema.to_owned(), name: table.to_owned() };
    match table.oid(client).await? {
        Some(relation) => schema_of(client, relation).await,
        None => Ok(None),
    }
}

/// The same of the table with this object id.
pub(crate) async fn schema_of(
    client: &Client,
    relation: u32,
) -> Result<Option<TableSchema>, tokio_postgres::Error> {
    let Some(row) = client.query_opt(RELATION, &[&relation]).await? else { return Ok(None) };
    let (schema, table) = (row.try_get(0)?, row.try_get(1)?);
    let root = row.try_get::<_, bool>(3)?.then_some(relation);
    let identity = match row.try_get(2)? {
        "d" => ReplicaIdentity::Default,
        "f" => ReplicaIdentity::Full,
        "i" => ReplicaIdentity::Index,
        _ => ReplicaIdentity::Nothing,
    };
    let rows = client.query(COLUMNS, &[&relation]).await?;
    let bare = |row: &Row| -> Result<Bare, tokio_postgres::Error> {
        Ok(Bare {
            name: row.try_get(0)?,
            type_oid: row.try_get(1)?,
            modifier: row.try_get(2)?,
            key: row.try_get(3)?,
        })
    };
    let columns = rows.iter().map(bare).collect::<Result<_, _>>()?;
    let (columns, _) = resolve(client, relation, identity, columns).await?;
    Ok(Some(TableSchema { relation, root, schema, table, identity, columns }))
}

/// The name of the table with this object id.
pub(crate) async fn name_of(client: &Client, relation: u32) -> Result<Option<Table>, tokio_postgres::Error> {
    let row = client.query_opt(RELATION, &[&relation]).await?;
    row.map(|row| Ok(Table { schema: row.try_get(0)?, name: row.try_get(1)? })).transpose()
}

/// A schema with operators that a statement would not find.
pub(crate) struct Hidden {
    /// Its name as SQL.
    pub(crate) schema: String,
    /// Whether the role may use it.
    pub(crate) usable: bool,
}

/// Where those operators of these base types are that a statement would not find by their names alone.
pub(crate) async fn hidden_operators(
    client: &Client,
    types: &[u32],
) -> Result<Vec<Hidden>, tokio_postgres::Error> {
    let rows = client.query(HIDDEN_OPERATORS, &[&types]).await?;
    rows.iter().map(|row| Ok(Hidden { schema: row.try_get(0)?, usable: row.try_get(1)? })).collect()
}

/// Lets the transaction's statements find the operators that order these base types. `Err` names the schemas where some
/// are that cannot be found.
pub(crate) async fn find_operators(
    client: &Client,
    types: &[u32],
) -> Result<Result<(), String>, tokio_postgres::Error> {
    let list = |hidden: &[Hidden]| {
        let schemas: Vec<&str> = hidden.iter().map(|hidden| hidden.schema.as_str()).collect();
        schemas.join(", ")
    };
    let hidden = hidden_operators(client, types).await?;
    if hidden.is_empty() {
        return Ok(Ok(()));
    }
    client.query_one(SEARCH_ALSO, &[&list(&hidden)]).await?;
    // A schema that the role may not use is passed over in silence.
    let hidden = hidden_operators(client, types).await?;
    Ok(if hidden.is_empty() { Ok(()) } else { Err(list(&hidden)) })
}

/// Bounds what is asked of a server in time.
pub(crate) async fn answered<T>(
    server: impl std::fmt::Display,
    query: impl Future<Output = Result<T, SourceError>>,
) -> Result<T, SourceError> {
    tokio::time::timeout(QUERY_TIMEOUT, query).await.unwrap_or_else(|_| {
        let seconds = QUERY_TIMEOUT.as_secs();
        Err(SourceError::Unavailable(format!("{server}: no answer to a query within {seconds} s")))
    })
}

/// Names a partition as the log does: by that partitioned table above it which the publication lists.
pub(crate) async fn name_by_root(
    client: &Client,
    publication: &str,
    table: &mut TableSchema,
) -> Result<(), tokio_postgres::Error> {
    let Some(root) = client.query_opt(&root(), &[&table.relation, &publication]).await? else {
        return Ok(());
    };
    table.root = Some(root.try_get(0)?);
    (table.schema, table.table) = (root.try_get(1)?, root.try_get(2)?);
    Ok(())
}

/// What the catalog is asked of a table that the stream has announced, prepared: see [`RESOLVE`], [`ROOT`] and whether a lock
/// is held without which the table is not altered.
pub(crate) struct AnnouncedQueries {
    resolve: Statement,
    root: Statement,
    locked: Statement,
}

/// What the catalog says of the columns of an announced table, and of the root above it.
pub(crate) type Completion = (Vec<Row>, Option<Row>);

impl AnnouncedQueries {
    pub(crate) async fn prepare(client: &Client) -> Result<Self, tokio_postgres::Error> {
        Ok(AnnouncedQueries {
            resolve: client.prepare(RESOLVE).await?,
            root: client.prepare(&root()).await?,
            locked: client.prepare(LOCKED).await?,
        })
    }

    /// Whether somebody holds the lock on the table without which its rows cannot be rewritten. A transaction keeps its locks
    /// until others see it, so that a statement after this one sees every rewrite that was committed, unless this is so.
    pub(crate) async fn locked(&self, client: &Client, relation: u32) -> Result<bool, tokio_postgres::Error> {
        client.query_one(&self.locked, &[&relation]).await?.try_get(0)
    }

    /// Asks all at once, for [`complete`].
    pub(crate) async fn ask(
        &self,
        client: &Client,
        publication: &str,
        announced: &Announced,
    ) -> Result<Completion, tokio_postgres::Error> {
        let names: Vec<&str> = announced.columns.iter().map(|column| column.name.as_str()).collect();
        let types: Vec<u32> = announced.columns.iter().map(|column| column.type_oid).collect();
        let modifiers: Vec<i32> = announced.columns.iter().map(|column| column.modifier).collect();
        let by_index = announced.identity == ReplicaIdentity::Index;
        let relation = announced.relation;
        let parameters: [&(dyn ToSql + Sync); 5] = [&relation, &names, &types, &modifiers, &by_index];
        let root: [&(dyn ToSql + Sync); 2] = [&relation, &publication];
        tokio::try_join!(client.query(&self.resolve, &parameters), client.query_opt(&self.root, &root))
    }
}

/// What the stream says of a table, with what the catalog adds to it; and whether the catalog does not know it like that
/// any more.
pub(crate) fn complete(
    announced: &Announced,
    (rows, root): Completion,
) -> Result<(TableSchema, bool), tokio_postgres::Error> {
    let Announced { relation, schema, table, identity, columns } = announced;
    let columns = columns.iter().map(|column| Bare {
        name: column.name.clone(),
        type_oid: column.type_oid,
        modifier: column.modifier,
        key: column.key,
    });
    let (columns, outdated) = resolved(*identity, columns.collect(), &rows)?;
    let mut table = TableSchema {
        relation: *relation,
        root: None,
        schema: schema.clone(),
        table: table.clone(),
        identity: *identity,
        columns,
    };
    if let Some(root) = root {
        table.root = Some(root.try_get(0)?);
        (table.schema, table.table) = (root.try_get(1)?, root.try_get(2)?);
    }
    Ok((table, outdated))
}

/// Whether somebody else's lock was in the way: not to be had in time, or in a circle with ours.
pub(crate) fn locked(state: &SqlState) -> bool {
    matches!(state, &SqlState::LOCK_NOT_AVAILABLE | &SqlState::T_R_DEADLOCK_DETECTED)
}

/// What the rows of table $1 mean, as JSON: see [`Description`]. All from one statement's snapshot, or half of a change would
/// show.
pub(crate) const DESCRIPTION: &str = "
SELECT pg_catalog.json_build_object(
    'storage', pg_catalog.json_build_object('file', a.file, 'columns', a.columns),
    'schema', n.nspname, 'table', c.relname, 'persistence', c.relpersistence,
    'parents', (SELECT coalesce(json_agg(i.inhparent::int8 ORDER BY i.inhparent), '[]')
                FROM pg_catalog.pg_inherits i WHERE i.inhrelid = c.oid),
    'children', (SELECT coalesce(json_agg(i.inhrelid::int8 ORDER BY i.inhrelid), '[]')
                 FROM pg_catalog.pg_inherits i WHERE i.inhparent = c.oid AND c.relkind <> 'p'),
    'key', (SELECT coalesce(json_agg(k.number ORDER BY k.place), '[]')
            FROM pg_catalog.pg_index i
            CROSS JOIN LATERAL pg_catalog.unnest((i.indkey::int2[])[0:i.indnkeyatts - 1]) WITH ORDINALITY k (number, place)
            WHERE i.indrelid = c.oid AND CASE c.relreplident WHEN 'i' THEN i.indisreplident WHEN 'n' THEN false
                                         ELSE i.indisprimary AND i.indimmediate END),
    'columns', a.described,
    'types', (TYPES))::text
FROM pg_catalog.pg_class c
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
CROSS JOIN LATERAL (
    SELECT pg_catalog.hashtextextended(c.relfilenode || ':' ||
               coalesce(string_agg(a.attnum::text, ',' ORDER BY a.attnum) FILTER (WHERE a.atthasmissing), ''), 0),
           pg_catalog.hashtextextended(coalesce(string_agg(a.attnum || ':' || a.xmin, ',' ORDER BY a.attnum), ''), 0),
           coalesce(json_agg(pg_catalog.json_build_object(
               'number', a.attnum, 'name', a.attname, 'modifier', a.atttypmod, 'collation', a.attcollation::int8,
               'generated', a.attgenerated <> '', 'type', CASE WHEN t.typtype <> 'd' THEN t.oid ELSE (
                   WITH RECURSIVE below (oid) AS (
                       SELECT t.typbasetype
                       UNION ALL SELECT d.typbasetype FROM below JOIN pg_catalog.pg_type d ON d.oid = below.oid AND d.typtype = 'd')
                   SELECT below.oid FROM below JOIN pg_catalog.pg_type b ON b.oid = below.oid WHERE b.typtype <> 'd')
               END::int8) ORDER BY a.attnum) FILTER (WHERE NOT a.attisdropped), '[]')
    FROM pg_catalog.pg_attribute a LEFT JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
    WHERE a.attrelid = c.oid AND a.attnum > 0
) a (file, columns, described)
WHERE c.oid = $1";

/// The enums and composite types of which table $1 is made, as JSON.
const TYPES: &str = "
WITH RECURSIVE reached (oid) AS (
    SELECT a.atttypid FROM pg_catalog.pg_attribute a
    WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped AND a.atttypid >= 16384
    UNION
    PARTS
)
SELECT coalesce(json_agg(pg_catalog.json_build_object(
    'oid', t.oid::int8,
    'labels', (SELECT coalesce(json_agg(pg_catalog.json_build_array(e.oid::int8, e.enumlabel) ORDER BY e.oid), '[]')
               FROM pg_catalog.pg_enum e WHERE e.enumtypid = t.oid),
    'attributes', (SELECT coalesce(json_agg(pg_catalog.json_build_array(p.attnum, p.atttypid::int8) ORDER BY p.attnum), '[]')
                   FROM pg_catalog.pg_attribute p
                   WHERE p.attrelid = t.typrelid AND p.attnum > 0 AND NOT p.attisdropped),
    'versions', coalesce(CASE t.typtype
        WHEN 'e' THEN (SELECT json_agg(e.xmin::text::int8 ORDER BY e.oid) FROM pg_catalog.pg_enum e WHERE e.enumtypid = t.oid)
        ELSE (SELECT json_agg(p.xmin::text::int8 ORDER BY p.attnum)
              FROM pg_catalog.pg_attribute p WHERE p.attrelid = t.typrelid AND p.attnum > 0) END, '[]')) ORDER BY t.oid), '[]')
FROM reached r JOIN pg_catalog.pg_type t ON t.oid = r.oid WHERE t.typtype IN ('e', 'c')";

/// The types that the types in `reached` are made of.
pub(crate) const PARTS: &str = "
    SELECT part.oid FROM reached r JOIN pg_catalog.pg_type t ON t.oid = r.oid
    CROSS JOIN LATERAL (
        SELECT t.typbasetype WHERE t.typtype = 'd'
        UNION ALL SELECT t.typelem WHERE t.typelem <> 0 AND t.typtype = 'b'
        UNION ALL SELECT g.rngsubtype FROM pg_catalog.pg_range g WHERE t.oid IN (g.rngtypid, g.rngmultitypid)
        UNION ALL SELECT p.atttypid FROM pg_catalog.pg_attribute p
                  WHERE p.attrelid = t.typrelid AND t.typtype = 'c' AND p.attnum > 0 AND NOT p.attisdropped
    ) part (oid)";

/// [`DESCRIPTION`] of the relation that an SQL expression names.
pub(crate) fn description_of(relation: &str) -> String {
    DESCRIPTION.replace("TYPES", TYPES).replace("PARTS", PARTS).replace("$1", relation)
}

/// The types of each of the tables $1, in their order; see [`TYPES`].
pub(crate) fn types_of_tables() -> String {
    let types = TYPES.replace("PARTS", PARTS).replace("$1", "g.relation");
    format!(
        "SELECT ({types})::text FROM pg_catalog.unnest($1::oid[]) WITH ORDINALITY g (relation, place) ORDER BY place"
    )
}

/// Asks with a prepared [`DESCRIPTION`]. `None` where there is no such table.
pub(crate) async fn description(
    client: &Client,
    prepared: &Statement,
    relation: u32,
) -> Result<Option<String>, tokio_postgres::Error> {
    let row = client.query_opt(prepared, &[&relation]).await?;
    row.map(|row| row.try_get(0)).transpose()
}

pub(crate) fn parse_description(json: &str) -> Result<Description, SourceError> {
    serde_json::from_str(json)
        .map_err(|error| SourceError::Unavailable(format!("a table's description cannot be read: {error}")))
}

/// See [`AnnouncedQueries::locked`].
const LOCKED: &str = "SELECT EXISTS (SELECT FROM pg_catalog.pg_locks
    WHERE locktype = 'relation' AND relation = $1 AND mode = 'AccessExclusiveLock' AND granted
      AND database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()))";

async fn resolve(
    client: &Client,
    relation: u32,
    identity: ReplicaIdentity,
    bare: Vec<Bare>,
) -> Result<(Vec<Column>, bool), tokio_postgres::Error> {
    let names: Vec<&str> = bare.iter().map(|column| column.name.as_str()).collect();
    let types: Vec<u32> = bare.iter().map(|column| column.type_oid).collect();
    let modifiers: Vec<i32> = bare.iter().map(|column| column.modifier).collect();
    let by_index = identity == ReplicaIdentity::Index;
    let rows = client.query(RESOLVE, &[&relation, &names, &types, &modifiers, &by_index]).await?;
    resolved(identity, bare, &rows)
}

fn resolved(
    identity: ReplicaIdentity,
    bare: Vec<Bare>,
    rows: &[Row],
) -> Result<(Vec<Column>, bool), tokio_postgres::Error> {
    let places: Vec<Option<i32>> = rows.iter().map(|row| row.try_get(8)).collect::<Result<_, _>>()?;
    let keys = key_of(identity, &bare, &places);
    // The query returns one row per column, in order.
    let columns = bare.into_iter().zip(keys).zip(rows);
    let columns = columns.map(|((bare, key), row)| column(bare, key, row)).collect::<Result<_, _>>()?;
    let outdated = rows.iter().map(|row| row.try_get(10)).collect::<Result<Vec<bool>, _>>()?;
    Ok((columns, outdated.contains(&true)))
}

/// Each column's place in the key. Where the index is not the one any more of which the message spoke, the table's
/// order stands for its order.
fn key_of(identity: ReplicaIdentity, bare: &[Bare], places: &[Option<i32>]) -> Vec<Option<u16>> {
    let belongs = |(bare, place): (&Bare, &Option<i32>)| match identity {
        ReplicaIdentity::Full => place.is_some(),
        ReplicaIdentity::Nothing => false,
        ReplicaIdentity::Default | ReplicaIdentity::Index => bare.key,
    };
    let belongs: Vec<bool> = bare.iter().zip(places).map(belongs).collect();
    let known = belongs.iter().zip(places).all(|(belongs, place)| !belongs || place.is_some());
    let mut next = 0;
    let place = |(belongs, place): (&bool, &Option<i32>)| {
        next += u16::from(*belongs);
        let place = place.filter(|_| known).and_then(|place| u16::try_from(place).ok());
        belongs.then(|| place.unwrap_or(next))
    };
    belongs.iter().zip(places).map(place).collect()
}

fn column(bare: Bare, key: Option<u16>, row: &Row) -> Result<Column, tokio_postgres::Error> {
    let type_name: Option<String> = row.try_get(1)?;
    Ok(Column {
        name: bare.name,
        type_oid: row.try_get(0)?,
        type_name: type_name.unwrap_or_else(|| format!("oid {}", bare.type_oid)),
        key,
        collation: collation(row)?,
        number: row.try_get(11)?,
        recorded: None,
    })
}

fn collation(row: &Row) -> Result<Option<Collation>, tokio_postgres::Error> {
    let Some(name) = row.try_get::<_, Option<&str>>(2)? else { return Ok(None) };
    let deterministic = row.try_get::<_, Option<bool>>(3)?.unwrap_or(true);
    let own: (Option<&str>, Option<&str>) = (row.try_get(4)?, row.try_get(5)?);
    let database: (Option<&str>, Option<&str>) = (row.try_get(6)?, row.try_get(7)?);
    // Provider `d`: the collation named "default" is the database's.
    let is_default = own.0 == Some("d");
    let (provider, locale) = if is_default { database } else { own };
    let locale = locale.unwrap_or_default();
    Ok(Some(Collation {
        name: if is_default { locale.to_owned() } else { name.to_owned() },
        deterministic,
        // The server compares bytes of its own encoding, we those of UTF-8.
        bytewise: row.try_get(9)? && bytewise(provider.unwrap_or_default(), locale),
    }))
}

/// Whether a provider compares texts of a locale byte by byte. The `builtin` provider (`b`) knows no other way;
/// `icu` (`i`) never does; of libc (`c`) these locales do.
fn bytewise(provider: &str, locale: &str) -> bool {
    match provider {
        "b" => true,
        "c" => {
            let plain: String = locale.chars().filter(|c| *c != '-').collect();
            matches!(plain.to_ascii_uppercase().as_str(), "C" | "POSIX" | "C.UTF8")
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::bytewise;

    #[test]
    fn bytewise_locales() {
        for (provider, locale, expected) in [
            ("c", "C", true),
            ("c", "POSIX", true),
            ("c", "C.UTF-8", true),
            ("c", "C.utf8", true),
            ("c", "en_US.UTF-8", false),
            ("c", "", false),
            ("b", "C.UTF-8", true),
            ("b", "PG_UNICODE_FAST", true),
            ("i", "und", false),
            ("i", "C", false),
        ] {
            assert_eq!(bytewise(provider, locale), expected, "{provider} {locale}");
        }
    }
}
