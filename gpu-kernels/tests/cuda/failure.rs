//! Drivers, devices and memory that are missing or fail: the backend gives typed errors, and takes another way if there is one.

use crate::support::calls;
use crate::support::fake::{Fake, pattern};
use crate::support::world::*;
use crate::{inside, without_context};
use kvring_gpu_kernels::{
    ComputeStream, CopyBackend, CopyError, CopyMode, CudaBackend, Direction, Fence, GpuError, GpuOptions,
    Memory, PagedKv, Plane, SKIP, probe,
};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const STAGING_MIN: usize = 256 << 10;
/// Bytes of a shard of [`World::plain`] with eight blocks in a chunk.
const SHARD: usize = 2 * 8192 * 8;
const BLOCKS: [u32; 8] = [1, 2, 3, 4, 5, 6, 7, 8];

fn new(mode: CopyMode) -> GpuError {
    CudaBackend::new(options(mode)).err().expect("no backend")
}

#[test]
fn no_device() {
    without_context(&[("FAKE_CUDA_DEVICES", "0")], |_| {
        assert_eq!(probe().unwrap_err(), GpuError::NoDevice);
        assert_eq!(new(CopyMode::Auto), GpuError::NoDevice);
    });
}

#[test]
fn a_stub() {
    without_context(&[("FAKE_CUDA_STUB", "1")], |_| {
        assert_eq!(probe().unwrap_err(), GpuError::StubLibrary);
    });
}

#[test]
fn a_driver_that_is_too_old() {
    without_context(&[("FAKE_CUDA_VERSION", "11080")], |_| {
        let error = probe().unwrap_err();
        assert!(matches!(error, GpuError::DriverTooOld { found: 11080, .. }), "{error}");
        assert!(error.to_string().contains("12.0 or later, got 11.8"), "{error}");
    });
}

#[test]
fn devices_are_described_and_numbered() {
    without_context(&[("FAKE_CUDA_DEVICES", "2")], |fake| {
        let devices = probe().unwrap();
        assert_eq!(devices.len(), 2);
        let second = &devices[1];
        assert_eq!((second.device, &*second.name, second.compute_capability), (1, "Fake H100 1", (9, 0)));
        assert_eq!((second.multiprocessors, second.memory_bytes), (132, 1 << 30));
        for device in [2, u32::MAX] {
            let error = CudaBackend::new(GpuOptions::new(device)).err().unwrap();
            assert_eq!(error, GpuError::Device { device, count: 2 });
        }
        assert_eq!(fake.counts(), Default::default());
        assert_eq!(CudaBackend::new(GpuOptions::new(1)).unwrap().device(), second);
        assert_eq!(fake.counts(), Default::default());
    });
}

#[test]
fn kernels_that_do_not_load() {
    inside(&[("FAKE_CUDA_PTX_MAX", "8.0")], |_| {
        for mode in [CopyMode::Staged, CopyMode::ZeroCopy] {
            let error = new(mode);
            assert!(matches!(error, GpuError::Mode { asked, .. } if asked == mode.as_str()), "{error}");
            assert!(error.to_string().contains("570"), "{error}");
        }
        let lines = warnings();
        let world = World::new(options(CopyMode::Auto), Cache::plain(2, 4096, 6, 2), PART);
        assert_eq!(lines.lock().unwrap().len(), 1, "{lines:?}");
        let shards = world.shard(0, &[5, 1]);
        let error = world.store(true, &shards).unwrap_err();
        let CopyError::Gpu(GpuError::Mode { asked: "checksum", why }) = &error else { panic!("{error}") };
        assert!(why.contains("570"), "{why}");
        assert_eq!(world.backend.describe(&world.cache.paged), "stores by batch; loads by batch");
        let image = world.cache.renew(&mut Random::new(1, 0));
        world.store(false, &shards).unwrap();
        assert!(world.bytes_at(0) == world.cache.gather(&image, &[5, 1]));
    });
}

