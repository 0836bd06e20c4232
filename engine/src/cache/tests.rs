//! Tests of the cache's parts. The whole cache is tested from outside: `tests/cache_*.rs`.

use std::collections::HashMap;

use proptest::prelude::*;

use super::chunk::Chunks;
use super::hash::Hash;
use super::index::{FORMING_MAX, Index};
use super::lease::{ADMISSIONS_MAX, Leases};
use super::mark::For;
use super::slab::Slabs;
use super::slot::Slots;
use super::*;
use crate::policy::PolicyKind;
use kvring_shm_abi::chunk::{ChunkIdentity, ChunkWord};
use kvring_shm_abi::lookup;

const SEED: [u64; 2] = [3, 5];

fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

#[test]
fn the_index_finds_what_is_in_it_as_it_grows_and_shrinks() {
    let mut chunks = Chunks::new(50_000).unwrap();
    chunks.set_ready((50_000, 0));
    let mut index = Index::new(50_000).unwrap();
    let mut known: HashMap<Key, Vec<ChunkId>> = HashMap::new();
    let mut state = 1;
    for step in 0..100_000_u64 {
        // The first half mostly inserts, the second mostly removes.
        let key = [random(&mut state) % 20_000, 1];
        let hash = Hash::new(SEED, 0, key);
        let ids = known.entry(key).or_default();
        if random(&mut state) % 100 < if step < 50_000 { 80 } else { 20 } {
            if ids.len() < FORMING_MAX {
                let id = chunks.create(key, hash, 0, 1, Round::default()).unwrap();
                index.insert(&mut chunks, id);
                ids.push(id);
            }
        } else if let Some(id) = ids.pop() {
            index.remove(&mut chunks, id);
            chunks.destroy(id, 1);
        }
        let mut found = index.forming(&chunks, hash, 0, key).to_vec();
        found.sort_unstable();
        let mut expected = ids.clone();
        expected.sort_unstable();
        assert_eq!(found, expected, "step {step}");
        assert!(index.forming(&chunks, hash, 1, key).is_empty(), "another namespace's");
    }
    for (key, ids) in &known {
        let hash = Hash::new(SEED, 0, *key);
        for id in ids {
            assert!(index.holds(&chunks, *id));
        }
        assert_eq!(index.forming(&chunks, hash, 0, *key).len(), ids.len());
    }
    assert_eq!(index.len, known.values().map(|ids| ids.len() as u64).sum::<u64>());
}

#[test]
fn spans_are_short_where_little_is_wasted_and_end_at_boundaries() {
    let mib = 1 << 20;
    let mut slabs = Slabs::new(mib, 4096).unwrap();
    let mut ideal = |bytes| {
        let class = slabs.class_for(bytes, None).unwrap();
        let class = slabs.class(class);
        (class.least, class.ideal)
    };
    assert_eq!(ideal(1), (1, 1));
    assert_eq!(ideal(mib), (1, 1));
    assert_eq!(ideal(mib + 1), (2, 16));
    assert_eq!(ideal(3 * mib / 2), (2, 3));
    assert_eq!(ideal(700 << 10), (1, 5));
    assert_eq!(ideal(600 * mib), (600, 600));
    assert_eq!(ideal(1 << 30), (1024, 1024));
    assert!(slabs.class_for((1 << 30) + 1, None).is_err());
    assert!(slabs.class_for(0, None).is_err());

    // There are 1000 slabs before a boundary and 1000 behind it: a span of 600 fits once on each side, and not
    // across.
    for slab in 24..2024 {
        slabs.add(slab).unwrap();
    }
    assert!(slabs.add(24).is_err() && slabs.add(4096).is_err());
    let slots = Slots::new(4096 * 256).unwrap();
    let class = slabs.class_for(600 * mib, None).unwrap();
    for head in [24, 1024] {
        assert_eq!(slabs.assign(class, &mut NoTable::new(1 << 16)), 600);
        let (slot, fresh) = slabs.take(class, &slots).unwrap();
        assert_eq!((slabs.offset(slot), fresh), (head * mib, true));
    }
    assert_eq!(slabs.assign(class, &mut NoTable::new(1 << 16)), 0);
}

