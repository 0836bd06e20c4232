//! Getting the name: exactly one start at a time, never beside a living engine. And what is to become of what lies under
//! it: taken over as it is, or swept.
//!
//! The lock belongs to an *inode*, the name may lead to another one by the time it is held; so whoever gets the lock
//! checks that the file is still current, and begins again if not. While the lock on the current file is held, nobody
//! else unlinks or replaces the name (a forced removal excepted), and the other segments belong to its holder.

use super::{Removed, Setup, SetupError, Sweep, arena_superblock, sweep};
use crate::preflight::{self, Room};
use kvring_shm_abi::claims::Locks;
use kvring_shm_abi::engine_segment::{EngineSegment, LIFE_WORDS_AT, OWNER_WORD, Places};
use kvring_shm_abi::failpoint;
use kvring_shm_abi::futex::Deadline;
use kvring_shm_abi::life::Life;
use kvring_shm_abi::lobby::{LOBBY_BYTES, Lobby};
use kvring_shm_abi::mapping::Mapping;
use kvring_shm_abi::segment::{self, Access, EngineName, SegmentError, SegmentFile, SegmentLock};
use kvring_shm_abi::superblock::{
    ARENA_TRAILER, Geometry, Identity, Kind, Mismatch, SUPERBLOCK_BYTES, Superblock, boot_id,
};
use kvring_shm_abi::sync::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often a held lock is tried again.
const POLL: Duration = Duration::from_millis(5);
/// How long an engine that lives is looked at: one that has just been killed is marked as dead a moment later.
const DYING: Duration = Duration::from_millis(200);

/// Why what a predecessor left was not kept.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ColdStart {
    /// It never was complete: its creator died half-way.
    #[error("half-created segments were swept")]
    HalfCreated,
    /// Another build made it.
    #[error("the segments are another build's: {0}")]
    OtherBuild(Mismatch),
    /// Another arena is wanted.
    #[error("another arena is wanted: there was one of {} bytes in slabs of {}", .found.arena_bytes, .found.slab_bytes)]
    OtherGeometry {
        /// What there was.
        found: Geometry,
    },
    /// The machine has been started again since.
    #[error("the segments are from before the machine's last start")]
    OtherBoot,
    /// It was half-way through being removed.
    #[error("the segments were retired already")]
    Retired,
    /// A cold start was asked for.
    #[error("a cold start was asked for")]
    Asked,
    /// Each recovery of it so far has failed.
    #[error("{0} recoveries of it have failed in a row")]
    Failed(u32),
    /// The engine had found its own invariants broken.
    #[error("the engine had found its own invariants broken")]
    Unhealthy,
    /// The lobby or the arena is not there, or not of the same start.
    #[error("{0}")]
    Satellite(String),
    /// What its tables say makes no sense.
    #[error("what its tables say makes no sense: {0}")]
    Nonsense(String),
}

/// So many recoveries in a row may fail; then the next start is a cold one.
const RECOVERIES_MAX: u32 = 2;

/// What lies under the name, as far as it can be read.
pub(super) enum Found {
    /// No magic.
    Incomplete,
    /// A magic, but nothing that this build understands; what it has in common with every build is its superblock.
    Foreign { mapping: Arc<Mapping>, mismatch: Mismatch },
    /// An engine's segment of this build.
    Known { segment: Box<EngineSegment>, identity: Identity },
}

