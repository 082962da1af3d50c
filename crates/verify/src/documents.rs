//! A search index against its table.
//!
//! First the table is walked in the order of its key, a chunk of rows at a time in a snapshot of its own, and each
//! row's document is compared. Then the index is walked in the order of its ids, to find documents of which there is
//! no row. A row or document that comes or goes meanwhile is met by one of the walks or by neither, and if it is met
//! it must be right.

use std::collections::{BTreeMap, HashSet};
use std::thread;
use std::time::Duration;

use change::{Encoding, Field, Lsn, Snapshot, TableSchema, key};
use serde_json::{Map, Value};
use tokio_postgres::SimpleQueryRow;
use tokio_postgres::error::SqlState;
use worker::Checkpoint;

use crate::rollforward::RollForward;
use crate::rows::RowRecord;
use crate::source::{Reading, identifier, literal, only, text};
use crate::touched::{Attribute, Expectation, Touched};
use crate::verifier::Expected;
use crate::{Difference, DocumentStore, Documents, NotVerified, Verified, Verifier, window};

/// Rows that are read in one snapshot: at first, and at most.
const CHUNK: (usize, usize) = (200, 5_000);
/// About as many bytes, going by the chunk before.
const CHUNK_BYTES: usize = 16 << 20;
/// Documents that are asked for at a time.
const FETCH: usize = 1_000;
/// The same in bytes of their ids.
const FETCH_BYTES: usize = 256 << 10;
/// The same in bytes of their rows.
const FETCH_ROW_BYTES: usize = 8 << 20;
/// How often keys that only a later snapshot can tell about are looked at again, and how long after.
const AGAIN: (u32, Duration) = (20, Duration::from_millis(100));

/// A search index, as far as the proof needs to know it.
pub struct Index {
    /// `search.emails`.
    pub store: String,
    /// Hash of the definition that its checkpoint must have.
    pub definition: String,
    /// Its table, as it is now.
    pub table: TableSchema,
    /// The columns that its documents hold, beside those of the key.
    pub columns: Vec<String>,
}

pub(crate) fn verify(
    verifier: &mut Verifier<'_>,
    index: &Index,
    store: &mut dyn DocumentStore,
) -> Result<Verified, NotVerified> {
    let window = window::open(verifier.source)?;
    let mut walk = Walk::new(verifier, index, store, RollForward::new(window))?;
    let (mut after, mut limit) = (None, CHUNK.0);
    loop {
        let rows = walk.read(&walk.page_of_rows(after.as_deref(), limit))?;
        // Also when there is no row: what is not there must not be in the index, and that must be ready.
        walk.reach(rows.lsn)?;
        after = rows.found.last().map(|(_, row)| row[..walk.key_len].to_vec());
        let whole = rows.found.len() == limit;
        let bytes: usize = rows.found.iter().map(|(_, row)| bytes_of(row)).sum();
        limit = (CHUNK_BYTES / (bytes / rows.found.len().max(1)).max(1)).clamp(1, CHUNK.1);
        let ids = rows.found.iter().map(|(id, _)| id.clone()).collect();
        let later = walk.settle(ids, rows)?;
        walk.again(later)?;
        if !whole {
            break;
        }
    }
    walk.extras()?;
    walk.finish()
}

/// Rows by the ids of their documents.
type Rows = Vec<(String, Vec<Option<String>>)>;

struct Walk<'w, 'v> {
    verifier: &'w mut Verifier<'v>,
    index: &'w Index,
    store: &'w mut dyn DocumentStore,
    /// Those of the key first.
    attributes: Vec<Attribute>,
    key_len: usize,
    roll: RollForward,
    touched: Touched,
    at: Option<Checkpoint>,
    checked: u64,
    differences: u64,
}

impl<'w, 'v> Walk<'w, 'v> {
    fn new(
        verifier: &'w mut Verifier<'v>,
        index: &'w Index,
        store: &'w mut dyn DocumentStore,
        roll: RollForward,
    ) -> Result<Self, NotVerified> {
        let attribute = |column: &change::Column| Attribute {
            name: column.name.clone(),
            encoding: Encoding::of(column.type_oid),
        };
        let mut attributes: Vec<Attribute> = index.table.key_columns().map(attribute).collect();
        let key_len = attributes.len();
        if key_len == 0 {
            return Err(NotVerified::new(
                format!("{}: its table has no key", index.store),
                "give it a primary key",
            ));
        }
        for name in &index.columns {
            if attributes.iter().any(|known| known.name == *name) {
                continue;
            }
            let Some(place) = index.table.column(name) else {
                return Err(NotVerified::new(
                    format!("{}: its table has no column `{name}`", index.store),
                    "",
                ));
            };
            attributes.push(attribute(&index.table.columns[place]));
        }
        Ok(Walk {
            verifier,
            index,
            store,
            attributes,
            key_len,
            roll,
            touched: Touched::default(),
            at: None,
            checked: 0,
            differences: 0,
        })
    }

