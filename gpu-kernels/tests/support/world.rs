//! A backend and what it copies between: random caches in device memory, arenas in shared memory, and rounds, which know the bytes
//! that must be on both sides in the end.

use super::calls;
use super::fake::Fake;
use super::pages::{Group, Laid, ORDERS, Shape, chunks, pieces};
pub(crate) use super::random::Random;
use kvring_gpu_kernels::{
    ArenaMapping, ComputeStream, CopyBackend, CopyBatch, CopyDone, CopyError, CopyMode, CudaBackend,
    Direction, Fence, GpuOptions, MappedArena, Memory, PagedKv, Transfer, checksum,
};
use std::any::Any;
use std::fmt::Display;
use std::sync::{Arc, Mutex};

/// Bytes of one registration in the tests: shards often straddle two.
pub(crate) const PART: usize = 64 << 10;
pub(crate) const FORCED: [CopyMode; 3] = [CopyMode::Batch, CopyMode::Staged, CopyMode::ZeroCopy];
pub(crate) const DIRECTIONS: [Direction; 2] = [Direction::Store, Direction::Load];

/// Where the shards of a batch lie, and their blocks.
pub(crate) type Shards = Vec<(*mut u8, Vec<u32>)>;

/// Shared memory that transfers use too. A test reads and writes it only while no transfer does.
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
    pub(crate) fn new(bytes: usize) -> Bytes {
        let len = bytes.next_multiple_of(4096);
        Bytes { at: calls::shared(len).cast(), len }
    }

    pub(crate) fn part(self, at: usize, len: usize) -> Bytes {
        assert!(at + len <= self.len);
        Bytes { at: self.at.wrapping_add(at), len }
    }

    pub(crate) fn read(self) -> Vec<u8> {
        calls::bytes_at(self.at.cast(), self.len)
    }

    pub(crate) fn write(self, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.len);
        // SAFETY: memory of the tests', which stays mapped.
        unsafe { self.at.copy_from_nonoverlapping(bytes.as_ptr(), self.len) };
    }

    /// Writes new random bytes, and returns them.
    pub(crate) fn renew(self, rng: &mut Random) -> Vec<u8> {
        let bytes = random(rng, self.len);
        self.write(&bytes);
        bytes
    }
}

pub(crate) fn random(rng: &mut Random, bytes: usize) -> Vec<u8> {
    let mut random = vec![0; bytes];
    rng.fill(&mut random);
    random
}

/// An arena. The test says how much of it has memory.
pub(crate) struct Arena {
    pub(crate) all: Bytes,
    pub(crate) allocated: Arc<Mutex<u64>>,
    /// The offset at which the mapping begins that the backend is told of.
    pub(crate) skew: usize,
    /// The mapping holds it. A test counts the holders.
    pub(crate) kept: Arc<()>,
}

impl Arena {
    pub(crate) fn new(bytes: usize) -> Arena {
        let all = Bytes::new(bytes);
        Arena { all, allocated: Arc::new(Mutex::new(all.len as u64)), skew: 0, kept: Arc::new(()) }
    }

    pub(crate) fn mapping(&self) -> ArenaMapping {
        let allocated = self.allocated.clone();
        ArenaMapping {
            base: self.all.at.wrapping_add(self.skew),
            bytes: self.all.len - self.skew,
            allocated: Arc::new(move || *allocated.lock().unwrap()),
            lock: None,
            keep: self.kept.clone() as Arc<dyn Any + Send + Sync>,
        }
    }

    /// Has the backend let go of the mapping?
    pub(crate) fn is_let_go(&self) -> bool {
        Arc::strong_count(&self.kept) == 1
    }

    pub(crate) fn at(&self, offset: usize) -> *mut u8 {
        self.all.at.wrapping_add(offset)
    }

    pub(crate) fn grow(&self, to: usize) {
        *self.allocated.lock().unwrap() = to as u64;
    }
}

/// A paged cache in device memory, which with the fake is memory of this process.
pub(crate) struct Cache {
    pub(crate) address: u64,
    pub(crate) bytes: usize,
    groups: Vec<Group>,
    pub(crate) paged: Arc<PagedKv>,
}

impl Cache {
    /// A random cache. The calling thread is in the context.
    pub(crate) fn random(rng: &mut Random, shape: Shape) -> Cache {
        // There is poison before, between and after the groups.
        let mut end = 256;
        let mut groups = Vec::new();
        for _ in 0..rng.within(1, shape.groups) {
            let begin = end + shape.unit * rng.within(0, 4);
            let order = rng.within(0, ORDERS.len() - 1);
            let (group, next) = Group::new(rng, order, shape, begin);
            groups.push(group);
            end = next.next_multiple_of(16) + 256;
        }
        Cache::of(groups, end)
    }

    /// One group of `planes` planes far apart, with pages of `page` bytes.
    pub(crate) fn plain(planes: usize, page: usize, blocks: u32, per_chunk: u32) -> Cache {
        let bytes = page * blocks as usize;
        let laid = (0..planes).map(|plane| Laid { at: 256 + plane * (bytes + 256), stride: page, page });
        let group = Group { order: "LBHN", planes: laid.collect(), lowest: 0, blocks, per_chunk };
        Cache::of(vec![group], 256 + planes * (bytes + 256))
    }

