//! Removing segments: what a dead engine left, what a clean end gives up, what `kvring remove` is asked for.
//!
//! The order is always the same: retire, wake, unlink the lobby, the arena and the channels, and the engine's segment
//! last, because its lock is what gives the right to remove the others. Nothing is truncated: who still maps a
//! segment keeps it, sees that it is retired, and lets go.

use super::takeover::{Found, acquire};
use super::{SetupError, arena_superblock};
use kvring_shm_abi::engine_segment::EngineSegment;
use kvring_shm_abi::failpoint;
use kvring_shm_abi::futex;
use kvring_shm_abi::lobby::{LOBBY_BYTES, Lobby};
use kvring_shm_abi::park;
use kvring_shm_abi::segment::{self, Access, EngineName, SHM_DIR, SegmentError, SegmentFile};
use nix::errno::Errno;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// What was removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Names removed.
    pub segments: u64,
    /// Bytes they held. They are free once nobody maps them any more.
    pub bytes: u64,
    /// The living engine whose segments were taken away by force; it ends by itself.
    pub forced_pid: Option<u32>,
}

fn path(segment: &str) -> PathBuf {
    Path::new(SHM_DIR).join(segment.trim_start_matches('/'))
}

fn bytes_of(path: &Path) -> u64 {
    // Blocks are counted in units of 512 bytes, whatever the file system's own are.
    std::fs::symlink_metadata(path).map_or(0, |meta| meta.blocks() * 512)
}

impl Removed {
    /// Unlinks one segment, and counts it; none of that name is fine.
    pub(super) fn unlink(&mut self, name: &str) -> Result<(), SetupError> {
        let bytes = bytes_of(&path(name));
        match nix::sys::mman::shm_unlink(name) {
            Ok(()) => {
                self.segments += 1;
                self.bytes += bytes;
                Ok(())
            }
            Err(Errno::ENOENT) => Ok(()),
            Err(errno) => Err(SetupError::Unlink { name: name.to_owned(), errno }),
        }
    }
}

/// The channels of this engine's clients, as segment names.
fn channels(name: &EngineName) -> Vec<String> {
    let prefix = format!("{}client.", name.prefix());
    let entries = std::fs::read_dir(SHM_DIR).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|file| file.starts_with(&prefix))
        .map(|file| format!("/{file}"))
        .collect()
}

/// Unlinks every channel that was made for one entry of the client table.
pub(crate) fn unlink_channels_of(name: &EngineName, entry: usize) {
    let prefix = format!("/{}client.{entry}.", name.prefix());
    for channel in channels(name).iter().filter(|channel| channel.starts_with(&prefix)) {
        segment::unlink(channel);
    }
}

/// Everything under the name, the engine's segment included.
fn all(name: &EngineName) -> Vec<String> {
    let mut names = channels(name);
    names.extend([name.lobby(), name.arena(), name.engine_segment()]);
    names.retain(|segment| path(segment).exists());
    names
}

/// Bytes that the segments of this name hold.
pub(crate) fn bytes_held(name: &EngineName) -> u64 {
    all(name).iter().map(|segment| bytes_of(&path(segment))).sum()
}

/// Marks an engine's segment as given up, and wakes whoever sleeps on it: after the store, so that who wakes sees it.
pub(super) fn retire_engine(segment: &EngineSegment) {
    segment.superblock().retire();
    futex::wake_all(segment.epoch().incarnation_word());
    for word in segment.life_words.iter() {
        futex::wake_all(word.futex());
    }
    for record in segment.attach.iter() {
        futex::wake_all(record.word().0);
    }
}

/// Retires and unlinks the lobby, the arena and all channels. For whoever holds the lock on the current engine file.
///
/// # Errors
/// One of them is not ours, or cannot be removed.
pub(super) fn satellites(name: &EngineName) -> Result<Removed, SetupError> {
    retire_lobby(name)?;
    retire_arena(name)?;
    failpoint::here("satellites retired");
    let mut removed = Removed::default();
    for channel in channels(name) {
        // A channel needs no mark: its client watches the engine, and makes another one.
        removed.unlink(&channel)?;
    }
    removed.unlink(&name.lobby())?;
    failpoint::here("lobby gone");
    removed.unlink(&name.arena())?;
    Ok(removed)
}

