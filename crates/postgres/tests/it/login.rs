//! Every way in, on both kinds of connection.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use postgres::connection::ReplicationConnection;
use postgres::{Config, catalog};
use testkit::services::{Postgres, wait_until};

use crate::support::*;

/// Logs in both ways. The answers must agree.
fn log_in(text: &str) -> Result<(), String> {
    let config = Config::parse(text, &|_| None).map_err(|error| error.to_string())?;
    let runtime = runtime();
    let replication = runtime.block_on(async {
        let mut connection =
            ReplicationConnection::connect(&config).await.map_err(|error| error.to_string())?;
        connection.identify_system().await.map(drop).map_err(|error| error.to_string())
    });
    let sql: Result<(), String> = runtime.block_on(async {
        let client = catalog::connect(&config).await.map_err(|error| error.to_string())?;
        let row = client.query_one("SHOW TimeZone", &[]).await.map_err(|error| error.to_string())?;
        assert_eq!(row.get::<_, String>(0), "UTC");
        Ok(())
    });
    assert_eq!(replication.is_ok(), sql.is_ok(), "{text}: replication {replication:?}, SQL {sql:?}");
    replication
}

fn refused(text: &str, why: &str) {
    let error = log_in(text).unwrap_err();
    assert!(error.contains(why), "{text}: {error}");
}

#[test]
fn trust_passwords_and_sockets() {
    let server = Postgres::start();
    server.sql(
        "postgres",
        "SET password_encryption = 'md5'; CREATE ROLE m LOGIN REPLICATION PASSWORD 'p m';
         SET password_encryption = 'scram-sha-256'; CREATE ROLE s LOGIN REPLICATION PASSWORD 'p@s';
         CREATE ROLE c LOGIN REPLICATION PASSWORD 'clear'; CREATE ROLE weak LOGIN PASSWORD 'w'",
    );
    server.set_hba(
        "host all postgres all trust\nhost all m all md5\nhost all s all scram-sha-256\nhost all c all password\n\
         host all weak all scram-sha-256\nlocal all s scram-sha-256",
    );
    let at = format!("127.0.0.1:{}/postgres", server.port());
    log_in(&format!("postgres://postgres@{at}")).unwrap();
    log_in(&format!("postgres://m:p%20m@{at}")).unwrap();
    log_in(&format!("postgres://s:p%40s@{at}")).unwrap();
    log_in(&format!("postgres://c:clear@{at}")).unwrap();
    let dir = server.socket_dir().display();
    log_in(&format!("host={dir} port={} user=postgres dbname=postgres", server.port())).unwrap();
    log_in(&format!(
        "host={dir} port={} user=s password='p@s' dbname=postgres sslmode=require",
        server.port()
    ))
    .unwrap();
    // The second server answers when the first does not.
    log_in(&format!("postgres://postgres@127.0.0.1:1,{at}")).unwrap();

    refused(&format!("postgres://s:wrong@{at}"), "28P01");
    refused(&format!("postgres://s@{at}"), "password");
    refused(&format!("postgres://s:p%40s@{at}?channel_binding=require"), "");
    refused(&format!("postgres://postgres@{at}?channel_binding=require"), "channel");
    refused(&format!("postgres://postgres@{at}?sslmode=require"), "TLS");
    refused(&format!("postgres://nobody@127.0.0.1:{}/none", server.port()), "28000");
    let weak = Config::parse(&format!("postgres://weak:w@{at}"), &|_| None).unwrap();
    let error = runtime().block_on(ReplicationConnection::connect(&weak)).map(drop).unwrap_err();
    assert!(
        matches!(relay::SourceError::from(error), relay::SourceError::Refused(_)),
        "no REPLICATION attribute"
    );
}

