//! The eviction order of restored chunks: it is built after serving has begun, because neither sorting a million chunks
//! nor giving each its place is done in the time that a client may wait for a restarted engine. A thread sorts them, and
//! then the service thread places them, a piece per turn. Nothing is evicted before that is over. If the engine dies
//! meanwhile, nothing is lost: the slot headers say when each chunk was used last.

use super::Service;
use super::slot_table::SharedSlots;
use crate::cache::{Cache, Sorted, Unplaced};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};

/// So few chunks get their places before serving begins. That takes a millisecond, and an engine with less than that to
/// do evicts as soon as it serves.
const FEW: usize = 1 << 13;

/// How far the order has come.
pub(crate) enum Placing {
    /// A thread is sorting the chunks.
    Sorting(JoinHandle<Sorted>),
    /// They are sorted, and get their places.
    Sorted(Sorted),
    /// Each has its place.
    Over,
}

impl Placing {
    /// Begins to build the order. If there is no thread for it, the chunks are sorted here.
    pub(crate) fn begin(unplaced: Unplaced, cache: &mut Cache<SharedSlots>) -> Placing {
        if unplaced.len() <= FEW {
            cache.go_on_placing(&mut unplaced.sort());
            return Placing::Over;
        }
        // The thread is handed the chunks when it runs: they would be lost with a thread that cannot be started.
        let (chunks, handed) = mpsc::channel::<Unplaced>();
        let sort = move || handed.recv().unwrap_or_default().sort();
        match thread::Builder::new().name("kvring-order".into()).spawn(sort) {
            Ok(thread) => match chunks.send(unplaced) {
                Ok(()) => Placing::Sorting(thread),
                Err(mpsc::SendError(unplaced)) => Placing::Sorted(unplaced.sort()),
            },
            Err(error) => {
                tracing::warn!(%error, "no thread to sort the recovered chunks; serving begins when they are sorted");
                Placing::Sorted(unplaced.sort())
            }
        }
    }
}

impl Service {
    /// Takes over what the thread has sorted. Called with each tick.
    pub(super) fn look_at_sorting(&mut self) {
        if let Placing::Sorting(thread) = &self.placing
            && thread.is_finished()
            && let Placing::Sorting(thread) = core::mem::replace(&mut self.placing, Placing::Over)
        {
            match thread.join() {
                Ok(sorted) => self.placing = Placing::Sorted(sorted),
                // As if the chunks had been sorted here.
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
    }

    /// Whether there are chunks to be given their places now.
    #[inline]
    pub(super) fn is_placing(&self) -> bool {
        matches!(self.placing, Placing::Sorted(_))
    }

    /// Gives some more chunks their places.
    pub(super) fn go_on_placing(&mut self) {
        if let Placing::Sorted(sorted) = &mut self.placing
            && self.cache.go_on_placing(sorted)
        {
            self.placing = Placing::Over;
            tracing::info!("every recovered chunk has its place in the eviction order; evictions may go on");
        }
    }
}
