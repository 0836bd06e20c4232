//! Damaged chunks: from the first word of it on lookups find them no longer, and they go with their last lease.

use super::chunk::Life;
use super::slot::State;
use super::{Cache, Key, NamespaceId, SlotId, SlotTable};
use crate::policy::ChunkId;

/// What an invalidation came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Invalidated {
    /// Nobody had leased the chunk: its slots are free.
    Dropped,
    /// Somebody has: it is hidden, and its slots are freed with its last lease.
    Hidden,
    /// The slot holds no shard of a visible chunk, or no longer: nothing has changed.
    Gone,
    /// No honest client says this: it does not read such shards, or the slot is another key's. Nothing has changed.
    Refused,
}

impl<T: SlotTable> Cache<T> {
    /// A reader's word that the bytes of a shard are not those that were stored. From now on no lookup finds its chunk, and
    /// a reservation of its key is granted, as if it had been evicted. What a lease promises stays promised: where the
    /// chunk is leased, its slots are freed when the last of its leases ends. No successor of this engine shows it again.
    ///
    /// `reads` says whether the reader reads shards of this namespace and rank. O(ranks).
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
        if chunk.key != key || !reads(u32::from(chunk.namespace), u32::from(entry.rank)) {
            return Invalidated::Refused;
        }
        // Nobody has read one that is forming; of one that is hidden this is no news.
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

    /// Takes a leased chunk out of all that leads to it but its leases.
    fn hide(&mut self, id: ChunkId) {
        // Before a lookup can miss it: who stores it again must not find an engine that shows this one after its death.
        self.each_slot(id, |cache, slot| cache.table.hidden(slot));
        self.unlist(id, false);
        let namespace = usize::from(self.chunks.get(id).namespace);
        if let Some(registered) = &mut self.namespaces[namespace] {
            registered.pinned -= 1;
        }
        self.chunks.set_hidden(id);
    }
}