    fn select(&self, width: usize) -> String {
        format!("SELECT {} FROM {}", self.columns(width), only(&self.index.table))
    }

    /// The first columns: `"a", "b"`.
    fn columns(&self, width: usize) -> String {
        let names = self.attributes[..width].iter().map(|attribute| identifier(&attribute.name));
        names.collect::<Vec<_>>().join(", ")
    }

    fn page_of_rows(&self, after: Option<&[Option<String>]>, limit: usize) -> String {
        let key = self.columns(self.key_len);
        let after =
            after.map(|values| format!(" WHERE ({key}) > ({})", literals(values))).unwrap_or_default();
        format!("{}{after} ORDER BY {key} LIMIT {limit}", self.select(self.attributes.len()))
    }

    /// The first columns of the rows of these ids; `None` where none of them is an id.
    fn rows_of(&self, ids: &[String], width: usize) -> Option<String> {
        let keys: Vec<String> = ids
            .iter()
            .filter_map(|id| key::split(id, self.key_len))
            .map(
                |values| {
                    if self.key_len == 1 { literals(&values) } else { format!("({})", literals(&values)) }
                },
            )
            .collect();
        let key = self.columns(self.key_len);
        let key = if self.key_len == 1 { key } else { format!("({key})") };
        (!keys.is_empty()).then(|| format!("{} WHERE {key} IN ({})", self.select(width), keys.join(", ")))
    }

    /// Reads rows in a snapshot of their own.
    fn read(&mut self, sql: &str) -> Result<Reading<Rows>, NotVerified> {
        let (source, width, key_len) = (self.verifier.source, self.attributes.len(), self.key_len);
        let reading = source.read(&self.index.table, self.verifier.timeout, || {
            let rows = source.rows(sql)?;
            Ok(rows.iter().map(|row| row_of(row, width, key_len)).collect())
        })?;
        self.touched.advance(&reading.snapshot);
        Ok(reading)
    }

