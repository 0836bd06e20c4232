//! Slot headers: what each slot in the arena holds. Only the engine writes them; workers check them before and after each copy.
//!
//! A header's word holds `state | owner entry | generation`. The engine writes the other fields first and the word last; a
//! worker reads the word, the fields, the slot's bytes, and the word again (a seqlock per slot, with the payload elsewhere).

use crate::abi;
use crate::failpoint::{self, Place, Rule};
use crate::mapping::{Pad, Shared};
use crate::sync::{AtomicU64, Ordering, fence};

abi! {
    /// What a slot is doing.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum SlotState: u8 {
        /// Nobody has it.
        Free = 0,
        /// A worker has reserved it, and may be writing its bytes.
        Writing = 1,
        /// It holds a shard; its bytes do not change until the generation does.
        Committed = 2,
        /// As `Writing`, but for no chunk: its round failed or was replaced. It stays so until its writer commits, aborts or
        /// dies, and its bytes are never used.
        Orphaned = 3,
    }

    /// Bits of the word that are the state, from the lowest one on.
    const STATE_BITS: u32 = 2;
    /// The next bits: the owner's entry.
    const OWNER_BITS: u32 = 8;
    /// The other bits: the generation.
    pub const GENERATION_BITS: u32 = 54;

    /// One record of the slot table: two cache lines, of which a load reads only the first.
    #[repr(C, align(128))]
    pub struct SlotHeader {
        word: AtomicU64,
        key: [AtomicU64; 2],
        /// The namespace in the low half, the rank in the high one.
        namespace_and_rank: AtomicU64,
        offset: AtomicU64,
        length: AtomicU64,
        checksum: AtomicU64,
        _pad0: Pad<8>,
        /// This and the following fields are the second line: only a recovery reads it.
        nonce: AtomicU64,
        round: AtomicU64,
        last_touch: AtomicU64,
        /// 0, or 1 for a committed shard that is damaged.
        hidden: AtomicU64,
        _pad1: Pad<32>,
    }

    /// Bytes of a header.
    pub const SLOT_HEADER_BYTES: usize = 128;

    /// The checksum of the bytes 0 to 25 in two pages of 13. Every implementation of checksums has a test against it, so that
    /// another way to compute them changes the layout hash.
    pub const CHECKSUM_EXAMPLE: u64 = 0x812c_f608_e98e_5ad0;
}

/// The header's word, unpacked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotWord {
    /// What the slot is doing.
    pub state: SlotState,
    /// The entry of the client that is writing or has written the slot.
    pub owner: u8,
    /// Grows each time that the slot is freed, and is never reset in one segment. 54 bits.
    pub generation: u64,
}

/// The largest generation; after 2⁵⁴ uses of one slot the next one is 0 again.
pub const GENERATION_MAX: u64 = (1 << GENERATION_BITS) - 1;

const STATE_MASK: u64 = (1 << STATE_BITS) - 1;
const GENERATION_SHIFT: u32 = STATE_BITS + OWNER_BITS;
const _: () = assert!(GENERATION_SHIFT + GENERATION_BITS == 64 && OWNER_BITS == u8::BITS);

impl SlotWord {
    /// Packs: state, owner, generation, from the lowest bit on.
    #[must_use]
    pub fn pack(self) -> u64 {
        (self.generation << GENERATION_SHIFT) | (u64::from(self.owner) << STATE_BITS) | self.state as u64
    }

    /// Unpacks.
    #[must_use]
    pub fn unpack(word: u64) -> SlotWord {
        // All four numbers name a state.
        let state = SlotState::from_number(word & STATE_MASK).unwrap_or(SlotState::Orphaned);
        SlotWord { state, owner: (word >> STATE_BITS) as u8, generation: word >> GENERATION_SHIFT }
    }
}

/// What a shard is: the fields of the header that are fixed when a writer gets the slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardIdentity {
    /// The chunk's key.
    pub key: [u64; 2],
    /// The [id](crate::namespace) of the namespace it belongs to.
    pub namespace: u32,
    /// The rank whose part of the chunk it is.
    pub rank: u32,
    /// First byte in the arena.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

impl core::fmt::Display for ShardIdentity {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let ShardIdentity { key: [low, high], namespace, rank, offset, length } = self;
        write!(
            f,
            "rank {rank} of chunk {high:016x}{low:016x} in namespace {namespace}, {length} bytes at {offset}"
        )
    }
}

