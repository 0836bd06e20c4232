//! The mover's queue: jobs that wait (loads go before stores), jobs that run, and reports of jobs that have ended.

use super::job::{Finished, Job, JobId};
use super::report::{LoadReport, StoreReport};
use kvring_gpu_kernels::{CopyError, SKIP};
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

#[derive(Default)]
struct State {
    loads: VecDeque<Arc<Job>>,
    stores: VecDeque<Arc<Job>>,
    /// Jobs that have not ended, the running one included.
    open: Vec<Arc<Job>>,
    finished: Finished,
    failed_blocks: Vec<u32>,
    /// Why a load is lost, if one is: nobody knows whether its copy has ended, and its job stays open.
    lost: Option<CopyError>,
    closed: bool,
}

impl State {
    fn is_empty(&self) -> bool {
        self.loads.is_empty() && self.stores.is_empty()
    }
}

/// What the mover finds in the queue.
pub(super) enum Next {
    /// The job to carry out.
    Job(Arc<Job>),
    /// No job waits at the moment.
    Nothing,
    /// No job waits, and none will come.
    Closed,
}

/// The queue, shared by the callers' threads and the mover.
#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    /// Notified when a job has been added, or the queue closed.
    work: Condvar,
    /// Notified when a job has ended or is lost.
    ended: Condvar,
}

impl Queue {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a job; false when the queue is closed.
    pub(super) fn push(&self, job: Arc<Job>) -> bool {
        let mut state = self.state();
        if state.closed {
            return false;
        }
        state.open.push(job.clone());
        if job.is_store() {
            state.stores.push_back(job);
        } else {
            state.loads.push_back(job);
        }
        drop(state);
        self.work.notify_one();
        true
    }

    /// Mover: waits for the next job, for at most `patience` if that is given.
    pub(super) fn next(&self, patience: Option<Duration>) -> Next {
        let state = self.state();
        let nothing = |state: &mut State| state.is_empty() && !state.closed;
        let mut state = match patience {
            Some(patience) => {
                let waited = self.work.wait_timeout_while(state, patience, nothing);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
            None => self.work.wait_while(state, nothing).unwrap_or_else(PoisonError::into_inner),
        };
        match state.loads.pop_front().or_else(|| state.stores.pop_front()) {
            Some(job) => Next::Job(job),
            None if state.closed => Next::Closed,
            None => Next::Nothing,
        }
    }

    /// Mover: does a load wait?
    pub(super) fn has_load(&self) -> bool {
        !self.state().loads.is_empty()
    }

    /// Mover: the next load, if one waits.
    pub(super) fn next_load(&self) -> Option<Arc<Job>> {
        self.state().loads.pop_front()
    }

    pub(super) fn finish_store(&self, job: &Arc<Job>, report: StoreReport) {
        let mut state = self.state();
        state.open.retain(|other| !Arc::ptr_eq(other, job));
        state.finished.stores.push((job.id, job.request.clone(), report));
        drop(state);
        self.ended.notify_all();
    }

    pub(super) fn finish_load(&self, job: &Arc<Job>, report: LoadReport, failed: &[u32]) {
        let mut state = self.state();
        // Failed blocks come before or together with the load's report, never after it.
        state.failed_blocks.extend(failed.iter().filter(|block| **block != SKIP));
        state.open.retain(|other| !Arc::ptr_eq(other, job));
        state.finished.loads.push((job.id, job.request.clone(), report));
        drop(state);
        self.ended.notify_all();
    }

    /// Says that a load is lost: its job will never end, so all waits end now.
    pub(super) fn lose(&self, why: &CopyError) {
        self.state().lost.get_or_insert_with(|| why.clone());
        self.ended.notify_all();
    }

    /// Why a load is lost, if one is.
    pub(super) fn lost(&self) -> Option<CopyError> {
        self.state().lost.clone()
    }

    /// The jobs that have ended since the last call.
    pub(super) fn take_finished(&self) -> Finished {
        core::mem::take(&mut self.state().finished)
    }

    /// Blocks whose load has failed since the last call.
    pub(super) fn take_failed_blocks(&self) -> Vec<u32> {
        core::mem::take(&mut self.state().failed_blocks)
    }

    /// The stores among these jobs that have not ended. Those that have not begun go to the front of the queue.
    pub(super) fn preempt(&self, concerned: impl Fn(&Job) -> bool) -> Vec<Arc<Job>> {
        let mut state = self.state();
        let concerned = |job: &Arc<Job>| concerned(job);
        let stores = core::mem::take(&mut state.stores);
        let (first, rest): (VecDeque<_>, VecDeque<_>) = stores.into_iter().partition(concerned);
        state.stores = first;
        state.stores.extend(rest);
        state.open.iter().filter(|job| job.is_store() && concerned(job)).cloned().collect()
    }

    /// Jobs that have not ended.
    pub(super) fn open_jobs(&self) -> Vec<Arc<Job>> {
        self.state().open.clone()
    }

    /// Waits until at most `left` jobs have not ended, or until `timeout` has passed. True in the first case.
    pub(super) fn wait_open(&self, left: usize, timeout: Duration) -> bool {
        self.wait_until(timeout, |open| open.len() <= left)
    }

    /// Waits until this job has ended, or until `timeout` has passed. True in the first case, and for an unknown job.
    pub(super) fn wait_job(&self, job: JobId, timeout: Duration) -> bool {
        self.wait_until(timeout, |open| open.iter().all(|other| other.id != job))
    }

    fn wait_until(&self, timeout: Duration, enough: impl Fn(&[Arc<Job>]) -> bool) -> bool {
        let state = self.state();
        let goes_on = |state: &mut State| !enough(&state.open) && state.lost.is_none();
        let waited = self.ended.wait_timeout_while(state, timeout, goes_on);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        enough(&state.open)
    }

    /// Takes jobs again, for another mover.
    pub(super) fn reopen(&self) {
        self.state().closed = false;
    }

    /// Takes no more jobs. Those that wait are still carried out.
    pub(super) fn close(&self) {
        self.state().closed = true;
        self.work.notify_all();
    }
}
