//! The replication connection: what tokio-postgres does not speak, on postgres-protocol.
//!
//! Connects, encrypts, logs in, runs the few commands of the replication protocol, and after START_REPLICATION
//! gives its socket away to [`crate::stream`]. At its border every error says which server it was and what the
//! server said, so that "the slot is in use", "the slot is gone" and "the network is gone" stay apart.
//!
//! <https://www.postgresql.org/docs/current/protocol-replication.html>

use std::future::Future;
use std::io;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use change::{Lsn, Timeline};
use fallible_iterator::FallibleIterator;
use postgres_protocol::message::backend::{DataRowBody, Message};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::runtime::Runtime;

use crate::authentication::Login;
use crate::config::{Config, Host, SslMode, Target, socket};
use crate::error::{ConnectionError, ServerError};
use crate::tls::Tls;

/// Settings that every session of Millrace has, so that a value's text depends on the value only and nothing times
/// out or is hidden silently.
pub(crate) const SESSION: &[(&str, &str)] = &[
    ("client_encoding", "UTF8"),
    ("TimeZone", "UTC"),
    ("DateStyle", "ISO"),
    ("IntervalStyle", "postgres"),
    ("extra_float_digits", "3"),
    ("bytea_output", "hex"),
    ("xmloption", "content"),
    ("statement_timeout", "0"),
    ("lock_timeout", "0"),
    ("idle_in_transaction_session_timeout", "0"),
    ("idle_session_timeout", "0"),
    ("row_security", "off"),
    ("standard_conforming_strings", "on"),
    ("synchronous_commit", "on"),
];

/// How long the server may take for an answer to a command.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Tag of CopyBothResponse, which postgres-protocol does not know.
const COPY_BOTH: u8 = b'W';

/// Longest message accepted before streaming; a timeline history is the longest there is.
const MAX_COMMAND_MESSAGE: usize = 16 << 20;

/// A socket of any kind.
pub(crate) trait Socket: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Socket for T {}

/// Rows of a command's answer as text.
type Rows = Vec<Vec<Option<Bytes>>>;

/// The session options as the startup message carries them: `-c name=value ...`, after the user's own.
pub(crate) fn session_options(target: &Target) -> String {
    let mut options = target.options.clone().unwrap_or_default();
    for (name, value) in SESSION {
        options.push_str(&format!(" -c {name}={value}"));
    }
    options
}

/// The ways to try, in order: whether to encrypt.
pub(crate) fn attempts(mode: SslMode) -> &'static [bool] {
    match mode {
        SslMode::Disable => &[false],
        SslMode::Allow => &[false, true],
        SslMode::Prefer => &[true, false],
        SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => &[true],
    }
}

/// A logged-in connection in replication mode, on the configured database.
pub struct ReplicationConnection {
    socket: Box<dyn Socket>,
    server: String,
    /// Received and not yet read.
    input: BytesMut,
    output: BytesMut,
}

impl ReplicationConnection {
    /// Connects to the first server that lets us in.
    pub async fn connect(config: &Config) -> Result<Self, ConnectionError> {
        let mut last = None;
        for target in config.targets() {
            match Self::connect_to(target).await {
                Ok(connection) => return Ok(connection),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| {
            let reason = "no server is named".to_owned();
            crate::config::ConfigError::Malformed(reason).into()
        }))
    }

    /// Connects to one server.
    pub async fn connect_to(target: &Target) -> Result<Self, ConnectionError> {
        let mut result = Err(crate::config::ConfigError::Malformed("no way to connect".into()).into());
        for encrypt in attempts(target.ssl.mode) {
            let attempt = bounded(target.connect_timeout, Self::attempt(target, *encrypt)).await;
            result = match attempt {
                Ok(result) => result,
                Err(error) => Err(ConnectionError::Io { server: target.to_string(), error }),
            };
            if result.is_ok() {
                break;
            }
        }
        result
    }

