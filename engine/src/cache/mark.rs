//! Eviction in two halves. Schedulers find chunks by themselves and say so afterwards, so before a visible chunk is dropped its
//! record is *marked*: no lookup finds it from then on. Then the engine listens to what schedulers have said until then, and
//! only after that it decides: what is held by now, or was used, is spared, and the rest is dropped. See
//! [`kvring_shm_abi::lookup`] for the reason why this is enough.
//!
//! Usually no scheduler has said anything that the engine has not heard, and all of this happens within one call of the cache.
//! If somebody has, the chunks stay marked until the service has listened ([`Cache::heard`]); meanwhile the cache marks no
//! others, and whoever needs room waits.

use super::chunk::Life;
use super::{Cache, SlotTable};
use crate::policy::ChunkId;

/// The most chunks that are marked at one time.
const MARKED_MAX: usize = 64;

/// Whether the engine has heard everything that schedulers had said when it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// It has, and has done all of it: while a hold is only partly done, not everything has been heard. A repeated hold takes
    /// its lease apart first, so chunks that the client holds all the time have no pin for a while.
    All,
    /// It has not: it has to read their rings first.
    NotYet,
    /// A scheduler holds something that it cannot say now. Nothing may be dropped.
    Never,
}

/// Asked after chunks were marked. It begins with the fence of [`kvring_shm_abi::lookup`].
pub type Ears<'a> = dyn FnMut() -> Heard + 'a;

/// For whom chunks are marked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum For {
    /// For a reservation that needs room.
    #[default]
    Room,
    /// For slabs that another size needs: if one chunk stays, all do.
    Slabs,
    /// For a clear.
    Clear,
}

/// The chunks that are marked.
#[derive(Default)]
pub(super) struct Marked {
    chunks: Vec<ChunkId>,
    purpose: For,
    /// Counts the times that chunks were marked when none was.
    batch: u64,
    /// Everything that had been said has been heard; what is left is being dropped.
    is_heard: bool,
    /// Records that will be touched when the marked chunks are dropped.
    to_come: u64,
}

impl Marked {
    pub(super) fn new() -> Marked {
        Marked { chunks: Vec::with_capacity(MARKED_MAX), ..Marked::default() }
    }

    /// Whether this chunk is marked.
    #[inline]
    pub(super) fn has(&self, id: ChunkId) -> bool {
        !self.chunks.is_empty() && self.chunks.contains(&id)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// How many chunks are marked.
    pub(super) fn len(&self) -> u64 {
        self.chunks.len() as u64
    }

    /// Forgets a mark; the caller decides what becomes of the chunk.
    pub(super) fn forget(&mut self, id: ChunkId) -> bool {
        let at = if self.chunks.is_empty() { None } else { self.chunks.iter().position(|one| *one == id) };
        at.map(|at| self.chunks.swap_remove(at)).is_some()
    }

    /// Puts a chunk on the list, whether it is marked or not: for tests of the self-check.
    #[cfg(test)]
    pub(super) fn remember(&mut self, id: ChunkId) {
        self.chunks.push(id);
    }
}

impl<T: SlotTable> Cache<T> {
    /// Whether chunks are marked about which nothing can be decided before the service has listened.
    pub fn is_waiting(&self) -> bool {
        !self.marked.is_empty()
    }

    /// Whether the service has listened, and marked chunks are left to be dropped: see [`Cache::go_on_dropping`].
    pub fn is_dropping(&self) -> bool {
        self.marked.is_heard && self.is_waiting()
    }

    /// The number of the batch of marked chunks for which the service has to listen, if there is one.
    pub fn awaits(&self) -> Option<u64> {
        (self.is_waiting() && !self.marked.is_heard).then_some(self.marked.batch)
    }

    /// The service has heard everything that schedulers had said when the chunks of this batch were marked. Another one may be
    /// marked by now: all chunks of an earlier one were spared meanwhile.
    pub fn heard(&mut self, batch: u64) {
        self.marked.is_heard |= self.marked.batch == batch;
    }

    /// Drops marked chunks, after [`Cache::heard`], until what is allowed is spent.
    pub fn go_on_dropping(&mut self) {
        self.change();
        while let Some(id) = self.marked.chunks.last().copied() {
            let purpose = self.marked.purpose;
            debug_assert!(!self.chunks.get(id).pins.any(), "a chunk that is held is spared");
            match purpose {
                For::Room | For::Slabs => self.counters.evicted += 1,
                For::Clear => self.counters.cleared += 1,
            }
            // This also takes it off the list.
            self.drop_chunk(id, purpose != For::Clear);
            if self.is_spent() {
                return;
            }
        }
    }

    /// Marks a visible chunk. False: no more can be marked now.
    pub(super) fn mark(&mut self, id: ChunkId, purpose: For) -> bool {
        debug_assert!(self.chunks.get(id).life() == Life::Visible && !self.marked.has(id));
        if self.marked.chunks.is_empty() {
            let (chunks, batch) = (std::mem::take(&mut self.marked.chunks), self.marked.batch + 1);
            self.marked = Marked { chunks, purpose, batch, ..Marked::default() };
        }
        debug_assert!(self.marked.purpose == purpose && !self.marked.is_heard);
        self.table.chunks().mark(id);
        self.marked.chunks.push(id);
        self.marked.to_come += self.records_of_drop(id);
        self.marked.chunks.len() < MARKED_MAX && self.work + self.marked.to_come < self.allowed
    }

    /// How many records dropping this chunk touches: itself, and each of its slots when it is looked at and when it goes back.
    /// A span goes back with the last of its slots; the slots that are in use share that.
    fn records_of_drop(&self, id: ChunkId) -> u64 {
        let world = self.world_of(id);
        let spans = (0..world).filter_map(|rank| {
            let head = self.slabs.head_of(self.chunks.shard(id, world, rank)?)?;
            let span = self.slabs.span(head);
            Some(self.slabs.records(span.len).div_ceil(u64::from(span.used.max(1))))
        });
        1 + 2 * u64::from(world) + spans.sum::<u64>()
    }

    /// After chunks were marked: drops them if everything that was said has been heard.
    pub(super) fn decide(&mut self, ears: &mut Ears<'_>) -> Heard {
        if self.marked.is_empty() {
            return Heard::All;
        }
        let heard = ears();
        match heard {
            Heard::All => {
                self.marked.is_heard = true;
                // What it touches has been allowed for.
                let allowed = std::mem::replace(&mut self.allowed, u64::MAX);
                self.go_on_dropping();
                self.allowed = allowed;
            }
            Heard::NotYet => {}
            Heard::Never => self.spare_all(),
        }
        heard
    }

    /// A chunk is held or used: if it is marked, it stays. If slabs are being emptied, so do all others that are marked.
    #[inline]
    pub(super) fn spare(&mut self, id: ChunkId) {
        if !self.marked.has(id) {
            return;
        }
        if self.marked.purpose == For::Slabs {
            return self.spare_all();
        }
        self.marked.forget(id);
        self.table.chunks().spare(id);
    }

    /// All chunks that are marked stay.
    pub fn spare_all(&mut self) {
        self.change();
        let purpose = self.marked.purpose;
        if purpose == For::Slabs && self.is_waiting() {
            self.spoil_emptying();
        }
        while let Some(id) = self.marked.chunks.pop() {
            self.table.chunks().spare(id);
            // The search for the coldest has passed them by as if they were in use. The coldest was marked first.
            if purpose == For::Room && self.policy.has(id) {
                self.policy.put_back(id);
            }
        }
    }
}