fn paged(base: u64, stride: usize, page: usize, blocks: u32, memory: Memory) -> Arc<PagedKv> {
    let plane = Plane { base: base as *mut u8, block_stride: stride, page_bytes: page };
    // SAFETY: nothing is copied.
    Arc::new(unsafe { PagedKv::new(vec![plane], blocks, 1) }.unwrap().on(memory))
}

#[test]
fn memory_that_is_not_the_device_s() {
    inside(&[("FAKE_CUDA_DEVICES", "2")], |fake| {
        let backend = backend(CopyMode::Auto);
        let here = calls::device(4096 * 4);
        let other = cudarc::driver::CudaContext::new(1).unwrap();
        let there = calls::device(4096 * 4);
        drop(other);
        let _context = calls::context();
        let host = calls::shared(4096 * 4) as u64;
        let registered = calls::shared(4096 * 4);
        assert_eq!(calls::register(registered, 4096 * 4), None);
        let before = fake.counts();
        let cases = [
            (host, 4096, 4, "does not know"),
            (registered as u64, 4096, 4, "of the host"),
            (there, 4096, 4, "device 1"),
            (0x10, 4096, 4, "does not know"),
            (here, 4096, 5, "ends at"),
            (here + 4, 4096, 4, "ends at"),
            (here, 1 << 40, 4, "ends at"),
            (here, usize::MAX / 2, u32::MAX, "64 bits"),
            (u64::MAX - 10, 16, 1, "64 bits"),
        ];
        for (base, stride, blocks, why) in cases {
            let cache = paged(base, stride, 16.max(stride.min(4096)), blocks, Memory::Cuda(0));
            let error = backend.prepare(&cache).unwrap_err();
            assert!(
                matches!(&error, CopyError::Gpu(GpuError::Memory { group: 0, plane: 0, address, device: 0, got, .. })
                    if got.contains(why) && *address == base),
                "{base:#x}, {stride} × {blocks}: {error}"
            );
        }
        // A cache that says that it is in host memory, or in that of another device.
        for memory in [Memory::Host, Memory::Cuda(1)] {
            let error = backend.prepare(&paged(here, 4096, 4096, 4, memory)).unwrap_err();
            assert!(matches!(error, CopyError::OtherMemory { .. }), "{error}");
        }
        backend.prepare(&paged(here, 4096, 4096, 4, Memory::Cuda(0))).unwrap();
        assert_eq!(fake.counts().registrations, before.registrations);
    });
}

/// Takes all device memory but so much.
fn leave(bytes: usize) -> u64 {
    let (free, _) = cudarc::driver::result::mem_get_info().unwrap();
    calls::device(free - bytes)
}

#[test]
fn no_memory_for_staging_buffers() {
    inside(&[("FAKE_CUDA_DELAY_US", "0")], |fake| {
        let lines = warnings();
        let cache = Cache::plain(3, 8192, 40, 30);
        let shard = cache.shard_bytes();
        let ballast = leave(100 << 10);
        let error = backend(CopyMode::Staged).prepare(&cache.paged).unwrap_err();
        assert!(matches!(error, CopyError::Gpu(GpuError::Mode { asked: "staged", .. })), "{error}");
        lines.lock().unwrap().clear();
        let world = World::new(options(CopyMode::Auto), cache, shard);
        let World { backend, cache, .. } = &world;
        assert_eq!(backend.describe(&cache.paged), "stores by batch; loads by batch");
        let others: Vec<_> = (0..3).map(|_| cache.again()).collect();
        others.iter().for_each(|other| backend.prepare(other).unwrap());
        let said = lines.lock().unwrap().clone();
        assert_eq!(said.len(), 1, "{said:#?}");
        // Without staging buffers kernels sum skipped blocks in the arena. They cannot do so here, because the shard lies in
        // several registrations.
        world.check(false);
        let launches = fake.calls("cuLaunchKernel");
        let round =
            Round::new(&mut Random::new(5, 0), cache, world.arena.all, Direction::Store, true, vec![0]);
        let done = backend.submit(round.batch(Fence::none())).unwrap().wait().unwrap();
        round.check("without staging buffers", Some(done));
        assert!(fake.calls("cuLaunchKernel") > launches);
        let blocks: Vec<u32> = (0..30).map(|at| if at == 7 { SKIP } else { at }).collect();
        let load = world.submit(Direction::Load, true, Fence::none(), &world.shard(0, &blocks));
        let error = load.and_then(|transfer| transfer.wait()).unwrap_err();
        assert_eq!(error, CopyError::Gpu(GpuError::NoPlaceForChecksum));
        calls::free(ballast);
        // There is device memory again.
        let later = cache.again();
        backend.prepare(&later).unwrap();
        assert_ne!(backend.describe(&later), "");
    });
}

