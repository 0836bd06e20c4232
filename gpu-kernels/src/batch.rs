//! What to move, and after what: shards of the arena, and the blocks of a paged cache that they are made of.

use crate::layout::{BlockError, PagedKv};
use std::any::Any;
use std::sync::Arc;

/// The direction in which bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From the paged cache into the arena.
    Store,
    /// From the arena into the paged cache.
    Load,
}

impl Direction {
    /// For people.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Direction::Store => "store",
            Direction::Load => "load",
        }
    }
}

/// A stream of the caller's device (a `CUstream`). A transfer must come after the work on it: after the kernels that write the
/// KV of a store, and the last readers of the blocks of a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ComputeStream(pub u64);

/// A point in a [`ComputeStream`]: all that had been put on it when the fence was made ([`CopyBackend::fence`](crate::CopyBackend::fence)).
#[derive(Clone, Default)]
pub struct Fence(pub(crate) Option<Arc<dyn Any + Send + Sync>>);

impl Fence {
    /// A fence with nothing to wait for. It is all that host memory needs: the caller's earlier accesses to it have ended.
    #[must_use]
    pub fn none() -> Fence {
        Fence(None)
    }
}

impl core::fmt::Debug for Fence {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(if self.0.is_some() { "Fence(event)" } else { "Fence(none)" })
    }
}

/// Shards of the arena, each with the blocks of its chunk.
#[derive(Debug)]
pub struct CopyBatch {
    pub(crate) direction: Direction,
    pub(crate) checksum: bool,
    pub(crate) after: Fence,
    pub(crate) paged: Arc<PagedKv>,
    /// The first byte of each shard.
    pub(crate) arena: Vec<*mut u8>,
    /// `paged.blocks_per_chunk()` for each shard, checked.
    pub(crate) blocks: Vec<u32>,
}

// SAFETY: addresses only; `CopyBatch::shard` states who may touch the memory behind them, from any thread.
unsafe impl Send for CopyBatch {}
// SAFETY: as above.
unsafe impl Sync for CopyBatch {}

impl CopyBatch {
    /// An empty batch. With `checksum`, each shard's checksum is computed in the copy (see [`crate::checksum`]).
    #[must_use]
    pub fn new(direction: Direction, paged: &Arc<PagedKv>, checksum: bool) -> CopyBatch {
        CopyBatch {
            direction,
            checksum,
            after: Fence::none(),
            paged: paged.clone(),
            arena: Vec::new(),
            blocks: Vec::new(),
        }
    }

    /// Orders the batch after a fence of the backend that it is submitted to.
    #[must_use]
    pub fn after(mut self, fence: Fence) -> CopyBatch {
        self.after = fence;
        self
    }

    /// Adds a shard: `paged.shard_bytes()` of the arena, from `arena` on, and the chunk's blocks.
    ///
    /// A block of a *load* that is [`crate::SKIP`] is not written; its bytes count in the shard's checksum all the same.
    ///
    /// # Errors
    /// Block ids that the cache does not have, or SKIP in a store. Nothing is added then.
    ///
    /// # Safety
    /// Until the batch's transfer has completed, the shard in the arena is mapped, and what was promised to
    /// [`PagedKv::grouped`] holds for the blocks; the destination is writable, and nobody else accesses it; nobody writes the
    /// blocks of a store. Another process may write the arena side of a *load* meanwhile: then the bytes loaded are
    /// meaningless, and the caller finds that out by looking at the slot's word again.
    pub unsafe fn shard(&mut self, arena: *mut u8, blocks: &[u32]) -> Result<(), BlockError> {
        self.paged.check_blocks(blocks, self.direction == Direction::Load)?;
        self.arena.push(arena);
        self.blocks.extend_from_slice(blocks);
        Ok(())
    }

    /// The shards: the first byte of each, and its chunk's blocks.
    pub(crate) fn shards(&self) -> impl ExactSizeIterator<Item = (*mut u8, &[u32])> {
        self.arena.iter().copied().zip(self.blocks.chunks_exact(self.paged.blocks_per_chunk() as usize))
    }

    /// Its direction.
    #[must_use]
    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// Number of shards.
    #[must_use]
    pub fn len(&self) -> usize {
        self.arena.len()
    }

    /// Is there nothing to move?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.arena.is_empty()
    }

    /// Bytes of its shards.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.arena.len() as u64 * self.paged.shard_bytes()
    }
}
