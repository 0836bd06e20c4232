//! What clients give back: leases, and the slots that they were writing.

use super::error::CommitError;
use super::lease::LeaseId;
use super::slot::State;
use super::{Cache, Key, OWNERS, Owner, SlotId, SlotTable};

/// What an abort came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aborted {
    /// The slot is free, and its chunk's round is dropped.
    Freed,
    /// It was not this client's to abort any longer: committed, free, or somebody else's.
    Gone,
}

impl<T: SlotTable> Cache<T> {
    /// A writer's word that it will not complete its shard, and writes no more. A round that a rank has failed is
    /// dropped: nothing that the others computed in it is published.
    ///
    /// # Errors
    ///
    /// What no honest client sends: see [`CommitError`]. Then nothing has changed.
    pub fn abort(
        &mut self,
        owner: Owner,
        slot: SlotId,
        generation: u64,
        key: Key,
    ) -> Result<Aborted, CommitError> {
        self.change();
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
    fn abort_slot(&mut self, slot: SlotId) {
        if let Some(id) = self.slots.get(slot).chunk() {
            self.drop_chunk(id, false);
        }
        self.free_slot(slot);
    }

    /// Ends what a lease has beyond its first `keep` chunks; all of it with 0. Unknown is fine: false.
    pub fn release(&mut self, owner: Owner, session: u64, admission: u32, keep: u32) -> bool {
        self.change();
        if usize::from(owner) >= OWNERS {
            return false;
        }
        let (lease, _) = self.leases.find(owner, session, admission);
        if let Some(id) = lease {
            self.truncate(id, keep);
        }
        lease.is_some()
    }

    /// Ends the leases of all admissions of a session. Unknown is fine: false.
    pub fn end_session(&mut self, owner: Owner, session: u64) -> bool {
        self.change();
        if usize::from(owner) >= OWNERS {
            return false;
        }
        let mut known = false;
        while let Some(id) = self.leases.any_of(owner, session) {
            self.truncate(id, 0);
            known = true;
        }
        known
    }

    /// The client's process is gone, or with `quarantine` merely detached: it may still be writing, or a device
    /// on its behalf. Its leases end, and its rounds are dropped. Its WRITING slots are freed; in quarantine they stay
    /// WRITING until [`Cache::quarantine_over`]. O(what it holds).
    pub fn client_gone(&mut self, owner: Owner, nonce: u64, quarantine: bool) {
        self.change();
        if usize::from(owner) >= OWNERS {
            return;
        }
        while let Some(id) = self.leases.first_of(owner) {
            self.truncate(id, 0);
        }
        if !quarantine {
            self.quarantine_over(owner, nonce);
            return;
        }
        if let Some(attachment) = self.slots.find_attachment(owner, nonce) {
            self.orphan_all(attachment);
            self.slots.retire(attachment);
        }
    }

    /// What this attachment is writing is for no chunk any more, and its rounds are dropped.
    fn orphan_all(&mut self, attachment: u8) {
        let mut at = self.slots.first_writing(attachment);
        while let Some(slot) = at {
            if let Some(id) = self.slots.get(slot).chunk() {
                self.drop_chunk(id, false);
            }
            // Dropping a chunk orphans its WRITING slots, and leaves them in their lists.
            at = self.slots.next_writing(slot);
        }
    }

    /// Does the client in this entry write anything, under any attachment?
    pub fn writes(&self, owner: Owner) -> bool {
        self.slots.writes(owner)
    }

    /// The entry has lost its owner, for which a device may still write: as [`Cache::owner_gone`], but what it was writing
    /// stays WRITING, for no chunk, until that says so. O(what it holds).
    pub fn owner_lingers(&mut self, owner: Owner) {
        self.change();
        if usize::from(owner) >= OWNERS {
            return;
        }
        while let Some(id) = self.leases.first_of(owner) {
            self.truncate(id, 0);
        }
        for attachment in 0..=u8::MAX {
            if self.slots.is_attachment_of(owner, attachment) {
                self.orphan_all(attachment);
            }
        }
        self.slots.leave(owner);
    }

    /// Nothing writes for this attachment any longer: frees its WRITING slots. Leases of the entry stay: they may be a
    /// later attachment's. O(what it writes).
    pub fn quarantine_over(&mut self, owner: Owner, nonce: u64) {
        self.change();
        if let Some(attachment) = self.slots.find_attachment(owner, nonce) {
            self.slots.retire(attachment);
            while let Some(slot) = self.slots.first_writing(attachment) {
                self.abort_slot(slot);
            }
        }
    }

    /// The entry has lost its owner for good: everything goes that it had under any attachment. O(what it holds).
    pub fn owner_gone(&mut self, owner: Owner) {
        self.change();
        if usize::from(owner) >= OWNERS {
            return;
        }
        while let Some(id) = self.leases.first_of(owner) {
            self.truncate(id, 0);
        }
        self.slots.leave(owner);
        self.earlier_attachments_gone(owner);
    }

    /// The client in this entry has named all that it still writes ([`Cache::adopt`]): what is left of its earlier
    /// attachments is free. Answers how many slots that were. O(what they wrote).
    pub fn declare_end(&mut self, owner: Owner) -> u32 {
        self.change();
        if usize::from(owner) >= OWNERS { 0 } else { self.earlier_attachments_gone(owner) }
    }

    fn earlier_attachments_gone(&mut self, owner: Owner) -> u32 {
        let mut freed = 0;
        while let Some(attachment) = self.slots.earlier_attachment(owner) {
            // The record goes with its last slot, or here where it has none.
            self.slots.retire(attachment);
            while let Some(slot) = self.slots.first_writing(attachment) {
                self.abort_slot(slot);
                freed += 1;
            }
        }
        freed
    }

    /// Ends what a lease has beyond its first `keep` chunks.
    pub(super) fn truncate(&mut self, id: LeaseId, keep: u32) {
        self.unlease(id, keep, Some(self.leases.get(id).owner));
    }

    /// Ends a lease in favour of a newer one of the same admission, which has pinned what it wants: who pays goes on
    /// paying.
    pub(super) fn replaced(&mut self, id: LeaseId) {
        self.unlease(id, 0, None);
    }

    fn unlease(&mut self, id: LeaseId, keep: u32, leaving: Option<Owner>) {
        let Self { leases, chunks, slabs, namespaces, charges, .. } = self;
        leases.truncate(id, keep, |chunk| Self::unpin(chunks, slabs, namespaces, charges, leaving, chunk));
        self.drop_unheld();
    }
}
