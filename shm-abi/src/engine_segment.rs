//! `kvring.<name>.engine`: written by the engine's service thread alone, mapped read-only by clients.
//!
//! It has the superblock, the epoch, what the engine says of itself, statistics, the engine's life words (one per client entry,
//! because the kernel wakes only one sleeper per word; and the *owner* word, by which one engine excludes another), the answers
//! to attachments, namespaces, slab table, the directory with the chunk records, and the slot table. Records and slot table are
//! sparse: memory for records is allocated as chunks are made, and memory for headers when a slab gets its class (a slot's id
//! follows from the place of its slab).

use crate::abi;
use crate::chunk::{ChunkCounts, ChunkRecord, ChunkTable, ChunkWord, SlotLine, lines_for};
use crate::directory::{Bucket, Directory};
use crate::epoch::Epoch;
use crate::life::LifeWord;
use crate::lobby::CLIENTS_MAX;
use crate::mapping::{Mapping, One, OutOfBounds, Pad, Shared, View};
use crate::message::{ANY_NAMESPACE, DTYPE_BYTES, MODEL_NAME_BYTES, Registration};
use crate::namespace::{namespace_id, namespace_index};
use crate::slot::{SLOT_HEADER_BYTES, SlotHeader};
use crate::superblock::{Geometry, SUPERBLOCK_BYTES, Superblock};
use crate::sync::{AtomicU32, AtomicU64, Ordering, fence};
use crate::text::{load_text, store_text};
use crate::{futex, slot};
use std::sync::Arc;

