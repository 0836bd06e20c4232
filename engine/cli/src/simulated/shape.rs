//! The shape of one rank's simulated paged KV cache.

use serde::{Deserialize, Serialize};

/// The shape of one rank's paged KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Shape {
    /// Tokens in a chunk: a block of the trace.
    pub(crate) chunk_tokens: u32,
    /// Blocks in a chunk.
    pub(crate) blocks_per_chunk: u32,
    /// Planes.
    pub(crate) planes: u32,
    /// Words of a page.
    pub(crate) page_words: u32,
    /// Blocks there are.
    pub(crate) num_blocks: u32,
}

impl Shape {
    /// Bytes of a page.
    pub(crate) fn page_bytes(&self) -> usize {
        self.page_words as usize * 8
    }

    /// Bytes of one rank's part of a chunk.
    pub(crate) fn shard_bytes(&self) -> u64 {
        u64::from(self.blocks_per_chunk) * u64::from(self.planes) * self.page_bytes() as u64
    }

    /// Bytes of the whole paged KV cache of one rank.
    pub(crate) fn kv_bytes(&self) -> u64 {
        u64::from(self.num_blocks) * u64::from(self.planes) * self.page_bytes() as u64
    }
}
