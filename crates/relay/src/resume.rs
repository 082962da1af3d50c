//! Whether the log may be continued from this source, and from where.
//!
//! The ledger says "the log holds everything committed below `end_lsn`, and the last change is `position`". The
//! slot restarts at `end_lsn`, so the server sends again what committed at or after it:
//!
//! - a transaction whose commit record starts below `end_lsn` is in the log: skip it;
//! - the transaction that the ledger calls split is in the log up to and including `ordinal`: skip that many
//!   changes, and demand that the last of them has the digest that the ledger remembers;
//! - a message at or below `position` is in the log: skip it. An LSN alone would not do: the message and the
//!   next transaction can have the same one;
//! - everything else is new.
//!
//! Postgres accepts a start that it cannot honour, in both directions, without a word: below the slot's
//! `confirmed_flush_lsn` it silently skips forward, above the end of its WAL it sends nothing for ever. So
//! [`check`] compares first, and refuses.

use change::{Kind, Lsn, NEW_LOG, Position, Progress, Refusal, Split};

use crate::{Heartbeat, Ledger, SourceState};

/// How far the log is.
pub(crate) fn progress(ledger: &Ledger) -> Result<&Progress, Refusal> {
    let what = "the ledger holds no progress: the setup has not finished";
    ledger.progress.as_ref().ok_or_else(|| Refusal::new(what, "run `millrace setup`"))
}

/// Decides whether the log may be continued from the source; gives the progress to continue from.
pub fn check(ledger: &Ledger, source: &SourceState) -> Result<Progress, Refusal> {
    let progress = progress(ledger)?;
    check_log(ledger, progress)?;
    check_history(progress, source)?;
    let refuse = |what: String| Err(Refusal::new(what, NEW_LOG));
    if source.confirmed_flush > progress.end_lsn {
        return refuse(format!(
            "the slot has moved to {} but the log ends at {}: the changes between are in neither",
            source.confirmed_flush, progress.end_lsn
        ));
    }
    let held = held(progress);
    if source.flush_lsn < held {
        return refuse(format!(
            "the server's WAL ends at {} but the log already holds {held}: the server was restored from a backup, \
             or failed over to a standby that had not received everything",
            source.flush_lsn
        ));
    }
    Ok(progress.clone())
}

/// Below this LSN stands everything that the log shows: a snapshot's round is ahead of the stream.
fn held(progress: &Progress) -> Lsn {
    let window = progress.snapshot.as_ref().and_then(|snapshot| snapshot.window.as_ref());
    window.map_or(progress.end_lsn, |window| window.until.max(progress.end_lsn))
}

/// Whether the source has all that a log holds, so that what follows it follows the log's end as well.
pub fn same_history(progress: &Progress, source: &SourceState) -> bool {
    check_history(progress, source).is_ok() && source.flush_lsn >= held(progress)
}

/// The log must be the one that the ledger speaks of, whole.
fn check_log(ledger: &Ledger, progress: &Progress) -> Result<(), Refusal> {
    let what = match &ledger.log {
        None => "the log topic is empty but its ledger is not".to_owned(),
        Some(log) if *log != progress.log => {
            format!(
                "the log topic has the id {log} but its ledger speaks of {}: it was recreated",
                progress.log
            )
        }
        Some(_) if ledger.log_end < progress.log_end => format!(
            "the log topic ends at offset {} but its ledger speaks of offset {}: records were lost",
            ledger.log_end, progress.log_end
        ),
        Some(_) if ledger.data_end.is_some_and(|end| end < progress.log_end) => format!(
            "the log topic has no committed record at offset {}, the last one that its ledger speaks of: records were \
             lost, and their transaction was aborted",
            progress.log_end - 1
        ),
        Some(_) if ledger.data_end.is_some_and(|end| end > progress.log_end) => format!(
            "the log topic has records behind offset {}, the last of which its ledger speaks: the ledger lost its end",
            progress.log_end
        ),
        Some(_) => return Ok(()),
    };
    Err(Refusal::new(what, NEW_LOG))
}

