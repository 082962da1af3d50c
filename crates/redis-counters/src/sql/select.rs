//! The query as Postgres evaluates it for `verify`: the whole answer, hidden counts included.

use super::bind::Bound;
use super::column_type::Type;
use super::definition::Aggregate;
use super::scope::quote_identifier;

impl Bound {
    /// A query whose rows are: the group's values as texts (to be joined by [`change::key::join`]),
    /// then `count(*)`, the number of rows in which the aggregate's column is not NULL (for `count(*)` that of all),
    /// and the sum (NULL for counts), as texts too. Without GROUP BY it answers one row.
    ///
    /// `from` is what stands after FROM: the table, or any relation that has its columns under their names, such as
    /// `jsonb_populate_recordset(NULL::public.emails, $1) AS emails`. The session must have Millrace's settings
    /// (DateStyle ISO, TimeZone UTC), as the texts of the log do, and `standard_conforming_strings` on.
    pub fn select_sql(&self, from: &str) -> String {
        let definition = self.definition();
        let names: Vec<String> =
            definition.group_columns().iter().map(|name| quote_identifier(name)).collect();
        let text = |(name, (place, kind)): (&String, &(usize, Type))| {
            group_text(name, *kind, self.columns[*place].modified)
        };
        let mut results: Vec<String> = names.iter().zip(&self.group).map(text).collect();
        results.push("count(*)::text".to_owned());
        results.push(match definition.aggregate().column() {
            Some(column) => format!("count({})::text", quote_identifier(column)),
            None => "count(*)::text".to_owned(),
        });
        results.push(match definition.aggregate() {
            Aggregate::Sum { column } => format!("sum({})::text", quote_identifier(column)),
            _ => "NULL::text".to_owned(),
        });
        let mut sql = format!("SELECT {} FROM {from}", results.join(", "));
        if let Some(filter) = definition.filter() {
            sql += &format!(" WHERE {filter}");
        }
        if !names.is_empty() {
            sql += &format!(" GROUP BY {}", names.join(", "));
        }
        sql
    }
}

/// The text of a group's value, as Postgres itself prints it. Where equal values of a type print differently, the
/// shortest of their texts.
fn group_text(name: &str, kind: Type, modified: bool) -> String {
    match kind {
        // The cast says `true`, the type's output and so the log says `t`.
        Type::Boolean => format!("left({name}::text, 1)"),
        Type::Numeric if !modified => format!("trim_scale({name})::text"),
        // The cast of character(n) drops its trailing blanks; the type's output has them.
        Type::Char if modified => format!("textin(bpcharout({name}))"),
        _ => format!("{name}::text"),
    }
}
