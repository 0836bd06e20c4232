//! Reports: the outcome of each job, and the reasons.

use crate::error::CallError;
use kvring_shm_abi::slot::NotServable;

/// The outcome of a store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreReport {
    /// Shards written and committed.
    pub stored: u32,
    /// Shards skipped, because their chunk is visible already, this rank has a slot for it in this round already, or a
    /// newer round of the same source has begun.
    pub skipped: u32,
    /// Shards dropped, for one of the reasons in `why`.
    pub dropped: u32,
    /// The reasons; their counts add up to `dropped`.
    pub why: Drops,
    /// Bytes copied.
    pub bytes: u64,
    /// Nanoseconds spent copying.
    pub copy_ns: u64,
}

/// Why shards were not stored, in shards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drops {
    /// The arena has no room, even after eviction.
    pub no_space: u32,
    /// This client holds or writes as much as it may.
    pub busy: u32,
    /// The namespace is not registered with the engine, or not yet again.
    pub not_registered: u32,
    /// There was no engine, or it did not answer in time. Shards that had been copied by then may be committed all the
    /// same.
    pub unavailable: u32,
    /// Their round had failed or was replaced before they were committed, or their arena is gone.
    pub gone: u32,
    /// They were preempted, or the adapter was shut down, before their copy began.
    pub cancelled: u32,
    /// The copy failed, or the engine's answer made no sense.
    pub failed: u32,
}

/// Why a shard was not stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dropped {
    NoSpace,
    Busy,
    NotRegistered,
    Unavailable,
    Gone,
    Cancelled,
    Failed,
}

impl Dropped {
    /// The reason that a call's error amounts to.
    pub(super) fn by(error: &CallError) -> Dropped {
        match error {
            CallError::NotRegistered => Dropped::NotRegistered,
            CallError::Busy => Dropped::Busy,
            CallError::OutOfSpace => Dropped::NoSpace,
            CallError::Degraded(_)
            | CallError::Dead
            | CallError::Restarted
            | CallError::TimedOut { .. }
            | CallError::Forked => Dropped::Unavailable,
            CallError::TooManyKeys { .. } | CallError::Refused(_) => Dropped::Failed,
        }
    }
}

impl StoreReport {
    pub(super) fn drop_shards(&mut self, shards: u32, why: Dropped) {
        self.dropped += shards;
        let count = match why {
            Dropped::NoSpace => &mut self.why.no_space,
            Dropped::Busy => &mut self.why.busy,
            Dropped::NotRegistered => &mut self.why.not_registered,
            Dropped::Unavailable => &mut self.why.unavailable,
            Dropped::Gone => &mut self.why.gone,
            Dropped::Cancelled => &mut self.why.cancelled,
            Dropped::Failed => &mut self.why.failed,
        };
        *count += shards;
    }

    /// The report of a store of which all shards were dropped.
    pub(super) fn dropped(shards: usize, why: Dropped) -> StoreReport {
        let mut report = StoreReport::default();
        report.drop_shards(shards as u32, why);
        report
    }
}

/// The outcome of a load.
///
/// # Example
/// ```
/// # use kvring_adapter::{Client, PagedKv, Plane, Role, WorkerAdapter, WorkerOptions};
/// # use std::time::Duration;
/// use kvring_adapter::{ChunkHandle, ChunkWord, LoadChunk};
///
/// # let (engine, options) = include!(concat!(env!("CARGO_MANIFEST_DIR"), "/doc/engine.rs"));
/// # let mut cache = vec![7u8; 4096];
/// # let plane = Plane { base: cache.as_mut_ptr(), block_stride: 4096, page_bytes: 4096 };
/// # let client = Client::new(Role::Worker, options)?;
/// # let mut worker = WorkerAdapter::new(&client, WorkerOptions::new([1, 2, 3, 4], 1, 0, 16))?;
/// # // SAFETY: `cache` has all of these blocks, and outlives the worker, which is shut down below; nobody else uses it.
/// # worker.register_kv_caches(unsafe { PagedKv::new(vec![plane], 1, 1) }?)?;
/// // A handle from an engine that has been started anew since then.
/// let stale = ChunkHandle { arena_id: [1, 2], word: ChunkWord::new(0, 1) };
/// let job = worker.submit_load("request", vec![LoadChunk { chunk: stale, blocks: vec![0] }], None)?;
/// # worker.wait_job(job, Duration::from_secs(3600));
/// let (_, _, report) = &worker.get_finished().loads[0];
/// assert_eq!((report.loaded, report.failed, report.why.other_arena), (0, 1, 1));
/// assert_eq!(worker.get_block_ids_with_load_errors(), [0]);
/// # worker.shutdown();
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadReport {
    /// Chunks loaded and validated.
    pub loaded: u32,
    /// Chunks that could not be loaded, for one of the reasons in `why`; their blocks are among the blocks with load errors.
    pub failed: u32,
    /// The reasons; their counts add up to `failed`.
    pub why: LoadFailures,
    /// Bytes copied.
    pub bytes: u64,
    /// Nanoseconds spent copying.
    pub copy_ns: u64,
}

