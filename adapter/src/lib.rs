//! The adapters by which vLLM's scheduler and workers use a kvring engine.
//!
//! Adapters share a [`Client`], which attaches by itself, notices the engine's death and restart, and attaches again.
//! Every call returns by its deadline, whatever the engine does. No engine is no error: stores are dropped, lookups find
//! nothing, and loads fail, each with its reason.
//!
//! | type | what it is for |
//! | --- | --- |
//! | [`Client`] | one attachment to an engine, in one [`Role`] |
//! | [`WorkerAdapter`] | stores and loads of one rank's paged KV cache, in the background |
//! | [`PollingSchedulerAdapter`] | lookups with a definite answer at once |
//! | [`Hit`] | what a lookup has found, and where each rank loads it from |
//!
//! # Example
//! This is `examples/client.rs`, which stores, looks up, loads and verifies:
//! ```no_run
#![doc = include_str!("../../examples/client.rs")]
//! ```

mod arena;
mod at;
mod attachment;
mod batch;
mod client;
mod counters;
mod dma;
mod engine_view;
mod error;
mod fork;
mod gate;
mod health;
mod hit;
mod keeper;
mod leases;
mod ledger;
mod link;
mod options;
mod rejoin;
mod scheduler;
mod shared;
mod stand_ins;
mod status;
mod worker;

pub use client::{Client, Probe};
pub use counters::ClientStats;
pub use engine_view::EngineView;
pub use error::{AttachError, CallError, RegisterError};
pub use health::Health;
pub use hit::Hit;
pub use kvring_gpu_kernels::Digest;
pub use kvring_shm_abi::chunk::ChunkWord;
pub use kvring_shm_abi::engine_segment::ChunkHandle;
pub use kvring_shm_abi::lobby::Role;
pub use kvring_shm_abi::message::{KEYS_MAX, Key, Round};
pub use options::{ClientOptions, ConfigError, DEFAULT_ENGINE};
pub use scheduler::{LookupStats, PollingSchedulerAdapter, SchedulerOptions};
pub use worker::{
    BlockError, Checksum, ComputeStream, CopyError, CopyMode, Drops, Finished, JobId, Jobs, KvGroup, LOST,
    LayoutError, LoadChunk, LoadFailures, LoadReport, Memory, PagedKv, Plane, SKIP, StoreChunk, StoreReport,
    SubmitError, WorkerAdapter, WorkerOptions,
};
