//! The private state of each slot, and for each attachment the list of the slots that it is writing.

use bytemuck::{Pod, Zeroable};

use super::{OWNERS, Owner, SlotId};
use crate::lazy::{Lazy, NoMemory};

/// The bits that a generation has in the published word of a slot.
const GENERATION_MASK: u64 = kvring_shm_abi::slot::GENERATION_MAX;
/// The most attachments with WRITING slots at one time, including earlier attachments of an entry.
pub(super) const ATTACHMENTS: usize = 256;

/// A slot's state. Zeroed memory says FREE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Free,
    Writing,
    Committed,
}

/// A slot, in 24 bytes. Links are slot id + 1; 0 is "none".
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Slot {
    /// generation << 2 | state
    word: u64,
    /// Chunk id + 1; 0 while FREE, and for an orphan. During a recovery a slot that has not been read yet is FREE, and may
    /// have the chunk whose record leads to it.
    chunk: u32,
    /// WRITING: the previous slot in the attachment's list.
    prev: u32,
    /// WRITING: the next slot in the attachment's list. FREE: the next free slot of the span.
    pub(super) next: u32,
    pub(super) rank: u8,
    /// WRITING: the attachment that writes.
    attachment: u8,
    _pad: [u8; 2],
}

const _: () = assert!(size_of::<Slot>() == 24);

impl Slot {
    pub(super) fn generation(&self) -> u64 {
        self.word >> 2
    }

    pub(super) fn state(&self) -> State {
        match self.word & 3 {
            0 => State::Free,
            1 => State::Writing,
            _ => State::Committed,
        }
    }

    pub(super) fn chunk(&self) -> Option<u32> {
        self.chunk.checked_sub(1)
    }

    fn set(&mut self, generation: u64, state: State) {
        self.word = ((generation & GENERATION_MASK) << 2) | state as u64;
    }
}

/// One attachment. It has a record while it has WRITING slots or is its entry's current one.
#[derive(Clone, Copy, Default)]
struct Attachment {
    used: bool,
    owner: Owner,
    nonce: u64,
    /// The first slot of its list, + 1.
    head: u32,
}

/// How many slots there are by state. Free ones are counted by the slabs.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub(super) struct SlotCounts {
    pub(super) writing: u64,
    pub(super) committed: u64,
    pub(super) orphans: u64,
}

/// All slots of the arena, by id.
pub(super) struct Slots {
    slots: Lazy<Slot>,
    attachments: Box<[Attachment; ATTACHMENTS]>,
    /// Each entry's current attachment.
    current: [Option<u8>; OWNERS],
    pub(super) counts: SlotCounts,
}

impl Slots {
    pub(super) fn new(count: u32) -> Result<Self, NoMemory> {
        Ok(Self {
            slots: Lazy::new(count as usize)?,
            attachments: Box::new([Attachment::default(); ATTACHMENTS]),
            current: [None; OWNERS],
            counts: SlotCounts::default(),
        })
    }

    pub(super) fn len(&self) -> u32 {
        self.slots.len() as u32
    }

    #[inline(always)]
    pub(super) fn get(&self, slot: SlotId) -> &Slot {
        &self.slots[slot as usize]
    }

    pub(super) fn set_next(&mut self, slot: SlotId, next: u32) {
        self.slots[slot as usize].next = next;
    }

    /// Raises the generation of a slot that is used for the first time in this engine's life to the one that
    /// earlier engines have published.
    pub(super) fn raise_generation(&mut self, slot: SlotId, published: u64) {
        let slot = &mut self.slots[slot as usize];
        debug_assert_eq!(slot.state(), State::Free);
        let generation = slot.generation().max(published & GENERATION_MASK);
        slot.set(generation, State::Free);
    }

