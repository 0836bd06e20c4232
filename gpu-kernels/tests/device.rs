//! `CudaBackend` with whatever driver there is: random caches, random batches, bit-exact. Nothing here knows of the fake, or
//! looks at device memory other than by copies, so the same binary runs on a GPU (`benches/gpu/run`):
//!
//! ```text
//! KVRING_REAL_CUDA=1 KVRING_ROUNDS=5000 device-…        # the binary of this test
//! KVRING_REAL_CUDA=1 KVRING_ROUNDS=100 compute-sanitizer device-…
//! ```
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

mod support;

use kvring_gpu_kernels::raw::{Device, DeviceMemory, PlainStream, Registered};
use kvring_gpu_kernels::{
    ArenaMapping, CopyBackend, CopyBatch, CopyMode, CudaBackend, Direction, GpuOptions, KvGroup, MappedArena,
    Memory, PagedKv, Plane, SKIP, checksum,
};
use std::ffi::c_void;
use std::sync::Arc;
use std::time::Duration;
use support::calls::shared;
use support::fake::{inside, is_real};
use support::random::Rng;

/// Bytes of the arena. Its parts are shorter, so shards straddle them.
const ARENA: usize = 1 << 20;
const PART: usize = 256 << 10;
/// Bytes of the device memory that caches lie in.
const CACHE: usize = 512 << 10;
/// Rounds before another cache is made.
const PER_CACHE: usize = 4;

/// A number from the environment: how many rounds, or a seed.
fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().unwrap())
}

/// Shared memory that stays mapped. A test accesses it only while nothing copies from or to it.
#[derive(Clone, Copy)]
struct Host(*mut u8, usize);

impl Host {
    fn new(bytes: usize) -> Host {
        Host(shared(bytes).cast::<u8>(), bytes)
    }

    fn read(self) -> Vec<u8> {
        // SAFETY: mapped for good, and nothing copies there now.
        unsafe { std::slice::from_raw_parts(self.0, self.1) }.to_vec()
    }

    fn write(self, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.1);
        // SAFETY: as above.
        unsafe { self.0.copy_from_nonoverlapping(bytes.as_ptr(), self.1) };
    }
}

/// A device's memory with a mirror on each side, and a stream that computes.
struct Bench {
    compute: PlainStream,
    memory: DeviceMemory,
    /// The bytes that the "kernels" of the stream write to the device.
    written: Host,
    /// The bytes that its "readers" find there.
    found: Host,
    _registered: [Registered; 2],
}

impl Bench {
    fn new(device: &Device) -> Bench {
        let (written, found) = (Host::new(CACHE), Host::new(CACHE));
        // SAFETY: they stay mapped.
        let register = |host: Host| unsafe { device.register(host.0, host.1) }.unwrap();
        let _registered = [register(written), register(found)];
        let (compute, memory) = (device.stream().unwrap(), device.allocate(CACHE).unwrap());
        Bench { compute, memory, written, found, _registered }
    }

    /// Puts a write of all of the cache's memory on the stream, and returns before it is done.
    fn write(&self, bytes: &[u8]) {
        self.written.write(bytes);
        // SAFETY: registered, and not touched before the stream has been waited for.
        unsafe { self.compute.to_device(self.memory.address(), self.written.0, CACHE) }.unwrap();
    }

    /// Puts a read of all of the cache's memory on the stream.
    fn read(&self) {
        // SAFETY: as in `write`.
        unsafe { self.compute.to_host(self.found.0, self.memory.address(), CACHE) }.unwrap();
    }

    fn contents(&self) -> Vec<u8> {
        self.read();
        self.compute.synchronize().unwrap();
        self.found.read()
    }
}

