//! Statistics that are read off the cache rather than counted as things happen.

use super::Service;
use crate::stats::{self, Stat};

impl Service {
    /// Called with each tick.
    pub(super) fn publish_gauges(&self) {
        let block = &self.segments.engine.stats;
        let cache = self.cache.stats();
        let slab_bytes = self.segments.geometry().slab_bytes;
        let taken = self.allocator.taken();
        for (stat, value) in [
            (Stat::Evictions, cache.evicted),
            (Stat::SpansTaken, cache.spans_taken),
            (Stat::SlotsFree, cache.slots_free),
            (Stat::SlotsWriting, cache.slots_writing),
            (Stat::SlotsOrphaned, cache.orphans),
            (Stat::SlotsCommitted, cache.slots_committed),
            (Stat::ChunksVisible, cache.chunks_visible),
            (Stat::ChunksForming, cache.chunks_forming),
            (Stat::ChunksHidden, cache.chunks_hidden),
            (Stat::Leases, cache.leases),
            (Stat::Pins, cache.pins),
            (Stat::Namespaces, self.registry.len() as u64),
            (Stat::Clients, u64::from(self.active.count_ones())),
            (Stat::ArenaBytes, self.segments.geometry().arena_bytes),
            (Stat::ArenaBytesAllocated, u64::from(taken) * slab_bytes),
            (Stat::ArenaBytesUsed, cache.bytes_used),
            (Stat::SlabsFree, cache.slabs_free),
            (Stat::ClientsAwaited, u64::from(self.awaited.entries.count_ones())),
            (Stat::ClientsLingering, self.entries.iter().filter(|entry| entry.lingers()).count() as u64),
            (Stat::LongestTurnNs, self.longest_ns),
            (Stat::LongestTurnCpuNs, self.longest_cpu_ns),
            (Stat::AllocationStalled, u64::from(self.allocator.is_stalled())),
        ] {
            stat.of(block).set(value);
        }
        for (stat, value) in stats::of_lookups(&self.segments.lobby.lookup_totals()) {
            stat.of(block).set(value);
        }
    }
}
