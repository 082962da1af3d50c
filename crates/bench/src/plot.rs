//! The rates as a picture: a bar for each side, its rounds as dots.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::measure::Sample;
use crate::report::{median, of};
use crate::{Options, value_name};

const SIZE: (u32, u32) = (720, 360);
/// Of what runs beside Millrace, and of Millrace.
const PEER: RGBColor = RGBColor(170, 178, 189);
const OURS: RGBColor = RGBColor(38, 110, 180);

pub(crate) fn draw(path: &Path, options: &Options, samples: &[Sample]) -> Result<()> {
    let sides = options.sides();
    let most = samples.iter().map(Sample::rows_per_second).fold(0.0, f64::max);
    let shape = value_name(&options.shape);
    let failed = |error: &dyn std::fmt::Display| anyhow!("cannot draw {}: {error}", path.display());

    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE).map_err(|e| failed(&e))?;
    let mut chart = ChartBuilder::on(&root)
        .caption(format!("{shape}: thousand rows a second"), ("sans-serif", 18))
        .margin(10)
        .x_label_area_size(30)
        .y_label_area_size(50)
        .build_cartesian_2d((0..sides.len().saturating_sub(1)).into_segmented(), 0.0..most * 1.1 / 1000.0)
        .map_err(|e| failed(&e))?;
    let name = |place: &SegmentValue<usize>| match place {
        SegmentValue::CenterOf(place) => sides.get(*place).map_or("", |side| side.name()).to_owned(),
        _ => String::new(),
    };
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(WHITE)
        .x_label_formatter(&name)
        .y_label_formatter(&|rate| format!("{rate:.0}"))
        .draw()
        .map_err(|e| failed(&e))?;
    let bars = sides.iter().enumerate().map(|(place, side)| {
        let rate = median(of(samples, *side, Sample::rows_per_second)).unwrap_or(0.0);
        let (from, to) = (SegmentValue::Exact(place), SegmentValue::Exact(place + 1));
        let color = if side.is_ours() { OURS } else { PEER };
        let mut bar = Rectangle::new([(from, 0.0), (to, rate / 1000.0)], color.filled());
        bar.set_margin(0, 0, 14, 14);
        bar
    });
    chart.draw_series(bars).map_err(|e| failed(&e))?;
    let dots = samples.iter().filter_map(|sample| {
        let place = sides.iter().position(|side| side.name() == sample.side)?;
        let at = (SegmentValue::CenterOf(place), sample.rows_per_second() / 1000.0);
        Some(Circle::new(at, 3, BLACK.filled()))
    });
    chart.draw_series(dots).map_err(|e| failed(&e))?;
    root.present().map_err(|e| failed(&e))?;
    Ok(())
}
