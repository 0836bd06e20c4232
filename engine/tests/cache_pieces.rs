//! Long work goes on in pieces: no piece does more than it may, and all pieces together do what one call would do.

#![allow(clippy::unwrap_used, reason = "a test")]

mod cache_support;

use cache_support::small::{
    NONCE, SLAB_BYTES, cache, cache_of, config, message, part, register, reserve, reserve_in,
    reserve_quietly, round, slot_of, store, store_ranks,
};
use cache_support::{VecTable, chain, key, search};
use kvring_engine::cache::{
    Cache, CacheConfig, Ears, Heard, Held, Hold, Key, Leaving, Parting, Reservation, Reserve,
};
use kvring_shm_abi::chunk::ChunkWord;
use kvring_shm_abi::lookup::Marked;
use proptest::prelude::*;
use std::collections::BTreeMap;

/// How many records one chunk of 64 ranks takes, together with the other rounds of its key and a step of a search
/// for room.
const CHUNK: u64 = 1024;

/// Calls `piece`, with `allowed` records each time, until it says that all is done. Returns the number of calls.
fn in_pieces(
    cache: &mut Cache<VecTable>,
    allowed: u64,
    what: &str,
    mut piece: impl FnMut(&mut Cache<VecTable>) -> bool,
) -> u32 {
    for calls in 1.. {
        cache.allow(allowed);
        let before = cache.work();
        let done = piece(cache);
        let spent = cache.work() - before;
        assert!(spent <= allowed + CHUNK, "{what}: {spent} records where {allowed} were allowed");
        if done {
            cache.allow(u64::MAX);
            return calls;
        }
    }
    unreachable!()
}

/// Says in pieces of this many chunks that a client holds what it has found. Returns the number of chunks.
fn find_in_pieces(cache: &mut Cache<VecTable>, session: u64, keys: &[Key], piece: usize) -> u32 {
    let words = search(cache, 0, keys, Marked::Missing);
    let mut hold = Hold::new(0, session, 0, 0, 0, words.len() as u32);
    for part in words.chunks(piece) {
        assert_eq!(cache.hold_piece(&mut hold, part.iter().copied()), Ok(Held::All));
    }
    cache.check_all().unwrap();
    hold.held
}

fn reserve_in_pieces(
    cache: &mut Cache<VecTable>,
    namespace: u32,
    rank: u32,
    number: u32,
    keys: &[Key],
    allowed: u64,
) -> (Vec<Reservation>, u32) {
    let (mut answers, mut parent) = (Vec::new(), None);
    let mut going = cache.reservation(namespace, keys.len());
    let calls = in_pieces(cache, allowed, "a reservation", |cache| {
        let keys = &keys[answers.len()..];
        let message = Reserve { namespace, parent, ..message(rank, round(number), keys) };
        let done = cache
            .reserve_piece(message, &mut going, &mut || Heard::All, &mut |_, answer| answers.push(answer))
            .unwrap();
        parent = done.checked_sub(1).map(|last| keys[last]).or(parent);
        done == keys.len()
    });
    (answers, calls)
}

