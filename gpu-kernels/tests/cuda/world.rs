//! Random caches in the fake's device memory, arenas in shared memory, and a plain reference of what copies must do to both,
//! which knows only strides and slices.

use crate::support::calls;
use crate::support::fake::Fake;
pub(crate) use crate::support::random::Rng;
use crate::support::random::{Laid, Sizes, lay, lay_packed};
use kvring_gpu_kernels::{
    ArenaMapping, CopyBackend, CopyBatch, CopyDone, CopyError, CopyMode, CpuBackend, CudaBackend, Direction,
    Fence, GpuOptions, KvGroup, Memory, PagedKv, Plane, SKIP,
};
use std::any::Any;
use std::sync::{Arc, Mutex};

/// Bytes of one registration in the tests: shards often straddle two.
pub(crate) const PART: usize = 64 << 10;
/// The axes from the outermost on, but for the content: Layers, Blocks, Heads, tokens (N).
const ORDERS: [&str; 9] = ["LBHN", "LBNH", "LHBN", "BLHN", "BLNH", "BHLN", "LBN", "packed", "padded"];

/// Memory that transfers write too. A test reads and writes it only while no transfer uses it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bytes {
    pub(crate) at: *mut u8,
    pub(crate) len: usize,
}

// SAFETY: an address; the comment above says who accesses the memory, and when.
unsafe impl Send for Bytes {}
// SAFETY: as above.
unsafe impl Sync for Bytes {}

impl Bytes {
    pub(crate) fn read(self) -> Vec<u8> {
        // SAFETY: mapped memory of the tests'.
        unsafe { std::slice::from_raw_parts(self.at, self.len) }.to_vec()
    }

    pub(crate) fn write(self, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.len);
        // SAFETY: as above.
        unsafe { self.at.copy_from_nonoverlapping(bytes.as_ptr(), self.len) };
    }

    /// Writes new random bytes, and returns them.
    pub(crate) fn renew(self, rng: &mut Rng) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        rng.fill(&mut bytes);
        self.write(&bytes);
        bytes
    }
}

/// An arena. The test says how much of it has memory.
pub(crate) struct Arena {
    pub(crate) all: Bytes,
    pub(crate) allocated: Arc<Mutex<u64>>,
    /// The offset at which the mapping begins that the backend is told of.
    pub(crate) skew: usize,
}

impl Arena {
    pub(crate) fn new(bytes: usize) -> Arena {
        let bytes = bytes.next_multiple_of(4096);
        let all = Bytes { at: calls::shared(bytes).cast(), len: bytes };
        Arena { all, allocated: Arc::new(Mutex::new(bytes as u64)), skew: 0 }
    }

    pub(crate) fn mapping(&self, keep: Arc<dyn Any + Send + Sync>) -> ArenaMapping {
        let allocated = self.allocated.clone();
        ArenaMapping {
            base: self.all.at.wrapping_add(self.skew),
            bytes: self.all.len - self.skew,
            allocated: Arc::new(move || *allocated.lock().unwrap()),
            lock: None,
            keep,
        }
    }

    pub(crate) fn at(&self, offset: usize) -> *mut u8 {
        self.all.at.wrapping_add(offset)
    }

    pub(crate) fn grow(&self, to: u64) {
        *self.allocated.lock().unwrap() = to;
    }
}

#[derive(Clone, Debug)]
struct Group {
    order: &'static str,
    planes: Vec<Laid>,
    blocks: u32,
    per_chunk: u32,
}

/// Limits for a random cache.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Lengths and offsets of pages are multiples of this.
    pub(crate) unit: usize,
    /// The most units of a token's content.
    pub(crate) content: usize,
    /// The most tokens of a block.
    pub(crate) tokens: usize,
    /// The most blocks of a chunk.
    pub(crate) per_chunk: usize,
    pub(crate) groups: usize,
}

impl Shape {
    pub(crate) const SMALL: Shape = Shape { unit: 16, content: 6, tokens: 16, per_chunk: 6, groups: 3 };

    pub(crate) fn random(rng: &mut Rng) -> Shape {
        let unit = [16, 16, 8, 4][rng.within(0, 3)];
        match rng.next() % 8 {
            0 => Shape { unit, content: 1, tokens: 2, per_chunk: 700, groups: 1 },
            1 => Shape { unit, content: 32, tokens: 48, per_chunk: 8, groups: 2 },
            _ => Shape { unit, ..Shape::SMALL },
        }
    }

    /// Pages that fit no vector of the kernels.
    pub(crate) fn odd(rng: &mut Rng) -> Shape {
        Shape { unit: [1, 2, 3, 5, 7, 9, 14][rng.within(0, 6)], ..Shape::SMALL }
    }
}

