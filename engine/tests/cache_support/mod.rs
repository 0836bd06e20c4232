//! A slot table over a `Vec` that checks each transition, shared by the cache's tests.
#![allow(dead_code, reason = "each test binary uses its part")]
#![allow(clippy::unwrap_used, reason = "tests")]

pub(crate) mod small;

use kvring_engine::cache::{
    Cache, Found, Held, Hold, HoldError, Key, Owner, Restored, Shard, ShardHeader, SlotId, SlotTable,
};
use kvring_shm_abi::chunk::{ChunkTable, ChunkWord};
use kvring_shm_abi::engine_segment::StatWord as Word;
use kvring_shm_abi::lookup::Marked;
use kvring_shm_abi::mapping::Mapping;
use std::sync::Arc;

/// Where a shard lies, and in which generation of its slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ShardRef {
    pub(crate) slot: SlotId,
    pub(crate) generation: u64,
    pub(crate) offset: u64,
}

/// The published state of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Free,
    Writing(ShardHeader),
    Orphaned(ShardHeader),
    Committed(ShardHeader),
    Hidden(ShardHeader),
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    pub(crate) state: State,
    pub(crate) generation: u64,
    pub(crate) tick: u64,
    pub(crate) checksum: u64,
    pub(crate) ensured: bool,
}

/// The published slots and chunks, and logs of what was freed and touched. A clone is a copy: it shares nothing with its
/// original.
#[derive(Clone)]
pub(crate) struct VecTable {
    chunks: PrivateChunks,
    pub(crate) entries: Vec<Entry>,
    pub(crate) freed: Vec<SlotId>,
    /// Slots that were touched since the log was last emptied, in order.
    pub(crate) touches: Vec<SlotId>,
    /// The spans: first slab, number of slabs, bytes of a slot.
    pub(crate) spans: Vec<(u32, u32, u64)>,
    /// While this is true, `ensure` returns false.
    pub(crate) out_of_space: bool,
    /// How often `ensure` was called.
    pub(crate) ensures: u32,
}

/// Chunk records and their directory, in memory of their own.
struct PrivateChunks {
    table: ChunkTable,
    memory: Arc<Mapping>,
}

impl PrivateChunks {
    fn new(chunks: u32) -> PrivateChunks {
        let memory = Arc::new(Mapping::private(ChunkTable::bytes_alone(chunks)));
        PrivateChunks { table: ChunkTable::alone_in(&memory, chunks), memory }
    }

    fn words(&self) -> &[Word] {
        self.memory.slice(0, self.memory.len() / size_of::<Word>()).unwrap()
    }
}

impl Clone for PrivateChunks {
    fn clone(&self) -> PrivateChunks {
        let copy = PrivateChunks::new(self.table.len());
        for (to, from) in copy.words().iter().zip(self.words()) {
            to.set(from.get());
        }
        copy
    }
}

impl VecTable {
    pub(crate) fn new(slots: usize) -> Self {
        let entry = Entry { state: State::Free, generation: 0, tick: 0, checksum: 0, ensured: false };
        // The logs get their memory up front, so that a counting allocator sees the cache alone.
        Self {
            chunks: PrivateChunks::new(slots.max(1) as u32),
            entries: vec![entry; slots],
            freed: Vec::with_capacity(1 << 16),
            touches: Vec::with_capacity(1 << 16),
            spans: Vec::with_capacity(slots),
            out_of_space: false,
            ensures: 0,
        }
    }

    /// Changes a word of the chunk records or of their lines.
    pub(crate) fn scribble(&self, word: usize, change: impl FnOnce(u64) -> u64) {
        let records = (1 + 16) * 8;
        let word =
            if word < records { word } else { (1 + self.chunks.table.len() as usize) * 8 + word - records };
        let word = &self.chunks.words()[word];
        word.set(change(word.get()));
    }

    /// The shards of a chunk that a lookup has found, as the workers of its ranks find them.
    pub(crate) fn shards(&self, word: ChunkWord) -> Vec<ShardRef> {
        let content = self.chunks.table.find(word).unwrap();
        let of_chunk = |header: &ShardHeader| {
            (header.key, header.namespace) == (content.identity.key, content.identity.namespace)
        };
        let committed = self
            .entries
            .iter()
            .filter(|entry| matches!(entry.state, State::Committed(header) if of_chunk(&header)));
        let world = committed.count() as u32;
        let shard = |rank| {
            let slot = self.chunks.table.slot(&content, world, rank).unwrap();
            let Entry { state: State::Committed(header), generation, .. } = self.entries[slot as usize]
            else {
                panic!("rank {rank}'s shard of {content:?} is not in slot {slot}");
            };
            assert!(
                of_chunk(&header) && header.rank == rank,
                "slot {slot} holds {header:?}, not rank {rank} of {content:?}"
            );
            ShardRef { slot, generation, offset: header.offset }
        };
        (0..world).map(shard).collect()
    }