/// The longest requests of a client that there may be, with the most ranks.
#[test]
fn no_call_does_more_than_it_may_and_what_one_chunk_takes() {
    // 128 chunks of 64 ranks fill the arena.
    let mut cache = cache_of(CacheConfig { keys_max: 8192, ..config(32) }, &[4096; 64]);
    let first = chain(1, 128);
    for rank in 0..64 {
        let (answers, calls) = reserve_in_pieces(&mut cache, 0, rank, 1, &first, 64);
        assert!(calls > 4, "{calls} calls");
        for (answer, key) in answers.into_iter().zip(&first) {
            cache.commit(rank as u8, slot_of(answer).0, slot_of(answer).1, *key, 0).unwrap();
        }
    }
    // Each key comes 64 times.
    let keys: Vec<Key> = first.iter().cycle().take(8192).copied().collect();
    let words = search(&cache, 0, &keys, Marked::Missing);
    let mut hold = Hold::new(0, 1, 0, 0, 0, 8192);
    let hold_in_pieces = |cache: &mut Cache<VecTable>, hold: &mut Hold| {
        in_pieces(cache, 4096, "a hold", |cache| {
            let rest = words[hold.held as usize..].iter().copied();
            cache.hold_piece(hold, rest).unwrap() == Held::All
        })
    };
    let calls = hold_in_pieces(&mut cache, &mut hold);
    assert!(calls > 100, "{calls} calls");
    // The same again: first what the lease has is unpinned.
    let mut again = Hold::new(0, 1, 0, 0, 0, 8192);
    let calls = hold_in_pieces(&mut cache, &mut again);
    assert!((4..20).contains(&calls), "{calls} calls");
    assert_eq!((hold.held, again.held, cache.stats().pins), (8192, 8192, 8192));
    assert!(in_pieces(&mut cache, 256, "a release", |cache| cache.release(0, 1, 0, 8000)) == 1);
    let calls = in_pieces(&mut cache, 256, "a session's end", |cache| cache.end_session(0, 1));
    assert!(calls > 16, "{calls} calls");
    // Everything is evicted for new chunks, and then their writer dies.
    let (answers, calls) = reserve_in_pieces(&mut cache, 0, 7, 2, &chain(2, 128), 256);
    assert!(answers.iter().all(|answer| matches!(answer, Reservation::Write { .. })), "{answers:?}");
    assert!(calls > 2, "{calls} calls");
    let mut parting = Parting::new(7, Leaving::Left { nonce: NONCE });
    let calls = in_pieces(&mut cache, 64, "a death", |cache| cache.part(&mut parting));
    assert!(calls > 4, "{calls} calls");
    assert_eq!((cache.stats().slots_writing, cache.stats().chunks_forming), (0, 0));
    // Next a clear.
    store_ranks(&mut cache, 0, 0..64, 3, &chain(3, 100));
    let mut at = Some(0);
    let calls = in_pieces(&mut cache, 256, "a clear", |cache| {
        at = cache.clear_step(None, at.unwrap(), &mut || Heard::All);
        at.is_none()
    });
    assert!(calls > 16, "{calls} calls");
    assert_eq!(cache.stats().slabs_free, 32);
    cache.check_all().unwrap();
}

/// What [`Cache::allow`] bounds is what calls say that they have touched: here are the numbers that they must say.
#[test]
fn each_call_counts_what_it_touches() {
    fn spent<R>(cache: &mut Cache<VecTable>, call: impl FnOnce(&mut Cache<VecTable>) -> R) -> u64 {
        let before = cache.work();
        call(cache);
        cache.work() - before
    }
    let (n, ranks) = (50, 4);
    let keys = chain(1, n);
    let mut cache = cache(4, &[4096; 4]);
    for rank in 0..4 {
        let mut slots = Vec::new();
        let reserved = spent(&mut cache, |cache| slots = reserve(cache, rank, round(1), &keys));
        // Each key is looked for twice, and a chunk and a slot change. The first slot's slab is cut before that.
        assert_eq!(reserved > 4 * n, rank == 0, "{reserved}");
        assert!(reserved >= 4 * n, "{reserved}");
        let (slot, generation) = slot_of(slots[0]);
        let commit =
            |cache: &mut Cache<VecTable>| cache.commit(rank as u8, slot, generation, keys[0], 0).unwrap();
        // The last one makes the chunk visible.
        assert_eq!(spent(&mut cache, commit), if rank == 3 { 1 + ranks } else { 1 });
        for (answer, key) in slots.into_iter().zip(&keys).skip(1) {
            cache.commit(rank as u8, slot_of(answer).0, slot_of(answer).1, *key, 0).unwrap();
        }
    }
    let words = search(&cache, 0, &keys, Marked::Missing);
    let find = |cache: &mut Cache<VecTable>, owner| {
        let mut hold = Hold::new(owner, 1, 0, 0, 0, words.len() as u32);
        let piece = |words: &[ChunkWord]| {
            spent(cache, |cache| {
                assert_eq!(cache.hold_piece(&mut hold, words.iter().copied()), Ok(Held::All));
            })
        };
        words.chunks(25).map(piece).collect::<Vec<_>>()
    };
    // Each chunk gets its place in a lease, a pin and a new age. The first pin of a chunk looks at its slots, and so does
    // an access.
    let (first, again) = (25 * (2 + 2 * ranks), 25 * (2 + ranks));
    assert_eq!(find(&mut cache, 0), [first, first]);
    assert_eq!(find(&mut cache, 1), [again, again]);
    // A repetition takes each of the lease's chunks off it first, and is no access.
    assert_eq!(find(&mut cache, 1), [n + 25 * 2, 25 * 2]);
    assert_eq!(spent(&mut cache, |cache| cache.release(1, 1, 0, 20)), n - 20);
    assert_eq!(spent(&mut cache, |cache| cache.end_session(1, 1)), 20);
    assert_eq!(spent(&mut cache, |cache| cache.end_session(0, 1)), n * (1 + ranks));
    // Each slot goes back, and the slab with the last one.
    let cleared = spent(&mut cache, |cache| cache.clear(None));
    assert!(cleared > n * (2 + 2 * ranks), "{cleared}");
}

