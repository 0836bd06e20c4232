//! Restoring: how a new engine takes over the tables that an earlier one left, and how clients that come back claim
//! the slots that they were writing.
//!
//! The calls come in this order, after [`Cache::add_slab`] and [`Cache::register`] and before anything else:
//! [`Cache::restore_chunks`], then [`Cache::restore_span`] for each span, [`Cache::restore`] for each of its slots in use,
//! ascending, and [`Cache::restore_end`]. Then [`Cache::owner_gone`] for each entry whose owner is dead, and
//! [`Cache::go_on_placing`] at any time later. Tables that make no sense are an error, and this cache is of no further
//! use then: nobody knows who may still be writing where.

use super::chunk::Life;
use super::place::Unplaced;
use super::slot::State;
use super::{Cache, Key, OWNERS, Owner, RANKS, ShardHeader, SlotId, SlotTable};
use crate::policy::ChunkId;
use kvring_shm_abi::chunk::{ChunkContent, ChunkIdentity};
use kvring_shm_abi::namespace::namespace_index;

/// The nonce under which the slots are listed that an entry was writing under earlier engines. In which attachment
/// it wrote them does not matter: all of them belong to its present owner, whose life word has been the same all
/// the time.
const INHERITED: u64 = 0;

/// A slot that was found in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// The slot's header.
    pub header: ShardHeader,
    /// Its generation.
    pub generation: u64,
    /// What the slot's word says.
    pub found: Found,
    /// Logical time of its last access.
    pub tick: u64,
}

/// How a slot in use was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// WRITING: its owner may still be writing it.
    Writing,
    /// An orphan: its owner may still be writing it, but it belongs to no chunk.
    Orphaned,
    /// COMMITTED: it holds a shard.
    Committed,
    /// COMMITTED and hidden: it holds a damaged shard, which some client had leased.
    Hidden,
}

/// What is put off until all slots have been read.
#[derive(Debug, Default)]
pub(super) struct Unfinished {
    /// Complete chunks.
    visible: Unplaced,
    /// Forming chunks of keys of which another round is complete.
    unwanted: Vec<ChunkId>,
    /// COMMITTED slots that belong to no chunk.
    useless: Vec<SlotId>,
    /// How many chunks have a record that says that they are visible, and lack shards.
    expected: u32,
}

/// What became of the chunks that a recovery found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Complete chunks: lookups find them.
    pub visible: u32,
    /// Incomplete chunks: they go on forming.
    pub kept: u32,
    /// Dropped chunks: another round of the same key is complete.
    pub dropped: u32,
}

/// Why the tables of an earlier engine cannot be taken over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotRestorable {
    /// A span that cannot be in this arena, or overlaps another one.
    #[error(
        "a span of {slabs} slabs at slab {first}, in slots of {slot_bytes} bytes, does not fit where it is"
    )]
    Span {
        /// Its first slab.
        first: u32,
        /// Slabs.
        slabs: u32,
        /// Bytes of a slot.
        slot_bytes: u64,
    },
    /// There is no memory. Nothing is wrong with the tables.
    #[error("no memory for {what} ({count}); free some and start again")]
    Memory {
        /// What the memory is for.
        what: &'static str,
        /// How many of these there are so far.
        count: usize,
    },
    /// A slot in use whose header does not fit its place.
    #[error("slot {slot} cannot hold what its header says: {} bytes at {}", .shard.header.length, .shard.header.offset)]
    Slot {
        /// The slot.
        slot: SlotId,
        /// Its header.
        shard: Box<Shard>,
    },
}

/// Appends `more` to `list`, if there is memory for it.
fn push<V>(list: &mut Vec<V>, more: impl IntoIterator<Item = V>) -> Result<(), NotRestorable> {
    for value in more {
        let what = "a list of what cannot be kept";
        list.try_reserve(1).map_err(|_| NotRestorable::Memory { what, count: list.len() })?;
        list.push(value);
    }
    Ok(())
}

impl<T: SlotTable> Cache<T> {
    /// Restores a span: `slabs` slabs from `first` on, cut into slots of `slot_bytes`.
    ///
    /// # Errors
    ///
    /// There can be no such span, or there is no memory.
    pub fn restore_span(&mut self, first: u32, slabs: u32, slot_bytes: u64) -> Result<(), NotRestorable> {
        self.change();
        if first >= self.slabs.count() || !self.slabs.restore_span(first, slabs, slot_bytes) {
            return Err(NotRestorable::Span { first, slabs, slot_bytes });
        }
        // The headers should have memory already, but reading them must not depend on that.
        let slots = self.slabs.span(first).slots;
        if self.table.ensure(self.slabs.first_slot(first), slots) {
            return Ok(());
        }
        Err(NotRestorable::Memory { what: "slot headers", count: slots as usize })
    }

