//! Keeps a forked child from using what it inherits from its parent.
//!
//! A child does not inherit the mappings (`MADV_DONTFORK`), so one that called into an inherited adapter would die of a
//! SIGSEGV. Each call therefore compares a counter of the process, which only a child of `fork` raises.

use kvring_shm_abi::sync::{AtomicU32, Ordering};
use std::sync::Once;

static FORKS: AtomicU32 = AtomicU32::new(0);
static REGISTER: Once = Once::new();

extern "C" fn in_child() {
    // Relaxed: right after `fork` the child has one thread.
    FORKS.fetch_add(1, Ordering::Relaxed);
}

/// Remembers the process that made it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ForkGuard(u32);

impl ForkGuard {
    /// A guard of the calling process.
    pub(crate) fn new() -> ForkGuard {
        REGISTER.call_once(|| {
            // SAFETY: the handler only touches an atomic. Registering it can fail only for lack of memory, and then a
            // child is not recognised, as without the guard.
            unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
        });
        ForkGuard(FORKS.load(Ordering::Relaxed))
    }

    /// Is this still the process that made it? One load.
    #[inline]
    pub(crate) fn is_ours(self) -> bool {
        FORKS.load(Ordering::Relaxed) == self.0
    }
}
