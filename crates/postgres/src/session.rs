//! A session in Postgres' own protocol, for what tokio-postgres does not speak (replication) or gives row by row (COPY).
//!
//! Connects, encrypts, logs in, and runs commands whose answers are text. At its border every error says which server it
//! was and what the server said.
//!
//! <https://www.postgresql.org/docs/current/protocol-flow.html>

use std::future::Future;
use std::io;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use fallible_iterator::FallibleIterator;
use futures_util::FutureExt as _;
use postgres_protocol::message::backend::{DataRowBody, ErrorResponseBody, Message};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::runtime::Runtime;

use crate::authentication::Login;
use crate::config::{Host, SslMode, Target, socket};
use crate::error::{ConnectionError, ServerError};
use crate::tls::Tls;

/// Settings of every session of Millrace, whatever a database or a role presets: a value's text depends on the value
/// only, nothing times out or is hidden silently, and a name means what it means in `pg_catalog`. An object that
/// somebody made in `public` or in a temporary schema is never run with our rights.
pub(crate) const SESSION: &[(&str, &str)] = &[
    ("search_path", "pg_catalog,pg_temp"),
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
    ("default_transaction_read_only", "off"),
    ("default_transaction_isolation", "read committed"),
    ("default_transaction_deferrable", "off"),
    ("default_tablespace", ""),
    ("default_table_access_method", "heap"),
    ("local_preload_libraries", ""),
    ("exit_on_error", "off"),
    ("quote_all_identifiers", "off"),
    ("transform_null_equals", "off"),
    ("array_nulls", "on"),
    // Compiling a catalog query takes seconds, and running it milliseconds.
    ("jit", "off"),
    // So does planning one, where it is asked again and again.
    ("plan_cache_mode", "force_generic_plan"),
    ("lc_monetary", "C"),
];

/// Turns off what only newer servers have; naming it at the start of a session would keep older ones from connecting.
pub(crate) const NEWER_SETTINGS: &str = "SELECT pg_catalog.set_config('transaction_timeout', '0', false)
    WHERE pg_catalog.current_setting('transaction_timeout', true) IS NOT NULL";

/// How long the server may take for an answer to a command.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest message accepted before streaming; a timeline history is the longest there is.
const MAX_COMMAND_MESSAGE: usize = 16 << 20;

/// Longest message that Postgres can send: a row of at most 1 GiB of values, and headers.
const MAX_MESSAGE: usize = (2 << 30) - 1;

pub(crate) const COPY_DATA: u8 = b'd';

/// A read of fewer bytes leaves the receiver time to rest.
pub(crate) const SMALL_READ: usize = 64 << 10;

/// Rest between small reads under load.
pub(crate) const REST: Duration = Duration::from_millis(1);

/// A socket of any kind.
pub(crate) trait Socket: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Socket for T {}

/// Rows of a command's answer as text.
pub(crate) type Rows = Vec<Vec<Option<Bytes>>>;

