//! Eviction in two halves: what is marked, what spares it, and what is decided. Without its rule, each of these tests would
//! drop what a scheduler holds, hide what nobody drops, or let somebody wait for ever.
#![allow(clippy::unwrap_used, reason = "a test")]

use crate::cache_support::small::{
    NONCE, SLAB_BYTES, cache, cache_of, config, message, register, reserve, round, slot_of, store,
    store_ranks,
};
use crate::cache_support::{VecTable, chain, hold, key, search};
use kvring_engine::cache::{
    Cache, CacheConfig, Ears, Going, Heard, Invalidated, Key, Leaving, Parting, Reservation, Reserve,
};
use kvring_engine::policy::PolicyKind;
use kvring_shm_abi::chunk::ChunkWord;
use kvring_shm_abi::lookup::Marked;

/// Four chunks of a chain fill the arena.
fn full() -> (Cache<VecTable>, Vec<ChunkWord>) {
    let mut cache = cache(1, &[SLAB_BYTES / 4]);
    store(&mut cache, 1, &chain(1, 4));
    let words = found(&cache, 4);
    (cache, words)
}

fn found(cache: &Cache<VecTable>, len: u64) -> Vec<ChunkWord> {
    search(cache, 0, &chain(1, len), Marked::Missing)
}

/// A reservation of rank 0 that goes on after it had to wait.
struct Waiting {
    going: Going,
    namespace: u32,
    keys: Vec<Key>,
    answers: Vec<Reservation>,
}

impl Waiting {
    fn new(cache: &mut Cache<VecTable>, namespace: u32, keys: Vec<Key>) -> Waiting {
        let going = cache.reservation(namespace, keys.len());
        Waiting { going, namespace, keys, answers: Vec::new() }
    }

    /// Goes on. True: everything is answered.
    fn go_on(&mut self, cache: &mut Cache<VecTable>, ears: &mut Ears<'_>) -> bool {
        let done = self.answers.len();
        let parent = done.checked_sub(1).map(|last| self.keys[last]);
        let keys = &self.keys[done..];
        let message = Reserve { namespace: self.namespace, parent, ..message(0, round(9), keys) };
        let answers = &mut self.answers;
        cache.reserve_piece(message, &mut self.going, ears, &mut |_, answer| answers.push(answer)).unwrap();
        cache.check_all().unwrap();
        self.answers.len() == self.keys.len()
    }

    /// How many slots it was given.
    fn written(&self) -> usize {
        self.answers.iter().filter(|answer| matches!(answer, Reservation::Write { .. })).count()
    }
}

/// Asks for one more chunk than there is room for, while a scheduler has not been heard.
fn wait_for_room(cache: &mut Cache<VecTable>) -> Waiting {
    let mut waiting = Waiting::new(cache, 0, vec![key(9, 0)]);
    assert!(!waiting.go_on(cache, &mut || Heard::NotYet));
    assert!(cache.is_waiting() && !cache.is_dropping());
    waiting
}

/// Everything has been heard: what is still marked goes.
fn decide(cache: &mut Cache<VecTable>) {
    cache.heard(cache.awaits().unwrap_or_default());
    cache.go_on_dropping();
    assert!(!cache.is_waiting() && !cache.is_dropping());
    cache.check_all().unwrap();
}

#[test]
fn a_marked_chunk_is_found_by_nobody_but_readers_of_a_dead_engine() {
    let (mut cache, words) = full();
    wait_for_room(&mut cache);
    assert_eq!(found(&cache, 4), words[..3], "the tail is marked");
    assert_eq!(search(&cache, 0, &chain(1, 4), Marked::There), words);
    assert_eq!((cache.stats().chunks_visible, cache.stats().evicted), (4, 0), "and nothing is dropped");
    // Workers may load it: a scheduler's message may still be on its way.
    assert!(cache.table().shards(words[3]).len() == 1);
}

#[test]
fn a_reservation_that_had_to_wait_goes_on_after_the_decision() {
    let (mut cache, words) = full();
    let mut waiting = wait_for_room(&mut cache);
    assert!(!waiting.go_on(&mut cache, &mut || panic!("what is marked is asked about once")));
    decide(&mut cache);
    assert!(waiting.go_on(&mut cache, &mut || panic!("there is room")));
    assert_eq!((waiting.written(), cache.stats().evicted), (1, 1));
    assert_eq!(found(&cache, 4), words[..3]);
    assert!(search(&cache, 0, &chain(1, 4), Marked::There).len() == 3);
}

