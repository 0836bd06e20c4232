//! Everything that a backend makes is given back.

use crate::inside;
use crate::support::calls::{self, FAR_LATER_US};
use crate::support::fake::pattern;
use crate::support::world::*;
use kvring_gpu_kernels::{CopyBackend, CopyMode, Direction};
use std::sync::Arc;

#[test]
fn nothing_is_left() {
    inside(&[], |fake| {
        for mode in CopyMode::ALL {
            let start = fake.counts();
            let world = World::plain(mode, 8, 4 * 2 * PART);
            let submit = |at: usize| {
                let direction = DIRECTIONS[at % 2];
                let blocks = world.cache.blocks(&mut Random::new(at as u64, 0), direction, 1).remove(0);
                let shards = world.shard(at * world.cache.shard_bytes(), &blocks);
                world.submit(direction, true, world.fence(), &shards).unwrap()
            };
            let transfers: Vec<_> = (0..4).map(submit).collect();
            let unused = world.fence();
            // Transfers outlive everything else, and the backend waits for them.
            let World { backend, mapped, arena, cache, torch } = world;
            drop(mapped);
            assert_eq!(fake.counts().registrations as usize, arena.all.len.div_ceil(PART), "{mode}: in use");
            drop(backend);
            // Torch's stream is left.
            let between = fake.counts();
            assert_eq!((between.streams, between.modules), (start.streams + 1, start.modules), "{mode}");
            for mut transfer in transfers {
                assert!(transfer.poll(), "{mode}: it has ended");
                transfer.wait().unwrap();
            }
            drop((unused, cache));
            assert_eq!(calls::destroy(torch as _), None);
            assert_eq!(fake.counts(), start, "{mode}");
            assert!(arena.is_let_go(), "{mode}");
        }
    });
}

#[test]
fn layouts_that_are_gone_are_forgotten() {
    inside(&[], |fake| {
        let backend = backend(CopyMode::Staged);
        let arena = Arena::new(PART);
        let mut most = 0;
        for round in 0..50 {
            // With another cache's table it would copy other pages.
            check(&backend, &Cache::plain(1 + round % 3, 512, 8, 2), &arena, false);
            most = most.max(fake.counts().allocations);
        }
        // Six staging buffers, a cache's table, and that of the one before. (The cache itself has been freed.)
        assert!(most <= 8, "{most}");
    });
}

#[test]
fn an_arena_goes_when_its_last_transfer_has_ended() {
    inside(&[], |fake| {
        for mode in FORCED {
            let world = World::plain(mode, 2, 2 * PART);
            let fence = world.written_late(fake, 3, FAR_LATER_US);
            let shards = world.shard(PART - 8192, &[7, 9]);
            let mut transfer = world.submit(Direction::Store, false, fence, &shards).unwrap();
            let World { backend, mapped, arena, .. } = world;
            drop(mapped);
            std::thread::sleep(std::time::Duration::from_millis(10));
            assert!(!transfer.poll());
            assert!(fake.counts().registrations == 2 && !arena.is_let_go(), "{mode}");
            transfer.wait().unwrap();
            until("unregistered", || fake.counts().registrations == 0 && arena.is_let_go());
            // And once more, at the same place.
            let mapped = backend.map_arena(arena.mapping());
            until_registered(&mapped, arena.all.len);
        }
        assert_eq!(fake.counts().registrations, 0);
    });
}

#[test]
fn a_backend_goes_while_an_arena_is_being_registered() {
    inside(&[], |fake| {
        let before = fake.counts();
        let path = std::env::temp_dir().join(format!("kvring-lock-{}", std::process::id()));
        std::fs::write(&path, "").unwrap();
        let lock = std::fs::File::open(&path).unwrap();
        lock.lock().unwrap();
        for how in 0..6 {
            let arena = Arena::new(8 * PART);
            // The arena has no memory yet, or somebody else holds the lock, or half of it has memory.
            arena.grow(if how % 3 == 0 { 0 } else { 4 * PART });
            let mut mapping = arena.mapping();
            mapping.lock = (how % 3 == 1).then(|| path.clone());
            let backend = backend(CopyMode::Staged);
            let mapped = backend.map_arena(mapping);
            if how % 3 == 2 {
                until_registered(&mapped, 4 * PART);
            }
            if how < 3 {
                drop(backend);
                assert_eq!(fake.counts().registrations, 0);
                drop(mapped);
            } else {
                drop(mapped);
                until("it is let go", || arena.is_let_go());
                drop(backend);
            }
            assert!(arena.is_let_go());
            assert_eq!(fake.counts(), before);
        }
        // A thread that waits for the lock takes it when it is free.
        let backend = backend(CopyMode::Batch);
        let map = |bytes| {
            let mut mapping = Arena::new(bytes).mapping();
            mapping.lock = Some(path.clone());
            backend.map_arena(mapping)
        };
        let mapped = map(2 * PART);
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert_eq!(mapped.registered_bytes(), 0);
        lock.unlock().unwrap();
        until_registered(&mapped, 2 * PART);
        drop(mapped);
        // A process that never gives the lock back does not keep others from registering for good.
        lock.lock().unwrap();
        until_registered(&map(9 * PART), 9 * PART);
        std::fs::remove_file(&path).unwrap();
    });
}

