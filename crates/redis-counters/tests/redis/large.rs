//! Commits of more groups than a script should write: Redis is never held for long, all of it shows at once, and whatever ends
//! one between two commands leaves a store that is right.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use change::Op;
use redis_counters::{Bounds, CountersSink, Namespace, Server};
use testkit::services::Redis;
use worker::{Sink, SinkError, Stored};

use crate::proxy::{Cut, Proxy};
use crate::rig::{Mail, Rig, definitions, everything, hash, mail, run, text};

const NAMES: [&str; 2] = ["bytes", "all"];
/// Whose keys are written: those that readers see, or those of the copies.
const KINDS: [Kind; 2] = [Kind::Shown, Kind::Copy];
const FEW: Bounds =
    Bounds { script_groups: 20, script_bytes: 1 << 20, held_groups: 400, held_bytes: 1 << 20 };

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Shown,
    Copy,
}

impl Kind {
    fn value(self, name: &str) -> String {
        match self {
            Kind::Shown => name.to_owned(),
            Kind::Copy => format!("millrace:p:{name}:copy:value"),
        }
    }

    /// With scripts that are as small as can be.
    fn rig(self, url: &str, bounds: Bounds) -> Rig {
        let mut server = Server::new(url);
        server.response_timeout = Duration::from_secs(5);
        server.longest_script = Duration::from_micros(1);
        let space = Namespace::new("", "p");
        let make = match self {
            Kind::Shown => CountersSink::new,
            Kind::Copy => CountersSink::of_copies,
        };
        Rig::over(make(&server, space, bounds, definitions(&NAMES)).unwrap())
    }

    /// The same, at the place where the stores are.
    fn loaded(self, url: &str, bounds: Bounds) -> Rig {
        let mut rig = self.rig(url, bounds);
        rig.load().unwrap();
        rig.offset = rig.at[0].next_offset;
        rig
    }
}

/// A mail for each of so many users.
fn mails(users: std::ops::Range<i64>, size: i64) -> Vec<Mail> {
    users.map(|user| mail(user, user, size)).collect()
}

fn filled(redis: &Redis, kind: Kind, users: i64) -> Rig {
    let mut rig = kind.rig(&redis.url(), FEW);
    rig.load().unwrap();
    mails(0..users, 1).iter().for_each(|mail| rig.insert(mail));
    rig.commit().unwrap();
    rig
}

/// Half of the users get another size, some lose their mail, some are new.
fn change(rig: &mut Rig) {
    for user in 0..150 {
        let (old, new) = (mail(user, user, 1), mail(user, user, 2));
        rig.change(Op::Update, Some(&old), Some(&new)).unwrap();
    }
    mails(150..200, 1).iter().for_each(|mail| rig.delete(mail));
    mails(1000..1050, 7).iter().for_each(|mail| rig.insert(mail));
}

fn changed() -> BTreeMap<String, String> {
    let of = |users: std::ops::Range<i64>, size: &str| {
        users.map(|user| (user.to_string(), size.to_owned())).collect::<Vec<_>>()
    };
    of(0..150, "2").into_iter().chain(of(200..300, "1")).chain(of(1000..1050, "7")).collect()
}

/// Keys that only a commit under way has.
fn left(redis: &Redis) -> Vec<String> {
    everything(redis).into_keys().filter(|key| key.contains(":staging")).collect()
}

#[test]
fn whatever_ends_a_large_commit_between_two_commands_leaves_a_store_that_is_right() {
    for kind in KINDS {
        let redis = Redis::start();
        filled(&redis, kind, 300);
        let before = everything(&redis);
        let mut ways = 0;
        for cut in [Cut::Before, Cut::After] {
            for number in 0.. {
                restore(&redis, &before);
                let proxy = Proxy::start(&redis, move |request| (request == number).then_some(cut));
                let mut rig = kind.rig(&proxy.url(), FEW);
                let outcome = rig.load().map(|_| {
                    rig.offset = rig.at[0].next_offset;
                    change(&mut rig);
                    rig.commit()
                });
                let whole = matches!(outcome, Ok(Ok(())));
                if whole && proxy.requests() <= number {
                    assert!(number > 30, "{kind:?}: {number} requests only");
                    break;
                }
                ways += 1;
                assert!(!whole, "{kind:?} {cut:?} {number}: {outcome:?}");
                goes_on(&redis, kind, &format!("{kind:?} {cut:?} {number}"));
            }
        }
        assert!(ways > 60, "{kind:?}: {ways}");
    }
}

