//! Making room: free slots, fresh spans, the coldest chunks, and spans of other sizes, in that order.

use super::chunk::{Chunks, LINES_MAX, Lack, Life};
use super::slab::Class;
use super::slot::State;
use super::{Cache, NamespaceId, SlotId, SlotTable};
use crate::policy::ChunkId;

/// Chunks that one search for room evicts at most.
const EVICTIONS_MAX: u32 = 64;
/// Free slots that a search aims at: one part in this many of its class, and at most `SPARE_MAX`.
const SPARE_PARTS: u64 = 64;
const SPARE_MAX: u64 = 32;
/// Forming chunks without a writer that are looked at for one that may go.
const IDLE_LOOK: usize = 8;
/// Slabs that are looked at for a span to take from another class: where this class could evict as well, and
/// where it has nothing left to evict.
const STEAL_LOOK: u32 = 64;
const STEAL_LOOK_STARVED: u32 = 4096;
/// Slots in use of spans that are taken at once: bounds the time that this takes.
const STEAL_SLOTS_MAX: u32 = 1 << 15;

impl<T: SlotTable> Cache<T> {
    /// A free slot of the class, for which room is made if need be. With `starved`, which is set when that failed,
    /// nothing is tried: one message looks for room in vain once.
    pub(super) fn take_slot(&mut self, class: u16, starved: &mut bool) -> Option<SlotId> {
        if self.slabs.class(class).free == 0 && !self.assign(class) && (*starved || !self.make_room(class)) {
            *starved = true;
            return None;
        }
        let (slot, fresh) = self.slabs.take(class, &self.slots)?;
        if fresh {
            self.slots.raise_generation(slot, self.table.generation(slot));
        }
        Some(slot)
    }

    fn assign(&mut self, class: u16) -> bool {
        self.slabs.assign(class, &mut self.table)
    }

    /// From now on nothing is evicted, or is again: after a restart, until those who hold something have said so.
    pub fn hold_evictions(&mut self, hold: bool) {
        self.evictions_held = hold;
    }

    /// Is nothing to be evicted at the moment?
    pub fn evictions_held(&self) -> bool {
        self.evictions_held
    }

    /// Evicts until the class has a few free slots, so that the next keys find them; true if there is one.
    fn make_room(&mut self, class: u16) -> bool {
        if self.evictions_held {
            return false;
        }
        let Class { slots, namespaces, .. } = *self.slabs.class(class);
        let spare = (slots / SPARE_PARTS).clamp(1, SPARE_MAX);
        let mut may_steal = true;
        for _ in 0..EVICTIONS_MAX {
            let coldest = self.coldest(namespaces, Some(class));
            if may_steal {
                may_steal = false;
                if self.steal(class, coldest.map(|(tick, _)| tick)) {
                    if self.assign(class) {
                        return true;
                    }
                    // The coldest one may have gone with the span.
                    continue;
                }
            }
            let Some((_, id)) = coldest else { break };
            self.evict(id);
            // Its span may have become free as a whole, and gone back to the pool.
            if self.slabs.class(class).free == 0 {
                self.assign(class);
            }
            if self.slabs.class(class).free >= spare {
                break;
            }
        }
        self.slabs.class(class).free > 0
    }

    /// The coldest chunk of these namespaces (bit n: namespace n) that may go, and when it was used last. One that forms
    /// may have no slot of a class yet: it goes only where it gives back what is wanted.
    fn coldest(&mut self, namespaces: u64, class: Option<u16>) -> Option<(u64, ChunkId)> {
        let mut coldest: Option<(u64, ChunkId)> = None;
        let mut left = namespaces;
        while left != 0 {
            let namespace = left.trailing_zeros() as usize;
            left &= left - 1;
            let Some(registered) = &self.namespaces[namespace] else { continue };
            let chunks = &self.chunks;
            let gives = |id| {
                class.is_none_or(|class| {
                    let mut ranks = (0..).zip(&registered.layouts[..registered.world as usize]);
                    ranks.any(|(rank, layout)| {
                        layout.class == class && chunks.shard(id, registered.world, rank).is_some()
                    })
                })
            };
            let mut idle = chunks.idle(namespace).take(IDLE_LOOK);
            let idle = idle.find(|id| chunks.is_evictable(*id) && gives(*id));
            // Where all are leased, looking would take long and find nothing.
            let all_pinned = self.policy.len(namespace) <= registered.pinned;
            let visible = match all_pinned {
                true => None,
                false => {
                    self.policy.victim(namespace, &mut u32::MAX.clone(), &mut |id| chunks.is_evictable(id))
                }
            };
            for id in idle.into_iter().chain(visible) {
                let tick = chunks.get(id).tick;
                if coldest.is_none_or(|(other, _)| tick < other) {
                    coldest = Some((tick, id));
                }
            }
        }
        coldest
    }