/// Is this an error that says "not ours", rather than "not complete"?
fn not_ours(error: SegmentError) -> Result<(), SetupError> {
    match error {
        SegmentError::WrongOwner { .. } | SegmentError::WrongMode { .. } => Err(error.into()),
        error => {
            tracing::debug!(%error, "not retired, only unlinked");
            Ok(())
        }
    }
}

fn retire_lobby(name: &EngineName) -> Result<(), SetupError> {
    // Allocated before it is touched: a half-created one may have no memory yet.
    let opened = SegmentFile::open(&name.lobby(), Access::ReadWrite)
        .and_then(|file| file.allocate(0, LOBBY_BYTES as u64))
        .and_then(|()| segment::open_shared(&name.lobby(), LOBBY_BYTES));
    let mapping = match opened {
        Ok(mapping) => mapping,
        Err(error) => return not_ours(error),
    };
    let lobby = Lobby::new(Arc::new(mapping))?;
    lobby.superblock()?.retire();
    // An engine that still lives (a forced removal) looks at once.
    park::notify(lobby.doorbell());
    Ok(())
}

fn retire_arena(name: &EngineName) -> Result<(), SetupError> {
    let retire = || {
        let file = SegmentFile::open(&name.arena(), Access::ReadWrite)?;
        let bytes = file.len()?;
        file.allocate(bytes.saturating_sub(super::ARENA_TRAILER), super::ARENA_TRAILER)?;
        let mapping = file.map(bytes, Access::ReadWrite)?;
        if let Ok(superblock) = arena_superblock(&mapping) {
            superblock.retire();
        }
        Ok(())
    };
    retire().or_else(not_ours)
}

/// Sweeps everything, the engine's segment last. For whoever holds the lock on the current engine file.
pub(super) fn held(name: &EngineName, found: &Found) -> Result<Removed, SetupError> {
    found.retire();
    failpoint::here("predecessor retired");
    let mut removed = satellites(name)?;
    failpoint::here("predecessor's satellites gone");
    removed.unlink(&name.engine_segment())?;
    failpoint::here("predecessor gone");
    Ok(removed)
}

/// `kvring remove`: takes all segments of an engine away. Of a living one only with `force`: it keeps its inodes, sees
/// that they are retired, and ends; its clients lose it as if it had died.
///
/// # Errors
/// Without `force`: the engine lives or starts. Segments of other users, always.
pub fn remove(name: &EngineName, force: bool, wait: Duration) -> Result<Removed, SetupError> {
    let names = all(name);
    if names.is_empty() {
        return Ok(Removed::default());
    }
    for segment in &names {
        mend_mode(segment);
    }
    let refused = match acquire(name, wait) {
        Ok(taken) => {
            let removed = held(name, taken.found.as_ref().unwrap_or(&Found::Incomplete))?;
            // Where only satellites were left, the engine's file was made by `acquire`, for its lock: it does not count.
            let made = u64::from(taken.found.is_none());
            return Ok(Removed { segments: removed.segments - made, ..removed });
        }
        Err(error) => error,
    };
    let (forced_pid, state) = match &refused {
        SetupError::AlreadyRunning { pid, .. } => (Some(*pid), "runs"),
        SetupError::Starting { .. } => (None, "is being started or removed"),
        SetupError::Exiting { .. } => (None, "is dead, and its process still exiting"),
        SetupError::OtherBuild { .. } => (None, "is another build's"),
        _ => return Err(refused),
    };
    if !force {
        return Err(refused);
    }
    tracing::warn!(name = %name, "this engine {state}; its segments are removed by force, as asked");
    // Without the lock: whoever holds it does not let go. A start that is under way notices at its end.
    let file = SegmentFile::open(&name.engine_segment(), Access::ReadWrite)?;
    let removed = held(name, &Found::look(&file)?)?;
    Ok(Removed { forced_pid, ..removed })
}

/// A segment of ours with a wrong mode is refused everywhere; removing it must work all the same.
fn mend_mode(segment: &str) {
    let path = path(segment);
    let ours = std::fs::symlink_metadata(&path)
        .is_ok_and(|meta| meta.is_file() && meta.uid() == nix::unistd::geteuid().as_raw());
    if ours && let Err(error) = std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)) {
        tracing::debug!(segment, %error, "its mode cannot be changed");
    }
}