/// A new worker finds either side of the transaction, whole, and goes on.
fn goes_on(redis: &Redis, kind: Kind, what: &str) {
    let mut rig = kind.rig(&redis.url(), FEW);
    let found = rig.load().unwrap();
    assert!(found.iter().all(|stored| matches!(stored, Stored::At(_))), "{what}: {found:?}");
    assert_eq!(left(redis), [""; 0], "{what}");
    rig.offset = rig.at[0].next_offset;
    if rig.offset == 301 {
        let shown = hash(redis, &kind.value("bytes"));
        assert!(shown.len() == 300 && shown.values().all(|size| size == "1"), "{what}: {shown:?}");
        change(&mut rig);
        rig.commit().unwrap();
    }
    assert_eq!(hash(redis, &kind.value("bytes")), changed(), "{what}");
    assert_eq!(text(redis, &kind.value("all")).as_deref(), Some("300"), "{what}");
    // Hidden counts are right as well: every group goes with its last row.
    for user in changed().keys() {
        let user = user.parse().unwrap();
        let size = if user < 150 {
            2
        } else if user < 300 {
            1
        } else {
            7
        };
        rig.delete(&mail(user, user, size));
    }
    rig.commit().unwrap();
    assert_eq!(hash(redis, &kind.value("bytes")).len(), 0, "{what}");
    assert_eq!(left(redis), [""; 0], "{what}");
}

fn restore(redis: &Redis, all: &BTreeMap<String, Vec<u8>>) {
    run(redis, "FLUSHALL");
    for (key, dump) in all {
        redis::cmd("RESTORE").arg(key).arg(0).arg(&dump[..]).exec(&mut redis.connect()).unwrap();
    }
}

#[test]
fn of_two_workers_the_one_that_is_late_changes_nothing() {
    for kind in KINDS {
        let redis = Redis::start();
        filled(&redis, kind, 300);
        let before = everything(&redis);
        for number in 2.. {
            restore(&redis, &before);
            // At this request of the first, the second commits another transaction.
            let url = redis.url();
            let proxy = Proxy::start(&redis, move |request| {
                if request == number {
                    let mut second = kind.rig(&url, FEW);
                    second.load().unwrap();
                    second.offset = second.at[0].next_offset + 1000;
                    mails(0..300, 1).iter().for_each(|mail| second.delete(mail));
                    mails(2000..2300, 5).iter().for_each(|mail| second.insert(mail));
                    second.commit().unwrap();
                }
                None
            });
            let mut rig = kind.loaded(&proxy.url(), FEW);
            change(&mut rig);
            let outcome = rig.commit();
            if proxy.requests() <= number {
                assert!(number > 30, "{kind:?}: {number} requests only");
                break;
            }
            let found = hash(&redis, &kind.value("bytes"));
            let second = found.len() == 300 && found.values().all(|size| size == "5");
            assert!(second, "{kind:?} {number}: {outcome:?}, {found:?}");
            assert!(matches!(outcome, Err(SinkError::Moved(_))), "{kind:?} {number}: {outcome:?}");
            rig.load().unwrap();
            assert_eq!(left(&redis), [""; 0], "{kind:?} {number}");
        }
    }
}

/// Users get another size; as many groups as before.
fn resize(rig: &mut Rig, users: std::ops::Range<i64>, size: i64) {
    for user in users {
        let (old, new) = (mail(user, user, 1), mail(user, user, size));
        rig.change(Op::Update, Some(&old), Some(&new)).unwrap();
    }
}

#[test]
fn of_two_workers_that_both_began_the_later_goes_on() {
    for kind in KINDS {
        let redis = Redis::start();
        filled(&redis, kind, 300);
        let before = everything(&redis);
        for number in 2.. {
            restore(&redis, &before);
            // At this request of the first, the second writes a part of another transaction early.
            let (url, later) = (redis.url(), Arc::new(Mutex::new(None)));
            let slot = later.clone();
            let proxy = Proxy::start(&redis, move |request| {
                if request == number {
                    let mut second = kind.loaded(&url, Bounds { held_groups: 40, ..FEW });
                    resize(&mut second, 100..200, 5);
                    *slot.lock().unwrap() = Some(second);
                }
                None
            });
            let mut first = kind.loaded(&proxy.url(), FEW);
            resize(&mut first, 0..150, 2);
            let outcome = first.commit();
            let Some(mut second) = later.lock().unwrap().take() else {
                assert!(number > 20 && outcome.is_ok(), "{kind:?}: {number} requests only, {outcome:?}");
                break;
            };
            let what = format!("{kind:?} {number}: {outcome:?}");
            let expected: fn(i64) -> &'static str = if outcome.is_ok() {
                // It began after the second, which finds that out.
                assert!(matches!(second.commit(), Err(SinkError::Moved(_))) && number < 10, "{what}");
                |user| if user < 150 { "2" } else { "1" }
            } else {
                assert!(matches!(outcome, Err(SinkError::Moved(_))), "{what}");
                resize(&mut second, 200..250, 5);
                second.commit().unwrap();
                |user| if (100..250).contains(&user) { "5" } else { "1" }
            };
            let expected = (0..300).map(|user| (user.to_string(), expected(user).to_owned())).collect();
            assert_eq!(hash(&redis, &kind.value("bytes")), expected, "{what}");
        }
    }
}

