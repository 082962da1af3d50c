//! The contract of `worker::Sink`: what a commit shows, what a crash leaves, what is refused.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use change::{Op, TableSchema};
use serde_json::{Value, json};
use tantivy_search::{IndexDefinition, Indexes, Options, SearchSink};
use worker::{Checkpoint, Move, Sink, SinkError, Stored};

use crate::bench::{Bench, FLOAT8, INT8, RECORD_MAX, Server, TEXT, definition, emails, row, start_of, table};

const MAIL: [&str; 7] = ["1", "inbox", "Hello", "a body", "f", "12.50", "2025-01-19 12:34:56+00"];

fn document(server: &Server, id: &str) -> Option<Value> {
    match server.get(&format!("/indexes/emails/documents/{id}")) {
        (200, document) => Some(document),
        (404, error) => {
            assert_eq!(error["code"], "document_not_found");
            None
        }
        other => panic!("{other:?}"),
    }
}

fn total(server: &Server) -> u64 {
    server.get("/indexes/emails/documents").1["total"].as_u64().unwrap()
}

fn with(values: &[(usize, &'static str)]) -> Vec<&'static str> {
    let mut mail = MAIL.to_vec();
    for (place, value) in values {
        mail[*place] = value;
    }
    mail
}

#[test]
fn a_commit_shows_documents_in_the_logs_form() {
    let directory = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(directory.path());
    let server = Server::start(&bench.indexes);
    bench.insert(&MAIL);
    bench.insert(&["2", "~", "~", "\"q\" \\ é", "~", "~", "~"]);
    assert_eq!(server.get("/indexes/emails/documents/1").0, 503);
    bench.commit();
    let expected = json!({
        "id": 1, "subject": "Hello", "body": "a body", "folder": "inbox", "is_read": false, "size": "12.50",
        "sent_at": "2025-01-19T12:34:56.000000Z",
    });
    assert_eq!(document(&server, "1"), Some(expected));
    let nulls = json!({
        "id": 2, "subject": null, "body": "\"q\" \\ é", "folder": null, "is_read": null, "size": null,
        "sent_at": null,
    });
    assert_eq!(document(&server, "2"), Some(nulls));
    bench.update(&with(&[(1, "done")]));
    bench.delete(&["2", "~", "~", "~", "~", "~", "~"]);
    bench.commit();
    assert_eq!(document(&server, "1").unwrap()["folder"], "done");
    assert_eq!((document(&server, "2"), total(&server)), (None, 1));
}

#[test]
fn without_a_commit_nothing_happened() {
    let directory = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(directory.path());
    bench.insert(&MAIL);
    bench.commit();
    let committed = bench.at.clone();
    bench.update(&with(&[(1, "lost")]));
    bench.insert(&["2", "x", "x", "x", "t", "1", "infinity"]);
    bench.truncate();
    drop(bench);

    let mut bench = Bench::new(directory.path());
    assert_eq!(bench.at, committed);
    let server = Server::start(&bench.indexes);
    assert_eq!((document(&server, "1").unwrap()["folder"].as_str(), total(&server)), (Some("inbox"), 1));

    // Discarded in the same process, as after an error.
    bench.insert(&["2", "x", "x", "x", "t", "1", "infinity"]);
    bench.sink.discard();
    assert_eq!(bench.load(), Stored::At(committed));
    bench.insert(&["3", "x", "x", "x", "t", "1", "-infinity"]);
    bench.commit();
    assert_eq!((document(&server, "2"), total(&server)), (None, 2));
}

#[test]
fn a_checkpoint_moves_in_memory_and_reaches_the_disk_in_time() {
    let directory = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(directory.path());
    let server = Server::start(&bench.indexes);
    let shown =
        |server: &Server| server.get("/indexes/emails").1["checkpoint"]["next_offset"].as_i64().unwrap();
    let on_disk = || {
        let meta = fs::read_to_string(directory.path().join("emails/meta.json")).unwrap();
        let meta: Value = serde_json::from_str(&meta).unwrap();
        let payload: Value = serde_json::from_str(meta["payload"].as_str().unwrap()).unwrap();
        payload["next_offset"].as_i64().unwrap()
    };
    bench.insert(&MAIL);
    bench.commit();
    assert_eq!((shown(&server), on_disk()), (1, 1));
    bench.pass(10);
    bench.commit();
    assert_eq!((shown(&server), on_disk()), (11, 1));
    bench.pass(100_000);
    bench.commit();
    assert_eq!((shown(&server), on_disk()), (100_011, 100_011));
    bench.pass(1);
    assert!(bench.sink.due_in(60_000_000).is_zero());
    bench.commit();
    assert_eq!(on_disk(), 100_012);
    // A restart comes back to what the disk says.
    bench.pass(5);
    bench.commit();
    assert_eq!(bench.load(), Stored::At(Checkpoint { next_offset: 100_012, ..bench.at.clone() }));
}

#[test]
fn a_commit_is_due_by_time_and_by_number() {
    let directory = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(directory.path());
    assert!(bench.sink.due_in(1_000_000).is_zero(), "nothing staged: cheap");
    bench.insert(&MAIL);
    assert!(bench.sink.due_in(1_000_000).is_zero(), "the first after a pause is shown at once");
    bench.commit();
    bench.insert(&MAIL);
    assert!(!bench.sink.due_in(1_000_001).is_zero(), "the next waits");
    assert!(bench.sink.due_in(2_000_001).is_zero(), "at most the interval");
    assert!(bench.sink.due_in(500_000).is_zero(), "a clock set back does not stop commits");
    assert!(!bench.sink.full());
}

#[test]
fn a_commit_from_elsewhere_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(directory.path());
    bench.insert(&MAIL);
    let from = Checkpoint { next_offset: 77, ..bench.at.clone() };
    let error = bench.sink.commit(&[Some(Move { from: from.clone(), to: from })]).unwrap_err();
    assert!(matches!(error, SinkError::Moved(_)), "{error}");
}

#[test]
fn truncate_removes_what_came_before_it_and_nothing_after() {
    let directory = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(directory.path());
    let server = Server::start(&bench.indexes);
    bench.insert(&MAIL);
    bench.insert(&with(&[(0, "2")]));
    bench.commit();
    bench.insert(&with(&[(0, "3")]));
    bench.truncate();
    bench.insert(&with(&[(0, "4")]));
    bench.insert(&with(&[(0, "2"), (1, "again")]));
    bench.commit();
    assert_eq!(total(&server), 2);
    assert!(document(&server, "1").is_none() && document(&server, "3").is_none());
    assert_eq!(document(&server, "2").unwrap()["folder"], "again");
    bench.truncate();
    bench.commit();
    assert_eq!(total(&server), 0);
    // After a truncate the committed document is no source for a hole.
    bench.insert(&MAIL);
    bench.commit();
    bench.truncate();
    let hole = bench.send(Op::Update, None, Some(&row(&with(&[(3, "?")]))), None);
    assert!(matches!(hole, Err(SinkError::Poison(_))), "{hole:?}");
}

#[test]
fn h44_an_unchanged_value_comes_from_the_pending_document_then_from_the_stored_one() {
    let directory = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(directory.path());
    let server = Server::start(&bench.indexes);
    let body = |id| document(&server, id).unwrap()["body"].as_str().unwrap().to_owned();
    bench.insert(&with(&[(3, "first")]));
    bench.commit();
    bench.update(&with(&[(1, "moved"), (3, "?")]));
    bench.commit();
    assert_eq!(body("1"), "first");
    bench.update(&with(&[(3, "second")]));
    bench.update(&with(&[(1, "again"), (3, "?")]));
    bench.commit();
    assert_eq!(body("1"), "second");
    // A value that is literally the placeholder is no hole, and NULL is a value.
    bench.update(&with(&[(3, change::UNAVAILABLE)]));
    bench.update(&with(&[(2, "x"), (3, "?")]));
    bench.insert(&with(&[(0, "2"), (3, "~")]));
    bench.update(&with(&[(0, "2"), (3, "?")]));
    bench.commit();
    assert_eq!(body("1"), change::UNAVAILABLE);
    assert_eq!(document(&server, "2").unwrap()["body"], Value::Null);
    assert_eq!(server.hits(json!({"q": "body", "filter": "folder = again"})), [0i64; 0]);
}

#[test]
fn h44_an_unchanged_value_that_is_nowhere_stops_the_worker_with_the_remedy() {
    let directory = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(directory.path());
    bench.insert(&MAIL);
    bench.commit();
    bench.delete(&["1", "~", "~", "~", "~", "~", "~"]);
    for id in ["1", "9"] {
        let mail = row(&[id, "f", "s", "?", "f", "1", "~"]);
        let error = bench.send(Op::Update, None, Some(&mail), None).unwrap_err();
        let SinkError::Poison(reason) = error else { panic!("{error}") };
        assert!(
            reason.contains("REPLICA IDENTITY FULL") && reason.contains(&format!("row `{id}`")),
            "{reason}"
        );
    }
}

#[test]
fn a_row_of_which_a_column_was_left_out_is_refused_and_when_skipped_keeps_no_older_value() {
    let directory = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(directory.path());
    let server = Server::start(&bench.indexes);
    let huge: &'static str = Box::leak("word ".repeat(RECORD_MAX / 5).into_boxed_str());
    bench.insert(&with(&[(3, "small")]));
    bench.commit();
    let update = row(&with(&[(1, "moved"), (3, huge)]));
    let Err(SinkError::Refused(refusal)) = bench.send(Op::Update, None, Some(&update), None) else {
        panic!("it was taken in")
    };
    assert!(refusal.what.contains("`body` of the row 1"), "{refusal}");
    assert!(refusal.remedy.contains("millrace skip search.emails --key '1'"), "{refusal}");
    bench.skips = true;
    bench.send(Op::Update, None, Some(&update), None).unwrap();
    bench.commit();
    let found = |id| document(&server, id).unwrap();
    assert_eq!((&found("1")["folder"], &found("1")["body"]), (&json!("moved"), &Value::Null));
    // What is not in the log stays out until the log has it.
    bench.update(&with(&[(1, "again"), (3, "?")]));
    bench.commit();
    assert_eq!((&found("1")["folder"], &found("1")["body"]), (&json!("again"), &Value::Null));
    bench.update(&with(&[(3, "small again")]));
    bench.commit();
    assert_eq!(found("1")["body"], json!("small again"));
    // A row that goes needs none of its columns.
    bench.skips = false;
    bench.delete(&with(&[(3, huge)]));
    bench.commit();
    assert_eq!(document(&server, "1"), None);
}

#[test]
fn h32_a_changed_key_takes_the_unchanged_value_with_it() {
    let directory = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(directory.path());
    let server = Server::start(&bench.indexes);
    let key = |id: &'static str| with(&[(0, id), (1, "~"), (2, "~"), (3, "~"), (4, "~"), (5, "~"), (6, "~")]);
    let moved = |id: &'static str| with(&[(0, id), (3, "?")]);
    bench.insert(&with(&[(3, "of one")]));
    bench.insert(&with(&[(0, "2"), (3, "of two")]));
    bench.commit();
    // From the stored document, on to a third key, and the freed key taken by another row: all in one commit.
    bench.rekey(&key("1"), &moved("5"));
    bench.rekey(&key("2"), &moved("1"));
    bench.rekey(&key("5"), &moved("6"));
    // From a pending document.
    bench.insert(&with(&[(0, "7"), (3, "of seven")]));
    bench.rekey(&key("7"), &moved("8"));
    bench.commit();
    let bodies = |id| document(&server, id).map(|document| document["body"].as_str().unwrap().to_owned());
    assert_eq!(bodies("6").as_deref(), Some("of one"));
    assert_eq!(bodies("1").as_deref(), Some("of two"));
    assert_eq!(bodies("8").as_deref(), Some("of seven"));
    for gone in ["2", "5", "7"] {
        assert_eq!(bodies(gone), None);
    }
}

#[test]
fn h33_the_key_of_a_row_is_the_records_key() {
    // A key that is itself TOASTed comes as a placeholder in `after`, and as the old key in the record.
    let directory = tempfile::tempdir().unwrap();
    let schema = table(&[("code!", TEXT), ("subject", TEXT)]);
    let definition = IndexDefinition { text: vec!["subject".into()], ..bare() };
    let mut bench = Bench::of(directory.path(), definition, schema);
    let server = Server::start(&bench.indexes);
    bench.insert(&["long", "one"]);
    bench.send(Op::Update, Some(&row(&["long", "~"])), Some(&row(&["?", "two"])), None).unwrap();
    bench.commit();
    assert_eq!(document(&server, "long"), Some(json!({"code": "long", "subject": "two"})));
    assert_eq!(total(&server), 1);
}

fn bare() -> IndexDefinition {
    IndexDefinition {
        name: "emails".into(),
        schema: "public".into(),
        table: "emails".into(),
        ..IndexDefinition::default()
    }
}

#[test]
fn a_composite_key_is_joined_and_escaped() {
    let directory = tempfile::tempdir().unwrap();
    let schema = table(&[("a!", TEXT), ("b!", TEXT), ("c!", 1184), ("subject", TEXT)]);
    let definition = IndexDefinition { text: vec!["subject".into()], ..bare() };
    let mut bench = Bench::of(directory.path(), definition, schema);
    let server = Server::start(&bench.indexes);
    bench.insert(&["x:y", "back\\slash", "2025-01-19 12:00:00+00", "s"]);
    bench.insert(&["x", "y:back\\slash", "2025-01-19 12:00:00+00", "t"]);
    bench.insert(&["~", "", "infinity", "u"]);
    bench.insert(&["\\N", "", "infinity", "v"]);
    bench.commit();
    let id = |id: &str| document(&server, &id.replace('%', "%25").replace('\\', "%5C").replace(' ', "%20"));
    assert_eq!(id("x\\:y:back\\\\slash:2025-01-19 12\\:00\\:00+00").unwrap()["subject"], "s");
    assert_eq!(id("x:y\\:back\\\\slash:2025-01-19 12\\:00\\:00+00").unwrap()["subject"], "t");
    assert_eq!(id("\\N::infinity").unwrap()["subject"], "u");
    assert_eq!(id("\\\\N::infinity").unwrap()["subject"], "v");
    assert_eq!(total(&server), 4);
}

/// Damages an index, and says what the next start finds.
fn found_after(damage: impl FnOnce(&Path)) -> (Stored, Bench, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(directory.path());
    bench.insert(&MAIL);
    bench.commit();
    drop(bench);
    damage(&directory.path().join("emails"));
    let indexes = Indexes::new(vec![definition()]).unwrap();
    let mut sink = SearchSink::new(&indexes, Options::new(directory.path())).unwrap();
    let stored = sink.load().unwrap().remove(0);
    drop(sink);
    // Filled again, it works.
    let mut bench = Bench::new(directory.path());
    bench.insert(&MAIL);
    bench.commit();
    (stored, bench, directory)
}

/// A segment's file.
fn segment(path: &Path, extension: &str) -> PathBuf {
    let mut files = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
    files.find(|file| file.extension().is_some_and(|found| found == extension)).unwrap()
}

#[test]
fn damage_is_noticed_and_mended() {
    let meta = |edit: fn(&mut Value)| {
        move |path: &Path| {
            let mut meta = serde_json::from_slice(&fs::read(path.join("meta.json")).unwrap()).unwrap();
            edit(&mut meta);
            fs::write(path.join("meta.json"), meta.to_string()).unwrap();
        }
    };
    let flip = |path: &Path| {
        let file = segment(path, "store");
        let mut bytes = fs::read(&file).unwrap();
        bytes[10] ^= 0xff;
        fs::write(file, bytes).unwrap();
    };
    let cut = |path: &Path| {
        let file = segment(path, "term");
        let bytes = fs::read(&file).unwrap();
        fs::write(file, &bytes[..bytes.len() / 2]).unwrap();
    };
    type Damage = Box<dyn Fn(&Path)>;
    let damages: Vec<(&str, Damage)> = vec![
        ("is missing", Box::new(|path| fs::remove_file(path.join("meta.json")).unwrap())),
        ("meta.json", Box::new(|path| fs::write(path.join("meta.json"), "{").unwrap())),
        ("meta.json", Box::new(|path| fs::write(path.join("meta.json"), "").unwrap())),
        ("no checkpoint", Box::new(meta(|meta| meta["payload"] = Value::Null))),
        ("meta.json", Box::new(meta(|meta| meta["payload"] = "nonsense".into()))),
        ("fields", Box::new(meta(|meta| meta["schema"].as_array_mut().unwrap().swap(0, 1)))),
        ("idx", Box::new(|path| fs::remove_file(segment(path, "idx")).unwrap())),
        ("checksum", Box::new(flip)),
        ("", Box::new(cut)),
        (".managed.json", Box::new(|path| fs::remove_file(path.join(".managed.json")).unwrap())),
        (".managed", Box::new(|path| fs::write(path.join(".managed.json"), "[").unwrap())),
    ];
    for (name, damage) in damages {
        let (stored, bench, _directory) = found_after(|path| damage(path));
        let Stored::Damaged(reason) = stored else { panic!("{name}: {stored:?}") };
        assert!(reason.contains(name), "{name}: {reason}");
        assert_eq!(total(&Server::start(&bench.indexes)), 1, "{name}");
    }
}

#[test]
fn a_deleted_directory_and_leftovers_of_a_reset_are_empty() {
    let (stored, ..) = found_after(|path| fs::remove_dir_all(path).unwrap());
    assert_eq!(stored, Stored::Empty);
    // Killed before the rename of a reset.
    let (stored, _, directory) = found_after(|path| {
        fs::rename(path, path.with_extension("new")).unwrap();
        fs::create_dir(path).unwrap();
    });
    assert_eq!(stored, Stored::Empty);
    assert!(!directory.path().join("emails.new").exists());
}

#[test]
fn another_definition_is_another_index() {
    let directory = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(directory.path());
    bench.insert(&MAIL);
    bench.commit();
    let first = bench.at.clone();
    drop(bench);
    let other = IndexDefinition { date: Vec::new(), ..definition() };
    let indexes = Indexes::new(vec![other.clone()]).unwrap();
    let mut sink = SearchSink::new(&indexes, Options::new(directory.path())).unwrap();
    assert_ne!(sink.stores()[0].definition, first.definition);
    assert_eq!(sink.load().unwrap(), [Stored::At(first)]);
    sink.reset(0, &start_of(&other)).unwrap();
    assert_eq!(sink.load().unwrap(), [Stored::At(start_of(&other))]);
}

#[test]
fn a_newer_format_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    drop(Bench::new(directory.path()));
    let path = directory.path().join("emails/meta.json");
    let mut meta: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    meta["payload"] = r#"{"format":2,"else":true}"#.into();
    fs::write(path, meta.to_string()).unwrap();
    let indexes = Indexes::new(vec![definition()]).unwrap();
    let mut sink = SearchSink::new(&indexes, Options::new(directory.path())).unwrap();
    let error = sink.load().unwrap_err();
    assert!(matches!(&error, SinkError::Refused(refusal) if refusal.what.contains("format 2")), "{error}");
}

#[test]
fn a_directory_has_one_writer() {
    let directory = tempfile::tempdir().unwrap();
    let mut first = Bench::new(directory.path());
    let indexes = Indexes::new(vec![definition()]).unwrap();
    let mut second = SearchSink::new(&indexes, Options::new(directory.path())).unwrap();
    let error = second.load().unwrap_err();
    assert!(
        matches!(&error, SinkError::Refused(refusal) if refusal.what.contains("another process")),
        "{error}"
    );
    // Who stands by takes over when the other lets go.
    first.sink.discard();
    second.load().unwrap();
}

#[test]
fn a_directory_deleted_while_running_is_noticed_and_readers_live_on() {
    let directory = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(directory.path());
    let server = Server::start(&bench.indexes);
    for id in ["1", "2", "3"] {
        bench.insert(&with(&[(0, id)]));
        bench.commit();
    }
    bench.sink.check().unwrap();
    fs::remove_dir_all(directory.path()).unwrap();
    assert_eq!(server.hits(json!({"q": "hello"})).len(), 3);
    let error = bench.sink.check().unwrap_err();
    assert!(matches!(error, SinkError::Moved(_)), "{error}");
    bench.insert(&with(&[(0, "4")]));
    let error = bench.try_commit().unwrap_err();
    assert!(matches!(error, SinkError::Moved(_) | SinkError::Unavailable(_)), "{error}");
    assert_eq!(server.hits(json!({"q": "hello"})).len(), 3);
    bench.sink.discard();
    assert_eq!(bench.load(), Stored::Empty);
    assert_eq!(server.get("/health").0, 503);
    bench.insert(&MAIL);
    bench.commit();
    assert_eq!((server.get("/health").0, server.hits(json!({"q": "hello"}))), (200, vec![1]));
}

#[test]
fn an_older_commit_put_back_while_running_is_not_built_upon() {
    let directory = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(directory.path());
    let meta = directory.path().join("emails/meta.json");
    let older = fs::read(&meta).unwrap();
    bench.insert(&MAIL);
    bench.commit();
    fs::write(&meta, older).unwrap();
    bench.insert(&with(&[(0, "2")]));
    let error = bench.try_commit().unwrap_err();
    assert!(matches!(error, SinkError::Moved(_)), "{error}");
    bench.sink.discard();
    let stored = bench.load();
    assert!(matches!(&stored, Stored::At(Checkpoint { next_offset: 0, .. })), "{stored:?}");
}

#[test]
fn a_column_may_come_later_but_not_go() {
    let directory = tempfile::tempdir().unwrap();
    let old = table(&[("id!", INT8), ("subject", TEXT)]);
    let wide = table(&[("id!", INT8), ("subject", TEXT), ("score", FLOAT8)]);
    let definition = IndexDefinition { text: vec!["subject".into()], number: vec!["score".into()], ..bare() };
    assert!(definition.bind(&old).unwrap_err().what.contains("`score`"));
    definition.bind(&wide).unwrap();
    let mut bench = Bench::of(directory.path(), definition.clone(), old.clone());
    let server = Server::start(&bench.indexes);
    bench.insert(&["1", "before"]);
    bench.alter(wide);
    bench.insert(&["2", "after", "1e+20"]);
    bench.commit();
    assert_eq!(document(&server, "1").unwrap()["score"], Value::Null);
    assert_eq!(server.hits(json!({"filter": "score > 100000000000000000000"})), [0i64; 0]);
    assert_eq!(server.hits(json!({"filter": "score >= 100000000000000000000"})), [2]);
    drop(server);
    drop(bench);
    let mut bench = Bench::of(directory.path(), definition, old);
    let error = bench.send(Op::Create, None, Some(&row(&["3", "x"])), None).unwrap_err();
    assert!(
        matches!(&error, SinkError::Refused(refusal) if refusal.what.contains("dropped or renamed")),
        "{error}"
    );
}

#[test]
fn tables_that_cannot_be_indexed_are_refused_with_the_remedy() {
    let keyless = TableSchema { columns: table(&[("a", TEXT)]).columns.clone(), ..(*emails()).clone() };
    let refusal = IndexDefinition { text: vec!["a".into()], ..bare() }.bind(&keyless).unwrap_err();
    assert!(refusal.remedy.contains("ADD PRIMARY KEY"), "{refusal}");
    let wrong = IndexDefinition { number: vec!["subject".into()], ..bare() }.bind(&emails()).unwrap_err();
    assert!(wrong.what.contains("`subject` under `number`"), "{wrong}");
    let twice = IndexDefinition { exact: vec!["size".into()], number: vec!["size".into()], ..bare() };
    assert!(twice.validate().is_err());
    assert!(IndexDefinition { name: "../x".into(), ..definition() }.validate().is_err());
    assert!(bare().validate().is_err());
    let named = table(&[("id!", INT8), ("kind", 2205)]);
    let refusal = IndexDefinition { exact: vec!["kind".into()], ..bare() }.bind(&named).unwrap_err();
    assert!(refusal.what.contains("when what it names is renamed"), "{refusal}");
    assert!(Indexes::new(vec![definition(), definition()]).is_err());
    definition().bind(&emails()).unwrap();
}

#[test]
fn a_changed_key_column_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(directory.path());
    bench.insert(&MAIL);
    let mut other: TableSchema = (*emails()).clone();
    other.columns[1].key = Some(2);
    bench.alter(Arc::new(other));
    let error = bench.send(Op::Create, None, Some(&row(&MAIL)), None).unwrap_err();
    assert!(
        matches!(&error, SinkError::Refused(refusal) if refusal.what.contains("(id) to (id, folder)")),
        "{error}"
    );
    // The log ends the rows and begins them again under their new key, with which an empty index goes on.
    let server = Server::start(&bench.indexes);
    bench.truncate();
    bench.insert(&MAIL);
    bench.commit();
    assert_eq!(total(&server), 1);
    let id = format!("{}:{}", MAIL[0], MAIL[1]);
    assert!(document(&server, &id).is_some(), "{id}");
}

