//! No turn of the service loop does unbounded work: no request of one client keeps the engine from anything else. Nothing here
//! looks at a clock. The tests count what happens while something else does.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_adapter::Key;
use kvring_shm_abi::chunk::ChunkWord;
use kvring_shm_abi::engine_segment::RANKS_MAX;
use kvring_shm_abi::failpoint::Place;
use kvring_shm_abi::lobby::Role;
use kvring_shm_abi::message::{KEYS_MAX, Record, Request, ReserveAnswer, SlotOutcome, Status};
use kvring_tests::{
    Claimed, EngineProcess, FAIL_POINT, RawClient, chain, eventually, overrides, round, unique_name,
};

const WORLD: u32 = RANKS_MAX as u32;
/// Room for the keys of the longest reservation, and for its answer.
const PAYLOAD_WORDS: u32 = (1 << 15) + (KEYS_MAX * ReserveAnswer::WORDS) as u32;
/// Chunks of a long lease: it takes several slices to end it.
const LEASE: usize = 80 * HOLD;
/// Chunks of one hold, which takes less than a slice.
const HOLD: usize = 256;

/// A worker with room for the longest reservation, a namespace of the most ranks with 16 chunks, and the longest list of keys
/// of which all are there.
fn longest_reservations(engine: &EngineProcess) -> (RawClient, u32, Vec<Key>) {
    let mut worker =
        Claimed::with_payload(&engine.name, Role::Worker, PAYLOAD_WORDS).publish(|_| {}).unwrap();
    let (mut namespace, stored) = (0, chain(1, 16));
    for rank in 0..WORLD {
        namespace = worker.register(500, WORLD, rank, 4096);
        let slots = worker.reserve(namespace, rank, round(1), &stored);
        assert_eq!(worker.finish(&slots, true), [SlotOutcome::Done; 16]);
    }
    (worker, namespace, stored.iter().cycle().take(KEYS_MAX).copied().collect())
}

/// Gives the scheduler's session a long lease on the chunks of `keys`, again and again the same.
fn hold_long(scheduler: &mut RawClient, namespace: u32, session: u64, keys: &[Key]) {
    let found = scheduler.search(namespace, keys);
    let words: Vec<ChunkWord> = found.iter().cycle().take(HOLD).copied().collect();
    for first in (0..LEASE).step_by(HOLD) {
        let hold = scheduler.hold_request(session, 0, namespace, first as u32, &words);
        assert_eq!(scheduler.call(hold).results[0], HOLD as u64);
    }
}

/// The beat moves with the work that is done, not with the number of turns: again and again during these reservations, of which
/// the engine could take nearly all in one turn. It moves at most once in a millisecond, which is longer than one of them takes.
#[test]
fn the_beat_goes_on_under_the_longest_reservations_of_the_most_ranks() {
    const RESERVATIONS: u64 = 40;
    let engine = EngineProcess::start("turns-beat", 16);
    let (mut client, namespace, keys) = longest_reservations(&engine);
    let view = engine.view();
    let before = view.segment.epoch().beat();
    for _ in 0..RESERVATIONS {
        client.send(client.reserve_request(namespace, WORLD - 1, round(2), &keys));
    }
    let mut answered = 0;
    eventually("all are answered", || {
        while let Some(completion) = client.poll() {
            assert_eq!((completion.status, completion.results[0]), (Status::Ok, 0), "nothing is granted");
            answered += 1;
        }
        answered == RESERVATIONS
    });
    let beats = view.segment.epoch().beat().wrapping_sub(before);
    assert!(u64::from(beats) >= RESERVATIONS / 4, "{beats} beats during {RESERVATIONS} reservations");
    engine.settles_without(client);
}

/// The engine takes another client's request between two pieces of one that takes long.
#[test]
fn a_short_request_waits_for_no_long_one_to_end() {
    let name = unique_name("turns-fair");
    // In the middle of the reservation, which has been put off for the third time.
    let middle = format!("{}:3:stop", Place::RequestPutOff);
    let mut engine = EngineProcess::launched(&overrides(&name, 16), &[(FAIL_POINT, &middle)]);
    engine.serves().unwrap();
    engine.is_allocated();
    let (mut long, namespace, keys) = longest_reservations(&engine);
    let mut short = RawClient::attach(&engine.name, Role::Scheduler);
    engine.stop();
    long.send(long.reserve_request(namespace, WORLD - 1, round(2), &keys));
    short.send(Request::Noop);
    engine.resume();
    engine.has_stopped();
    assert!(long.poll().is_none(), "the long one has not been put off");
    assert!(short.poll().is_some(), "the short one waits");
    engine.resume();
    assert_eq!(long.answer().status, Status::Ok);
    engine.settles_without((long, short));
}

/// A client dies in the middle of a request, with more leases than one turn frees.
#[test]
fn a_client_that_dies_in_the_middle_of_its_request_leaves_nothing() {
    let (engine, bystander) = EngineProcess::with_bystander("turns-death");
    let (worker, namespace, keys) = longest_reservations(&engine);
    let mut client = RawClient::attach(&engine.name, Role::Scheduler);
    for session in 0..4 {
        hold_long(&mut client, namespace, session, &keys[..16]);
    }
    client.send(Request::Noop);
    client.send(Request::EndSession { session: 0 });
    eventually("some of it is done", || client.poll().is_some());
    drop(client);
    engine.stat_becomes("leases", 0);
    bystander.goes_on();
    engine.settles_beside(bystander, worker);
}
