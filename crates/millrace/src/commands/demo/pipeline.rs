//! Reader, counters and search as processes of their own, started, watched and killed.

use std::fs::{self, OpenOptions};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, bail};

/// Its commands of the same names.
pub(super) const ROLES: [&str; 3] = ["reader", "counters", "search"];

/// The three processes. They are not ended with this value: who started the demo decides on that, by the process
/// ids in the run's directory.
pub(super) struct Pipeline {
    program: PathBuf,
    config: PathBuf,
    run: PathBuf,
    children: Vec<(&'static str, Child)>,
}

impl Pipeline {
    pub(super) fn start(config: &Path, run: &Path) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("where this program is")?;
        let config = fs::canonicalize(config).with_context(|| config.display().to_string())?;
        let run = fs::canonicalize(run).with_context(|| run.display().to_string())?;
        let mut pipeline = Pipeline { program, config, run, children: Vec::new() };
        for role in ROLES {
            let child = pipeline.spawn(role)?;
            pipeline.children.push((role, child));
        }
        Ok(pipeline)
    }

    fn spawn(&self, role: &str) -> anyhow::Result<Child> {
        let log = self.run.join(format!("{role}.log"));
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| log.display().to_string())?;
        let mut command = Command::new(&self.program);
        command.arg(role).arg("--config").arg(&self.config).current_dir(&self.run);
        command.stdin(Stdio::null()).stdout(log.try_clone().context("the log")?).stderr(log);
        // Ctrl-C is for the demo, which may leave them running.
        command.process_group(0);
        let child = command.spawn().with_context(|| format!("cannot start {}", self.program.display()))?;
        let file = self.run.join(format!("{role}.pid"));
        fs::write(&file, format!("{}\n", child.id())).with_context(|| file.display().to_string())?;
        Ok(child)
    }

    /// Fails when one has ended by itself.
    pub(super) fn check(&mut self) -> anyhow::Result<()> {
        for (role, child) in &mut self.children {
            if let Some(status) = child.try_wait().with_context(|| format!("process of {role}"))? {
                bail!(
                    "{role} ended by itself: {status}; the end of its log:\n{}",
                    last_lines(&self.run, role)
                );
            }
        }
        Ok(())
    }

    /// kill -9, and a new start at once. Gives the id that was killed.
    pub(super) fn kill(&mut self, role: &str) -> anyhow::Result<u32> {
        let place = self.children.iter().position(|(other, _)| *other == role);
        let place = place.with_context(|| format!("{role} is not running"))?;
        let child = &mut self.children[place].1;
        let killed = child.id();
        child.kill().and_then(|()| child.wait()).with_context(|| format!("cannot kill {role}"))?;
        self.children[place].1 = self.spawn(role)?;
        Ok(killed)
    }
}

fn last_lines(run: &Path, role: &str) -> String {
    const LINES: usize = 12;
    let log = fs::read_to_string(run.join(format!("{role}.log"))).unwrap_or_default();
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}
