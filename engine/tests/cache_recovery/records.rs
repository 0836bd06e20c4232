//! What a new engine makes of the chunk records of an earlier one.
#![allow(clippy::unwrap_used, reason = "a test")]

use crate::cache_support::small::{cache, find, hits, register, reserve_one, round, store, store_ranks};
use crate::cache_support::{VecTable, chain, hold, key, look_up, restore_end, search};
use crate::restored;
use kvring_engine::cache::{Cache, Heard, Invalidated, SlotTable};
use kvring_shm_abi::chunk::ChunkWord;
use kvring_shm_abi::directory::CHUNK_IDS;
use kvring_shm_abi::lookup::Marked;
use proptest::collection::vec;
use proptest::prelude::*;

/// A scheduler that comes back holds what it had leased, up to the first chunk that is not there any more.
#[test]
fn what_was_leased_is_held_again_by_its_words() {
    let worlds: &[&[u64]] = &[&[4096], &[4096]];
    let mut old = cache(8, worlds[0]);
    register(&mut old, 1, worlds[1]);
    store(&mut old, 1, &chain(1, 4));
    store_ranks(&mut old, 1, 0..1, 1, &chain(2, 1));
    let words = search(&old, 0, &chain(1, 4), Marked::Missing);
    let others = ChunkWord::new(4, words[0].generation());
    let mut new = restored(old.table(), 8, worlds);
    restore_end(&mut new);
    let [first, second, ..] = words[..] else { panic!("{words:?}") };
    let stale = ChunkWord::new(second.chunk(), second.generation() + 1);
    let beyond = ChunkWord::new(CHUNK_IDS - 1, second.generation());
    assert!(new.table().chunks().find(others).is_some(), "a chunk of the other namespace");
    for (session, held, expected) in [
        (1, &words[..], 4),
        (2, &[first, stale, second], 1),
        (3, &[first, others, second], 1),
        (4, &[first, beyond, second], 1),
        (5, &[stale, first], 0),
        (6, &[first, first, second], 3),
    ] {
        assert_eq!(hold(&mut new, (0, session, 0), 0, 0, held), Ok(expected), "session {session}");
        new.check_all().unwrap();
    }
    assert_eq!(new.stats().pins, 4 + 1 + 1 + 1 + 3);
    new.clear(None);
    assert_eq!(hits(&mut new, &chain(1, 4)), 4, "all of it is held");
    assert_eq!(hold(&mut new, (0, 1, 0), 0, 0, &words), Ok(4), "said twice");
    new.check_all().unwrap();
    assert_eq!(new.stats().pins, 4 + 1 + 1 + 1 + 3);
}

/// An engine that dies between its marks and its decision had not decided.
#[test]
fn what_was_marked_is_found_again_by_the_same_words() {
    let worlds: &[&[u64]] = &[&[4096], &[4096; 6]];
    let mut old = cache(8, worlds[0]);
    register(&mut old, 1, worlds[1]);
    store(&mut old, 1, &chain(1, 20));
    store_ranks(&mut old, 1, 0..6, 1, &chain(2, 3));
    let (words, wide) =
        (search(&old, 0, &chain(1, 20), Marked::Missing), search(&old, 1, &chain(2, 3), Marked::Missing));
    assert_eq!((words.len(), wide.len()), (20, 3));
    assert_eq!(old.clear_step(None, 0, &mut || Heard::NotYet), Some(23));
    // Its clients go on finding them all as soon as they know that it is dead.
    assert!(search(&old, 0, &chain(1, 20), Marked::Missing).is_empty());
    assert_eq!(search(&old, 0, &chain(1, 20), Marked::There), words);
    // It may have decided about some.
    old.heard(old.awaits().unwrap_or_default());
    old.allow(10);
    old.go_on_dropping();
    let left = search(&old, 1, &chain(2, 3), Marked::There);
    assert!((1..3).contains(&left.len()), "{left:?}");

    let mut new = restored(old.table(), 8, worlds);
    let restored = restore_end(&mut new);
    assert_eq!((restored.visible as usize, restored.dropped), (20 + left.len(), 0));
    new.check_all().unwrap();
    assert!(!new.is_waiting());
    assert_eq!(search(&new, 0, &chain(1, 20), Marked::Missing), words);
    assert_eq!(search(&new, 1, &chain(2, 3), Marked::Missing), left);
    assert_eq!(hold(&mut new, (0, 1, 0), 0, 0, &words), Ok(20));
    new.clear(None);
    assert_eq!(search(&new, 0, &chain(1, 20), Marked::Missing), words);
}

