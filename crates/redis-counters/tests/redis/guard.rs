//! Servers and users that are not fit are refused, with the remedy, before anything is written.

use redis_counters::{ACL_COMMANDS as RULE, Bounds, CountersSink, Namespace, Server};
use testkit::services::{Redis, free_port};
use worker::{Sink, SinkError, Stored};

use crate::rig::{NAMES, Rig, definitions, everything, mail, run, sink, text};

fn user(redis: &Redis, rule: &str) -> String {
    run(redis, &format!("ACL SETUSER bridge reset on >secret {rule}"));
    redis.url().replace("redis://", "redis://bridge:secret@")
}

fn load(url: &str, prefix: &str) -> Result<Vec<Stored>, SinkError> {
    let mut rig = Rig::over(sink(url, Namespace::new(prefix, "p"), Bounds::default(), &NAMES));
    rig.load()
}

#[test]
fn the_documented_permissions_suffice() {
    let redis = Redis::start();
    let url = user(&redis, &format!("~app:* {RULE}"));
    let tiny = Bounds { script_groups: 1, ..Bounds::default() };
    let mut rig = Rig::over(sink(&url, Namespace::new("app:", "p"), tiny, &NAMES));
    rig.load().unwrap();
    let mails = [mail(1, 1, 1), mail(2, 2, 2), mail(3, 3, 3)];
    mails.iter().for_each(|mail| rig.insert(mail));
    rig.commit().unwrap();
    rig.delete(&mails[0]);
    rig.commit().unwrap();
    rig.sink.check().unwrap();
    // Without INFO only the check of the server is missing.
    load(&user(&redis, &format!("~app:* {RULE} -info")), "app:").unwrap();
}

#[test]
fn a_missing_permission_is_found_before_the_first_write() {
    let redis = Redis::start();
    let names = |keys: &str| format!("{keys} {RULE}");
    let rules = [
        names("~other:*"),
        names("~millrace:*"),
        names("~millrace:* ~unread ~sized ~bytes ~folders ~all ~all_sized %R~all_bytes"),
        names("~*") + " -hdel",
        names("~*") + " -rename",
        names("~*") + " -evalsha",
        "~* +@all -hset".to_owned(),
    ];
    for rule in rules {
        let error = load(&user(&redis, &rule), "").unwrap_err();
        let SinkError::Refused(refusal) = &error else { panic!("{rule}: {error}") };
        assert!(refusal.remedy.contains("ACL SETUSER"), "{refusal}");
        assert!(everything(&redis).is_empty(), "{rule}");
    }
    // Taken away while the worker runs.
    let url = user(&redis, &names("~*"));
    let mut rig = Rig::over(sink(&url, Namespace::new("", "p"), Bounds::default(), &NAMES));
    rig.load().unwrap();
    rig.insert(&mail(1, 1, 1));
    rig.commit().unwrap();
    let before = everything(&redis);
    run(&redis, "ACL SETUSER bridge -hdel");
    rig.delete(&mail(1, 1, 1));
    assert!(matches!(rig.commit(), Err(SinkError::Refused(_))));
    assert_eq!(everything(&redis), before);
}

#[test]
fn a_wrong_password_is_refused_and_not_printed() {
    let redis = Redis::start();
    let url = user(&redis, &format!("~* {RULE}")).replace("secret", "guessed");
    let error = load(&url, "").unwrap_err();
    assert!(matches!(error, SinkError::Refused(_)), "{error}");
    assert!(!error.to_string().contains("guessed"), "{error}");
}

#[test]
fn a_redis_that_evicts_or_shards_is_refused() {
    let evicting = Redis::start_with(&[("maxmemory-policy", "allkeys-lru")]);
    let sharded = Redis::start_with(&[("cluster-enabled", "yes")]);
    for (redis, remedy) in [(evicting, "maxmemory-policy noeviction"), (sharded, "not a cluster")] {
        let error = load(&redis.url(), "").unwrap_err();
        assert!(matches!(&error, SinkError::Refused(refusal) if refusal.remedy.contains(remedy)), "{error}");
    }
}

#[test]
fn a_replica_is_waited_for() {
    let primary = Redis::start();
    let replica = Redis::start_with(&[("replicaof", &format!("127.0.0.1 {}", primary.port()))]);
    let error = load(&replica.url(), "").unwrap_err();
    assert!(matches!(error, SinkError::Unavailable(_)), "{error}");
}

#[test]
fn rediss_trusts_the_authorities_it_is_given_and_no_others() {
    let directory = std::env::temp_dir().join(format!("millrace-tls-{}", free_port()));
    std::fs::create_dir_all(&directory).unwrap();
    let path = |name: &str| directory.join(name).display().to_string();
    let (key, certificate, port) = (path("key.pem"), path("certificate.pem"), free_port().to_string());
    let made = std::process::Command::new("openssl")
        .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"])
        .args(["-addext", "subjectAltName=DNS:localhost", "-keyout", &key, "-out", &certificate])
        .args(["-addext", "basicConstraints=critical,CA:FALSE"])
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let redis = Redis::start_with(&[
        ("tls-port", &port),
        ("tls-cert-file", &certificate),
        ("tls-key-file", &key),
        ("tls-ca-cert-file", &certificate),
        ("tls-auth-clients", "no"),
    ]);
    let mut server = Server::new(format!("rediss://localhost:{port}/0"));
    let stranger = server.clone();
    server.authorities = Some(std::fs::read(&certificate).unwrap());
    std::fs::remove_dir_all(&directory).unwrap();
    let over = |server: &Server| {
        let space = Namespace::new("", "p");
        CountersSink::new(server, space, Bounds::default(), definitions(&["all"])).unwrap()
    };
    let mut rig = Rig::over(over(&server));
    rig.load().unwrap();
    rig.insert(&mail(1, 1, 1));
    rig.commit().unwrap();
    assert_eq!(text(&redis, "all"), Some("1".into()));
    assert!(over(&stranger).load().is_err(), "no public authority signed it");
}
