//! A worker's paged KV cache: planes of pages, whose bytes are a function of their place ([`content`](crate::content)).

use crate::content::{self, Content, LANES, PageId};
use anyhow::{Context, bail, ensure};
use kvring_adapter::{Memory, PagedKv, Plane};
use serde::{Deserialize, Serialize};
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::any::Any;
use std::ptr::NonNull;

/// Planes begin on pages of the machine.
const ALIGN: usize = 4096;
/// What the gaps between pages hold.
const CANARY: u64 = 0xa5a5_a5a5_a5a5_a5a5;

/// The shape of one rank's paged KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Planes.
    pub planes: u32,
    /// Bytes of a page: in planes with even numbers, and in the others. Multiples of 64.
    pub page_bytes: [usize; 2],
    /// Bytes behind each page which nobody may write. A multiple of 8.
    pub gap_bytes: usize,
    /// Blocks of a chunk.
    pub blocks_per_chunk: u32,
    /// Blocks in all.
    pub blocks: u32,
}

impl Shape {
    /// Two planes, as keys and values, of different sizes, with a gap after each page; 64 KiB a shard.
    pub const SMALL: Shape =
        Shape { planes: 2, page_bytes: [4096, 12288], gap_bytes: 64, blocks_per_chunk: 4, blocks: 256 };

    /// 1 MiB a shard, so that a copy takes long enough to be raced.
    pub const LARGE: Shape =
        Shape { page_bytes: [256 << 10, 256 << 10], blocks_per_chunk: 2, blocks: 32, ..Shape::SMALL };

    /// Chunks that fit into the cache at once.
    #[must_use]
    pub const fn chunks(&self) -> usize {
        (self.blocks / self.blocks_per_chunk) as usize
    }

    /// Bytes of a page of this plane.
    #[must_use]
    pub const fn page_bytes(&self, plane: u32) -> usize {
        self.page_bytes[plane as usize % 2]
    }

    const fn block_stride(&self, plane: u32) -> usize {
        self.page_bytes(plane) + self.gap_bytes
    }

    /// Bytes of all pages of a block.
    const fn block_bytes(&self) -> u64 {
        let [even, odd] = self.page_bytes;
        self.planes.div_ceil(2) as u64 * even as u64 + (self.planes / 2) as u64 * odd as u64
    }

    /// Bytes of one rank's part of a chunk.
    #[must_use]
    pub const fn shard_bytes(&self) -> u64 {
        self.blocks_per_chunk as u64 * self.block_bytes()
    }

    /// Bytes that a plane takes, gaps included.
    #[must_use]
    pub const fn plane_bytes(&self, plane: u32) -> usize {
        self.blocks as usize * self.block_stride(plane)
    }

    /// Bytes that the whole cache takes, gaps included.
    #[must_use]
    pub const fn kv_bytes(&self) -> u64 {
        self.blocks as u64 * (self.block_bytes() + self.planes as u64 * self.gap_bytes as u64)
    }
}

/// Bytes of a chunk that are not the chunk's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wrong {
    /// How many bytes are wrong.
    pub bytes: u64,
    /// The page with the first wrong word.
    pub page: PageId,
    /// The index of that word in its page.
    pub word: usize,
    /// What the word should be.
    pub expected: u64,
    /// What it is.
    pub found: u64,
}

/// Whatever a plane's memory belongs to. It is dropped with the cache.
pub type Owner = Box<dyn Any + Send + Sync>;

/// The cache. The threads of the adapter that was told of it read and write it too, so each access here says why none of them
/// does so at that time.
#[derive(Debug)]
pub struct Pages {
    shape: Shape,
    memory: Memory,
    planes: Vec<(NonNull<u64>, Owner)>,
}

// SAFETY: the memory belongs to this value alone, and an adapter's threads touch it only as `describe`'s caller has promised.
unsafe impl Send for Pages {}
// SAFETY: as above; with a shared reference the memory is only read.
unsafe impl Sync for Pages {}

/// Zeroed memory of the host.
struct Host(NonNull<u8>, Layout);

// SAFETY: an address and a layout; the memory belongs to nobody else.
unsafe impl Send for Host {}
// SAFETY: as above.
unsafe impl Sync for Host {}

impl Drop for Host {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.0.as_ptr(), self.1) };
    }
}