    /// The attachment under which `owner` writes now; makes it the current one. `None`: there are too many earlier
    /// ones with WRITING slots.
    pub(super) fn attach(&mut self, owner: Owner, nonce: u64) -> Option<u8> {
        let current = self.current[owner as usize];
        let is = |id: &u8| self.attachments[*id as usize].nonce == nonce;
        if let Some(id) = current.filter(is) {
            return Some(id);
        }
        // An earlier attachment keeps its WRITING slots, apart from those of the new one.
        let idle = current.filter(|id| self.attachments[*id as usize].head == 0);
        let id = match (self.find_attachment(owner, nonce), idle) {
            (None, Some(id)) => {
                self.attachments[id as usize].nonce = nonce;
                id
            }
            _ => self.attachment_for(owner, nonce)?,
        };
        if let Some(other) = idle.filter(|other| *other != id) {
            self.attachments[other as usize].used = false;
        }
        self.current[owner as usize] = Some(id);
        Some(id)
    }

    /// Finds or makes an attachment's record, without making it current. `None`: there are too many.
    pub(super) fn attachment_for(&mut self, owner: Owner, nonce: u64) -> Option<u8> {
        if let Some(known) = self.find_attachment(owner, nonce) {
            return Some(known);
        }
        let id = self.attachments.iter().position(|attachment| !attachment.used)?;
        self.attachments[id] = Attachment { used: true, owner, nonce, head: 0 };
        Some(id as u8)
    }

    /// The record of an attachment, if it has WRITING slots or is current.
    pub(super) fn find_attachment(&self, owner: Owner, nonce: u64) -> Option<u8> {
        let found = self.attachments.iter().position(|a| a.used && a.owner == owner && a.nonce == nonce);
        found.map(|id| id as u8)
    }

    /// Makes an attachment one of the past: its record is freed as soon as it has no WRITING slot.
    pub(super) fn retire(&mut self, id: u8) {
        let attachment = &mut self.attachments[id as usize];
        if self.current[attachment.owner as usize] == Some(id) {
            self.current[attachment.owner as usize] = None;
        }
        attachment.used = attachment.head != 0;
    }

    /// Retires the entry's current attachment, if it has one.
    pub(super) fn leave(&mut self, owner: Owner) {
        if let Some(id) = self.current[owner as usize] {
            self.retire(id);
        }
    }

    /// The first slot in an attachment's list.
    pub(super) fn first_writing(&self, attachment: u8) -> Option<SlotId> {
        self.attachments[attachment as usize].head.checked_sub(1)
    }

    /// The slot behind `slot` in its attachment's list.
    pub(super) fn next_writing(&self, slot: SlotId) -> Option<SlotId> {
        self.slots[slot as usize].next.checked_sub(1)
    }

    /// All slots in the attachments' lists, with their writers.
    pub(super) fn all_writing(&self) -> impl Iterator<Item = (Owner, SlotId)> {
        let used = self.attachments.iter().filter(|attachment| attachment.used);
        used.flat_map(move |attachment| {
            let mut at = attachment.head.checked_sub(1);
            std::iter::from_fn(move || {
                let slot = at?;
                at = self.next_writing(slot);
                Some((attachment.owner, slot))
            })
        })
    }

    /// An attachment of this entry other than its current one, if there is one left.
    pub(super) fn earlier_attachment(&self, owner: Owner) -> Option<u8> {
        let current = self.current[owner as usize];
        let is_earlier =
            |(id, a): (usize, &Attachment)| a.used && a.owner == owner && current != Some(id as u8);
        self.attachments.iter().enumerate().position(is_earlier).map(|id| id as u8)
    }

    /// Whether this is the record of an attachment of this entry.
    pub(super) fn is_attachment_of(&self, owner: Owner, id: u8) -> bool {
        let attachment = &self.attachments[id as usize];
        attachment.used && attachment.owner == owner
    }

    /// Whether this entry has a WRITING slot, under any attachment.
    pub(super) fn writes(&self, owner: Owner) -> bool {
        self.attachments.iter().any(|a| a.used && a.owner == owner && a.head != 0)
    }

    /// Whether `owner`'s current attachment is writing this slot.
    pub(super) fn is_writer(&self, owner: Owner, slot: SlotId) -> bool {
        let slot = self.get(slot);
        slot.state() == State::Writing && self.current.get(owner as usize) == Some(&Some(slot.attachment))
    }