/// Everything in a header, for a recovery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotContent {
    /// State, owner, generation.
    pub word: SlotWord,
    /// The shard; means nothing in a free slot.
    pub identity: ShardIdentity,
    /// The nonce of the attachment that is writing or has written it.
    pub nonce: u64,
    /// Its packed [`Round`](crate::message::Round).
    pub round: u64,
    /// Logical time of its last access.
    pub last_touch: u64,
    /// The shard is damaged. Leases of this engine may still lead to it; the next engine frees it.
    pub hidden: bool,
}

// SAFETY: atomics and padding only.
unsafe impl Shared for SlotHeader {}

#[cfg(not(loom))]
const _: () = {
    use core::mem::offset_of;
    assert!(core::mem::size_of::<SlotHeader>() == SLOT_HEADER_BYTES);
    assert!(offset_of!(SlotHeader, word) == 0);
    assert!(offset_of!(SlotHeader, checksum) + 8 <= 64);
    assert!(offset_of!(SlotHeader, nonce) == 64);
};

/// A shard that may be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommittedShard {
    /// The generation of its slot, for [`SlotHeader::still_valid`].
    pub generation: u64,
    /// First byte in the arena.
    pub offset: u64,
    /// Its checksum; 0: it has none.
    pub checksum: u64,
}

/// Why a load of a shard is refused, or why its bytes must not be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotServable {
    /// The slot holds no committed shard.
    #[error("the slot holds no committed shard")]
    NotCommitted,
    /// The slot has been freed or given away during the copy.
    #[error("expected a committed shard of generation {expected}, found generation {found} ({committed})",
            committed = if *.committed { "committed" } else { "not committed" })]
    Gone {
        /// The generation before the copy.
        expected: u64,
        /// The generation now.
        found: u64,
        /// Is the slot committed now?
        committed: bool,
    },
    /// The header describes another shard: another key, namespace, rank or length.
    #[error("expected {expected}, the slot holds {found}")]
    OtherShard {
        /// The shard that the chunk's record has led to.
        expected: ShardIdentity,
        /// The shard that the header names.
        found: ShardIdentity,
    },
}

impl SlotHeader {
    /// A free slot of generation 0 in private memory, for models.
    #[cfg(loom)]
    #[must_use]
    #[allow(clippy::new_without_default, reason = "made in models alone")]
    pub fn new() -> SlotHeader {
        let zero = || AtomicU64::new(0);
        SlotHeader {
            word: zero(),
            key: [zero(), zero()],
            namespace_and_rank: zero(),
            offset: zero(),
            length: zero(),
            checksum: zero(),
            _pad0: Pad::new(),
            nonce: zero(),
            round: zero(),
            last_touch: zero(),
            hidden: zero(),
            _pad1: Pad::new(),
        }
    }

    /// Engine: gives the slot to a writer. Stores the fields first, the word last.
    pub fn begin_writing(&self, word: SlotWord, identity: &ShardIdentity, nonce: u64, round: u64) {
        // SYNC POINT: Release fence; pairs with the Acquire fence in `still_valid`. A reader that saw any of these fields in
        // `validate`, before its copy, finds in `still_valid` the word that freed the slot, or a later one.
        fence(Ordering::Release);
        if failpoint::broken(Rule::WordLast) {
            self.word.store(word.pack(), Ordering::Release);
            failpoint::here(Place::WritingFields);
        }
        self.key[0].store(identity.key[0], Ordering::Relaxed);
        self.key[1].store(identity.key[1], Ordering::Relaxed);
        let place = u64::from(identity.namespace) | (u64::from(identity.rank) << 32);
        self.namespace_and_rank.store(place, Ordering::Relaxed);
        self.offset.store(identity.offset, Ordering::Relaxed);
        self.length.store(identity.length, Ordering::Relaxed);
        self.checksum.store(0, Ordering::Relaxed);
        self.nonce.store(nonce, Ordering::Relaxed);
        self.round.store(round, Ordering::Relaxed);
        self.hidden.store(0, Ordering::Relaxed);
        failpoint::here(Place::WritingWord);
        // SYNC POINT: Release; pairs with the Acquire in `validate` and in a recovery's scan.
        self.word.store(word.pack(), Ordering::Release);
        failpoint::here(Place::WritingDone);
    }

