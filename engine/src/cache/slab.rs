//! Slabs, the spans that classes make of them, and free slots: which bytes of the arena belong to which size of
//! slots.
//!
//! The arena consists of slabs of one size, a power of two from 1 MiB to 1 GiB. A *class* is an exact shard size
//! rounded up to 4 KiB. It takes *spans* of consecutive free slabs that do not cross a 1 GiB boundary, and cuts
//! each into slots. A wholly free span goes back to the pool at once.
//!
//! Slot ids are positional: first slab × (slab bytes / 4096) + i. So they need no allocation, and they are unique
//! whatever class a slab has. The same id may mean other bytes at another time; generations tell these apart.

use core::ops::Range;

use bytemuck::{Pod, Zeroable};

use super::error::{AddSlabError, RegisterError};
use super::slot::Slots;
use super::{PAGE_BYTES, SlotId, SlotTable};
use crate::lazy::{Lazy, NoMemory};

/// The most different shard sizes at one time.
pub(super) const CLASSES_MAX: usize = 256;
/// No span crosses a multiple of this many bytes.
const BOUNDARY_BYTES: u64 = 1 << 30;
/// A span may waste one part in this many; otherwise a longer one is tried.
const WASTE_PARTS: u64 = 16;

mod empty;
mod pool;
mod restore;

use pool::Pool;

/// The state of a slab. Every field but `head` has a meaning only in the first slab of a span. Links are slab + 1.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Span {
    /// The first slab of the span that this slab is in, + 1; 0: it is in none.
    head: u32,
    class: u32,
    /// Slabs.
    pub(super) len: u32,
    /// Bytes of a slot; at most 1 GiB.
    slot_bytes: u32,
    /// How many slots it has.
    pub(super) slots: u32,
    /// How many slots are not free.
    pub(super) used: u32,
    /// Slots from this index on have not been used since the span was assigned.
    pub(super) fresh: u32,
    /// The first free slot before `fresh`: slot id + 1.
    free: u32,
    /// The neighbours in the class's list of spans with a free slot.
    prev: u32,
    next: u32,
    /// How many slots are WRITING or have a pinned chunk. While there are any, the span cannot be taken away.
    pub(super) busy: u32,
    /// 1: the span is being emptied. It gives out no slot, and its class does not count its free slots.
    closed: u32,
    /// The latest access to any of its chunks.
    pub(super) touch: u64,
    _reserved: u64,
}

const _: () = assert!(size_of::<Span>() == 64);

/// One shard size.
#[derive(Clone, Copy)]
pub(super) struct Class {
    /// Bytes of a slot.
    pub(super) bytes: u64,
    /// How many slabs a span has that wastes little.
    pub(super) ideal: u32,
    /// How many slabs one slot needs.
    pub(super) least: u32,
    /// The first span with a free slot, + 1; 0: none.
    partial: u32,
    /// How many slots its spans have.
    pub(super) slots: u64,
    /// How many of them are free.
    pub(super) free: u64,
    /// The namespaces that have shards of this size (bit n: namespace n).
    pub(super) namespaces: u64,
}

impl Class {
    /// Whether no namespace has shards of this size and no span is cut into it: then its place may be given to
    /// another size.
    fn is_unused(&self) -> bool {
        self.namespaces == 0 && self.slots == 0
    }
}

/// The arena's slabs and their division.
pub(super) struct Slabs {
    slab_bytes: u64,
    count: u32,
    /// log2 of the number of 4 KiB slots in a slab.
    shift: u32,
    /// How many slabs lie between two 1 GiB boundaries.
    group: u32,
    spans: Lazy<Span>,
    pool: Pool,
    /// The slabs that are being emptied for another class; the free ones among them are not in the pool.
    closed: Range<u32>,
    /// How many slots of closed spans are free.
    pub(super) closed_free: u64,
    /// How many closed spans have become wholly free so far.
    pub(super) spans_taken: u64,
    /// Bytes of slots that are not free.
    pub(super) bytes_used: u64,
    /// How many slabs were added.
    pub(super) usable: u32,
    classes: Vec<Class>,
}