/// The same for a chunk that is evicted, and for a client that may have nothing.
#[test]
fn a_search_and_a_refusal_count_what_they_look_at() {
    let mut cache = cache(1, &[SLAB_BYTES / 8]);
    store(&mut cache, 1, &chain(1, 8));
    let before = cache.work();
    reserve(&mut cache, 0, round(2), &chain(2, 1));
    // The key twice, the search and its look at a chunk, that chunk and its slot, which goes back, the new ones.
    assert!(cache.work() - before >= 9, "{}", cache.work() - before);
    let mut cache = cache_of(config(2), &[4096]);
    for nonce in 0..256 {
        let keys = [key(nonce, 0)];
        cache.reserve(Reserve { owner: 3, nonce, ..message(0, round(1), &keys) }, &mut |_, _| {}).unwrap();
    }
    let before = cache.work();
    let keys = chain(1, 50);
    let message = Reserve { owner: 3, nonce: 256, ..message(0, round(1), &keys) };
    cache.reserve(message, &mut |_, answer| assert_eq!(answer, Reservation::Busy)).unwrap();
    assert_eq!(cache.work() - before, 50);
}

/// A client that was thrown out dies: its slots are orphans already, and looking at them is work all the same.
#[test]
fn slots_that_are_orphans_already_count_as_work() {
    let mut cache = cache(1, &[4096]);
    reserve(&mut cache, 0, round(1), &chain(1, 200));
    part(&mut cache, 0, Leaving::Detached { nonce: NONCE });
    let mut parting = Parting::new(0, Leaving::Lingers);
    let calls = in_pieces(&mut cache, 10, "a death", |cache| cache.part(&mut parting));
    assert!(calls >= 20, "{calls} calls");
    assert_eq!(cache.stats().orphans, 200);
}

/// A client was thrown out many times, and has declared nothing: its attachments are looked for one by one.
#[test]
fn looking_for_a_clients_attachments_counts_as_work() {
    let mut cache = cache(2, &[4096]);
    for nonce in 0..200 {
        let keys = [key(nonce, 0)];
        let message = Reserve { owner: 3, nonce, ..message(0, round(1), &keys) };
        let is_slot = |answer| matches!(answer, Reservation::Write { .. });
        cache.reserve(message, &mut |_, answer| assert!(is_slot(answer))).unwrap();
        part(&mut cache, 3, Leaving::Detached { nonce });
    }
    let mut freed = 0;
    let calls = in_pieces(&mut cache, 100, "a declaration's end", |cache| cache.declare_end(3, &mut freed));
    assert!(calls >= 20, "{calls} calls");
    assert_eq!(freed, 200);
}

/// Leaves are evicted first, however many pieces an access had.
#[test]
fn the_order_of_eviction_does_not_depend_on_the_pieces() {
    let left_after = |access: &dyn Fn(&mut Cache<VecTable>)| {
        // There is room for eight chunks, and a search for room aims at one spare slot.
        let mut cache = cache(1, &[SLAB_BYTES / 8]);
        store(&mut cache, 1, &chain(1, 6));
        store(&mut cache, 2, &chain(2, 2));
        access(&mut cache);
        cache.end_session(0, 1);
        let mut left = Vec::new();
        for number in 3..9 {
            store(&mut cache, number, &[key(number.into(), 0)]);
            left.push((hits_quietly(&cache, &chain(1, 6)), hits_quietly(&cache, &chain(2, 2))));
        }
        (left, cache)
    };
    let (expected, _) = left_after(&|cache| assert_eq!(find_in_pieces(cache, 1, &chain(1, 6), 6), 6));
    assert_eq!(expected, [(6, 1), (6, 0), (5, 0), (4, 0), (3, 0), (2, 0)]);
    for piece in 1..6 {
        let looked_up = left_after(&|cache| assert_eq!(find_in_pieces(cache, 1, &chain(1, 6), piece), 6));
        assert_eq!(looked_up.0, expected, "looked up in pieces of {piece}");
    }
    for allowed in [1, 10, 20, 1000] {
        let reserved = left_after(&|cache| {
            let (answers, calls) = reserve_in_pieces(cache, 0, 0, 77, &chain(1, 6), allowed);
            assert_eq!(answers, [Reservation::Present; 6]);
            assert_eq!(calls > 1, allowed < 20, "{calls} calls");
        });
        assert_eq!(reserved.0, expected, "reserved with {allowed} records at a time");
    }
}

