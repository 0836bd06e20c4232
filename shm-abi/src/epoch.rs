//! The engine's health in two words: *incarnation* (which life) and *beat* (that it moves).
//!
//! Both are plain stores by the engine's service thread and by nobody else: a stuck loop must look stuck. They sit
//! on separate cache-line pairs, so that a beat does not disturb clients that watch for a restart.

use crate::abi;
use crate::mapping::{Pad, Shared};
use crate::sync::{AtomicU32, Ordering};

abi! {
    /// The two words, each alone on a pair of cache lines.
    #[repr(C, align(128))]
    pub struct Epoch {
        /// Odd while recovering, even while serving; 0 before the first engine.
        incarnation: AtomicU32,
        _pad0: Pad<124>,
        /// Wraps in its own word.
        beat: AtomicU32,
        _pad1: Pad<124>,
    }
}

// SAFETY: atomics and padding only; every bit pattern is a value.
unsafe impl Shared for Epoch {}

impl Epoch {
    /// A new engine takes over, before it looks at anything: the next odd number, also after a death while odd.
    /// Dying half-way therefore never looks ready.
    pub fn begin_recovery(&self) -> u32 {
        let odd = self.incarnation.load(Ordering::Relaxed).wrapping_add(1) | 1;
        // Release: pairs with `incarnation()`'s Acquire; a client that sees it drops what it knew.
        self.incarnation.store(odd, Ordering::Release);
        odd
    }

    /// Recovery is complete: even again. Everything the engine wrote before is visible to who sees it.
    pub fn begin_serving(&self) -> u32 {
        let even = self.incarnation.load(Ordering::Relaxed).wrapping_add(1);
        // SYNC POINT: Release; pairs with the Acquire in `incarnation()`.
        self.incarnation.store(even, Ordering::Release);
        even
    }

    /// Which life.
    #[must_use]
    pub fn incarnation(&self) -> u32 {
        // SYNC POINT: Acquire; pairs with the Release in `begin_serving`.
        self.incarnation.load(Ordering::Acquire)
    }

    /// True for an incarnation that serves: even, and not the zero of a fresh segment.
    #[must_use]
    pub fn serves(incarnation: u32) -> bool {
        incarnation != 0 && incarnation.is_multiple_of(2)
    }

    /// The loop has moved. Called by the service loop itself and by nothing else.
    pub fn bump_beat(&self) {
        self.beat.store(self.beat.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
    }

    /// The beat; only its changes mean something.
    #[must_use]
    pub fn beat(&self) -> u32 {
        self.beat.load(Ordering::Relaxed)
    }

    /// The futex word that sleepers watch for a restart.
    #[must_use]
    pub fn incarnation_word(&self) -> &AtomicU32 {
        &self.incarnation
    }
}

#[cfg(not(loom))]
const _: () = {
    assert!(core::mem::size_of::<Epoch>() == 256);
    assert!(core::mem::offset_of!(Epoch, beat) == 128);
};
