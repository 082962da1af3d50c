//! Measures Millrace beside its limits and its peers: real services on this machine, every side in the same run on the
//! same backlog, counted at the destination after the clock has stopped. `scripts/bench` builds and runs it.

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;

mod backlog;
mod idle;
mod latency;
mod measure;
mod plot;
mod producer;
mod report;
mod run;
mod sides;
mod stack;
mod stores;

use backlog::Shape;
use sides::{Side, Variant};

/// What to measure.
#[derive(Parser, Debug)]
#[command(about, max_term_width = 100)]
struct Options {
    /// The backlog that every side drains
    #[arg(value_enum, default_value = "batches")]
    shape: Shape,
    /// Rows that are inserted, and then updated
    #[arg(long, default_value_t = 1_000_000)]
    rows: u64,
    /// Transactions a second, where they come at a steady rate
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rate: u32,
    /// How often each side drains it
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=10))]
    rounds: u32,
    /// The sides, in the order of the first round; every other round goes the other way [default: all that fit]
    #[arg(long, value_enum, value_delimiter = ',')]
    sides: Option<Vec<Side>>,
    #[command(flatten)]
    variant: Variant,
    /// Where to append the figures as JSON lines
    #[arg(long)]
    json: Option<PathBuf>,
    /// Where to draw the rates, as SVG
    #[arg(long)]
    plot: Option<PathBuf>,
}

impl Options {
    fn sides(&self) -> Vec<Side> {
        let fit = match self.shape {
            Shape::Steady => vec![Side::Reader, Side::Counters, Side::Search],
            Shape::Stores => vec![Side::Consumer, Side::Redis, Side::Counters, Side::Tantivy, Side::Search],
            _ => vec![Side::Limit, Side::Again, Side::Reader, Side::Producer, Side::Debezium],
        };
        self.sides.clone().unwrap_or(fit)
    }
}

fn main() -> Result<()> {
    let options = Options::parse();
    if options.shape == Shape::Steady {
        report::print_latencies(&latency::run(&options)?);
        return Ok(());
    }
    if options.shape == Shape::Idle {
        report::print_rest(&idle::run()?);
        return Ok(());
    }
    let samples = if options.shape == Shape::Stores { stores::run(&options)? } else { run::all(&options)? };
    report::print(&options, &samples);
    if let Some(path) = &options.json {
        report::append(path, &options, &samples)?;
    }
    if let Some(path) = &options.plot {
        plot::draw(path, &options, &samples)?;
    }
    Ok(())
}
