//! The mover: the thread that carries out a worker's jobs, so that vLLM's thread never waits for a copy or for the
//! engine.
//!
//! Loads go first, because a request waits for each of them: a store lets them pass between two of its batches. A copy
//! that runs when the engine goes away ends by itself.

use super::WorkerOptions;
use super::job::{Job, Work};
use super::queue::{Next, Queue};
use super::report::{Dropped, LoadError, LoadReport, StoreReport};
use super::unsettled::Unsettled;
use crate::arena::Arena;
use crate::attachment::Attachment;
use crate::client::Client;
use crate::shared::Registered;
use kvring_gpu_kernels::{CopyBackend, CopyBatch, CopyError, Direction, MappedArena, Transfer};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Bytes of one batch: large enough to hide a round trip, and small enough that a load or a preemption does not wait
/// long for the two batches that may be in flight.
const BATCH_BYTES: u64 = 16 << 20;
/// The most chunks of one batch.
const BATCH_CHUNKS: usize = 512;
/// How often the mover looks at stores that wait for the next engine, while there are any.
const UNSETTLED_EVERY: Duration = Duration::from_millis(2);
/// How often the mover looks whether the arena is still the one that the backend has registered, if devices write into
/// it.
const ARENA_EVERY: Duration = Duration::from_millis(500);

pub(super) struct Mover {
    pub(super) client: Arc<Client>,
    pub(super) registered: Arc<Registered>,
    pub(super) queue: Arc<Queue>,
    pub(super) backend: Arc<dyn CopyBackend>,
    /// The arena that the backend has mapped, and the backend's mapping.
    pub(super) arena: Mutex<Option<(Arena, Arc<dyn MappedArena>)>>,
    pub(super) options: WorkerOptions,
}

/// How a job ended.
pub(super) enum Ended {
    Store(StoreReport),
    /// A store whose copies have ended and whose commits wait for the next engine.
    Unsettled(Unsettled),
    /// A load, and the blocks that must be recomputed.
    Load(LoadReport, Vec<u32>),
    /// A load of which nobody knows whether a device still writes into its blocks: they stay the job's, and it is never
    /// reported.
    Lost(CopyError),
}

impl Mover {
    /// Works until the queue is closed and empty.
    pub(super) fn run(&self) {
        let mut unsettled: Vec<(Arc<Job>, Unsettled)> = Vec::new();
        loop {
            // Before the first job, too: it may take a backend long to register the arena, so it begins early, in the
            // background. A backend that panics here must not end this thread, or jobs would never be reported.
            if catch_unwind(AssertUnwindSafe(|| self.look_at_arena())).is_err() {
                tracing::error!(
                    "an error while the kvring engine's memory is prepared for copies (a bug: please report it); trying again"
                );
            }
            match self.queue.next(self.patience(!unsettled.is_empty())) {
                Next::Job(job) => {
                    let waits = self.carry_out(&job);
                    unsettled.extend(waits.map(|store| (job, store)));
                }
                Next::Nothing => {}
                Next::Closed if unsettled.is_empty() => break,
                Next::Closed => std::thread::sleep(UNSETTLED_EVERY),
            }
            unsettled.retain_mut(|(job, store)| {
                let report = store.look(&self.client.shared.ledger, !job.is_cancelled());
                report.map(|report| self.stored(job, report)).is_none()
            });
        }
    }

    /// The longest wait for a job.
    fn patience(&self, has_unsettled: bool) -> Option<Duration> {
        match (has_unsettled, self.backend.writes_by_device()) {
            (true, _) => Some(UNSETTLED_EVERY),
            (false, true) => Some(ARENA_EVERY),
            (false, false) => None,
        }
    }

