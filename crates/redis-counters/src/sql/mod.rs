//! Counters as SQL: from the text of a query to what one row adds to the answer.
//!
//! ```text
//! text ─▶ Definition ─(TableSchema)─▶ Bound ─(row)─▶ Contribution
//! ```
//!
//! A [`Definition`] is the query, parsed and reduced to the subset: one table, one aggregate, plain columns to
//! group by, a WHERE of comparisons. [`Definition::bind`] resolves it against one version of the table, where all
//! that could make our answer differ from Postgres's is refused: a type or a collation whose comparison is not
//! ours, a literal that depends on the session, a replica identity that leaves out a column of the old row. What
//! is left is evaluated on rows of the log by [`Bound::contribution`], with SQL's three-valued logic. Groups are written
//! as Postgres prints their values; [`group`] says what that means, and what happens when a column's type changes.
//!
//! *What holds:* over any set of rows, the contributions summed by group are what Postgres answers to the query
//! over the same rows. A test proves it on random rows and queries against a real server.
//!
//! The database's encoding is taken to be UTF-8; in another, `_` in LIKE may mean something else.

mod bind;
mod column_type;
mod decimal;
mod definition;
mod evaluate;
mod group;
mod like;
mod literal;
mod predicate;
mod scope;
mod select;
mod time;
mod value;

pub use bind::Bound;
pub use definition::{Aggregate, Definition};
pub use evaluate::{Contribution, Scratch};
pub(crate) use group::Form;
pub(crate) use scope::display_table;

#[cfg(test)]
mod refusal_tests;
#[cfg(test)]
mod tests;
