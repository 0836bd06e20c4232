//! Spans as an earlier life of the engine left them, found again from the slots that were in use.

use super::super::slot::Slots;
use super::super::{SlotId, SlotTable};
use super::{Class, Slabs};

impl Slabs {
    /// Puts a slot that an earlier life left in use back into a span of its class, which is made if need be.
    /// False: no span of the class has this slot at `offset`, or a later slot was restored before.
    pub(in crate::cache) fn restore<T: SlotTable>(
        &mut self,
        class: u16,
        slot: SlotId,
        offset: u64,
        slots: &mut Slots,
        table: &mut T,
    ) -> bool {
        let ensure = |first, count| table.ensure(first, count);
        if !self.restore_span(class, slot, offset, ensure) || self.offset(slot) != offset {
            return false;
        }
        let Some(head) = self.head_of(slot) else { return false };
        let i = slot - self.first_slot(head);
        if self.class_of_span(head) != class || i >= self.span(head).slots || i < self.span(head).fresh {
            return false;
        }
        // Those that are skipped were free.
        for i in self.span(head).fresh..i {
            let skipped = self.first_slot(head) + i;
            let free = std::mem::replace(&mut self.spans[head as usize].free, skipped + 1);
            slots.raise_generation(skipped, table.generation(skipped));
            slots.set_next(skipped, free);
        }
        let span = &mut self.spans[head as usize];
        span.fresh = i + 1;
        span.used += 1;
        if span.used == span.slots {
            self.partial_remove(head);
        }
        self.classes[class as usize].free -= 1;
        true
    }

    /// Finds the span's first slab from slot id and offset: id = first × 2^shift + i, offset = first × slab + i × class.
    fn restore_span(
        &mut self,
        class: u16,
        slot: SlotId,
        offset: u64,
        ensure: impl FnOnce(SlotId, u32) -> bool,
    ) -> bool {
        let Class { bytes, ideal, least, .. } = self.classes[class as usize];
        let place = slot >> self.shift;
        if self.head_of_slab(place).is_some() {
            return true;
        }
        // A span is at most `ideal` slabs, so its first is one of the last `ideal`.
        let earliest = place.saturating_sub(ideal - 1).max(place - place % self.group);
        let fits = |head: &u32| {
            u64::from(*head) * self.slab_bytes + u64::from(slot - self.first_slot(*head)) * bytes == offset
        };
        let Some(head) = (earliest..=place).rev().find(fits) else { return false };
        let boundary = (head - head % self.group + self.group).min(self.count);
        let len = (head..boundary.min(head + ideal)).take_while(|slab| self.is_pooled(*slab)).count() as u32;
        if len < least || slot - self.first_slot(head) >= self.slots_in(class, len) {
            return false;
        }
        if !ensure(self.first_slot(head), self.slots_in(class, len)) {
            return false;
        }
        for slab in head..head + len {
            self.pool_remove(slab);
        }
        self.make_span(class, head, len);
        true
    }
}
