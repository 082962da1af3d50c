//! The figures, for people and for programs.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use anyhow::Result;
use comfy_table::{CellAlignment, Table, presets};
use serde_json::json;

use crate::backlog::Shape;
use crate::measure::Sample;
use crate::program::Build;
use crate::rounds::{Column, Figures};
use crate::sides::Side;
use crate::{Options, value_name};

type Figure = fn(&Sample) -> f64;

/// Decimals in the table, and the figure; NaN if the sample has none.
const FIGURES: [(usize, Figure); 6] = [
    (0, Sample::rows_per_second),
    (1, |sample| sample.per_row(sample.own)),
    (1, |sample| sample.per_row(sample.server)),
    (1, |sample| sample.per_row(sample.broker)),
    (0, |sample| if sample.peak_kib == 0 { f64::NAN } else { sample.peak_kib as f64 / 1024.0 }),
    (0, |sample| sample.rows as f64),
];

/// Medians of the rounds as a table in Markdown. Every side drained the same, so that a ratio is one of times.
pub(crate) fn print(options: &Options, samples: &[Sample]) {
    let mut table = Table::new();
    table.set_header([
        "side",
        "rows/s",
        "of limit",
        "own CPU µs/row",
        if options.shape == Shape::Stores { "Redis" } else { "walsender" },
        "broker",
        "peak MiB",
        "rows counted",
    ]);
    let rate = |side| median(of(samples, side, Sample::rows_per_second));
    for side in options.sides() {
        let figures = FIGURES.map(|(decimals, figure)| cell(median(of(samples, side, figure)), decimals));
        let limit = rate(side).zip(rate(side.limit())).map(|(rate, limit)| rate / limit);
        table.add_row(row(side.name().to_owned(), figures, cell(limit, 2)));
        let Some(own) = side.own().filter(|own| rate(*own).is_some()) else { continue };
        let ratios = FIGURES.map(|(_, figure)| ratio(of(samples, side, figure), of(samples, own, figure)));
        let label = format!("{} : {}", side.name(), own.name());
        table.add_row(row(label, ratios.map(|ratio| cell(ratio, 2)), cell(None, 2)));
    }
    print_table(table);
}

/// The limit's part comes after the rate.
fn row<const N: usize>(label: String, figures: [String; N], of_limit: String) -> Vec<String> {
    let mut row = Vec::from([label]);
    row.extend(figures);
    row.insert(2, of_limit);
    row
}

/// Medians of the rounds of whole stacks as a table in Markdown. `heading` names the subjects.
pub(crate) fn print_figures(options: &Options, heading: &str, columns: &[Column], stacks: &[Vec<Figures>]) {
    let mut table = Table::new();
    table.set_header([heading].into_iter().chain(columns.iter().map(|(heading, _)| *heading)));
    let builds = options.builds();
    for Figures { subject, .. } in stacks.first().into_iter().flatten() {
        let rounds = |build: Build<'_>, place: usize| -> Vec<f64> {
            let all = stacks.iter().flatten();
            let its = all.filter(|figures| (figures.build, figures.subject) == (build.name(), subject));
            its.map(|figures| figures.values[place]).collect()
        };
        for build in &builds {
            let label = match builds.len() {
                1 => (*subject).to_owned(),
                _ => format!("{subject}, {}", build.name()),
            };
            let medians = columns
                .iter()
                .enumerate()
                .map(|(place, (_, decimals))| cell(median(rounds(*build, place)), *decimals));
            table.add_row([label].into_iter().chain(medians));
        }
        if let [own, other] = builds[..] {
            let ratios =
                (0..columns.len()).map(|place| cell(ratio(rounds(other, place), rounds(own, place)), 2));
            table.add_row([format!("{subject}, other : own")].into_iter().chain(ratios));
        }
    }
    print_table(table);
}

fn print_table(mut table: Table) {
    table.load_preset(presets::ASCII_MARKDOWN);
    table.column_iter_mut().skip(1).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    println!("{table}");
}

/// A figure as text; a dash where there is none.
fn cell(figure: Option<f64>, decimals: usize) -> String {
    figure.map_or("-".to_owned(), |figure| format!("{figure:.decimals$}"))
}

/// A line of JSON for each sample.
pub(crate) fn append(path: &Path, options: &Options, samples: &[Sample]) -> Result<()> {
    let mut file = File::options().create(true).append(true).open(path)?;
    let shape = value_name(&options.shape);
    for sample in samples {
        let line = json!({
            "shape": shape, "side": sample.side, "round": sample.round, "rows": sample.rows,
            "seconds": sample.time.as_secs_f64(), "own_cpu_s": sample.own.as_secs_f64(),
            "server_cpu_s": sample.server.as_secs_f64(), "broker_cpu_s": sample.broker.as_secs_f64(),
            "peak_kib": sample.peak_kib,
        });
        writeln!(file, "{line}")?;
    }
    Ok(())
}

/// One side's figure in every round; empty for a side that did not run.
pub(crate) fn of(samples: &[Sample], side: Side, figure: impl Fn(&Sample) -> f64) -> Vec<f64> {
    samples.iter().filter(|sample| sample.side == side.name()).map(figure).collect()
}

/// The median over the rounds of other : own. Both builds of a round had the machine at about the same speed, so that a
/// round's ratio says more than that of two medians.
fn ratio(other: Vec<f64>, own: Vec<f64>) -> Option<f64> {
    median(other.into_iter().zip(own).map(|(other, own)| other / own).collect())
}

/// The median of the figures that are numbers.
pub(crate) fn median(mut figures: Vec<f64>) -> Option<f64> {
    figures.retain(|figure| figure.is_finite());
    figures.sort_by(f64::total_cmp);
    let half = figures.len() / 2;
    let upper = *figures.get(half)?;
    Some(if figures.len().is_multiple_of(2) { f64::midpoint(figures[half - 1], upper) } else { upper })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratio_is_the_median_of_the_rounds() {
        // The machine was twice as fast in the second round, and something disturbed the third.
        assert_eq!(ratio(vec![110.0, 220.0, 100.0], vec![100.0, 200.0, 500.0]), Some(1.1));
        assert_eq!(ratio(vec![1.0, 3.0], vec![1.0, 1.0]), Some(2.0));
        assert_eq!(ratio(vec![0.0], vec![0.0]), None);
    }
}