/// Caches that were prepared before keep their windows, so staging buffers must not get shorter, or be freed.
#[test]
fn a_cache_that_comes_later_does_not_take_staging_buffers_away() {
    inside(&[("FAKE_CUDA_DELAY_US", "20")], |fake| {
        let small = Cache::plain(3, 8192, 40, 16);
        let large = Cache::plain(3, 65536, 20, 16);
        let arena = Arena::new(large.shard_bytes());
        let backend = backend(CopyMode::Staged);
        let _mapped = backend.map_arena(arena.mapping());
        check(&backend, &small, &arena, true);
        // There is room for the table, and for buffers that are no longer than those there are.
        for room in [Some(STAGING_MIN / 2), Some(3 * STAGING_MIN), Some(12 * STAGING_MIN), None] {
            let ballast = room.map(leave);
            if room.is_some() {
                // Fails as if somebody took freed memory at once.
                fake.fail("cuMemAlloc", 2, 2);
            }
            backend.prepare(&large.again()).unwrap();
            fake.reset();
            check(&backend, &small, &arena, true);
            check(&backend, &large, &arena, true);
            ballast.map(calls::free);
        }
    });
}

#[test]
fn no_memory_for_the_table() {
    inside(&[], |fake| {
        let cache = Cache::plain(3, 8192, 40, 30);
        let backend = backend(CopyMode::Batch);
        let before = fake.counts();
        let ballast = leave(100);
        let error = backend.prepare(&cache.paged).unwrap_err();
        assert!(matches!(&error, CopyError::Gpu(error) if error.is_out_of_memory()), "{error}");
        calls::free(ballast);
        assert_eq!(fake.counts(), before);
        backend.prepare(&cache.paged).unwrap();
    });
}

#[test]
fn a_part_that_cannot_be_registered() {
    inside(&[("FAKE_CUDA_DELAY_US", "20")], |fake| {
        let lines = warnings();
        for part in 1..=4 {
            fake.fail("cuMemHostRegister", 2, part);
            let cache = Cache::plain(1, 8192, 40, 20);
            let world = World::unregistered(options(CopyMode::ZeroCopy), cache, 4 * PART);
            until("it was tried", || lines.lock().unwrap().len() as i32 == part);
            assert_eq!(world.mapped.registered_bytes(), (part as u64 - 1) * PART as u64);
            assert!(lines.lock().unwrap().last().unwrap().contains("ulimit"));
            world.check(true);
            fake.reset();
        }
        assert_eq!(fake.counts().registrations, 0);
    });
}

