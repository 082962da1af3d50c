//! What the rows of a table mean, as the catalog has it: by it a change is noticed of which no row event tells (h30).
//!
//! Postgres announces changes of rows, not of what their text means. A label of an enum can be renamed, two columns can
//! swap their names, a type can change without a rewrite. Rows that the log holds then have values, or names of values,
//! that the table does not have any more, and a later old row would be one that the log never had. So a description of
//! each table is kept in the ledger and compared with the catalog: [`Description::breaks`].

use serde::{Deserialize, Serialize};

/// Types whose values have the same text: `text` and `character varying`.
const SAME_TEXT: [u32; 2] = [25, 1043];

/// Everything on which the meaning of a table's rows depends.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Description {
    /// Where its rows are.
    pub storage: Storage,
    /// Its schema (namespace).
    pub schema: String,
    /// Its name; a partition's is its own, not its root's.
    pub table: String,
    /// `pg_class.relpersistence`: `p` permanent, `u` unlogged.
    pub persistence: String,
    /// Tables of which it is a partition or a child, ascending.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parents: Vec<u32>,
    /// Children by inheritance (partitions are none), ascending.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub children: Vec<u32>,
    /// Numbers of the columns of its records' key, in the key's order: the replica identity's, or the primary key's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub key: Vec<i16>,
    /// Its columns, in the order of their numbers.
    pub columns: Vec<ColumnDescription>,
    /// Enums and composite types that its columns are made of, also within domains, arrays and ranges; ascending.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub types: Vec<TypeDescription>,
}

/// One column.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ColumnDescription {
    /// `pg_attribute.attnum`, which a column keeps for its life and no other column of the table ever gets.
    pub number: i16,
    /// Its name.
    pub name: String,
    /// Object id of its type; of a domain the one below.
    #[serde(rename = "type")]
    pub type_oid: u32,
    /// Its type modifier; -1 for none.
    pub modifier: i32,
    /// Object id of its collation; 0 for none.
    pub collation: u32,
    /// Whether it is generated: then the stream lacks it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub generated: bool,
}

/// What the text of a type's values depends on.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct TypeDescription {
    /// Its object id.
    pub oid: u32,
    /// Object ids and texts of an enum's labels, ascending.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<(u32, String)>,
    /// Numbers and types of a composite type's attributes, ascending.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub attributes: Vec<(i16, u32)>,
    /// `xmin` of each label, or of each attribute that the type has or had: what was changed and changed back between two
    /// looks shows there. Empty where an older version wrote it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub versions: Vec<i64>,
}

/// Tells that a table's rows were rewritten, perhaps with other values. Such a rewrite changes both; VACUUM FULL and
/// TRUNCATE change the file alone, SET STATISTICS the columns. (VACUUM FULL after ADD COLUMN ... DEFAULT changes both for
/// nothing.)
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Storage {
    /// Of the file, and of the columns whose default older rows lack.
    pub file: i64,
    /// Of the columns' definitions.
    pub columns: i64,
}

impl Storage {
    /// Whether the rows are others than those that were there `before`.
    pub fn rewritten(self, before: Storage) -> bool {
        self.file != before.file && self.columns != before.columns
    }
}

impl Description {
    /// Why rows that the log got under `before` do not mean any more what they meant; `None` if they still do.
    ///
    /// A column that was added without a default, dropped, or renamed to a name that no other column had leaves every
    /// row as it is. So does a label that an enum gained.
    pub fn breaks(&self, before: &Description) -> Option<String> {
        if self.storage.rewritten(before.storage) {
            return Some("its rows were rewritten".to_owned());
        }
        if self.persistence != before.persistence {
            let was = if before.persistence == "u" { "it was unlogged" } else { "it is unlogged" };
            return Some(was.to_owned());
        }
        if self.key != before.key {
            return Some("its rows have another key".to_owned());
        }
        let columns = before.columns.iter().find_map(|column| self.breaks_column(column));
        columns.or_else(|| before.types.iter().find_map(|before| self.breaks_type(before)))
    }

    /// Says so if the name of the column with this number belongs to another column now.
    pub(crate) fn reassigned(&self, name: &str, number: i16) -> Option<String> {
        let other = self.columns.iter().any(|column| column.name == name && column.number != number);
        other.then(|| another_column(name))
    }

    fn breaks_column(&self, before: &ColumnDescription) -> Option<String> {
        let name = &before.name;
        if let Some(why) = self.reassigned(name, before.number) {
            return Some(why);
        }
        let now = self.columns.iter().find(|column| column.number == before.number)?;
        if before.generated && !now.generated {
            return Some(format!("column {name} is not generated any more"));
        }
        retyped(name, before.type_oid, now.type_oid)
    }

    fn breaks_type(&self, before: &TypeDescription) -> Option<String> {
        let now = self.types.iter().find(|now| now.oid == before.oid)?;
        let version = |known: &TypeDescription, place: usize| known.versions.get(place).copied();
        let renamed = before.labels.iter().enumerate().find(|(place, label)| {
            let same = now.labels.iter().position(|now| now == *label);
            let versions = same.and_then(|same| version(before, *place).zip(version(now, same)));
            same.is_none() || versions.is_some_and(|(before, now)| before != now)
        });
        if let Some((_, (_, label))) = renamed {
            return Some(format!("label {label} of an enum was renamed"));
        }
        let known = before.labels.is_empty() && !before.versions.is_empty();
        let altered = now.attributes != before.attributes || (known && now.versions != before.versions);
        altered.then(|| "a composite type has other attributes".to_owned())
    }
}

