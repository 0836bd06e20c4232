//! The cache's rules (ARCHITECTURE.md, §3, §6 and §8), one by one. Without its rule, each of these tests would
//! serve wrong bytes, lose something, or leak.

#[path = "../cache_support/mod.rs"]
mod cache_support;
mod holds;
mod marks;
mod room;

use cache_support::ShardRef;
use cache_support::small::{
    NONCE, SLAB_BYTES, SLOTS_PER_SLAB, cache, cache_of, commit, config, declare_end, find, hits, leased,
    message, part, register, reserve, reserve_one, round, slot_of, store, store_ranks,
};
use cache_support::{State, chain, key};
use kvring_engine::cache::SlotTable;
use kvring_engine::cache::{
    Aborted, CacheConfig, CommitError, Committed, Held, Hold, HoldError, Invalidated, Key, Leaving,
    RegisterError, Reservation, Reserve, ReserveError, Round,
};
use kvring_shm_abi::lookup::Marked;
use kvring_shm_abi::namespace::namespace_id;

#[test]
fn garbage_of_a_failed_round_is_never_combined() {
    let mut cache = cache(4, &[4096; 4]);
    let name = key(1, 0);
    // Rank 1's load has failed. The other ranks compute on garbage, and commit.
    let slots: Vec<_> = (0..4).map(|rank| reserve_one(&mut cache, rank, round(1), name)).collect();
    for rank in [0, 2, 3] {
        assert_eq!(commit(&mut cache, rank, slots[rank as usize], name), Committed::Committed);
    }
    assert_eq!(cache.abort(1, slots[1].0, slots[1].1, name), Ok(Aborted::Freed));
    // The new round is not de-duplicated against shards that were committed in the failed one: every rank writes
    // again.
    for rank in 0..4 {
        let slot = reserve_one(&mut cache, rank, round(2), name);
        assert_eq!(hits(&mut cache, &[name]), 0, "visible before all ranks are");
        commit(&mut cache, rank as u8, slot, name);
    }
    let shards = find(&mut cache, 1, &[name]);
    assert_eq!(shards.len(), 4);
    for shard in shards {
        let State::Committed(header) = cache.table().entries[shard.slot as usize].state else {
            panic!("{shard:?}")
        };
        assert_eq!(header.round, round(2));
    }
}

#[test]
fn without_the_abort_the_rounds_stay_apart() {
    let mut cache = cache(4, &[4096; 2]);
    let name = key(1, 0);
    let garbage = reserve_one(&mut cache, 0, round(1), name);
    commit(&mut cache, 0, garbage, name);
    // Rank 1 never took part in round 1. Round 2 of rank 1 must not meet rank 0's shard of round 1.
    let good = reserve_one(&mut cache, 1, round(2), name);
    commit(&mut cache, 1, good, name);
    assert_eq!(hits(&mut cache, &[name]), 0);
    assert_eq!(reserve(&mut cache, 0, round(1), &[name]), [Reservation::Superseded]);
    let again = reserve_one(&mut cache, 0, round(2), name);
    commit(&mut cache, 0, again, name);
    assert_eq!(hits(&mut cache, &[name]), 1);
}

#[test]
fn a_writing_slot_is_freed_by_its_writer_alone() {
    let mut cache = cache(1, &[SLAB_BYTES / 4]);
    let keys = chain(1, 4);
    let slots: Vec<_> = reserve(&mut cache, 0, round(1), &keys).into_iter().map(slot_of).collect();
    // The client is detached, and still copies. Whatever is tried, nobody gets its slots.
    part(&mut cache, 0, Leaving::Detached { nonce: NONCE });
    cache.clear(None);
    cache.check_all().unwrap();
    assert_eq!(reserve(&mut cache, 0, round(2), &chain(2, 1)), [Reservation::NoSpace]);
    assert_eq!(cache.stats().orphans, 4);
    let other = Reserve { owner: 5, nonce: 1, ..message(0, round(1), &keys) };
    cache.reserve(other, &mut |_, answer| assert_eq!(answer, Reservation::NoSpace)).unwrap();
    let (slot, generation) = slots[0];
    assert_eq!(cache.commit(5, slot, generation, keys[0], 0), Err(CommitError::NotYours { slot, owner: 5 }));
    // Its process is gone for good, and so is any device that wrote on its behalf.
    part(&mut cache, 0, Leaving::Left { nonce: NONCE });
    cache.check_all().unwrap();
    assert_eq!((cache.stats().orphans, cache.stats().slots_writing), (0, 0));
    assert_eq!(slot_of(reserve(&mut cache, 0, round(2), &chain(2, 1))[0]).1, generation + 1);
}

