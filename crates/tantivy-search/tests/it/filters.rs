//! Filters against an evaluator of their own over the rows: it knows integers and text, and nothing of Tantivy.

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use serde_json::json;
use tantivy_search::IndexDefinition;

use crate::bench::{Bench, INT8, NUMERIC, Server, TEXT, TIMESTAMPTZ, table};

/// A row: values as integers, so that comparing them needs no parser. Hundredths for `price`, hours for `at`.
#[derive(Clone, Debug)]
struct Row {
    folder: Option<&'static str>,
    big: Option<i64>,
    price: Option<i64>,
    at: Option<i64>,
}

const FOLDERS: [&str; 5] = ["inbox", "Inbox", "", "it's", "a \"b\" \\ c"];
const BIG: [i64; 7] = [i64::MIN, -1, 0, 1, 9_007_199_254_740_992, 9_007_199_254_740_993, i64::MAX];

fn price(hundredths: i64) -> String {
    let sign = if hundredths < 0 { "-" } else { "" };
    format!("{sign}{}.{:02}", hundredths.abs() / 100, hundredths.abs() % 100)
}

fn hour(hours: i64, separator: char, zone: &str) -> String {
    // Within one month: no calendar needed.
    format!("2025-01-{:02}{separator}{:02}:00:00{zone}", 1 + hours / 24, hours % 24)
}

