//! What a scheduler says that it holds, and what is held of it. Without its rule, each of these tests would pin what is not
//! there, or let go of what somebody holds.
#![allow(clippy::unwrap_used, reason = "a test")]

use crate::cache_support::small::{
    SLAB_BYTES, cache, cache_of, config, find, hits, part, register, reserve, round, store, store_ranks,
};
use crate::cache_support::{VecTable, chain, hold, key, look_up, search};
use kvring_engine::cache::{
    Cache, CacheConfig, HoldError, Invalidated, Leaving, Reservation, SlotTable, Stats,
};
use kvring_shm_abi::chunk::ChunkWord;
use kvring_shm_abi::directory::CHUNK_IDS;
use kvring_shm_abi::lookup::Marked;

/// The most leases that one session may have.
const ADMISSIONS_MAX: u32 = 16;
const NAME: (u8, u64, u32) = (0, 1, 0);

/// A cache with the chain 1 of `len` chunks, and the words by which a client knows these.
fn with_chain(len: u64) -> (Cache<VecTable>, Vec<ChunkWord>) {
    let mut cache = cache(4, &[4096]);
    store(&mut cache, 1, &chain(1, len));
    let words = search(&cache, 0, &chain(1, len), Marked::Missing);
    assert_eq!(words.len() as u64, len);
    (cache, words)
}

fn held(cache: &Cache<VecTable>) -> (u64, u64) {
    cache.check_all().unwrap();
    let Stats { leases, pins, .. } = cache.stats();
    (leases, pins)
}

/// Which of these chunks nobody holds: a clear drops them. The cache is of no use afterwards.
fn not_held(mut cache: Cache<VecTable>, words: &[ChunkWord]) -> Vec<usize> {
    cache.clear(None);
    cache.check_all().unwrap();
    let is_gone = |at: &usize| cache.table().chunks().find(words[*at]).is_none();
    (0..words.len()).filter(is_gone).collect()
}

#[test]
fn a_message_beyond_the_leases_end_holds_nothing() {
    let (mut cache, words) = with_chain(8);
    assert_eq!(hold(&mut cache, NAME, 0, 1, &words[1..]), Err(HoldError::Gap { first: 1, len: 0 }));
    assert_eq!(held(&cache), (0, 0));
    assert_eq!(hold(&mut cache, NAME, 0, 0, &words[..3]), Ok(3));
    assert_eq!(hold(&mut cache, NAME, 0, 4, &words[4..]), Err(HoldError::Gap { first: 4, len: 3 }));
    assert_eq!(
        hold(&mut cache, NAME, 0, u32::MAX, &words[4..]),
        Err(HoldError::Gap { first: u32::MAX, len: 3 })
    );
    // Nor does another admission of the session have the first chunks.
    assert_eq!(hold(&mut cache, (0, 1, 1), 0, 3, &words[3..]), Err(HoldError::Gap { first: 3, len: 0 }));
    assert_eq!(held(&cache), (1, 3), "what was held before is held");
    assert_eq!(not_held(cache, &words), [3, 4, 5, 6, 7]);
}

#[test]
fn a_message_at_the_leases_end_appends() {
    let (mut cache, words) = with_chain(40);
    for (first, count) in [(0, 3), (3, 20), (23, 1), (24, 16)] {
        let part = &words[first..first + count];
        assert_eq!(hold(&mut cache, NAME, 0, first as u32, part), Ok(count as u32));
        assert_eq!(held(&cache), (1, (first + count) as u64));
    }
    // The lease keeps the order of its chunks: what is released is its tail.
    assert!(cache.release(0, 1, 0, 25));
    assert_eq!(not_held(cache, &words), (25..40).collect::<Vec<_>>());
}