    /// The slots of a restored span.
    pub fn slots_of_span(&self, first: u32) -> core::ops::Range<SlotId> {
        let slot = self.slabs.first_slot(first);
        slot..slot + self.slabs.span(first).slots
    }

    /// Takes over the records of the chunks that an earlier engine showed. Such a chunk keeps its id, its record and the
    /// directory's hint, and is visible again as soon as [`Cache::restore`] has seen all its shards. A record that cannot
    /// be what it says is ended.
    ///
    /// # Errors
    ///
    /// There is no memory.
    pub fn restore_chunks(&mut self) -> Result<(), NotRestorable> {
        self.change();
        let ready = self.table.chunks().ready();
        let mut lines = Vec::new();
        let what = "lines of slots";
        let memory = NotRestorable::Memory { what, count: ready.1 as usize };
        lines.try_reserve_exact(ready.1 as usize).map_err(|_| memory)?;
        lines.resize(ready.1 as usize, false);
        self.chunks.restore_begin(ready);
        // From the last one down, so that of those that are free the lowest is given out first.
        for id in (0..ready.0).rev() {
            if let Some(content) = self.table.chunks().read(id) {
                if id < self.chunks.fresh && self.expect(id, &content, &mut lines) {
                    // The dead engine had not decided about what it had marked.
                    self.table.chunks().spare(id);
                    self.restored.expected += 1;
                    continue;
                }
                self.table.chunks().end(id, content.identity);
            }
            self.chunks.restore_free(id);
        }
        self.chunks.restore_free_lines(&lines);
        Ok(())
    }

    /// Expects the shards of a chunk where its record says that they are. False: the record makes no sense.
    fn expect(&mut self, id: ChunkId, content: &ChunkContent, lines: &mut [bool]) -> bool {
        let ChunkIdentity { key, namespace } = content.identity;
        let Some(registered) = self.namespace(namespace).filter(|registered| registered.is_complete()) else {
            return false;
        };
        let world = registered.world;
        let Self { table, slots, chunks, .. } = self;
        let mut all = [SlotId::MAX; RANKS];
        for (rank, to) in (0..world).zip(&mut all) {
            *to = table.chunks().slot(content, world, rank).unwrap_or(SlotId::MAX);
        }
        let all = &all[..world as usize];
        let are_there = all.iter().all(|slot| *slot < slots.len());
        if !are_there || !chunks.expect(id, key, namespace_index(namespace), world, content.place, lines) {
            return false;
        }
        // If a slot is named twice, its header decides whose it is, and the other chunk is never whole.
        for (rank, slot) in (0..).zip(all) {
            chunks.set_shard(id, world, rank, Some(*slot));
            slots.expect(*slot, Some(id));
        }
        true
    }

    /// Prefetches what [`Cache::restore`] will look at for this slot.
    #[inline]
    pub fn restore_soon(&self, slot: SlotId) {
        if slot < self.slots.len()
            && let Some(id) = self.slots.get(slot).chunk()
        {
            self.chunks.prefetch(id);
        }
    }

