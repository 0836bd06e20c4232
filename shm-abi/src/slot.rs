//! Slot headers: what each place in the arena holds, written by the engine alone, checked by workers around each copy.
//!
//! One word says it all: `state | owner entry | generation`. Header fields are written first and the word last; a
//! worker reads the word, the fields, the bytes, and the word again (a seqlock per slot, with the payload elsewhere).

use crate::abi;
use crate::failpoint;
use crate::mapping::{Pad, Shared};
use crate::sync::{AtomicU64, Ordering, fence};

abi! {
    /// What a slot is doing.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum SlotState: u8 {
        /// Nobody's.
        Free = 0,
        /// Given to a worker that may be writing its bytes.
        Writing = 1,
        /// Holds a shard; its bytes do not change until the generation does.
        Committed = 2,
        /// As `Writing`, but for no chunk: its round failed or was replaced. It waits for its writer's word or death, and
        /// nothing that was written there is ever used.
        Orphaned = 3,
    }

    /// Bits of the word that are the state, from the lowest one on.
    const STATE_BITS: u32 = 2;
    /// The next ones: the owner's entry.
    const OWNER_BITS: u32 = 8;
    /// The rest: the generation.
    pub const GENERATION_BITS: u32 = 54;

    /// One entry of the slot table: two cache lines, of which a load looks at the first.
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
        /// Second line: what recovery needs.
        nonce: AtomicU64,
        round: AtomicU64,
        last_touch: AtomicU64,
        /// 0, or 1 for a committed shard that is damaged.
        hidden: AtomicU64,
        _pad1: Pad<32>,
    }

    /// Bytes of a header.
    pub const SLOT_HEADER_BYTES: usize = 128;

    /// The checksum of the bytes 0 to 25 in two pages of 13. Whoever computes `checksum` does it in this way, and a test of his
    /// compares; so that a change of the way is a change of the layout.
    pub const CHECKSUM_EXAMPLE: u64 = 0x812c_f608_e98e_5ad0;
}

/// The header's word, unpacked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotWord {
    /// What the slot is doing.
    pub state: SlotState,
    /// The client entry that writes or wrote it.
    pub owner: u8,
    /// Grows each time the slot is freed; never reset while the inode lives. 54 bits.
    pub generation: u64,
}

/// The largest generation; the next one wraps to 0 after 2⁵⁴ reuses of one slot.
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

/// What a shard is: the part of the header that is fixed when the slot is given to a writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardIdentity {
    /// The chunk's key.
    pub key: [u64; 2],
    /// The namespace it belongs to.
    pub namespace: u32,
    /// Whose part of the chunk.
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

/// All that a header says: what a recovery reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotContent {
    /// State, owner, generation.
    pub word: SlotWord,
    /// Which shard; means nothing in a free slot.
    pub identity: ShardIdentity,
    /// The attachment that writes or wrote it.
    pub nonce: u64,
    /// The packed [`Round`](crate::message::Round) that it may combine in.
    pub round: u64,
    /// Logical time of its last access.
    pub last_touch: u64,
    /// The shard is damaged: leases of one engine still lead to it, and nothing of the next one does.
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

