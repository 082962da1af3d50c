//! A stretch of the log, read without a group: for `tail` and `verify`.

use std::time::Duration;

use rdkafka::message::Message;
use worker::{FeedError, LogBatch};

use crate::feed::{BATCH_MAX_BYTES, BATCH_MAX_RECORDS, push};
use crate::ledger::require_topics;
use crate::reader::{Next, PartitionReader, out_of_range};
use crate::{Connection, Names};

/// Where to begin.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Start {
    /// The first record that is still there.
    Beginning,
    /// The first record at or after this offset. Refused when the log begins after it.
    Offset(i64),
    /// The first record that committed at the source at or after this time, milliseconds since the epoch; the end,
    /// when there is none. Time may step back by the source's clock: begin early enough.
    Time(i64),
}

/// Reads committed records of the log up to an end offset, in order.
pub struct RangeReader {
    reader: PartitionReader,
    /// The next offset that may be wanted.
    next: i64,
    end: i64,
    /// An end of committed records that is known to be reached when "nothing more is committed" comes.
    stable: i64,
    finished: bool,
}

impl RangeReader {
    /// Reads from `start` to before the offset `end`; `None` for the end of what is committed now, `i64::MAX` to
    /// go on for ever.
    pub fn open(
        connection: &Connection,
        names: &Names,
        start: Start,
        end: Option<i64>,
    ) -> Result<Self, FeedError> {
        require_topics(connection, names)?;
        let mut reader = PartitionReader::new(connection, names, names.log())?;
        let (first, stable) = reader.bounds()?;
        let end = end.unwrap_or(stable);
        let next = match start {
            Start::Beginning => first,
            Start::Offset(offset) if offset < first => return Err(out_of_range(reader.topic()).into()),
            Start::Offset(offset) => offset,
            Start::Time(time) => reader.offset_at(time)?.unwrap_or(stable),
        };
        let finished = next >= end;
        if !finished {
            reader.seek(next)?;
        }
        Ok(RangeReader { reader, next, end, stable, finished })
    }

    /// The next offset that may be read.
    pub fn next_offset(&self) -> i64 {
        self.next
    }

    /// Clears `batch` and fills it with what comes next, waiting at most `timeout` for the first. `false` when the
    /// end is reached and the batch is empty.
    pub fn read(&mut self, timeout: Duration, batch: &mut LogBatch) -> Result<bool, FeedError> {
        batch.clear();
        let mut wait = timeout;
        while !self.finished && batch.len() < BATCH_MAX_RECORDS && batch.byte_len() < BATCH_MAX_BYTES {
            match self.reader.next(std::mem::take(&mut wait))? {
                Next::Record(message) if message.offset() >= self.end => self.finished = true,
                Next::Record(message) => {
                    push(batch, &message)?;
                    self.next = message.offset() + 1;
                    self.finished = self.next >= self.end;
                }
                Next::End => self.ended()?,
                Next::Nothing => break,
            }
        }
        Ok(!self.finished || !batch.is_empty())
    }

    /// Nothing more is committed: the end, if it lies within what was committed when this was last asked. If only
    /// now it does, "nothing more" may have been said before, and is asked for again.
    fn ended(&mut self) -> Result<(), FeedError> {
        if self.stable >= self.end {
            self.finished = true;
            return Ok(());
        }
        self.stable = self.reader.bounds()?.1;
        if self.stable >= self.end {
            self.reader.seek(self.next)?;
        }
        Ok(())
    }
}