    /// Engine: commits the shard. Its writer has said that its bytes are complete, by a commit message in its ring.
    pub fn commit(&self, word: SlotWord, checksum: u64) {
        self.checksum.store(checksum, Ordering::Relaxed);
        failpoint::here(Place::CommitWord);
        // SYNC POINT: Release; pairs with the Acquire in `validate`: a worker that sees COMMITTED sees the shard's bytes, which
        // were written before the commit message that the engine has acquired.
        self.word.store(word.pack(), Ordering::Release);
        failpoint::here(Place::CommitDone);
    }

    /// Engine: marks a slot whose round has failed or was replaced. Its writer may still be writing it.
    pub fn orphan(&self, word: SlotWord) {
        // SYNC POINT: Release; pairs with the Acquire in a recovery's `read`.
        self.word.store(word.pack(), Ordering::Release);
    }

    /// Engine: frees the slot, with its next generation. Only after that can the slot be given away again.
    pub fn free(&self, next_generation: u64) {
        let word = SlotWord { state: SlotState::Free, owner: 0, generation: next_generation };
        // SYNC POINT: Release; a reader whose copy saw bytes of the slot's next writer finds this word or a later one in
        // `still_valid`: that writer acquired its reservation after this store, and fenced before it wrote.
        failpoint::here(Place::FreeWord);
        self.word.store(word.pack(), Ordering::Release);
        failpoint::here(Place::FreeDone);
    }

    /// Engine: notes that a lookup has used the slot at logical time `tick`. A recovery rebuilds the eviction order from it.
    pub fn touch(&self, tick: u64) {
        self.last_touch.store(tick, Ordering::Relaxed);
    }

    /// Engine: marks a committed shard as damaged. A worker may still load it under a lease, and finds the damage by its
    /// checksum.
    pub fn hide(&self) {
        // Relaxed: only a recovery reads it, after the death of this process, and the mark of that death orders its stores.
        self.hidden.store(1, Ordering::Relaxed);
    }

    /// Worker, before a copy: does the slot hold this committed shard? The offset of `expected` is not compared: the header
    /// says where the shard lies.
    pub fn validate(&self, expected: &ShardIdentity) -> Result<CommittedShard, NotServable> {
        // SYNC POINT: Acquire; pairs with the Release in `commit`.
        let word = SlotWord::unpack(self.word.load(Ordering::Acquire));
        if word.state != SlotState::Committed {
            return Err(NotServable::NotCommitted);
        }
        let found = self.identity();
        if found != (ShardIdentity { offset: found.offset, ..*expected }) {
            return Err(NotServable::OtherShard { expected: *expected, found });
        }
        let checksum = self.checksum.load(Ordering::Relaxed);
        Ok(CommittedShard { generation: word.generation, offset: found.offset, checksum })
    }

    /// Worker, after a copy: did the slot hold that shard during the whole copy?
    pub fn still_valid(&self, generation: u64) -> Result<(), NotServable> {
        // SYNC POINT: Acquire fence; pairs with the Release fence that the slot's next writer makes before its first store into
        // it. If the copy saw any of that writer's bytes, this load sees the word that freed the slot, or a later one.
        fence(Ordering::Acquire);
        self.check_word(generation, self.word.load(Ordering::Relaxed))
    }

    /// [`SlotHeader::still_valid`] without its fence: the negative control of the models. Never use it.
    #[cfg(loom)]
    pub fn still_valid_broken(&self, generation: u64) -> Result<(), NotServable> {
        self.check_word(generation, self.word.load(Ordering::Relaxed))
    }

    fn check_word(&self, expected: u64, word: u64) -> Result<(), NotServable> {
        let found = if failpoint::broken(Rule::Generation) { expected } else { word >> GENERATION_SHIFT };
        let committed = word & STATE_MASK == SlotState::Committed as u64;
        if found == expected && committed {
            Ok(())
        } else {
            Err(NotServable::Gone { expected, found, committed })
        }
    }

    /// The word as it is now.
    #[must_use]
    pub fn word(&self) -> SlotWord {
        SlotWord::unpack(self.word.load(Ordering::Acquire))
    }

    /// Everything in the header, for a recovery: during one nobody else writes it.
    #[must_use]
    pub fn read(&self) -> SlotContent {
        // SYNC POINT: Acquire; pairs with the Release of each transition, made by a process that may be dead by now.
        let word = self.word();
        SlotContent {
            word,
            identity: self.identity(),
            nonce: self.nonce.load(Ordering::Relaxed),
            round: self.round.load(Ordering::Relaxed),
            last_touch: self.last_touch.load(Ordering::Relaxed),
            hidden: self.hidden.load(Ordering::Relaxed) != 0,
        }
    }

