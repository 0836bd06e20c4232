//! A chunk's record: a reader races with the end of its chunk and with the next one that gets the record.

use crate::harness::{fails, holds};
use kvring_shm_abi::chunk::{ChunkContent, ChunkIdentity, ChunkRecord, LINES_MAX};
use kvring_shm_abi::mapping::View;
use kvring_shm_abi::payload::{Payload, Word};
use kvring_shm_abi::slot::{ShardIdentity, SlotHeader, SlotState, SlotWord};
use kvring_shm_abi::sync::{Ordering, fence};
use loom::thread;
use std::sync::{Arc, Mutex};

const OLD: ChunkIdentity = ChunkIdentity { key: [1, 1], namespace: 1 };
const NEW: ChunkIdentity = ChunkIdentity { key: [2, 1], namespace: 1 };
const OLD_PLACE: [u32; LINES_MAX] = [11, 0, 0, 0];
const NEW_PLACE: [u32; LINES_MAX] = [21, 0, 0, 0];

/// The protocol, and ways to break it, one at a time.
#[derive(Clone, Copy)]
struct Habits {
    fill: fn(&ChunkRecord, ChunkIdentity, [u32; LINES_MAX]),
    read: fn(&ChunkRecord) -> Option<ChunkContent>,
    /// The engine fills the record before it has ended the chunk that has it.
    fills_first: bool,
    /// The engine shows the record before it has filled it.
    shows_first: bool,
}

const RIGHT: Habits =
    Habits { fill: ChunkRecord::fill, read: ChunkRecord::read, fills_first: false, shows_first: false };

/// What a reader has read while the record went from one chunk to the next.
fn read_against_reuse(habits: Habits) -> Option<ChunkContent> {
    let record = Arc::new(ChunkRecord::new());
    record.fill(OLD, OLD_PLACE);
    record.show();
    let engines = record.clone();
    let engine = thread::spawn(move || {
        if habits.fills_first {
            (habits.fill)(&engines, NEW, NEW_PLACE);
        }
        engines.end();
        if habits.shows_first {
            engines.show();
        }
        if !habits.fills_first {
            (habits.fill)(&engines, NEW, NEW_PLACE);
        }
        if !habits.shows_first {
            engines.show();
        }
    });
    let reader = thread::spawn(move || (habits.read)(&record));
    engine.join().unwrap();
    reader.join().unwrap()
}

fn is_of_one_life(habits: Habits) -> Option<u64> {
    let ChunkContent { identity, generation, place } = read_against_reuse(habits)?;
    let expected = if generation == 0 { (OLD, OLD_PLACE) } else { (NEW, NEW_PLACE) };
    assert_eq!((identity, place), expected, "fields of another life, in generation {generation}");
    Some(generation)
}

#[test]
fn what_is_read_is_of_one_life() {
    let seen = Arc::new(Mutex::new(std::collections::BTreeSet::new()));
    let all = seen.clone();
    holds("chunk record", Some(3), move || {
        all.lock().unwrap().insert(is_of_one_life(RIGHT));
    });
    let expected = [None, Some(0), Some(1)];
    assert_eq!(
        seen.lock().unwrap().iter().copied().collect::<Vec<_>>(),
        expected,
        "the old, the new and nothing"
    );
}

fn caught(name: &str, habits: Habits) {
    fails(name, "fields of another life", None, move || {
        is_of_one_life(habits);
    });
}

#[test]
fn control_writer_without_fence_is_caught() {
    caught("chunk record, writer without fence", Habits { fill: ChunkRecord::fill_broken, ..RIGHT });
}

#[test]
fn control_reader_without_fence_is_caught() {
    caught("chunk record, reader without fence", Habits { read: ChunkRecord::read_broken, ..RIGHT });
}

#[test]
fn control_filled_before_the_end_is_caught() {
    caught("chunk record, filled before its chunk's end", Habits { fills_first: true, ..RIGHT });
}

#[test]
fn control_shown_before_it_is_filled_is_caught() {
    caught("chunk record, shown before it is filled", Habits { shows_first: true, ..RIGHT });
}

/// A slot that a worker reads by way of the record, while the chunk ends and its slot is given to another round of the same
/// key. That round fails elsewhere, so nobody ever shows what it has stored.
#[derive(Clone, Copy)]
struct Way {
    /// The engine frees the slot, and gives it away, before the record has left its generation.
    ends_last: bool,
    /// The worker does not look at the record again.
    looks_once: bool,
}

const BYTES: u64 = 11;
const GARBAGE: u64 = 66;
const SHARD: ShardIdentity = ShardIdentity { key: [1, 1], namespace: 1, rank: 0, offset: 0, length: 8 };

fn word(state: SlotState, generation: u64) -> SlotWord {
    SlotWord { state, owner: 3, generation }
}

fn load_against_a_failed_round(way: Way) -> Option<u64> {
    let (record, header) = (Arc::new(ChunkRecord::new()), Arc::new(SlotHeader::new()));
    let arena = Payload::new(View::from_vec(vec![Word::new()]));
    header.begin_writing(word(SlotState::Writing, 7), &SHARD, 1, 1);
    arena.write(0, &[BYTES]).unwrap();
    header.commit(word(SlotState::Committed, 7), 0);
    record.fill(OLD, OLD_PLACE);
    record.show();
    let theirs = (record.clone(), header.clone(), arena.clone());
    let engine = thread::spawn(move || {
        let (record, header, arena) = theirs;
        if !way.ends_last {
            record.end();
        }
        header.free(8);
        header.begin_writing(word(SlotState::Writing, 8), &SHARD, 1, 2);
        // The writer, which is another process; what comes between the two is modelled by `slot`.
        fence(Ordering::Release);
        arena.write(0, &[GARBAGE]).unwrap();
        header.commit(word(SlotState::Committed, 8), 0);
        if way.ends_last {
            record.end();
        }
    });
    let load = || {
        let content = record.read().filter(|content| content.generation == 0)?;
        assert_eq!(content.place, OLD_PLACE);
        let found = header.validate(&SHARD).ok()?;
        if !way.looks_once && !record.is_still(content.generation) {
            return None;
        }
        let mut bytes = [0];
        arena.read(0, &mut bytes).unwrap();
        header.still_valid(found.generation).ok()?;
        Some(bytes[0])
    };
    let loaded = load();
    engine.join().unwrap();
    loaded
}

fn loads_what_was_shown(way: Way) -> Option<u64> {
    let loaded = load_against_a_failed_round(way);
    assert!(loaded.is_none_or(|bytes| bytes == BYTES), "wrong bytes served");
    loaded
}

#[test]
fn what_is_loaded_was_shown() {
    let seen = Arc::new(Mutex::new(std::collections::BTreeSet::new()));
    let all = seen.clone();
    holds("chunk record, load", Some(3), move || {
        all.lock().unwrap().insert(loads_what_was_shown(Way { ends_last: false, looks_once: false }));
    });
    assert_eq!(seen.lock().unwrap().len(), 2, "some are loaded, some refused");
}

#[test]
fn control_slot_freed_before_the_records_end_is_caught() {
    fails("chunk record, slot freed first", "wrong bytes served", Some(3), || {
        loads_what_was_shown(Way { ends_last: true, looks_once: false });
    });
}

#[test]
fn control_record_not_read_again_is_caught() {
    fails("chunk record, not read again", "wrong bytes served", Some(3), || {
        loads_what_was_shown(Way { ends_last: false, looks_once: true });
    });
}