fn openssl(dir: &Path, arguments: &str) {
    let output = Command::new("openssl").args(arguments.split(' ')).current_dir(dir).output().unwrap();
    assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// An authority, another one that signed nothing, and the server's certificate for `localhost`.
fn certificates(dir: &Path, key: &str, digest: &str) {
    let new_key = format!("-newkey {key} -nodes");
    for (authority, subject) in [("ca", "/CN=authority"), ("other", "/CN=stranger")] {
        openssl(
            dir,
            &format!(
                "req -x509 {new_key} -keyout {authority}.key -out {authority}.crt -days 9 -subj {subject}"
            ),
        );
    }
    fs::write(dir.join("names"), "subjectAltName=DNS:localhost\n").unwrap();
    openssl(dir, &format!("req {new_key} -keyout server.key -out server.csr -subj /CN=server"));
    openssl(
        dir,
        &format!(
            "x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 9 -{digest} -extfile names -out server.crt"
        ),
    );
}

/// Puts the certificate where the server reads it, and turns TLS on.
fn serve(server: &Postgres, dir: &Path) {
    let owner = fs::metadata(server.data_dir()).unwrap();
    for file in ["server.crt", "server.key"] {
        let to = server.data_dir().join(file);
        fs::copy(dir.join(file), &to).unwrap();
        fs::set_permissions(&to, PermissionsExt::from_mode(0o600)).unwrap();
        chown(&to, Some(owner.uid()), Some(owner.gid())).unwrap();
    }
    server.sql("postgres", "ALTER SYSTEM SET ssl = on");
    server.reload();
    wait_until("TLS", PATIENCE, || (server.value("postgres", "SHOW ssl") == "on").then_some(()));
}

#[test]
fn tls_is_checked_as_sslmode_says_and_scram_is_bound_to_it() {
    let dir = tempfile::tempdir().unwrap();
    let server = Postgres::start();
    server.sql("postgres", "CREATE ROLE s LOGIN REPLICATION PASSWORD 'p'");
    server.set_hba("hostssl all s all scram-sha-256\nhostnossl all postgres all trust");
    for (key, digest) in [("rsa:2048", "sha256"), ("ec -pkeyopt ec_paramgen_curve:P-256", "sha384")] {
        certificates(dir.path(), key, digest);
        serve(&server, dir.path());
        let url = |host: &str, rest: &str| format!("postgres://s:p@{host}:{}/postgres?{rest}", server.port());
        let root = |name: &str| -> String {
            let path: PathBuf = dir.path().join(name);
            format!("sslrootcert={}", path.display())
        };
        log_in(&url("localhost", "")).unwrap();
        log_in(&url("localhost", "sslmode=allow")).unwrap();
        log_in(&url("127.0.0.1", "sslmode=require&channel_binding=require")).unwrap();
        log_in(&url("127.0.0.1", "sslmode=require&channel_binding=disable")).unwrap();
        let ca = root("ca.crt");
        log_in(&url("localhost", &format!("sslmode=verify-full&{ca}&channel_binding=require"))).unwrap();
        log_in(&url("127.0.0.1", &format!("sslmode=verify-ca&{ca}"))).unwrap();
        // The server's own certificate, trusted by itself.
        log_in(&url("localhost", &format!("sslmode=verify-full&{}", root("server.crt")))).unwrap();

        refused(&url("127.0.0.1", &format!("sslmode=verify-full&{ca}")), "certificate");
        refused(&url("127.0.0.1", &format!("sslmode=verify-full&{}", root("server.crt"))), "certificate");
        refused(&url("localhost", &format!("sslmode=verify-ca&{}", root("other.crt"))), "certificate");
        refused(&url("localhost", &format!("sslmode=require&{}", root("other.crt"))), "certificate");
        refused(&url("localhost", "sslmode=verify-full"), "sslrootcert");
        refused(&url("localhost", "sslmode=verify-full&sslrootcert=system"), "certificate");
        refused(&url("localhost", &format!("sslmode=verify-ca&{}", root("missing.crt"))), "missing.crt");
        refused(&url("localhost", "sslmode=disable"), "28000");
    }
    // `prefer` and `allow` find the way in that there is.
    let plain = format!("postgres://postgres@localhost:{}/postgres", server.port());
    log_in(&plain).unwrap();
    log_in(&format!("{plain}?sslmode=allow")).unwrap();
    refused(&format!("{plain}?sslmode=require"), "28000");
}
