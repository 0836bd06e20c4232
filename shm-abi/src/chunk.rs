//! Chunk records: which chunks are visible, and where their shards lie. The engine writes them in its segment, and leads to them
//! by the [directory](crate::directory).
//!
//! A record has the same id as its chunk. Its word holds `state | generation`. A chunk becomes visible by a store of the word
//! after everything else has been written, and ends by a store of the word before anything of it is given away: before the
//! first of its slots is freed. The generation grows with each end, so a reader that finds the same word before and after it
//! has read the fields has read the fields of one life. What changes with each access is not here: readers share these lines.

use crate::abi;
use crate::directory::{CHUNK_ID_BITS, CHUNK_IDS, Directory, Spot};
use crate::failpoint::{self, Place, Rule};
#[cfg(not(loom))]
use crate::mapping::Mapping;
use crate::mapping::{One, Pad, Shared, View, prefetch};
use crate::namespace::namespace_index;
use crate::sync::{AtomicU32, AtomicU64, Ordering, fence};

abi! {
    /// What a record says of its chunk.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum ChunkState: u8 {
        /// Nothing: there is none, or it is not visible.
        Free = 0,
        /// All its shards are committed, and lookups find it.
        Visible = 1,
        /// As `Visible`, but the engine wants its room: no lookup finds it until the engine has decided. Whoever holds it may
        /// load it.
        Evicting = 2,
    }

    /// Bits of the word that are the state, from the lowest one on. The next ones are the generation.
    const STATE_BITS: u32 = 2;

    /// Bits of a generation: together with a chunk's id they fill a word.
    const GENERATION_BITS: u32 = u64::BITS - CHUNK_ID_BITS;

    /// The most ranks whose slots a chunk has in its own record.
    pub const RANKS_INLINE: usize = 4;

    /// How many slots a line has.
    pub const LINE_SLOTS: usize = 16;

    /// The most lines that a chunk has.
    pub const LINES_MAX: usize = 4;

    /// One chunk, in one cache line.
    #[repr(C, align(64))]
    pub struct ChunkRecord {
        word: AtomicU64,
        key: [AtomicU64; 2],
        namespace: AtomicU32,
        _pad0: Pad<4>,
        /// The slot of each rank; in a namespace of more ranks than [`RANKS_INLINE`] the lines that have the slots.
        place: [AtomicU32; LINES_MAX],
        _pad1: Pad<16>,
    }

    /// The slots of up to [`LINE_SLOTS`] ranks of one chunk.
    #[repr(C, align(64))]
    pub struct SlotLine {
        slots: [AtomicU32; LINE_SLOTS],
    }

    /// How many records and lines have memory. Nobody looks at one beyond: that would take memory for it.
    #[repr(C, align(64))]
    pub struct ChunkCounts {
        records: AtomicU32,
        lines: AtomicU32,
        _pad: Pad<56>,
    }
}

const STATE_MASK: u64 = (1 << STATE_BITS) - 1;
const NEXT_GENERATION: u64 = 1 << STATE_BITS;
const WORD_MASK: u64 = (1 << (STATE_BITS + GENERATION_BITS)) - 1;
const _: () = assert!(RANKS_INLINE <= LINES_MAX);

/// The generation in a record's word. The bits above it are not used.
#[inline(always)]
pub(crate) const fn generation_of(word: u64) -> u64 {
    (word & WORD_MASK) >> STATE_BITS
}

/// What a record's word says of its chunk.
#[inline(always)]
pub(crate) const fn state_of(word: u64) -> Option<ChunkState> {
    match word & STATE_MASK {
        0 => Some(ChunkState::Free),
        1 => Some(ChunkState::Visible),
        2 => Some(ChunkState::Evicting),
        _ => None,
    }
}

#[inline(always)]
const fn is_there(word: u64) -> bool {
    matches!(state_of(word), Some(ChunkState::Visible | ChunkState::Evicting))
}

// SAFETY: atomics and padding only.
unsafe impl Shared for ChunkRecord {}
// SAFETY: atomics only.
unsafe impl Shared for SlotLine {}
// SAFETY: atomics and padding only.
unsafe impl Shared for ChunkCounts {}