impl Found {
    /// Looks, without ever touching a page that has no memory: on a full file system that would be a SIGBUS.
    pub(super) fn look(file: &SegmentFile) -> Result<Found, SegmentError> {
        let bytes = file.len()?;
        if bytes < SUPERBLOCK_BYTES as u64 {
            return Ok(Found::Incomplete);
        }
        let backed = |bytes: u64| match file.allocate(0, bytes) {
            Ok(()) => Ok(true),
            // It was not there before, so nobody has written there. Where it was, that is a shortage of the moment (of memory to
            // swap it in), and says nothing of what lies there.
            Err(SegmentError::NoSpace { .. }) if file.allocated_bytes()? < bytes => Ok(false),
            Err(error) => Err(error),
        };
        if !backed(SUPERBLOCK_BYTES as u64)? {
            return Ok(Found::Incomplete);
        }
        let mapping = Arc::new(file.map(bytes, Access::ReadWrite)?);
        let identity = match mapping.at::<Superblock>(0).map(|block| block.read(Kind::Engine, bytes)) {
            Ok(Ok(identity)) => identity,
            Ok(Err(Mismatch::Incomplete)) => return Ok(Found::Incomplete),
            Ok(Err(mismatch)) => return Ok(Found::Foreign { mapping, mismatch }),
            Err(_) => return Ok(Found::Incomplete),
        };
        let places = Places::of(&identity.geometry);
        let mismatch = Mismatch::Size { expected: places.bytes, found: bytes };
        if bytes < places.bytes || !backed(places.slots_at)? {
            return Ok(Found::Foreign { mapping, mismatch });
        }
        match EngineSegment::new(mapping.clone(), &identity.geometry) {
            Ok(segment) => {
                // An engine whose kernel marked no words, and that has died: from here on its words say so. This open
                // file holds none of its locks, so a living one's are seen.
                let marked = Locks::of(file, LIFE_WORDS_AT).mark_dead(&segment.life_words);
                if marked > 0 {
                    tracing::debug!(words = marked, "an engine has died, as its file locks tell");
                }
                Ok(Found::Known { segment: Box::new(segment), identity })
            }
            Err(_) => Ok(Found::Foreign { mapping, mismatch }),
        }
    }

    /// The process id of an engine that lives. The owner word decides ([`Found::look`] has marked it where only a file lock
    /// told of its owner's death); only a segment from before the machine's last
    /// start is dead whatever it says (a boot id that cannot be read is unknown, not another).
    pub(super) fn living(&self) -> Option<u32> {
        match self {
            Found::Known { segment, identity } if !other_boot(identity) => {
                let lives = matches!(segment.life_words[OWNER_WORD].life(), Life::Alive { .. });
                lives.then(|| segment.info().pid.load(Ordering::Relaxed))
            }
            _ => None,
        }
    }

    /// Marks it as given up and wakes its sleepers, as far as this build can.
    pub(super) fn retire(&self) {
        match self {
            Found::Incomplete => {}
            Found::Foreign { mapping, .. } => {
                if let Ok(block) = mapping.at::<Superblock>(0) {
                    block.retire();
                }
            }
            Found::Known { segment, .. } => sweep::retire_engine(segment),
        }
    }

    /// Why it is not to be taken over; `None`: nothing speaks against it so far.
    fn cold_start(&self, setup: &Setup<'_>) -> Option<ColdStart> {
        let (segment, identity) = match self {
            Found::Incomplete => return Some(ColdStart::HalfCreated),
            Found::Foreign { mismatch, .. } => return Some(ColdStart::OtherBuild(mismatch.clone())),
            Found::Known { segment, identity } => (segment, identity),
        };
        let failed = segment.info().recoveries.load(Ordering::Relaxed);
        if segment.superblock().is_retired() {
            Some(ColdStart::Retired)
        } else if other_boot(identity) {
            Some(ColdStart::OtherBoot)
        } else if identity.geometry != setup.geometry && !setup.any_geometry {
            Some(ColdStart::OtherGeometry { found: identity.geometry })
        } else if let Some(reason) = &setup.cold {
            Some(reason.clone())
        } else if segment.info().unhealthy.load(Ordering::Relaxed) != 0 {
            Some(ColdStart::Unhealthy)
        } else if failed >= RECOVERIES_MAX {
            Some(ColdStart::Failed(failed))
        } else {
            None
        }
    }

    /// Why a lock that stays held is held.
    fn busy(self, name: &EngineName, waited: Duration) -> SetupError {
        let waited_ms = u64::try_from(waited.as_millis()).unwrap_or(u64::MAX);
        let name = name.clone();
        match self {
            Found::Incomplete => SetupError::Starting { name, waited_ms },
            Found::Foreign { mismatch, .. } => SetupError::OtherBuild { name, mismatch },
            Found::Known { segment, .. } => {
                let pid = segment.info().pid.load(Ordering::Relaxed);
                SetupError::Exiting { name, pid, waited_ms }
            }
        }
    }
}

fn other_boot(identity: &Identity) -> bool {
    let (then, now) = (identity.boot_id, boot_id());
    then != [0, 0] && now != [0, 0] && then != now
}

/// The current engine file, locked by us.
pub(super) struct Held {
    pub(super) file: SegmentFile,
    pub(super) lock: SegmentLock,
    /// What lies in it; `None` where we have just created it.
    pub(super) found: Option<Found>,
}