impl Slabs {
    /// The caller has checked the geometry: see `CacheConfig::check`.
    pub(super) fn new(slab_bytes: u64, count: u32) -> Result<Self, NoMemory> {
        Ok(Self {
            slab_bytes,
            count,
            shift: (slab_bytes / PAGE_BYTES).trailing_zeros(),
            group: (BOUNDARY_BYTES / slab_bytes) as u32,
            spans: Lazy::new(count as usize)?,
            pool: Pool::new(count, (BOUNDARY_BYTES / slab_bytes) as u32)?,
            closed: 0..0,
            closed_free: 0,
            spans_taken: 0,
            bytes_used: 0,
            usable: 0,
            classes: Vec::with_capacity(CLASSES_MAX),
        })
    }

    pub(super) fn count(&self) -> u32 {
        self.count
    }

    pub(super) fn class(&self, class: u16) -> &Class {
        &self.classes[class as usize]
    }

    pub(super) fn classes(&self) -> &[Class] {
        &self.classes
    }

    /// Adds a slab to the pool: it has memory now.
    pub(super) fn add(&mut self, index: u32) -> Result<(), AddSlabError> {
        if index >= self.count {
            return Err(AddSlabError::OutOfRange { index, count: self.count });
        }
        let is_known = self.spans[index as usize].head != 0 || self.closed.contains(&index);
        if self.is_pooled(index) || is_known {
            return Err(AddSlabError::Twice { index });
        }
        self.usable += 1;
        self.pool.put(index..index + 1);
        Ok(())
    }

    /// The class of shards of this many bytes, made if there is none. `namespace`, if given, counts as a user of it
    /// from now on.
    pub(super) fn class_for(
        &mut self,
        shard_bytes: u64,
        namespace: Option<u8>,
    ) -> Result<u16, RegisterError> {
        let longest = self.slab_bytes * u64::from(self.group.min(self.count));
        if shard_bytes == 0 || shard_bytes > longest {
            return Err(RegisterError::ShardBytes { shard_bytes, most: longest });
        }
        let bytes = shard_bytes.next_multiple_of(PAGE_BYTES);
        let class = match self.classes.iter().position(|class| class.bytes == bytes) {
            Some(class) => class,
            None => {
                let new = self.new_class(bytes);
                match self.classes.iter().position(Class::is_unused) {
                    Some(unused) => {
                        self.classes[unused] = new;
                        unused
                    }
                    None if self.classes.len() < CLASSES_MAX => {
                        self.classes.push(new);
                        self.classes.len() - 1
                    }
                    None => {
                        return Err(RegisterError::TooManySizes { shard_bytes, most: CLASSES_MAX as u32 });
                    }
                }
            }
        };
        self.classes[class].namespaces |= namespace.map_or(0, |namespace| 1 << namespace);
        Ok(class as u16)
    }

    /// How many shard sizes are in use.
    pub(super) fn sizes(&self) -> usize {
        self.classes.iter().filter(|class| !class.is_unused()).count()
    }

    /// This namespace uses no size any more.
    pub(super) fn forget(&mut self, namespace: u8) {
        for class in &mut self.classes {
            class.namespaces &= !(1 << namespace);
        }
    }

    /// Chooses the length of the class's spans: the smallest one that wastes at most one part in `WASTE_PARTS`, or
    /// else the least wasteful one.
    fn new_class(&self, bytes: u64) -> Class {
        let least = bytes.div_ceil(self.slab_bytes) as u32;
        let (mut ideal, mut best) = (least, u64::MAX);
        for len in least..=self.group.min(self.count) {
            let span_bytes = self.slab_bytes * u64::from(len);
            let waste = span_bytes % bytes;
            if waste * WASTE_PARTS <= span_bytes {
                ideal = len;
                break;
            }
            // The waste in parts of 2³² of the span. A span has at most 2³⁰ bytes, so it cannot overflow.
            let share = (waste << 32) / span_bytes;
            if share < best {
                (ideal, best) = (len, share);
            }
        }
        Class { bytes, ideal, least, partial: 0, slots: 0, free: 0, namespaces: 0 }
    }

    /// The first slab of the span that a slot is in.
    #[inline(always)]
    pub(super) fn head_of(&self, slot: SlotId) -> Option<u32> {
        self.spans[(slot >> self.shift) as usize].head.checked_sub(1)
    }

    /// The first slab of the span that a slab is in.
    pub(super) fn head_of_slab(&self, slab: u32) -> Option<u32> {
        self.spans[slab as usize].head.checked_sub(1)
    }

