//! Everything that a backend makes is given back.

use crate::support::calls;
use crate::support::fake::{Counts, pattern};
use crate::world::*;
use kvring_gpu_kernels::{ComputeStream, CopyBackend, CopyMode, Direction};
use std::sync::Arc;

#[test]
fn nothing_is_left() {
    inside("leaks::nothing_is_left", &[], |fake| {
        let context = calls::context();
        for mode in CopyMode::ALL {
            let cache = Cache::plain(2, 8192, 40, 8);
            let torch = calls::stream() as u64;
            let arena = Arena::new(4 * cache.shard_bytes());
            let kept = Arc::new(());
            let before = fake.counts();
            let backend = backend(mode);
            let mapped = backend.map_arena(arena.mapping(kept.clone()));
            until("registered", || mapped.registered_bytes() == arena.all.len as u64);
            let submit = |at: usize, direction| {
                let fence = backend.fence(ComputeStream(torch)).unwrap();
                let blocks = cache.blocks(&mut Rng(at as u64), direction, 1).remove(0);
                let shards = [(arena.at(at * cache.shard_bytes()), blocks)];
                backend.submit(batch(direction, &cache, true, fence, &shards)).unwrap()
            };
            let transfers: Vec<_> =
                (0..4).map(|at| submit(at, [Direction::Store, Direction::Load][at % 2])).collect();
            // Transfers outlive everything else, and the backend waits for them.
            let unused = backend.fence(ComputeStream(torch)).unwrap();
            drop(mapped);
            assert_eq!(fake.counts().registrations as usize, arena.all.len.div_ceil(PART), "{mode}: in use");
            drop(backend);
            let between = fake.counts();
            assert_eq!((between.streams, between.modules), (before.streams, before.modules), "{mode}");
            for mut transfer in transfers {
                assert!(transfer.poll(), "{mode}: it has ended");
                transfer.wait().unwrap();
            }
            drop(unused);
            assert_eq!(fake.counts(), before, "{mode}");
            assert_eq!(Arc::strong_count(&kept), 1, "{mode}");
        }
        drop(context);
    });
}

#[test]
fn layouts_that_are_gone_are_forgotten() {
    inside("leaks::layouts_that_are_gone_are_forgotten", &[], |fake| {
        let _context = calls::context();
        let backend = backend(CopyMode::Staged);
        let arena = Arena::new(PART);
        let mut most = 0;
        for round in 0..50 {
            let cache = Cache::plain(1 + round % 3, 512, 8, 2);
            let shards = [(arena.at(0), vec![1, 2])];
            let image = cache.all.renew(&mut Rng(round as u64));
            copied(&backend, Direction::Store, &cache, false, &shards).unwrap();
            // With another cache's table it would copy other pages.
            assert!(arena.all.read()[..cache.shard_bytes()] == cache.gather(&image, &[1, 2]));
            most = most.max(fake.counts().allocations);
        }
        // Six staging buffers, a cache, its table, and that of the one before.
        assert!(most <= 9, "{most}");
    });
}

#[test]
fn an_arena_goes_when_its_last_transfer_has_ended() {
    inside("leaks::an_arena_goes_when_its_last_transfer_has_ended", &[], |fake| {
        let _context = calls::context();
        let torch = calls::stream() as u64;
        let cache = Cache::plain(2, 8192, 40, 2);
        let arena = Arena::new(2 * PART);
        for mode in [CopyMode::Batch, CopyMode::Staged, CopyMode::ZeroCopy] {
            let kept = Arc::new(());
            let backend = backend(mode);
            let mapped = backend.map_arena(arena.mapping(kept.clone()));
            until("registered", || mapped.registered_bytes() == arena.all.len as u64);
            assert_eq!(fake.fill(torch, cache.all.at as u64, cache.all.len, 3, calls::FAR_LATER_US), 0);
            let fence = backend.fence(ComputeStream(torch)).unwrap();
            let shards = [(arena.at(PART - 8192), vec![7, 9])];
            let mut transfer =
                backend.submit(batch(Direction::Store, &cache, false, fence, &shards)).unwrap();
            drop(mapped);
            std::thread::sleep(std::time::Duration::from_millis(10));
            assert!(!transfer.poll());
            assert!(fake.counts().registrations == 2 && Arc::strong_count(&kept) > 1, "{mode}");
            transfer.wait().unwrap();
            until("unregistered", || fake.counts().registrations == 0 && Arc::strong_count(&kept) == 1);
            // And once more, at the same place.
            let mapped = backend.map_arena(arena.mapping(kept.clone()));
            until("registered again", || mapped.registered_bytes() == arena.all.len as u64);
        }
        assert_eq!(fake.counts().registrations, 0);
    });
}

