//! What a new engine restores from the slot table of an earlier one.

#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "../cache_support/mod.rs"]
mod cache_support;
mod records;

use cache_support::small::{
    SLAB_BYTES, cache, commit, config, declare_end, find, hits, message, register, reserve, reserve_in,
    reserve_one, round, slot_of, store, store_ranks,
};
use cache_support::{State, VecTable, chain, key, look_up, restore, restore_end};
use kvring_engine::cache::{
    Cache, CacheConfig, Committed, Invalidated, Key, NotRestorable, Reservation, Reserve, Shard, ShardHeader,
    SlotTable,
};
use kvring_shm_abi::namespace::namespace_id;

/// A cache with everything that an engine left behind, as its successor reads it.
fn restored(table: &VecTable, slabs: u32, namespaces: &[&[u64]]) -> Cache<VecTable> {
    let mut cache = empty(table, config(slabs));
    for (namespace, ranks) in namespaces.iter().enumerate() {
        register(&mut cache, namespace as u32, ranks);
    }
    restore(&mut cache);
    cache
}

/// A cache over a copy of that table, into which nothing has been restored yet.
fn empty(table: &VecTable, config: CacheConfig) -> Cache<VecTable> {
    let mut cache = Cache::new(config, table.clone()).unwrap();
    for slab in 0..config.slab_count {
        cache.add_slab(slab).unwrap();
    }
    cache
}

#[test]
fn a_shortage_is_not_taken_for_nonsense() {
    let mut cache = cache(2, &[4096]);
    store(&mut cache, 1, &chain(1, 4));
    let (first, slabs, slot_bytes) = cache.table().spans[0];
    let mut new = empty(cache.table(), config(2));
    new.table_mut().out_of_space = true;
    let short = new.restore_span(first, slabs, slot_bytes);
    assert!(matches!(short, Err(NotRestorable::Memory { count: 256, .. })), "{short:?}");
    let nonsense = new.restore_span(first, 3, slot_bytes);
    assert!(matches!(nonsense, Err(NotRestorable::Span { .. })), "{nonsense:?}");
}

#[test]
fn recovery_keeps_what_a_living_sibling_completes() {
    let worlds: &[&[u64]] = &[&[4096, 70_000], &[1_500_000]];
    let mut old = cache(8, worlds[0]);
    register(&mut old, 1, worlds[1]);
    let (kept, late, whole) = (key(1, 0), key(2, 0), chain(3, 3));
    store_ranks(&mut old, 0, 0..2, 1, &whole);
    store_ranks(&mut old, 1, 0..1, 1, &[key(4, 0)]);
    let first = reserve_one(&mut old, 0, round(1), kept);
    let second = reserve_one(&mut old, 1, round(1), kept);
    commit(&mut old, 0, first, kept);
    let alone = reserve_one(&mut old, 0, round(1), late);
    commit(&mut old, 0, alone, late);

    let mut new = restored(old.table(), 8, worlds);
    let restored = restore_end(&mut new);
    assert_eq!((restored.visible, restored.kept, restored.dropped), (4, 2, 0));
    new.check_all().unwrap();
    assert_eq!(hits(&mut new, &whole), 3);
    // The writer has come back under another nonce, and names the slot that it was writing.
    assert!(!new.adopt(7, 1, second.0, second.1, kept), "somebody else's");
    assert!(!new.adopt(1, 1, second.0, second.1 + 1, kept), "another life of the slot");
    assert!(!new.adopt(1, 1, second.0, second.1, late), "another key");
    assert!(!new.adopt(1, 1, first.0, first.1, kept), "committed");
    assert!(new.adopt(1, 1, second.0, second.1, kept));
    assert!(new.adopt(1, 1, second.0, second.1, kept), "repeated");
    assert_eq!(declare_end(&mut new, 1), 0);
    assert_eq!(new.commit(1, second.0, second.1, kept, 0), Ok(Committed::Committed));
    assert_eq!(hits(&mut new, &[kept]), 1);
    // A chunk of which one rank has committed waits for the other rank, which had not reserved its slot yet.
    assert_eq!(new.commit(0, alone.0, alone.1, late, 0), Ok(Committed::AlreadyCommitted));
    let other = reserve_one(&mut new, 1, round(1), late);
    commit(&mut new, 1, other, late);
    assert_eq!(hits(&mut new, &[late]), 1);
    new.clear(None);
    new.check_all().unwrap();
    assert_eq!(new.stats().slabs_free, 8);
}

