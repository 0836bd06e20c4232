//! What lies under the name of an engine's segment: whether its engine lives, and whether it may be taken over.

use super::sweep::{Removed, Sweep, retire_engine};
use super::{Setup, SetupError};
use kvring_shm_abi::claims::Locks;
use kvring_shm_abi::engine_segment::{EngineSegment, LIFE_WORDS_AT, OWNER_WORD, Places};
use kvring_shm_abi::failpoint::{self, Place};
use kvring_shm_abi::life::Life;
use kvring_shm_abi::mapping::Mapping;
use kvring_shm_abi::segment::{Access, EngineName, SegmentError, SegmentFile};
use kvring_shm_abi::superblock::{Geometry, Identity, Kind, Mismatch, SUPERBLOCK_BYTES, Superblock, boot_id};
use kvring_shm_abi::sync::Ordering;
use std::sync::Arc;
use std::time::Duration;

/// Why a predecessor's segments were not kept.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ColdStart {
    /// They were never complete: their creator died half-way.
    #[error("half-created segments were swept")]
    HalfCreated,
    /// Another build made them.
    #[error("the segments are another build's: {0}")]
    OtherBuild(Mismatch),
    /// An arena of another geometry is wanted.
    #[error(
        "another arena is wanted: there was one of {} bytes in slabs of {}, for {} chunks",
        .found.arena_bytes, .found.slab_bytes, .found.max_chunks
    )]
    OtherGeometry {
        /// The predecessor's geometry.
        found: Geometry,
    },
    /// The machine has been restarted since.
    #[error("the segments are from before the machine's last start")]
    OtherBoot,
    /// Somebody had begun to remove them.
    #[error("the segments were retired already")]
    Retired,
    /// A cold start was asked for.
    #[error("a cold start was asked for")]
    Asked,
    /// Each recovery of them so far has failed.
    #[error("{0} recoveries of it have failed in a row")]
    Failed(u32),
    /// The engine had found its own invariants broken.
    #[error("the engine had found its own invariants broken")]
    Unhealthy,
    /// The lobby or the arena is missing, or belongs to another start.
    #[error("{0}")]
    Satellite(String),
    /// Their tables make no sense.
    #[error("what its tables say makes no sense: {0}")]
    Nonsense(String),
}

/// After this many failed recoveries in a row, the next start is a cold one.
const RECOVERIES_MAX: u32 = 2;

/// What lies under the engine segment's name, as far as it can be read.
pub(super) enum Found {
    /// A file without a magic.
    Incomplete,
    /// A file with a magic that this build does not understand. Its superblock is the one part that all builds have
    /// in common.
    Foreign { mapping: Arc<Mapping>, mismatch: Mismatch },
    /// An engine's segment of this build.
    Known { segment: Box<EngineSegment>, identity: Identity },
}

impl Found {
    /// Looks at the file without touching a page that has no memory; on a full file system that would be a SIGBUS.
    pub(super) fn look(file: &SegmentFile) -> Result<Found, SegmentError> {
        let bytes = file.len()?;
        if bytes < SUPERBLOCK_BYTES as u64 {
            return Ok(Found::Incomplete);
        }
        let backed = |bytes: u64| match file.allocate(0, bytes) {
            Ok(()) => Ok(true),
            // The range had no memory, so nobody has written there. If it had memory, the error is a shortage of
            // the moment (of memory to swap the pages in), and says nothing about their content.
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
        if bytes < places.bytes || !backed(places.records_at)? {
            return Ok(Found::Foreign { mapping, mismatch });
        }
        match EngineSegment::new(mapping.clone(), &identity.geometry, identity.arena_id) {
            Ok(segment) => {
                // If the kernel of a dead engine marked no words, its words are marked here. This open file holds
                // none of the engine's locks itself, so it sees those of a living one.
                let marked = Locks::of(file, LIFE_WORDS_AT).mark_dead(&segment.life_words);
                if marked > 0 {
                    tracing::debug!(words = marked, "an engine has died, as its file locks tell");
                }
                Ok(Found::Known { segment: Box::new(segment), identity })
            }
            Err(_) => Ok(Found::Foreign { mapping, mismatch }),
        }
    }

    /// The process id of the engine, if it lives. The owner word decides ([`Found::look`] has marked it if only a
    /// file lock told of its owner's death). Only a segment from before the machine's last start is dead whatever
    /// its word says (a boot id that cannot be read counts as unknown, not as another one).
    pub(super) fn living(&self) -> Option<u32> {
        match self {
            Found::Known { segment, identity } if !other_boot(identity) => {
                let lives = matches!(segment.life_words[OWNER_WORD].life(), Life::Alive { .. });
                lives.then(|| segment.info().pid.load(Ordering::Relaxed))
            }
            _ => None,
        }
    }

    /// Marks the segment as retired and wakes its sleepers, as far as this build can.
    fn retire(&self) {
        match self {
            Found::Incomplete => {}
            Found::Foreign { mapping, .. } => {
                if let Ok(block) = mapping.at::<Superblock>(0) {
                    block.retire();
                }
            }
            Found::Known { segment, .. } => retire_engine(segment),
        }
    }

    /// Retires and removes everything, the engine's segment last. The caller holds the lock on the current engine file.
    ///
    /// A segment of ours cannot be removed. The others have been.
    pub(super) fn sweep(&self, name: &EngineName) -> Result<Removed, SetupError> {
        self.retire();
        failpoint::here(Place::PredecessorRetired);
        let mut sweep = Sweep::default();
        sweep.satellites(name);
        failpoint::here(Place::PredecessorsSatellitesGone);
        sweep.unlink(&name.engine_segment());
        failpoint::here(Place::PredecessorGone);
        sweep.end()
    }

    /// Why the segment must not be taken over; `None`: nothing speaks against it so far.
    pub(super) fn cold_start(&self, setup: &Setup<'_>) -> Option<ColdStart> {
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

    /// The error for a lock that stays held: why it is held.
    pub(super) fn busy(self, name: &EngineName, waited: Duration) -> SetupError {
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
