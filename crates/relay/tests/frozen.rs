//! A reader that was frozen after it had read the ledger, while another one went on: it compares the old ledger with the
//! new slot. It must find out that it was fenced, and not say that changes are missing.

use std::cmp::Ordering;
use std::time::Duration;

use change::{Clock, LedgerEntry, Lsn, Position, Progress, RecordBatch, Refusal, Timeline};
use relay::{
    Announced, Confirmed, Control, Described, Heartbeat, Ledger, Limits, Publication, PublishError,
    Publisher, ReadRequest, RelayError, Round, RoundEvent, Source, SourceError, SourceState, Unchanged,
    WalEvent,
};

/// What the ledger said when it was read.
const LEDGER_END: Lsn = Lsn(100);
/// Where another reader has moved the slot since.
const SLOT: Lsn = Lsn(200);

struct Older {
    /// Whether a newer publisher has been opened.
    fenced: bool,
}

impl Publisher for Older {
    fn open(&mut self) -> Result<Ledger, PublishError> {
        let progress = Progress {
            log: "a".into(),
            generation: 1,
            end_lsn: LEDGER_END,
            position: Position::START,
            split: None,
            log_end: 1,
            timeline: timeline(),
            beat: (0, String::new()),
            snapshot: None,
            time_ms: 0,
        };
        let log = Some("a".into());
        Ok(Ledger { progress: Some(progress), log, log_end: 1, data_end: Some(1), ..Ledger::default() })
    }

    fn begin(&mut self) -> Result<(), PublishError> {
        unreachable!("nothing is written")
    }

    fn ready(&mut self) -> bool {
        true
    }

    fn append(&mut self, _: &RecordBatch, _: usize) -> Result<(), PublishError> {
        unreachable!("nothing is written")
    }

    fn commit(&mut self, _: &[LedgerEntry], _: &mut Progress) -> Result<(), PublishError> {
        unreachable!("nothing is written")
    }

    fn confirm(&mut self) -> Result<(), PublishError> {
        if self.fenced { Err(PublishError::Fenced) } else { Ok(()) }
    }
}

fn timeline() -> Timeline {
    Timeline { system_id: "1".into(), timeline: 1 }
}

struct Server;

impl Source for Server {
    fn busy(&mut self) -> Result<bool, SourceError> {
        Ok(false)
    }

    fn state(&mut self, _: &Timeline) -> Result<SourceState, SourceError> {
        let (timeline, heartbeat) = (timeline(), Heartbeat::default());
        Ok(SourceState { confirmed_flush: SLOT, flush_lsn: SLOT, timeline, switch_point: None, heartbeat })
    }

    fn take_over(&mut self) -> Result<(), SourceError> {
        unreachable!("nobody holds the slot")
    }

    fn write_heartbeat(&mut self, _: &Heartbeat) -> Result<(), SourceError> {
        unreachable!("it does not come to this")
    }

    fn start(&mut self, _: Lsn) -> Result<(), SourceError> {
        unreachable!("it does not come to this")
    }

    fn poll(
        &mut self,
        _: Duration,
        _: &mut dyn FnMut(WalEvent<'_>) -> Result<(), RelayError>,
    ) -> Result<bool, RelayError> {
        unreachable!("it does not come to this")
    }

    fn published(&mut self) -> Result<Publication, SourceError> {
        unreachable!("it does not come to this")
    }

    fn ask_unchanged(&mut self) {
        unreachable!("it does not come to this")
    }

    fn unchanged(&mut self) -> Result<Unchanged, SourceError> {
        unreachable!("it does not come to this")
    }

    fn absence(&mut self, _: u32, _: &str) -> Result<Option<Refusal>, SourceError> {
        unreachable!("it does not come to this")
    }

    fn describe(&mut self, _: &Announced, _: u32) -> Result<Option<Described>, SourceError> {
        unreachable!("it does not come to this")
    }

    fn visible(&mut self) -> Result<change::Snapshot, SourceError> {
        unreachable!("it does not come to this")
    }

    fn read(
        &mut self,
        _: &[ReadRequest],
        _: u64,
        _: &mut dyn FnMut(&change::Snapshot) -> bool,
        _: &mut dyn FnMut(RoundEvent<'_>) -> Result<(), RelayError>,
    ) -> Result<Round, RelayError> {
        unreachable!("it does not come to this")
    }

    fn compare(
        &mut self,
        _: u32,
        _: &[change::Key],
        _: &change::Key,
    ) -> Result<Option<Vec<Ordering>>, SourceError> {
        unreachable!("it does not come to this")
    }

    fn acknowledge(&mut self, _: Confirmed) -> Result<(), SourceError> {
        unreachable!("it does not come to this")
    }
}

struct Still;

impl Clock for Still {
    fn now_us(&self) -> i64 {
        0
    }

    fn sleep(&self, _: Duration) {}
}

struct Unwatched;

impl Control for Unwatched {
    fn stop(&self) -> bool {
        false
    }
}

fn ended(fenced: bool) -> RelayError {
    let mut publisher = Older { fenced };
    let names = ("mailbox", "app");
    relay::run(&mut Server, &mut publisher, &Still, &Unwatched, names, &Limits::default())
        .expect_err("the slot is ahead of the ledger")
}

#[test]
fn a_reader_that_was_fenced_is_not_refused() {
    let error = ended(true);
    assert!(matches!(error, RelayError::Publish(PublishError::Fenced)), "{error}");
}

#[test]
fn the_only_reader_is_refused() {
    let error = ended(false);
    let RelayError::Refused(refusal) = error else { panic!("{error}") };
    assert!(refusal.what.contains("in neither"), "{refusal}");
}
