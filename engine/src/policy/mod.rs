//! Which chunk goes when room is needed: one trait, one file per policy, all the same shape.
//!
//! A policy orders the chunks of each namespace by themselves, all of them in the same tables. It knows nothing of slots,
//! leases or shared memory; the cache tells it what was inserted, used and removed, and asks for the coldest chunk that
//! may go. Everything a policy needs is taken when it is made, which is when the engine starts: no call allocates from the
//! heap, and a namespace that is registered costs no memory.
//!
//! | policy | right for | why |
//! | --- | --- | --- |
//! | [`lru`] | a cache that holds most of what is reused | recency is all that counts when little has to go |
//! | [`arc`] | a cache that is small against what passes through | what came back once outlives what did not |
//!
//! `kvring simulate` measures both on a trace, with these very objects.

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

/// A chunk's place in the cache's private chunk table; dense, reused after a removal.
pub type ChunkId = u32;

/// Orders that a policy keeps, one for each namespace.
pub const ORDERS: usize = 64;

/// The orders in which chunks are evicted: one order for each namespace, by its number below [`ORDERS`].
///
/// The head of a chain is warmer than what follows it, so that leaves go first. Polls and retries are not accesses: the
/// caller filters them out.
pub trait Policy: Send {
    /// The name used in configuration, statistics and tables: `lru`, `arc`.
    fn name(&self) -> &'static str;

    /// A chunk that was not resident now is, in this order. `hash` identifies its content across residencies (for ghost
    /// lists); `parent` is the chunk just before it in its chain, where that is resident: a new leaf is
    /// colder than its parent, however late it is stored.
    fn insert(&mut self, order: usize, id: ChunkId, hash: u64, parent: Option<ChunkId>);

    /// A resident chunk was used: it becomes the warmest; or where one in front of it in its chain was touched in the same
    /// access, just colder than that `front`. So a chain is touched from its head on, in as many pieces as there are.
    fn touch(&mut self, id: ChunkId, front: Option<ChunkId>);

    /// A resident chunk is gone. `evicted` is true where room was needed (ghost lists remember it) and false
    /// where it was cleared, replaced or aborted.
    fn remove(&mut self, id: ChunkId, evicted: bool);

    /// The coldest chunk of this order for which `evictable` holds; the caller then calls [`Policy::remove`].
    /// A chunk that is refused is in use, and may be moved to the warm end, so that the next call does not
    /// meet it again: a scan is amortised O(1). Each look takes one off `looks`; `None` when there are none left, or this
    /// call has looked at every chunk. Calls whose looks come to their end go on where the one before has stopped: after
    /// twice as many looks as there are chunks they have looked at every one, whatever was looked at before.
    fn victim(
        &mut self,
        order: usize,
        looks: &mut u32,
        evictable: &mut dyn FnMut(ChunkId) -> bool,
    ) -> Option<ChunkId>;

    /// The order, in which nothing is resident, is another namespace's from now on.
    fn forget(&mut self, order: usize);

    /// How many chunks of this order are resident.
    fn len(&self, order: usize) -> usize;

    /// True when no chunk of this order is resident.
    fn is_empty(&self, order: usize) -> bool {
        self.len(order) == 0
    }

    /// The resident chunks, coldest first; asserts the policy's own invariants. For tests and self-checks.
    fn dump(&self, order: usize) -> Vec<ChunkId>;
}

/// The most chunks that one policy can order: links are 32-bit, and there are two ghosts to a chunk.
pub const MAX_CHUNKS: usize = 1 << 30;

/// The policies there are.
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

/// A policy's name that is none of [`PolicyKind::ALL`].
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

/// Makes a policy for chunk ids below `max_chunks`, and takes all the memory that it will ever need.
///
/// The memory comes zeroed from the system and is not touched here: pages of chunks that never exist cost nothing.
///
/// # Panics
///
/// If `max_chunks` is above [`MAX_CHUNKS`].
///
/// # Errors
///
/// The system has no address space for it.
pub fn build(kind: PolicyKind, max_chunks: usize) -> Result<Box<dyn Policy>, NoMemory> {
    Ok(match kind {
        PolicyKind::Lru => Box::new(lru::Lru::new(max_chunks)?),
        PolicyKind::Arc => Box::new(arc::Arc::new(max_chunks)?),
    })
}
