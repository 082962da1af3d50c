//! Reads typed values out of the tree. What a section was asked for is what it may hold: the keys that exist are
//! written in one place, where they are read. Mistakes are collected, so that one run shows all of them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::Display;
use std::rc::Rc;

use change::Refusal;

use super::tree::{self, Node, Origin, Value};

/// Names this unlike a key are not worth suggesting.
const NEAR: f64 = 0.7;

/// The mistakes found so far.
#[derive(Clone, Default)]
pub(crate) struct Mistakes(Rc<RefCell<Vec<Refusal>>>);

impl Mistakes {
    pub(crate) fn add(&self, origin: &Origin, what: impl Display, remedy: impl Into<String>) {
        self.0.borrow_mut().push(Refusal::new(format!("{origin}: {what}"), remedy));
    }

    pub(crate) fn take(&self) -> Vec<Refusal> {
        self.0.take()
    }
}

/// One table of the tree, being read.
pub(crate) struct Section {
    /// Keys from the root, with a dot after each: `postgres.`; empty for the root.
    prefix: String,
    origin: Origin,
    entries: BTreeMap<String, Node>,
    /// Keys that were asked for.
    known: Vec<String>,
    /// Those of them that were there, whatever their values.
    given: Vec<String>,
    mistakes: Mistakes,
}

/// A value, where it was written, and under which key.
pub(crate) struct Found<T> {
    pub(crate) key: String,
    pub(crate) origin: Origin,
    pub(crate) value: T,
}

impl Section {
    pub(crate) fn root(node: Node, mistakes: Mistakes) -> Self {
        Section::new(String::new(), node, mistakes)
    }

    fn new(prefix: String, node: Node, mistakes: Mistakes) -> Self {
        let entries = match node.value {
            Value::Table(entries) => entries,
            other => {
                let key = prefix.trim_end_matches('.');
                mistakes.add(
                    &node.origin,
                    format!("`{key}` is {}, not a table", other.kind()),
                    format!("write it as a section: [{key}]"),
                );
                BTreeMap::new()
            }
        };
        Section { prefix, origin: node.origin, entries, known: Vec::new(), given: Vec::new(), mistakes }
    }

    /// The table at `key`, or an empty one, whose required keys are then found missing.
    pub(crate) fn section(&mut self, key: &str) -> Section {
        let origin = self.origin.clone();
        let empty = || Node { origin, value: Value::Table(BTreeMap::new()) };
        let node = self.take(key).unwrap_or_else(empty);
        Section::new(format!("{}{key}.", self.prefix), node, self.mistakes.clone())
    }

    /// The table at `key`, where there is one.
    pub(crate) fn optional_section(&mut self, key: &str) -> Option<Section> {
        let node = self.take(key)?;
        Some(Section::new(format!("{}{key}.", self.prefix), node, self.mistakes.clone()))
    }

    /// The tables whose names the user chose.
    pub(crate) fn named_sections(&mut self) -> Vec<(String, Section)> {
        let entries = std::mem::take(&mut self.entries);
        let section = |(name, node): (String, Node)| {
            let prefix = format!("{}{name}.", self.prefix);
            (name, Section::new(prefix, node, self.mistakes.clone()))
        };
        entries.into_iter().map(section).collect()
    }

    /// Values whose keys the user chose, as text: numbers and booleans are welcome too.
    pub(crate) fn named_values(&mut self) -> Vec<Found<String>> {
        for node in self.entries.values_mut() {
            match &node.value {
                Value::Integer(number) => node.value = Value::Text(number.to_string()),
                Value::Boolean(yes) => node.value = Value::Text(yes.to_string()),
                _ => {}
            }
        }
        let names: Vec<String> =
            self.entries.keys().map(|key| key.strip_suffix("_file").unwrap_or(key).to_owned()).collect();
        let mut found = Vec::with_capacity(names.len());
        for name in names {
            found.extend(self.string(&name).map(|value| Found { key: name, ..value }));
        }
        found
    }

    /// Values whose keys name tables, each one of `choices`.
    pub(crate) fn choices(&mut self, choices: &[&str]) -> Vec<Found<String>> {
        let names: Vec<String> = self.entries.keys().cloned().collect();
        let mut found = Vec::new();
        for name in names {
            let Some(choice) = self.text(&name) else { continue };
            if choices.contains(&choice.value.as_str()) {
                found.push(Found { key: name, ..choice });
            } else {
                let what = format!("`{}` is \"{}\"", choice.key, choice.value);
                self.mistakes.add(
                    &choice.origin,
                    what,
                    format!("choose one of \"{}\"", choices.join("\", \"")),
                );
            }
        }
        found
    }

    /// The string at `key`, or the content of the file that `key_file` names.
    pub(crate) fn string(&mut self, key: &str) -> Option<Found<String>> {
        let inline = self.text(key);
        let path = self.text(&format!("{key}_file"));
        match (inline, path) {
            (Some(inline), Some(path)) => {
                let what = format!("both `{}` and `{}` are given", inline.key, path.key);
                self.mistakes.add(&path.origin, what, "keep one of them");
                None
            }
            (inline, None) => inline,
            (None, Some(path)) => match std::fs::read_to_string(&path.value) {
                Ok(content) => {
                    let value = content.trim_end_matches(['\r', '\n']).to_owned();
                    Some(Found { key: format!("{}{key}", self.prefix), origin: path.origin, value })
                }
                Err(error) => {
                    let what = format!("`{}` names the file {}: {error}", path.key, path.value);
                    self.mistakes.add(&path.origin, what, "name a file that this user can read");
                    None
                }
            },
        }
    }