#[test]
fn slot_ids_of_a_span_are_unique_to_it_and_offsets_inside_it() {
    let mib = 1 << 20;
    for bytes in [4096, 5000, 100_000, 700_000, mib, 3 * mib / 2] {
        let mut slabs = Slabs::new(mib, 64).unwrap();
        let mut slots = Slots::new(64 * 256).unwrap();
        (0..64).for_each(|slab| slabs.add(slab).unwrap());
        let class = slabs.class_for(bytes, None).unwrap();
        let mut seen = Vec::new();
        loop {
            let Some((slot, _)) = slabs.take(class, &slots) else {
                if slabs.assign(class, &mut NoTable::new(1 << 16)) > 0 {
                    continue;
                }
                break;
            };
            let offset = slabs.offset(slot);
            assert!(offset.is_multiple_of(4096) && offset + bytes <= 64 * mib);
            let head = slabs.head_of(slot).unwrap();
            assert!((offset + bytes).div_ceil(mib) <= u64::from(head + slabs.span(head).len));
            seen.push(slot);
        }
        let class_bytes = slabs.class(class).bytes;
        assert!(seen.len() as u64 * class_bytes * 16 >= 64 * mib * 14, "{bytes}: {} slots", seen.len());
        let count = seen.len();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), count);
        for slot in seen {
            slabs.give(slot, &mut slots, &mut NoTable::new(1 << 16));
        }
        assert_eq!(slabs.pool_len(), 64);
    }
}

#[test]
fn leases_keep_the_order_of_their_chunks_and_lose_their_tails() {
    let mut leases = Leases::new(4, 100, 9).unwrap();
    let chunks: Vec<ChunkId> = (100..140).collect();
    let make = |leases: &mut Leases, admission, chunks: &[ChunkId]| {
        let id = leases.create(1, 7, admission, chunks[0]);
        chunks[1..].iter().for_each(|chunk| leases.push(id, *chunk));
    };
    make(&mut leases, 0, &chunks);
    make(&mut leases, 1, &chunks[..15]);
    let (first, admissions) = leases.find(1, 7, 0);
    let first = first.unwrap();
    assert_eq!((admissions, leases.pins, leases.room(1, None, 0)), (2, 55, 45));
    for from in 0..=40 {
        assert!(leases.chunks(first, from).eq(chunks[from as usize..].iter().copied()), "from {from}");
    }
    let dropped: Vec<_> = (0..25).map(|_| leases.pop(first).unwrap()).collect();
    assert!(dropped.iter().eq(chunks[15..].iter().rev()));
    assert_eq!(leases.chunks(first, 0).collect::<Vec<_>>(), chunks[..15]);
    assert_eq!((leases.place(first, 15), leases.chunks(first, 13).collect()), (None, vec![113, 114]));
    assert_eq!(leases.blocks_used(), 4);
    assert_eq!(leases.room(1, Some(first), ADMISSIONS_MAX), 70);
    assert_eq!((leases.room(1, None, ADMISSIONS_MAX - 1), leases.room(1, None, ADMISSIONS_MAX)), (70, 0));
    (0..15).for_each(|_| assert!(leases.pop(first).is_some()));
    assert_eq!((leases.find(1, 7, 0), leases.find(2, 7, 1)), ((None, 1), (None, 0)));
    let other = leases.any_of(1, 7).unwrap();
    (0..15).for_each(|_| assert!(leases.pop(other).is_some()));
    assert_eq!((leases.len, leases.pins, leases.blocks_used(), leases.first_of(1)), (0, 0, 0, None));
}

fn small() -> Cache<NoTable> {
    let mut cache = Cache::new(CacheConfig::new(1 << 20, 1), NoTable::new(1 << 16)).unwrap();
    cache.add_slab(0).unwrap();
    cache.register(0, 2, 0, 4096).unwrap();
    cache.register(0, 2, 1, 4096).unwrap();
    for rank in 0..2 {
        let keys = [[1, 1], [2, 2]];
        let round = Round::default();
        let message = Reserve { owner: 0, nonce: 1, namespace: 0, rank, round, parent: None, keys: &keys };
        let mut slots = Vec::new();
        cache
            .reserve(message, &mut |i, answer| {
                if let Reservation::Write { slot, generation, .. } = answer {
                    slots.push((slot, generation, keys[i]));
                }
            })
            .unwrap();
        for (slot, generation, key) in slots {
            cache.commit(0, slot, generation, key, 0).unwrap();
        }
    }
    cache
}

