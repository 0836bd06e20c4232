//! A transfer comes after its fence, and waits for nothing else. Without the ordering the same tests find wrong bytes.

use crate::support::calls::{self, FAR_LATER_US, LATE_US};
use crate::support::fake::{Fake, pattern};
use crate::world::*;
use kvring_gpu_kernels::{
    ComputeStream, CopyBackend, CopyError, CopyMode, CudaBackend, Direction, Fence, GpuError,
};
use std::sync::Arc;

const PAGE: usize = 8192;
const MODES: [CopyMode; 3] = [CopyMode::Batch, CopyMode::Staged, CopyMode::ZeroCopy];

struct Setting {
    backend: CudaBackend,
    arena: Arena,
    cache: Cache,
    torch: u64,
    shards: Vec<(*mut u8, Vec<u32>)>,
    mapped: Arc<dyn kvring_gpu_kernels::MappedArena>,
}

impl Setting {
    fn new(mode: CopyMode) -> Setting {
        let setting = Setting::unregistered(mode);
        let whole = setting.arena.all.len as u64;
        until("the arena is registered", || setting.mapped.registered_bytes() == whole);
        setting
    }

    /// The same with an arena that is not registered yet.
    fn unregistered(mode: CopyMode) -> Setting {
        let cache = Cache::plain(1, PAGE, 4, 2);
        let arena = Arena::new(4 * PAGE);
        let backend = backend(mode);
        let mapped = backend.map_arena(arena.mapping(Arc::new(())));
        backend.prepare(&cache.paged).unwrap();
        // Blocks 1 and 2 make one shard, 3 and 0 the next.
        let shards = vec![(arena.at(0), vec![1, 2]), (arena.at(2 * PAGE), vec![3, 0])];
        let torch = calls::stream() as u64;
        Setting { backend, arena, cache, torch, shards, mapped }
    }

    fn pages(&self) -> u64 {
        self.cache.all.at as u64 + 256
    }

    fn fence(&self, stream: u64) -> Fence {
        self.backend.fence(ComputeStream(stream)).unwrap()
    }

    /// How many of the stores saw what the stream had written before their fence.
    fn stores(&self, fake: &Fake, stream: u64, seeds: std::ops::Range<u32>, delay_us: u32) -> usize {
        let saw = |seed: &u32| {
            assert_eq!(fake.fill(stream, self.pages(), 4 * PAGE, *seed, delay_us), 0);
            let fence = self.fence(stream);
            let store = batch(Direction::Store, &self.cache, seed.is_multiple_of(2), fence, &self.shards);
            self.backend.submit(store).unwrap().wait().unwrap();
            let all = pattern(*seed, 4 * PAGE);
            let expected = [&all[PAGE..], &all[..PAGE]].concat();
            let is_right = self.arena.all.read()[..4 * PAGE] == expected;
            assert_eq!(calls::finish(stream as _), None);
            is_right
        };
        seeds.filter(saw).count()
    }

    /// How many readers on the stream, before the fence, found what was there before the load.
    fn loads(&self, fake: &Fake, stream: u64, seeds: std::ops::Range<u32>, delay_us: u32) -> usize {
        let mut rng = Rng(7);
        let kept = |seed: &u32| {
            assert_eq!(fake.fill(stream, self.pages(), 4 * PAGE, *seed, 0), 0);
            assert_eq!(calls::finish(stream as _), None);
            let shared = self.arena.all.renew(&mut rng);
            let mut found = vec![0; 4 * PAGE];
            // SAFETY: it lives until the stream has done its work, below.
            let read = unsafe { fake.read(stream, self.pages(), 4 * PAGE, found.as_mut_ptr(), delay_us) };
            assert_eq!(read, 0);
            let fence = self.fence(stream);
            let load = batch(Direction::Load, &self.cache, seed.is_multiple_of(2), fence, &self.shards);
            self.backend.submit(load).unwrap().wait().unwrap();
            assert_eq!(calls::finish(stream as _), None);
            let pages = &self.cache.all.read()[256..][..4 * PAGE];
            assert!(pages[PAGE..] == shared[..3 * PAGE] && pages[..PAGE] == shared[3 * PAGE..][..PAGE]);
            found == pattern(*seed, 4 * PAGE)
        };
        seeds.filter(kept).count()
    }
}

