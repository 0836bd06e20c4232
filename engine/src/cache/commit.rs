//! Commits, and the moment at which a chunk becomes visible.

use super::chunk::NO_PARENT;
use super::error::CommitError;
use super::slot::State;
use super::{Cache, Hash, Key, Owner, PAGE_BYTES, SlotId, SlotTable};
use crate::policy::ChunkId;

/// What a commit came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Committed {
    /// The shard is committed now.
    Committed,
    /// It was before: the commit was repeated.
    AlreadyCommitted,
    /// The chunk was dropped meanwhile; the slot is free, or somebody else's.
    Gone,
}

impl<T: SlotTable> Cache<T> {
    /// A writer's word that its shard is complete. The round's last one makes the chunk visible.
    ///
    /// # Errors
    ///
    /// What no honest client sends: see [`CommitError`]. Then nothing has changed.
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
            // Who committed it matters no longer: entries change hands, and nothing is changed.
            (State::Committed, _) => Ok(Committed::AlreadyCommitted),
            (State::Writing, Some(id)) => {
                self.commit_shard(owner, slot, id, checksum);
                Ok(Committed::Committed)
            }
        }
    }

    /// The slot's state, if it is still in the life that the client means.
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

    /// All ranks have committed in one round.
    pub(super) fn make_visible(&mut self, id: ChunkId) {
        let chunk = self.chunks.get(id);
        let (key, namespace, tick) = (chunk.key, chunk.namespace, chunk.tick);
        let hash = Hash::new(self.config.seed, u32::from(namespace), key);
        let matches = self.index.matches(&self.chunks, hash, namespace, key);
        for other in matches.forming() {
            if *other != id {
                self.drop_chunk(*other, false);
            }
        }
        let parent = match self.chunks.parent(id) {
            NO_PARENT => None,
            hash => self.index.any_visible(&self.chunks, hash, namespace),
        };
        self.show(id);
        self.policy.insert(usize::from(namespace), id, hash.whole(), parent);
        self.each_slot(id, |cache, slot| cache.slabs.touch(slot, tick));
    }

    /// Lookups find the chunk from now on. Its place in the order of eviction is the caller's to give.
    pub(super) fn show(&mut self, id: ChunkId) {
        self.chunks.set_visible(id);
        self.index.set_visible(&self.chunks, id);
        if self.world_of(id) == 1
            && let Some(slot) = self.chunks.shard(id, 1, 0)
        {
            let page = (self.slabs.offset(slot) / PAGE_BYTES) as u32;
            self.chunks.get_mut(id).set_single(self.slots.get(slot).generation(), page);
        }
    }

    /// Bytes of a slot in its span.
    pub(super) fn slot_bytes(&self, slot: SlotId) -> u64 {
        let head = self.slabs.head_of(slot).unwrap_or(0);
        self.slabs.class(self.slabs.class_of_span(head)).bytes
    }
}
