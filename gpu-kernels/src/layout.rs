//! A paged KV cache, as vLLM has it: planes of pages, one page per block, at a base address and a stride. Layers that share a
//! block table are a *group*; most models have one, those that mix kinds of attention have several.
//!
//! This one affine description covers all of vLLM's page orders, named by the axes L(ayer), B(lock), H(ead), N (token of a
//! block) and C(ontent), the outermost first. In LBHNC, LBNHC, BLHNC, BLNHC and MLA the bytes of one layer in one block are
//! contiguous, so there is a plane for each layer. With the heads outside the blocks (LHBNC) or outside the layers (BHLNC) there
//! is a plane for each head of a layer. Packed allocations are planes whose pages lie in each other's gaps; padded pages are
//! planes whose stride is longer than their page.
//!
//! A shard holds page bytes verbatim, group after group, and in each block-major and plane-minor: `[block of
//! chunk][plane][page bytes]`. So the groups, the order of planes and their page sizes belong to the namespace: they go into
//! the layout digest.

use crate::digest::Digest;
use core::fmt;

/// Stands for a block id in a load: the block's pages are not written, because vLLM has them already, or has no block there.
pub const SKIP: u32 = u32::MAX;

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

impl Plane {
    fn page(&self, block: u32) -> (*mut u8, usize) {
        let address = match block {
            SKIP => core::ptr::null_mut(),
            block => self.base.wrapping_add(block as usize * self.block_stride),
        };
        (address, self.page_bytes)
    }
}

/// Layers that share a block table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvGroup {
    /// The planes: a block has one page in each.
    pub planes: Vec<Plane>,
    /// How many blocks there are.
    pub num_blocks: u32,
    /// How many of them make a chunk.
    pub blocks_per_chunk: u32,
}

impl KvGroup {
    /// Bytes of a chunk's blocks in this group, whose index is `group`.
    fn chunk_bytes(&self, group: usize) -> Result<u64, LayoutError> {
        let &KvGroup { ref planes, num_blocks, blocks_per_chunk } = self;
        if planes.is_empty() {
            return Err(LayoutError::Empty("plane"));
        }
        if num_blocks == 0 {
            return Err(LayoutError::Empty("block"));
        }
        if blocks_per_chunk == 0 {
            return Err(LayoutError::Empty("block per chunk"));
        }
        for (plane, &Plane { base, block_stride, page_bytes }) in planes.iter().enumerate() {
            if base.is_null() || page_bytes == 0 || page_bytes > block_stride {
                let base = base as usize;
                return Err(LayoutError::Plane { group, plane, base, page_bytes, block_stride });
            }
        }
        let bytes = planes.iter().map(|plane| plane.page_bytes as u128).sum::<u128>();
        u64::try_from(bytes * u128::from(blocks_per_chunk)).map_err(|_| LayoutError::TooLarge { group })
    }
}

/// A paged KV cache that cannot exist.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// It has nothing to copy.
    #[error("expected at least one {0}, got none")]
    Empty(&'static str),
    /// A plane whose pages overlap or are empty, or whose address is null.
    #[error(
        "group {group}, plane {plane}: expected a non-null base and a page of 1 to block_stride bytes, got base \
         {base:#x}, page of {page_bytes} bytes, stride {block_stride}"
    )]
    Plane {
        /// The index of its group.
        group: usize,
        /// Its index in the group.
        plane: usize,
        /// Its base address.
        base: usize,
        /// Bytes of a page.
        page_bytes: usize,
        /// Bytes between pages.
        block_stride: usize,
    },
    /// The shard's bytes or the chunk's blocks are too many to be counted.
    #[error("expected a chunk of at most 2^64 - 1 bytes and 2^32 - 1 blocks, got more with group {group}")]
    TooLarge {
        /// The group that made it too much.
        group: usize,
    },
}

/// Block ids that are not those of a chunk of this cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    /// No such block.
    #[error("expected block ids below {num_blocks}, got {block}")]
    OutOfRange {
        /// The id.
        block: u32,
        /// How many blocks there are.
        num_blocks: u32,
    },
    /// A chunk has another number of blocks.
    #[error("expected {expected} block ids for a chunk, got {got}")]
    WrongCount {
        /// Blocks of a chunk.
        expected: u32,
        /// Given.
        got: usize,
    },
    /// [`SKIP`] in a store.
    #[error("expected blocks to store, got SKIP as the chunk's block {at}")]
    NothingToStore {
        /// Its index among the chunk's block ids.
        at: usize,
    },
}

/// The memory that a cache is in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Memory {
    /// This process's own.
    #[default]
    Host,
    /// That of the CUDA device with this number, as `CUDA_VISIBLE_DEVICES` lets this process count them.
    Cuda(u32),
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Memory::Host => f.write_str("host memory"),
            Memory::Cuda(device) => write!(f, "the memory of CUDA device {device}"),
        }
    }
}