/// The server must share its history with the one that the ledger knows, up to the ledger's end.
fn check_history(progress: &Progress, source: &SourceState) -> Result<(), Refusal> {
    let refuse = |what: String| Err(Refusal::new(what, NEW_LOG));
    let (known, found) = (&progress.timeline, &source.timeline);
    if known.system_id != found.system_id {
        return refuse(format!(
            "the server's system identifier is {} but the log was read from {}: this is another server",
            found.system_id, known.system_id
        ));
    }
    if known.timeline != found.timeline {
        match source.switch_point {
            Some(switch) if held(progress) <= switch => {}
            Some(switch) => {
                return refuse(format!(
                    "the server is on timeline {} since {switch}, but the log holds {} of timeline {}: changes \
                     in the log were lost by the server",
                    found.timeline,
                    held(progress),
                    known.timeline
                ));
            }
            None => {
                return refuse(format!(
                    "the server is on timeline {}, which does not descend from the log's timeline {}",
                    found.timeline, known.timeline
                ));
            }
        }
    }
    let Heartbeat { beat, nonce } = &source.heartbeat;
    let (known_beat, known_nonce) = &progress.beat;
    if beat < known_beat || (beat == known_beat && nonce != known_nonce) {
        return refuse(format!(
            "the heartbeat table holds beat {beat} but the log has seen beat {known_beat}: the server was \
             restored to an earlier point in time"
        ));
    }
    Ok(())
}

/// What the log held when the stream was started: decides what is skipped.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Cursor {
    end_lsn: Lsn,
    position: Position,
    split: Option<Split>,
}

/// What to do with a transaction that the source sends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Plan {
    /// It is in the log.
    Skip,
    /// It is new from this ordinal on. When that is not 0, the change before it must have the digest.
    From {
        /// The first new change.
        ordinal: u64,
        /// Digest of the change before.
        digest: u64,
    },
}

impl Cursor {
    /// The cursor of a ledger.
    pub fn new(progress: &Progress) -> Self {
        let Progress { end_lsn, position, split, .. } = progress.clone();
        Cursor { end_lsn, position, split }
    }

    /// What to do with the transaction whose commit record starts at `commit_lsn`.
    pub fn transaction(&mut self, commit_lsn: Lsn) -> Result<Plan, Refusal> {
        if commit_lsn < self.end_lsn {
            return Ok(Plan::Skip);
        }
        match self.split.take() {
            None => Ok(Plan::From { ordinal: 0, digest: 0 }),
            Some(split) if split.commit_lsn == commit_lsn => {
                Ok(Plan::From { ordinal: split.ordinal + 1, digest: split.digest })
            }
            Some(split) => Err(Refusal::new(
                format!(
                    "the log holds the first part of the transaction that commits at {}, but the server goes on \
                     with the one at {commit_lsn}",
                    split.commit_lsn
                ),
                NEW_LOG,
            )),
        }
    }

    /// The split transaction whose rest has not begun to arrive.
    pub fn split(&self) -> Option<&Split> {
        self.split.as_ref()
    }

    /// Whether the message at `lsn` is in the log.
    pub fn has_message(&self, lsn: Lsn) -> bool {
        Position { lsn, kind: Kind::Message, ordinal: 0 } <= self.position
    }
}

