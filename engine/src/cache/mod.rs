//! The heart of the engine. It knows which chunks exist, where their shards lie, and which clients may read and
//! write them.
//!
//! The cache has one owner (`&mut self`): no locks, no clock, no I/O, and no heap allocation after [`Cache::new`].
//! So no request of a client can fail for want of memory. The cache decides; a [`SlotTable`] publishes each
//! transition of a slot and of a visible chunk.
//!
//! * A **lookup** is the client's own: it reads the records of visible chunks, and then says what it holds. The cache pins
//!   that ([`Cache::hold_piece`]).
//! * A **store** is [`Cache::reserve`], then [`Cache::commit`] or [`Cache::abort`] for each slot. A chunk becomes
//!   visible when all ranks have committed in one round; the other rounds of it that were forming are dropped then.
//! * **Dropping** a chunk (because of an eviction, a newer round or an abort) frees its COMMITTED slots and
//!   *orphans* its WRITING ones: an orphan belongs to no chunk and stays WRITING until its writer commits it,
//!   aborts it, or is gone.
//! * A visible chunk is dropped in two halves, because schedulers say only afterwards what they have found: see [`mark`].
//! * A chunk that is **leased** or being written is never evicted. A leased chunk that turns out to be damaged is
//!   *hidden* at once, and dropped when its last lease ends.

mod check;
mod chunk;
mod client;
mod commit;
mod config;
mod empty;
mod error;
mod evict;
mod forget;
mod hash;
mod hold;
mod index;
mod invalidate;
mod lease;
mod mark;
mod part;
mod pins;
mod place;
mod reserve;
mod restore;
mod slab;
mod slot;
mod stats;
mod table;

pub use client::Aborted;
pub use commit::Committed;
pub use config::CacheConfig;
pub use error::{
    AddSlabError, CommitError, ConfigError, HoldError, InvariantBroken, RegisterError, ReserveError,
};
pub use hold::{Held, Hold};
pub use invalidate::Invalidated;
pub use mark::{Ears, Heard};
pub use part::{Leaving, Parting};
pub use place::{Sorted, Unplaced};
pub use reserve::{Going, Reservation, Reserve};
pub use restore::{Found, NotRestorable, Restored, Shard};
pub use stats::Stats;
pub use table::{
    Key, NAMESPACES, NamespaceId, NoTable, OWNERS, Owner, PAGE_BYTES, RANKS, Round, ShardHeader, SlotId,
    SlotTable,
};

use check::Check;
use chunk::{Chunks, Life};
use empty::Emptying;
use hash::Hash;
use index::Index;
use lease::Leases;
use mark::Marked;
use slab::Slabs;
use slot::Slots;

use crate::policy::{self, ChunkId, Policy};
use kvring_shm_abi::chunk::ChunkIdentity;
use kvring_shm_abi::directory::Spot;
use kvring_shm_abi::message::ANY_NAMESPACE;
use kvring_shm_abi::namespace::namespace_index;

/// The cache of one arena. See the module's documentation.
pub struct Cache<T> {
    table: T,
    config: CacheConfig,
    slabs: Slabs,
    slots: Slots,
    chunks: Chunks,
    /// The forming chunks. Visible ones are found by the table's directory.
    index: Index,
    leases: Leases,
    namespaces: Box<[Option<Namespace>]>,
    /// Keeps the eviction order of each namespace.
    policy: Box<dyn Policy>,
    /// The bytes that each client has leased or reserved.
    charges: Charges,
    /// Logical time: it grows with each access.
    tick: u64,
    /// The number of the current reservation. Chunks that carry it are not evicted.
    guard: u32,
    /// The slab at which the next search for spans of other classes begins.
    steal_cursor: u32,
    /// While this is true, nothing is evicted.
    evictions_held: bool,
    /// Visible chunks that a recovery has found and that have no place in the eviction order yet. While there are
    /// any, nothing is evicted.
    unplaced: u64,
    marked: Marked,
    /// What a recovery puts off until its end.
    restored: restore::Unfinished,
    /// Slabs that are being emptied for another size.
    emptying: Option<Emptying>,
    /// Records touched so far; see [`Cache::allow`].
    work: u64,
    /// A call that goes on in pieces stops when `work` has reached this.
    allowed: u64,
    counters: Counters,
    check: Check,
    /// Grows with each change. A self-check compares its sums only if no change came between its first entry and
    /// its last.
    version: u64,
}

