//! What can go wrong with a segment.

use super::SHM_DIR;
use nix::errno::Errno;

/// What can go wrong with a segment.
#[derive(Debug, thiserror::Error)]
pub enum SegmentError {
    /// There is none of that name.
    #[error("no shared memory segment {0}")]
    NotFound(String),
    /// There is one already.
    #[error("shared memory segment {0} exists already")]
    Exists(String),
    /// It belongs to another user.
    #[error(
        "segment {name}: expected one of this user (uid {expected}), found one of uid {found}; run this as that user, or use \
         another engine name"
    )]
    WrongOwner {
        /// The segment.
        name: String,
        /// Our effective uid.
        expected: u32,
        /// Its owner.
        found: u32,
    },
    /// Others may read or write it.
    #[error(
        "segment {name}: expected mode 0600, found {found:04o}; `chmod 600 {SHM_DIR}{name}`, or take it away with `kvring remove`"
    )]
    WrongMode {
        /// The segment.
        name: String,
        /// Its permission bits.
        found: u32,
    },
    /// It is shorter than the part that is to be mapped.
    #[error("segment {name}: expected at least {expected} bytes, found {found}")]
    TooShort {
        /// The segment.
        name: String,
        /// Bytes needed.
        expected: u64,
        /// Bytes there.
        found: u64,
    },
    /// `/dev/shm` (or the cgroup) is full.
    #[error(
        "segment {name}: expected room for {bytes} more bytes in {SHM_DIR}, it has {available} left; enlarge it (docker run \
         --shm-size, mount -o remount,size=), free some of it, or start the kvring engine with a smaller --arena"
    )]
    NoSpace {
        /// The segment.
        name: String,
        /// Bytes that were to be allocated.
        bytes: u64,
        /// Bytes that the file system says are available.
        available: u64,
    },
    /// Any other error of a system call.
    #[error("segment {name}: {what}: {errno}")]
    Os {
        /// The segment.
        name: String,
        /// The call.
        what: &'static str,
        /// Its error.
        errno: Errno,
    },
    /// The crate `shared_memory` refused.
    #[error("segment {name}: {error}")]
    Crate {
        /// The segment.
        name: String,
        /// Its error.
        error: shared_memory::ShmemError,
    },
}
