//! Removing segments: what a dead engine left, what a clean end gives up, what `kvring remove` is asked for.
//!
//! The order is always the same: retire, wake, unlink the lobby, the arena and the channels, and the engine's segment
//! last, because its lock is what gives the right to remove the others. Nothing is truncated: who still maps a
//! segment keeps it, sees that it is retired, and lets go.
//!
//! Everybody may make files in `/dev/shm`, also under our names. What is not ours ([`Whose`]) is left where it is, with a
//! warning; and a sweep goes on after whatever it cannot remove, and says so at its end.

use super::takeover::{Found, acquire};
use super::{SetupError, arena_superblock};
use kvring_shm_abi::engine_segment::EngineSegment;
use kvring_shm_abi::failpoint;
use kvring_shm_abi::futex;
use kvring_shm_abi::lobby::{LOBBY_BYTES, Lobby};
use kvring_shm_abi::park;
use kvring_shm_abi::segment::{self, Access, EngineName, SHM_DIR, SegmentError, SegmentFile, path};
use kvring_shm_abi::superblock::ARENA_TRAILER;
use nix::errno::Errno;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
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

/// Whose the file is that a segment's name leads to. Its mode says nothing about that.
enum Whose {
    Nobody,
    /// Ours, with so many bytes of memory.
    Ours(u64),
    /// Another user's.
    User(u32),
    /// A directory, a link, …: no segment.
    NoFile,
}

impl Whose {
    fn of(segment: &str) -> Whose {
        let Ok(meta) = std::fs::symlink_metadata(path(segment)) else { return Whose::Nobody };
        if meta.uid() != nix::unistd::geteuid().as_raw() {
            Whose::User(meta.uid())
        } else if meta.is_file() {
            // Blocks are counted in units of 512 bytes, whatever the file system's own are.
            Whose::Ours(meta.blocks() * 512)
        } else {
            Whose::NoFile
        }
    }
}

/// A sweep that is under way.
#[derive(Default)]
pub(super) struct Sweep {
    removed: Removed,
    failed: Option<SetupError>,
}

impl Sweep {
    /// Unlinks a segment that is ours, and counts it; none of that name is fine.
    pub(super) fn unlink(&mut self, name: &str) {
        let bytes = match Whose::of(name) {
            Whose::Nobody => return,
            Whose::Ours(bytes) => bytes,
            Whose::User(uid) => {
                tracing::warn!(segment = name, uid, "left where it is: it belongs to another user");
                return;
            }
            Whose::NoFile => {
                tracing::warn!(segment = name, "left where it is: it is no file of shared memory");
                return;
            }
        };
        match nix::sys::mman::shm_unlink(name) {
            Ok(()) => {
                self.removed.segments += 1;
                self.removed.bytes += bytes;
            }
            Err(Errno::ENOENT) => {}
            Err(errno) => {
                let error = SetupError::Unlink { name: name.to_owned(), errno };
                tracing::warn!(%error, "the others are removed all the same");
                self.failed.get_or_insert(error);
            }
        }
    }

    /// Retires and unlinks the lobby, the arena and all channels. For whoever holds the lock on the current engine file.
    pub(super) fn satellites(&mut self, name: &EngineName) {
        for segment in [name.lobby(), name.arena()] {
            mend_mode(&segment);
        }
        let arena = SegmentFile::open(&name.arena(), Access::ReadWrite).map_err(SetupError::from);
        for retired in [retire_lobby(name), arena.and_then(|file| retire_arena(&file))] {
            // What cannot be opened, or is half-made, cannot be marked: it is unlinked all the same, if it is ours.
            if let Err(error) = retired {
                tracing::debug!(%error, "not retired");
            }
        }
        failpoint::here("satellites retired");
        for channel in channels(name) {
            // A channel needs no mark: its client watches the engine, and makes another one.
            self.unlink(&channel);
        }
        self.unlink(&name.lobby());
        failpoint::here("lobby gone");
        self.unlink(&name.arena());
    }

    /// What was removed.
    ///
    /// # Errors
    /// The first of ours that could not be.
    pub(super) fn end(self) -> Result<Removed, SetupError> {
        self.failed.map_or(Ok(self.removed), Err)
    }
}

