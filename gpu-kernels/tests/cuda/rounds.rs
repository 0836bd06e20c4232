//! Random batches of random caches, bit-exact.

use crate::support::calls;
use crate::support::fake::Fake;
use crate::world::*;
use kvring_gpu_kernels::{
    CopyBackend, CopyError, CopyMode, CudaBackend, Direction, Fence, GpuError, MappedArena,
};
use std::sync::Arc;

const ARENA: usize = 2 << 20;

/// A backend and an arena that it knows.
struct World {
    mode: CopyMode,
    backend: CudaBackend,
    arena: Arena,
    _mapped: Arc<dyn MappedArena>,
    /// Can this driver run the kernels? Only they compute checksums.
    kernels: bool,
}

impl World {
    fn new(mode: CopyMode, arena: Arena, kernels: bool) -> World {
        let backend = backend(mode);
        let mapped = backend.map_arena(arena.mapping(Arc::new(())));
        World { mode, backend, arena, _mapped: mapped, kernels }
    }

    /// Copies some batches of one cache. Returns how many.
    fn round(&self, rng: &mut Rng, cache: &Cache, odd: bool) -> usize {
        let refused = matches!(self.mode, CopyMode::Staged | CopyMode::ZeroCopy) && odd;
        let prepared = self.backend.prepare(&cache.paged);
        if refused {
            let asked = self.mode.as_str();
            assert!(
                matches!(&prepared, Err(CopyError::Gpu(GpuError::Mode { asked: a, .. })) if *a == asked),
                "{prepared:?} of {}",
                cache.describe()
            );
            return 0;
        }
        prepared.unwrap();
        let stream = calls::stream() as u64;
        let batches = rng.within(1, 3);
        for _ in 0..batches {
            let direction = if rng.one_in(2) { Direction::Store } else { Direction::Load };
            let checksum = rng.one_in(2) && self.kernels && !odd;
            let fence = match rng.next() % 3 {
                0 => Fence::none(),
                1 => self.backend.fence(kvring_gpu_kernels::ComputeStream(stream)).unwrap(),
                _ => self.backend.fence(kvring_gpu_kernels::ComputeStream(0)).unwrap(),
            };
            self.one(rng, cache, direction, checksum, fence);
        }
        // SAFETY: nobody uses it any more.
        unsafe { cudarc::driver::result::stream::destroy(stream as _) }.unwrap();
        batches
    }

    fn one(&self, rng: &mut Rng, cache: &Cache, direction: Direction, checksum: bool, fence: Fence) {
        let bytes = cache.shard_bytes();
        let align = [1, 4, 8, 16, 4096][rng.within(0, 4)];
        let mut at = self.arena.skew;
        let mut places = Vec::new();
        let room = self.arena.all.len;
        for _ in 0..rng.within(0, 7) {
            at = (at + rng.within(0, 5000)).next_multiple_of(align);
            if at + bytes > room {
                break;
            }
            places.push(at);
            at += bytes;
        }
        let blocks = cache.blocks(rng, direction, places.len());
        let shards: Vec<_> = places.iter().map(|at| self.arena.at(*at)).zip(blocks).collect();
        let (mut cached, mut shared) = (cache.all.renew(rng), self.arena.all.renew(rng));
        for (at, (_, blocks)) in places.iter().zip(&shards) {
            match direction {
                Direction::Store => {
                    shared[*at..][..bytes].copy_from_slice(&cache.gather(&cached, blocks));
                }
                Direction::Load => cache.scatter(&mut cached, &shared[*at..][..bytes], blocks),
            }
        }
        let mut transfer = self.backend.submit(batch(direction, cache, checksum, fence, &shards)).unwrap();
        let sums = match rng.next() % 4 {
            0 => {
                drop(transfer);
                None
            }
            1 => {
                while !transfer.poll() {
                    std::thread::yield_now();
                }
                Some(transfer.wait().unwrap().checksums)
            }
            2 => Some(std::thread::scope(|scope| {
                scope.spawn(move || transfer.wait().unwrap().checksums).join().unwrap()
            })),
            _ => Some(transfer.wait().unwrap().checksums),
        };
        let why = || {
            let mode = self.mode;
            format!("{mode} {direction:?} at {places:?} of {bytes} bytes each, {}", cache.describe())
        };
        assert!(self.arena.all.read() == shared, "the arena is wrong: {}", why());
        assert!(cache.all.read() == cached, "the cache is wrong: {}", why());
        let Some(sums) = sums else { return };
        let expected = if checksum { cache.sums(direction, &shards) } else { Vec::new() };
        assert_eq!(sums, expected, "checksums: {}", why());
    }

