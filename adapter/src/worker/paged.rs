//! A paged KV cache on the host, as vLLM's CPU backend has it: planes (one per layer, or per layer and K/V) of pages,
//! one page per block, at a base address and a stride.
//!
//! A shard holds page bytes verbatim, block-major and plane-minor: `[block of chunk][plane][page bytes]`. So the order
//! of planes and their page sizes belong to the namespace: they go into the layout digest.

use core::fmt;

/// One plane: page `b` is at `base + b × block_stride`, `page_bytes` long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plane {
    /// Address of block 0's page.
    pub base: *mut u8,
    /// Bytes from one block's page to the next one's.
    pub block_stride: usize,
    /// Bytes of a page.
    pub page_bytes: usize,
}

/// A paged KV cache that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Nothing to copy.
    #[error("expected at least one {0}, got none")]
    Empty(&'static str),
    /// A plane whose pages overlap or are empty, or whose address is null.
    #[error(
        "plane {plane}: expected a non-null base and a page of 1 to block_stride bytes, got base {base:#x}, page of \
         {page_bytes} bytes, stride {block_stride}"
    )]
    Plane {
        /// Which.
        plane: usize,
        /// Its base address.
        base: usize,
        /// Bytes of a page.
        page_bytes: usize,
        /// Bytes between pages.
        block_stride: usize,
    },
    /// The shard's size does not fit into the address space.
    #[error("a shard of {blocks} blocks of {page_bytes} bytes each does not fit into 64 bits")]
    TooLarge {
        /// Blocks of a chunk.
        blocks: u32,
        /// Bytes of one block over all planes.
        page_bytes: usize,
    },
}

/// A block id that the cache does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    /// No such block.
    #[error("expected block ids below {num_blocks}, got {block}")]
    OutOfRange {
        /// The id.
        block: u32,
        /// Blocks there are.
        num_blocks: u32,
    },
    /// Not as many as a chunk has.
    #[error("expected {expected} block ids for a chunk, got {got}")]
    WrongCount {
        /// Blocks of a chunk.
        expected: u32,
        /// Given.
        got: usize,
    },
}

/// A worker's paged KV cache.
#[derive(Clone)]
pub struct PagedKv {
    planes: Vec<Plane>,
    num_blocks: u32,
    blocks_per_chunk: u32,
    shard_bytes: u64,
}

// SAFETY: addresses only. Who reads and writes them when is the contract of `PagedKv::new`.
unsafe impl Send for PagedKv {}
// SAFETY: as above.
unsafe impl Sync for PagedKv {}

impl fmt::Debug for PagedKv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PagedKv")
            .field("planes", &self.planes.len())
            .field("num_blocks", &self.num_blocks)
            .field("blocks_per_chunk", &self.blocks_per_chunk)
            .field("shard_bytes", &self.shard_bytes)
            .finish()
    }
}

impl PagedKv {
    /// Describes a paged KV cache of `num_blocks` blocks, of which `blocks_per_chunk` make a chunk.
    ///
    /// # Safety
    /// Until the worker adapter that gets it has been shut down, every page of every plane is readable and writable
    /// memory. While a store that names a block runs, nobody writes that block; while a load that names it runs,
    /// nobody else reads or writes it.
    pub unsafe fn new(
        planes: Vec<Plane>,
        num_blocks: u32,
        blocks_per_chunk: u32,
    ) -> Result<PagedKv, LayoutError> {
        if planes.is_empty() {
            return Err(LayoutError::Empty("plane"));
        }
        if num_blocks == 0 {
            return Err(LayoutError::Empty("block"));
        }
        if blocks_per_chunk == 0 {
            return Err(LayoutError::Empty("block per chunk"));
        }
        for (plane, Plane { base, block_stride, page_bytes }) in planes.iter().enumerate() {
            if base.is_null() || *page_bytes == 0 || page_bytes > block_stride {
                return Err(LayoutError::Plane {
                    plane,
                    base: *base as usize,
                    page_bytes: *page_bytes,
                    block_stride: *block_stride,
                });
            }
        }
        let page_bytes: usize = planes.iter().map(|plane| plane.page_bytes).sum();
        let shard_bytes = (page_bytes as u64)
            .checked_mul(u64::from(blocks_per_chunk))
            .ok_or(LayoutError::TooLarge { blocks: blocks_per_chunk, page_bytes })?;
        Ok(PagedKv { planes, num_blocks, blocks_per_chunk, shard_bytes })
    }

