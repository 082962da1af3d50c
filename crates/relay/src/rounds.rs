//! When a round of a snapshot is read, and how it gets into the log.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use change::{Key, Lsn, Read, Refusal, TableProgress};

use crate::run::Relay;
use crate::snapshot::{Answers, ReadPiece};
use crate::{Control, Publisher, ReadRequest, RelayError, Round, RoundEvent, Source, SourceError};

/// Tables that one round reads at most: each is a lock.
const TABLES_MAX: usize = 16;
/// With more transactions that no snapshot has seen, one is taken only to forget most of them: the ledger holds them all.
const UNSEEN_MAX: usize = 1_000;
/// For so long the stream pauses for transactions to become visible that it has told of already.
const PROBE: Duration = Duration::from_secs(1);
/// Logged as the reason if an earlier run of the reader decided to read the table again.
const FOUND_BEFORE: &str = "what was found before this start ended what had been read of it";
/// Between two looks at what is visible.
const PROBE_INTERVAL: Duration = Duration::from_millis(5);
/// Between two looks whether a change of the publication, or a rewrite that takes long to be seen, is visible.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// Of the reader's time, one part in so many goes into looks at the catalog while the stream goes on.
const LOOK_SHARE: u32 = 20;
/// After a round that could not be read the stream goes on for so long: doubled from the first to the last.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));

/// When the next round may be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    next_us: i64,
    back_off: Duration,
    /// When to look whether what may have changed the publication is visible.
    look_us: i64,
    /// Whether to look at the publication in any case.
    look_again: bool,
    /// Where the stream was at the last look, and when the next one may be.
    looked: (Lsn, i64),
}

impl Default for Pace {
    fn default() -> Self {
        Pace {
            next_us: i64::MIN,
            back_off: BACK_OFF.0,
            look_us: i64::MIN,
            look_again: false,
            looked: (Lsn::ZERO, i64::MIN),
        }
    }
}

