//! The thread that owns a streaming socket: reads what the server sends, tells it how far we are.
//!
//! Two duties that must not wait for each other. *Reading* hands whole pieces of the stream to the consumer, at
//! most [`MAX_IN_FLIGHT`] bytes ahead of it; when the consumer is slow the thread stops reading, and TCP makes the
//! server wait. *Answering* goes on all the same: a status update follows every acknowledgement, every request
//! of the server, and otherwise a timer, so the link lives while the consumer sleeps.
//!
//! What a status update claims: `flush` and `apply` are the highest LSN that the consumer acknowledged, never more;
//! `write` is what has been received. All three only grow.
//!
//! *Zero-copy*: a piece is one `Bytes` of many messages as they came; walking it costs five bytes of header each.
//!
//! *Under load* the server wakes the receiver for every row, which costs it more than the row. So after
//! [`BUSY_READS`] small reads in quick succession the thread sleeps a moment before each further one. A transaction
//! that comes alone is never delayed.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use change::Lsn;
use postgres_protocol::message::backend::Message;
use postgres_protocol::message::frontend;
use tokio::io::AsyncWriteExt;
use tokio::runtime::Runtime;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{MissedTickBehavior, interval};

use crate::connection::Streaming;
use crate::error::{ConnectionError, ServerError};
use crate::session::{self, REST, SMALL_READ, Socket};

mod wire;

pub(crate) use wire::Frame;

/// Bytes handed over and not yet consumed. One message may be longer; it then travels alone.
const MAX_IN_FLIGHT: usize = 8 << 20;

/// What a piece counts at least, which bounds their number.
const MIN_CHARGE: usize = 32 << 10;

/// Pieces handed over and not yet consumed, and one place for the end of the stream.
const MAX_PIECES: usize = MAX_IN_FLIGHT / MIN_CHARGE + 1;

/// Memory asked for at a time for reading.
const CHUNK: usize = 256 << 10;

/// Small reads in quick succession after which there is load.
const BUSY_READS: u32 = 8;

/// What quick succession is.
const BUSY_GAP: Duration = Duration::from_millis(4);

/// What a rest must bring for there to be load (bytes): a few thousand short transactions a second are none.
const WORTH_A_REST: usize = 8 << 10;

/// The server hears from us at least this often.
const STATUS_INTERVAL: Duration = Duration::from_secs(10);

/// How long the end of the stream may take.
const FAREWELL: Duration = Duration::from_secs(1);

/// A run of whole messages. Counts against [`MAX_IN_FLIGHT`] until dropped.
pub(crate) struct Piece {
    bytes: Bytes,
    _permit: OwnedSemaphorePermit,
}

impl Piece {
    /// The messages. All were checked before they were handed over.
    pub(crate) fn frames(&self) -> impl Iterator<Item = Frame<'_>> {
        wire::frames(&self.bytes)
    }
}

enum Arrival {
    Piece(Piece),
    End(ConnectionError),
}

/// The consumer's end of a stream.
pub(crate) struct ReplicationStream {
    arrivals: Receiver<Arrival>,
    acknowledged: Option<watch::Sender<Lsn>>,
    ended: bool,
}

impl ReplicationStream {
    /// Gives the socket, and the runtime in which it was opened, to a thread of its own. It ends with the connection, or
    /// when the stream is dropped.
    pub(crate) fn spawn(
        runtime: Runtime,
        from: Lsn,
        streaming: Streaming,
        server_timeout: Option<Duration>,
    ) -> io::Result<Self> {
        let (sender, arrivals) = sync_channel(MAX_PIECES);
        let (acknowledged, watch) = watch::channel(Lsn::ZERO);
        let task = Task {
            link: Link {
                socket: streaming.socket,
                output: BytesMut::new(),
                received: from,
                flushed: Lsn::ZERO,
            },
            input: streaming.input,
            room: Arc::new(Semaphore::new(MAX_IN_FLIGHT)),
            pace: Pace::default(),
        };
        // A third of the server's patience leaves room for two that come late.
        let period = server_timeout.map_or(STATUS_INTERVAL, |patience| STATUS_INTERVAL.min(patience / 3));
        let server = streaming.server;
        std::thread::Builder::new().name("wal".into()).spawn(move || {
            let run = task.run(&sender, watch, period.max(Duration::from_millis(10)));
            if let Err(end) = runtime.block_on(run) {
                let error = end.into_error(server);
                tracing::debug!(%error, "replication stream ended");
                // Pieces hold a permit each, so the last place is always free; without a consumer nobody cares.
                let _ = sender.try_send(Arrival::End(error));
            }
        })?;
        Ok(ReplicationStream { arrivals, acknowledged: Some(acknowledged), ended: false })
    }

