//! `CudaBackend` with whatever driver there is: random caches, random batches, bit-exact. These tests need nothing of the fake, so
//! the same binary runs on a GPU (`benches/gpu/run`):
//!
//! ```text
//! KVRING_REAL_CUDA=1 KVRING_ROUNDS=5000 device-…        # the binary of this test
//! KVRING_REAL_CUDA=1 KVRING_ROUNDS=100 compute-sanitizer device-…
//! ```
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

mod support;

use kvring_gpu_kernels::raw::{Device, PlainStream, Registered};
use kvring_gpu_kernels::{CopyBackend, CopyMode, CudaBackend, Direction, GpuOptions, Memory, PagedKv, Plane};
use std::sync::Arc;
use support::calls;
use support::fake::{Kernels, inside_as, is_real, test_of};
use support::pages::Shape;
use support::world::{Arena, Bytes, Cache, DIRECTIONS, Random, Round, places, until_registered};

/// Bytes of the arena. Its parts are shorter, so shards straddle them.
const ARENA: usize = 1 << 20;
const PART_BYTES: usize = 256 << 10;
/// Rounds before another cache is made.
const PER_CACHE: usize = 4;

/// A number from the environment: how many rounds, or a seed.
fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().unwrap())
}

/// A cache, and a stream that computes: it writes to the cache from one mirror in host memory, and reads it into another.
struct Bench {
    compute: PlainStream,
    cache: Cache,
    written: Bytes,
    found: Bytes,
    _registered: [Registered; 2],
}

impl Bench {
    fn new(device: &Device, cache: Cache) -> Bench {
        let mirrors = [0; 2].map(|_| Bytes::new(cache.bytes));
        // SAFETY: they stay mapped.
        let _registered = mirrors.map(|mirror| unsafe { device.register(mirror.at, mirror.len) }.unwrap());
        let [written, found] = mirrors.map(|mirror| mirror.part(0, cache.bytes));
        Bench { compute: device.stream().unwrap(), cache, written, found, _registered }
    }

    fn round(&self, rng: &mut Random, backend: &CudaBackend, arena: Bytes, checksum: bool) {
        let Bench { compute, cache, .. } = self;
        let (direction, places) = (rng.pick(&DIRECTIONS), places(rng, cache, 0, arena.len));
        let checksum = checksum && rng.one_in(2);
        let round = Round::new(rng, cache, arena, direction, checksum, places);
        // The round's bytes come to the cache anew, by the stream. A store must read what has only just been put on the stream;
        // a load must wait for the readers on it.
        cache.renew(rng);
        self.written.write(&round.before);
        // SAFETY: registered, and not touched before the stream has been waited for.
        unsafe { compute.to_device(cache.address, self.written.at, cache.bytes) }.unwrap();
        // SAFETY: as above.
        unsafe { compute.to_host(self.found.at, cache.address, cache.bytes) }.unwrap();
        let fence = backend.fence(compute.compute_stream()).unwrap();
        let done = backend.submit(round.batch(fence)).unwrap().wait().unwrap();
        compute.synchronize().unwrap();
        if direction == Direction::Load {
            assert!(self.found.read() == round.before, "a load overtook a reader: {}", cache.describe());
        }
        round.check(backend.name(), Some(done));
    }
}

fn rounds(mode: CopyMode) {
    let _context = calls::context();
    let device = Device::open(0).unwrap();
    let seed = setting("KVRING_SEED", 1);
    let count = setting("KVRING_ROUNDS", if is_real() { 400 } else { 24 }) as usize;
    let mut rng = Random::new(seed << 8 | mode as u64, 0);
    let options = GpuOptions { mode, part_bytes: PART_BYTES, ..GpuOptions::new(0) };
    let (backend, arena) = (CudaBackend::new(options).unwrap(), Arena::new(ARENA));
    let mapped = backend.map_arena(arena.mapping());
    // A real driver also meets an arena that is not registered yet, or only in part; with the fake other tests do that.
    if !is_real() {
        until_registered(&mapped, ARENA);
    }
    for _ in (0..count).step_by(PER_CACHE) {
        // Kernels can neither copy nor sum pages whose length is no multiple of 4.
        let is_odd = matches!(mode, CopyMode::Batch | CopyMode::Auto) && rng.one_in(8);
        let unit = if is_odd { 5 } else { rng.pick(&[16, 16, 8, 4]) };
        let content = rng.pick(&[1, 6, 64]);
        let shape = Shape { unit, content, blocks: (1, 12), groups: 2, ..Shape::SMALL };
        let bench = Bench::new(&device, Cache::random(&mut rng, shape));
        for _ in 0..PER_CACHE {
            bench.round(&mut rng, &backend, arena.all, !is_odd);
        }
    }
    eprintln!("{mode} on {}: {count} rounds, seed {seed}", device.info().name);
}

/// Runs a test with the fake driver, or with the machine's own.
fn inside<F: FnOnce()>(body: F) {
    let report = [("FAKE_CUDA_REPORT", "1"), ("FAKE_CUDA_DELAY_US", "100")];
    inside_as(test_of::<F>(), Kernels::Ours, &report, |_| body());
}

#[test]
fn random_rounds_by_batch() {
    inside(|| rounds(CopyMode::Batch));
}

#[test]
fn random_rounds_by_staged() {
    inside(|| rounds(CopyMode::Staged));
}

#[test]
fn random_rounds_by_zerocopy() {
    inside(|| rounds(CopyMode::ZeroCopy));
}

#[test]
fn random_rounds_by_auto() {
    inside(|| rounds(CopyMode::Auto));
}

#[test]
fn memory_of_the_host_is_no_cache() {
    inside(|| {
        let backend = CudaBackend::new(GpuOptions::new(0)).unwrap();
        let plane = Plane { base: calls::shared(4096).cast(), block_stride: 4096, page_bytes: 4096 };
        // SAFETY: nothing is copied.
        let paged = unsafe { PagedKv::new(vec![plane], 1, 1) }.unwrap().on(Memory::Cuda(0));
        assert!(backend.prepare(&Arc::new(paged)).unwrap_err().to_string().contains("expected 4096 bytes"));
    });
}