#[test]
fn what_is_not_declared_is_freed_and_what_was_orphaned_stays_of_no_use() {
    let world: &[u64] = &[4096, 4096];
    let mut old = cache(2, world);
    let (named, forgotten, failed) = (key(1, 0), key(2, 0), key(3, 0));
    let mine = reserve_one(&mut old, 0, round(1), named);
    let unsaid = reserve_one(&mut old, 0, round(1), forgotten);
    // One rank fails the round: the other rank's slot is an orphan from then on.
    let orphan = reserve_one(&mut old, 0, round(1), failed);
    let aborted = reserve_one(&mut old, 1, round(1), failed);
    old.abort(1, aborted.0, aborted.1, failed).unwrap();

    // The engine is restarted twice, and no client comes back in between.
    let mut new = restored(old.table(), 2, &[world]);
    restore_end(&mut new);
    let mut new = restored(new.table(), 2, &[world]);
    restore_end(&mut new);
    new.check_all().unwrap();
    assert_eq!((new.stats().slots_writing, new.stats().orphans), (3, 1));
    for (slot, name) in [(mine, named), (orphan, failed)] {
        assert!(new.adopt(0, 9, slot.0, slot.1, name));
    }
    assert_eq!(declare_end(&mut new, 0), 1);
    assert_eq!(new.commit(0, unsaid.0, unsaid.1, forgotten, 0), Ok(Committed::Gone));
    assert_eq!(new.commit(0, orphan.0, orphan.1, failed, 0), Ok(Committed::Gone), "its round had failed");
    assert_eq!(new.commit(0, mine.0, mine.1, named, 0), Ok(Committed::Committed));
    new.check_all().unwrap();
    // Now no client comes back at all.
    let mut new = restored(new.table(), 2, &[world]);
    restore_end(&mut new);
    (0..2).for_each(|owner| new.owner_gone(owner));
    new.check_all().unwrap();
    assert_eq!(new.stats().slots_writing, 0);
}

/// As after a death between making a span and using it, or between freeing a span's last slot and giving the span
/// back.
#[test]
fn spans_in_which_nothing_is_in_use_go_back() {
    let mut old = cache(2, &[70_000]);
    store(&mut old, 1, &chain(1, 2));
    let mut new = empty(old.table(), config(2));
    register(&mut new, 0, &[70_000]);
    new.restore_span(0, 1, 73_728).unwrap();
    assert_eq!(restore_end(&mut new).visible, 0);
    assert_eq!(new.stats().slabs_free, 2);
    new.check_all().unwrap();
}

#[test]
fn nothing_is_evicted_while_evictions_are_held() {
    let mut cache = cache(1, &[SLAB_BYTES / 2]);
    store(&mut cache, 1, &chain(1, 2));
    cache.hold_evictions(true);
    assert_eq!(reserve(&mut cache, 0, round(2), &[key(2, 0)]), [Reservation::NoSpace]);
    assert_eq!(hits(&mut cache, &chain(1, 2)), 2);
    cache.clear(None);
    store(&mut cache, 3, &chain(1, 2));
    cache.release(0, 0, 0, 0);
    cache.hold_evictions(false);
    reserve_one(&mut cache, 0, round(4), key(2, 0));
    cache.check_all().unwrap();
}

/// Chunks of which the first was used last before the engine died, and the arena has no room for another one.
fn full() -> Cache<VecTable> {
    let mut old = cache(1, &[SLAB_BYTES / 4]);
    for number in [3, 2, 1, 0] {
        store(&mut old, 1, &[key(number, 0)]);
    }
    let mut new = empty(old.table(), config(1));
    register(&mut new, 0, &[SLAB_BYTES / 4]);
    restore(&mut new);
    new
}