#[test]
fn a_transaction_of_any_size_is_held_in_bounded_memory() {
    for kind in KINDS {
        let redis = Redis::start();
        filled(&redis, kind, 300);
        let mut rig = kind.loaded(&redis.url(), Bounds { held_groups: 40, ..FEW });
        // Each user several times, in two rounds, so that what was written early is changed again.
        for size in [3, 4] {
            for user in 0..900 {
                rig.insert(&mail(user, user, size));
            }
        }
        let shown = hash(&redis, &Kind::Shown.value("bytes"));
        assert!(kind == Kind::Copy || shown.len() == 300 && shown.values().all(|size| size == "1"));
        assert!(!left(&redis).is_empty(), "nothing was written early");
        rig.sink.check().unwrap();
        rig.commit().unwrap();
        let expected = (0..900).map(|user| (user.to_string(), if user < 300 { "8" } else { "7" }.to_owned()));
        assert_eq!(hash(&redis, &kind.value("bytes")), expected.collect());
        assert_eq!(text(&redis, &kind.value("all")).as_deref(), Some("2100"));
        assert_eq!(left(&redis), [""; 0]);
        assert!(rig.load().unwrap().iter().all(|stored| matches!(stored, Stored::At(_))));
    }
}

#[test]
fn what_was_written_early_is_taken_back() {
    for kind in KINDS {
        let redis = Redis::start();
        filled(&redis, kind, 300);
        let before = everything(&redis);
        let mut rig = kind.loaded(&redis.url(), Bounds { held_groups: 40, ..FEW });
        mails(100..500, 9).iter().for_each(|mail| rig.insert(mail));
        mails(100..500, 9).iter().for_each(|mail| rig.insert(mail));
        assert!(!left(&redis).is_empty());
        rig.sink.discard();
        rig.load().unwrap();
        assert_eq!(contents(&redis), contents_of(&before), "{kind:?}");
        assert_eq!(left(&redis), [""; 0]);
        // A TRUNCATE in the middle.
        rig.offset = rig.at[0].next_offset;
        mails(100..500, 9).iter().for_each(|mail| rig.insert(mail));
        rig.change(Op::Truncate, None, None).unwrap();
        mails(400..600, 3).iter().for_each(|mail| rig.insert(mail));
        rig.commit().unwrap();
        let found = hash(&redis, &kind.value("bytes"));
        assert!(found.len() == 200 && found.values().all(|size| size == "3"), "{kind:?}: {found:?}");
        assert_eq!(text(&redis, &kind.value("all")).as_deref(), Some("200"));
        assert!(rig.load().unwrap().iter().all(|stored| matches!(stored, Stored::At(_))));
    }
}

/// Every hash, whatever the order in which Redis has its fields.
fn contents(redis: &Redis) -> BTreeMap<String, BTreeMap<String, String>> {
    let hashes =
        everything(redis).into_keys().filter(|key| !key.ends_with("all") && !key.ends_with("all:copy:value"));
    hashes.map(|key| (key.clone(), hash(redis, &key))).collect()
}

fn contents_of(dumps: &BTreeMap<String, Vec<u8>>) -> BTreeMap<String, BTreeMap<String, String>> {
    let redis = Redis::start();
    restore(&redis, dumps);
    contents(&redis)
}

/// The commands that Redis ran, each with the number of its arguments, those in scripts included.
fn commands(redis: &Redis) -> Vec<(String, usize)> {
    let entries: Vec<(i64, i64, i64, Vec<String>, String, String)> =
        redis::cmd("SLOWLOG").arg("GET").arg(-1).query(&mut redis.connect()).unwrap();
    let of = |(_, _, _, arguments, _, _): (i64, i64, i64, Vec<String>, String, String)| {
        // The log shows 32 arguments, the last one being `... (123 more arguments)`.
        let more = arguments
            .last()
            .and_then(|last| last.strip_prefix("... (")?.split(' ').next()?.parse::<usize>().ok());
        (arguments[0].to_uppercase(), arguments.len() + more.map_or(0, |more| more - 1))
    };
    entries.into_iter().map(of).collect()
}

#[test]
fn no_command_of_a_large_commit_has_to_do_with_all_groups() {
    const USERS: i64 = 5_000;
    for kind in KINDS {
        let redis = Redis::start_with(&[("slowlog-log-slower-than", "0"), ("slowlog-max-len", "100000")]);
        filled(&redis, kind, USERS);
        run(&redis, "SLOWLOG RESET");
        let mut rig = kind.loaded(&redis.url(), Bounds::default());
        mails(0..USERS, 2).iter().for_each(|mail| rig.insert(mail));
        rig.commit().unwrap();
        let commands = commands(&redis);
        assert_eq!(
            hash(&redis, &kind.value("bytes")).values().filter(|size| *size == "3").count(),
            USERS as usize
        );
        let scripts = commands.iter().filter(|(name, _)| name == "EVALSHA").count();
        assert!(scripts > 300, "{kind:?}: {scripts} scripts");
        // A piece of 50 fields has as many names and values, and what was before.
        let (name, most) = commands.iter().max_by_key(|(_, arguments)| arguments).unwrap();
        assert!(*most < 500, "{kind:?}: {name} with {most} arguments");
        for whole in ["COPY", "HGETALL", "HKEYS", "HVALS", "KEYS", "DEL", "DUMP"] {
            assert!(commands.iter().all(|(name, _)| name != whole), "{kind:?}: {whole}");
        }
    }
}
