//! What the cache counts.

use super::{Cache, OWNERS, Owner, SlotTable};

/// Counters and gauges at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Slots of assigned spans that are free.
    pub slots_free: u64,
    /// WRITING slots, orphans included.
    pub slots_writing: u64,
    /// COMMITTED slots.
    pub slots_committed: u64,
    /// WRITING slots that belong to no chunk.
    pub orphans: u64,
    /// Chunks that lookups find.
    pub chunks_visible: u64,
    /// Chunks of which not all shards are committed.
    pub chunks_forming: u64,
    /// Damaged chunks that leases still hold.
    pub chunks_hidden: u64,
    /// Leases.
    pub leases: u64,
    /// Pins: the chunks of all leases, each counted once for each lease.
    pub pins: u64,
    /// Slabs that were added.
    pub slabs_usable: u64,
    /// Usable slabs that are in no span.
    pub slabs_free: u64,
    /// Bytes of slots that are not free.
    pub bytes_used: u64,
    /// Bytes of slabs that were added.
    pub bytes_usable: u64,
    /// Chunks evicted so far.
    pub evicted: u64,
    /// Chunks dropped by clears so far.
    pub cleared: u64,
    /// Keys for which there was no space so far.
    pub no_space: u64,
    /// Spans taken from another size so far.
    pub spans_taken: u64,
}

impl<T: SlotTable> Cache<T> {
    /// The present counters. O(different shard sizes).
    #[must_use]
    pub fn stats(&self) -> Stats {
        let classes = self.slabs.classes();
        Stats {
            slots_free: classes.iter().map(|class| class.free).sum::<u64>() + self.slabs.closed_free,
            slots_writing: self.slots.counts.writing,
            slots_committed: self.slots.counts.committed,
            orphans: self.slots.counts.orphans,
            chunks_visible: self.chunks.counts.visible,
            chunks_forming: self.chunks.counts.forming,
            chunks_hidden: self.chunks.counts.hidden,
            leases: u64::from(self.leases.len),
            pins: self.leases.pins,
            slabs_usable: u64::from(self.slabs.usable),
            slabs_free: u64::from(self.slabs.pool_len()),
            bytes_used: self.slabs.bytes_used,
            bytes_usable: u64::from(self.slabs.usable) * self.config.slab_bytes,
            evicted: self.counters.evicted,
            cleared: self.counters.cleared,
            no_space: self.counters.no_space,
            spans_taken: self.slabs.spans_taken,
        }
    }

    /// The bytes that a client is charged for what it leased or reserved; 0 for an entry that does not exist.
    #[must_use]
    pub fn client_bytes(&self, owner: Owner) -> u64 {
        if usize::from(owner) < OWNERS { self.charges.of[usize::from(owner)] } else { 0 }
    }
}