abi! {
    /// The most namespaces that an engine can have.
    pub const NAMESPACES_MAX: usize = 64;

    /// The most ranks that a namespace can have.
    pub const RANKS_MAX: usize = 64;

    /// The life word by which an engine owns its segments; the others belong to the client entries of the same index.
    pub const OWNER_WORD: usize = CLIENTS_MAX;

    /// Life words in this segment.
    pub const LIFE_WORDS: usize = CLIENTS_MAX + 1;

    const EPOCH_AT: usize = SUPERBLOCK_BYTES;

    const INFO_AT: usize = EPOCH_AT + size_of::<Epoch>();

    const CHUNK_COUNTS_AT: usize = INFO_AT + size_of::<EngineInfo>();

    const TERMS_AT: usize = CHUNK_COUNTS_AT + size_of::<ChunkCounts>();

    const STATS_AT: usize = 1024;

    /// Words of the statistics block.
    pub const STATS_WORDS: usize = 256;

    /// Offset of the life words.
    pub const LIFE_WORDS_AT: usize = 4096;

    /// Offset of the answers to attachments.
    pub const ATTACH_AT: usize = 12288;

    /// Offset of the namespaces.
    pub const NAMESPACES_AT: usize = 16384;

    /// Offset of the slab table. The directory, the chunk records, their lines and the slot table follow, each on a new page.
    pub const SLABS_AT: usize = NAMESPACES_AT + NAMESPACES_MAX * size_of::<Namespace>();

    /// Offsets and length of the segment for an example, so that the layout hash covers how [`Places`] rounds.
    const DIRECTORY_AT_EXAMPLE: u64 = EXAMPLE.directory_at;
    const RECORDS_AT_EXAMPLE: u64 = EXAMPLE.records_at;
    const LINES_AT_EXAMPLE: u64 = EXAMPLE.lines_at;
    const SLOTS_AT_EXAMPLE: u64 = EXAMPLE.slots_at;
    const BYTES_EXAMPLE: u64 = EXAMPLE.bytes;

    /// What the engine says of itself, for `status`.
    #[repr(C, align(64))]
    pub struct EngineInfo {
        /// Process id, in the engine's PID namespace.
        pub pid: AtomicU32,
        /// The beat moves at least once in this time, in microseconds.
        pub beat_interval_us: AtomicU32,
        /// When it started, in nanoseconds since the Unix epoch.
        pub started_unix_ns: AtomicU64,
        /// Slabs that are allocated so far.
        pub slabs_allocated: AtomicU32,
        /// 0 while it is healthy; else the number of the self-check that failed, as the engine numbers them.
        pub unhealthy: AtomicU32,
        /// Eviction policy: zero-padded name.
        pub policy: [AtomicU64; 2],
        /// Recoveries that have begun since one was last completed. After two the next engine starts cold: what it would
        /// recover may be what made them fail.
        pub recoveries: AtomicU32,
        /// The engine's [`Means::to_bits`](crate::means::Means::to_bits).
        pub stand_ins: AtomicU32,
        /// 1: the engine has ended because it was asked to, and has left its segments for a successor. An engine that has ended
        /// and left a 0 here has died.
        pub stopped: AtomicU32,
        _pad: Pad<12>,
    }

    /// What schedulers go by that read the engine's tables: see [`lookup`](crate::lookup).
    #[repr(C, align(64))]
    pub struct ReaderTerms {
        /// The most bytes that one client may hold, in whole slots, each chunk counted once.
        client_bytes: AtomicU64,
        /// The most chunks that one client may hold in all its leases together, and the most leases.
        client_pins: AtomicU32,
        client_leases: AtomicU32,
        /// The incarnation of the last engine that was free to evict.
        evicting: AtomicU32,
        _pad: Pad<44>,
    }

    /// A counter or gauge of the engine's: one word, stored plainly by the service thread.
    #[repr(transparent)]
    pub struct StatWord(AtomicU64);

    /// How an attachment stands.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum AttachStatus: u32 {
        /// Not answered yet.
        None = 0,
        /// The engine reads the channel.
        Attached = 1,
        /// The channel is not there, not ours, too short or not well formed.
        BadChannel = 2,
        /// The entry names a role that does not exist.
        BadRole = 3,
        /// The client meant another incarnation.
        Stale = 4,
        /// The client left.
        Left = 5,
        /// The client broke the protocol: the engine no longer reads its channel.
        Breach = 6,
    }

    /// The engine's answer to the client in one entry.
    #[repr(C, align(64))]
    pub struct AttachRecord {
        /// Counts answers; the client sleeps on it.
        answers: AtomicU32,
        _pad0: Pad<4>,
        /// The attachment that is answered and its status, in one word: the nonce, with the status in place of its low byte.
        answer: AtomicU64,
        _pad: Pad<48>,
    }

    /// The bits of an answer that are its status.
    const STATUS_MASK: u64 = 0xFF;

    /// A registered namespace. Fields are fixed once the word says ready; ranks fill in as they register.
    #[repr(C, align(64))]
    pub struct Namespace {
        /// The state, and above it how many namespaces have begun here: see their [ids](crate::namespace).
        word: AtomicU32,
        world: AtomicU32,
        chunk_tokens: AtomicU32,
        _pad0: Pad<4>,
        fingerprint: [AtomicU64; 4],
        ranks: AtomicU64,
        model: [AtomicU64; MODEL_NAME_BYTES / 8],
        dtype: [AtomicU64; DTYPE_BYTES / 8],
        _pad1: Pad<56>,
        layout: [AtomicU64; RANKS_MAX],
        shard_bytes: [AtomicU64; RANKS_MAX],
    }

    const NAMESPACE_FREE: u32 = 0;

    const NAMESPACE_READY: u32 = 1;

    /// What each new namespace adds to the word of its record. The bits below are the state.
    const NAMESPACE_BEGINS: u32 = 1 << 8;

    /// The id of an example: another way to pack it changes the layout hash.
    const NAMESPACE_ID_EXAMPLE: u32 = namespace_id(3, 5);

    /// The class and the span of one slab. A recovery reads these records first; the slots' headers say the rest.
    #[repr(C, align(16))]
    pub struct SlabRecord {
        /// Bytes of each slot; 0 while the slab has no class, and in all slabs of a span but the first.
        class_bytes: AtomicU64,
        /// Slabs in the span that starts here.
        span: AtomicU32,
        _pad: Pad<4>,
    }
}

const NAMESPACE_STATE_MASK: u32 = NAMESPACE_BEGINS - 1;

