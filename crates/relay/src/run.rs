use std::collections::BTreeSet;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

use change::{Clock, Encoder, LedgerEntry, Oversize, Progress, Refusal, TableProgress};

use crate::assemble::{Assembler, Reach};
use crate::claim::Claims;
use crate::deferred::Deferred;
use crate::resume::{self, Cursor};
use crate::rounds::Pace;
use crate::snapshot::Reading;
use crate::{Confirmed, Heartbeat, Ledger, PublishError, Publisher, Source, SourceError, WalEvent};

/// Why the relay ended.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// The source failed.
    #[error("source: {0}")]
    Source(#[from] SourceError),
    /// The publisher failed.
    #[error("log: {0}")]
    Publish(#[from] PublishError),
    /// Going on could lose changes.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The same, while something of the stream is not in the log yet, and stores cannot be told that they may be wrong.
    /// Another start looks at the catalog first, and tells them if it refuses what it finds.
    #[error("{0}")]
    RefusedMidway(Refusal),
}

impl RelayError {
    /// True if trying again does not help.
    fn is_refusal(&self) -> bool {
        matches!(
            self,
            RelayError::Refused(_)
                | RelayError::RefusedMidway(_)
                | RelayError::Source(SourceError::Refused(_))
                | RelayError::Publish(PublishError::Refused(_))
        )
    }
}

/// While a Kafka transaction begins, changes that come join it; for so long at a time they are waited for.
const JOIN: Duration = Duration::from_millis(1);

/// Bounds of the relay's work. Memory is about `send_bytes` plus the largest row, whatever a transaction's size.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Records are handed to the publisher in pieces of about this many bytes, which should fit a core's cache.
    pub send_bytes: usize,
    /// A Kafka transaction is committed at about this many bytes, even inside a source transaction.
    pub commit_bytes: usize,
    /// A Kafka transaction is committed at this age, even inside a source transaction.
    pub commit_interval: Duration,
    /// A Kafka transaction is committed so long after the last at the soonest: what comes meanwhile joins it, and a broker
    /// that has less to do is the quicker with it.
    pub pause: Duration,
    /// The same after a Kafka transaction of `busy_bytes` and more, when there is load: many small ones would cost the brokers
    /// more than the changes in them.
    pub busy_pause: Duration,
    /// See [`busy_pause`](Self::busy_pause).
    pub busy_bytes: usize,
    /// When nothing for us happens, the log's LSN follows the server's at this interval.
    pub idle_interval: Duration,
    /// The heartbeat table is written at this interval.
    pub heartbeat_interval: Duration,
    /// How often a reader that stands by looks whether the slot is free.
    pub stand_by_interval: Duration,
    /// A round of a snapshot reads about so many bytes of rows; the stream waits meanwhile.
    pub round_bytes: u64,
    /// Bytes of rows per second that a snapshot reads at most; `None`: as many as it can.
    pub snapshot_rate: Option<u64>,
    /// Tables, by schema and name, of which a row that is larger than a record may be is written without its largest columns.
    pub omit: BTreeSet<(String, String)>,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            send_bytes: 128 << 10,
            commit_bytes: 32 << 20,
            commit_interval: Duration::from_secs(1),
            pause: Duration::from_millis(3),
            busy_pause: Duration::from_millis(20),
            busy_bytes: 128 << 10,
            idle_interval: Duration::from_millis(100),
            heartbeat_interval: Duration::from_secs(60),
            stand_by_interval: Duration::from_millis(500),
            round_bytes: 64 << 20,
            snapshot_rate: None,
            omit: BTreeSet::new(),
        }
    }
}

/// What the relay is told and tells while it runs.
pub trait Control {
    /// Whether to end in order. Asked often.
    fn stop(&self) -> bool;

    /// Whether to take the slot from a reader that holds it, rather than stand by.
    fn take_over(&self) -> bool {
        false
    }

    /// The relay stands by: another reader holds the slot.
    fn standing_by(&self) {}

    /// The log has come to `progress`, with so many records in this Kafka transaction.
    fn committed(&self, progress: &Progress, records: u64) {
        let _ = (progress, records);
    }

