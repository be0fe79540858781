//! The bar chart of the demo's measurements. Each group of bars has its own scale.

use std::fmt::Write as _;

/// Bars that are compared, with what each is called.
pub struct Group {
    pub name: &'static str,
    pub unit: &'static str,
    /// The value of each of `SIDES`.
    pub values: [f64; 2],
}

const SIDES: [&str; 2] = ["normal pull", "cvmfs-snapshotter"];
/// Colours of Okabe and Ito, which colour-blind readers can tell apart.
const COLOURS: [&str; 2] = ["#777777", "#0072b2"];
const WIDTH: f64 = 860.0;
const LEFT: f64 = 210.0;
const LONGEST: f64 = 520.0;
const BAR: f64 = 16.0;
const GAP: f64 = 18.0;
const TOP: f64 = 70.0;

pub fn svg(title: &str, groups: &[Group]) -> String {
    #[allow(clippy::cast_precision_loss)]
    let height = TOP + groups.len() as f64 * (2.0 * BAR + GAP);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n<rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n\
         <text x=\"16\" y=\"28\" font-size=\"16\" font-weight=\"bold\">{title}</text>\n"
    );
    // Writing into memory cannot fail.
    let mut x = 16.0;
    for (side, colour) in SIDES.iter().zip(COLOURS) {
        let _ = writeln!(out, "<rect x=\"{x}\" y=\"42\" width=\"12\" height=\"12\" fill=\"{colour}\"/>");
        let _ = writeln!(out, "<text x=\"{}\" y=\"53\">{side}</text>", x + 18.0);
        x += 210.0;
    }
    let mut y = TOP;
    for Group { name, unit, values } in groups {
        let longest = values.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
        let _ = writeln!(out, "<text x=\"16\" y=\"{}\">{name}</text>", y + 1.5 * BAR + 4.0);
        for (value, colour) in values.iter().zip(COLOURS) {
            let width = (value / longest * LONGEST).max(1.0);
            let _ = writeln!(
                out,
                "<rect x=\"{LEFT}\" y=\"{y}\" width=\"{width:.1}\" height=\"{}\" fill=\"{colour}\"/>",
                BAR - 2.0
            );
            let digits = if *value < 10.0 { 2 } else { 0 };
            let _ = writeln!(
                out,
                "<text x=\"{:.1}\" y=\"{}\">{value:.digits$} {unit}</text>",
                LEFT + width + 6.0,
                y + 12.0
            );
            y += BAR;
        }
        y += GAP;
    }
    out.push_str("</svg>\n");
    out
}