/// Counters that only grow.
#[derive(Clone, Copy, Default)]
struct Counters {
    evicted: u64,
    cleared: u64,
    no_space: u64,
}

/// A registered namespace.
struct Namespace {
    id: NamespaceId,
    world: u32,
    /// Bit r: rank r is registered.
    ranks: u64,
    layouts: [Layout; RANKS],
    /// Bytes of all ranks' slots.
    chunk_bytes: u64,
    /// Visible chunks that are leased.
    pinned: usize,
    /// Logical time of the last use of any of its chunks, or of the last registration.
    used: u64,
}

/// One rank's shard of each chunk.
#[derive(Clone, Copy, Default)]
struct Layout {
    shard_bytes: u64,
    /// Bytes of a slot: `shard_bytes`, rounded up to whole pages.
    slot_bytes: u64,
    class: u16,
}

impl Namespace {
    fn has(&self, rank: u32) -> bool {
        rank < self.world && self.ranks >> rank & 1 == 1
    }

    fn is_complete(&self) -> bool {
        self.ranks.count_ones() == self.world
    }
}

impl<T: SlotTable> Cache<T> {
    /// Takes the memory for all tables. Most of it is address space that is never touched.
    ///
    /// No slab is usable yet; see [`Cache::add_slab`].
    ///
    /// # Errors
    ///
    /// A geometry or a limit is out of range, or there is no address space for the tables.
    pub fn new(config: CacheConfig, table: T) -> Result<Self, ConfigError> {
        let slots = config.check()?;
        let chunks = config.chunks_max.min(slots).min(table.chunks().len());
        Ok(Self {
            table,
            slabs: Slabs::new(config.slab_bytes, config.slab_count)?,
            slots: Slots::new(slots)?,
            chunks: Chunks::new(chunks)?,
            index: Index::new(chunks)?,
            leases: Leases::new(
                config.leases_max,
                config.pins_max,
                config.seed[0].rotate_left(17) ^ config.seed[1],
            )?,
            namespaces: (0..NAMESPACES).map(|_| None).collect(),
            policy: policy::build(config.policy, chunks as usize)?,
            charges: Charges { of: [0; OWNERS], unpaid: 0, most: config.client_bytes_max },
            tick: 0,
            guard: 0,
            steal_cursor: 0,
            evictions_held: false,
            unplaced: 0,
            marked: Marked::new(),
            restored: restore::Unfinished::default(),
            emptying: None,
            work: 0,
            allowed: u64::MAX,
            counters: Counters::default(),
            check: Check::default(),
            version: 0,
            config,
        })
    }

    /// The table to which the transitions of slots are published.
    pub fn table(&self) -> &T {
        &self.table
    }

    /// The same table, for changes to what it holds besides the slots.
    pub fn table_mut(&mut self) -> &mut T {
        &mut self.table
    }

    /// Tells the cache that this slab has memory now and may be used.
    ///
    /// # Errors
    ///
    /// There is no such slab, or it has been added before.
    pub fn add_slab(&mut self, index: u32) -> Result<(), AddSlabError> {
        self.change();
        self.slabs.add(index)
    }

    /// Fixes one rank's layout: its shard of each chunk has `shard_bytes` bytes. The first rank that registers
    /// fixes the size of the world. A repetition is no error.
    ///
    /// # Errors
    ///
    /// An id, a rank or a size is out of range, or disagrees with what was registered before.
    pub fn register(
        &mut self,
        namespace: NamespaceId,
        world: u32,
        rank: u32,
        shard_bytes: u64,
    ) -> Result<(), RegisterError> {
        self.change();
        let index = namespace_index(namespace);
        let Some(known) = self.namespaces.get(usize::from(index)) else {
            return Err(RegisterError::NoSuchNamespace { namespace });
        };
        if world == 0 || world as usize > RANKS {
            return Err(RegisterError::World { world });
        }
        if rank >= world {
            return Err(RegisterError::Rank { rank, world });
        }
        if let Some(known) = known {
            if known.id != namespace {
                return Err(RegisterError::OtherNamespace { namespace, there: known.id });
            }
            if known.world != world {
                return Err(RegisterError::OtherWorld { namespace, fixed: known.world, world });
            }
            let fixed = known.layouts[rank as usize].shard_bytes;
            if known.has(rank) {
                let other = RegisterError::OtherShard { namespace, rank, fixed, shard_bytes };
                return if fixed == shard_bytes { Ok(()) } else { Err(other) };
            }
        }
        let class = self.slabs.class_for(shard_bytes, Some(index))?;
        let layouts = [Layout::default(); RANKS];
        let new = Namespace { id: namespace, world, ranks: 0, layouts, chunk_bytes: 0, pinned: 0, used: 0 };
        let entry = self.namespaces[usize::from(index)].get_or_insert(new);
        entry.ranks |= 1 << rank;
        let slot_bytes = self.slabs.class(class).bytes;
        entry.chunk_bytes += slot_bytes;
        entry.layouts[rank as usize] = Layout { shard_bytes, slot_bytes, class };
        Ok(())
    }

