//! Loss curves as SVG, whose text is text: no fonts are needed to draw it.

use crate::record::Event;
use anyhow::{Context, Result, anyhow};
use plotters::prelude::*;
use std::path::Path;

/// A line in a picture.
pub struct Curve {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

/// The training and held-out loss of one run.
pub fn run(path: &Path, title: &str, events: &[Event]) -> Result<()> {
    let curve = |name: &str, loss: fn(&Event) -> Option<f64>| Curve {
        name: name.to_owned(),
        points: points(events, loss),
    };
    let curves = [
        curve("training batches", |event| match event {
            Event::Evaluation { train_loss, .. } => *train_loss,
            _ => None,
        }),
        curve("held-out text", held_out),
    ];
    draw(path, title, &curves)
}

pub fn held_out(event: &Event) -> Option<f64> {
    match event {
        Event::Evaluation { held_out_loss, .. } => Some(*held_out_loss),
        _ => None,
    }
}

/// Steps and losses.
pub fn points(events: &[Event], loss: impl Fn(&Event) -> Option<f64>) -> Vec<(f64, f64)> {
    events
        .iter()
        .filter_map(|event| match event {
            Event::Evaluation { step, .. } => Some((*step as f64, loss(event)?)),
            _ => None,
        })
        .collect()
}

/// Draws `curves` over the steps, with a legend.
pub fn draw(path: &Path, title: &str, curves: &[Curve]) -> Result<()> {
    let mut svg = String::new();
    render(&mut svg, title, curves).map_err(|error| anyhow!("cannot draw {title}: {error}"))?;
    std::fs::write(path, svg).with_context(|| format!("cannot write {}", path.display()))
}

fn render(
    svg: &mut String,
    title: &str,
    curves: &[Curve],
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    const COLOURS: [RGBColor; 3] = [
        RGBColor(0, 90, 181),
        RGBColor(220, 50, 32),
        RGBColor(60, 140, 60),
    ];
    let points = || curves.iter().flat_map(|curve| &curve.points);
    let last = points().map(|p| p.0).fold(1., f64::max);
    let low = points().map(|p| p.1).fold(f64::INFINITY, f64::min);
    let high = points().map(|p| p.1).fold(f64::NEG_INFINITY, f64::max);
    let (low, high) = if low < high { (low, high) } else { (0., 1.) };
    let margin = 0.05 * (high - low);
    let root = SVGBackend::with_string(svg, (760, 420)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 16))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(50)
        .build_cartesian_2d(0. ..last, low - margin..high + margin)?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .x_desc("steps")
        .y_desc("loss, nats a token")
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.2}"))
        .draw()?;
    for (i, curve) in curves.iter().enumerate() {
        // Each narrower than those below it, so that equal curves are all seen.
        let width = 2 * (curves.len() - i) as u32;
        let style = ShapeStyle::from(COLOURS[i % COLOURS.len()]).stroke_width(width);
        chart
            .draw_series(LineSeries::new(curve.points.iter().copied(), style))?
            .label(&curve.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], style));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .label_font(("sans-serif", 14))
        .background_style(WHITE)
        .border_style(BLACK.mix(0.3))
        .draw()?;
    root.present()?;
    drop(chart);
    drop(root);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_has_its_title_and_its_curves() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("loss.svg");
        let curve = |name: &str, points: &[(f64, f64)]| Curve {
            name: name.to_owned(),
            points: points.to_vec(),
        };
        let curves = [
            curve("falls", &[(0., 4.), (10., 2.)]),
            curve("is empty", &[]),
        ];
        draw(&path, "a title", &curves).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        for text in ["a title", "falls", "is empty", "steps", "polyline"] {
            assert!(svg.contains(text), "{text}");
        }
        draw(&path, "a point", &[curve("one", &[(0., 4.)])]).unwrap();
        draw(&path, "nothing", &[]).unwrap();
    }
}