    async fn attempt(target: &Target, encrypt: bool) -> Result<Self, ConnectionError> {
        let server = target.to_string();
        let failed = |error| ConnectionError::Io { server: server.clone(), error };
        let (socket, end_point): (Box<dyn Socket>, _) = match &target.host {
            Host::Unix(dir) => {
                let stream = UnixStream::connect(socket(dir, target.port)).await.map_err(failed)?;
                (Box::new(stream), None)
            }
            Host::Tcp(host) => {
                let mut stream = tcp(target, host).await.map_err(failed)?;
                if encrypt && offers_tls(target, &mut stream).await.map_err(failed)? {
                    let stream = Tls::new(&target.ssl)?.handshake(host, stream).await.map_err(failed)?;
                    let end_point = stream.server_end_point();
                    (Box::new(stream), end_point)
                } else {
                    (Box::new(stream), None)
                }
            }
        };
        let mut connection = ReplicationConnection {
            socket,
            server: server.clone(),
            input: BytesMut::new(),
            output: BytesMut::new(),
        };
        connection.log_in(target, end_point).await?;
        Ok(connection)
    }

    async fn log_in(&mut self, target: &Target, end_point: Option<Vec<u8>>) -> Result<(), ConnectionError> {
        let options = session_options(target);
        let parameters = [
            ("user", target.user.as_str()),
            ("database", &target.database),
            ("replication", "database"),
            ("application_name", &target.application_name),
            ("options", &options),
        ];
        frontend::startup_message(parameters, &mut self.output).map_err(|error| self.io(error))?;
        self.flush().await?;
        let mut login = Login::new(target, end_point);
        loop {
            match self.receive().await? {
                Message::ReadyForQuery(_) => return Ok(()),
                Message::ParameterStatus(_) | Message::BackendKeyData(_) => {}
                message => {
                    let answered = login.answer(message, &mut self.output);
                    answered.map_err(|reason| ConnectionError::Authentication {
                        server: self.server.clone(),
                        reason,
                    })?;
                    self.flush().await?;
                }
            }
        }
    }

    /// Who the server is, and its WAL's flush position.
    pub async fn identify_system(&mut self) -> Result<(Timeline, Lsn), ConnectionError> {
        let rows = self.command("IDENTIFY_SYSTEM").await?;
        let field = |i: usize| text(rows.first().and_then(|row| row.get(i)));
        let parsed = (field(0), field(1).and_then(|t| t.parse().ok()), field(2).and_then(|t| t.parse().ok()));
        match parsed {
            (Some(system_id), Some(timeline), Some(lsn)) => {
                Ok((Timeline { system_id: system_id.to_owned(), timeline }, lsn))
            }
            _ => Err(self.misunderstood("IDENTIFY_SYSTEM gave no system id, timeline and position")),
        }
    }

    /// The LSN at which `timeline` (which the server must know) left its ancestor `ancestor`; `None` when that
    /// is not one of its ancestors.
    pub async fn switch_point(
        &mut self,
        timeline: u32,
        ancestor: u32,
    ) -> Result<Option<Lsn>, ConnectionError> {
        if ancestor >= timeline {
            return Ok(None);
        }
        let rows = self.command(&format!("TIMELINE_HISTORY {timeline}")).await?;
        let history = text(rows.first().and_then(|row| row.get(1)));
        let history = history.ok_or_else(|| self.misunderstood("TIMELINE_HISTORY gave no history"))?;
        switch_point(history, ancestor)
            .map_err(|line| self.misunderstood(&format!("timeline history: `{line}`")))
    }

    /// How long the server waits for a sign of life; `None` for ever.
    pub async fn wal_sender_timeout(&mut self) -> Result<Option<Duration>, ConnectionError> {
        let query = "SELECT setting::bigint FROM pg_catalog.pg_settings WHERE name = 'wal_sender_timeout'";
        let rows = self.command(query).await?;
        let millis = text(rows.first().and_then(|row| row.first())).and_then(|text| text.parse().ok());
        let millis: u64 = millis.ok_or_else(|| self.misunderstood("wal_sender_timeout is not a number"))?;
        Ok((millis > 0).then(|| Duration::from_millis(millis)))
    }

