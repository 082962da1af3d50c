use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::Description;
use crate::description::{another_column, retyped};
use crate::lsn::cut;
use crate::name::{quoted_table_name, table_name};

/// Which columns of the old row Postgres writes to the WAL for an update or a delete.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ReplicaIdentity {
    /// The primary key's, where it changed.
    Default,
    /// None: updates and deletes fail on a published table.
    Nothing,
    /// All of them.
    Full,
    /// Those of a chosen unique index.
    Index,
}

/// What order comparisons and equality of a text column mean; absent for types without a collation.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Collation {
    /// Its name, as `pg_collation.collname`; `default` is resolved to the database's.
    pub name: String,
    /// Whether equal means equal bytes.
    pub deterministic: bool,
    /// Whether order means order of bytes (`C`, `POSIX`, `C.UTF-8`-like).
    pub bytewise: bool,
}

/// A column, as of one version of its table.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Column {
    /// Its name, unquoted.
    pub name: String,
    /// Object id of its type, or of the base type when the type is a domain.
    pub type_oid: u32,
    /// The base type as `format_type` prints it: `character varying(40)`, `numeric(10,2)`.
    pub type_name: String,
    /// Its place in the record's key, from 1: in the replica identity's index, or under FULL in the primary key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<u16>,
    /// Its collation, where its type has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub collation: Option<Collation>,
    /// `pg_attribute.attnum`, which a column keeps for its life and no other column of the table ever gets; absent where the
    /// catalog did not know the column any more, or an older version described it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub number: Option<i16>,
    /// The column's name in the records of this version, where it differs from `name`; empty if they lack the column. See
    /// [`TableSchema::with_present_names`].
    #[serde(skip)]
    pub recorded: Option<String>,
}

impl Column {
    /// The column's name in the records of this version; empty if they lack the column.
    pub fn recorded_name(&self) -> &str {
        self.recorded.as_deref().unwrap_or(&self.name)
    }

    /// True for regclass, regrole and similar types. Their text is the name of a database object and changes when the object
    /// is renamed, without an event for the row.
    pub fn names_an_object(&self) -> bool {
        // regproc, regprocedure, regoper, regoperator, regclass, regtype, regconfig, regdictionary, regnamespace, regrole,
        // regcollation.
        [24, 2202, 2203, 2204, 2205, 2206, 3734, 3769, 4089, 4096, 4191].contains(&self.type_oid)
    }
}

/// A table, as of one version: what a worker needs to read its rows.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TableSchema {
    /// Object id of the relation.
    pub relation: u32,
    /// The partitioned table under whose name it is in the log: itself, or the one of which it is a partition.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<u32>,
    /// Its schema (namespace), or its root's.
    pub schema: String,
    /// Its name, or its root's.
    pub table: String,
    /// What an old row holds.
    pub identity: ReplicaIdentity,
    /// The columns in the order of the stream.
    pub columns: Vec<Column>,
}

impl TableSchema {
    /// `schema.table`, as the configuration names it; see [`table_name`].
    pub fn full_name(&self) -> String {
        table_name(&self.schema, &self.table)
    }

    /// The same as SQL: `"public"."emails"`.
    pub fn quoted(&self) -> String {
        quoted_table_name(&self.schema, &self.table)
    }

    /// Whether it is a partitioned table, of which the partitions have the rows.
    pub fn partitioned(&self) -> bool {
        self.root == Some(self.relation)
    }

    /// How to have whole old rows, of the table that has this name in SQL.
    pub fn make_full(&self, name: &str) -> String {
        let also = if self.root.is_some() {
            ", and the same of each partition, which does not inherit it"
        } else {
            ""
        };
        format!("ALTER TABLE {name} REPLICA IDENTITY FULL{also}")
    }

    /// The same table under another's name.
    pub fn named_as(&self, other: &TableSchema) -> TableSchema {
        let TableSchema { root, schema, table, .. } = other.clone();
        TableSchema { root, schema, table, ..self.clone() }
    }

