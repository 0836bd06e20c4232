//! Wrong usage: flags and settings that cannot be, and their exit code.

use core::fmt;

/// The command line, or a settings file that it names, asks for something that cannot be: exit code 2. Something that only this
/// machine cannot do now is an error like any other, and exit code 1.
#[derive(Debug)]
pub(crate) struct WrongUsage(String);

impl fmt::Display for WrongUsage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for WrongUsage {}

/// Wrong usage that is found after `clap` has read the command line.
pub(crate) fn wrong(what: impl fmt::Display) -> anyhow::Error {
    WrongUsage(what.to_string()).into()
}
