//! The other processes of a replay or of chaos: this executable again.

use crate::console::{self, LOG_ENV, LogChoice};
use anyhow::Context;
use kvring_rig::child::Stderr;
use std::process::Command;

/// The command `kvring WORD`, to be completed.
pub(crate) fn kvring(word: &str) -> anyhow::Result<Command> {
    let mut command = Command::new(std::env::current_exe().context("this executable's path")?);
    command.arg(word);
    Ok(command)
}

impl LogChoice {
    /// Makes a child log what the user asked for. All of that is shown; otherwise the last lines are kept, in case it fails.
    pub(crate) fn hand_to(&self, command: &mut Command) -> Stderr {
        match self.asked() {
            Some(asked) => {
                command.env(LOG_ENV, asked);
                Stderr::Shown(console::say)
            }
            None => Stderr::Kept,
        }
    }
}