    /// The entry and the nonce under which this slot is written.
    pub(super) fn writer(&self, slot: SlotId) -> (Owner, u64) {
        let attachment = &self.attachments[self.get(slot).attachment as usize];
        (attachment.owner, attachment.nonce)
    }

    /// FREE → WRITING.
    pub(super) fn begin_writing(&mut self, slot: SlotId, attachment: u8, chunk: u32, rank: u8) {
        let generation = self.get(slot).generation();
        let entry = &mut self.slots[slot as usize];
        debug_assert_eq!(entry.state(), State::Free);
        entry.set(generation, State::Writing);
        entry.chunk = chunk + 1;
        entry.rank = rank;
        self.link(slot, attachment);
        self.counts.writing += 1;
    }

    /// WRITING → COMMITTED.
    pub(super) fn commit(&mut self, slot: SlotId) {
        self.unlink(slot);
        let entry = &mut self.slots[slot as usize];
        entry.set(entry.generation(), State::Committed);
        self.counts.writing -= 1;
        self.counts.committed += 1;
    }

    /// A recovery expects this chunk's shard in a slot that it has not read yet, or expects none any more.
    pub(super) fn expect(&mut self, slot: SlotId, chunk: Option<u32>) {
        self.slots[slot as usize].chunk = chunk.map_or(0, |chunk| chunk + 1);
    }

    /// FREE → COMMITTED, when a recovery reads the tables of an earlier engine. A shard of no chunk is freed at its end.
    pub(super) fn restore_committed(&mut self, slot: SlotId, chunk: Option<u32>, rank: u8) {
        let entry = &mut self.slots[slot as usize];
        debug_assert_eq!(entry.state(), State::Free);
        entry.set(entry.generation(), State::Committed);
        entry.chunk = chunk.map_or(0, |chunk| chunk + 1);
        entry.rank = rank;
        self.counts.committed += 1;
    }

    /// The slot stays WRITING, but belongs to no chunk any more.
    pub(super) fn orphan(&mut self, slot: SlotId) {
        debug_assert_eq!(self.get(slot).state(), State::Writing);
        self.slots[slot as usize].chunk = 0;
        self.counts.orphans += 1;
    }

    /// WRITING or COMMITTED → FREE. Returns the next generation.
    pub(super) fn free(&mut self, slot: SlotId) -> u64 {
        match self.get(slot).state() {
            State::Writing => {
                self.unlink(slot);
                self.counts.writing -= 1;
                if self.get(slot).chunk == 0 {
                    self.counts.orphans -= 1;
                }
            }
            State::Committed => self.counts.committed -= 1,
            State::Free => debug_assert!(false, "slot {slot} is freed twice"),
        }
        let entry = &mut self.slots[slot as usize];
        entry.chunk = 0;
        entry.set(entry.generation() + 1, State::Free);
        entry.generation()
    }

    /// Moves a WRITING slot to another attachment: its client has come back under a new nonce.
    pub(super) fn hand_over(&mut self, slot: SlotId, attachment: u8) {
        self.unlink(slot);
        self.link(slot, attachment);
    }

    fn link(&mut self, slot: SlotId, attachment: u8) {
        let head = std::mem::replace(&mut self.attachments[attachment as usize].head, slot + 1);
        if let Some(next) = head.checked_sub(1) {
            self.slots[next as usize].prev = slot + 1;
        }
        let entry = &mut self.slots[slot as usize];
        (entry.prev, entry.next, entry.attachment) = (0, head, attachment);
    }

    fn unlink(&mut self, slot: SlotId) {
        let Slot { prev, next, attachment, .. } = *self.get(slot);
        match prev.checked_sub(1) {
            Some(prev) => self.slots[prev as usize].next = next,
            None => self.attachments[attachment as usize].head = next,
        }
        if let Some(next) = next.checked_sub(1) {
            self.slots[next as usize].prev = prev;
        }
        let list = &mut self.attachments[attachment as usize];
        if list.head == 0 && self.current[list.owner as usize] != Some(attachment) {
            list.used = false;
        }
    }
}
