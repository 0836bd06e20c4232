//! What people see: logs and progress bars, which share stderr without tearing each other, and the style of tables.

use anyhow::{Context, anyhow};
use comfy_table::{CellAlignment, LineStyle, Table, presets};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::sync::OnceLock;
use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;

/// Where a level is taken from when the command line does not say.
pub(crate) const LOG_ENV: &str = "KVRING_LOG";

/// Lines that wait for an engine's log to be read.
const LOG_LINES: usize = 4096;

/// The level or filter that the user asked for, if any.
#[derive(Clone, Debug)]
pub(crate) struct LogChoice(Option<String>);

impl LogChoice {
    /// The flag, else the environment.
    pub(crate) fn new(flag: Option<String>) -> LogChoice {
        let environment = || std::env::var(LOG_ENV).ok().filter(|text| !text.is_empty());
        LogChoice(flag.or_else(environment))
    }

    /// What the user asked for.
    pub(crate) fn asked(&self) -> Option<&str> {
        self.0.as_deref()
    }

    /// The same, and `otherwise` where nothing was asked for.
    pub(crate) fn or(&self, otherwise: &str) -> LogChoice {
        LogChoice(Some(self.asked().unwrap_or(otherwise).to_owned()))
    }

    /// Starts logging, at `otherwise` if nothing was asked for.
    pub(crate) fn start(&self, otherwise: &str) -> anyhow::Result<()> {
        self.start_to(otherwise, || BesideBars)
    }

    /// The same on a thread of its own, which nobody ever waits for: for an engine, whose service thread must not stand
    /// still because somebody has stopped reading its log. Lines that find no room are lost, and counted in none. What is
    /// returned writes the rest when it is dropped.
    pub(crate) fn start_unwaited(&self, otherwise: &str) -> anyhow::Result<WorkerGuard> {
        let builder = NonBlockingBuilder::default().lossy(true).buffered_lines_limit(LOG_LINES);
        let (writer, guard) = builder.thread_name("kvring-log").finish(BesideBars);
        self.start_to(otherwise, move || writer.clone())?;
        Ok(guard)
    }

    fn start_to<W: Write + 'static>(
        &self,
        otherwise: &str,
        writer: impl Fn() -> W + Send + Sync + 'static,
    ) -> anyhow::Result<()> {
        let text = self.asked().unwrap_or(otherwise);
        let filter = EnvFilter::try_new(text).with_context(|| {
            format!(
                "--log-level or {LOG_ENV}: expected error, warn, info, debug, trace or a filter, got {text:?}"
            )
        })?;
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_ansi(std::io::stderr().is_terminal())
            .with_writer(writer)
            .try_init()
            .map_err(|error| anyhow!("cannot start logging: {error}"))
    }
}

/// All progress bars of this process. They show on a terminal only.
fn bars() -> &'static MultiProgress {
    static BARS: OnceLock<MultiProgress> = OnceLock::new();
    BARS.get_or_init(MultiProgress::new)
}

/// A bar over `total` bytes.
pub(crate) fn byte_bar(what: &'static str, total: u64) -> ProgressBar {
    bar(total, "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes}").with_message(what)
}

/// A bar over `total` things, with a message behind it.
pub(crate) fn count_bar(what: &'static str, total: u64) -> ProgressBar {
    bar(total, "{prefix} {wide_bar} {pos}/{len} {msg} {eta}").with_prefix(what)
}

fn bar(total: u64, template: &str) -> ProgressBar {
    // A template that cannot be is shown as the default bar; the unit test below sees to it.
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    bars().add(ProgressBar::new(total).with_style(style))
}

/// A line on stderr, above the bars. That nobody reads it is no reason to fail.
pub(crate) fn say(line: &str) {
    bars().suspend(|| drop(std::io::stderr().write_all(format!("{line}\n").as_bytes())));
}

/// A table in the style of all commands.
pub(crate) fn new_table() -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY);
    table.style_mut().row_separator = LineStyle::none();
    table
}

/// Numbers go to the right. After the rows: columns exist once a row does.
pub(crate) fn align_right(table: &mut Table, columns: &[usize]) {
    for column in columns {
        if let Some(column) = table.column_mut(*column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}

/// Logs, written above the bars.
struct BesideBars;

impl Write for BesideBars {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        // An error would be told to stderr by the subscriber, with a panic where that is closed: whoever reads the
        // logs of an engine would then end it by going away.
        bars().suspend(|| drop(std::io::stderr().write_all(bytes)));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_are_well_formed() {
        for template in [
            "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes}",
            "{prefix} {wide_bar} {pos}/{len} {msg} {eta}",
        ] {
            assert!(ProgressStyle::with_template(template).is_ok(), "{template}");
        }
    }

    #[test]
    fn the_flag_wins_over_the_environment() {
        assert_eq!(LogChoice::new(Some("debug".into())).asked(), Some("debug"));
    }
}
