//! Standard output; logs and progress bars, which share stderr without tearing each other; and the style of tables.

use crate::flags::wrong;
use anyhow::anyhow;
use comfy_table::{CellAlignment, LineStyle, Table, presets};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use kvring_benches::Console;
use std::io::{ErrorKind, IsTerminal, Stdout, Write};
use std::sync::OnceLock;
use tracing::level_filters::LevelFilter;
use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Where a level is taken from when the command line does not say.
const LOG_ENV: &str = "KVRING_LOG";

/// Lines that wait for an engine's log to be read.
const LOG_LINES: usize = 4096;

/// The crates that log. A filter for anything else would silence everything.
const LOG_PARTS: [&str; 6] =
    ["kvring", "kvring_adapter", "kvring_benches", "kvring_engine", "kvring_gpu_kernels", "kvring_shm_abi"];

/// A filter from a text such as `info` or `warn,kvring_engine=debug`. If the text has no level for everything, that is
/// `otherwise`.
fn log_filter(text: &str, otherwise: LevelFilter) -> Option<Targets> {
    let level = |text: &str| text.parse::<LevelFilter>().ok().filter(|_| !text.is_empty());
    let mut filter = Targets::new().with_default(otherwise);
    for directive in text.split(',').map(str::trim) {
        filter = match directive.split_once('=') {
            None => filter.with_default(level(directive)?),
            Some((target, of)) if LOG_PARTS.iter().any(|part| target.split("::").next() == Some(part)) => {
                filter.with_target(target, level(of)?)
            }
            Some(_) => return None,
        };
    }
    Some(filter)
}

/// Checks such a text; `from` says where it comes from.
pub(crate) fn check_log(from: &str, text: &str) -> anyhow::Result<()> {
    let parts = LOG_PARTS.join(", ");
    log_filter(text, LevelFilter::OFF).map(|_| ()).ok_or_else(|| {
        wrong(format!(
            "{from}: expected off, error, warn, info, debug or trace, or such a level for a part (kvring_engine=debug; parts: \
             {parts}), or several of them with commas between, got {text:?}"
        ))
    })
}

/// The level or filter that the user asked for, if any.
#[derive(Clone, Debug)]
pub(crate) struct LogChoice(Option<String>);

impl LogChoice {
    /// The flag, else the environment.
    pub(crate) fn new(flag: Option<String>) -> anyhow::Result<LogChoice> {
        let from = if flag.is_some() { "--log-level" } else { LOG_ENV };
        let environment = || std::env::var(LOG_ENV).ok().filter(|text| !text.is_empty());
        let asked = flag.or_else(environment);
        if let Some(text) = &asked {
            check_log(from, text)?;
        }
        Ok(LogChoice(asked))
    }

    /// The text that the user gave.
    fn asked(&self) -> Option<&str> {
        self.0.as_deref()
    }

    /// This console, for the commands of the laboratory.
    pub(crate) fn console(&self) -> Console {
        let log = self.0.clone();
        Console { out: || Box::new(out()), say, byte_bar, count_bar, log_variable: LOG_ENV, log }
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
        // Both have been checked.
        let level = otherwise.parse().unwrap_or(LevelFilter::INFO);
        let filter = log_filter(self.asked().unwrap_or(otherwise), level).unwrap_or_default();
        let lines =
            tracing_subscriber::fmt::layer().with_ansi(std::io::stderr().is_terminal()).with_writer(writer);
        let started = tracing_subscriber::registry().with(lines).with(filter).try_init();
        started.map_err(|error| anyhow!("cannot start logging: {error}"))
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
fn count_bar(what: &'static str, total: u64) -> ProgressBar {
    bar(total, "{prefix} {wide_bar} {pos}/{len} {msg} {eta}").with_prefix(what)
}

fn bar(total: u64, template: &str) -> ProgressBar {
    // A template that cannot be is shown as the default bar; the unit test below sees to it.
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    bars().add(ProgressBar::new(total).with_style(style))
}

/// Standard output: everything that a command prints for its user goes here. Its reader may stop in the middle (`| head`):
/// then the rest is dropped, and the command goes on as usual.
pub(crate) fn out() -> Out {
    #[allow(clippy::disallowed_methods, reason = "the one place")]
    Out(std::io::stdout())
}

/// See [`out`].
pub(crate) struct Out(Stdout);

fn unless_unread<T>(written: std::io::Result<T>, as_if: T) -> std::io::Result<T> {
    match written {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(as_if),
        written => written,
    }
}

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        unless_unread(self.0.write(bytes), bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        unless_unread(self.0.flush(), ())
    }
}

/// Writes a line to stderr, above the bars. It does not fail where nobody reads stderr.
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
        assert_eq!(LogChoice::new(Some("debug".into())).unwrap().asked(), Some("debug"));
    }

    #[test]
    fn a_filter_that_would_silence_everything_is_wrong() {
        let of = |text| log_filter(text, LevelFilter::INFO);
        for wrong in [
            "inof",
            "",
            "info,",
            "kvring_engin=debug",
            "kvring_engine=debgu",
            "=debug",
            "kvring_engine",
            "a=b=c",
        ] {
            assert_eq!(of(wrong), None, "{wrong}");
        }
        let filter = of("kvring_engine::service=debug, warn").unwrap();
        assert_eq!(
            filter,
            Targets::new()
                .with_default(LevelFilter::WARN)
                .with_target("kvring_engine::service", LevelFilter::DEBUG)
        );
        let filter = of("kvring_engine=off").unwrap();
        assert!(filter.would_enable("kvring_adapter", &tracing::Level::INFO), "the rest stays as it was");
        assert!(!filter.would_enable("kvring_engine", &tracing::Level::ERROR));
    }
}