    /// The same table, its columns numbered in the order in which the stream has them, if it is known which they are. The
    /// catalog was asked by name, and a column may have had another one for a while: then it has none of these names now,
    /// and the `earlier` version had it.
    pub fn numbered_since(mut self, earlier: &TableSchema, now: &Description) -> TableSchema {
        let there = |(_, number): &(&str, i16)| now.columns.iter().any(|column| column.number == *number);
        let known = self.numbers().chain(earlier.numbers().filter(there));
        let numbers: BTreeSet<i16> = known.map(|(_, number)| number).collect();
        if numbers.len() == self.columns.len() {
            for (column, number) in self.columns.iter_mut().zip(numbers) {
                column.number = Some(number);
            }
        }
        self
    }

    /// Says so if rows of the `earlier` version mean something else under this one: another column had the name of one of
    /// these columns, or one had another type.
    pub fn breaks(&self, earlier: &TableSchema) -> Option<String> {
        let names: BTreeMap<&str, i16> = earlier.numbers().collect();
        let other = |(name, number): &(&str, i16)| names.get(name).is_some_and(|known| known != number);
        if let Some((name, _)) = self.numbers().find(other) {
            return Some(another_column(name));
        }
        self.columns.iter().filter(|column| column.number.is_some()).find_map(|column| {
            let before = earlier.columns.iter().find(|before| before.number == column.number)?;
            retyped(&column.name, before.type_oid, column.type_oid)
        })
    }

    /// The same table, with what the stream does not say of a column taken from an earlier version.
    pub fn completed_from(mut self, earlier: &TableSchema) -> TableSchema {
        for column in &mut self.columns {
            let same = |known: &&Column| match column.number.and(known.number) {
                Some(_) => known.number == column.number,
                None => known.name == column.name,
            };
            let Some(known) = earlier.columns.iter().find(same) else { continue };
            if self.identity == ReplicaIdentity::Full || column.key.is_some() {
                column.key = known.key.or(column.key);
            }
            column.collation = known.collation.clone();
            column.number = column.number.or(known.number);
        }
        self
    }

    /// The same version with the names that its columns got in `later` versions, which are in order, and have now: a column
    /// that was renamed is found under its new name. When a name goes to another column, the table begins again in the
    /// log, and columns have the names that they had until then: whoever reads these records is not yet there. A column of the
    /// newest version that these records do not have is among the columns, without being recorded; one that they have under
    /// another name is there under both.
    pub fn with_present_names(mut self, later: &[&TableSchema], now: &Description) -> TableSchema {
        let mut known: BTreeMap<&str, i16> = self.numbers().collect();
        let mut last: Vec<(&str, i16)> = Vec::new();
        let versions = later.iter().map(|version| version.numbers().collect());
        let present = now.columns.iter().map(|column| (column.name.as_str(), column.number)).collect();
        for names in versions.chain([present]) {
            let names: Vec<(&str, i16)> = names;
            if names.iter().any(|(name, number)| known.get(name).is_some_and(|known| known != number)) {
                break;
            }
            known.extend(names.iter().copied());
            last = names;
        }
        let newest = later.last().map_or(&[][..], |newest| &newest.columns[..]);
        let others: Vec<Column> = newest.iter().chain(&self.columns).cloned().collect();
        for column in &mut self.columns {
            let renamed =
                |(name, number): &&(&str, i16)| column.number == Some(*number) && column.name != *name;
            if let Some((name, _)) = last.iter().find(renamed) {
                column.recorded = Some(std::mem::replace(&mut column.name, (*name).to_owned()));
            }
        }
        // A renamed column is listed under its other names too, so that a store which still uses one of them works until it
        // reaches the rename.
        for column in others {
            if self.column(&column.name).is_none() {
                let same =
                    self.columns.iter().find(|own| own.number.is_some() && own.number == column.number);
                let recorded = same.map(|own| own.recorded.as_ref().unwrap_or(&own.name).clone());
                let recorded = Some(recorded.unwrap_or_default());
                self.columns.push(Column { key: None, recorded, ..column });
            }
        }
        self
    }

