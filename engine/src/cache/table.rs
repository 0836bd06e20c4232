//! The vocabulary between the cache and its surroundings: names of things, and how each transition of a slot is
//! published.

use kvring_shm_abi::chunk::ChunkTable;

/// A chunk's name: 128 opaque bits that cover its whole prefix.
pub type Key = [u64; 2];
/// A place in the arena. Ids are positional: an id means the same bytes as long as its span keeps its class.
pub type SlotId = u32;
/// The number of a client's entry, below [`OWNERS`].
pub type Owner = u8;
/// A namespace's [id](kvring_shm_abi::namespace). Its index is below [`NAMESPACES`]; chunks know their namespace by that alone.
pub type NamespaceId = u32;

/// How many entries for clients there are.
pub const OWNERS: usize = 64;
/// The most namespaces at one time.
pub const NAMESPACES: usize = 64;
/// The most ranks of one namespace.
pub const RANKS: usize = 64;
/// The unit of shard sizes and offsets, in bytes.
pub const PAGE_BYTES: u64 = 4096;

/// One store of chunks by all ranks. Shards combine only within a round.
///
/// Of two rounds from one source, the newer is the one whose number is ahead by less than 2³¹. So numbers may wrap
/// around.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Round {
    /// Who counts the rounds: one life of one scheduler.
    pub source: u32,
    /// The source's running number of the round.
    pub number: u32,
}

/// What a slot was given to its writer for: the part of the slot's header that stays the same until the slot is
/// freed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardHeader {
    /// The client entry that writes.
    pub owner: Owner,
    /// Its attach nonce.
    pub nonce: u64,
    /// The chunk's key.
    pub key: Key,
    /// The chunk's namespace.
    pub namespace: NamespaceId,
    /// The rank whose shard it is.
    pub rank: u32,
    /// The round in which the shard may combine with others.
    pub round: Round,
    /// First byte in the arena.
    pub offset: u64,
    /// Bytes of the shard (not rounded up).
    pub length: u64,
}

/// How the cache publishes the transitions of slots and of visible chunks: to shared memory in the engine, to a
/// `Vec` in tests.
///
/// The cache calls these methods only for slots of spans whose headers were ensured, and in an order that is right
/// for readers: a slot is `freed`, with its next generation, before it is given to anybody again; a chunk's record
/// ends before the first of its slots is freed.
pub trait SlotTable {
    /// The records of visible chunks, and the directory by which they are found.
    fn chunks(&self) -> &ChunkTable;

    /// Makes sure that this many chunk records, and this many lines, have memory. False: there is none.
    fn ensure_chunks(&mut self, records: u32, lines: u32) -> bool;

    /// The slot belongs to a writer from now on. `generation` is the one that was last published.
    fn writing(&mut self, slot: SlotId, generation: u64, header: &ShardHeader);

    /// The slot's bytes are complete. They do not change as long as the generation stays.
    fn committed(&mut self, slot: SlotId, generation: u64, owner: Owner, checksum: u64);

    /// The slot belongs to no chunk any more. Even if its writer commits it, neither this engine nor a later one
    /// uses its bytes.
    fn orphaned(&mut self, slot: SlotId, generation: u64, owner: Owner);

    /// The slot's bytes are damaged. Clients that hold a lease on its chunk may still read them, but no later
    /// engine shows the chunk to anybody.
    fn hidden(&mut self, slot: SlotId);

    /// The slot belongs to nobody. A client that still reads it sees that the generation has changed.
    fn freed(&mut self, slot: SlotId, next_generation: u64);

    /// The slot's chunk was used at this logical time (larger is later; within one access, the head of a chain has
    /// the latest).
    fn touched(&mut self, slot: SlotId, tick: u64);

    /// Makes sure that the headers of these slots have memory. False: there is none, and the slots stay unused.
    fn ensure(&mut self, first_slot: SlotId, count: u32) -> bool;

    /// `slabs` slabs from `first_slab` on were cut into slots of `slot_bytes`. Their headers are ensured, and none
    /// is in use yet.
    fn span_made(&mut self, first_slab: u32, slabs: u32, slot_bytes: u64);

    /// The span that began at this slab no longer exists; all of its slots are free.
    fn span_gone(&mut self, first_slab: u32);

    /// The generation in an ensured header: what an earlier engine left there, or 0.
    fn generation(&self, slot: SlotId) -> u64;
}

/// For a cache without an arena: nothing is published, and the chunks' records are in private memory.
pub struct NoTable(ChunkTable);

impl NoTable {
    /// A table for this many chunks.
    #[must_use]
    pub fn new(chunks: u32) -> Self {
        Self(ChunkTable::private(chunks))
    }
}

impl SlotTable for NoTable {
    fn chunks(&self) -> &ChunkTable {
        &self.0
    }
    fn ensure_chunks(&mut self, records: u32, lines: u32) -> bool {
        self.0.set_ready(records, lines);
        true
    }
    fn writing(&mut self, _: SlotId, _: u64, _: &ShardHeader) {}
    fn committed(&mut self, _: SlotId, _: u64, _: Owner, _: u64) {}
    fn orphaned(&mut self, _: SlotId, _: u64, _: Owner) {}
    fn hidden(&mut self, _: SlotId) {}
    fn freed(&mut self, _: SlotId, _: u64) {}
    fn touched(&mut self, _: SlotId, _: u64) {}
    fn ensure(&mut self, _: SlotId, _: u32) -> bool {
        true
    }
    fn span_made(&mut self, _: u32, _: u32, _: u64) {}
    fn span_gone(&mut self, _: u32) {}
    fn generation(&self, _: SlotId) -> u64 {
        0
    }
}
