//! COPY of a query's rows, on a thread of its own that reads ahead of whoever takes them.
//!
//! The server wakes its receiver for every few rows, which costs both more than the rows. So a read that brought little is
//! followed by a moment's sleep, as in [`crate::stream`].

use std::io;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::BytesMut;
use futures_util::FutureExt as _;
use postgres_protocol::message::backend::Message;
use tokio::runtime::Runtime;

use crate::config::Target;
use crate::error::ConnectionError;
use crate::session::{self, CopyScan, REST, Running, SMALL_READ, Session, message_length};

/// Rows are handed over in pieces of this size, but for a row that is larger.
const PIECE_BYTES: usize = 256 << 10;
/// Pieces that may wait to be taken.
const PIECES_AHEAD: usize = 64;

/// A session that copies. Not to be used on a runtime's thread.
pub(crate) struct CopySession {
    runtime: Runtime,
    session: Session,
}

/// A COPY that runs.
pub(crate) struct CopyOut {
    /// Whole messages, each with one row.
    pub(crate) pieces: Receiver<Result<BytesMut, ConnectionError>>,
    thread: JoinHandle<Option<CopySession>>,
}

/// Pieces that were read, to be filled again: memory that is given back is cleared before it is had again.
#[derive(Clone, Default)]
pub(crate) struct Free(Arc<Mutex<Vec<BytesMut>>>);

impl Free {
    fn pieces(&self) -> MutexGuard<'_, Vec<BytesMut>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A piece with room for `len` bytes at least.
    fn take(&self, len: usize) -> BytesMut {
        let mut piece = self.pieces().pop().unwrap_or_else(|| BytesMut::with_capacity(PIECE_BYTES));
        piece.clear();
        piece.reserve(len);
        piece
    }

    pub(crate) fn give(&self, piece: BytesMut) {
        if piece.capacity() <= PIECE_BYTES {
            self.pieces().push(piece);
        }
    }
}

/// Takes a row off a piece: its line, and what follows.
pub(crate) fn row(piece: &[u8]) -> Option<(&[u8], &[u8])> {
    let (message, rest) = piece.split_at_checked(message_length(piece)?)?;
    let row = message.get(5..)?;
    Some((row.strip_suffix(b"\n").unwrap_or(row), rest))
}

impl CopySession {
    pub(crate) fn connect(target: &Target) -> Result<Self, ConnectionError> {
        let failed = |error| ConnectionError::Io { server: target.to_string(), error };
        let runtime = session::runtime().map_err(failed)?;
        let session = runtime.block_on(Session::connect(target, false))?;
        Ok(CopySession { runtime, session })
    }

    /// What names it where its command is to be cancelled.
    pub(crate) fn running(&self) -> Running {
        self.session.running()
    }

    /// Whether the server has said nothing unasked, nor closed the connection, while it rested.
    pub(crate) fn rests(&mut self) -> bool {
        let Session { socket, input, .. } = &mut self.session;
        self.runtime.block_on(async {
            // The runtime takes note of what has come.
            tokio::task::yield_now().await;
            session::read_available(socket, input).now_or_never().is_none()
        })
    }

    /// Runs a command, for not longer than `limit`.
    pub(crate) fn command(&mut self, command: &str, limit: Duration) -> Result<(), ConnectionError> {
        let server = self.session.server.clone();
        let run = async { tokio::time::timeout(limit, self.session.command(command)).await };
        match self.runtime.block_on(run) {
            Ok(done) => done.map(drop),
            Err(_) => Err(ConnectionError::Io { server, error: io::ErrorKind::TimedOut.into() }),
        }
    }

    /// Begins to copy the rows of a query.
    pub(crate) fn copy(mut self, select: &str, free: Free) -> io::Result<CopyOut> {
        let (sender, pieces) = sync_channel(PIECES_AHEAD);
        let copy = format!("COPY ({select}) TO STDOUT");
        let thread = std::thread::Builder::new().name("copy".into()).spawn(move || {
            match self.runtime.block_on(read(&mut self.session, &copy, &free, &sender)) {
                Ok(all) => all.then_some(self),
                Err(error) => {
                    // The receiver may be gone, and then nobody cares.
                    let _ = sender.send(Err(error));
                    None
                }
            }
        })?;
        Ok(CopyOut { pieces, thread })
    }
}

impl CopyOut {
    /// The session again, when its rows were all taken.
    pub(crate) fn finish(self) -> Option<CopySession> {
        drop(self.pieces);
        self.thread.join().ok().flatten()
    }
}