/// Locks the engine file, creating it where there is none.
///
/// # Errors
/// Its engine lives; or the lock stays held until `wait` has passed.
pub(super) fn acquire(name: &EngineName, wait: Duration) -> Result<Held, SetupError> {
    let began = Instant::now();
    let deadline = Deadline::after(wait);
    let file_name = name.engine_segment();
    loop {
        let (file, fresh) = match SegmentFile::open(&file_name, Access::ReadWrite) {
            Ok(file) => (file, false),
            // Without a length: who finds it knows that it has only just been made.
            Err(SegmentError::NotFound(_)) => match SegmentFile::create(&file_name, 0) {
                Ok(file) => (file, true),
                Err(SegmentError::Exists(_)) => continue,
                Err(error) => return Err(error.into()),
            },
            Err(error) => return Err(error.into()),
        };
        failpoint::here("opened");
        let lock = file.try_lock();
        if !file.is_current() {
            // Unlinked or replaced between the opening and the lock: look again at what the name leads to now.
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
            // A starter, a remover, or a dead engine whose descriptors the kernel is still closing.
            None if deadline.passed() => return Err(found.busy(name, began.elapsed())),
            None => std::thread::sleep(POLL),
        }
    }
}

/// The name is ours, and everything that a start can be refused for has been looked at. Nothing has been changed yet.
pub(super) enum Claimed {
    /// A fresh engine file, locked. The lobby, the arena and channels may be there: somebody removed the engine's file by hand.
    Fresh(Unfinished),
    /// All segments of a dead predecessor, fit to be taken over.
    Warm(Box<Inherited>),
    /// What a predecessor left is to be swept.
    Stale(Box<Stale>),
}

/// What a predecessor left, and cannot be kept.
pub(super) struct Stale {
    found: Found,
    pub(super) why: ColdStart,
    _held: (SegmentFile, SegmentLock),
}

impl Stale {
    /// Sweeps it. The name is free then, and to be claimed again: a cold start never uses an inode twice.
    pub(super) fn sweep(self, name: &EngineName) -> Result<ColdStart, SetupError> {
        let Removed { segments, bytes, .. } = sweep::held(name, &self.found)?;
        tracing::warn!(%name, segments, bytes, reason = %self.why, "cold start");
        Ok(self.why)
    }
}

/// What a dead predecessor left.
pub(super) struct Inherited {
    pub(super) file: SegmentFile,
    pub(super) lock: SegmentLock,
    pub(super) engine: EngineSegment,
    pub(super) lobby: Lobby,
    pub(super) arena: SegmentFile,
    pub(super) identity: Identity,
}

/// Gets the name, decides what is to become of what a dead predecessor left, and refuses what cannot be: all before
/// anything is swept. Once we have `swept` there is no way back: what the predecessor's clients still map is waited for.
pub(super) fn claim_name(setup: &Setup<'_>, swept: bool) -> Result<Claimed, SetupError> {
    let check = || -> Result<(), SetupError> {
        sweep::check_names(setup.name)?;
        if !swept {
            // With what a sweep gives back.
            preflight::check(&setup.geometry, &Room::for_engine(setup.name))?;
        }
        Ok(())
    };
    let Held { file, lock, found } = acquire(setup.name, setup.wait)?;
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

/// The lobby and the arena of the same start. The inner error says why there are none: then a cold start it must be.
///
/// # Errors
/// They are not ours, or cannot be written: nothing is swept for that.
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
    // Slots lie in slabs that have memory; were some of it taken away, touching them could be a SIGBUS.
    let allocated = u64::from(segment.info().slabs_allocated.load(Ordering::Relaxed));
    let needed = allocated.saturating_mul(identity.geometry.slab_bytes);
    let held = arena.allocated_bytes()?;
    if needed > identity.geometry.arena_bytes || held < needed {
        return Ok(Err(format!("the arena holds {held} bytes, its engine had allocated {needed}")));
    }
    Ok(Ok((lobby, arena)))
}

/// Segments in the making: removed again when the start fails, as long as they are ours.
pub(super) struct Unfinished {
    name: EngineName,
    held: Option<(SegmentFile, SegmentLock)>,
    /// Has anything but the engine's file been made, or swept?
    sweeps: bool,
}

impl Unfinished {
    /// The making begins: what lies under the name without an engine's file is swept.
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

    /// Complete: nothing is removed.
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
        if let Err(error) = sweep::held(&self.name, &Found::Incomplete) {
            tracing::warn!(%error, "a start failed, and something of it stays: the next start sweeps it");
        }
    }
}