    /// Rounds with a new cache each. Returns how many batches were copied.
    fn rounds(&self, rng: &mut Rng, count: usize) -> usize {
        let mut batches = 0;
        for _ in 0..count {
            let odd = rng.one_in(6);
            let shape = if odd { Shape::odd(rng) } else { Shape::random(rng) };
            let cache = Cache::random(rng, shape);
            batches += self.round(rng, &cache, is_odd(&cache));
        }
        batches
    }
}

/// Is it a cache that kernels cannot copy?
fn is_odd(cache: &Cache) -> bool {
    kvring_gpu_kernels::Tiles::of(&cache.paged).is_err()
}

const FORCED: [CopyMode; 3] = [CopyMode::Batch, CopyMode::Staged, CopyMode::ZeroCopy];

/// Rounds in every forced mode.
fn forced(fake: &Fake, seed: u64, count: usize, kernels: bool, arena: impl Fn() -> Arena) {
    let _context = calls::context();
    let mut rng = Rng(seed);
    let mut batches = 0;
    for mode in if kernels { &FORCED[..] } else { &FORCED[..1] } {
        let world = World::new(*mode, arena(), kernels);
        batches += world.rounds(&mut rng, count);
    }
    assert!(batches > count, "{batches}");
    let left = fake.counts();
    assert_eq!((left.registrations, left.pinned, left.allocations, left.modules), (0, 0, 0, 0));
}

#[test]
fn registered_as_a_whole() {
    inside("rounds::registered_as_a_whole", &[("FAKE_CUDA_DELAY_US", "60")], |fake| {
        forced(fake, 1, 60, true, || Arena::new(ARENA));
    });
}

#[test]
fn by_the_device_s_own_addresses() {
    let env = [("FAKE_CUDA_HOST_POINTER", "0"), ("FAKE_CUDA_DELAY_US", "60")];
    inside("rounds::by_the_device_s_own_addresses", &env, |fake| {
        forced(fake, 2, 40, true, || Arena::new(ARENA));
    });
}

#[test]
fn registered_in_part_and_growing() {
    let env = [("FAKE_CUDA_LOCKED", "1200000"), ("FAKE_CUDA_DELAY_US", "60")];
    inside("rounds::registered_in_part_and_growing", &env, |fake| {
        let _context = calls::context();
        let mut rng = Rng(3);
        for mode in FORCED {
            let arena = Arena::new(ARENA);
            arena.grow(0);
            let world = World::new(mode, arena, true);
            for step in 0..20 {
                world.arena.grow(step * (ARENA as u64 / 18));
                world.rounds(&mut rng, 2);
            }
            until("some of it is registered", || world._mapped.registered_bytes() > 0);
            assert!(world._mapped.registered_bytes() < 1_200_000);
        }
        assert_eq!(fake.counts().registrations, 0);
    });
}

#[test]
fn not_registered_at_all() {
    inside("rounds::not_registered_at_all", &[("FAKE_CUDA_DELAY_US", "60")], |fake| {
        fake.fail("cuMemHostRegister", 801, 1);
        forced(fake, 4, 30, true, || Arena::new(ARENA));
        assert!(fake.calls("cuMemHostRegister") >= 3);
    });
}

#[test]
fn an_arena_that_begins_anywhere() {
    inside("rounds::an_arena_that_begins_anywhere", &[("FAKE_CUDA_DELAY_US", "60")], |fake| {
        forced(fake, 5, 20, true, || Arena { skew: 1001, ..Arena::new(ARENA) });
    });
}

#[test]
fn without_batched_copies() {
    let env = [("FAKE_CUDA_VERSION", "12020"), ("FAKE_CUDA_DELAY_US", "60")];
    inside("rounds::without_batched_copies", &env, |fake| {
        forced(fake, 6, 30, true, || Arena::new(ARENA));
        assert_eq!(fake.calls("cuMemcpyBatchAsync"), 0);
    });
}