    /// The next piece; `None` when there is none within `timeout`.
    pub(crate) fn receive(&mut self, timeout: Duration) -> Result<Option<Piece>, ConnectionError> {
        match self.arrivals.recv_timeout(timeout) {
            Ok(Arrival::Piece(piece)) => Ok(Some(piece)),
            Ok(Arrival::End(error)) => {
                self.ended = true;
                Err(error)
            }
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => {
                self.ended = true;
                let error = io::Error::new(io::ErrorKind::NotConnected, "the stream has ended");
                Err(ConnectionError::Io { server: "replication".into(), error })
            }
        }
    }

    /// Tells the server that everything below `lsn` may be forgotten. A lower one than before changes nothing.
    pub(crate) fn acknowledge(&self, lsn: Lsn) {
        if let Some(acknowledged) = &self.acknowledged {
            acknowledged.send_if_modified(|highest| {
                let grown = lsn > *highest;
                *highest = lsn.max(*highest);
                grown
            });
        }
    }
}

impl Drop for ReplicationStream {
    /// Lets the task send the last acknowledgement and take its leave, so that the slot is free soon.
    fn drop(&mut self) {
        drop(self.acknowledged.take());
        let deadline = Instant::now() + FAREWELL;
        while !self.ended && Instant::now() < deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            self.ended = matches!(self.arrivals.recv_timeout(left), Err(RecvTimeoutError::Disconnected));
        }
    }
}

/// Why a stream ended.
enum End {
    Io(io::Error),
    Server(ServerError),
    /// The server said that it is done, which it does when it shuts down.
    Done,
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        End::Io(error)
    }
}

impl End {
    fn into_error(self, server: String) -> ConnectionError {
        match self {
            End::Server(error) => ConnectionError::Server { server, error },
            End::Io(error) => ConnectionError::Io { server, error },
            End::Done => {
                let error = io::Error::new(io::ErrorKind::ConnectionAborted, "server is shutting down");
                ConnectionError::Io { server, error }
            }
        }
    }
}

struct Task {
    link: Link,
    input: BytesMut,
    room: Arc<Semaphore>,
    pace: Pace,
}

impl Task {
    /// Runs until the connection ends (an error) or the consumer is gone.
    async fn run(
        mut self,
        arrivals: &SyncSender<Arrival>,
        mut acknowledged: watch::Receiver<Lsn>,
        period: Duration,
    ) -> Result<(), End> {
        let mut timer = interval(period);
        timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut ready = self.take_ready().await?;
        loop {
            let charge = u32::try_from(ready.len().clamp(MIN_CHARGE, MAX_IN_FLIGHT)).unwrap_or(u32::MAX);
            // Every branch can be cancelled without loss: `read` keeps what it read in `input`.
            tokio::select! {
                changed = acknowledged.changed() => {
                    self.link.flushed = self.link.flushed.max(*acknowledged.borrow_and_update());
                    if changed.is_err() {
                        self.link.farewell().await;
                        return Ok(());
                    }
                    self.link.send_status().await?;
                }
                _ = timer.tick() => self.link.send_status().await?,
                permit = self.room.clone().acquire_many_owned(charge), if !ready.is_empty() => {
                    let Ok(permit) = permit else { return Ok(()) };
                    let piece = Piece { bytes: std::mem::take(&mut ready), _permit: permit };
                    if arrivals.try_send(Arrival::Piece(piece)).is_err() {
                        self.link.farewell().await;
                        return Ok(());
                    }
                    // What ends the stream may stand behind the piece.
                    ready = self.take_ready().await?;
                }
                read = read(&mut self.link.socket, &mut self.input, &mut self.pace), if ready.is_empty() => {
                    read?;
                    ready = self.take_ready().await?;
                }
            }
        }
    }

