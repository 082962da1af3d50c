//! Names: how SQL folds and quotes them, and what a column reference in the definition may look like.

use change::{Refusal, TableSchema};
use sqlparser::ast::{Expr, Ident, ObjectName};

/// The one table of a definition, under the names by which its columns may be qualified.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Scope {
    pub(crate) schema: String,
    pub(crate) table: String,
    pub(crate) alias: Option<String>,
}

impl Scope {
    /// Takes the expression as a column of the table; `None` when it is something else.
    pub(crate) fn column(&self, expr: &Expr) -> Result<Option<String>, Refusal> {
        let parts = match expr {
            Expr::Nested(inner) => return self.column(inner),
            Expr::Identifier(ident) => std::slice::from_ref(ident),
            Expr::CompoundIdentifier(parts) => parts.as_slice(),
            _ => return Ok(None),
        };
        let names = parts.iter().map(fold).collect::<Result<Vec<_>, _>>()?;
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let column = match (names.as_slice(), &self.alias) {
            ([column], _) => Some(column),
            ([table, column], Some(alias)) if table == alias => Some(column),
            ([table, column], None) if *table == self.table => Some(column),
            ([schema, table, column], None) if *schema == self.schema && *table == self.table => Some(column),
            _ => None,
        };
        match column {
            Some(column) => Ok(Some((*column).to_owned())),
            None => Err(Refusal::new(
                format!("{expr} does not name a column of the table in FROM"),
                "write the column's name alone",
            )),
        }
    }
}

/// The schema and name of a table; without a schema it is `public`.
pub(crate) fn table_name(name: &ObjectName) -> Result<(String, String), Refusal> {
    let idents: Option<Vec<&Ident>> = name.0.iter().map(|part| part.as_ident()).collect();
    match idents.as_deref() {
        Some([table]) => Ok(("public".to_owned(), fold(table)?)),
        Some([schema, table]) => Ok((fold(schema)?, fold(table)?)),
        _ => Err(Refusal::new(format!("{name} is not a table's name"), "write table or schema.table")),
    }
}

/// The name that an identifier means: as it stands in quotes, else in lower case.
pub(crate) fn fold(ident: &Ident) -> Result<String, Refusal> {
    match ident.quote_style {
        None => {
            let name = ident.value.to_ascii_lowercase();
            if is_reserved(&name) {
                // Postgres takes it for syntax, or for a function that is called without parentheses.
                let remedy = format!("write {} if it is a name", quote_identifier(&name));
                return Err(Refusal::new(format!("{ident} is a reserved word of SQL"), remedy));
            }
            Ok(name)
        }
        Some('"') => Ok(ident.value.clone()),
        Some(_) => {
            Err(Refusal::new(format!("{ident} is quoted in a way that SQL does not know"), "use \"…\""))
        }
    }
}

/// The identifier as SQL, always in quotes.
pub(crate) fn quote_identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// The identifier as SQL, in quotes only where it needs them: for people to read and paste.
pub(crate) fn display_identifier(name: &str) -> String {
    let plain = name.starts_with(|c: char| c.is_ascii_lowercase() || c == '_')
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    if plain && !is_reserved(name) { name.to_owned() } else { quote_identifier(name) }
}

/// A table as one writes it in SQL: for people to read and paste.
pub(crate) fn display_table(table: &TableSchema) -> String {
    format!("{}.{}", display_identifier(&table.schema), display_identifier(&table.table))
}

fn is_reserved(name: &str) -> bool {
    RESERVED.split_ascii_whitespace().any(|word| word == name)
}

/// Words that cannot name a column or a table without quotes: categories R and T of `pg_get_keywords()`.
const RESERVED: &str = "all analyse analyze and any array as asc asymmetric authorization binary both case cast \
    check collate collation column concurrently constraint create cross current_catalog current_date current_role \
    current_schema current_time current_timestamp current_user default deferrable desc distinct do else end except \
    false fetch for foreign freeze from full grant group having ilike in initially inner intersect into is isnull \
    join lateral leading left like limit localtime localtimestamp natural not notnull null offset on only or order \
    outer overlaps placing primary references returning right select session_user similar some symmetric \
    system_user table tablesample then to trailing true union unique user using variadic verbose when where window \
    with";