/// Copies, giving whole messages; false where nobody takes them any more.
async fn read(
    session: &mut Session,
    copy: &str,
    free: &Free,
    pieces: &SyncSender<Result<BytesMut, ConnectionError>>,
) -> Result<bool, ConnectionError> {
    session.send_query(copy).await?;
    while !matches!(session.receive().await?, Message::CopyOutResponse(_)) {}
    let mut begun = free.take(session.input.len());
    begun.extend_from_slice(&session.input);
    session.input = begun;
    let mut whole = 0;
    loop {
        let scan = session::scan_copy(&session.input, whole, |_| Ok(()));
        let CopyScan { length, missing, other } = scan.map_err(|error| session.io(error))?;
        whole = length;
        // What does not fit any more begins the next piece.
        if other.is_some() || session.input.capacity() - session.input.len() < missing.max(1) {
            let mut next = free.take(session.input.len() - whole + missing);
            next.extend_from_slice(&session.input[whole..]);
            session.input.truncate(whole);
            let piece = std::mem::replace(&mut session.input, next);
            whole = 0;
            if !piece.is_empty() && pieces.send(Ok(piece)).is_err() {
                return Ok(false);
            }
        }
        if other.is_some() {
            match session.receive_one().await? {
                Some(Message::CopyDone) => break,
                None | Some(Message::ParameterStatus(_) | Message::NotificationResponse(_)) => continue,
                Some(Message::ErrorResponse(body)) => return Err(session.refused(&body)),
                Some(_) => return Err(session.misunderstood("a message that does not belong into a COPY")),
            }
        }
        let read = session::read_available(&mut session.socket, &mut session.input).await;
        let count = read.map_err(|error| session.io(error))?;
        if count < SMALL_READ && session.input.len() < session.input.capacity() {
            std::thread::sleep(REST);
        }
    }
    while !matches!(session.receive().await?, Message::ReadyForQuery(_)) {}
    Ok(true)
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    fn message(tag: u8, content: &[u8]) -> Vec<u8> {
        let length = u32::try_from(content.len() + 4).unwrap();
        [&[tag][..], &length.to_be_bytes(), content].concat()
    }

    /// What a COPY gives whose server says this, in parts of so many bytes; and how it ended.
    fn copied(answer: &[u8], part: usize) -> (Vec<Vec<u8>>, Result<bool, ConnectionError>) {
        let (sender, pieces) = sync_channel(PIECES_AHEAD);
        let result = session::runtime().unwrap().block_on(async {
            let (ours, mut theirs) = tokio::io::duplex(1 << 20);
            let mut session = Session::new(Box::new(ours), "a server".into());
            let serve = async {
                for part in answer.chunks(part) {
                    theirs.write_all(part).await.unwrap();
                    tokio::task::yield_now().await;
                }
                theirs.shutdown().await.unwrap();
            };
            let free = Free::default();
            tokio::join!(read(&mut session, "COPY", &free, &sender), serve).0
        });
        drop(sender);
        let mut rows = Vec::new();
        for piece in pieces.iter().map(Result::unwrap) {
            let mut rest = &piece[..];
            while let Some((row, after)) = row(rest) {
                rows.push(row.to_vec());
                rest = after;
            }
            assert!(rest.is_empty(), "a piece holds whole rows");
        }
        (rows, result)
    }

    #[test]
    fn every_row_comes_whole_whatever_comes_between() {
        let long = [&[b'x'; 2 * PIECE_BYTES][..], b"\n"].concat();
        let answer = [
            message(b'N', b"SNOTICE\0C00000\0Mfirst\0\0"),
            message(b'H', &[0, 0, 0]),
            message(b'd', b"1\tone\n"),
            message(b'N', b"SNOTICE\0C00000\0Mbetween\0\0"),
            message(b'd', b"\n"),
            message(b'S', b"TimeZone\0UTC\0"),
            message(b'd', &long),
            message(b'd', b"last\n"),
            message(b'c', b""),
            message(b'C', b"COPY 4\0"),
            message(b'Z', b"T"),
        ]
        .concat();
        for part in [997, 100_000, usize::MAX] {
            let (rows, result) = copied(&answer[..], part.min(answer.len()));
            assert!(matches!(result, Ok(true)), "{result:?}");
            assert_eq!(rows, [b"1\tone", &b""[..], &long[..2 * PIECE_BYTES], b"last"]);
        }
    }

    #[test]
    fn a_copy_without_its_end_is_an_error() {
        let begun = [message(b'H', &[0, 0, 0]), message(b'd', b"1\n")].concat();
        let (rows, result) = copied(&begun, 100);
        assert!(matches!(result, Err(ConnectionError::Io { .. })), "{rows:?} {result:?}");
        let failed = message(b'E', b"SERROR\0C57014\0Mcanceled\0\0");
        let (_, result) = copied(&[&begun[..], &failed].concat(), 100);
        let said = result.unwrap_err();
        assert_eq!(said.server_error().map(|error| error.code.as_str()), Some("57014"), "{said}");
        let (_, result) = copied(&[&begun[..], &message(b'D', &[0, 0])].concat(), 100);
        assert!(matches!(result, Err(ConnectionError::Io { .. })), "{result:?}");
        let (_, result) = copied(&[&begun[..], b"d\0\0\0\x01"].concat(), 100);
        assert!(matches!(result, Err(ConnectionError::Io { .. })), "{result:?}");
    }
}
