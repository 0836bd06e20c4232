//! Jobs: what the caller's thread hands to the mover, and how the two agree on which blocks are being read.

use super::report::{LoadReport, StoreReport};
use kvring_gpu_kernels::{Fence, PagedKv};
use kvring_shm_abi::engine_segment::ShardHandle;
use kvring_shm_abi::message::{Key, Round};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

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
    /// Its copies come after this.
    pub(crate) after: Fence,
    submitted: Instant,
    phase: Mutex<Phase>,
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
struct Phase {
    /// Copies of its blocks that are running.
    copying: u32,
    /// No copy may begin any more.
    cancelled: bool,
    /// No copy will begin any more: all are done.
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

    /// Mover: a copy of its blocks runs from now on until what this returns is dropped; `None` where none may begin.
    pub(crate) fn begin_copy(&self) -> Option<CopyRunning<'_>> {
        let mut phase = self.phase();
        if phase.cancelled {
            return None;
        }
        phase.copying += 1;
        Some(CopyRunning(self))
    }

    /// May no copy of its blocks begin any more, and is nobody interested in what becomes of it?
    pub(crate) fn is_cancelled(&self) -> bool {
        self.phase().cancelled
    }

    /// Mover: its blocks are not looked at any more.
    pub(crate) fn end_copies(&self) {
        self.phase().copied = true;
        self.changed.notify_all();
    }

    /// Caller: waits until its blocks are not looked at any more. When its submission is `patience` ago no further copy begins,
    /// but one that runs is always waited for.
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

    /// Caller: no copy begins any more, and no answer is waited for; waits for a copy that runs.
    pub(crate) fn cancel(&self) {
        self.phase().cancelled = true;
        self.wait_copied(Duration::ZERO);
    }
}

/// A copy of a job's blocks that is running, until this is dropped.
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
        // Until it has said that no further copy may begin.
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