/// Everything of one batch is spared while the service still listens for it; what it has heard then says nothing of the next one.
#[test]
fn what_was_heard_for_an_earlier_batch_decides_nothing() {
    let (mut cache, words) = full();
    wait_for_room(&mut cache);
    let earlier = cache.awaits().unwrap();
    assert_eq!(hold(&mut cache, (0, 1, 0), 0, 0, &words[3..]), Ok(1));
    assert_eq!(cache.awaits(), None);
    wait_for_room(&mut cache);
    let batch = cache.awaits().unwrap();
    assert_ne!(batch, earlier);
    cache.heard(earlier);
    assert!(cache.is_waiting() && !cache.is_dropping());
    assert_eq!(search(&cache, 0, &chain(1, 4), Marked::There).len(), 4);
    cache.heard(batch);
    assert!(cache.is_dropping());
}

/// A scheduler that holds whatever is marked, and lets go of it at once, keeps no store waiting for ever.
#[test]
fn a_search_does_not_wait_for_ever_for_what_is_held_again_and_again() {
    let (mut cache, words) = full();
    let mut waiting = Waiting::new(&mut cache, 0, vec![key(9, 0)]);
    let mut waits = 0;
    while !waiting.go_on(&mut cache, &mut || Heard::NotYet) {
        waits += 1;
        assert!(waits < 100, "it waits for ever");
        assert_eq!(hold(&mut cache, (0, 1, 0), 0, 0, &words), Ok(4));
        assert!(cache.end_session(0, 1));
    }
    assert_eq!(waiting.answers, [Reservation::NoSpace]);
    assert!(waits > 4, "{waits}");
}

#[test]
fn what_is_held_by_then_is_spared_and_another_one_goes() {
    let (mut cache, words) = full();
    let mut waiting = wait_for_room(&mut cache);
    assert_eq!(hold(&mut cache, (0, 1, 0), 0, 0, &words), Ok(4));
    assert!(!cache.is_waiting(), "nothing else is marked");
    assert_eq!(found(&cache, 4), words, "found again by the same word");
    assert!(waiting.go_on(&mut cache, &mut || panic!("nothing may be marked")));
    assert_eq!(waiting.answers, [Reservation::NoSpace], "all of them are held");
    assert!(cache.end_session(0, 1));
    // Only the tail is held: the next one goes.
    let mut waiting = wait_for_room(&mut cache);
    assert_eq!(hold(&mut cache, (0, 1, 0), 0, 0, &words[3..]), Ok(1));
    assert!(!waiting.go_on(&mut cache, &mut || Heard::NotYet));
    decide(&mut cache);
    assert!(waiting.go_on(&mut cache, &mut || panic!("there is room")));
    assert_eq!(waiting.written(), 1);
    assert_eq!(search(&cache, 0, &[key(1, 3)], Marked::Missing), words[3..]);
}

#[test]
fn a_release_before_the_decision_changes_nothing() {
    let (mut cache, words) = full();
    let mut waiting = wait_for_room(&mut cache);
    assert_eq!(hold(&mut cache, (0, 1, 0), 0, 0, &words), Ok(4));
    assert!(cache.end_session(0, 1));
    // It was spared, so somebody has to mark it again.
    assert!(!cache.is_waiting());
    decide(&mut cache);
    assert_eq!((found(&cache, 4), cache.stats().evicted), (words, 0));
    assert!(waiting.go_on(&mut cache, &mut || Heard::All));
    assert_eq!((waiting.written(), cache.stats().evicted), (1, 1));
}

#[test]
fn a_hold_that_is_cut_spares_only_what_it_holds() {
    let (mut cache, words) = full();
    wait_for_room(&mut cache);
    let stale = ChunkWord::new(words[1].chunk(), words[1].generation() + 1);
    assert_eq!(hold(&mut cache, (0, 1, 0), 0, 0, &[words[0], stale, words[3]]), Ok(1));
    assert!(cache.is_waiting());
    decide(&mut cache);
    assert_eq!(found(&cache, 4), words[..3]);
}

