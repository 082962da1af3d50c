//! The builds of Millrace under measurement, their configuration and their commands.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::Result;
use testkit::services::{Kafka, Postgres};

use crate::backlog::DATABASE;

/// What distinguishes the other build from this one.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Variant {
    /// Another build of Millrace, to run beside this one
    #[arg(long, value_parser = |path: &str| fs::canonicalize(path))]
    program: Option<PathBuf>,
    /// A librdkafka property, `NAME=VALUE`, that only the other build has
    #[arg(long, value_parser = property)]
    property: Vec<(String, String)>,
}

impl Variant {
    /// True if there is another build to measure.
    pub(crate) fn is_given(&self) -> bool {
        self.program.is_some() || !self.property.is_empty()
    }
}

fn property(text: &str) -> Result<(String, String), &'static str> {
    let (name, value) = text.split_once('=').ok_or("it has the form NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

/// A build of Millrace.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Build<'a> {
    /// Built together with this program
    Own,
    /// `--program` with `--property`; without a program, this build with other properties
    Other(&'a Variant),
}

impl Build<'_> {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Build::Own => "own",
            Build::Other(_) => "other",
        }
    }

    /// Writes a pipeline's configuration into `directory`. `rest` has the tables that follow `[kafka]`.
    pub(crate) fn configure(
        self,
        directory: &Path,
        pipeline: &str,
        postgres: &Postgres,
        kafka: &Kafka,
        rest: &str,
    ) -> Result<()> {
        let mut text = format!(
            "pipeline = \"{pipeline}\"\n[postgres]\nurl = \"{}\"\ntables = [\"public.emails\"]\n\
             [kafka]\nbootstrap = \"{}\"\n[kafka.properties]\n",
            postgres.url(DATABASE),
            kafka.bootstrap()
        );
        if let Build::Other(variant) = self {
            for (name, value) in &variant.property {
                text += &format!("{name:?} = {value:?}\n");
            }
        }
        Ok(fs::write(config(directory), text + rest)?)
    }

    /// A command of the pipeline configured in `directory`.
    pub(crate) fn command(self, directory: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.program());
        command.arg("--config").arg(config(directory)).args(arguments).stdin(Stdio::null());
        command
    }

    fn program(self) -> PathBuf {
        let own = || std::env::current_exe().map(|exe| exe.with_file_name("millrace")).unwrap_or_default();
        match self {
            Build::Other(Variant { program: Some(program), .. }) => program.clone(),
            Build::Own | Build::Other(_) => own(),
        }
    }
}

fn config(directory: &Path) -> PathBuf {
    directory.join("millrace.toml")
}
