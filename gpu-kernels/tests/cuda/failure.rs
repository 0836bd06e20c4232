//! Drivers, devices and memory that are missing or fail: the backend gives typed errors, and takes another way if there is one.

use crate::support::calls;
use crate::support::fake::{Fake, pattern};
use crate::world::*;
use kvring_gpu_kernels::{
    ComputeStream, CopyBackend, CopyError, CopyMode, CudaBackend, Direction, Fence, GpuError, GpuOptions,
    Memory, PagedKv, Plane, probe,
};
use std::sync::Arc;

const STAGING_MIN: usize = 256 << 10;

fn new(mode: CopyMode) -> GpuError {
    match CudaBackend::new(options(mode)) {
        Ok(_) => panic!("there is a backend"),
        Err(error) => error,
    }
}

#[test]
fn no_device() {
    inside("failure::no_device", &[("FAKE_CUDA_DEVICES", "0")], |_| {
        assert_eq!(probe().unwrap_err(), GpuError::NoDevice);
        assert_eq!(new(CopyMode::Auto), GpuError::NoDevice);
    });
}

#[test]
fn a_stub() {
    inside("failure::a_stub", &[("FAKE_CUDA_STUB", "1")], |_| {
        assert_eq!(probe().unwrap_err(), GpuError::StubLibrary);
    });
}

#[test]
fn a_driver_that_is_too_old() {
    inside("failure::a_driver_that_is_too_old", &[("FAKE_CUDA_VERSION", "11080")], |_| {
        let error = probe().unwrap_err();
        assert!(matches!(error, GpuError::DriverTooOld { found: 11080, .. }), "{error}");
        assert!(error.to_string().contains("12.0 or later, got 11.8"), "{error}");
    });
}