#[cfg(not(loom))]
const _: () = {
    assert!(size_of::<ChunkRecord>() == 64);
    assert!(size_of::<SlotLine>() == 64);
    assert!(size_of::<ChunkCounts>() == 64);
};

/// How many lines there are for this many chunks: enough for one chunk of any world.
#[must_use]
pub const fn lines_for(chunks: u32) -> usize {
    if chunks as usize > LINES_MAX { chunks as usize } else { LINES_MAX }
}

/// How many lines a chunk of this many ranks has.
#[inline(always)]
#[must_use]
pub const fn lines_of(world: u32) -> usize {
    if world as usize > RANKS_INLINE { (world as usize).div_ceil(LINE_SLOTS) } else { 0 }
}

/// A visible chunk in one word: its id, and the generation of its record. In one arena no two chunks ever have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChunkWord(u64);

impl ChunkWord {
    /// Packs: the id, the generation, from the lowest bit on.
    #[must_use]
    #[inline(always)]
    pub const fn new(chunk: u32, generation: u64) -> ChunkWord {
        ChunkWord((generation << CHUNK_ID_BITS) | chunk as u64)
    }

    /// The word with these bits.
    #[must_use]
    pub const fn from_bits(bits: u64) -> ChunkWord {
        ChunkWord(bits)
    }

    /// Its bits.
    #[must_use]
    #[inline(always)]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// The chunk's id.
    #[must_use]
    pub const fn chunk(self) -> u32 {
        self.0 as u32 & (CHUNK_IDS - 1)
    }

    /// The generation of its record: the low 40 bits, which is more than a record is ever used.
    #[must_use]
    pub const fn generation(self) -> u64 {
        self.0 >> CHUNK_ID_BITS
    }
}

/// What a chunk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkIdentity {
    /// Its key.
    pub key: [u64; 2],
    /// The [id](crate::namespace) of the namespace in which the key means something.
    pub namespace: u32,
}

/// A visible chunk, as its record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkContent {
    /// What it is.
    pub identity: ChunkIdentity,
    /// The record's generation.
    pub generation: u64,
    /// The slots of its ranks, or the lines that have them.
    pub place: [u32; LINES_MAX],
}

impl ChunkRecord {
    /// A record in private memory, for models.
    #[cfg(loom)]
    #[must_use]
    #[allow(clippy::new_without_default, reason = "made in models alone")]
    pub fn new() -> ChunkRecord {
        ChunkRecord {
            word: AtomicU64::new(0),
            key: core::array::from_fn(|_| AtomicU64::new(0)),
            namespace: AtomicU32::new(0),
            _pad0: Pad::new(),
            place: core::array::from_fn(|_| AtomicU32::new(0)),
            _pad1: Pad::new(),
        }
    }

    /// The chunk, if there is one: visible, or being evicted.
    #[must_use]
    pub fn read(&self) -> Option<ChunkContent> {
        // SYNC POINT: Acquire; pairs with the Release in `show`, so the fields are at least those of this life.
        let word = self.word.load(Ordering::Acquire);
        let content = self.content(word)?;
        // SYNC POINT: Acquire fence; pairs with the Release fence in `fill`. If a field was of a later life, this load sees the
        // word that ended the earlier one.
        fence(Ordering::Acquire);
        (self.word.load(Ordering::Relaxed) == word).then_some(content)
    }

    /// [`ChunkRecord::read`] without its fence: the negative control of the models. Never use it.
    #[cfg(loom)]
    #[must_use]
    pub fn read_broken(&self) -> Option<ChunkContent> {
        let word = self.word.load(Ordering::Acquire);
        let content = self.content(word)?;
        (self.word.load(Ordering::Relaxed) == word).then_some(content)
    }

