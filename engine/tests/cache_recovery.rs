//! What a new engine makes of the slot table that another one left.

#![allow(clippy::unwrap_used, reason = "a test")]

mod cache_support;

use cache_support::small::{
    NONCE, SLAB_BYTES, cache, commit, config, hits, register, reserve, reserve_in, reserve_one, round,
    slot_of, store,
};
use cache_support::{State, VecTable, chain, key};
use kvring_engine::cache::{Cache, Committed, Shard, ShardHeader, SlotId};

/// Everything that an engine left behind, as its successor reads it.
fn restored(table: &VecTable, slabs: u32, namespaces: &[&[u64]]) -> Cache<VecTable> {
    let mut cache = Cache::new(config(slabs), table.clone()).unwrap();
    for slab in 0..slabs {
        cache.add_slab(slab).unwrap();
    }
    for (namespace, ranks) in namespaces.iter().enumerate() {
        register(&mut cache, namespace as u32, ranks);
    }
    // The successor publishes what it takes over again; this table insists on legal transitions.
    let found: Vec<_> =
        table.entries.iter().enumerate().filter(|(_, entry)| entry.state != State::Free).collect();
    for (slot, entry) in found {
        let (header, committed) = match entry.state {
            State::Writing(header) => (header, false),
            State::Committed(header) => (header, true),
            State::Free => continue,
        };
        let shard = Shard { header, generation: entry.generation, committed, tick: entry.tick };
        assert!(cache.restore(slot as SlotId, &shard), "slot {slot}: {shard:?}");
    }
    cache
}

#[test]
fn interleaving_14_recovery_keeps_what_a_living_sibling_completes() {
    let worlds: &[&[u64]] = &[&[4096, 70_000], &[1_500_000]];
    let mut old = cache(8, worlds[0]);
    register(&mut old, 1, worlds[1]);
    let (kept, lost, whole) = (key(1, 0), key(2, 0), chain(3, 3));
    for rank in 0..2 {
        let slots = reserve(&mut old, rank, round(1), &whole);
        for (answer, key) in slots.into_iter().zip(&whole) {
            commit(&mut old, rank as u8, slot_of(answer), *key);
        }
    }
    let large = slot_of(reserve_in(&mut old, 1, 0, round(1), &[key(4, 0)])[0]);
    commit(&mut old, 0, large, key(4, 0));
    let first = reserve_one(&mut old, 0, round(1), kept);
    let second = reserve_one(&mut old, 1, round(1), kept);
    commit(&mut old, 0, first, kept);
    let alone = reserve_one(&mut old, 0, round(1), lost);
    commit(&mut old, 0, alone, lost);

    let mut new = restored(old.table(), 8, worlds);
    let restored = new.restore_end();
    assert_eq!((restored.visible, restored.kept, restored.dropped), (4, 1, 1));
    new.check_all().unwrap();
    assert_eq!(hits(&mut new, &whole), 3);
    // The writer came back under another entry and nonce, and names what it was writing.
    let was = (1, NONCE);
    assert!(!new.adopt((7, 1), (1, NONCE + 1), second.0, second.1, kept), "somebody else's");
    assert!(new.adopt((7, 1), was, second.0, second.1, kept));
    new.quarantine_over(was.0, was.1);
    assert_eq!(new.commit(7, second.0, second.1, kept, 0), Ok(Committed::Committed));
    assert_eq!(hits(&mut new, &[kept]), 1);
    // What was dropped has another generation, also for later lives.
    assert_eq!(new.commit(0, alone.0, alone.1, lost, 0), Ok(Committed::Gone));
    new.clear(None);
    new.check_all().unwrap();
    assert_eq!(new.stats().slabs_free, 8);
}

#[test]
fn recovery_refuses_headers_that_make_no_sense() {
    let mut old = cache(2, &[70_000]);
    store(&mut old, 1, &chain(1, 2));
    let mut new = Cache::new(config(2), old.table().clone()).unwrap();
    for slab in 0..2 {
        new.add_slab(slab).unwrap();
    }
    register(&mut new, 0, &[70_000]);
    let State::Committed(header) = old.table().entries[0].state else { panic!("slot 0 is in use") };
    let wrong = [
        ShardHeader { offset: header.offset + 4096, ..header },
        ShardHeader { offset: u64::MAX, ..header },
        ShardHeader { length: 0, ..header },
        ShardHeader { length: u64::MAX, ..header },
        ShardHeader { owner: 64, ..header },
    ];
    for header in wrong {
        let shard = Shard { header, generation: 0, committed: true, tick: 0 };
        assert!(!new.restore(0, &shard), "{header:?}");
        assert!(!new.restore(u32::MAX, &shard), "{header:?}");
    }
    new.check_all().unwrap();
}

#[test]
fn ten_rounds_of_recovery_never_reuse_a_generation() {
    let mut table = cache(1, &[SLAB_BYTES / 2]).table().clone();
    let mut seen = std::collections::BTreeSet::new();
    for life in 0..10 {
        let mut cache = restored(&table, 1, &[&[SLAB_BYTES / 2]]);
        cache.restore_end();
        for number in 0..3 {
            let name = key(life, number);
            let (slot, generation) = reserve_one(&mut cache, 0, round(number as u32), name);
            assert!(seen.insert((slot, generation)), "slot {slot} had generation {generation} before");
            commit(&mut cache, 0, (slot, generation), name);
        }
        if life % 2 == 0 {
            // The next life finds nothing in use, and must read what its slots' generations are.
            cache.clear(None);
        }
        table = cache.table().clone();
    }
}