/// Refuses names that a start could not use, before it sweeps anything: the engine's file is locked, and so ours.
///
/// # Errors
/// The lobby's or the arena's name leads to something that is not ours.
pub(super) fn check_names(name: &EngineName) -> Result<(), SetupError> {
    for segment in [name.lobby(), name.arena()] {
        match Whose::of(&segment) {
            Whose::Nobody | Whose::Ours(_) => {}
            Whose::User(found) => {
                let expected = nix::unistd::geteuid().as_raw();
                return Err(SegmentError::WrongOwner { name: segment, expected, found }.into());
            }
            Whose::NoFile => return Err(SetupError::NoFile { name: segment }),
        }
    }
    Ok(())
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
        if matches!(Whose::of(channel), Whose::Ours(_)) {
            segment::unlink(channel);
        }
    }
}

/// Everything under the name, the engine's segment included.
fn all(name: &EngineName) -> Vec<String> {
    let mut names = channels(name);
    names.extend([name.lobby(), name.arena(), name.engine_segment()]);
    names.retain(|segment| path(segment).exists());
    names
}

/// Bytes that a sweep of this name would give back.
pub(crate) fn bytes_held(name: &EngineName) -> u64 {
    let bytes = |segment: &String| match Whose::of(segment) {
        Whose::Ours(bytes) => bytes,
        Whose::Nobody | Whose::User(_) | Whose::NoFile => 0,
    };
    all(name).iter().map(bytes).sum()
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

fn retire_lobby(name: &EngineName) -> Result<(), SetupError> {
    // Allocated before it is touched: a half-created one may have no memory yet.
    SegmentFile::open(&name.lobby(), Access::ReadWrite)?.allocate(0, LOBBY_BYTES as u64)?;
    let lobby = Lobby::new(Arc::new(segment::open_shared(&name.lobby(), LOBBY_BYTES)?))?;
    lobby.superblock()?.retire();
    // An engine that still lives (a forced removal) looks at once.
    park::notify(lobby.doorbell());
    Ok(())
}

/// Marks an arena as given up.
pub(super) fn retire_arena(file: &SegmentFile) -> Result<(), SetupError> {
    let bytes = file.len()?;
    file.allocate(bytes.saturating_sub(ARENA_TRAILER), ARENA_TRAILER)?;
    let mapping = file.map(bytes, Access::ReadWrite)?;
    arena_superblock(&mapping)?.retire();
    Ok(())
}

/// Sweeps everything, the engine's segment last. For whoever holds the lock on the current engine file.
///
/// # Errors
/// Something of ours cannot be removed; the rest has been.
pub(super) fn held(name: &EngineName, found: &Found) -> Result<Removed, SetupError> {
    found.retire();
    failpoint::here("predecessor retired");
    let mut sweep = Sweep::default();
    sweep.satellites(name);
    failpoint::here("predecessor's satellites gone");
    sweep.unlink(&name.engine_segment());
    failpoint::here("predecessor gone");
    sweep.end()
}

/// `kvring remove`: takes all segments of an engine away. Of a living one only with `force`: it keeps its inodes, sees
/// that they are retired, and ends; its clients lose it as if it had died.
///
/// # Errors
/// Without `force`: the engine lives or starts. The engine's segment is another user's. Something of ours cannot be removed.
pub fn remove(name: &EngineName, force: bool, wait: Duration) -> Result<Removed, SetupError> {
    let names = all(name);
    if names.is_empty() {
        return Ok(Removed::default());
    }
    mend_mode(&name.engine_segment());
    let refused = match acquire(name, wait) {
        Ok(taken) => {
            let removed = held(name, taken.found.as_ref().unwrap_or(&Found::Incomplete))?;
            // Where only satellites were left, the engine's file was made by `acquire`, for its lock: it does not count.
            let made = u64::from(taken.found.is_none());
            return Ok(Removed { segments: removed.segments.saturating_sub(made), ..removed });
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
    let mend = || std::fs::set_permissions(path(segment), std::fs::Permissions::from_mode(0o600));
    if matches!(Whose::of(segment), Whose::Ours(_))
        && let Err(error) = mend()
    {
        tracing::debug!(segment, %error, "its mode cannot be changed");
    }
}