    /// A round of a snapshot is in the log; so far have the tables been read.
    fn read(&self, tables: &mut dyn Iterator<Item = &TableProgress>) {
        let _ = tables;
    }

    /// This table's rows end in the log, for this reason, and are read anew.
    fn reads_anew(&self, table: &str, why: &str) {
        let _ = (table, why);
    }

    /// This table is not published any more, and all that was committed of it is in the log.
    fn left(&self, table: &str) {
        let _ = table;
    }

    /// A row is in the log without these columns, a JSON array, for its size; `key` is the record's.
    fn omitted(&self, key: &str, columns: &str) {
        let _ = (key, columns);
    }

    /// A round could not be read now.
    fn snapshot_waits(&self, reason: &str) {
        let _ = reason;
    }

    /// A transaction that may have altered a table is committed, perhaps, and not visible. Says what follows from that.
    fn not_visible(&self, consequence: &str) {
        let _ = consequence;
    }

    /// The snapshot has come to one of [`STAGES`]; where tests end the process.
    fn reached(&self, stage: &str) {
        let _ = stage;
    }
}

/// Where a crash would be in the middle of something, in the order in which a round comes to them.
pub const STAGES: [&str; 6] =
    ["round.begun", "round.first_row", "round.read", "round.committed", "window.closed", "snapshot.complete"];

/// Runs the relay until it is told to stop or cannot go on: stand by, fence, check, stream.
///
/// `pipeline` and `database` go into the envelope. After an error that is worth another try the caller drops both
/// ports, waits, and calls again with new ones.
pub fn run(
    source: &mut dyn Source,
    publisher: &mut dyn Publisher,
    clock: &dyn Clock,
    control: &dyn Control,
    (pipeline, database): (&str, &str),
    limits: &Limits,
) -> Result<(), RelayError> {
    if !stand_by(source, clock, control, limits)? {
        return Ok(());
    }
    let ledger = publisher.open()?;
    let ended = continue_log(&ledger, source, publisher, clock, control, (pipeline, database), limits);
    if ended.as_ref().is_err_and(RelayError::is_refusal) {
        // A reader that was frozen compares a source that another reader has gone on with to what it knew before. The
        // other one has fenced it, and it has nothing to say any more.
        publisher.confirm()?;
    }
    ended
}

/// Checks that the log may be continued from the source, and streams.
fn continue_log(
    ledger: &Ledger,
    source: &mut dyn Source,
    publisher: &mut dyn Publisher,
    clock: &dyn Clock,
    control: &dyn Control,
    (pipeline, database): (&str, &str),
    limits: &Limits,
) -> Result<(), RelayError> {
    if control.take_over() && source.busy()? {
        source.take_over()?;
    }
    let state = source.state(&resume::progress(ledger)?.timeline)?;
    let mut progress = resume::check(ledger, &state)?;
    progress.timeline = state.timeline;
    let oversize = oversize(&limits.omit, publisher)?;
    let encoder = Encoder::new(pipeline, database).omitting(oversize);
    let mut relay = Relay::new(encoder, progress, ledger, clock, limits);
    relay.beat(source, state.heartbeat.beat)?;
    relay.first_look(source, publisher, control)?;
    relay.after_look(source, publisher, control)?;
    source.start(relay.progress.end_lsn)?;

    while !control.stop() {
        let patience = relay.patience(publisher.ready());
        let arrived = source.poll(patience, &mut |event| relay.take_or_defer(event, publisher, control))?;
        relay.round(source, publisher, control)?;
        relay.decide(source, publisher, control)?;
        while relay.paused {
            relay.round(source, publisher, control)?;
            relay.decide(source, publisher, control)?;
        }
        relay.ask_ahead(source);
        if relay.due(arrived, publisher.ready()) && relay.may_claim(source, publisher, control)? {
            relay.commit(publisher, control)?;
        }
        if let Some(confirmed) = relay.confirmed.take() {
            source.acknowledge(confirmed)?;
        }
        if relay.heartbeat_due() {
            relay.beat(source, relay.progress.beat.0)?;
            relay.look_soon();
        }
    }
    relay.finish(source, publisher, control)
}

