//! From a filter to a query.

use std::ops::Bound;

use tantivy::Term;
use tantivy::query::{ExistsQuery, RangeQuery, TermSetQuery};

use super::{Filter, Selection, Test};
use crate::definition::Role;
use crate::document::exact_term;
use crate::index::Layout;
use crate::order;

/// The documents that the filter selects. The error is for the one who wrote the filter.
pub(crate) fn compile(filter: &Filter, layout: &Layout) -> Result<Selection, String> {
    let each = |filters: &[Filter]| {
        filters.iter().map(|filter| compile(filter, layout)).collect::<Result<_, String>>()
    };
    Ok(match filter {
        Filter::All(filters) => Selection::All(each(filters)?),
        Filter::Any(filters) => Selection::Any(each(filters)?),
        Filter::Not(filter) => compile(filter, layout)?.not(),
        Filter::Is(attribute, test) => is(attribute, test, layout)?,
    })
}

fn is(attribute: &str, test: &Test, layout: &Layout) -> Result<Selection, String> {
    let (role, place) = layout.filterable(attribute).ok_or_else(|| not_filterable(attribute, layout))?;
    let field = layout.fields[place];
    let term = |value: &String| Ok(Term::from_field_text(field, &term_text(role, attribute, value)?));
    Ok(match test {
        Test::OneOf(values) => {
            let terms: Vec<Term> = values.iter().map(term).collect::<Result<_, String>>()?;
            Selection::matches(TermSetQuery::new(terms))
        }
        Test::Range { .. } if role == Role::Exact => {
            return Err(format!(
                "Attribute `{attribute}` is compared for equality only: `<`, `>` and `TO` need it under `number` \
                 or `date` in [search.indexes.{}].",
                layout.definition.name
            ));
        }
        Test::Range { low, high } => {
            let bound = |bound: &Option<(String, bool)>| match bound {
                None => Ok(Bound::Unbounded),
                Some((value, true)) => term(value).map(Bound::Included),
                Some((value, false)) => term(value).map(Bound::Excluded),
            };
            Selection::matches(RangeQuery::new(bound(low)?, bound(high)?))
        }
        // Every document has every attribute, be it NULL.
        Test::Exists => Selection::Everything,
        Test::Null => Selection::matches(ExistsQuery::new(Layout::name(place), false)).not(),
        Test::Empty if role == Role::Exact => {
            Selection::matches(TermSetQuery::new([Term::from_field_text(field, "")]))
        }
        Test::Empty => Selection::Nothing,
    })
}

fn term_text<'v>(role: Role, attribute: &str, value: &'v str) -> Result<std::borrow::Cow<'v, str>, String> {
    let key = match role {
        Role::Text | Role::Exact => return Ok(exact_term(value)),
        Role::Number => order::number_key(value),
        Role::Date => order::filter_instant_key(value),
    };
    let wanted = if role == Role::Number { "a number" } else { "a date (ISO 8601, or seconds since 1970)" };
    key.map(Into::into)
        .ok_or_else(|| format!("Attribute `{attribute}` is compared with `{value}`, which is not {wanted}."))
}

fn not_filterable(attribute: &str, layout: &Layout) -> String {
    let definition = &layout.definition;
    let columns = definition.roles().filter(|(role, _)| *role != Role::Text);
    let names: Vec<String> = columns.map(|(_, name)| format!("`{name}`")).collect();
    if names.is_empty() {
        return format!(
            "Attribute `{attribute}` is not filterable. Index `{}` does not have configured filterable attributes.",
            definition.name
        );
    }
    let names = names.join(", ");
    format!("Attribute `{attribute}` is not filterable. Available filterable attributes are: {names}.")
}