    /// Begins to stream `publication`'s changes from `slot`; the connection then belongs to the stream.
    pub(crate) async fn start_replication(
        mut self,
        slot: &str,
        publication: &str,
        from: Lsn,
    ) -> Result<Streaming, ConnectionError> {
        let publication = literal(&identifier(publication));
        let command = format!(
            "START_REPLICATION SLOT {} LOGICAL {from} (proto_version '1', publication_names {publication}, messages 'true')",
            identifier(slot)
        );
        frontend::query(&command, &mut self.output).map_err(|error| self.io(error))?;
        self.flush().await?;
        loop {
            self.fill_message().await?;
            if self.input.first() == Some(&COPY_BOTH) {
                let length = message_length(&self.input).unwrap_or(0);
                let _ = self.input.split_to(length);
                return Ok(Streaming { socket: self.socket, input: self.input, server: self.server });
            }
            match self.receive().await? {
                Message::NoticeResponse(_) | Message::ParameterStatus(_) => {}
                _ => return Err(self.misunderstood("START_REPLICATION was not answered by a copy")),
            }
        }
    }

    /// Runs one command and gives the rows it returns.
    pub(crate) async fn command(&mut self, command: &str) -> Result<Rows, ConnectionError> {
        frontend::query(command, &mut self.output).map_err(|error| self.io(error))?;
        self.flush().await?;
        let mut rows = Rows::new();
        let mut failure = None;
        loop {
            match self.receive_any().await? {
                Message::DataRow(row) => rows.push(columns(&row).map_err(|error| self.io(error))?),
                Message::ErrorResponse(body) => {
                    failure = Some(ServerError::read(body.fields()).map_err(|error| self.io(error))?);
                }
                Message::ReadyForQuery(_) => break,
                _ => {}
            }
        }
        match failure {
            Some(error) => Err(ConnectionError::Server { server: self.server.clone(), error }),
            None => Ok(rows),
        }
    }

    /// The next message; an error of the server is an error.
    async fn receive(&mut self) -> Result<Message, ConnectionError> {
        match self.receive_any().await? {
            Message::ErrorResponse(body) => {
                let error = ServerError::read(body.fields()).map_err(|error| self.io(error))?;
                Err(ConnectionError::Server { server: self.server.clone(), error })
            }
            message => Ok(message),
        }
    }

    async fn receive_any(&mut self) -> Result<Message, ConnectionError> {
        loop {
            self.fill_message().await?;
            let message = Message::parse(&mut self.input).map_err(|error| self.io(error))?;
            match message {
                Some(Message::NoticeResponse(body)) => {
                    let notice = ServerError::read(body.fields()).map_err(|error| self.io(error))?;
                    tracing::debug!(server = self.server, %notice, "notice");
                }
                Some(message) => return Ok(message),
                None => return Err(self.misunderstood("a message is incomplete")),
            }
        }
    }