/// How many chunks of a chain there are, without an access to them.
fn hits_quietly(cache: &Cache<VecTable>, keys: &[Key]) -> usize {
    let entries = &cache.table().entries;
    let is_there = |key: &&Key| {
        entries.iter().any(
            |entry| matches!(entry.state, cache_support::State::Committed(header) if header.key == **key),
        )
    };
    keys.iter().take_while(is_there).count()
}

/// While a hold is under way, not everything has been heard. So what the client had and says again stays, although its lease
/// is made anew piece by piece.
#[test]
fn what_is_held_again_in_pieces_stays_all_the_time() {
    let mut cache = cache(1, &[SLAB_BYTES / 8]);
    store(&mut cache, 1, &chain(1, 8));
    assert_eq!(find_in_pieces(&mut cache, 1, &chain(1, 8), 8), 8);
    let words = search(&cache, 0, &chain(1, 8), Marked::Missing);
    let mut hold = Hold::new(0, 1, 0, 0, 0, 8);
    let mut waits = 0;
    for part in words.chunks(3) {
        // Another client wants room between two pieces.
        let (keys, mut going) = ([key(9, 0)], cache.reservation(0, 1));
        let ears: &mut Ears<'_> = &mut || Heard::NotYet;
        let message = message(0, round(9), &keys);
        cache
            .reserve_piece(message, &mut going, ears, &mut |_, answer| {
                assert_eq!(answer, Reservation::NoSpace);
            })
            .unwrap();
        waits += u32::from(cache.is_waiting());
        assert_eq!(cache.hold_piece(&mut hold, part.iter().copied()), Ok(Held::All));
        cache.check_all().unwrap();
    }
    assert!(waits > 0, "it was never unpinned, and nothing is tested");
    assert!(!cache.is_waiting());
    cache.heard(cache.awaits().unwrap_or_default());
    cache.go_on_dropping();
    assert_eq!(search(&cache, 0, &chain(1, 8), Marked::Missing), words);
    assert_eq!((cache.stats().leases, cache.stats().pins, cache.stats().evicted), (1, 8, 0));
    // Another chain under the same admission: chunks that it does not need are released.
    assert_eq!(find_in_pieces(&mut cache, 1, &chain(1, 2), 1), 2);
    assert_eq!(cache.stats().pins, 2);
}

/// A lookup of an admission that already has a lease on other chunks, which its pieces replace.
#[test]
fn a_lookup_takes_the_place_of_an_earlier_one_piece_by_piece() {
    let mut cache = cache(1, &[SLAB_BYTES / 16]);
    store(&mut cache, 1, &chain(1, 6));
    store(&mut cache, 2, &chain(2, 8));
    assert_eq!(find_in_pieces(&mut cache, 1, &chain(1, 6), 2), 6);
    assert_eq!(find_in_pieces(&mut cache, 1, &chain(2, 8), 3), 8);
    assert_eq!((cache.stats().leases, cache.stats().pins), (1, 8));
    let (held, left) = (search(&cache, 0, &chain(2, 8), Marked::Missing), chain(1, 6));
    cache.clear(None);
    assert_eq!(search(&cache, 0, &chain(2, 8), Marked::Missing), held);
    assert!(search(&cache, 0, &left, Marked::There).is_empty());
}

