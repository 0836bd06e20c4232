//! A worker's jobs after their submission: what ended, what failed, and waiting for it, also from other threads.

use super::job::{Finished, Job, JobId};
use super::queue::Queue;
use crate::client::Client;
use kvring_gpu_kernels::CopyError;
use std::sync::Arc;
use std::time::Duration;

/// The jobs of a [`crate::WorkerAdapter`], for threads that wait for some of them while another one submits more.
#[derive(Clone)]
pub struct Jobs {
    client: Arc<Client>,
    /// Outlives the mover: what has ended is reported whenever it is asked for.
    pub(super) queue: Arc<Queue>,
}

impl Jobs {
    pub(super) fn new(client: &Arc<Client>) -> Jobs {
        Jobs { client: client.clone(), queue: Arc::default() }
    }

    /// Nothing in a forked child: the jobs are its parent's, and so may be the queue's lock.
    fn queue(&self) -> Option<&Queue> {
        self.client.shared.fork.is_ours().then_some(&*self.queue)
    }

    /// Jobs that have ended since the last call; each is reported exactly once.
    #[must_use]
    pub fn get_finished(&self) -> Finished {
        self.queue().map(Queue::take_finished).unwrap_or_default()
    }

    /// Why it is not known whether a load has ended, once that is so: a device may still write into its blocks, so it is never
    /// reported, and nothing may be computed from the cache any more, which the caller must see to. Copies of which this is said
    /// have been asked about for half a minute.
    #[must_use]
    pub fn lost(&self) -> Option<CopyError> {
        self.queue().and_then(Queue::lost)
    }

    /// Blocks whose load has failed since the last call: to be recomputed; never [`crate::SKIP`]. A load's blocks are here no
    /// later than its report is in `get_finished`.
    #[must_use]
    pub fn get_block_ids_with_load_errors(&self) -> Vec<u32> {
        self.queue().map(Queue::take_failed_blocks).unwrap_or_default()
    }

    /// Before the blocks of these requests (of all, for `None`) are given to somebody else: when this returns, no
    /// store reads them any more. Stores are finished first as long as the engine answers, and until `flush_timeout` after
    /// their submission: where stores come faster than they are copied, who waits is given up at once. A copy that runs is
    /// always waited for, also when the engine is not there.
    pub fn handle_preemptions(&self, requests: Option<&[&str]>) {
        self.flush_those(|job| requests.is_none_or(|requests| requests.contains(&job.request.as_str())));
    }

    /// `handle_preemptions`, by job. Unknown and ended ones, and loads, are fine.
    pub fn flush(&self, jobs: &[JobId]) {
        self.flush_those(|job| jobs.contains(&job.id));
    }

    fn flush_those(&self, concerned: impl Fn(&Job) -> bool) {
        let Some(queue) = self.queue() else { return };
        let stores = queue.preempt(concerned);
        if stores.is_empty() {
            return;
        }
        let fit = self.client.is_healthy();
        let patience = if fit { self.client.options().flush_timeout } else { Duration::ZERO };
        for job in stores {
            job.wait_copied(patience);
        }
    }

    /// Waits until no job is open, at most `timeout`. True when none is.
    #[must_use]
    pub fn wait_idle(&self, timeout: Duration) -> bool {
        self.queue().is_none_or(|queue| queue.wait_open(0, timeout))
    }

    /// Waits until fewer jobs than now are open, at most `timeout`: for callers that have nothing else to do.
    #[must_use]
    pub fn wait_some(&self, timeout: Duration) -> bool {
        self.queue().is_none_or(|queue| queue.wait_open(queue.open_jobs().len().saturating_sub(1), timeout))
    }

    /// Waits until this job has ended, at most `timeout`. True when it has; also for a job that never was.
    #[must_use]
    pub fn wait_job(&self, job: JobId, timeout: Duration) -> bool {
        self.queue().is_none_or(|queue| queue.wait_job(job, timeout))
    }
}