#[test]
fn devices_are_described_and_numbered() {
    inside("failure::devices_are_described_and_numbered", &[("FAKE_CUDA_DEVICES", "2")], |fake| {
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
    inside("failure::kernels_that_do_not_load", &[("FAKE_CUDA_PTX_MAX", "8.0")], |_| {
        for mode in [CopyMode::Staged, CopyMode::ZeroCopy] {
            let error = new(mode);
            assert!(matches!(error, GpuError::Mode { asked, .. } if asked == mode.as_str()), "{error}");
            assert!(error.to_string().contains("570"), "{error}");
        }
        let _context = calls::context();
        let lines = warnings();
        let backend = backend(CopyMode::Auto);
        assert_eq!(lines.lock().unwrap().len(), 1, "{lines:?}");
        let cache = Cache::plain(2, 4096, 6, 2);
        let arena = Arena::new(PART);
        let _mapped = backend.map_arena(arena.mapping(Arc::new(())));
        let shards = [(arena.at(0), vec![5, 1])];
        let error = copied(&backend, Direction::Store, &cache, true, &shards).unwrap_err();
        assert!(
            matches!(&error, CopyError::Gpu(GpuError::Mode { asked: "checksum", why }) if why.contains("570")),
            "{error}"
        );
        assert_eq!(backend.describe(&cache.paged), "stores by batch; loads by batch");
        let image = cache.all.renew(&mut Rng(1));
        copied(&backend, Direction::Store, &cache, false, &shards).unwrap();
        assert!(arena.all.read()[..cache.shard_bytes()] == cache.gather(&image, &[5, 1]));
    });
}

fn refused(backend: &CudaBackend, paged: PagedKv) -> GpuError {
    match backend.prepare(&Arc::new(paged)) {
        Err(CopyError::Gpu(error)) => error,
        other => panic!("{other:?}"),
    }
}

fn paged(base: u64, stride: usize, page: usize, blocks: u32) -> PagedKv {
    let plane = Plane { base: base as *mut u8, block_stride: stride, page_bytes: page };
    // SAFETY: it is refused.
    unsafe { PagedKv::new(vec![plane], blocks, 1) }.unwrap()
}

#[test]
fn memory_that_is_not_the_device_s() {
    inside("failure::memory_that_is_not_the_device_s", &[("FAKE_CUDA_DEVICES", "2")], |fake| {
        let _context = calls::context();
        let backend = backend(CopyMode::Auto);
        let here = calls::device(4096 * 4);
        let other = cudarc::driver::CudaContext::new(1).unwrap();
        let there = calls::device(4096 * 4);
        drop(other);
        let context = calls::context();
        context.bind_to_thread().unwrap();
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
            let error =
                refused(&backend, paged(base, stride, 16.max(stride.min(4096)), blocks).on(Memory::Cuda(0)));
            assert!(
                matches!(&error, GpuError::Memory { group: 0, plane: 0, address, device: 0, got, .. }
                    if got.contains(why) && *address == base),
                "{base:#x}, {stride} × {blocks}: {error}"
            );
        }
        // A cache that says that it is in host memory, or in that of another device.
        for memory in [Memory::Host, Memory::Cuda(1)] {
            let error = backend.prepare(&Arc::new(paged(here, 4096, 4096, 4).on(memory))).unwrap_err();
            assert!(matches!(error, CopyError::OtherMemory { .. }), "{error}");
        }
        backend.prepare(&Arc::new(paged(here, 4096, 4096, 4).on(Memory::Cuda(0)))).unwrap();
        assert_eq!(fake.counts().registrations, before.registrations);
    });
}

/// Takes all device memory but so much.
fn leave(bytes: usize) -> u64 {
    let (free, _) = cudarc::driver::result::mem_get_info().unwrap();
    calls::device(free - bytes)
}

fn free(address: u64) {
    // SAFETY: not used any more.
    unsafe { cudarc::driver::result::free_sync(address) }.unwrap();
}

/// Copies in both directions, and checks the bytes.
fn check(backend: &CudaBackend, cache: &Cache, arena: &Arena, checksum: bool) {
    let mut rng = Rng(77);
    for direction in [Direction::Store, Direction::Load] {
        let (mut image, mut shared) = (cache.all.renew(&mut rng), arena.all.renew(&mut rng));
        let blocks = cache.blocks(&mut rng, direction, 1).remove(0);
        let shards = [(arena.at(0), blocks.clone())];
        let done = copied(backend, direction, cache, checksum, &shards).unwrap();
        let bytes = cache.shard_bytes();
        match direction {
            Direction::Store => shared[..bytes].copy_from_slice(&cache.gather(&image, &blocks)),
            Direction::Load => cache.scatter(&mut image, &shared[..bytes], &blocks),
        }
        assert!(cache.all.read() == image && arena.all.read() == shared, "{direction:?}");
        if checksum {
            assert_eq!(done.checksums, cache.sums(direction, &shards), "{direction:?}");
        }
    }
}

#[test]
fn no_memory_for_staging_buffers() {
    inside("failure::no_memory_for_staging_buffers", &[("FAKE_CUDA_DELAY_US", "0")], |fake| {
        let _context = calls::context();
        let lines = warnings();
        let cache = Cache::plain(3, 8192, 40, 30);
        let arena = Arena::new(cache.shard_bytes());
        let ballast = leave(100 << 10);
        let error = backend(CopyMode::Staged).prepare(&cache.paged).unwrap_err();
        assert!(matches!(error, CopyError::Gpu(GpuError::Mode { asked: "staged", .. })), "{error}");
        lines.lock().unwrap().clear();
        let backend = backend(CopyMode::Auto);
        let mapped = backend.map_arena(arena.mapping(Arc::new(())));
        until("registered", || mapped.registered_bytes() == arena.all.len as u64);
        backend.prepare(&cache.paged).unwrap();
        assert_eq!(backend.describe(&cache.paged), "stores by batch; loads by batch");
        let others: Vec<_> = (0..3).map(|_| Arc::new((*cache.paged).clone())).collect();
        others.iter().for_each(|other| backend.prepare(other).unwrap());
        let said = lines.lock().unwrap().clone();
        assert_eq!(said.len(), 1, "{said:#?}");
        // Without staging buffers kernels sum skipped blocks in the arena. They cannot do so here, because the shard lies in
        // several registrations.
        check(&backend, &cache, &arena, false);
        let launches = fake.calls("cuLaunchKernel");
        let shards = [(arena.at(0), cache.blocks(&mut Rng(5), Direction::Store, 1).remove(0))];
        let done = copied(&backend, Direction::Store, &cache, true, &shards).unwrap();
        assert_eq!(done.checksums, cache.sums(Direction::Store, &shards));
        assert!(fake.calls("cuLaunchKernel") > launches);
        let mut blocks = shards[0].1.clone();
        blocks[7] = kvring_gpu_kernels::SKIP;
        (0..30).filter(|at| *at != 7).for_each(|at| blocks[at] = at as u32);
        let error = copied(&backend, Direction::Load, &cache, true, &[(arena.at(0), blocks)]).unwrap_err();
        assert_eq!(error, CopyError::Gpu(GpuError::NoPlaceForChecksum));
        free(ballast);
        // There is device memory again.
        let later = Arc::new((*cache.paged).clone());
        backend.prepare(&later).unwrap();
        assert_ne!(backend.describe(&later), "");
    });
}

/// Caches that were prepared before keep their windows, so staging buffers must not get shorter, or be freed.
#[test]
fn a_cache_that_comes_later_does_not_take_staging_buffers_away() {
    const NAME: &str = "failure::a_cache_that_comes_later_does_not_take_staging_buffers_away";
    inside(NAME, &[("FAKE_CUDA_DELAY_US", "20")], |fake| {
        let _context = calls::context();
        let small = Cache::plain(3, 8192, 40, 16);
        let large = Cache::plain(3, 65536, 20, 16);
        let arena = Arena::new(large.shard_bytes());
        let backend = backend(CopyMode::Staged);
        let _mapped = backend.map_arena(arena.mapping(Arc::new(())));
        check(&backend, &small, &arena, true);
        // Room for the table, and for buffers that are no longer than those there are.
        for room in [STAGING_MIN / 2, 3 * STAGING_MIN, 12 * STAGING_MIN] {
            let ballast = leave(room);
            // Fails as if somebody took freed memory at once.
            fake.fail("cuMemAlloc", 2, 2);
            backend.prepare(&Arc::new((*large.paged).clone())).unwrap();
            fake.reset();
            check(&backend, &small, &arena, true);
            check(&backend, &large, &arena, true);
            free(ballast);
        }
        let again = Arc::new((*large.paged).clone());
        backend.prepare(&again).unwrap();
        check(&backend, &small, &arena, true);
        check(&backend, &large, &arena, true);
    });
}

#[test]
fn no_memory_for_the_table() {
    inside("failure::no_memory_for_the_table", &[], |fake| {
        let _context = calls::context();
        let cache = Cache::plain(3, 8192, 40, 30);
        let backend = backend(CopyMode::Batch);
        let before = fake.counts();
        let ballast = leave(100);
        let error = backend.prepare(&cache.paged).unwrap_err();
        assert!(matches!(&error, CopyError::Gpu(error) if error.is_out_of_memory()), "{error}");
        free(ballast);
        assert_eq!(fake.counts(), before);
        backend.prepare(&cache.paged).unwrap();
    });
}

#[test]
fn a_part_that_cannot_be_registered() {
    inside("failure::a_part_that_cannot_be_registered", &[("FAKE_CUDA_DELAY_US", "20")], |fake| {
        let _context = calls::context();
        let lines = warnings();
        let cache = Cache::plain(1, 8192, 40, 20);
        for part in 1..=4 {
            fake.fail("cuMemHostRegister", 2, part);
            let arena = Arena::new(4 * PART);
            let backend = backend(CopyMode::ZeroCopy);
            let mapped = backend.map_arena(arena.mapping(Arc::new(())));
            until("it was tried", || lines.lock().unwrap().len() as i32 == part);
            assert_eq!(mapped.registered_bytes(), (part as u64 - 1) * PART as u64);
            assert!(lines.lock().unwrap().last().unwrap().contains("ulimit"));
            check(&backend, &cache, &arena, true);
            fake.reset();
        }
        assert_eq!(fake.counts().registrations, 0);
    });
}

/// When `submit` returns, a batch that has failed half-way has ended: nothing writes any more.
#[test]
fn a_batch_that_fails_half_way_has_ended() {
    inside("failure::a_batch_that_fails_half_way_has_ended", &[], |fake| {
        let _context = calls::context();
        let torch = calls::stream() as u64;
        let cache = Cache::plain(2, 8192, 40, 8);
        let arena = Arena::new(6 * cache.shard_bytes());
        for (mode, call) in [
            (CopyMode::Batch, "cuEventRecord"),
            (CopyMode::Staged, "cuMemcpyDtoHAsync"),
            (CopyMode::Staged, "cuLaunchKernel"),
            (CopyMode::ZeroCopy, "cuLaunchKernel"),
        ] {
            let backend = backend(mode);
            let mapped = backend.map_arena(arena.mapping(Arc::new(())));
            backend.prepare(&cache.paged).unwrap();
            until("registered", || mapped.registered_bytes() == arena.all.len as u64);
            let before = arena.all.renew(&mut Rng(5));
            assert_eq!(fake.fill(torch, cache.all.at as u64, cache.all.len, 8, 100_000), 0);
            let fence = backend.fence(ComputeStream(torch)).unwrap();
            fake.fail_once(call, 1, if call == "cuEventRecord" { 1 } else { 4 });
            let blocks = cache.blocks(&mut Rng(6), Direction::Store, 6);
            let shards: Vec<_> =
                blocks.into_iter().enumerate().map(|(k, b)| (arena.at(k * cache.shard_bytes()), b)).collect();
            let outcome = backend.submit(batch(Direction::Store, &cache, false, fence, &shards));
            let then = arena.all.read();
            let error = outcome.err().unwrap();
            assert!(matches!(error, CopyError::Gpu(GpuError::Call { code: 1, .. })), "{error}");
            // A part of the batch had been put on lanes, and has been copied.
            assert!(then != before, "{mode} {call}");
            assert!(cache.all.read() == pattern(8, cache.all.len));
            std::thread::sleep(std::time::Duration::from_millis(150));
            assert!(arena.all.read() == then, "{mode} {call}: it went on");
            fake.reset();
            check(&backend, &cache, &arena, true);
        }
    });
}

/// Looking at events fails for a while. The transfer is still in flight, and succeeds in the end.
#[test]
fn an_error_of_looking_is_not_the_end_of_a_copy() {
    inside("failure::an_error_of_looking_is_not_the_end_of_a_copy", &[], |fake| {
        let _context = calls::context();
        let torch = calls::stream() as u64;
        let cache = Cache::plain(2, 8192, 40, 8);
        let arena = Arena::new(cache.shard_bytes());
        let backend = backend(CopyMode::Staged);
        let _mapped = backend.map_arena(arena.mapping(Arc::new(())));
        backend.prepare(&cache.paged).unwrap();
        let shards = [(arena.at(0), vec![1, 2, 3, 4, 5, 6, 7, 8])];
        for (round, code) in [1, 2, 999, 1].into_iter().enumerate() {
            let seed = 20 + round as u32;
            assert_eq!(fake.fill(torch, cache.all.at as u64, cache.all.len, seed, 150_000), 0);
            let fence = backend.fence(ComputeStream(torch)).unwrap();
            let mut transfer = backend.submit(batch(Direction::Store, &cache, true, fence, &shards)).unwrap();
            fake.fail("cuEventQuery", code, 1);
            fake.fail("cuEventSynchronize", code, 1);
            match round {
                // Polling holds nobody up.
                0 => assert!(!transfer.poll() && !transfer.poll()),
                1 => drop(transfer),
                _ => {
                    std::thread::scope(|scope| {
                        let waits = scope.spawn(|| transfer.wait());
                        std::thread::sleep(std::time::Duration::from_millis(20));
                        fake.reset();
                        waits.join().unwrap().unwrap();
                    });
                    let all = pattern(seed, cache.all.len);
                    assert!(arena.all.read() == cache.gather(&all, &shards[0].1), "{code}");
                    continue;
                }
            }
            if round == 1 {
                assert!(arena.all.read() == cache.gather(&pattern(seed, cache.all.len), &shards[0].1));
            }
            fake.reset();
        }
    });
}

/// The driver gives no answer for so long that the backend stops waiting, and then the copy runs after all. So the slots that it
/// was to write must not be given to anybody else.
#[test]
fn a_copy_that_is_not_known_to_have_ended_says_so() {
    inside("failure::a_copy_that_is_not_known_to_have_ended_says_so", &[], |fake| {
        let _context = calls::context();
        let torch = calls::stream() as u64;
        let cache = Cache::plain(2, 8192, 40, 8);
        let arena = Arena::new(cache.shard_bytes());
        let backend = backend(CopyMode::Staged);
        let mapped = backend.map_arena(arena.mapping(Arc::new(())));
        until("registered", || mapped.registered_bytes() == arena.all.len as u64);
        backend.prepare(&cache.paged).unwrap();
        let shards = [(arena.at(0), vec![1, 2, 3, 4, 5, 6, 7, 8])];
        for half_way in [false, true] {
            let before = arena.all.renew(&mut Rng(5));
            assert_eq!(fake.fill(torch, cache.all.at as u64, cache.all.len, 6, 4_000_000), 0);
            let fence = backend.fence(ComputeStream(torch)).unwrap();
            if half_way {
                fake.fail_once("cuEventRecord", 1, 1);
            }
            for call in ["cuEventQuery", "cuEventSynchronize", "cuStreamSynchronize"] {
                fake.fail(call, 999, 1);
            }
            let store = batch(Direction::Store, &cache, true, fence, &shards);
            let error = backend.submit(store).and_then(|transfer| transfer.wait()).unwrap_err();
            assert!(matches!(error, CopyError::Unended(GpuError::Call { .. })), "{error}");
            assert!(arena.all.read() == before, "it has yet to begin");
            fake.reset();
            let image = pattern(6, cache.all.len);
            let shard = cache.gather(&image, &shards[0].1);
            until("it was written all the same", || arena.all.read() == shard);
        }
    });
}

/// When the driver has given no answer for a while, the backend gives a store up: nobody gets the store's slots. It goes on
/// asking about a load: until the load's end is known its blocks cannot be given to anybody.
#[test]
fn a_load_is_asked_about_for_longer_than_a_store() {
    inside("failure::a_load_is_asked_about_for_longer_than_a_store", &[], |fake| {
        let _context = calls::context();
        let torch = calls::stream() as u64;
        let cache = Cache::plain(2, 8192, 40, 8);
        let arena = Arena::new(2 * cache.shard_bytes());
        let load_patience = std::time::Duration::from_secs(200);
        let backend = CudaBackend::new(GpuOptions { load_patience, ..options(CopyMode::Staged) }).unwrap();
        let mapped = backend.map_arena(arena.mapping(Arc::new(())));
        until("registered", || mapped.registered_bytes() == arena.all.len as u64);
        backend.prepare(&cache.paged).unwrap();
        let shards = |at| [(arena.at(at * cache.shard_bytes()), vec![1, 2, 3, 4, 5, 6, 7, 8])];
        for half_way in [false, true] {
            std::thread::scope(|scope| {
                let fence = backend.fence(ComputeStream(torch)).unwrap();
                if half_way {
                    fake.fail_once("cuEventRecord", 1, 1);
                }
                for call in ["cuEventQuery", "cuEventSynchronize", "cuStreamSynchronize"] {
                    fake.fail(call, 999, 1);
                }
                let (backend, asked) = (&backend, fake.calls("cuStreamSynchronize"));
                let load = batch(Direction::Load, &cache, true, fence, &shards(0));
                let load = scope.spawn(move || backend.submit(load).and_then(|transfer| transfer.wait()));
                // A load that could be submitted only in part is waited for at once. The store is submitted after that has begun.
                while half_way && fake.calls("cuStreamSynchronize") == asked {
                    std::thread::yield_now();
                }
                let store = batch(Direction::Store, &cache, true, Fence::none(), &shards(1));
                let store = backend.submit(store).and_then(|transfer| transfer.wait());
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
    let _context = calls::context();
    let torch = calls::stream() as u64;
    let cache = Cache::plain(2, 8192, 40, 8);
    let arena = Arena::new(8 * cache.shard_bytes());
    let kept = Arc::new(());
    let backend = backend(CopyMode::Staged);
    let mapped = backend.map_arena(arena.mapping(kept.clone()));
    backend.prepare(&cache.paged).unwrap();
    assert_eq!(fake.fill(torch, cache.all.at as u64, cache.all.len, 4, 5_000_000), 0);
    let submit = |at: usize, direction| {
        let fence = backend.fence(ComputeStream(torch)).unwrap();
        let blocks = cache.blocks(&mut Rng(at as u64), direction, 1).remove(0);
        let shards = [(arena.at(at * cache.shard_bytes()), blocks)];
        until("registered", || mapped.registered_bytes() == arena.all.len as u64);
        backend.submit(batch(direction, &cache, true, fence, &shards)).unwrap()
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
    let shards = [(arena.at(0), vec![0, 1, 2, 3, 4, 5, 6, 7])];
    copied(&backend, Direction::Store, &cache, true, &shards).unwrap_err();
    backend.fence(ComputeStream(torch)).unwrap_err();
    backend.prepare(&Arc::new((*cache.paged).clone())).unwrap_err();
    drop(backend.map_arena(Arena::new(PART).mapping(Arc::new(()))));
    drop((mapped, backend));
    assert_eq!(Arc::strong_count(&kept), 1, "the arena is let go");
}

#[test]
fn a_lost_device() {
    inside("failure::a_lost_device", &[], |fake| lose(fake, 0));
}

#[test]
fn a_device_at_fault() {
    inside("failure::a_device_at_fault", &[], |fake| lose(fake, 700));
}

#[test]
fn a_device_of_which_nothing_is_known() {
    inside("failure::a_device_of_which_nothing_is_known", &[], |fake| lose(fake, 999));
}

#[test]
fn a_batch_of_nothing() {
    inside("failure::a_batch_of_nothing", &[], |_| {
        let _context = calls::context();
        let cache = Cache::plain(1, 64, 1, 1);
        for mode in [CopyMode::Batch, CopyMode::Staged, CopyMode::ZeroCopy] {
            let backend = backend(mode);
            for direction in [Direction::Store, Direction::Load] {
                let empty = batch(direction, &cache, true, Fence::none(), &[]);
                let mut transfer = backend.submit(empty).unwrap();
                assert!(transfer.poll());
                assert_eq!(transfer.wait().unwrap().checksums, []);
            }
        }
    });
}