#[test]
fn a_newer_round_orphans_what_an_older_one_writes() {
    let mut cache = cache(1, &[4096]);
    let name = key(1, 0);
    let old = reserve_one(&mut cache, 0, round(1), name);
    let new = reserve_one(&mut cache, 0, round(2), name);
    assert_ne!(old.0, new.0, "the old copy may still run");
    assert_eq!(cache.stats().orphans, 1);
    assert_eq!(commit(&mut cache, 0, old, name), Committed::Gone);
    assert_eq!(hits(&mut cache, &[name]), 0);
    assert_eq!(cache.stats().orphans, 0);
    assert_eq!(commit(&mut cache, 0, old, name), Committed::Gone);
    assert_eq!(commit(&mut cache, 0, new, name), Committed::Committed);
    assert_eq!(commit(&mut cache, 0, new, name), Committed::AlreadyCommitted);
    assert_eq!(hits(&mut cache, &[name]), 1);
}

#[test]
fn retries_are_no_accesses_and_reservations_count_once_for_each_round() {
    let mut cache = cache(1, &[SLAB_BYTES / 4]);
    let (old, new) = (chain(1, 2), chain(2, 2));
    store(&mut cache, 1, &old);
    find(&mut cache, 1, &old);
    store(&mut cache, 2, &new);
    cache.table_mut().touches.clear();
    for _ in 0..5 {
        find(&mut cache, 1, &old);
    }
    assert!(cache.table().touches.is_empty());
    cache.release(0, 1, 0, 0);
    store(&mut cache, 3, &[key(3, 0)]);
    assert_eq!((hits(&mut cache, &new), hits(&mut cache, &old)), (2, 1), "the retries kept the older chain");

    cache.table_mut().touches.clear();
    for _ in 0..3 {
        assert_eq!(reserve(&mut cache, 0, round(9), &new), [Reservation::Present; 2]);
    }
    assert_eq!(cache.table().touches.len(), 2);
}

#[test]
fn a_client_holds_no_more_than_its_share() {
    let bytes = SLAB_BYTES / 16;
    let limited = CacheConfig { client_bytes_max: 3 * bytes, leases_max: 2, ..config(1) };
    let mut cache = cache_of(limited, &[bytes]);
    for place in 0..8 {
        store(&mut cache, place, &[key(1, place.into())]);
    }
    let other: Vec<Key> = chain(1, 8).split_off(4);
    assert_eq!(leased(&mut cache, 0, 1, &chain(1, 8)), 3);
    assert_eq!(cache.client_bytes(0), 3 * bytes);
    assert_eq!(leased(&mut cache, 0, 2, &other), 0);
    assert_eq!(leased(&mut cache, 0, 2, &chain(7, 8)), 0, "a miss needs no room");
    assert_eq!(leased(&mut cache, 0, 1, &chain(1, 8)), 3, "the same admission again");
    assert_eq!(reserve(&mut cache, 0, round(20), &[key(2, 0)]), [Reservation::Busy]);
    assert!(cache.release(0, 1, 0, 1));
    assert_eq!(cache.client_bytes(0), bytes);
    assert_eq!(leased(&mut cache, 0, 2, &other), 2);
    // Another client has a share of its own.
    assert_eq!(leased(&mut cache, 1, 1, &chain(1, 8)), 6, "three are leased already, three are not");
    // And no more than two leases, however many the other has.
    assert_eq!(leased(&mut cache, 1, 2, &chain(1, 8)), 6);
    assert_eq!(leased(&mut cache, 1, 3, &chain(1, 8)), 0);
    assert!(cache.end_session(0, 2));
    assert_eq!(leased(&mut cache, 1, 3, &chain(1, 8)), 0);
    assert!(cache.end_session(1, 2));
    assert!(leased(&mut cache, 1, 3, &chain(1, 8)) >= 6);
}

