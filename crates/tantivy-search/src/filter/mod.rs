//! Filters in Meilisearch's language: read ([`parse_json`]) and turned into a query ([`compile`],
//! [`Selection`]).
//!
//! As in Meilisearch, and unlike SQL, a comparison is true or false, never unknown: `a != 1` and `NOT a > 1`
//! also select documents whose `a` is NULL.

mod compile;
mod parse;
mod select;

pub(crate) use compile::compile;
pub(crate) use parse::parse_json;
pub(crate) use select::Selection;

/// A condition on a document.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Filter {
    All(Vec<Filter>),
    Any(Vec<Filter>),
    Not(Box<Filter>),
    Is(String, Test),
}

/// A condition on one attribute.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Test {
    OneOf(Vec<String>),
    /// Bounds with whether they belong to the range.
    Range {
        low: Option<(String, bool)>,
        high: Option<(String, bool)>,
    },
    /// The document has the attribute, be it NULL.
    Exists,
    Null,
    /// The empty string.
    Empty,
}
