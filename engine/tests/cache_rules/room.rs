//! Where there is no room: what goes for it, and what stays.

use crate::cache_support::small::{
    NONCE, SLAB_BYTES, SLOTS_PER_SLAB, cache, cache_of, commit, config, find, hits, leased, message, part,
    register, reserve, reserve_in, reserve_one, reserve_quietly, round, slot_of, store, store_ranks,
};
use crate::cache_support::{chain, key};
use kvring_engine::cache::{CacheConfig, Committed, Key, Leaving, Reservation, Reserve};
use kvring_engine::policy::PolicyKind;

#[test]
fn committed_shards_stay_while_a_sibling_is_written() {
    // There is room for two shards of each rank. Everything is in use, and one chunk waits for its second rank.
    let mut cache = cache(1, &[SLAB_BYTES / 4; 2]);
    let (waiting, other) = (key(1, 0), key(2, 0));
    let first = reserve_one(&mut cache, 0, round(1), waiting);
    let second = reserve_one(&mut cache, 1, round(1), waiting);
    commit(&mut cache, 0, first, waiting);
    store_ranks(&mut cache, 0, 0..2, 1, &[other]);
    // The visible chunk is evicted; the one that waits for a living writer is not.
    assert!(matches!(reserve(&mut cache, 0, round(3), &[key(3, 0)])[0], Reservation::Write { .. }));
    assert_eq!(hits(&mut cache, &[other]), 0);
    assert_eq!(commit(&mut cache, 1, second, waiting), Committed::Committed);
    assert_eq!(hits(&mut cache, &[waiting]), 1);
}

#[test]
fn leased_chunks_stay_and_others_go() {
    let mut cache = cache(1, &[SLAB_BYTES / 4]);
    let (leased, other) = (chain(1, 2), chain(2, 2));
    store(&mut cache, 1, &leased);
    store(&mut cache, 2, &other);
    assert_eq!(find(&mut cache, 1, &leased).len(), 2);
    hits(&mut cache, &other);
    for number in 3..20 {
        store(&mut cache, number, &[key(number.into(), 0)]);
        assert_eq!(hits(&mut cache, &leased), 2);
    }
    // If all four are leased there is no room, and the answer says so.
    let mine = chain(21, 2);
    store(&mut cache, 21, &mine);
    find(&mut cache, 2, &mine);
    assert_eq!(reserve(&mut cache, 0, round(30), &[key(30, 0)]), [Reservation::NoSpace]);
    assert!(cache.end_session(0, 1));
    assert_eq!(cache.stats().leases, 1);
    assert!(matches!(reserve(&mut cache, 0, round(30), &[key(30, 0)])[0], Reservation::Write { .. }));
    assert_eq!(hits(&mut cache, &leased), 1, "the tail of the colder chain goes first");
}

#[test]
fn a_message_never_evicts_its_own_chain() {
    let mut cache = cache(1, &[SLAB_BYTES / 4]);
    store(&mut cache, 1, &chain(1, 4));
    store(&mut cache, 2, &chain(2, 1));
    // Three of the four chunks are the message's own. One more fits, by evicting the fourth.
    let longer = chain(1, 5);
    let answers = reserve(&mut cache, 0, round(3), &longer);
    assert_eq!(answers[..3], [Reservation::Present; 3]);
    assert!(matches!(answers[3], Reservation::Write { .. }));
    assert_eq!(answers[4], Reservation::NoSpace);
    // The chunk just in front of the first key belongs to the chain, too.
    let mut cache = cache_of(config(1), &[SLAB_BYTES]);
    store(&mut cache, 1, &chain(1, 1));
    let keys = [key(1, 1)];
    let message = Reserve { parent: Some(key(1, 0)), ..message(0, round(2), &keys) };
    cache.reserve(message, &mut |_, answer| assert_eq!(answer, Reservation::NoSpace)).unwrap();
}

#[test]
fn sizes_take_spans_from_each_other() {
    let mut cache = cache(4, &[SLAB_BYTES / 8]);
    register(&mut cache, 1, &[3 * SLAB_BYTES]);
    store(&mut cache, 1, &chain(1, 32));
    assert_eq!(cache.stats().slabs_free, 0);
    // Another model needs three slabs in a row. All slabs have chunks that may be evicted.
    assert!(matches!(reserve_in(&mut cache, 1, 0, round(1), &[key(9, 0)])[0], Reservation::Write { .. }));
    assert!(cache.stats().spans_taken >= 3);
    assert_eq!(cache.stats().chunks_visible, 8);
    // A span that is being written is not taken back, however many keys ask for it.
    let answers = reserve(&mut cache, 0, round(2), &chain(2, 20));
    let written = answers.iter().filter(|answer| matches!(answer, Reservation::Write { .. })).count();
    assert_eq!(written, 8);
}