    /// Restores one slot in use. A WRITING slot stays its owner's, even if its chunk cannot be kept. The last shard
    /// of a chunk makes it visible.
    ///
    /// # Errors
    ///
    /// The header makes no sense here, or there is no memory.
    pub fn restore(&mut self, slot: SlotId, shard: &Shard) -> Result<(), NotRestorable> {
        self.change();
        let nonsense = || NotRestorable::Slot { slot, shard: Box::new(*shard) };
        let Shard { header, generation, found, tick } = *shard;
        if slot >= self.slots.len() || usize::from(header.owner) >= OWNERS {
            return Err(nonsense());
        }
        let Self { slabs, slots, table, .. } = self;
        if !slabs.restore(slot, header.offset, header.length, slots, table) {
            return Err(nonsense());
        }
        self.slots.raise_generation(slot, generation);
        self.slabs.touch(slot, tick);
        if let Some(id) = self.slots.get(slot).chunk() {
            self.slots.expect(slot, None);
            if found == Found::Committed && self.is_expected(id, slot, &header) {
                return self.restore_expected(id, slot, header.rank, tick);
            }
        }
        let is_of_no_chunk = matches!(found, Found::Orphaned | Found::Hidden);
        let chunk = if is_of_no_chunk { None } else { self.chunk_of(&header, tick) };
        if let Some((id, world)) = chunk {
            self.chunks.set_shard(id, world, header.rank, Some(slot));
        }
        match (chunk, found) {
            (Some((id, world)), Found::Committed) => {
                self.slots.restore_committed(slot, Some(id), header.rank as u8);
                let chunk = self.chunks.get_mut(id);
                chunk.committed += 1;
                if u32::from(chunk.committed) == world && self.publish(id) {
                    self.index.remove(&mut self.chunks, id);
                    self.restore_visible(id)?;
                }
            }
            (_, Found::Hidden) | (None, Found::Committed) => {
                self.slots.restore_committed(slot, None, 0);
                push(&mut self.restored.useless, [slot])?;
            }
            (chunk, Found::Writing | Found::Orphaned) => {
                let attachment = self.slots.attachment_for(header.owner, INHERITED).ok_or_else(nonsense)?;
                let id = chunk.map(|(id, _)| id);
                self.slots.begin_writing(slot, attachment, id.unwrap_or(0), header.rank as u8);
                self.slabs.busy(slot);
                self.charges.of[usize::from(header.owner)] += self.slot_bytes(slot);
                match id {
                    Some(id) => self.chunks.get_mut(id).writing += 1,
                    None if found == Found::Orphaned => self.slots.orphan(slot),
                    None => self.orphan(slot),
                }
            }
        }
        Ok(())
    }

    /// Whether this slot holds a shard that the chunk's record has led us to expect there.
    fn is_expected(&self, id: ChunkId, slot: SlotId, header: &ShardHeader) -> bool {
        let ShardHeader { key, namespace, rank, length, .. } = *header;
        let chunk = self.chunks.get(id);
        let registered = self.namespace(namespace).filter(|registered| registered.has(rank));
        chunk.life() == Life::Expected
            && (chunk.key, chunk.namespace) == (key, namespace_index(namespace))
            && registered.is_some_and(|registered| {
                registered.layouts[rank as usize].shard_bytes == length
                    && self.chunks.shard(id, registered.world, rank) == Some(slot)
            })
    }

    /// Restores a shard that was expected; the chunk is visible again with its last one.
    fn restore_expected(
        &mut self,
        id: ChunkId,
        slot: SlotId,
        rank: u32,
        tick: u64,
    ) -> Result<(), NotRestorable> {
        self.slots.restore_committed(slot, Some(id), rank as u8);
        self.used_at(id, tick);
        let chunk = self.chunks.get_mut(id);
        chunk.committed += 1;
        if u32::from(chunk.committed) == self.world_of(id) {
            self.restored.expected -= 1;
            return self.restore_visible(id);
        }
        Ok(())
    }

    /// Notes when a chunk was used last, as one of its slots tells.
    fn used_at(&mut self, id: ChunkId, tick: u64) {
        let chunk = self.chunks.get_mut(id);
        chunk.tick = chunk.tick.max(tick);
        self.tick = self.tick.max(tick);
        if let Some(registered) = &mut self.namespaces[usize::from(chunk.namespace)] {
            registered.used = registered.used.max(tick);
        }
    }

    /// The forming chunk to which a shard belongs, with its world; it is made if necessary. `None`: the shard is of no use to any
    /// chunk.
    fn chunk_of(&mut self, header: &ShardHeader, tick: u64) -> Option<(ChunkId, u32)> {
        let ShardHeader { key, namespace, rank, round, length, .. } = *header;
        let registered = self.namespace(namespace).filter(|registered| registered.has(rank))?;
        let world = registered.world;
        if registered.layouts[rank as usize].shard_bytes != length {
            return None;
        }
        let namespace = namespace_index(namespace);
        let hash = self.hash(namespace, key);
        if self.visible(namespace, key).is_some() {
            // Another round of the key is complete: the engine died before it had dropped this one.
            return None;
        }
        let forming = self.index.forming(&self.chunks, hash, namespace, key);
        let same = forming.iter().find(|id| self.chunks.get(**id).round() == round);
        let id = match same {
            Some(id) if self.chunks.shard(*id, world, rank).is_some() => return None,
            Some(id) => *id,
            None if forming.len() == super::index::FORMING_MAX => return None,
            None => {
                while let Some(lack) = self.chunks.lack(world) {
                    if !self.more_records(lack) {
                        return None;
                    }
                }
                let id = self.chunks.create(key, hash, namespace, world, round)?;
                self.index.insert(&mut self.chunks, id);
                id
            }
        };
        self.used_at(id, tick);
        Some((id, world))
    }

