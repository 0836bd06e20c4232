//! Making room: by free slots, fresh spans, the coldest chunks, and spans of other sizes, in that order. Every
//! search goes on in steps: see `Cache::allow`.

use super::chunk::{Chunks, Lack, Life};
use super::mark::{Ears, For, Heard};
use super::slab::Class;
use super::slot::State;
use super::{Cache, NAMESPACES, NamespaceId, SlotId, SlotTable};
use crate::policy::ChunkId;
use kvring_shm_abi::namespace::namespace_index;

/// How many free slots a search aims at: one in this many slots of its class, and at most `SPARE_MAX`.
const SPARE_PARTS: u64 = 64;
const SPARE_MAX: u64 = 32;
/// How many idle forming chunks, and how many chunks in the eviction order, one step of a search for the coldest
/// looks at in each namespace.
const IDLE_LOOK: u32 = 8;
const VICTIM_LOOK: u32 = 16;

/// How often the service may have to listen before a search that has found nothing in between is in vain.
const WAITS_MAX: u32 = 16;

/// How many slot headers, and how many chunk records or lines, can be given zeroed memory in the time that touching one
/// record takes.
const HEADERS: u32 = 8;
const RECORDS: u32 = 16;

/// The result of a search for a slot.
pub(super) enum Room {
    /// A free slot.
    Slot(SlotId),
    /// There is none.
    None,
    /// What is allowed is spent; the search goes on where it stopped.
    Later,
}

/// How far one message's search for room has come. Once it has been in vain, it is not repeated for the message's
/// other keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Search {
    /// The search has looked at everything in vain, for a slot (`in_vain`) or for a record (`no_record`). A message
    /// that finds no record may still get slots for chunks that have one.
    in_vain: bool,
    no_record: bool,
    /// How many chunks were refused since the last success, and how many slabs were looked at.
    refused: u64,
    pub(super) slabs: u32,
    /// How often the service had to listen since the last success. A scheduler that holds whatever is marked must not keep a
    /// store waiting for ever.
    waits: u32,
    /// The slab with which the search goes on. Each message has its own, because other searches look for other
    /// sizes.
    pub(super) slab: Option<u32>,
}

/// The result of a search for a chunk's record.
pub(super) enum Record {
    /// There is one.
    There,
    /// There is none.
    None,
    /// As [`Room::Later`].
    Later,
}

/// The coldest chunk, as far as one step of the search has looked.
enum Coldest {
    /// This chunk, and when it was used last.
    Chunk(u64, ChunkId),
    /// No chunk may be evicted.
    None,
    /// None has been found yet; this step refused this many chunks.
    Refused(u32),
}

impl<T: SlotTable> Cache<T> {
    /// Takes a free slot of the class; makes room for it if necessary, and does at least one step of that, whatever
    /// is allowed.
    pub(super) fn take_slot(&mut self, class: u16, search: &mut Search, ears: &mut Ears<'_>) -> Room {
        let mut may_go_on = true;
        while self.slabs.class(class).free == 0 && (search.in_vain || !self.assign(class)) {
            if search.in_vain {
                return Room::None;
            }
            if !may_go_on || self.is_waiting() {
                return Room::Later;
            }
            search.in_vain = !self.make_room(class, search, ears);
            may_go_on = !self.is_spent();
        }
        let Some((slot, fresh)) = self.slabs.take(class, &self.slots) else { return Room::None };
        (search.refused, search.slabs, search.waits) = (0, 0, 0);
        if fresh {
            self.slots.raise_generation(slot, self.table.generation(slot));
        }
        Room::Slot(slot)
    }

    fn assign(&mut self, class: u16) -> bool {
        let slabs = self.slabs.assign(class, &mut self.table);
        if slabs > 0 {
            self.work += self.slabs.records(slabs) + self.header_records(class, slabs);
        }
        slabs > 0
    }

    /// Ensuring the headers of this many slabs takes about as long as touching this many records.
    pub(super) fn header_records(&self, class: u16, slabs: u32) -> u64 {
        u64::from(self.slabs.slots_in(class, slabs) / HEADERS)
    }

    /// Forbids evictions, or allows them again. They are forbidden after a restart until the clients that hold
    /// something have declared it.
    pub fn hold_evictions(&mut self, hold: bool) {
        self.evictions_held = hold;
    }

    /// Whether evictions are forbidden.
    pub fn evictions_held(&self) -> bool {
        self.evictions_held
    }

