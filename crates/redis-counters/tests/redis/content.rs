//! Redis holds exactly what the queries return.

use std::collections::BTreeMap;

use change::{Op, ReplicaIdentity};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use redis_counters::{Bounds, CountersSink, Namespace, Server};
use testkit::services::Redis;
use worker::{Sink, SinkError};

use crate::rig::{Mail, NAMES, Rig, definitions, hash, mail, map, run, schema, text};

/// Small enough that ordinary transactions of these tests are staged.
const TINY: Bounds = Bounds { script_groups: 3, script_bytes: 1 << 20, held_groups: 9, held_bytes: 1 << 20 };

#[test]
fn h60_groups_and_sums_as_sql_has_them() {
    let redis = Redis::start();
    let mut rig = Rig::start(&redis, &NAMES);
    assert_eq!(text(&redis, "all"), Some("0".into()), "an empty table has a count");
    assert_eq!(text(&redis, "all_bytes"), Some(String::new()), "and a NULL sum, at once after the reset");

    let mails = [mail(1, 7, 5), mail(2, 7, -5), mail(3, 8, None)];
    mails.iter().for_each(|mail| rig.insert(mail));
    rig.commit().unwrap();
    assert_eq!(
        hash(&redis, "bytes"),
        map(&[("7", "0"), ("8", "")]),
        "a sum of 0 stays, one of NULLs is empty"
    );
    assert_eq!(hash(&redis, "sized"), map(&[("7", "2"), ("8", "0")]));
    assert_eq!(text(&redis, "all_bytes"), Some("0".into()));

    rig.delete(&mails[0]);
    rig.delete(&mails[1]);
    rig.commit().unwrap();
    assert_eq!(hash(&redis, "bytes"), map(&[("8", "")]), "a group goes with its last row");
    assert_eq!(hash(&redis, "unread"), map(&[("8", "1")]));
    assert_eq!(text(&redis, "all_bytes"), Some(String::new()));
    assert_eq!(text(&redis, "all_sized"), Some("0".into()));

    rig.delete(&mails[2]);
    rig.commit().unwrap();
    assert!(NAMES[..4].iter().all(|name| hash(&redis, name).is_empty()));
    assert_eq!(text(&redis, "all"), Some("0".into()));
}

#[test]
fn sums_outgrow_64_bits() {
    let redis = Redis::start();
    let mut rig = Rig::start(&redis, &["bytes"]);
    (0..3).for_each(|id| rig.insert(&mail(id, 1, i64::MAX)));
    rig.commit().unwrap();
    assert_eq!(hash(&redis, "bytes"), map(&[("1", "27670116110564327421")]));
    (3..7).for_each(|id| rig.insert(&mail(id, 1, i64::MIN)));
    rig.commit().unwrap();
    assert_eq!(hash(&redis, "bytes"), map(&[("1", "-9223372036854775811")]));
}

#[test]
fn group_fields_are_escaped_and_null_is_told_apart() {
    let redis = Redis::start();
    let mut rig = Rig::start(&redis, &["folders"]);
    let with = |id, folder: Option<&str>| Mail { folder: folder.map(str::to_owned), ..mail(id, 1, 1) };
    for (id, folder) in [Some("a:b\\c"), None, Some("\\N"), Some(""), Some("é\n")].into_iter().enumerate() {
        rig.insert(&with(id as i64, folder));
    }
    rig.commit().unwrap();
    let expected = [("a\\:b\\\\c:1", "1"), ("\\N:1", "1"), ("\\\\N:1", "1"), (":1", "1"), ("é\n:1", "1")];
    assert_eq!(hash(&redis, "folders"), map(&expected));
}

#[test]
fn random_changes_in_scripts() {
    random_changes(Bounds::default(), 1, false);
}

#[test]
fn random_changes_through_staging() {
    random_changes(TINY, 2, false);
}

#[test]
fn random_changes_of_copies_in_place() {
    random_changes(TINY, 3, true);
}

