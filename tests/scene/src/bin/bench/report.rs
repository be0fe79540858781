//! Everything that was measured: as tables that one can read, and as JSON. Pure.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::stats::{Cell, float};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Measured in seconds, as the next two.
    Micros,
    Millis,
    Seconds,
    /// Measured in bytes.
    Megabytes,
    PerSecond,
    Pieces,
    /// The share of the time of all cores. It appears only in JSON.
    Share,
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Self::Micros => "µs",
            Self::Millis => "ms",
            Self::Seconds => "s",
            Self::Megabytes => "MB",
            Self::PerSecond => "/s",
            Self::Pieces => "",
            Self::Share => "share",
        }
    }

    fn convert(self, value: f64) -> f64 {
        match self {
            Self::Micros => value * 1e6,
            Self::Millis => value * 1e3,
            Self::Megabytes => value / 1e6,
            Self::Seconds | Self::PerSecond | Self::Pieces | Self::Share => value,
        }
    }
}

#[derive(Clone, Debug)]
pub struct Row {
    pub name: String,
    /// With so many snapshots in the store.
    pub at: Option<usize>,
    unit: Unit,
    /// In the order of the group's columns.
    cells: Vec<Option<Cell>>,
}

/// Rows that have the same contestants. The first is ours.
#[derive(Clone, Debug, Default)]
pub struct Group {
    title: String,
    columns: Vec<String>,
    rows: Vec<Row>,
    notes: Vec<String>,
}

impl Group {
    pub fn new(title: &str, columns: &[&str]) -> Self {
        let columns = columns.iter().map(|&name| name.to_owned()).collect();
        Self { title: title.to_owned(), columns, ..Self::default() }
    }

    pub fn put(&mut self, name: &str, unit: Unit, column: &str, cell: Option<Cell>) {
        self.put_at(name, None, unit, column, cell);
    }

    pub fn put_at(&mut self, name: &str, at: Option<usize>, unit: Unit, column: &str, cell: Option<Cell>) {
        let column = self.columns.iter().position(|known| known == column).expect("a cell has a column");
        let row = self.rows.iter().position(|row| row.name == name && row.at == at).unwrap_or_else(|| {
            let cells = vec![None; self.columns.len()];
            self.rows.push(Row { name: name.to_owned(), at, unit, cells });
            self.rows.len() - 1
        });
        self.rows[row].cells[column] = cell;
    }

    /// Why something is missing, or what must be known to read it. Said once.
    pub fn add_note(&mut self, note: String) {
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }

    pub fn columns(&self) -> &[String] {
        &self.columns
    }

    /// The medians of one contestant that were taken with so many snapshots: (snapshots, seconds).
    pub fn growth(&self, name: &str, column: &str) -> Vec<(f64, f64)> {
        let Some(column) = self.columns.iter().position(|known| known == column) else { return Vec::new() };
        let of_name = self.rows.iter().filter(|row| row.name == name);
        of_name.filter_map(|row| Some((float(row.at?), row.cells[column].as_ref()?.median))).collect()
    }

    pub fn table(&self) -> String {
        let mut lines = vec![[vec![String::new()], self.columns.clone()].concat()];
        for row in self.rows.iter().filter(|row| row.unit != Unit::Share) {
            let ours = row.cells[0].as_ref();
            let cells = row.cells.iter().enumerate().map(|(n, cell)| match cell {
                None => "–".to_owned(),
                Some(cell) => format_cell(cell, row.unit, if n == 0 { None } else { ours }),
            });
            lines.push([row.title()].into_iter().chain(cells).collect());
        }
        let widths: Vec<usize> = (0..=self.columns.len())
            .map(|column| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or_default())
            .collect();
        let mut text = format!("{}\n", self.title);
        for line in lines {
            let mut padded = String::new();
            for (cell, &width) in line.iter().zip(&widths) {
                let _ = write!(padded, "{cell:width$}   ");
            }
            let _ = writeln!(text, "  {}", padded.trim_end());
        }
        for note in &self.notes {
            let _ = writeln!(text, "  * {note}");
        }
        text
    }