#[test]
fn nothing_visible_is_dropped_while_a_scheduler_cannot_say_what_it_holds() {
    for policy in PolicyKind::ALL {
        let mut cache = cache_of(CacheConfig { policy, ..config(1) }, &[SLAB_BYTES / 4]);
        store(&mut cache, 1, &chain(1, 4));
        let words = found(&cache, 4);
        let mut waiting = Waiting::new(&mut cache, 0, chain(9, 3));
        assert!(waiting.go_on(&mut cache, &mut || Heard::Never), "nobody waits");
        assert_eq!((waiting.answers, cache.is_waiting()), (vec![Reservation::NoSpace; 3], false));
        assert_eq!(cache.clear_step(None, 0, &mut || Heard::Never), Some(0), "to be tried again");
        cache.check_all().unwrap();
        assert_eq!(found(&cache, 4), words);
        // The next message is not refused for that.
        let mut waiting = Waiting::new(&mut cache, 0, chain(9, 3));
        assert!(waiting.go_on(&mut cache, &mut || Heard::All));
        assert_eq!(waiting.written(), 3);
    }
}

/// The eviction order is not disturbed by chunks that were marked and spared.
#[test]
fn what_was_spared_for_a_scheduler_that_cannot_speak_still_goes_tail_first() {
    for policy in PolicyKind::ALL {
        // A search marks two chunks of 128 at a time.
        let mut cache = cache_of(CacheConfig { policy, ..config(1) }, &[SLAB_BYTES / 128]);
        store(&mut cache, 1, &chain(1, 128));
        for _ in 0..3 {
            let mut waiting = Waiting::new(&mut cache, 0, vec![key(9, 0)]);
            assert!(waiting.go_on(&mut cache, &mut || Heard::Never));
        }
        for number in 0..20 {
            let before = found(&cache, 128).len();
            store(&mut cache, 2, &[key(9, number)]);
            let after = search(&cache, 0, &chain(1, 128), Marked::There).len();
            let gone = 128 + number + 1 - cache.stats().chunks_visible;
            assert_eq!(after as u64, 128 - gone, "{policy}: a hole in a chain of {before}");
        }
    }
}

#[test]
fn incomplete_chunks_go_without_asking_anybody() {
    let mut cache = cache(1, &[SLAB_BYTES / 4, SLAB_BYTES / 2]);
    // Two chunks have the shard of one rank, and nobody writes them.
    for (number, answer) in reserve(&mut cache, 0, round(1), &chain(1, 4)).into_iter().enumerate() {
        let (slot, generation) = slot_of(answer);
        cache.commit(0, slot, generation, key(1, number as u64), 0).unwrap();
    }
    let mut waiting = Waiting::new(&mut cache, 0, vec![key(9, 0)]);
    assert!(waiting.go_on(&mut cache, &mut || panic!("no lookup finds them")));
    assert_eq!((waiting.written(), cache.stats().chunks_forming), (1, 4));
}

#[test]
fn a_reservation_of_a_marked_chunk_spares_it() {
    let (mut cache, words) = full();
    wait_for_room(&mut cache);
    let mut present = Waiting::new(&mut cache, 0, chain(1, 4));
    assert!(present.go_on(&mut cache, &mut || panic!("all of it is there")));
    assert_eq!(present.answers, [Reservation::Present; 4]);
    assert!(!cache.is_waiting());
    decide(&mut cache);
    assert_eq!((found(&cache, 4), cache.stats().evicted), (words, 0));
}

#[test]
fn a_marked_parent_of_a_message_is_spared() {
    let (mut cache, words) = full();
    wait_for_room(&mut cache);
    let keys = [key(1, 4)];
    let message = Reserve { parent: Some(key(1, 3)), ..message(0, round(2), &keys) };
    let mut going = cache.reservation(0, 1);
    let done = cache.reserve_piece(message, &mut going, &mut || Heard::NotYet, &mut |_, _| {}).unwrap();
    assert_eq!((done, cache.is_waiting()), (0, true), "it waits for another one");
    decide(&mut cache);
    assert_eq!(search(&cache, 0, &[key(1, 3)], Marked::Missing), words[3..]);
    assert_eq!(cache.stats().evicted, 1);
}

