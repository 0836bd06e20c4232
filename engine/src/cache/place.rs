//! The eviction order of restored chunks. A million of them take longer to be sorted and to get their places than
//! anybody should wait for a restarted engine, so that happens after serving has begun: see
//! [`Cache::go_on_placing`].

use super::chunk::Life;
use super::{Cache, NotRestorable, SlotTable};
use crate::policy::ChunkId;

/// How many chunks ahead their records are prefetched.
const AHEAD: usize = 8;
/// How many chunks get their places before the memory of their list's end is given back.
const GIVE_BACK: usize = 4096;

/// Restored chunks that have no place in the eviction order yet, and when each was used last.
#[derive(Debug, Default)]
#[must_use = "nothing is evicted before each of them has its place"]
pub struct Unplaced(Vec<(u64, ChunkId)>);

impl Unplaced {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Sorts them by their last access. This takes no memory, and 70 ms for a million chunks.
    pub fn sort(mut self) -> Sorted {
        self.0.sort_unstable();
        Sorted(self.0)
    }

    /// Adds a chunk, if there is memory for it.
    pub(super) fn push(&mut self, tick: u64, id: ChunkId) -> Result<(), NotRestorable> {
        let what = "the order in which chunks were used last";
        self.0.try_reserve(1).map_err(|_| NotRestorable::Memory { what, count: self.0.len() })?;
        self.0.push((tick, id));
        Ok(())
    }
}

/// The same, the chunk that was used last at the end.
#[derive(Debug)]
#[must_use = "nothing is evicted before each of them has its place"]
pub struct Sorted(Vec<(u64, ChunkId)>);

impl<T: SlotTable> Cache<T> {
    /// Gives restored chunks their places in the eviction order, the one that was used last first, until what is
    /// allowed is spent. True: each has its place.
    ///
    /// Each of them becomes the coldest of its namespace. Whatever is stored or used meanwhile is at the warm end of
    /// the order and is not disturbed, so the order becomes what it would have been if all chunks had been given
    /// their places at once. Until then nothing is evicted.
    pub fn go_on_placing(&mut self, sorted: &mut Sorted) -> bool {
        self.change();
        let Sorted(chunks) = sorted;
        while let Some((_, id)) = chunks.pop() {
            if let Some((_, later)) = chunks.len().checked_sub(AHEAD).and_then(|at| chunks.get(at)) {
                self.chunks.prefetch(*later);
            }
            self.work += 2;
            // A visible chunk without a place has been there since the restart: a chunk that was stored since then,
            // perhaps in the record of a dropped one, got its place when it became visible.
            if self.chunks.get(id).life() == Life::Visible {
                self.place(id);
            }
            if self.is_spent() {
                break;
            }
        }
        // Giving back all of it at once would take as long as many pieces.
        if chunks.capacity() - chunks.len() >= GIVE_BACK {
            chunks.shrink_to_fit();
        }
        debug_assert!(!chunks.is_empty() || self.unplaced == 0);
        chunks.is_empty()
    }

    /// Gives a visible chunk its place in the eviction order if it has none yet: behind all that have theirs.
    pub(super) fn place(&mut self, id: ChunkId) {
        if self.unplaced == 0 || self.policy.has(id) {
            return;
        }
        self.unplaced -= 1;
        let chunk = self.chunks.get(id);
        let (namespace, key) = (chunk.namespace, chunk.key);
        let hash = self.spot(namespace, key).hash();
        self.policy.insert_coldest(usize::from(namespace), id, hash);
    }
}