/// The session options as the startup message carries them: `-c name=value ...`, after the user's own.
pub(crate) fn session_options(target: &Target) -> String {
    let mut options = target.options.clone().unwrap_or_default();
    for (name, value) in SESSION {
        options.push_str(&format!(" -c {name}={}", value.replace(' ', "\\ ")));
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

/// A logged-in session on the configured database.
pub(crate) struct Session {
    pub(crate) socket: Box<dyn Socket>,
    pub(crate) server: String,
    /// Received and not yet read.
    pub(crate) input: BytesMut,
    output: BytesMut,
    running: Running,
}

/// What names a session where its command is to be cancelled.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Running {
    process: i32,
    secret: i32,
    encrypt: bool,
}

impl Running {
    /// Has the server cancel what the session runs.
    pub(crate) async fn cancel(self, target: &Target) -> Result<(), ConnectionError> {
        let (mut socket, _) = open(target, self.encrypt).await?;
        let mut request = BytesMut::new();
        frontend::cancel_request(self.process, self.secret, &mut request);
        let cancelled = async {
            socket.write_all(&request).await?;
            socket.flush().await?;
            // The server closes it when it has taken the request.
            socket.read_buf(&mut request).await
        };
        let failed = |error| ConnectionError::Io { server: target.to_string(), error };
        cancelled.await.map(drop).map_err(failed)
    }
}

impl Session {
    /// On a socket over which nothing was said yet.
    pub(crate) fn new(socket: Box<dyn Socket>, server: String) -> Self {
        let (input, output) = (BytesMut::new(), BytesMut::new());
        Session { socket, server, input, output, running: Running::default() }
    }

    /// Connects to one server. A session for `replication` knows the commands of that as well.
    pub(crate) async fn connect(target: &Target, replication: bool) -> Result<Self, ConnectionError> {
        let mut result = Err(crate::config::ConfigError::Malformed("no way to connect".into()).into());
        for encrypt in attempts(target.ssl.mode) {
            let attempt = bounded(target.connect_timeout, Self::attempt(target, replication, *encrypt)).await;
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

    async fn attempt(target: &Target, replication: bool, encrypt: bool) -> Result<Self, ConnectionError> {
        let (socket, end_point) = open(target, encrypt).await?;
        let mut session = Session::new(socket, target.to_string());
        session.running.encrypt = encrypt;
        session.log_in(target, replication, end_point).await?;
        session.command(NEWER_SETTINGS).await?;
        Ok(session)
    }

    async fn log_in(
        &mut self,
        target: &Target,
        replication: bool,
        end_point: Option<Vec<u8>>,
    ) -> Result<(), ConnectionError> {
        let options = session_options(target);
        let parameters = [
            ("user", target.user.as_str()),
            ("database", &target.database),
            ("replication", if replication { "database" } else { "false" }),
            ("application_name", &target.application_name),
            ("options", &options),
        ];
        frontend::startup_message(parameters, &mut self.output).map_err(|error| self.io(error))?;
        self.flush().await?;
        let mut login = Login::new(target, end_point);
        loop {
            match self.receive().await? {
                Message::ReadyForQuery(_) => return Ok(()),
                Message::ParameterStatus(_) => {}
                Message::BackendKeyData(key) => {
                    self.running.process = key.process_id();
                    self.running.secret = key.secret_key();
                }
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

    /// What names this session to whoever cancels its command.
    pub(crate) fn running(&self) -> Running {
        self.running
    }

    /// Runs one command and gives the rows it returns.
    pub(crate) async fn command(&mut self, command: &str) -> Result<Rows, ConnectionError> {
        self.send_query(command).await?;
        let mut rows = Rows::new();
        let mut failure = None;
        loop {
            match self.receive_any().await? {
                Message::DataRow(row) => rows.push(columns(&row).map_err(|error| self.io(error))?),
                Message::ErrorResponse(body) => failure = Some(self.refused(&body)),
                Message::ReadyForQuery(_) => break,
                _ => {}
            }
        }
        failure.map_or(Ok(rows), Err)
    }

    /// Sends a query, whose answers are [received](Self::receive) one by one.
    pub(crate) async fn send_query(&mut self, query: &str) -> Result<(), ConnectionError> {
        frontend::query(query, &mut self.output).map_err(|error| self.io(error))?;
        self.flush().await
    }

    /// The next message; an error of the server is an error.
    pub(crate) async fn receive(&mut self) -> Result<Message, ConnectionError> {
        match self.receive_any().await? {
            Message::ErrorResponse(body) => Err(self.refused(&body)),
            message => Ok(message),
        }
    }

    async fn receive_any(&mut self) -> Result<Message, ConnectionError> {
        loop {
            if let Some(message) = self.receive_one().await? {
                return Ok(message);
            }
        }
    }

    /// The next message, whatever it is; `None` for a notice.
    pub(crate) async fn receive_one(&mut self) -> Result<Option<Message>, ConnectionError> {
        self.fill_message().await?;
        match Message::parse(&mut self.input).map_err(|error| self.io(error))? {
            Some(Message::NoticeResponse(body)) => {
                let notice = ServerError::read(body.fields()).map_err(|error| self.io(error))?;
                tracing::debug!(server = self.server, %notice, "notice");
                Ok(None)
            }
            Some(message) => Ok(Some(message)),
            None => Err(self.misunderstood("a message is incomplete")),
        }
    }

    /// What the server says is wrong.
    pub(crate) fn refused(&self, body: &ErrorResponseBody) -> ConnectionError {
        match ServerError::read(body.fields()) {
            Ok(error) => ConnectionError::Server { server: self.server.clone(), error },
            Err(error) => self.io(error),
        }
    }

    /// Reads until a whole message stands in the buffer.
    pub(crate) async fn fill_message(&mut self) -> Result<(), ConnectionError> {
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

    pub(crate) fn io(&self, error: io::Error) -> ConnectionError {
        ConnectionError::Io { server: self.server.clone(), error }
    }

    pub(crate) fn misunderstood(&self, what: &str) -> ConnectionError {
        self.io(io::Error::new(io::ErrorKind::InvalidData, what.to_owned()))
    }
}

/// What drives a connection that has a thread of its own. While that thread sleeps, nothing that arrives wakes anybody,
/// which a runtime's driver does on another thread, for every few kilobytes.
pub(crate) fn runtime() -> io::Result<Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

/// Reads what has come, waiting for the first of it. TLS gives one record at a time, of a few kilobytes: who sleeps between
/// two reads must have taken all that there are.
pub(crate) async fn read_available(socket: &mut dyn Socket, input: &mut BytesMut) -> io::Result<usize> {
    let mut count = socket.read_buf(input).await?;
    if count == 0 {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the connection"));
    }
    while input.len() < input.capacity() {
        match socket.read_buf(input).now_or_never() {
            Some(Ok(more)) if more > 0 => count += more,
            // An end comes again, behind what has been read.
            _ => break,
        }
    }
    Ok(count)
}

/// A socket to the server, and the digest of its certificate where the channel is TLS.
async fn open(target: &Target, encrypt: bool) -> Result<(Box<dyn Socket>, Option<Vec<u8>>), ConnectionError> {
    let failed = |error| ConnectionError::Io { server: target.to_string(), error };
    Ok(match &target.host {
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
    })
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
pub(crate) fn message_length(input: &[u8]) -> Option<usize> {
    let length = input.get(1..)?.first_chunk::<4>()?;
    Some(1 + u32::from_be_bytes(*length) as usize)
}

/// What stands in a buffer of a COPY.
pub(crate) struct CopyScan {
    /// Bytes of whole CopyData messages at its front.
    pub(crate) length: usize,
    /// Bytes that the message after them still lacks.
    pub(crate) missing: usize,
    /// Tag of the whole message after them that is no CopyData.
    pub(crate) other: Option<u8>,
}

/// Walks a buffer of which the first `length` bytes are whole CopyData messages; gives the content of those behind.
pub(crate) fn scan_copy(
    input: &[u8],
    mut length: usize,
    mut take: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<CopyScan> {
    loop {
        let rest = &input[length..];
        let Some(next) = message_length(rest) else {
            return Ok(CopyScan { length, missing: 0, other: None });
        };
        if !(5..=MAX_MESSAGE).contains(&next) {
            let what = format!("the server sent what is no COPY: a message of {next} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        if rest.len() < next {
            return Ok(CopyScan { length, missing: next - rest.len(), other: None });
        }
        if rest[0] != COPY_DATA {
            return Ok(CopyScan { length, missing: 0, other: Some(rest[0]) });
        }
        take(&rest[5..next])?;
        length += next;
    }
}

fn columns(row: &DataRowBody) -> io::Result<Vec<Option<Bytes>>> {
    let buffer = row.buffer_bytes();
    row.ranges().map(|range| Ok(range.map(|range| buffer.slice(range)))).collect()
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use tokio::io::ReadBuf;

    use super::*;

    /// Gives a record at a time, as TLS does, and then nothing for now.
    struct Records(usize);

    const RECORD: [u8; 8192] = [b'x'; 8192];

    impl AsyncRead for Records {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buffer: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            if self.0 == 0 {
                return Poll::Pending;
            }
            self.0 -= 1;
            buffer.put_slice(&RECORD[..RECORD.len().min(buffer.remaining())]);
            Poll::Ready(Ok(()))
        }
    }

    impl AsyncWrite for Records {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
            Poll::Ready(Ok(bytes.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[test]
    fn all_records_that_have_come_are_read_at_once() {
        let runtime = runtime().unwrap();
        let read = |records, room| {
            let mut input = BytesMut::with_capacity(room);
            let count = runtime.block_on(read_available(&mut Records(records), &mut input)).unwrap();
            assert_eq!(count, input.len());
            count
        };
        assert_eq!(read(30, 1 << 20), 30 * RECORD.len());
        assert_eq!(read(30, 100_000), 100_000, "as far as there is room");
        assert_eq!(read(1, 1 << 20), RECORD.len());
    }
}