/// When `submit` returns, a batch that has failed half-way has ended: nothing writes any more.
#[test]
fn a_batch_that_fails_half_way_has_ended() {
    inside(&[], |fake| {
        for (mode, call, use_) in [
            (CopyMode::Batch, "cuEventRecord", 1),
            (CopyMode::Staged, "cuMemcpyDtoHAsync", 4),
            (CopyMode::Staged, "cuLaunchKernel", 4),
            (CopyMode::ZeroCopy, "cuLaunchKernel", 4),
        ] {
            let world = World::plain(mode, 8, 6 * SHARD);
            let World { arena, cache, .. } = &world;
            let before = arena.all.renew(&mut Random::new(5, 0));
            let fence = world.written_late(fake, 8, 100_000);
            fake.fail_once(call, 1, use_);
            let blocks = cache.blocks(&mut Random::new(6, 0), Direction::Store, 6);
            let shards: Vec<_> =
                blocks.iter().enumerate().flat_map(|(k, blocks)| world.shard(k * SHARD, blocks)).collect();
            let error = world.submit(Direction::Store, false, fence, &shards).err().unwrap();
            let then = arena.all.read();
            assert!(matches!(error, CopyError::Gpu(GpuError::Call { code: 1, .. })), "{error}");
            // A part of the batch had been put on lanes, and has been copied.
            assert!(then != before, "{mode} {call}");
            assert!(cache.read() == pattern(8, cache.bytes));
            std::thread::sleep(Duration::from_millis(150));
            assert!(arena.all.read() == then, "{mode} {call}: it went on");
            fake.reset();
            world.check(true);
        }
    });
}

/// Looking at events fails for a while. The transfer is still in flight, and succeeds in the end.
#[test]
fn an_error_of_looking_is_not_the_end_of_a_copy() {
    inside(&[], |fake| {
        let world = World::plain(CopyMode::Staged, 8, SHARD);
        for (seed, code) in (20..).zip([1, 2, 999, 1]) {
            let fence = world.written_late(fake, seed, 150_000);
            let mut transfer = world.submit(Direction::Store, true, fence, &world.shard(0, &BLOCKS)).unwrap();
            fake.fail("cuEventQuery", code, 1);
            fake.fail("cuEventSynchronize", code, 1);
            match seed {
                // Polling holds nobody up.
                20 => {
                    assert!(!transfer.poll() && !transfer.poll());
                    fake.reset();
                    transfer.wait().unwrap();
                }
                21 => drop(transfer),
                _ => std::thread::scope(|scope| {
                    let waits = scope.spawn(|| transfer.wait());
                    std::thread::sleep(Duration::from_millis(20));
                    fake.reset();
                    waits.join().unwrap().unwrap();
                }),
            }
            let image = pattern(seed, world.cache.bytes);
            assert!(world.bytes_at(0) == world.cache.gather(&image, &BLOCKS), "{code}");
            fake.reset();
        }
    });
}

/// From now on the driver does not say whether work has ended.
fn say_nothing(fake: &Fake) {
    for call in ["cuEventQuery", "cuEventSynchronize", "cuStreamSynchronize"] {
        fake.fail(call, 999, 1);
    }
}

/// The driver gives no answer for so long that the backend stops waiting, and then the copy runs after all. So the slots that it
/// was to write must not be given to anybody else.
#[test]
fn a_copy_that_is_not_known_to_have_ended_says_so() {
    inside(&[], |fake| {
        let world = World::plain(CopyMode::Staged, 8, SHARD);
        let shards = world.shard(0, &BLOCKS);
        for half_way in [false, true] {
            let before = world.arena.all.renew(&mut Random::new(5, 0));
            let fence = world.written_late(fake, 6, 4_000_000);
            if half_way {
                fake.fail_once("cuEventRecord", 1, 1);
            }
            say_nothing(fake);
            let store = world.submit(Direction::Store, true, fence, &shards);
            let error = store.and_then(|transfer| transfer.wait()).unwrap_err();
            assert!(matches!(error, CopyError::Unended(GpuError::Call { .. })), "{error}");
            assert!(world.arena.all.read() == before, "it has yet to begin");
            fake.reset();
            let shard = world.cache.gather(&pattern(6, world.cache.bytes), &BLOCKS);
            until("it was written all the same", || world.bytes_at(0) == shard);
        }
    });
}