#[test]
fn a_backend_goes_while_an_arena_is_being_registered() {
    inside("leaks::a_backend_goes_while_an_arena_is_being_registered", &[], |fake| {
        let _context = calls::context();
        let before = Counts { ..fake.counts() };
        let folder = std::env::temp_dir().join(format!("kvring-lock-{}", std::process::id()));
        std::fs::write(&folder, "").unwrap();
        let lock = std::fs::File::open(&folder).unwrap();
        lock.lock().unwrap();
        for how in 0..6 {
            let (arena, kept) = (Arena::new(8 * PART), Arc::new(()));
            // The arena has no memory yet, or somebody else holds the lock, or half of it has memory.
            arena.grow(if how % 3 == 0 { 0 } else { 4 * PART as u64 });
            let mut mapping = arena.mapping(kept.clone());
            mapping.lock = (how % 3 == 1).then(|| folder.clone());
            let backend = backend(CopyMode::Staged);
            let mapped = backend.map_arena(mapping);
            if how % 3 == 2 {
                until("half of it", || mapped.registered_bytes() == 4 * PART as u64);
            }
            if how < 3 {
                drop(backend);
                assert_eq!(fake.counts().registrations, 0);
                drop(mapped);
            } else {
                drop(mapped);
                until("it is let go", || Arc::strong_count(&kept) == 1);
                drop(backend);
            }
            assert_eq!(Arc::strong_count(&kept), 1);
            assert_eq!(fake.counts(), before);
        }
        // A thread that waits for the lock takes it when it is free.
        let arena = Arena::new(2 * PART);
        let mut mapping = arena.mapping(Arc::new(()));
        mapping.lock = Some(folder.clone());
        let backend = backend(CopyMode::Batch);
        let mapped = backend.map_arena(mapping);
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert_eq!(mapped.registered_bytes(), 0);
        lock.unlock().unwrap();
        until("registered", || mapped.registered_bytes() == 2 * PART as u64);
        drop(mapped);
        // A process that never gives the lock back does not keep others from registering for good.
        lock.lock().unwrap();
        let mut mapping = Arena::new(9 * PART).mapping(Arc::new(()));
        mapping.lock = Some(folder.clone());
        let mapped = backend.map_arena(mapping);
        until("registered all the same", || mapped.registered_bytes() == 9 * PART as u64);
        std::fs::remove_file(&folder).unwrap();
    });
}

/// The pages are such that kernels cannot copy them, so there are no staging buffers: freeing those would wait as well.
#[test]
fn a_backend_that_goes_waits_for_what_it_copies() {
    inside("leaks::a_backend_that_goes_waits_for_what_it_copies", &[], |fake| {
        let _context = calls::context();
        let torch = calls::stream() as u64;
        let cache = Cache::plain(2, 8191, 40, 2);
        let arena = Arena::new(2 * PART);
        let backend = backend(CopyMode::Batch);
        let mapped = backend.map_arena(arena.mapping(Arc::new(())));
        until("registered", || mapped.registered_bytes() == arena.all.len as u64);
        assert_eq!(fake.fill(torch, cache.all.at as u64, cache.all.len, 3, calls::FAR_LATER_US), 0);
        let fence = backend.fence(ComputeStream(torch)).unwrap();
        let shards = [(arena.at(PART - 8192), vec![7, 9])];
        let mut transfer = backend.submit(batch(Direction::Store, &cache, false, fence, &shards)).unwrap();
        drop(backend);
        assert_eq!(fake.counts().registrations, 0);
        assert!(transfer.poll(), "it has ended");
        transfer.wait().unwrap();
        let all = pattern(3, cache.all.len);
        assert!(arena.all.read()[PART - 8192..][..cache.shard_bytes()] == cache.gather(&all, &shards[0].1));
        assert_eq!(calls::finish(torch as _), None, "nothing was at fault");
    });
}