    /// What a successor reads of a slot; `None`: it is free.
    pub(crate) fn shard(&self, slot: SlotId) -> Option<Shard> {
        let entry = self.entries[slot as usize];
        let (header, found) = match entry.state {
            State::Writing(header) => (header, Found::Writing),
            State::Orphaned(header) => (header, Found::Orphaned),
            State::Committed(header) => (header, Found::Committed),
            State::Hidden(header) => (header, Found::Hidden),
            State::Free => return None,
        };
        Some(Shard { header, generation: entry.generation, found, tick: entry.tick })
    }

    /// Asserts that no two slots in use share a byte.
    pub(crate) fn assert_disjoint(&self) {
        let mut used: Vec<(u64, u64)> = Vec::new();
        for entry in &self.entries {
            if let State::Writing(header)
            | State::Orphaned(header)
            | State::Committed(header)
            | State::Hidden(header) = entry.state
            {
                used.push((header.offset, header.offset + header.length));
            }
        }
        used.sort_unstable();
        for pair in used.windows(2) {
            assert!(pair[0].1 <= pair[1].0, "slots overlap: {pair:?}");
        }
    }

    fn log(log: &mut Vec<SlotId>, slot: SlotId) {
        if log.len() < log.capacity() {
            log.push(slot);
        }
    }
}

impl SlotTable for VecTable {
    fn chunks(&self) -> &ChunkTable {
        &self.chunks.table
    }

    fn ensure_chunks(&mut self, records: u32, lines: u32) -> bool {
        if !self.out_of_space {
            self.chunks.table.set_ready(records, lines);
        }
        !self.out_of_space
    }

    fn writing(&mut self, slot: SlotId, generation: u64, header: &ShardHeader) {
        let entry = &mut self.entries[slot as usize];
        assert!(entry.ensured, "slot {slot} has no header yet");
        match entry.state {
            State::Free => {}
            other => panic!("slot {slot} was {other:?}, and is given to {header:?}"),
        }
        assert_eq!(entry.generation, generation, "slot {slot}: a generation that was not published");
        entry.state = State::Writing(*header);
    }

    fn committed(&mut self, slot: SlotId, generation: u64, owner: Owner, checksum: u64) {
        let entry = &mut self.entries[slot as usize];
        let State::Writing(header) = entry.state else { panic!("slot {slot} was {:?}", entry.state) };
        assert_eq!((entry.generation, header.owner), (generation, owner), "slot {slot}");
        entry.state = State::Committed(header);
        entry.checksum = checksum;
    }

    fn orphaned(&mut self, slot: SlotId, generation: u64, owner: Owner) {
        let entry = &mut self.entries[slot as usize];
        let State::Writing(header) = entry.state else { panic!("slot {slot} was {:?}", entry.state) };
        assert_eq!((entry.generation, header.owner), (generation, owner), "slot {slot}");
        entry.state = State::Orphaned(header);
    }

    fn hidden(&mut self, slot: SlotId) {
        let entry = &mut self.entries[slot as usize];
        let State::Committed(header) = entry.state else { panic!("slot {slot} was {:?}", entry.state) };
        entry.state = State::Hidden(header);
    }

    fn freed(&mut self, slot: SlotId, next_generation: u64) {
        let entry = &mut self.entries[slot as usize];
        assert_ne!(entry.state, State::Free, "slot {slot} is freed twice");
        assert_eq!(entry.generation + 1, next_generation, "slot {slot}: generations grow by one");
        entry.state = State::Free;
        entry.generation = next_generation;
        Self::log(&mut self.freed, slot);
    }

    fn touched(&mut self, slot: SlotId, tick: u64) {
        let entry = &mut self.entries[slot as usize];
        assert_ne!(entry.state, State::Free, "slot {slot} is touched while free");
        entry.tick = tick;
        Self::log(&mut self.touches, slot);
    }