#[test]
fn nothing_is_evicted_before_each_restored_chunk_has_its_place() {
    let mut new = full();
    let (restored, unplaced) = new.restore_end();
    assert_eq!((restored.visible, unplaced.len()), (4, 4));
    let mut sorted = unplaced.sort();
    for left in (0..4).rev() {
        assert_eq!(reserve(&mut new, 0, round(2), &[key(9, 0)]), [Reservation::NoSpace], "{left} are left");
        new.allow(1);
        assert_eq!(new.go_on_placing(&mut sorted), left == 0);
        new.allow(u64::MAX);
    }
    // The end of the grace may come before or after that.
    new.hold_evictions(true);
    assert_eq!(reserve(&mut new, 0, round(2), &[key(9, 0)]), [Reservation::NoSpace]);
    new.hold_evictions(false);
    store(&mut new, 2, &[key(9, 0)]);
    assert_eq!(new.stats().evicted, 1);
    assert_eq!(hits(&mut new, &[key(3, 0)]), 0, "the one that was used first");
}

#[test]
fn what_is_used_before_it_has_its_place_is_evicted_last() {
    let mut new = full();
    let (_, unplaced) = new.restore_end();
    assert_eq!(hits(&mut new, &[key(3, 0)]), 1);
    assert!(new.go_on_placing(&mut unplaced.sort()));
    new.check_all().unwrap();
    for (number, evicted) in [(9, 2), (10, 1), (11, 0), (12, 3)] {
        store(&mut new, 2, &[key(number, 0)]);
        let is_left = |number: &u64| hits_quietly(&new, key(*number, 0));
        assert_eq!((0..4).filter(is_left).count() as u64, 12 - number, "stored {number}");
        assert!(!is_left(&evicted), "{evicted}");
    }
}

/// A chain goes leaf first, however soon after a restart the leaf is stored.
#[test]
fn a_leaf_that_is_stored_before_its_parent_has_its_place_is_evicted_before_it() {
    for allowed in [0, 1, u64::MAX] {
        let mut old = cache(1, &[SLAB_BYTES / 4]);
        (0..3).for_each(|number| store(&mut old, 1, &[key(number, 0)]));
        let mut new = empty(old.table(), config(1));
        register(&mut new, 0, &[SLAB_BYTES / 4]);
        restore(&mut new);
        let (_, unplaced) = new.restore_end();
        let mut sorted = unplaced.sort();
        new.allow(allowed);
        let is_placed = allowed > 0 && new.go_on_placing(&mut sorted);
        new.allow(u64::MAX);
        let (parent, leaf) = (key(0, 0), key(0, 1));
        let mut slots = Vec::new();
        let keys = [leaf];
        let message = Reserve { parent: Some(parent), ..message(0, round(2), &keys) };
        new.reserve(message, &mut |_, answer| slots.push(slot_of(answer))).unwrap();
        commit(&mut new, 0, slots[0], leaf);
        assert!(is_placed || new.go_on_placing(&mut sorted));
        let mut left = vec![(true, true)];
        for number in 9..13 {
            store(&mut new, 3, &[key(number, 0)]);
            left.push((hits_quietly(&new, parent), hits_quietly(&new, leaf)));
        }
        left.dedup();
        assert_eq!(left, [(true, true), (true, false), (false, false)], "{allowed} records before the store");
    }
}

/// Whether there is such a chunk, without an access to it.
fn hits_quietly(cache: &Cache<VecTable>, key: Key) -> bool {
    let is_it = |state| matches!(state, State::Committed(header) if header.key == key);
    cache.table().entries.iter().any(|entry| is_it(entry.state))
}