#[test]
fn transfers_come_after_their_fence() {
    inside("order::transfers_come_after_their_fence", &[], |fake| {
        let _context = calls::context();
        for mode in MODES {
            let setting = Setting::new(mode);
            assert_eq!(setting.stores(fake, setting.torch, 0..60, LATE_US / 8), 60, "{mode}");
            assert_eq!(setting.loads(fake, setting.torch, 100..160, LATE_US / 8), 60, "{mode}");
            // The legacy default stream.
            assert_eq!(setting.stores(fake, 0, 200..220, LATE_US / 8), 20, "{mode}");
            assert_eq!(setting.loads(fake, 0, 300..320, LATE_US / 8), 20, "{mode}");
        }
    });
}

/// Without registration the driver copies through buffers of its own.
#[test]
fn so_they_do_where_nothing_is_registered() {
    inside("order::so_they_do_where_nothing_is_registered", &[], |fake| {
        let _context = calls::context();
        fake.fail("cuMemHostRegister", 1, 1);
        for mode in MODES {
            let setting = Setting::unregistered(mode);
            assert_eq!(setting.stores(fake, setting.torch, 0..30, LATE_US / 8), 30, "{mode}");
            assert_eq!(setting.loads(fake, setting.torch, 100..130, LATE_US / 8), 30, "{mode}");
            assert_eq!(setting.mapped.registered_bytes(), 0);
        }
    });
}

#[test]
fn without_the_wait_bytes_are_wrong() {
    inside("order::without_the_wait_bytes_are_wrong", &[], |fake| {
        let _context = calls::context();
        for mode in MODES {
            let setting = Setting::new(mode);
            fake.ignore("cuStreamWaitEvent");
            let (stores, loads) = (
                setting.stores(fake, setting.torch, 0..10, LATE_US),
                setting.loads(fake, setting.torch, 100..110, LATE_US),
            );
            assert!(stores < 10 && loads < 10, "{mode}: {stores} and {loads} of 10 were right");
            fake.reset();
        }
    });
}

fn copied_after(setting: &Setting, fence: Fence) {
    let store = batch(Direction::Store, &setting.cache, true, fence, &setting.shards);
    setting.backend.submit(store).unwrap().wait().unwrap();
}

#[test]
fn what_comes_after_the_fence_is_not_waited_for() {
    inside("order::what_comes_after_the_fence_is_not_waited_for", &[], |fake| {
        let _context = calls::context();
        for mode in MODES {
            let setting = Setting::new(mode);
            let elsewhere = calls::device(64);
            let fence = setting.fence(setting.torch);
            assert_eq!(fake.fill(setting.torch, elsewhere, 64, 1, 5 * FAR_LATER_US), 0);
            copied_after(&setting, fence);
            let found = calls::bytes_at(elsewhere as *const _, 64);
            assert_eq!(found, [0; 64], "{mode}: it waited for what came later");
            assert_eq!(calls::finish(setting.torch as _), None);
            assert_eq!(calls::bytes_at(elsewhere as *const _, 64), pattern(1, 64));
        }
    });
}

#[test]
fn two_batches_of_one_fence_and_none_of_the_next() {
    inside("order::two_batches_of_one_fence_and_none_of_the_next", &[], |fake| {
        let _context = calls::context();
        let setting = Setting::new(CopyMode::Staged);
        assert_eq!(fake.fill(setting.torch, setting.pages(), 4 * PAGE, 9, LATE_US), 0);
        let fence = setting.fence(setting.torch);
        // The event of this second fence is used again, for an idle stream. The first fence must not come sooner by that.
        drop(setting.fence(setting.torch));
        let submit = |shard: usize| {
            let shards = &setting.shards[shard..=shard];
            setting
                .backend
                .submit(batch(Direction::Store, &setting.cache, false, fence.clone(), shards))
                .unwrap()
        };
        let both = [submit(0), submit(1)];
        drop(fence.clone());
        let idle = calls::stream() as u64;
        for _ in 0..5 {
            drop(setting.fence(idle));
        }
        for transfer in both {
            transfer.wait().unwrap();
        }
        let all = pattern(9, 4 * PAGE);
        assert!(setting.arena.all.read()[..4 * PAGE] == [&all[PAGE..], &all[..PAGE]].concat());
    });
}