/// What is left out of rows that are too large for a record.
fn oversize(
    omit: &BTreeSet<(String, String)>,
    publisher: &mut dyn Publisher,
) -> Result<Oversize, RelayError> {
    if omit.is_empty() {
        return Ok(Oversize::default());
    }
    let Some(record_max) = publisher.record_max()? else {
        return Err(RelayError::Refused(Refusal::new(
            "columns are to be left out of rows that are larger than a record may be, and the log's limit, \
             max.message.bytes, may not be read",
            "allow this login to describe the configuration of the log's topic (DescribeConfigs), or take \"omit\" \
             out of [postgres.oversize]",
        )));
    };
    Ok(Oversize { record_max, tables: omit.clone() })
}

/// Waits until no other reader holds the slot. False when told to stop meanwhile.
fn stand_by(
    source: &mut dyn Source,
    clock: &dyn Clock,
    control: &dyn Control,
    limits: &Limits,
) -> Result<bool, RelayError> {
    while !control.take_over() && source.busy()? {
        control.standing_by();
        if control.stop() {
            return Ok(false);
        }
        clock.sleep(limits.stand_by_interval);
    }
    Ok(!control.stop())
}

pub(crate) struct Relay<'a> {
    pub(crate) clock: &'a dyn Clock,
    pub(crate) limits: &'a Limits,
    pub(crate) assembler: Assembler,
    /// Events that wait for Postgres to compare keys or to tell of a rewrite, or for a round.
    pub(crate) deferred: Deferred,
    /// Whether what comes now waits for a round.
    pub(crate) paused: bool,
    /// When the next round of a snapshot may be.
    pub(crate) pace: Pace,
    /// What may be claimed.
    pub(crate) claims: Claims,
    /// What the ledger holds.
    pub(crate) progress: Progress,
    /// What may be acknowledged and has not been yet.
    confirmed: Option<Confirmed>,
    /// Records and bytes sent in the open Kafka transaction.
    sent_records: u64,
    sent_bytes: usize,
    /// Whether the last Kafka transaction was as large as under load.
    pub(crate) busy: bool,
    /// When the oldest record not yet committed was assembled.
    pub(crate) waiting_since: Option<i64>,
    pub(crate) committed_at: i64,
    beat_at: i64,
    /// The server asked for an acknowledgement.
    reply_requested: bool,
}

impl<'a> Relay<'a> {
    fn new(
        encoder: Encoder,
        progress: Progress,
        ledger: &Ledger,
        clock: &'a dyn Clock,
        limits: &'a Limits,
    ) -> Self {
        let Progress { end_lsn, position, split, .. } = progress.clone();
        let reach = Reach { end_lsn, position, split };
        let reading = Reading::new(ledger);
        let assembler = Assembler::new(encoder, Cursor::new(&progress), &ledger.schemas, reach, reading);
        Relay {
            clock,
            limits,
            assembler,
            deferred: Deferred::default(),
            paused: false,
            pace: Pace::default(),
            claims: Claims::default(),
            progress,
            confirmed: None,
            sent_records: 0,
            sent_bytes: 0,
            busy: false,
            waiting_since: None,
            committed_at: clock.now_us(),
            beat_at: clock.now_us(),
            reply_requested: false,
        }
    }

    /// Takes in one event of the source, or has it wait behind one that only Postgres can decide on, or for a round.
    fn take_or_defer(
        &mut self,
        event: WalEvent<'_>,
        publisher: &mut dyn Publisher,
        control: &dyn Control,
    ) -> Result<(), RelayError> {
        if !self.paused && self.deferred.is_empty() && self.assembler.decided(&event) {
            return self.take(event, publisher, control);
        }
        self.deferred.push(event);
        Ok(())
    }