#[derive(Clone, Debug)]
enum Condition {
    Folder(Vec<&'static str>),
    Big(&'static str, i64),
    Price(&'static str, i64),
    At(&'static str, i64),
    Between(i64, i64),
    Null(&'static str),
    Not(Box<Condition>),
    And(Vec<Condition>),
    Or(Vec<Condition>),
}

fn compare(value: Option<i64>, sign: &str, with: i64) -> bool {
    // As in Meilisearch, NULL is different from everything and in no range.
    match (value, sign) {
        (value, "!=") => value != Some(with),
        (None, _) => false,
        (Some(value), "=") => value == with,
        (Some(value), "<") => value < with,
        (Some(value), "<=") => value <= with,
        (Some(value), ">") => value > with,
        (Some(value), _) => value >= with,
    }
}

impl Condition {
    fn holds(&self, row: &Row) -> bool {
        match self {
            Condition::Folder(folders) => row.folder.is_some_and(|folder| folders.contains(&folder)),
            Condition::Big(sign, with) => compare(row.big, sign, *with),
            Condition::Price(sign, with) => compare(row.price, sign, *with),
            Condition::At(sign, with) => compare(row.at, sign, *with),
            Condition::Between(low, high) => row.price.is_some_and(|price| (*low..=*high).contains(&price)),
            Condition::Null("folder") => row.folder.is_none(),
            Condition::Null("big") => row.big.is_none(),
            Condition::Null(_) => row.price.is_none(),
            Condition::Not(inner) => !inner.holds(row),
            Condition::And(parts) => parts.iter().all(|part| part.holds(row)),
            Condition::Or(parts) => parts.iter().any(|part| part.holds(row)),
        }
    }

    fn text(&self) -> String {
        let quoted = |text: &str| format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"));
        let join = |parts: &[Condition], with: &str| {
            let parts: Vec<String> = parts.iter().map(|part| format!("({})", part.text())).collect();
            parts.join(with)
        };
        match self {
            Condition::Folder(folders) if folders.len() == 1 => format!("folder = {}", quoted(folders[0])),
            Condition::Folder(folders) => {
                let folders: Vec<String> = folders.iter().map(|folder| quoted(folder)).collect();
                format!("folder IN [{}]", folders.join(", "))
            }
            Condition::Big(sign, with) => format!("big {sign} {with}"),
            Condition::Price(sign, with) => format!("price {sign} {}", price(*with)),
            Condition::At(sign, with) => format!("at {sign} {}", hour(*with, 'T', "Z")),
            Condition::Between(low, high) => format!("price {} TO {}", price(*low), price(*high)),
            Condition::Null(attribute) => format!("{attribute} IS NULL"),
            Condition::Not(inner) => format!("NOT ({})", inner.text()),
            Condition::And(parts) => join(parts, " AND "),
            Condition::Or(parts) => join(parts, " OR "),
        }
    }
}

fn conditions() -> impl Strategy<Value = Condition> {
    let sign = || proptest::sample::select(vec!["=", "!=", "<", "<=", ">", ">="]);
    let leaf = prop_oneof![
        proptest::sample::subsequence(FOLDERS.to_vec(), 0..=3).prop_map(Condition::Folder),
        (sign(), proptest::sample::select(BIG.to_vec())).prop_map(|(sign, with)| Condition::Big(sign, with)),
        (sign(), -300i64..300).prop_map(|(sign, with)| Condition::Price(sign, with)),
        (sign(), 0i64..100).prop_map(|(sign, with)| Condition::At(sign, with)),
        (-300i64..300, -300i64..300).prop_map(|(low, high)| Condition::Between(low, high)),
        proptest::sample::select(vec!["folder", "big", "price"]).prop_map(Condition::Null),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        prop_oneof![
            inner.clone().prop_map(|inner| Condition::Not(Box::new(inner))),
            proptest::collection::vec(inner.clone(), 1..4).prop_map(Condition::And),
            proptest::collection::vec(inner, 1..4).prop_map(Condition::Or),
        ]
    })
}

fn rows() -> impl Strategy<Value = Vec<Row>> {
    let row = (
        proptest::option::of(proptest::sample::select(FOLDERS.to_vec())),
        proptest::option::of(proptest::sample::select(BIG.to_vec())),
        proptest::option::weighted(0.8, -300i64..300),
        proptest::option::weighted(0.8, 0i64..100),
    );
    proptest::collection::vec(row.prop_map(|(folder, big, price, at)| Row { folder, big, price, at }), 60)
}

#[test]
fn filters_select_what_they_say() {
    let mut runner = TestRunner::deterministic();
    for _ in 0..3 {
        let rows = rows().new_tree(&mut runner).unwrap().current();
        let directory = tempfile::tempdir().unwrap();
        let schema =
            table(&[("id!", INT8), ("folder", TEXT), ("big", INT8), ("price", NUMERIC), ("at", TIMESTAMPTZ)]);
        let definition = IndexDefinition {
            name: "emails".into(),
            schema: "public".into(),
            table: "emails".into(),
            text: Vec::new(),
            exact: vec!["folder".into()],
            number: vec!["big".into(), "price".into()],
            date: vec!["at".into()],
        };
        let mut bench = Bench::of(directory.path(), definition, schema);
        for (id, row) in rows.iter().enumerate() {
            let text = |value: Option<String>| value.unwrap_or_else(|| "~".to_owned());
            let values = [
                id.to_string(),
                text(row.folder.map(str::to_owned)),
                text(row.big.map(|big| big.to_string())),
                text(row.price.map(price)),
                text(row.at.map(|at| hour(at, ' ', "+00"))),
            ];
            bench.insert(&values.each_ref().map(String::as_str));
            // Several segments.
            if id % 20 == 19 {
                bench.commit();
            }
        }
        let server = Server::start(&bench.indexes);
        for _ in 0..150 {
            let condition = conditions().new_tree(&mut runner).unwrap().current();
            let filter = condition.text();
            let mut found = server.hits(json!({"filter": filter, "limit": 100}));
            found.sort_unstable();
            let expected: Vec<i64> =
                (0i64..).zip(&rows).filter(|(_, row)| condition.holds(row)).map(|(id, _)| id).collect();
            assert_eq!(found, expected, "{filter}");
        }
    }
}

#[test]
fn what_the_property_does_not_reach() {
    let directory = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(directory.path());
    bench.insert(&["1", "", "a", "b", "t", "NaN", "infinity"]);
    bench.insert(&["2", &"long".repeat(2_000), "a", "b", "f", "1e20", "0044-03-15 00:00:00+00 BC"]);
    bench.insert(&["3", "~", "a", "b", "~", "100000000000000000000.5", "9999-12-31 23:59:59.999999+00"]);
    bench.commit();
    let server = Server::start(&bench.indexes);
    let found = |filter: &str| server.hits(json!({"filter": filter}));
    assert_eq!(found("folder IS EMPTY"), [1]);
    assert_eq!(found("folder IS NOT EMPTY"), [2, 3]);
    assert_eq!(found("folder EXISTS"), [1, 2, 3]);
    assert_eq!(found("folder NOT EXISTS"), [0i64; 0]);
    assert_eq!(found("folder IS NOT NULL"), [1, 2]);
    assert_eq!(found(&format!("folder = {}", "long".repeat(2_000))), [2]);
    assert_eq!(found(&format!("folder = {}", "long".repeat(2_001))), [0i64; 0]);
    assert_eq!(found("is_read = true"), [1]);
    assert_eq!(found("is_read != true"), [2, 3]);
    assert_eq!(found("size > 100000000000000000000"), [1, 3]);
    assert_eq!(found("size = 1e20"), [2]);
    assert_eq!(found("size = NaN"), [1]);
    assert_eq!(found("sent_at < '0001-01-01'"), [2]);
    assert_eq!(found("sent_at = infinity"), [1]);
    assert_eq!(found("sent_at > 9999-12-31 AND sent_at < infinity"), [3]);
    assert_eq!(found("sent_at > 0"), [1, 3]);
    assert_eq!(server.hits(json!({"filter": ["is_read = true", ["size = NaN", "size = 1"]]})), [1]);
    assert_eq!(server.hits(json!({"filter": []})), [1, 2, 3]);
    assert_eq!(server.hits(json!({"q": "a", "filter": "size = 1e20"})), [2]);
}

const VOCABULARY: [&str; 5] = ["ant", "bee", "cat", "dog", "elk"];

/// A query: words, phrases and excluded phrases.
#[derive(Clone, Debug)]
struct Query {
    words: Vec<&'static str>,
    phrases: Vec<Vec<&'static str>>,
    excluded: Vec<Vec<&'static str>>,
    all: bool,
}

impl Query {
    fn selects(&self, columns: [&[&str]; 2]) -> bool {
        let has = |phrase: &[&str]| {
            columns.iter().any(|column| column.windows(phrase.len()).any(|window| window == phrase))
        };
        let word = |word: &&'static str| has(&[*word]);
        let words = if self.all || self.words.is_empty() {
            self.words.iter().all(word)
        } else {
            self.words.iter().any(word)
        };
        words
            && self.phrases.iter().all(|phrase| has(phrase))
            && !self.excluded.iter().any(|phrase| has(phrase))
    }

    fn text(&self) -> String {
        let quoted = |sign: &str, phrases: &[Vec<&str>]| {
            phrases
                .iter()
                .map(|phrase| format!("{sign}\"{}\"", phrase.join(" ")))
                .collect::<Vec<_>>()
                .join(" ")
        };
        format!("{} {} {}", self.words.join(" "), quoted("", &self.phrases), quoted("-", &self.excluded))
    }
}

fn words(length: std::ops::Range<usize>) -> impl Strategy<Value = Vec<&'static str>> {
    proptest::collection::vec(proptest::sample::select(VOCABULARY.to_vec()), length)
}

fn queries() -> impl Strategy<Value = Query> {
    let phrases = || proptest::collection::vec(words(1..4), 0..3);
    (words(0..4), phrases(), phrases(), any::<bool>()).prop_map(|(words, phrases, excluded, all)| Query {
        words,
        phrases,
        excluded,
        all,
    })
}

#[test]
fn words_select_what_they_say_also_under_a_filter() {
    let mut runner = TestRunner::deterministic();
    let directory = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(directory.path());
    let mails = proptest::collection::vec((words(0..4), words(0..9), 0i64..5), 150);
    let mails = mails.new_tree(&mut runner).unwrap().current();
    for (id, (subject, body, size)) in mails.iter().enumerate() {
        let (id, size) = (id.to_string(), size.to_string());
        bench.insert(&[&id, "f", &subject.join(" "), &body.join(", "), "f", &size, "~"]);
        if id.ends_with("49") {
            bench.commit();
        }
    }
    let server = Server::start(&bench.indexes);
    for round in 0i64..200 {
        let query = queries().new_tree(&mut runner).unwrap().current();
        let strategy = if query.all { "all" } else { "last" };
        let least = round % 4;
        let body = json!({
            "q": query.text(), "matchingStrategy": strategy, "filter": format!("NOT size < {least}"), "limit": 150,
        });
        let mut found = server.hits(body.clone());
        found.sort_unstable();
        let expected: Vec<i64> = (0i64..)
            .zip(&mails)
            .filter(|(_, (subject, body, size))| query.selects([subject, body]) && *size >= least)
            .map(|(id, _)| id)
            .collect();
        assert_eq!(found, expected, "{body}");
    }
}
