//! What tests and their other processes say to each other: a line of JSON each way.

use crate::kv::{Shape, mix};
use crate::wait::LIMIT;
use kvring_adapter::{ClientOptions, Key, ShardHandle};
use serde::{Deserialize, Serialize};
use std::time::Duration;

const LIMIT_MS: u64 = LIMIT.as_millis() as u64;

/// A client's options, as far as tests choose them; times in milliseconds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ClientSpec {
    /// The engine's name.
    pub engine: String,
    /// See [`ClientOptions::attach_timeout`].
    pub attach_ms: u64,
    /// See [`ClientOptions::register_timeout`].
    pub register_ms: u64,
    /// See [`ClientOptions::operation_timeout`].
    pub operation_ms: u64,
    /// See [`ClientOptions::drain_timeout`].
    pub drain_ms: u64,
    /// See [`ClientOptions::stall_after`].
    pub stall_ms: u64,
    /// See [`ClientOptions::backoff_max`].
    pub backoff_max_ms: u64,
    /// See [`ClientOptions::payload_bytes`].
    pub payload_bytes: usize,
}

impl ClientSpec {
    /// Patient: nothing times out that is not meant to, however busy the machine is.
    #[must_use]
    pub fn new(engine: &str) -> ClientSpec {
        ClientSpec {
            engine: engine.to_owned(),
            attach_ms: LIMIT_MS,
            register_ms: LIMIT_MS,
            operation_ms: LIMIT_MS,
            // Not for ever: a test that has failed, with its engine dead, is to come to its end.
            drain_ms: 20_000,
            stall_ms: LIMIT_MS,
            backoff_max_ms: 20,
            payload_bytes: 4 << 20,
        }
    }

    /// As the adapter takes it.
    #[must_use]
    pub fn options(&self) -> ClientOptions {
        ClientOptions {
            engine: self.engine.clone(),
            client: format!("test:{}", std::process::id()),
            attach_timeout: Duration::from_millis(self.attach_ms),
            register_timeout: Duration::from_millis(self.register_ms),
            operation_timeout: Duration::from_millis(self.operation_ms),
            drain_timeout: Duration::from_millis(self.drain_ms),
            stall_after: Duration::from_millis(self.stall_ms),
            backoff_min: Duration::from_millis(2),
            backoff_max: Duration::from_millis(self.backoff_max_ms),
            payload_bytes: self.payload_bytes,
            ..ClientOptions::default()
        }
    }
}

/// A namespace's fingerprint, by a number.
#[must_use]
pub fn fingerprint(namespace: u64) -> [u64; 4] {
    core::array::from_fn(|word| mix(mix(namespace).wrapping_add(word as u64)))
}

/// One rank's worker.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WorkerSpec {
    /// How it attaches.
    pub client: ClientSpec,
    /// Which namespace.
    pub namespace: u64,
    /// Number of ranks.
    pub world: u32,
    /// This rank.
    pub rank: u32,
    /// Tokens per chunk.
    pub chunk_tokens: u32,
    /// The paged KV cache.
    pub shape: Shape,
    /// Are checksums stored and verified?
    pub checksum: bool,
}

impl WorkerSpec {
    /// The only rank of namespace 1.
    #[must_use]
    pub fn new(engine: &str) -> WorkerSpec {
        WorkerSpec {
            client: ClientSpec::new(engine),
            namespace: 1,
            world: 1,
            rank: 0,
            chunk_tokens: 64,
            shape: Shape::SMALL,
            checksum: false,
        }
    }

    /// One rank of several.
    #[must_use]
    pub fn rank(engine: &str, world: u32, rank: u32) -> WorkerSpec {
        WorkerSpec { world, rank, ..WorkerSpec::new(engine) }
    }

    /// The namespace's fingerprint.
    #[must_use]
    pub fn fingerprint(&self) -> [u64; 4] {
        fingerprint(self.namespace)
    }
}

/// A scheduler.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SchedulerSpec {
    /// How it attaches.
    pub client: ClientSpec,
    /// Which namespace.
    pub namespace: u64,
    /// Number of ranks, for the handles.
    pub world: u32,
    /// The polling adapter, or the one whose lookups may be pending?
    pub polling: bool,
    /// How long a synchronous lookup may take.
    pub lookup_ms: u64,
    /// How long an asynchronous one may.
    pub pending_ms: u64,
}