/// The words of the chunks with these keys, up to the first that is missing.
fn search(cache: &Cache<NoTable>, namespace: NamespaceId, keys: &[Key]) -> Vec<ChunkWord> {
    let mut words = Vec::new();
    let table = cache.table.chunks();
    table.search(namespace, keys.iter().copied(), keys.len(), lookup::Marked::Missing, &mut words);
    words
}

#[test]
fn what_a_hold_does_is_counted_and_grows_with_its_chunks_alone() {
    let mut cache = small();
    let keys: Vec<Key> = [[1, 1], [2, 2]].into_iter().cycle().take(8192).collect();
    let words = search(&cache, 0, &keys);
    for again in [false, true, true] {
        let mut hold = Hold::new(1, 1, 1, 0, 0, 8192);
        for (at, piece) in words.chunks(512).enumerate() {
            let (work, passed) = (cache.work(), cache.leases.passed.get());
            assert_eq!(cache.hold_piece(&mut hold, piece.iter().copied()), Ok(Held::All));
            // Each chunk is looked at and pinned, and used by the first message, on both of its ranks. Two chunks are pinned
            // for the first time.
            let first = if at == 0 { 4 } else { 0 };
            let expected = match (again, at) {
                (false, _) => 512 * (2 + 2) + first,
                // The lease is taken apart before that.
                (true, 0) => 8192 + 4 + 512 * 2 + first,
                (true, _) => 512 * 2,
            };
            assert_eq!((cache.work() - work, cache.leases.passed.get() - passed), (expected, 0));
        }
        assert_eq!(hold.held, 8192);
    }
}

type Breakage = fn(&mut Cache<NoTable>);

#[test]
fn the_self_check_notices_what_disagrees() {
    let breakages: [(&str, Breakage); 16] = [
        ("a pin too many", |cache| {
            cache.chunks.get_mut(0).pins.add();
        }),
        ("a key that is not its record's", |cache| cache.chunks.get_mut(0).key[0] ^= 1),
        ("a record that ended before its chunk", |cache| {
            let key = cache.chunks.get(0).key;
            cache.table.chunks().end(0, ChunkIdentity { key, namespace: 0 });
        }),
        ("a record without a hint", |cache| {
            let (directory, key) = (cache.table.chunks().directory(), cache.chunks.get(0).key);
            directory.remove(directory.spot(0, key), 0);
        }),
        ("a record of no chunk", |cache| {
            let identity = ChunkIdentity { key: [9, 9], namespace: 0 };
            let free = cache.chunks.fresh - 1;
            cache.drop_chunk(free, false);
            assert!(cache.table.chunks().show(free, identity, &[0, 1], &[], |_| None));
        }),
        ("a record that leads to another's slot", |cache| {
            let identity = ChunkIdentity { key: cache.chunks.get(0).key, namespace: 0 };
            cache.table.chunks().end(0, identity);
            assert!(cache.table.chunks().show(0, identity, &[0, 0], &[], |_| None));
        }),
        ("a shard too many", |cache| cache.chunks.get_mut(1).committed += 1),
        ("another's slot", |cache| cache.chunks.set_shard(1, 2, 0, Some(0))),
        ("a slot freed behind its chunk", |cache| {
            cache.slots.free(0);
        }),
        ("an orphan counted that is not", |cache| cache.slots.counts.orphans += 1),
        ("a chunk without its place in the eviction order", |cache| cache.policy.remove(1, false)),
        ("a chunk counted that is said to have no place", |cache| cache.unplaced += 1),
        ("a record marked that nobody decides about", |cache| cache.table.chunks().mark(0)),
        ("a marked chunk that lookups find", |cache| {
            cache.mark(0, For::Room);
            cache.table.chunks().spare(0);
        }),
        ("a marked chunk that is held", |cache| {
            cache.mark(0, For::Room);
            cache.pin(0, 0, 0);
        }),
        ("a free record on the list of marked chunks", |cache| {
            let word = cache.table.chunks().word(0);
            cache.mark(0, For::Room);
            cache.marked.forget(0);
            cache.drop_chunk(0, false);
            assert!(cache.table.chunks().word(0) != word);
            cache.marked.remember(0);
        }),
    ];
    for (what, breakage) in breakages {
        let mut cache = small();
        for _ in 0..100 {
            cache.check_step(3).unwrap();
        }
        breakage(&mut cache);
        assert!((0..100).any(|_| cache.check_step(3).is_err()), "{what} goes unnoticed step by step");
        assert!(cache.check_all().is_err(), "{what} goes unnoticed");
    }
}