/// When the driver has given no answer for a while, the backend gives a store up: nobody gets the store's slots. It goes on
/// asking about a load: until the load's end is known its blocks cannot be given to anybody.
#[test]
fn a_load_is_asked_about_for_longer_than_a_store() {
    inside(&[], |fake| {
        let options = GpuOptions { load_patience: Duration::from_secs(200), ..options(CopyMode::Staged) };
        let world = &World::new(options, Cache::plain(2, 8192, 40, 8), 2 * SHARD);
        let copied = |direction, fence, at| {
            let transfer = world.submit(direction, true, fence, &world.shard(at, &BLOCKS));
            transfer.and_then(|transfer| transfer.wait())
        };
        for half_way in [false, true] {
            std::thread::scope(|scope| {
                let fence = world.fence();
                if half_way {
                    fake.fail_once("cuEventRecord", 1, 1);
                }
                say_nothing(fake);
                let asked = fake.calls("cuStreamSynchronize");
                let load = scope.spawn(move || copied(Direction::Load, fence, 0));
                // A load that could be submitted only in part is waited for at once. The store is submitted after that has begun.
                while half_way && fake.calls("cuStreamSynchronize") == asked {
                    std::thread::yield_now();
                }
                let store = copied(Direction::Store, Fence::none(), SHARD);
                assert!(matches!(store, Err(CopyError::Unended(_))), "{store:?}");
                assert!(!load.is_finished(), "the load was given up as well");
                fake.reset();
                let loaded = load.join().unwrap();
                assert_eq!(loaded.is_ok(), !half_way, "{loaded:?}");
                assert!(!matches!(loaded, Err(CopyError::Unended(_))), "{loaded:?}");
            });
        }
    });
}

fn lose(fake: &Fake, code: i32) {
    let world = World::plain(CopyMode::Staged, 8, 8 * SHARD);
    // Torch's stream is busy for long, so nothing that waits for a fence begins.
    drop(world.written_late(fake, 4, 5_000_000));
    let submit = |at: usize, direction| {
        let blocks = world.cache.blocks(&mut Random::new(at as u64, 0), direction, 1).remove(0);
        world.submit(direction, true, world.fence(), &world.shard(at * SHARD, &blocks)).unwrap()
    };
    let waiting = [submit(0, Direction::Store), submit(1, Direction::Load)];
    let (dropped, mut polled) = (submit(2, Direction::Store), submit(3, Direction::Load));
    std::thread::scope(|scope| {
        let waiting = waiting.map(|transfer| scope.spawn(move || transfer.wait()));
        while fake.calls("cuEventSynchronize") < 2 {
            std::thread::yield_now();
        }
        fake.lose(code);
        for waiting in waiting {
            match waiting.join().unwrap().unwrap_err() {
                CopyError::Unended(GpuError::Call { .. }) if code == 999 => {}
                CopyError::Gpu(GpuError::Call { .. }) if code != 999 => {}
                error => panic!("{error}"),
            }
        }
    });
    while !polled.poll() {
        std::thread::yield_now();
    }
    polled.wait().unwrap_err();
    drop(dropped);
    world.store(true, &world.shard(0, &BLOCKS)).unwrap_err();
    let World { backend, mapped, arena, cache, torch } = world;
    backend.fence(ComputeStream(torch)).unwrap_err();
    backend.prepare(&cache.again()).unwrap_err();
    drop(backend.map_arena(Arena::new(PART).mapping()));
    drop((mapped, backend));
    assert!(arena.is_let_go());
}

#[test]
fn a_lost_device() {
    inside(&[], |fake| lose(fake, 46));
}

#[test]
fn a_device_at_fault() {
    inside(&[], |fake| lose(fake, 700));
}

#[test]
fn a_device_of_which_nothing_is_known() {
    inside(&[], |fake| lose(fake, 999));
}

#[test]
fn a_batch_of_nothing() {
    inside(&[], |_| {
        let cache = Cache::plain(1, 64, 1, 1);
        for mode in FORCED {
            let backend = backend(mode);
            for direction in DIRECTIONS {
                let mut transfer =
                    backend.submit(batch(direction, &cache, true, Fence::none(), &[])).unwrap();
                assert!(transfer.poll());
                assert_eq!(transfer.wait().unwrap().checksums, []);
            }
        }
    });
}

/// Collects the warnings of this process from now on.
fn warnings() -> Arc<Mutex<Vec<String>>> {
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
        self.0.lock().unwrap().push(format!("{event:?}"));
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}
