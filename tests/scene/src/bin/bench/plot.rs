//! A drawing of what calls cost in larger stores: both axes are logarithmic. Pure.

use std::fmt::Write as _;

/// A line of the drawing.
pub struct Series {
    pub name: String,
    /// (snapshots, seconds)
    pub points: Vec<(f64, f64)>,
    /// Another snapshotter, whose line is dashed.
    pub peer: bool,
}

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 520.0;
const LEFT: f64 = 84.0;
const RIGHT: f64 = 250.0;
const TOP: f64 = 52.0;
const BOTTOM: f64 = 64.0;
/// Colours of Okabe and Ito, which colour-blind readers can tell apart.
const COLOURS: [&str; 6] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];
const GREYS: [&str; 3] = ["#000000", "#777777", "#b0b0b0"];

/// A logarithmic axis from one power of ten to another, on `from..to` of the drawing.
struct Axis {
    least: i32,
    most: i32,
    from: f64,
    to: f64,
}

impl Axis {
    fn over(values: impl Iterator<Item = f64> + Clone, from: f64, to: f64) -> Self {
        let logs = values.filter(|value| *value > 0.0).map(f64::log10);
        let (least, most) = (logs.clone().fold(f64::INFINITY, f64::min), logs.fold(f64::NEG_INFINITY, f64::max));
        #[allow(clippy::cast_possible_truncation)]
        let (least, most) = if least.is_finite() { (least.floor() as i32, most.ceil() as i32) } else { (0, 1) };
        Self { least, most: most.max(least + 1), from, to }
    }

    fn place(&self, value: f64) -> f64 {
        let share = (value.log10() - f64::from(self.least)) / f64::from(self.most - self.least);
        self.from + (self.to - self.from) * share
    }

    fn powers(&self) -> impl Iterator<Item = f64> {
        (self.least..=self.most).map(|power| 10_f64.powi(power))
    }
}

pub fn svg(title: &str, series: &[Series]) -> String {
    let points = || series.iter().flat_map(|s| s.points.iter());
    let x = Axis::over(points().map(|p| p.0), LEFT, WIDTH - RIGHT);
    let y = Axis::over(points().map(|p| p.1 * 1e6), HEIGHT - BOTTOM, TOP);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" \
         height=\"{HEIGHT}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n"
    );
    text(&mut out, LEFT, 28.0, "start", "font-size=\"16\" font-weight=\"bold\"", title);
    for value in x.powers() {
        let at = x.place(value);
        line(&mut out, [at, TOP, at, HEIGHT - BOTTOM], "stroke=\"#ddd\"");
        text(&mut out, at, HEIGHT - BOTTOM + 20.0, "middle", "", &label(value));
    }
    for value in y.powers() {
        let at = y.place(value);
        line(&mut out, [LEFT, at, WIDTH - RIGHT, at], "stroke=\"#ddd\"");
        text(&mut out, LEFT - 8.0, at + 4.0, "end", "", &label(value));
    }
    line(&mut out, [LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM], "stroke=\"#333\"");
    line(&mut out, [LEFT, TOP, LEFT, HEIGHT - BOTTOM], "stroke=\"#333\"");
    let (middle, centre) = (f64::midpoint(LEFT, WIDTH - RIGHT), f64::midpoint(TOP, HEIGHT - BOTTOM));
    text(&mut out, middle, HEIGHT - 18.0, "middle", "", "snapshots in the store");
    let turned = format!("transform=\"rotate(-90 22 {centre})\"");
    text(&mut out, 22.0, centre, "middle", &turned, "one call, µs (median)");
    let (mut colours, mut greys) = (COLOURS.iter().cycle(), GREYS.iter().cycle());
    for (n, s) in series.iter().enumerate() {
        let (next, dashes) = if s.peer { (greys.next(), " stroke-dasharray=\"6 4\"") } else { (colours.next(), "") };
        let colour = next.expect("a circle has no end");
        let style = format!("stroke=\"{colour}\" stroke-width=\"2\"{dashes}");
        let places: Vec<(f64, f64)> = s.points.iter().map(|p| (x.place(p.0), y.place(p.1 * 1e6))).collect();
        let path: Vec<String> = places.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let _ = writeln!(out, "<polyline fill=\"none\" {style} points=\"{}\"/>", path.join(" "));
        for (x, y) in places {
            let _ = writeln!(out, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\" fill=\"{colour}\"/>");
        }
        let (left, row) = (WIDTH - RIGHT + 16.0, TOP + 10.0 + 22.0 * crate::stats::float(n));
        line(&mut out, [left, row, left + 30.0, row], &style);
        text(&mut out, left + 38.0, row + 4.0, "start", "", &s.name);
    }
    out.push_str("</svg>\n");
    out
}

fn line(out: &mut String, [x1, y1, x2, y2]: [f64; 4], style: &str) {
    let _ = writeln!(out, "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" {style}/>");
}

fn text(out: &mut String, x: f64, y: f64, anchor: &str, style: &str, what: &str) {
    let what = escaped(what);
    let _ =
        writeln!(out, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"#222\" {style}>{what}</text>");
}

fn label(power: f64) -> String {
    let plain = format!("{power}");
    let Some(zeros) = plain.len().checked_sub(4).filter(|_| power >= 1000.0) else { return plain };
    let (head, tail) = plain.split_at(1 + zeros % 3);
    tail.as_bytes().chunks(3).fold(head.to_owned(), |text, chunk| format!("{text},{}", String::from_utf8_lossy(chunk)))
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
#[allow(clippy::float_cmp)]
mod tests {
    use super::*;

    #[test]
    fn plot_escapes_special_characters_in_names() {
        let one = Series { name: "<a & \"b\">".to_owned(), points: vec![(100.0, 1e-4), (1e5, 2e-4)], peer: true };
        let drawing = svg("t", &[one]);
        assert!(drawing.contains(">&lt;a &amp; &quot;b&quot;&gt;</text>"), "{drawing}");
        assert!(!drawing.contains("<a"));
    }

    #[test]
    fn plot_axis_positions_powers_of_ten_evenly() {
        let axis = Axis::over([150.0, 90_000.0].into_iter(), 0.0, 300.0);
        assert_eq!([100.0, 1000.0, 100_000.0].map(|value| axis.place(value).round()), [0.0, 100.0, 300.0]);
        assert_eq!(
            [1.0, 100.0, 1000.0, 100_000.0, 1_000_000.0].map(label),
            ["1", "100", "1,000", "100,000", "1,000,000"]
        );
    }

    #[test]
    fn plot_without_series_is_a_complete_svg() {
        assert!(svg("empty", &[]).ends_with("</svg>\n"));
    }
}
