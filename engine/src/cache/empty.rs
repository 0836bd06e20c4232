//! Slabs of other classes' spans, emptied for a class that needs them: over as many turns as it takes.

use super::evict::Search;
use super::slab::Class;
use super::{Cache, SlotTable};

/// Slabs that one step looks at for those that may be emptied; and that one message's search looks at where its class has
/// nothing left to evict.
const LOOK: u32 = 64;
const LOOK_STARVED: u32 = 4096;
/// Slots in use of spans that are emptied together: bounds how long it takes until a class has them.
const SLOTS_MAX: u32 = 1 << 15;

/// Slabs that are being emptied. Their spans are closed meanwhile, so nothing new comes into them; what is leased in the
/// meantime stays, and all of it is opened again.
#[derive(Clone, Copy)]
pub(super) struct Emptying {
    /// The slab to go on with, and the slot of its span.
    slab: u32,
    slot: u32,
    /// First look, then drop: a span with one chunk that must stay would be emptied for nothing.
    drops: bool,
}

impl<T: SlotTable> Cache<T> {
    /// Are slabs being emptied?
    pub fn is_emptying(&self) -> bool {
        self.emptying.is_some()
    }

    /// Begins to empty spans of other classes whose chunks are all colder than `colder_than` (`None`: any), so that the
    /// class can have their slabs, and does a first piece of it. False where none were found.
    pub(super) fn steal(&mut self, class: u16, colder_than: Option<u64>, search: &mut Search) -> bool {
        // Where there are slabs, it is for want of headers that the class has none of them: more would not help.
        if self.slabs.has_run(class) {
            search.slabs = u32::MAX;
            return false;
        }
        let Class { ideal, least, .. } = *self.slabs.class(class);
        search.slabs = search.slabs.saturating_add(LOOK);
        let window = self.find_window(class, ideal, colder_than);
        let window =
            window.or_else(|| if least < ideal { self.find_window(class, least, colder_than) } else { None });
        let Some((start, len)) = window else { return false };
        // Nothing is emptied for slots whose headers would have no memory.
        if !self.slabs.ensure(class, start, len, &mut self.table) {
            search.slabs = u32::MAX;
            return false;
        }
        self.slabs.close(start..start + len);
        self.emptying = Some(Emptying { slab: start, slot: 0, drops: false });
        self.go_on_emptying();
        true
    }

    /// Are there slabs that the search of this message has not looked at?
    pub(super) fn may_steal(&self, search: &Search) -> bool {
        search.slabs < self.slabs.count().min(LOOK_STARVED)
    }

    /// The next piece of emptying slabs: at least one step.
    pub fn go_on_emptying(&mut self) {
        let Some(mut emptying) = self.emptying else { return };
        self.change();
        for step in 0_u64.. {
            if step > 0 && self.is_spent() {
                self.emptying = Some(emptying);
                return;
            }
            self.work += 1;
            let closed = self.slabs.closed();
            if emptying.slab >= closed.end {
                if emptying.drops {
                    break;
                }
                emptying = Emptying { slab: closed.start, slot: 0, drops: true };
                self.counters.spans_taken += self.slabs.spans_of(closed).count() as u64;
                continue;
            }
            let Some(head) = self.slabs.head_of_slab(emptying.slab) else {
                emptying = Emptying { slab: emptying.slab + 1, slot: 0, ..emptying };
                continue;
            };
            let (first, span) = (self.slabs.first_slot(head), *self.slabs.span(head));
            if emptying.slot >= span.fresh {
                emptying = Emptying { slab: head + span.len, slot: 0, ..emptying };
                continue;
            }
            if let Some(id) = self.slots.get(first + emptying.slot).chunk() {
                if !self.chunks.is_evictable(id) {
                    break;
                }
                if emptying.drops {
                    // The span is gone with its last slot.
                    self.evict(id);
                }
            }
            emptying.slot += 1;
        }
        self.emptying = None;
        self.slabs.open();
    }

    /// The coldest run of slabs that are free or of other classes' spans, none of which is busy.
    fn find_window(&mut self, class: u16, len: u32, colder_than: Option<u64>) -> Option<(u32, u32)> {
        let count = self.slabs.count();
        let mut look = LOOK;
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
            self.work += u64::from(seen);
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
            if used > SLOTS_MAX {
                return (None, seen);
            }
            latest = latest.max(span.touch);
        }
        (Some(latest), len)
    }
}