/// A random cache in `CACHE` bytes from `base` on: pages in any order, contiguous or with gaps, of any multiple of `unit`.
fn cache(rng: &mut Rng, base: u64, unit: usize) -> Arc<PagedKv> {
    let mut at = rng.within(0, 63) * unit;
    let mut groups = Vec::new();
    for _ in 0..=rng.within(0, 1) {
        let blocks = rng.within(1, 12);
        let mut planes: Vec<Plane> = Vec::new();
        for _ in 0..=rng.within(0, 3) {
            let longest = [4, 64, 700][rng.within(0, 2)];
            let page = unit * rng.within(1, longest);
            let gap = if rng.one_in(2) { 0 } else { unit * rng.within(0, 39) };
            let base_of = |at: usize| (base + at as u64) as *mut u8;
            let stride = page + gap;
            if at + blocks * stride > CACHE {
                break;
            }
            planes.push(Plane { base: base_of(at), block_stride: stride, page_bytes: page });
            at += blocks * stride + rng.within(0, 2) * unit;
        }
        if !planes.is_empty() {
            let blocks_per_chunk = rng.within(1, blocks.min(5)) as u32;
            groups.push(KvGroup { planes, num_blocks: blocks as u32, blocks_per_chunk });
        }
    }
    if groups.is_empty() {
        return cache(rng, base, unit);
    }
    // SAFETY: within the bench's memory, which outlives the backends; batches come one after the other.
    Arc::new(unsafe { PagedKv::grouped(groups) }.unwrap().on(Memory::Cuda(0)))
}

/// Block ids of some chunks, none twice: as many chunks as there are blocks for.
fn chunks(rng: &mut Rng, paged: &PagedKv, wanted: usize, may_skip: bool) -> Vec<Vec<u32>> {
    let mut decks: Vec<Vec<u32>> =
        paged.groups().iter().map(|group| (0..group.num_blocks).collect()).collect();
    let mut all = Vec::new();
    for _ in 0..wanted {
        let mut blocks = Vec::new();
        for (group, deck) in paged.groups().iter().zip(&mut decks) {
            if deck.len() < group.blocks_per_chunk as usize {
                return all;
            }
            for _ in 0..group.blocks_per_chunk {
                let block = deck.swap_remove(rng.within(0, deck.len() - 1));
                blocks.push(if may_skip && rng.one_in(5) { SKIP } else { block });
            }
        }
        all.push(blocks);
    }
    all
}

/// Does to both sides what the copy of one shard does, and returns its checksum.
fn reference(
    direction: Direction,
    paged: &PagedKv,
    (device, base): (&mut [u8], u64),
    shard: &mut [u8],
    blocks: &[u32],
) -> u64 {
    let (mut at, mut sum) = (0, 0u64);
    for (address, bytes) in paged.pages(blocks) {
        let shard = &mut shard[at..][..bytes];
        if !address.is_null() {
            let page = &mut device[(address as u64 - base) as usize..][..bytes];
            match direction {
                Direction::Store => shard.copy_from_slice(page),
                Direction::Load => page.copy_from_slice(shard),
            }
        }
        sum = sum.wrapping_add(checksum::part(shard, at as u64));
        at += bytes;
    }
    checksum::finish(sum, at as u64)
}

struct World {
    bench: Bench,
    backend: CudaBackend,
    mapped: Arc<dyn MappedArena>,
    arena: Host,
}

impl World {
    fn new(device: &Device, mode: CopyMode) -> World {
        let options = GpuOptions { mode, part_bytes: PART, ..GpuOptions::new(0) };
        let (backend, arena) = (CudaBackend::new(options).unwrap(), Host::new(ARENA));
        let allocated = Arc::new(|| ARENA as u64);
        let (base, bytes) = (arena.0, arena.1);
        let mapping = ArenaMapping { base, bytes, allocated, lock: None, keep: Arc::new(()) };
        let mapped = backend.map_arena(mapping);
        World { bench: Bench::new(device), backend, mapped, arena }
    }

