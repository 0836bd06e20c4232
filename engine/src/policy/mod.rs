//! Policies decide which chunk is evicted when room is needed: one trait, and one file per policy, all of the same
//! shape.
//!
//! A policy keeps a separate order for the chunks of each namespace, but has one set of tables for all of them. It
//! knows nothing of slots, leases or shared memory: the cache tells it what was inserted, used and removed, and
//! asks for the coldest chunk that may be evicted. All memory that a policy needs is taken when the engine starts:
//! no call allocates from the heap, and registering a namespace costs no memory.
//!
//! | policy | right for | why |
//! | --- | --- | --- |
//! | [`lru`] | a cache that holds most of what is reused | recency is all that counts when little has to go |
//! | [`arc`] | a cache that is small against what passes through | what came back once outlives what did not |
//!
//! `kvring simulate` measures both on a trace, with this code.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use crate::lazy::NoMemory;

pub mod arc;
mod ghosts;
mod lists;
pub mod lru;
#[cfg(test)]
mod tests;

/// A chunk's index in the cache's private chunk table. Ids are dense, and reused after a removal.
pub type ChunkId = u32;

/// How many orders a policy keeps: one for each namespace.
pub const ORDERS: usize = 64;

/// The orders in which chunks are evicted, one for each namespace, by its number below [`ORDERS`].
///
/// The head of a chain is warmer than the chunks behind it, so leaves are evicted first. Polls and retries are not
/// accesses; the caller does not report them.
pub trait Policy: Send {
    /// The name used in configuration, statistics and tables: `lru`, `arc`.
    fn name(&self) -> &'static str;

    /// A chunk becomes resident, in this order. `hash` identifies its content across residencies (for ghost lists).
    /// `parent` is the chunk just in front of it in its chain, if that is resident: a new leaf is colder than its
    /// parent, however late it is stored.
    fn insert(&mut self, order: usize, id: ChunkId, hash: u64, parent: Option<ChunkId>);

    /// As `insert`, for a chunk that was last used before all others of this order: it becomes the coldest, in arc of
    /// those seen once. An engine's successor gives its chunks their places in this way, the warmest first, while
    /// others are already being used.
    fn insert_coldest(&mut self, order: usize, id: ChunkId, hash: u64);

    /// Whether a chunk is resident.
    fn has(&self, id: ChunkId) -> bool;

    /// A resident chunk was used. It becomes the warmest or, if `front`, a chunk in front of it in its chain, was
    /// touched in the same access, just colder than `front`. So a chain is touched from its head on, in any number
    /// of pieces.
    fn touch(&mut self, id: ChunkId, front: Option<ChunkId>);

    /// A resident chunk has been dropped. `evicted` is true if its room was needed (ghost lists then remember it),
    /// and false if it was cleared, replaced or aborted.
    fn remove(&mut self, id: ChunkId, evicted: bool);

    /// The coldest chunk of this order for which `evictable` holds; the caller then calls [`Policy::remove`]. A
    /// refused chunk is in use and may be moved to the warm end, so that the next call does not meet it again: the
    /// scan is amortised O(1). Each chunk looked at takes one off `looks`. The result is `None` when `looks` is 0,
    /// or when this call has looked at every chunk. After `looks` has come to 0, the next call goes on where this
    /// one stopped: after twice as many looks as there are chunks, the calls have looked at every one, whatever was
    /// looked at before.
    fn victim(
        &mut self,
        order: usize,
        looks: &mut u32,
        evictable: &mut dyn FnMut(ChunkId) -> bool,
    ) -> Option<ChunkId>;

    /// A resident chunk was chosen as [`victim`](Policy::victim), and stays after all, although nobody has used it: it is the
    /// coldest again, in arc of those of its list.
    fn put_back(&mut self, id: ChunkId);

    /// This order, in which no chunk is resident, is given to another namespace.
    fn forget(&mut self, order: usize);

    /// How many chunks of this order are resident.
    fn len(&self, order: usize) -> usize;

    /// Whether no chunk of this order is resident.
    fn is_empty(&self, order: usize) -> bool {
        self.len(order) == 0
    }

    /// The resident chunks, coldest first. Asserts the policy's own invariants. For tests and self-checks.
    fn dump(&self, order: usize) -> Vec<ChunkId>;
}

/// The most chunks that one policy can order: links are 32-bit, and there are two ghosts to a chunk.
pub const MAX_CHUNKS: usize = 1 << 30;

/// The available policies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PolicyKind {
    /// Least recently used: [`lru::Lru`].
    #[default]
    Lru,
    /// Adaptive replacement: [`arc::Arc`].
    Arc,
}

impl PolicyKind {
    /// Every policy, in the order in which tables show them.
    pub const ALL: [Self; 2] = [Self::Lru, Self::Arc];

    /// The name used in configuration, statistics and tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lru => "lru",
            Self::Arc => "arc",
        }
    }
}

impl fmt::Display for PolicyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that is none of [`PolicyKind::ALL`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown eviction policy {came:?}: expected lru or arc")]
pub struct UnknownPolicy {
    /// What was given.
    pub came: String,
}

impl FromStr for PolicyKind {
    type Err = UnknownPolicy;

    fn from_str(name: &str) -> Result<Self, UnknownPolicy> {
        let known = Self::ALL.into_iter().find(|kind| kind.name() == name);
        known.ok_or_else(|| UnknownPolicy { came: name.to_owned() })
    }
}

/// Makes a policy for chunk ids below `max_chunks`, and takes all memory that it will ever need.
///
/// The system gives the memory zeroed, and nothing touches it here: pages for chunks that never exist cost nothing.
///
/// # Panics
///
/// If `max_chunks` is above [`MAX_CHUNKS`].
///
/// # Errors
///
/// The system has no address space for the tables.
pub fn build(kind: PolicyKind, max_chunks: usize) -> Result<Box<dyn Policy>, NoMemory> {
    Ok(match kind {
        PolicyKind::Lru => Box::new(lru::Lru::new(max_chunks)?),
        PolicyKind::Arc => Box::new(arc::Arc::new(max_chunks)?),
    })
}
