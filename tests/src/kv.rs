//! A paged KV cache whose bytes are a function of what they belong to, so that every byte loaded can be checked.

use kvring_adapter::{Key, Memory, PagedKv, Plane};
use kvring_gpu_kernels::raw::{Device, DeviceMemory};
use serde::{Deserialize, Serialize};

/// The form of a paged KV cache: two planes, as keys and values, of different sizes, with a gap after each page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Bytes of a page in each plane, multiples of 8.
    pub pages: [usize; 2],
    pub blocks_per_chunk: u32,
    /// Blocks of the whole cache.
    pub blocks: u32,
}

impl Shape {
    /// 64 KiB a shard.
    pub const SMALL: Shape = Shape { pages: [4096, 12288], blocks_per_chunk: 4, blocks: 256 };
    /// 1 MiB a shard, so that a copy takes long enough to be raced.
    pub const LARGE: Shape = Shape { pages: [256 << 10, 256 << 10], blocks_per_chunk: 2, blocks: 32 };

    pub fn shard_bytes(&self) -> u64 {
        (self.pages[0] + self.pages[1]) as u64 * u64::from(self.blocks_per_chunk)
    }

    /// Chunks that fit into the cache at once.
    pub fn chunks(&self) -> usize {
        (self.blocks / self.blocks_per_chunk) as usize
    }
}

/// What a block's bytes are a function of: two contents differ in every word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Content {
    pub key: Key,
    pub rank: u32,
    /// Names one computation of the chunk: stores of different versions write different bytes.
    pub version: u64,
}

/// A wrong word in a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrongBytes {
    /// The block's place in the chunk.
    pub block: usize,
    pub plane: usize,
    /// The word's place in the page.
    pub word: usize,
    pub expected: u64,
    pub found: u64,
}

/// Words between two pages of a plane.
const GAP: usize = 8;
/// What the gaps hold.
const CANARY: u64 = 0xa5a5_a5a5_a5a5_a5a5;
/// What blocks hold before a load.
const POISON: u64 = 0xdead_dead_dead_dead;

/// The cache's memory. An adapter's threads read and write its pages, so it is accessed by address only.
pub struct Kv {
    shape: Shape,
    memory: Memory,
    planes: [(*mut u64, usize); 2],
    /// The memory of the planes where it is a device's.
    on_device: Vec<DeviceMemory>,
}

/// Are caches to be in a GPU's memory? So it is where tests run with the fake CUDA driver (`KVRING_TEST_FAKE_GPU=1`, see
/// `tests/run`), whose device memory the host can access.
pub fn with_fake_gpu() -> bool {
    std::env::var_os("KVRING_TEST_FAKE_GPU").is_some()
}

// SAFETY: addresses of memory that lives as long as this. Which thread may touch which block when is what the adapter's
// contract says, and the tests keep to it: a block is touched here only while no job has it.
unsafe impl Send for Kv {}
// SAFETY: as above.
unsafe impl Sync for Kv {}

impl Kv {
    /// An empty cache of this shape.
    pub fn new(shape: Shape) -> Kv {
        let plane = |page: usize| {
            let words = (page / 8 + GAP) * shape.blocks as usize;
            let memory = vec![CANARY; words].into_boxed_slice();
            (Box::into_raw(memory).cast::<u64>(), words)
        };
        Kv { shape, memory: Memory::Host, planes: shape.pages.map(plane), on_device: Vec::new() }
    }

    /// An empty cache in the memory of the fake driver's first device.
    pub fn on_fake_gpu(shape: Shape) -> Kv {
        let device = Device::open(0).expect("the fake CUDA driver");
        let mut on_device = Vec::new();
        let planes = shape.pages.map(|page| {
            let words = (page / 8 + GAP) * shape.blocks as usize;
            let memory = device.allocate(words * 8).expect("the fake device's memory");
            let base = memory.address() as *mut u64;
            for word in 0..words {
                // SAFETY: the fake's device memory is the host's too, and nobody else knows of it yet.
                unsafe { base.wrapping_add(word).write(CANARY) };
            }
            on_device.push(memory);
            (base, words)
        });
        Kv { shape, memory: Memory::Cuda(0), planes, on_device }
    }

    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The cache as the worker adapter takes it.
    pub fn paged(&self) -> PagedKv {
        let planes = self.planes.iter().zip(self.shape.pages).map(|((base, _), page_bytes)| Plane {
            base: base.cast(),
            block_stride: page_bytes + GAP * 8,
            page_bytes,
        });
        // SAFETY: both planes have `blocks` pages at that stride, and `WorkerSide` shuts its adapter down before it
        // drops this; it touches a block only while no job has it.
        let paged = unsafe { PagedKv::new(planes.collect(), self.shape.blocks, self.shape.blocks_per_chunk) };
        paged.expect("a shape that can be").on(self.memory)
    }