#[test]
fn a_message_before_the_leases_end_cuts_it_there_and_appends() {
    let (mut cache, words) = with_chain(8);
    store(&mut cache, 2, &chain(2, 3));
    let other = search(&cache, 0, &chain(2, 3), Marked::Missing);
    assert_eq!(hold(&mut cache, NAME, 0, 0, &words), Ok(8));
    assert_eq!(hold(&mut cache, NAME, 0, 5, &other[..2]), Ok(2));
    assert_eq!(held(&cache), (1, 7));
    let all = [&words[..], &other].concat();
    // It also cuts if it has no chunk itself.
    assert_eq!(hold(&mut cache, NAME, 0, 6, &[]), Ok(0));
    assert_eq!(held(&cache), (1, 6));
    assert_eq!(not_held(cache, &all), [5, 6, 7, 9, 10]);
}

#[test]
fn a_message_without_chunks_from_the_first_on_ends_the_lease() {
    let (mut cache, words) = with_chain(3);
    assert_eq!(hold(&mut cache, NAME, 0, 0, &words), Ok(3));
    assert_eq!(hold(&mut cache, NAME, 0, 0, &[]), Ok(0));
    assert_eq!(held(&cache), (0, 0));
}

#[test]
fn a_message_may_be_repeated() {
    let (mut cache, words) = with_chain(30);
    assert_eq!(hold(&mut cache, NAME, 0, 0, &words[..10]), Ok(10));
    cache.table_mut().touches.clear();
    for _ in 0..3 {
        assert_eq!(hold(&mut cache, NAME, 0, 0, &words[..10]), Ok(10));
        assert_eq!((held(&cache), cache.client_bytes(0)), ((1, 10), 10 * 4096));
    }
    assert!(cache.table().touches.is_empty(), "a repetition is not an access");
    for _ in 0..3 {
        assert_eq!(hold(&mut cache, NAME, 0, 10, &words[10..]), Ok(20));
        assert_eq!((held(&cache), cache.client_bytes(0)), ((1, 30), 30 * 4096));
    }
    assert!(cache.end_session(0, 1));
    assert_eq!(held(&cache), (0, 0));
    assert_eq!(cache.client_bytes(0), 0);
}

#[test]
fn a_chunk_of_another_life_cuts_the_hold() {
    let (mut cache, old) = with_chain(8);
    // The fourth chunk is dropped and stored again: it has the same record, in another generation.
    let shard = cache.table().shards(old[3])[0];
    assert_eq!(cache.invalidate(shard.slot, shard.generation, key(1, 3), |_, _| true), Invalidated::Dropped);
    store(&mut cache, 2, &chain(1, 8));
    let new = search(&cache, 0, &chain(1, 8), Marked::Missing);
    assert_eq!((new[3].chunk(), new.len()), (old[3].chunk(), 8));
    assert_eq!(hold(&mut cache, NAME, 0, 0, &old), Ok(3));
    assert_eq!(held(&cache), (1, 3));
    assert_eq!(hold(&mut cache, NAME, 0, 3, &new[3..]), Ok(5));
    // A message may begin with such a chunk: then it only cuts.
    assert_eq!(hold(&mut cache, NAME, 0, 6, &old[3..4]), Ok(0));
    assert_eq!(held(&cache), (1, 6));
}

#[test]
fn a_chunk_of_another_namespace_cuts_the_hold() {
    let (mut cache, words) = with_chain(3);
    register(&mut cache, 1, &[4096]);
    store_ranks(&mut cache, 1, 0..1, 1, &chain(1, 3));
    let others = search(&cache, 1, &chain(1, 3), Marked::Missing);
    assert_eq!(hold(&mut cache, NAME, 0, 0, &[words[0], others[1], words[2]]), Ok(1));
    assert_eq!(hold(&mut cache, NAME, 1, 1, &words[1..]), Ok(0));
    assert_eq!(held(&cache), (1, 1));
    let namespace = 9;
    assert_eq!(hold(&mut cache, NAME, namespace, 0, &words), Err(HoldError::UnknownNamespace { namespace }));
    assert_eq!(held(&cache), (1, 1), "such a message does not even cut");
}

#[test]
fn an_id_beyond_the_table_cuts_the_hold() {
    let (mut cache, words) = with_chain(3);
    for id in [3, 1023, 1024, CHUNK_IDS - 1] {
        let beyond = ChunkWord::new(id, words[1].generation());
        assert_eq!(hold(&mut cache, NAME, 0, 0, &[words[0], beyond, words[2]]), Ok(1), "id {id}");
        assert_eq!(held(&cache), (1, 1));
    }
}