    /// Names and numbers of the columns of which the number is known.
    fn numbers(&self) -> impl Iterator<Item = (&str, i16)> {
        self.columns.iter().filter_map(|column| Some((column.name.as_str(), column.number?)))
    }

    /// Which table it is in the log: its partitions are one.
    pub fn family(&self) -> u32 {
        self.root.unwrap_or(self.relation)
    }

    /// Place of a column by its name.
    pub fn column(&self, name: &str) -> Option<usize> {
        self.columns.iter().position(|column| column.name == name)
    }

    /// The columns of the record's key, in the key's order.
    pub fn key_columns(&self) -> impl Iterator<Item = &Column> {
        self.key_places().into_iter().map(|place| &self.columns[place])
    }

    /// The key of a record as people and stores write it: values as Postgres prints them, [joined](crate::key::join). `None`
    /// for JSON that is no key of this table.
    pub fn key_text(&self, key: &[u8]) -> Option<String> {
        let columns: Vec<&Column> = self.key_columns().collect();
        let names: Vec<&str> = columns.iter().map(|column| column.recorded_name()).collect();
        let mut values = Vec::new();
        crate::key_fields(key, &names, &mut values).ok()?;
        let texts = values
            .iter()
            .zip(&columns)
            .map(|(value, column)| value.postgres_text(Encoding::of_column(column)));
        let texts: Vec<_> = texts.collect();
        let whole = !columns.is_empty() && !values.contains(&crate::Field::Missing);
        whole.then(|| crate::key::join(texts.iter().map(Option::as_deref)))
    }

    /// What the order of keys depends on: name, type and collation of each column of the key.
    pub fn key_signature(&self) -> Vec<String> {
        let signature = |column: &Column| {
            let collation = column.collation.as_ref().map_or("", |collation| &collation.name);
            format!("{} {} {collation}", column.name, column.type_oid)
        };
        self.key_columns().map(signature).collect()
    }

    /// Where the columns of the record's key stand among the columns, in the key's order.
    pub fn key_places(&self) -> Vec<usize> {
        let mut places: Vec<usize> = (0..self.columns.len()).collect();
        places.retain(|place| self.columns[*place].key.is_some());
        places.sort_by_key(|place| self.columns[*place].key);
        places
    }
}

/// Names one version of one table: what the header `millrace.schema` holds. Written `16384/3`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SchemaRef {
    /// Object id of the relation.
    pub relation: u32,
    /// Version, from 1, counted per relation within a log.
    pub version: u32,
}

impl fmt::Display for SchemaRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.relation, self.version)
    }
}

impl FromStr for SchemaRef {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (relation, version) = cut(text, b'/').ok_or(())?;
        Ok(SchemaRef { relation: relation.parse().map_err(drop)?, version: version.parse().map_err(drop)? })
    }
}

/// How a type's text becomes JSON.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Encoding {
    /// `t`/`f` to `true`/`false`.
    Boolean,
    /// Digits as they are.
    Integer,
    /// Digits as they are, whole numbers as `1.0`; `NaN` and the infinities as strings.
    Float,
    /// A string of the digits; `NaN` as `"NAN"`, the infinities as `"POSITIVE_INFINITY"` and `"NEGATIVE_INFINITY"`.
    Numeric,
    /// A string of the text as it is: text, uuid, json, and every type not named here.
    Text,
    /// `2025-01-19` to `"2025-01-19Z"`.
    Date,
    /// `12:34:56.5` to `"12:34:56.5Z"`.
    Time,
    /// `2025-01-19 12:34:56.5` to `"2025-01-19T12:34:56.5Z"`.
    Timestamp,
    /// The same from `2025-01-19 12:34:56.5+00`; the session's TimeZone is UTC.
    TimestampTz {
        /// Digits of a second's fraction, as many as the type has: `"2025-01-19T12:34:56.500000Z"`.
        digits: usize,
    },
    /// `\x0102` to base64.
    Bytea,
}