    fn expected(&self) -> Expected<'w> {
        Expected { store: &self.index.store, definition: &self.index.definition }
    }

    fn reach(&mut self, lsn: Lsn) -> Result<(), NotVerified> {
        let (expected, store) = (self.expected(), &mut *self.store);
        self.verifier.reach(&expected, lsn, |patience| store.checkpoint(lsn, patience))
    }

    /// Compares the documents of these ids with what the rows and the log say; gives those that only a later
    /// snapshot can tell about. The store has come to the reading's LSN.
    fn settle(&mut self, ids: Vec<String>, rows: Reading<Rows>) -> Result<Vec<String>, NotVerified> {
        let Reading { snapshot, lsn, found } = rows;
        let found: BTreeMap<String, Vec<Option<String>>> = found.into_iter().collect();
        let mut later = Vec::new();
        let mut left = ids.as_slice();
        loop {
            let (batch, rest) = left.split_at(batch_of(left, &found));
            let documents = self.fetch(batch, lsn, &snapshot)?;
            for id in batch {
                self.checked += 1;
                let expected = self.touched.expect(id, found.get(id).map(Vec::as_slice));
                if expected == Expectation::Later {
                    self.checked -= 1;
                    later.push(id.clone());
                } else {
                    self.compare(id, &expected, documents.get(id).map(String::as_str))?;
                }
            }
            left = rest;
            let (store, checked) = (&self.index.store, self.checked);
            self.verifier.observer.progress(store, "documents", checked);
            if left.is_empty() {
                return Ok(later);
            }
        }
    }

    /// The documents of these ids, by id, the log being rolled forward to where they are the state of.
    fn fetch(
        &mut self,
        ids: &[String],
        lsn: Lsn,
        snapshot: &Snapshot,
    ) -> Result<BTreeMap<String, String>, NotVerified> {
        let fetched = self.store.fetch(ids).map_err(|error| NotVerified::store(&self.index.store, &error))?;
        let Documents { checkpoint, documents } = fetched;
        self.expected().demand(self.verifier.log.id(), &checkpoint, lsn)?;
        let (touched, attributes, key_len) = (&mut self.touched, &self.attributes, self.key_len);
        let table = &self.index.table;
        self.roll.to(self.verifier.log, checkpoint.next_offset, snapshot, &mut |xid, record| {
            match RowRecord::read(table, record)? {
                Some(row) => touched.take(xid, &row, attributes, key_len),
                None => Ok(()),
            }
        })?;
        self.at = Some(checkpoint);
        documents.into_iter().map(|document| Ok((self.id_of(&document)?, document))).collect()
    }

    fn compare(&mut self, id: &str, expected: &Expectation, found: Option<&str>) -> Result<(), NotVerified> {
        let (source, found) = match (expected, found) {
            (Expectation::Row(row), Some(document)) => {
                let values = self.values(document, self.attributes.len())?;
                let differ: Vec<usize> =
                    (0..row.len()).filter(|place| !self.equal(*place, row, &values)).collect();
                if differ.is_empty() {
                    return Ok(());
                }
                let texts: Vec<Option<String>> = values.into_iter().map(Option::flatten).collect();
                (self.shown(row, &differ), self.shown(&texts, &differ))
            }
            (Expectation::Row(row), None) => {
                (self.shown(row, &(0..row.len()).collect::<Vec<_>>()), Value::Null)
            }
            (_, Some(document)) => (Value::Null, serde_json::from_str(document).unwrap_or(Value::Null)),
            (_, None) => return Ok(()),
        };
        self.differences += 1;
        let store = self.index.store.clone();
        self.verifier.observer.difference(Difference { store, key: id.to_owned(), source, found });
        Ok(())
    }

    fn equal(&self, place: usize, row: &[Option<String>], values: &[Option<Option<String>>]) -> bool {
        // An attribute that is missing is not one that is NULL.
        let Some(found) = &values[place] else { return false };
        match (&row[place], found) {
            (Some(a), Some(b)) if self.attributes[place].encoding == Encoding::Float => {
                a == b || a.parse::<f64>().is_ok_and(|a| b.parse().is_ok_and(|b: f64| a == b))
            }
            (a, b) => a == b,
        }
    }

    /// Some of a row's values, by their names.
    fn shown(&self, row: &[Option<String>], places: &[usize]) -> Value {
        let value = |place: &usize| {
            let text = row[*place].clone().map_or(Value::Null, Value::String);
            (self.attributes[*place].name.clone(), text)
        };
        Value::Object(places.iter().map(value).collect::<Map<_, _>>())
    }

    /// The first values of a document, as Postgres prints them; `None` for an attribute that is missing.
    fn values(&self, document: &str, count: usize) -> Result<Vec<Option<Option<String>>>, NotVerified> {
        let broken = |error: &dyn std::fmt::Display| {
            NotVerified::new(format!("{}: a document cannot be read: {error}", self.index.store), "")
        };
        let attributes = &self.attributes[..count];
        let names: Vec<&str> = attributes.iter().map(|attribute| attribute.name.as_str()).collect();
        let mut fields = Vec::new();
        change::fields(document, &names, &mut fields).map_err(|error| broken(&error))?;
        let value = |(field, attribute): (&Field<'_>, &Attribute)| match field {
            Field::Missing => None,
            field => Some(field.postgres_text(attribute.encoding).map(|text| text.into_owned())),
        };
        Ok(fields.iter().zip(attributes).map(value).collect())
    }

    fn id_of(&self, document: &str) -> Result<String, NotVerified> {
        let values = self.values(document, self.key_len)?;
        Ok(key::join(values.iter().map(|value| value.as_ref().and_then(|text| text.as_deref()))))
    }

    /// Looks at keys again, each time in a new snapshot.
    fn again(&mut self, mut ids: Vec<String>) -> Result<(), NotVerified> {
        for _ in 0..AGAIN.0 {
            let Some(sql) = self.rows_of(&ids, self.attributes.len()) else { return Ok(()) };
            thread::sleep(AGAIN.1);
            let rows = self.read(&sql)?;
            self.reach(rows.lsn)?;
            ids = self.settle(ids, rows)?;
        }
        match ids.first() {
            None => Ok(()),
            Some(id) => {
                let what = format!("{}: the row of document {id} does not keep still", self.index.store);
                Err(NotVerified::new(what, "run `millrace verify` again"))
            }
        }
    }

    /// Walks the index and compares the documents of which the table shows no row.
    fn extras(&mut self) -> Result<(), NotVerified> {
        let names: Vec<String> =
            self.attributes[..self.key_len].iter().map(|attribute| attribute.name.clone()).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let mut after: Option<String> = None;
        loop {
            let page = self.store.page(after.as_deref(), FETCH, &names);
            let page = page.map_err(|error| NotVerified::store(&self.index.store, &error))?.documents;
            let ids: Vec<String> =
                page.iter().map(|document| self.id_of(document)).collect::<Result<_, _>>()?;
            let Some(last) = ids.last() else { return Ok(()) };
            after = Some(last.clone());
            let rows = self.read_keys_of(&ids)?;
            let known: HashSet<&String> = rows.found.iter().map(|(id, _)| id).collect();
            let odd: Vec<String> = ids.into_iter().filter(|id| !known.contains(id)).collect();
            if !odd.is_empty() {
                self.reach(rows.lsn)?;
                let later = self.settle(odd, Reading { found: Vec::new(), ..rows })?;
                self.again(later)?;
            }
        }
    }

    /// The keys of the rows of these ids. One that no value of the key's type looks like makes Postgres refuse the query: then
    /// each is asked for alone, and those refused have no row.
    fn read_keys_of(&mut self, ids: &[String]) -> Result<Reading<Rows>, NotVerified> {
        let (source, key_len) = (self.verifier.source, self.key_len);
        let together = self.rows_of(ids, key_len);
        let alone: Vec<String> =
            ids.iter().filter_map(|id| self.rows_of(std::slice::from_ref(id), key_len)).collect();
        let reading = source.read(&self.index.table, self.verifier.timeout, || {
            let Some(together) = together else { return Ok(Vec::new()) };
            let rows = |rows: Vec<SimpleQueryRow>| {
                rows.iter().map(|row| row_of(row, key_len, key_len)).collect::<Rows>()
            };
            source.rows("SAVEPOINT millrace")?;
            match source.try_rows(&together) {
                Ok(found) => return Ok(rows(found)),
                Err(error) if is_data(&error) => source.rows("ROLLBACK TO millrace")?,
                Err(error) => return Err(NotVerified::postgres(&together, &error)),
            };
            let mut found = Vec::new();
            for sql in alone {
                match source.try_rows(&sql) {
                    Ok(one) => found.extend(rows(one)),
                    Err(error) if is_data(&error) => drop(source.rows("ROLLBACK TO millrace")?),
                    Err(error) => return Err(NotVerified::postgres(&sql, &error)),
                }
            }
            Ok(found)
        })?;
        self.touched.advance(&reading.snapshot);
        Ok(reading)
    }

    fn finish(self) -> Result<Verified, NotVerified> {
        let store = self.index.store.clone();
        let Some(at) = self.at else {
            return Err(NotVerified::new(format!("{store}: nothing was read"), ""));
        };
        Ok(Verified { store, lsn: at.lsn, checked: self.checked, differences: self.differences })
    }
}

