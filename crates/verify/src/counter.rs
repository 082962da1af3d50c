//! A counter against the answer to its query.

use std::collections::BTreeMap;

use change::{Encoding, Field, Op, TableSchema};
use serde_json::Value;
use worker::LogRecord;

use crate::rollforward::RollForward;
use crate::rows::{Datum, RowRecord};
use crate::source::{identifier, only};
use crate::tally::{Sign, Tally};
use crate::verifier::Expected;
use crate::{CounterStore, Difference, NotVerified, Source, Verified, Verifier, window};

/// Groups that are fetched at a time.
const FETCH: usize = 10_000;
/// Images of rows that are evaluated at a time.
const IMAGES: usize = 5_000;
/// The same in bytes.
const IMAGE_BYTES: usize = 4 << 20;
/// Progress is told every so many records.
const TELL: u64 = 50_000;

/// What a counter counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Measure {
    /// `count(*)`.
    Rows,
    /// `count(column)`.
    Values,
    /// `sum(column)`.
    Sum,
}

/// A counter, as far as the proof needs to know it.
pub struct Counter {
    /// `counters.unread`.
    pub store: String,
    /// The definition that its checkpoint must have.
    pub definition: String,
    /// Its table, as it is now.
    pub table: TableSchema,
    /// The columns that its query names.
    pub columns: Vec<String>,
    /// The number of group columns.
    pub groups: usize,
    /// What it counts.
    pub measure: Measure,
    /// The query for what stands after FROM. Each row of its answer: the group columns, the number of rows, the
    /// number of values that are not NULL, the sum; all as texts.
    pub query: Box<dyn Fn(&str) -> String>,
}

pub(crate) fn verify(
    verifier: &mut Verifier<'_>,
    counter: &Counter,
    store: &mut dyn CounterStore,
) -> Result<Verified, NotVerified> {
    let (source, timeout) = (verifier.source, verifier.timeout);
    let expected = Expected { store: &counter.store, definition: &counter.definition };
    let window = window::open(source)?;
    let reading = source.read(&counter.table, timeout, || answer(source, counter))?;
    verifier.reach(&expected, reading.lsn, |_| store.checkpoint())?;
    let (at, found) = store.content().map_err(|error| NotVerified::store(&counter.store, &error))?;
    let at = at.ok_or_else(|| NotVerified::new(format!("{}: its checkpoint is gone", counter.store), ""))?;
    expected.demand(verifier.log.id(), &at, reading.lsn)?;

    let mut images = Images::new(source, counter, reading.found)?;
    let (mut told, observer) = (0, &mut *verifier.observer);
    RollForward::new(window).to(verifier.log, at.next_offset, &reading.snapshot, &mut |_, record| {
        told += 1;
        if told % TELL == 0 {
            observer.progress(&counter.store, "changes since the snapshot", told);
        }
        images.take(record)
    })?;
    let expected = images.finish()?.values(counter);
    let (checked, differences) = compare(&counter.store, &expected, &found, |difference| {
        verifier.observer.difference(difference);
    });
    Ok(Verified { store: counter.store.clone(), lsn: at.lsn, checked, differences })
}

/// The query's answer as the current transaction sees it.
fn answer(source: &Source, counter: &Counter) -> Result<Tally, NotVerified> {
    let mut tally = Tally::default();
    let query = (counter.query)(&only(&counter.table));
    source.rows(&format!("DECLARE millrace_verify NO SCROLL CURSOR FOR {query}"))?;
    loop {
        let rows = source.rows(&format!("FETCH {FETCH} FROM millrace_verify"))?;
        for row in &rows {
            tally.take_text(counter, row)?;
        }
        if rows.len() < FETCH {
            return Ok(tally);
        }
    }
}

/// Compares two maps in the order of their keys; gives the number of keys in either, and of those that differ.
fn compare(
    store: &str,
    expected: &BTreeMap<String, String>,
    found: &BTreeMap<String, String>,
    mut tell: impl FnMut(Difference),
) -> (u64, u64) {
    let keys: std::collections::BTreeSet<&String> = expected.keys().chain(found.keys()).collect();
    let mut differences = 0;
    for key in &keys {
        let (source, found) = (expected.get(*key), found.get(*key));
        if source != found {
            differences += 1;
            let value =
                |value: Option<&String>| value.map_or(Value::Null, |text| Value::String(text.clone()));
            let (source, found) = (value(source), value(found));
            tell(Difference { store: store.to_owned(), key: (*key).clone(), source, found });
        }
    }
    (keys.len() as u64, differences)
}

/// Images of rows on their way to Postgres, which says what they add to the answer and take from it.
struct Images<'a> {
    source: &'a Source,
    counter: &'a Counter,
    columns: Vec<&'a str>,
    /// Theirs.
    encodings: Vec<Encoding>,
    /// The query over `$1`, a JSON array of images.
    sql: String,
    tally: Tally,
    /// Rows that came and rows that went, each a JSON array that is not closed yet.
    came: String,
    went: String,
    count: usize,
}