/// A mapping is announced again while its earlier registrations are still being undone. The driver refuses two registrations of
/// the same memory, and a copy that begins under one that is being undone is a fault that ends the context.
#[test]
fn an_arena_that_is_let_go_and_mapped_again_at_once() {
    inside("leaks::an_arena_that_is_let_go_and_mapped_again_at_once", &[], |fake| {
        let _context = calls::context();
        let torch = calls::stream() as u64;
        let cache = Cache::plain(2, 8192, 40, 2);
        for mode in [CopyMode::Batch, CopyMode::Staged, CopyMode::ZeroCopy] {
            let (arena, kept) = (Arena::new(8 * PART), Arc::new(()));
            let all = arena.all.len as u64;
            let backend = backend(mode);
            backend.prepare(&cache.paged).unwrap();
            // The registering thread sleeps, and notices late that the arena has been dropped.
            arena.grow(all / 2);
            let mapped = backend.map_arena(arena.mapping(kept.clone()));
            until("half of it", || mapped.registered_bytes() == all / 2);
            drop(mapped);
            let mapped = backend.map_arena(arena.mapping(kept.clone()));
            // This copy begins only after all of that.
            assert_eq!(fake.fill(torch, cache.all.at as u64, cache.all.len, 3, calls::FAR_LATER_US), 0);
            let fence = backend.fence(ComputeStream(torch)).unwrap();
            let shards = [(arena.at(0), vec![7, 9])];
            let transfer = backend.submit(batch(Direction::Store, &cache, false, fence, &shards)).unwrap();
            // Once more, with a copy in flight that holds the arena.
            drop(mapped);
            let mapped = backend.map_arena(arena.mapping(kept.clone()));
            transfer.wait().unwrap();
            let image = pattern(3, cache.all.len);
            assert!(arena.all.read()[..cache.shard_bytes()] == cache.gather(&image, &shards[0].1), "{mode}");
            arena.grow(all);
            until("all of it", || mapped.registered_bytes() == all);
            drop(mapped);
            until("it is let go", || Arc::strong_count(&kept) == 1);
            assert_eq!(fake.counts().registrations, 0, "{mode}");
        }
    });
}

/// As after a cold restart of the engine: the earlier arena is unregistered in the background.
#[test]
fn another_arena_is_registered_where_only_one_can_be_locked() {
    let limit = (8 * PART).to_string();
    let env = [("FAKE_CUDA_LOCKED", &*limit)];
    inside("leaks::another_arena_is_registered_where_only_one_can_be_locked", &env, |fake| {
        let _context = calls::context();
        let backend = backend(CopyMode::Batch);
        for _ in 0..4 {
            let (one, other) = (Arena::new(8 * PART), Arena::new(8 * PART));
            let all = one.all.len as u64;
            // The registering thread sleeps, and notices late that the arena has been dropped.
            one.grow(all / 2);
            let mapped = backend.map_arena(one.mapping(Arc::new(())));
            until("half of it", || mapped.registered_bytes() == all / 2);
            drop(mapped);
            let mapped = backend.map_arena(other.mapping(Arc::new(())));
            until("all of it", || mapped.registered_bytes() == all);
            drop(mapped);
        }
        drop(backend);
        assert_eq!(fake.counts().registrations, 0);
    });
}
