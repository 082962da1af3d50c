use std::collections::BTreeMap;

use change::Datum;
use verify::Measure;

use crate::rig::{Rig, Store, counter, row, xid};

const UNREAD: &str = "SELECT user_id::text, count(*)::text, count(*)::text, NULL::text FROM mails \
    WHERE NOT is_read AND folder = 'inbox' GROUP BY user_id";
const SIZES: &str = "SELECT folder::text, day::text, at::text, count(*)::text, count(size)::text, sum(size)::text FROM mails \
    WHERE at > '2026-01-01 00:00:00+00' OR day = '2025-12-31' GROUP BY folder, day, at";
const ALL: &str = "SELECT count(*)::text, count(size)::text, NULL::text FROM mails";

fn unread(rig: &Rig) -> verify::Counter {
    counter(rig, &["user_id", "is_read", "folder"], 1, Measure::Rows, UNREAD)
}

fn sizes(rig: &Rig) -> verify::Counter {
    counter(rig, &["folder", "day", "at", "size"], 3, Measure::Sum, SIZES)
}

fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()
}

fn fill(rig: &Rig) {
    rig.commit(
        "INSERT INTO mails SELECT g, g % 3, 'inbox', g % 2 = 0, g, '2026-02-01 10:00:00.5Z', '2026-02-01', 'b'
         FROM generate_series(1, 12) g",
        |log, xid| (1..=12).for_each(|id| log.insert(xid, &rig.row(id))),
    );
}