/// Why chunks could not be loaded, in chunks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadFailures {
    /// The chunk was not pinned any more, and has been evicted or replaced since the lookup.
    pub gone: u32,
    /// The lookup found the chunk in an arena that has been replaced since.
    pub other_arena: u32,
    /// There is no arena, or the namespace is not registered.
    pub unavailable: u32,
    /// The handle leads to a shard of another model, layout or rank.
    pub mismatch: u32,
    /// The bytes are not those that were stored.
    pub corrupt: u32,
    /// The adapter was shut down before the copy began.
    pub cancelled: u32,
    /// The copy itself failed.
    pub failed: u32,
}

/// Why a chunk could not be loaded. Its texts are for vLLM's log; what exactly a slot's header said is logged at debug
/// level only.
#[derive(Debug, thiserror::Error)]
pub(super) enum LoadError {
    #[error("it was evicted or replaced after it had been looked up")]
    Gone,
    #[error("there is KV of another model, rank or size where it was found (a bug: please report it)")]
    Mismatch(NotServable),
    #[error("the kvring engine was started anew, and empty, after it had been looked up")]
    OtherArena,
    #[error(transparent)]
    Unavailable(#[from] CallError),
    #[error(
        "it was found outside the kvring engine's memory (place {slot}, offset {offset}; a bug: please report it)"
    )]
    Outside { slot: u32, offset: u64 },
    #[error("it is damaged: expected checksum {stored:#018x}, its bytes have {computed:#018x}")]
    Corrupt { stored: u64, computed: u64 },
    #[error("kvring is being shut down in this process")]
    Cancelled,
    #[error(transparent)]
    Copy(#[from] kvring_gpu_kernels::CopyError),
}

impl LoadReport {
    pub(super) fn fail(&mut self, error: &LoadError) {
        self.failed += 1;
        let count = match error {
            LoadError::Gone => &mut self.why.gone,
            LoadError::Mismatch(_) | LoadError::Outside { .. } => &mut self.why.mismatch,
            LoadError::OtherArena => &mut self.why.other_arena,
            LoadError::Unavailable(_) => &mut self.why.unavailable,
            LoadError::Corrupt { .. } => &mut self.why.corrupt,
            LoadError::Cancelled => &mut self.why.cancelled,
            LoadError::Copy(_) => &mut self.why.failed,
        };
        *count += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_add_up() {
        let mut report = StoreReport::default();
        let all = [
            Dropped::NoSpace,
            Dropped::Busy,
            Dropped::NotRegistered,
            Dropped::Unavailable,
            Dropped::Gone,
            Dropped::Cancelled,
            Dropped::Failed,
        ];
        for (shards, why) in (1..).zip(all) {
            report.drop_shards(shards, why);
        }
        let Drops { no_space, busy, not_registered, unavailable, gone, cancelled, failed } = report.why;
        assert_eq!(
            [no_space, busy, not_registered, unavailable, gone, cancelled, failed],
            [1, 2, 3, 4, 5, 6, 7]
        );
        assert_eq!(report.dropped, 28);
        let mut report = LoadReport::default();
        report.fail(&LoadError::OtherArena);
        report.fail(&LoadError::Gone);
        report.fail(&LoadError::Corrupt { stored: 1, computed: 2 });
        let why = LoadFailures { gone: 1, other_arena: 1, corrupt: 1, ..LoadFailures::default() };
        assert_eq!((report.failed, report.why), (3, why));
    }
}
