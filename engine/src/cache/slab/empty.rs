//! Closing slabs while they are being emptied for another class, and opening them again.

use core::ops::Range;

use super::Slabs;

impl Slabs {
    /// Closes slabs of one group, each of which is free or in a span, because they are to be emptied: their spans
    /// give out no slot any more, and slabs of them that are free, or become free, are not in the pool.
    pub(in crate::cache) fn close(&mut self, slabs: Range<u32>) {
        debug_assert!(self.closed.is_empty());
        let mut at = slabs.start;
        while at < slabs.end {
            at = match self.head_of_slab(at) {
                Some(head) => {
                    self.close_span(head, true);
                    head + self.span(head).len
                }
                None => {
                    let run = (at..slabs.end).take_while(|slab| self.is_pooled(*slab)).count() as u32;
                    debug_assert_ne!(run, 0, "slab {at} is neither free nor in a span");
                    self.pool.take(at..at + run);
                    at + run.max(1)
                }
            };
        }
        self.closed = slabs;
    }

    /// The closed slabs; an empty range if there are none.
    pub(in crate::cache) fn closed(&self) -> Range<u32> {
        self.closed.clone()
    }

    /// Opens the closed slabs: the free ones go to the pool, and spans that are left give out slots again.
    pub(in crate::cache) fn open(&mut self) {
        let slabs = std::mem::take(&mut self.closed);
        let mut at = slabs.start;
        while at < slabs.end {
            at = match self.head_of_slab(at) {
                Some(head) => {
                    self.close_span(head, false);
                    head + self.span(head).len
                }
                None => {
                    let run = (at..slabs.end).take_while(|slab| self.head_of_slab(*slab).is_none());
                    let end = at + run.count() as u32;
                    self.pool.put(at..end);
                    end
                }
            };
        }
    }

    fn close_span(&mut self, head: u32, close: bool) {
        let span = &mut self.spans[head as usize];
        let (class, free) = (span.class as usize, u64::from(span.slots - span.used));
        span.closed = u32::from(close);
        if close {
            self.classes[class].free -= free;
            self.closed_free += free;
        } else {
            self.classes[class].free += free;
            self.closed_free -= free;
        }
        if free > 0 {
            if close { self.partial_remove(head) } else { self.partial_insert(head) }
        }
    }
}
