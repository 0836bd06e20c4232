//! The only place in this crate that names raw atomics: a word that threads of this process count in and park on.
//! (`kvring-shm-abi::sync` has the project's others; this crate does not depend on it.)
#![allow(clippy::disallowed_types, reason = "this is the one module that may name them")]

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// A 32-bit word to count in, and to park on with `atomic-wait` (private futexes: threads of one process).
#[derive(Debug, Default)]
pub(crate) struct Word(AtomicU32);

impl Word {
    pub(crate) fn new(value: u32) -> Word {
        Word(AtomicU32::new(value))
    }

    /// Acquire: pairs with the Release in `bump_and_wake` and in `sub`.
    pub(crate) fn get(&self) -> u32 {
        self.0.load(Ordering::Acquire)
    }

    /// Takes the next `count` numbers: the first of them. Relaxed, because the pieces that it counts were published with the job.
    pub(crate) fn add(&self, count: u32) -> u32 {
        self.0.fetch_add(count, Ordering::Relaxed)
    }

    /// Counts down; true for the thread that reaches zero. AcqRel: that thread sees all that the others did before they counted.
    pub(crate) fn sub(&self, count: u32) -> bool {
        self.0.fetch_sub(count, Ordering::AcqRel) == count
    }

    /// Changes the word and wakes all threads that wait for that. Release: pairs with the Acquire in `get`.
    pub(crate) fn bump_and_wake(&self) {
        self.0.fetch_add(1, Ordering::Release);
        atomic_wait::wake_all(&self.0);
    }

    /// Sleeps while the word is `seen`; may return early.
    pub(crate) fn wait(&self, seen: u32) {
        atomic_wait::wait(&self.0, seen);
    }
}

/// A sum that several threads add to.
#[derive(Debug, Default)]
pub(crate) struct Sum(AtomicU64);

impl Sum {
    /// Relaxed, because the sum is read only after the job's count has reached zero.
    pub(crate) fn add(&self, value: u64) {
        self.0.fetch_add(value, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A Release fence: pairs with the Acquire fence that a reader makes between its copy and its second look at a slot.
pub(crate) fn release_fence() {
    std::sync::atomic::fence(Ordering::Release);
}