/// A worker's paged KV cache.
#[derive(Clone)]
pub struct PagedKv {
    memory: Memory,
    order: u64,
    groups: Vec<KvGroup>,
    blocks_per_chunk: u32,
    shard_bytes: u64,
}

// SAFETY: addresses only. The contract of `PagedKv::grouped` says who reads and writes the memory, and when.
unsafe impl Send for PagedKv {}
// SAFETY: as above.
unsafe impl Sync for PagedKv {}

impl fmt::Debug for PagedKv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let planes: Vec<usize> = self.groups.iter().map(|group| group.planes.len()).collect();
        f.debug_struct("PagedKv")
            .field("memory", &self.memory)
            .field("planes", &planes)
            .field("blocks_per_chunk", &self.blocks_per_chunk)
            .field("shard_bytes", &self.shard_bytes)
            .finish()
    }
}

impl PagedKv {
    /// Describes a paged KV cache of one group: `num_blocks` blocks, of which `blocks_per_chunk` make a chunk.
    ///
    /// # Safety
    /// As [`PagedKv::grouped`].
    pub unsafe fn new(
        planes: Vec<Plane>,
        num_blocks: u32,
        blocks_per_chunk: u32,
    ) -> Result<PagedKv, LayoutError> {
        // SAFETY: as the caller promises.
        unsafe { PagedKv::grouped(vec![KvGroup { planes, num_blocks, blocks_per_chunk }]) }
    }

    /// Describes a paged KV cache in host memory. A chunk's block ids are those of the first group, then those of the second, and
    /// so on.
    ///
    /// # Safety
    /// Until the worker adapter that gets it has been shut down, every page of every plane is readable and writable
    /// memory. While a store that names a block runs, nobody writes that block; while a load that names it runs,
    /// nobody else reads or writes it.
    pub unsafe fn grouped(groups: Vec<KvGroup>) -> Result<PagedKv, LayoutError> {
        if groups.is_empty() {
            return Err(LayoutError::Empty("group"));
        }
        let (mut blocks_per_chunk, mut shard_bytes) = (0u32, 0u64);
        for (index, group) in groups.iter().enumerate() {
            let too_large = LayoutError::TooLarge { group: index };
            let bytes = group.chunk_bytes(index)?;
            shard_bytes = shard_bytes.checked_add(bytes).ok_or(too_large.clone())?;
            blocks_per_chunk = blocks_per_chunk.checked_add(group.blocks_per_chunk).ok_or(too_large)?;
        }
        Ok(PagedKv { memory: Memory::Host, order: 0, groups, blocks_per_chunk, shard_bytes })
    }

    /// The same cache in other memory: its addresses are addresses there, and what was promised to [`PagedKv::grouped`] holds
    /// there.
    #[must_use]
    pub fn on(mut self, memory: Memory) -> PagedKv {
        self.memory = memory;
        self
    }

    /// Adds to the layout's digest a digest of the tensors that the planes were made of (their places, the order of their
    /// dimensions). The tensors decide what a page's bytes mean, and the planes do not show them: without this, two caches of
    /// equal planes and different tensors would take each other's shards for their own.
    #[must_use]
    pub fn ordered(mut self, order: u64) -> PagedKv {
        self.order = order;
        self
    }

    /// The memory that it is in.
    #[must_use]
    pub fn memory(&self) -> Memory {
        self.memory
    }

    /// Its groups.
    #[must_use]
    pub fn groups(&self) -> &[KvGroup] {
        &self.groups
    }

    /// Bytes of one shard: what one chunk of this rank takes in the arena.
    #[must_use]
    pub fn shard_bytes(&self) -> u64 {
        self.shard_bytes
    }

    /// Blocks of a chunk, over all groups.
    #[must_use]
    pub fn blocks_per_chunk(&self) -> u32 {
        self.blocks_per_chunk
    }

    /// A digest of what decides the order of bytes in a shard.
    #[must_use]
    pub fn layout_digest(&self) -> u64 {
        let mut digest = Digest::default();
        let mut mix = |word| digest.mix(word);
        mix(self.order);
        for group in &self.groups {
            mix(u64::from(group.blocks_per_chunk));
            // The number of planes too, or a group's last plane could be taken for the next group's number of blocks.
            mix(group.planes.len() as u64);
            for plane in &group.planes {
                mix(plane.page_bytes as u64);
            }
        }
        digest.value()
    }

    /// Checks one chunk's block ids. With `may_skip` they may be [`SKIP`]: for a load.
    pub fn check_blocks(&self, blocks: &[u32], may_skip: bool) -> Result<(), BlockError> {
        if blocks.len() != self.blocks_per_chunk as usize {
            return Err(BlockError::WrongCount { expected: self.blocks_per_chunk, got: blocks.len() });
        }
        let mut at = 0;
        for (group, blocks) in self.by_group(blocks) {
            let num_blocks = group.num_blocks;
            for &block in blocks {
                match block {
                    SKIP if may_skip => {}
                    SKIP => return Err(BlockError::NothingToStore { at }),
                    block if block >= num_blocks => {
                        return Err(BlockError::OutOfRange { block, num_blocks });
                    }
                    _ => {}
                }
                at += 1;
            }
        }
        Ok(())
    }

