//! Keys of tables as SQL: as conditions of a chunk, and compared by Postgres where only it can tell (h26).
//!
//! A condition and ORDER BY must mean one order. ORDER BY takes the operators of the column's type; a condition takes
//! what it finds by name, so that [`catalog::find_operators`] must have been called in its transaction, and every value
//! must have the column's type.

use std::cmp::Ordering;

use change::{Key, TableSchema};
use relay::SourceError;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Error};

use crate::catalog;
use crate::error::failed;
use crate::plan::{quote, quote_literal};

/// Types and collations of columns ($2, in this order) of relation $1, as SQL. Without their modifiers, which could cut
/// a value.
const COLUMNS: &str = "
SELECT pg_catalog.format_type(a.atttypid, -1),
       pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.collname)
FROM pg_catalog.unnest($2::text[]) WITH ORDINALITY AS g (name, place)
JOIN pg_catalog.pg_attribute a ON a.attrelid = $1 AND a.attname = g.name
LEFT JOIN pg_catalog.pg_collation c ON c.oid = a.attcollation
LEFT JOIN pg_catalog.pg_namespace n ON n.oid = c.collnamespace
ORDER BY g.place";

/// A column of a key, as SQL.
struct KeyColumn {
    name: String,
    type_name: String,
    collation: Option<String>,
}

/// A table's key as SQL.
pub(crate) struct KeySql(Vec<KeyColumn>);

impl KeySql {
    pub(crate) async fn of(client: &Client, schema: &TableSchema) -> Result<Self, Error> {
        let names: Vec<&str> = schema.key_columns().map(|column| column.name.as_str()).collect();
        let rows = client.query(COLUMNS, &[&schema.relation, &names]).await?;
        let column = |(row, name): (&tokio_postgres::Row, &&str)| {
            Ok(KeyColumn { name: quote(name), type_name: row.try_get(0)?, collation: row.try_get(1)? })
        };
        rows.iter().zip(&names).map(column).collect::<Result<_, _>>().map(KeySql)
    }

    /// Whether the table has none.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many columns it has.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// `"a", "b"`
    pub(crate) fn columns(&self) -> String {
        let names: Vec<&str> = self.0.iter().map(|column| column.name.as_str()).collect();
        names.join(", ")
    }

    /// `("a", "b")`
    pub(crate) fn row(&self) -> String {
        format!("({})", self.columns())
    }

    /// `('1'::integer, 'x'::text)`
    pub(crate) fn row_of(&self, key: &Key) -> String {
        let literal = |(column, value): (&KeyColumn, &String)| {
            format!("{}::{}", quote_literal(value), column.type_name)
        };
        let literals: Vec<String> = self.0.iter().zip(key).map(literal).collect();
        format!("({})", literals.join(", "))
    }
}

/// The base types of a key's columns.
pub(crate) fn types_of(schema: &TableSchema) -> Vec<u32> {
    schema.key_columns().map(|column| column.type_oid).collect()
}

/// How keys of a table compare with `bound`, told by the key columns' own operators and collations; `None` where the key
/// has other columns or types now, or the table is gone. After an error the connection may be left in a transaction.
pub(crate) async fn compare(
    client: &Client,
    relation: u32,
    keys: &[Key],
    bound: &Key,
) -> Result<Option<Vec<Ordering>>, SourceError> {
    let at = |error: &Error| failed(&format!("cannot compare keys of relation {relation}"), error);
    let begin = "BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY";
    client.batch_execute(begin).await.map_err(|e| at(&e))?;
    let compared = compare_within(client, relation, keys, bound).await?;
    client.batch_execute("ROLLBACK").await.map_err(|e| at(&e))?;
    Ok(compared)
}

async fn compare_within(
    client: &Client,
    relation: u32,
    keys: &[Key],
    bound: &Key,
) -> Result<Option<Vec<Ordering>>, SourceError> {
    let at = |error: &Error| failed(&format!("cannot compare keys of relation {relation}"), error);
    let Some(schema) = catalog::schema_of(client, relation).await.map_err(|e| at(&e))? else {
        return Ok(None);
    };
    let name = schema.full_name();
    let key = KeySql::of(client, &schema).await.map_err(|e| at(&e))?;
    if key.len() != bound.len() {
        return Ok(None);
    }
    if let Err(schemas) = catalog::find_operators(client, &types_of(&schema)).await.map_err(|e| at(&e))? {
        return Err(SourceError::Unavailable(hidden(&name, &schemas)));
    }
    let mut left = Vec::new();
    let mut columns = Vec::new();
    let mut arrays = Vec::new();
    for (place, KeyColumn { type_name, collation, .. }) in key.0.iter().enumerate() {
        let collate = collation.as_ref().map(|name| format!(" COLLATE {name}")).unwrap_or_default();
        left.push(format!("k.c{place}::{type_name}{collate}"));
        columns.push(format!("c{place}"));
        arrays.push(keys.iter().map(|key| key.get(place).map(String::as_str)).collect::<Vec<_>>());
    }
    let parameters: Vec<String> = (1..=key.len()).map(|n| format!("${n}::text[]")).collect();
    let query = format!(
        "SELECT ({}) <= {} FROM unnest({}) WITH ORDINALITY AS k ({}, n) ORDER BY n",
        left.join(", "),
        key.row_of(bound),
        parameters.join(", "),
        columns.join(", ")
    );
    let values: Vec<&(dyn ToSql + Sync)> = arrays.iter().map(|array| array as &(dyn ToSql + Sync)).collect();
    let rows = match client.query(&query, &values).await {
        Ok(rows) => rows,
        // Not values of these types, or none that have an order.
        Err(error) if error.code().is_some_and(|code| matches!(&code.code()[..2], "22" | "42")) => {
            return Ok(None);
        }
        Err(error) => return Err(at(&error)),
    };
    let ordering = |row: &tokio_postgres::Row| match row.try_get(0) {
        Ok(Some(true)) => Ok(Ordering::Less),
        Ok(_) => Ok(Ordering::Greater),
        Err(error) => Err(at(&error)),
    };
    rows.iter().map(ordering).collect::<Result<_, _>>().map(Some)
}

/// Why keys cannot be compared.
pub(crate) fn hidden(table: &str, schemas: &str) -> String {
    format!(
        "the operators that order the key of {table} are in schema {schemas}, which the role may not use or does not \
         find them in: GRANT USAGE ON SCHEMA {schemas}"
    )
}
