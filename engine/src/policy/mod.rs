//! Which chunk goes when room is needed: one trait, one file per policy, all the same shape.
//!
//! A policy orders the chunks of one namespace. It knows nothing of slots, leases or shared memory; the
//! cache tells it what was inserted, used and removed, and asks for the coldest chunk that may go.
//! Everything a policy needs is taken when it is made: no call allocates from the heap.

/// A chunk's place in the cache's private chunk table; dense, reused after a removal.
pub type ChunkId = u32;

/// The order in which one namespace's chunks are evicted.
///
/// Chains are touched *tail first* by the caller, so that the head of a prefix ends as the warmest and
/// leaves go first. Polls and retries are not accesses: the caller filters them out.
pub trait Policy: Send {
    /// The name used in configuration, statistics and tables: `lru`, `arc`.
    fn name(&self) -> &'static str;

    /// A chunk that was not resident now is. `hash` identifies its content across residencies (for ghost
    /// lists); `parent` is the chunk just before it in its chain, where that is resident: a new leaf is
    /// colder than its parent, however late it is stored.
    fn insert(&mut self, id: ChunkId, hash: u64, parent: Option<ChunkId>);

    /// A resident chunk was used.
    fn touch(&mut self, id: ChunkId);

    /// A resident chunk is gone. `evicted` is true where room was needed (ghost lists remember it) and false
    /// where it was cleared, replaced or aborted.
    fn remove(&mut self, id: ChunkId, evicted: bool);

    /// The coldest chunk for which `evictable` holds; the caller then calls [`Policy::remove`].
    /// A chunk that is refused is in use, and may be moved to the warm end, so that the next call does not
    /// meet it again: a scan is amortised O(1). `None` when every chunk was refused.
    fn victim(&mut self, evictable: &mut dyn FnMut(ChunkId) -> bool) -> Option<ChunkId>;

    /// How many chunks are resident.
    fn len(&self) -> usize;

    /// True when no chunk is resident.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The resident chunks, coldest first; asserts the policy's own invariants. For tests and self-checks.
    fn dump(&self) -> Vec<ChunkId>;
}
