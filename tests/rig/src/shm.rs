//! The files of an engine in `/dev/shm`, seen from outside.

use anyhow::Context;
use kvring_engine::config::EngineConfig;
use kvring_engine::segments;
use kvring_shm_abi::segment::{EngineName, SHM_DIR};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// Removes whatever an engine has left, for instance after a `kill -9`. A failure is logged.
pub fn sweep(name: &EngineName) {
    match segments::remove(name, true, EngineConfig::default().start_wait()) {
        Ok(removed) => tracing::debug!(segments = removed.segments, bytes = removed.bytes, "swept"),
        Err(error) => tracing::error!(%error, "the engine {name} may have left segments in /dev/shm"),
    }
}

/// The names of the files that belong to this engine or to its clients.
#[must_use]
pub fn files(name: &EngineName) -> Vec<String> {
    let entries = std::fs::read_dir(SHM_DIR).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|file| file.starts_with(&name.prefix())).collect()
}

/// Flips a bit in every page of the arena, as a faulty neighbour would: a negative control for whatever verifies bytes.
///
/// # Errors
/// The arena cannot be opened, read or written.
pub fn corrupt(name: &EngineName, arena_bytes: u64) -> anyhow::Result<()> {
    let path = PathBuf::from(format!("{SHM_DIR}{}", name.arena()));
    let file =
        File::options().read(true).write(true).open(&path).context("opening the arena to corrupt it")?;
    for page in (0..arena_bytes).step_by(4096) {
        let mut byte = [0];
        file.read_exact_at(&mut byte, page + 123)?;
        file.write_all_at(&[byte[0] ^ 0x10], page + 123)?;
    }
    Ok(())
}