#[test]
fn a_chunk_that_is_only_forming_or_hidden_cuts_the_hold() {
    let (mut cache, words) = with_chain(3);
    reserve(&mut cache, 0, round(2), &[key(1, 3)]);
    // The forming chunk has the next record, which has had no chunk so far.
    assert_eq!(hold(&mut cache, NAME, 0, 0, &[words[0], ChunkWord::new(3, 0)]), Ok(1));
    assert_eq!(hold(&mut cache, (0, 2, 0), 0, 0, &words), Ok(3));
    let shard = cache.table().shards(words[1])[0];
    assert_eq!(cache.invalidate(shard.slot, shard.generation, key(1, 1), |_, _| true), Invalidated::Hidden);
    assert_eq!(hold(&mut cache, (0, 3, 0), 0, 0, &words), Ok(1));
    assert_eq!(held(&cache), (3, 1 + 3 + 1));
}

#[test]
fn more_than_the_share_is_cut_and_the_prefix_is_held() {
    let limited = CacheConfig { client_bytes_max: 5 * 4096, ..config(4) };
    let mut cache = cache_of(limited, &[4096]);
    for number in 0..2 {
        store(&mut cache, 1, &chain(1, 4 + 4 * number));
    }
    let words = search(&cache, 0, &chain(1, 8), Marked::Missing);
    assert_eq!(hold(&mut cache, NAME, 0, 0, &words[..3]), Ok(3));
    assert_eq!(hold(&mut cache, NAME, 0, 3, &words[3..]), Ok(2));
    assert_eq!((held(&cache), cache.client_bytes(0)), ((1, 5), 5 * 4096));
    // What somebody else pays for costs nothing.
    assert_eq!(hold(&mut cache, (1, 1, 0), 0, 0, &words), Ok(8));
    assert_eq!((cache.client_bytes(0), cache.client_bytes(1)), (5 * 4096, 3 * 4096));
    assert_eq!(hold(&mut cache, NAME, 0, 5, &words[5..]), Ok(3));
    assert_eq!(held(&cache), (2, 16));
}

#[test]
fn more_pins_than_a_client_may_have_cut_the_hold() {
    let mut cache = cache_of(CacheConfig { pins_max: 5, ..config(4) }, &[4096]);
    store(&mut cache, 1, &chain(1, 4));
    let words = search(&cache, 0, &chain(1, 4), Marked::Missing);
    assert_eq!(hold(&mut cache, NAME, 0, 0, &words), Ok(4));
    assert_eq!(hold(&mut cache, (0, 2, 0), 0, 0, &words), Ok(1));
    assert_eq!(hold(&mut cache, (1, 2, 0), 0, 0, &words), Ok(4), "another client has pins of its own");
    assert!(cache.end_session(1, 2));
    assert_eq!(hold(&mut cache, NAME, 0, 0, &words), Ok(4), "its own places are room for it");
    assert_eq!(held(&cache), (2, 5));
}

#[test]
fn a_session_has_a_limited_number_of_leases() {
    let (mut cache, words) = with_chain(2);
    for admission in 0..ADMISSIONS_MAX {
        assert_eq!(hold(&mut cache, (0, 1, admission), 0, 0, &words), Ok(2));
    }
    assert_eq!(hold(&mut cache, (0, 1, ADMISSIONS_MAX), 0, 0, &words), Ok(0));
    assert_eq!(held(&cache), (u64::from(ADMISSIONS_MAX), 2 * u64::from(ADMISSIONS_MAX)));
    // Neither those that it has, nor other sessions, are in the way of anything.
    assert_eq!(hold(&mut cache, (0, 1, 3), 0, 0, &words[..1]), Ok(1));
    assert_eq!(hold(&mut cache, (0, 2, 0), 0, 0, &words), Ok(2));
    assert_eq!(hold(&mut cache, (1, 1, 0), 0, 0, &words), Ok(2));
    assert!(cache.release(0, 1, 3, 0));
    assert_eq!(hold(&mut cache, (0, 1, ADMISSIONS_MAX), 0, 0, &words), Ok(2));
}

