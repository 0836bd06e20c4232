//! Making room: free slots, fresh spans, the coldest chunks, and spans of other sizes, in that order. Every search goes on in
//! steps: see `Cache::allow`.

use super::chunk::{Chunks, Lack, Life};
use super::slab::Class;
use super::slot::State;
use super::{Cache, NAMESPACES, NamespaceId, SlotId, SlotTable};
use crate::policy::ChunkId;

/// Chunks that one search for room evicts at most.
const EVICTIONS_MAX: u32 = 64;
/// Free slots that a search aims at: one part in this many of its class, and at most `SPARE_MAX`.
const SPARE_PARTS: u64 = 64;
const SPARE_MAX: u64 = 32;
/// Forming chunks without a writer, and chunks in the order of eviction, that one step of a search for the coldest looks at
/// in each namespace.
const IDLE_LOOK: u32 = 8;
const VICTIM_LOOK: u32 = 16;

/// Slot headers that get their memory, zeroed, in the time that a record takes.
const HEADERS: u32 = 8;

/// What a search for a slot came to.
pub(super) enum Room {
    /// This slot.
    Slot(SlotId),
    /// There is none.
    None,
    /// What is allowed is spent: the search goes on where it stopped.
    Later,
}

/// How far a message's search for room has come: one message looks for room in vain once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Search {
    /// It has looked at everything for a slot, and for a record: who wants for the one may still get the other.
    in_vain: bool,
    no_record: bool,
    /// Chunks that were refused since one was found, and slabs that were looked at.
    refused: u64,
    pub(super) slabs: u32,
    /// The slab to go on with. Its own: other searches look for other sizes.
    pub(super) slab: Option<u32>,
}

/// The same for a chunk's record.
pub(super) enum Record {
    /// There is one.
    There,
    /// There is none.
    None,
    /// As for a slot.
    Later,
}

/// What is the coldest, as far as a step of the search has looked.
enum Coldest {
    /// This chunk, and when it was used last.
    Chunk(u64, ChunkId),
    /// None may go.
    None,
    /// Not found yet: so many more were refused.
    Refused(u32),
}

