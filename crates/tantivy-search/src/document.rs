//! From a change in the log to a document: its id, its JSON, and the terms it is found by.

use std::borrow::Cow;

use change::{Encoding, Field};
use tantivy::TantivyDocument;
use worker::Change;
use xxhash_rust::xxh3::xxh3_128;

use crate::definition::{Attribute, Binding, Role};
use crate::index::Layout;
use crate::order;

/// Longest id, bytes: Tantivy silently drops longer terms, and then an upsert would not replace.
const MAX_ID_BYTES: usize = tantivy::tokenizer::MAX_TOKEN_LEN;
/// An exact value longer than this is indexed by its beginning and a hash of the whole.
const MAX_EXACT_BYTES: usize = 1_024;

/// What a document's member takes beside a text, about.
const MEMBER_BYTES: usize = 32;

/// A document of which some values may be known only from the row's earlier document.
pub(crate) struct Draft<'a> {
    pub(crate) id: String,
    /// By place in the binding's attributes.
    values: Vec<Field<'a>>,
    /// Places whose value the log does not hold.
    pub(crate) holes: Vec<usize>,
}

/// The id of the row that a record's key names.
pub(crate) fn id_of(key: &[u8], columns: &[Attribute]) -> Result<String, String> {
    id_of_values(&key_values(key, columns)?, columns)
}

fn id_of_values(values: &[Field<'_>], columns: &[Attribute]) -> Result<String, String> {
    let mut id = String::new();
    for (place, (value, column)) in values.iter().zip(columns).enumerate() {
        change::key::append(&mut id, place, value.postgres_text(column.encoding).as_deref());
    }
    if id.len() > MAX_ID_BYTES {
        return Err(format!("its key is {} bytes long; a document's id may have {MAX_ID_BYTES}", id.len()));
    }
    Ok(id)
}

fn key_values<'a>(key: &'a [u8], columns: &[Attribute]) -> Result<Vec<Field<'a>>, String> {
    let mut values = Vec::new();
    change::key_fields(key, columns, &mut values)
        .map_err(|error| format!("its key cannot be read: {error}"))?;
    match values.iter().position(|value| *value == Field::Missing) {
        Some(place) => Err(format!("its key has no `{}`", columns[place].name)),
        None => Ok(values),
    }
}

impl<'a> Draft<'a> {
    /// Reads a change that leaves a row behind. A column that was left out of the log reads as NULL.
    pub(crate) fn read(change: &Change<'a>, binding: &Binding) -> Result<Draft<'a>, String> {
        let after = change.event.after.ok_or("it has no `after`")?;
        // The key comes from the record's key: in `after` a TOASTed key may be a placeholder.
        let mut values = key_values(change.key, binding.key())?;
        let id = id_of_values(&values, binding.key())?;
        let row = &binding.attributes[binding.key_len..];
        let mut fields = Vec::new();
        change::fields(after, row, &mut fields).map_err(|error| error.to_string())?;
        let names = |header| change::column_names(header).map_err(|error| error.to_string());
        let (unchanged, omitted) = (names(change.unchanged)?, names(change.omitted)?);
        let mut holes = Vec::new();
        for (attribute, field) in row.iter().zip(fields) {
            if unchanged.contains(&attribute.recorded) {
                holes.push(values.len());
            }
            values.push(match field {
                _ if omitted.contains(&attribute.recorded) => Field::Null,
                Field::Missing if attribute.present() => {
                    return Err(format!("its row has no column `{}`", attribute.recorded));
                }
                Field::Missing => Field::Null,
                field => field,
            });
        }
        Ok(Draft { id, values, holes })
    }

    /// Takes the values of the holes from the row's earlier document. An error names what is not there.
    pub(crate) fn fill(&mut self, binding: &Binding, earlier: &'a str) -> Result<(), String> {
        let names: Vec<&str> =
            self.holes.iter().map(|place| binding.attributes[*place].name.as_str()).collect();
        let mut found = Vec::new();
        change::fields(earlier, &names, &mut found).map_err(|error| error.to_string())?;
        for ((place, value), name) in self.holes.iter().zip(found).zip(names) {
            if value == Field::Missing {
                return Err(format!("its earlier document has no `{name}`"));
            }
            self.values[*place] = value;
        }
        self.holes.clear();
        Ok(())
    }

    /// The row, for a message.
    pub(crate) fn row(&self) -> String {
        format!("row `{}`", self.id)
    }

    /// The document as JSON: every attribute, each value as the log has it.
    pub(crate) fn json(&self, binding: &Binding) -> String {
        let long = |value: &Field<'_>| match value {
            Field::Text(text) => text.len(),
            Field::Bare(_) | Field::Null | Field::Missing => 0,
        };
        let size: usize = self.values.iter().map(|value| long(value) + MEMBER_BYTES).sum();
        let mut json = String::with_capacity(size);
        json.push('{');
        for (attribute, value) in binding.attributes.iter().zip(&self.values) {
            if json.len() > 1 {
                json.push(',');
            }
            push_string(&mut json, &attribute.name);
            json.push(':');
            push_value(&mut json, value);
        }
        json.push('}');
        json
    }