/// How many chunks a client's share has room for.
const SHARE: u64 = 6;

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the clients have leased before, and however many pieces a hold has: it charges no client beyond its share,
    /// and holds as much as the client may lease.
    #[test]
    fn a_hold_charges_nobody_beyond_his_share(
        steps in prop::collection::vec((0..3_u8, 0..4_u64, 0..4_u64, 1..12_u64, 1..13_usize), 1..60),
    ) {
        let bytes = SLAB_BYTES / 64;
        let mut cache = cache_of(CacheConfig { client_bytes_max: SHARE * bytes, ..config(1) }, &[bytes]);
        // Four chains have a prefix in common.
        let chain_of = |chain: u64, len: u64| -> Vec<Key> {
            (0..len).map(|place| key(if place < 4 { 0 } else { chain }, place)).collect()
        };
        for chain in 0..4 {
            // They are stored in parts, because slots that are being written are charged too.
            chain_of(chain, 12).chunks(4).for_each(|keys| store(&mut cache, chain as u32, keys));
        }
        let mut leases: BTreeMap<(u8, u64), Vec<Key>> = BTreeMap::new();
        for (client, session, chain, len, piece) in steps {
            prop_assert!(cache.end_session(client, session));
            leases.remove(&(client, session));
            let keys = chain_of(chain, len);
            let mut room = SHARE - cache.client_bytes(client) / bytes;
            let expected = keys.iter().take_while(|key| {
                let is_free = leases.values().any(|lease| lease.contains(key));
                let fits = is_free || room > 0;
                room -= u64::from(fits && !is_free);
                fits
            });
            let expected = expected.count();
            let words = search(&cache, 0, &keys, Marked::Missing);
            prop_assert_eq!(words.len(), keys.len());
            let mut hold = Hold::new(client, session, 0, 0, 0, words.len() as u32);
            for part in words.chunks(piece) {
                let held = cache.hold_piece(&mut hold, part.iter().copied()).unwrap();
                if held == Held::Cut {
                    break;
                }
            }
            prop_assert_eq!(hold.held as usize, expected);
            if expected > 0 {
                leases.insert((client, session), keys[..expected].to_vec());
            }
            cache.check_all().unwrap();
            for client in 0..3 {
                let charged = cache.client_bytes(client) / bytes;
                prop_assert!(charged <= SHARE, "client {} stands at {} of {}", client, charged, SHARE);
            }
        }
    }
}

/// Two slabs of small chunks, which are to become one large slot.
fn small_and_large() -> Cache<VecTable> {
    let mut cache = cache(2, &[4096]);
    register(&mut cache, 1, &[2 * SLAB_BYTES]);
    register(&mut cache, 2, &[SLAB_BYTES]);
    store(&mut cache, 1, &chain(1, 500));
    cache
}

fn ask_for_large(cache: &mut Cache<VecTable>, allowed: u64) -> Vec<Reservation> {
    let mut answers = Vec::new();
    let mut going = cache.reservation(1, 1);
    let keys = [key(9, 0)];
    let message = Reserve { owner: 1, namespace: 1, ..message(0, round(1), &keys) };
    cache.allow(allowed);
    let ears: &mut Ears<'_> = &mut || Heard::All;
    cache.reserve_piece(message, &mut going, ears, &mut |_, answer| answers.push(answer)).unwrap();
    cache.allow(u64::MAX);
    cache.check_all().unwrap();
    answers
}

/// Goes on until no slab is being emptied any more: each call drops as many chunks as can be marked at one time.
fn empty_all(cache: &mut Cache<VecTable>) {
    while cache.is_emptying() {
        let before = cache.work();
        cache.go_on_emptying(&mut || Heard::All);
        assert!(cache.work() > before, "it comes to no end");
        cache.check_all().unwrap();
    }
}

#[test]
fn what_is_being_emptied_gives_out_nothing_and_stays_together() {
    let mut cache = small_and_large();
    // The emptying has begun to drop chunks, and then the client for which it was begun is gone.
    assert!(ask_for_large(&mut cache, 1000).is_empty());
    assert!(cache.is_emptying());
    let (chunks, bytes) = (cache.stats().chunks_visible, cache.stats().bytes_used);
    assert!((1..500).contains(&chunks), "{chunks} chunks");
    assert_eq!(bytes, chunks * 4096, "what is free of it is not used");
    // No other reservation gets a slot in the closed slabs, neither of their own size nor of another one.
    assert_eq!(cache.stats().slabs_free, 0);
    for (namespace, name) in [(0, 7), (2, 8)] {
        let mut answers = Vec::new();
        let mut going = cache.reservation(namespace, 1);
        let keys = [key(name, 0)];
        let message = Reserve { owner: 2, namespace, ..message(0, round(1), &keys) };
        cache.allow(2);
        let ears: &mut Ears<'_> = &mut || Heard::All;
        cache.reserve_piece(message, &mut going, ears, &mut |_, answer| answers.push(answer)).unwrap();
        assert!(answers.is_empty(), "{answers:?}");
    }
    cache.allow(u64::MAX);
    cache.check_all().unwrap();
    empty_all(&mut cache);
    assert_eq!((cache.is_emptying(), cache.stats().slabs_free, cache.stats().chunks_visible), (false, 2, 0));
    assert!(matches!(ask_for_large(&mut cache, u64::MAX)[0], Reservation::Write { .. }));
}