impl Pages {
    /// Zeroed pages of this shape, in the host's memory.
    ///
    /// # Errors
    /// A shape that cannot be, or no memory.
    pub fn new(shape: Shape) -> anyhow::Result<Pages> {
        let mut planes: Vec<(NonNull<u64>, Owner)> = Vec::new();
        for plane in 0..shape.planes {
            let bytes = shape.plane_bytes(plane);
            ensure!(bytes > 0, "expected a plane of some bytes, got {shape:?}");
            let layout = Layout::from_size_align(bytes, ALIGN).context("a plane of the paged KV cache")?;
            // SAFETY: the layout is not empty.
            let base = NonNull::new(unsafe { alloc_zeroed(layout) })
                .with_context(|| format!("no memory for a plane of {bytes} bytes of the paged KV cache"))?;
            planes.push((base.cast(), Box::new(Host(base, layout))));
        }
        // SAFETY: each plane has just been allocated with its size.
        unsafe { Pages::at(shape, Memory::Host, planes) }
    }

    /// Pages of this shape in planes that have been allocated elsewhere, for instance on a device whose memory the host can
    /// reach.
    ///
    /// # Safety
    /// Each plane has [`Shape::plane_bytes`] bytes, which live as long as their owner, and which nobody else uses.
    ///
    /// # Errors
    /// A shape that cannot be.
    pub unsafe fn at(
        shape: Shape,
        memory: Memory,
        planes: Vec<(NonNull<u64>, Owner)>,
    ) -> anyhow::Result<Pages> {
        let whole = |bytes: usize| bytes > 0 && bytes.is_multiple_of(LANES * 8);
        if !shape.page_bytes.into_iter().all(whole) || !shape.gap_bytes.is_multiple_of(8) {
            bail!(
                "expected pages of a multiple of {} bytes, and gaps of whole words, got {shape:?}",
                LANES * 8
            );
        }
        let pages = Pages { shape, memory, planes };
        for gap in pages.gaps() {
            // SAFETY: by our caller's promise, or our own, the gap is ours alone.
            unsafe { gap.write(CANARY) };
        }
        Ok(pages)
    }

    /// Its shape.
    #[must_use]
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The cache, as a worker's adapter takes it.
    ///
    /// # Safety
    /// The adapter that gets it is shut down before `self` is dropped, and blocks that a job names are left alone until
    /// the job has been reported.
    ///
    /// # Errors
    /// A shape that the adapter does not take.
    pub unsafe fn describe(&self) -> anyhow::Result<PagedKv> {
        let planes = (0..).zip(&self.planes).map(|(plane, (base, _))| Plane {
            base: base.as_ptr().cast(),
            block_stride: self.shape.block_stride(plane),
            page_bytes: self.shape.page_bytes(plane),
        });
        // SAFETY: each plane has so many pages at that stride; the rest is our caller's promise.
        let paged = unsafe { PagedKv::new(planes.collect(), self.shape.blocks, self.shape.blocks_per_chunk) };
        Ok(paged.context("the simulated paged KV cache")?.on(self.memory))
    }

    fn page(&self, plane: u32, block: u32) -> *mut u64 {
        assert!(block < self.shape.blocks, "block {block} of {}", self.shape.blocks);
        let (base, _) = &self.planes[plane as usize];
        base.as_ptr().wrapping_byte_add(block as usize * self.shape.block_stride(plane))
    }

