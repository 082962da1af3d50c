//! One connection to one broker: requests go out in order and are answered in order.

use std::fmt::Display;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use bytes::{Buf, BufMut, BytesMut};
use change::Refusal;
use kafka_protocol::messages::{RequestHeader, ResponseHeader};
use kafka_protocol::protocol::{Decodable, Encodable, HeaderVersion, Request, StrBytes};
use openssl::ssl::{HandshakeError, SslStream};
use openssl::x509::X509VerifyResult;

use super::security::Security;
use crate::KafkaError;

/// The longest answer that is believed (bytes): more than the largest batch that the log's writer sends.
const ANSWER_MAX_LEN: usize = 128 << 20;
/// A larger buffer of a request or an answer is given back (bytes).
const BUFFER_KEPT: usize = 2 << 20;
/// The longest wait for one address to take a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Why a request was not answered, or not with success.
#[derive(Debug)]
pub(crate) enum WireError {
    /// The same over another connection may do.
    Again(String),
    /// The same a moment later will do.
    Busy(String),
    /// Trying again does not help.
    Kafka(KafkaError),
}

impl From<KafkaError> for WireError {
    fn from(error: KafkaError) -> Self {
        WireError::Kafka(error)
    }
}

enum Stream {
    Plain(TcpStream),
    Tls(Box<SslStream<TcpStream>>),
}

impl Stream {
    fn tcp(&self) -> &TcpStream {
        match self {
            Stream::Plain(stream) => stream,
            Stream::Tls(stream) => stream.get_ref(),
        }
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Stream::Plain(stream) => stream.write_all(bytes),
            Stream::Tls(stream) => stream.write_all(bytes),
        }
    }

    fn read_exact(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        match self {
            Stream::Plain(stream) => stream.read_exact(bytes),
            Stream::Tls(stream) => stream.read_exact(bytes),
        }
    }
}

pub(crate) struct Broker {
    stream: Stream,
    address: String,
    client_id: StrBytes,
    /// Number of the next request, and of the next that is answered.
    sent: i32,
    answered: i32,
    buffer: BytesMut,
    /// Of the last answer, whose memory is had again once nothing of it is held any more.
    received: BytesMut,
    /// The brokers end connections that outlive the login.
    expires: Option<Instant>,
}

impl Broker {
    /// Connects, with TLS and a login where `security` says so.
    pub(crate) fn connect(
        (host, port): (&str, u16),
        security: &Security,
        client_id: &str,
        deadline: Instant,
    ) -> Result<Self, WireError> {
        let address = format!("{host}:{port}");
        let failed = |error: &dyn Display| WireError::Again(format!("cannot connect to {address}: {error}"));
        let stream = dial((host, port), deadline).map_err(|error| failed(&error))?;
        let set_up = || {
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(left(deadline)))?;
            stream.set_write_timeout(Some(left(deadline)))
        };
        set_up().map_err(|error: io::Error| failed(&error))?;
        let stream = match security.tls(host)? {
            None => Stream::Plain(stream),
            Some(tls) => match tls.connect(host, stream) {
                Ok(stream) => Stream::Tls(Box::new(stream)),
                Err(HandshakeError::Failure(stream))
                    if security.verifies() && stream.ssl().verify_result() != X509VerifyResult::OK =>
                {
                    let reason = stream.ssl().verify_result();
                    let what = format!("the certificate of {address} is not trusted: {reason}");
                    let remedy = "name the authority that signed it as `ssl.ca.location` in [kafka.properties], and the \
                                  brokers as it names them in kafka.bootstrap";
                    return Err(KafkaError::Refused(Refusal::new(what, remedy)).into());
                }
                Err(error) => return Err(failed(&error)),
            },
        };
        let client_id = StrBytes::from_string(client_id.to_owned());
        let mut broker = Broker {
            stream,
            address,
            client_id,
            sent: 0,
            answered: 0,
            buffer: BytesMut::new(),
            received: BytesMut::new(),
            expires: None,
        };
        if let Some(lifetime) = security.log_in(&mut broker, deadline)? {
            // Before the broker does.
            broker.expires = Some(Instant::now() + lifetime.mul_f64(0.8));
        }
        Ok(broker)
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Whether the broker is about to end the connection, for the login's time is over.
    pub(crate) fn expired(&self) -> bool {
        self.expires.is_some_and(|at| Instant::now() >= at)
    }

