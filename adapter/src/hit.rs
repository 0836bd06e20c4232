//! The answers of lookups.

use kvring_shm_abi::chunk::ChunkWord;
use kvring_shm_abi::engine_segment::ChunkHandle;
use std::sync::Arc;

/// The answer of a lookup: the longest visible prefix of its keys, pinned for this request and admission.
///
/// # Example
/// ```
/// # use kvring_adapter::{
/// #     Client, PagedKv, Plane, PollingSchedulerAdapter, Role, Round, SchedulerOptions, StoreChunk, WorkerAdapter,
/// #     WorkerOptions,
/// # };
/// # use std::time::Duration;
/// use kvring_adapter::LoadChunk;
///
/// # let patience = Duration::from_secs(3600);
/// # let (engine, options) = include!(concat!(env!("CARGO_MANIFEST_DIR"), "/doc/engine.rs"));
/// # let mut cache = vec![7u8; 2 * 4096];
/// # let plane = Plane { base: cache.as_mut_ptr(), block_stride: 4096, page_bytes: 4096 };
/// # let client = Client::new(Role::Worker, options.clone())?;
/// # let mut worker = WorkerAdapter::new(&client, WorkerOptions::new([1, 2, 3, 4], 1, 0, 16))?;
/// # // SAFETY: `cache` has all of these blocks, and outlives the worker, which is shut down below; nobody else uses it.
/// # worker.register_kv_caches(unsafe { PagedKv::new(vec![plane], 2, 1) }?)?;
/// # let chunk = StoreChunk { key: [10, 0], blocks: vec![0] };
/// # let job = worker.submit_store("1", Round { source: 1, number: 1 }, None, vec![chunk], None)?;
/// # worker.wait_job(job, patience);
/// # let client = Client::new(Role::Scheduler, options)?;
/// # client.wait_ready(patience).map_err(|health| health.to_string())?;
/// # let mut scheduler = PollingSchedulerAdapter::new(&client, SchedulerOptions::new([1, 2, 3, 4]));
/// // A worker of the one rank that there is has stored the first of these chunks.
/// let hit = scheduler.lookup("request", 0, &[[10, 0], [20, 0]])?;
/// assert_eq!(hit.chunks, 1);
/// let free_blocks = [1];
/// let load = hit.handles().zip(free_blocks).map(|(chunk, block)| LoadChunk { chunk, blocks: vec![block] });
/// let job = worker.submit_load("request", load.collect(), None)?;
/// # worker.wait_job(job, patience);
/// # let (_, _, report) = &worker.get_finished().loads[0];
/// # assert_eq!((report.loaded, report.failed), (1, 0));
/// # worker.shutdown();
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hit {
    /// Chunks found, from the first key on. 0 also if the engine could not be asked.
    pub chunks: u32,
    /// The arena that the chunks are in. A worker that maps another one refuses them.
    pub arena_id: [u64; 2],
    /// The chunks; `None` if nothing was found.
    pub(crate) found: Option<Arc<[ChunkWord]>>,
}

impl Hit {
    pub(crate) const fn nothing() -> Hit {
        Hit { chunks: 0, arena_id: [0; 2], found: None }
    }

    /// The handles of the chunks, to be sent with the scheduler's metadata to all ranks: each finds its own shards by them.
    pub fn handles(&self) -> impl ExactSizeIterator<Item = ChunkHandle> + '_ {
        let words: &[ChunkWord] = self.found.as_deref().unwrap_or_default();
        words.iter().map(|word| ChunkHandle { arena_id: self.arena_id, word: *word })
    }
}