    /// Carries out one job and reports it, exactly once whatever happens, or a request would hang. A store that waits
    /// for the next engine is returned, and the caller reports it.
    fn carry_out(&self, job: &Arc<Job>) -> Option<Unsettled> {
        let ran = catch_unwind(AssertUnwindSafe(|| match &job.work {
            Work::Store { round, parent, chunks } => {
                self.store(job, *round, *parent, chunks).map_or_else(Ended::Unsettled, Ended::Store)
            }
            Work::Load { chunks } => self.load(job, chunks),
        }));
        job.end_copies();
        match (ran, &job.work) {
            (Ok(Ended::Unsettled(store)), _) => return Some(store),
            (Ok(Ended::Store(report)), _) => self.stored(job, report),
            (Ok(Ended::Load(report, failed)), _) => self.queue.finish_load(job, report, &failed),
            (Ok(Ended::Lost(error)), _) => {
                tracing::error!(request = %job.request, %error, "{}", super::LOST);
                self.queue.lose(&error);
            }
            (Err(_), Work::Store { chunks, .. }) => {
                tracing::error!(
                    request = %job.request,
                    "an error inside kvring (a bug: please report it): this KV is not stored"
                );
                let report = StoreReport::dropped(chunks.len(), Dropped::Failed);
                self.queue.finish_store(job, report);
            }
            (Err(_), Work::Load { chunks }) => {
                tracing::error!(
                    request = %job.request,
                    "an error inside kvring (a bug: please report it): this KV is not loaded, and vLLM computes it \
                     again or fails the request, as its kv_load_failure_policy says"
                );
                let failed: Vec<u32> = chunks.iter().flat_map(|chunk| chunk.blocks.iter().copied()).collect();
                let mut report = LoadReport::default();
                chunks.iter().for_each(|_| report.fail(&LoadError::Copy(CopyError::ThreadFailed)));
                self.queue.finish_load(job, report, &failed);
            }
        }
        None
    }

    fn stored(&self, job: &Arc<Job>, report: StoreReport) {
        tracing::debug!(
            request = %job.request, stored = report.stored, skipped = report.skipped, dropped = report.dropped,
            bytes = report.bytes, ms = report.copy_ns / 1_000_000, "store"
        );
        self.queue.finish_store(job, report);
    }

    /// How many chunks of a store, or of a load, make a batch; `words` is the size of the payload area.
    pub(super) fn chunks_per_batch(&self, job: &Job, words: usize) -> usize {
        let fit = BATCH_BYTES / job.paged.shard_bytes().max(1);
        // Three reservations of 5 words a chunk and three commits of 6 fit at the same time.
        usize::try_from(fit).unwrap_or(1).min(words / 40).clamp(1, BATCH_CHUNKS)
    }

    /// Carries out loads that have arrived meanwhile, between two batches of a store.
    pub(super) fn loads_first(&self) {
        while let Some(job) = self.queue.next_load() {
            self.carry_out(&job);
        }
    }

    /// If devices write into the arena, has the backend map it as soon as there is one, and drops that mapping when
    /// there is none.
    fn look_at_arena(&self) {
        if !self.backend.writes_by_device() {
            return;
        }
        match self.client.current_attachment() {
            Some(attachment) => self.map_arena(&attachment),
            None => *self.arena.lock().unwrap_or_else(PoisonError::into_inner) = None,
        }
    }

    /// Has the backend map this attachment's arena, unless it has already. Only backends whose devices write there need
    /// it.
    fn map_arena(&self, attachment: &Attachment) {
        let Some(arena) = &attachment.arena else { return };
        if !self.backend.writes_by_device() {
            return;
        }
        let mut known = self.arena.lock().unwrap_or_else(PoisonError::into_inner);
        if known.as_ref().is_some_and(|(known, _)| known.is(arena)) {
            return;
        }
        // Drop the earlier arena first, so that the backend undoes its registration.
        *known = None;
        let engine = attachment.link.engine.clone();
        let mapping =
            arena.mapping(engine, attachment.identity.geometry.slab_bytes, &self.client.options().engine);
        *known = Some((arena.clone(), self.backend.map_arena(mapping)));
    }

    /// Starts copying shards between the arena and their blocks; with `checksum` the transfer gives their checksums in
    /// the same order. The caller keeps the attachment that maps the arena, and the job's
    /// [`CopyRunning`](super::job::CopyRunning), until the transfer has ended.
    pub(super) fn start<'a>(
        &self,
        direction: Direction,
        attachment: &Attachment,
        shards: impl Iterator<Item = (*mut u8, &'a [u32])>,
        job: &Job,
        checksum: bool,
    ) -> Result<Box<dyn Transfer>, CopyError> {
        self.map_arena(attachment);
        let mut batch = CopyBatch::new(direction, &job.paged, checksum).after(job.after.clone());
        for (address, blocks) in shards {
            // SAFETY: the address has been checked against the arena for a whole shard, and the caller keeps the
            // attachment that maps it; whoever made the `PagedKv` has promised that its pages are as described for as
            // long as the job runs. A store's slot is ours (WRITING, under a writer pass); nobody uses a load's bytes
            // before the slot's word has been looked at again.
            let added = unsafe { batch.shard(address, blocks) };
            // The job's block ids were checked when it was submitted.
            debug_assert_eq!(added, Ok(()));
        }
        self.backend.submit(batch)
    }
}
