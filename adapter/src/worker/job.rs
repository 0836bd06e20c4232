//! Jobs: the caller's thread hands them to the mover, and each knows whether copies of its blocks run or may still
//! begin.

use super::report::{LoadReport, StoreReport};
use kvring_gpu_kernels::{Fence, PagedKv};
use kvring_shm_abi::engine_segment::ChunkHandle;
use kvring_shm_abi::message::{Key, Round};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Names a job; ids grow in the order of submission.
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

/// One chunk to load: what the lookup found, and the blocks to copy this rank's shard of it to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadChunk {
    /// The chunk, from [`crate::Hit::handles`].
    pub chunk: ChunkHandle,
    /// The blocks to copy it to, in order.
    pub blocks: Vec<u32>,
}

/// Jobs that have ended since the last call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Finished {
    /// Stores: job, request, report.
    pub stores: Vec<(JobId, String, StoreReport)>,
    /// Loads: job, request, report.
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
    /// The layout under which the job was submitted.
    pub(crate) paged: std::sync::Arc<PagedKv>,
    /// The job's copies are ordered after this fence.
    pub(crate) after: Fence,
    submitted: Instant,
    phase: Mutex<Phase>,
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
struct Phase {
    /// How many copies of the job's blocks are running.
    copying: u32,
    /// No copy may begin any more, and nobody waits for the outcome.
    cancelled: bool,
    /// No copy will begin any more: the mover has ended all of them.
    copied: bool,
}

impl Job {
    pub(crate) fn new(
        id: JobId,
        request: &str,
        work: Work,
        paged: std::sync::Arc<PagedKv>,
        after: Fence,
    ) -> Job {
        Job {
            id,
            request: request.to_owned(),
            work,
            paged,
            after,
            submitted: Instant::now(),
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

    /// Mover: says that a copy of the job's blocks runs, until the value that this returns is dropped. `None` if no
    /// copy may begin any more.
    pub(crate) fn begin_copy(&self) -> Option<CopyRunning<'_>> {
        let mut phase = self.phase();
        if phase.cancelled {
            return None;
        }
        phase.copying += 1;
        Some(CopyRunning(self))
    }

    /// Has the job been cancelled, so that no copy of its blocks may begin and nobody waits for the outcome?
    pub(crate) fn is_cancelled(&self) -> bool {
        self.phase().cancelled
    }

    /// Mover: says that it does not touch the job's blocks any more.
    pub(crate) fn end_copies(&self) {
        self.phase().copied = true;
        self.changed.notify_all();
    }

    /// Caller: waits until the mover does not touch the job's blocks any more. From `patience` after the job's
    /// submission no further copy may begin; this always waits for a copy that runs.
    pub(crate) fn wait_copied(&self, patience: Duration) {
        let mut phase = self.phase();
        while !phase.copied && !phase.cancelled {
            let left = patience.saturating_sub(self.submitted.elapsed());
            if left.is_zero() {
                phase.cancelled = true;
                break;
            }
            phase = self.changed.wait_timeout(phase, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        while phase.copying > 0 {
            phase = self.changed.wait(phase).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Caller: lets no further copy begin, keeps the mover from waiting for answers, and waits for a copy that runs.
    pub(crate) fn cancel(&self) {
        self.phase().cancelled = true;
        self.wait_copied(Duration::ZERO);
    }
}

/// While this lives, a copy of the job's blocks counts as running.
pub(crate) struct CopyRunning<'a>(&'a Job);

impl Drop for CopyRunning<'_> {
    fn drop(&mut self) {
        self.0.phase().copying -= 1;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvring_gpu_kernels::Plane;
    use std::sync::{Arc, mpsc};

    fn job() -> Arc<Job> {
        let plane =
            Plane { base: core::ptr::without_provenance_mut(4096), block_stride: 4096, page_bytes: 4096 };
        // SAFETY: nothing is ever copied.
        let paged = unsafe { PagedKv::new(vec![plane], 1, 1) }.unwrap();
        Arc::new(Job::new(JobId(1), "r", Work::Load { chunks: Vec::new() }, Arc::new(paged), Fence::none()))
    }

    #[test]
    fn a_preemption_waits_for_every_copy_that_runs_and_none_begins_after_it() {
        let job = job();
        let (first, second) = (job.begin_copy().unwrap(), job.begin_copy().unwrap());
        let (tell, told) = mpsc::channel();
        let theirs = job.clone();
        let flush = std::thread::spawn(move || {
            theirs.wait_copied(Duration::ZERO);
            tell.send(()).unwrap();
        });
        // Wait until the flush has said that no further copy may begin.
        while job.begin_copy().is_some() {
            std::thread::yield_now();
        }
        drop(first);
        let early = told.recv_timeout(Duration::from_millis(30));
        assert_eq!(early, Err(mpsc::RecvTimeoutError::Timeout), "one copy still runs");
        drop(second);
        told.recv().unwrap();
        flush.join().unwrap();
    }
}
