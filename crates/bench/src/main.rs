//! Measures Millrace beside its limits and its peers: real services on this machine, every side in the same run on the
//! same backlog, counted at the destination after the clock has stopped. `scripts/bench` builds and runs it.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};

mod backlog;
mod idle;
mod latency;
mod ledger;
mod measure;
mod plot;
mod producer;
mod program;
mod report;
mod rounds;
mod run;
mod sides;
mod stack;
mod stores;

use backlog::Shape;
use program::{Build, Variant};
use sides::Side;

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
    /// How often each side, or each build, is measured
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
    /// Refuses sides that cannot run.
    fn check(&self) -> Result<()> {
        let fit = self.shape.sides();
        for side in self.sides.iter().flatten() {
            let (name, shape) = (value_name(side), value_name(&self.shape));
            let others: Vec<_> = fit.iter().map(value_name).collect();
            let others = others.join(", ");
            ensure!(fit.contains(side), "the shape `{shape}` has no side `{name}`, only: {others}");
            ensure!(
                side.own().is_none() || self.variant.is_given(),
                "the side `{name}` runs another build of Millrace: name it with --program PATH, \
                 or this build's other settings with --property NAME=VALUE"
            );
        }
        Ok(())
    }

    fn sides(&self) -> Vec<Side> {
        let given = |side: &Side| side.own().is_none() || self.variant.is_given();
        let fit = || self.shape.sides().iter().copied().filter(given).collect();
        self.sides.clone().unwrap_or_else(fit)
    }

    /// The builds to measure, where a build is not a side.
    fn builds(&self) -> Vec<Build<'_>> {
        let other = self.variant.is_given().then_some(Build::Other(&self.variant));
        [Build::Own].into_iter().chain(other).collect()
    }

    /// The build that a side runs.
    fn build(&self, side: Side) -> Build<'_> {
        if side.own().is_some() { Build::Other(&self.variant) } else { Build::Own }
    }
}

/// A value's name on the command line.
fn value_name(value: &impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

fn main() -> Result<()> {
    let options = Options::parse();
    options.check()?;
    let samples = match options.shape {
        Shape::Steady => {
            let stacks = rounds::run(&options, &latency::COLUMNS, |build| latency::run(&options, build))?;
            report::print_figures(&options, "visible in", &latency::COLUMNS, &stacks);
            return Ok(());
        }
        Shape::Idle => {
            let stacks = rounds::run(&options, &idle::COLUMNS, |build| idle::run(&options, build))?;
            report::print_figures(&options, "process", &idle::COLUMNS, &stacks);
            return Ok(());
        }
        Shape::Stores => stores::run(&options)?,
        Shape::Batches | Shape::Singles | Shape::One | Shape::Snapshot => run::all(&options)?,
    };
    report::print(&options, &samples);
    if let Some(path) = &options.json {
        report::append(path, &options, &samples)?;
    }
    if let Some(path) = &options.plot {
        plot::draw(path, &options, &samples)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(arguments: &[&str]) -> Options {
        Options::parse_from([&["bench"], arguments].concat())
    }

    #[test]
    fn sides_of_another_build_need_one() {
        for (shape, side) in [("batches", "other"), ("stores", "other-counters"), ("stores", "other-search")]
        {
            let alone = options(&[shape, "--sides", side]);
            assert!(alone.check().is_err_and(|error| error.to_string().contains("--program")), "{side}");
            let with = options(&[shape, "--sides", side, "--program", "/proc/self/exe"]);
            assert!(with.check().is_ok(), "{side}");
        }
    }

    #[test]
    fn every_shape_includes_the_other_build_by_default() {
        for shape in Shape::value_variants() {
            let others = |options: &Options| match shape {
                Shape::Steady | Shape::Idle => options.builds().len() - 1,
                _ => options.sides().iter().filter(|side| side.own().is_some()).count(),
            };
            let name = value_name(shape);
            assert_eq!(others(&options(&[&name])), 0, "{name}");
            assert!(others(&options(&[&name, "--program", "/proc/self/exe"])) > 0, "{name}");
        }
    }
}
