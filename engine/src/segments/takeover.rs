//! Claiming a name, so that one start at a time has it, and never beside a living engine; and deciding whether what
//! lies under the name is taken over as it is or swept.
//!
//! The lock belongs to an *inode*, and the name may lead to another one by the time the lock is held. So a process
//! that gets the lock checks that the file is still current, and begins again if not. While the lock on the current
//! file is held, nobody else unlinks or replaces the name (except a forced removal), and the other segments belong
//! to the lock's holder.

use super::found::{ColdStart, Found};
use super::sweep::{Removed, Sweep, check_names};
use super::{Setup, SetupError, arena_superblock};
use crate::preflight::{self, Room};
use crate::stop::StopHandle;
use kvring_shm_abi::engine_segment::EngineSegment;
use kvring_shm_abi::failpoint::{self, Place};
use kvring_shm_abi::futex::Deadline;
use kvring_shm_abi::lobby::{LOBBY_BYTES, Lobby};
use kvring_shm_abi::segment::{self, Access, EngineName, SegmentError, SegmentFile, SegmentLock};
use kvring_shm_abi::superblock::{ARENA_TRAILER, Identity, Kind, Superblock};
use kvring_shm_abi::sync::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often a start tries again to get a lock that is held.
const POLL: Duration = Duration::from_millis(5);
/// How long a start watches an engine that seems to live: one that has just been killed is marked as dead a moment
/// later.
const DYING: Duration = Duration::from_millis(200);

/// The current engine file, whose lock we hold.
pub(super) struct Held {
    pub(super) file: SegmentFile,
    pub(super) lock: SegmentLock,
    /// What lies in it; `None` if we have just created it.
    pub(super) found: Option<Found>,
}

/// Locks the engine file; creates it if there is none.
///
/// Its engine lives, the lock stays held until `wait` has passed, or `stop` is requested meanwhile.
pub(super) fn acquire(name: &EngineName, wait: Duration, stop: &StopHandle) -> Result<Held, SetupError> {
    let began = Instant::now();
    let deadline = Deadline::after(wait);
    let file_name = name.engine_segment();
    loop {
        if stop.is_requested() {
            return Err(SetupError::Stopped);
        }
        let (file, fresh) = match SegmentFile::open(&file_name, Access::ReadWrite) {
            Ok(file) => (file, false),
            // It has no length yet: another start that finds it knows that it has only just been made.
            Err(SegmentError::NotFound(_)) => match SegmentFile::create(&file_name, 0) {
                Ok(file) => (file, true),
                Err(SegmentError::Exists(_)) => continue,
                Err(error) => return Err(error.into()),
            },
            Err(error) => return Err(error.into()),
        };
        failpoint::here(Place::Opened);
        let lock = file.try_lock();
        if !file.is_current() {
            // The file was unlinked or replaced between the opening and the lock: look again at what the name leads
            // to now.
            drop(lock);
            if deadline.passed() {
                return Err(Found::Incomplete.busy(name, began.elapsed()));
            }
            std::thread::yield_now();
            continue;
        }
        let found = if fresh { Found::Incomplete } else { Found::look(&file)? };
        if let Some(pid) = found.living() {
            drop(lock);
            if began.elapsed() >= wait.min(DYING) {
                return Err(SetupError::AlreadyRunning { name: name.clone(), pid });
            }
            std::thread::sleep(POLL);
            continue;
        }
        match lock {
            Some(lock) => return Ok(Held { file, lock, found: (!fresh).then_some(found) }),
            // It is held by another start, by a removal, or by a dead engine whose descriptors the kernel is still
            // closing.
            None if deadline.passed() => return Err(found.busy(name, began.elapsed())),
            None => std::thread::sleep(POLL),
        }
    }
}

/// What a claimed name leads to. The name is ours, and everything for which a start can be refused has been
/// checked. Nothing has been changed yet.
pub(super) enum Claimed {
    /// A fresh engine file, locked. A lobby, an arena and channels may still be there, if somebody removed the
    /// engine's file by hand.
    Fresh(Unfinished),
    /// All segments of a dead predecessor, which can be taken over.
    Warm(Box<Inherited>),
    /// A predecessor's segments, which are to be swept.
    Stale(Box<Stale>),
}

/// A predecessor's segments that cannot be kept.
pub(super) struct Stale {
    found: Found,
    pub(super) why: ColdStart,
    _held: (SegmentFile, SegmentLock),
}

impl Stale {
    /// Sweeps them. The name is free then and must be claimed again, because a cold start never uses an inode
    /// twice.
    pub(super) fn sweep(self, name: &EngineName) -> Result<ColdStart, SetupError> {
        let Removed { segments, bytes, .. } = self.found.sweep(name)?;
        tracing::warn!(%name, segments, bytes, reason = %self.why, "cold start");
        Ok(self.why)
    }
}

/// The segments of a dead predecessor.
pub(super) struct Inherited {
    pub(super) file: SegmentFile,
    pub(super) lock: SegmentLock,
    pub(super) engine: EngineSegment,
    pub(super) lobby: Lobby,
    pub(super) arena: SegmentFile,
    pub(super) identity: Identity,
}

