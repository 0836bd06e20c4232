//! Why an engine's segments could not be made, taken over or removed.

use crate::preflight::NoRoom;
use kvring_shm_abi::life::ClaimError;
use kvring_shm_abi::mapping::OutOfBounds;
use kvring_shm_abi::segment::{EngineName, SegmentError};
use kvring_shm_abi::superblock::Mismatch;
use nix::errno::Errno;

/// Why segments could not be made or removed.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// An engine of that name lives.
    #[error(
        "an engine named {name} runs already (pid {pid}); stop it, use another --name, \
         or take its segments away with `kvring remove --name {name} --force`"
    )]
    AlreadyRunning {
        /// The engine's name.
        name: EngineName,
        /// Its process, in its own PID namespace.
        pid: u32,
    },
    /// Another process holds the lock, and the segment is not complete.
    #[error(
        "another engine named {name} is starting or being removed: waited {waited_ms} ms for it; try again"
    )]
    Starting {
        /// The engine's name.
        name: EngineName,
        /// How long this start waited, in milliseconds.
        waited_ms: u64,
    },
    /// The engine is dead, but its exiting process still holds the lock.
    #[error(
        "the engine named {name} (pid {pid}) is dead, but still exiting: waited {waited_ms} ms for it; try again"
    )]
    Exiting {
        /// The engine's name.
        name: EngineName,
        /// Its process, in its own PID namespace.
        pid: u32,
        /// How long this start waited, in milliseconds.
        waited_ms: u64,
    },
    /// The lock is held by an engine whose segment this build cannot read.
    #[error("an engine named {name} of another build runs: {mismatch}; stop it, or use another --name")]
    OtherBuild {
        /// The engine's name.
        name: EngineName,
        /// How its segment differs.
        mismatch: Mismatch,
    },
    /// Somebody removed the segments while they were being made.
    #[error(
        "the segments of {name} were removed while they were being made (`kvring remove --force`?); try again"
    )]
    Removed {
        /// The engine's name.
        name: EngineName,
    },
    /// The start was asked to stop. Nothing of it is left, and what could have been taken over is still there.
    #[error("asked to stop before it served")]
    Stopped,
    /// The arena does not fit.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    /// A name leads to something that is no segment at all.
    #[error(
        "segment {name}: expected a file of shared memory, found something else; remove it, or use another --name"
    )]
    NoFile {
        /// The segment.
        name: String,
    },
    /// A segment could not be opened, created or mapped.
    #[error(transparent)]
    Segment(#[from] SegmentError),
    /// A segment is too short for what belongs into it.
    #[error(transparent)]
    Bounds(#[from] OutOfBounds),
    /// A life word of a fresh segment was claimed already.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// The system gave no random numbers.
    #[error("no random numbers for the arena's id: {0}")]
    Random(std::io::Error),
    /// A name could not be removed.
    #[error("segment {name}: unlink: {errno}; remove it by hand")]
    Unlink {
        /// The segment.
        name: String,
        /// Why.
        errno: Errno,
    },
}