    fn ensure(&mut self, first_slot: SlotId, count: u32) -> bool {
        self.ensures += 1;
        if self.out_of_space {
            return false;
        }
        for entry in &mut self.entries[first_slot as usize..(first_slot + count) as usize] {
            entry.ensured = true;
        }
        true
    }

    fn span_made(&mut self, first_slab: u32, slabs: u32, slot_bytes: u64) {
        let overlap =
            |(first, len, _): &(u32, u32, u64)| *first < first_slab + slabs && first_slab < first + len;
        assert!(!self.spans.iter().any(overlap), "a span at {first_slab} over another");
        self.spans.push((first_slab, slabs, slot_bytes));
    }

    fn span_gone(&mut self, first_slab: u32) {
        let at = self.spans.iter().position(|(first, ..)| *first == first_slab);
        self.spans.swap_remove(at.unwrap_or_else(|| panic!("no span at {first_slab}")));
    }

    fn generation(&self, slot: SlotId) -> u64 {
        self.entries[slot as usize].generation
    }
}

/// A lease's name: client, session and admission.
pub(crate) type LeaseName = (Owner, u64, u32);

/// What a client finds by itself in the published records. Nobody is told.
pub(crate) fn search<T: SlotTable>(
    cache: &Cache<T>,
    namespace: u32,
    keys: &[Key],
    marked: Marked,
) -> Vec<ChunkWord> {
    let mut words = Vec::new();
    cache.table().chunks().search(namespace, keys.iter().copied(), usize::MAX, marked, &mut words);
    words
}

/// A message about chunks that a client holds, done in full. Returns how many of them are held.
pub(crate) fn hold<T: SlotTable>(
    cache: &mut Cache<T>,
    (owner, session, admission): LeaseName,
    namespace: u32,
    first: u32,
    words: &[ChunkWord],
) -> Result<u32, HoldError> {
    let mut hold = Hold::new(owner, session, admission, namespace, first, words.len() as u32);
    loop {
        let rest = words[hold.held as usize..].iter().copied();
        match cache.hold_piece(&mut hold, rest)? {
            Held::Later => {}
            Held::All => {
                assert_eq!(hold.held as usize, words.len(), "not all of them, and nothing cut it");
                return Ok(hold.held);
            }
            Held::Cut => return Ok(hold.held),
        }
    }
}

/// Looks up as a client does: it searches, says what it holds, and has what was held in the end. A miss is not worth a word.
/// `words` is emptied first; it is the caller's so that a counting allocator sees the cache alone.
pub(crate) fn look_up_into<T: SlotTable>(
    cache: &mut Cache<T>,
    name: LeaseName,
    namespace: u32,
    keys: &[Key],
    words: &mut Vec<ChunkWord>,
) {
    words.clear();
    let table = cache.table().chunks();
    table.search(namespace, keys.iter().copied(), usize::MAX, Marked::Missing, words);
    if !words.is_empty() {
        let held = hold(cache, name, namespace, 0, words).unwrap();
        words.truncate(held as usize);
    }
}

/// As [`look_up_into`]. Returns the words of the chunks that are held.
pub(crate) fn look_up<T: SlotTable>(
    cache: &mut Cache<T>,
    name: LeaseName,
    namespace: u32,
    keys: &[Key],
) -> Vec<ChunkWord> {
    let mut words = Vec::new();
    look_up_into(cache, name, namespace, keys, &mut words);
    words
}

/// Restores all that the cache's table holds, as an engine's successor does.
pub(crate) fn restore(cache: &mut Cache<VecTable>) {
    cache.restore_chunks().unwrap();
    for (first, len, slot_bytes) in cache.table().spans.clone() {
        cache.restore_span(first, len, slot_bytes).unwrap();
        for slot in cache.slots_of_span(first) {
            if let Some(shard) = cache.table().shard(slot) {
                cache.restore(slot, &shard).unwrap();
            }
        }
    }
}

/// Ends the restoring, and gives each chunk its place in the eviction order.
pub(crate) fn restore_end(cache: &mut Cache<VecTable>) -> Restored {
    let (restored, unplaced) = cache.restore_end();
    assert!(cache.go_on_placing(&mut unplaced.sort()));
    restored
}

/// The key at a place in a chain.
pub(crate) fn key(chain: u64, place: u64) -> Key {
    [chain << 32 | place, 0x6b76_7269_6e67]
}

/// The first `len` keys of a chain.
pub(crate) fn chain(chain: u64, len: u64) -> Vec<Key> {
    (0..len).map(|place| key(chain, place)).collect()
}