/// Why a load of a shard was refused, or must not be believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotServable {
    /// The slot has been freed or given away since the lookup.
    #[error("expected a committed shard of generation {expected}, found generation {found} ({committed})",
            committed = if *.committed { "committed" } else { "not committed" })]
    Gone {
        /// The generation that the lookup answered.
        expected: u64,
        /// The generation now.
        found: u64,
        /// Whether that is committed.
        committed: bool,
    },
    /// The header describes something else: the handle belongs to another key, namespace, rank or place.
    #[error("expected {expected}, the slot holds {found}")]
    OtherShard {
        /// What was asked for.
        expected: ShardIdentity,
        /// What the slot says it holds.
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

    /// Engine: the slot now belongs to a writer. Fields first, the word last.
    pub fn begin_writing(&self, word: SlotWord, identity: &ShardIdentity, nonce: u64, round: u64) {
        // SYNC POINT: Release fence; pairs with the Acquire fence in `still_valid`. A reader that saw any field of this
        // life, in `validate` on the way to its copy, finds the word that freed the slot, or a later one.
        fence(Ordering::Release);
        if failpoint::broken("word last") {
            self.word.store(word.pack(), Ordering::Release);
            failpoint::here("writing.fields");
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
        failpoint::here("writing.word");
        // SYNC POINT: Release; pairs with the Acquire in `validate` and in a recovery's scan.
        self.word.store(word.pack(), Ordering::Release);
        failpoint::here("writing.done");
    }

    /// Engine: the shard's bytes are complete (their writer's commit was acquired from its ring).
    pub fn commit(&self, word: SlotWord, checksum: u64) {
        self.checksum.store(checksum, Ordering::Relaxed);
        failpoint::here("commit.word");
        // SYNC POINT: Release; pairs with the Acquire in `validate`: who sees COMMITTED sees the payload, which
        // happened before the commit message that the engine acquired.
        self.word.store(word.pack(), Ordering::Release);
        failpoint::here("commit.done");
    }

    /// Engine: the slot's round has failed or was replaced; its writer may still be at it.
    pub fn orphan(&self, word: SlotWord) {
        // SYNC POINT: Release; pairs with the Acquire in a recovery's `read`.
        self.word.store(word.pack(), Ordering::Release);
    }

    /// Engine: free, with the next generation. Before the slot is given away again.
    pub fn free(&self, next_generation: u64) {
        let word = SlotWord { state: SlotState::Free, owner: 0, generation: next_generation };
        // SYNC POINT: Release; a reader whose copy saw bytes of the slot's next life finds this or a later word in
        // `still_valid`: the next writer acquired its reservation after this store and fenced before it wrote.
        failpoint::here("free.word");
        self.word.store(word.pack(), Ordering::Release);
        failpoint::here("free.done");
    }

    /// Engine: used by a lookup at logical time `tick`; recovery rebuilds the eviction order from it.
    pub fn touch(&self, tick: u64) {
        self.last_touch.store(tick, Ordering::Relaxed);
    }

    /// Engine: the committed shard is damaged. Who has leased it may still load it, and finds that out for itself.
    pub fn hide(&self) {
        // Relaxed: only a recovery looks, after the death of this process, whose mark orders all of its stores.
        self.hidden.store(1, Ordering::Relaxed);
    }

    /// Worker, before a copy: is this the committed shard that the lookup meant? Returns the checksum stored with it.
    pub fn validate(&self, expected: &ShardIdentity, generation: u64) -> Result<u64, NotServable> {
        // SYNC POINT: Acquire; pairs with the Release in `commit`.
        self.check_word(generation, self.word.load(Ordering::Acquire))?;
        let found = self.identity();
        if found != *expected {
            return Err(NotServable::OtherShard { expected: *expected, found });
        }
        Ok(self.checksum.load(Ordering::Relaxed))
    }

    /// Worker, after a copy: were those bytes the shard's all the time?
    pub fn still_valid(&self, generation: u64) -> Result<(), NotServable> {
        // SYNC POINT: Acquire fence; pairs with the Release fence that a writer makes before its first payload store.
        // If the copy saw any of those bytes, this load sees the word that freed the slot, or a later one.
        fence(Ordering::Acquire);
        self.check_word(generation, self.word.load(Ordering::Relaxed))
    }

    /// [`SlotHeader::still_valid`] without its fence: the negative control of the models. Never use it.
    #[cfg(loom)]
    pub fn still_valid_broken(&self, generation: u64) -> Result<(), NotServable> {
        self.check_word(generation, self.word.load(Ordering::Relaxed))
    }

    fn check_word(&self, expected: u64, word: u64) -> Result<(), NotServable> {
        let found = if failpoint::broken("generation") { expected } else { word >> GENERATION_SHIFT };
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

    /// Everything, for a recovery: nobody else writes the header then.
    #[must_use]
    pub fn read(&self) -> SlotContent {
        // SYNC POINT: Acquire; pairs with the Release of each transition, by a process that may be dead by now.
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

    /// The identity fields as they are now: meaningful only under a word that has been checked.
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
        assert!(header.validate(&SHARD, 0).is_err(), "a free slot is not servable");
        header.begin_writing(word(SlotState::Writing, 7), &SHARD, 1, 1);
        assert!(matches!(header.validate(&SHARD, 7), Err(NotServable::Gone { committed: false, .. })));
        header.commit(word(SlotState::Committed, 7), 55);
        assert_eq!(header.validate(&SHARD, 7), Ok(55));
        assert!(matches!(header.validate(&SHARD, 6), Err(NotServable::Gone { expected: 6, found: 7, .. })));
        for other in [
            ShardIdentity { key: [1, 3], ..SHARD },
            ShardIdentity { namespace: 0, ..SHARD },
            ShardIdentity { rank: 0, ..SHARD },
            ShardIdentity { offset: 0, ..SHARD },
            ShardIdentity { length: 1, ..SHARD },
        ] {
            assert!(matches!(header.validate(&other, 7), Err(NotServable::OtherShard { .. })));
        }
        assert_eq!(header.still_valid(7), Ok(()));
        header.free(8);
        assert!(header.still_valid(7).is_err());
        // The same slot, the same key, another life: still not what was asked for.
        header.begin_writing(word(SlotState::Writing, 8), &SHARD, 1, 2);
        header.commit(word(SlotState::Committed, 8), 55);
        assert!(header.still_valid(7).is_err());
    }

    #[test]
    fn a_load_looks_at_one_cache_line() {
        // What `validate` and `still_valid` read, and what only a recovery reads.
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
        assert!(header.validate(&SHARD, 7).is_err(), "an orphan is not servable");
        header.hide();
        assert!(header.read().hidden);
        header.begin_writing(word(SlotState::Writing, 7), &SHARD, 11, 12);
        assert!(!header.read().hidden, "a slot's next shard is not damaged");
    }
}
