//! Millrace: committed changes of Postgres to derived stores, exactly once.

mod cli;
mod commands;
mod config;
mod failpoint;
mod failure;
mod logs;
mod stop;
mod supervise;
mod telemetry;
mod wiring;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match commands::execute(cli::Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprint!("{failure}");
            failure.code()
        }
    }
}