impl Group {
    fn new(rng: &mut Rng, shape: Shape, mut at: usize) -> (Group, usize) {
        let order = ORDERS[rng.within(0, ORDERS.len() - 1)];
        let axes = match order {
            "padded" => "LBHN",
            "packed" => "",
            axes => axes,
        };
        let blocks = rng.within(1, 9);
        let (layers, tokens) = (rng.within(1, 3), rng.within(1, shape.tokens));
        let heads = if axes.contains('H') { rng.within(1, 3) } else { 1 };
        let content = shape.unit * rng.within(1, shape.content);
        let spare = if order == "padded" || axes.is_empty() { shape.unit * rng.within(0, 5) } else { 0 };
        let mut planes;
        (planes, at) = if axes.is_empty() {
            let pages: Vec<usize> = (0..=layers).map(|_| content * rng.within(1, tokens)).collect();
            lay_packed(&pages, blocks, spare, at)
        } else {
            lay(axes, Sizes { layers, blocks, heads, tokens, content, spare }, at)
        };
        if rng.one_in(2) {
            planes.sort_by_key(|plane| plane.at);
        }
        let per_chunk = rng.within(1, shape.per_chunk) as u32;
        (Group { order, planes, blocks: blocks as u32, per_chunk }, at)
    }

    fn described(&self, memory: u64) -> KvGroup {
        let plane = |laid: &Laid| Plane {
            base: (memory + laid.at as u64) as *mut u8,
            block_stride: laid.stride,
            page_bytes: laid.page,
        };
        let planes = self.planes.iter().map(plane).collect();
        KvGroup { planes, num_blocks: self.blocks, blocks_per_chunk: self.per_chunk }
    }
}

/// A paged cache in device memory, which with the fake is memory of this process.
pub(crate) struct Cache {
    pub(crate) all: Bytes,
    groups: Vec<Group>,
    pub(crate) paged: Arc<PagedKv>,
    /// The same cache for the CPU backend.
    host: Arc<PagedKv>,
}

impl Cache {
    /// A random cache. The calling thread is in the context.
    pub(crate) fn random(rng: &mut Rng, shape: Shape) -> Cache {
        // There is poison before, between and after the groups.
        let mut end = 256;
        let mut groups = Vec::new();
        for _ in 0..rng.within(1, shape.groups) {
            let begin = end + shape.unit * rng.within(0, 4);
            let (group, next) = Group::new(rng, shape, begin);
            groups.push(group);
            end = next.next_multiple_of(16) + 256;
        }
        Cache::of(groups, end)
    }

    /// One group of `planes` planes far apart, with pages of `page` bytes.
    pub(crate) fn plain(planes: usize, page: usize, blocks: u32, per_chunk: u32) -> Cache {
        let bytes = page * blocks as usize;
        let laid = (0..planes).map(|plane| Laid { at: 256 + plane * (bytes + 256), stride: page, page });
        let group = Group { order: "LBHN", planes: laid.collect(), blocks, per_chunk };
        Cache::of(vec![group], 256 + planes * (bytes + 256))
    }

    fn of(groups: Vec<Group>, bytes: usize) -> Cache {
        let memory = calls::device(bytes);
        let described = || groups.iter().map(|group| group.described(memory)).collect();
        // SAFETY: memory of the fake, for as long as this lives; the tests see to it who uses it when.
        let paged = unsafe { PagedKv::grouped(described()) }.unwrap();
        let (host, paged) = (Arc::new(paged.clone()), Arc::new(paged.on(Memory::Cuda(0))));
        Cache { all: Bytes { at: memory as *mut u8, len: bytes }, groups, paged, host }
    }

    pub(crate) fn shard_bytes(&self) -> usize {
        self.paged.shard_bytes() as usize
    }

    /// The pages of a chunk in the order of the shard: the offset in the memory, or none for a skipped block, and the length.
    fn pages(&self, blocks: &[u32]) -> Vec<(Option<usize>, usize)> {
        let (mut pages, mut position) = (Vec::new(), 0);
        for group in &self.groups {
            for _ in 0..group.per_chunk {
                let block = blocks[position];
                for laid in &group.planes {
                    let at = (block != SKIP).then(|| laid.at + block as usize * laid.stride);
                    pages.push((at, laid.page));
                }
                position += 1;
            }
        }
        pages
    }

    pub(crate) fn gather(&self, image: &[u8], blocks: &[u32]) -> Vec<u8> {
        let page = |(at, bytes): (Option<usize>, usize)| &image[at.unwrap()..][..bytes];
        self.pages(blocks).into_iter().flat_map(page).copied().collect()
    }

    pub(crate) fn scatter(&self, image: &mut [u8], shard: &[u8], blocks: &[u32]) {
        let mut offset = 0;
        for (at, bytes) in self.pages(blocks) {
            if let Some(at) = at {
                image[at..][..bytes].copy_from_slice(&shard[offset..][..bytes]);
            }
            offset += bytes;
        }
    }