    pub fn json(&self) -> Value {
        let rows: Vec<Value> = self.rows.iter().map(|row| row.json(&self.columns)).collect();
        json!({ "title": self.title, "rows": rows, "notes": self.notes })
    }
}

impl Row {
    fn title(&self) -> String {
        let at = self.at.map(|at| format!(" at {}", number(float(at)))).unwrap_or_default();
        match self.unit.name() {
            "" => format!("{}{at}", self.name),
            unit => format!("{}{at}, {unit}", self.name),
        }
    }

    fn json(&self, columns: &[String]) -> Value {
        let value = |v: f64| json!(self.unit.convert(v));
        let cells = columns.iter().zip(&self.cells).map(|(column, cell)| {
            let cell = cell.as_ref().map(|cell| {
                json!({
                    "median": value(cell.median),
                    "quartiles": cell.quartiles.map(value),
                    "extremes": cell.extremes.map(value),
                    "samples": cell.samples,
                })
            });
            (column.clone(), cell.unwrap_or(Value::Null))
        });
        let cells: serde_json::Map<String, Value> = cells.collect();
        json!({ "name": self.name, "snapshots": self.at, "unit": self.unit.name(), "contestants": cells })
    }
}

/// The median, how far samples lie apart, and how it compares.
fn format_cell(cell: &Cell, unit: Unit, ours: Option<&Cell>) -> String {
    let [low, high] = cell.spread().map(|value| number(unit.convert(value)));
    let mut text = number(unit.convert(cell.median));
    if low != high {
        let _ = write!(text, " [{low}..{high}]");
    }
    if let Some(ours) = ours.filter(|ours| ours.median > 0.0) {
        let _ = write!(text, " (×{})", number(cell.median / ours.median));
    }
    text
}

/// Three digits of what is small, all of what is large.
fn number(value: f64) -> String {
    let digits = match value.abs() {
        0.0 => 0,
        small if small < 1.0 => 3,
        small if small < 10.0 => 2,
        small if small < 100.0 => 1,
        _ => 0,
    };
    let plain = format!("{value:.digits$}");
    let (whole, fraction) = plain.split_once('.').map_or((plain.as_str(), None), |(w, f)| (w, Some(f)));
    let mut text = String::new();
    for (n, digit) in whole.chars().enumerate() {
        if n > 0 && digit.is_ascii_digit() && (whole.len() - n).is_multiple_of(3) && !text.ends_with('-') {
            text.push(',');
        }
        text.push(digit);
    }
    let fraction = fraction.map(|f| f.trim_end_matches('0')).filter(|f| digits == 3 || !f.is_empty());
    match fraction {
        Some("") | None => text,
        Some(fraction) => format!("{text}.{fraction}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_formats_numbers_with_few_digits() {
        let shown = [0.0, 0.01234, 1.0, 1.234, 12.34, 123.4, 1234.0, 1_234_567.8, -1234.0].map(number);
        let wanted = ["0", "0.012", "1", "1.23", "12.3", "123", "1,234", "1,234,568", "-1,234"];
        assert_eq!(shown, wanted);
    }

    #[test]
    fn report_table_is_aligned_and_compares_with_first_column() {
        let mut group = Group::new("calls", &["ours", "theirs"]);
        group.put_at("Stat", Some(1000), Unit::Micros, "ours", Cell::of(&[1e-6, 2e-6, 3e-6]));
        group.put_at("Stat", Some(1000), Unit::Micros, "theirs", Cell::one(1e-5));
        group.put("start", Unit::Millis, "theirs", Cell::one(0.25));
        group.put("cpu", Unit::Share, "ours", Cell::one(0.5));
        group.add_note("why".to_owned());
        group.add_note("why".to_owned());
        let wanted = [
            "calls",
            "                      ours       theirs",
            "  Stat at 1,000, µs   2 [1..3]   10 (×5)",
            "  start, ms           –          250",
            "  * why",
        ];
        assert_eq!(group.table().lines().collect::<Vec<_>>(), wanted);
        assert_eq!(group.growth("Stat", "theirs"), [(1000.0, 1e-5)]);
        assert_eq!(group.json()["rows"][2]["contestants"]["ours"]["median"], 0.5);
    }
}
