//! The configuration before it has types: one tree of values, from the file and from the environment, in which
//! every value still knows where it was written, so that a mistake can name the line.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::rc::Rc;

use change::Refusal;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// What every variable of the environment that is ours begins with.
pub(crate) const ENV_PREFIX: &str = "MILLRACE_";
/// Variables that the command line reads itself.
const OF_THE_COMMAND_LINE: [&str; 3] = ["MILLRACE_CONFIG", "MILLRACE_LOG_FORMAT", "MILLRACE_LOG_LEVEL"];
/// The one table whose keys have dots (librdkafka's names); an underscore stands for a dot in the environment.
const DOTTED: [&str; 2] = ["kafka", "properties"];

/// Where a value was written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Origin {
    /// In the file, at this line.
    Line(Rc<str>, usize),
    /// In this variable of the environment.
    Variable(String),
    /// Nowhere; this is the file that it could be written to.
    Nowhere(Rc<str>),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Line(file, line) => write!(f, "{file}:{line}"),
            Origin::Variable(name) => write!(f, "environment variable {name}"),
            Origin::Nowhere(file) => f.write_str(file),
        }
    }
}

/// A value and where it was written.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) origin: Origin,
    pub(crate) value: Value,
}

#[derive(Clone, Debug)]
pub(crate) enum Value {
    Text(String),
    Integer(i64),
    Boolean(bool),
    List(Vec<Node>),
    Table(BTreeMap<String, Node>),
    /// From the environment: whoever reads it knows which type it has.
    Untyped(String),
    /// A TOML type that no key of ours has.
    Other(&'static str),
}

impl Value {
    /// The type's name for people.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Value::Text(_) | Value::Untyped(_) => "a string",
            Value::Integer(_) => "an integer",
            Value::Boolean(_) => "a boolean",
            Value::List(_) => "an array",
            Value::Table(_) => "a table",
            Value::Other(kind) => kind,
        }
    }
}

/// Reads the file's text and lays the environment over it: a variable wins over the file.
pub(crate) fn merge(
    path: &Path,
    text: &str,
    environment: impl IntoIterator<Item = (String, String)>,
) -> Result<Node, Refusal> {
    let file: Rc<str> = path.display().to_string().into();
    let mut root = read(&file, text)?;
    for (name, content) in environment {
        let Some(path) = key_path(&name) else { continue };
        insert(&mut root, &name, &path, content)?;
    }
    Ok(root)
}

/// The tree of a TOML text.
pub(crate) fn read(file: &Rc<str>, text: &str) -> Result<Node, Refusal> {
    let lines = Lines { file, text };
    let parsed = DeTable::parse(text).map_err(|error| {
        let place = lines.origin(error.span().unwrap_or_default());
        Refusal::new(
            format!("{place}: not TOML: {}", error.message()),
            "mend the line; the form is described at https://toml.io",
        )
    })?;
    let origin = Origin::Nowhere(file.clone());
    Ok(Node { origin, value: Value::Table(lines.table(parsed.get_ref())) })
}

/// One value in TOML's form, for lists in the environment.
pub(crate) fn read_value(origin: &Origin, text: &str) -> Option<Node> {
    let parsed = DeValue::parse(text).ok()?;
    let nowhere: Rc<str> = "".into();
    let mut node = Lines { file: &nowhere, text }.node(&parsed);
    node.origin = origin.clone();
    if let Value::List(items) = &mut node.value {
        items.iter_mut().for_each(|item| item.origin = origin.clone());
    }
    Some(node)
}

struct Lines<'a> {
    file: &'a Rc<str>,
    text: &'a str,
}

impl Lines<'_> {
    fn origin(&self, span: Range<usize>) -> Origin {
        let before = &self.text.as_bytes()[..span.start.min(self.text.len())];
        Origin::Line(self.file.clone(), 1 + before.iter().filter(|b| **b == b'\n').count())
    }

    fn table(&self, table: &DeTable<'_>) -> BTreeMap<String, Node> {
        let entry = |(key, value): (&Spanned<_>, &Spanned<DeValue<'_>>)| {
            let name: &std::borrow::Cow<'_, str> = key.get_ref();
            // The key's line, not the value's: a table's value may start elsewhere.
            (name.to_string(), Node { origin: self.origin(key.span()), ..self.node(value) })
        };
        table.iter().map(entry).collect()
    }

    fn node(&self, value: &Spanned<DeValue<'_>>) -> Node {
        let typed = match value.get_ref() {
            DeValue::String(text) => Value::Text(text.to_string()),
            DeValue::Integer(number) => match i64::from_str_radix(number.as_str(), number.radix()) {
                Ok(number) => Value::Integer(number),
                Err(_) => Value::Other("an integer beyond 64 bits"),
            },
            DeValue::Boolean(yes) => Value::Boolean(*yes),
            DeValue::Float(_) => Value::Other("a floating-point number"),
            DeValue::Datetime(_) => Value::Other("a date or time"),
            DeValue::Array(items) => Value::List(items.iter().map(|item| self.node(item)).collect()),
            DeValue::Table(table) => Value::Table(self.table(table)),
        };
        Node { origin: self.origin(value.span()), value: typed }
    }
}

/// The keys that a variable stands for; `None` when it is not ours.
fn key_path(name: &str) -> Option<Vec<String>> {
    let rest = name.strip_prefix(ENV_PREFIX)?;
    if OF_THE_COMMAND_LINE.contains(&name) || of_a_kubernetes_service(rest) {
        return None;
    }
    let mut path: Vec<String> = rest.split("__").map(str::to_lowercase).collect();
    if path.len() == 3 && path[..2] == DOTTED {
        let (base, file) = match path[2].strip_suffix("_file") {
            Some(base) => (base, "_file"),
            None => (path[2].as_str(), ""),
        };
        path[2] = format!("{}{file}", base.replace('_', "."));
    }
    Some(path)
}

/// Kubernetes gives every pod `NAME_SERVICE_HOST`, `NAME_PORT_9201_TCP`... for each service; one may be called
/// `millrace`. No key of ours looks like that.
fn of_a_kubernetes_service(rest: &str) -> bool {
    let rest = format!("_{rest}");
    rest.ends_with("_SERVICE_HOST")
        || rest.contains("_SERVICE_PORT")
        || rest.ends_with("_PORT")
        || rest.split_once("_PORT_").is_some_and(|(_, port)| port.starts_with(|c: char| c.is_ascii_digit()))
}

/// Writes a variable's content at `path` below `here`.
fn insert(here: &mut Node, name: &str, path: &[String], content: String) -> Result<(), Refusal> {
    let origin = Origin::Variable(name.to_owned());
    let Value::Table(table) = &mut here.value else {
        let what = format!(
            "{origin}: no key `{}` can stand here: {} has a value, not a table",
            path.join("."),
            here.origin
        );
        return Err(Refusal::new(what, format!("unset {name}")));
    };
    match path {
        [] => {}
        [last] => {
            // The other spelling in the file gives way as well: a variable wins.
            let other = last.strip_suffix("_file").map_or_else(|| format!("{last}_file"), str::to_owned);
            if table.get(&other).is_some_and(|node| matches!(node.origin, Origin::Line(..))) {
                table.remove(&other);
            }
            table.insert(last.clone(), Node { origin, value: Value::Untyped(content) });
        }
        [first, rest @ ..] => {
            let empty = || Node { origin, value: Value::Table(BTreeMap::new()) };
            insert(table.entry(first.clone()).or_insert_with(empty), name, rest, content)?;
        }
    }
    Ok(())
}
