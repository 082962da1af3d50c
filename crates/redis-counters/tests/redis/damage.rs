//! What is not as it was left is found, and nothing is built on it.

use change::Lsn;
use redis_counters::{Bounds, Counters, Namespace, Server};
use testkit::services::Redis;
use worker::{Checkpoint, Sink, SinkError, Stored};

use crate::rig::{NAMES, Rig, everything, hash, mail, map, refusal, run, sink, text};

/// Counters with two mails in them.
fn filled(redis: &Redis, names: &[&str]) -> Rig {
    let mut rig = Rig::start(redis, names);
    rig.insert(&mail(1, 7, 5));
    rig.insert(&mail(2, 8, 3));
    rig.commit().unwrap();
    rig
}

#[test]
fn h41_a_wrong_type_anywhere_writes_nothing() {
    let keys = ["bytes", "millrace:p:bytes", "millrace:p:bytes:rows", "millrace:p:bytes:nonnull", "all"];
    let redis = Redis::start();
    for key in keys {
        run(&redis, "FLUSHALL");
        let mut rig = filled(&redis, &["unread", "bytes", "all"]);
        run(&redis, &format!("UNLINK {key}"));
        run(&redis, &format!("RPUSH {key} intruder"));
        let before = everything(&redis);
        rig.insert(&mail(3, 7, 1));
        let error = rig.commit().unwrap_err();
        assert!(matches!(error, SinkError::Moved(_)), "{key}: {error}");
        assert_eq!(everything(&redis), before, "{key}");
        assert!(matches!(rig.sink.check(), Err(SinkError::Moved(_))), "{key}");
    }
}

#[test]
fn h42_a_deleted_key_is_noticed_and_filled_again() {
    let redis = Redis::start();
    let mut rig = filled(&redis, &NAMES);
    // The owners' hash alone is no loss, and is made again.
    run(&redis, "UNLINK millrace:owners");
    assert!(matches!(rig.sink.check(), Err(SinkError::Moved(_))));
    assert!(rig.load().unwrap().iter().all(|stored| matches!(stored, Stored::At(_))));
    let whole = everything(&redis);

    for key in whole.keys().filter(|key| *key != "millrace:owners") {
        let mut rig = filled_from(&redis, &whole);
        run(&redis, &format!("UNLINK {key}"));
        assert!(matches!(rig.sink.check(), Err(SinkError::Moved(_))), "{key}");
        rig.insert(&mail(3, 9, 9));
        assert!(matches!(rig.commit(), Err(SinkError::Moved(_))), "{key}");
        let found = rig.load().unwrap();
        let damaged: Vec<usize> =
            (0..found.len()).filter(|place| matches!(found[*place], Stored::Damaged(_))).collect();
        let name = key.trim_start_matches("millrace:p:").split(':').next().unwrap();
        assert_eq!(damaged, [NAMES.iter().position(|known| *known == name).unwrap()], "{key}: {found:?}");
        assert_eq!(rig.at[damaged[0]].next_offset, 1);
    }
}

/// Puts back every key and loads.
fn filled_from(redis: &Redis, whole: &std::collections::BTreeMap<String, Vec<u8>>) -> Rig {
    run(redis, "FLUSHALL");
    for (key, dump) in whole {
        redis::cmd("RESTORE").arg(key).arg(0).arg(&dump[..]).exec(&mut redis.connect()).unwrap();
    }
    Rig::start(redis, &NAMES)
}

#[test]
fn h42_a_lost_or_added_group_is_noticed() {
    let redis = Redis::start();
    let mut rig = filled(&redis, &["bytes"]);
    for command in ["HDEL bytes 7", "HSET bytes 99 1"] {
        run(&redis, command);
        assert!(matches!(rig.sink.check(), Err(SinkError::Moved(_))), "{command}");
        assert!(matches!(rig.load().unwrap()[..], [Stored::Damaged(_)]), "{command}");
        assert!(hash(&redis, "bytes").is_empty());
    }
}

#[test]
fn an_emptied_redis_is_empty() {
    let redis = Redis::start();
    let mut rig = filled(&redis, &NAMES);
    run(&redis, "FLUSHALL");
    assert!(matches!(rig.sink.check(), Err(SinkError::Moved(_))));
    assert!(rig.load().unwrap().iter().all(|stored| *stored == Stored::Empty));
}

