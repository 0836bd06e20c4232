//! A transfer comes after its fence, and waits for nothing else. Without the ordering the same tests find wrong bytes.

use crate::inside;
use crate::support::calls::{self, FAR_LATER_US, LATE_US};
use crate::support::fake::{Fake, pattern};
use crate::support::world::*;
use kvring_gpu_kernels::{ComputeStream, CopyBackend, CopyError, CopyMode, CudaBackend, Direction, GpuError};
use std::ops::Range;

const PAGE: usize = 8192;

fn world(mode: CopyMode) -> World {
    World::new(options(mode), Cache::plain(1, PAGE, 4, 2), 4 * PAGE)
}

/// Blocks 1 and 2 make one shard, 3 and 0 the next.
fn shards(world: &World) -> Shards {
    [world.shard(0, &[1, 2]), world.shard(2 * PAGE, &[3, 0])].concat()
}

/// Has a store copied the bytes that torch's stream had written with this seed?
fn is_stored(world: &World, seed: u32) -> bool {
    let image = pattern(seed, world.cache.bytes);
    let shards = [world.cache.gather(&image, &[1, 2]), world.cache.gather(&image, &[3, 0])];
    world.arena.all.read() == shards.concat()
}

/// The number of stores that copied the bytes which torch's stream had written before their fence.
fn stores(world: &World, fake: &Fake, seeds: Range<u32>, delay_us: u32) -> usize {
    let saw = |seed: &u32| {
        let fence = world.written_late(fake, *seed, delay_us);
        let store = world.submit(Direction::Store, seed.is_multiple_of(2), fence, &shards(world));
        store.unwrap().wait().unwrap();
        let is_right = is_stored(world, *seed);
        assert_eq!(calls::finish(world.torch as _), None);
        is_right
    };
    seeds.filter(saw).count()
}

/// The number of readers on torch's stream, put there before the fence, that found the bytes from before the load.
fn loads(world: &World, fake: &Fake, seeds: Range<u32>, delay_us: u32) -> usize {
    let kept = |seed: &u32| {
        let mut rng = Random::new(u64::from(*seed), 0);
        let (cache, arena) = (&world.cache, world.arena.all);
        let checksum = seed.is_multiple_of(2);
        let round = Round::new(&mut rng, cache, arena, Direction::Load, checksum, vec![0, 2 * PAGE]);
        let mut found = vec![0; cache.bytes];
        let into = found.as_mut_ptr();
        // SAFETY: `found` lives until the stream has done its work, below.
        assert_eq!(unsafe { fake.read(world.torch, cache.address, cache.bytes, into, delay_us) }, 0);
        let done = world.backend.submit(round.batch(world.fence())).unwrap().wait().unwrap();
        assert_eq!(calls::finish(world.torch as _), None);
        round.check("behind a reader", Some(done));
        found == round.before
    };
    seeds.filter(kept).count()
}

#[test]
fn transfers_come_after_their_fence() {
    inside(&[], |fake| {
        for mode in FORCED {
            let world = world(mode);
            assert_eq!(stores(&world, fake, 0..60, LATE_US / 8), 60, "{mode}");
            assert_eq!(loads(&world, fake, 100..160, LATE_US / 8), 60, "{mode}");
            let legacy_default_stream = World { torch: 0, ..world };
            assert_eq!(stores(&legacy_default_stream, fake, 200..220, LATE_US / 8), 20, "{mode}");
            assert_eq!(loads(&legacy_default_stream, fake, 300..320, LATE_US / 8), 20, "{mode}");
        }
    });
}

/// Without registration the driver copies through buffers of its own.
#[test]
fn so_they_do_where_nothing_is_registered() {
    inside(&[], |fake| {
        fake.fail("cuMemHostRegister", 1, 1);
        for mode in FORCED {
            let world = World::unregistered(options(mode), Cache::plain(1, PAGE, 4, 2), 4 * PAGE);
            assert_eq!(stores(&world, fake, 0..30, LATE_US / 8), 30, "{mode}");
            assert_eq!(loads(&world, fake, 100..130, LATE_US / 8), 30, "{mode}");
            assert_eq!(world.mapped.registered_bytes(), 0);
        }
    });
}