    /// Blocks for so many chunks. Those of loads come once each, or are SKIP.
    pub(crate) fn blocks(&self, rng: &mut Rng, direction: Direction, chunks: usize) -> Vec<Vec<u32>> {
        let mut all = vec![Vec::new(); chunks];
        for group in &self.groups {
            let wanted = group.per_chunk as usize * chunks;
            let mut ids: Vec<u32> = match direction {
                Direction::Store => {
                    (0..wanted).map(|_| rng.within(0, group.blocks as usize - 1) as u32).collect()
                }
                Direction::Load => (0..group.blocks).collect(),
            };
            if direction == Direction::Load {
                ids.resize(ids.len().max(wanted), SKIP);
                let some = rng.within(2, 6) as u64;
                ids.iter_mut().for_each(|id| *id = if rng.one_in(some) { SKIP } else { *id });
                // Every other time the blocks stay contiguous.
                if rng.one_in(2) {
                    rng.shuffle(&mut ids);
                }
            }
            for (chunk, ids) in all.iter_mut().zip(ids.chunks(group.per_chunk as usize)) {
                chunk.extend_from_slice(ids);
            }
        }
        all
    }

    /// The CPU backend's checksums of the same bytes. It copies them again, which changes nothing.
    pub(crate) fn sums(&self, direction: Direction, shards: &[(*mut u8, Vec<u32>)]) -> Vec<u64> {
        let mut batch = CopyBatch::new(direction, &self.host, true);
        for (at, blocks) in shards {
            // SAFETY: nothing else runs there.
            unsafe { batch.shard(*at, blocks) }.unwrap();
        }
        CpuBackend::new(1).submit(batch).unwrap().wait().unwrap().checksums
    }

    /// For messages.
    pub(crate) fn describe(&self) -> String {
        let group = |group: &Group| {
            let pages: Vec<_> = group.planes.iter().map(|plane| (plane.page, plane.stride)).collect();
            format!("{} {} of {} blocks {pages:?}", group.order, group.per_chunk, group.blocks)
        };
        self.groups.iter().map(group).collect::<Vec<_>>().join("; ")
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        // SAFETY: allocated by `of`; all transfers have ended. A lost device does not matter here.
        let _ = unsafe { cudarc::driver::result::free_sync(self.all.at as u64) };
    }
}

/// A batch of these shards.
pub(crate) fn batch(
    direction: Direction,
    cache: &Cache,
    checksum: bool,
    after: Fence,
    shards: &[(*mut u8, Vec<u32>)],
) -> CopyBatch {
    let mut batch = CopyBatch::new(direction, &cache.paged, checksum).after(after);
    for (at, blocks) in shards {
        // SAFETY: the tests keep cache and arena, and access them only when the transfer has ended.
        unsafe { batch.shard(*at, blocks) }.unwrap();
    }
    batch
}

pub(crate) fn options(mode: CopyMode) -> GpuOptions {
    let load_patience = std::time::Duration::from_secs(2);
    GpuOptions { mode, part_bytes: PART, sm_count: 3, load_patience, ..GpuOptions::new(0) }
}

pub(crate) fn backend(mode: CopyMode) -> CudaBackend {
    CudaBackend::new(options(mode)).unwrap()
}

/// Waits until `is_so`. If it waits in vain, it has said what it waits for, and `tests/watch` sees that it stands still.
pub(crate) fn until(what: &str, is_so: impl Fn() -> bool) {
    for looks in 1_u64.. {
        if is_so() {
            return;
        }
        if looks.is_multiple_of(1000) {
            eprintln!("still waiting, after {looks} looks: {what}");
        }
        std::thread::sleep(std::time::Duration::from_millis((1 + looks / 50).min(100)));
    }
}

/// Runs a test with the fake driver.
pub(crate) fn inside(name: &str, env: &[(&str, &str)], body: impl FnOnce(&Fake)) {
    crate::support::fake::inside(name, env, || body(&Fake::get()));
}

/// Submits a batch, waits for it at once, and returns its outcome.
pub(crate) fn copied(
    backend: &CudaBackend,
    direction: Direction,
    cache: &Cache,
    checksum: bool,
    shards: &[(*mut u8, Vec<u32>)],
) -> Result<CopyDone, CopyError> {
    let batch = batch(direction, cache, checksum, Fence::none(), shards);
    backend.submit(batch).and_then(|transfer| transfer.wait())
}

/// Collects the warnings of this process from now on.
pub(crate) fn warnings() -> Arc<Mutex<Vec<String>>> {
    let lines = Arc::new(Mutex::new(Vec::new()));
    tracing::subscriber::set_global_default(Warnings(lines.clone())).unwrap();
    lines
}

struct Warnings(Arc<Mutex<Vec<String>>>);

impl tracing::Subscriber for Warnings {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() <= tracing::Level::WARN
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        struct Line(String);
        impl tracing::field::Visit for Line {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                self.0 += &format!("{field}={value:?} ");
            }
        }
        let mut line = Line(String::new());
        event.record(&mut line);
        self.0.lock().unwrap().push(line.0);
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}