#[test]
fn what_all_are_spared_from_is_found_again_by_the_same_words() {
    let (mut cache, words) = full();
    assert_eq!(cache.clear_step(None, 0, &mut || Heard::NotYet), Some(4));
    assert!(found(&cache, 4).is_empty());
    cache.spare_all();
    cache.check_all().unwrap();
    assert_eq!((found(&cache, 4), cache.is_waiting()), (words.clone(), false));
    decide(&mut cache);
    assert_eq!((found(&cache, 4), cache.stats().cleared), (words, 0));
}

#[test]
fn a_clear_waits_and_drops_what_nobody_holds_by_then() {
    let (mut cache, words) = full();
    assert_eq!(cache.clear_step(None, 0, &mut || Heard::NotYet), Some(4));
    assert_eq!(cache.clear_step(None, 4, &mut || panic!("nothing new is marked")), Some(4));
    assert_eq!(hold(&mut cache, (0, 1, 0), 0, 0, &words[..2]), Ok(2));
    assert_eq!(cache.stats().chunks_visible, 4);
    decide(&mut cache);
    assert_eq!(cache.clear_step(None, 4, &mut || panic!("nothing is marked")), None);
    assert_eq!((found(&cache, 4), cache.stats().cleared), (words[..2].to_vec(), 2));
    assert_eq!((cache.stats().chunks_visible, cache.stats().evicted), (2, 0));
}

#[test]
fn a_clear_that_has_to_listen_again_and_again_comes_to_its_end() {
    // More chunks than can be marked at one time.
    let mut cache = cache(1, &[4096]);
    store(&mut cache, 1, &chain(1, 200));
    let words = found(&cache, 200);
    let (mut from, mut waits) = (Some(0), 0);
    while let Some(at) = from {
        from = cache.clear_step(None, at, &mut || Heard::NotYet);
        if cache.is_waiting() {
            // One of each batch is held meanwhile.
            let is_marked = |at: &usize| search(&cache, 0, &[key(1, *at as u64)], Marked::Missing).is_empty();
            let is_there = |at: &usize| !search(&cache, 0, &[key(1, *at as u64)], Marked::There).is_empty();
            let at = (0..200).filter(is_there).find(is_marked).unwrap();
            assert_eq!(hold(&mut cache, (0, waits, 0), 0, 0, &words[at..=at]), Ok(1));
            decide(&mut cache);
            waits += 1;
        }
    }
    assert!(waits > 1, "{waits} batches");
    assert_eq!((cache.stats().chunks_visible, cache.stats().cleared), (waits, 200 - waits));
}

#[test]
fn a_damaged_chunk_goes_whether_it_is_marked_or_not() {
    let (mut cache, words) = full();
    let mut waiting = wait_for_room(&mut cache);
    let shard = cache.table().shards(words[3])[0];
    assert_eq!(cache.invalidate(shard.slot, shard.generation, key(1, 3), |_, _| true), Invalidated::Dropped);
    cache.check_all().unwrap();
    assert!(!cache.is_waiting(), "nothing is left to be decided");
    assert!(waiting.go_on(&mut cache, &mut || panic!("there is room")));
    assert_eq!((waiting.written(), cache.stats().evicted), (1, 0));
}

#[test]
fn what_is_marked_by_one_search_waits_for_one_decision_whoever_else_wants_room() {
    let (mut cache, words) = full();
    let mut first = wait_for_room(&mut cache);
    let mut second = Waiting::new(&mut cache, 0, vec![key(8, 0)]);
    assert!(!second.go_on(&mut cache, &mut || panic!("nothing more is marked")));
    assert_eq!(cache.clear_step(None, 0, &mut || panic!("nothing more is marked")), Some(0));
    decide(&mut cache);
    assert!(first.go_on(&mut cache, &mut || panic!("there is room")));
    assert!(second.go_on(&mut cache, &mut || Heard::All));
    assert_eq!((first.written(), second.written()), (1, 1));
    assert_eq!(found(&cache, 4), words[..2]);
}