    /// Worker, after it has read a slot to which this record led: was that the chunk's slot then? A record leaves its
    /// generation before the first of its slots is freed.
    #[must_use]
    pub fn is_still(&self, generation: u64) -> bool {
        // SYNC POINT: Acquire fence; pairs with the Release in `end` by way of the slot: its next words and fields are stored
        // after that, so whoever has read one of them reads here that the record has ended.
        fence(Ordering::Acquire);
        let word = self.word.load(Ordering::Relaxed);
        is_there(word) && (generation_of(word) == generation || failpoint::broken(Rule::Generation))
    }

    fn content(&self, word: u64) -> Option<ChunkContent> {
        if !is_there(word) {
            return None;
        }
        let key = [self.key[0].load(Ordering::Relaxed), self.key[1].load(Ordering::Relaxed)];
        let namespace = self.namespace.load(Ordering::Relaxed);
        let place = core::array::from_fn(|at| self.place[at].load(Ordering::Relaxed));
        Some(ChunkContent {
            identity: ChunkIdentity { key, namespace },
            generation: generation_of(word),
            place,
        })
    }

    /// Engine: writes the fields of the next life.
    pub fn fill(&self, identity: ChunkIdentity, place: [u32; LINES_MAX]) {
        // SYNC POINT: Release fence; pairs with the Acquire fence in `read`. A reader that has read any of these fields finds the
        // word that ended the life before, or a later one.
        fence(Ordering::Release);
        self.store(identity, place);
    }

    /// [`ChunkRecord::fill`] without its fence: the negative control of the models. Never use it.
    #[cfg(loom)]
    pub fn fill_broken(&self, identity: ChunkIdentity, place: [u32; LINES_MAX]) {
        self.store(identity, place);
    }

    fn store(&self, ChunkIdentity { key, namespace }: ChunkIdentity, place: [u32; LINES_MAX]) {
        self.key[0].store(key[0], Ordering::Relaxed);
        self.key[1].store(key[1], Ordering::Relaxed);
        self.namespace.store(namespace, Ordering::Relaxed);
        for (to, from) in self.place.iter().zip(place) {
            to.store(from, Ordering::Relaxed);
        }
    }

    /// Engine: the chunk is visible from now on. Everything of it has been written.
    pub fn show(&self) {
        let word = self.word.load(Ordering::Relaxed) & !STATE_MASK | ChunkState::Visible as u64;
        // SYNC POINT: Release; pairs with the Acquire in `read`.
        self.word.store(word, Ordering::Release);
    }

    /// Engine: no lookup finds the chunk until the engine has decided ([`ChunkRecord::show`] or [`ChunkRecord::end`]). After it
    /// has marked chunks in this way, and before it decides, it listens to all schedulers: see [`lookup`](crate::lookup).
    pub fn mark(&self) {
        let word = self.word.load(Ordering::Relaxed) & !STATE_MASK | ChunkState::Evicting as u64;
        // Relaxed: the fence that pairs is the caller's, after the last mark (`lookup::fence`).
        self.word.store(word, Ordering::Relaxed);
    }

    /// The word as it is now: see [`lookup`](crate::lookup).
    #[inline(always)]
    pub(crate) fn word(&self, order: Ordering) -> u64 {
        self.word.load(order)
    }

    /// The key and the namespace: of the life that the caller reads the word of, before and after this.
    #[inline(always)]
    pub(crate) fn is_of(&self, namespace: u32, key: [u64; 2]) -> bool {
        let own = [self.key[0].load(Ordering::Relaxed), self.key[1].load(Ordering::Relaxed)];
        own == key && self.namespace.load(Ordering::Relaxed) == namespace
    }

    /// Engine: the chunk is not visible any more. Only after that it may be taken apart.
    pub fn end(&self) {
        let word =
            (self.word.load(Ordering::Relaxed) & !STATE_MASK).wrapping_add(NEXT_GENERATION) & WORD_MASK;
        // SYNC POINT: Release; pairs with the Acquire of a successor's `read`. The slots' next words are stored after it.
        self.word.store(word, Ordering::Release);
    }
}

/// All records of an engine, the lines that belong to them, and the directory that leads to them.
#[derive(Clone)]
pub struct ChunkTable {
    records: View<ChunkRecord>,
    lines: View<SlotLine>,
    counts: One<ChunkCounts>,
    directory: Directory,
}

