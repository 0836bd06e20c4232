//! The words between the cache and its surroundings: names of things, and how a slot's transition is published.

/// A chunk's name: 128 opaque bits that cover its whole prefix.
pub type Key = [u64; 2];
/// A place in the arena; positional, so the same bytes have the same id for as long as the class stays.
pub type SlotId = u32;
/// A client entry, below [`OWNERS`].
pub type Owner = u8;
/// A registered namespace, below [`NAMESPACES`].
pub type NamespaceId = u32;

/// Client entries.
pub const OWNERS: usize = 64;
/// Namespaces at once.
pub const NAMESPACES: usize = 64;
/// Ranks of one namespace.
pub const RANKS: usize = 64;
/// The unit of shard sizes and offsets, in bytes.
pub const PAGE_BYTES: u64 = 4096;

/// One store of chunks by all ranks. Shards combine only within a round.
///
/// Of two rounds from one source the newer is the one whose number is ahead by less than 2³¹, so numbers may wrap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Round {
    /// Who counts: one scheduler's life.
    pub source: u32,
    /// Its how-manieth round.
    pub number: u32,
}

/// What a slot is given to a writer for: the part of the slot's header that stays until the slot is freed.
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
    /// Whose part of the chunk.
    pub rank: u32,
    /// The round it may combine in.
    pub round: Round,
    /// First byte in the arena.
    pub offset: u64,
    /// Bytes of the shard (not rounded up).
    pub length: u64,
}

/// How the cache publishes what becomes of slots: over shared memory in the engine, over a `Vec` in tests.
///
/// The cache calls it for ids of ensured spans only, and in an order that is right for readers: a slot is
/// `freed`, with its next generation, before it is anybody's again.
pub trait SlotTable {
    /// The slot belongs to a writer from now on. `generation` is the one that was published last.
    fn writing(&mut self, slot: SlotId, generation: u64, header: &ShardHeader);

    /// The slot's bytes are complete and will not change while the generation stays.
    fn committed(&mut self, slot: SlotId, generation: u64, owner: Owner, checksum: u64);

    /// The slot is written for no chunk any more: whatever its writer says, nothing in it will be used, by this engine or
    /// a later one.
    fn orphaned(&mut self, slot: SlotId, generation: u64, owner: Owner);

    /// The slot's bytes are damaged: whoever holds a lease on it may still look, and no later engine shows it to anybody.
    fn hidden(&mut self, slot: SlotId);

    /// The slot is nobody's; whoever still reads it sees another generation.
    fn freed(&mut self, slot: SlotId, next_generation: u64);

    /// The slot's chunk was used at this logical time (larger is later; a chain's head is its latest).
    fn touched(&mut self, slot: SlotId, tick: u64);

    /// Makes sure that the headers of these ids have memory. False: out of space, and the ids stay unused.
    fn ensure(&mut self, first_slot: SlotId, count: u32) -> bool;

    /// `slabs` slabs from this one on are cut into slots of `slot_bytes`, whose headers are ensured. None is in use yet.
    fn span_made(&mut self, first_slab: u32, slabs: u32, slot_bytes: u64);

    /// That span is no more; all of its slots are free.
    fn span_gone(&mut self, first_slab: u32);

    /// The generation in an ensured header: what earlier lives of the engine have left there, or 0.
    fn generation(&self, slot: SlotId) -> u64;
}