#[test]
fn a_search_for_a_record_waits_too() {
    let mut cache = cache_of(CacheConfig { chunks_max: 4, ..config(1) }, &[4096]);
    store(&mut cache, 1, &chain(1, 4));
    let words = found(&cache, 4);
    let mut waiting = wait_for_room(&mut cache);
    assert_eq!(hold(&mut cache, (0, 1, 0), 0, 0, &words[3..]), Ok(1));
    assert!(!waiting.go_on(&mut cache, &mut || Heard::NotYet));
    assert_eq!(found(&cache, 4), words[..2]);
    decide(&mut cache);
    assert!(waiting.go_on(&mut cache, &mut || panic!("there is a record")));
    assert_eq!((waiting.written(), cache.stats().chunks_visible), (1, 3));
    let mut deaf = Waiting::new(&mut cache, 0, chain(7, 2));
    assert!(deaf.go_on(&mut cache, &mut || Heard::Never));
    assert_eq!((deaf.answers, cache.stats().chunks_visible), (vec![Reservation::NoSpace; 2], 3));
}

#[test]
fn what_is_dropped_in_pieces_goes_on_in_pieces() {
    let mut cache = cache(1, &[4096]);
    store(&mut cache, 1, &chain(1, 40));
    assert_eq!(cache.clear_step(None, 0, &mut || Heard::NotYet), Some(40));
    cache.heard(cache.awaits().unwrap_or_default());
    for left in (0..40).rev() {
        cache.allow(1);
        assert!(cache.is_dropping());
        cache.go_on_dropping();
        cache.check_all().unwrap();
        assert_eq!(cache.stats().chunks_visible, left);
    }
    assert!(!cache.is_waiting());
    // Between two pieces a chunk that is left may still be held.
    cache.allow(u64::MAX);
    store(&mut cache, 2, &chain(1, 4));
    let words = found(&cache, 4);
    assert_eq!(cache.clear_step(None, 0, &mut || Heard::NotYet), Some(40));
    cache.heard(cache.awaits().unwrap_or_default());
    cache.allow(1);
    cache.go_on_dropping();
    cache.allow(u64::MAX);
    let left: Vec<ChunkWord> = search(&cache, 0, &chain(1, 4), Marked::There);
    assert_eq!(hold(&mut cache, (0, 1, 0), 0, 0, &words[..1]), Ok(u32::from(left.contains(&words[0]))));
    cache.go_on_dropping();
    cache.check_all().unwrap();
    assert_eq!(u64::from(!left.is_empty()), cache.stats().chunks_visible);
}

/// Two slabs of small chunks are to become one large slot. Everything is marked, and nothing is dropped yet.
fn emptying() -> (Cache<VecTable>, Waiting, Vec<ChunkWord>) {
    let mut cache = cache(2, &[SLAB_BYTES / 8]);
    register(&mut cache, 1, &[2 * SLAB_BYTES]);
    store(&mut cache, 1, &chain(1, 16));
    let words = found(&cache, 16);
    let mut waiting = Waiting::new(&mut cache, 1, vec![key(9, 0)]);
    assert!(!waiting.go_on(&mut cache, &mut || Heard::NotYet));
    assert!(cache.is_waiting() && cache.is_emptying());
    assert!(found(&cache, 16).is_empty());
    (cache, waiting, words)
}

#[test]
fn slabs_for_another_size_are_emptied_after_the_decision() {
    let (mut cache, mut waiting, _) = emptying();
    cache.go_on_emptying(&mut || panic!("what is marked is asked about once"));
    assert_eq!(cache.stats().chunks_visible, 16);
    decide(&mut cache);
    assert!(waiting.go_on(&mut cache, &mut || panic!("nothing is left to be marked")));
    assert_eq!((waiting.written(), cache.stats().chunks_visible, cache.is_emptying()), (1, 0, false));
}

#[test]
fn one_marked_chunk_that_is_held_keeps_all_of_its_slabs() {
    for at in [0, 7, 15] {
        let (mut cache, mut waiting, words) = emptying();
        assert_eq!(hold(&mut cache, (0, 1, 0), 0, 0, &words[at..=at]), Ok(1));
        decide(&mut cache);
        assert!(waiting.go_on(&mut cache, &mut || Heard::All));
        assert_eq!(waiting.answers, [Reservation::NoSpace]);
        assert!(!cache.is_emptying());
        assert_eq!((found(&cache, 16), cache.stats().evicted), (words, 0), "chunk {at} is held");
        // The slabs are open again: their own size finds a slot there.
        assert!(cache.end_session(0, 1));
        let mut own = Waiting::new(&mut cache, 0, vec![key(8, 0)]);
        assert!(own.go_on(&mut cache, &mut || Heard::All));
        assert_eq!(own.written(), 1);
    }
}

