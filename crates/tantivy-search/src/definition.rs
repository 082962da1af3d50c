use std::collections::HashSet;

use change::{Column, Encoding, Refusal, TableSchema};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_128;

/// Raised whenever the same definition gives another index: another layout, other terms.
const FORMAT: u32 = 1;

/// Longest name of an index, bytes.
const MAX_NAME_BYTES: usize = 64;

/// A configured index: which columns of which table, and what each is good for.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct IndexDefinition {
    /// Its name: the directory's, and the one in the routes.
    pub name: String,
    /// The table's schema.
    pub schema: String,
    /// The table.
    pub table: String,
    /// Columns that `q` searches: split into words, case folded.
    pub text: Vec<String>,
    /// Columns that filters compare for equality, as they look in a document.
    pub exact: Vec<String>,
    /// Columns that filters compare and `sort` orders as numbers.
    pub number: Vec<String>,
    /// Columns that filters compare and `sort` orders as points in time.
    pub date: Vec<String>,
}

/// What a column is good for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Role {
    Text,
    Exact,
    Number,
    Date,
}

impl IndexDefinition {
    /// Checks what can be checked without knowing the table.
    pub fn validate(&self) -> Result<(), Refusal> {
        let named = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        if self.name.is_empty() || self.name.len() > MAX_NAME_BYTES || !self.name.chars().all(named) {
            return Err(Refusal::new(
                format!("`{}` is not a name for a search index", self.name),
                format!("use at most {MAX_NAME_BYTES} of a-z, A-Z, 0-9, `_` and `-`"),
            ));
        }
        if self.columns().is_empty() {
            return Err(self.refuse("has no columns", "name at least one under `text`"));
        }
        let mut seen = HashSet::new();
        for (role, column) in self.roles() {
            // A text column may be filtered as well; two ways to filter it would contradict each other.
            if !seen.insert((role == Role::Text, column)) {
                return Err(self.refuse(
                    &format!("names column `{column}` twice"),
                    "leave it in one of `exact`, `number` and `date`, and at most once in `text`",
                ));
            }
        }
        Ok(())
    }

    /// Checks the definition against the table as it is. For `check` and `setup`, which see the source; the sink
    /// is more patient, since the log may begin before a column was added.
    pub fn bind(&self, schema: &TableSchema) -> Result<(), Refusal> {
        self.validate()?;
        if !self.derives_from(schema) {
            return Err(self.refuse(&format!("is not on table {}", schema.full_name()), "correct `table`"));
        }
        Binding::new(self, schema)?;
        match self.columns().into_iter().find(|column| schema.column(column).is_none()) {
            Some(column) => {
                let names: Vec<&str> = schema.columns.iter().map(|column| column.name.as_str()).collect();
                Err(self.refuse(
                    &format!("names column `{column}`, which table {} does not have", schema.full_name()),
                    &format!("its columns are: {}", names.join(", ")),
                ))
            }
            None => Ok(()),
        }
    }

    /// Hash of everything that makes this index another one than that of a different definition.
    pub fn hash(&self) -> String {
        let parts = (FORMAT, &self.schema, &self.table, &self.text, &self.exact, &self.number, &self.date);
        // Strings and numbers always become JSON.
        let canonical = serde_json::to_vec(&parts).unwrap_or_default();
        format!("{:032x}", xxh3_128(&canonical))
    }

    /// Its table as the configuration names it.
    pub(crate) fn table_name(&self) -> String {
        change::table_name(&self.schema, &self.table)
    }

    pub(crate) fn derives_from(&self, schema: &TableSchema) -> bool {
        self.schema == schema.schema && self.table == schema.table
    }

    /// Every column with its role, in the definition's order.
    pub(crate) fn roles(&self) -> impl Iterator<Item = (Role, &str)> {
        let lists = [
            (Role::Text, &self.text),
            (Role::Exact, &self.exact),
            (Role::Number, &self.number),
            (Role::Date, &self.date),
        ];
        lists.into_iter().flat_map(|(role, columns)| columns.iter().map(move |name| (role, name.as_str())))
    }

    /// The columns, each once.
    pub fn columns(&self) -> Vec<&str> {
        let mut columns = Vec::new();
        for (_, name) in self.roles() {
            if !columns.contains(&name) {
                columns.push(name);
            }
        }
        columns
    }

    fn refuse(&self, what: &str, remedy: &str) -> Refusal {
        let (name, table) = (&self.name, self.table_name());
        let remedy = format!("[search.indexes.{name}]: {remedy}");
        Refusal::new(format!("the search index `{name}` of {table} {what}"), remedy)
    }
}

