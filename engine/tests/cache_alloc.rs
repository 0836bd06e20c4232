//! The cache takes its memory when it is made: no operation allocates, and a huge arena costs only as much memory
//! as is used of it.

#![allow(clippy::unwrap_used, reason = "a test")]

mod cache_support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use cache_support::{VecTable, chain, key, look_up, look_up_into};
use kvring_engine::cache::{
    Cache, CacheConfig, Heard, Key, Leaving, NoTable, Owner, Parting, Reservation, Reserve, Round, SlotId,
};
use kvring_engine::policy::PolicyKind;

/// Counts the allocations of this thread.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    // A thread that is ending has no counter any more, but it is not the one under test.
    let _ = ALLOCATIONS.try_with(|allocations| allocations.set(allocations.get() + 1));
}

// SAFETY: every call is passed on to `System`, and counted.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps `GlobalAlloc`'s contract, and `System` has the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(memory, layout, bytes) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations() -> u64 {
    ALLOCATIONS.with(Cell::get)
}

#[test]
fn no_operation_allocates() {
    for policy in PolicyKind::ALL {
        let slabs = 12;
        let config = CacheConfig { policy, ..CacheConfig::new(1 << 20, slabs) };
        let mut cache = Cache::new(config, VecTable::new(slabs as usize * 256)).unwrap();
        // Registering and forgetting are counted too: no request of a client may fail for want of memory.
        let registering = allocations();
        cache.register(3, 64, 63, 4096).unwrap();
        assert!(cache.forget(3));
        for (namespace, ranks) in [&[50_000_u64][..], &[30_000, 90_000], &[20_000; 9]].into_iter().enumerate()
        {
            for (rank, bytes) in ranks.iter().enumerate() {
                cache.register(namespace as u32, ranks.len() as u32, rank as u32, *bytes).unwrap();
            }
        }
        assert_eq!(allocations(), registering, "{policy} allocated for a namespace");
        for slab in 0..slabs {
            cache.add_slab(slab).unwrap();
        }
        let mut random = 1_u64;
        let mut next = |below: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) % below
        };
        let mut writes: Vec<(Owner, SlotId, u64, Key)> = Vec::with_capacity(1 << 16);
        let mut words = Vec::with_capacity(64);
        let chains: Vec<Vec<Key>> = (0..40).map(|at| chain(at, 30)).collect();
        let worlds = [1, 2, 9];

        let before = allocations();
        for step in 0..60_000_u64 {
            let (owner, namespace) = (next(4) as Owner, next(3) as u32);
            let keys = &chains[next(40) as usize][..next(30) as usize];
            match next(40) {
                0..12 => {
                    let rank = next(worlds[namespace as usize]) as u32;
                    let round = Round { source: next(3) as u32, number: (step / 500) as u32 };
                    let message =
                        Reserve { owner, nonce: 1, namespace, rank, round, parent: Some(key(1, 1)), keys };
                    let heard =
                        [Heard::All, Heard::NotYet, Heard::Never][(next(30) as usize).saturating_sub(27)];
                    let mut going = cache.reservation(namespace, keys.len());
                    // What has to wait is given up here.
                    let reserved =
                        cache.reserve_piece(message, &mut going, &mut || heard, &mut |i, answer| {
                            if let Reservation::Write { slot, generation, .. } = answer {
                                writes.push((owner, slot, generation, keys[i]));
                            }
                        });
                    assert!(reserved.is_ok());
                }
                12..24 => {
                    for _ in 0..20 {
                        if !writes.is_empty() {
                            let at = next(writes.len() as u64) as usize;
                            let (owner, slot, generation, key) = writes.swap_remove(at);
                            let _ = cache.commit(owner, slot, generation, key, 1);
                        }
                    }
                }
                24 => {
                    if let Some((owner, slot, generation, key)) = writes.pop() {
                        let _ = cache.abort(owner, slot, generation, key);
                    }
                }
                25..33 => {
                    let name = (owner, next(20), next(2) as u32);
                    look_up_into(&mut cache, name, namespace, keys, &mut words);
                }
                33..36 => {
                    cache.end_session(owner, next(20));
                }
                36 => {
                    cache.release(owner, next(20), 0, 3);
                }
                37 if next(3) == 0 => cache.spare_all(),
                38 if cache.is_waiting() => {
                    cache.heard(cache.awaits().unwrap_or_default());
                    cache.go_on_dropping();
                }
                37 if next(20) == 0 => {
                    cache.part(&mut Parting::new(owner, Leaving::Left { nonce: 1 }));
                }
                38 if next(200) == 0 => {
                    cache.allow(50);
                    // What is marked stays so for a while: nothing is dropped, and searches for room wait.
                    let heard = if next(2) == 0 { Heard::All } else { Heard::NotYet };
                    cache.clear_step(Some(namespace), 0, &mut || heard);
                    cache.allow(u64::MAX);
                }
                _ => cache.check_step(100).unwrap(),
            }
            // The logs belong to the table, not to the cache.
            cache.table_mut().freed.clear();
            cache.table_mut().touches.clear();
        }
        let stats = cache.stats();
        assert_eq!(allocations(), before, "{policy} allocated");
        assert!(
            stats.evicted > 1000 && stats.cleared > 0 && stats.spans_taken > 10 && stats.leases > 0,
            "{stats:?}"
        );
        cache.check_all().unwrap();
    }
}

/// KiB of this process's memory that no file backs.
fn anonymous_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn ten_thousand_chunks_in_a_large_arena_take_little_memory() {
    let before = anonymous_kib();
    let (slab_bytes, slabs) = (16 << 20, 4096);
    let mut cache = Cache::new(CacheConfig::new(slab_bytes, slabs), NoTable::new(1 << 18)).unwrap();
    for slab in 0..slabs {
        cache.add_slab(slab).unwrap();
    }
    cache.register(0, 1, 0, 4 << 20).unwrap();
    for at in 0..20 {
        let keys = chain(at, 500);
        let round = Round { source: 1, number: 1 };
        let message = Reserve { owner: 0, nonce: 1, namespace: 0, rank: 0, round, parent: None, keys: &keys };
        let mut slots = Vec::new();
        cache
            .reserve(message, &mut |i, answer| {
                let Reservation::Write { slot, generation, .. } = answer else { panic!("{answer:?}") };
                slots.push((slot, generation, keys[i]));
            })
            .unwrap();
        for (slot, generation, key) in slots {
            cache.commit(0, slot, generation, key, 0).unwrap();
        }
        assert_eq!(look_up(&mut cache, (0, at, 0), 0, &keys).len(), 500);
    }
    let stats = cache.stats();
    assert_eq!((stats.chunks_visible, stats.pins), (10_000, 10_000));
    let kib = anonymous_kib() - before;
    println!("{kib} KiB for {} chunks in {} GiB", stats.chunks_visible, stats.bytes_usable >> 30);
    // This includes the other test, which runs in the same process.
    assert!(kib < 30 << 10, "{kib} KiB");
}
