//! Emptying slabs of other classes' spans for a class that needs them, over as many turns as it takes.

use super::chunk::Life;
use super::evict::Search;
use super::mark::{Ears, For, Heard};
use super::slab::Class;
use super::{Cache, SlotTable};

/// How many slabs one step looks at in search of some to empty, and how many the search of one message looks at if
/// its class has nothing left to evict.
const LOOK: u32 = 64;
const LOOK_STARVED: u32 = 4096;
/// The most slots in use in spans that are emptied together. It bounds how long the class waits for their slabs.
const SLOTS_MAX: u32 = 1 << 15;

/// Slabs that are being emptied. Meanwhile their spans are closed, so they give out no slot. If a chunk in them is
/// leased meanwhile, it stays, and all of them are opened again.
#[derive(Clone, Copy)]
pub(super) struct Emptying {
    /// The slab with which to go on, and the slot in its span.
    slab: u32,
    slot: u32,
    /// First all chunks are looked at (false), and only then dropped (true). Otherwise a span with one chunk that
    /// must stay would be emptied for nothing.
    drops: bool,
    /// A chunk in them was held or used after it had been marked.
    is_spoilt: bool,
}

impl<T: SlotTable> Cache<T> {
    /// Whether slabs are being emptied.
    pub fn is_emptying(&self) -> bool {
        self.emptying.is_some()
    }

    /// A chunk that is in the way stays, so all of them do.
    pub(super) fn spoil_emptying(&mut self) {
        if let Some(emptying) = &mut self.emptying {
            emptying.is_spoilt = true;
        }
    }

    /// Begins to empty spans of other classes whose chunks are all colder than `colder_than` (`None`: of any age),
    /// so that the class can have their slabs, and does the first piece of it. False: it found none.
    pub(super) fn steal(
        &mut self,
        class: u16,
        colder_than: Option<u64>,
        search: &mut Search,
        ears: &mut Ears<'_>,
    ) -> bool {
        // If there are free slabs, the class has not taken them because there was no memory for their headers; more
        // slabs would not help.
        if self.slabs.has_run(class) {
            search.slabs = u32::MAX;
            return false;
        }
        let Class { ideal, least, .. } = *self.slabs.class(class);
        let from = search.slab.unwrap_or(self.steal_cursor);
        let (mut window, mut passed) = self.find_window(class, from, ideal, colder_than);
        if window.is_none() && least < ideal {
            let other = self.find_window(class, from, least, colder_than);
            (window, passed) = (other.0, passed.min(other.1));
        }
        self.steal_cursor = (from + passed) % self.slabs.count();
        search.slab = Some(self.steal_cursor);
        search.slabs = search.slabs.saturating_add(passed);
        let Some((start, len)) = window else { return false };
        self.work += self.slabs.records(len) + self.header_records(class, len);
        // Nothing is emptied for slots that would have no memory for their headers.
        if !self.slabs.ensure(class, start, len, &mut self.table) {
            search.slabs = u32::MAX;
            return false;
        }
        self.slabs.close(start..start + len);
        self.emptying = Some(Emptying { slab: start, slot: 0, drops: false, is_spoilt: false });
        self.go_on_emptying(ears);
        true
    }

    /// Whether there are slabs left that this message's search has not looked at.
    pub(super) fn may_steal(&self, search: &Search) -> bool {
        search.slabs < self.slabs.count().min(LOOK_STARVED)
    }

    /// Does the next piece of emptying slabs, at least one step, unless the service has to listen first.
    pub fn go_on_emptying(&mut self, ears: &mut Ears<'_>) {
        let Some(mut emptying) = self.emptying else { return };
        if self.is_waiting() {
            return;
        }
        self.change();
        let mut is_over = emptying.is_spoilt;
        let mut is_room_for_marks = true;
        for step in 0_u64.. {
            if is_over || !is_room_for_marks || step > 0 && self.is_spent() {
                break;
            }
            self.work += 1;
            let closed = self.slabs.closed();
            if emptying.slab >= closed.end {
                is_over = emptying.drops;
                if !is_over {
                    emptying = Emptying { slab: closed.start, slot: 0, drops: true, ..emptying };
                }
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
            let id = self.slots.get(first + emptying.slot).chunk().filter(|id| !self.marked.has(*id));
            if let Some(id) = id {
                if !self.chunks.is_evictable(id) {
                    self.spare_all();
                    is_over = true;
                } else if emptying.drops && self.chunks.get(id).life() == Life::Visible {
                    is_room_for_marks = self.mark(id, For::Slabs);
                } else if emptying.drops {
                    // The span goes back to the pool with its last slot.
                    self.evict(id);
                }
            }
            emptying.slot += 1;
        }
        self.emptying = Some(emptying);
        match self.decide(ears) {
            Heard::NotYet => return,
            Heard::Never => is_over = true,
            Heard::All => {}
        }
        if is_over {
            self.emptying = None;
            self.work += self.slabs.records(self.slabs.closed().len() as u32);
            self.slabs.open();
        }
    }

    /// Searches, from slab `from` on, for the coldest run of `len` slabs that are free or in idle spans of other
    /// classes, colder than `colder_than`. Also returns how many slabs from there on need no second look: no such
    /// run begins at them, or its run has been looked at.
    fn find_window(
        &mut self,
        class: u16,
        from: u32,
        len: u32,
        colder_than: Option<u64>,
    ) -> (Option<(u32, u32)>, u32) {
        let count = self.slabs.count();
        let mut best: Option<(u64, u32)> = None;
        let (mut passed, mut seen) = (0, 0);
        while passed < LOOK.min(count) && seen < LOOK {
            let start = (from + passed) % count;
            let window = self.window(class, start, len, colder_than);
            seen += window.seen;
            passed += window.passed;
            if let Some(touch) = window.touch.filter(|touch| best.is_none_or(|(other, _)| *touch < other)) {
                best = Some((touch, start));
            }
        }
        self.work += u64::from(seen);
        (best.map(|(_, start)| (start, len)), passed)
    }

    /// Looks at one run of slabs.
    fn window(&self, class: u16, start: u32, len: u32, colder_than: Option<u64>) -> Window {
        let slabs = &self.slabs;
        if start + len > slabs.count() || start % slabs.group() + len > slabs.group() {
            return Window { touch: None, seen: 1, passed: 1 };
        }
        let (mut latest, mut used) = (0, 0);
        for slab in start..start + len {
            let seen = slab - start + 1;
            if slabs.is_pooled(slab) {
                continue;
            }
            // No run that contains this slab can be emptied.
            let refused = Window { touch: None, seen, passed: seen };
            let Some(head) = slabs.head_of_slab(slab) else { return refused };
            let span = slabs.span(head);
            let is_warm = colder_than.is_some_and(|limit| span.touch >= limit);
            if slabs.class_of_span(head) == class || span.busy > 0 || is_warm {
                return refused;
            }
            if slab == head || slab == start {
                used += span.used;
            }
            if used > SLOTS_MAX {
                return Window { passed: 1, ..refused };
            }
            latest = latest.max(span.touch);
        }
        Window { touch: Some(latest), seen: len, passed: 1 }
    }
}

/// The result of a look at one run of slabs.
#[derive(Clone, Copy)]
struct Window {
    /// The latest access to any of its chunks, if all of the run may be emptied.
    touch: Option<u64>,
    /// How many slabs were looked at.
    seen: u32,
    /// How many slabs, from the first one on, the search need not look at again as the beginning of a run.
    passed: u32,
}
