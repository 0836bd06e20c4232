//! What to move: shards of the arena, and the blocks of a paged cache that they are made of.

use crate::backend::Fence;
use crate::layout::{BlockError, PagedKv};
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