#[test]
fn a_key_too_long_for_a_term_is_poison() {
    let directory = tempfile::tempdir().unwrap();
    let schema = table(&[("code!", TEXT), ("subject", TEXT)]);
    let definition = IndexDefinition { text: vec!["subject".into()], exact: vec!["code".into()], ..bare() };
    let mut bench = Bench::of(directory.path(), definition, schema);
    let server = Server::start(&bench.indexes);
    let long = "ß".repeat(30_000);
    bench.insert(&[&long, "long"]);
    bench.insert(&[&format!("{long}x"), "longer"]);
    bench.commit();
    let found = |value: &str| {
        let body = json!({"filter": [format!("code = '{value}'")]});
        server.post("/indexes/emails/search", &body).1["hits"].as_array().map(Vec::len)
    };
    // Filters have a bound of their own; a shorter value is no prefix match.
    assert_eq!(found(&"ß".repeat(20_000)), Some(0));
    let error = bench.send(Op::Create, None, Some(&row(&[&"x".repeat(70_000), "s"])), None).unwrap_err();
    assert!(matches!(error, SinkError::Poison(_)), "{error}");
}

#[test]
fn h42_a_copy_takes_an_indexs_place_only_where_readers_do_not_go_back() {
    let directory = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(directory.path());
    let server = Server::start(&bench.indexes);
    bench.insert(&MAIL);
    bench.commit();
    // Readers see the checkpoint in memory, ahead of the disk.
    bench.pass(10);
    bench.commit();
    let options = Options { heap_bytes: 15_000_000, ..Options::new(directory.path()) };
    let mut copies = SearchSink::of_copies(&bench.indexes, options).unwrap();
    assert_eq!(bench.sink.copies().unwrap(), [None]);
    assert!(bench.sink.rebuild(0, true).unwrap());
    assert_eq!(bench.sink.copies().unwrap(), [Some(Stored::Empty)]);
    assert_eq!(copies.load().unwrap(), [Stored::Empty]);
    let mut at = start_of(&definition());
    copies.reset(0, &at).unwrap();
    let mut build = |copies: &mut SearchSink, next_offset, ready| {
        let to = Checkpoint { next_offset, lsn: bench.at.lsn, ready, ..at.clone() };
        copies.commit(&[Some(Move { from: at.clone(), to: to.clone() })]).unwrap();
        at = to;
        copies.release(0).unwrap();
    };
    build(&mut copies, 5, true);
    assert!(matches!(&bench.sink.copies().unwrap()[..], [Some(Stored::At(at))] if at.next_offset == 5));
    assert!(!bench.sink.swap(0).unwrap(), "behind what was shown, if not behind the disk");
    assert_eq!((server.hits(json!({"q": "hello"})), total(&server)), (vec![1], 1));
    assert!(matches!(bench.sink.load().unwrap()[..], [Stored::At(_)]));
    assert!(matches!(copies.load().unwrap()[..], [Stored::At(_)]), "it goes on");
    build(&mut copies, 11, true);
    assert!(matches!(bench.sink.swap(0), Err(SinkError::Moved(_))), "not what was looked at last");
    bench.sink.copies().unwrap();
    assert!(bench.sink.swap(0).unwrap());
    assert_eq!(server.hits(json!({"q": "hello"})), [1], "until it is loaded");
    let stored = bench.sink.load().unwrap();
    assert!(matches!(&stored[..], [Stored::At(at)] if at.next_offset == 11), "{stored:?}");
    assert_eq!((server.hits(json!({"q": "hello"})), total(&server)), (vec![], 0));
    let entries = fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name());
    let left: Vec<_> = entries.filter(|name| !name.to_string_lossy().starts_with('.')).collect();
    assert_eq!(left, ["emails"]);
}

#[test]
fn an_index_of_another_definition_is_shown_as_what_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(directory.path());
    bench.insert(&MAIL);
    bench.commit();
    let first = bench.at.clone();
    drop(bench);
    let other = IndexDefinition { exact: vec!["body".into()], ..definition() };
    let indexes = Indexes::new(vec![other]).unwrap();
    let mut sink = SearchSink::new(&indexes, Options::new(directory.path())).unwrap();
    assert_eq!(sink.load().unwrap(), [Stored::At(first)]);
    assert!(sink.rebuild(0, true).unwrap());
    let server = Server::start(&indexes);
    assert_eq!(server.hits(json!({"q": "hello", "filter": "folder = inbox"})), [1]);
    let (status, answer) = server.post("/indexes/emails/search", &json!({"filter": "body = x"}));
    assert_eq!((status, answer["code"].as_str()), (400, Some("invalid_search_filter")));
}