    fn round(&self, rng: &mut Rng, paged: &Arc<PagedKv>, can_sum: bool) {
        let direction = if rng.one_in(2) { Direction::Store } else { Direction::Load };
        let (mut device, mut arena) = (vec![0; CACHE], vec![0; ARENA]);
        rng.fill(&mut device);
        rng.fill(&mut arena);
        let before = device.clone();
        self.arena.write(&arena);
        // A store must read what has only just been put on the stream; a load must wait for the readers on it.
        self.bench.write(&device);
        if direction == Direction::Load {
            self.bench.read();
        }
        let fence = self.backend.fence(self.bench.compute.compute_stream()).unwrap();
        let with_sums = can_sum && rng.one_in(2);
        let mut batch = CopyBatch::new(direction, paged, with_sums).after(fence);
        let length = paged.shard_bytes() as usize;
        let (mut at, mut sums) = (0, Vec::new());
        let wanted = rng.within(0, 6);
        for blocks in chunks(rng, paged, wanted, direction == Direction::Load) {
            // Kernels need shards that are aligned; DMA takes any.
            let align = [1, 4, 16, 4096][rng.within(0, 3)];
            at = (at + rng.within(0, 8999)).next_multiple_of(align);
            if at + length > ARENA {
                break;
            }
            // SAFETY: the arena stays mapped; nobody touches it or the cache before the transfer has ended.
            unsafe { batch.shard(self.arena.0.wrapping_add(at), &blocks) }.unwrap();
            let base = self.bench.memory.address();
            sums.push(reference(direction, paged, (&mut device, base), &mut arena[at..][..length], &blocks));
            at += length;
        }
        let done = self.backend.submit(batch).unwrap().wait().unwrap();
        assert_eq!(done.checksums, if with_sums { sums } else { Vec::new() }, "{direction:?} of {paged:?}");
        self.bench.compute.synchronize().unwrap();
        if direction == Direction::Load {
            assert!(self.bench.found.read() == before, "a load overtook a reader: {paged:?}");
        }
        assert!(self.arena.read() == arena, "{direction:?}: wrong bytes in the arena: {paged:?}");
        assert!(self.bench.contents() == device, "{direction:?}: wrong bytes on the device: {paged:?}");
    }
}

fn rounds(mode: CopyMode) {
    let device = Device::open(0).unwrap();
    let seed = setting("KVRING_SEED", 1);
    let count = setting("KVRING_ROUNDS", if is_real() { 400 } else { 24 }) as usize;
    let mut rng = Rng(seed << 8 | mode as u64);
    let world = World::new(&device, mode);
    // A real driver also meets an arena that is not registered yet, or only in part; with the fake other tests do that.
    while !is_real() && world.mapped.registered_bytes() < ARENA as u64 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let base = world.bench.memory.address();
    for _ in (0..count).step_by(PER_CACHE) {
        // Kernels can neither copy nor sum pages whose length is no multiple of 4.
        let is_odd = matches!(mode, CopyMode::Batch | CopyMode::Auto) && rng.one_in(8);
        let unit = if is_odd { 5 } else { [16, 16, 8, 4][rng.within(0, 3)] };
        let paged = cache(&mut rng, base, unit);
        for _ in 0..PER_CACHE {
            world.round(&mut rng, &paged, !is_odd);
        }
    }
    eprintln!("{mode} on {}: {count} rounds, seed {seed}", device.info().name);
}

fn report() -> [(&'static str, &'static str); 2] {
    [("FAKE_CUDA_REPORT", "1"), ("FAKE_CUDA_DELAY_US", "100")]
}

#[test]
fn random_rounds_by_batch() {
    inside("random_rounds_by_batch", &report(), || rounds(CopyMode::Batch));
}

#[test]
fn random_rounds_by_staged() {
    inside("random_rounds_by_staged", &report(), || rounds(CopyMode::Staged));
}

#[test]
fn random_rounds_by_zerocopy() {
    inside("random_rounds_by_zerocopy", &report(), || rounds(CopyMode::ZeroCopy));
}

#[test]
fn random_rounds_by_auto() {
    inside("random_rounds_by_auto", &report(), || rounds(CopyMode::Auto));
}

#[test]
fn memory_of_the_host_is_no_cache() {
    inside("memory_of_the_host_is_no_cache", &report(), || {
        let backend = CudaBackend::new(GpuOptions::new(0)).unwrap();
        let page: *mut c_void = shared(4096);
        let plane = Plane { base: page.cast(), block_stride: 4096, page_bytes: 4096 };
        // SAFETY: nothing is copied.
        let paged = unsafe { PagedKv::new(vec![plane], 1, 1) }.unwrap().on(Memory::Cuda(0));
        assert!(backend.prepare(&Arc::new(paged)).unwrap_err().to_string().contains("expected 4096 bytes"));
    });
}