    /// Makes room for the record of one more chunk of this world; false where there is none, and nothing was evicted in
    /// vain: each chunk that goes gives back some of what is lacking, and what it gives stays until the next one needs it.
    pub(super) fn make_record(&mut self, world: u32) -> bool {
        for _ in 0..=LINES_MAX {
            let namespaces = match self.chunks.lack(world) {
                None => return true,
                Some(Lack::Record) => u64::MAX,
                Some(Lack::Lines) => self.wide_namespaces(),
            };
            if self.evictions_held {
                return false;
            }
            let Some((_, coldest)) = self.coldest(namespaces, None) else { return false };
            self.evict(coldest);
        }
        false
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
        self.slabs.give(slot, &mut self.slots, &mut self.table);
    }

    /// Empties spans of other classes whose chunks are all colder than `colder_than` (`None`: any), so that the
    /// class can have their slabs.
    fn steal(&mut self, class: u16, colder_than: Option<u64>) -> bool {
        let Class { ideal, least, .. } = *self.slabs.class(class);
        let window = self.find_window(class, ideal, colder_than);
        let window =
            window.or_else(|| if least < ideal { self.find_window(class, least, colder_than) } else { None });
        let Some((start, len)) = window else { return false };
        // First look, then drop: a span with one chunk that must stay would be emptied for nothing.
        let may_go = |cache: &Self, slot| match cache.slots.get(slot).chunk() {
            Some(id) => cache.chunks.is_evictable(id),
            None => true,
        };
        let slots = |cache: &Self, head| {
            let first = cache.slabs.first_slot(head);
            first..first + cache.slabs.span(head).fresh
        };
        let heads = |cache: &Self, slab: u32| cache.slabs.head_of_slab(slab);
        for slab in start..start + len {
            if let Some(head) = heads(self, slab)
                && !slots(self, head).all(|slot| may_go(self, slot))
            {
                return false;
            }
        }
        for slab in start..start + len {
            if let Some(head) = heads(self, slab) {
                self.counters.spans_taken += 1;
                for slot in slots(self, head) {
                    if let Some(id) = self.slots.get(slot).chunk() {
                        self.evict(id);
                    }
                }
            }
        }
        true
    }

    /// The coldest run of slabs that are free or of other classes' spans, none of which is busy.
    fn find_window(&mut self, class: u16, len: u32, colder_than: Option<u64>) -> Option<(u32, u32)> {
        let count = self.slabs.count();
        let mut look = if colder_than.is_some() { STEAL_LOOK } else { STEAL_LOOK_STARVED };
        let mut best: Option<(u64, u32)> = None;
        let mut start = self.steal_cursor % count;
        for _ in 0..look.min(count) {
            let (touch, seen) = self.window_touch(class, start, len);
            if let Some(touch) = touch.filter(|touch| colder_than.is_none_or(|limit| *touch < limit))
                && best.is_none_or(|(other, _)| touch < other)
            {
                best = Some((touch, start));
            }
            start = (start + 1) % count;
            look = look.saturating_sub(seen);
            if look == 0 {
                break;
            }
        }
        self.steal_cursor = start;
        best.map(|(_, start)| (start, len))
    }

    /// The latest access to any chunk in these slabs, if all of them may be emptied; and how many were looked at.
    fn window_touch(&self, class: u16, start: u32, len: u32) -> (Option<u64>, u32) {
        let slabs = &self.slabs;
        if start + len > slabs.count() || start % slabs.group() + len > slabs.group() {
            return (None, 1);
        }
        let (mut latest, mut used) = (0, 0);
        for slab in start..start + len {
            let seen = slab - start + 1;
            if slabs.is_pooled(slab) {
                continue;
            }
            let Some(head) = slabs.head_of_slab(slab) else { return (None, seen) };
            let span = slabs.span(head);
            if slabs.class_of_span(head) == class || span.busy > 0 {
                return (None, seen);
            }
            if slab == head || slab == start {
                used += span.used;
            }
            if used > STEAL_SLOTS_MAX {
                return (None, seen);
            }
            latest = latest.max(span.touch);
        }
        (Some(latest), len)
    }

    /// Drops the chunks that are not leased, of one namespace or of all: visible ones, and rounds that form (whose
    /// writers then find them gone). Looks at `budget` chunks from `from` on; answers where to go on, `None` at the end.
    pub fn clear_step(
        &mut self,
        namespace: Option<NamespaceId>,
        from: ChunkId,
        budget: u32,
    ) -> Option<ChunkId> {
        self.change();
        let end = self.chunks.fresh.min(from.saturating_add(budget));
        for id in from..end {
            let chunk = self.chunks.get(id);
            let is_meant = namespace.is_none_or(|namespace| namespace == u32::from(chunk.namespace));
            if is_meant && chunk.life() != Life::Free && !chunk.pins.any() {
                self.drop_chunk(id, false);
            }
        }
        (end < self.chunks.fresh).then_some(end)
    }

    /// As [`Cache::clear_step`], all at once: O(chunks).
    pub fn clear(&mut self, namespace: Option<NamespaceId>) {
        self.clear_step(namespace, 0, u32::MAX);
    }
}