#[test]
fn a_thread_that_is_not_in_the_context_is_told_so() {
    inside("order::a_thread_that_is_not_in_the_context_is_told_so", &[], |fake| {
        let _context = calls::context();
        let setting = Setting::new(CopyMode::Staged);
        let (backend, cache, shards) = (&setting.backend, &setting.cache, &setting.shards);
        let shards: Vec<_> = shards.iter().map(|(at, blocks)| (*at as usize, blocks.clone())).collect();
        std::thread::scope(|scope| {
            let store = || {
                let shards: Vec<_> =
                    shards.iter().map(|(at, blocks)| (*at as *mut u8, blocks.clone())).collect();
                let store = batch(Direction::Store, cache, true, Fence::none(), &shards);
                backend.submit(store).and_then(|transfer| transfer.wait())
            };
            // A fresh thread, as all threads are but torch's.
            scope.spawn(move || {
                store().unwrap();
                for call in ["cuCtxPushCurrent", "cuCtxSetCurrent"] {
                    fake.ignore(call);
                }
                let error = store().unwrap_err();
                assert!(
                    matches!(error, CopyError::Unended(GpuError::Call { code: 201, .. })),
                    "without its context: {error}"
                );
                fake.reset();
                store().unwrap();
            });
        });
    });
}

#[test]
fn no_copy_crosses_the_border_of_two_registrations() {
    inside("order::no_copy_crosses_the_border_of_two_registrations", &[], |_| {
        let _context = calls::context();
        // First by raw calls: the driver refuses a copy across a border.
        let (raw, stream, device) = (calls::shared(2 * PART), calls::stream(), calls::device(PAGE));
        let at = |offset: usize| raw.wrapping_byte_add(offset);
        assert_eq!(calls::register(raw, PART).or(calls::register(at(PART), PART)), None);
        let refused = Some(cudarc::driver::sys::CUresult::CUDA_ERROR_INVALID_VALUE);
        assert_eq!(calls::to_host(at(PART - PAGE / 2), device, PAGE, stream), refused);
        // A backend that takes both for one registration makes that copy, and gets the same error.
        let believed = CudaBackend::new(kvring_gpu_kernels::GpuOptions {
            part_bytes: 4 * PART,
            ..options(CopyMode::Batch)
        })
        .unwrap();
        let cache = Cache::plain(1, PAGE, 4, 2);
        let over = vec![(at(PART - PAGE / 2).cast::<u8>(), vec![0, 2])];
        let store = |backend: &CudaBackend, shards: &[(*mut u8, Vec<u32>)]| {
            let store = batch(Direction::Store, &cache, false, Fence::none(), shards);
            backend.submit(store).and_then(|transfer| transfer.wait())
        };
        let error = store(&believed, &over).unwrap_err();
        assert!(matches!(error, CopyError::Gpu(GpuError::Call { code: 1, .. })), "{error}");
        // A backend that has registered the arena itself divides copies at the borders.
        for mode in MODES {
            let backend = backend(mode);
            let arena = Arena::new(2 * PART);
            let mapped = backend.map_arena(arena.mapping(Arc::new(())));
            until("both parts are registered", || mapped.registered_bytes() == 2 * PART as u64);
            let image = cache.all.renew(&mut Rng(3));
            let over = vec![(arena.at(PART - PAGE / 2), vec![0, 2])];
            store(&backend, &over).unwrap();
            let shard = &arena.all.read()[PART - PAGE / 2..][..2 * PAGE];
            assert!(shard == cache.gather(&image, &[0, 2]), "{mode}");
        }
    });
}