    pub(super) fn span(&self, head: u32) -> &Span {
        &self.spans[head as usize]
    }

    pub(super) fn class_of_span(&self, head: u32) -> u16 {
        self.span(head).class as u16
    }

    pub(super) fn first_slot(&self, head: u32) -> SlotId {
        head << self.shift
    }

    /// The first byte of a slot of an assigned span in the arena.
    #[inline(always)]
    pub(super) fn offset(&self, slot: SlotId) -> u64 {
        let head = self.head_of(slot).unwrap_or(0);
        let i = slot - self.first_slot(head);
        u64::from(head) * self.slab_bytes + u64::from(i) * u64::from(self.spans[head as usize].slot_bytes)
    }

    /// Counts a slot as busy: it is WRITING now, or its chunk was pinned.
    pub(super) fn busy(&mut self, slot: SlotId) {
        if let Some(head) = self.head_of(slot) {
            self.spans[head as usize].busy += 1;
        }
    }

    /// The opposite of `busy`.
    pub(super) fn idle(&mut self, slot: SlotId) {
        if let Some(head) = self.head_of(slot) {
            debug_assert_ne!(self.spans[head as usize].busy, 0);
            self.spans[head as usize].busy -= 1;
        }
    }

    /// Notes that the slot's chunk was used.
    pub(super) fn touch(&mut self, slot: SlotId, tick: u64) {
        if let Some(head) = self.head_of(slot) {
            let span = &mut self.spans[head as usize];
            span.touch = span.touch.max(tick);
        }
    }

    /// Takes a free slot from the class's spans. True: it has not been used since the span was assigned.
    pub(super) fn take(&mut self, class: u16, slots: &Slots) -> Option<(SlotId, bool)> {
        let head = self.classes[class as usize].partial.checked_sub(1)?;
        let first = self.first_slot(head);
        let span = &mut self.spans[head as usize];
        let (slot, fresh) = match span.free.checked_sub(1) {
            Some(slot) => {
                span.free = slots.get(slot).next;
                (slot, false)
            }
            None => {
                span.fresh += 1;
                (first + span.fresh - 1, true)
            }
        };
        span.used += 1;
        self.bytes_used += u64::from(span.slot_bytes);
        if span.used == span.slots {
            self.partial_remove(head);
        }
        self.classes[class as usize].free -= 1;
        Some((slot, fresh))
    }

    /// Takes a slot back that is free again. If it was the last one in use, its span goes back to the pool. Returns
    /// how many records that touched.
    pub(super) fn give<T: SlotTable>(&mut self, slot: SlotId, slots: &mut Slots, table: &mut T) -> u64 {
        let Some(head) = self.head_of(slot) else { return 0 };
        let span = &mut self.spans[head as usize];
        slots.set_next(slot, span.free);
        span.free = slot + 1;
        span.used -= 1;
        self.bytes_used -= u64::from(span.slot_bytes);
        let Span { used, slots, class, closed, len, .. } = *span;
        if closed == 1 {
            self.closed_free += 1;
        } else {
            self.classes[class as usize].free += 1;
            if used + 1 == slots {
                self.partial_insert(head);
            }
        }
        if used > 0 {
            return 1;
        }
        self.release(head, table);
        1 + self.records(len)
    }

    /// Making or giving back a span of this many slabs takes about as long as touching this many records: one for
    /// each slab, and some for the group's bits.
    pub(super) fn records(&self, slabs: u32) -> u64 {
        u64::from(slabs + self.group.div_ceil(64))
    }

    /// Gives the class a span from the pool: one of the ideal length, or else the longest shorter one that fits a
    /// shard. Returns its length in slabs, or 0 if there is none or no memory for its headers.
    pub(super) fn assign<T: SlotTable>(&mut self, class: u16, table: &mut T) -> u32 {
        let Class { ideal, least, .. } = self.classes[class as usize];
        let Some(run) = self.pool.find(least, ideal) else { return 0 };
        let (head, len) = (run.start, run.end - run.start);
        if !self.ensure(class, head, len, table) {
            return 0;
        }
        table.span_made(head, len, self.classes[class as usize].bytes);
        self.make_span(class, head, len);
        len
    }

