//! The seqlock of a slot: a load races with the slot's next writer.

use crate::harness::{fails, holds};
use crate::ring::{cells, next};
use kvring_shm_abi::mapping::View;
use kvring_shm_abi::payload::{Payload, Word};
use kvring_shm_abi::ring::{Body, Consumer, Producer};
use kvring_shm_abi::slot::{NotServable, ShardIdentity, SlotHeader, SlotState, SlotWord};
use kvring_shm_abi::sync::{Ordering, fence};
use loom::thread;
use std::sync::Arc;

const OLD: ShardIdentity = ShardIdentity { key: [1, 1], namespace: 1, rank: 0, offset: 0, length: 16 };
const NEW: ShardIdentity = ShardIdentity { key: [2, 1], ..OLD };
const GENERATION: u64 = 7;
const OLD_BYTES: [u64; 2] = [11, 12];
const NEW_BYTES: [u64; 2] = [21, 22];
const OLD_CHECKSUM: u64 = 55;
const NEW_CHECKSUM: u64 = 66;

/// The protocol, and ways to break it, one at a time.
#[derive(Clone, Copy)]
struct Habits {
    /// The next writer makes a fence between its reservation and its first byte.
    writer_fence: bool,
    still_valid: fn(&SlotHeader, u64) -> Result<(), NotServable>,
    /// The generation in which the next writer gets the slot.
    next_generation: u64,
}

const RIGHT: Habits =
    Habits { writer_fence: true, still_valid: SlotHeader::still_valid, next_generation: GENERATION + 1 };

fn word(state: SlotState, generation: u64) -> SlotWord {
    SlotWord { state, owner: 3, generation }
}

/// The engine frees the slot, gives it to the next writer, and commits when the writer says so.
fn engine(header: &SlotHeader, generation: u64, mut reservation: Producer, mut commit: Consumer) {
    header.free(generation);
    header.begin_writing(word(SlotState::Writing, generation), &NEW, 1, 2);
    reservation.push(&Body::default());
    next(&mut commit);
    header.commit(word(SlotState::Committed, generation), NEW_CHECKSUM);
}

/// The next writer waits for the slot, writes it, and says so.
fn writer(arena: &Payload, writer_fence: bool, mut reservation: Consumer, mut commit: Producer) {
    next(&mut reservation);
    if writer_fence {
        // SYNC POINT: Release fence; pairs with the Acquire fence in `SlotHeader::still_valid`.
        fence(Ordering::Release);
    }
    arena.write(0, &NEW_BYTES).unwrap();
    commit.push(&Body::default());
}

/// A worker that looks for the old shard. Returns the checksum and the bytes that it may serve; `None` if it must refuse.
fn load(header: &SlotHeader, arena: &Payload, habits: Habits) -> Option<(u64, [u64; 2])> {
    let found = header.validate(&OLD).ok()?;
    let mut copy = [0; 2];
    arena.read(0, &mut copy).unwrap();
    (habits.still_valid)(header, found.generation).ok()?;
    Some((found.checksum, copy))
}

fn load_against_reuse(habits: Habits) -> Option<(u64, [u64; 2])> {
    let headers = View::from_vec(vec![SlotHeader::new()]);
    let arena = Payload::new(View::from_vec((0..2).map(|_| Word::new()).collect()));
    headers[0].begin_writing(word(SlotState::Writing, GENERATION), &OLD, 1, 1);
    arena.write(0, &OLD_BYTES).unwrap();
    headers[0].commit(word(SlotState::Committed, GENERATION), OLD_CHECKSUM);
    assert_eq!(load(&headers[0], &arena, RIGHT), Some((OLD_CHECKSUM, OLD_BYTES)), "undisturbed");

    let (reservations, commits) = (cells(), cells());
    let theirs = headers.clone();
    let (reserving, committed) = (Producer::new(reservations.clone()), Consumer::new(commits.clone()));
    let engine = thread::spawn(move || engine(&theirs[0], habits.next_generation, reserving, committed));
    let theirs = arena.clone();
    let (reserved, committing) = (Consumer::new(reservations), Producer::new(commits));
    let writer = thread::spawn(move || writer(&theirs, habits.writer_fence, reserved, committing));
    let served = load(&headers[0], &arena, habits);
    engine.join().unwrap();
    writer.join().unwrap();
    served
}

fn bytes_are_old(habits: Habits) {
    if let Some((_, bytes)) = load_against_reuse(habits) {
        assert_eq!(bytes, OLD_BYTES, "wrong bytes served");
    }
}

#[test]
fn what_is_served_is_the_old_lifes() {
    let seen = Arc::new(std::sync::Mutex::new([false; 2]));
    let both = seen.clone();
    holds("slot", Some(2), move || {
        let served = load_against_reuse(RIGHT);
        if let Some((_, bytes)) = served {
            assert_eq!(bytes, OLD_BYTES, "wrong bytes served");
        }
        both.lock().unwrap()[usize::from(served.is_some())] = true;
    });
    assert_eq!(*seen.lock().unwrap(), [true; 2], "expected loads that are refused and loads that are served");
}

#[test]
fn the_checksum_served_is_the_old_lifes() {
    holds("slot, checksum", Some(2), || {
        if let Some((checksum, _)) = load_against_reuse(RIGHT) {
            assert_eq!(checksum, OLD_CHECKSUM, "wrong checksum served");
        }
    });
}

#[test]
fn control_writer_without_fence_is_caught() {
    fails("slot, writer without fence", "wrong bytes served", Some(2), || {
        bytes_are_old(Habits { writer_fence: false, ..RIGHT });
    });
}

#[test]
fn control_reader_without_fence_is_caught() {
    fails("slot, reader without fence", "wrong bytes served", Some(2), || {
        bytes_are_old(Habits { still_valid: SlotHeader::still_valid_broken, ..RIGHT });
    });
}

#[test]
fn control_generation_not_bumped_is_caught() {
    fails("slot, same generation", "wrong bytes served", Some(2), || {
        bytes_are_old(Habits { next_generation: GENERATION, ..RIGHT });
    });
}
