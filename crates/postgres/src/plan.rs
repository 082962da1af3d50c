//! What a pipeline is to have at the source, and its names as SQL.

use std::fmt;

use change::TableSchema;
use tokio_postgres::{Client, Error};

/// A table's name, its two parts unquoted.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Table {
    /// Its schema.
    pub schema: String,
    /// Its name in the schema.
    pub name: String,
}

impl Table {
    /// The table of a schema.
    pub fn of(schema: &TableSchema) -> Self {
        Table { schema: schema.schema.clone(), name: schema.table.clone() }
    }

    /// As SQL: `"public"."emails"`.
    pub fn quoted(&self) -> String {
        format!("{}.{}", quote(&self.schema), quote(&self.name))
    }

    /// The table itself and no child of it, as SQL: children of an inheritance tree are tables of their own.
    pub fn only(&self) -> String {
        format!("ONLY {}", self.quoted())
    }

    /// Its object id, where it exists.
    pub async fn oid(&self, client: &Client) -> Result<Option<u32>, Error> {
        const OID: &str =
            "SELECT c.oid FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
            WHERE n.nspname = $1 AND c.relname = $2";
        Ok(client.query_opt(OID, &[&self.schema, &self.name]).await?.map(|row| row.get(0)))
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.schema, self.name)
    }
}

/// What a pipeline is to have at the source.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    /// Its name.
    pub pipeline: String,
    /// Key of its row in the heartbeat table.
    pub heartbeat: String,
    /// The slot's name.
    pub slot: String,
    /// The publication's name.
    pub publication: String,
    /// What it streams.
    pub tables: Vec<Table>,
    /// Those tables that a store's query names.
    pub queried: Vec<Table>,
    /// The role that runs it.
    pub role: String,
    /// Size up to which a table without a key is read in one piece.
    pub keyless_bytes: u64,
}

/// A name as SQL.
pub fn quote(identifier: &str) -> String {
    format!("\"{}\"", identifier.replace('"', "\"\""))
}

/// A text as SQL.
pub fn quote_literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}