impl Relay<'_> {
    /// Looks at the publication before the stream begins. What ran until now may have changed it, and shows later.
    pub(crate) fn first_look(
        &mut self,
        source: &mut dyn Source,
        publisher: &mut dyn Publisher,
        control: &dyn Control,
    ) -> Result<(), RelayError> {
        let snapshot = source.visible()?;
        self.assembler.reading.republished(snapshot.in_progress());
        self.reconcile(source, publisher, control)
    }

    /// Brings what is known in line with the catalog: tables may have come or gone, or may mean something else.
    pub(crate) fn reconcile(
        &mut self,
        source: &mut dyn Source,
        publisher: &mut dyn Publisher,
        control: &dyn Control,
    ) -> Result<(), RelayError> {
        let begun_us = self.clock.now_us();
        let at = self.assembler.stream_lsn();
        let publication = source.published()?;
        let between = self.assembler.between();
        match self.assembler.reading.reconcile(&publication, between) {
            // On an idle source nothing else would take the stream as far.
            Ok(true) => self.beat(source, self.progress.beat.0)?,
            Ok(false) => {}
            Err((refusal, concerned)) => return self.refuse(refusal, &concerned, publisher, control),
        }
        self.pace.look_again = !between;
        let rest = LOOK_INTERVAL.max(self.since(begun_us).saturating_mul(LOOK_SHARE));
        self.pace.looked = (at, begun_us.saturating_add(rest.as_micros() as i64));
        if publication.settled && between {
            self.claims.looked(at);
        }
        Ok(())
    }

    /// Ends the reader with this refusal. The cause may be older than the look that found it, so stores of the tables
    /// `concerned` may be ready at an LSN at which they are wrong. A message in the log marks them as not ready first.
    fn refuse(
        &mut self,
        refusal: Refusal,
        concerned: &[u32],
        publisher: &mut dyn Publisher,
        control: &dyn Control,
    ) -> Result<(), RelayError> {
        if self.waiting_since.is_some() {
            // These records may come from the change that is refused; they are not committed.
            return Err(RelayError::RefusedMidway(refusal));
        }
        self.assembler.reading.distrust(concerned);
        self.assembler.tell_gaps(self.clock.now_us());
        self.commit(publisher, control)?;
        Err(refusal.into())
    }

    /// What follows from a look, before anything else reaches the log.
    pub(crate) fn after_look(
        &mut self,
        source: &mut dyn Source,
        publisher: &mut dyn Publisher,
        control: &dyn Control,
    ) -> Result<(), RelayError> {
        if !self.assembler.between() {
            return Ok(());
        }
        self.assembler.reading.came_to(self.assembler.reach().end_lsn);
        // First: a table that is gone may end the reader, and its stores are not to be ready then.
        self.tell_gaps(publisher, control)?;
        let stream_lsn = self.assembler.stream_lsn();
        if self.assembler.reading.next_departure().is_some_and(|until| until <= stream_lsn) {
            self.depart(source, publisher, control, stream_lsn)?;
            self.tell_gaps(publisher, control)?;
        }
        self.end_stale(source, publisher, control)
    }

    /// Tells stores what the log lacks.
    fn tell_gaps(&mut self, publisher: &mut dyn Publisher, control: &dyn Control) -> Result<(), RelayError> {
        if self.assembler.tell_gaps(self.clock.now_us()) {
            self.commit(publisher, control)?;
        }
        Ok(())
    }

    /// Tables of which no change can come any more leave the log. One that is configured and was taken away by somebody
    /// else ends the reader, with all that was committed before in the log.
    fn depart(
        &mut self,
        source: &mut dyn Source,
        publisher: &mut dyn Publisher,
        control: &dyn Control,
        stream_lsn: Lsn,
    ) -> Result<(), RelayError> {
        let names: BTreeMap<u32, String> = self.assembler.reading.names();
        for relation in self.assembler.reading.depart(stream_lsn) {
            let Some(name) = names.get(&relation) else { continue };
            if let Some(refusal) = source.absence(relation, name)? {
                self.commit(publisher, control)?;
                return self.refuse(refusal, &[relation], publisher, control);
            }
            control.left(name);
        }
        Ok(())
    }

    /// Ends what counts no more, before anything of it is left out of the log: the stores behind it are right until then.
    pub(crate) fn end_stale(
        &mut self,
        source: &mut dyn Source,
        publisher: &mut dyn Publisher,
        control: &dyn Control,
    ) -> Result<(), RelayError> {
        let stale: BTreeSet<&str> = self.assembler.reading.stale().map(|table| table.name.as_str()).collect();
        if !stale.is_empty() && self.assembler.between() {
            let stale: Vec<String> = stale.into_iter().map(str::to_owned).collect();
            for table in stale {
                let why = self.assembler.reading.take_why(&table);
                control.reads_anew(&table, why.as_deref().unwrap_or(FOUND_BEFORE));
            }
            // Its transaction id is above all that were given out before, and a snapshot after it tells of them all.
            self.beat(source, self.progress.beat.0)?;
            let visible = source.visible()?;
            self.assembler.end_stale(&visible, self.clock.now_us())?;
            self.commit(publisher, control)?;
        }
        Ok(())
    }

    /// A table that is rewritten is noticed with its next change, and now and then without one.
    pub(crate) fn look_soon(&mut self) {
        self.pace.look_again = true;
    }

    /// Looks at the publication again: when the stream told that it had changed, which is before others see it; and now
    /// and then while the stream goes on, for not everything is told there.
    fn look(
        &mut self,
        source: &mut dyn Source,
        publisher: &mut dyn Publisher,
        control: &dyn Control,
    ) -> Result<(), RelayError> {
        let (at, next_us) = self.pace.looked;
        let news = self.assembler.stream_lsn() > at || self.assembler.reading.distrusts();
        let due = || news && self.clock.now_us() >= next_us;
        if self.pace.look_again || due() {
            return self.reconcile(source, publisher, control);
        }
        if self.assembler.reading.awaits_publication() && self.clock.now_us() >= self.pace.look_us {
            self.pace.look_us = self.clock.now_us().saturating_add(LOOK_INTERVAL.as_micros() as i64);
            let snapshot = source.visible()?;
            if self.assembler.reading.sees_publication(&snapshot) {
                self.reconcile(source, publisher, control)?;
            }
        }
        Ok(())
    }

    /// Whether the stream should pause here, at the end of a transaction, for [`round`](Self::round).
    pub(crate) fn may_pause(&self) -> bool {
        let reading = &self.assembler.reading;
        self.assembler.between()
            && reading.active()
            && (reading.window_ends(self.assembler.stream_lsn(), self.assembler.reach().end_lsn)
                || (reading.may_read() && self.clock.now_us() >= self.pace.next_us))
    }

    /// Reads a round, if it is time for one.
    pub(crate) fn round(
        &mut self,
        source: &mut dyn Source,
        publisher: &mut dyn Publisher,
        control: &dyn Control,
    ) -> Result<(), RelayError> {
        if !self.assembler.between() {
            return Ok(());
        }
        if self.assembler.reading.unseen() > UNSEEN_MAX {
            let snapshot = source.visible()?;
            self.assembler.reading.accepts(&snapshot);
        }
        self.look(source, publisher, control)?;
        let stream_lsn = self.assembler.stream_lsn();
        let tells = self.assembler.reading.has_something_to_say(stream_lsn);
        if tells && self.waiting_since.is_some() && !self.may_claim(source, publisher, control)? {
            return Ok(());
        }
        self.after_look(source, publisher, control)?;
        if !self.may_pause() {
            return Ok(());
        }
        let (stream_lsn, log_lsn) = (self.assembler.stream_lsn(), self.assembler.reach().end_lsn);
        if self.assembler.reading.close_window(stream_lsn, log_lsn) {
            control.reached("window.closed");
        }
        if !self.may_pause() {
            return Ok(());
        }
        if self.waiting_since.is_some() {
            if !self.may_claim(source, publisher, control)? {
                return Ok(());
            }
            self.commit(publisher, control)?;
        }
        if !self.visible(source, control)? {
            return Ok(());
        }
        control.reached("round.begun");
        let begun_us = self.clock.now_us();
        let requests: Vec<ReadRequest> =
            self.assembler.reading.pending().take(TABLES_MAX).map(request).collect();
        match self.read(source, publisher, control, &requests)? {
            (Round::NotNow(reason), _) => {
                // A table may be gone.
                self.pace.look_again = true;
                self.give_way(reason, control);
            }
            (Round::Broken(relation, why), _) => self.assembler.begin_again(relation, &why),
            (Round::Taken { snapshot, until }, pieces) => {
                let bytes: u64 = pieces.iter().map(|piece| piece.bytes).sum();
                control.reached("round.read");
                self.assembler.end_round();
                self.assembler.reading.round(snapshot, until, pieces, begun_us.div_euclid(1000));
                self.commit(publisher, control)?;
                control.reached("round.committed");
                control.read(&mut self.assembler.reading.tables());
                self.pace = Pace { look_us: self.pace.look_us, looked: self.pace.looked, ..Pace::default() };
                if let Some(rate) = self.limits.snapshot_rate {
                    let earned = u128::from(bytes) * 1_000_000 / u128::from(rate.max(1));
                    self.pace.next_us = begun_us.saturating_add(i64::try_from(earned).unwrap_or(i64::MAX));
                }
            }
        }
        Ok(())
    }

    /// Waits, the stream pausing, until every transaction that it told of is visible (h20). Where that takes long, the
    /// stream goes on first.
    fn visible(&mut self, source: &mut dyn Source, control: &dyn Control) -> Result<bool, RelayError> {
        let begun_us = self.clock.now_us();
        loop {
            let snapshot = source.visible()?;
            if self.assembler.reading.accepts(&snapshot) {
                return Ok(true);
            }
            if control.stop() {
                return Ok(false);
            }
            if self.since(begun_us) >= PROBE {
                let reason = "waiting for transactions that the log may have already to become visible: they wait for a \
                              synchronous standby (synchronous_standby_names), or have not ended";
                self.give_way(reason.to_owned(), control);
                return Ok(false);
            }
            self.clock.sleep(PROBE_INTERVAL);
        }
    }

    fn give_way(&mut self, reason: String, control: &dyn Control) {
        control.snapshot_waits(&reason);
        self.assembler.reading.waits(reason);
        let wait = self.pace.back_off;
        self.pace.next_us = self.clock.now_us().saturating_add(wait.as_micros() as i64);
        self.pace.back_off = (wait * 2).min(BACK_OFF.1);
    }

    /// Reads rows into the open Kafka transaction.
    fn read(
        &mut self,
        source: &mut dyn Source,
        publisher: &mut dyn Publisher,
        control: &dyn Control,
        requests: &[ReadRequest],
    ) -> Result<(Round, Vec<ReadPiece>), RelayError> {
        let mut position = self.assembler.begin_round();
        let mut pieces = Vec::new();
        // The table whose rows come now.
        let mut current = None;
        let mut reading = std::mem::take(&mut self.assembler.reading);
        let now_us = self.clock.now_us();
        let round = source.read(
            requests,
            self.limits.round_bytes,
            &mut |snapshot| reading.accepts(snapshot),
            &mut |event| {
                match event {
                    RoundEvent::Table { schema, description } => {
                        let relation = schema.relation;
                        let piece = ReadPiece {
                            relation,
                            read: Read::Nothing,
                            key: schema.key_signature(),
                            description,
                            rows: 0,
                            bytes: 0,
                        };
                        let encoder = self.assembler.round_table(schema)?;
                        current = Some((encoder, piece));
                    }
                    RoundEvent::Row(row) => {
                        let Some((encoder, piece)) = &mut current else { return Err(out_of_order()) };
                        self.assembler.round_row(encoder, position, Some(row), now_us)?;
                        position.ordinal += 1;
                        if piece.rows == 0 {
                            control.reached("round.first_row");
                        }
                        piece.rows += 1;
                        piece.bytes += row.as_bytes().len() as u64;
                        self.send_piece(self.assembler.ready().0.byte_len(), publisher, control)?;
                    }
                    RoundEvent::End(read) => {
                        let Some((_, piece)) = current.take() else { return Err(out_of_order()) };
                        pieces.push(ReadPiece { read, ..piece });
                    }
                }
                Ok(())
            },
        );
        self.assembler.reading = reading;
        Ok((round?, pieces))
    }

    /// Has the source describe the table that the first event announces. Waits until the source can: the transaction may
    /// have altered the table and not be visible yet, and what follows would then be changes of rows that the log does not
    /// have. Returns false when told to stop meanwhile.
    fn describe_first(
        &mut self,
        source: &mut dyn Source,
        publisher: &mut dyn Publisher,
        control: &dyn Control,
    ) -> Result<bool, RelayError> {
        let first = self.deferred.first();
        let asked = first.as_ref().and_then(|event| self.assembler.to_describe(event));
        let Some((announced, xid)) = asked.map(|(announced, xid)| (announced.clone(), xid)) else {
            return Ok(true);
        };
        let begun_us = self.clock.now_us();
        let mut told = false;
        loop {
            if let Some(described) = source.describe(&announced, xid)? {
                self.assembler.described(described);
                return Ok(true);
            }
            if control.stop() {
                return Ok(false);
            }
            if self.since(begun_us) >= PROBE && !std::mem::replace(&mut told, true) {
                if self.waiting_since.is_some() && self.may_claim(source, publisher, control)? {
                    self.commit(publisher, control)?;
                }
                control.not_visible("the stream waits");
            }
            // A standby may be missing for hours.
            self.clock.sleep(if told { LOOK_INTERVAL } else { PROBE_INTERVAL });
        }
    }

    /// Has Postgres compare the keys that only it can compare, and takes in the events that waited, up to the next pause.
    pub(crate) fn decide(
        &mut self,
        source: &mut dyn Source,
        publisher: &mut dyn Publisher,
        control: &dyn Control,
    ) -> Result<(), RelayError> {
        self.paused = false;
        while !self.deferred.is_empty() {
            if !self.describe_first(source, publisher, control)? {
                return Ok(());
            }
            let mut answers = Answers::new();
            // Older answers would hide keys that the new ones must have.
            self.assembler.reading.answered(Answers::new());
            for (relation, keys) in self.deferred.keys(|event| self.assembler.undecided(event)) {
                let bounds: Vec<Key> = self.assembler.reading.bounds(relation).cloned().collect();
                for bound in bounds {
                    let Some(orderings) = source.compare(relation, &keys, &bound)? else {
                        self.assembler.begin_again(relation, "its rows have another key");
                        break;
                    };
                    let answer =
                        |(key, ordering): (&Key, _)| ((relation, key.clone(), bound.clone()), ordering);
                    answers.extend(keys.iter().zip(orderings).map(answer));
                }
            }
            self.assembler.reading.answered(answers);
            let mut deferred = std::mem::take(&mut self.deferred);
            let moved = deferred.drain(|event| {
                let decided = !self.paused && self.assembler.decided(&event);
                if decided {
                    self.take(event, publisher, control)?;
                }
                Ok::<_, RelayError>(decided)
            })?;
            self.deferred = deferred;
            if self.paused {
                return Ok(());
            }
            if !moved {
                let what = "the server did not say how a row's key compares".to_owned();
                return Err(SourceError::Unavailable(what).into());
            }
        }
        Ok(())
    }
}

fn request((relation, table): (u32, &TableProgress)) -> ReadRequest {
    let (after, only_keys) = match &table.read {
        Read::UpTo(key) => (Some(key.clone()), false),
        Read::All => (None, true),
        Read::Nothing | Read::Removed => (None, false),
    };
    ReadRequest {
        relation,
        key: table.key.clone(),
        description: table.description.clone(),
        storage: table.storage,
        after,
        only_keys,
        keys: table.owed.iter().cloned().collect(),
    }
}

fn out_of_order() -> RelayError {
    SourceError::Unavailable("the source reads rows of no table".to_owned()).into()
}