#[test]
fn recovery_refuses_what_makes_no_sense() {
    let mut old = cache(2, &[70_000]);
    store(&mut old, 1, &chain(1, 2));
    let spans = [
        (2, 1, 1 << 16),
        (0, 0, 1 << 16),
        (0, 3, 1 << 16),
        (0, u32::MAX, 4096),
        (0, 1, 4097),
        (0, 1, 0),
        (0, 1, 2 << 20),
    ];
    let mut new = empty(old.table(), config(2));
    for (first, len, slot_bytes) in spans {
        assert!(new.restore_span(first, len, slot_bytes).is_err(), "{first} {len} {slot_bytes}");
    }
    let good = old.table().shard(0).unwrap();
    assert!(new.restore(0, &good).is_err(), "in no span");
    let mut new = empty(old.table(), config(2));
    register(&mut new, 0, &[70_000]);
    new.restore_span(0, 1, 73_728).unwrap();
    assert!(new.restore_span(0, 1, 73_728).is_err(), "twice");
    let header = good.header;
    let wrong = [
        ShardHeader { offset: header.offset + 4096, ..header },
        ShardHeader { offset: u64::MAX, ..header },
        ShardHeader { length: 0, ..header },
        ShardHeader { length: u64::MAX, ..header },
        ShardHeader { owner: 64, ..header },
    ];
    for header in wrong {
        let shard = Shard { header, ..good };
        assert!(new.restore(0, &shard).is_err(), "{header:?}");
        assert!(new.restore(u32::MAX, &shard).is_err(), "{header:?}");
    }
    new.check_all().unwrap();
    // A shard of a namespace, rank or size that is not registered is of no use, but no error.
    for header in [ShardHeader { namespace: 9, ..header }, ShardHeader { rank: 63, ..header }] {
        let mut new = empty(old.table(), config(2));
        register(&mut new, 0, &[70_000]);
        new.restore_span(0, 1, 73_728).unwrap();
        new.restore(0, &Shard { header, ..good }).unwrap();
        assert_eq!(restore_end(&mut new).visible, 0);
        new.check_all().unwrap();
    }
}

/// Chunks, incomplete chunks and slots of a namespace that was at the same index before: the engine died before it had freed
/// them, or its tables make no sense.
#[test]
fn what_an_earlier_namespace_at_the_same_index_left_is_of_no_use() {
    let world: &[u64] = &[4096, 4096];
    let (earlier, id) = (namespace_id(3, 7), namespace_id(3, 8));
    let mut old = empty(&VecTable::new(512), config(2));
    register(&mut old, earlier, world);
    store_ranks(&mut old, earlier, 0..2, 1, &chain(1, 3));
    store_ranks(&mut old, earlier, 0..1, 1, &chain(2, 1));
    reserve_in(&mut old, earlier, 0, round(1), &chain(3, 1));
    for (registered, kept) in [(earlier, (3, 2, 0)), (id, (0, 0, 0))] {
        let mut new = empty(old.table(), config(2));
        register(&mut new, registered, world);
        restore(&mut new);
        let restored = restore_end(&mut new);
        assert_eq!((restored.visible, restored.kept, restored.dropped), kept);
        new.check_all().unwrap();
        let is_there = |id| new.table().chunks().read(id).is_some();
        assert_eq!((0..3).filter(|id| is_there(*id)).count() as u32, restored.visible);
        // The slot that is being written stays its writer's.
        assert_eq!(new.stats().slots_writing, 1);
        assert_eq!(new.stats().slots_committed, if registered == id { 0 } else { 7 });
        // Its successors find the keys of what they store themselves.
        store_ranks(&mut new, registered, 0..2, 2, &chain(1, 4));
        assert_eq!(look_up(&mut new, (9, 9, 9), registered, &chain(1, 4)).len(), 4);
    }
    // A record of the present namespace leads to a slot of the earlier one.
    let mut old = empty(&VecTable::new(512), config(2));
    register(&mut old, id, world);
    store_ranks(&mut old, id, 0..2, 1, &chain(1, 2));
    let mut table = old.table().clone();
    let State::Committed(header) = table.entries[0].state else { panic!("the first slot") };
    table.entries[0].state = State::Committed(ShardHeader { namespace: earlier, ..header });
    let mut new = empty(&table, config(2));
    register(&mut new, id, world);
    restore(&mut new);
    let restored = restore_end(&mut new);
    assert_eq!((restored.visible, restored.kept, restored.dropped), (1, 0, 1));
    new.check_all().unwrap();
}

/// Which namespace is forgotten first when their table is full does not depend on the number of restarts.
#[test]
fn the_age_of_a_namespace_survives_a_restart() {
    let worlds: &[&[u64]] = &[&[4096][..]; 8];
    let mut old = cache(8, worlds[0]);
    (1..8).for_each(|namespace| register(&mut old, namespace, worlds[0]));
    let order = [3_u32, 0, 7, 5, 1, 6, 2, 4];
    for namespace in order {
        store_ranks(&mut old, namespace, 0..1, 1, &[key(1, 0)]);
    }
    let mut new = restored(old.table(), 8, worlds);
    restore_end(&mut new);
    for cache in [&old, &new] {
        let mut sorted = [0, 1, 2, 3, 4, 5, 6, 7];
        sorted.sort_by_key(|namespace| cache.used(*namespace));
        assert_eq!(sorted, order);
    }
}