    /// Whether anything may be evicted. It may not while evictions are forbidden, and not before each restored chunk
    /// has its place in the order: the coldest of those that have theirs may be warmer than all others.
    fn may_evict(&self) -> bool {
        !self.evictions_held && self.unplaced == 0
    }

    /// Does one step of the search for room: evicts until the class has a few free slots, so that the message's
    /// next keys find some; or marks what it would evict. False: there is nothing left to try.
    fn make_room(&mut self, class: u16, search: &mut Search, ears: &mut Ears<'_>) -> bool {
        if !self.may_evict() {
            return false;
        }
        if self.emptying.is_some() {
            self.go_on_emptying(ears);
            return true;
        }
        let Class { slots, namespaces, .. } = *self.slabs.class(class);
        let spare = (slots / SPARE_PARTS).clamp(1, SPARE_MAX);
        let (mut may_steal, mut marked) = (true, 0);
        loop {
            let coldest = match self.coldest(namespaces, Some(class)) {
                Coldest::Chunk(tick, id) => Some((tick, id)),
                Coldest::Refused(refused) if self.goes_on(namespaces, refused, search) => break,
                Coldest::Refused(_) | Coldest::None => None,
            };
            let may_steal = std::mem::take(&mut may_steal) && self.may_steal(search);
            if may_steal && self.steal(class, coldest.map(|(tick, _)| tick), search, ears) {
                return true;
            }
            let Some((_, id)) = coldest else {
                if marked > 0 {
                    break;
                }
                return self.slabs.class(class).free > 0 || self.may_steal(search);
            };
            let is_room_for_marks = if self.chunks.get(id).life() == Life::Visible {
                marked += self.slots_of(id, class);
                self.mark(id, For::Room)
            } else {
                self.evict(id);
                true
            };
            // The chunk's span may have become wholly free and have gone back to the pool.
            if self.slabs.class(class).free == 0 && marked == 0 {
                self.assign(class);
            }
            if self.slabs.class(class).free + marked >= spare || self.is_spent() || !is_room_for_marks {
                break;
            }
        }
        let heard = self.decide(ears);
        self.decided(heard, search)
    }

    /// After a search has marked chunks. False: the search is in vain.
    fn decided(&mut self, heard: Heard, search: &mut Search) -> bool {
        search.waits += u32::from(heard == Heard::NotYet);
        heard != Heard::Never && search.waits <= WAITS_MAX
    }

    /// How many slots of this class a visible chunk has: one for each rank whose shards have that size.
    fn slots_of(&self, id: ChunkId, class: u16) -> u64 {
        self.namespace_of(id).map_or(0, |registered| {
            let layouts = &registered.layouts[..registered.world as usize];
            layouts.iter().filter(|layout| layout.class == class).count() as u64
        })
    }

    /// Notes that this many more chunks were refused. False: all chunks have been looked at, and none of them may
    /// be evicted.
    fn goes_on(&self, namespaces: u64, refused: u32, search: &mut Search) -> bool {
        search.refused += u64::from(refused);
        let all = (0..NAMESPACES).filter(|namespace| namespaces >> namespace & 1 == 1);
        let len = |n| self.policy.len(n) as u64 + u64::from(self.chunks.idle_len(n));
        // Everything is looked at twice: a chunk that was refused at first may have become evictable meanwhile, and
        // one that was evictable may not be any more.
        search.refused <= 2 * all.map(len).sum::<u64>()
    }

    /// The coldest chunk of these namespaces (bit n: namespace n) that may be evicted. A forming chunk may have no
    /// slot of the class yet; it is chosen only if it has one.
    fn coldest(&mut self, namespaces: u64, class: Option<u16>) -> Coldest {
        let mut coldest = Coldest::None;
        let mut left = namespaces;
        while left != 0 {
            let namespace = left.trailing_zeros() as usize;
            left &= left - 1;
            if self.namespaces[namespace].is_none() {
                continue;
            }
            let (mut idle_looks, mut looks) = (IDLE_LOOK, VICTIM_LOOK);
            let idle = self.idle_victim(namespace, class, &mut idle_looks);
            let visible = self.visible_victim(namespace, &mut looks);
            let refused = (IDLE_LOOK - idle_looks) + (VICTIM_LOOK - looks);
            self.work += 1 + u64::from(refused);
            for id in idle.into_iter().chain(visible) {
                let tick = self.chunks.get(id).tick;
                let is_colder = if let Coldest::Chunk(other, _) = coldest { tick < other } else { true };
                if is_colder {
                    coldest = Coldest::Chunk(tick, id);
                }
            }
            match &mut coldest {
                Coldest::Chunk(..) => {}
                Coldest::Refused(all) => *all += refused,
                Coldest::None if looks == 0 || idle_looks == 0 => coldest = Coldest::Refused(refused),
                Coldest::None => {}
            }
        }
        coldest
    }

