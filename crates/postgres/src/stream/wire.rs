//! The messages inside the copy: XLogData and keepalives from the server, status updates to it.
//!
//! <https://www.postgresql.org/docs/current/protocol-replication.html>

use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::{BufMut, BytesMut};
use change::Lsn;

use crate::session::{COPY_DATA, CopyScan, message_length, scan_copy};

/// 2000-01-01 in microseconds since the Unix epoch.
const POSTGRES_EPOCH_US: u64 = 946_684_800_000_000;

const XLOG_DATA: u8 = b'w';
const KEEPALIVE: u8 = b'k';

/// Bytes before an XLogData's payload: its tag, two LSNs, the time.
const XLOG_HEADER: usize = 25;

/// Bytes of a keepalive: its tag, the LSN, the time, whether a reply is wanted.
const KEEPALIVE_LENGTH: usize = 18;

/// One message of the stream, borrowed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Frame<'a> {
    /// A message of pgoutput, and its place in the WAL.
    Data { lsn: Lsn, payload: &'a [u8] },
    /// The server has sent everything committed below `wal_end`.
    Keepalive { wal_end: Lsn, reply_requested: bool },
}

/// The messages of a buffer that [`scan`] found whole.
pub(super) fn frames(bytes: &[u8]) -> impl Iterator<Item = Frame<'_>> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let (message, after) = rest.split_at_checked(message_length(rest)?)?;
        rest = after;
        frame(message.get(5..)?).ok()
    })
}

/// Appends a standby status update: received so far, and made durable.
pub(super) fn status(output: &mut BytesMut, received: Lsn, flushed: Lsn) {
    output.put_u8(COPY_DATA);
    output.put_u32(4 + 34);
    output.put_u8(b'r');
    for lsn in [received, flushed, flushed] {
        output.put_u64(lsn.0);
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
    output.put_u64(u64::try_from(now).unwrap_or(0).saturating_sub(POSTGRES_EPOCH_US));
    output.put_u8(0);
}

/// What stands in a buffer.
pub(super) struct Scan {
    pub(super) copy: CopyScan,
    /// Highest LSN that its messages show as received.
    pub(super) received: Lsn,
    pub(super) reply_requested: bool,
}

pub(super) fn scan(input: &[u8]) -> io::Result<Scan> {
    let (mut received, mut reply_requested) = (Lsn::ZERO, false);
    let copy = scan_copy(input, 0, |content| {
        match frame(content)? {
            Frame::Data { lsn, .. } => received = received.max(lsn),
            Frame::Keepalive { wal_end, reply_requested: requested } => {
                received = received.max(wal_end);
                reply_requested |= requested;
            }
        }
        Ok(())
    })?;
    Ok(Scan { copy, received, reply_requested })
}

/// Reads a CopyData's content.
fn frame(content: &[u8]) -> io::Result<Frame<'_>> {
    let lsn =
        || content.get(1..).and_then(|rest| rest.first_chunk::<8>()).map(|lsn| Lsn(u64::from_be_bytes(*lsn)));
    match (content.first(), lsn()) {
        (Some(&XLOG_DATA), Some(lsn)) if content.len() >= XLOG_HEADER => {
            Ok(Frame::Data { lsn, payload: &content[XLOG_HEADER..] })
        }
        (Some(&KEEPALIVE), Some(wal_end)) if content.len() == KEEPALIVE_LENGTH => {
            Ok(Frame::Keepalive { wal_end, reply_requested: content[KEEPALIVE_LENGTH - 1] != 0 })
        }
        (tag, _) => Err(invalid(format!("replication message {tag:?} of {} bytes", content.len()))),
    }
}

pub(super) fn invalid(what: String) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the server sent what is not the replication protocol: {what}"),
    )
}