/// One attribute of a document: a column and where its value is found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Attribute {
    pub(crate) name: String,
    /// What the log's rows of this version call it; empty where they do not have it, which reads as NULL.
    pub(crate) recorded: String,
    pub(crate) encoding: Encoding,
    pub(crate) key: bool,
    /// Whether the table has such a column, in this version or by now.
    pub(crate) known: bool,
}

impl Attribute {
    /// Whether this version's rows have it.
    pub(crate) fn present(&self) -> bool {
        !self.recorded.is_empty()
    }
}

impl AsRef<str> for Attribute {
    fn as_ref(&self) -> &str {
        &self.recorded
    }
}

/// A definition as it applies to one version of its table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Binding {
    /// The key's columns in the relation's order, then the configured ones.
    pub(crate) attributes: Vec<Attribute>,
    /// How many of them are the key's.
    pub(crate) key_len: usize,
    /// The definition's columns by role, as places in `attributes`.
    pub(crate) roles: Vec<(Role, usize)>,
}

impl Binding {
    /// Fits the definition to a version of its table. A column that the version does not have is absent, which
    /// reads as NULL.
    pub(crate) fn new(definition: &IndexDefinition, schema: &TableSchema) -> Result<Binding, Refusal> {
        let mut attributes: Vec<Attribute> = schema
            .key_columns()
            .map(|column| Attribute {
                name: column.name.clone(),
                recorded: column.recorded_name().to_owned(),
                encoding: Encoding::of(column.type_oid),
                key: true,
                known: true,
            })
            .collect();
        let key_len = attributes.len();
        if key_len == 0 {
            let table = schema.quoted();
            return Err(definition.refuse(
                "needs a key to tell the documents apart, and the table has none",
                &format!(
                    "give the table one: ALTER TABLE {table} ADD PRIMARY KEY (...), or ALTER TABLE {table} \
                     REPLICA IDENTITY USING INDEX ..."
                ),
            ));
        }
        let names: Vec<&str> = definition.roles().map(|(_, name)| name).collect();
        let used = |column: &&Column| column.key.is_some() || names.contains(&column.name.as_str());
        if let Some(column) = schema.columns.iter().filter(used).find(|column| column.names_an_object()) {
            return Err(definition.refuse(
                &format!(
                    "has `{}` of type {}, the text of which is another one when what it names is renamed",
                    column.name, column.type_name
                ),
                "name a column of type oid, or one of text that is written with the row",
            ));
        }
        let mut roles = Vec::new();
        for (role, name) in definition.roles() {
            let column = schema.column(name).map(|place| &schema.columns[place]);
            if let Some(column) = column {
                role.fits(column.type_oid).map_err(|(kind, types)| {
                    definition.refuse(
                        &format!("has `{name}` under `{kind}`, but its type is {}", column.type_name),
                        &format!("`{kind}` takes {types}; put it under `exact` or `text`"),
                    )
                })?;
            }
            let place = attributes.iter().position(|known| known.name == name).unwrap_or_else(|| {
                attributes.push(Attribute {
                    name: name.to_owned(),
                    recorded: column.map_or_else(String::new, |column| column.recorded_name().to_owned()),
                    encoding: column.map_or(Encoding::Text, |column| Encoding::of(column.type_oid)),
                    key: false,
                    known: column.is_some(),
                });
                attributes.len() - 1
            });
            roles.push((role, place));
        }
        Ok(Binding { attributes, key_len, roles })
    }

    pub(crate) fn key(&self) -> &[Attribute] {
        &self.attributes[..self.key_len]
    }
}

impl Role {
    /// Whether values of a type can play the role; if not, the role's name and the types that can.
    fn fits(self, type_oid: u32) -> Result<(), (&'static str, &'static str)> {
        const NUMERIC: u32 = 1700;
        let encoding = Encoding::of(type_oid);
        match self {
            Role::Number if type_oid == NUMERIC => Ok(()),
            Role::Number if matches!(encoding, Encoding::Integer | Encoding::Float) => Ok(()),
            Role::Number => Err(("number", "integers, floats and numeric")),
            Role::Date
                if matches!(
                    encoding,
                    Encoding::Date | Encoding::Timestamp | Encoding::TimestampTz { .. }
                ) =>
            {
                Ok(())
            }
            Role::Date => Err(("date", "date, timestamp and timestamptz")),
            Role::Text | Role::Exact => Ok(()),
        }
    }
}