    fn of(groups: Vec<Group>, bytes: usize) -> Cache {
        let address = calls::device(bytes);
        let described = groups.iter().map(|group| group.described(address)).collect();
        // SAFETY: device memory for as long as this lives; the tests see to it who uses it when.
        let paged = unsafe { PagedKv::grouped(described) }.unwrap();
        Cache { address, bytes, groups, paged: Arc::new(paged.on(Memory::Cuda(0))) }
    }

    /// The same cache, described anew: a backend does not know it yet.
    pub(crate) fn again(&self) -> Arc<PagedKv> {
        Arc::new(PagedKv::clone(&self.paged))
    }

    pub(crate) fn shard_bytes(&self) -> usize {
        self.paged.shard_bytes() as usize
    }

    pub(crate) fn read(&self) -> Vec<u8> {
        calls::read_device(self.address, self.bytes)
    }

    /// Writes new random bytes, and returns them.
    pub(crate) fn renew(&self, rng: &mut Random) -> Vec<u8> {
        let bytes = random(rng, self.bytes);
        calls::write_device(self.address, &bytes);
        bytes
    }

    /// The shard that a store of these blocks makes, if the memory has these bytes.
    pub(crate) fn gather(&self, image: &[u8], blocks: &[u32]) -> Vec<u8> {
        let pages = pieces(&self.groups, blocks).into_iter();
        pages.flat_map(|piece| &image[piece.at.unwrap()..][..piece.bytes]).copied().collect()
    }

    fn scatter(&self, image: &mut [u8], shard: &[u8], blocks: &[u32]) {
        for piece in pieces(&self.groups, blocks) {
            if let Some(at) = piece.at {
                image[at..][..piece.bytes].copy_from_slice(&shard[piece.offset..][..piece.bytes]);
            }
        }
    }

    /// The checksum of a shard of these blocks that begins with these bytes: the sum over its pages.
    fn sum(&self, shard: &[u8], blocks: &[u32]) -> u64 {
        let pages = pieces(&self.groups, blocks).into_iter();
        let parts = pages.map(|page| checksum::part(&shard[page.offset..][..page.bytes], page.offset as u64));
        checksum::finish(parts.fold(0, u64::wrapping_add), self.paged.shard_bytes())
    }

    /// Blocks for so many chunks. Those of loads come once each, or are SKIP.
    pub(crate) fn blocks(&self, rng: &mut Random, direction: Direction, count: usize) -> Vec<Vec<u32>> {
        chunks(&self.groups, count, |group, ids| match direction {
            Direction::Store => group.any(rng, ids, false),
            Direction::Load => group.distinct(rng, ids),
        })
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
        // All transfers have ended. An error of a lost device does not matter here.
        calls::free(self.address);
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

/// A batch with random bytes on both sides, and the bytes that must be there when it has ended.
pub(crate) struct Round<'a> {
    direction: Direction,
    cache: &'a Cache,
    arena: Bytes,
    checksum: bool,
    places: Vec<usize>,
    blocks: Vec<Vec<u32>>,
    /// The bytes that the cache has before the batch.
    pub(crate) before: Vec<u8>,
    cached: Vec<u8>,
    shared: Vec<u8>,
}

impl<'a> Round<'a> {
    /// A round with a shard at each of these places in the arena. Writes new bytes to both sides.
    pub(crate) fn new(
        rng: &mut Random,
        cache: &'a Cache,
        arena: Bytes,
        direction: Direction,
        checksum: bool,
        places: Vec<usize>,
    ) -> Round<'a> {
        let blocks = cache.blocks(rng, direction, places.len());
        let (before, mut shared) = (cache.renew(rng), arena.renew(rng));
        let mut cached = before.clone();
        for (at, blocks) in places.iter().zip(&blocks) {
            let shard = &mut shared[*at..][..cache.shard_bytes()];
            match direction {
                Direction::Store => shard.copy_from_slice(&cache.gather(&before, blocks)),
                Direction::Load => cache.scatter(&mut cached, shard, blocks),
            }
        }
        Round { direction, cache, arena, checksum, places, blocks, before, cached, shared }
    }

    pub(crate) fn batch(&self, after: Fence) -> CopyBatch {
        let places = self.places.iter().map(|at| self.arena.at.wrapping_add(*at));
        let shards: Shards = places.zip(self.blocks.iter().cloned()).collect();
        batch(self.direction, self.cache, self.checksum, after, &shards)
    }

