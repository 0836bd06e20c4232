//! The only place with raw atomics.
//!
//! `clippy.toml` forbids `std::sync::atomic` types everywhere else, so that under `--cfg loom` the model checker
//! sees every atomic of every protocol in this crate. Other crates take their atomics from here too.

#[cfg(not(loom))]
#[allow(clippy::disallowed_types)]
mod imp {
    pub use core::hint::spin_loop;
    pub use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
}

#[cfg(loom)]
mod imp {
    pub use loom::hint::spin_loop;
    pub use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
}

pub use imp::*;
