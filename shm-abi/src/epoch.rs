//! The engine's health in two words: the *incarnation*, another one after each start, and the *beat*, which moves while the
//! engine works.
//!
//! Only the engine's service thread stores them, so that a loop that is stuck looks stuck. They lie on separate pairs of cache
//! lines, so that a beat does not disturb clients that watch for a restart.

use crate::abi;
use crate::mapping::{Pad, Shared};
use crate::sync::{AtomicU32, Ordering};

abi! {
    /// The two words, each alone on a pair of cache lines.
    #[repr(C, align(128))]
    pub struct Epoch {
        /// Odd while the engine recovers, even while it serves; 0 before the first engine.
        incarnation: AtomicU32,
        _pad0: Pad<124>,
        /// Counts, and wraps; only its changes mean something.
        beat: AtomicU32,
        _pad1: Pad<124>,
    }
}

// SAFETY: atomics and padding only; every bit pattern is a value.
unsafe impl Shared for Epoch {}

impl Epoch {
    /// Called by a new engine before it changes anything: sets the next odd number, also if its predecessor died while the
    /// number was odd. So an engine that dies half-way through its recovery never looks ready.
    pub fn begin_recovery(&self) -> u32 {
        let odd = self.incarnation.load(Ordering::Relaxed).wrapping_add(1) | 1;
        // SYNC POINT: Release; pairs with the Acquire in `incarnation()`. A client that sees it gives up its attachment.
        self.incarnation.store(odd, Ordering::Release);
        odd
    }

    /// Called when the recovery is complete: sets the next even number. A client that sees it sees everything that the engine
    /// has written before.
    pub fn begin_serving(&self) -> u32 {
        let even = self.incarnation.load(Ordering::Relaxed).wrapping_add(1);
        // SYNC POINT: Release; pairs with the Acquire in `incarnation()`.
        self.incarnation.store(even, Ordering::Release);
        even
    }

    /// The incarnation.
    #[must_use]
    pub fn incarnation(&self) -> u32 {
        // SYNC POINT: Acquire; pairs with the Release in `begin_recovery` and `begin_serving`.
        self.incarnation.load(Ordering::Acquire)
    }

    /// True for an incarnation that serves: even, and not the zero of a fresh segment.
    #[must_use]
    pub fn serves(incarnation: u32) -> bool {
        incarnation != 0 && incarnation.is_multiple_of(2)
    }

    /// Moves the beat. Only the service loop itself calls it.
    pub fn bump_beat(&self) {
        self.beat.store(self.beat.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
    }

    /// The beat; only its changes mean something.
    #[must_use]
    pub fn beat(&self) -> u32 {
        self.beat.load(Ordering::Relaxed)
    }

    /// The word that sleepers watch for a restart.
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