#[test]
fn a_shared_prefix_is_charged_once_however_many_requests_hold_it() {
    let bytes = SLAB_BYTES / 16;
    let mut cache = cache_of(CacheConfig { client_bytes_max: 4 * bytes, ..config(1) }, &[bytes]);
    store(&mut cache, 0, &chain(1, 3));
    store(&mut cache, 1, &chain(2, 1));
    for session in 0..50 {
        assert_eq!(leased(&mut cache, 0, session, &chain(1, 3)), 3, "session {session}");
        assert_eq!(leased(&mut cache, 1, session, &chain(1, 3)), 3, "another client, session {session}");
        assert_eq!((cache.client_bytes(0), cache.client_bytes(1)), (3 * bytes, 0), "the first pays");
    }
    assert_eq!(leased(&mut cache, 0, 50, &chain(2, 1)), 1);
    assert_eq!(cache.client_bytes(0), 4 * bytes);
    // The payer parts: nobody pays for what the other one still leases, until a client pins it.
    part(&mut cache, 0, Leaving::Left { nonce: 7 });
    cache.check_all().unwrap();
    assert_eq!((cache.client_bytes(0), cache.client_bytes(1)), (0, 0));
    assert_eq!(leased(&mut cache, 2, 1, &chain(1, 2)), 2);
    assert_eq!((cache.client_bytes(1), cache.client_bytes(2)), (0, 2 * bytes));
    for session in 0..50 {
        assert!(cache.end_session(1, session));
    }
    cache.check_all().unwrap();
    assert_eq!((cache.client_bytes(1), cache.client_bytes(2)), (0, 2 * bytes));
    assert!(cache.end_session(2, 1));
    assert_eq!(cache.client_bytes(2), 0);
    cache.check_all().unwrap();
}

#[test]
fn who_holds_on_to_what_others_paid_for_does_not_use_up_their_share() {
    let bytes = SLAB_BYTES / 16;
    let mut cache = cache_of(CacheConfig { client_bytes_max: 4 * bytes, ..config(1) }, &[bytes]);
    for name in 0..3 {
        store(&mut cache, name, &chain(name.into(), 4));
    }
    // Client 1 also leases whatever client 0 has leased, and never releases it.
    for session in 0..3 {
        let keys = chain(session, 4);
        let expected = if session < 2 { 4 } else { 0 };
        assert_eq!(leased(&mut cache, 0, session, &keys), expected, "session {session}");
        if session < 2 {
            assert_eq!(leased(&mut cache, 1, session, &keys), 4, "at no cost");
            assert!(cache.end_session(0, session));
        }
        // Nobody pays for one share. From then on the payer goes on paying, so all that is leased stays bounded.
        assert_eq!(cache.client_bytes(0), if session == 0 { 0 } else { 4 * bytes });
        cache.check_all().unwrap();
    }
    for session in 0..2 {
        assert!(cache.end_session(1, session));
    }
    cache.check_all().unwrap();
    assert_eq!((cache.client_bytes(0), cache.client_bytes(1)), (0, 0));
}

#[test]
fn a_fifth_round_takes_the_place_of_an_idle_one() {
    let mut cache = cache(1, &[4096; 2]);
    let name = key(1, 0);
    let of = |source| Round { source, number: 1 };
    let slots: Vec<_> = (0..4).map(|source| reserve_one(&mut cache, 0, of(source), name)).collect();
    assert_eq!(reserve(&mut cache, 0, of(4), &[name]), [Reservation::NoSpace]);
    commit(&mut cache, 0, slots[2], name);
    assert_eq!(reserve(&mut cache, 0, of(2), &[name]), [Reservation::Pending { committed: true }]);
    assert_eq!(reserve(&mut cache, 0, of(3), &[name]), [Reservation::Pending { committed: false }]);
    reserve_one(&mut cache, 0, of(4), name);
    // The first round to complete drops the others.
    let other = reserve_one(&mut cache, 1, of(0), name);
    commit(&mut cache, 1, other, name);
    commit(&mut cache, 0, slots[0], name);
    assert_eq!(hits(&mut cache, &[name]), 1);
    assert_eq!((cache.stats().chunks_forming, cache.stats().orphans), (0, 3));
    assert_eq!(commit(&mut cache, 0, slots[1], name), Committed::Gone);
}

#[test]
fn round_numbers_wrap() {
    let mut cache = cache(1, &[4096; 2]);
    let name = key(1, 0);
    reserve_one(&mut cache, 0, round(u32::MAX), name);
    reserve_one(&mut cache, 0, round(2), name);
    assert_eq!(reserve(&mut cache, 0, round(u32::MAX), &[name]), [Reservation::Superseded]);
}

