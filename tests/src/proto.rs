//! How tests set their clients up, and what stores, loads and lookups come to: in a form that goes through a pipe.

use crate::wait::LIMIT;
use kvring_adapter::{ClientOptions, Round};
use kvring_rig::pages::Shape;
use kvring_rig::random::Random;
use kvring_rig::wire::Handle;
use serde::{Deserialize, Serialize};
use std::time::Duration;

const LIMIT_MS: u64 = LIMIT.as_millis() as u64;

/// The client options that tests choose; times are in milliseconds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ClientSpec {
    pub engine: String,
    pub attach_ms: u64,
    pub register_ms: u64,
    pub operation_ms: u64,
    pub drain_ms: u64,
    pub stall_ms: u64,
    pub backoff_max_ms: u64,
    pub payload_bytes: usize,
}

impl ClientSpec {
    /// A patient client: nothing times out that is not meant to, however busy the machine is.
    pub fn new(engine: &str) -> ClientSpec {
        ClientSpec {
            engine: engine.to_owned(),
            attach_ms: LIMIT_MS,
            register_ms: LIMIT_MS,
            operation_ms: LIMIT_MS,
            // Not for ever: a test that has failed, with its engine dead, must come to its end.
            drain_ms: 20_000,
            stall_ms: LIMIT_MS,
            backoff_max_ms: 20,
            payload_bytes: 4 << 20,
        }
    }

    /// The options as the adapter takes them.
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
pub fn fingerprint(namespace: u64) -> [u64; 4] {
    let mut random = Random::new(0, namespace);
    core::array::from_fn(|_| random.bits())
}

/// A round of source 1.
pub fn round(number: u32) -> Round {
    Round { source: 1, number }
}

/// One rank's worker.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WorkerSpec {
    pub client: ClientSpec,
    pub namespace: u64,
    pub world: u32,
    pub rank: u32,
    pub chunk_tokens: u32,
    pub shape: Shape,
    /// Are checksums stored and verified?
    pub checksum: bool,
}

impl WorkerSpec {
    /// The only rank of namespace 1.
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
    pub fn rank(engine: &str, world: u32, rank: u32) -> WorkerSpec {
        WorkerSpec { world, rank, ..WorkerSpec::new(engine) }
    }

    pub fn fingerprint(&self) -> [u64; 4] {
        fingerprint(self.namespace)
    }
}

/// A scheduler.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SchedulerSpec {
    pub client: ClientSpec,
    pub namespace: u64,
}

impl SchedulerSpec {
    /// A patient one of namespace 1.
    pub fn new(engine: &str) -> SchedulerSpec {
        SchedulerSpec { client: ClientSpec::new(engine), namespace: 1 }
    }

    pub fn fingerprint(&self) -> [u64; 4] {
        fingerprint(self.namespace)
    }
}

/// What a lookup has found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// How many chunks, from the first key on.
    pub chunks: u32,
    /// What every rank loads.
    pub handles: Vec<Handle>,
}

/// What became of the shards of a store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    /// Written and committed.
    pub stored: u32,
    /// Visible already.
    pub skipped: u32,
    pub dropped: u32,
}

/// Everything was written.
pub fn all_stored(count: usize) -> Stored {
    Stored { stored: count as u32, ..Stored::default() }
}

/// Everything was dropped.
pub fn all_dropped(count: usize) -> Stored {
    Stored { dropped: count as u32, ..Stored::default() }
}

/// What became of the shards of a load.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loaded {
    /// Reported as loaded.
    pub loaded: u32,
    /// Reported as failed.
    pub failed: u32,
    /// Reported as loaded, with bytes that are not the chunk's.
    pub wrong: u32,
}

/// Everything was loaded, and right.
pub fn all_loaded(count: usize) -> Loaded {
    Loaded { loaded: count as u32, ..Loaded::default() }
}

/// Every load failed.
pub fn all_failed(count: usize) -> Loaded {
    Loaded { failed: count as u32, ..Loaded::default() }
}
