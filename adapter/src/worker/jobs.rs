//! A worker's jobs after their submission: which have ended, which failed, and how to wait for them, also from other
//! threads.

use super::job::{Finished, Job, JobId};
use super::queue::Queue;
use crate::client::Client;
use kvring_gpu_kernels::CopyError;
use std::sync::Arc;
use std::time::Duration;

/// The jobs of a [`crate::WorkerAdapter`], for threads that wait for some of them while another one submits more.
///
/// # Example
/// ```
/// use kvring_adapter::{Client, ClientOptions, Role, WorkerAdapter, WorkerOptions};
/// use std::time::Duration;
///
/// let client = Client::new(Role::Worker, ClientOptions::default())?;
/// let worker = WorkerAdapter::new(&client, WorkerOptions::new([1, 2, 3, 4], 1, 0, 16))?;
/// let jobs = worker.jobs();
/// let waiting = std::thread::spawn(move || jobs.wait_idle(Duration::from_secs(5)));
/// assert!(waiting.join().is_ok_and(|is_idle| is_idle), "no job has been submitted");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Jobs {
    client: Arc<Client>,
    /// It outlives the mover, so that jobs that have ended can be reported at any time.
    pub(super) queue: Arc<Queue>,
}

impl Jobs {
    pub(super) fn new(client: &Arc<Client>) -> Jobs {
        Jobs { client: client.clone(), queue: Arc::default() }
    }

    /// `None` in a forked child: the jobs are its parent's, and a thread of the parent may have held the queue's lock
    /// at the fork.
    fn queue(&self) -> Option<&Queue> {
        self.client.shared.fork.is_ours().then_some(&*self.queue)
    }

    /// The jobs that have ended since the last call; each job is reported exactly once.
    #[must_use]
    pub fn get_finished(&self) -> Finished {
        self.queue().map(Queue::take_finished).unwrap_or_default()
    }

    /// Why a load is *lost*, if one is: nobody knows whether its copy has ended, so a device may still write into its
    /// blocks. A lost load is never reported, and the caller must see to it that nothing is computed from the cache any
    /// more. A load is lost only after the device has been asked about its copy for half a minute.
    #[must_use]
    pub fn lost(&self) -> Option<CopyError> {
        self.queue().and_then(Queue::lost)
    }

    /// The blocks whose load has failed since the last call: vLLM must recompute them. None of them is [`crate::SKIP`].
    /// A load's failed blocks are here no later than its report is in `get_finished`.
    #[must_use]
    pub fn get_block_ids_with_load_errors(&self) -> Vec<u32> {
        self.queue().map(Queue::take_failed_blocks).unwrap_or_default()
    }

    /// Call this before the blocks of these requests (`None`: of all) are given to somebody else: when it returns, no
    /// store reads them any more. While the engine is healthy, these stores are copied first, and each may still begin
    /// copies until `flush_timeout` after its submission; where stores come faster than they are copied, a store may
    /// have waited that long already, and is then given up at once. This always waits for a copy that runs, also when
    /// there is no engine.
    pub fn handle_preemptions(&self, requests: Option<&[&str]>) {
        self.flush_those(|job| requests.is_none_or(|requests| requests.contains(&job.request.as_str())));
    }

    /// As `handle_preemptions`, for these jobs. Ignores loads, and jobs that have ended or are unknown.
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

    /// Waits at most `timeout` until no job is open. True when none is.
    #[must_use]
    pub fn wait_idle(&self, timeout: Duration) -> bool {
        self.queue().is_none_or(|queue| queue.wait_open(0, timeout))
    }

    /// Waits at most `timeout` until fewer jobs than now are open. For callers that have nothing else to do.
    #[must_use]
    pub fn wait_some(&self, timeout: Duration) -> bool {
        self.queue().is_none_or(|queue| queue.wait_open(queue.open_jobs().len().saturating_sub(1), timeout))
    }

    /// Waits at most `timeout` until this job has ended. True when it has, and for an unknown job.
    #[must_use]
    pub fn wait_job(&self, job: JobId, timeout: Duration) -> bool {
        self.queue().is_none_or(|queue| queue.wait_job(job, timeout))
    }
}
