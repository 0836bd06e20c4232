//! Random batches of random caches, bit-exact.

use crate::inside;
use crate::support::calls;
use crate::support::fake::Fake;
use crate::support::pages::Shape;
use crate::support::world::*;
use kvring_gpu_kernels::{
    ComputeStream, CopyBackend, CopyError, CopyMode, CudaBackend, Direction, Fence, GpuError, GpuOptions,
    MappedArena, Tiles,
};
use std::sync::Arc;

const ARENA: usize = 2 << 20;

/// A backend and an arena that it knows.
struct Ground {
    mode: CopyMode,
    backend: CudaBackend,
    arena: Arena,
    mapped: Arc<dyn MappedArena>,
    /// Can this driver run the kernels? Only they compute checksums.
    kernels: bool,
}

impl Ground {
    fn new(options: GpuOptions, arena: Arena, kernels: bool) -> Ground {
        let mode = options.mode;
        let backend = CudaBackend::new(options).unwrap();
        let mapped = backend.map_arena(arena.mapping());
        Ground { mode, backend, arena, mapped, kernels }
    }

    /// Copies some batches of one cache. Returns how many.
    fn some(&self, rng: &mut Random, cache: &Cache) -> usize {
        // Kernels cannot copy every cache.
        let odd = Tiles::of(&cache.paged).is_err();
        let prepared = self.backend.prepare(&cache.paged);
        if odd && matches!(self.mode, CopyMode::Staged | CopyMode::ZeroCopy) {
            let refused = prepared.unwrap_err();
            let CopyError::Gpu(GpuError::Mode { asked, .. }) = refused else { panic!("{refused}") };
            assert_eq!(asked, self.mode.as_str(), "{}", cache.describe());
            return 0;
        }
        prepared.unwrap();
        let stream = calls::stream();
        let batches = rng.within(1, 3);
        for _ in 0..batches {
            let fence = match rng.bits() % 3 {
                0 => Fence::none(),
                1 => self.backend.fence(ComputeStream(stream as u64)).unwrap(),
                _ => self.backend.fence(ComputeStream(0)).unwrap(),
            };
            let checksum = rng.one_in(2) && self.kernels && !odd;
            let direction = rng.pick(&DIRECTIONS);
            self.one(rng, cache, direction, checksum, fence);
        }
        assert_eq!(calls::destroy(stream), None);
        batches
    }

    fn one(&self, rng: &mut Random, cache: &Cache, direction: Direction, checksum: bool, fence: Fence) {
        let places = places(rng, cache, self.arena.skew, self.arena.all.len);
        let round = Round::new(rng, cache, self.arena.all, direction, checksum, places);
        let mut transfer = self.backend.submit(round.batch(fence)).unwrap();
        let done = match rng.bits() % 4 {
            0 => {
                drop(transfer);
                None
            }
            1 => {
                while !transfer.poll() {
                    std::thread::yield_now();
                }
                Some(transfer.wait().unwrap())
            }
            2 => Some(std::thread::scope(|scope| scope.spawn(|| transfer.wait().unwrap()).join().unwrap())),
            _ => Some(transfer.wait().unwrap()),
        };
        round.check(self.mode, done);
    }

    /// A store and a load with checksums.
    fn both(&self, rng: &mut Random, cache: &Cache) {
        for direction in DIRECTIONS {
            self.one(rng, cache, direction, true, Fence::none());
        }
    }

    /// Batches with a new cache each. Returns how many were copied.
    fn rounds(&self, rng: &mut Random, count: usize) -> usize {
        let round = |_| {
            let cache = any_cache(rng);
            self.some(rng, &cache)
        };
        (0..count).map(round).sum()
    }
}

fn any_cache(rng: &mut Random) -> Cache {
    let shape = if rng.one_in(6) { odd(rng) } else { shape(rng) };
    Cache::random(rng, shape)
}

fn shape(rng: &mut Random) -> Shape {
    let unit = rng.pick(&[16, 16, 8, 4]);
    match rng.bits() % 8 {
        0 => Shape { unit, content: 1, tokens: 2, per_chunk: (1, 700), groups: 1, ..Shape::SMALL },
        1 => Shape { unit, content: 32, tokens: 48, per_chunk: (1, 8), groups: 2, ..Shape::SMALL },
        _ => Shape { unit, ..Shape::SMALL },
    }
}

/// Pages that fit no vector of the kernels.
fn odd(rng: &mut Random) -> Shape {
    Shape { unit: rng.pick(&[1, 2, 3, 5, 7, 9, 14]), ..Shape::SMALL }
}

/// Rounds in every forced mode. Everything is given back.
fn forced(fake: &Fake, seed: u64, count: usize, kernels: bool, skew: usize) {
    let mut rng = Random::new(seed, 0);
    let mut batches = 0;
    for mode in if kernels { &FORCED[..] } else { &FORCED[..1] } {
        let ground = Ground::new(options(*mode), Arena { skew, ..Arena::new(ARENA) }, kernels);
        batches += ground.rounds(&mut rng, count);
    }
    assert!(batches > count, "{batches}");
    let left = fake.counts();
    assert_eq!((left.registrations, left.pinned, left.allocations, left.modules), (0, 0, 0, 0));
}

