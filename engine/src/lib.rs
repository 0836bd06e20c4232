//! The kvring engine: one process that owns a node's KV cache.
//!
//! [`Engine`] is the whole of it. Its parts: [`segments`] (start, exclusivity, end), [`allocator`] and
//! [`preflight`] (memory), `recovery` (what a dead engine left), the service loop (private: rings, lobby,
//! dispatch), [`cache`] (which chunks there are, and who leases or writes them), [`policy`] (eviction order),
//! [`stats`], [`config`].

pub mod allocator;
pub mod cache;
pub mod cgroup;
pub mod config;
mod engine;
mod lazy;
pub mod policy;
pub mod preflight;
pub mod process;
mod recovery;
pub mod segments;
mod service;
pub mod stats;
mod stop;

pub use kvring_shm_abi::byte_size;

pub use engine::{Engine, RunningEngine, StartError, spawn};
pub use service::RECORDS_PER_TURN;
pub use stop::StopHandle;
