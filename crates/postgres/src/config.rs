//! Where the server is and how to get in, as libpq users expect to say it.
//!
//! A connection string, the environment (`PGHOST`, ...), the password file and the certificate files of
//! `~/.postgresql` become a list of [`Target`]s once. Nothing re-reads the environment afterwards.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::conninfo::{self, Pairs};
use crate::passfile::{self, Account};

/// How long to wait for a connection when nothing else is said.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Idle time after which TCP asks whether the server still lives.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);

/// A keyword, and the environment variable that stands in for it.
const VARIABLES: &[(&str, &str)] = &[
    ("host", "PGHOST"),
    ("hostaddr", "PGHOSTADDR"),
    ("port", "PGPORT"),
    ("user", "PGUSER"),
    ("password", "PGPASSWORD"),
    ("passfile", "PGPASSFILE"),
    ("dbname", "PGDATABASE"),
    ("options", "PGOPTIONS"),
    ("application_name", "PGAPPNAME"),
    ("connect_timeout", "PGCONNECT_TIMEOUT"),
    ("channel_binding", "PGCHANNELBINDING"),
    ("sslmode", "PGSSLMODE"),
    ("sslnegotiation", "PGSSLNEGOTIATION"),
    ("sslrootcert", "PGSSLROOTCERT"),
    ("sslcert", "PGSSLCERT"),
    ("sslkey", "PGSSLKEY"),
];

/// Keywords without a variable; those that libpq knows and that change nothing here are accepted as well.
const OTHERS: &[&str] = &[
    "keepalives",
    "keepalives_idle",
    "keepalives_interval",
    "keepalives_count",
    "tcp_user_timeout",
    "target_session_attrs",
    "gssencmode",
    "client_encoding",
    "fallback_application_name",
    "load_balance_hosts",
];

/// What is wrong with a connection string or what it names.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ConfigError {
    /// The text has the wrong form.
    #[error("{0}")]
    Malformed(String),
    /// There is no such keyword.
    #[error("unknown connection keyword `{0}`")]
    UnknownKeyword(String),
    /// A keyword has a value that it cannot have.
    #[error("`{keyword}` cannot be `{value}`: expected {expected}")]
    Value {
        /// The keyword.
        keyword: &'static str,
        /// Its value.
        value: String,
        /// What it can be.
        expected: &'static str,
    },
    /// Certificates or keys cannot be used.
    #[error("TLS: {0}")]
    Tls(String),
}

/// Servers to try, in order. Several only stand for one primary that may move between them.
#[derive(Clone, Debug)]
pub struct Config {
    targets: Vec<Target>,
}

/// One server and an account on it.
#[derive(Clone, Debug)]
pub struct Target {
    /// Where it listens.
    pub host: Host,
    /// Its address, to save the look-up of its name.
    pub hostaddr: Option<IpAddr>,
    /// Its port, also in the name of its unix socket.
    pub port: u16,
    /// The role to log in as.
    pub user: String,
    /// Its password, from the string, the environment or the password file.
    pub password: Option<Password>,
    /// The database.
    pub database: String,
    /// What `pg_stat_activity` shows.
    pub application_name: String,
    /// Command-line options for the server's session, before Millrace's own.
    pub options: Option<String>,
    /// How long connecting may take.
    pub connect_timeout: Duration,
    /// Idle time before TCP keepalives; `None` turns them off.
    pub keepalive: Option<Duration>,
    /// Whether SCRAM must be, may be or must not be bound to the TLS channel.
    pub channel_binding: ChannelBinding,
    /// Encryption.
    pub ssl: Ssl,
}

/// Where a server listens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Host {
    /// A host name or an address.
    Tcp(String),
    /// The directory of a unix socket.
    Unix(PathBuf),
}

/// A secret that is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Password(String);

impl Password {
    /// The secret itself, for the server only.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("\"…\"")
    }
}

/// libpq's `channel_binding`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ChannelBinding {
    /// Never.
    Disable,
    /// Where both sides can.
    Prefer,
    /// Any other way to log in is refused.
    Require,
}

/// libpq's `sslmode`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum SslMode {
    /// Never encrypt.
    Disable,
    /// Encrypt if the server will not have it otherwise.
    Allow,
    /// Encrypt if the server can.
    Prefer,
    /// Encrypt, whoever the server is; with a root certificate the same as `VerifyCa`.
    Require,
    /// Encrypt, with a server whose certificate a trusted authority signed.
    VerifyCa,
    /// The same, and the certificate bears the host's name.
    VerifyFull,
}

/// Encryption of one connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ssl {
    /// How much of it.
    pub mode: SslMode,
    /// Whom to trust.
    pub root: RootCert,
    /// Our certificate and its key, where the server asks for one.
    pub client: Option<(PathBuf, PathBuf)>,
    /// Whether TLS begins without asking first (`sslnegotiation=direct`).
    pub direct: bool,
}

/// libpq's `sslrootcert`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RootCert {
    /// Nobody.
    None,
    /// The authorities in a PEM file.
    File(PathBuf),
    /// The authorities that the operating system trusts.
    System,
}

