//! A new engine's reading of the slot table that an earlier one left, and clients' claims to what they were writing.

use super::chunk::NO_PARENT;
use super::slot::State;
use super::{Cache, Hash, Key, NAMESPACES, OWNERS, Owner, ShardHeader, SlotId, SlotTable};
use crate::policy::ChunkId;

/// A slot that was found WRITING or COMMITTED.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// What its header says.
    pub header: ShardHeader,
    /// Its generation.
    pub generation: u64,
    /// COMMITTED, else WRITING.
    pub committed: bool,
    /// Logical time of its last access.
    pub tick: u64,
}

/// What became of the chunks that were found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Complete: lookups find them.
    pub visible: u32,
    /// Incomplete, but somebody may still be writing a shard.
    pub kept: u32,
    /// Incomplete, and nobody writes.
    pub dropped: u32,
}

impl<T: SlotTable> Cache<T> {
    /// Takes over one slot. To be called in ascending order of slots, after [`Cache::add_slab`] and
    /// [`Cache::register`] and before anything else; [`Cache::restore_end`] follows the last.
    ///
    /// A WRITING slot stays its writer's, also where its chunk cannot be kept. False: the header makes no sense here
    /// (it lies elsewhere, or its span overlaps another), and nothing has changed.
    pub fn restore(&mut self, slot: SlotId, shard: &Shard) -> bool {
        self.change();
        let Shard { header, generation, committed, tick } = *shard;
        if slot >= self.slots.len() || usize::from(header.owner) >= OWNERS {
            return false;
        }
        let Ok(class) = self.slabs.class_for(header.length, None) else { return false };
        let attachment =
            if committed { Some(0) } else { self.slots.attachment_for(header.owner, header.nonce) };
        let Some(attachment) = attachment else { return false };
        if !self.slabs.restore(class, slot, header.offset, &mut self.slots, &mut self.table) {
            return false;
        }
        self.slots.raise_generation(slot, generation);
        let chunk = self.chunk_of(&header, tick);
        match (chunk, committed) {
            (Some(id), true) => {
                self.slots.restore_committed(slot, id, header.rank as u8);
                self.chunks.get_mut(id).committed += 1;
            }
            (None, true) => {
                self.slots.restore_committed(slot, 0, 0);
                self.free_slot(slot);
            }
            (chunk, false) => {
                self.slots.begin_writing(slot, attachment, chunk.unwrap_or(0), header.rank as u8);
                self.slabs.busy(slot);
                self.charges.of[usize::from(header.owner)] += self.slot_bytes(slot);
                match chunk {
                    Some(id) => self.chunks.get_mut(id).writing += 1,
                    None => self.slots.orphan(slot),
                }
            }
        }
        if let Some(id) = chunk {
            let world = self.world_of(id);
            self.chunks.set_shard(id, world, header.rank, Some(slot));
        }
        true
    }

    /// The forming chunk that a shard belongs to. `None`: it is of no use to any.
    fn chunk_of(&mut self, header: &ShardHeader, tick: u64) -> Option<ChunkId> {
        let ShardHeader { key, namespace, rank, round, length, .. } = *header;
        let registered = self.namespace(namespace).filter(|registered| registered.has(rank))?;
        let world = registered.world;
        if registered.layouts[rank as usize].shard_bytes != length {
            return None;
        }
        let hash = self.hash(namespace, key);
        let matches = self.index.matches(&self.chunks, hash, namespace as u8, key);
        let same = matches.forming().iter().find(|id| self.chunks.get(**id).round() == round);
        let id = match same {
            Some(id) if self.chunks.shard(*id, world, rank).is_some() => return None,
            Some(id) => *id,
            None if matches.forming().len() == super::index::FORMING_MAX => return None,
            None => {
                let id = self.chunks.create(key, hash, namespace as u8, world, round)?;
                self.chunks.set_parent(id, NO_PARENT);
                self.index.insert(&mut self.chunks, id);
                id
            }
        };
        let chunk = self.chunks.get_mut(id);
        chunk.tick = chunk.tick.max(tick);
        self.tick = self.tick.max(tick);
        Some(id)
    }

    /// The last slot has been restored: complete chunks become visible in the order of their last access. Incomplete
    /// ones stay while a sibling is WRITING, and are dropped otherwise. Allocates.
    pub fn restore_end(&mut self) -> Restored {
        self.change();
        let mut restored = Restored::default();
        let mut complete: Vec<(u64, ChunkId)> = Vec::new();
        for namespace in 0..NAMESPACES {
            debug_assert_eq!(self.chunks.idle(namespace).count(), 0);
        }
        for id in 0..self.chunks.fresh {
            let chunk = *self.chunks.get(id);
            if chunk.writing > 0 {
                restored.kept += 1;
                continue;
            }
            self.chunks.idle_insert(id);
            if u32::from(chunk.committed) == self.world_of(id) {
                complete.push((chunk.tick, id));
            } else {
                self.drop_chunk(id, false);
                restored.dropped += 1;
            }
        }
        complete.sort_unstable();
        for (_, id) in complete {
            // Two complete rounds of one key: the engine died between the commit and dropping the other.
            let (key, namespace) = (self.chunks.get(id).key, self.chunks.get(id).namespace);
            let hash = Hash::new(self.config.seed, u32::from(namespace), key);
            if self.index.matches(&self.chunks, hash, namespace, key).visible.is_some() {
                self.drop_chunk(id, false);
                restored.dropped += 1;
            } else {
                self.chunks.idle_remove(id);
                self.make_visible(id);
                restored.visible += 1;
            }
        }
        restored
    }

    /// A client that came back names a slot that it was writing as `was`, its entry and nonce then. It goes on writing as
    /// `owner`. False: it does not write that slot.
    pub fn adopt(
        &mut self,
        (owner, nonce): (Owner, u64),
        was: (Owner, u64),
        slot: SlotId,
        generation: u64,
        key: Key,
    ) -> bool {
        self.change();
        if usize::from(owner) >= OWNERS
            || !matches!(self.state_of(slot, generation), Ok(Some(State::Writing)))
        {
            return false;
        }
        let is_key = self.slots.get(slot).chunk().is_none_or(|id| self.chunks.get(id).key == key);
        if self.slots.writer(slot) != was || !is_key {
            return false;
        }
        let Some(attachment) = self.slots.attach(owner, nonce) else { return false };
        let bytes = self.slot_bytes(slot);
        self.charges.of[usize::from(was.0)] -= bytes;
        self.charges.of[usize::from(owner)] += bytes;
        self.slots.hand_over(slot, attachment);
        // So that an engine after this one knows whose it is. Of an orphan no header is kept here: it stays as it was.
        if let Some(id) = self.slots.get(slot).chunk() {
            let (namespace, rank) =
                (u32::from(self.chunks.get(id).namespace), u32::from(self.slots.get(slot).rank));
            let length =
                self.namespace(namespace).map_or(0, |known| known.layouts[rank as usize].shard_bytes);
            let (round, offset) = (self.chunks.get(id).round(), self.slabs.offset(slot));
            let header = ShardHeader { owner, nonce, key, namespace, rank, round, offset, length };
            self.table.writing(slot, generation, &header);
        }
        true
    }
}