    /// Takes in one event of the source; sends when there is enough.
    pub(crate) fn take(
        &mut self,
        event: WalEvent<'_>,
        publisher: &mut dyn Publisher,
        control: &dyn Control,
    ) -> Result<(), RelayError> {
        if let WalEvent::Keepalive { reply_requested: true, .. } = event {
            self.reply_requested = true;
        }
        let ended = matches!(event, WalEvent::Commit { .. });
        self.assembler.take(event, self.clock).map_err(|error| match error {
            RelayError::Refused(refusal) if !self.assembler.between() => RelayError::RefusedMidway(refusal),
            error => error,
        })?;
        self.paused = ended && (self.may_pause() || self.assembler.reading.has_stale());
        let (batch, ready) = self.assembler.ready();
        if ready == 0 {
            return Ok(());
        }
        let bytes = batch.byte_len();
        if self.waiting_since.is_none() {
            self.waiting_since = Some(self.clock.now_us());
            publisher.begin()?;
        }
        self.send_piece(bytes, publisher, control)
    }

    /// How long the next poll may wait: not at all while a round can be read, or something waits to be committed into a
    /// transaction that is `ready`.
    fn patience(&self, ready: bool) -> Duration {
        if self.may_pause() {
            self.rest_left()
        } else if self.waiting_since.is_some() && !self.assembler.mid_transaction() {
            if ready { self.pause_left() } else { JOIN }
        } else if self.behind() {
            self.limits.idle_interval.saturating_sub(self.since(self.committed_at)).max(self.rest_left())
        } else {
            self.limits.idle_interval
        }
    }

    /// Whether to commit now, `arrived` telling whether the source had anything, `ready` whether the transaction has begun.
    fn due(&self, arrived: bool, ready: bool) -> bool {
        let whole = !self.assembler.mid_transaction();
        match self.waiting_since {
            Some(since) => {
                (whole && !arrived && ready && self.pause_left().is_zero())
                    || self.sent_bytes >= self.limits.commit_bytes
                    || self.since(since) >= self.limits.commit_interval
            }
            None => {
                whole
                    && (self.assembler.reading.dirty()
                        || (self.reply_requested && self.behind())
                        || (self.behind() && self.since(self.committed_at) >= self.limits.idle_interval))
            }
        }
    }

    /// Until a Kafka transaction may be committed.
    fn pause_left(&self) -> Duration {
        let pause = if self.busy { self.limits.busy_pause } else { self.limits.pause };
        pause.saturating_sub(self.since(self.committed_at)).max(self.rest_left())
    }

    /// Whether the ledger's LSN is behind the stream.
    pub(crate) fn behind(&self) -> bool {
        self.assembler.stream_lsn() > self.progress.end_lsn
    }

    /// Long, where the clock was set back meanwhile: nothing may wait until it has come there again.
    pub(crate) fn since(&self, past_us: i64) -> Duration {
        u64::try_from(self.clock.now_us() - past_us).map_or(Duration::MAX, Duration::from_micros)
    }

    /// Sends the so many bytes that are ready, if they are enough.
    pub(crate) fn send_piece(
        &mut self,
        bytes: usize,
        publisher: &mut dyn Publisher,
        control: &dyn Control,
    ) -> Result<(), RelayError> {
        if bytes >= self.limits.send_bytes {
            self.send(publisher, control)?;
        }
        Ok(())
    }

    /// Sends what is ready.
    fn send(&mut self, publisher: &mut dyn Publisher, control: &dyn Control) -> Result<(), RelayError> {
        let (batch, ready) = self.assembler.ready();
        if ready > 0 {
            let bytes = batch.byte_len();
            publisher.append(batch, ready)?;
            for record in batch.omitting(ready) {
                control
                    .omitted(&String::from_utf8_lossy(record.key), &String::from_utf8_lossy(record.omitted));
            }
            self.sent_records += ready as u64;
            self.sent_bytes += bytes;
            self.assembler.sent();
        }
        Ok(())
    }

