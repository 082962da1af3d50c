//! Rounds of the shapes that measure a whole stack: in each round, every build on a stack of its own.

use anyhow::{Context, Result};

use crate::Options;
use crate::program::Build;

/// A column of figures: its heading, and the decimals to print.
pub(crate) type Column = (&'static str, usize);

/// The figures of one subject in one round, in the order of the shape's columns.
pub(crate) struct Figures {
    pub(crate) build: &'static str,
    /// A process, or a place where rows become visible.
    pub(crate) subject: &'static str,
    pub(crate) values: Vec<f64>,
}

/// Measures every build in every round. Returns the figures of each stack, in the order of the rounds.
pub(crate) fn run(
    options: &Options,
    columns: &[Column],
    measure: impl Fn(Build<'_>) -> Result<Vec<Figures>>,
) -> Result<Vec<Vec<Figures>>> {
    let mut stacks = Vec::new();
    for round in 1..=options.rounds {
        for build in in_order(options.builds(), round) {
            let name = build.name();
            eprintln!("round {round}, {name}: starting a stack");
            let figures = measure(build).with_context(|| format!("{name} in round {round}"))?;
            for Figures { subject, values, .. } in &figures {
                let values = columns.iter().zip(values);
                let texts =
                    values.map(|((heading, decimals), value)| format!("{heading} {value:.decimals$}"));
                eprintln!("round {round}, {name}: {subject:<8} {}", texts.collect::<Vec<_>>().join(", "));
            }
            stacks.push(figures);
        }
    }
    Ok(stacks)
}

/// The order of a round: every other one goes in the opposite direction.
pub(crate) fn in_order<T>(mut items: Vec<T>, round: u32) -> Vec<T> {
    if round.is_multiple_of(2) {
        items.reverse();
    }
    items
}