const _: () = {
    // No namespace has that index.
    assert!(namespace_index(ANY_NAMESPACE) as usize >= NAMESPACES_MAX);
    assert!(TERMS_AT + size_of::<ReaderTerms>() <= STATS_AT);
    assert!(STATS_AT + STATS_WORDS * 8 <= LIFE_WORDS_AT);
    assert!(LIFE_WORDS_AT + LIFE_WORDS * size_of::<LifeWord>() <= ATTACH_AT);
    assert!(ATTACH_AT + CLIENTS_MAX * size_of::<AttachRecord>() <= NAMESPACES_AT);
    assert!(SLABS_AT.is_multiple_of(4096));
};

// SAFETY: atomics and padding.
unsafe impl Shared for EngineInfo {}
const _: () = assert!(size_of::<EngineInfo>() == 64);

// SAFETY: atomics and padding.
unsafe impl Shared for ReaderTerms {}
const _: () = assert!(size_of::<ReaderTerms>() == 64);

/// How much one client may hold. An engine has room for as much from each of its clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientShare {
    /// Bytes, in whole slots, each chunk counted once.
    pub bytes: u64,
    /// Chunks in all leases together.
    pub pins: u32,
    /// Leases.
    pub leases: u32,
}

impl ReaderTerms {
    /// Engine: sets what each client may hold, before it serves.
    pub fn set_share(&self, ClientShare { bytes, pins, leases }: ClientShare) {
        // Relaxed: the incarnation (Release) tells that the engine serves.
        self.client_bytes.store(bytes, Ordering::Relaxed);
        self.client_pins.store(pins, Ordering::Relaxed);
        self.client_leases.store(leases, Ordering::Relaxed);
    }

    /// Client: what it may hold.
    #[must_use]
    pub fn share(&self) -> ClientShare {
        ClientShare {
            bytes: self.client_bytes.load(Ordering::Relaxed),
            pins: self.client_pins.load(Ordering::Relaxed),
            leases: self.client_leases.load(Ordering::Relaxed),
        }
    }

    /// Engine: from now on it may evict, whether or not all clients of the engine before it have declared what they hold.
    pub fn set_evicting(&self, incarnation: u32) {
        // Relaxed: the fence orders it. It comes before the first mark, so that whoever sees a mark of this engine sees this.
        self.evicting.store(incarnation, Ordering::Relaxed);
        crate::lookup::fence();
    }

    /// Scheduler, after the [`fence`](crate::lookup::fence): has an engine begun to evict that is younger than the one with this
    /// incarnation, to which the scheduler has told what it holds?
    #[must_use]
    pub fn is_evicted_without(&self, incarnation: u32) -> bool {
        (self.evicting.load(Ordering::Relaxed).wrapping_sub(incarnation) as i32) > 0
    }
}

// SAFETY: one atomic.
unsafe impl Shared for StatWord {}

impl StatWord {
    /// The value.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Sets it (service thread).
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// Adds to it (service thread, the only writer, so a load and a store suffice).
    pub fn add(&self, value: u64) {
        self.set(self.get().wrapping_add(value));
    }
}

impl AttachStatus {
    /// For messages: what the engine says of the client.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            AttachStatus::None => "not answered yet",
            AttachStatus::Attached => "attached",
            AttachStatus::BadChannel => "its channel is missing or not well formed",
            AttachStatus::BadRole => "it has a role that does not exist",
            AttachStatus::Stale => "it meant an engine from before the last restart",
            AttachStatus::Left => "it has left",
            AttachStatus::Breach => "it broke the protocol",
        }
    }
}

// SAFETY: atomics and padding.
unsafe impl Shared for AttachRecord {}
const _: () = assert!(size_of::<AttachRecord>() == 64);

impl AttachRecord {
    /// Engine: answers the client with this nonce, and wakes it.
    pub fn answer(&self, nonce: u64, status: AttachStatus) {
        // SYNC POINT: Release; pairs with the Acquire in `read`.
        self.answer.store(nonce & !STATUS_MASK | u64::from(status as u32), Ordering::Release);
        // SYNC POINT: Release; pairs with the Acquire in `word`: a client that sees the count sees the answer.
        self.answers.store(self.answers.load(Ordering::Relaxed).wrapping_add(1), Ordering::Release);
        futex::wake_all(&self.answers);
    }

