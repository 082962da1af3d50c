//! What follows when the relay or a worker ends with an error: another try, and when, or the end.

use std::collections::VecDeque;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::{Duration, Instant};

use change::{NEW_LOG, Refusal};
use relay::{PublishError, RelayError, SourceError};
use worker::{FeedError, WorkerError};

use crate::failure::Failure;

/// Waits between tries, doubled from the first to the last.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(15));
/// After a run of this length an outage counts as a new one.
const HEALTHY: Duration = Duration::from_secs(60);
/// After being fenced: long enough for the newer one to take the slot or the log, so that this one finds it held.
const FENCED_PAUSE: Duration = Duration::from_secs(3);
/// So often within [`FENCED_WITHIN`] is no take-over any more but two processes that fence each other for ever (h10).
const FENCED_LIMIT: usize = 3;
const FENCED_WITHIN: Duration = Duration::from_secs(300);

/// What to do next.
#[derive(Debug)]
pub(crate) enum Next {
    /// Make new ports after this time and run again.
    Again(Duration),
    /// Give up.
    End(Failure),
}

/// Remembers what happened so far.
pub(crate) struct Supervisor {
    back_off: Duration,
    fenced: VecDeque<Instant>,
    /// Whether the relay was refused in the middle of a transaction when it ended last.
    midway: bool,
}

impl Supervisor {
    pub(crate) fn new() -> Self {
        Supervisor { back_off: BACK_OFF.0, fenced: VecDeque::new(), midway: false }
    }

    /// After the relay ran from `started` to `now`.
    pub(crate) fn after_relay(&mut self, error: RelayError, started: Instant, now: Instant) -> Next {
        let again = std::mem::replace(&mut self.midway, matches!(error, RelayError::RefusedMidway(_)));
        match error {
            RelayError::RefusedMidway(_) if !again => Next::Again(Duration::ZERO),
            RelayError::Refused(refusal)
            | RelayError::RefusedMidway(refusal)
            | RelayError::Source(SourceError::Refused(refusal))
            | RelayError::Publish(PublishError::Refused(refusal)) => Next::End(refusal.into()),
            RelayError::Publish(PublishError::Fenced) => self.after_fencing("reader", now),
            RelayError::Source(SourceError::Unavailable(_))
            | RelayError::Publish(PublishError::Unavailable(_)) => Next::Again(self.longer(now - started)),
        }
    }

    /// After a worker ran from `started` to `now`; `store` is one that has stopped.
    pub(crate) fn after_worker(
        &mut self,
        error: WorkerError,
        part: &str,
        (store, log): (&str, &str),
        started: Instant,
        now: Instant,
    ) -> Next {
        match error {
            WorkerError::Feed(FeedError::Unavailable(_)) => Next::Again(self.longer(now - started)),
            WorkerError::Feed(FeedError::Fenced) => self.after_fencing(part, now),
            error => Next::End(refusal_of(&error, store, log).into()),
        }
    }

    fn after_fencing(&mut self, part: &str, now: Instant) -> Next {
        self.fenced.push_back(now);
        while self.fenced.front().is_some_and(|first| now - *first > FENCED_WITHIN) {
            self.fenced.pop_front();
        }
        if self.fenced.len() > FENCED_LIMIT {
            let what = format!(
                "fenced {} times within {} s by another `millrace {part}`",
                self.fenced.len(),
                FENCED_WITHIN.as_secs()
            );
            return Next::End(Failure::Fenced(what));
        }
        Next::Again(FENCED_PAUSE + jitter(FENCED_PAUSE))
    }

    fn longer(&mut self, ran: Duration) -> Duration {
        if ran >= HEALTHY {
            self.back_off = BACK_OFF.0;
        }
        let wait = self.back_off;
        self.back_off = (self.back_off * 2).min(BACK_OFF.1);
        wait + jitter(wait)
    }
}

/// What an error that does not go away says to the operator; `log` is the topic, and `store` the store that has stopped.
pub(crate) fn refusal_of(error: &WorkerError, store: &str, log: &str) -> Refusal {
    match error {
        WorkerError::Refused(refusal) | WorkerError::Feed(FeedError::Refused(refusal)) => refusal.clone(),
        WorkerError::Feed(FeedError::Poison { offset, reason }) => poison(log, *offset, reason, ""),
        WorkerError::Poison { offset, reason } => {
            let skip = format!("millrace skip {store} --offset {offset} --reason TEXT leaves it out; ");
            poison(log, *offset, reason, &skip)
        }
        WorkerError::Feed(error) => Refusal::new(error.to_string(), "see the log of the worker"),
    }
}

fn poison(log: &str, offset: i64, reason: &str, skip: &str) -> Refusal {
    Refusal::new(
        format!("topic {log}, partition 0, offset {offset}: {reason}; the store holds what is before it"),
        format!(
            "look at it: kcat -C -t {log} -p 0 -o {offset} -c 1; run the Millrace that wrote it; {skip}or \
             {NEW_LOG}"
        ),
    )
}

/// Up to half of `most`, so that processes that fail together do not try together.
fn jitter(most: Duration) -> Duration {
    // The standard library seeds every RandomState anew.
    let random = RandomState::new().build_hasher().finish();
    most.mul_f64(0.5 * (random as f64 / u64::MAX as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fenced() -> RelayError {
        PublishError::Fenced.into()
    }

    #[test]
    fn h10_repeated_fencing_within_minutes_ends_the_reader_and_seldom_fencing_does_not() {
        let start = Instant::now();
        let mut supervisor = Supervisor::new();
        for _ in 0..FENCED_LIMIT {
            assert!(
                matches!(supervisor.after_relay(fenced(), start, start), Next::Again(wait) if wait >= FENCED_PAUSE)
            );
        }
        assert!(matches!(supervisor.after_relay(fenced(), start, start), Next::End(Failure::Fenced(_))));

        let mut supervisor = Supervisor::new();
        for minutes in 0..20 {
            let now = start + Duration::from_secs(120 * minutes);
            assert!(matches!(supervisor.after_relay(fenced(), start, now), Next::Again(_)), "{minutes}");
        }
    }

    #[test]
    fn outages_are_waited_out_longer_and_longer_and_forgotten_after_health() {
        let start = Instant::now();
        let mut supervisor = Supervisor::new();
        let mut wait = |ran| {
            let error = SourceError::Unavailable("away".into()).into();
            match supervisor.after_relay(error, start, start + ran) {
                Next::Again(wait) => wait,
                Next::End(failure) => panic!("{failure}"),
            }
        };
        let first = wait(Duration::ZERO);
        assert!((BACK_OFF.0..=BACK_OFF.0.mul_f64(1.5)).contains(&first), "{first:?}");
        let later = (0..20).map(|_| wait(Duration::ZERO)).last().unwrap();
        assert!((BACK_OFF.1..=BACK_OFF.1.mul_f64(1.5)).contains(&later), "{later:?}");
        assert!(wait(HEALTHY) <= BACK_OFF.0.mul_f64(1.5));
    }

    #[test]
    fn refusals_end_with_their_remedy() {
        let start = Instant::now();
        let refusal = Refusal::new("slot lost", "do this");
        let error = RelayError::Source(SourceError::Refused(refusal));
        match Supervisor::new().after_relay(error, start, start) {
            Next::End(failure) => assert_eq!(failure.to_string(), "error: slot lost\n  remedy: do this\n"),
            Next::Again(_) => panic!("a refusal does not go away"),
        }
    }
}