impl ChunkTable {
    /// The tables in a segment.
    #[must_use]
    pub fn new(
        records: View<ChunkRecord>,
        lines: View<SlotLine>,
        counts: One<ChunkCounts>,
        directory: Directory,
    ) -> ChunkTable {
        ChunkTable { records, lines, counts, directory }
    }

    /// Tables for this many chunks in private memory, for tests.
    ///
    /// # Panics
    /// When memory is exhausted.
    #[cfg(not(loom))]
    #[must_use]
    pub fn private(chunks: u32) -> ChunkTable {
        ChunkTable::alone_in(&std::sync::Arc::new(Mapping::private(ChunkTable::bytes_alone(chunks))), chunks)
    }

    /// Bytes of a mapping that has nothing but tables for this many chunks, for tests.
    #[cfg(not(loom))]
    #[must_use]
    pub fn bytes_alone(chunks: u32) -> usize {
        (1 + chunks as usize + lines_for(chunks) + Directory::buckets_for(chunks)) * 64
    }

    /// The tables in such a mapping.
    ///
    /// # Panics
    /// When the mapping is too short.
    #[cfg(not(loom))]
    #[must_use]
    #[allow(clippy::expect_used)]
    pub fn alone_in(mapping: &std::sync::Arc<Mapping>, chunks: u32) -> ChunkTable {
        let (records, lines, buckets) = (chunks as usize, lines_for(chunks), Directory::buckets_for(chunks));
        let inside = "a mapping of `bytes_alone`";
        let buckets = View::new(mapping, (1 + records + lines) * 64, buckets).expect(inside);
        ChunkTable {
            counts: One::new(mapping, 0).expect(inside),
            records: View::new(mapping, 64, records).expect(inside),
            lines: View::new(mapping, (1 + records) * 64, lines).expect(inside),
            directory: Directory::new(buckets, [1, 2]),
        }
    }