#[test]
fn one_chunk_that_is_leased_meanwhile_keeps_its_slabs() {
    let mut cache = small_and_large();
    assert!(ask_for_large(&mut cache, 300).is_empty());
    assert!(cache.is_emptying());
    assert_eq!(hits_quietly(&cache, &chain(1, 500)), 500, "first it only looks");
    assert_eq!(find_in_pieces(&mut cache, 1, &chain(1, 500)[..300], 100), 300);
    empty_all(&mut cache);
    assert!(!cache.is_emptying());
    cache.check_all().unwrap();
    assert_eq!(cache.stats().evicted, 0, "looked first, dropped nothing");
    assert_eq!(ask_for_large(&mut cache, u64::MAX), [Reservation::NoSpace]);
    cache.end_session(0, 1);
    assert!(matches!(ask_for_large(&mut cache, u64::MAX)[0], Reservation::Write { .. }));
}

#[test]
fn spans_that_are_taken_are_counted_when_they_are() {
    let mut cache = small_and_large();
    let mut taken = Vec::new();
    // After the emptying has begun to drop chunks, one that it has not reached yet is leased.
    assert!(ask_for_large(&mut cache, 1000).is_empty());
    taken.push(cache.stats().spans_taken);
    let last = chain(1, 500).into_iter().rev().find(|key| hits_quietly(&cache, &[*key]) == 1).unwrap();
    assert_eq!(find_in_pieces(&mut cache, 1, &[last], 1), 1);
    empty_all(&mut cache);
    assert!(!cache.is_emptying());
    taken.push(cache.stats().spans_taken);
    cache.end_session(0, 1);
    assert!(matches!(ask_for_large(&mut cache, u64::MAX)[0], Reservation::Write { .. }));
    taken.push(cache.stats().spans_taken);
    assert_eq!(taken, [0, 1, 2]);
}

/// A search that has looked at everything is not repeated for the message's next key.
#[test]
fn a_search_in_vain_is_made_once_for_a_message() {
    // Every slab has a chunk that is being written, and a shard needs two slabs.
    let mut cache = cache(1024, &[SLAB_BYTES / 2]);
    register(&mut cache, 1, &[2 * SLAB_BYTES]);
    for place in 0..2048 {
        let slot = reserve_quietly(&mut cache, key(1, place));
        if place % 2 == 0 {
            cache.commit(0, slot.0, slot.1, key(1, place), 0).unwrap();
        }
    }
    let before = cache.work();
    let one = reserve_in(&mut cache, 1, 0, round(1), &[key(2, 0)]);
    let spent_for_one = cache.work() - before;
    let before = cache.work();
    let many = reserve_in(&mut cache, 1, 0, round(1), &chain(3, 500));
    let spent_for_many = cache.work() - before;
    assert_eq!(one, [Reservation::NoSpace]);
    assert_eq!(many, [Reservation::NoSpace; 500]);
    assert!(spent_for_many < spent_for_one + 500 * 8, "{spent_for_one} for one, {spent_for_many} for 500");
}

/// The same if records are missing: every chunk is being written.
#[test]
fn a_search_for_a_record_in_vain_is_made_once_for_a_message() {
    let mut cache = cache_of(CacheConfig { chunks_max: 16, ..config(4) }, &[4096]);
    (0..63).for_each(|namespace| register(&mut cache, namespace, &[4096]));
    reserve(&mut cache, 0, round(1), &chain(1, 16));
    let mut spent = |keys: u64| {
        let before = cache.work();
        let answers = reserve(&mut cache, 0, round(1), &chain(1 + keys, keys));
        assert_eq!(answers, vec![Reservation::NoSpace; keys as usize]);
        cache.work() - before
    };
    let (one, many) = (spent(1), spent(500));
    assert!(many < one + 500 * 8, "{one} for one, {many} for 500");
}
