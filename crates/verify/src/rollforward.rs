use change::Snapshot;

use crate::{From, Log, NotVerified};
use worker::LogRecord;

/// The one way through the log: from the window's beginning forwards, a stretch at a time, each record once.
pub(crate) struct RollForward {
    next: From,
}

impl RollForward {
    pub(crate) fn new(window: From) -> Self {
        RollForward { next: window }
    }

    /// Gives `take` those records below `end` that were not read before and that belong to transactions which the
    /// snapshot did not see. Gives the number of all that were read.
    pub(crate) fn to(
        &mut self,
        log: &mut dyn Log,
        end: i64,
        snapshot: &Snapshot,
        take: &mut dyn FnMut(u32, &LogRecord<'_>) -> Result<(), NotVerified>,
    ) -> Result<u64, NotVerified> {
        if let From::Offset(next) = self.next
            && next >= end
        {
            return if next == end {
                Ok(0)
            } else {
                Err(NotVerified::new(
                    format!("the store went back from offset {next} of the log to {end}"),
                    "",
                ))
            };
        }
        let mut read = 0;
        log.read(self.next, end, &mut |record| {
            read += 1;
            match record.xid {
                Some(xid) if !snapshot.saw(xid) => take(xid, record),
                // A message outside of any transaction changes no row.
                _ => Ok(()),
            }
        })?;
        self.next = From::Offset(end);
        Ok(read)
    }
}