#[test]
fn a_colder_span_of_another_size_goes_before_a_warmer_chunk_of_this_one() {
    let mut cache = cache(2, &[SLAB_BYTES / 2]);
    register(&mut cache, 1, &[SLAB_BYTES]);
    store_ranks(&mut cache, 1, 0..1, 1, &[key(9, 0)]);
    store(&mut cache, 1, &chain(1, 2));
    store(&mut cache, 2, &chain(2, 2));
    assert_eq!((hits(&mut cache, &chain(1, 2)), hits(&mut cache, &chain(2, 2))), (2, 2));
    assert_eq!(cache.stats().spans_taken, 1);
}

/// A chunk of another world is evicted only if it gives back some of what is missing.
#[test]
fn nothing_is_evicted_that_gives_back_nothing_of_what_is_wanted() {
    // There are 1000 records: first for chunks of 8 ranks, then for chunks of 64.
    let mut cache = cache_of(CacheConfig { chunks_max: 1000, ..config(64) }, &[4096; 8]);
    register(&mut cache, 1, &[4096; 64]);
    for first in (0..1000).step_by(500) {
        let keys: Vec<Key> = (first..first + 500).map(|place| key(1, place)).collect();
        store_ranks(&mut cache, 0, 0..8, 1, &keys);
    }
    assert_eq!((cache.stats().chunks_visible, cache.stats().evicted), (1000, 0));
    for place in 0..100 {
        let before = cache.stats().evicted;
        let answers = reserve_in(&mut cache, 1, 0, round(2), &[key(2, place)]);
        assert!(matches!(answers[0], Reservation::Write { .. }), "{answers:?}");
        assert!(cache.stats().evicted - before <= 4, "{} chunks for one", cache.stats().evicted - before);
    }
    // The other way round.
    let mut cache = cache_of(CacheConfig { chunks_max: 16, ..config(64) }, &[4096; 8]);
    register(&mut cache, 1, &[4096; 64]);
    store_ranks(&mut cache, 1, 0..64, 1, &chain(1, 4));
    let answers = reserve(&mut cache, 0, round(1), &chain(2, 8));
    assert!(answers.iter().all(|answer| matches!(answer, Reservation::Write { .. })), "{answers:?}");
    assert_eq!(cache.stats().evicted, 2);
}

/// An incomplete chunk stays if it has no slot of the wanted size.
#[test]
fn an_incomplete_chunk_without_a_slot_of_the_size_stays() {
    let mut cache = cache(2, &[SLAB_BYTES / 2, SLAB_BYTES]);
    let half = reserve_one(&mut cache, 0, round(1), key(1, 0));
    commit(&mut cache, 0, half, key(1, 0));
    // Nor can its span be taken: another slot of it is being written.
    reserve_one(&mut cache, 0, round(1), key(4, 0));
    reserve_one(&mut cache, 1, round(1), key(2, 0));
    assert_eq!(reserve(&mut cache, 1, round(1), &[key(3, 0)]), [Reservation::NoSpace]);
    assert_eq!((cache.stats().evicted, cache.stats().chunks_forming), (0, 3));
}

/// A search that is cut into steps looks at everything in the end, also at chunks behind many that may not be
/// evicted.
#[test]
fn half_a_chunk_of_the_size_is_found_behind_many_of_another() {
    let mut cache = cache(4, &[4096, SLAB_BYTES]);
    let keys = chain(1, 200);
    let answers = reserve(&mut cache, 0, round(1), &keys);
    // The first chunk is still being written, so the span cannot be taken.
    for (answer, key) in answers.into_iter().zip(&keys).skip(1) {
        commit(&mut cache, 0, slot_of(answer), *key);
    }
    store_ranks(&mut cache, 0, 1..2, 1, &chain(2, 3));
    let answers = reserve(&mut cache, 1, round(1), &[key(3, 0)]);
    assert!(matches!(answers[0], Reservation::Write { .. }), "{answers:?}");
    assert_eq!(cache.stats().evicted, 1);
}

