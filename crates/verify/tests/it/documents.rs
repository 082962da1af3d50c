use std::collections::BTreeMap;

use change::{Datum, Op};
use serde_json::Value;

use crate::rig::{Rig, Store, index, now_ms, row, xid};

type Content = BTreeMap<String, String>;

/// The documents that the index must hold now, made by SQL.
fn documents(rig: &Rig) -> Content {
    let sql = "SELECT id::text, json_build_object('id', id, 'user_id', user_id, 'folder', folder, 'is_read', is_read,
        'at', to_char(at, 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'), 'day', to_char(day, 'YYYY-MM-DD\"Z\"'), 'body', body)
        FROM mails";
    let rows = rig.session.sql(sql);
    let text = |value: &Option<String>| value.clone().expect("no column is NULL");
    rows.into_iter().map(|row| (text(&row[0]), text(&row[1]))).collect()
}

fn fill(rig: &Rig, count: u64) {
    rig.commit(
        &format!(
            "INSERT INTO mails SELECT g, g % 3, 'a:b\\c', g % 2 = 0, g, '2026-02-01 10:00:00Z', '2026-02-01', 'body ' || g
             FROM generate_series(1, {count}) g"
        ),
        |_, _| (),
    );
}

fn datums(row: &[Option<String>]) -> Vec<Datum<'_>> {
    row.iter().map(|value| value.as_deref().map_or(Datum::Null, Datum::Text)).collect()
}

#[track_caller]
fn assert_equal(rig: &Rig, store: &mut Store<'_, Content>) -> u64 {
    let (verified, found) = rig.verify(|verifier| verifier.index(&index(rig), store));
    assert_eq!(found, []);
    verified.expect("it could be verified").checked
}

#[test]
fn equal_documents_are_equal_in_every_chunk() {
    let rig = Rig::new();
    let mut empty = Store::later(Content::new(), || (rig.checkpoint(), Content::new()));
    assert_eq!(assert_equal(&rig, &mut empty), 0);
    fill(&rig, 12_001);
    rig.session.sql("UPDATE mails SET folder = NULL, at = NULL, day = NULL, body = NULL WHERE id = 7");
    let mut store = Store::later(Content::new(), || {
        let mut at = rig.checkpoint();
        // Each chunk has a snapshot of its own, and so an LSN.
        at.lsn = change::Lsn(u64::MAX);
        (at, documents(&rig))
    });
    assert_eq!(assert_equal(&rig, &mut store), 12_001);
}

#[test]
fn each_kind_of_difference_is_found() {
    let rig = Rig::new();
    fill(&rig, 9);
    let mut store = Store::later(Content::new(), || {
        let mut content = documents(&rig);
        let wrong = content["1"].replace("body 1", "body 2").replace("\"user_id\" : 1", "\"user_id\" : null");
        content.insert("1".into(), wrong);
        let lacking = content["2"].replace("\"is_read\"", "\"other\"");
        content.insert("2".into(), lacking);
        content.remove("3");
        content.insert("77".into(), content["4"].replace("\"id\" : 4", "\"id\" : 77"));
        content.insert("x".into(), content["4"].replace("\"id\" : 4", "\"id\" : \"x\""));
        let mut at = rig.checkpoint();
        at.lsn = change::Lsn(u64::MAX);
        (at, content)
    });
    let (verified, found) = rig.verify(|verifier| verifier.index(&index(&rig), &mut store));
    let verified = verified.unwrap();
    assert_eq!((verified.checked, verified.differences), (11, 5));
    let shown: Vec<(&str, &Value, &Value)> =
        found.iter().map(|d| (d.key.as_str(), &d.source, &d.found)).collect();
    assert_eq!(shown[0].0, "1");
    assert_eq!(*shown[0].1, serde_json::json!({"user_id": "1", "body": "body 1"}));
    assert_eq!(*shown[0].2, serde_json::json!({"user_id": null, "body": "body 2"}));
    assert_eq!((shown[1].0, shown[1].1), ("2", &serde_json::json!({"is_read": "t"})));
    assert_eq!((shown[2].0, &shown[2].1["body"], shown[2].2), ("3", &"body 3".into(), &Value::Null));
    assert_eq!((shown[3].0, shown[3].1, &shown[3].2["id"]), ("77", &Value::Null, &77.into()));
    assert_eq!((shown[4].0, shown[4].1, &shown[4].2["id"]), ("x", &Value::Null, &"x".into()));
}

