//! What the processes of a replay say to each other: coordinator ↔ scheduler ↔ worker, as vLLM's scheduler tells its
//! workers with each step what to load and what to store.

use kvring_adapter::Key;
use kvring_rig::pages::Shape;
use kvring_rig::wire::{Lookups, Shard};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// The longest that one load or store of a worker may take. Far above anything real: only a hang reaches it.
pub(super) const STEP_MAX: Duration = Duration::from_secs(120);
/// How long a scheduler waits for a worker: somewhat longer, so that the process that is nearest to a hang reports it.
pub(super) const REPLY_MAX: Duration = Duration::from_secs(150);
/// How long the coordinator waits for a scheduler: a load and a store.
pub(super) const REQUEST_MAX: Duration = Duration::from_secs(330);

/// Tokens in a block of the simulated paged KV cache.
pub(super) const BLOCK_TOKENS: u32 = 32;
/// Planes of the simulated paged KV cache: four layers, K and V of each in one plane.
pub(super) const PLANES: u32 = 4;

/// What a simulated vLLM instance is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Plan {
    /// The engine's name.
    pub(super) engine: String,
    /// Which instance.
    pub(super) instance: u32,
    /// Its ranks.
    pub(super) ranks: u32,
    /// Names the namespace, the same in all instances.
    pub(super) fingerprint: [u64; 4],
    /// Tokens of a chunk: a block of the trace.
    pub(super) chunk_tokens: u32,
    /// The paged KV cache of each rank.
    pub(super) shape: Shape,
    /// Is every loaded byte compared?
    pub(super) verify: bool,
    /// Threads that copy in each worker; `None`: as the adapter chooses.
    pub(super) copy_threads: Option<usize>,
}

/// From the coordinator to a scheduler.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum ToScheduler {
    /// First of all.
    Start(Plan),
    /// One request, from lookup to store.
    Request {
        /// Its number in the trace.
        index: u32,
        /// The trace's block ids.
        blocks: Vec<u64>,
    },
    /// See to it that nothing is under way any more.
    Quiesce,
}

/// From a scheduler to the coordinator.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum FromScheduler {
    /// It and its workers are attached and registered.
    Ready,
    /// The request is done.
    Done(RequestReport),
    /// All sessions have ended, and the engine has heard everything.
    Quiet(Lookups),
}

/// What became of a request.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct RequestReport {
    /// Chunks that the lookup found.
    pub(super) hit_chunks: u32,
    /// How long the lookup took.
    pub(super) lookup_ns: u64,
    /// One per rank.
    pub(super) ranks: Vec<(Loaded, Stored)>,
}

impl Loaded {
    /// Sums.
    pub(super) fn add(&mut self, other: &Loaded) {
        let Loaded { loaded, failed, bytes, copy_ns, wrong_bytes } = other;
        self.loaded += loaded;
        self.failed += failed;
        self.bytes += bytes;
        self.copy_ns += copy_ns;
        self.wrong_bytes += wrong_bytes;
    }
}

impl Stored {
    /// Sums.
    pub(super) fn add(&mut self, other: &Stored) {
        let Stored { stored, skipped, dropped, bytes, copy_ns } = other;
        self.stored += stored;
        self.skipped += skipped;
        self.dropped += dropped;
        self.bytes += bytes;
        self.copy_ns += copy_ns;
    }
}

/// From a scheduler to a worker.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum ToWorker {
    /// First of all: the instance and the rank in it.
    Start(Plan, u32),
    /// One request's work.
    Step(Step),
    /// See to it that nothing is under way any more.
    Quiesce,
}

/// What a worker does for one request: load what was found, "compute" the rest, store that.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Step {
    /// The request's name.
    pub(super) request: String,
    /// Which arena the shards are in.
    pub(super) arena_id: [u64; 2],
    /// To be loaded, and where to.
    pub(super) load: Vec<(Shard, Vec<u32>)>,
    /// To be computed and stored: key and blocks.
    pub(super) store: Vec<(Key, Vec<u32>)>,
    /// The round that the store belongs to: source, number.
    pub(super) round: (u32, u32),
    /// The key just before the first one to be stored.
    pub(super) parent: Option<Key>,
}

/// From a worker to its scheduler.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum FromWorker {
    /// Attached and registered.
    Ready,
    /// The step's load has ended: the scheduler may give up the lookup's pins.
    Loaded(Loaded),
    /// The step's store has ended: the step is done.
    Stored(Stored),
    /// Nothing is under way, and the engine has heard everything.
    Quiet,
}

/// What became of a step's load.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct Loaded {
    /// Shards loaded and validated.
    pub(super) loaded: u64,
    /// Shards that could not be loaded; computed again.
    pub(super) failed: u64,
    /// Bytes copied.
    pub(super) bytes: u64,
    /// Time spent copying.
    pub(super) copy_ns: u64,
    /// Bytes that were loaded, and are not what was stored.
    pub(super) wrong_bytes: u64,
}

/// What became of a step's store.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct Stored {
    /// Shards written and committed.
    pub(super) stored: u64,
    /// Shards that were there already.
    pub(super) skipped: u64,
    /// Shards that were not stored.
    pub(super) dropped: u64,
    /// Bytes copied.
    pub(super) bytes: u64,
    /// Time spent copying.
    pub(super) copy_ns: u64,
}