/// Stores those of these chunks that are not there. The others count as used.
fn store(cache: &mut Cache<NoTable>, number: u32, namespace: NamespaceId, keys: &[Key]) {
    let mut slots = Vec::new();
    let round = Round { source: 1, number };
    let message = Reserve { owner: 0, nonce: 2, namespace, rank: 0, round, parent: None, keys };
    let reserved = cache.reserve(message, &mut |at, answer| match answer {
        Reservation::Write { slot, generation, .. } => slots.push((slot, generation, keys[at])),
        answer => assert_eq!(answer, Reservation::Present),
    });
    reserved.unwrap();
    for (slot, generation, key) in slots {
        cache.commit(0, slot, generation, key, 0).unwrap();
    }
}

/// A cache as after a restart that has found chunks with these last accesses, in two namespaces by turns. Chunk n is in
/// slot n, and has its number in its key.
fn restored(policy: PolicyKind, ticks: &[u64]) -> (Cache<NoTable>, Unplaced) {
    let mut cache =
        Cache::new(CacheConfig { policy, ..CacheConfig::new(1 << 20, 4) }, NoTable::new(1 << 16)).unwrap();
    (0..4).for_each(|slab| cache.add_slab(slab).unwrap());
    (0..2).for_each(|namespace| cache.register(namespace, 1, 0, 4096).unwrap());
    let mut unplaced = Unplaced::default();
    for (slot, tick) in (0..).zip(ticks) {
        store(&mut cache, 0, slot % 2, &[[slot.into(), 1]]);
        let id = cache.slots.get(slot).chunk().unwrap();
        cache.chunks.get_mut(id).tick = *tick;
        cache.policy.remove(id, false);
        cache.unplaced += 1;
        unplaced.push(*tick, id).unwrap();
    }
    assert_eq!(unplaced.len(), ticks.len());
    (cache, unplaced)
}

/// What may happen to the chunks `at`, `at + 2`, … while the order is being built. They are a chain of one namespace.
fn use_or_drop(cache: &mut Cache<NoTable>, number: u32, (what, at, len): (u8, u64, u64)) {
    let namespace = (at % 2) as u32;
    let keys: Vec<Key> = (0..len).map(|place| [at + 2 * place, 1]).collect();
    match what {
        // A lookup; its lease stays for a while.
        0..8 => {
            let words = search(cache, namespace, &keys);
            let mut hold = Hold::new(1, u64::from(number), 0, namespace, 0, words.len() as u32);
            assert_eq!(cache.hold_piece(&mut hold, words), Ok(Held::All));
        }
        // A store. Chunks that are there already are in front of the new ones, and count as used.
        8..16 => store(cache, number, namespace, &keys),
        // A restored chunk is damaged.
        16..19 => {
            cache.invalidate(at as SlotId, 0, [at, 1], |_, _| true);
        }
        19..24 => {
            cache.end_session(1, at);
        }
        _ => cache.clear(Some(namespace)),
    }
    cache.check_all().unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    /// The eviction order after a restart is the same whether all chunks get their places at once, or piece by piece
    /// while chunks are used, stored and dropped.
    #[test]
    fn the_order_that_is_built_in_pieces_is_that_which_is_built_at_once(
        policy in prop::sample::select(&PolicyKind::ALL[..]),
        ticks in prop::collection::vec(1..30_u64, 0..60),
        steps in prop::collection::vec(
            (prop::option::of(1..30_u64), (0..25_u8, 0..70_u64, 1..5_u64)),
            0..30,
        ),
    ) {
        let ((mut whole, unplaced), (mut pieces, same)) = (restored(policy, &ticks), restored(policy, &ticks));
        prop_assert!(whole.go_on_placing(&mut unplaced.sort()));
        let mut sorted = same.sort();
        for (number, (allowed, step)) in (1..).zip(steps) {
            if let Some(allowed) = allowed {
                pieces.allow(allowed);
                let before = pieces.work();
                pieces.go_on_placing(&mut sorted);
                prop_assert!(pieces.work() - before <= allowed + 1);
                pieces.allow(u64::MAX);
            }
            use_or_drop(&mut whole, number, step);
            use_or_drop(&mut pieces, number, step);
        }
        prop_assert!(pieces.go_on_placing(&mut sorted));
        for cache in [&mut whole, &mut pieces] {
            cache.check_all().unwrap();
            prop_assert_eq!((cache.unplaced, cache.stats().evicted), (0, 0));
        }
        for namespace in 0..2 {
            let named = |cache: &Cache<NoTable>| -> Vec<Key> {
                cache.policy.dump(namespace).into_iter().map(|id| cache.chunks.get(id).key).collect()
            };
            prop_assert_eq!(named(&whole), named(&pieces));
        }
    }
}

