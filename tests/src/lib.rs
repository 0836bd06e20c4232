//! What the cross-process tests are made of: engines and clients in processes of their own, a paged KV cache whose bytes
//! are a function of the key, a client that may send anything, and waiting by state instead of by time.
//!
//! Every test makes its own engine under its own name; guards kill processes and remove segments when they are dropped,
//! also when a test panics.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]
#![allow(clippy::disallowed_methods, reason = "what these processes print is for the test that started them")]
#![allow(missing_docs, reason = "names that say everything have no comment")]

pub mod attempts;
pub mod crash;
pub mod ends;
pub mod engine;
pub mod fuzz;
pub mod held;
pub mod isolate;
pub mod kv;
pub mod model;
pub mod peer;
pub mod process;
pub mod proto;
pub mod raw;
pub mod scheduler;
pub mod traffic;
pub mod wait;
pub mod worker;

pub use crash::{BREAK, FAIL_POINT};
pub use engine::{EngineProcess, Sweep, overrides, stat_of, unique_name};
pub use held::{Fault, HeldBackend};
pub use isolate::{isolated, segments};
pub use kv::chain;
pub use kvring_rig::child::thread_state;
pub use kvring_rig::pages::Shape;
pub use kvring_rig::wire::Handle;
pub use peer::{Ask, Peer};
pub use process::in_a_call;
pub use proto::{
    ClientSpec, Found, Loaded, SchedulerSpec, Stored, WorkerSpec, all_dropped, all_failed, all_loaded,
    all_stored, round,
};
pub use raw::{Claimed, RawClient};
pub use scheduler::SchedulerSide;
pub use traffic::Bystander;
pub use wait::{LIMIT, becomes, eventually, until, within};
pub use worker::{WorkerSide, client};

/// The variable that says how much longer the soaks run: `tests/run --long` sets it.
pub const SOAK: &str = "KVRING_SOAK";

/// How many times as long as usual soaks run: 1, or what [`SOAK`] says.
pub fn soak() -> u64 {
    std::env::var(SOAK).ok().and_then(|times| times.parse().ok()).unwrap_or(1)
}

/// Writes the logs of this process to its standard error if `KVRING_LOG` names a level (`debug`, say). Further calls in a
/// process change nothing.
pub fn log() {
    let level = std::env::var("KVRING_LOG")
        .ok()
        .and_then(|text| text.parse::<tracing_subscriber::filter::LevelFilter>().ok());
    if let Some(level) = level {
        let _ = tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).try_init();
    }
}
