//! The output: a table for people, JSON for programs; progress on a terminal only.

use comfy_table::{CellAlignment, LineStyle, Table, presets};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use std::io::Write;

/// How to measure and how to print.
#[derive(Clone, Copy, Debug)]
pub(crate) struct How {
    /// JSON instead of a table.
    pub(crate) json: bool,
    /// Windows of each measurement.
    pub(crate) windows: usize,
    /// Where to.
    pub(crate) out: fn() -> Box<dyn Write>,
}

impl How {
    /// A bar of `steps` steps on stderr; none where stderr is no terminal.
    pub(crate) fn bar(&self, steps: usize) -> ProgressBar {
        let bar = ProgressBar::with_draw_target(Some(steps as u64), ProgressDrawTarget::stderr());
        // A template that cannot be parsed would only cost the look.
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} {wide_msg}") {
            bar.set_style(style);
        }
        bar
    }

    /// Prints rows: all their fields as JSON, or the table and the notes under it.
    pub(crate) fn print(&self, json: &impl Serialize, table: &Sheet, notes: &[String]) -> anyhow::Result<()> {
        let mut out = (self.out)();
        if self.json {
            serde_json::to_writer_pretty(&mut out, json)?;
            writeln!(out)?;
            return Ok(());
        }
        writeln!(out, "{}", table.render())?;
        for note in notes {
            writeln!(out, "{note}")?;
        }
        Ok(())
    }
}

/// A table in the style of all commands.
pub(crate) fn new_table() -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY);
    table.style_mut().row_separator = LineStyle::none();
    table
}

/// Aligns columns of numbers to the right. It is called after the rows are added: columns exist once a row does.
pub(crate) fn align_right(table: &mut Table, columns: impl IntoIterator<Item = usize>) {
    for column in columns {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}

/// A table: text in the first column, numbers in the others.
pub(crate) struct Sheet(Table);

impl Sheet {
    /// With its headings.
    pub(crate) fn new(headings: &[&str]) -> Sheet {
        let mut table = new_table();
        table.set_header(headings.to_vec());
        Sheet(table)
    }

    /// Adds a row.
    pub(crate) fn row(&mut self, cells: Vec<String>) {
        self.0.add_row(cells);
    }

    fn render(&self) -> String {
        let mut table = self.0.clone();
        let columns = table.column_count();
        align_right(&mut table, 1..columns);
        table.to_string()
    }
}

/// A time in the unit that reads best; a dash where there is none.
pub(crate) fn time(ns: f64) -> String {
    match ns {
        ns if !ns.is_finite() => "-".to_owned(),
        ns if ns.abs() < 10.0 => format!("{ns:.2} ns"),
        ns if ns.abs() < 1e3 => format!("{ns:.0} ns"),
        ns if ns.abs() < 1e6 => format!("{:.2} µs", ns / 1e3),
        ns if ns.abs() < 1e9 => format!("{:.2} ms", ns / 1e6),
        ns => format!("{:.2} s", ns / 1e9),
    }
}

/// A plain number; a dash where there is none.
pub(crate) fn number(value: f64, digits: usize) -> String {
    if value.is_finite() { format!("{value:.digits$}") } else { "-".to_owned() }
}

/// Bytes, in the unit that divides them.
pub(crate) fn bytes(bytes: usize) -> String {
    match bytes {
        b if b >= 1 << 20 && b % (1 << 20) == 0 => format!("{} MiB", b >> 20),
        b if b >= 1 << 10 && b % (1 << 10) == 0 => format!("{} KiB", b >> 10),
        b => format!("{b} B"),
    }
}

/// Rounded for JSON: digits beyond these are noise.
pub(crate) fn rounded(value: f64, digits: i32) -> Option<f64> {
    let scale = 10f64.powi(digits);
    value.is_finite().then(|| (value * scale).round() / scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(time(1.234), "1.23 ns");
        assert_eq!(time(123.4), "123 ns");
        assert_eq!(time(12_345.0), "12.35 µs");
        assert_eq!(time(8_100_000.0), "8.10 ms");
        assert_eq!(time(f64::NAN), "-");
        assert_eq!(number(f64::NAN, 1), "-");
        assert_eq!(
            (bytes(65536), bytes(2 << 20), bytes(100)),
            ("64 KiB".into(), "2 MiB".into(), "100 B".into())
        );
        assert_eq!((rounded(1.23456, 2), rounded(f64::INFINITY, 2)), (Some(1.23), None));
    }
}