/// The slabs have more chunks than can be marked at one time.
#[test]
fn one_chunk_that_is_held_of_the_first_that_were_marked_keeps_the_others_from_being_marked() {
    let mut cache = cache(2, &[SLAB_BYTES / 128]);
    register(&mut cache, 1, &[2 * SLAB_BYTES]);
    store(&mut cache, 1, &chain(1, 256));
    let words = found(&cache, 256);
    let mut waiting = Waiting::new(&mut cache, 1, vec![key(9, 0)]);
    assert!(!waiting.go_on(&mut cache, &mut || Heard::NotYet));
    let is_marked = |at: &usize| search(&cache, 0, &[key(1, *at as u64)], Marked::Missing).is_empty();
    let marked: Vec<usize> = (0..256).filter(is_marked).collect();
    assert!((1..256).contains(&marked.len()), "{marked:?}");
    let held = words[marked[0]];
    assert_eq!(hold(&mut cache, (0, 1, 0), 0, 0, &[held]), Ok(1));
    assert!(waiting.go_on(&mut cache, &mut || panic!("nothing more is marked")));
    assert_eq!((waiting.answers, cache.is_emptying()), (vec![Reservation::NoSpace], false));
    assert_eq!((found(&cache, 256), cache.stats().evicted), (words, 0));
}

/// Some chunks have gone already when one that comes later is held: then no more go.
#[test]
fn a_chunk_that_is_held_before_it_is_marked_spares_those_that_were_marked_before_it() {
    let mut cache = cache(2, &[SLAB_BYTES / 128]);
    register(&mut cache, 1, &[2 * SLAB_BYTES]);
    store(&mut cache, 1, &chain(1, 256));
    let words = found(&cache, 256);
    let mut waiting = Waiting::new(&mut cache, 1, vec![key(9, 0)]);
    assert!(!waiting.go_on(&mut cache, &mut || Heard::NotYet));
    decide(&mut cache);
    let gone = cache.stats().evicted as usize;
    assert!(gone > 20, "{gone} chunks");
    // The chunks are looked at in the order of their slots, which is that of the chain: this one is in the middle of the next
    // that would be marked.
    let at = gone + 10;
    assert_eq!(search(&cache, 0, &[key(1, at as u64)], Marked::Missing), [words[at]]);
    assert_eq!(hold(&mut cache, (0, 1, 0), 0, 0, &[words[at]]), Ok(1));
    assert!(waiting.go_on(&mut cache, &mut || Heard::All));
    assert_eq!((waiting.answers, cache.is_emptying()), (vec![Reservation::NoSpace], false));
    assert_eq!(cache.stats().evicted as usize, gone);
}

#[test]
fn slabs_are_open_again_if_a_scheduler_cannot_say_what_it_holds() {
    let mut cache = cache(2, &[SLAB_BYTES / 8]);
    register(&mut cache, 1, &[2 * SLAB_BYTES]);
    store(&mut cache, 1, &chain(1, 15));
    let words = found(&cache, 15);
    let mut waiting = Waiting::new(&mut cache, 1, vec![key(9, 0)]);
    assert!(waiting.go_on(&mut cache, &mut || Heard::Never));
    assert_eq!((waiting.answers, cache.is_emptying()), (vec![Reservation::NoSpace], false));
    assert_eq!(found(&cache, 15), words);
    let mut own = Waiting::new(&mut cache, 0, vec![key(8, 0)]);
    assert!(own.go_on(&mut cache, &mut || panic!("there is a free slot")));
    assert_eq!(own.written(), 1);
}

#[test]
fn a_writer_that_dies_leaves_what_was_marked_for_it() {
    let (mut cache, _) = full();
    wait_for_room(&mut cache);
    assert!(cache.part(&mut Parting::new(0, Leaving::Left { nonce: NONCE })));
    cache.check_all().unwrap();
    assert!(cache.is_waiting());
    decide(&mut cache);
    assert_eq!((cache.stats().chunks_visible, cache.stats().slots_free), (3, 1));
    store_ranks(&mut cache, 0, 0..1, 3, &[key(7, 0)]);
    assert_eq!(cache.stats().evicted, 1);
}