    /// As [`Section::string`], and its absence is a mistake.
    pub(crate) fn required(&mut self, key: &str, example: &str) -> Option<Found<String>> {
        let found = self.string(key);
        if found.is_none() {
            self.missing(key, example);
        }
        found
    }

    /// Says that `key` is not there; where it is there and wrong, that has been said.
    pub(crate) fn missing(&self, key: &str, example: &str) {
        if self.given.iter().any(|given| given.strip_suffix("_file").unwrap_or(given) == key) {
            return;
        }
        let path = format!("{}{key}", self.prefix);
        let variable = format!("{}{}", tree::ENV_PREFIX, path.to_uppercase().replace('.', "__"));
        let section = self.prefix.trim_end_matches('.');
        let place = if section.is_empty() { String::new() } else { format!(" under [{section}]") };
        self.mistakes.add(
            &self.origin,
            format!("`{path}` is missing"),
            format!("write `{key} = {example}`{place}, or set {variable}"),
        );
    }

    fn text(&mut self, key: &str) -> Option<Found<String>> {
        let node = self.take(key)?;
        match node.value {
            Value::Text(value) | Value::Untyped(value) => self.found(key, node.origin, value),
            other => self.wrong_type(key, &node.origin, &other, "a string"),
        }
    }

    /// The integer at `key`.
    pub(crate) fn integer(&mut self, key: &str, range: std::ops::RangeInclusive<i64>) -> Option<Found<i64>> {
        let node = self.take(key)?;
        let number = match &node.value {
            Value::Integer(number) => *number,
            Value::Untyped(text) if text.trim().parse::<i64>().is_ok() => text.trim().parse().ok()?,
            other => return self.wrong_type(key, &node.origin, other, "an integer"),
        };
        if range.contains(&number) {
            return self.found(key, node.origin, number);
        }
        let what = format!("`{}{key}` is {number}", self.prefix);
        let remedy = format!("choose a number from {} to {}", range.start(), range.end());
        self.mistakes.add(&node.origin, what, remedy);
        None
    }

    /// The strings at `key`; from the environment as a TOML array or separated by commas.
    pub(crate) fn strings(&mut self, key: &str) -> Option<Found<Vec<Found<String>>>> {
        let node = self.take(key)?;
        let items = match node.value {
            Value::List(items) => items,
            Value::Untyped(text) => self.listed(key, &node.origin, &text)?,
            other => return self.wrong_type(key, &node.origin, &other, "an array of strings"),
        };
        let mut values = Vec::with_capacity(items.len());
        for item in items {
            match item.value {
                Value::Text(value) => values.extend(self.found(key, item.origin, value)),
                other => return self.wrong_type(key, &item.origin, &other, "an array of strings"),
            }
        }
        self.found(key, node.origin, values)
    }

    fn listed(&self, key: &str, origin: &Origin, text: &str) -> Option<Vec<Node>> {
        if !text.trim_start().starts_with('[') {
            let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
            let node = |part: &str| Node { origin: origin.clone(), value: Value::Text(part.to_owned()) };
            return Some(parts.map(node).collect());
        }
        match tree::read_value(origin, text.trim()) {
            Some(Node { value: Value::List(items), .. }) => Some(items),
            _ => {
                let what = format!("`{}{key}` is not an array in TOML's form", self.prefix);
                self.mistakes.add(origin, what, r#"write ["a", "b"], or a,b"#);
                None
            }
        }
    }

    fn take(&mut self, key: &str) -> Option<Node> {
        self.known.push(key.to_owned());
        let (key, node) = self.entries.remove_entry(key)?;
        self.given.push(key);
        Some(node)
    }

    fn found<T>(&self, key: &str, origin: Origin, value: T) -> Option<Found<T>> {
        Some(Found { key: format!("{}{key}", self.prefix), origin, value })
    }

    fn wrong_type<T>(&self, key: &str, origin: &Origin, found: &Value, wanted: &str) -> Option<T> {
        let what = format!("`{}{key}` is {}, not {wanted}", self.prefix, found.kind());
        self.mistakes.add(origin, what, format!("give it {wanted}"));
        None
    }

    /// Refuses what nobody asked for.
    pub(crate) fn finish(self) {
        for (key, node) in &self.entries {
            let (what, unit) = match &node.origin {
                Origin::Variable(_) => (format!("no key `{}{key}`", self.prefix), "variable"),
                _ => (format!("unknown key `{}{key}`", self.prefix), "key"),
            };
            let remedy = match self.nearest(key) {
                Some(near) => format!("did you mean `{}{near}`?", self.prefix),
                None => format!("remove this {unit}; here are possible: {}", self.known_keys()),
            };
            self.mistakes.add(&node.origin, what, remedy);
        }
    }

    fn nearest(&self, key: &str) -> Option<&str> {
        let near = |known: &String| (strsim::jaro_winkler(known, key), known.clone());
        let best = self.known.iter().map(near).max_by(|a, b| a.0.total_cmp(&b.0))?;
        let known = self.known.iter().find(|known| **known == best.1)?;
        (best.0 >= NEAR).then_some(known.as_str())
    }

    fn known_keys(&self) -> String {
        let shown = |key: &&String| !key.ends_with("_file");
        self.known.iter().filter(shown).map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ")
    }
}
