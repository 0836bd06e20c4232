//! Removing segments: those that a dead engine left, those that a clean end gives up, and those that `kvring
//! remove` is to remove.
//!
//! The order is always the same: retire, wake, unlink the lobby, the arena and the channels, and last the engine's
//! segment, because its lock gives the right to remove the others. Nothing is truncated: a process that still maps
//! a segment keeps it, sees that it is retired, and unmaps it.
//!
//! Everybody may make files in `/dev/shm`, also under our names. A file that is not ours ([`Whose`]) is left where
//! it is, with a warning. A sweep goes on after a file that it cannot remove, and reports the failure at its end.

use super::files::{Whose, channels};
use super::{SetupError, arena_superblock};
use kvring_shm_abi::engine_segment::EngineSegment;
use kvring_shm_abi::failpoint::{self, Place};
use kvring_shm_abi::futex;
use kvring_shm_abi::lobby::{LOBBY_BYTES, Lobby};
use kvring_shm_abi::park;
use kvring_shm_abi::segment::{self, Access, EngineName, SegmentError, SegmentFile, path};
use kvring_shm_abi::superblock::ARENA_TRAILER;
use nix::errno::Errno;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

/// What was removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// How many segments' names were removed.
    pub segments: u64,
    /// The bytes that they held. These become free when nobody maps them any more.
    pub bytes: u64,
    /// The process of the living engine whose segments were removed by force; it ends by itself.
    pub forced_pid: Option<u32>,
}

/// A sweep that is under way.
#[derive(Default)]
pub(super) struct Sweep {
    removed: Removed,
    failed: Option<SetupError>,
}

impl Sweep {
    /// Unlinks a segment that is ours, and counts it. That there is none is no error.
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

    /// Retires and unlinks the lobby, the arena and all channels. The caller holds the lock on the current engine
    /// file.
    pub(super) fn satellites(&mut self, name: &EngineName) {
        for segment in [name.lobby(), name.arena()] {
            mend_mode(&segment);
        }
        let arena = SegmentFile::open(&name.arena(), Access::ReadWrite).map_err(SetupError::from);
        for retired in [retire_lobby(name), arena.and_then(|file| retire_arena(&file))] {
            // A segment that cannot be opened, or is half-made, cannot be marked. It is unlinked all the same, if
            // it is ours.
            if let Err(error) = retired {
                tracing::debug!(%error, "not retired");
            }
        }
        failpoint::here(Place::SatellitesRetired);
        for channel in channels(name) {
            // A channel needs no mark: its client watches the engine, and makes another channel.
            self.unlink(&channel);
        }
        self.unlink(&name.lobby());
        failpoint::here(Place::LobbyGone);
        self.unlink(&name.arena());
    }

    /// What was removed.
    ///
    /// The first segment of ours that could not be removed.
    pub(super) fn end(self) -> Result<Removed, SetupError> {
        self.failed.map_or(Ok(self.removed), Err)
    }
}

/// Refuses names that a start could not use, before it sweeps anything. The engine's file needs no check: we have
/// locked it, so it is ours.
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

/// Marks an engine's segment as retired and then wakes all its sleepers; in this order, so that they see the mark.
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
    // The lobby is allocated before it is touched: a half-made one may have no memory yet.
    SegmentFile::open(&name.lobby(), Access::ReadWrite)?.allocate(0, LOBBY_BYTES as u64)?;
    let lobby = Lobby::new(Arc::new(segment::open_shared(&name.lobby(), LOBBY_BYTES)?))?;
    lobby.superblock()?.retire();
    // After a forced removal, the engine that still lives looks at once.
    park::notify(lobby.doorbell());
    Ok(())
}

/// Marks an arena as retired.
pub(super) fn retire_arena(file: &SegmentFile) -> Result<(), SetupError> {
    let bytes = file.len()?;
    file.allocate(bytes.saturating_sub(ARENA_TRAILER), ARENA_TRAILER)?;
    let mapping = file.map(bytes, Access::ReadWrite)?;
    arena_superblock(&mapping)?.retire();
    Ok(())
}

/// Repairs the mode of a segment of ours: a wrong mode is refused everywhere, but removing the segment must work
/// all the same.
pub(super) fn mend_mode(segment: &str) {
    let mend = || std::fs::set_permissions(path(segment), std::fs::Permissions::from_mode(0o600));
    if matches!(Whose::of(segment), Whose::Ours(_))
        && let Err(error) = mend()
    {
        tracing::debug!(segment, %error, "its mode cannot be changed");
    }
}
