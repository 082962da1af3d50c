//! The figures, for people and for programs.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use anyhow::Result;
use clap::ValueEnum as _;
use comfy_table::{CellAlignment, Table, presets};
use serde_json::json;

use crate::Options;
use crate::backlog::Shape;
use crate::idle::Rest;
use crate::latency::Latency;
use crate::measure::Sample;
use crate::sides::Side;

/// Medians of the rounds as a table in Markdown. Every side drained the same, so that a ratio is one of times.
pub(crate) fn print(options: &Options, samples: &[Sample]) {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN).set_header([
        "side",
        "rows/s",
        "of limit",
        "own CPU µs/row",
        if options.shape == Shape::Stores { "Redis" } else { "walsender" },
        "broker",
        "peak MiB",
        "rows counted",
    ]);
    for side in &options.sides() {
        let figure = |figure: &dyn Fn(&Sample) -> f64| of(samples, *side, figure).unwrap_or(f64::NAN);
        let rate = figure(&Sample::rows_per_second);
        table.add_row([
            side.name().to_owned(),
            format!("{rate:.0}"),
            of(samples, side.limit(), &Sample::rows_per_second)
                .map_or("-".into(), |limit| format!("{:.2}", rate / limit)),
            format!("{:.1}", figure(&|sample| sample.per_row(sample.own))),
            format!("{:.1}", figure(&|sample| sample.per_row(sample.server))),
            format!("{:.1}", figure(&|sample| sample.per_row(sample.broker))),
            match figure(&|sample| sample.peak_kib as f64 / 1024.0) {
                0.0 => "-".to_owned(),
                peak => format!("{peak:.0}"),
            },
            format!("{:.0}", figure(&|sample| sample.rows as f64)),
        ]);
    }
    table.column_iter_mut().skip(1).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    println!("{table}");
}

/// How long a commit took to be visible, as a table in Markdown.
pub(crate) fn print_latencies(latencies: &[Latency]) {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN).set_header(["visible in", "p50 ms", "p99 ms", "max ms"]);
    for Latency { place, p50, p99, max } in latencies {
        let ms = [p50, p99, max].map(|time| format!("{:.1}", time.as_secs_f64() * 1e3));
        table.add_row([&[(*place).to_owned()][..], &ms].concat());
    }
    table.column_iter_mut().skip(1).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    println!("{table}");
}

/// What each process takes at rest, as a table in Markdown.
pub(crate) fn print_rest(rest: &[Rest]) {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN).set_header(["process", "% of a core", "peak MiB"]);
    for Rest { process, cpu, peak_kib } in rest {
        let peak = *peak_kib as f64 / 1024.0;
        table.add_row([(*process).to_owned(), format!("{cpu:.2}"), format!("{peak:.0}")]);
    }
    table.column_iter_mut().skip(1).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    println!("{table}");
}

/// A line of JSON for each sample.
pub(crate) fn append(path: &Path, options: &Options, samples: &[Sample]) -> Result<()> {
    let mut file = File::options().create(true).append(true).open(path)?;
    let shape = options.shape.to_possible_value().map(|value| value.get_name().to_owned());
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

/// The median over the rounds of one side's figure; `None` for a side that did not run.
pub(crate) fn of(samples: &[Sample], side: Side, figure: &dyn Fn(&Sample) -> f64) -> Option<f64> {
    median(samples.iter().filter(|sample| sample.side == side.name()).map(figure).collect())
}

fn median(mut figures: Vec<f64>) -> Option<f64> {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied()
}