    /// Takes the whole messages off the input, answering the server where it asks.
    async fn take_ready(&mut self) -> Result<Bytes, End> {
        let mut scan = wire::scan(&self.input)?;
        while let (0, Some(_)) = (scan.copy.length, scan.copy.other) {
            self.other_message()?;
            scan = wire::scan(&self.input)?;
        }
        let ready = self.input.split_to(scan.copy.length).freeze();
        self.link.received = self.link.received.max(scan.received);
        if scan.reply_requested {
            self.link.send_status().await?;
        }
        // A long message gets all its memory at once; small ones share a chunk.
        let missing = scan.copy.missing;
        if self.input.capacity() - self.input.len() < missing.max(SMALL_READ) {
            self.input.reserve(missing.max(CHUNK));
        }
        Ok(ready)
    }

    /// Reads the message at the front of the input that is no CopyData. Most end the stream.
    fn other_message(&mut self) -> Result<(), End> {
        let unexpected = |what: &str| End::Io(wire::invalid(what.to_owned()));
        match Message::parse(&mut self.input)?.ok_or_else(|| unexpected("a message cut short"))? {
            Message::ErrorResponse(body) => Err(End::Server(ServerError::read(body.fields())?)),
            Message::CopyDone | Message::CommandComplete(_) => Err(End::Done),
            // A server that reads its configuration again may tell.
            Message::ParameterStatus(_) => Ok(()),
            Message::NoticeResponse(body) => {
                let notice = ServerError::read(body.fields())?;
                tracing::warn!(%notice, "notice of the replication server");
                // So version 18 says that it skips a publication that it does not find, and its changes.
                if notice.slot_is_unusable() { Err(End::Server(notice)) } else { Ok(()) }
            }
            _ => Err(unexpected("a message that does not belong into a copy")),
        }
    }
}

/// Reads once, after a rest when there is load.
async fn read(socket: &mut Box<dyn Socket>, input: &mut BytesMut, pace: &mut Pace) -> io::Result<()> {
    let rested = pace.busy();
    if rested {
        // Not a timer's: the runtime would be woken by what arrives.
        std::thread::sleep(REST);
    }
    let count = session::read_available(socket, input).await?;
    pace.note(count, rested, Instant::now());
    Ok(())
}

/// Tells load from a transaction that comes alone.
#[derive(Debug, Default)]
struct Pace {
    last: Option<Instant>,
    streak: u32,
}

impl Pace {
    fn note(&mut self, count: usize, rested: bool, now: Instant) {
        let quick = self.last.is_some_and(|last| now.saturating_duration_since(last) < BUSY_GAP);
        let worth = !rested || count >= WORTH_A_REST;
        self.streak = if quick && worth && count < SMALL_READ { self.streak.saturating_add(1) } else { 0 };
        self.last = Some(now);
    }

    fn busy(&self) -> bool {
        self.streak >= BUSY_READS
    }
}

/// The answering half.
struct Link {
    socket: Box<dyn Socket>,
    output: BytesMut,
    received: Lsn,
    flushed: Lsn,
}

impl Link {
    /// Nobody can have made durable what was not received, whatever was acknowledged.
    async fn send_status(&mut self) -> io::Result<()> {
        self.output.clear();
        let flushed = self.flushed.min(self.received);
        wire::status(&mut self.output, self.received, flushed);
        self.socket.write_all(&self.output).await?;
        self.socket.flush().await
    }

    /// The last acknowledgement and a proper end. A server that does not take it finds out by itself.
    async fn farewell(&mut self) {
        let goodbye = async {
            self.send_status().await?;
            self.output.clear();
            frontend::copy_done(&mut self.output);
            frontend::terminate(&mut self.output);
            self.socket.write_all(&self.output).await?;
            self.socket.shutdown().await
        };
        // The consumer is gone: there is nobody to tell.
        let _ = tokio::time::timeout(FAREWELL, goodbye).await;
    }
}

#[cfg(test)]
mod tests;