#[test]
fn rows_below_zero_mean_filling_again_and_then_refusal() {
    let redis = Redis::start();
    let mut rig = filled(&redis, &["unread", "all"]);
    // The log cannot have said this: the table was changed behind it, or Redis was.
    run(&redis, "HSET unread 7 0");
    let before = everything(&redis);
    rig.delete(&mail(1, 7, 5));
    assert!(matches!(rig.commit(), Err(SinkError::Moved(_))));
    assert_eq!(everything(&redis), before, "nothing of the other counter either");
    assert!(matches!(rig.load().unwrap()[..], [Stored::Damaged(_), Stored::At(_)]));
    assert!(hash(&redis, "unread").is_empty());
    // Once it is past that place, it may happen to Redis another time.
    rig.insert(&mail(1, 7, 5));
    rig.insert(&mail(2, 7, 5));
    rig.commit().unwrap();
    run(&redis, "HSET unread 7 1");
    rig.delete(&mail(1, 7, 5));
    rig.delete(&mail(2, 7, 5));
    assert!(matches!(rig.commit(), Err(SinkError::Moved(_))));
    assert!(matches!(rig.load().unwrap()[..], [Stored::Damaged(_), Stored::At(_)]));
    rig.offset = 1;
    // From the beginning the log says it again: now it is the log's fault.
    rig.delete(&mail(1, 7, 5));
    assert!(matches!(rig.commit(), Err(SinkError::Moved(_))));
    let found = rig.sink.load().unwrap();
    assert!(refusal(&found).remedy.contains("begin a new log"), "{found:?}");
    assert!(matches!(found[..], [Stored::Refused { at: Some(_), .. }, Stored::At(_)]));
}

#[test]
fn a_value_that_is_no_number_is_damage() {
    let redis = Redis::start();
    let mut rig = filled(&redis, &["bytes"]);
    run(&redis, "HSET bytes 7 many");
    rig.insert(&mail(3, 7, 1));
    assert!(matches!(rig.commit(), Err(SinkError::Moved(_))));
    assert!(matches!(rig.load().unwrap()[..], [Stored::Damaged(_)]));
}

#[test]
fn another_definition_is_another_store() {
    let redis = Redis::start();
    let mut rig = filled(&redis, &["unread"]);
    run(&redis, "HSET millrace:p:unread definition other");
    let [Stored::At(at)] = &rig.sink.load().unwrap()[..] else { panic!("it is whole as far as can be told") };
    assert_eq!(at.definition, "other");
}

#[test]
fn a_newer_format_is_refused() {
    let redis = Redis::start();
    let mut rig = filled(&redis, &["unread"]);
    run(&redis, "HSET millrace:p:unread format 2");
    let before = everything(&redis);
    assert!(refusal(&rig.sink.load().unwrap()).what.contains("has format 2"));
    assert_eq!(everything(&redis), before);
}

#[test]
fn what_is_not_ours_is_never_touched() {
    let redis = Redis::start();
    let foreign =
        ["SET unread theirs", "HSET unread 1 5", "SET millrace:p:unread x", "SET millrace:owners x"];
    for command in foreign {
        run(&redis, "FLUSHALL");
        run(&redis, command);
        let before = everything(&redis);
        let mut sink = sink(&redis.url(), Namespace::new("", "p"), Bounds::default(), &["unread", "all"]);
        assert!(refusal(&sink.load().unwrap()).remedy.contains("prefix"));
        assert_eq!(everything(&redis), before);
    }
}

#[test]
fn two_pipelines_do_not_share_a_counter() {
    let redis = Redis::start();
    let rig = filled(&redis, &["unread"]);
    let before = everything(&redis);
    let mut other = sink(&redis.url(), Namespace::new("", "q"), Bounds::default(), &["unread"]);
    assert!(refusal(&other.load().unwrap()).what.contains("pipeline `p`"));
    assert_eq!(everything(&redis), before);
    drop(rig);
}

#[test]
fn prefix_and_database_keep_pipelines_apart() {
    let redis = Redis::start();
    let mut plain = filled(&redis, &["unread"]);
    let mut prefixed =
        Rig::over(sink(&redis.url(), Namespace::new("app:", "p"), Bounds::default(), &["unread"]));
    let database = redis.url().replace("/0", "/3");
    let mut third = Rig::over(sink(&database, Namespace::new("", "p"), Bounds::default(), &["unread"]));
    let mut socket = redis.unix_url();
    socket.push_str("?db=4");
    let mut fourth = Rig::over(sink(&socket, Namespace::new("", "p"), Bounds::default(), &["unread"]));
    for rig in [&mut prefixed, &mut third, &mut fourth] {
        assert_eq!(rig.load().unwrap(), [Stored::Empty]);
        rig.insert(&mail(1, 1, 1));
        rig.commit().unwrap();
    }
    assert_eq!(hash(&redis, "app:unread"), map(&[("1", "1")]));
    assert_eq!(hash(&redis, "app:millrace:p:unread")["lsn"], "0/2");
    assert_eq!(hash(&redis, "unread"), map(&[("7", "1"), ("8", "1")]));
    plain.sink.check().unwrap();
    let mut connection = redis.connect();
    for database in ["3", "4"] {
        redis::cmd("SELECT").arg(database).exec(&mut connection).unwrap();
        let value: String = redis::cmd("HGET").arg("unread").arg("1").query(&mut connection).unwrap();
        assert_eq!(value, "1");
    }
}