/// The reason to begin a table again if a column's new type changes the text of its values.
pub(crate) fn retyped(name: &str, before: u32, now: u32) -> Option<String> {
    let same_text = SAME_TEXT.contains(&now) && SAME_TEXT.contains(&before);
    (now != before && !same_text).then(|| format!("column {name} has another type"))
}

/// The reason to begin a table again if a name belongs to another column now.
pub(crate) fn another_column(name: &str) -> String {
    format!("column {name} is another one than before")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{LedgerEntry, Read, TableProgress};

    fn column(number: i16, name: &str, type_oid: u32) -> ColumnDescription {
        ColumnDescription {
            number,
            name: name.into(),
            type_oid,
            modifier: -1,
            ..ColumnDescription::default()
        }
    }

    fn table() -> Description {
        let mood = TypeDescription {
            oid: 900,
            labels: vec![(901, "sad".into()), (902, "happy".into())],
            versions: vec![7, 7],
            ..TypeDescription::default()
        };
        let attributes = vec![(1, 23), (2, 25)];
        let pair =
            TypeDescription { oid: 910, attributes, versions: vec![7, 7], ..TypeDescription::default() };
        Description {
            schema: "public".into(),
            table: "t".into(),
            persistence: "p".into(),
            key: vec![1],
            columns: vec![column(1, "id", 23), column(2, "a", 25), column(3, "b", 25), column(5, "m", 900)],
            types: vec![mood, pair],
            ..Description::default()
        }
    }

    fn breaks(change: impl FnOnce(&mut Description)) -> Option<String> {
        let mut now = table();
        change(&mut now);
        now.breaks(&table())
    }

    #[test]
    fn h30_what_leaves_every_row_as_it_is() {
        assert_eq!(breaks(|_| {}), None);
        assert_eq!(breaks(|t| t.columns.push(column(6, "c", 23))), None, "a column is added");
        assert_eq!(breaks(|t| drop(t.columns.remove(2))), None, "a column is dropped");
        assert_eq!(breaks(|t| t.columns[1].name = "title".into()), None, "a column is renamed");
        assert_eq!(breaks(|t| t.columns[1].type_oid = 1043), None, "text becomes varchar");
        assert_eq!(breaks(|t| t.columns[1].modifier = 24), None, "a limit is widened");
        assert_eq!(breaks(|t| t.types[0].labels.push((903, "so".into()))), None, "an enum gains a label");
        assert_eq!(breaks(|t| t.storage.file = 7), None, "VACUUM FULL");
        assert_eq!(breaks(|t| t.storage.columns = 7), None, "SET STATISTICS");
    }

    #[test]
    fn h30_what_gives_rows_another_meaning() {
        let why = |change: fn(&mut Description)| breaks(change).unwrap_or_else(|| "nothing".into());
        assert_eq!(why(|t| t.storage = Storage { file: 7, columns: 7 }), "its rows were rewritten");
        let swapped = |t: &mut Description| {
            t.columns[1].name = "b".into();
            t.columns[2].name = "a".into();
        };
        assert_eq!(why(swapped), "column a is another one than before");
        let over_each_other = |t: &mut Description| {
            t.columns.remove(1);
            t.columns[1].name = "a".into();
        };
        assert_eq!(why(over_each_other), "column a is another one than before");
        let again = |t: &mut Description| t.columns[1].number = 6;
        assert_eq!(why(again), "column a is another one than before");
        assert_eq!(why(|t| t.columns[0].type_oid = 26), "column id has another type");
        assert_eq!(why(|t| t.persistence = "u".into()), "it is unlogged");
        assert_eq!(why(|t| t.key = vec![2]), "its rows have another key");
        let renamed = |t: &mut Description| t.types[0].labels[1].1 = "glad".into();
        assert_eq!(why(renamed), "label happy of an enum was renamed");
        let attribute = |t: &mut Description| t.types[1].attributes.push((3, 23));
        assert_eq!(why(attribute), "a composite type has other attributes");
        assert_eq!(
            why(|t| t.types[0].versions[1] = 9),
            "label happy of an enum was renamed",
            "and renamed back"
        );
        assert_eq!(
            why(|t| t.types[1].versions.push(9)),
            "a composite type has other attributes",
            "for a while"
        );
    }

    #[test]
    fn h30_a_generated_column_that_becomes_a_plain_one() {
        let mut before = table();
        before.columns[1].generated = true;
        assert_eq!(table().breaks(&before).as_deref(), Some("column a is not generated any more"));
    }

    #[test]
    fn comes_back_from_the_ledger() {
        let described = TableProgress {
            description: Some(Box::new(table())),
            publication_xmin: 7,
            ..TableProgress::new("public.t".into(), 1, Read::All)
        };
        let entry = LedgerEntry::Table(16384, described);
        assert_eq!(LedgerEntry::decode(entry.key().as_bytes(), &entry.value()), Ok(entry.clone()));
    }
}