    /// Client: the answer to the attachment with this nonce; [`AttachStatus::None`] while the answer here is another's.
    #[must_use]
    pub fn read(&self, nonce: u64) -> AttachStatus {
        // SYNC POINT: Acquire; pairs with the Release in `answer`.
        let answer = self.answer.load(Ordering::Acquire);
        if (answer ^ nonce) & !STATUS_MASK != 0 {
            return AttachStatus::None;
        }
        AttachStatus::from_number(answer & STATUS_MASK).unwrap_or(AttachStatus::None)
    }

    /// For a sleep: the word and its value. A client takes them before it calls `read`, or it could miss an answer.
    #[must_use]
    pub fn word(&self) -> (&AtomicU32, u32) {
        (&self.answers, self.answers.load(Ordering::Acquire))
    }
}

// SAFETY: atomics and padding.
unsafe impl Shared for Namespace {}
const _: () = assert!(size_of::<Namespace>() == 1216 && size_of::<Namespace>().is_multiple_of(64));

/// A namespace as a reader sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamespaceInfo {
    /// Its id.
    pub id: u32,
    /// Its fingerprint.
    pub fingerprint: [u64; 4],
    /// Number of ranks.
    pub world: u32,
    /// Tokens per chunk.
    pub chunk_tokens: u32,
    /// The ranks that have registered, one bit each.
    pub ranks: u64,
    /// The model's name: for people.
    pub model: String,
    /// The dtype's name: for people.
    pub dtype: String,
    /// Bytes per shard, of the ranks that have registered.
    pub shard_bytes: Vec<u64>,
}

impl Namespace {
    /// Engine: begins a new namespace, without ranks, in the record at this index, of which the last one has ended. Returns its
    /// id.
    pub fn begin(&self, index: u8, registration: &Registration) -> u32 {
        let word = (self.word.load(Ordering::Relaxed) & !NAMESPACE_STATE_MASK).wrapping_add(NAMESPACE_BEGINS);
        self.word.store(word | NAMESPACE_FREE, Ordering::Relaxed);
        // SYNC POINT: Release fence; pairs with the Acquire fence in `id_of`. A reader that has read any of these fields finds
        // this word, or a later one.
        fence(Ordering::Release);
        for (to, from) in self.fingerprint.iter().zip(registration.fingerprint) {
            to.store(from, Ordering::Relaxed);
        }
        self.world.store(registration.world, Ordering::Relaxed);
        self.chunk_tokens.store(registration.chunk_tokens, Ordering::Relaxed);
        self.ranks.store(0, Ordering::Relaxed);
        store_text(&self.model, &registration.model);
        store_text(&self.dtype, &registration.dtype);
        // SYNC POINT: Release; pairs with the Acquire in `id`.
        self.word.store(word | NAMESPACE_READY, Ordering::Release);
        namespace_id(index, word / NAMESPACE_BEGINS)
    }

    /// Engine: enters a rank that has registered.
    pub fn set_rank(&self, rank: usize, layout: u64, shard_bytes: u64) {
        self.layout[rank].store(layout, Ordering::Relaxed);
        self.shard_bytes[rank].store(shard_bytes, Ordering::Relaxed);
        let ranks = self.ranks.load(Ordering::Relaxed) | (1 << rank);
        // SYNC POINT: Release; pairs with the Acquire in `rank_layout` and `read`.
        self.ranks.store(ranks, Ordering::Release);
    }

    /// Engine: ends the namespace. The record may be used for another one, which gets another id.
    pub fn end(&self) {
        let word = self.word.load(Ordering::Relaxed) & !NAMESPACE_STATE_MASK;
        // SYNC POINT: Release; pairs with the Acquire in `id`.
        self.word.store(word | NAMESPACE_FREE, Ordering::Release);
    }

    /// The id of the namespace that is here, in the record at this index.
    #[must_use]
    pub fn id(&self, index: u8) -> Option<u32> {
        // SYNC POINT: Acquire; pairs with the Release in `begin`.
        let word = self.word.load(Ordering::Acquire);
        let is_ready = word & NAMESPACE_STATE_MASK == NAMESPACE_READY;
        is_ready.then(|| namespace_id(index, word / NAMESPACE_BEGINS))
    }