#[test]
fn hostile_messages_are_typed_errors() {
    let mut cache = cache(1, &[4096; 2]);
    let keys = vec![[0; 2]; 513];
    let message = Reserve { nonce: 0, ..message(0, round(0), &keys) };
    let mut reserve = |message| cache.reserve(message, &mut |_, _| panic!("nothing is answered"));
    assert_eq!(reserve(message), Err(ReserveError::TooManyKeys { keys: 513, most: 512 }));
    let message = Reserve { keys: &keys[..1], ..message };
    for namespace in [1, 63, 64, namespace_id(0, 1), u32::MAX] {
        let error = ReserveError::UnknownNamespace { namespace };
        assert_eq!(reserve(Reserve { namespace, ..message }), Err(error));
    }
    for rank in [2, 64, 255, 256, u32::MAX] {
        assert_eq!(
            reserve(Reserve { rank, ..message }),
            Err(ReserveError::UnknownRank { namespace: 0, rank })
        );
    }
    assert_eq!(reserve(Reserve { owner: 64, ..message }), Err(ReserveError::NoSuchOwner { owner: 64 }));
    let mut hold = |owner, namespace| cache.hold_piece(&mut Hold::new(owner, 0, 0, namespace, 0, 0), []);
    for namespace in [1, 63, 64, u32::MAX] {
        assert_eq!(hold(0, namespace), Err(HoldError::UnknownNamespace { namespace }));
    }
    for owner in [64, 255] {
        assert_eq!(hold(owner, 0), Err(HoldError::NoSuchOwner { owner }));
    }
    for slot in [SLOTS_PER_SLAB, u32::MAX - 1, u32::MAX] {
        let error = CommitError::NoSuchSlot { slot, count: SLOTS_PER_SLAB };
        assert_eq!(cache.commit(0, slot, 0, [0; 2], 0), Err(error));
        assert_eq!(cache.abort(0, slot, u64::MAX, [0; 2]), Err(error));
    }
    part(&mut cache, 255, Leaving::Detached { nonce: 0 });
    part(&mut cache, 63, Leaving::Left { nonce: u64::MAX });
    // The same key five hundred times gets one slot.
    let mut writes = 0;
    let message = Reserve { keys: &keys[..512], ..message };
    let count = &mut |_, answer| writes += u32::from(matches!(answer, Reservation::Write { .. }));
    cache.reserve(message, count).unwrap();
    assert_eq!(writes, 1);
    cache.check_all().unwrap();
}

/// One index, one namespace after the other: the id of the first does not lead to the second.
#[test]
fn an_id_of_a_namespace_that_is_gone_leads_nowhere() {
    let mut cache = cache(2, &[4096]);
    let (gone, id, later) = (namespace_id(0, 0), namespace_id(0, 1), namespace_id(0, 2));
    let other = RegisterError::OtherNamespace { namespace: id, there: gone };
    assert_eq!(cache.register(id, 1, 0, 4096), Err(other));
    assert!(cache.forget(gone));
    register(&mut cache, id, &[4096]);
    let keys = chain(1, 3);
    store_ranks(&mut cache, id, 0..1, 1, &keys);
    let mut words = Vec::new();
    for (namespace, found) in [(gone, 0), (later, 0), (id, 3)] {
        words.clear();
        let table = cache.table().chunks();
        table.search(namespace, keys.iter().copied(), keys.len(), Marked::Missing, &mut words);
        assert_eq!(words.len(), found);
    }
    for (namespace, expected) in [
        (gone, Err(HoldError::UnknownNamespace { namespace: gone })),
        (later, Err(HoldError::UnknownNamespace { namespace: later })),
        (id, Ok(Held::All)),
    ] {
        let mut hold = Hold::new(9, 9, 9, namespace, 0, 3);
        assert_eq!(cache.hold_piece(&mut hold, words.iter().copied()), expected);
    }
    assert!(cache.end_session(9, 9));
    let used = cache.used(id);
    for namespace in [gone, later] {
        cache.use_namespace(namespace);
        cache.clear(Some(namespace));
        assert!(cache.forget(namespace), "there is no such namespace");
    }
    assert_eq!((cache.used(gone), cache.used(id), cache.stats().chunks_visible), (0, used, 3));
    cache.check_all().unwrap();
    cache.clear(Some(id));
    assert_eq!(cache.stats().chunks_visible, 0);
    assert!(cache.forget(id));
}

