//! A worker's paged KV cache: planes of pages, in this process's own memory.

use super::content::{self, PageId};
use super::shape::Shape;
use anyhow::{Context, bail};
use kvring_adapter::{Key, PagedKv, Plane};
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

/// Pages begin on cache lines, planes on pages of the machine.
const ALIGN: usize = 4096;

/// The memory. The adapter's threads read and write it too: each access here says why none of them does so now.
pub(crate) struct Pages {
    shape: Shape,
    rank: u32,
    planes: Vec<NonNull<u64>>,
    layout: Layout,
}

impl Pages {
    /// Zeroed pages of this shape.
    pub(crate) fn new(shape: Shape, rank: u32) -> anyhow::Result<Pages> {
        let bytes = shape.num_blocks as usize * shape.page_bytes();
        if bytes == 0 || !shape.page_bytes().is_multiple_of(content::LANES * 8) {
            bail!("expected blocks of a multiple of {} bytes, got {shape:?}", content::LANES * 8);
        }
        let layout = Layout::from_size_align(bytes, ALIGN).context("a plane of the paged KV cache")?;
        let mut pages = Pages { shape, rank, planes: Vec::new(), layout };
        for _ in 0..shape.planes {
            // SAFETY: the layout is not empty.
            let plane = unsafe { alloc_zeroed(layout) };
            let plane = NonNull::new(plane.cast::<u64>()).with_context(|| {
                format!("no memory for a plane of {bytes} bytes; try a smaller --bytes-per-token")
            })?;
            pages.planes.push(plane);
        }
        Ok(pages)
    }

    /// As the worker adapter takes it.
    ///
    /// # Safety
    /// The adapter that gets it is shut down before `self` is dropped; blocks that a job names are left alone until
    /// the job has been reported.
    pub(crate) unsafe fn describe(&self) -> anyhow::Result<PagedKv> {
        let page_bytes = self.shape.page_bytes();
        let plane = |plane: &NonNull<u64>| Plane {
            base: plane.as_ptr().cast(),
            block_stride: page_bytes,
            page_bytes,
        };
        let planes = self.planes.iter().map(plane).collect();
        // SAFETY: each plane has `num_blocks` pages; the rest is our caller's promise.
        let paged = unsafe { PagedKv::new(planes, self.shape.num_blocks, self.shape.blocks_per_chunk) };
        paged.context("the simulated paged KV cache")
    }

    fn address(&self, plane: u32, block: u32) -> *mut u64 {
        assert!(block < self.shape.num_blocks, "block {block} of {}", self.shape.num_blocks);
        let words = block as usize * self.shape.page_words as usize;
        // SAFETY: the plane has `num_blocks` pages of `page_words` words.
        unsafe { self.planes[plane as usize].as_ptr().add(words) }
    }

    /// The pages of a chunk in these blocks: address and name.
    fn of_chunk<'a>(&'a self, key: Key, blocks: &'a [u32]) -> impl Iterator<Item = (*mut u64, PageId)> + 'a {
        (0u32..).zip(blocks).flat_map(move |(index, block)| {
            (0..self.shape.planes).map(move |plane| {
                (self.address(plane, *block), PageId { key, rank: self.rank, block: index, plane })
            })
        })
    }

    /// "Computes" a chunk: writes its content into its blocks.
    ///
    /// # Safety
    /// No open job names these blocks.
    pub(crate) unsafe fn compute(&mut self, key: Key, blocks: &[u32]) {
        for (page, id) in self.of_chunk(key, blocks) {
            // SAFETY: a page of ours; by our caller's promise nobody else uses it, and `self` is borrowed mutably.
            let page = unsafe { std::slice::from_raw_parts_mut(page, self.shape.page_words as usize) };
            content::fill(page, id);
        }
    }

    /// Makes sure that what these blocks hold is not by chance what a load will bring: the first and the last word of
    /// each page become what they cannot be.
    ///
    /// # Safety
    /// No open job names these blocks.
    pub(crate) unsafe fn spoil(&mut self, key: Key, blocks: &[u32]) {
        for (page, id) in self.of_chunk(key, blocks) {
            // SAFETY: as in `compute`.
            let page = unsafe { std::slice::from_raw_parts_mut(page, self.shape.page_words as usize) };
            let (first, last) = content::ends(page.len(), id);
            if let Some(word) = page.first_mut() {
                *word = !first;
            }
            if let Some(word) = page.last_mut() {
                *word = !last;
            }
        }
    }

    /// How many bytes of these blocks are not the chunk's; the first few places are logged.
    ///
    /// # Safety
    /// No open job names these blocks.
    pub(crate) unsafe fn wrong_bytes(&self, key: Key, blocks: &[u32]) -> u64 {
        let mut wrong_bytes = 0;
        for (page, id) in self.of_chunk(key, blocks) {
            // SAFETY: a page of ours, which by our caller's promise nobody writes.
            let page = unsafe { std::slice::from_raw_parts(page, self.shape.page_words as usize) };
            let wrong = content::wrong_bytes(page, id);
            if wrong > 0 && wrong_bytes == 0 {
                let (word, expected, came) = content::first_wrong(page, id).unwrap_or_default();
                let (expected, came) = (format!("{expected:#018x}"), format!("{came:#018x}"));
                tracing::error!(?id, word, expected, came, wrong, "a loaded page is wrong");
            }
            wrong_bytes += wrong;
        }
        wrong_bytes
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        for plane in &self.planes {
            // SAFETY: allocated with this layout; the adapter that was told of it has been shut down.
            unsafe { dealloc(plane.as_ptr().cast(), self.layout) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_computed_chunk_is_right_a_spoilt_one_wrong_in_every_page() {
        let shape =
            Shape { chunk_tokens: 512, blocks_per_chunk: 2, planes: 3, page_words: 16, num_blocks: 5 };
        let mut pages = Pages::new(shape, 1).unwrap();
        let (key, blocks) = ([7, 8], [4, 0]);
        // SAFETY: there is no adapter.
        unsafe {
            pages.compute(key, &blocks);
            pages.compute([9, 9], &[1, 2]);
            assert_eq!(pages.wrong_bytes(key, &blocks), 0);
            assert!(pages.wrong_bytes(key, &[0, 4]) > 0, "the order of the blocks matters");
            pages.spoil(key, &blocks);
            // The complement differs in every byte of two words of each of the six pages.
            assert_eq!(pages.wrong_bytes(key, &blocks), 6 * 16);
        }
    }
}