    /// How many chunks there can be.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.records.len() as u32
    }

    /// There is always one.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// How many records, and how many lines, have memory.
    #[must_use]
    pub fn ready(&self) -> (u32, u32) {
        // SYNC POINT: Acquire; pairs with the Release in `set_ready`.
        let ready = |count: &AtomicU32, all: usize| count.load(Ordering::Acquire).min(all as u32);
        (ready(&self.counts.records, self.records.len()), ready(&self.counts.lines, self.lines.len()))
    }

    /// Engine: this many records and lines have memory now.
    pub fn set_ready(&self, records: u32, lines: u32) {
        // SYNC POINT: Release; pairs with the Acquire in `ready`.
        self.counts.records.store(records, Ordering::Release);
        self.counts.lines.store(lines, Ordering::Release);
    }

    /// The directory.
    #[inline(always)]
    #[must_use]
    pub fn directory(&self) -> &Directory {
        &self.directory
    }

    /// As many records as have memory: nobody looks at one beyond.
    #[inline(always)]
    pub(crate) fn records(&self) -> &[ChunkRecord] {
        let ready = self.ready().0 as usize;
        self.records.get(..ready).unwrap_or_default()
    }

    /// The record of this id. The id may be anything: a record without memory is not looked at, because that would take memory
    /// for it, and would be a SIGBUS where there is none.
    #[inline(always)]
    #[must_use]
    pub(crate) fn record(&self, chunk: u32) -> Option<&ChunkRecord> {
        if chunk < self.ready().0 { self.records.get(chunk as usize) } else { None }
    }

    /// The chunk of this id, if there is one, visible or being evicted. The id may be anything.
    #[must_use]
    pub fn read(&self, chunk: u32) -> Option<ChunkContent> {
        self.record(chunk)?.read()
    }

    /// The chunk that this word names, if it is still there and visible.
    #[must_use]
    pub fn find(&self, word: ChunkWord) -> Option<ChunkContent> {
        self.read(word.chunk())
            .filter(|content| content.generation == word.generation() || failpoint::broken(Rule::Generation))
    }

    /// The word of a visible chunk, which its engine has looked at already.
    #[inline(always)]
    #[must_use]
    pub fn word(&self, chunk: u32) -> Option<ChunkWord> {
        let word = self.records.get(chunk as usize)?.word.load(Ordering::Relaxed);
        Some(ChunkWord::new(chunk, generation_of(word)))
    }

    /// Prefetches a chunk's record.
    #[inline(always)]
    pub fn prefetch(&self, chunk: u32) {
        prefetch(&self.records, chunk as usize);
    }

    /// Worker, after it has read a slot to which the chunk's record led: was that the chunk's slot then?
    #[must_use]
    pub fn is_still_there(&self, word: ChunkWord) -> bool {
        self.record(word.chunk()).is_some_and(|record| record.is_still(word.generation()))
    }

    /// Engine: no lookup finds this chunk until the engine has decided. See [`ChunkRecord::mark`].
    pub fn mark(&self, chunk: u32) {
        self.records[chunk as usize].mark();
        failpoint::here(Place::ChunkMarked);
    }

    /// Engine: if a chunk is marked, it stays, and lookups find it again.
    pub fn spare(&self, chunk: u32) {
        let record = &self.records[chunk as usize];
        if state_of(record.word(Ordering::Relaxed)) == Some(ChunkState::Evicting) {
            record.show();
        }
    }

    /// The slot of a rank's shard of a chunk that was read. `None`: there is no such rank, or its line does not exist.
    #[must_use]
    pub fn slot(&self, content: &ChunkContent, world: u32, rank: u32) -> Option<u32> {
        let (place, rank) = (&content.place, rank as usize);
        if rank >= world as usize {
            return None;
        }
        if lines_of(world) == 0 {
            return place.get(rank).copied();
        }
        let line = *place.get(rank / LINE_SLOTS)?;
        let line = (line < self.ready().1).then(|| self.lines.get(line as usize)).flatten()?;
        Some(line.slots[rank % LINE_SLOTS].load(Ordering::Relaxed))
    }

    /// Engine: makes a chunk visible whose shards are all committed, in these slots. In a namespace of more ranks than
    /// [`RANKS_INLINE`], it has been given these lines. `spot_of` is as for [`Directory::insert`]. False: the directory has no
    /// place for it.
    #[must_use]
    pub fn show(
        &self,
        chunk: u32,
        identity: ChunkIdentity,
        slots: &[u32],
        lines: &[u32],
        spot_of: impl FnMut(u32) -> Option<Spot>,
    ) -> bool {
        debug_assert!(chunk < self.ready().0 && lines.iter().all(|line| *line < self.ready().1));
        debug_assert_eq!(lines.len(), lines_of(slots.len() as u32));
        let record = &self.records[chunk as usize];
        debug_assert!(record.read().is_none(), "chunk {chunk} is visible already");
        let mut place = [0; LINES_MAX];
        let inline = if lines.is_empty() { slots } else { lines };
        place[..inline.len()].copy_from_slice(inline);
        record.fill(identity, place);
        for (line, slots) in lines.iter().zip(slots.chunks(LINE_SLOTS)) {
            for (to, slot) in self.lines[*line as usize].slots.iter().zip(slots) {
                to.store(*slot, Ordering::Relaxed);
            }
        }
        failpoint::here(Place::ChunkFields);
        if !self.directory.insert(self.spot(identity), chunk, spot_of) {
            return false;
        }
        failpoint::here(Place::ChunkHint);
        record.show();
        failpoint::here(Place::ChunkShown);
        true
    }

    /// Engine: a chunk ends. Its slots and lines may be given away after that.
    pub fn end(&self, chunk: u32, identity: ChunkIdentity) {
        failpoint::here(Place::ChunkEnds);
        self.records[chunk as usize].end();
        failpoint::here(Place::ChunkEnded);
        self.directory.remove(self.spot(identity), chunk);
    }

    #[inline(always)]
    fn spot(&self, ChunkIdentity { key, namespace }: ChunkIdentity) -> Spot {
        self.directory.spot(namespace_index(namespace), key)
    }
}