impl Config {
    /// Reads a connection string, filling gaps from the process's environment.
    pub fn from_env(text: &str) -> Result<Self, ConfigError> {
        Self::parse(text, &|name| std::env::var(name).ok())
    }

    /// Reads a connection string, filling gaps from `env`.
    pub fn parse(text: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<Self, ConfigError> {
        let pairs = conninfo::parse(text)?;
        let known = |keyword: &str| VARIABLES.iter().any(|(k, _)| *k == keyword) || OTHERS.contains(&keyword);
        if let Some((keyword, _)) = pairs.iter().find(|(keyword, _)| !known(keyword)) {
            return Err(ConfigError::UnknownKeyword(keyword.clone()));
        }
        Ok(Config { targets: targets(&Settings { pairs, env })? })
    }

    /// The servers to try, in order; at least one.
    pub fn targets(&self) -> &[Target] {
        &self.targets
    }

    /// Name of the database.
    pub fn database(&self) -> &str {
        self.targets.first().map_or("", |target| &target.database)
    }

    /// Name of the role.
    pub fn user(&self) -> &str {
        self.targets.first().map_or("", |target| &target.user)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Tcp(host) => write!(f, "{host}:{}", self.port),
            Host::Unix(dir) => write!(f, "{}", socket(dir, self.port).display()),
        }
    }
}

/// The file of a unix socket.
pub(crate) fn socket(dir: &Path, port: u16) -> PathBuf {
    dir.join(format!(".s.PGSQL.{port}"))
}

struct Settings<'a> {
    pairs: Pairs,
    env: &'a dyn Fn(&str) -> Option<String>,
}

impl Settings<'_> {
    /// A keyword's value, from the string, else from its variable; an empty one counts as absent.
    fn get(&self, keyword: &str) -> Option<String> {
        let said = self.pairs.iter().rev().find(|(k, _)| k == keyword).map(|(_, value)| value.clone());
        let variable =
            || VARIABLES.iter().find(|(k, _)| *k == keyword).and_then(|(_, name)| (self.env)(name));
        said.filter(|value| !value.is_empty()).or_else(|| variable().filter(|value| !value.is_empty()))
    }

    /// A keyword's value, as one of several.
    fn choice<T: Copy>(
        &self,
        keyword: &'static str,
        choices: &[(&str, T)],
        expected: &'static str,
    ) -> Result<Option<T>, ConfigError> {
        let Some(value) = self.get(keyword) else { return Ok(None) };
        match choices.iter().find(|(name, _)| *name == value) {
            Some((_, choice)) => Ok(Some(*choice)),
            None => Err(ConfigError::Value { keyword, value, expected }),
        }
    }

    fn seconds(&self, keyword: &'static str) -> Result<Option<u64>, ConfigError> {
        let Some(value) = self.get(keyword) else { return Ok(None) };
        let error = ConfigError::Value { keyword, value: value.clone(), expected: "a number of seconds" };
        value.parse().map(Some).map_err(|_| error)
    }

    /// A comma-separated list.
    fn list(&self, keyword: &str) -> Vec<String> {
        let text = self.get(keyword).unwrap_or_default();
        if text.is_empty() { Vec::new() } else { text.split(',').map(|s| s.trim().to_owned()).collect() }
    }

    /// A file that libpq looks for in the home directory when nothing is said.
    fn home_file(&self, name: &str) -> Option<PathBuf> {
        let home = (self.env)("HOME").filter(|home| !home.is_empty())?;
        Some(Path::new(&home).join(name)).filter(|path| path.exists())
    }
}

fn targets(settings: &Settings<'_>) -> Result<Vec<Target>, ConfigError> {
    let addresses = settings.list("hostaddr");
    let mut hosts = settings.list("host");
    if hosts.is_empty() {
        hosts = if addresses.is_empty() { vec![String::new()] } else { addresses.clone() };
    }
    if !addresses.is_empty() && addresses.len() != hosts.len() {
        return Err(ConfigError::Malformed("`hostaddr` and `host` name different numbers of servers".into()));
    }
    let ports = settings.list("port");
    if ports.len() > 1 && ports.len() != hosts.len() {
        return Err(ConfigError::Malformed("`port` and `host` name different numbers of servers".into()));
    }
    let account = account(settings)?;
    hosts
        .into_iter()
        .enumerate()
        .map(|(i, name)| {
            let port = ports.get(i).or(ports.first().filter(|_| ports.len() == 1)).map_or("", String::as_str);
            target(settings, &account, &name, addresses.get(i).map(String::as_str), port)
        })
        .collect()
}