/// The pages are such that kernels cannot copy them, so there are no staging buffers: freeing those would wait as well.
#[test]
fn a_backend_that_goes_waits_for_what_it_copies() {
    inside(&[], |fake| {
        let world = World::new(options(CopyMode::Batch), Cache::plain(2, 8191, 40, 2), 2 * PART);
        let fence = world.written_late(fake, 3, FAR_LATER_US);
        let shards = world.shard(PART - 8192, &[7, 9]);
        let mut transfer = world.submit(Direction::Store, false, fence, &shards).unwrap();
        let World { backend, arena, cache, torch, .. } = world;
        drop(backend);
        assert_eq!(fake.counts().registrations, 0);
        assert!(transfer.poll(), "it has ended");
        transfer.wait().unwrap();
        let shard = cache.gather(&pattern(3, cache.bytes), &[7, 9]);
        assert!(arena.all.part(PART - 8192, shard.len()).read() == shard);
        assert_eq!(calls::finish(torch as _), None, "nothing was at fault");
    });
}

/// Maps half of the arena. The registering thread then sleeps, and notices late that the arena has been dropped.
fn map_half(backend: &impl CopyBackend, arena: &Arena) -> Arc<dyn kvring_gpu_kernels::MappedArena> {
    arena.grow(arena.all.len / 2);
    let mapped = backend.map_arena(arena.mapping());
    until_registered(&mapped, arena.all.len / 2);
    mapped
}

/// A mapping is announced again while its earlier registrations are still being undone. The driver refuses two registrations of
/// the same memory, and a copy that begins under one that is being undone is a fault that ends the context.
#[test]
fn an_arena_that_is_let_go_and_mapped_again_at_once() {
    inside(&[], |fake| {
        for mode in FORCED {
            let world = World::plain(mode, 2, PART);
            let arena = Arena::new(8 * PART);
            drop(map_half(&world.backend, &arena));
            let mapped = world.backend.map_arena(arena.mapping());
            // This copy begins only after all of that.
            let fence = world.written_late(fake, 3, FAR_LATER_US);
            let shards = [(arena.at(0), vec![7, 9])];
            let transfer = world.submit(Direction::Store, false, fence, &shards).unwrap();
            // Once more, with a copy in flight that holds the arena.
            drop(mapped);
            let mapped = world.backend.map_arena(arena.mapping());
            transfer.wait().unwrap();
            let shard = world.cache.gather(&pattern(3, world.cache.bytes), &[7, 9]);
            assert!(arena.all.part(0, shard.len()).read() == shard, "{mode}");
            arena.grow(arena.all.len);
            until_registered(&mapped, arena.all.len);
            drop(mapped);
            until("it is let go", || arena.is_let_go());
            drop(world);
            assert_eq!(fake.counts().registrations, 0, "{mode}");
        }
    });
}

/// As after a cold restart of the engine: the earlier arena is unregistered in the background.
#[test]
fn another_arena_is_registered_where_only_one_can_be_locked() {
    inside(&[("FAKE_CUDA_LOCKED", &(8 * PART).to_string())], |fake| {
        let backend = backend(CopyMode::Batch);
        for _ in 0..4 {
            let (one, other) = (Arena::new(8 * PART), Arena::new(8 * PART));
            drop(map_half(&backend, &one));
            let mapped = backend.map_arena(other.mapping());
            until_registered(&mapped, other.all.len);
        }
        drop(backend);
        assert_eq!(fake.counts().registrations, 0);
    });
}