    /// Checks the bytes on both sides, and the checksums, if the transfer was waited for. `what` is for messages.
    pub(crate) fn check(&self, what: impl Display, done: Option<CopyDone>) {
        let Round { direction, cache, places, .. } = self;
        let why = || format!("{what}, {direction:?} at {places:?}, {}", cache.describe());
        assert!(self.arena.read() == self.shared, "the arena is wrong: {}", why());
        assert!(cache.read() == self.cached, "the cache is wrong: {}", why());
        let Some(done) = done else { return };
        let shards = places.iter().zip(&self.blocks).take(if self.checksum { places.len() } else { 0 });
        let sums: Vec<_> = shards.map(|(at, blocks)| cache.sum(&self.shared[*at..], blocks)).collect();
        assert_eq!(done.checksums, sums, "checksums: {}", why());
    }
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

pub(crate) fn until_registered(mapped: &Arc<dyn MappedArena>, bytes: usize) {
    until("bytes of the arena to be registered", || mapped.registered_bytes() == bytes as u64);
}

/// A backend that has prepared a cache and registered an arena, and a stream that stands for torch's.
pub(crate) struct World {
    pub(crate) backend: CudaBackend,
    pub(crate) mapped: Arc<dyn MappedArena>,
    pub(crate) arena: Arena,
    pub(crate) cache: Cache,
    pub(crate) torch: u64,
}

impl World {
    /// A world with an arena of so many bytes, all of them registered.
    pub(crate) fn new(options: GpuOptions, cache: Cache, arena: usize) -> World {
        let world = World::unregistered(options, cache, arena);
        until_registered(&world.mapped, world.arena.all.len);
        world
    }

    /// The same, while the arena may still be being registered.
    pub(crate) fn unregistered(options: GpuOptions, cache: Cache, arena: usize) -> World {
        let (backend, arena) = (CudaBackend::new(options).unwrap(), Arena::new(arena));
        let mapped = backend.map_arena(arena.mapping());
        backend.prepare(&cache.paged).unwrap();
        World { backend, mapped, arena, cache, torch: calls::stream() as u64 }
    }

    /// A world with a cache of 40 blocks of 16 KiB in two planes, of which so many make a chunk.
    pub(crate) fn plain(mode: CopyMode, per_chunk: u32, arena: usize) -> World {
        World::new(options(mode), Cache::plain(2, 8192, 40, per_chunk), arena)
    }

    pub(crate) fn fence(&self) -> Fence {
        self.backend.fence(ComputeStream(self.torch)).unwrap()
    }

    /// Lets a kernel of torch's write the whole cache after a delay ([`super::fake::pattern`] of the seed), and returns a fence behind it.
    pub(crate) fn written_late(&self, fake: &Fake, seed: u32, delay_us: u32) -> Fence {
        assert_eq!(fake.fill(self.torch, self.cache.address, self.cache.bytes, seed, delay_us), 0);
        self.fence()
    }

    /// A shard of these blocks, so many bytes from the arena's first one on.
    pub(crate) fn shard(&self, at: usize, blocks: &[u32]) -> Shards {
        vec![(self.arena.at(at), blocks.to_vec())]
    }

    /// The bytes of a shard there.
    pub(crate) fn bytes_at(&self, at: usize) -> Vec<u8> {
        self.arena.all.part(at, self.cache.shard_bytes()).read()
    }

    pub(crate) fn submit(
        &self,
        direction: Direction,
        checksum: bool,
        fence: Fence,
        shards: &[(*mut u8, Vec<u32>)],
    ) -> Result<Box<dyn Transfer>, CopyError> {
        self.backend.submit(batch(direction, &self.cache, checksum, fence, shards))
    }

    /// A store without a fence, and its outcome.
    pub(crate) fn store(
        &self,
        checksum: bool,
        shards: &[(*mut u8, Vec<u32>)],
    ) -> Result<CopyDone, CopyError> {
        self.submit(Direction::Store, checksum, Fence::none(), shards).and_then(|transfer| transfer.wait())
    }

    /// Copies a random shard in both directions, and checks the bytes.
    pub(crate) fn check(&self, checksum: bool) {
        check(&self.backend, &self.cache, &self.arena, checksum);
    }
}

/// Copies a random shard in both directions, and checks the bytes.
pub(crate) fn check(backend: &CudaBackend, cache: &Cache, arena: &Arena, checksum: bool) {
    let mut rng = Random::new(77, 0);
    for direction in DIRECTIONS {
        let round = Round::new(&mut rng, cache, arena.all, direction, checksum, vec![0]);
        let done = backend.submit(round.batch(Fence::none())).and_then(|transfer| transfer.wait()).unwrap();
        round.check("a shard", Some(done));
    }
}

/// Places for some shards in an arena of so many bytes, from `first` on. Kernels need shards that are aligned; DMA takes any.
pub(crate) fn places(rng: &mut Random, cache: &Cache, first: usize, arena: usize) -> Vec<usize> {
    let (mut at, mut places) = (first, Vec::new());
    let align = rng.pick(&[1, 4, 8, 16, 4096]);
    for _ in 0..rng.within(0, 7) {
        at = (at + rng.within(0, 5000)).next_multiple_of(align);
        if at + cache.shard_bytes() > arena {
            break;
        }
        places.push(at);
        at += cache.shard_bytes();
    }
    places
}