impl SchedulerSpec {
    /// A patient one of namespace 1 with one rank.
    #[must_use]
    pub fn new(engine: &str) -> SchedulerSpec {
        SchedulerSpec {
            client: ClientSpec::new(engine),
            namespace: 1,
            world: 1,
            polling: true,
            lookup_ms: LIMIT_MS,
            pending_ms: LIMIT_MS,
        }
    }

    /// Of a namespace with several ranks.
    #[must_use]
    pub fn world(engine: &str, world: u32) -> SchedulerSpec {
        SchedulerSpec { world, ..SchedulerSpec::new(engine) }
    }

    /// The namespace's fingerprint.
    #[must_use]
    pub fn fingerprint(&self) -> [u64; 4] {
        fingerprint(self.namespace)
    }
}

/// [`ShardHandle`], for a pipe: as vLLM's metadata carries it from the scheduler to the workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handle {
    /// Which arena.
    pub arena_id: [u64; 2],
    /// The slot.
    pub slot: u32,
    /// Its generation.
    pub generation: u64,
    /// First byte in the arena.
    pub offset: u64,
    /// The chunk's key.
    pub key: Key,
}

impl From<ShardHandle> for Handle {
    fn from(shard: ShardHandle) -> Handle {
        let ShardHandle { arena_id, slot, generation, offset, key } = shard;
        Handle { arena_id, slot, generation, offset, key }
    }
}

impl Handle {
    /// As the adapter takes it.
    #[must_use]
    pub fn shard(&self) -> ShardHandle {
        let Handle { arena_id, slot, generation, offset, key } = *self;
        ShardHandle { arena_id, slot, generation, offset, key }
    }
}

/// What a lookup found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// Chunks, from the first key on.
    pub chunks: u32,
    /// What each rank loads.
    pub ranks: Vec<Vec<Handle>>,
}

/// What a store came to, in shards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    /// Written and committed.
    pub stored: u32,
    /// Visible already.
    pub skipped: u32,
    /// Dropped.
    pub dropped: u32,
}

/// Everything was written.
#[must_use]
pub fn all_stored(count: usize) -> Stored {
    Stored { stored: count as u32, ..Stored::default() }
}

/// What a load came to, in shards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loaded {
    /// Loaded, as the adapter says.
    pub loaded: u32,
    /// Reported as failed.
    pub failed: u32,
    /// Of those loaded: with bytes that are not the chunk's.
    pub wrong: u32,
}

/// Everything was loaded, and right.
#[must_use]
pub fn all_loaded(count: usize) -> Loaded {
    Loaded { loaded: count as u32, ..Loaded::default() }
}

/// What lookups have come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Answered by the engine.
    pub answered: u64,
    /// 0 because of the engine's health.
    pub degraded: u64,
    /// 0 because of the deadline.
    pub timed_out: u64,
    /// 0 because of the namespace, or of too many leases.
    pub refused: u64,
}

/// What a test asks of a client in another process.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the methods of `Peer` have the same names and are documented")]
pub enum Ask {
    BecomeUser { uid: u32 },
    Worker(Box<WorkerSpec>),
    HeldWorker(Box<WorkerSpec>),
    HoldAStore { round: (u32, u32), keys: Vec<Key>, version: u64 },
    FinishTheStore,
    End { how: u32 },
    EndKeepers,
    RegisterDma,
    Fork,
    Scheduler(Box<SchedulerSpec>),
    WaitReady,
    Health,
    Store { request: String, round: (u32, u32), parent: Option<Key>, keys: Vec<Key>, version: u64 },
    Load { request: String, handles: Vec<Handle>, version: u64 },
    Lookup { request: String, admission: u32, keys: Vec<Key> },
    Release { request: String, admission: u32, keep: u32 },
    EndSession { request: String },
    ResetCache,
    Tally,
    Shutdown,
}

/// What it answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[allow(missing_docs, reason = "see `Ask`")]
pub enum Tell {
    Done,
    Failed(String),
    Health(String),
    Stored(Stored),
    Loaded(Loaded),
    Found(Found),
    Count(u64),
    Tally(Tally),
}