    /// Makes a chunk visible, all of whose shards have been restored; other rounds of it are not wanted. It gets
    /// its place in the eviction order later.
    fn restore_visible(&mut self, id: ChunkId) -> Result<(), NotRestorable> {
        if self.chunks.counts.forming > 0 {
            let (key, namespace) = (self.chunks.get(id).key, self.chunks.get(id).namespace);
            let forming = self.index.forming(&self.chunks, self.hash(namespace, key), namespace, key);
            push(&mut self.restored.unwanted, forming.iter().copied())?;
        }
        self.chunks.set_visible(id);
        self.unplaced += 1;
        self.restored.visible.push(self.chunks.get(id).tick, id)
    }

    /// Ends the restoring. What is of no use is freed only now, because an empty span goes back to the pool, and
    /// this one might have held more slots. Incomplete chunks go on forming, even those that nobody is writing:
    /// another rank of their round may not have reserved its slot yet, and a shard that was committed and
    /// acknowledged must not be lost. As ever, incomplete chunks are the first to be evicted, and a newer round
    /// replaces them. Lookups find the visible chunks from now on; the caller gives them their places in the eviction
    /// order ([`Cache::go_on_placing`]).
    pub fn restore_end(&mut self) -> (Restored, Unplaced) {
        self.change();
        let Unfinished { visible, unwanted, useless, expected } = core::mem::take(&mut self.restored);
        let dropped = unwanted.len() as u32 + expected;
        let mut restored = Restored { visible: visible.len() as u32, dropped, ..Restored::default() };
        if expected > 0 {
            self.drop_expected();
        }
        for slot in useless {
            self.free_slot(slot);
        }
        for id in unwanted {
            if self.chunks.get(id).writing == 0 {
                self.chunks.idle_insert(id);
            }
            self.drop_chunk(id, false);
        }
        if self.chunks.counts.forming > 0 {
            for id in 0..self.chunks.fresh {
                let chunk = self.chunks.get(id);
                if chunk.life() == Life::Forming {
                    restored.kept += 1;
                    if chunk.writing == 0 {
                        self.chunks.idle_insert(id);
                    }
                }
            }
        }
        self.slabs.release_unused(&mut self.table);
        (restored, visible)
    }

    /// Drops the chunks whose records say that they are visible and of which not all shards were found: the engine died while
    /// it hid a damaged one, or its tables make no sense.
    fn drop_expected(&mut self) {
        for id in 0..self.chunks.fresh {
            let chunk = self.chunks.get(id);
            if chunk.life() != Life::Expected {
                continue;
            }
            self.table.chunks().end(id, self.identity(id));
            self.each_slot(id, |cache, slot| {
                let entry = cache.slots.get(slot);
                match (entry.chunk() == Some(id), entry.state()) {
                    (true, State::Committed) => cache.free_slot(slot),
                    (true, State::Free) => cache.slots.expect(slot, None),
                    (true, State::Writing) | (false, _) => {}
                }
            });
            self.chunks.destroy(id, self.world_of(id));
        }
    }

    /// Hands a WRITING slot over to the present attachment of the client that was writing it: the client has come
    /// back with the same entry and this nonce, has named the slot, and goes on writing it. False: the client is
    /// not writing that slot.
    ///
    /// The entry alone gives it the right to the slot. Its life word has been claimed by the same owner since the
    /// slot was given to it: otherwise an engine would have freed the slot before anybody else could claim the
    /// entry.
    pub fn adopt(&mut self, owner: Owner, nonce: u64, slot: SlotId, generation: u64, key: Key) -> bool {
        self.change();
        self.work += 2;
        if usize::from(owner) >= OWNERS
            || !matches!(self.state_of(slot, generation), Ok(Some(State::Writing)))
        {
            return false;
        }
        let is_key = self.slots.get(slot).chunk().is_none_or(|id| self.chunks.get(id).key == key);
        if self.slots.writer(slot).0 != owner || !is_key {
            return false;
        }
        let Some(attachment) = self.slots.attach(owner, nonce) else { return false };
        self.slots.hand_over(slot, attachment);
        true
    }
}