impl<T: SlotTable> Cache<T> {
    /// A free slot of the class, for which room is made if need be: at least one step of that, whatever is allowed.
    pub(super) fn take_slot(&mut self, class: u16, search: &mut Search) -> Room {
        let mut may_go_on = true;
        while self.slabs.class(class).free == 0 && (search.in_vain || !self.assign(class)) {
            if search.in_vain {
                return Room::None;
            }
            if !may_go_on {
                return Room::Later;
            }
            search.in_vain = !self.make_room(class, search);
            may_go_on = !self.is_spent();
        }
        let Some((slot, fresh)) = self.slabs.take(class, &self.slots) else { return Room::None };
        (search.refused, search.slabs) = (0, 0);
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

    /// Records that it takes about as long as to make sure of the headers of so many slabs.
    pub(super) fn header_records(&self, class: u16, slabs: u32) -> u64 {
        u64::from(self.slabs.slots_in(class, slabs) / HEADERS)
    }

    /// From now on nothing is evicted, or is again: after a restart, until those who hold something have said so.
    pub fn hold_evictions(&mut self, hold: bool) {
        self.evictions_held = hold;
    }

    /// Is nothing to be evicted at the moment?
    pub fn evictions_held(&self) -> bool {
        self.evictions_held
    }

    /// A step of the search for room: evicts until the class has a few free slots, so that the next keys find them. False
    /// where there is nothing more to try.
    fn make_room(&mut self, class: u16, search: &mut Search) -> bool {
        if self.evictions_held {
            return false;
        }
        if self.emptying.is_some() {
            self.go_on_emptying();
            return true;
        }
        let Class { slots, namespaces, .. } = *self.slabs.class(class);
        let spare = (slots / SPARE_PARTS).clamp(1, SPARE_MAX);
        let mut may_steal = true;
        for _ in 0..EVICTIONS_MAX {
            let coldest = match self.coldest(namespaces, Some(class)) {
                Coldest::Chunk(tick, id) => Some((tick, id)),
                Coldest::Refused(refused) if self.goes_on(namespaces, refused, search) => return true,
                Coldest::Refused(_) | Coldest::None => None,
            };
            let may_steal = std::mem::take(&mut may_steal) && self.may_steal(search);
            if may_steal && self.steal(class, coldest.map(|(tick, _)| tick), search) {
                return true;
            }
            let Some((_, id)) = coldest else {
                return self.slabs.class(class).free > 0 || self.may_steal(search);
            };
            self.evict(id);
            // Its span may have become free as a whole, and gone back to the pool.
            if self.slabs.class(class).free == 0 {
                self.assign(class);
            }
            if self.slabs.class(class).free >= spare || self.is_spent() {
                break;
            }
        }
        true
    }

    /// So many more were refused. False where that has been all there are, and none of them may go.
    fn goes_on(&self, namespaces: u64, refused: u32, search: &mut Search) -> bool {
        search.refused += u64::from(refused);
        let all = (0..NAMESPACES).filter(|namespace| namespaces >> namespace & 1 == 1);
        let len = |n| self.policy.len(n) as u64 + u64::from(self.chunks.idle_len(n));
        // Two rounds: who was refused at first may have been let go of meanwhile, and so the other way round.
        search.refused <= 2 * all.map(len).sum::<u64>()
    }

    /// The coldest chunk of these namespaces (bit n: namespace n) that may go. One that forms may have no slot of a class yet:
    /// it goes only where it gives back what is wanted.
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

    /// The first chunk without a writer that may go, and gives back a slot of the class. As a policy's `victim` does, it puts
    /// those that are refused behind the others.
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

    /// Has the chunk a slot of this class?
    fn gives(&mut self, id: ChunkId, class: u16) -> bool {
        let Some(registered) = self.namespace(u32::from(self.chunks.get(id).namespace)) else { return false };
        let world = registered.world;
        let mut ranks = (0..).zip(&registered.layouts[..world as usize]);
        let gives =
            ranks.any(|(rank, layout)| layout.class == class && self.chunks.shard(id, world, rank).is_some());
        self.work += u64::from(world);
        gives
    }

    /// The coldest visible chunk that may go. Where all are leased, looking would take long and find nothing.
    fn visible_victim(&mut self, namespace: usize, looks: &mut u32) -> Option<ChunkId> {
        let Self { policy, chunks, namespaces, .. } = self;
        let pinned = namespaces[namespace].as_ref().map_or(0, |registered| registered.pinned);
        if policy.len(namespace) <= pinned {
            return None;
        }
        policy.victim(namespace, looks, &mut |id| chunks.is_evictable(id))
    }

    /// Makes room for the record of one more chunk of this world. Nothing is evicted in vain: each chunk that goes gives back
    /// some of what is lacking, and what it gives stays until the next one needs it.
    pub(super) fn make_record(&mut self, world: u32, search: &mut Search) -> Record {
        loop {
            let namespaces = match self.chunks.lack(world) {
                None => return Record::There,
                Some(Lack::Record) => u64::MAX,
                Some(Lack::Lines) => self.wide_namespaces(),
            };
            if self.evictions_held || search.no_record {
                return Record::None;
            }
            match self.coldest(namespaces, None) {
                Coldest::Chunk(_, id) => {
                    search.refused = 0;
                    self.evict(id);
                }
                // Those it looked at are behind the others now.
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

    /// The namespaces whose chunks have lines of the wide pool, a bit each.
    fn wide_namespaces(&self) -> u64 {
        let namespaces = (0..).zip(&self.namespaces);
        let wide = namespaces.filter(|(_, n)| n.as_ref().is_some_and(|n| Chunks::is_wide(n.world)));
        wide.fold(0, |bits, (number, _): (u32, _)| bits | 1 << number)
    }

    /// Drops a chunk because room is needed.
    pub(super) fn evict(&mut self, id: ChunkId) {
        debug_assert!(self.chunks.is_evictable(id));
        self.counters.evicted += 1;
        self.drop_chunk(id, true);
    }

    /// Takes a chunk out of everything: its COMMITTED slots are freed, its WRITING ones orphaned.
    pub(super) fn drop_chunk(&mut self, id: ChunkId, evicted: bool) {
        let chunk = self.chunks.get(id);
        debug_assert!(!chunk.pins.any());
        self.work += 1;
        match chunk.life() {
            Life::Visible | Life::Forming => self.unlist(id, evicted),
            Life::Hidden => {}
            Life::Free => {
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

    /// Nothing leads to the chunk any more: no lookup, no order of eviction.
    pub(super) fn unlist(&mut self, id: ChunkId, evicted: bool) {
        let chunk = self.chunks.get(id);
        if chunk.life() == Life::Visible {
            self.policy.remove(id, evicted);
        } else if chunk.writing == 0 {
            self.chunks.idle_remove(id);
        }
        self.index.remove(&mut self.chunks, id);
    }

    /// WRITING stays WRITING, but for no chunk.
    pub(super) fn orphan(&mut self, slot: SlotId) {
        self.slots.orphan(slot);
        let (owner, _) = self.slots.writer(slot);
        self.table.orphaned(slot, self.slots.get(slot).generation(), owner);
    }

    /// WRITING, by its writer's word or death, or COMMITTED → FREE.
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

    /// Drops the chunks that are not leased, of one namespace or of all: visible ones, and rounds that form (whose
    /// writers then find them gone). Looks at chunks from `from` on; answers where to go on when what is allowed is spent,
    /// `None` at the end.
    pub fn clear_step(&mut self, namespace: Option<NamespaceId>, from: ChunkId) -> Option<ChunkId> {
        self.change();
        for id in from..self.chunks.fresh {
            if self.is_spent() {
                return Some(id);
            }
            self.work += 1;
            let chunk = self.chunks.get(id);
            let is_meant = namespace.is_none_or(|namespace| namespace == u32::from(chunk.namespace));
            if is_meant && chunk.life() != Life::Free && !chunk.pins.any() {
                self.drop_chunk(id, false);
            }
        }
        None
    }

    /// As [`Cache::clear_step`], all at once: O(chunks).
    pub fn clear(&mut self, namespace: Option<NamespaceId>) {
        let allowed = std::mem::replace(&mut self.allowed, u64::MAX);
        self.clear_step(namespace, 0);
        self.allowed = allowed;
    }
}
