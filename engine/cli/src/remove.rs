//! `kvring remove`: takes an engine's segments away.

use crate::console;
use crate::status::quoted_name;
use kvring_adapter::DEFAULT_ENGINE;
use kvring_engine::byte_size::ByteSize;
use kvring_engine::config::EngineConfig;
use kvring_engine::segments;
use kvring_shm_abi::segment::EngineName;
use std::io::Write;

/// Remove what a dead engine left in /dev/shm; with --force also a living one's memory
///
/// An engine that ends cleanly leaves nothing, and the next `kvring serve` of the same name sweeps by itself: this is
/// for a name that is not used again. A living engine is left alone, unless forced: then it ends by itself, its
/// clients go on without it, and the memory is free as soon as they let go.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  kvring remove --name old                what a killed engine left behind
  kvring remove --force                   also if it still runs, or hangs")]
pub(crate) struct Args {
    /// The engine's name
    #[arg(long, default_value = DEFAULT_ENGINE)]
    name: EngineName,

    /// Take the memory of a living engine away as well
    #[arg(long)]
    force: bool,
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let removed = segments::remove(&args.name, args.force, EngineConfig::default().start_wait())?;
    let mut out = console::out();
    if removed.segments == 0 {
        writeln!(out, "nothing to remove: no segment of engine {} in /dev/shm", quoted_name(&args.name))?;
    } else {
        let bytes = ByteSize(removed.bytes).human();
        writeln!(
            out,
            "removed {} segments of engine {} ({bytes})",
            removed.segments,
            quoted_name(&args.name)
        )?;
    }
    if let Some(pid) = removed.forced_pid {
        writeln!(out, "its process (pid {pid}) was alive: it ends by itself")?;
    }
    Ok(())
}