/// A chunk keeps its id, its record and its hint: nothing of that is written again.
#[test]
fn what_was_visible_keeps_its_record() {
    let worlds: &[&[u64]] = &[&[4096], &[4096; 6]];
    let mut old = cache(8, worlds[0]);
    register(&mut old, 1, worlds[1]);
    store(&mut old, 1, &chain(1, 3));
    store_ranks(&mut old, 1, 0..6, 1, &chain(2, 3));
    // An id in the middle is free, and a forming chunk has another.
    let first = find(&mut old, 1, &chain(1, 1))[0];
    assert!(old.end_session(0, 1));
    assert_eq!(old.invalidate(first.slot, first.generation, key(1, 0), |_, _| true), Invalidated::Dropped);
    reserve_one(&mut old, 0, round(1), key(3, 0));
    let records =
        |cache: &Cache<VecTable>| (0..8).map(|id| cache.table().chunks().read(id)).collect::<Vec<_>>();
    let before = records(&old);
    assert_eq!(before.iter().flatten().count(), 5);

    let mut new = restored(old.table(), 8, worlds);
    assert_eq!(records(&new), before);
    let restored = restore_end(&mut new);
    assert_eq!((restored.visible, restored.kept, restored.dropped), (5, 1, 0));
    assert_eq!(records(&new), before);
    new.check_all().unwrap();
    // The lowest free id is used first: the forming chunk's.
    store(&mut new, 2, &chain(4, 1));
    assert!(records(&new).iter().flatten().any(|content| content.identity.key == key(4, 0)));
    new.check_all().unwrap();
}

/// A death between the last commit and the record, or between the record's end and its slots: in both cases the record says
/// nothing, and the slots tell that all of the chunk is there.
#[test]
fn a_chunk_without_a_record_gets_one() {
    let world: &[u64] = &[4096; 6];
    let mut old = cache(8, world);
    store_ranks(&mut old, 0, 0..6, 1, &chain(1, 3));
    let table = old.table().clone();
    let identity = table.chunks().read(1).unwrap().identity;
    table.chunks().end(1, identity);
    let mut new = restored(&table, 8, &[world]);
    assert_eq!(restore_end(&mut new).visible, 3);
    new.check_all().unwrap();
    assert_eq!(hits(&mut new, &chain(1, 3)), 3);
}

/// The slots of two ranks have changed places in a record: it is not believed, because the shards themselves say whose they are.
#[test]
fn a_record_that_names_a_slot_for_another_rank_is_not_believed() {
    for world in [&[4096_u64, 4096][..], &[4096; 6]] {
        let mut old = cache(8, world);
        store_ranks(&mut old, 0, 0..world.len() as u32, 1, &chain(1, 2));
        let table = old.table().clone();
        let content = table.chunks().read(1).unwrap();
        // Two ranks' slots are the two halves of a word: the first one of the record's places, or of its line.
        let slots = |table: &VecTable| {
            let content = table.chunks().read(1).unwrap();
            let slot = |rank| table.chunks().slot(&content, world.len() as u32, rank);
            (0..world.len() as u32).map(slot).collect::<Vec<_>>()
        };
        let before = slots(&table);
        let (record, line) = ((1 + 1) * 8 + 4, (1 + 16) * 8 + content.place[0] as usize * 8);
        table.scribble(if world.len() == 2 { record } else { line }, |word| word.rotate_left(32));
        let after = slots(&table);
        assert_eq!((after[0], after[1]), (before[1], before[0]));
        let mut new = restored(&table, 8, &[world]);
        let restored = restore_end(&mut new);
        // With two ranks both shards are elsewhere, and make a chunk of their own. With six, four are where the record says:
        // they go with it, and the other two are not enough.
        let expected = if world.len() == 2 { (2, 0, 1) } else { (1, 1, 1) };
        assert_eq!((restored.visible, restored.kept, restored.dropped), expected);
        new.check_all().unwrap();
        assert_eq!(hits(&mut new, &chain(1, 2)), restored.visible);
        for word in search(&new, 0, &chain(1, 2), Marked::Missing) {
            assert_eq!(new.table().shards(word).len(), world.len());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever somebody has scribbled into records: a chunk that is found afterwards is one whose shards say so themselves.
    #[test]
    fn records_that_make_no_sense_lead_to_no_wrong_shard(scribbles in vec((1_usize..200, 0_u64..300, any::<bool>()), 1..12)) {
        let worlds: &[&[u64]] = &[&[4096], &[4096; 6]];
        let mut old = cache(8, worlds[0]);
        register(&mut old, 1, worlds[1]);
        store(&mut old, 1, &chain(1, 4));
        store_ranks(&mut old, 1, 0..6, 1, &chain(2, 4));
        let table = old.table().clone();
        for (at, value, is_flip) in scribbles {
            table.scribble(at, |word| if is_flip { word ^ (1 << (value % 64)) } else { value });
        }
        let mut new = restored(&table, 8, worlds);
        restore_end(&mut new);
        for (namespace, keys) in [(0, chain(1, 4)), (1, chain(2, 4))] {
            for key in keys {
                for word in look_up(&mut new, (0, 1, 0), namespace, &[key]) {
                    let identity = new.table().chunks().find(word).unwrap().identity;
                    prop_assert_eq!((identity.key, identity.namespace), (key, namespace));
                    prop_assert_eq!(new.table().shards(word).len(), worlds[namespace as usize].len());
                }
            }
        }
        // What is stored now finds its place whatever was scribbled.
        new.clear(None);
        store(&mut new, 2, &chain(5, 4));
        prop_assert_eq!(hits(&mut new, &chain(5, 4)), 4);
    }
}
