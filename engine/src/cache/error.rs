//! What can be wrong with a request: one closed enum for each kind. A full cache is an answer, not an error.

use super::{Key, NAMESPACES, NamespaceId, OWNERS, Owner, RANKS, SlotId};
use crate::lazy::NoMemory;

/// Why a cache cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Slabs are powers of two from 1 MiB to 1 GiB.
    #[error("slab of {bytes} bytes: expected a power of two from 1 MiB to 1 GiB")]
    SlabBytes {
        /// What was given.
        bytes: u64,
    },
    /// Slot ids are 32-bit, and one of them is reserved.
    #[error("{slab_count} slabs of {slab_bytes} bytes have {slots} slots: expected 1 to {most}")]
    Slots {
        /// Slabs in the arena.
        slab_count: u32,
        /// Bytes of each.
        slab_bytes: u64,
        /// Slot ids that they need.
        slots: u64,
        /// The most there may be.
        most: u64,
    },
    /// A limit must be in its range.
    #[error("{name}: expected 1 to {most}, got {value}")]
    Limit {
        /// The setting's name, as in `EngineConfig`.
        name: &'static str,
        /// What was given.
        value: u64,
        /// The most it may be.
        most: u64,
    },
    /// There is no memory for the tables.
    #[error(transparent)]
    Memory(#[from] NoMemory),
}

/// Why a slab cannot be added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddSlabError {
    /// The arena has no such slab.
    #[error("slab {index} does not exist: the arena has {count}")]
    OutOfRange {
        /// What was given.
        index: u32,
        /// Slabs in the arena.
        count: u32,
    },
    /// Each slab is added once.
    #[error("slab {index} is in use already")]
    Twice {
        /// What was given.
        index: u32,
    },
}

/// Why a rank cannot be registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegisterError {
    /// The namespace's index is out of range.
    #[error("namespace {namespace}: indices are below {NAMESPACES}")]
    NoSuchNamespace {
        /// What was given.
        namespace: NamespaceId,
    },
    /// Another namespace has the same index, and has not been forgotten.
    #[error("namespace {namespace}: namespace {there} is at its index")]
    OtherNamespace {
        /// What was given.
        namespace: NamespaceId,
        /// The namespace that is there.
        there: NamespaceId,
    },
    /// The number of ranks is out of range.
    #[error("world of {world} ranks: expected 1 to {RANKS}")]
    World {
        /// What was given.
        world: u32,
    },
    /// The world has no such rank.
    #[error("rank {rank} in a world of {world}")]
    Rank {
        /// What was given.
        rank: u32,
        /// Ranks there are.
        world: u32,
    },
    /// The first rank fixed another world size.
    #[error("namespace {namespace} has a world of {fixed} ranks, not of {world}")]
    OtherWorld {
        /// The namespace.
        namespace: NamespaceId,
        /// What its first rank said.
        fixed: u32,
        /// What this one said.
        world: u32,
    },
    /// The rank has registered another shard size before.
    #[error("rank {rank} of namespace {namespace} has shards of {fixed} bytes, not of {shard_bytes}")]
    OtherShard {
        /// The namespace.
        namespace: NamespaceId,
        /// The rank.
        rank: u32,
        /// What it said first.
        fixed: u64,
        /// What it says now.
        shard_bytes: u64,
    },
    /// A shard must fit into a span, which ends at the next 1 GiB boundary, and into the arena.
    #[error("shard of {shard_bytes} bytes: expected 1 to {most}")]
    ShardBytes {
        /// What was given.
        shard_bytes: u64,
        /// Bytes of the longest span.
        most: u64,
    },
    /// There are too many different shard sizes.
    #[error("shard of {shard_bytes} bytes would be one size too many: {most} are in use")]
    TooManySizes {
        /// What was given.
        shard_bytes: u64,
        /// Sizes there may be.
        most: u32,
    },
}

/// Why nothing of a hold is pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HoldError {
    /// The namespace is not registered.
    #[error("namespace {namespace} is not registered")]
    UnknownNamespace {
        /// What was given.
        namespace: NamespaceId,
    },
    /// The lease does not have the chunks in front of these.
    #[error("chunks from number {first} on, of a lease of {len}")]
    Gap {
        /// How many chunks the message says that the lease has.
        first: u32,
        /// How many it has.
        len: u32,
    },
    /// There is no such client entry.
    #[error("client entry {owner}: entries are below {OWNERS}")]
    NoSuchOwner {
        /// What was given.
        owner: Owner,
    },
}

/// Why a whole reservation is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReserveError {
    /// The namespace is not registered.
    #[error("namespace {namespace} is not registered")]
    UnknownNamespace {
        /// What was given.
        namespace: NamespaceId,
    },
    /// The world has no such rank, or the rank has not registered its layout.
    #[error("rank {rank} of namespace {namespace} is not registered")]
    UnknownRank {
        /// The namespace.
        namespace: NamespaceId,
        /// What was given.
        rank: u32,
    },
    /// The message is longer than it may be.
    #[error("{keys} keys in one message: expected at most {most}")]
    TooManyKeys {
        /// What was given.
        keys: usize,
        /// What is allowed.
        most: usize,
    },
    /// There is no such client entry.
    #[error("client entry {owner}: entries are below {OWNERS}")]
    NoSuchOwner {
        /// What was given.
        owner: Owner,
    },
}

/// Why a commit or an abort is a breach: an honest client never causes one of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommitError {
    /// The slot does not exist.
    #[error("slot {slot} does not exist: there are {count}")]
    NoSuchSlot {
        /// What was given.
        slot: SlotId,
        /// Slot ids of the arena.
        count: u32,
    },
    /// The slot is being written by somebody else, or by an earlier attachment of the same entry.
    #[error("slot {slot} is not written by client {owner}")]
    NotYours {
        /// The slot.
        slot: SlotId,
        /// Who asked.
        owner: Owner,
    },
    /// The slot holds a shard of another chunk.
    #[error("slot {slot} does not hold a shard of {:016x}{:016x}", .key[1], .key[0])]
    OtherKey {
        /// The slot.
        slot: SlotId,
        /// What was given.
        key: Key,
    },
}

/// What the cache's self-check found wrong: a bug, or memory that somebody else has written to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvariantBroken {
    /// Two counts that must be equal are not.
    #[error("{what}: counted {counted}, recorded {recorded}")]
    Count {
        /// What was counted.
        what: &'static str,
        /// The number of entries that were counted.
        counted: u64,
        /// The number that the tables record.
        recorded: u64,
    },
    /// Two table entries that must name each other do not.
    #[error("{what}: entry {at} disagrees with {with}")]
    Link {
        /// Which pair of tables.
        what: &'static str,
        /// The entry that was looked at.
        at: u64,
        /// What it names.
        with: u64,
    },
}