    /// The pages of a chunk in these blocks: address, words, and name.
    fn of_chunk<'a>(
        &'a self,
        content: Content,
        blocks: &'a [u32],
    ) -> impl Iterator<Item = (*mut u64, usize, PageId)> + 'a {
        (0u32..).zip(blocks).flat_map(move |(index, block)| {
            (0..self.shape.planes).map(move |plane| {
                let words = self.shape.page_bytes(plane) / 8;
                (self.page(plane, *block), words, PageId { content, block: index, plane })
            })
        })
    }

    /// "Computes" a chunk: writes its content into its blocks.
    ///
    /// # Safety
    /// No job reads or writes these blocks.
    pub unsafe fn compute(&mut self, content: Content, blocks: &[u32]) {
        for (page, words, id) in self.of_chunk(content, blocks) {
            // SAFETY: a page of ours; by our caller's promise nobody else uses it, and `self` is borrowed mutably.
            content::fill(unsafe { std::slice::from_raw_parts_mut(page, words) }, id);
        }
    }

    /// Makes every bit of these blocks other than it is in this content, before that is loaded into them.
    ///
    /// # Safety
    /// No job reads or writes these blocks.
    pub unsafe fn spoil(&mut self, content: Content, blocks: &[u32]) {
        for (page, words, id) in self.of_chunk(content, blocks) {
            // SAFETY: as in `compute`.
            content::spoil(unsafe { std::slice::from_raw_parts_mut(page, words) }, id);
        }
    }

    /// What of these blocks is not the content; `None` where all of it is.
    ///
    /// # Safety
    /// No job writes these blocks.
    #[must_use]
    pub unsafe fn verify(&self, content: Content, blocks: &[u32]) -> Option<Wrong> {
        let mut all: Option<Wrong> = None;
        for (page, words, id) in self.of_chunk(content, blocks) {
            // SAFETY: a page of ours, which by our caller's promise nobody writes.
            let page = unsafe { std::slice::from_raw_parts(page, words) };
            let bytes = content::wrong_bytes(page, id);
            if let Some(all) = &mut all {
                all.bytes += bytes;
            } else if let Some((word, expected, found)) = content::first_wrong(page, id).filter(|_| bytes > 0)
            {
                all = Some(Wrong { bytes, page: id, word, expected, found });
            }
        }
        all
    }

    /// All words of all gaps.
    fn gaps(&self) -> impl Iterator<Item = *mut u64> {
        (0..self.shape.planes).flat_map(move |plane| {
            (0..self.shape.blocks).flat_map(move |block| {
                let gap = self.page(plane, block).wrapping_byte_add(self.shape.page_bytes(plane));
                (0..self.shape.gap_bytes / 8).map(move |word| gap.wrapping_add(word))
            })
        })
    }

    /// Has nobody ever written between the pages?
    #[must_use]
    pub fn gaps_are_untouched(&self) -> bool {
        // SAFETY: words of ours, where no job writes unless the code under test is wrong, which is what is asked here.
        self.gaps().all(|gap| unsafe { gap.read_volatile() } == CANARY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape =
        Shape { planes: 3, page_bytes: [128, 192], gap_bytes: 16, blocks_per_chunk: 2, blocks: 5 };
    const CONTENT: Content = Content { key: [7, 8], rank: 1, version: 2 };

    #[test]
    fn a_computed_chunk_is_right_and_a_spoilt_one_is_wrong_everywhere() {
        let mut pages = Pages::new(SHAPE).unwrap();
        let blocks = [4, 0];
        // SAFETY: there is no adapter.
        unsafe {
            pages.compute(CONTENT, &blocks);
            pages.compute(Content { key: [9, 9], ..CONTENT }, &[1, 2]);
            assert_eq!(pages.verify(CONTENT, &blocks), None);
            assert!(pages.verify(CONTENT, &[0, 4]).is_some(), "the order of the blocks matters");
            pages.spoil(CONTENT, &blocks);
            let wrong = pages.verify(CONTENT, &blocks).unwrap();
            assert_eq!(wrong.bytes, SHAPE.shard_bytes());
            assert_eq!((wrong.page.block, wrong.page.plane, wrong.word), (0, 0, 0));
            assert_eq!(wrong.expected, !wrong.found);
        }
        assert!(pages.gaps_are_untouched());
    }

    #[test]
    fn a_write_behind_a_page_is_noticed() {
        let pages = Pages::new(SHAPE).unwrap();
        // SAFETY: within the plane: the first word of the gap behind block 3.
        unsafe { pages.page(1, 3).wrapping_byte_add(192).write(0) };
        assert!(!pages.gaps_are_untouched());
    }

    #[test]
    fn sizes_are_sums() {
        assert_eq!(SHAPE.shard_bytes(), 2 * (128 + 192 + 128));
        assert_eq!(SHAPE.kv_bytes(), (0..3).map(|plane| SHAPE.plane_bytes(plane) as u64).sum());
        for shape in [Shape { page_bytes: [128, 100], ..SHAPE }, Shape { gap_bytes: 4, ..SHAPE }] {
            let error = Pages::new(shape).unwrap_err().to_string();
            assert!(error.contains("multiple of 64 bytes"), "{error}");
        }
    }
}
