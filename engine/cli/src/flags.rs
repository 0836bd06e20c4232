//! What flags have in common: what is wrong with them, and which exit code that is.

use core::fmt;

/// What the command line, or a settings file that it names, asks for cannot be: exit code 2. What only this machine cannot do
/// now is an error like any other, and exit code 1.
#[derive(Debug)]
pub(crate) struct WrongUsage(String);

impl fmt::Display for WrongUsage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for WrongUsage {}

/// Wrong usage, for what is found after `clap` has read the command line.
pub(crate) fn wrong(what: impl fmt::Display) -> anyhow::Error {
    WrongUsage(what.to_string()).into()
}