    /// From now on, each call that goes on in pieces stops after it has touched about this many records of the
    /// tables (a record is a chunk, a slot, a place of a lease, or an entry of the eviction order). It overshoots
    /// by at most what one chunk takes. Without this call, nothing stops.
    pub fn allow(&mut self, records: u64) {
        self.allowed = self.work.saturating_add(records);
    }

    /// Counts work outside the tables that takes about as long as touching this many records.
    pub fn spend(&mut self, records: u64) {
        self.work += records;
    }

    /// Records touched so far.
    pub fn work(&self) -> u64 {
        self.work
    }

    /// How many records may still be touched.
    pub fn left(&self) -> u64 {
        self.allowed.saturating_sub(self.work)
    }

    /// Whether all allowed records have been touched.
    pub fn is_spent(&self) -> bool {
        self.work >= self.allowed
    }

    /// Notes that the namespace is in use now. All others were used before it.
    pub fn use_namespace(&mut self, id: NamespaceId) {
        self.tick += 1;
        let tick = self.tick;
        if let Some(namespace) = self.namespace_mut(id) {
            namespace.used = tick;
        }
    }

    /// When the namespace was last used, in logical time. A successor of this engine derives it from the last
    /// accesses of slots.
    pub fn used(&self, id: NamespaceId) -> u64 {
        self.namespace(id).map_or(0, |namespace| namespace.used)
    }

    /// How many different shard sizes are in use, and how many there may be.
    pub fn sizes(&self) -> (usize, usize) {
        (self.slabs.sizes(), slab::CLASSES_MAX)
    }

    /// Every call that changes something begins with this.
    fn change(&mut self) {
        self.version += 1;
    }

    /// The namespace with this id: an id of another one that was at the same index leads nowhere.
    fn namespace(&self, id: NamespaceId) -> Option<&Namespace> {
        let namespace = self.namespaces.get(usize::from(namespace_index(id)))?.as_ref();
        namespace.filter(|namespace| namespace.id == id)
    }

    fn namespace_mut(&mut self, id: NamespaceId) -> Option<&mut Namespace> {
        let namespace = self.namespaces.get_mut(usize::from(namespace_index(id)))?.as_mut();
        namespace.filter(|namespace| namespace.id == id)
    }

    /// The namespace of a chunk. It is not forgotten as long as it has chunks.
    fn namespace_of(&self, id: ChunkId) -> Option<&Namespace> {
        self.namespaces[usize::from(self.chunks.get(id).namespace)].as_ref()
    }

    /// What the chunk is, as its record says.
    fn identity(&self, id: ChunkId) -> ChunkIdentity {
        // `ANY_NAMESPACE` is no namespace's id, and never needed: every chunk has a namespace.
        let namespace = self.namespace_of(id).map_or(ANY_NAMESPACE, |namespace| namespace.id);
        ChunkIdentity { key: self.chunks.get(id).key, namespace }
    }

    /// This and the next two: of a key of the namespace at this index.
    fn hash(&self, namespace: u8, key: Key) -> Hash {
        Hash::new(self.config.seed, namespace, key)
    }

    fn spot(&self, namespace: u8, key: Key) -> Spot {
        self.table.chunks().directory().spot(namespace, key)
    }

