use std::collections::HashMap;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;

use super::*;

fn config(text: &str, env: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let env: HashMap<String, String> =
        env.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
    Config::parse(text, &|name| env.get(name).cloned())
}

fn summary(text: &str, env: &[(&str, &str)]) -> String {
    let config = match config(text, env) {
        Ok(config) => config,
        Err(error) => return format!("error: {error}"),
    };
    let one = |t: &Target| {
        let password = t.password.as_ref().map_or("-", Password::reveal);
        format!("{t} {} {} {password} {:?}", t.user, t.database, t.ssl.mode)
    };
    config.targets().iter().map(one).collect::<Vec<_>>().join("; ")
}

#[test]
fn the_string_outranks_the_environment() {
    let env = [("PGHOST", "envhost"), ("PGPORT", "7"), ("PGUSER", "envuser"), ("PGDATABASE", "envdb")];
    assert_eq!(summary("postgres://me:pw@h:1/db", &env), "h:1 me db pw Prefer");
    assert_eq!(summary("postgres://h", &env), "h:7 envuser envdb - Prefer");
    assert_eq!(summary("", &env), "envhost:7 envuser envdb - Prefer");
    assert_eq!(summary("host=a,b port=1,2 user=u", &[]), "a:1 u u - Prefer; b:2 u u - Prefer");
    assert_eq!(
        summary("host=a,/tmp user=u sslmode=require", &[]),
        "a:5432 u u - Require; /tmp/.s.PGSQL.5432 u u - Disable"
    );
    assert_eq!(summary("host=h", &[("USER", "os"), ("PGPASSWORD", "x")]), "h:5432 os os x Prefer");
}

#[test]
fn encryption_is_as_libpq_has_it() {
    let base = "postgres://u@h/?sslrootcert=";
    assert_eq!(summary(&format!("{base}system"), &[]), "h:5432 u u - VerifyFull");
    assert_eq!(summary(&format!("{base}/ca.pem&sslmode=require"), &[]), "h:5432 u u - VerifyCa");
    assert_eq!(summary("postgres://u@h", &[("PGSSLMODE", "verify-full")]), "h:5432 u u - VerifyFull");
    assert_eq!(
        summary(&format!("{base}system&sslmode=require"), &[]),
        "error: `sslmode` cannot be `require`: expected verify-full with sslrootcert=system"
    );
}

#[test]
fn mistakes_are_named() {
    for (text, expected) in [
        ("postgres://u@h/?sslmod=require", "unknown connection keyword `sslmod`"),
        ("postgres://u@h:x/", "`port` cannot be `x`: expected a number from 1 to 65535"),
        ("host=a,b,c port=1,2 user=u", "`port` and `host` name different numbers of servers"),
        ("host=h", "no user is named: say user@ or set PGUSER"),
        (
            "host=h user=u channel_binding=no",
            "`channel_binding` cannot be `no`: expected disable, prefer or require",
        ),
    ] {
        assert_eq!(summary(text, &[]), format!("error: {expected}"), "{text}");
    }
}

#[test]
fn passwords_come_from_the_file_and_are_never_printed() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    writeln!(file, "h:*:db:me:sesame").unwrap();
    let path = file.path().to_str().unwrap();
    let text = "postgres://me@h/db";
    assert_eq!(summary(text, &[("PGPASSFILE", path)]), "h:5432 me db sesame Prefer");
    let printed = format!("{:?}", config(text, &[("PGPASSFILE", path)]).unwrap());
    assert!(!printed.contains("sesame") && printed.contains("…"), "{printed}");
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o644)).unwrap();
    assert_eq!(summary(text, &[("PGPASSFILE", path)]), "h:5432 me db - Prefer");
}