    /// The id of the namespace that is here, in the record at this index, if it has that fingerprint.
    #[must_use]
    pub fn id_of(&self, index: u8, fingerprint: &[u64; 4]) -> Option<u32> {
        let id = self.id(index)?;
        let mut words = self.fingerprint.iter().zip(fingerprint);
        let is_it = words.all(|(have, want)| have.load(Ordering::Relaxed) == *want);
        // SYNC POINT: Acquire fence; pairs with the Release fence in `begin`. If a word of the fingerprint was another
        // namespace's, which has begun here meanwhile, this load sees that.
        fence(Ordering::Acquire);
        (is_it && self.id(index) == Some(id)).then_some(id)
    }

    /// Number of ranks.
    #[must_use]
    pub fn world(&self) -> u32 {
        self.world.load(Ordering::Relaxed)
    }

    /// Tokens per chunk.
    #[must_use]
    pub fn chunk_tokens(&self) -> u32 {
        self.chunk_tokens.load(Ordering::Relaxed)
    }

    /// Layout digest and bytes per shard of a rank that has registered.
    #[must_use]
    pub fn rank_layout(&self, rank: usize) -> Option<(u64, u64)> {
        // SYNC POINT: Acquire; pairs with the Release in `set_rank`.
        let ranks = self.ranks.load(Ordering::Acquire);
        if rank >= RANKS_MAX || ranks & (1 << rank) == 0 {
            return None;
        }
        Some((self.layout[rank].load(Ordering::Relaxed), self.shard_bytes[rank].load(Ordering::Relaxed)))
    }

    /// Everything in the record at this index, for `status` and for a recovery; `None` for a free record.
    #[must_use]
    pub fn read(&self, index: u8) -> Option<NamespaceInfo> {
        let id = self.id(index)?;
        let ranks = self.ranks.load(Ordering::Acquire);
        let mut fingerprint = [0; 4];
        for (to, from) in fingerprint.iter_mut().zip(&self.fingerprint) {
            *to = from.load(Ordering::Relaxed);
        }
        Some(NamespaceInfo {
            id,
            fingerprint,
            world: self.world(),
            chunk_tokens: self.chunk_tokens(),
            ranks,
            model: load_text(&self.model),
            dtype: load_text(&self.dtype),
            shard_bytes: (0..RANKS_MAX)
                .filter_map(|rank| self.rank_layout(rank))
                .map(|(_, bytes)| bytes)
                .collect(),
        })
    }
}

// SAFETY: atomics and padding.
unsafe impl Shared for SlabRecord {}
const _: () = assert!(size_of::<SlabRecord>() == 16);

impl SlabRecord {
    /// Engine: cuts `span` slabs, from this one on, into slots of `class_bytes`. It calls this when the headers of all those
    /// slots have memory, and before it uses one of them.
    pub fn assign(&self, class_bytes: u64, span: u32) {
        self.span.store(span, Ordering::Relaxed);
        // SYNC POINT: Release; pairs with the Acquire in `get`. An engine that dies before this store leaves a 0 here.
        self.class_bytes.store(class_bytes, Ordering::Release);
    }

    /// Engine: gives the span up, after it has freed the last of its slots.
    pub fn clear(&self) {
        self.class_bytes.store(0, Ordering::Release);
    }

    /// Bytes of each slot, and slabs, of the span that starts here, if one does.
    #[must_use]
    pub fn get(&self) -> Option<(u64, u32)> {
        let class_bytes = self.class_bytes.load(Ordering::Acquire);
        (class_bytes != 0).then(|| (class_bytes, self.span.load(Ordering::Relaxed)))
    }
}

/// The places in the segment that depend on the geometry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Places {
    /// First byte of the directory.
    pub directory_at: u64,
    /// First byte of the chunk records. Everything before it has memory from the start on; from here on the segment is sparse.
    pub records_at: u64,
    /// First byte of the lines that belong to the records.
    pub lines_at: u64,
    /// First byte of the slot table.
    pub slots_at: u64,
    /// Bytes of the segment.
    pub bytes: u64,
}

