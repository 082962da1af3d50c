//! A connection to Redis, and what its errors mean.
//!
//! A time-out or a lost connection does not say whether a script ran: the connection is dropped, the worker reads
//! the checkpoints again, and a script that runs late finds them moved or moves them itself.

use std::fmt;
use std::time::Duration;

use change::Refusal;
use redis::{
    Client, Connection, ConnectionAddr, ConnectionInfo, ErrorKind, FromRedisValue, IntoConnectionInfo,
    RedisError,
};
use redis::{ScriptInvocation, ServerErrorKind, TlsCertificates};
use worker::SinkError;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// What the Redis user must be allowed, as an ACL rule, beside its keys: `~PREFIX*`, or with an empty prefix
/// `~millrace:*` and the counters' names.
pub const ACL_COMMANDS: &str = "+evalsha +script|load +type +exists +unlink +rename +get +set +hget +hset \
                                +hsetnx +hmget +hdel +hlen +hscan +hgetall +info +select";

/// How to reach Redis.
#[derive(Clone)]
pub struct Server {
    /// `redis://`, `rediss://` or `unix://`, with ACL user, password and database number where needed.
    pub url: String,
    /// PEM of the authorities that sign the server's certificate; default: the public ones.
    pub authorities: Option<Vec<u8>>,
    /// How long an answer may take before the connection is given up.
    pub response_timeout: Duration,
    /// Longest time that one script is meant to hold Redis. A commit that would take longer is written by several scripts,
    /// and the last of them makes all of it visible.
    pub longest_script: Duration,
}

/// Longest time of a script, where nothing else is asked for.
pub const LONGEST_SCRIPT: Duration = Duration::from_millis(40);

impl Server {
    /// A server with the default time-out, 20 s, which allows for other clients' long commands.
    pub fn new(url: impl Into<String>) -> Self {
        Server {
            url: url.into(),
            authorities: None,
            response_timeout: Duration::from_secs(20),
            longest_script: LONGEST_SCRIPT,
        }
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("response_timeout", &self.response_timeout).finish_non_exhaustive()
    }
}

/// One connection, made when it is needed and dropped when it is in doubt.
pub(crate) struct Link {
    client: Client,
    response_timeout: Duration,
    connection: Option<Connection>,
}

impl Link {
    /// Reads the settings; connects later.
    pub(crate) fn new(server: &Server) -> Result<Self, Refusal> {
        let refuse = |e: RedisError| {
            // The error's detail may quote the URL and so the password: only its category is shown.
            let what = format!("[redis] url or its authorities cannot be used: {}", e.category());
            Refusal::new(what, "write redis://USER:PASSWORD@HOST:PORT/DATABASE, rediss://… or unix:///PATH")
        };
        let info: ConnectionInfo = server.url.as_str().into_connection_info().map_err(refuse)?;
        if matches!(info.addr(), ConnectionAddr::TcpTls { .. }) {
            // The redis crate takes the process' provider and panics without one; an error means that there is one.
            let _ = rustls::crypto::ring::default_provider().install_default();
        }
        let tcp = info.tcp_settings().clone().set_nodelay(true);
        let info = info.set_tcp_settings(tcp);
        let client = match &server.authorities {
            None => Client::open(info),
            Some(pem) => {
                let certificates = TlsCertificates { client_tls: None, root_cert: Some(pem.clone()) };
                Client::build_with_tls(info, certificates)
            }
        };
        let client = client.map_err(refuse)?;
        Ok(Link { client, response_timeout: server.response_timeout, connection: None })
    }

    /// Runs a script.
    pub(crate) fn run<T: FromRedisValue>(&mut self, script: &ScriptInvocation<'_>) -> Result<T, SinkError> {
        self.with(|connection| script.invoke(connection))
    }

    /// Runs commands on the connection, a new one if need be.
    pub(crate) fn with<T>(
        &mut self,
        commands: impl FnOnce(&mut Connection) -> redis::RedisResult<T>,
    ) -> Result<T, SinkError> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.connect()?,
        };
        let outcome = commands(&mut connection);
        if !outcome.as_ref().is_err_and(doubtful) {
            self.connection = Some(connection);
        }
        outcome.map_err(|e| meaning(&e))
    }

    fn connect(&self) -> Result<Connection, SinkError> {
        let connect = || {
            let mut connection = self.client.get_connection_with_timeout(CONNECT_TIMEOUT)?;
            connection.set_read_timeout(Some(self.response_timeout))?;
            connection.set_write_timeout(Some(self.response_timeout))?;
            let info = redis::cmd("INFO").query::<String>(&mut connection);
            Ok((connection, info))
        };
        let (connection, info) = connect().map_err(|e: RedisError| meaning(&e))?;
        match info {
            Ok(info) => suitable(&info)?,
            Err(e) if e.kind() == ErrorKind::Server(ServerErrorKind::NoPerm) => {
                tracing::warn!("Redis does not permit INFO: that it never evicts keys could not be checked");
            }
            Err(e) => return Err(meaning(&e)),
        }
        Ok(connection)
    }
}