    /// Reads until a whole message stands in the buffer.
    async fn fill_message(&mut self) -> Result<(), ConnectionError> {
        let read = async {
            loop {
                match message_length(&self.input) {
                    Some(length) if self.input.len() >= length => return Ok(()),
                    Some(length) if length > MAX_COMMAND_MESSAGE => {
                        return Err(io::Error::new(io::ErrorKind::InvalidData, "a message is too long"));
                    }
                    _ => {}
                }
                if self.socket.read_buf(&mut self.input).await? == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
        };
        let result = bounded(ANSWER_TIMEOUT, read).await.and_then(|result| result);
        result.map_err(|error| self.io(error))
    }

    async fn flush(&mut self) -> Result<(), ConnectionError> {
        let write = async {
            self.socket.write_all_buf(&mut self.output).await?;
            self.socket.flush().await
        };
        let result = write.await;
        result.map_err(|error| self.io(error))
    }

    fn io(&self, error: io::Error) -> ConnectionError {
        ConnectionError::Io { server: self.server.clone(), error }
    }

    fn misunderstood(&self, what: &str) -> ConnectionError {
        self.io(io::Error::new(io::ErrorKind::InvalidData, what.to_owned()))
    }
}

/// What drives a connection that has a thread of its own. While that thread sleeps, nothing that arrives wakes anybody,
/// which a runtime's driver does on another thread, for every few kilobytes.
pub(crate) fn runtime() -> io::Result<Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

/// A connection that streams: the socket, and what has been read of it.
pub(crate) struct Streaming {
    pub(crate) socket: Box<dyn Socket>,
    pub(crate) input: BytesMut,
    pub(crate) server: String,
}

async fn bounded<T>(limit: Duration, work: impl Future<Output = T>) -> io::Result<T> {
    tokio::time::timeout(limit, work).await.map_err(|_| {
        io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {} s", limit.as_secs()))
    })
}

async fn tcp(target: &Target, host: &str) -> io::Result<TcpStream> {
    let stream = match target.hostaddr {
        Some(address) => TcpStream::connect((address, target.port)).await?,
        None => TcpStream::connect((host, target.port)).await?,
    };
    stream.set_nodelay(true)?;
    if let Some(idle) = target.keepalive {
        let keepalive = socket2::TcpKeepalive::new().with_time(idle);
        socket2::SockRef::from(&stream).set_tcp_keepalive(&keepalive)?;
    }
    Ok(stream)
}

/// Asks for TLS. False when the server has none and we may do without.
async fn offers_tls(target: &Target, stream: &mut TcpStream) -> io::Result<bool> {
    if target.ssl.direct {
        return Ok(true);
    }
    let mut request = BytesMut::new();
    frontend::ssl_request(&mut request);
    stream.write_all(&request).await?;
    // One byte and no more: what follows it before the handshake would be somebody else's.
    match stream.read_u8().await? {
        b'S' => Ok(true),
        b'N' if target.ssl.mode < SslMode::Require => Ok(false),
        _ => Err(io::Error::other("the server does not offer TLS, and sslmode demands it")),
    }
}

/// Length of the first message with its tag, once its header has come.
fn message_length(input: &[u8]) -> Option<usize> {
    let length = input.get(1..)?.first_chunk::<4>()?;
    Some(1 + u32::from_be_bytes(*length) as usize)
}

fn columns(row: &DataRowBody) -> io::Result<Vec<Option<Bytes>>> {
    let buffer = row.buffer_bytes();
    row.ranges().map(|range| Ok(range.map(|range| buffer.slice(range)))).collect()
}

fn text(value: Option<&Option<Bytes>>) -> Option<&str> {
    std::str::from_utf8(value?.as_ref()?).ok()
}

/// Reads a history file: a line `timeline <tab> LSN <tab> reason` for each ancestor, the LSN being where it was left.
fn switch_point(history: &str, ancestor: u32) -> Result<Option<Lsn>, &str> {
    for line in history.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let mut words = line.split_whitespace();
        let timeline: u32 = words.next().and_then(|word| word.parse().ok()).ok_or(line)?;
        let lsn: Lsn = words.next().and_then(|word| word.parse().ok()).ok_or(line)?;
        if timeline == ancestor {
            return Ok(Some(lsn));
        }
    }
    Ok(None)
}

/// An SQL identifier, quoted.
pub(crate) fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// An SQL string, quoted.
fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h05_switch_points_are_read_from_the_history() {
        let history = "1\t0/3000148\tno recovery target specified\n\n2\t0/5000000\tbefore 2020-01-01\n";
        assert_eq!(switch_point(history, 1), Ok(Some(Lsn(0x300_0148))));
        assert_eq!(switch_point(history, 2), Ok(Some(Lsn(0x500_0000))));
        assert_eq!(switch_point(history, 3), Ok(None));
        assert_eq!(switch_point("one 0/1", 1), Err("one 0/1"));
    }
}
