//! What clients give back: leases, and slots that they will not complete.

use super::error::CommitError;
use super::lease::LeaseId;
use super::slot::State;
use super::{Cache, Key, OWNERS, Owner, SlotId, SlotTable};

/// The result of an abort.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aborted {
    /// The slot is free, and its chunk's round is dropped.
    Freed,
    /// There was nothing left to abort: the slot is committed, free, or has been given away again.
    Gone,
}

impl<T: SlotTable> Cache<T> {
    /// Handles a writer's message that it will not complete its shard and writes no more. A round in which one rank
    /// has failed is dropped: nothing that the other ranks stored in it is published.
    ///
    /// # Errors
    ///
    /// A message that no honest client sends: see [`CommitError`]. Nothing has changed then.
    pub fn abort(
        &mut self,
        owner: Owner,
        slot: SlotId,
        generation: u64,
        key: Key,
    ) -> Result<Aborted, CommitError> {
        self.change();
        self.work += 1;
        if self.state_of(slot, generation)? != Some(State::Writing) {
            return Ok(Aborted::Gone);
        }
        if !self.slots.is_writer(owner, slot) {
            return Err(CommitError::NotYours { slot, owner });
        }
        if self.slots.get(slot).chunk().is_some_and(|id| self.chunks.get(id).key != key) {
            return Err(CommitError::OtherKey { slot, key });
        }
        self.abort_slot(slot);
        Ok(Aborted::Freed)
    }

    /// Frees a WRITING slot and drops its chunk, if it has one.
    pub(super) fn abort_slot(&mut self, slot: SlotId) {
        if let Some(id) = self.slots.get(slot).chunk() {
            self.drop_chunk(id, false);
        }
        self.free_slot(slot);
    }

    /// Unpins what a lease has beyond its first `keep` chunks; `keep` = 0 ends it. An unknown lease is no error.
    /// False: it stopped because what was allowed is spent; call it again.
    pub fn release(&mut self, owner: Owner, session: u64, admission: u32, keep: u32) -> bool {
        self.change();
        if usize::from(owner) >= OWNERS {
            return true;
        }
        let (lease, _) = self.leases.find(owner, session, admission);
        lease.is_none_or(|id| self.truncate(id, keep))
    }

    /// Ends the leases of all admissions of a session. An unknown session is no error. False: as
    /// [`Cache::release`].
    pub fn end_session(&mut self, owner: Owner, session: u64) -> bool {
        self.change();
        if usize::from(owner) >= OWNERS {
            return true;
        }
        while let Some(id) = self.leases.any_of(owner, session) {
            if !self.truncate(id, 0) {
                return false;
            }
        }
        true
    }

    /// Unpins what a lease has beyond its first `keep` chunks, from its tail on. False: it stopped, and is to be
    /// called again.
    pub(super) fn truncate(&mut self, id: LeaseId, keep: u32) -> bool {
        let owner = self.leases.get(id).owner;
        for _ in keep..self.leases.get(id).len {
            if self.is_spent() {
                return false;
            }
            if let Some(chunk) = self.leases.pop(id) {
                self.unpin(owner, chunk);
            }
        }
        true
    }
}
