use std::thread;
use std::time::Duration;

use verify::{From, NotVerified, window};

use crate::rig::{Rig, Store, index, now_ms, xid};

#[test]
fn h50_the_window_reaches_back_to_the_oldest_transaction_that_holds_an_xid() {
    let rig = Rig::new();
    let source = rig.source_as("postgres");
    let before = now_ms();
    let since = |from: Result<From, NotVerified>| match from.unwrap() {
        From::Time(time) => time,
        other => panic!("{other:?}"),
    };
    assert!((before - 12_000..=now_ms()).contains(&since(window::open(&source))));

    let open = rig.postgres.session("postgres");
    xid(&open.sql("BEGIN; SELECT pg_current_xact_id()"));
    let began = now_ms();
    thread::sleep(Duration::from_millis(1500));
    assert!(since(window::open(&source)) <= began - 9_000, "the open transaction counts");
    open.sql("PREPARE TRANSACTION 'p'");
    thread::sleep(Duration::from_millis(1500));
    assert!(since(window::open(&source)) <= began + 1_500 - 8_000, "prepared, it still counts");
    rig.session.sql("COMMIT PREPARED 'p'");
    assert!(since(window::open(&source)) > began - 8_000, "gone");
}

#[test]
fn h50_transactions_that_hide_their_beginning_are_waited_for_or_the_whole_log_is_read() {
    let rig = Rig::new();
    rig.session.sql("CREATE ROLE bridge LOGIN; GRANT SELECT ON mails TO bridge");
    let source = rig.source_as("bridge");
    let open = rig.postgres.session("postgres");
    xid(&open.sql("BEGIN; SELECT pg_current_xact_id()"));
    assert_eq!(window::open(&source), Ok(From::Beginning));
    // One that ends soon does no harm.
    let ending = thread::spawn(move || {
        thread::sleep(Duration::from_millis(300));
        open.sql("COMMIT");
    });
    assert!(matches!(window::open(&source), Ok(From::Time(_))));
    ending.join().unwrap();
    // With the right to see it, no waiting.
    rig.session.sql("GRANT pg_read_all_stats TO bridge");
    rig.session.sql("BEGIN; SELECT pg_current_xact_id()");
    assert!(matches!(window::open(&source), Ok(From::Time(_))));
}

#[test]
fn records_that_retention_removed_are_an_error() {
    let rig = Rig::new();
    for id in 1..4 {
        rig.commit(&format!("INSERT INTO mails VALUES ({id})"), |log, xid| log.insert(xid, &rig.row(id)));
    }
    rig.log.remove_below(2);
    let mut store = Store::later(Default::default(), || (rig.checkpoint(), Default::default()));
    let (verified, _) = rig.verify(|verifier| verifier.index(&index(&rig), &mut store));
    assert!(verified.unwrap_err().what.contains("partly removed"));
}