/// Claims the name, decides whether a dead predecessor's segments are taken over or swept, and refuses what is
/// impossible, all before anything is swept. Once we have `swept` there is no way back, so room is no longer
/// checked here: the start waits until the predecessor's clients have unmapped its memory.
pub(super) fn claim_name(setup: &Setup<'_>, swept: bool) -> Result<Claimed, SetupError> {
    let check = || -> Result<(), SetupError> {
        check_names(setup.name)?;
        if !swept {
            // The room includes what a sweep gives back.
            preflight::check(&setup.geometry, &Room::for_engine(setup.name))?;
        }
        Ok(())
    };
    let Held { file, lock, found } = acquire(setup.name, setup.wait, &setup.stop)?;
    let Some(found) = found else {
        let unfinished = Unfinished { name: setup.name.clone(), held: Some((file, lock)), sweeps: false };
        check()?;
        return Ok(Claimed::Fresh(unfinished));
    };
    let why = match found.cold_start(setup) {
        Some(why) => why,
        None => match siblings(setup.name, &found)? {
            Ok((lobby, arena)) => {
                let Found::Known { segment, identity } = found else {
                    unreachable!("`cold_start` has a reason for everything else")
                };
                let engine = *segment;
                let inherited = Inherited { file, lock, engine, lobby, arena, identity };
                return Ok(Claimed::Warm(Box::new(inherited)));
            }
            Err(why) => ColdStart::Satellite(why),
        },
    };
    check()?;
    Ok(Claimed::Stale(Box::new(Stale { found, why, _held: (file, lock) })))
}

/// The lobby and the arena of the same start. The inner error says why they are missing or unfit; then only a cold
/// start is possible.
///
/// They are not ours, or cannot be written. Nothing is swept because of that.
fn siblings(name: &EngineName, found: &Found) -> Result<Result<(Lobby, SegmentFile), String>, SetupError> {
    let Found::Known { segment, identity } = found else { return Ok(Err("no engine segment".to_owned())) };
    let unfit = |error: SegmentError| match error {
        SegmentError::NotFound(_) | SegmentError::TooShort { .. } => Ok(Err(error.to_string())),
        other => Err(SetupError::from(other)),
    };
    let same = |block: &Superblock, kind, bytes| match block.read(kind, bytes) {
        Err(mismatch) => Err(mismatch.to_string()),
        Ok(_) if block.is_retired() => Err("it was retired".to_owned()),
        Ok(other) if (other.arena_id, other.geometry) != (identity.arena_id, identity.geometry) => {
            Err("it belongs to another start".to_owned())
        }
        Ok(_) => Ok(()),
    };
    let lobby = match segment::open_shared(&name.lobby(), LOBBY_BYTES) {
        Ok(mapping) => Lobby::new(Arc::new(mapping))?,
        Err(error) => return unfit(error),
    };
    if let Err(why) = same(lobby.superblock()?, Kind::Lobby, LOBBY_BYTES as u64) {
        return Ok(Err(format!("segment {}: {why}", name.lobby())));
    }
    let bytes = identity.geometry.arena_bytes + ARENA_TRAILER;
    let arena = match SegmentFile::open(&name.arena(), Access::ReadWrite) {
        Ok(file) => file,
        Err(error) => return unfit(error),
    };
    let trailer = match arena.map(bytes, Access::ReadWrite) {
        Ok(mapping) => mapping,
        Err(error) => return unfit(error),
    };
    if let Err(why) = same(arena_superblock(&trailer)?, Kind::Arena, bytes) {
        return Ok(Err(format!("segment {}: {why}", name.arena())));
    }
    // Slots lie in slabs that have memory. If some of that had been taken away, touching a slot could be a SIGBUS.
    let allocated = u64::from(segment.info().slabs_allocated.load(Ordering::Relaxed));
    let needed = allocated.saturating_mul(identity.geometry.slab_bytes);
    let held = arena.allocated_bytes()?;
    if needed > identity.geometry.arena_bytes || held < needed {
        return Ok(Err(format!("the arena holds {held} bytes, its engine had allocated {needed}")));
    }
    Ok(Ok((lobby, arena)))
}

/// Segments in the making. A drop (the start has failed) removes them again, as long as they are ours.
pub(super) struct Unfinished {
    name: EngineName,
    held: Option<(SegmentFile, SegmentLock)>,
    /// Whether anything but the engine's file has been made, or swept.
    sweeps: bool,
}

impl Unfinished {
    /// Begins the making: sweeps what lies under the name without an engine's file.
    pub(super) fn begin(&mut self) -> Result<(), SetupError> {
        self.sweeps = true;
        let mut sweep = Sweep::default();
        sweep.satellites(&self.name);
        let Removed { segments, bytes, .. } = sweep.end()?;
        if segments > 0 {
            tracing::warn!(name = %self.name, segments, bytes, "leftovers were swept");
        }
        Ok(())
    }

    /// The engine's file.
    pub(super) fn file(&self) -> &SegmentFile {
        match &self.held {
            Some((file, _)) => file,
            None => unreachable!("only `finish` takes the file, and it takes `self` with it"),
        }
    }

    /// The segments are complete: nothing is removed any more.
    pub(super) fn finish(mut self) -> (SegmentFile, SegmentLock) {
        match self.held.take() {
            Some(held) => held,
            None => unreachable!("only `finish` takes the file, and it takes `self` with it"),
        }
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        let Some((file, _lock)) = self.held.take() else { return };
        if !file.is_current() {
            return;
        }
        if !self.sweeps {
            return segment::unlink(file.name());
        }
        if let Err(error) = Found::Incomplete.sweep(&self.name) {
            tracing::warn!(%error, "a start failed, and something of it stays: the next start sweeps it");
        }
    }
}