#[test]
fn what_is_not_leased_is_found_behind_many_that_are() {
    for policy in PolicyKind::ALL {
        let mut cache = cache_of(CacheConfig { policy, ..config(2) }, &[4096]);
        register(&mut cache, 1, &[SLAB_BYTES]);
        // 100 chunks are leased without an access, 156 were used, and a warm one has another size.
        store(&mut cache, 1, &[key(9, 0)]);
        store(&mut cache, 2, &chain(1, 100));
        store(&mut cache, 3, &chain(2, 155));
        assert_eq!(hits(&mut cache, &chain(2, 155)), 155);
        assert_eq!(leased(&mut cache, 0, 1, &[key(9, 0)]), 1);
        assert_eq!(leased(&mut cache, 0, 1, &chain(1, 100)), 100, "the same admission again");
        store_ranks(&mut cache, 1, 0..1, 1, &[key(3, 0)]);
        for place in 0..156 {
            let answer = reserve(&mut cache, 0, round(3), &[key(4, place)])[0];
            assert!(matches!(answer, Reservation::Write { .. }), "{policy}, key {place}: {answer:?}");
        }
        assert_eq!(cache.stats().spans_taken, 0, "{policy}: another size's was taken");
    }
}

#[test]
fn slabs_that_may_be_emptied_are_found_wherever_they_lie() {
    // How many slabs in a row one slot needs, and the distance between slabs that may not be emptied.
    for (bytes, run, every) in
        [(3 * SLAB_BYTES / 2, 2, 1), (16 * SLAB_BYTES, 16, 1), (16 * SLAB_BYTES, 16, 16)]
    {
        let slabs = 512;
        for at in (0..slabs - run).step_by(29) {
            let mut cache = cache_of(config(slabs as u32), &[SLAB_BYTES]);
            register(&mut cache, 1, &[bytes]);
            for place in 0..slabs {
                let (slot, generation) = reserve_quietly(&mut cache, key(1, place));
                let slab = u64::from(slot / SLOTS_PER_SLAB);
                if (at..at + run).contains(&slab) || !slab.is_multiple_of(every) {
                    cache.commit(0, slot, generation, key(1, place), 0).unwrap();
                }
            }
            let answer = reserve_in(&mut cache, 1, 0, round(1), &[key(2, 0)])[0];
            assert!(matches!(answer, Reservation::Write { .. }), "{run} slabs at {at}: {answer:?}");
        }
    }
}

#[test]
fn shard_sizes_that_no_namespace_has_any_more_are_given_back() {
    let mut cache = cache(4, &[4096]);
    for life in 0..20_u64 {
        for namespace in 1..4_u32 {
            for rank in 0..64 {
                let bytes =
                    4096 * (2 + 64 * (3 * life + u64::from(namespace)) + u64::from(rank)) % (2 << 20) + 8192;
                cache.register(namespace, 64, rank, bytes).unwrap();
            }
        }
        // A size stays as long as there is a slot of it, even an orphan.
        let slot = reserve_in(&mut cache, 1, 0, round(1), &[key(life, 0)])[0];
        cache.clear(None);
        (1..4).for_each(|namespace| assert!(cache.forget(namespace)));
        let (sizes, most) = cache.sizes();
        assert_eq!((sizes, most), (2, 256), "life {life}");
        part(&mut cache, 0, Leaving::Left { nonce: NONCE });
        assert!(matches!(slot, Reservation::Write { .. }));
        assert_eq!(cache.sizes().0, 1);
        cache.check_all().unwrap();
    }
}

#[test]
fn a_full_header_segment_is_no_space_and_not_a_fault() {
    let mut cache = cache(2, &[SLAB_BYTES / 2]);
    cache.table_mut().out_of_space = true;
    assert_eq!(reserve(&mut cache, 0, round(1), &chain(1, 2)), [Reservation::NoSpace; 2]);
    cache.table_mut().out_of_space = false;
    assert!(matches!(reserve(&mut cache, 0, round(1), &chain(1, 1))[0], Reservation::Write { .. }));
}

#[test]
fn a_message_asks_once_for_memory_that_is_not_there() {
    let mut cache = cache(2, &[SLAB_BYTES / 2]);
    cache.table_mut().out_of_space = true;
    assert_eq!(reserve(&mut cache, 0, round(1), &chain(1, 500)), [Reservation::NoSpace; 500]);
    // Memory is asked for twice: for a span of free slabs, and for one that would be taken from another size.
    assert!(cache.table().ensures <= 2, "{}", cache.table().ensures);
}

#[test]
fn no_chunk_goes_for_slots_whose_headers_have_no_memory() {
    let mut cache = cache(4, &[SLAB_BYTES / 8]);
    register(&mut cache, 1, &[SLAB_BYTES]);
    store(&mut cache, 1, &chain(1, 32));
    cache.table_mut().out_of_space = true;
    assert_eq!(reserve_in(&mut cache, 1, 0, round(1), &chain(9, 8)), [Reservation::NoSpace; 8]);
    assert_eq!(cache.stats().chunks_visible, 32);
    cache.table_mut().out_of_space = false;
    assert!(matches!(reserve_in(&mut cache, 1, 0, round(1), &[key(9, 0)])[0], Reservation::Write { .. }));
}
