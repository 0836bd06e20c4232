//! Records of the payload area: longer arguments and answers.

use super::{Key, join};
use crate::abi;
use crate::abi::Described;
use bytemuck::{Pod, Zeroable};

/// A record of the payload area: plain data, a whole number of words.
pub trait Record: Pod + Described {
    /// Words of one record.
    const WORDS: usize = size_of::<Self>() / 8;
}

abi! {
    /// The place of one shard, in the answer to a reservation.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
    #[repr(C)]
    pub struct ShardAnswer {
        /// Low half: the slot. High half: the slot's offset in the arena, in pages of 4 KiB.
        slot_and_page: u64,
        /// The slot's generation.
        pub generation: u64,
    }

    /// Bytes of a page of the arena: every shard starts on a page.
    pub const PAGE_BYTES: u64 = 4096;

    /// What became of one key of a reservation.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum ReserveOutcome: u32 {
        /// Write the shard into the slot that the answer names, then commit.
        Write = 0,
        /// The chunk is visible already: nothing to do.
        Present = 1,
        /// This rank has a slot for this chunk and round already (a repeated request).
        Held = 2,
        /// A newer round of the same source has begun: do not store this chunk.
        Superseded = 3,
        /// There is no room: do not store this chunk.
        NoSpace = 4,
        /// The client's share is used up: do not store this chunk.
        Busy = 5,
    }

    /// The answer for one key of a reservation.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
    #[repr(C)]
    pub struct ReserveAnswer {
        outcome: u64,
        /// Meaningful with [`ReserveOutcome::Write`].
        pub shard: ShardAnswer,
    }

    /// One slot that its writer commits or aborts.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
    #[repr(C)]
    pub struct SlotRecord {
        /// The slot, zero-extended.
        pub slot: u64,
        /// Its generation.
        pub generation: u64,
        /// The key it was reserved for.
        pub key: Key,
        /// The shard's checksum, or 0 where checksums are off.
        pub checksum: u64,
    }

    /// What became of one slot of a commit, an abort or a declaration.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum SlotOutcome: u64 {
        /// Done, now or by an earlier message.
        Done = 0,
        /// The reservation does not count any more: its round failed or was replaced. Nothing to do.
        Gone = 1,
        /// The slot is not this client's.
        NotYours = 2,
    }

    /// Bytes of a model's name in a registration; longer names are cut.
    pub const MODEL_NAME_BYTES: usize = 64;

    /// Bytes of a dtype's name.
    pub const DTYPE_BYTES: usize = 16;

    /// One rank's registration of a namespace.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
    #[repr(C)]
    pub struct Registration {
        /// Names the namespace: a digest of everything that the keys do not cover (model, KV layout, parallel geometry …).
        pub fingerprint: [u64; 4],
        /// A digest of this rank's page layout.
        pub layout: u64,
        /// Bytes of this rank's shard of one chunk.
        pub shard_bytes: u64,
        /// Number of ranks.
        pub world: u32,
        /// This rank.
        pub rank: u32,
        /// Tokens per chunk.
        pub chunk_tokens: u32,
        /// Reserved, 0.
        pub reserved: u32,
        /// The model's name, for people: UTF-8, zero padded.
        pub model: [u8; MODEL_NAME_BYTES],
        /// The dtype's name, for people: UTF-8, zero padded.
        pub dtype: [u8; DTYPE_BYTES],
    }
}

impl ShardAnswer {
    /// `offset` is a multiple of [`PAGE_BYTES`] below 16 TiB, the largest size of an arena.
    #[must_use]
    #[inline]
    pub fn new(slot: u32, offset: u64, generation: u64) -> ShardAnswer {
        debug_assert!(offset.is_multiple_of(PAGE_BYTES) && offset / PAGE_BYTES <= u64::from(u32::MAX));
        ShardAnswer { slot_and_page: join(slot, (offset / PAGE_BYTES) as u32), generation }
    }

    /// The slot.
    #[must_use]
    pub fn slot(&self) -> u32 {
        self.slot_and_page as u32
    }

    /// Its first byte in the arena.
    #[must_use]
    pub fn offset(&self) -> u64 {
        (self.slot_and_page >> 32) * PAGE_BYTES
    }

    /// As words of the payload area.
    #[must_use]
    #[inline]
    pub fn words(&self) -> [u64; 2] {
        [self.slot_and_page, self.generation]
    }
}

impl Record for ShardAnswer {}

impl ReserveAnswer {
    /// The answer that gives the client this slot to write.
    #[must_use]
    pub fn write(shard: ShardAnswer) -> ReserveAnswer {
        ReserveAnswer { outcome: ReserveOutcome::Write as u64, shard }
    }

    /// The answer that gives no slot, and why.
    #[must_use]
    pub fn skip(outcome: ReserveOutcome) -> ReserveAnswer {
        ReserveAnswer { outcome: outcome as u64, shard: ShardAnswer::new(0, 0, 0) }
    }

    /// The outcome; `None` where its number is unknown.
    #[must_use]
    pub fn outcome(&self) -> Option<ReserveOutcome> {
        ReserveOutcome::from_number(self.outcome)
    }

    /// As words of the payload area.
    #[must_use]
    pub fn words(&self) -> [u64; 3] {
        [self.outcome, self.shard.slot_and_page, self.shard.generation]
    }
}

impl Record for ReserveAnswer {}

impl Record for SlotRecord {}

impl Record for Registration {}

#[cfg(not(loom))]
const _: () = {
    assert!(size_of::<ShardAnswer>() == 16);
    assert!(size_of::<ReserveAnswer>() == 24);
    assert!(size_of::<SlotRecord>() == 40);
    assert!(size_of::<Registration>() == 144);
    assert!(ShardAnswer::WORDS * 8 == size_of::<ShardAnswer>());
    assert!(Registration::WORDS * 8 == size_of::<Registration>());
};