    /// Whether the pool has a run of slabs that the class could use. If it has, `assign` gives 0 for want of memory
    /// for headers.
    pub(super) fn has_run(&self, class: u16) -> bool {
        let Class { ideal, least, .. } = self.classes[class as usize];
        self.pool.find(least, ideal).is_some()
    }

    /// Makes sure that the headers of such a span there have memory; false if there is none.
    pub(super) fn ensure<T: SlotTable>(&self, class: u16, head: u32, len: u32, table: &mut T) -> bool {
        table.ensure(self.first_slot(head), self.slots_in(class, len))
    }

    /// How many slots a span of this many slabs has.
    pub(super) fn slots_in(&self, class: u16, len: u32) -> u32 {
        (self.slab_bytes * u64::from(len) / self.classes[class as usize].bytes) as u32
    }

    /// Makes a span of slabs that are all in the pool.
    fn make_span(&mut self, class: u16, head: u32, len: u32) {
        self.pool.take(head..head + len);
        let slots = self.slots_in(class, len);
        let slot_bytes = self.classes[class as usize].bytes as u32;
        for slab in head..head + len {
            self.spans[slab as usize] = Span { head: head + 1, ..Span::zeroed() };
        }
        self.spans[head as usize] =
            Span { head: head + 1, class: u32::from(class), len, slot_bytes, slots, ..Span::zeroed() };
        self.classes[class as usize].slots += u64::from(slots);
        self.classes[class as usize].free += u64::from(slots);
        self.partial_insert(head);
    }

    fn release<T: SlotTable>(&mut self, head: u32, table: &mut T) {
        let Span { class, len, slots, busy, closed, .. } = *self.span(head);
        debug_assert_eq!(busy, 0);
        table.span_gone(head);
        self.classes[class as usize].slots -= u64::from(slots);
        if closed == 1 {
            self.closed_free -= u64::from(slots);
            self.spans_taken += 1;
        } else {
            self.partial_remove(head);
            self.classes[class as usize].free -= u64::from(slots);
        }
        self.spans[head as usize..(head + len) as usize].fill(Span::zeroed());
        // Slabs that are being emptied do not go to the pool one by one, but all together when they are opened.
        let (before, after) = if self.closed.is_empty() {
            (head..head + len, 0..0)
        } else {
            let Range { start, end } = self.closed;
            (head..(head + len).min(start), head.max(end)..head + len)
        };
        for slabs in [before, after].into_iter().filter(|slabs| !slabs.is_empty()) {
            self.pool.put(slabs);
        }
    }

    fn partial_insert(&mut self, head: u32) {
        let class = self.span(head).class as usize;
        let next = std::mem::replace(&mut self.classes[class].partial, head + 1);
        if let Some(next) = next.checked_sub(1) {
            self.spans[next as usize].prev = head + 1;
        }
        let span = &mut self.spans[head as usize];
        (span.prev, span.next) = (0, next);
    }

    fn partial_remove(&mut self, head: u32) {
        let Span { class, prev, next, .. } = *self.span(head);
        match prev.checked_sub(1) {
            Some(prev) => self.spans[prev as usize].next = next,
            None => self.classes[class as usize].partial = next,
        }
        if let Some(next) = next.checked_sub(1) {
            self.spans[next as usize].prev = prev;
        }
    }

    pub(super) fn is_pooled(&self, slab: u32) -> bool {
        self.pool.has(slab)
    }

    /// How many slabs the pool has.
    pub(super) fn pool_len(&self) -> u32 {
        self.pool.len
    }

    /// The free slots of a span that have been used before.
    pub(super) fn free_list(&self, head: u32, slots: &Slots) -> impl Iterator<Item = SlotId> {
        let mut link = self.span(head).free;
        std::iter::from_fn(move || {
            let slot = link.checked_sub(1)?;
            link = slots.get(slot).next;
            Some(slot)
        })
    }

    /// The spans of a class that have a free slot.
    pub(super) fn partial_list(&self, class: u16) -> impl Iterator<Item = u32> {
        let mut link = self.class(class).partial;
        std::iter::from_fn(move || {
            let head = link.checked_sub(1)?;
            link = self.span(head).next;
            Some(head)
        })
    }

    /// How many slabs lie between two 1 GiB boundaries, which no span crosses.
    pub(super) fn group(&self) -> u32 {
        self.group
    }
}
