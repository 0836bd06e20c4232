//! Clients that part: what a client had is taken back in pieces, however much it is.

use super::slot::ATTACHMENTS;
use super::{Cache, OWNERS, Owner, SlotId, SlotTable};

/// Looking through all attachments takes about as long as touching this many records.
const ATTACHMENT_RECORDS: u64 = 16;

/// How a client parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaving {
    /// The client has said that it leaves, and writes no more under this nonce. Its leases end, and its WRITING
    /// slots are freed.
    Left {
        /// Its attach nonce.
        nonce: u64,
    },
    /// The engine no longer listens to the client, but the client, or a device on its behalf, may still be writing.
    /// Its leases end, and its rounds are dropped. Its WRITING slots become orphans until the client is
    /// [`Leaving::Gone`], or has declared in a later attachment what it still writes ([`Cache::declare_end`]).
    Detached {
        /// Its attach nonce.
        nonce: u64,
    },
    /// The entry's owner is dead, but a device may still write for it. As `Detached`, for every nonce of the entry.
    Lingers,
    /// The entry's owner is gone for good, and nothing writes for it. Everything that it had is freed, under every
    /// nonce of the entry.
    Gone,
}

/// A client that parts, and how far its parting has come.
#[derive(Clone, Copy, Debug)]
pub struct Parting {
    owner: Owner,
    how: Leaving,
    /// The attachment whose slots are being orphaned, and the slot with which the next piece begins.
    attachment: usize,
    slot: Option<SlotId>,
}

impl Parting {
    /// A parting of which nothing has been done yet. Until it is over, the caller lets nobody write or lease under
    /// this entry, and begins no other parting of it.
    #[must_use]
    pub fn new(owner: Owner, how: Leaving) -> Parting {
        Parting { owner, how, attachment: 0, slot: None }
    }
}

impl<T: SlotTable> Cache<T> {
    /// Does the next piece of a client's parting. True: the parting is over. False: it stopped because what was
    /// allowed is spent.
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

    /// Whether the client in this entry has any WRITING slot, under any attachment.
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

    /// The client in this entry has named all slots that it still writes ([`Cache::adopt`]): the other slots of its
    /// earlier attachments are freed. Adds the number of those to `freed`. False: it stopped because what was
    /// allowed is spent; call it again.
    pub fn declare_end(&mut self, owner: Owner, freed: &mut u32) -> bool {
        self.change();
        usize::from(owner) >= OWNERS || self.earlier_attachments_gone(owner, freed)
    }

    fn earlier_attachments_gone(&mut self, owner: Owner, freed: &mut u32) -> bool {
        while let Some(attachment) = self.slots.earlier_attachment(owner) {
            // The attachment's record is freed with its last slot, or here if it has no slot.
            self.slots.retire(attachment);
            let done = self.free_all(attachment, freed);
            self.work += ATTACHMENT_RECORDS;
            if !done {
                return false;
            }
        }
        true
    }

    /// Frees an attachment's WRITING slots and drops their rounds. False: it stopped, and is to be called again.
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

    /// Orphans an attachment's WRITING slots and drops their rounds. `at` is the slot with which to go on: it stays
    /// valid between two pieces, because only the parting itself frees slots of a client that parts. False: it
    /// stopped, and is to be called again.
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
            // Dropping a chunk orphans its WRITING slots but leaves them in their lists, so `next` can be read now.
            next = self.slots.next_writing(slot);
        }
        true
    }
}
