//! A counter against the answer to its query.

use std::collections::{BTreeMap, BTreeSet};

use change::{Encoding, Field, Lsn, Op, Snapshot, TableSchema};
use serde_json::Value;
use worker::{Checkpoint, LogRecord};

use crate::rollforward::RollForward;
use crate::rows::{Datum, RowRecord};
use crate::source::{identifier, only};
use crate::tally::{Sign, Tally};
use crate::verifier::Expected;
use crate::{CounterStore, Difference, NotVerified, Part, Source, Verified, Verifier, window};

/// Groups that are fetched at a time.
const FETCH: usize = 10_000;
/// Groups that are read again at a time.
const AGAIN: usize = 1_000;
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
    let content = Content::read(verifier, &expected, store, reading.lsn)?;

    let mut answer = Answer {
        roll: RollForward::new(window),
        snapshot: reading.snapshot,
        images: Images::new(source, counter, reading.found)?,
        told: 0,
    };
    answer.forward(verifier, &content.first)?;
    answer.images.tally.watch();
    answer.forward(verifier, &content.last)?;
    let mut suspects = answer.images.tally.touched();
    let checked = differing(counter, &answer.images.tally, &content.groups, &mut suspects);
    let (mut at, mut differences) = (content.last, 0);
    drop(content.groups);
    for groups in suspects.into_iter().collect::<Vec<String>>().chunks(AGAIN) {
        let (checkpoint, found) =
            store.groups(groups).map_err(|error| NotVerified::store(&counter.store, &error))?;
        at = expected.there(verifier.log.id(), checkpoint, reading.lsn)?;
        answer.forward(verifier, &at)?;
        for (group, found) in groups.iter().zip(found) {
            let source = answer.images.tally.value(counter, group);
            if source != found {
                differences += 1;
                let value = |value: Option<String>| value.map_or(Value::Null, Value::String);
                let (store, key) = (counter.store.clone(), group.clone());
                verifier.observer.difference(Difference {
                    store,
                    key,
                    source: value(source),
                    found: value(found),
                });
            }
        }
    }
    Ok(Verified { store: counter.store.clone(), lsn: at.lsn, checked, differences })
}

/// A store's content, read in parts.
struct Content {
    groups: BTreeMap<String, String>,
    /// Where the store was when the first part was read.
    first: Checkpoint,
    /// And the last.
    last: Checkpoint,
}

impl Content {
    fn read(
        verifier: &mut Verifier<'_>,
        expected: &Expected<'_>,
        store: &mut dyn CounterStore,
        wanted: Lsn,
    ) -> Result<Self, NotVerified> {
        let mut read = |from: Option<&str>| -> Result<(Checkpoint, Part), NotVerified> {
            let part = store.part(from).map_err(|error| NotVerified::store(expected.store, &error))?;
            let at = expected.there(verifier.log.id(), part.checkpoint.clone(), wanted)?;
            Ok((at, part))
        };
        let (first, part) = read(None)?;
        let mut content = Content { groups: part.groups.into_iter().collect(), last: first.clone(), first };
        let mut next = part.next;
        while let Some(from) = next {
            let (at, part) = read(Some(&from))?;
            if at.next_offset < content.last.next_offset {
                let (was, is) = (content.last.next_offset, at.next_offset);
                let what = format!("{}: it went back from offset {was} of the log to {is}", expected.store);
                return Err(NotVerified::new(what, ""));
            }
            content.groups.extend(part.groups);
            content.last = at;
            next = part.next;
        }
        Ok(content)
    }
}

/// The query's answer, on its way through the log.
struct Answer<'a> {
    roll: RollForward,
    snapshot: Snapshot,
    images: Images<'a>,
    /// Records that changed it.
    told: u64,
}

impl Answer<'_> {
    /// Brings the answer to where a store is.
    fn forward(&mut self, verifier: &mut Verifier<'_>, at: &Checkpoint) -> Result<(), NotVerified> {
        let Answer { roll, snapshot, images, told } = self;
        let observer = &mut *verifier.observer;
        roll.to(verifier.log, at.next_offset, snapshot, &mut |_, record| {
            *told += 1;
            if *told % TELL == 0 {
                observer.progress(&images.counter.store, "changes since the snapshot", *told);
            }
            images.take(record)
        })?;
        images.evaluate()
    }
}

/// Adds the groups that differ to `suspects`; gives the number of groups in either.
fn differing(
    counter: &Counter,
    tally: &Tally,
    found: &BTreeMap<String, String>,
    suspects: &mut BTreeSet<String>,
) -> u64 {
    let mut checked = 0;
    for group in tally.groups(counter) {
        let expected = tally.value(counter, group);
        checked += u64::from(expected.is_some() || found.contains_key(group));
        if expected.as_ref() != found.get(group) {
            suspects.insert(group.to_owned());
        }
    }
    for group in found.keys().filter(|group| !tally.knows(counter, group)) {
        checked += 1;
        suspects.insert(group.clone());
    }
    checked
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
                    Datum::Omitted => return Err(row.lacks(column)),
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