    /// The first idle forming chunk that may be evicted and gives back a slot of the class. Refused chunks go to
    /// the tail of the list, as in a policy's `victim`.
    fn idle_victim(&mut self, namespace: usize, class: Option<u16>, looks: &mut u32) -> Option<ChunkId> {
        for _ in 0..self.chunks.idle_len(namespace) {
            *looks = looks.checked_sub(1)?;
            let id = self.chunks.first_idle(namespace)?;
            if self.chunks.is_evictable(id) && class.is_none_or(|class| self.gives(id, class)) {
                return Some(id);
            }
            self.chunks.idle_remove(id);
            self.chunks.idle_insert(id);
        }
        None
    }

    /// Whether the chunk has a slot of this class.
    fn gives(&mut self, id: ChunkId, class: u16) -> bool {
        let Some(registered) = self.namespace_of(id) else { return false };
        let world = registered.world;
        let mut ranks = (0..).zip(&registered.layouts[..world as usize]);
        let gives =
            ranks.any(|(rank, layout)| layout.class == class && self.chunks.shard(id, world, rank).is_some());
        self.work += u64::from(world);
        gives
    }

    /// The coldest visible chunk that may be evicted. If all are leased, the search is skipped: it would take long
    /// and find nothing.
    fn visible_victim(&mut self, namespace: usize, looks: &mut u32) -> Option<ChunkId> {
        let Self { policy, chunks, namespaces, marked, .. } = self;
        let pinned = namespaces[namespace].as_ref().map_or(0, |registered| registered.pinned);
        if policy.len(namespace) <= pinned {
            return None;
        }
        policy.victim(namespace, looks, &mut |id| chunks.is_evictable(id) && !marked.has(id))
    }

    /// Makes room for the record of one more chunk of this world. Nothing is evicted in vain: each evicted chunk
    /// gives back some of what is missing, and that stays free until the next chunk needs it.
    pub(super) fn make_record(&mut self, world: u32, search: &mut Search, ears: &mut Ears<'_>) -> Record {
        loop {
            let Some(lack) = self.chunks.lack(world) else { return Record::There };
            if self.more_records(lack) {
                continue;
            }
            let namespaces = match lack {
                Lack::Record => u64::MAX,
                Lack::Lines => self.wide_namespaces(),
            };
            if !self.may_evict() || search.no_record {
                return Record::None;
            }
            if self.is_waiting() {
                return Record::Later;
            }
            match self.coldest(namespaces, None) {
                Coldest::Chunk(_, id) if self.chunks.get(id).life() == Life::Visible => {
                    search.refused = 0;
                    self.mark(id, For::Room);
                    let heard = self.decide(ears);
                    search.no_record = !self.decided(heard, search);
                }
                Coldest::Chunk(_, id) => {
                    search.refused = 0;
                    self.evict(id);
                }
                // The refused chunks are behind the others now, so the next step looks at others.
                Coldest::Refused(refused) if self.goes_on(namespaces, refused, search) => {
                    if self.is_spent() {
                        return Record::Later;
                    }
                }
                Coldest::Refused(_) | Coldest::None => {
                    (search.no_record, search.refused) = (true, 0);
                }
            }
        }
    }

    /// Gets memory for more records or lines. False: all that there can be have it, or there is none.
    pub(super) fn more_records(&mut self, lack: Lack) -> bool {
        let Some((ready, more)) = self.chunks.next_run(lack) else { return false };
        let has_memory = self.table.ensure_chunks(ready.0, ready.1);
        if has_memory {
            self.chunks.set_ready(ready);
            self.work += u64::from(more / RECORDS);
        }
        has_memory
    }

    /// The namespaces whose chunks use lines of the wide pool, one bit each.
    fn wide_namespaces(&self) -> u64 {
        let namespaces = (0..).zip(&self.namespaces);
        let wide = namespaces.filter(|(_, n)| n.as_ref().is_some_and(|n| Chunks::is_wide(n.world)));
        wide.fold(0, |bits, (number, _): (u32, _)| bits | 1 << number)
    }

    /// Drops a forming chunk because its room is needed. (A visible one is marked first.)
    pub(super) fn evict(&mut self, id: ChunkId) {
        debug_assert!(self.chunks.is_evictable(id) && self.chunks.get(id).life() == Life::Forming);
        self.counters.evicted += 1;
        self.drop_chunk(id, true);
    }