fn row_of(row: &SimpleQueryRow, width: usize, key_len: usize) -> (String, Vec<Option<String>>) {
    let values: Vec<Option<String>> = (0..width).map(|place| text(row, place).map(str::to_owned)).collect();
    (key::join(values[..key_len].iter().map(Option::as_deref)), values)
}

/// `'a', 'b'`
fn literals(values: &[Option<String>]) -> String {
    values.iter().map(|value| literal(value.as_deref())).collect::<Vec<_>>().join(", ")
}

/// How many of these ids go into one request; none only of none.
fn batch_of(ids: &[String], rows: &BTreeMap<String, Vec<Option<String>>>) -> usize {
    let (mut of_ids, mut of_rows) = (0, 0);
    let fitting = ids.iter().take(FETCH).take_while(|id| {
        of_ids += id.len();
        of_rows += rows.get(*id).map_or(0, |row| bytes_of(row));
        of_ids <= FETCH_BYTES && of_rows <= FETCH_ROW_BYTES
    });
    fitting.count().max(1).min(ids.len())
}

fn bytes_of(row: &[Option<String>]) -> usize {
    row.iter().flatten().map(String::len).sum()
}

/// Whether a value was refused for what it is (class 22: data exception).
fn is_data(error: &tokio_postgres::Error) -> bool {
    error.code().map(SqlState::code).is_some_and(|code| code.starts_with("22"))
}