#[test]
fn without_the_wait_bytes_are_wrong() {
    inside(&[], |fake| {
        for mode in FORCED {
            let world = world(mode);
            fake.ignore("cuStreamWaitEvent");
            let (stores, loads) =
                (stores(&world, fake, 0..10, LATE_US), loads(&world, fake, 100..110, LATE_US));
            assert!(stores < 10 && loads < 10, "{mode}: {stores} and {loads} of 10 were right");
            fake.reset();
        }
    });
}

#[test]
fn what_comes_after_the_fence_is_not_waited_for() {
    inside(&[], |fake| {
        for mode in FORCED {
            let world = world(mode);
            let elsewhere = calls::device(64);
            let fence = world.fence();
            assert_eq!(fake.fill(world.torch, elsewhere, 64, 1, 5 * FAR_LATER_US), 0);
            world.submit(Direction::Store, true, fence, &shards(&world)).unwrap().wait().unwrap();
            assert_eq!(calls::read_device(elsewhere, 64), [0; 64], "{mode}: it waited for what came later");
            assert_eq!(calls::finish(world.torch as _), None);
            assert_eq!(calls::read_device(elsewhere, 64), pattern(1, 64));
        }
    });
}

#[test]
fn two_batches_of_one_fence_and_none_of_the_next() {
    inside(&[], |fake| {
        let world = world(CopyMode::Staged);
        let fence = world.written_late(fake, 9, LATE_US);
        // The event of this second fence is used again, for an idle stream. The first fence must not come sooner by that.
        drop(world.fence());
        let submit = |shard| world.submit(Direction::Store, false, fence.clone(), shard).unwrap();
        let transfers: Vec<_> = shards(&world).chunks(1).map(submit).collect();
        drop(fence.clone());
        let idle = ComputeStream(calls::stream() as u64);
        for _ in 0..5 {
            drop(world.backend.fence(idle).unwrap());
        }
        for transfer in transfers {
            transfer.wait().unwrap();
        }
        assert!(is_stored(&world, 9));
    });
}

#[test]
fn a_thread_that_is_not_in_the_context_is_told_so() {
    inside(&[], |fake| {
        let world = world(CopyMode::Staged);
        let store = || world.store(true, &shards(&world));
        // A fresh thread, as all threads are but torch's.
        let thread = || {
            store().unwrap();
            fake.ignore("cuCtxPushCurrent");
            fake.ignore("cuCtxSetCurrent");
            let error = store().unwrap_err();
            let is_told = matches!(error, CopyError::Unended(GpuError::Call { code: 201, .. }));
            assert!(is_told, "without its context: {error}");
            fake.reset();
            store().unwrap();
        };
        std::thread::scope(|scope| scope.spawn(thread).join().unwrap());
    });
}

#[test]
fn no_copy_crosses_the_border_of_two_registrations() {
    inside(&[], |_| {
        let cache = Cache::plain(1, PAGE, 4, 2);
        let store = |backend: &CudaBackend, arena: &Arena| {
            let shards = [(arena.at(PART - PAGE / 2), vec![0, 2])];
            let store = batch(Direction::Store, &cache, false, kvring_gpu_kernels::Fence::none(), &shards);
            backend.submit(store).and_then(|transfer| transfer.wait())
        };
        // A backend that does not know of two registrations makes a copy across their border, which the driver refuses.
        let unknown = Arena::new(2 * PART);
        assert_eq!(calls::register(unknown.at(0).cast(), PART), None);
        assert_eq!(calls::register(unknown.at(PART).cast(), PART), None);
        let error = store(&backend(CopyMode::Batch), &unknown).unwrap_err();
        assert!(matches!(error, CopyError::Gpu(GpuError::Call { code: 1, .. })), "{error}");
        // A backend that has registered the arena itself divides copies at the borders.
        for mode in FORCED {
            let (backend, arena) = (backend(mode), Arena::new(2 * PART));
            let mapped = backend.map_arena(arena.mapping());
            until_registered(&mapped, 2 * PART);
            let image = cache.renew(&mut Random::new(3, 0));
            store(&backend, &arena).unwrap();
            let shard = arena.all.part(PART - PAGE / 2, 2 * PAGE).read();
            assert!(shard == cache.gather(&image, &[0, 2]), "{mode}");
        }
    });
}
