//! Restoring spans as an earlier engine left them.

use super::super::slot::Slots;
use super::super::{PAGE_BYTES, SlotId, SlotTable};
use super::Slabs;

impl Slabs {
    /// Makes a span that an earlier engine had, by its first slab, its length in slabs and its slot size. False:
    /// this arena cannot have such a span, or it overlaps another one.
    pub(in crate::cache) fn restore_span(&mut self, head: u32, len: u32, slot_bytes: u64) -> bool {
        let group_end = (head - head % self.group).saturating_add(self.group).min(self.count);
        let is_inside = len > 0 && head.checked_add(len).is_some_and(|end| end <= group_end);
        if !is_inside || !slot_bytes.is_multiple_of(PAGE_BYTES) {
            return false;
        }
        let Ok(class) = self.class_for(slot_bytes, None) else { return false };
        if len < self.classes[class as usize].least || !(head..head + len).all(|slab| self.is_pooled(slab)) {
            return false;
        }
        self.make_span(class, head, len);
        true
    }

    /// Takes a slot of a restored span that was in use. Slots must come in ascending order. False: no span has this
    /// slot at `offset` for a shard of `length` bytes, or a later slot was restored before.
    pub(in crate::cache) fn restore<T: SlotTable>(
        &mut self,
        slot: SlotId,
        offset: u64,
        length: u64,
        slots: &mut Slots,
        table: &T,
    ) -> bool {
        let Some(head) = self.head_of(slot) else { return false };
        let span = *self.span(head);
        let i = slot - self.first_slot(head);
        let is_size = length > 0 && length <= u64::from(span.slot_bytes);
        if !is_size || i >= span.slots || i < span.fresh || self.offset(slot) != offset {
            return false;
        }
        // The slots in between were free.
        for i in span.fresh..i {
            let skipped = self.first_slot(head) + i;
            let free = std::mem::replace(&mut self.spans[head as usize].free, skipped + 1);
            slots.raise_generation(skipped, table.generation(skipped));
            slots.set_next(skipped, free);
        }
        let span = &mut self.spans[head as usize];
        span.fresh = i + 1;
        span.used += 1;
        self.bytes_used += u64::from(span.slot_bytes);
        let (is_full, class) = (span.used == span.slots, span.class);
        if is_full {
            self.partial_remove(head);
        }
        self.classes[class as usize].free -= 1;
        true
    }

    /// Gives back the restored spans of which no slot was in use.
    pub(in crate::cache) fn release_unused<T: SlotTable>(&mut self, table: &mut T) {
        for head in 0..self.count {
            if self.head_of_slab(head) == Some(head) && self.span(head).used == 0 {
                self.release(head, table);
            }
        }
    }
}