    /// A chunk's block ids, group by group. Their number has been checked.
    fn by_group<'a>(&'a self, blocks: &'a [u32]) -> impl Iterator<Item = (&'a KvGroup, &'a [u32])> {
        let mut rest = blocks;
        self.groups.iter().map(move |group| {
            let (own, others) = rest.split_at(group.blocks_per_chunk as usize);
            rest = others;
            (group, own)
        })
    }

    /// The pages of one chunk's blocks in shard order: address and length. A skipped page's address is null. The ids have
    /// been checked.
    pub fn pages<'a>(&'a self, blocks: &'a [u32]) -> impl Iterator<Item = (*mut u8, usize)> + 'a {
        self.by_group(blocks).flat_map(|(group, blocks)| {
            blocks.iter().flat_map(|block| group.planes.iter().map(|plane| plane.page(*block)))
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

    fn group(planes: Vec<Plane>, num_blocks: u32, blocks_per_chunk: u32) -> KvGroup {
        KvGroup { planes, num_blocks, blocks_per_chunk }
    }

    fn grouped(groups: Vec<KvGroup>) -> Result<PagedKv, LayoutError> {
        // SAFETY: as above.
        unsafe { PagedKv::grouped(groups) }
    }

    #[test]
    fn groups_follow_one_another_with_blocks_of_their_own() {
        let first = group(vec![plane(0x1000, 64, 32), plane(0x2000, 64, 8)], 8, 2);
        let second = group(vec![plane(0x9000, 128, 100)], 4, 1);
        let kv = grouped(vec![first, second]).unwrap();
        assert_eq!((kv.blocks_per_chunk(), kv.shard_bytes()), (3, 2 * 40 + 100));
        let pages: Vec<_> = kv.pages(&[7, SKIP, 3]).map(|(a, n)| (a as usize, n)).collect();
        assert_eq!(pages, [(0x11c0, 32), (0x21c0, 8), (0, 32), (0, 8), (0x9180, 100)]);
        assert_eq!(kv.check_blocks(&[7, SKIP, 3], true), Ok(()));
        let outside = BlockError::OutOfRange { block: 7, num_blocks: 4 };
        assert_eq!(kv.check_blocks(&[7, 7, 7], true), Err(outside), "each by its own group");
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
        assert_eq!(kv.check_blocks(&[0], true), Err(BlockError::WrongCount { expected: 2, got: 1 }));
        assert_eq!(kv.check_blocks(&[0, 4], true), Err(BlockError::OutOfRange { block: 4, num_blocks: 4 }));
        assert_eq!(kv.check_blocks(&[0, 3], false), Ok(()));
        assert_eq!(kv.check_blocks(&[SKIP, SKIP], true), Ok(()));
        assert_eq!(kv.check_blocks(&[0, SKIP], false), Err(BlockError::NothingToStore { at: 1 }));
        assert_eq!(grouped(vec![]).unwrap_err(), LayoutError::Empty("group"));
        let huge = group(vec![plane(8, usize::MAX, usize::MAX)], 1, 1);
        assert!(grouped(vec![huge.clone()]).is_ok());
        assert_eq!(grouped(vec![huge.clone(), huge]).unwrap_err(), LayoutError::TooLarge { group: 1 });
        let wrong =
            vec![group(vec![plane(8, 8, 8)], 1, 1), group(vec![plane(8, 8, 8), plane(8, 4, 8)], 1, 1)];
        assert!(matches!(grouped(wrong), Err(LayoutError::Plane { group: 1, plane: 1, .. })));
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
        let turned = |order| paged(vec![plane(8, 64, 32)], 8, 2).unwrap().ordered(order).layout_digest();
        assert_ne!(turned(1), turned(2), "what the planes were made of");
        let of = |groups: &[(&[usize], u32)]| {
            let groups = groups.iter().map(|(pages, per_chunk)| {
                group(pages.iter().map(|bytes| plane(8, 64, *bytes)).collect(), 8, *per_chunk)
            });
            grouped(groups.collect()).unwrap().layout_digest()
        };
        assert_eq!(base, of(&[(&[32, 16], 2)]));
        let structures = [
            of(&[(&[32, 16], 2)]),
            of(&[(&[32], 2), (&[16], 2)]),
            of(&[(&[16], 2), (&[32], 2)]),
            of(&[(&[32, 2, 16], 2)]),
            of(&[(&[32, 16], 1), (&[32, 16], 1)]),
            of(&[(&[32, 2, 1, 16], 2)]),
        ];
        for (index, digest) in structures.iter().enumerate() {
            assert!(!structures[..index].contains(digest), "structure {index}");
        }
    }
}