/// The source sent something else than before at the place where the log was split.
pub(crate) fn split_differs(commit_lsn: Lsn, ordinal: u64) -> Refusal {
    Refusal::new(
        format!(
            "change {ordinal} of the transaction that commits at {commit_lsn} is not the one that the log holds"
        ),
        NEW_LOG,
    )
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use change::Timeline;

    pub(crate) fn progress() -> Progress {
        Progress {
            log: "a".into(),
            generation: 1,
            end_lsn: Lsn(100),
            position: Position { lsn: Lsn(90), kind: Kind::Transaction, ordinal: 3 },
            split: None,
            log_end: 8,
            timeline: Timeline { system_id: "7".into(), timeline: 1 },
            beat: (5, "n".into()),
            snapshot: None,
            time_ms: 0,
        }
    }

    fn ledger() -> Ledger {
        Ledger {
            progress: Some(progress()),
            log: Some("a".into()),
            log_end: 9,
            data_end: Some(8),
            ..Ledger::default()
        }
    }

    fn source() -> SourceState {
        SourceState {
            confirmed_flush: Lsn(100),
            flush_lsn: Lsn(100),
            timeline: Timeline { system_id: "7".into(), timeline: 1 },
            switch_point: None,
            heartbeat: Heartbeat { beat: 5, nonce: "n".into() },
        }
    }

    /// Changes a sound pair and gives the refusal, if any.
    fn refused(change: impl FnOnce(&mut Ledger, &mut SourceState)) -> Option<String> {
        let (mut ledger, mut source) = (ledger(), source());
        change(&mut ledger, &mut source);
        check(&ledger, &source).err().map(|refusal| refusal.what)
    }

    #[test]
    fn h04_the_ledger_lies_between_the_slot_and_the_end_of_the_wal() {
        assert_eq!(refused(|_, _| {}), None);
        assert_eq!(refused(|_, s| s.confirmed_flush = Lsn(50)), None);
        assert!(refused(|_, s| s.confirmed_flush = Lsn(101)).unwrap().contains("in neither"));
        assert!(refused(|_, s| s.flush_lsn = Lsn(99)).unwrap().contains("restored"));
        assert!(refused(|l, _| l.log_end = 7).unwrap().contains("records were lost"));
        assert!(refused(|l, _| l.data_end = Some(7)).unwrap().contains("records were lost"));
        assert!(refused(|l, _| l.data_end = Some(9)).unwrap().contains("the ledger lost its end"));
        assert!(refused(|l, _| l.progress = None).unwrap().contains("setup"));
    }

    #[test]
    fn h05_a_rewound_server_is_refused() {
        assert!(refused(|_, s| s.heartbeat.beat = 4).unwrap().contains("earlier point in time"));
        assert!(refused(|_, s| s.heartbeat.nonce = "m".into()).unwrap().contains("earlier point in time"));
        assert_eq!(refused(|_, s| s.heartbeat = Heartbeat { beat: 6, nonce: "x".into() }), None);
        assert!(refused(|_, s| s.timeline.system_id = "8".into()).unwrap().contains("another server"));
        let switched = |switch| {
            refused(move |_, s| {
                s.timeline.timeline = 2;
                s.switch_point = switch;
            })
        };
        assert_eq!(switched(Some(Lsn(100))), None);
        assert!(switched(Some(Lsn(99))).unwrap().contains("lost by the server"));
        assert!(switched(None).unwrap().contains("descend"));
    }

    #[test]
    fn h08_a_recreated_topic_is_refused() {
        assert!(refused(|l, _| l.log = Some("b".into())).unwrap().contains("recreated"));
        assert!(refused(|l, _| l.log = None).unwrap().contains("empty"));
    }

    #[test]
    fn h02_a_split_transaction_goes_on_where_it_was_split() {
        let mut with_split = progress();
        with_split.split = Some(Split { commit_lsn: Lsn(120), ordinal: 6, digest: 9 });
        let mut cursor = Cursor::new(&with_split);
        assert_eq!(cursor.transaction(Lsn(99)), Ok(Plan::Skip));
        assert_eq!(cursor.transaction(Lsn(120)), Ok(Plan::From { ordinal: 7, digest: 9 }));
        assert_eq!(cursor.transaction(Lsn(130)), Ok(Plan::From { ordinal: 0, digest: 0 }));
        let mut cursor = Cursor::new(&with_split);
        assert!(cursor.transaction(Lsn(130)).unwrap_err().what.contains("first part"));
    }

    #[test]
    fn h01_a_message_at_the_lsn_of_the_next_transaction_is_not_mistaken() {
        let at = |lsn, kind| {
            Cursor::new(&Progress { position: Position { lsn: Lsn(lsn), kind, ordinal: 0 }, ..progress() })
        };
        assert!(at(100, Kind::Message).has_message(Lsn(100)));
        assert_eq!(
            at(100, Kind::Message).transaction(Lsn(100)),
            Ok(Plan::From { ordinal: 0, digest: 0 }),
            "the transaction at the message's LSN is still to come"
        );
        assert!(!at(90, Kind::Transaction).has_message(Lsn(100)));
    }
}
