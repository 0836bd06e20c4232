//! The files that `/dev/shm` has under an engine's names, and whose they are.

use kvring_shm_abi::segment::{self, EngineName, SHM_DIR, path};
use std::os::unix::fs::MetadataExt;

/// To whom the file belongs that a segment's name leads to. Its mode says nothing about that.
pub(super) enum Whose {
    Nobody,
    /// It is ours, and has this many bytes of memory.
    Ours(u64),
    /// It is another user's.
    User(u32),
    /// It is a directory, a link or the like, and no segment.
    NoFile,
}

impl Whose {
    pub(super) fn of(segment: &str) -> Whose {
        let Ok(meta) = std::fs::symlink_metadata(path(segment)) else { return Whose::Nobody };
        if meta.uid() != nix::unistd::geteuid().as_raw() {
            Whose::User(meta.uid())
        } else if meta.is_file() {
            // Blocks are counted in units of 512 bytes, whatever the file system's block size is.
            Whose::Ours(meta.blocks() * 512)
        } else {
            Whose::NoFile
        }
    }
}

/// The channels of this engine's clients, as segment names.
pub(super) fn channels(name: &EngineName) -> Vec<String> {
    let prefix = format!("{}client.", name.prefix());
    let entries = std::fs::read_dir(SHM_DIR).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|file| file.starts_with(&prefix))
        .map(|file| format!("/{file}"))
        .collect()
}

/// Unlinks every channel that was made for one entry of the lobby.
pub(crate) fn unlink_channels_of(name: &EngineName, entry: usize) {
    let prefix = format!("/{}client.{entry}.", name.prefix());
    for channel in channels(name).iter().filter(|channel| channel.starts_with(&prefix)) {
        if matches!(Whose::of(channel), Whose::Ours(_)) {
            segment::unlink(channel);
        }
    }
}

/// All segments under the name, the engine's included.
pub(super) fn all(name: &EngineName) -> Vec<String> {
    let mut names = channels(name);
    names.extend([name.lobby(), name.arena(), name.engine_segment()]);
    names.retain(|segment| path(segment).exists());
    names
}

/// How many bytes a sweep of this name would give back.
pub(crate) fn bytes_held(name: &EngineName) -> u64 {
    let bytes = |segment: &String| match Whose::of(segment) {
        Whose::Ours(bytes) => bytes,
        Whose::Nobody | Whose::User(_) | Whose::NoFile => 0,
    };
    all(name).iter().map(bytes).sum()
}
