//! The paged cache of a row: layers outermost (LBHNC), so that a block's part of a layer is one fragment.

use super::memory::shuffled;
use anyhow::Context;
use kvring_gpu_kernels::{Memory, PagedKv, Plane};
use std::sync::Arc;

/// The most layers. A chunk of fewer fragments has fewer layers.
const LAYERS_MAX: usize = 32;

/// How a chunk is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// Bytes that are contiguous in the cache.
    pub(super) fragment: usize,
    /// Bytes of a chunk.
    pub(super) chunk: usize,
}

impl Shape {
    fn layers(self) -> usize {
        (self.chunk / self.fragment).min(LAYERS_MAX)
    }

    fn blocks_per_chunk(self) -> usize {
        self.chunk / self.fragment / self.layers()
    }
}

/// A cache that fills `bytes` of device memory, and the blocks of each of its chunks.
pub(super) struct Layout {
    pub(super) shape: Shape,
    pub(super) paged: Arc<PagedKv>,
    blocks: Vec<u32>,
    base: u64,
}

impl Layout {
    /// # Safety
    /// The promise of [`PagedKv::grouped`], for `bytes` bytes of the device's memory from `base` on.
    pub(super) unsafe fn new(
        shape: Shape,
        device: u32,
        base: u64,
        bytes: usize,
        seed: u64,
    ) -> anyhow::Result<Layout> {
        let Shape { fragment, chunk } = shape;
        let per_chunk = shape.blocks_per_chunk();
        let num_blocks = u32::try_from(bytes / chunk * per_chunk).context("too many blocks")?;
        let layer_bytes = num_blocks as usize * fragment;
        let plane = |layer| Plane {
            base: core::ptr::without_provenance_mut(base as usize + layer * layer_bytes),
            block_stride: fragment,
            page_bytes: fragment,
        };
        let planes = (0..shape.layers()).map(plane).collect();
        // SAFETY: our caller's promise; layers × blocks × fragment are no more than `bytes`.
        let paged = unsafe { PagedKv::new(planes, num_blocks, per_chunk as u32) }?.on(Memory::Cuda(device));
        Ok(Layout { shape, paged: Arc::new(paged), blocks: shuffled(num_blocks, seed), base })
    }

    /// Chunks that the cache has.
    pub(super) fn chunks(&self) -> usize {
        self.blocks.len() / self.shape.blocks_per_chunk()
    }

    /// The blocks of a chunk.
    pub(super) fn blocks(&self, chunk: usize) -> &[u32] {
        let per_chunk = self.shape.blocks_per_chunk();
        &self.blocks[chunk * per_chunk..][..per_chunk]
    }

    /// The offsets and lengths of a chunk's pages in the cache's memory, in the order of the shard.
    pub(super) fn places(&self, chunk: usize) -> impl Iterator<Item = (usize, usize)> {
        let pages = self.paged.pages(self.blocks(chunk));
        pages.map(|(address, bytes)| ((address as u64 - self.base) as usize, bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_belongs_to_one_chunk() {
        for (fragment, chunk) in [(64, 4096), (64, 64), (1024, 4096), (4096, 4096)] {
            let shape = Shape { fragment, chunk };
            // SAFETY: nothing is copied.
            let layout = unsafe { Layout::new(shape, 0, 1 << 20, 16384, 5) }.unwrap();
            assert_eq!((layout.chunks(), layout.paged.shard_bytes()), (16384 / chunk, chunk as u64));
            let mut places: Vec<_> = (0..layout.chunks()).flat_map(|chunk| layout.places(chunk)).collect();
            places.sort_unstable();
            let expected = (0..16384 / fragment).map(|page| (page * fragment, fragment));
            assert!(places.into_iter().eq(expected), "{shape:?}");
        }
    }
}
