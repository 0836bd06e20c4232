//! A chunk's record: a reader races with the end of its chunk and with the next one that gets the record.

use crate::harness::{fails, holds};
use kvring_shm_abi::chunk::{ChunkContent, ChunkIdentity, ChunkRecord, LINES_MAX};
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
