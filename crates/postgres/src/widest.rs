//! The widest rows of the tables, for whoever wants to know whether a record may have their size.

use change::{Encoding, ReplicaIdentity, TableSchema};
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::catalog;
use crate::check::Finding;
use crate::plan::{Plan, Table, quote};

/// Pages of a table that are read at most, in which rows are told by what they hold out of line too; of a larger table a
/// sample is read.
const PAGES: f64 = 20_000.0;
/// How long the server may read of a table, milliseconds.
const LIMIT_MS: u32 = 5_000;
/// Types of which the server knows the length of a value that it holds compressed: text, bpchar, varchar.
const TEXTS: [u32; 3] = [25, 1042, 1043];

/// A table's widest row, as far as was looked.
struct Widest {
    table: String,
    /// Of a record, about.
    bytes: u64,
    key: String,
    sample: bool,
}

/// Says how large the largest record of the tables will be, `record_max` being what the log takes.
pub async fn widest_rows(
    client: &Client,
    plan: &Plan,
    record_max: u64,
    omits: impl Fn(&Table) -> bool,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut widest: Option<Widest> = None;
    for table in &plan.tables {
        // A table that is missing or unreadable is found elsewhere.
        let Ok(Some(schema)) = catalog::table_schema(client, &table.schema, &table.name).await else {
            continue;
        };
        let found = match widest_row(client, table, &schema).await {
            Ok(Some(found)) => found,
            Err(error) if error.code() == Some(&SqlState::QUERY_CANCELED) => {
                let what =
                    format!("the widest row of {table} is not known: it was not found within {LIMIT_MS} ms");
                findings.push(Finding::advice(what, ""));
                continue;
            }
            Ok(None) | Err(_) => continue,
        };
        if found.bytes > record_max && !omits(table) {
            findings.push(Finding::advice(
                format!(
                    "the row {} of {table} becomes a record of about {}, and the log takes {}: the reader will refuse it, \
                     unless it is compressible",
                    found.key,
                    megabytes(found.bytes),
                    megabytes(record_max)
                ),
                format!(
                    "raise max.message.bytes of the log's topic, or have the largest columns of such rows left out: \
                     [postgres.oversize] {} = \"omit\"",
                    serde_json::Value::from(table.to_string())
                ),
            ));
        }
        if widest.as_ref().is_none_or(|widest| widest.bytes < found.bytes) {
            widest = Some(found);
        }
    }
    if let Some(Widest { table, bytes, key, sample }) = widest {
        let of = if sample { "of a sample of its rows, " } else { "" };
        findings.push(Finding::good(format!(
            "the widest row is {key} of {table}: {of}a record of about {}, and the log takes {}",
            megabytes(bytes),
            megabytes(record_max)
        )));
    }
    findings
}

/// `None` for an empty table.
async fn widest_row(
    client: &Client,
    table: &Table,
    schema: &TableSchema,
) -> Result<Option<Widest>, tokio_postgres::Error> {
    client.batch_execute(&format!("BEGIN READ ONLY; SET LOCAL statement_timeout = {LIMIT_MS}")).await?;
    let found = look(client, table, schema).await;
    client.batch_execute("ROLLBACK").await?;
    found
}

async fn look(
    client: &Client,
    table: &Table,
    schema: &TableSchema,
) -> Result<Option<Widest>, tokio_postgres::Error> {
    const SIZE: &str = "SELECT coalesce(sum(pg_catalog.pg_relation_size(p.oid)), 0)::float8
            / pg_catalog.current_setting('block_size')::float8
        FROM pg_catalog.pg_class p WHERE p.oid = $1::oid OR p.oid IN (SELECT t.relid FROM pg_catalog.pg_partition_tree($1::oid) t)";
    let pages: f64 = client.query_one(SIZE, &[&schema.relation]).await?.get(0);
    let sample = pages > PAGES;
    let part =
        if sample { format!(" TABLESAMPLE SYSTEM ({})", 100.0 * PAGES / pages) } else { String::new() };
    let width = |column: &change::Column| {
        let name = quote(&column.name);
        let bytes = if TEXTS.contains(&column.type_oid) || Encoding::of(column.type_oid) == Encoding::Bytea {
            format!("pg_catalog.octet_length({name})")
        } else {
            format!("pg_catalog.pg_column_size({name})")
        };
        format!("coalesce({bytes}, 0)::int8")
    };
    let widths: Vec<String> = schema.columns.iter().map(width).collect();
    let key: Vec<String> =
        schema.key_columns().map(|column| format!("{}::text", quote(&column.name))).collect();
    let key = if key.is_empty() { "''".to_owned() } else { key.join(" || ':' || ") };
    let sum = if widths.is_empty() { "0::int8".to_owned() } else { widths.join(" + ") };
    let sql = format!(
        "SELECT {sum} AS width, coalesce({key}, '') AS key FROM {}{part} ORDER BY 1 DESC LIMIT 1",
        table.quoted()
    );
    let Some(row) = client.query_opt(&sql, &[]).await? else { return Ok(None) };
    // An update under FULL has the row as it was, and as it is.
    let images = if schema.identity == ReplicaIdentity::Full { 2 } else { 1 };
    let bytes = row.get::<_, i64>(0).unsigned_abs() * images;
    let key = row.get::<_, String>(1);
    let key = if key.is_empty() { "without a key".to_owned() } else { key };
    Ok(Some(Widest { table: table.to_string(), bytes, key, sample }))
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / f64::from(1 << 20))
}