/// Random transactions, TRUNCATE among them, against the rows themselves.
fn random_changes(bounds: Bounds, seed: u64, copies: bool) {
    let redis = Redis::start();
    let mut rig = match copies {
        false => Rig::with(&redis, &NAMES, bounds),
        true => copies_of(&redis, bounds),
    };
    let key = |name: &str| if copies { format!("millrace:p:{name}:copy:value") } else { name.to_owned() };
    let mut random = StdRng::seed_from_u64(seed);
    let mut rows: BTreeMap<i64, Mail> = BTreeMap::new();
    for round in 0..60 {
        for _ in 0..random.random_range(0..25) {
            step(&mut rig, &mut random, &mut rows);
        }
        rig.commit().unwrap();
        compare(&redis, key, &rows, round);
        let staging: Vec<String> = redis::cmd("KEYS").arg("*staging*").query(&mut redis.connect()).unwrap();
        assert!(staging.is_empty(), "{staging:?}");
        rig.sink.check().unwrap();
    }
    // A new worker finds what this one left.
    assert!(matches!(rig.load().unwrap()[..], [worker::Stored::At(_), ..]));
    compare(&redis, key, &rows, 60);
}

/// The builder's side.
fn copies_of(redis: &Redis, bounds: Bounds) -> Rig {
    let (server, space) = (Server::new(redis.url()), Namespace::new("", "p"));
    let mut rig = Rig::over(CountersSink::of_copies(&server, space, bounds, definitions(&NAMES)).unwrap());
    rig.load().unwrap();
    rig
}

fn step(rig: &mut Rig, random: &mut StdRng, rows: &mut BTreeMap<i64, Mail>) {
    let id = random.random_range(0..40);
    let new = Mail {
        id,
        owner: random.random_bool(0.9).then(|| random.random_range(0..6)),
        folder: random.random_bool(0.9).then(|| ["inbox", "a:b", "\\"][random.random_range(0..3)].to_owned()),
        is_read: random.random_bool(0.9).then(|| random.random_bool(0.5)),
        size: random.random_bool(0.7).then(|| random.random_range(-3..4)),
    };
    match (rows.remove(&id), random.random_range(0..100)) {
        (_, 0..2) => {
            rig.change(Op::Truncate, None, None).unwrap();
            rows.clear();
        }
        (None, _) => {
            rig.insert(&new);
            rows.insert(id, new);
        }
        (Some(old), 2..40) => rig.delete(&old),
        (Some(old), _) => {
            rig.change(Op::Update, Some(&old), Some(&new)).unwrap();
            rows.insert(id, new);
        }
    }
}

/// What SQL would answer, from the rows.
fn compare(redis: &Redis, key_of: impl Fn(&str) -> String, rows: &BTreeMap<i64, Mail>, round: u32) {
    let null = || "\\N".to_owned();
    let owner = |mail: &Mail| mail.owner.map_or_else(null, |owner| owner.to_string());
    let folder = |mail: &Mail| {
        let folder = mail.folder.as_ref();
        folder.map_or_else(null, |folder| folder.replace('\\', "\\\\").replace(':', "\\:"))
    };
    let sum = |sizes: &[Option<i64>]| match sizes.iter().flatten().count() {
        0 => String::new(),
        _ => sizes.iter().flatten().sum::<i64>().to_string(),
    };
    let count = |sizes: &[Option<i64>]| sizes.iter().flatten().count().to_string();
    let group = |key: &dyn Fn(&Mail) -> Option<String>, answer: &dyn Fn(&[Option<i64>]) -> String| {
        let mut groups: BTreeMap<String, Vec<Option<i64>>> = BTreeMap::new();
        for mail in rows.values() {
            if let Some(key) = key(mail) {
                groups.entry(key).or_default().push(mail.size);
            }
        }
        groups.into_iter().map(|(key, sizes)| (key, answer(&sizes))).collect::<BTreeMap<_, _>>()
    };
    let unread = |mail: &Mail| mail.is_read == Some(false);
    let len = |sizes: &[Option<i64>]| sizes.len().to_string();
    let expected = [
        ("unread", group(&|mail| unread(mail).then(|| owner(mail)), &len)),
        ("sized", group(&|mail| Some(owner(mail)), &count)),
        ("bytes", group(&|mail| Some(owner(mail)), &sum)),
        ("folders", group(&|mail| Some(format!("{}:{}", folder(mail), owner(mail))), &sum)),
    ];
    for (name, expected) in expected {
        assert_eq!(hash(redis, &key_of(name)), expected, "{name} in round {round}");
    }
    let sizes: Vec<Option<i64>> = rows.values().map(|mail| mail.size).collect();
    let unread: Vec<Option<i64>> = rows.values().filter(|mail| unread(mail)).map(|mail| mail.size).collect();
    for (name, expected) in [("all", len(&sizes)), ("all_sized", count(&sizes)), ("all_bytes", sum(&unread))]
    {
        assert_eq!(text(redis, &key_of(name)), Some(expected), "{name} in round {round}");
    }
}

