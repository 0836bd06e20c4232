//! Ctrl-C: everything is given up, in order.

use anyhow::Context;
use kvring_rig::pipe::Abort;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::thread;

/// SIGINT and SIGTERM give the run up, in order; a second one ends this process at once, and the kernel the others.
pub(crate) fn abort_on_signal(abort: &Abort, say: fn(&str)) -> anyhow::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM]).context("cannot watch for SIGINT and SIGTERM")?;
    let abort = abort.clone();
    let watch = move || {
        for _ in signals.forever() {
            if !abort.interrupt() {
                std::process::exit(1);
            }
            say("interrupted: stopping the engine and all instances");
        }
    };
    thread::Builder::new().name("kvring-signals".to_owned()).spawn(watch).context("cannot start a thread")?;
    Ok(())
}