    fn page(&self, plane: usize, block: u32) -> *mut u64 {
        assert!(block < self.shape.blocks);
        let stride = self.shape.pages[plane] / 8 + GAP;
        self.planes[plane].0.wrapping_add(stride * block as usize)
    }

    /// Writes a chunk's content into its blocks.
    pub fn fill(&self, blocks: &[u32], content: Content) {
        self.each_word(blocks, |at, place| {
            // SAFETY: `each_word` gives words of our own pages; no job has the block.
            unsafe { at.write(word_of(content, place)) };
        });
    }

    /// Overwrites blocks, so that nothing of an earlier content is left.
    pub fn poison(&self, blocks: &[u32]) {
        self.each_word(blocks, |at, _| {
            // SAFETY: as in `fill`.
            unsafe { at.write(POISON) };
        });
    }

    /// The first word that is not the content's, if there is one.
    pub fn verify(&self, blocks: &[u32], content: Content) -> Option<WrongBytes> {
        let mut wrong = None;
        self.each_word(blocks, |at, place| {
            // SAFETY: as in `fill`.
            let (found, expected) = (unsafe { at.read() }, word_of(content, place));
            if found != expected && wrong.is_none() {
                let (block, plane, word) = place;
                wrong = Some(WrongBytes { block, plane, word, expected, found });
            }
        });
        wrong
    }

    fn each_word(&self, blocks: &[u32], mut act: impl FnMut(*mut u64, (usize, usize, usize))) {
        for (index, block) in blocks.iter().enumerate() {
            for plane in 0..2 {
                let page = self.page(plane, *block);
                for word in 0..self.shape.pages[plane] / 8 {
                    act(page.wrapping_add(word), (index, plane, word));
                }
            }
        }
    }

    /// Checks that nothing was ever written between the pages.
    pub fn check_gaps(&self) {
        for plane in 0..2 {
            for block in 0..self.shape.blocks {
                let end = self.page(plane, block).wrapping_add(self.shape.pages[plane] / 8);
                for word in 0..GAP {
                    // SAFETY: the gap behind a page of ours; no job writes there, which is what is checked.
                    let found = unsafe { end.wrapping_add(word).read_volatile() };
                    assert_eq!(found, CANARY, "plane {plane}, behind block {block}");
                }
            }
        }
    }
}

impl Drop for Kv {
    fn drop(&mut self) {
        if !self.on_device.is_empty() {
            // The device's memory frees itself.
            return;
        }
        for (base, words) in self.planes {
            // SAFETY: from `Box::into_raw` of a slice of that length.
            drop(unsafe { Box::from_raw(core::ptr::slice_from_raw_parts_mut(base, words)) });
        }
    }
}

/// A good 64-bit mix (splitmix64), also for the tests' random numbers.
pub fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn word_of(content: Content, (block, plane, word): (usize, usize, usize)) -> u64 {
    let Content { key, rank, version } = content;
    let page =
        mix(key[0]
            ^ mix(key[1] ^ mix(version ^ mix(u64::from(rank) << 32 | (block as u64) << 1 | plane as u64))));
    page.wrapping_add((word as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

/// `count` keys of a chain with this name.
pub fn chain(name: u64, count: usize) -> Vec<Key> {
    (0..count as u64).map(|index| [mix(name), index]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_differ_and_are_recognised() {
        let kv = Kv::new(Shape::SMALL);
        let content = Content { key: [1, 2], rank: 0, version: 0 };
        kv.fill(&[0, 1, 2, 9], content);
        assert_eq!(kv.verify(&[0, 1, 2, 9], content), None);
        let others = [
            Content { key: [1, 3], ..content },
            Content { rank: 1, ..content },
            Content { version: 1, ..content },
        ];
        for other in others {
            assert!(kv.verify(&[0, 1, 2, 9], other).is_some());
        }
        assert!(kv.verify(&[1, 0, 2, 9], content).is_some(), "the order of blocks counts");
        kv.poison(&[9]);
        assert_eq!(kv.verify(&[0, 1, 2, 9], content).map(|wrong| (wrong.block, wrong.word)), Some((3, 0)));
        kv.check_gaps();
    }
}