/// Whether the connection cannot be used again: an answer may still be on its way, or the server is a primary no more.
fn doubtful(error: &RedisError) -> bool {
    match error.kind() {
        ErrorKind::Server(ServerErrorKind::ReadOnly) => true,
        ErrorKind::Server(_) | ErrorKind::Extension => false,
        _ => true,
    }
}

fn meaning(error: &RedisError) -> SinkError {
    let refuse = |what: String, remedy: &str| SinkError::Refused(Refusal::new(what, remedy));
    let denied = error.code() == Some("NOPERM") || error.detail().is_some_and(|d| d.contains("ACL failure"));
    match error.kind() {
        _ if denied => refuse(format!("Redis denies a command or key: {error}"), &grant()),
        ErrorKind::AuthenticationFailed => {
            refuse(format!("Redis refuses the login: {error}"), "correct user and password in [redis] url")
        }
        ErrorKind::Server(ServerErrorKind::Moved | ServerErrorKind::Ask | ServerErrorKind::CrossSlot) => {
            clustered()
        }
        _ if matches!(error.code(), Some("NOAUTH" | "WRONGPASS")) => {
            refuse(format!("Redis refuses the login: {error}"), "correct user and password in [redis] url")
        }
        _ => SinkError::Unavailable(format!("Redis: {error}")),
    }
}

/// A permission that the scripts found missing.
pub(crate) fn missing_permission(what: &str) -> SinkError {
    let what = format!("the Redis user may not run `{what}`");
    SinkError::Refused(Refusal::new(what, grant()))
}

fn grant() -> String {
    format!("redis-cli ACL SETUSER USER '~PREFIX*' {ACL_COMMANDS}")
}

fn clustered() -> SinkError {
    SinkError::Refused(Refusal::new(
        "Redis runs in cluster mode, where counters cannot move together in one script",
        "point [redis] url at a Redis that is not a cluster",
    ))
}

/// Refuses a server that would lose keys by itself or cannot do what the scripts need.
fn suitable(info: &str) -> Result<(), SinkError> {
    let field = |name: &str| {
        info.lines()
            .find_map(|line| line.trim_end().strip_prefix(name)?.strip_prefix(':'))
            .unwrap_or_default()
    };
    if field("cluster_enabled") == "1" {
        return Err(clustered());
    }
    if field("loading") == "1" {
        return Err(SinkError::Unavailable("Redis is loading its data".to_owned()));
    }
    if field("role") == "slave" {
        let what = "Redis is a replica, which cannot be written: [redis] url must lead to the primary";
        return Err(SinkError::Unavailable(what.to_owned()));
    }
    let mut version = field("redis_version").split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (version.next().unwrap_or(0), version.next().unwrap_or(0));
    if version != (0, 0) && version < OLDEST {
        let what = format!("Redis {}.{} is too old", version.0, version.1);
        return Err(SinkError::Refused(Refusal::new(what, "upgrade Redis to 6.2 or newer")));
    }
    let policy = field("maxmemory_policy");
    if !policy.is_empty() && policy != "noeviction" {
        let what = format!("Redis would evict counters when memory is short: maxmemory-policy is {policy}");
        let remedy = "redis-cli CONFIG SET maxmemory-policy noeviction, and the same in redis.conf";
        return Err(SinkError::Refused(Refusal::new(what, remedy)));
    }
    Ok(())
}

/// The oldest version that is supported.
const OLDEST: (u32, u32) = (6, 2);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unsuitable_servers_are_told_apart() {
        let good = "redis_version:7.0.15\r\nloading:0\r\nrole:master\r\ncluster_enabled:0\r\nmaxmemory_policy:noeviction\r\n";
        assert!(suitable(good).is_ok());
        assert!(suitable("").is_ok(), "a server that tells nothing is not refused");
        for (from, to, refused) in [
            ("7.0.15", "6.0.9", true),
            ("cluster_enabled:0", "cluster_enabled:1", true),
            ("noeviction", "allkeys-lru", true),
            ("master", "slave", false),
            ("loading:0", "loading:1", false),
        ] {
            let error = suitable(&good.replace(from, to)).unwrap_err();
            assert_eq!(matches!(error, SinkError::Refused(_)), refused, "{to}: {error}");
        }
    }

    #[test]
    fn a_password_is_not_printed() {
        let server = Server::new("redis://user:secret@127.0.0.1:x/0");
        assert!(!format!("{server:?}").contains("secret"));
        let refusal = Link::new(&server).map(drop).unwrap_err();
        assert!(!refusal.to_string().contains("secret"), "{refusal}");
    }
}