#[test]
fn a_large_transaction_goes_beside_and_swaps() {
    let redis = Redis::start();
    let bounds = Bounds { script_groups: 1_000, ..Bounds::default() };
    let mut rig = Rig::with(&redis, &["bytes", "all"], bounds);
    let mails: Vec<Mail> = (0..25_000).map(|id| mail(id, id, id)).collect();
    // Left by a worker that died in such a commit.
    run(&redis, "SET millrace:p:bytes:staging somebody");
    run(&redis, "HSET millrace:p:bytes:staging:value 99999999 1");
    mails.iter().for_each(|mail| rig.insert(mail));
    assert!(rig.sink.full());
    rig.commit().unwrap();
    assert!(!rig.sink.full());
    let bytes = hash(&redis, "bytes");
    assert_eq!((bytes.len(), bytes.get("24999")), (25_000, Some(&"24999".to_owned())));
    assert_eq!(text(&redis, "all"), Some("25000".into()));
    rig.sink.check().unwrap();

    // All groups vanish: there is no staged hash to rename.
    mails.iter().for_each(|mail| rig.delete(mail));
    rig.commit().unwrap();
    assert!(hash(&redis, "bytes").is_empty() && hash(&redis, "millrace:p:bytes:rows").is_empty());
    assert_eq!(hash(&redis, "millrace:p:bytes")["groups"], "0");
    rig.sink.check().unwrap();
}

#[test]
fn leftovers_of_a_large_commit_are_removed_by_load() {
    let redis = Redis::start();
    let mut rig = Rig::start(&redis, &["bytes"]);
    rig.insert(&mail(1, 1, 1));
    rig.commit().unwrap();
    let before = crate::rig::everything(&redis);
    run(&redis, "SET millrace:p:bytes:staging somebody");
    run(&redis, "HSET millrace:p:bytes:staging:rows 1 1");
    assert!(matches!(rig.load().unwrap()[..], [worker::Stored::At(_)]));
    assert_eq!(crate::rig::everything(&redis), before);
}

#[test]
fn h34_a_change_without_its_old_row_is_refused() {
    let redis = Redis::start();
    let mut rig = Rig::start(&redis, &["unread"]);
    rig.insert(&mail(1, 1, 1));
    rig.commit().unwrap();
    let missing = rig.change(Op::Update, None, Some(&mail(1, 2, 1))).unwrap_err();
    let keyed = schema(ReplicaIdentity::Default);
    let before = mail(1, 1, 1).json();
    let narrowed = rig.raw(&keyed, Op::Delete, Some(&before), None).unwrap_err();
    for error in [missing, narrowed] {
        let SinkError::Refused(refusal) = error else { panic!("{error}") };
        assert!(refusal.remedy.contains("ALTER TABLE public.emails REPLICA IDENTITY FULL"), "{refusal}");
    }
    assert_eq!(hash(&redis, "unread"), map(&[("1", "1")]));
}

#[test]
fn a_counter_of_nothing_but_the_key_needs_no_old_row() {
    let redis = Redis::start();
    let mut rig = Rig::start(&redis, &["all"]);
    let keyed = schema(ReplicaIdentity::Default);
    let row = mail(1, 1, 1).json();
    rig.raw(&keyed, Op::Create, None, Some(&row)).unwrap();
    rig.raw(&keyed, Op::Create, None, Some(&row)).unwrap();
    rig.raw(&keyed, Op::Update, None, Some(&row)).unwrap();
    rig.raw(&keyed, Op::Delete, Some(&row), None).unwrap();
    rig.commit().unwrap();
    assert_eq!(text(&redis, "all"), Some("1".into()));
}

