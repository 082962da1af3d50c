//! A stretch of the log, read without a group: for `tail` and `verify`.

use std::time::{Duration, Instant};

use worker::{FeedError, LogBatch};

use crate::ledger::require_topics;
use crate::reader::{PartitionReader, out_of_range};
use crate::wire::fetch::Fetch;
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
    /// `None` once the end is reached.
    log: Option<Fetch>,
    /// The next offset that may be wanted.
    next: i64,
    end: i64,
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
        let log = names.log();
        let reader = PartitionReader::new(connection, names, log.clone())?;
        let (first, stable) = reader.bounds()?;
        let end = end.unwrap_or(stable);
        let next = match start {
            Start::Beginning => first,
            Start::Offset(offset) if offset < first => return Err(out_of_range(&log).into()),
            Start::Offset(offset) => offset,
            Start::Time(time) => reader.offset_at(time)?.unwrap_or(stable),
        };
        let fetch = || Fetch::start(connection, &log, next);
        Ok(RangeReader { log: (next < end).then(fetch).transpose()?, next, end })
    }

    /// The next offset that may be read.
    pub fn next_offset(&self) -> i64 {
        self.next
    }

    /// Clears `batch` and fills it with what comes next, waiting at most `timeout` for the first. `false` when the
    /// end is reached and the batch is empty.
    pub fn read(&mut self, timeout: Duration, batch: &mut LogBatch) -> Result<bool, FeedError> {
        batch.clear();
        let start = Instant::now();
        // Where only markers stood, what follows is still waited for.
        while let Some(log) = &mut self.log
            && batch.is_empty()
            && let Some(next) = log.next(timeout.saturating_sub(start.elapsed()), batch)?
        {
            batch.cut(self.end);
            self.next = next.min(self.end);
            if self.next == self.end {
                self.log = None;
            }
        }
        Ok(self.log.is_some() || !batch.is_empty())
    }
}
