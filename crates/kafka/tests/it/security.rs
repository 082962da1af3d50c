use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use kafka::{Connection, KafkaError, KafkaFeed, KafkaPublisher, Names, SetupWriter};
use relay::Publisher;
use testkit::services::Kafka;
use worker::Feed;

use crate::common::*;
use crate::feed::{read, until_assigned};

/// How long a login holds at this broker.
const LOGIN: Duration = Duration::from_secs(3);
/// Characters that SCRAM escapes, or that a list or Java's files would.
const USER: &str = "mill=race,1";
const PASSWORD: &str = "p=,s\u{e4}ge";

fn openssl(dir: &Path, arguments: &[&str]) {
    let output = Command::new("openssl").args(arguments).current_dir(dir).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// An authority, another one that signed nothing, the broker's certificate for `localhost`, and a client's, of which
/// the key has a password.
fn certificates(dir: &Path) {
    let new_key = ["-newkey", "rsa:2048"];
    for (authority, subject) in [("ca", "/CN=authority"), ("other", "/CN=stranger")] {
        let (key, certificate) = (format!("{authority}.key"), format!("{authority}.crt"));
        let own =
            ["req", "-x509", "-nodes", "-days", "9", "-subj", subject, "-keyout", &key, "-out", &certificate];
        openssl(dir, &[&own[..], &new_key].concat());
    }
    fs::write(dir.join("names"), "subjectAltName=DNS:localhost\n").unwrap();
    for (name, secret) in [("broker", &["-nodes"][..]), ("client", &["-passout", "pass:secret"])] {
        let (key, request) = (format!("{name}.key"), format!("{name}.csr"));
        let certificate = format!("{name}.crt");
        let own = ["req", "-subj", "/CN=anyone", "-keyout", &key, "-out", &request];
        openssl(dir, &[&own[..], &new_key, secret].concat());
        let signed =
            ["-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "names", "-days", "9"];
        openssl(dir, &[&["x509", "-req", "-in", &request, "-out", &certificate][..], &signed].concat());
    }
    let (own, secrets) = (
        ["-inkey", "client.key", "-in", "client.crt"],
        ["-passin", "pass:secret", "-passout", "pass:secret"],
    );
    openssl(dir, &[&["pkcs12", "-export", "-out", "client.p12"][..], &own, &secrets].concat());
    fs::create_dir_all(dir.join("authorities/none")).unwrap();
    fs::copy(dir.join("ca.crt"), dir.join("authorities/ca.crt")).unwrap();
    openssl(dir, &["rehash", "authorities"]);
    let store: String =
        ["broker.key", "broker.crt"].iter().map(|file| fs::read_to_string(dir.join(file)).unwrap()).collect();
    fs::write(dir.join("broker.pem"), store).unwrap();
}

fn properties(dir: &Path) -> String {
    certificates(dir);
    let at = dir.display();
    format!(
        "ssl.keystore.type=PEM\n\
         ssl.keystore.location={at}/broker.pem\n\
         ssl.truststore.type=PEM\n\
         ssl.truststore.location={at}/ca.crt\n\
         listener.name.ssl.ssl.client.auth=required\n\
         sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512\n\
         listener.name.sasl_ssl.connections.max.reauth.ms={}\n\
         listener.name.sasl_ssl.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule \
         required user_plain=\"{PASSWORD}\";\n\
         listener.name.sasl_ssl.scram-sha-256.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule \
         required;\n\
         listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule \
         required;\n",
        LOGIN.as_millis()
    )
    .escape_unicode_for_java()
}

/// Java reads its properties as Latin-1.
trait Java {
    fn escape_unicode_for_java(self) -> String;
}

impl Java for String {
    fn escape_unicode_for_java(self) -> String {
        self.chars()
            .map(
                |char| if char.is_ascii() { char.to_string() } else { format!("\\u{:04x}", u32::from(char)) },
            )
            .collect()
    }
}

/// One story, as a broker of one's own costs seconds.
#[test]
fn the_log_is_written_and_fed_over_tls_and_with_a_login() {
    let broker = Kafka::secured(&["SSL", "SASL_SSL"], properties);
    let (_, names) = pipeline(&broker, "secured");
    for mechanism in ["SCRAM-SHA-256", "SCRAM-SHA-512"] {
        broker.tool(
            "kafka.admin.ConfigCommand",
            &[
                "--bootstrap-server",
                &broker.bootstrap(),
                "--alter",
                "--entity-type",
                "users",
                "--entity-name",
                USER,
                "--add-config",
                &format!("{mechanism}=[iterations=4096,password={PASSWORD}]"),
            ],
        );
    }
    let file = |name: &str| broker.directory().join(name).display().to_string();
    let (ca, certificate, key) = (file("ca.crt"), file("client.crt"), file("client.key"));
    let tls = broker.listener("localhost", "SSL");
    let certified = |more: &[(&str, &str)]| {
        let all = [
            ("security.protocol", "ssl"),
            ("ssl.ca.location", &*ca),
            ("ssl.certificate.location", &certificate),
            ("ssl.key.location", &key),
            ("ssl.key.password", "secret"),
        ];
        connection(&tls, &[&all[..], more].concat())
    };
    let login = broker.listener("localhost", "SASL_SSL");
    let logged_in = |mechanism: &str, user: &str, password: &str| {
        let all = [
            ("security.protocol", "SASL_SSL"),
            ("ssl.ca.location", &*ca),
            ("sasl.mechanism", mechanism),
            ("sasl.username", user),
            ("sasl.password", password),
        ];
        connection(&login, &all)
    };

    // The same in other forms.
    let text = |name: &str| fs::read_to_string(broker.directory().join(name)).unwrap();
    let (ca_pem, certificate_pem, key_pem) = (text("ca.crt"), text("client.crt"), text("client.key"));
    let (store, authorities) = (file("client.p12"), file("authorities"));
    let from_text = [
        ("security.protocol", "ssl"),
        ("ssl.ca.pem", &*ca_pem),
        ("ssl.certificate.pem", &certificate_pem),
        ("ssl.key.pem", &key_pem),
        ("ssl.key.password", "secret"),
        ("compression.type", "none"),
    ];
    let from_store = [
        ("security.protocol", "ssl"),
        ("ssl.ca.location", &*authorities),
        ("ssl.keystore.location", &store),
        ("ssl.keystore.password", "secret"),
    ];

    let mut next = 0;
    let mut write = |publisher: &mut KafkaPublisher| {
        publisher.send(&rows(next, 10), 10).unwrap();
        publisher.commit(&[], &mut progress(next + 10)).unwrap();
        next += 10;
        next
    };
    let mut outlived = false;
    let ways = [
        certified(&[]),
        connection(&tls, &from_text),
        connection(&tls, &from_store),
        logged_in("PLAIN", "plain", PASSWORD),
        logged_in("SCRAM-SHA-256", USER, PASSWORD),
        logged_in("SCRAM-SHA-512", USER, PASSWORD),
    ];
    for way in &ways {
        let mut publisher = KafkaPublisher::new(way.clone(), names.clone());
        publisher.open().unwrap();
        let mut feed = KafkaFeed::alone(way, &names).unwrap();
        until_assigned(&mut feed);
        feed.seek(0).unwrap();
        let mut written = write(&mut publisher);
        if way.bootstrap() == login && !std::mem::replace(&mut outlived, true) {
            // Past the end of the login: now and then, and after a silence.
            let start = Instant::now();
            while start.elapsed() < LOGIN {
                write(&mut publisher);
                sleep(Duration::from_millis(50));
            }
            sleep(LOGIN);
            written = write(&mut publisher);
        }
        assert_eq!(read(&mut feed, written as usize), positions(0..written));
    }
    assert_eq!(committed(&broker.bootstrap(), &names), positions(0..next));

    let other = file("other.crt");
    refused(&certified(&[("ssl.ca.location", &other)]), &names, "not trusted");
    let foreign_name = broker.listener("127.0.0.1", "SASL_SSL");
    let by_address = |more: &[(&str, &str)]| {
        let all = [
            ("security.protocol", "sasl_ssl"),
            ("ssl.ca.location", &*ca),
            ("sasl.mechanism", "PLAIN"),
            ("sasl.username", "plain"),
            ("sasl.password", PASSWORD),
        ];
        connection(&foreign_name, &[&all[..], more].concat())
    };
    refused(&by_address(&[]), &names, "not trusted");
    SetupWriter::open(&by_address(&[("ssl.endpoint.identification.algorithm", "none")]), &names).unwrap();
    refused(&logged_in("PLAIN", "plain", "wrong"), &names, "log in");
    refused(&logged_in("SCRAM-SHA-512", USER, "wrong"), &names, "log in");
}

fn refused(connection: &Connection, names: &Names, why: &str) {
    let start = Instant::now();
    let writer = kafka::write_generations(
        connection,
        names.pipeline(),
        &kafka::Generations::of(kafka::Generation::new(1)),
    );
    assert!(matches!(&writer, Err(KafkaError::Refused(refusal)) if refusal.what.contains(why)), "{writer:?}");
    assert!(start.elapsed() < Duration::from_secs(10), "refused after {:?}", start.elapsed());
}
