//! `millrace demo`: an application with a mailbox, for people to watch. It fills the mailbox with real text, keeps
//! writing, shows the stores beside Postgres, and kills -9 reader, counters and search in turn.
//!
//! It is the application here, not a part of the pipeline: it writes to Postgres over `postgres.admin_url` and reads
//! Redis and the search API as any program would. Whether the stores are right is not judged here; that is
//! `millrace verify`'s part, which scripts/demo runs next. Needs migrations/010_demo.sql applied and `millrace setup`
//! done, and a configuration with counter `unread` and index `emails`.

mod look;
mod mailbox;
mod pipeline;
mod probe;
mod text;
mod traffic;
mod view;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use change::Lsn;
use clap::Args;

use crate::failure::{Failure, Outcome};
use crate::wiring::Process;
use look::Eyes;
use mailbox::Mailbox;
use pipeline::Pipeline;
use probe::{Latency, Probe};
use text::Letters;
use traffic::Traffic;
use view::View;

/// Between two looks on a terminal, and where lines are kept.
const REDRAW: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(2));
/// Between two questions whether a killed process is back.
const TICK: Duration = Duration::from_millis(10);
/// A process that was killed is expected back, with everything, in this time.
const RECOVERY: Duration = Duration::from_secs(60);
/// For the stores to have what the mailbox is filled with.
const FILLED: Duration = Duration::from_secs(120);

/// What `millrace demo` is told; scripts/demo tells it.
#[derive(Clone, Debug, Args)]
pub(crate) struct Options {
    /// Where logs and process ids go: NAME.log, NAME.pid. The processes go on running after the demo's end.
    #[arg(long, value_name = "DIRECTORY")]
    run: PathBuf,
    /// A directory with English prose in .md, .pod, .txt and README files; may be given several times.
    #[arg(long = "text", value_name = "DIRECTORY", required = true)]
    texts: Vec<PathBuf>,
    /// How many mails there are when traffic begins.
    #[arg(long, default_value_t = 5_000, value_parser = clap::value_parser!(u32).range(100..=1_000_000))]
    mails: u32,
    /// How long traffic goes on.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(3..=86_400))]
    seconds: u32,
}

/// Runs the demo; `config` is the file that the processes are started with.
pub(crate) fn execute(process: &Process, config: &Path, options: &Options) -> Outcome {
    let letters = Letters::read(&options.texts)?;
    println!("{} letters from {} works on this machine", letters.len(), letters.works());
    let admin = process.admin()?;
    let mut pipeline = Pipeline::start(config, &options.run)?;

    let mut mailbox = Mailbox::new(process.connect(&admin)?, letters.share());
    let started = Instant::now();
    process.runtime.block_on(mailbox.fill(options.mails))?;
    println!("{} mails committed in {:.1} s", options.mails, started.elapsed().as_secs_f64());
    let mut probe = Probe::new(process)?;
    let filled = probe.reach_all(FILLED, || pipeline.check())?;
    println!("in Redis and in the index {:.1} s later", filled.as_secs_f64());

    let mut writers = Vec::new();
    for _ in 0..traffic::WRITERS {
        writers.push(Mailbox::new(process.connect(&admin)?, letters.share()));
    }
    let traffic = Traffic::start(&process.runtime, writers);
    let shown = show(process, options, &mut pipeline, &mut probe, &traffic);
    let stopped = process.runtime.block_on(traffic.stop());
    shown?;
    Ok(stopped?)
}

/// The view, and the kills: one at each quarter of the time, and none before the last one has been got over.
fn show(
    process: &Process,
    options: &Options,
    pipeline: &mut Pipeline,
    probe: &mut Probe,
    traffic: &Traffic,
) -> Result<(), Failure> {
    let terminal = std::io::stdout().is_terminal();
    let mut eyes = Eyes::new(process)?;
    let mut view = View::new(terminal, options.seconds);
    let pause = if terminal { REDRAW.0 } else { REDRAW.1 };
    let whole = Duration::from_secs(options.seconds.into());
    let started = Instant::now();
    let mut drawn: Option<Instant> = None;
    let mut victims = pipeline::ROLES.iter().zip(1u32..).peekable();
    let mut recovery: Option<Recovery> = None;
    let mut latency = Latency::default();
    while started.elapsed() < whole || recovery.is_some() || victims.peek().is_some() {
        traffic.check()?;
        pipeline.check()?;
        if let Some(killed) = &recovery
            && let Some(away) = killed.over(probe)?
        {
            view.event(
                started.elapsed(),
                &format!("{} has everything again, {} ms after", killed.role, away.as_millis()),
            );
            recovery = None;
        }
        if recovery.is_none()
            && let Some((role, _)) = victims.next_if(|(_, place)| started.elapsed() >= whole * *place / 4)
        {
            let (killed, id) = Recovery::begin(role, pipeline, probe)?;
            view.event(started.elapsed(), &format!("kill -9 {role} (process {id}), and started again"));
            recovery = Some(killed);
        }
        if drawn.is_none_or(|drawn| drawn.elapsed() >= pause) {
            if recovery.is_none() {
                latency = probe.measure()?;
            }
            view.show(started.elapsed(), traffic.so_far(), &eyes.look()?, &latency);
            drawn = Some(Instant::now());
        }
        std::thread::sleep(TICK);
    }
    Ok(())
}

/// A process that was killed and started again, until its stores have all that Postgres had then.
struct Recovery {
    role: &'static str,
    killed: Instant,
    target: Lsn,
}

impl Recovery {
    fn begin(role: &'static str, pipeline: &mut Pipeline, probe: &Probe) -> anyhow::Result<(Self, u32)> {
        let killed = Instant::now();
        let id = pipeline.kill(role)?;
        Ok((Recovery { role, killed, target: probe.now()? }, id))
    }

    /// How long it took, once it is over.
    fn over(&self, probe: &mut Probe) -> anyhow::Result<Option<Duration>> {
        if probe.has(self.role, self.target) {
            return Ok(Some(self.killed.elapsed()));
        }
        let limit = RECOVERY.as_secs();
        anyhow::ensure!(
            self.killed.elapsed() < RECOVERY,
            "{} has not come back within {limit} s; see its log",
            self.role
        );
        Ok(None)
    }
}