#[test]
fn ten_rounds_of_recovery_never_reuse_a_generation() {
    let mut table = cache(1, &[SLAB_BYTES / 2]).table().clone();
    let mut seen = std::collections::BTreeSet::new();
    for life in 0..10 {
        let mut cache = restored(&table, 1, &[&[SLAB_BYTES / 2]]);
        restore_end(&mut cache);
        for number in 0..3 {
            let name = key(life, number);
            let (slot, generation) = reserve_one(&mut cache, 0, round(number as u32), name);
            assert!(seen.insert((slot, generation)), "slot {slot} had generation {generation} before");
            commit(&mut cache, 0, (slot, generation), name);
        }
        if life % 2 == 0 {
            // The next engine finds no slot in use, and must read the slots' generations.
            cache.clear(None);
        }
        table = cache.table().clone();
    }
}

/// The first slot of a span holds a committed shard of no use, and there is a good one behind it.
#[test]
fn a_useless_shard_at_the_head_of_a_span_does_not_end_the_recovery() {
    let mut old = cache(2, &[70_000]);
    store(&mut old, 1, &chain(1, 2));
    let mut table = old.table().clone();
    // The shard is made one of a namespace that is not registered any more. One of such a rank or size, or of one
    // chunk too many, is treated alike.
    let State::Committed(header) = table.entries[0].state else { panic!("the first slot") };
    table.entries[0].state = State::Committed(ShardHeader { namespace: 9, ..header });
    let mut new = restored(&table, 2, &[&[70_000]]);
    assert_eq!(restore_end(&mut new).visible, 1);
    new.check_all().unwrap();
}

/// The same because of a limit alone: fewer chunks than the earlier engine held.
#[test]
fn fewer_chunks_than_before_do_not_end_the_recovery() {
    let mut old = cache(4, &[70_000]);
    store(&mut old, 1, &chain(1, 40));
    let mut new = empty(old.table(), CacheConfig { chunks_max: 10, ..config(4) });
    register(&mut new, 0, &[70_000]);
    restore(&mut new);
    assert_eq!(restore_end(&mut new).visible, 10);
    new.check_all().unwrap();
}

#[test]
fn two_complete_rounds_of_one_key() {
    let mut old = cache(2, &[70_000]);
    let (a, b) = (round(1), kvring_engine::cache::Round { source: 77, number: 1 });
    let first = reserve_one(&mut old, 0, a, key(1, 0));
    let second = reserve_one(&mut old, 0, b, key(1, 0));
    let mut table = old.table().clone();
    for slot in [first.0, second.0] {
        let State::Writing(header) = table.entries[slot as usize].state else { panic!("{slot}") };
        table.entries[slot as usize].state = State::Committed(header);
    }
    let mut new = restored(&table, 2, &[&[70_000]]);
    assert_eq!(restore_end(&mut new).visible, 1);
    new.check_all().unwrap();
}

/// As after a death while a damaged chunk was still leased, or while it was being hidden.
#[test]
fn what_was_hidden_is_not_shown_by_the_next_engine() {
    let world: &[u64] = &[4096, 70_000];
    let mut old = cache(8, world);
    let name = key(1, 0);
    store_ranks(&mut old, 0, 0..2, 1, &[name]);
    let before = old.table().clone();
    let damaged = find(&mut old, 1, &[name])[0];
    let hidden = old.invalidate(damaged.slot, damaged.generation, name, |_, _| true);
    assert_eq!((hidden, old.stats().slots_committed), (Invalidated::Hidden, 2));
    let mut half = before;
    half.entries[damaged.slot as usize] = old.table().entries[damaged.slot as usize];
    for (table, dropped) in [(old.table(), 0), (&half, 1)] {
        let mut new = restored(table, 8, &[world]);
        let restored = restore_end(&mut new);
        assert_eq!((restored.visible, restored.kept, restored.dropped), (0, 0, dropped));
        new.check_all().unwrap();
        assert_eq!((hits(&mut new, &[name]), new.stats().slots_committed), (0, 0));
        store_ranks(&mut new, 0, 0..2, 2, &[name]);
        assert_eq!(hits(&mut new, &[name]), 1);
    }
}
