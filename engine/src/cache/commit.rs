//! Commits. The last commit of a round makes the chunk visible.

use super::error::CommitError;
use super::slot::State;
use super::{Cache, Key, Owner, RANKS, SlotId, SlotTable};
use crate::policy::ChunkId;
use kvring_shm_abi::directory::Spot;

/// The result of a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Committed {
    /// The shard has been committed.
    Committed,
    /// The shard had been committed before: the commit is a repetition.
    AlreadyCommitted,
    /// The chunk was dropped meanwhile. The slot is free, or has been given away again.
    Gone,
}

impl<T: SlotTable> Cache<T> {
    /// Handles a writer's message that its shard is complete. The last commit of a round makes the chunk visible.
    ///
    /// # Errors
    ///
    /// A message that no honest client sends: see [`CommitError`]. Nothing has changed then.
    pub fn commit(
        &mut self,
        owner: Owner,
        slot: SlotId,
        generation: u64,
        key: Key,
        checksum: u64,
    ) -> Result<Committed, CommitError> {
        self.change();
        self.work += 1;
        let Some(state) = self.state_of(slot, generation)? else { return Ok(Committed::Gone) };
        let chunk = self.slots.get(slot).chunk();
        let is_key = chunk.is_none_or(|id| self.chunks.get(id).key == key);
        match (state, chunk) {
            (State::Free, _) => Ok(Committed::Gone),
            (State::Writing, _) if !self.slots.is_writer(owner, slot) => {
                Err(CommitError::NotYours { slot, owner })
            }
            _ if !is_key => Err(CommitError::OtherKey { slot, key }),
            (State::Writing, None) => {
                self.free_slot(slot);
                Ok(Committed::Gone)
            }
            // It does not matter which client had committed it: entries change hands, and nothing is changed here.
            (State::Committed, _) => Ok(Committed::AlreadyCommitted),
            (State::Writing, Some(id)) => {
                self.commit_shard(owner, slot, id, checksum);
                Ok(Committed::Committed)
            }
        }
    }

    /// The slot's state, if its generation is still the one that the client means.
    pub(super) fn state_of(&self, slot: SlotId, generation: u64) -> Result<Option<State>, CommitError> {
        let count = self.slots.len();
        if slot >= count {
            return Err(CommitError::NoSuchSlot { slot, count });
        }
        let entry = self.slots.get(slot);
        Ok((entry.generation() == generation).then_some(entry.state()))
    }

    fn commit_shard(&mut self, owner: Owner, slot: SlotId, id: ChunkId, checksum: u64) {
        self.charges.of[usize::from(owner)] -= self.slot_bytes(slot);
        self.slots.commit(slot);
        self.slabs.idle(slot);
        self.table.committed(slot, self.slots.get(slot).generation(), owner, checksum);
        let chunk = self.chunks.get_mut(id);
        chunk.writing -= 1;
        chunk.committed += 1;
        let (writing, committed) = (chunk.writing, chunk.committed);
        if u32::from(committed) == self.world_of(id) {
            self.make_visible(id);
        } else if writing == 0 {
            self.chunks.idle_insert(id);
        }
    }

    /// Makes a chunk visible: all ranks have committed in one round. If the directory has no place for it, it is
    /// dropped.
    pub(super) fn make_visible(&mut self, id: ChunkId) {
        let chunk = self.chunks.get(id);
        let (key, namespace, tick) = (chunk.key, chunk.namespace, chunk.tick);
        let hash = self.hash(namespace, key);
        for other in self.index.forming(&self.chunks, hash, namespace, key).iter() {
            if *other != id {
                self.drop_chunk(*other, false);
            }
        }
        let parent = self.chunks.parent(id).and_then(|spot| self.any_visible(spot, namespace));
        if !self.publish(id) {
            self.no_space();
            self.chunks.idle_insert(id);
            return self.drop_chunk(id, false);
        }
        self.index.remove(&mut self.chunks, id);
        self.chunks.set_visible(id);
        if let Some(parent) = parent {
            self.place(parent);
        }
        let hash = self.spot(namespace, key).hash();
        self.policy.insert(usize::from(namespace), id, hash, parent);
        self.each_slot(id, |cache, slot| cache.slabs.touch(slot, tick));
    }

    /// A visible chunk of this namespace with this spot: that of the key or, very rarely, of another key with the same
    /// hash.
    fn any_visible(&self, spot: Spot, namespace: u8) -> Option<ChunkId> {
        let has_spot = |id: &ChunkId| {
            let published = self.chunks.published(*id).filter(|(other, _)| *other == namespace);
            published.is_some_and(|(namespace, key)| self.spot(namespace, key) == spot)
        };
        self.table.chunks().directory().hints(spot).find(has_spot)
    }

    /// Writes the chunk's record and the directory's hint to it. False: the directory has no place.
    pub(super) fn publish(&mut self, id: ChunkId) -> bool {
        let world = self.world_of(id);
        let mut slots = [0; RANKS];
        for (rank, to) in (0..world).zip(&mut slots) {
            // All ranks have committed, so each has a slot.
            *to = self.chunks.shard(id, world, rank).unwrap_or_default();
        }
        let identity = self.identity(id);
        let Self { table, chunks, .. } = self;
        let directory = table.chunks().directory();
        table.chunks().show(id, identity, &slots[..world as usize], chunks.lines(id, world), |other| {
            let (namespace, key) = chunks.published(other)?;
            Some(directory.spot(namespace, key))
        })
    }

    /// How many bytes the slot has in its span.
    pub(super) fn slot_bytes(&self, slot: SlotId) -> u64 {
        let head = self.slabs.head_of(slot).unwrap_or(0);
        self.slabs.class(self.slabs.class_of_span(head)).bytes
    }
}