    /// What Tantivy is given.
    pub(crate) fn terms(
        &self,
        binding: &Binding,
        layout: &Layout,
        json: &str,
    ) -> Result<TantivyDocument, String> {
        let mut document = TantivyDocument::with_capacity(2 * json.len());
        document.add_text(layout.id, &self.id);
        document.add_text(layout.json, json);
        for ((role, place), field) in binding.roles.iter().zip(&layout.fields) {
            let Attribute { name, encoding, .. } = &binding.attributes[*place];
            let value = &self.values[*place];
            let Some(shown) = shown(value) else { continue };
            match role {
                Role::Text => document.add_text(*field, shown),
                Role::Exact => document.add_text(*field, exact_term(shown)),
                Role::Number | Role::Date => {
                    document.add_text(
                        *field,
                        ordered(*role, value, *encoding).ok_or_else(|| {
                            format!("column `{name}` holds `{shown}`, which cannot be put in order")
                        })?,
                    );
                }
            }
        }
        Ok(document)
    }
}

fn ordered(role: Role, value: &Field<'_>, encoding: Encoding) -> Option<String> {
    let text = value.postgres_text(encoding)?;
    if role == Role::Number { order::number_key(&text) } else { order::instant_key(&text) }
}

/// A value as it is searched for: as the document shows it, a whole number without a fraction. `None` for NULL.
pub(crate) fn shown<'v>(value: &'v Field<'_>) -> Option<&'v str> {
    match value {
        Field::Missing | Field::Null => None,
        Field::Bare(token) => Some(token.strip_suffix(".0").unwrap_or(token)),
        Field::Text(text) => Some(text),
    }
}

/// The term that stands for an exact value.
pub(crate) fn exact_term(value: &str) -> Cow<'_, str> {
    if value.len() <= MAX_EXACT_BYTES {
        return Cow::Borrowed(value);
    }
    let cut = (0..=MAX_EXACT_BYTES).rev().find(|at| value.is_char_boundary(*at)).unwrap_or(0);
    let head = &value[..cut];
    // Longer than the term of any short value, and Postgres' text never holds a NUL: the two never meet.
    Cow::Owned(format!("{head}\u{0}{:032x}", xxh3_128(value.as_bytes())))
}

/// Appends a value as JSON.
pub(crate) fn push_value(json: &mut String, value: &Field<'_>) {
    match value {
        Field::Missing | Field::Null => json.push_str("null"),
        Field::Bare(token) => json.push_str(token),
        Field::Text(text) => push_string(json, text),
    }
}

/// Appends a JSON string.
pub(crate) fn push_string(json: &mut String, text: &str) {
    if text.bytes().any(|byte| byte < b' ' || byte == b'"' || byte == b'\\') {
        // A string always becomes JSON.
        return json.push_str(&serde_json::to_string(text).unwrap_or_default());
    }
    json.push('"');
    json.push_str(text);
    json.push('"');
}
