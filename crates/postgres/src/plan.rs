//! What a pipeline is to have at the source, and its names as SQL.

use std::fmt;
use std::str::FromStr;

use change::{TableNameError, TableSchema, parse_table_name, quoted_table_name, table_name};
use tokio_postgres::{Client, Error};

/// A table's name, its two parts unquoted. As text it is what the configuration has: `public.order items`, which
/// [`change::table_name`] writes and reads.
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
        quoted_table_name(&self.schema, &self.name)
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
        f.write_str(&table_name(&self.schema, &self.name))
    }
}

impl FromStr for Table {
    type Err = TableNameError;

    fn from_str(text: &str) -> Result<Self, TableNameError> {
        parse_table_name(text).map(|(schema, name)| Table { schema, name })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_displayed_as_it_is_configured_and_quoted_as_sql() {
        for (text, quoted) in [
            ("public.order items", r#""public"."order items""#),
            ("public.table_with_pk.1#2/3", r#""public"."table_with_pk.1#2/3""#),
            (r#"public.a"b"#, r#""public"."a""b""#),
            (r#""my.schema".order items"#, r#""my.schema"."order items""#),
        ] {
            let table: Table = text.parse().unwrap();
            assert_eq!((table.to_string().as_str(), table.quoted().as_str()), (text, quoted));
        }
    }
}