/// The places for 257 slabs and 4097 chunks: each table ends one item behind a page, and another rounding would show.
const EXAMPLE: Places =
    Places::of(&Geometry { arena_bytes: 257 << 20, slab_bytes: 1 << 20, max_chunks: 4097 });

impl Places {
    /// The places for a geometry.
    #[must_use]
    pub const fn of(geometry: &Geometry) -> Places {
        const fn behind(at: u64, count: usize, bytes: usize) -> u64 {
            (at + count as u64 * bytes as u64).next_multiple_of(4096)
        }
        let chunks = geometry.max_chunks;
        let directory_at = behind(SLABS_AT as u64, geometry.slab_count(), size_of::<SlabRecord>());
        let records_at = behind(directory_at, Directory::buckets_for(chunks), size_of::<Bucket>());
        let lines_at = behind(records_at, chunks as usize, size_of::<ChunkRecord>());
        let slots_at = behind(lines_at, lines_for(chunks), size_of::<SlotLine>());
        let bytes = behind(slots_at, geometry.slot_count(), SLOT_HEADER_BYTES);
        Places { directory_at, records_at, lines_at, slots_at, bytes }
    }
}

/// The mapped segment: typed views, bounds checked once.
#[derive(Clone)]
pub struct EngineSegment {
    mapping: Arc<Mapping>,
    /// One word per client entry, then the owner word.
    pub life_words: View<LifeWord>,
    /// One per client entry.
    pub attach: View<AttachRecord>,
    /// Namespace table.
    pub namespaces: View<Namespace>,
    /// Slab table.
    pub slabs: View<SlabRecord>,
    /// Slot table.
    pub slots: View<SlotHeader>,
    /// Chunk records, and the directory that leads to them.
    pub chunks: ChunkTable,
    /// Statistics.
    pub stats: View<StatWord>,
    epoch: One<Epoch>,
    info: One<EngineInfo>,
    terms: One<ReaderTerms>,
}

impl EngineSegment {
    /// Views into a mapped segment of this geometry, which belongs to the arena with this id.
    pub fn new(
        mapping: Arc<Mapping>,
        geometry: &Geometry,
        arena_id: [u64; 2],
    ) -> Result<EngineSegment, OutOfBounds> {
        let (places, chunks) = (Places::of(geometry), geometry.max_chunks as usize);
        let buckets =
            View::new(&mapping, places.directory_at as usize, Directory::buckets_for(geometry.max_chunks))?;
        Ok(EngineSegment {
            chunks: ChunkTable::new(
                View::new(&mapping, places.records_at as usize, chunks)?,
                View::new(&mapping, places.lines_at as usize, lines_for(geometry.max_chunks))?,
                One::new(&mapping, CHUNK_COUNTS_AT)?,
                // The arena's id is random, and the same for all engines that take the segment over.
                Directory::new(buckets, arena_id),
            ),
            life_words: View::new(&mapping, LIFE_WORDS_AT, LIFE_WORDS)?,
            attach: View::new(&mapping, ATTACH_AT, CLIENTS_MAX)?,
            namespaces: View::new(&mapping, NAMESPACES_AT, NAMESPACES_MAX)?,
            slabs: View::new(&mapping, SLABS_AT, geometry.slab_count())?,
            slots: View::new(&mapping, places.slots_at as usize, geometry.slot_count())?,
            stats: View::new(&mapping, STATS_AT, STATS_WORDS)?,
            epoch: One::new(&mapping, EPOCH_AT)?,
            info: One::new(&mapping, INFO_AT)?,
            terms: One::new(&mapping, TERMS_AT)?,
            mapping,
        })
    }

    /// The superblock.
    #[must_use]
    pub fn superblock(&self) -> &Superblock {
        superblock_of(&self.mapping)
    }

    /// The epoch.
    #[must_use]
    #[inline]
    pub fn epoch(&self) -> &Epoch {
        &self.epoch
    }