    /// Sends a request and waits for its answer.
    pub(crate) fn ask<R: Request>(
        &mut self,
        request: &R,
        version: i16,
        deadline: Instant,
    ) -> Result<R::Response, WireError> {
        self.send(request, version, deadline)?;
        self.receive::<R>(version, deadline)
    }

    /// Sends a request; its answer comes after those of the requests before it.
    pub(crate) fn send<R: Request>(
        &mut self,
        request: &R,
        version: i16,
        deadline: Instant,
    ) -> Result<(), WireError> {
        let header = RequestHeader::default()
            .with_request_api_key(R::KEY)
            .with_request_api_version(version)
            .with_correlation_id(self.sent)
            .with_client_id(Some(self.client_id.clone()));
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.clear();
        buffer.put_u32(0);
        header
            .encode(&mut buffer, R::header_version(version))
            .and_then(|()| request.encode(&mut buffer, version))
            .map_err(|error| self.broken(format!("a request cannot be written: {error}")))?;
        let len = (buffer.len() - 4) as u32;
        buffer[..4].copy_from_slice(&len.to_be_bytes());
        let tcp = self.stream.tcp();
        tcp.set_write_timeout(Some(left(deadline)))
            .and_then(|()| self.stream.write_all(&buffer))
            .map_err(|error| self.lost(error))?;
        if buffer.capacity() <= BUFFER_KEPT {
            self.buffer = buffer;
        }
        self.sent = self.sent.wrapping_add(1);
        Ok(())
    }

    /// Waits for the answer to the oldest request that has none, which was an `R` of this version.
    pub(crate) fn receive<R: Request>(
        &mut self,
        version: i16,
        deadline: Instant,
    ) -> Result<R::Response, WireError> {
        let tcp = self.stream.tcp();
        tcp.set_read_timeout(Some(left(deadline))).map_err(|error| self.lost(error))?;
        let mut len = [0; 4];
        self.stream.read_exact(&mut len).map_err(|error| self.lost(error))?;
        let len = u32::from_be_bytes(len) as usize;
        if len > ANSWER_MAX_LEN {
            return Err(
                self.broken(format!("an answer of {len} bytes: is this a Kafka broker, without TLS?"))
            );
        }
        let mut buffer = std::mem::take(&mut self.received);
        buffer.resize(len, 0);
        self.stream.read_exact(&mut buffer).map_err(|error| self.lost(error))?;
        let mut answer = buffer.split().freeze();
        if len <= BUFFER_KEPT {
            self.received = buffer;
        }
        let header = ResponseHeader::decode(&mut answer, R::Response::header_version(version))
            .map_err(|error| self.broken(format!("an answer cannot be read: {error}")))?;
        if header.correlation_id != self.answered {
            return Err(self.broken("an answer to another request".to_owned()));
        }
        self.answered = self.answered.wrapping_add(1);
        let response = R::Response::decode(&mut answer, version)
            .map_err(|error| self.broken(format!("an answer cannot be read: {error}")))?;
        if answer.has_remaining() {
            return Err(self.broken("an answer with more than belongs to it".to_owned()));
        }
        Ok(response)
    }

    fn lost(&self, error: io::Error) -> WireError {
        let what = match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => "no answer in time".to_owned(),
            ErrorKind::UnexpectedEof if self.answered == 0 => {
                "it ended the connection; does it expect TLS or a login ([kafka.properties] security.protocol)?".to_owned()
            }
            ErrorKind::UnexpectedEof => "it ended the connection".to_owned(),
            _ => error.to_string(),
        };
        self.broken(what)
    }

    fn broken(&self, what: String) -> WireError {
        WireError::Again(format!("{}: {what}", self.address))
    }
}

/// Tries each address of the host.
fn dial(to: (&str, u16), deadline: Instant) -> io::Result<TcpStream> {
    let mut last = io::Error::new(ErrorKind::NotFound, "the host has no address");
    for address in to.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, left(deadline).min(CONNECT_LIMIT)) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// What a read or write may take. Never zero, which would mean for ever.
fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
}