    /// Commits what is not held back. Only now may the slot move.
    pub(crate) fn commit(
        &mut self,
        publisher: &mut dyn Publisher,
        control: &dyn Control,
    ) -> Result<(), RelayError> {
        self.send(publisher, control)?;
        let Reach { end_lsn, position, split } = self.assembler.reach();
        let now_us = self.clock.now_us();
        self.assembler.settle();
        let snapshot = self.assembler.reading.progress();
        let time_ms = now_us.div_euclid(1000);
        let mut progress = Progress { end_lsn, position, split, snapshot, time_ms, ..self.progress.clone() };
        let entries: Vec<LedgerEntry> = self.assembler.new_entries().collect();
        publisher.commit(&entries, &mut progress)?;
        self.assembler.entries_committed();
        if self.progress.snapshot.is_some() && progress.snapshot.is_none() {
            control.reached("snapshot.complete");
        }
        control.committed(&progress, self.sent_records);
        self.confirmed = Some(Confirmed::after_commit(&progress));
        self.progress = progress;
        self.busy = self.sent_bytes >= self.limits.busy_bytes;
        self.sent_records = 0;
        self.sent_bytes = 0;
        self.waiting_since = None;
        self.committed_at = self.clock.now_us();
        self.reply_requested = false;
        Ok(())
    }

    fn heartbeat_due(&self) -> bool {
        self.since(self.beat_at) >= self.limits.heartbeat_interval
    }

    /// Writes the heartbeat; the next commit tells the ledger. A crash between leaves the table ahead of the
    /// ledger, which is sound.
    pub(crate) fn beat(&mut self, source: &mut dyn Source, last: i64) -> Result<(), RelayError> {
        let nonce = format!("{:016x}", RandomState::new().build_hasher().finish());
        let heartbeat = Heartbeat { beat: last + 1, nonce };
        source.write_heartbeat(&heartbeat)?;
        self.progress.beat = (heartbeat.beat, heartbeat.nonce);
        self.beat_at = self.clock.now_us();
        Ok(())
    }

    /// Ends in order: commits and acknowledges what is whole. An open source transaction is left to the next start.
    fn finish(
        mut self,
        source: &mut dyn Source,
        publisher: &mut dyn Publisher,
        control: &dyn Control,
    ) -> Result<(), RelayError> {
        if !self.assembler.mid_transaction() && (self.waiting_since.is_some() || self.behind()) {
            self.clock.sleep(self.rest_left());
            if self.may_claim(source, publisher, control)? {
                self.commit(publisher, control)?;
            }
        }
        if let Some(confirmed) = self.confirmed.take() {
            source.acknowledge(confirmed)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::resume::tests::progress;

    struct At(Cell<i64>);

    impl Clock for At {
        fn now_us(&self) -> i64 {
            self.0.get()
        }

        fn sleep(&self, _duration: Duration) {}
    }

    #[test]
    fn a_kafka_transaction_waits_for_the_pause_after_the_last() {
        let limits = Limits { busy_bytes: 1000, ..Limits::default() };
        let clock = At(Cell::new(0));
        let encoder = Encoder::new("mailbox", "postgres");
        let mut relay = Relay::new(encoder, progress(), &Ledger::default(), &clock, &limits);
        for (busy, pause) in [(false, limits.pause), (true, limits.busy_pause)] {
            relay.busy = busy;
            relay.committed_at = clock.now_us();
            let end = relay.committed_at + pause.as_micros() as i64;
            // The first record comes late in the pause.
            clock.0.set(end - 1);
            relay.waiting_since = Some(clock.now_us());
            assert!(!relay.due(false, true));
            assert_eq!(relay.patience(true), Duration::from_micros(1));
            assert_eq!(relay.patience(false), JOIN, "looks whether the transaction has begun");
            clock.0.set(end);
            assert!(relay.due(false, true));
            assert!(!relay.due(true, true), "more comes");
            assert!(!relay.due(false, false), "it has not begun");
            assert_eq!(relay.patience(true), Duration::ZERO);
            clock.0.set(relay.waiting_since.unwrap() + limits.commit_interval.as_micros() as i64);
            assert!(relay.due(true, false), "at this age whatever happens");
        }
        // The clock is set back.
        relay.committed_at = clock.now_us();
        relay.waiting_since = Some(clock.now_us());
        clock.0.set(clock.now_us() - 3_600_000_000);
        assert!(relay.due(false, true), "nothing waits for an hour");
    }
}