#[test]
fn other_tables_and_stores_that_stay_are_left_alone() {
    let redis = Redis::start();
    let mut rig = Rig::start(&redis, &["all", "bytes"]);
    rig.insert(&mail(1, 1, 1));
    let mut moves = rig.moves();
    moves[0] = None;
    rig.sink.commit(&moves).unwrap();
    assert_eq!((text(&redis, "all"), hash(&redis, "bytes").len()), (Some("0".into()), 1));
    let mut other = (*schema(ReplicaIdentity::Full)).clone();
    assert!(rig.sink.wants(0, &other));
    other.table = "users".into();
    assert!(!rig.sink.wants(0, &other));
}

#[test]
fn a_counter_refuses_a_row_that_lacks_a_column_of_its_own_and_no_other() {
    let redis = Redis::start();
    let server = redis_counters::Server::new(redis.url());
    let space = redis_counters::Namespace::new("", "p");
    let count = |name: &str, group: &str| {
        let sql = format!("SELECT {group}, count(*) FROM emails GROUP BY {group}");
        redis_counters::sql::Definition::parse(name, &sql).unwrap()
    };
    let counters = vec![count("by_folder", "folder"), count("by_user", "user_id")];
    let sink = redis_counters::CountersSink::new(&server, space, Bounds::default(), counters);
    let mut rig = Rig::over(sink.unwrap());
    rig.load().unwrap();
    let schema = schema(ReplicaIdentity::Full);
    let row = Mail { folder: Some(change::UNAVAILABLE.into()), ..mail(2, 1, 1) }.json();
    let change = worker::Change {
        offset: 1,
        position: change::Position::START,
        schema: &schema,
        key: br#"{"id":2,"__dbz__physicalTableIdentifier":"p.public.emails"}"#,
        event: change::Event { op: Op::Create, before: None, after: Some(&row) },
        unchanged: b"",
        omitted: br#"["folder"]"#,
        previous_key: b"",
    };
    let Err(worker::SinkError::Refused(refusal)) = rig.sink.apply(0, &change) else {
        panic!("it was counted")
    };
    assert!(refusal.what.contains("counters.by_folder needs `folder` of the row 2"), "{refusal}");
    rig.sink.apply(1, &change).unwrap();
    rig.offset = 2;
    rig.commit().unwrap();
    assert_eq!((hash(&redis, "by_folder"), hash(&redis, "by_user")), (map(&[]), map(&[("1", "1")])));
}

#[test]
fn h33_a_key_with_an_unchanged_toast_value_is_taken_from_the_records_key() {
    let redis = Redis::start();
    let server = redis_counters::Server::new(redis.url());
    let space = redis_counters::Namespace::new("", "p");
    let by_folder = "SELECT folder, count(*) FROM emails GROUP BY folder";
    let definition = redis_counters::sql::Definition::parse("by_folder", by_folder).unwrap();
    let sink = redis_counters::CountersSink::new(&server, space, Bounds::default(), vec![definition]);
    let mut rig = Rig::over(sink.unwrap());
    rig.load().unwrap();
    let mut keyed = (*schema(ReplicaIdentity::Default)).clone();
    keyed.columns[2].key = Some(1);
    let keyed = std::sync::Arc::new(keyed);
    let hole = Mail { folder: Some(change::UNAVAILABLE.into()), ..mail(2, 1, 1) }.json();
    let change = worker::Change {
        offset: 1,
        position: change::Position::START,
        schema: &keyed,
        key: br#"{"id":2,"folder":"inbox","__dbz__physicalTableIdentifier":"p.public.emails"}"#,
        event: change::Event { op: Op::Create, before: None, after: Some(&hole) },
        unchanged: br#"["folder"]"#,
        omitted: b"",
        previous_key: br#"{"id":1,"folder":"inbox"}"#,
    };
    rig.sink.apply(0, &change).unwrap();
    // An update that leaves the key alone, with the key's placeholder in it, changes nothing.
    let update = worker::Change { event: change::Event { op: Op::Update, ..change.event }, ..change };
    rig.sink.apply(0, &update).unwrap();
    rig.offset = 3;
    rig.commit().unwrap();
    assert_eq!(hash(&redis, "by_folder"), map(&[("inbox", "1")]));
}
