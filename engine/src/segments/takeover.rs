//! Getting the name: exactly one start at a time, never beside a living engine.
//!
//! The lock belongs to an *inode*, the name may lead to another one by the time it is held; so whoever gets the lock
//! checks that the file is still current, and begins again if not. While the lock on the current file is held, nobody
//! else unlinks or replaces the name (a forced removal excepted), and the other segments belong to its holder.

use super::{Setup, SetupError, checkpoint, sweep};
use kvring_shm_abi::engine_segment::{EngineSegment, OWNER_WORD, Places};
use kvring_shm_abi::futex::Deadline;
use kvring_shm_abi::life::Life;
use kvring_shm_abi::mapping::Mapping;
use kvring_shm_abi::segment::{Access, EngineName, SegmentError, SegmentFile, SegmentLock};
use kvring_shm_abi::superblock::{Geometry, Identity, Kind, Mismatch, SUPERBLOCK_BYTES, Superblock, boot_id};
use kvring_shm_abi::sync::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often a held lock is tried again.
const POLL: Duration = Duration::from_millis(5);

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
    #[error("the arena's geometry changed: {found:?}")]
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
    /// Complete, its engine dead: what a warm start would take over.
    #[error("the earlier engine has died; this release does not recover its contents")]
    Died,
}

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
            // It was not there before, so nobody has written there.
            Err(SegmentError::NoSpace { .. }) => Ok(false),
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
            Ok(segment) => Ok(Found::Known { segment: Box::new(segment), identity }),
            Err(_) => Ok(Found::Foreign { mapping, mismatch }),
        }
    }

    /// The process id of an engine that lives. The owner word decides; only a segment from before the machine's last
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

    fn cold_start(&self, wanted: &Geometry) -> ColdStart {
        match self {
            Found::Incomplete => ColdStart::HalfCreated,
            Found::Foreign { mismatch, .. } => ColdStart::OtherBuild(mismatch.clone()),
            Found::Known { segment, .. } if segment.superblock().is_retired() => ColdStart::Retired,
            Found::Known { identity, .. } if other_boot(identity) => ColdStart::OtherBoot,
            Found::Known { identity, .. } if identity.geometry != *wanted => {
                ColdStart::OtherGeometry { found: identity.geometry }
            }
            Found::Known { .. } => ColdStart::Died,
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
        checkpoint("opened");
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
            return Err(SetupError::AlreadyRunning { name: name.clone(), pid });
        }
        match lock {
            Some(lock) => return Ok(Held { file, lock, found: (!fresh).then_some(found) }),
            // A starter, a remover, or a dead engine whose descriptors the kernel is still closing.
            None if deadline.passed() => return Err(found.busy(name, began.elapsed())),
            None => std::thread::sleep(POLL),
        }
    }
}

/// The name is ours: a fresh engine file, locked, and nothing else under the name.
pub(super) struct Claimed {
    pub(super) unfinished: Unfinished,
    pub(super) cold_start: Option<ColdStart>,
}

/// Gets the name, after sweeping what a dead predecessor left.
pub(super) fn claim_name(setup: &Setup<'_>) -> Result<Claimed, SetupError> {
    let mut cold_start = None;
    loop {
        let held = acquire(setup.name, setup.wait)?;
        let Some(found) = &held.found else {
            let unfinished = Unfinished { name: setup.name.clone(), held: Some((held.file, held.lock)) };
            // Satellites without an engine file: somebody removed that one by hand.
            let leftovers = sweep::satellites(setup.name)?;
            if leftovers.segments > 0 {
                tracing::warn!(
                    segments = leftovers.segments,
                    bytes = leftovers.bytes,
                    "leftovers were swept"
                );
            }
            return Ok(Claimed { unfinished, cold_start });
        };
        let why = found.cold_start(&setup.geometry);
        let removed = sweep::held(setup.name, found)?;
        tracing::warn!(
            name = %setup.name, segments = removed.segments, bytes = removed.bytes, reason = %why, "cold start"
        );
        // The first reason is the one that says something: later rounds only meet other starters' traces.
        cold_start.get_or_insert(why);
    }
}

/// Segments in the making: removed again when the start fails, as long as they are ours.
pub(super) struct Unfinished {
    name: EngineName,
    held: Option<(SegmentFile, SegmentLock)>,
}

impl Unfinished {
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
        let swept = sweep::held(&self.name, &Found::Incomplete);
        if let Err(error) = swept {
            tracing::warn!(%error, "a start failed, and its segments stay: the next start sweeps them");
        }
    }
}