#[test]
fn h50_transactions_that_the_snapshot_did_not_see_are_applied_in_order() {
    let rig = Rig::new();
    fill(&rig, 9);
    let open = rig.postgres.session("postgres");
    let open_xid = xid(&open.sql("BEGIN; SELECT pg_current_xact_id()"));
    let deleted = rig.row(1);
    open.sql("DELETE FROM mails WHERE id = 1; UPDATE mails SET folder = 'x' WHERE id = 2");
    let mut stale = Content::new();
    let mut store = Store::later(Content::new(), || {
        stale = documents(&rig);
        open.sql("COMMIT");
        rig.log.delete(open_xid, &deleted);
        // The body was not sent: it is as the snapshot shows it.
        let new = row(&open, 2);
        let mut new = datums(&new);
        new[7] = Datum::Unchanged;
        rig.log.update(open_xid, None, &new);
        rig.commit("INSERT INTO mails VALUES (20, 1, 'new')", |log, xid| log.insert(xid, &rig.row(20)));
        rig.commit("UPDATE mails SET folder = 'y', body = 'z' WHERE id = 20", |log, xid| {
            log.update(xid, None, &datums(&rig.row(20)));
        });
        // And here it is as the change before left it.
        rig.commit("UPDATE mails SET folder = 'w' WHERE id = 20", |log, xid| {
            let new = rig.row(20);
            let mut new = datums(&new);
            new[7] = Datum::Unchanged;
            log.update(xid, None, &new);
        });
        let mut at = rig.checkpoint();
        at.lsn = change::Lsn(u64::MAX);
        (at, documents(&rig))
    });
    assert_eq!(assert_equal(&rig, &mut store), 9);
    drop(store);

    // An index that stands at the same place of the log but has not applied it differs.
    let mut store = Store::new(rig.checkpoint(), stale);
    store.at.lsn = change::Lsn(u64::MAX);
    let (verified, found) = rig.verify(|verifier| verifier.index(&index(&rig), &mut store));
    assert_eq!(verified.unwrap().differences, 3);
    assert_eq!(found.iter().map(|d| d.key.as_str()).collect::<Vec<_>>(), ["2", "20", "1"]);
}

#[test]
fn h32_a_value_from_under_another_key_is_looked_at_again() {
    let rig = Rig::new();
    fill(&rig, 3);
    let mut store = Store::later(Content::new(), || {
        let old = rig.row(2);
        rig.commit(
            "UPDATE mails SET id = 30 WHERE id = 2; UPDATE mails SET id = 2 WHERE id = 1",
            |log, xid| {
                let first = rig.row(2);
                log.delete(xid, &old);
                let key = |id: &str| {
                    change::TupleBuf::new(std::iter::once(Datum::Text(id)).chain([Datum::Null; 7]))
                };
                let moved = |id: &str, from: &str, row: &[Option<String>]| {
                    let mut new = datums(row);
                    new[7] = Datum::Unchanged;
                    let (new, from) = (change::TupleBuf::new(new), key(from));
                    assert_eq!(row[0].as_deref(), Some(id));
                    log.write_tuples(xid, now_ms(), Op::Create, None, Some(&new), Some(&from));
                };
                moved("30", "2", &rig.row(30));
                let mut before = first.clone();
                before[0] = Some("1".into());
                log.delete(xid, &before);
                moved("2", "1", &first);
            },
        );
        let mut at = rig.checkpoint();
        at.lsn = change::Lsn(u64::MAX);
        (at, documents(&rig))
    });
    assert_equal(&rig, &mut store);
}

#[test]
fn h50_a_truncate_after_the_snapshot_empties_the_index() {
    let rig = Rig::new();
    fill(&rig, 9);
    let mut store = Store::later(Content::new(), || {
        rig.commit("TRUNCATE mails; INSERT INTO mails VALUES (5, 5, 'again')", |log, xid| {
            log.truncate(xid);
            log.insert(xid, &rig.row(5));
        });
        let mut at = rig.checkpoint();
        at.lsn = change::Lsn(u64::MAX);
        (at, documents(&rig))
    });
    assert_equal(&rig, &mut store);
}

#[test]
fn an_index_that_is_not_ready_is_not_judged_even_when_the_table_is_empty() {
    let rig = Rig::new();
    let mut store = Store::new(rig.checkpoint(), Content::new());
    store.at.ready = false;
    store.at.lsn = change::Lsn(u64::MAX);
    let (verified, _) = rig.verify(|verifier| verifier.index(&index(&rig), &mut store));
    assert!(verified.unwrap_err().what.contains("being filled"));
}