    /// What the engine says of itself.
    #[must_use]
    pub fn info(&self) -> &EngineInfo {
        &self.info
    }

    /// What schedulers go by that read the tables.
    #[must_use]
    #[inline]
    pub fn terms(&self) -> &ReaderTerms {
        &self.terms
    }

    /// A namespace's id by its fingerprint.
    #[must_use]
    pub fn find_namespace(&self, fingerprint: &[u64; 4]) -> Option<u32> {
        (0u8..).zip(self.namespaces.iter()).find_map(|(index, namespace)| namespace.id_of(index, fingerprint))
    }

    /// Is the namespace with this id still there?
    #[must_use]
    pub fn has_namespace(&self, id: u32) -> bool {
        let index = namespace_index(id);
        self.namespaces.get(usize::from(index)).is_some_and(|namespace| namespace.id(index) == Some(id))
    }

    /// The header of a slot, if there is such a slot.
    #[must_use]
    pub fn slot(&self, slot: u32) -> Option<&slot::SlotHeader> {
        self.slots.get(slot as usize)
    }
}

/// The superblock at the start of a mapped segment (at least a page long, as all are).
fn superblock_of(mapping: &Mapping) -> &Superblock {
    match mapping.at::<Superblock>(0) {
        Ok(block) => block,
        // `EngineSegment::new` has made views far behind it.
        Err(_) => unreachable!("a mapped engine segment is longer than its superblock"),
    }
}

/// A chunk as the answer to a lookup names it, for the workers that load it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkHandle {
    /// The arena's id.
    pub arena_id: [u64; 2],
    /// The chunk.
    pub word: ChunkWord,
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::sync::AtomicBool;

    #[test]
    fn each_namespace_in_a_place_has_an_id_of_its_own() {
        let mapping = std::sync::Arc::new(Mapping::private(4096));
        let record: One<Namespace> = One::new(&mapping, 0).unwrap();
        let registration = |fingerprint| Registration { fingerprint, ..bytemuck::Zeroable::zeroed() };
        assert_eq!((record.id(5), record.read(5)), (None, None));
        for begins in 1..4 {
            let (id, fingerprint) = (namespace_id(5, begins), [u64::from(begins); 4]);
            assert_eq!(record.begin(5, &registration(fingerprint)), id);
            assert_eq!((record.id(5), record.read(5).unwrap().id), (Some(id), id));
            assert_eq!((record.id_of(5, &fingerprint), record.id_of(5, &[0; 4])), (Some(id), None));
            record.end();
            assert_eq!((record.id(5), record.id_of(5, &fingerprint), record.read(5)), (None, None, None));
        }
        // After 2²⁴ of them the numbers begin again.
        record.word.store(!NAMESPACE_STATE_MASK, Ordering::Relaxed);
        assert_eq!(record.begin(5, &registration([1; 4])), namespace_id(5, 0));
    }

    /// Each nonce is answered with a status that follows from it; a reader must never see another nonce's.
    #[test]
    fn an_answer_is_never_torn() {
        let mapping = std::sync::Arc::new(Mapping::private(4096));
        let record: One<AttachRecord> = One::new(&mapping, 0).unwrap();
        let stop = AtomicBool::new(false);
        let latest = AtomicU64::new(1);
        let torn = std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut nonce = 1 << 8;
                while !stop.load(Ordering::Relaxed) {
                    nonce += 1 << 8;
                    latest.store(nonce, Ordering::Relaxed);
                    let status =
                        if nonce >> 8 & 1 == 0 { AttachStatus::Stale } else { AttachStatus::Attached };
                    record.answer(nonce, status);
                }
            });
            let began = std::time::Instant::now();
            let mut torn = 0u64;
            while began.elapsed().as_millis() < 300 {
                let nonce = latest.load(Ordering::Relaxed);
                let expected = if nonce >> 8 & 1 == 0 { AttachStatus::Stale } else { AttachStatus::Attached };
                let read = record.read(nonce);
                torn += u64::from(read != AttachStatus::None && read != expected);
            }
            stop.store(true, Ordering::Relaxed);
            torn
        });
        assert_eq!(torn, 0, "answers with another nonce's status");
    }
}
