//! The heart of the engine: which chunks there are, where their shards lie, who may read and who may write them.
//!
//! One owner, `&mut self`: no locks, no atomics, no clock, no I/O, and no heap allocation after [`Cache::new`]: whatever
//! a client asks for, there is nothing that could fail for want of memory. It decides; a [`SlotTable`] publishes each slot's transition.
//!
//! * A **lookup** is two calls: [`Cache::find`] only reads, so that the answer can leave at once, and
//!   [`Cache::pin_found`] pins what was found; it cannot fail, because `find` asked for the room first.
//! * A **store** is [`Cache::reserve`], then [`Cache::commit`] or [`Cache::abort`] for each slot. A chunk becomes visible
//!   when all ranks have committed in one round, and drops the other rounds that were forming it.
//! * **Dropping** a chunk (eviction, a newer round, an abort) frees its COMMITTED slots, and *orphans* its WRITING ones:
//!   they stay WRITING for no chunk, until their writer's commit or abort, or until it is gone.
//! * A **leased** chunk and one that somebody is writing are never evicted. One that turned out to be damaged is *hidden*
//!   from lookups at once, and goes with its last lease.

mod check;
mod chunk;
mod client;
mod commit;
mod config;
mod empty;
mod error;
mod evict;
mod find;
mod forget;
mod index;
mod invalidate;
mod lease;
mod part;
mod pins;
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
    AddSlabError, CommitError, ConfigError, FindError, InvariantBroken, RegisterError, ReserveError,
};
pub use find::{Lookup, ShardRef};
pub use invalidate::Invalidated;
pub use part::{Leaving, Parting};
pub use reserve::{Going, Reservation, Reserve};
pub use restore::{Found, NotRestorable, Restored, Shard};
pub use stats::Stats;
pub use table::{
    Key, NAMESPACES, NamespaceId, OWNERS, Owner, PAGE_BYTES, RANKS, Round, ShardHeader, SlotId, SlotTable,
};

use check::Check;
use chunk::{Chunks, Life};
use empty::Emptying;
use find::Found as FoundFor;
use index::{Hash, Index};
use lease::Leases;
use slab::Slabs;
use slot::Slots;

use crate::policy::{self, ChunkId, Policy};

/// The cache of one arena. See the module's documentation.
pub struct Cache<T> {
    table: T,
    config: CacheConfig,
    slabs: Slabs,
    slots: Slots,
    chunks: Chunks,
    index: Index,
    leases: Leases,
    namespaces: Box<[Option<Namespace>]>,
    /// The order of eviction of each namespace.
    policy: Box<dyn Policy>,
    /// Bytes that each client has leased or reserved.
    charges: Charges,
    /// Logical time: grows with each access.
    tick: u64,
    /// Names the reservation whose keys must not be evicted.
    guard: u32,
    /// Where the search for spans to take from other classes goes on.
    steal_cursor: u32,
    /// Nothing may be evicted at the moment.
    evictions_held: bool,
    /// The chunks of the last `find`.
    found: Vec<ChunkId>,
    found_for: Option<FoundFor>,
    /// What a recovery has put off until its end.
    restored: restore::Unfinished,
    /// Slabs that are being emptied for another size.
    emptying: Option<Emptying>,
    /// Records touched so far: see [`Cache::allow`].
    work: u64,
    /// How much `work` may become before a call that goes on in pieces stops.
    allowed: u64,
    counters: Counters,
    check: Check,
    /// Grows with each change, so that a self-check knows whether its sums are of one state.
    version: u64,
}

/// What only grows.
#[derive(Clone, Copy, Default)]
struct Counters {
    evicted: u64,
    no_space: u64,
}

/// A registered model and layout.
struct Namespace {
    world: u32,
    /// Bit r: rank r is registered.
    ranks: u64,
    layouts: [Layout; RANKS],
    /// Bytes of all ranks' slots.
    chunk_bytes: u64,
    /// Visible chunks that are leased.
    pinned: usize,
    /// Logical time of the last use of any of its chunks, or of a registration.
    used: u64,
}