impl<'a> Images<'a> {
    fn new(source: &'a Source, counter: &'a Counter, tally: Tally) -> Result<Self, NotVerified> {
        let columns: Vec<&str> = counter.columns.iter().map(String::as_str).collect();
        let encoding = |name: &&str| {
            let place = counter.table.column(name);
            place.map_or(Encoding::Text, |place| Encoding::of(counter.table.columns[place].type_oid))
        };
        let encodings = columns.iter().map(encoding).collect();
        let sql = (counter.query)(&relation_of_images(source, counter)?);
        let (came, went) = (String::new(), String::new());
        Ok(Images { source, counter, columns, encodings, sql, tally, came, went, count: 0 })
    }

    fn take(&mut self, record: &LogRecord<'_>) -> Result<(), NotVerified> {
        let Some(row) = RowRecord::read(&self.counter.table, record)? else { return Ok(()) };
        if row.op == Op::Truncate {
            // Whatever was there before it in the order of the log is gone.
            self.tally.clear();
            self.came.clear();
            self.went.clear();
            self.count = 0;
            return Ok(());
        }
        if let Some(before) = row.before(&self.columns)? {
            push(&mut self.went, &self.columns, &self.encodings, &before);
            self.count += 1;
        }
        if let Some(after) = row.after(&self.columns)? {
            let mut known = Vec::with_capacity(after.len());
            for (value, column) in after.into_iter().zip(&self.columns) {
                match value {
                    Datum::Known(field) => known.push(field),
                    Datum::Unchanged => {
                        return Err(row.error(format!("it does not hold the value of `{column}`")));
                    }
                }
            }
            push(&mut self.came, &self.columns, &self.encodings, &known);
            self.count += 1;
        }
        if self.count >= IMAGES || self.came.len() + self.went.len() >= IMAGE_BYTES {
            self.evaluate()?;
        }
        Ok(())
    }

    fn evaluate(&mut self) -> Result<(), NotVerified> {
        self.count = 0;
        for (sign, images) in
            [(Sign::Plus, std::mem::take(&mut self.came)), (Sign::Minus, std::mem::take(&mut self.went))]
        {
            if images.is_empty() {
                continue;
            }
            for row in self.source.query(&self.sql, &[&(images + "]")])? {
                self.tally.take(self.counter, sign, |place| row.try_get(place).ok().flatten())?;
            }
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Tally, NotVerified> {
        self.evaluate()?;
        Ok(self.tally)
    }
}

/// Appends a row to a JSON array, its values as Postgres prints them: some of Debezium's forms it does not read.
fn push(array: &mut String, columns: &[&str], encodings: &[Encoding], values: &[Field<'_>]) {
    array.push(if array.is_empty() { '[' } else { ',' });
    array.push('{');
    for (place, ((column, encoding), value)) in columns.iter().zip(encodings).zip(values).enumerate() {
        if place > 0 {
            array.push(',');
        }
        push_string(array, column);
        array.push(':');
        match value.postgres_text(*encoding) {
            None => array.push_str("null"),
            Some(text) => push_string(array, &text),
        }
    }
    array.push('}');
}

fn push_string(json: &mut String, text: &str) {
    // A string always becomes JSON.
    json.push_str(&serde_json::to_string(text).unwrap_or_default());
}

/// What stands after FROM to have the images in `$1` as rows: the referenced columns with their own types and
/// collations, so that comparisons mean what they mean in the table.
fn relation_of_images(source: &Source, counter: &Counter) -> Result<String, NotVerified> {
    const COLUMNS: &str = "SELECT a.attname::text, pg_catalog.format_type(a.atttypid, a.atttypmod),
            CASE WHEN a.attcollation <> t.typcollation
                 THEN pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.collname) END
        FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
        LEFT JOIN pg_catalog.pg_collation c ON c.oid = a.attcollation
        LEFT JOIN pg_catalog.pg_namespace n ON n.oid = c.collnamespace
        WHERE a.attrelid = $1 AND a.attname = ANY ($2) AND a.attnum > 0 AND NOT a.attisdropped";
    if counter.columns.is_empty() {
        return Ok("pg_catalog.jsonb_array_elements($1::text::jsonb) AS images".to_owned());
    }
    let rows = source.query(COLUMNS, &[&counter.table.relation, &counter.columns])?;
    if rows.len() != counter.columns.len() {
        let what = format!("{}: its table has changed meanwhile", counter.store);
        return Err(NotVerified::new(what, "run `millrace verify` again"));
    }
    let column = |row: &tokio_postgres::Row| {
        let (name, kind, collation): (String, String, Option<String>) = (row.get(0), row.get(1), row.get(2));
        let collation = collation.map(|name| format!(" COLLATE {name}")).unwrap_or_default();
        format!("{} {kind}{collation}", identifier(&name))
    };
    let columns: Vec<String> = rows.iter().map(column).collect();
    Ok(format!("pg_catalog.jsonb_to_recordset($1::text::jsonb) AS images ({})", columns.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_compared_by_key() {
        let map =
            |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        let mut told = Vec::new();
        let (expected, found) =
            (map(&[("a", "1"), ("b", "2"), ("c", "3")]), map(&[("b", "2"), ("c", "4"), ("d", "5")]));
        let result = compare("s", &expected, &found, |d| told.push((d.key, d.source, d.found)));
        assert_eq!(result, (4, 3));
        let text = |t: &str| Value::String(t.into());
        assert_eq!(
            told,
            [
                ("a".into(), text("1"), Value::Null),
                ("c".into(), text("3"), text("4")),
                ("d".into(), Value::Null, text("5"))
            ]
        );
    }
}
