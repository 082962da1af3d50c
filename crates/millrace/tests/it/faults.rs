//! Damage to the stores: each is detected and mended from the log, without anybody's help.

use std::fs;

use crate::harness::{Pipeline, Role, copy_directory, soon};
use crate::mailbox::{Traffic, fill_points};

/// A running pipeline with something in it.
fn filled() -> Pipeline {
    let mut pipeline = Pipeline::running();
    fill_points(&pipeline.postgres);
    let traffic = Traffic::start(&pipeline.postgres, 7, 2);
    soon("some traffic", || traffic.committed.load(std::sync::atomic::Ordering::Relaxed) > 100);
    traffic.stop();
    pipeline.assert_stores_equal();
    pipeline
}

fn write_more(pipeline: &Pipeline) {
    pipeline.postgres.sql(
        "app",
        "INSERT INTO emails SELECT g, 3, 'inbox', 's', 't', 'b', false, 1, now()::timestamptz(0) \
         FROM generate_series(5000, 5040) g",
    );
}

#[test]
fn damaged_stores_are_mended_from_the_log() {
    let mut pipeline = filled();

    eprintln!("one hash deleted, idle");
    let mut redis = pipeline.redis.connect();
    redis::cmd("DEL").arg("unread").exec(&mut redis).expect("DEL");
    pipeline.assert_stores_equal();

    eprintln!("one group deleted, then more traffic");
    redis::cmd("HDEL").arg("senders").arg("3:inbox").exec(&mut redis).expect("HDEL");
    write_more(&pipeline);
    pipeline.assert_stores_equal();

    eprintln!("everything deleted");
    redis::cmd("FLUSHALL").exec(&mut redis).expect("FLUSHALL");
    pipeline.assert_stores_equal();

    eprintln!("an old dump restored");
    let dump = pipeline.directory.path().join("dump");
    pipeline.redis.dump_to(&dump);
    pipeline.postgres.sql("app", "DELETE FROM emails WHERE id % 3 = 0; UPDATE emails SET folder = 'inbox'");
    pipeline.assert_stores_equal();
    pipeline.redis.kill();
    pipeline.redis.restore_from(&dump);
    pipeline.assert_stores_equal();

    eprintln!("the index's directory deleted while the service runs");
    fs::remove_dir_all(pipeline.search_directory().join("emails")).expect("our directory");
    pipeline.postgres.sql("app", "UPDATE emails SET subject = 'changed' WHERE id % 2 = 0");
    pipeline.assert_stores_equal();

    eprintln!("the index's directory replaced by an old copy");
    pipeline.kill(Role::Search);
    let copy = pipeline.directory.path().join("copy");
    copy_directory(&pipeline.search_directory(), &copy);
    pipeline.spawn(Role::Search);
    pipeline.postgres.sql("app", "UPDATE emails SET subject = 'again' WHERE id % 2 = 1");
    pipeline.assert_stores_equal();
    pipeline.kill(Role::Search);
    fs::remove_dir_all(pipeline.search_directory()).expect("our directory");
    copy_directory(&copy, &pipeline.search_directory());
    pipeline.spawn(Role::Search);
    pipeline.assert_stores_equal();

    eprintln!("the index's files damaged");
    pipeline.kill(Role::Search);
    fs::write(pipeline.search_directory().join("emails/meta.json"), "{}").expect("our directory");
    pipeline.spawn(Role::Search);
    pipeline.assert_stores_equal();
}
