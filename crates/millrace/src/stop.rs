//! The one way to end a process in order: everyone asks, and everyone who waits is woken.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use change::Clock;
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};

use crate::failure::COULD_NOT;

/// What a shell gives for a process ended by SIGINT.
const ENDED_BY_SIGNAL: i32 = 130;
/// How long an orderly end may take. Below the 30 s after which many supervisors use kill -9.
const GRACE: Duration = Duration::from_secs(10);

/// Whether to end. Clones share the answer.
#[derive(Clone, Default)]
pub(crate) struct Stop(Arc<(Mutex<bool>, Condvar)>);

impl Stop {
    /// One that SIGTERM and SIGINT set. A second signal ends the process at once, and so does an orderly end
    /// that takes longer than [`GRACE`]; nothing is lost by that.
    pub(crate) fn on_signals(runtime: &Runtime) -> std::io::Result<Self> {
        let stop = Stop::default();
        let _guard = runtime.enter();
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let told = stop.clone();
        // Ends with the runtime, which its owner drops last.
        runtime.spawn(async move {
            let mut signalled = async || {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
            };
            signalled().await;
            tracing::info!("ending in order; a second signal ends at once");
            told.set();
            if tokio::time::timeout(GRACE, signalled()).await.is_ok() {
                tracing::warn!("second signal: ending at once");
                std::process::exit(ENDED_BY_SIGNAL);
            }
            tracing::warn!(
                "a server does not answer: ending without it; the next start goes on from what is durable"
            );
            std::process::exit(COULD_NOT.into());
        });
        Ok(stop)
    }

    pub(crate) fn set(&self) {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.0.1.notify_all();
    }

    pub(crate) fn is_set(&self) -> bool {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for `duration`, or less when told to end. Whether to end.
    pub(crate) fn wait(&self, duration: Duration) -> bool {
        let guard = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.0.1.wait_timeout_while(guard, duration, |set| !*set);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// The system's clock; its sleeps end when the process is to end.
#[derive(Clone)]
pub(crate) struct SystemClock(pub(crate) Stop);

impl Clock for SystemClock {
    fn now_us(&self) -> i64 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        i64::try_from(now.as_micros()).unwrap_or(i64::MAX)
    }

    fn sleep(&self, duration: Duration) {
        self.0.wait(duration);
    }
}