#[test]
fn without_kernels() {
    let env = [("FAKE_CUDA_PTX_MAX", "8.0"), ("FAKE_CUDA_DELAY_US", "60")];
    inside("rounds::without_kernels", &env, |fake| {
        forced(fake, 7, 60, false, || Arena::new(ARENA));
        assert_eq!(fake.calls("cuLaunchKernel"), 0);
    });
}

#[test]
fn by_what_a_calibration_found() {
    inside("rounds::by_what_a_calibration_found", &[("FAKE_CUDA_DELAY_US", "0")], |_| {
        let _context = calls::context();
        let mut rng = Rng(8);
        let world = World::new(CopyMode::Auto, Arena::new(ARENA), true);
        for index in 0..6 {
            let shape = if index % 3 == 2 { Shape::odd(&mut rng) } else { Shape::random(&mut rng) };
            let cache = Cache::random(&mut rng, shape);
            for _ in 0..5 {
                world.round(&mut rng, &cache, is_odd(&cache));
            }
        }
    });
}

/// Shards that are longer than the staging buffers, which are as long as memory allows, and at most 8 MiB.
#[test]
fn longer_than_the_staging_buffers() {
    inside("rounds::longer_than_the_staging_buffers", &[("FAKE_CUDA_MEMORY", "33000000")], |fake| {
        let _context = calls::context();
        let mut rng = Rng(9);
        let cache = Cache::plain(3, 33_000, 40, 30);
        let shard = cache.shard_bytes();
        assert!(shard > 10 * (256 << 10));
        // Leaves memory for six buffers of 512 KiB.
        let taken = 33_000_000 - cache.all.len - (6 * (512 << 10) + (200 << 10));
        let ballast = calls::device(taken);
        let world = World::new(CopyMode::Staged, Arena::new(3 * shard), true);
        world.backend.prepare(&cache.paged).unwrap();
        for round in 0..6 {
            let direction = if round % 2 == 0 { Direction::Store } else { Direction::Load };
            world.one(&mut rng, &cache, direction, round > 1, Fence::none());
        }
        assert!(fake.calls("cuLaunchKernel") > 6 * 5);
        // SAFETY: not used.
        unsafe { cudarc::driver::result::free_sync(ballast) }.unwrap();
    });
}

#[test]
fn longer_than_any_staging_buffer() {
    inside("rounds::longer_than_any_staging_buffer", &[("FAKE_CUDA_DELAY_US", "0")], |_| {
        let _context = calls::context();
        let mut rng = Rng(10);
        let cache = Cache::plain(2, 256 << 10, 41, 37);
        let world = World::new(CopyMode::Staged, Arena::new(cache.shard_bytes() + (1 << 20)), true);
        for direction in [Direction::Store, Direction::Load] {
            world.one(&mut rng, &cache, direction, true, Fence::none());
        }
    });
}

#[test]
fn parts_and_processors_of_any_number() {
    let env = [("FAKE_CUDA_LOCKED", "4000000"), ("FAKE_CUDA_DELAY_US", "0")];
    inside("rounds::parts_and_processors_of_any_number", &env, |_| {
        let _context = calls::context();
        let mut rng = Rng(12);
        for part_bytes in [0, 1, 4097, 10_000, 1 << 30, usize::MAX] {
            for (mode, sm_count) in [(CopyMode::Staged, 0), (CopyMode::ZeroCopy, u32::MAX)] {
                let options = kvring_gpu_kernels::GpuOptions { part_bytes, sm_count, ..options(mode) };
                let arena = Arena::new(300 << 10);
                let backend = CudaBackend::new(options).unwrap();
                let mapped = backend.map_arena(arena.mapping(Arc::new(())));
                until("registered", || mapped.registered_bytes() == arena.all.len as u64);
                let world = World { mode, backend, arena, _mapped: mapped, kernels: true };
                let cache = Cache::plain(2, 4096, 30, 12);
                for direction in [Direction::Store, Direction::Load] {
                    world.one(&mut rng, &cache, direction, true, Fence::none());
                }
            }
        }
    });
}