const QUICK: (&str, &str) = ("FAKE_CUDA_DELAY_US", "60");

#[test]
fn registered_as_a_whole() {
    inside(&[QUICK], |fake| forced(fake, 1, 60, true, 0));
}

#[test]
fn by_the_device_s_own_addresses() {
    inside(&[QUICK, ("FAKE_CUDA_HOST_POINTER", "0")], |fake| forced(fake, 2, 40, true, 0));
}

#[test]
fn registered_in_part_and_growing() {
    inside(&[QUICK, ("FAKE_CUDA_LOCKED", "1200000")], |fake| {
        let mut rng = Random::new(3, 0);
        for mode in FORCED {
            let arena = Arena::new(ARENA);
            arena.grow(0);
            let ground = Ground::new(options(mode), arena, true);
            for step in 0..20 {
                ground.arena.grow(step * (ARENA / 18));
                ground.rounds(&mut rng, 2);
            }
            until("some of it is registered", || ground.mapped.registered_bytes() > 0);
            assert!(ground.mapped.registered_bytes() < 1_200_000);
        }
        assert_eq!(fake.counts().registrations, 0);
    });
}

#[test]
fn not_registered_at_all() {
    inside(&[QUICK], |fake| {
        fake.fail("cuMemHostRegister", 801, 1);
        forced(fake, 4, 30, true, 0);
        assert!(fake.calls("cuMemHostRegister") >= 3);
    });
}

#[test]
fn an_arena_that_begins_anywhere() {
    inside(&[QUICK], |fake| forced(fake, 5, 20, true, 1001));
}

#[test]
fn without_batched_copies() {
    inside(&[QUICK, ("FAKE_CUDA_VERSION", "12020")], |fake| {
        forced(fake, 6, 30, true, 0);
        assert_eq!(fake.calls("cuMemcpyBatchAsync"), 0);
    });
}

#[test]
fn without_kernels() {
    inside(&[QUICK, ("FAKE_CUDA_PTX_MAX", "8.0")], |fake| {
        forced(fake, 7, 60, false, 0);
        assert_eq!(fake.calls("cuLaunchKernel"), 0);
    });
}

#[test]
fn by_what_a_calibration_found() {
    inside(&[("FAKE_CUDA_DELAY_US", "0")], |_| {
        let mut rng = Random::new(8, 0);
        let ground = Ground::new(options(CopyMode::Auto), Arena::new(ARENA), true);
        for index in 0..6 {
            let shape = if index % 3 == 2 { odd(&mut rng) } else { shape(&mut rng) };
            let cache = Cache::random(&mut rng, shape);
            for _ in 0..5 {
                ground.some(&mut rng, &cache);
            }
        }
    });
}

/// Shards that are longer than the staging buffers, which are as long as memory allows, and at most 8 MiB.
#[test]
fn longer_than_the_staging_buffers() {
    inside(&[("FAKE_CUDA_MEMORY", "33000000")], |fake| {
        let mut rng = Random::new(9, 0);
        let cache = Cache::plain(3, 33_000, 40, 30);
        let shard = cache.shard_bytes();
        assert!(shard > 10 * (256 << 10));
        // Leaves memory for six buffers of 512 KiB.
        let ballast = calls::device(33_000_000 - cache.bytes - (6 * (512 << 10) + (200 << 10)));
        let ground = Ground::new(options(CopyMode::Staged), Arena::new(3 * shard), true);
        ground.backend.prepare(&cache.paged).unwrap();
        for round in 0..6 {
            ground.one(&mut rng, &cache, DIRECTIONS[round % 2], round > 1, Fence::none());
        }
        assert!(fake.calls("cuLaunchKernel") > 6 * 5);
        calls::free(ballast);
    });
}

#[test]
fn longer_than_any_staging_buffer() {
    inside(&[("FAKE_CUDA_DELAY_US", "0")], |_| {
        let cache = Cache::plain(2, 256 << 10, 41, 37);
        let arena = Arena::new(cache.shard_bytes() + (1 << 20));
        Ground::new(options(CopyMode::Staged), arena, true).both(&mut Random::new(10, 0), &cache);
    });
}

#[test]
fn parts_and_processors_of_any_number() {
    inside(&[("FAKE_CUDA_LOCKED", "4000000"), ("FAKE_CUDA_DELAY_US", "0")], |_| {
        let mut rng = Random::new(12, 0);
        let cache = Cache::plain(2, 4096, 30, 12);
        for part_bytes in [0, 1, 4097, 10_000, 1 << 30, usize::MAX] {
            for (mode, sm_count) in [(CopyMode::Staged, 0), (CopyMode::ZeroCopy, u32::MAX)] {
                let options = GpuOptions { part_bytes, sm_count, ..options(mode) };
                let ground = Ground::new(options, Arena::new(300 << 10), true);
                until_registered(&ground.mapped, ground.arena.all.len);
                ground.both(&mut rng, &cache);
            }
        }
    });
}