/// Room for eight chunks: six of a chain, and two that were used after that.
fn full_with_chain() -> (Cache<VecTable>, Vec<ChunkWord>) {
    let mut cache = cache(1, &[SLAB_BYTES / 8]);
    store(&mut cache, 1, &chain(1, 6));
    store(&mut cache, 2, &chain(2, 2));
    let words = search(&cache, 0, &chain(1, 6), Marked::Missing);
    (cache, words)
}

#[test]
fn a_long_chain_is_evicted_tail_first_however_many_messages_held_it() {
    for len in 1..=6 {
        let (mut cache, words) = full_with_chain();
        for (at, part) in words.chunks(len).enumerate() {
            let first = (at * len) as u32;
            assert_eq!(hold(&mut cache, NAME, 0, first, part), Ok(part.len() as u32));
        }
        assert!(cache.end_session(0, 1));
        let mut left = Vec::new();
        for number in 3..9 {
            store(&mut cache, number, &[key(number.into(), 0)]);
            let count = |keys: &[_]| search(&cache, 0, keys, Marked::There).len();
            left.push((count(&chain(1, 6)), count(&chain(2, 2))));
        }
        assert_eq!(left, [(6, 1), (6, 0), (5, 0), (4, 0), (3, 0), (2, 0)], "{len} chunks a message");
    }
}

#[test]
fn the_head_of_a_chain_is_later_than_its_tail_however_many_messages_held_it() {
    for len in 1..=6 {
        let (mut cache, words) = full_with_chain();
        for (at, part) in words.chunks(len).enumerate() {
            assert_eq!(hold(&mut cache, NAME, 0, (at * len) as u32, part), Ok(part.len() as u32));
        }
        let tick =
            |word: &ChunkWord| cache.table().entries[cache.table().shards(*word)[0].slot as usize].tick;
        let ticks: Vec<u64> = words.iter().map(tick).collect();
        assert!(ticks.windows(2).all(|pair| pair[0] > pair[1]), "{ticks:?}, {len} chunks a message");
    }
}

#[test]
fn what_is_held_is_never_dropped() {
    let (mut cache, words) = full_with_chain();
    assert_eq!(hold(&mut cache, NAME, 0, 0, &words), Ok(6));
    // The other two chunks make room, and nothing else can.
    for number in 3..6 {
        let answers = reserve(&mut cache, 0, round(number), &chain(u64::from(number), 3));
        let written = answers.iter().filter(|answer| matches!(answer, Reservation::Write { .. })).count();
        assert_eq!(written, if number == 3 { 2 } else { 0 });
    }
    cache.clear(None);
    cache.check_all().unwrap();
    assert_eq!(search(&cache, 0, &chain(1, 6), Marked::Missing), words);
}

#[test]
fn a_lease_ends_with_its_client() {
    let (mut cache, words) = with_chain(4);
    assert_eq!(hold(&mut cache, NAME, 0, 0, &words), Ok(4));
    assert_eq!(hold(&mut cache, (1, 1, 0), 0, 0, &words[..2]), Ok(2));
    part(&mut cache, 0, Leaving::Left { nonce: 7 });
    assert_eq!(held(&cache), (1, 2));
    assert_eq!(not_held(cache, &words), [2, 3]);
}

/// A preempted request is looked up under its next admission while it still holds its chunks under the one before.
#[test]
fn each_admission_has_a_lease_of_its_own() {
    let (mut cache, _) = with_chain(4);
    assert_eq!(look_up(&mut cache, (0, 1, 0), 0, &chain(1, 4)).len(), 4);
    assert_eq!(look_up(&mut cache, (0, 1, 1), 0, &chain(1, 3)).len(), 3);
    assert_eq!(held(&cache), (2, 7));
    assert!(cache.release(0, 1, 0, 0));
    assert_eq!(held(&cache), (1, 3));
    assert_eq!(find(&mut cache, 2, &chain(1, 4)).len(), 4);
    assert!(cache.end_session(0, 1));
    assert_eq!(held(&cache), (1, 4));
    assert_eq!(hits(&mut cache, &chain(1, 4)), 4);
}
