//! Damaged chunks: as soon as one client reports the damage, no lookup finds the chunk any more. It is dropped when
//! its last lease ends.

use super::chunk::Life;
use super::slot::State;
use super::{Cache, Key, NamespaceId, SlotId, SlotTable};
use crate::policy::ChunkId;

/// The result of an invalidation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Invalidated {
    /// The chunk was not leased: its slots are free.
    Dropped,
    /// The chunk is leased: it is hidden, and its slots are freed with its last lease.
    Hidden,
    /// The slot does not, or no longer, hold a shard of a visible chunk. Nothing has changed.
    Gone,
    /// No honest client sends this: the client does not read such shards, or the slot has another key. Nothing has
    /// changed.
    Refused,
}

impl<T: SlotTable> Cache<T> {
    /// Handles a reader's message that the bytes of a shard are not those that were stored. From now on no lookup
    /// finds the chunk, and a reservation of its key is granted, as if it had been evicted. A lease still keeps
    /// what it promises: if the chunk is leased, its slots are freed when its last lease ends. No successor of this
    /// engine shows the chunk again.
    ///
    /// `reads` tells whether the reader reads shards of this namespace and rank. O(ranks).
    pub fn invalidate(
        &mut self,
        slot: SlotId,
        generation: u64,
        key: Key,
        reads: impl FnOnce(NamespaceId, u32) -> bool,
    ) -> Invalidated {
        self.change();
        let Ok(state) = self.state_of(slot, generation) else { return Invalidated::Refused };
        let entry = self.slots.get(slot);
        let Some(id) = entry.chunk().filter(|_| state == Some(State::Committed)) else {
            return Invalidated::Gone;
        };
        let chunk = self.chunks.get(id);
        if chunk.key != key || !reads(self.identity(id).namespace, u32::from(entry.rank)) {
            return Invalidated::Refused;
        }
        // Nobody has read a chunk that is forming, and one that is hidden has been reported before.
        if chunk.life() != Life::Visible {
            return Invalidated::Gone;
        }
        if !chunk.pins.any() {
            self.drop_chunk(id, false);
            return Invalidated::Dropped;
        }
        self.hide(id);
        Invalidated::Hidden
    }

    /// Hides a leased chunk: afterwards only its leases lead to it.
    fn hide(&mut self, id: ChunkId) {
        // This comes before a lookup can miss the chunk. A client that misses it may store it again, and if this
        // engine then dies, its successor must not show the damaged one.
        self.each_slot(id, |cache, slot| cache.table.hidden(slot));
        self.unlist(id, false);
        let namespace = usize::from(self.chunks.get(id).namespace);
        if let Some(registered) = &mut self.namespaces[namespace] {
            registered.pinned -= 1;
        }
        self.chunks.set_hidden(id);
    }
}
