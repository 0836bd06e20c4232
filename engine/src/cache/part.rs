//! Clients that go: what they had is taken back in pieces, however much it is.

use super::slot::ATTACHMENTS;
use super::{Cache, OWNERS, Owner, SlotId, SlotTable};

/// Records that it takes about as long as to look through all attachments.
const ATTACHMENT_RECORDS: u64 = 16;

/// How a client goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaving {
    /// It has said so, and writes no more under this nonce: its leases end, its WRITING slots are freed.
    Left {
        /// Its attach nonce.
        nonce: u64,
    },
    /// It is no longer listened to, and may still be writing, or a device on its behalf. Its leases end, and its rounds are
    /// dropped. What it is WRITING stays so, for no chunk, until it is [`Leaving::Gone`], or has said
    /// in a later attachment what it still writes ([`Cache::declare_end`]).
    Detached {
        /// Its attach nonce.
        nonce: u64,
    },
    /// The entry has lost its owner, for which a device may still write: as `Detached`, under any nonce.
    Lingers,
    /// The entry has lost its owner for good: everything goes that it had, under any nonce.
    Gone,
}

/// A client that goes, and how far that has come.
#[derive(Clone, Copy, Debug)]
pub struct Parting {
    owner: Owner,
    how: Leaving,
    /// The attachment whose slots are being orphaned, and the slot to go on with.
    attachment: usize,
    slot: Option<SlotId>,
}

impl Parting {
    /// Nothing has been done yet. Until it is over, nobody writes or leases under this entry, and no other parting of it
    /// begins.
    #[must_use]
    pub fn new(owner: Owner, how: Leaving) -> Parting {
        Parting { owner, how, attachment: 0, slot: None }
    }
}

impl<T: SlotTable> Cache<T> {
    /// The next piece of a client's parting. True when it is over, false where it stopped because what was allowed is spent.
    pub fn part(&mut self, parting: &mut Parting) -> bool {
        self.change();
        let owner = parting.owner;
        if usize::from(owner) >= OWNERS {
            return true;
        }
        while let Some(id) = self.leases.first_of(owner) {
            if !self.truncate(id, 0) {
                return false;
            }
        }
        match parting.how {
            Leaving::Left { nonce } => self.slots.find_attachment(owner, nonce).is_none_or(|attachment| {
                self.slots.retire(attachment);
                self.free_all(attachment, &mut 0)
            }),
            Leaving::Detached { nonce } => {
                let attachment = self.slots.find_attachment(owner, nonce);
                attachment.is_none_or(|attachment| {
                    let done = self.orphan_all(attachment, &mut parting.slot);
                    if done {
                        self.slots.retire(attachment);
                    }
                    done
                })
            }
            Leaving::Lingers => {
                while parting.attachment < ATTACHMENTS {
                    let attachment = parting.attachment as u8;
                    let is_its = self.slots.is_attachment_of(owner, attachment);
                    if is_its && !self.orphan_all(attachment, &mut parting.slot) {
                        return false;
                    }
                    parting.attachment += 1;
                }
                self.slots.leave(owner);
                true
            }
            Leaving::Gone => {
                self.slots.leave(owner);
                self.earlier_attachments_gone(owner, &mut 0)
            }
        }
    }

    /// Does the client in this entry write anything, under any attachment?
    pub fn writes(&self, owner: Owner) -> bool {
        self.slots.writes(owner)
    }

    /// As [`Cache::part`] with [`Leaving::Gone`], all at once.
    pub fn owner_gone(&mut self, owner: Owner) {
        self.part_at_once(owner, Leaving::Gone);
    }

    /// As [`Cache::part`] with [`Leaving::Lingers`], all at once.
    pub fn owner_lingers(&mut self, owner: Owner) {
        self.part_at_once(owner, Leaving::Lingers);
    }

    fn part_at_once(&mut self, owner: Owner, how: Leaving) {
        let allowed = std::mem::replace(&mut self.allowed, u64::MAX);
        let over = self.part(&mut Parting::new(owner, how));
        debug_assert!(over);
        self.allowed = allowed;
    }

    /// The client in this entry has named all that it still writes ([`Cache::adopt`]): what is left of its earlier
    /// attachments is free. Adds to `freed` how many slots that were. False where it stopped: call it again.
    pub fn declare_end(&mut self, owner: Owner, freed: &mut u32) -> bool {
        self.change();
        usize::from(owner) >= OWNERS || self.earlier_attachments_gone(owner, freed)
    }

    fn earlier_attachments_gone(&mut self, owner: Owner, freed: &mut u32) -> bool {
        while let Some(attachment) = self.slots.earlier_attachment(owner) {
            // The record goes with its last slot, or here where it has none.
            self.slots.retire(attachment);
            let done = self.free_all(attachment, freed);
            self.work += ATTACHMENT_RECORDS;
            if !done {
                return false;
            }
        }
        true
    }

    /// Frees what an attachment is writing, and drops its rounds. False where it stopped.
    fn free_all(&mut self, attachment: u8, freed: &mut u32) -> bool {
        while let Some(slot) = self.slots.first_writing(attachment) {
            if self.is_spent() {
                return false;
            }
            self.abort_slot(slot);
            *freed += 1;
        }
        true
    }

    /// What this attachment is writing is for no chunk any more, and its rounds are dropped; `at` is the slot to go on with:
    /// nobody frees a slot of a client that parts but its parting. False where it stopped.
    fn orphan_all(&mut self, attachment: u8, at: &mut Option<SlotId>) -> bool {
        let mut next = at.take().or_else(|| self.slots.first_writing(attachment));
        while let Some(slot) = next {
            if self.is_spent() {
                *at = Some(slot);
                return false;
            }
            self.work += 1;
            if let Some(id) = self.slots.get(slot).chunk() {
                self.drop_chunk(id, false);
            }
            // Dropping a chunk orphans its WRITING slots, and leaves them in their lists.
            next = self.slots.next_writing(slot);
        }
        true
    }
}