impl Encoding {
    /// The encoding of a base type, by its object id in `pg_type.dat`.
    pub fn of(type_oid: u32) -> Encoding {
        match type_oid {
            16 => Encoding::Boolean,
            20 | 21 | 23 | 26 => Encoding::Integer,
            700 | 701 => Encoding::Float,
            1700 => Encoding::Numeric,
            1082 => Encoding::Date,
            1083 => Encoding::Time,
            1114 => Encoding::Timestamp,
            1184 => Encoding::TimestampTz { digits: 6 },
            17 => Encoding::Bytea,
            _ => Encoding::Text,
        }
    }

    /// The encoding of a column, which knows its type's precision.
    pub(crate) fn of_column(column: &Column) -> Encoding {
        let precision = || column.type_name.split_once('(')?.1.split_once(')')?.0.parse().ok();
        match (Encoding::of(column.type_oid), precision()) {
            (Encoding::TimestampTz { .. }, Some(digits)) => Encoding::TimestampTz { digits },
            (encoding, _) => encoding,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ColumnDescription;

    fn table(columns: &[(&str, Option<u16>)]) -> TableSchema {
        let column = |(name, key): &(&str, Option<u16>)| Column {
            name: (*name).to_owned(),
            type_oid: 25,
            type_name: "text".into(),
            key: *key,
            collation: None,
            number: None,
            recorded: None,
        };
        TableSchema {
            relation: 1,
            root: None,
            schema: "public".into(),
            table: "t".into(),
            identity: ReplicaIdentity::Full,
            columns: columns.iter().map(column).collect(),
        }
    }

    #[test]
    fn columns_are_numbered_by_their_order_where_it_is_known_which_they_are() {
        let (known, now) = named(&[(1, "id"), (3, "a"), (4, "b")]);
        let swapped = table(&[("id", None), ("b", None), ("t", None)]);
        let numbered = swapped.clone().numbered_since(&known, &now);
        assert_eq!(numbered.numbers().collect::<Vec<_>>(), [("id", 1), ("b", 3), ("t", 4)]);
        assert_eq!(numbered.breaks(&known).unwrap(), "column b is another one than before");
        let (_, dropped) = named(&[(1, "id"), (3, "a")]);
        assert_eq!(swapped.numbered_since(&known, &dropped).numbers().count(), 0);
        // Another b; `t` was the name of a for a while.
        let (_, now) = named(&[(1, "id"), (3, "a"), (7, "b"), (8, "c")]);
        let mut renamed = table(&[("id", None), ("t", None), ("b", None)]);
        (renamed.columns[0].number, renamed.columns[2].number) = (Some(1), Some(7));
        let numbered = renamed.clone().numbered_since(&known, &now);
        assert_eq!(numbered.numbers().collect::<Vec<_>>(), [("id", 1), ("t", 3), ("b", 7)]);
        // One of `t` and `b` may be c.
        let (_, now) = named(&[(1, "id"), (3, "a"), (8, "c")]);
        renamed.columns[2].number = None;
        assert_eq!(renamed.numbered_since(&known, &now).numbers().count(), 1);
    }

    #[test]
    fn what_the_catalog_forgot_is_taken_from_an_earlier_version() {
        let known = table(&[("a", Some(2)), ("b", Some(1)), ("c", None)]);
        let described = table(&[("b", None), ("c", None), ("a", None), ("d", None)]);
        let completed = described.clone().completed_from(&known);
        assert_eq!(
            completed.key_columns().map(|column| column.name.as_str()).collect::<Vec<_>>(),
            ["b", "a"]
        );
        // The stream says which columns are in the key of an index; only their order is not known.
        let index = TableSchema { identity: ReplicaIdentity::Index, ..described };
        assert_eq!(index.completed_from(&known).key_columns().count(), 0);
    }

    fn named(columns: &[(i16, &str)]) -> (TableSchema, Description) {
        let names: Vec<_> = columns.iter().map(|(_, name)| (*name, None)).collect();
        let mut schema = table(&names);
        for (column, (number, _)) in schema.columns.iter_mut().zip(columns) {
            column.number = Some(*number);
        }
        let columns = schema.columns.iter().map(|column| ColumnDescription {
            number: column.number.unwrap_or_default(),
            name: column.name.clone(),
            ..ColumnDescription::default()
        });
        let now = Description { columns: columns.collect(), ..Description::default() };
        (schema, now)
    }

    /// Name and recorded name of each column of the first version, as the later ones call them, the last of which is now's.
    fn present(versions: &[&[(i16, &str)]]) -> Vec<(String, String)> {
        let (later, descriptions): (Vec<_>, Vec<_>) =
            versions[1..].iter().map(|columns| named(columns)).unzip();
        let later: Vec<&TableSchema> = later.iter().collect();
        let seen = named(versions[0]).0.with_present_names(&later, descriptions.last().unwrap());
        let name = |column: &Column| (column.name.clone(), column.recorded_name().to_owned());
        seen.columns.iter().map(name).collect()
    }

    #[test]
    fn columns_of_an_older_version_have_the_names_that_they_have_now() {
        let pair = |name: &str, recorded: &str| (name.to_owned(), recorded.to_owned());
        let (id, a, b) = (pair("id", "id"), pair("a", "a"), pair("b", "b"));
        let older: &[(i16, &str)] = &[(1, "id"), (2, "a"), (3, "b")];
        assert_eq!(present(&[older, older]), [id.clone(), a.clone(), b.clone()]);
        let renamed: &[(i16, &str)] = &[(1, "id"), (2, "title"), (3, "b")];
        assert_eq!(present(&[older, renamed]), [id.clone(), pair("title", "a"), b.clone(), a.clone()]);
        let dropped = present(&[older, &[(1, "id"), (3, "b")]]);
        assert_eq!(dropped, [id.clone(), a.clone(), b.clone()], "its name is nobody else's");
        let added = present(&[older, &[(1, "id"), (2, "a"), (3, "b"), (4, "c")]]);
        assert_eq!(added, [id.clone(), a.clone(), b.clone(), pair("c", "")], "rows do not have the new one");
    }

    #[test]
    fn where_a_name_went_to_another_column_older_versions_keep_the_names_of_their_time() {
        let pair = |name: &str, recorded: &str| (name.to_owned(), recorded.to_owned());
        let (id, a, b) = (pair("id", "id"), pair("a", "a"), pair("b", "b"));
        let older: &[(i16, &str)] = &[(1, "id"), (2, "a"), (3, "b")];
        let swapped = present(&[older, &[(1, "id"), (2, "b"), (3, "a")]]);
        assert_eq!(swapped, [id.clone(), a.clone(), b.clone()]);
        let replaced = present(&[older, &[(1, "id"), (3, "b"), (4, "a")]]);
        assert_eq!(replaced, [id.clone(), a.clone(), b.clone()]);
        // The first column was called c for a while, and then another one was.
        let renamed: &[(i16, &str)] = &[(1, "id"), (2, "c"), (3, "b")];
        let taken: &[(i16, &str)] = &[(1, "id"), (2, "a"), (3, "c")];
        let seen = [id.clone(), pair("c", "a"), b.clone(), a.clone()];
        assert_eq!(present(&[older, renamed, taken]), seen);
        assert_eq!(present(&[renamed, taken]), [id, pair("c", "c"), b, pair("a", "c")]);
    }
}