/// What all servers have in common.
fn account(settings: &Settings<'_>) -> Result<Target, ConfigError> {
    let user = settings.get("user").or_else(|| (settings.env)("USER")).or_else(|| (settings.env)("LOGNAME"));
    let user =
        user.ok_or_else(|| ConfigError::Malformed("no user is named: say user@ or set PGUSER".into()))?;
    let binding = [
        ("disable", ChannelBinding::Disable),
        ("prefer", ChannelBinding::Prefer),
        ("require", ChannelBinding::Require),
    ];
    let keepalives = settings.choice("keepalives", &[("0", false), ("1", true)], "0 or 1")?.unwrap_or(true);
    let idle = settings.seconds("keepalives_idle")?.filter(|s| *s > 0).map(Duration::from_secs);
    let name = settings.get("application_name").or_else(|| settings.get("fallback_application_name"));
    Ok(Target {
        host: Host::Tcp(String::new()),
        hostaddr: None,
        port: 0,
        password: settings.get("password").map(Password),
        database: settings.get("dbname").unwrap_or_else(|| user.clone()),
        user,
        application_name: name.unwrap_or_else(|| "millrace".into()),
        options: settings.get("options"),
        connect_timeout: settings
            .seconds("connect_timeout")?
            .filter(|s| *s > 0)
            .map_or(CONNECT_TIMEOUT, Duration::from_secs),
        keepalive: keepalives.then(|| idle.unwrap_or(KEEPALIVE_IDLE)),
        channel_binding: settings
            .choice("channel_binding", &binding, "disable, prefer or require")?
            .unwrap_or(ChannelBinding::Prefer),
        ssl: ssl(settings)?,
    })
}

fn target(
    settings: &Settings<'_>,
    account: &Target,
    name: &str,
    address: Option<&str>,
    port: &str,
) -> Result<Target, ConfigError> {
    let mut target = account.clone();
    let default_dir = Path::new("/var/run/postgresql");
    target.host = match name {
        "" if default_dir.is_dir() => Host::Unix(default_dir.into()),
        "" => Host::Tcp("localhost".into()),
        path if path.starts_with('/') => Host::Unix(path.into()),
        name => Host::Tcp(name.into()),
    };
    let error =
        |keyword, value: &str, expected| ConfigError::Value { keyword, value: value.into(), expected };
    if let Some(address) = address {
        target.hostaddr = Some(address.parse().map_err(|_| error("hostaddr", address, "an IP address"))?);
    }
    target.port = match port {
        "" => 5432,
        text => text.parse().map_err(|_| error("port", text, "a number from 1 to 65535"))?,
    };
    if target.password.is_none() {
        target.password = password_from_file(settings, &target, default_dir);
    }
    if matches!(target.host, Host::Unix(_)) {
        // As in libpq: a unix socket is never encrypted.
        target.ssl.mode = SslMode::Disable;
    }
    Ok(target)
}

fn password_from_file(settings: &Settings<'_>, target: &Target, default_dir: &Path) -> Option<Password> {
    let file = settings.get("passfile").map(PathBuf::from).or_else(|| settings.home_file(".pgpass"))?;
    let host = match &target.host {
        Host::Tcp(host) => host.as_str(),
        Host::Unix(dir) if dir == default_dir => "localhost",
        Host::Unix(dir) => dir.to_str()?,
    };
    let account = Account { host, port: target.port, database: &target.database, user: &target.user };
    passfile::lookup(&file, account).map(Password)
}

fn ssl(settings: &Settings<'_>) -> Result<Ssl, ConfigError> {
    let modes = [
        ("disable", SslMode::Disable),
        ("allow", SslMode::Allow),
        ("prefer", SslMode::Prefer),
        ("require", SslMode::Require),
        ("verify-ca", SslMode::VerifyCa),
        ("verify-full", SslMode::VerifyFull),
    ];
    let expected = "disable, allow, prefer, require, verify-ca or verify-full";
    let said = settings.choice("sslmode", &modes, expected)?;
    let root = match settings.get("sslrootcert").as_deref() {
        Some("system") => RootCert::System,
        Some(file) => RootCert::File(file.into()),
        None => settings.home_file(".postgresql/root.crt").map_or(RootCert::None, RootCert::File),
    };
    let mut mode = said.unwrap_or(SslMode::Prefer);
    match root {
        // Anybody can have a certificate from a public authority: only the name tells.
        RootCert::System if said.is_some_and(|mode| mode < SslMode::VerifyFull) => {
            let value = settings.get("sslmode").unwrap_or_default();
            let expected = "verify-full with sslrootcert=system";
            return Err(ConfigError::Value { keyword: "sslmode", value, expected });
        }
        RootCert::System => mode = SslMode::VerifyFull,
        RootCert::File(_) if mode == SslMode::Require => mode = SslMode::VerifyCa,
        _ => {}
    }
    let certificate = settings.get("sslcert").map(PathBuf::from);
    let key = settings.get("sslkey").map(PathBuf::from);
    let certificate = certificate.or_else(|| settings.home_file(".postgresql/postgresql.crt"));
    let key = key.or_else(|| settings.home_file(".postgresql/postgresql.key"));
    let direct = settings
        .choice("sslnegotiation", &[("postgres", false), ("direct", true)], "postgres or direct")?
        .unwrap_or(false);
    if direct && mode < SslMode::Require {
        return Err(ConfigError::Malformed("sslnegotiation=direct needs sslmode=require or stronger".into()));
    }
    Ok(Ssl { mode, root, client: certificate.zip(key), direct })
}

#[cfg(test)]
mod tests;
