//! Tables, sizes, ages and progress for a terminal.
#![forbid(unsafe_code)]

use std::fmt::Write;
use std::io::{IsTerminal, Write as _};

use crate::model::printable;

/// Formats rows so that each column is as wide as its widest cell.
pub fn table<const N: usize>(head: [&str; N], rows: impl Iterator<Item = [String; N]>) -> String {
    let rows: Vec<[String; N]> =
        [head.map(str::to_owned)].into_iter().chain(rows).map(|row| row.map(|text| cell(&text))).collect();
    let mut widths = [0; N];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            // Writing into memory cannot fail.
            let _ = write!(line, "{cell:<width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// A text as it stands in a table: without control characters, and cut so that rows are not wider than a screen.
fn cell(text: &str) -> String {
    const MAX_CHARACTERS: usize = 100;
    match text.char_indices().nth(MAX_CHARACTERS) {
        Some((end, _)) => format!("{}…", printable(&text[..end])),
        None => printable(text),
    }
}

/// Formats bytes in units of 1000, as `docker` and `nerdctl` do.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["kB", "MB", "GB", "TB", "PB"];
    let mut unit = "B";
    let mut number = bytes * 10;
    for larger in UNITS {
        if number < 10_000 {
            break;
        }
        (unit, number) = (larger, number / 1000);
    }
    if unit == "B" || number >= 1000 {
        format!("{} {unit}", number / 10)
    } else {
        format!("{}.{} {unit}", number / 10, number % 10)
    }
}

/// Formats seconds in the largest unit of which there are at least two.
pub fn age(seconds: u64) -> String {
    for (unit, name) in [(86_400, "days"), (3600, "hours"), (60, "minutes")] {
        if seconds >= 2 * unit {
            return format!("{} {name}", seconds / unit);
        }
    }
    format!("{seconds} seconds")
}

/// A line on the terminal that says how far long work is. It is erased at the end, and not shown if standard error is not a
/// terminal.
pub struct Progress {
    is_shown: bool,
}

impl Progress {
    pub fn new() -> Self {
        Self { is_shown: std::io::stderr().is_terminal() }
    }

    pub fn set_message(&self, message: &str) {
        if self.is_shown {
            let _ = write!(std::io::stderr(), "\r\x1b[K{message}");
        }
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.set_message("");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [["grün", "2"], ["a\x1b[2Jlonger", ""]].map(|row| row.map(str::to_owned));
        assert_eq!(
            table(["IMAGE", "USED BY"], rows.into_iter()),
            "IMAGE        USED BY\ngrün         2\na?[2Jlonger\n"
        );
    }

    #[test]
    fn sizes_and_ages_have_two_or_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 kB"),
            (99_949, "99.9 kB"),
            (123_456, "123 kB"),
            (9_100_000_000, "9.1 GB"),
        ] {
            assert_eq!(size(bytes), text);
        }
        for (seconds, text) in
            [(0, "0 seconds"), (119, "119 seconds"), (120, "2 minutes"), (7199, "119 minutes"), (172_800, "2 days")]
        {
            assert_eq!(age(seconds), text);
        }
    }
}
