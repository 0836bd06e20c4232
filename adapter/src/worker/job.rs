//! Jobs: what the caller's thread hands to the mover, and how the two agree on which blocks are being read.

use super::paged::PagedKv;
use kvring_shm_abi::engine_segment::ShardHandle;
use kvring_shm_abi::message::{Key, Round};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Names a job, in the order of submission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(pub u64);

/// One chunk to store: its key and the blocks that hold it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreChunk {
    /// The chunk's key.
    pub key: Key,
    /// Its blocks, in order.
    pub blocks: Vec<u32>,
}

/// One chunk to load: where the lookup said it is, and the blocks that it goes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadChunk {
    /// From [`crate::Hit::shards_of`].
    pub shard: ShardHandle,
    /// Where it goes, in order.
    pub blocks: Vec<u32>,
}

/// What became of a store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreReport {
    /// Shards written and committed.
    pub stored: u32,
    /// Skipped: visible already, or being stored under a newer round.
    pub skipped: u32,
    /// Dropped: no room, the engine not available, or the round failed.
    pub dropped: u32,
    /// Bytes copied.
    pub bytes: u64,
    /// Nanoseconds spent copying.
    pub copy_ns: u64,
}

/// What became of a load.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadReport {
    /// Chunks loaded and validated.
    pub loaded: u32,
    /// Chunks that could not be loaded; their blocks are among the blocks with load errors.
    pub failed: u32,
    /// Bytes copied.
    pub bytes: u64,
    /// Nanoseconds spent copying.
    pub copy_ns: u64,
}

/// Jobs that have ended since the last call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Finished {
    /// Stores: job, request, what became of it.
    pub stores: Vec<(JobId, String, StoreReport)>,
    /// Loads.
    pub loads: Vec<(JobId, String, LoadReport)>,
}

pub(crate) enum Work {
    Store { round: Round, parent: Option<Key>, chunks: Vec<StoreChunk> },
    Load { chunks: Vec<LoadChunk> },
}

/// A job, shared by the caller's thread and the mover.
pub(crate) struct Job {
    pub(crate) id: JobId,
    pub(crate) request: String,
    pub(crate) work: Work,
    /// The layout it was submitted under.
    pub(crate) paged: std::sync::Arc<PagedKv>,
    phase: Mutex<Phase>,
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
struct Phase {
    /// A copy of its blocks is running.
    copying: bool,
    /// No copy may begin any more.
    cancelled: bool,
    /// No copy will begin any more: all are done.
    copied: bool,
}

impl Job {
    pub(crate) fn new(id: JobId, request: &str, work: Work, paged: std::sync::Arc<PagedKv>) -> Job {
        Job {
            id,
            request: request.to_owned(),
            work,
            paged,
            phase: Mutex::new(Phase::default()),
            changed: Condvar::new(),
        }
    }

    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_store(&self) -> bool {
        matches!(self.work, Work::Store { .. })
    }

    /// Mover: may a copy of its blocks begin? If so it has begun.
    pub(crate) fn begin_copy(&self) -> bool {
        let mut phase = self.phase();
        if phase.cancelled {
            return false;
        }
        phase.copying = true;
        true
    }

    /// Mover: the copy that began has ended.
    pub(crate) fn end_copy(&self) {
        self.phase().copying = false;
        self.changed.notify_all();
    }

    /// Mover: its blocks are not looked at any more.
    pub(crate) fn end_copies(&self) {
        let mut phase = self.phase();
        (phase.copying, phase.copied) = (false, true);
        drop(phase);
        self.changed.notify_all();
    }

    /// Caller: waits until its blocks are not looked at any more; after `patience` no further copy begins, but one
    /// that runs is always waited for.
    pub(crate) fn wait_copied(&self, patience: std::time::Duration) {
        let until = std::time::Instant::now() + patience;
        let mut phase = self.phase();
        while !phase.copied && !phase.cancelled {
            let left = until.saturating_duration_since(std::time::Instant::now());
            if left.is_zero() {
                phase.cancelled = true;
                break;
            }
            phase = self.changed.wait_timeout(phase, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        while phase.copying {
            phase = self.changed.wait(phase).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Caller: no copy begins any more; waits for one that runs.
    pub(crate) fn cancel(&self) {
        self.wait_copied(std::time::Duration::ZERO);
    }
}