    /// Drops a chunk: frees its COMMITTED slots and orphans its WRITING ones.
    pub(super) fn drop_chunk(&mut self, id: ChunkId, evicted: bool) {
        let chunk = self.chunks.get(id);
        debug_assert!(!chunk.pins.any());
        self.work += 1;
        match chunk.life() {
            Life::Visible | Life::Forming => self.unlist(id, evicted),
            Life::Hidden => {}
            Life::Free | Life::Expected => {
                debug_assert!(false, "chunk {id} is dropped twice");
                return;
            }
        }
        self.each_slot(id, |cache, slot| match cache.slots.get(slot).state() {
            State::Committed => cache.free_slot(slot),
            State::Writing => cache.orphan(slot),
            State::Free => debug_assert!(false, "slot {slot} of chunk {id} is free"),
        });
        let world = self.world_of(id);
        self.chunks.destroy(id, world);
    }

    /// From now on nothing leads to the chunk: its record ends, and the eviction order loses it; or, if it is forming, the
    /// index and the idle list do.
    pub(super) fn unlist(&mut self, id: ChunkId, evicted: bool) {
        if self.chunks.get(id).life() == Life::Visible {
            self.marked.forget(id);
            self.table.chunks().end(id, self.identity(id));
            if self.policy.has(id) {
                self.policy.remove(id, evicted);
            } else {
                self.unplaced -= 1;
            }
            return;
        }
        if self.chunks.get(id).writing == 0 {
            self.chunks.idle_remove(id);
        }
        self.index.remove(&mut self.chunks, id);
    }

    /// The slot stays WRITING, but belongs to no chunk any more.
    pub(super) fn orphan(&mut self, slot: SlotId) {
        self.slots.orphan(slot);
        let (owner, _) = self.slots.writer(slot);
        self.table.orphaned(slot, self.slots.get(slot).generation(), owner);
    }

    /// Frees a slot: a WRITING one, whose writer has said so or is gone, or a COMMITTED one.
    pub(super) fn free_slot(&mut self, slot: SlotId) {
        if self.slots.get(slot).state() == State::Writing {
            let (owner, _) = self.slots.writer(slot);
            self.charges.of[usize::from(owner)] -= self.slot_bytes(slot);
            self.slabs.idle(slot);
        }
        let generation = self.slots.free(slot);
        self.table.freed(slot, generation);
        self.work += self.slabs.give(slot, &mut self.slots, &mut self.table);
    }

    /// Drops all chunks that are not leased, of one namespace or of all: visible ones and forming ones, whose
    /// writers then find them gone. Begins at chunk `from`. Returns where to go on if what is allowed is spent or the
    /// service has to listen first, and `None` at the end.
    pub fn clear_step(
        &mut self,
        namespace: Option<NamespaceId>,
        from: ChunkId,
        ears: &mut Ears<'_>,
    ) -> Option<ChunkId> {
        if self.is_waiting() {
            return Some(from);
        }
        self.change();
        // Between two steps it may have been forgotten.
        if namespace.is_some_and(|id| self.namespace(id).is_none()) {
            return None;
        }
        let index = namespace.map(namespace_index);
        let (mut id, mut is_room_for_marks) = (from, true);
        while id < self.chunks.fresh && is_room_for_marks && !self.is_spent() {
            self.work += 1;
            let chunk = self.chunks.get(id);
            let is_meant = index.is_none_or(|index| index == chunk.namespace);
            match chunk.life() {
                Life::Visible if is_meant && !chunk.pins.any() => {
                    is_room_for_marks = self.mark(id, For::Clear)
                }
                Life::Forming if is_meant => {
                    self.counters.cleared += 1;
                    self.drop_chunk(id, false);
                }
                // A hidden chunk goes with its last lease.
                _ => {}
            }
            id += 1;
        }
        match self.decide(ears) {
            Heard::All if id == self.chunks.fresh => None,
            Heard::All | Heard::NotYet => Some(id),
            Heard::Never => Some(from),
        }
    }

    /// As [`Cache::clear_step`], all at once, where nobody holds anything that the cache has not been told: O(chunks).
    pub fn clear(&mut self, namespace: Option<NamespaceId>) {
        let allowed = std::mem::replace(&mut self.allowed, u64::MAX);
        let mut from = Some(0);
        while let Some(chunk) = from {
            from = self.clear_step(namespace, chunk, &mut || Heard::All);
        }
        self.allowed = allowed;
    }
}
