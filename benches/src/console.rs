//! The command's console, which the commands of this crate use: its standard output, its lines and bars on standard error, its
//! logs.

use indicatif::ProgressBar;
use kvring_rig::child::Stderr;
use std::io::Write;
use std::process::Command;

/// The command's console, and the log level that its user has asked for.
#[derive(Clone, Debug)]
pub struct Console {
    /// Opens standard output.
    pub out: fn() -> Box<dyn Write>,
    /// Writes a line to standard error, above all bars.
    pub say: fn(&str),
    /// Makes a bar for so many bytes, with a message before it.
    pub byte_bar: fn(&'static str, u64) -> ProgressBar,
    /// Makes a bar for so many things, with a message before it.
    pub count_bar: fn(&'static str, u64) -> ProgressBar,
    /// The environment variable from which a process takes its log level.
    pub log_variable: &'static str,
    /// The log level, or filter, that the user has asked for.
    pub log: Option<String>,
}

impl Console {
    /// Makes a child log at the level that the user has asked for, else errors only. Its lines are shown as they come.
    pub(crate) fn hand_to(&self, command: &mut Command) -> Stderr {
        command.env(self.log_variable, self.log.as_deref().unwrap_or("error"));
        Stderr::Shown(self.say)
    }
}