#[test]
fn restored_chunks_are_in_the_order_of_their_last_access() {
    for policy in PolicyKind::ALL {
        let (mut cache, unplaced) = restored(policy, &[30, 5, 10, 7, 20, 6, 10, 8]);
        assert!(cache.go_on_placing(&mut unplaced.sort()));
        assert_eq!(cache.policy.dump(0), [2, 6, 4, 0]);
        assert_eq!(cache.policy.dump(1), [1, 5, 3, 7]);
    }
}

#[test]
fn limits_out_of_range_are_errors() {
    let config = CacheConfig::new(1 << 20, 16);
    let wrong = [
        CacheConfig { slab_bytes: 1 << 19, ..config },
        CacheConfig { slab_bytes: 3 << 20, ..config },
        CacheConfig { slab_bytes: 1 << 31, ..config },
        CacheConfig { slab_count: 0, ..config },
        CacheConfig { slab_bytes: 1 << 30, slab_count: u32::MAX, ..config },
        CacheConfig { chunks_max: 0, ..config },
        CacheConfig { keys_max: u32::MAX, ..config },
        CacheConfig { leases_max: 0, ..config },
        CacheConfig { pins_max: u32::MAX, ..config },
    ];
    for config in wrong {
        assert!(Cache::new(config, NoTable::new(1 << 16)).is_err(), "{config:?}");
    }
    let mut cache = Cache::new(config, NoTable::new(1 << 16)).unwrap();
    assert!(cache.register(64, 1, 0, 4096).is_err());
    assert!(cache.register(0, 0, 0, 4096).is_err() && cache.register(0, 65, 0, 4096).is_err());
    assert!(cache.register(0, 2, 2, 4096).is_err() && cache.register(0, 1, 0, 17 << 20).is_err());
    cache.register(0, 2, 1, 4096).unwrap();
    cache.register(0, 2, 1, 4096).unwrap();
    assert!(cache.register(0, 2, 1, 4097).is_err() && cache.register(0, 3, 0, 4096).is_err());
}

/// A message of records that make no sense counts as work all the same, because each record is looked at.
#[test]
fn what_is_refused_counts_as_work() {
    let mut cache = Cache::new(CacheConfig::new(1 << 20, 4), NoTable::new(1 << 16)).unwrap();
    let key = [1, 2];
    for slot in [0, 5, 1 << 20, SlotId::MAX] {
        let mut worked = cache.work();
        let mut counts = |cache: &Cache<NoTable>, what: &str| {
            assert!(cache.work() > worked, "{what}, slot {slot}");
            worked = cache.work();
        };
        assert!(!cache.adopt(1, 7, slot, 0, key));
        counts(&cache, "a declaration");
        assert!(!matches!(cache.commit(1, slot, 0, key, 0), Ok(Committed::Committed)));
        counts(&cache, "a commit");
        assert!(!matches!(cache.abort(1, slot, 0, key), Ok(Aborted::Freed)));
        counts(&cache, "an abort");
    }
}