    /// Bytes of one shard: what one chunk of this rank takes in the arena.
    #[must_use]
    pub fn shard_bytes(&self) -> u64 {
        self.shard_bytes
    }

    /// Blocks of a chunk.
    #[must_use]
    pub fn blocks_per_chunk(&self) -> u32 {
        self.blocks_per_chunk
    }

    /// A digest of what decides the order of bytes in a shard.
    #[must_use]
    pub fn layout_digest(&self) -> u64 {
        // FNV-1a: not a secret, only a check that two runs of one rank mean the same.
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        let mut mix = |value: u64| hash = (hash ^ value).wrapping_mul(0x0000_0100_0000_01b3);
        mix(u64::from(self.blocks_per_chunk));
        for plane in &self.planes {
            mix(plane.page_bytes as u64);
        }
        hash
    }

    /// Checks one chunk's block ids.
    pub fn check_blocks(&self, blocks: &[u32]) -> Result<(), BlockError> {
        if blocks.len() != self.blocks_per_chunk as usize {
            return Err(BlockError::WrongCount { expected: self.blocks_per_chunk, got: blocks.len() });
        }
        match blocks.iter().find(|block| **block >= self.num_blocks) {
            Some(block) => Err(BlockError::OutOfRange { block: *block, num_blocks: self.num_blocks }),
            None => Ok(()),
        }
    }

    /// The pages of one chunk's blocks in shard order: address and length. The ids have been checked.
    pub(crate) fn pages<'a>(&'a self, blocks: &'a [u32]) -> impl Iterator<Item = (*mut u8, usize)> + 'a {
        blocks.iter().flat_map(move |block| {
            self.planes.iter().map(move |plane| {
                let address = plane.base.wrapping_add(*block as usize * plane.block_stride);
                (address, plane.page_bytes)
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plane(base: usize, block_stride: usize, page_bytes: usize) -> Plane {
        Plane { base: base as *mut u8, block_stride, page_bytes }
    }

    fn paged(planes: Vec<Plane>, num_blocks: u32, per_chunk: u32) -> Result<PagedKv, LayoutError> {
        // SAFETY: nothing is copied in these tests.
        unsafe { PagedKv::new(planes, num_blocks, per_chunk) }
    }

    #[test]
    fn pages_come_block_major_and_plane_minor() {
        let kv = paged(vec![plane(0x1000, 64, 32), plane(0x9000, 128, 100)], 8, 2).unwrap();
        assert_eq!(kv.shard_bytes(), 2 * 132);
        let pages: Vec<_> = kv.pages(&[3, 1]).map(|(a, n)| (a as usize, n)).collect();
        assert_eq!(pages, [(0x1000 + 192, 32), (0x9000 + 384, 100), (0x1000 + 64, 32), (0x9000 + 128, 100)]);
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_numbers() {
        assert_eq!(paged(vec![], 1, 1).unwrap_err(), LayoutError::Empty("plane"));
        assert_eq!(paged(vec![plane(1, 1, 1)], 0, 1).unwrap_err(), LayoutError::Empty("block"));
        assert!(matches!(paged(vec![plane(0, 1, 1)], 1, 1), Err(LayoutError::Plane { plane: 0, .. })));
        assert!(matches!(paged(vec![plane(8, 4, 5)], 1, 1), Err(LayoutError::Plane { page_bytes: 5, .. })));
        let kv = paged(vec![plane(8, 8, 8)], 4, 2).unwrap();
        assert_eq!(kv.check_blocks(&[0]), Err(BlockError::WrongCount { expected: 2, got: 1 }));
        assert_eq!(kv.check_blocks(&[0, 4]), Err(BlockError::OutOfRange { block: 4, num_blocks: 4 }));
        assert_eq!(kv.check_blocks(&[0, 3]), Ok(()));
    }

    #[test]
    fn the_digest_tells_layouts_apart() {
        let digest = |planes, per_chunk| paged(planes, 8, per_chunk).unwrap().layout_digest();
        let base = digest(vec![plane(8, 64, 32), plane(8, 64, 16)], 2);
        assert_ne!(base, digest(vec![plane(8, 64, 16), plane(8, 64, 32)], 2));
        assert_ne!(base, digest(vec![plane(8, 64, 32), plane(8, 64, 16)], 4));
        assert_eq!(
            base,
            digest(vec![plane(16, 128, 32), plane(24, 64, 16)], 2),
            "where it lies does not matter"
        );
    }
}