    /// The visible chunk of this key.
    fn visible(&self, namespace: u8, key: Key) -> Option<ChunkId> {
        self.table.chunks().directory().hints(self.spot(namespace, key)).find(|id| {
            let chunk = self.chunks.published_as(*id, namespace, key);
            chunk.is_some_and(|chunk| chunk.life() == Life::Visible)
        })
    }

    /// The number of ranks in a chunk's world.
    fn world_of(&self, id: ChunkId) -> u32 {
        self.namespace_of(id).map_or(0, |namespace| namespace.world)
    }

    /// Calls `act` with each slot of a chunk.
    fn each_slot(&mut self, id: ChunkId, mut act: impl FnMut(&mut Self, SlotId)) {
        let world = self.world_of(id);
        self.work += u64::from(world);
        for rank in 0..world {
            if let Some(slot) = self.chunks.shard(id, world, rank) {
                act(self, slot);
            }
        }
    }

    /// Notes that the chunk was used at `tick`. `front` is the chunk in front of it in its chain, if the same
    /// access used it too.
    fn touch(&mut self, id: ChunkId, tick: u64, front: Option<ChunkId>) {
        self.spare(id);
        self.chunks.get_mut(id).tick = tick;
        self.place(id);
        self.policy.touch(id, front);
        self.each_slot(id, |cache, slot| {
            cache.slabs.touch(slot, tick);
            cache.table.touched(slot, tick);
        });
    }

    /// Adds one pin of `owner`'s to a chunk. `to_come` is how many chunks may follow it in the same message: the
    /// client takes over the charge for a chunk that nobody pays for only if its share also has room for all of
    /// those.
    fn pin(&mut self, id: ChunkId, owner: Owner, to_come: u64) {
        self.work += 1;
        let Self { chunks, namespaces, charges, .. } = self;
        let chunk = chunks.get_mut(id);
        let first = !chunk.pins.any();
        chunk.pins.add();
        if let Some(namespace) = &mut namespaces[chunk.namespace as usize] {
            let bytes = namespace.chunk_bytes;
            namespace.pinned += usize::from(first);
            if first {
                charges.of[usize::from(owner)] += bytes;
                chunk.pins.charge(Some(owner));
            } else if chunk.pins.payer().is_none() && charges.room(owner) >= bytes.saturating_mul(1 + to_come)
            {
                charges.unpaid -= bytes;
                charges.of[usize::from(owner)] += bytes;
                chunk.pins.charge(Some(owner));
            }
        }
        if first {
            self.each_slot(id, |cache, slot| cache.slabs.busy(slot));
        }
    }

    /// Removes one pin of `leaving`'s from a chunk. If `leaving` paid for the chunk and others still pin it, it
    /// stops paying: see [`pins`].
    fn unpin(&mut self, leaving: Owner, id: ChunkId) {
        self.work += 1;
        let Self { chunks, namespaces, charges, .. } = self;
        let chunk = chunks.get_mut(id);
        chunk.pins.remove();
        let Some(namespace) = &mut namespaces[usize::from(chunk.namespace)] else { return };
        let bytes = namespace.chunk_bytes;
        if chunk.pins.any() {
            if chunk.pins.payer() == Some(leaving) && charges.unpaid.saturating_add(bytes) <= charges.most {
                chunk.pins.charge(None);
                charges.of[usize::from(leaving)] -= bytes;
                charges.unpaid += bytes;
            }
            return;
        }
        match chunk.pins.payer() {
            Some(payer) => charges.of[usize::from(payer)] -= bytes,
            None => charges.unpaid -= bytes,
        }
        let is_hidden = chunk.life() == Life::Hidden;
        if !is_hidden {
            namespace.pinned -= 1;
        }
        self.each_slot(id, |cache, slot| cache.slabs.idle(slot));
        if is_hidden {
            self.drop_chunk(id, false);
        }
    }
}

/// The bytes that are leased or being written, and who pays for them.
struct Charges {
    of: [u64; OWNERS],
    /// Leased bytes for which nobody pays.
    unpaid: u64,
    /// The share: the most that one client may be charged, and the most that `unpaid` may reach.
    most: u64,
}

impl Charges {
    /// How many more bytes `owner` may be charged.
    fn room(&self, owner: Owner) -> u64 {
        self.most.saturating_sub(self.of[usize::from(owner)])
    }
}

#[cfg(test)]
mod tests;