#[test]
fn a_client_that_attaches_again_and_again_meets_a_limit() {
    let mut cache = cache(2, &[4096]);
    let mut busy = 0;
    for nonce in 0..400 {
        let keys = [key(nonce, 0)];
        let message = Reserve { owner: 3, nonce, ..message(0, round(1), &keys) };
        cache.reserve(message, &mut |_, answer| busy += u32::from(answer == Reservation::Busy)).unwrap();
        part(&mut cache, 3, Leaving::Detached { nonce });
        cache.check_all().unwrap();
    }
    assert_eq!(busy, 400 - 256);
    assert_eq!(declare_end(&mut cache, 3), 256);
    assert_eq!((cache.stats().slots_writing, cache.client_bytes(3)), (0, 0));
}

#[test]
fn the_self_check_goes_on_step_by_step_and_notices_a_stray_count() {
    let mut cache = cache(2, &[4096, 8192]);
    for rank in 0..2 {
        reserve(&mut cache, rank, round(1), &chain(1, 40));
    }
    for _ in 0..1000 {
        cache.check_step(7).unwrap();
    }
}

#[test]
fn the_self_check_of_an_arena_full_of_the_smallest_slots_ends_at_its_last_slot() {
    // 4 KiB slots leave no unused ids at a slab's end, and behind the last slot there is no slab.
    let mut cache = cache(2, &[4096]);
    store(&mut cache, 1, &chain(1, 2 * u64::from(SLOTS_PER_SLAB)));
    for _ in 0..1000 {
        cache.check_step(7).unwrap();
    }
}

#[test]
fn a_damaged_chunk_is_found_no_more_and_stored_again_while_a_lease_still_holds_it() {
    let mut cache = cache(4, &[4096; 2]);
    let name = key(1, 0);
    store_ranks(&mut cache, 0, 0..2, 1, &[name]);
    let shards = find(&mut cache, 1, &[name]);
    let ShardRef { slot, generation, .. } = shards[1];
    let reads = |namespace, rank| (namespace, rank) == (0, 1);
    // A client that reads other shards, or names another key, is refused.
    assert_eq!(cache.invalidate(slot, generation, name, |_, rank| rank == 0), Invalidated::Refused);
    assert_eq!(cache.invalidate(slot, generation, key(1, 1), reads), Invalidated::Refused);
    assert_eq!(cache.invalidate(u32::MAX, generation, name, reads), Invalidated::Refused);
    assert_eq!(cache.invalidate(slot, generation + 1, name, reads), Invalidated::Gone);
    assert_eq!(hits(&mut cache, &[name]), 1);
    assert_eq!(cache.invalidate(slot, generation, name, reads), Invalidated::Hidden);
    assert_eq!(cache.invalidate(slot, generation, name, reads), Invalidated::Gone, "said twice");
    cache.check_all().unwrap();
    assert_eq!(hits(&mut cache, &[name]), 0);
    assert_eq!((cache.stats().chunks_hidden, cache.stats().chunks_visible), (1, 0));
    // A leased chunk stays where it is, and clearing does not drop it.
    cache.clear(None);
    cache.check_all().unwrap();
    assert!(matches!(cache.table().entries[slot as usize].state, State::Hidden(_)));
    // The next store is not told that the chunk is present, and lookups find what it writes.
    store_ranks(&mut cache, 0, 0..2, 2, &[name]);
    let again = find(&mut cache, 2, &[name]);
    assert!(again.len() == 2 && again.iter().all(|new| shards.iter().all(|old| old.slot != new.slot)));
    // The last lease of the damaged chunk ends.
    assert!(cache.end_session(0, 1));
    cache.check_all().unwrap();
    assert_eq!(cache.table().entries[slot as usize].state, State::Free);
    assert_eq!((cache.stats().chunks_hidden, hits(&mut cache, &[name])), (0, 1));
    // A damaged chunk that nobody has leased is dropped at once.
    assert!(cache.end_session(0, 2));
    let ShardRef { slot, generation, .. } = again[1];
    assert_eq!(cache.invalidate(slot, generation, name, reads), Invalidated::Dropped);
    cache.check_all().unwrap();
    assert_eq!((cache.stats().slots_committed, cache.stats().bytes_used), (0, 0));
}
