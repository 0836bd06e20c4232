//! Loom models of the protocols in shared memory, each with negative controls that must fail.
//!
//! ```text
//! RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom cargo test -p kvring-shm-abi --test loom --release
//! ```
//!
//! Without `--cfg loom` this file is empty. With `-- --nocapture` each model says how many executions it took.
//! `LOOM_MAX_PREEMPTIONS` overrides the bounds written here.
//!
//! What loom cannot see: accesses are treated as AcqRel where they say SeqCst (fences are exact, and only fences are
//! SeqCst here), no load takes a value that is stored later (no load buffering), and the kernel's side of a futex is
//! the model in `kvring_shm_abi::futex`. Copies of payload are relaxed atomic words here; in the arena they are
//! opaque copies, which the compiler may not move over the fences either.
#![cfg(loom)]
#![allow(clippy::unwrap_used, reason = "clippy allows it in tests, but not in their helpers")]

mod chunk;
mod completion;
mod harness;
mod hold;
mod park;
mod ring;
mod slot;
