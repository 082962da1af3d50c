//! Checks, before the log claims an LSN, that the catalog has not changed below it without an event in the stream.
//!
//! A store that is ready says that it holds everything up to the LSN that the log has come to. A column that is dropped and
//! added, a partition that is attached, or a table that is rewritten changes what the rows are, and no event tells until the
//! table's next change. So each commit that brings the log to a new LSN is preceded by a question: is the catalog as the last
//! look found it? It is cheap, and asked while the brokers begin their transaction. Only where the answer is no, the catalog is
//! looked at, and what begins again does so in the same commit.

use std::time::Duration;

use change::Lsn;

use crate::run::Relay;
use crate::{Control, Publisher, RelayError, Source};

/// After a check the next one waits for this many times its duration, which bounds the load on the server.
const SHARE: u32 = 5;
/// Pause after a check without a result.
const UNSURE: Duration = Duration::from_millis(100);

/// How far the catalog has been checked.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Claims {
    /// All changes of the catalog below this LSN are known.
    covered: Lsn,
    /// The stream's LSN when the pending check started.
    asked: Option<Lsn>,
    /// Start and length of the pause before the next check.
    rest: (i64, Duration),
}

impl Claims {
    /// A look that was sure of what it saw began when the stream was here.
    pub(crate) fn looked(&mut self, stream_lsn: Lsn) {
        self.covered = self.covered.max(stream_lsn);
    }
}

impl Relay<'_> {
    /// The LSN that the next commit claims.
    fn claim(&self) -> Lsn {
        match self.waiting_since {
            Some(_) => self.assembler.reach().end_lsn,
            None => self.assembler.stream_lsn(),
        }
    }

    /// Whether the next commit claims an LSN that needs a check. None is needed while the stores are marked not ready.
    fn uncovered(&self) -> bool {
        let claim = self.claim();
        claim > self.progress.end_lsn && claim > self.claims.covered && !self.assembler.reading.distrusts()
    }

    /// The rest of the pause before the next check.
    pub(crate) fn rest_left(&self) -> Duration {
        let (from, rest) = self.claims.rest;
        if self.claims.asked.is_none() && self.uncovered() {
            rest.saturating_sub(self.since(from))
        } else {
            Duration::ZERO
        }
    }

    /// Asks ahead, so that the answer is there when the brokers are ready. Under load more comes before they are.
    pub(crate) fn ask_ahead(&mut self, source: &mut dyn Source) {
        let waits = self.waiting_since.is_some() && !self.assembler.mid_transaction();
        if waits
            && !self.busy
            && self.claims.asked.is_none()
            && self.uncovered()
            && self.rest_left().is_zero()
        {
            self.ask(source);
        }
    }

    fn ask(&mut self, source: &mut dyn Source) -> Lsn {
        source.ask_unchanged();
        *self.claims.asked.insert(self.assembler.stream_lsn())
    }

    /// Returns whether the next commit may claim its LSN. If the catalog has changed below it, the consequences are in the log
    /// or part of that commit. Returns false if this is not known yet.
    pub(crate) fn may_claim(
        &mut self,
        source: &mut dyn Source,
        publisher: &mut dyn Publisher,
        control: &dyn Control,
    ) -> Result<bool, RelayError> {
        if !self.rest_left().is_zero() {
            return Ok(false);
        }
        if self.uncovered() && !self.unchanged(source)? && !self.look_below(source, publisher, control)? {
            self.claims.rest = (self.clock.now_us(), UNSURE);
            return Ok(false);
        }
        if self.waiting_since.is_none() {
            self.assembler.follow(self.assembler.stream_lsn());
        }
        Ok(true)
    }

    fn unchanged(&mut self, source: &mut dyn Source) -> Result<bool, RelayError> {
        while self.uncovered() {
            let at = match self.claims.asked {
                Some(at) => at,
                None => self.ask(source),
            };
            let answer = source.unchanged()?;
            self.claims.asked = None;
            self.claims.rest = (self.clock.now_us(), answer.took.saturating_mul(SHARE));
            if !answer.unchanged {
                return Ok(false);
            }
            self.claims.covered = at;
        }
        Ok(true)
    }

    /// Looks at the catalog, and brings into the log what follows.
    fn look_below(
        &mut self,
        source: &mut dyn Source,
        publisher: &mut dyn Publisher,
        control: &dyn Control,
    ) -> Result<bool, RelayError> {
        if !self.assembler.between() {
            // A table can begin again only between transactions: the commit waits for the end of this one.
            return Ok(false);
        }
        self.reconcile(source, publisher, control)?;
        self.after_look(source, publisher, control)?;
        let late = |since| self.since(since) >= self.limits.commit_interval;
        if self.uncovered() && self.waiting_since.is_some_and(late) {
            // A transaction that has changed the catalog waits for a standby, perhaps for hours.
            control.not_visible("no store is ready");
            self.assembler.reading.distrust_all();
            self.assembler.tell_gaps(self.clock.now_us());
            self.commit(publisher, control)?;
        }
        Ok(!self.uncovered())
    }
}
