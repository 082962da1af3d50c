//! A table's name as text: in the configuration, in the ledger, in messages and in SQL.
//!
//! Everywhere but in SQL it is `schema.name`. The first dot divides the two, and everything else is literal, so that
//! `public.order items` and `public.v1.2` need no quotes. A part can also be written in SQL's double quotes:
//! `"my.schema".t` is how to name a schema with a dot. [`table_name`] writes quotes only where the text would mean
//! another table without them, so [`parse_table_name`] reads back every name that it writes.

use std::fmt;

/// Longest name that Postgres keeps whole, in bytes.
const MAX_IDENTIFIER: usize = 63;

/// Why a text does not name a table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TableNameError {
    /// There is no dot, so the schema is missing.
    NoSchema,
    /// A part begins with a double quote and does not end with one, or more follows it.
    Quotes,
    /// A part is empty, or holds a null character.
    Empty,
    /// A part is longer than Postgres keeps.
    TooLong,
}

impl fmt::Display for TableNameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TableNameError::NoSchema => "write the schema too, as in public.emails",
            TableNameError::Quotes => {
                "write schema.table, or a part in double quotes as in SQL: \"my.schema\".\"order items\""
            }
            TableNameError::Empty => "write schema.table, as in public.emails",
            TableNameError::TooLong => "Postgres keeps 63 bytes of a name: write the name that it has there",
        })
    }
}

impl std::error::Error for TableNameError {}

/// `schema.name`, as the configuration has it.
pub fn table_name(schema: &str, name: &str) -> String {
    let written = |part: &str, quoted: bool| if quoted { quote(part) } else { part.to_owned() };
    let schema = written(schema, schema.starts_with('"') || schema.contains('.'));
    format!("{schema}.{}", written(name, name.starts_with('"')))
}

/// Schema and name from a text like `public.emails`.
pub fn parse_table_name(text: &str) -> Result<(String, String), TableNameError> {
    let (schema, rest) = match quoted(text)? {
        Some((schema, rest)) => (schema, rest.strip_prefix('.').ok_or(no_dot(rest))?),
        None => text
            .split_once('.')
            .map(|(schema, rest)| (schema.to_owned(), rest))
            .ok_or(TableNameError::NoSchema)?,
    };
    let name = match quoted(rest)? {
        Some((name, "")) => name,
        Some(_) => return Err(TableNameError::Quotes),
        None => rest.to_owned(),
    };
    for part in [&schema, &name] {
        if part.is_empty() || part.contains('\0') {
            return Err(TableNameError::Empty);
        }
        if part.len() > MAX_IDENTIFIER {
            return Err(TableNameError::TooLong);
        }
    }
    Ok((schema, name))
}

/// A table's name as SQL: `"public"."emails"`.
pub fn quoted_table_name(schema: &str, name: &str) -> String {
    format!("{}.{}", quote(schema), quote(name))
}

fn quote(part: &str) -> String {
    format!("\"{}\"", part.replace('"', "\"\""))
}

fn no_dot(rest: &str) -> TableNameError {
    if rest.is_empty() { TableNameError::NoSchema } else { TableNameError::Quotes }
}

/// The quoted part at the beginning of a text, without its quotes, and what follows it; `None` if there is none.
fn quoted(text: &str) -> Result<Option<(String, &str)>, TableNameError> {
    let Some(mut rest) = text.strip_prefix('"') else { return Ok(None) };
    let mut part = String::new();
    loop {
        let (before, after) = rest.split_once('"').ok_or(TableNameError::Quotes)?;
        part.push_str(before);
        match after.strip_prefix('"') {
            Some(more) => {
                part.push('"');
                rest = more;
            }
            None => return Ok(Some((part, after))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_dot_divides_and_quotes_are_read_as_sql_reads_them() {
        for (text, schema, name) in [
            ("public.emails", "public", "emails"),
            ("public.order items", "public", "order items"),
            ("public.table_with_pk.1#2/3", "public", "table_with_pk.1#2/3"),
            ("public.a\"b", "public", "a\"b"),
            ("public.MixedCase", "public", "MixedCase"),
            ("public.été", "public", "été"),
            ("\"my.schema\".\"order items\"", "my.schema", "order items"),
            ("\"my.schema\".order items", "my.schema", "order items"),
            ("public.\"a\"\"b\"", "public", "a\"b"),
            ("public.\"\"\"\"", "public", "\""),
            ("a\"b.c", "a\"b", "c"),
        ] {
            assert_eq!(parse_table_name(text), Ok((schema.into(), name.into())), "{text}");
        }
    }

    #[test]
    fn what_names_no_table() {
        use TableNameError::*;
        let long = format!("public.{}", "x".repeat(64));
        for (text, error) in [
            ("", NoSchema),
            ("emails", NoSchema),
            ("\"emails\"", NoSchema),
            (".emails", Empty),
            ("public.", Empty),
            ("public.\"\"", Empty),
            ("public.a\0b", Empty),
            ("public.\"emails", Quotes),
            ("\"public.emails", Quotes),
            ("\"public\"x.emails", Quotes),
            ("public.\"emails\"x", Quotes),
            (&long, TooLong),
        ] {
            assert_eq!(parse_table_name(text), Err(error), "{text}");
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let parts = ["a", "a.b", "\"", "\"a\"", "a\"b", "\"a.b\"", ".", " ", "a\"", "\".\""];
        for schema in parts {
            for name in parts {
                let text = table_name(schema, name);
                assert_eq!(parse_table_name(&text), Ok((schema.into(), name.into())), "{text}");
                let sql = quoted_table_name(schema, name);
                assert_eq!(parse_table_name(&sql), Ok((schema.into(), name.into())), "{sql}");
            }
        }
        assert_eq!(table_name("public", "order items"), "public.order items");
        assert_eq!(table_name("my.schema", "order items"), "\"my.schema\".order items");
    }
}