#[test]
fn equal_counters_are_equal_and_each_kind_of_difference_is_found() {
    let rig = Rig::new();
    fill(&rig);
    let good = map(&[("0", "2"), ("1", "2"), ("2", "2")]);
    let check = |content: BTreeMap<String, String>| {
        let mut store = Store::new(rig.checkpoint(), content);
        let (verified, found) = rig.verify(|verifier| verifier.counter(&unread(&rig), &mut store));
        let verified = verified.unwrap();
        assert_eq!(verified.differences as usize, found.len());
        found.into_iter().map(|d| format!("{} {} {}", d.key, d.source, d.found)).collect::<Vec<_>>()
    };
    assert_eq!(check(good.clone()), Vec::<String>::new());
    let mut wrong = good.clone();
    wrong.insert("1".into(), "3".into());
    wrong.remove("2");
    wrong.insert("7:x".into(), "0".into());
    assert_eq!(check(wrong), [r#"1 "2" "3""#, r#"2 "2" null"#, r#"7:x null "0""#]);

    let mut all = Store::new(rig.checkpoint(), map(&[("", "12")]));
    let counter = counter(&rig, &[], 0, Measure::Rows, ALL);
    let (verified, found) = rig.verify(|verifier| verifier.counter(&counter, &mut all));
    assert_eq!((verified.unwrap().checked, found), (1, vec![]));
}

#[test]
fn h50_a_transaction_in_flight_when_the_snapshot_was_taken() {
    let rig = Rig::new();
    fill(&rig);
    let open = rig.postgres.session("postgres");
    let xid = xid(&open.sql("BEGIN; SELECT pg_current_xact_id()"));
    let (old, gone) = (rig.row(1), rig.row(3));
    open.sql(
        "UPDATE mails SET user_id = 5, day = '2025-12-31', at = NULL WHERE id = 1; DELETE FROM mails WHERE id = 3;
         INSERT INTO mails VALUES (100, 5, 'a:b\\c', false, NULL, '2026-03-01 00:00Z', NULL, '')",
    );
    let then = |content: BTreeMap<String, String>| {
        let (rig, open, old, gone) = (&rig, &open, &old, &gone);
        move || {
            open.sql("COMMIT");
            let new = row(open, 1);
            let new: Vec<Datum<'_>> =
                new.iter().map(|v| v.as_deref().map_or(Datum::Null, Datum::Text)).collect();
            rig.log.update(xid, Some(old), &new);
            rig.log.delete(xid, gone);
            rig.log.insert(xid, &rig.row(100));
            (rig.checkpoint(), content)
        }
    };
    let after = map(&[("0", "1"), ("1", "1"), ("2", "2"), ("5", "1")]);
    let mut store = Store::later(BTreeMap::new(), then(after));
    let (verified, found) = rig.verify(|verifier| verifier.counter(&unread(&rig), &mut store));
    assert_eq!(found, []);
    assert_eq!(verified.unwrap().checked, 4);

    // The same log once more, now all of it seen by the snapshot; another counter, with Debezium's dates and times.
    let sums = map(&[
        (r"inbox:2026-02-01:2026-02-01 10\:00\:00.5+00", "74"),
        (r"inbox:2025-12-31:\N", "1"),
        (r"a\:b\\c:\N:2026-03-01 00\:00\:00+00", ""),
    ]);
    let mut store = Store::new(rig.checkpoint(), sums);
    let (verified, found) = rig.verify(|verifier| verifier.counter(&sizes(&rig), &mut store));
    assert_eq!(found, []);
    assert_eq!(verified.unwrap().differences, 0);
}

#[test]
fn h50_unseen_changes_are_evaluated_by_postgres() {
    let rig = Rig::new();
    fill(&rig);
    let open = rig.postgres.session("postgres");
    let xid = xid(&open.sql("BEGIN; SELECT pg_current_xact_id()"));
    let old = rig.row(2);
    open.sql("UPDATE mails SET at = '20270-01-01 00:00:00Z', day = NULL WHERE id = 2");
    let sums = map(&[
        (r"inbox:2026-02-01:2026-02-01 10\:00\:00.5+00", "76"),
        (r"inbox:\N:20270-01-01 00\:00\:00+00", "2"),
    ]);
    let mut store = Store::later(BTreeMap::new(), || {
        open.sql("COMMIT");
        let new = rig.row(2);
        let new: Vec<Datum<'_>> = new.iter().map(|v| v.as_deref().map_or(Datum::Null, Datum::Text)).collect();
        rig.log.update(xid, Some(&old), &new);
        (rig.checkpoint(), sums)
    });
    let (verified, found) = rig.verify(|verifier| verifier.counter(&sizes(&rig), &mut store));
    assert_eq!(found, []);
    assert_eq!(verified.unwrap().checked, 2);
}

#[test]
fn h50_a_prepared_transaction_and_one_that_was_not_seen_although_its_commit_is_below_the_lsn() {
    let rig = Rig::new();
    fill(&rig);
    let session = rig.postgres.session("postgres");
    let prepared = xid(&session.sql("BEGIN; SELECT pg_current_xact_id()"));
    session.sql("INSERT INTO mails VALUES (50, 9, 'inbox', false); PREPARE TRANSACTION 'p'");
    // As with a synchronous standby that is missing (h20): the log has it before others see it. Here its record is
    // written while it is still prepared.
    let new: Vec<Option<String>> = ["50", "9", "inbox", "f"].map(|v| Some(v.to_owned())).into();
    let new = [new, vec![None; 4]].concat();
    rig.log.insert(prepared, &new);
    let with = map(&[("0", "2"), ("1", "2"), ("2", "2"), ("9", "1")]);
    let mut store = Store::later(BTreeMap::new(), || (rig.checkpoint(), with.clone()));
    let (verified, found) = rig.verify(|verifier| verifier.counter(&unread(&rig), &mut store));
    assert_eq!((found, verified.unwrap().differences), (vec![], 0));
    // And once it is seen it is not counted twice.
    session.sql("COMMIT PREPARED 'p'");
    let mut store = Store::later(BTreeMap::new(), || (rig.checkpoint(), with.clone()));
    let (verified, found) = rig.verify(|verifier| verifier.counter(&unread(&rig), &mut store));
    assert_eq!((found, verified.unwrap().differences), (vec![], 0));
}

#[test]
fn h50_a_truncate_after_the_snapshot_takes_everything_before_it() {
    let rig = Rig::new();
    fill(&rig);
    let mut store = Store::later(BTreeMap::new(), || {
        rig.commit("INSERT INTO mails VALUES (60, 1, 'inbox', false)", |log, xid| {
            log.insert(xid, &rig.row(60))
        });
        rig.commit("TRUNCATE mails", |log, xid| log.truncate(xid));
        rig.commit("INSERT INTO mails VALUES (61, 4, 'inbox', false)", |log, xid| {
            log.insert(xid, &rig.row(61))
        });
        (rig.checkpoint(), map(&[("4", "1")]))
    });
    let (verified, found) = rig.verify(|verifier| verifier.counter(&unread(&rig), &mut store));
    assert_eq!((found, verified.unwrap().checked), (vec![], 1));
}

#[test]
fn an_update_without_its_old_row_needs_no_more_than_the_key() {
    let rig = Rig::new();
    fill(&rig);
    let by_key = counter(
        &rig,
        &["id"],
        1,
        Measure::Rows,
        "SELECT (id)::text, count(*)::text, count(*)::text, NULL::text FROM mails WHERE id < 3 GROUP BY id",
    );
    let update = || {
        rig.commit("UPDATE mails SET user_id = 8 WHERE id = 1", |log, xid| {
            let new = rig.row(1);
            let new: Vec<Datum<'_>> =
                new.iter().map(|v| v.as_deref().map_or(Datum::Null, Datum::Text)).collect();
            log.update(xid, None, &new);
        });
        rig.checkpoint()
    };
    let mut store = Store::later(BTreeMap::new(), || (update(), map(&[("1", "1"), ("2", "1")])));
    let (verified, found) = rig.verify(|verifier| verifier.counter(&by_key, &mut store));
    assert_eq!((found, verified.unwrap().differences), (vec![], 0));
    // A column that is not in the key cannot be had, and nothing is guessed.
    let mut store = Store::later(BTreeMap::new(), || (update(), map(&[])));
    let (verified, _) = rig.verify(|verifier| verifier.counter(&unread(&rig), &mut store));
    assert!(verified.unwrap_err().what.contains("old value of `user_id`"));
}

#[test]
fn h28_a_store_that_is_not_ready_or_behind_or_another_is_not_judged() {
    let rig = Rig::new();
    fill(&rig);
    let refuse = |change: fn(&mut worker::Checkpoint), expected: &str| {
        let mut at = rig.checkpoint();
        change(&mut at);
        let mut store = Store::new(at, map(&[("0", "2"), ("1", "2"), ("2", "2")]));
        let (verified, found) = rig.verify(|verifier| verifier.counter(&unread(&rig), &mut store));
        let what = verified.unwrap_err().what;
        assert!(what.contains(expected) && found.is_empty(), "{what}");
    };
    refuse(|at| at.ready = false, "being filled");
    refuse(|at| at.lsn = change::Lsn(1), "bytes behind");
    refuse(|at| at.log = "another".into(), "follows log another");
    refuse(|at| at.definition = "another".into(), "another definition");
}

/// The groups "0" and "1" are read first, "2" and "4" later.
#[test]
fn h50_a_store_that_moves_while_it_is_read_is_equal_or_not_group_by_group() {
    let first = map(&[("0", "2"), ("1", "2"), ("2", "2")]);
    let after = map(&[("0", "1"), ("1", "2"), ("2", "3"), ("4", "1")]);
    let check = |first: &BTreeMap<String, String>, after: &BTreeMap<String, String>| {
        let rig = Rig::new();
        fill(&rig);
        let mut store = Store::new(rig.checkpoint(), first.clone());
        store.between = Some(Box::new(|| {
            let old = rig.row(3);
            rig.commit("DELETE FROM mails WHERE id = 3", |log, xid| log.delete(xid, &old));
            for (id, user) in [(70, 2), (71, 4)] {
                let insert = format!("INSERT INTO mails VALUES ({id}, {user}, 'inbox', false)");
                rig.commit(&insert, |log, xid| log.insert(xid, &rig.row(id)));
            }
            (rig.checkpoint(), after.clone())
        }));
        let (verified, found) = rig.verify(|verifier| verifier.counter(&unread(&rig), &mut store));
        assert_eq!(verified.unwrap().differences as usize, found.len());
        found.into_iter().map(|d| format!("{} {} {}", d.key, d.source, d.found)).collect::<Vec<_>>()
    };
    assert_eq!(check(&first, &after), Vec::<String>::new());
    let but = |all: &BTreeMap<String, String>, group: &str, value: Option<&str>| {
        let mut all = all.clone();
        match value {
            Some(value) => drop(all.insert(group.to_owned(), value.to_owned())),
            None => drop(all.remove(group)),
        }
        all
    };
    // One that is wrong when it is read, and happens to have the value that is right later.
    let (mut early, mut late) = (first.clone(), after.clone());
    early.insert("0".into(), "1".into());
    late.insert("0".into(), "0".into());
    assert_eq!(check(&early, &late), [r#"0 "1" "0""#]);
    // One that nothing touches, in either part; one that changed after it was read; one before; one that came; one too many.
    for (group, value, difference) in [
        ("1", Some("3"), r#"1 "2" "3""#),
        ("1", None, r#"1 "2" null"#),
        ("0", Some("2"), r#"0 "1" "2""#),
        ("2", Some("2"), r#"2 "3" "2""#),
        ("4", None, r#"4 "1" null"#),
        ("8", Some("1"), r#"8 null "1""#),
    ] {
        let (first, after) = match group {
            "1" => (but(&first, group, value), but(&after, group, value)),
            _ => (first.clone(), but(&after, group, value)),
        };
        assert_eq!(check(&first, &after), [difference], "{group} is {value:?}");
    }
}

#[test]
fn h50_a_table_that_is_emptied_while_its_counter_is_read() {
    let all = map(&[("0", "2"), ("1", "2"), ("2", "2")]);
    let without = map(&[("0", "2"), ("2", "2")]);
    for (before, after, differences) in [
        (&all, map(&[("5", "1")]), 0),
        (&all, map(&[("1", "1")]), 2),
        // One that is not there when it would be read, and is there when it should not.
        (&without, map(&[("1", "2"), ("5", "1")]), 1),
    ] {
        let rig = Rig::new();
        fill(&rig);
        let mut store = Store::new(rig.checkpoint(), before.clone());
        store.between = Some(Box::new(|| {
            rig.commit("TRUNCATE mails", |log, xid| log.truncate(xid));
            rig.commit("INSERT INTO mails VALUES (61, 5, 'inbox', false)", |log, xid| {
                log.insert(xid, &rig.row(61))
            });
            (rig.checkpoint(), after)
        }));
        let (verified, found) = rig.verify(|verifier| verifier.counter(&unread(&rig), &mut store));
        assert_eq!(
            (verified.unwrap().differences, found.len()),
            (differences, differences as usize),
            "{found:?}"
        );
    }
}