#[test]
fn others_read_a_counter_with_its_checkpoint_and_drop_it() {
    let redis = Redis::start();
    let mut rig = filled(&redis, &NAMES);
    run(&redis, "SET theirs 1");
    let mut counters = Counters::new(&Server::new(redis.url()), Namespace::new("", "p")).unwrap();
    let part = counters.part("bytes", None).unwrap();
    assert_eq!((part.checkpoint.as_ref(), part.next), (Some(&rig.at[2]), None));
    assert_eq!(
        part.groups.into_iter().collect::<std::collections::BTreeMap<_, _>>(),
        map(&[("7", "5"), ("8", "3")])
    );
    assert_eq!(counters.part("all_bytes", None).unwrap().groups, [(String::new(), "8".to_owned())]);
    let groups = ["8", "9", ""].map(str::to_owned);
    let (checkpoint, values) = counters.groups("bytes", &groups).unwrap();
    assert_eq!((checkpoint, values), (Some(rig.at[2].clone()), vec![Some("3".to_owned()), None, None]));
    assert_eq!(counters.groups("all_bytes", &groups).unwrap().1, [None, None, Some("8".to_owned())]);
    assert_eq!(counters.checkpoints(&["all", "nothing"]).unwrap(), [Some(rig.at[4].clone()), None]);
    // Filling is visible.
    let beginning = rig.beginning(0);
    rig.sink.reset(0, &beginning).unwrap();
    assert!(!counters.checkpoints(&["unread"]).unwrap()[0].as_ref().unwrap().ready);
    assert_eq!(hash(&redis, "millrace:p:unread")["state"], "filling");

    assert_eq!(counters.owned().unwrap().len(), NAMES.len());
    let mut other = Counters::new(&Server::new(redis.url()), Namespace::new("", "q")).unwrap();
    assert_eq!(other.drop_counters(&NAMES).unwrap(), 0, "another pipeline's");
    assert_eq!(counters.drop_counters(&["unread", "nothing"]).unwrap(), 1);
    assert_eq!(counters.drop_counters(&NAMES).unwrap(), 6);
    assert_eq!(everything(&redis).into_keys().collect::<Vec<_>>(), ["theirs"]);
}

#[test]
fn only_lsn_and_readiness_move() {
    let redis = Redis::start();
    let mut rig = filled(&redis, &["unread", "all"]);
    let mut moves = rig.moves();
    for step in moves.iter_mut().flatten() {
        step.to = Checkpoint { lsn: Lsn(0x1A2B3C), ..step.from.clone() };
    }
    rig.sink.commit(&moves).unwrap();
    assert_eq!(hash(&redis, "millrace:p:unread")["lsn"], "0/1A2B3C");
    assert_eq!(text(&redis, "all"), Some("2".into()));
    rig.sink.check().unwrap();
}

#[test]
fn a_checkpoint_of_an_older_version_is_continued_and_names_its_last_record_then() {
    let redis = Redis::start();
    let mut rig = filled(&redis, &["unread", "all"]);
    let key = "millrace:p:unread";
    let last: Option<worker::LastRecord> = "7 0/1A2B3C:t:5 00000000deadbeef".parse().ok();
    let name = |rig: &mut Rig, last| {
        let mut moves = rig.moves();
        for step in moves.iter_mut().flatten() {
            step.to = Checkpoint { last, ..step.from.clone() };
        }
        rig.sink.commit(&moves).unwrap();
    };
    name(&mut rig, last);
    assert_eq!(hash(&redis, key)["last"], "7 0/1A2B3C:t:5 00000000deadbeef");
    // An older version writes all fields but this one.
    redis::cmd("HDEL").arg(key).arg("last").exec(&mut redis.connect()).unwrap();
    let found = rig.load().unwrap();
    assert!(matches!(&found[0], Stored::At(at) if at.last.is_none()), "{found:?}");
    assert!(matches!(&found[1], Stored::At(at) if at.last == last), "{found:?}");
    name(&mut rig, last);
    assert!(rig.load().unwrap().iter().all(|found| matches!(found, Stored::At(at) if at.last == last)));
    rig.sink.check().unwrap();
}