    /// The shard that the fields name now. It has a meaning only if the word is checked before and after.
    #[must_use]
    pub fn identity(&self) -> ShardIdentity {
        let place = self.namespace_and_rank.load(Ordering::Relaxed);
        ShardIdentity {
            key: [self.key[0].load(Ordering::Relaxed), self.key[1].load(Ordering::Relaxed)],
            namespace: place as u32,
            rank: (place >> 32) as u32,
            offset: self.offset.load(Ordering::Relaxed),
            length: self.length.load(Ordering::Relaxed),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::mapping::Mapping;

    const SHARD: ShardIdentity =
        ShardIdentity { key: [1, 2], namespace: 3, rank: 4, offset: 4096, length: 8192 };

    fn word(state: SlotState, generation: u64) -> SlotWord {
        SlotWord { state, owner: 9, generation }
    }

    #[test]
    fn a_load_sees_only_the_committed_shard_it_asked_for() {
        let memory = Mapping::private(4096);
        let header = memory.at::<SlotHeader>(128).unwrap();
        assert_eq!(header.validate(&SHARD), Err(NotServable::NotCommitted), "a free slot");
        header.begin_writing(word(SlotState::Writing, 7), &SHARD, 1, 1);
        assert_eq!(header.validate(&SHARD), Err(NotServable::NotCommitted));
        header.commit(word(SlotState::Committed, 7), 55);
        let committed = CommittedShard { generation: 7, offset: 4096, checksum: 55 };
        assert_eq!(header.validate(&SHARD), Ok(committed));
        assert_eq!(
            header.validate(&ShardIdentity { offset: 0, ..SHARD }),
            Ok(committed),
            "the header says where"
        );
        for other in [
            ShardIdentity { key: [1, 3], ..SHARD },
            ShardIdentity { namespace: 0, ..SHARD },
            ShardIdentity { rank: 0, ..SHARD },
            ShardIdentity { length: 1, ..SHARD },
        ] {
            assert!(matches!(header.validate(&other), Err(NotServable::OtherShard { .. })));
        }
        assert_eq!(header.still_valid(7), Ok(()));
        header.free(8);
        assert!(header.still_valid(7).is_err());
        // The same slot and the same key, in another generation: still not the shard that was asked for.
        header.begin_writing(word(SlotState::Writing, 8), &SHARD, 1, 2);
        header.commit(word(SlotState::Committed, 8), 55);
        assert!(header.still_valid(7).is_err());
    }

    #[test]
    fn a_load_looks_at_one_cache_line() {
        // First the fields that `validate` and `still_valid` read, then those that only a recovery reads.
        assert_eq!(memoffset::span_of!(SlotHeader, word..=checksum), 0..56);
        assert_eq!(memoffset::span_of!(SlotHeader, nonce..=hidden), 64..96);
    }

    #[test]
    fn words_pack_and_unpack() {
        for state in [SlotState::Free, SlotState::Writing, SlotState::Committed, SlotState::Orphaned] {
            for generation in [0, 1, GENERATION_MAX] {
                let word = SlotWord { state, owner: 255, generation };
                assert_eq!(SlotWord::unpack(word.pack()), word);
            }
        }
    }

    #[test]
    fn what_a_recovery_reads_is_what_was_written() {
        let memory = Mapping::private(4096);
        let header = memory.at::<SlotHeader>(0).unwrap();
        header.begin_writing(word(SlotState::Writing, 7), &SHARD, 11, 12);
        header.touch(13);
        let content = SlotContent {
            word: word(SlotState::Writing, 7),
            identity: SHARD,
            nonce: 11,
            round: 12,
            last_touch: 13,
            hidden: false,
        };
        assert_eq!(header.read(), content);
        header.orphan(word(SlotState::Orphaned, 7));
        assert_eq!(header.read(), SlotContent { word: word(SlotState::Orphaned, 7), ..content });
        assert_eq!(header.validate(&SHARD), Err(NotServable::NotCommitted), "an orphan");
        header.hide();
        assert!(header.read().hidden);
        header.begin_writing(word(SlotState::Writing, 7), &SHARD, 11, 12);
        assert!(!header.read().hidden, "a slot's next shard is not damaged");
    }
}
