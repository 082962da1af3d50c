//! The commands, a file each.

mod check;
mod counters;
pub(crate) mod demo;
mod generation;
mod reader;
mod rebuild;
mod run;
mod search;
mod service;
mod setup;
mod skip;
mod snapshot;
mod status;
mod stores;
mod tail;
mod teardown;
mod verify;
mod wait;
mod worker;

use crate::cli::{Cli, Command, GenerationCommand};
use crate::config::Config;
use crate::failure::Outcome;
use crate::telemetry;
use crate::wiring::Process;

/// Does what the command line says.
pub(crate) fn execute(cli: Cli) -> Outcome {
    telemetry::log::start(cli.global.log_format, &cli.global.log_level)?;
    let (path, asked_for) = cli.global.config();
    let process = Process::new(Config::load(&path, asked_for)?)?;
    match cli.command {
        Command::Setup { dry_run } => setup::execute(&process, dry_run),
        Command::Snapshot { table, yes } => snapshot::execute(&process, &table, yes),
        Command::Check { format } => check::execute(&process, format),
        Command::Reader { takeover } => run::reader(process, takeover),
        Command::Counters { skip } => run::counters(process, skip.records),
        Command::Search { skip } => run::search(process, skip.records),
        Command::Run { takeover } => run::all(process, takeover),
        Command::Status { format } => status::execute(&process, format),
        Command::Wait { lsn, stores, timeout, format } => {
            wait::execute(&process, lsn, &stores, timeout, format)
        }
        Command::Verify { stores, timeout, all, format } => {
            verify::execute(&process, &stores, timeout, all, format)
        }
        Command::Rebuild { stores, wait, format } => rebuild::execute(&process, &stores, wait, format),
        Command::Skip { store, records, reason } => skip::execute(&process, &store, records.into(), reason),
        Command::Generation(GenerationCommand::New { again, wait, format }) => {
            generation::new(&process, again, wait, format)
        }
        Command::Generation(GenerationCommand::Retire { yes }) => generation::retire(&process, yes),
        Command::Tail { from_beginning, table, limit, format } => {
            tail::execute(&process, from_beginning, table.as_ref(), limit, format)
        }
        Command::Teardown { yes } => teardown::execute(&process, yes),
        Command::Demo(options) => demo::execute(&process, &path, &options),
    }
}

/// Prints a result as one line of JSON.
fn print_line(result: &impl serde::Serialize) {
    match serde_json::to_string(result) {
        Ok(line) => println!("{line}"),
        // Plain structures with text keys always become JSON.
        Err(error) => tracing::error!(%error, "a result could not be printed"),
    }
}