/// One rank's part of each chunk.
#[derive(Clone, Copy, Default)]
struct Layout {
    shard_bytes: u64,
    /// Bytes of a slot: the shard's, rounded up.
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
    /// Takes the memory for everything: most of it address space that is never touched.
    ///
    /// No slab is usable yet: see [`Cache::add_slab`].
    ///
    /// # Errors
    ///
    /// A geometry or a limit that is out of range; no address space for the tables.
    pub fn new(config: CacheConfig, table: T) -> Result<Self, ConfigError> {
        let slots = config.check()?;
        let chunks = config.chunks_max.min(slots);
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
            found: Vec::with_capacity(config.keys_max as usize),
            found_for: None,
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

    /// The table that transitions are published to.
    pub fn table(&self) -> &T {
        &self.table
    }

    /// As [`Cache::table`], to change what is beside the slots.
    pub fn table_mut(&mut self) -> &mut T {
        &mut self.table
    }

    /// The slab of this index has memory now, and may be used.
    ///
    /// # Errors
    ///
    /// There is no such slab, or it was added before.
    pub fn add_slab(&mut self, index: u32) -> Result<(), AddSlabError> {
        self.change();
        self.slabs.add(index)
    }

    /// Fixes one rank's layout: `shard_bytes` of each chunk. The first rank fixes the world. Repeatable.
    ///
    /// # Errors
    ///
    /// An id, a rank or a size out of range, or a disagreement with what was registered.
    pub fn register(
        &mut self,
        namespace: NamespaceId,
        world: u32,
        rank: u32,
        shard_bytes: u64,
    ) -> Result<(), RegisterError> {
        self.change();
        if namespace as usize >= NAMESPACES {
            return Err(RegisterError::NoSuchNamespace { namespace });
        }
        if world == 0 || world as usize > RANKS {
            return Err(RegisterError::World { world });
        }
        if rank >= world {
            return Err(RegisterError::Rank { rank, world });
        }
        if let Some(known) = &self.namespaces[namespace as usize] {
            if known.world != world {
                return Err(RegisterError::OtherWorld { namespace, fixed: known.world, world });
            }
            let fixed = known.layouts[rank as usize].shard_bytes;
            if known.has(rank) {
                let other = RegisterError::OtherShard { namespace, rank, fixed, shard_bytes };
                return if fixed == shard_bytes { Ok(()) } else { Err(other) };
            }
        }
        let class = self.slabs.class_for(shard_bytes, Some(namespace))?;
        let layouts = [Layout::default(); RANKS];
        let new = Namespace { world, ranks: 0, layouts, chunk_bytes: 0, pinned: 0, used: 0 };
        let entry = self.namespaces[namespace as usize].get_or_insert(new);
        entry.ranks |= 1 << rank;
        let slot_bytes = self.slabs.class(class).bytes;
        entry.chunk_bytes += slot_bytes;
        entry.layouts[rank as usize] = Layout { shard_bytes, slot_bytes, class };
        Ok(())
    }

    /// From now on, calls that go on in pieces stop after about so many records of the tables: a chunk, a slot, a place of a
    /// lease, an entry of the order of eviction. No more than what one chunk takes is done beyond that. Without this call,
    /// nothing stops.
    pub fn allow(&mut self, records: u64) {
        self.allowed = self.work.saturating_add(records);
    }

    /// Work beside the tables, as many records as take about as long.
    pub fn spend(&mut self, records: u64) {
        self.work += records;
    }

    /// Records touched so far.
    pub fn work(&self) -> u64 {
        self.work
    }

    /// Records that are left of what was allowed.
    pub fn left(&self) -> u64 {
        self.allowed.saturating_sub(self.work)
    }

    /// Has what was allowed been used up?
    pub fn is_spent(&self) -> bool {
        self.work >= self.allowed
    }

    /// The namespace is in use: the others are older.
    pub fn use_namespace(&mut self, id: NamespaceId) {
        self.tick += 1;
        if let Some(Some(namespace)) = self.namespaces.get_mut(id as usize) {
            namespace.used = self.tick;
        }
    }

    /// When the namespace was used last, in logical time. A successor knows it from the slots' last accesses.
    pub fn used(&self, id: NamespaceId) -> u64 {
        self.namespace(id).map_or(0, |namespace| namespace.used)
    }

    /// Different shard sizes in use, and how many there may be.
    pub fn sizes(&self) -> (usize, usize) {
        (self.slabs.sizes(), slab::CLASSES_MAX)
    }

    /// Every call that changes something begins here: what `find` promised holds no longer.
    fn change(&mut self) {
        self.found_for = None;
        self.version += 1;
    }

    fn namespace(&self, id: NamespaceId) -> Option<&Namespace> {
        self.namespaces.get(id as usize)?.as_ref()
    }

    fn hash(&self, namespace: NamespaceId, key: Key) -> Hash {
        Hash::new(self.config.seed, namespace, key)
    }

    /// The ranks of a chunk's world.
    fn world_of(&self, id: ChunkId) -> u32 {
        let namespace = u32::from(self.chunks.get(id).namespace);
        self.namespace(namespace).map_or(0, |namespace| namespace.world)
    }

    /// Does `act` with each slot of a chunk.
    fn each_slot(&mut self, id: ChunkId, mut act: impl FnMut(&mut Self, SlotId)) {
        let world = self.world_of(id);
        self.work += u64::from(world);
        for rank in 0..world {
            if let Some(slot) = self.chunks.shard(id, world, rank) {
                act(self, slot);
            }
        }
    }

    /// The chunk was used at `tick`, and in the same access the one in `front` of it in its chain.
    fn touch(&mut self, id: ChunkId, tick: u64, front: Option<ChunkId>) {
        self.chunks.get_mut(id).tick = tick;
        self.policy.touch(id, front);
        self.each_slot(id, |cache, slot| {
            cache.slabs.touch(slot, tick);
            cache.table.touched(slot, tick);
        });
    }

    /// A lease names the chunk once more. `to_come`: so many chunks may follow it in the same lookup, for which there has to
    /// be room before this client takes over what nobody pays for.
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

    /// A lease names the chunk no longer. What `leaving` has paid for and others still hold, it pays no more: see
    /// [`pins`].
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

/// Bytes that are leased, and being written, and who pays for them.
struct Charges {
    of: [u64; OWNERS],
    /// Leased, and nobody pays.
    unpaid: u64,
    /// The share: the most that a client may be charged, and nobody.
    most: u64,
}

impl Charges {
    /// How much more `owner` may be charged.
    fn room(&self, owner: Owner) -> u64 {
        self.most.saturating_sub(self.of[usize::from(owner)])
    }
}

#[cfg(test)]
mod tests;
