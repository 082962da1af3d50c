//! What a process used, as the kernel tells.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::Result;
use testkit::services::Kafka;

use crate::sides::Side;

/// Ticks a second of the kernel's CPU accounting; fixed on Linux.
const TICKS: u64 = 100;

/// CPU time that a process has used so far; zero when it is gone.
pub(crate) fn cpu(process: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    // The name, in parentheses, may hold anything.
    let fields: Vec<&str> =
        stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace().collect()).unwrap_or_default();
    let ticks = |place: usize| fields.get(place).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
    // Counted from after the name: utime and stime.
    Duration::from_millis((ticks(11) + ticks(12)) * 1000 / TICKS)
}

/// The most memory that a process has had resident, KiB.
fn peak_kib(process: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// A process under observation. What it used is remembered, for it may end before anybody asks.
pub(crate) struct Watched {
    process: u32,
    before: Duration,
    used: Duration,
    peak_kib: u64,
}

impl Watched {
    pub(crate) fn new(process: u32) -> Self {
        Watched { process, before: cpu(process), used: Duration::ZERO, peak_kib: 0 }
    }

    /// From its birth on.
    pub(crate) fn born(process: u32) -> Self {
        Watched { before: Duration::ZERO, ..Watched::new(process) }
    }

    pub(crate) fn look(&mut self) {
        self.used = self.used.max(cpu(self.process).saturating_sub(self.before));
        self.peak_kib = self.peak_kib.max(peak_kib(self.process));
    }

    pub(crate) fn used(&self) -> Duration {
        self.used
    }

    pub(crate) fn peak_kib(&self) -> u64 {
        self.peak_kib
    }
}

/// One side's figures of one round.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    pub(crate) side: &'static str,
    pub(crate) round: u32,
    /// Row changes that were counted at the destination.
    pub(crate) rows: u64,
    pub(crate) time: Duration,
    /// CPU of the side itself, of the server that it reads from or writes to (walsender, Redis), and of the broker.
    pub(crate) own: Duration,
    pub(crate) server: Duration,
    pub(crate) broker: Duration,
    pub(crate) peak_kib: u64,
}

impl Sample {
    pub(crate) fn rows_per_second(&self) -> f64 {
        self.rows as f64 / self.time.as_secs_f64()
    }

    /// Microseconds of CPU for a row.
    pub(crate) fn per_row(&self, cpu: Duration) -> f64 {
        cpu.as_secs_f64() * 1e6 / self.rows.max(1) as f64
    }
}

/// Looks at something every few milliseconds until it is there.
pub(crate) fn until(
    deadline: Duration,
    mut there: impl FnMut() -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    let begun = Instant::now();
    while !there()? {
        anyhow::ensure!(begun.elapsed() < deadline, "not done after {deadline:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// What this process itself does.
pub(crate) fn within(
    kafka: &Kafka,
    side: Side,
    round: u32,
    drain: impl FnOnce() -> Result<u64>,
) -> Result<Sample> {
    let mut own = Watched::new(std::process::id());
    let mut broker = Watched::new(kafka.id());
    let began = Instant::now();
    let rows = drain()?;
    let time = began.elapsed();
    own.look();
    broker.look();
    Ok(Sample {
        side: side.name(),
        round,
        rows,
        time,
        own: own.used(),
        server: Duration::ZERO,
        broker: broker.used(),
        peak_kib: 0,
    })
}
