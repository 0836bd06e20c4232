//! No turn of the service loop does unbounded work: no request of one client keeps the engine from anything else. Nothing here
//! looks at a clock. The tests count what happens while something else does.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_adapter::Key;
use kvring_shm_abi::engine_segment::RANKS_MAX;
use kvring_shm_abi::failpoint::Place;
use kvring_shm_abi::lobby::Role;
use kvring_shm_abi::message::{KEYS_MAX, Request, SlotOutcome, Status};
use kvring_tests::{
    Claimed, EngineProcess, FAIL_POINT, RawClient, chain, eventually, overrides, round, unique_name,
};

const WORLD: u32 = RANKS_MAX as u32;
/// Room for the keys of the longest lookup, and for its answer.
const PAYLOAD_WORDS: u32 = (1 << 15) + (KEYS_MAX * RANKS_MAX * 2) as u32;

/// A scheduler with room for the longest lookup, and the longest list of keys of which all are found.
fn longest_lookups(engine: &EngineProcess) -> (RawClient, u32, Vec<Key>) {
    let mut worker = RawClient::attach(&engine.name, Role::Worker);
    let (mut namespace, stored) = (0, chain(1, 16));
    for rank in 0..WORLD {
        namespace = worker.register(500, WORLD, rank, 4096);
        let slots = worker.reserve(namespace, rank, round(1), &stored);
        assert_eq!(worker.finish(&slots, true), [SlotOutcome::Done; 16]);
    }
    let scheduler =
        Claimed::with_payload(&engine.name, Role::Scheduler, PAYLOAD_WORDS).publish(|_| {}).unwrap();
    (scheduler, namespace, stored.iter().cycle().take(KEYS_MAX).copied().collect())
}

/// The beat moves with the work that is done, not with the number of turns: several times during each of these lookups.
#[test]
fn the_beat_goes_on_under_the_longest_lookups_of_the_most_ranks() {
    const LOOKUPS: u64 = 40;
    let engine = EngineProcess::start("turns-beat", 16);
    let (mut client, namespace, keys) = longest_lookups(&engine);
    let view = engine.view();
    let before = view.segment.epoch().beat();
    for session in 0..LOOKUPS {
        client.send(client.lookup_request(session, 0, namespace, &keys));
    }
    let mut answered = 0;
    eventually("all are answered", || {
        while let Some(completion) = client.poll() {
            assert_eq!((completion.status, completion.results[0]), (Status::Ok, KEYS_MAX as u64));
            answered += 1;
        }
        answered == LOOKUPS
    });
    let beats = view.segment.epoch().beat().wrapping_sub(before);
    assert!(u64::from(beats) >= LOOKUPS, "{beats} beats during {LOOKUPS} lookups");
    assert_eq!(engine.stat("pins"), LOOKUPS * KEYS_MAX as u64);
    engine.settles_without(client);
}

/// The engine takes another client's request between two pieces of one that takes long.
#[test]
fn a_short_request_waits_for_no_long_one_to_end() {
    let name = unique_name("turns-fair");
    // In the middle of the lookup, which has been put off for the third time.
    let middle = format!("{}:3:stop", Place::RequestPutOff);
    let mut engine = EngineProcess::launched(&overrides(&name, 16), &[(FAIL_POINT, &middle)]);
    engine.serves().unwrap();
    engine.is_allocated();
    let (mut long, namespace, keys) = longest_lookups(&engine);
    let mut short = RawClient::attach(&engine.name, Role::Scheduler);
    engine.stop();
    long.send(long.lookup_request(1, 0, namespace, &keys));
    short.send(Request::Noop);
    engine.resume();
    engine.has_stopped();
    assert!(long.poll().is_none(), "the long one has not been put off");
    assert!(short.poll().is_some(), "the short one waits");
    engine.resume();
    assert_eq!(long.answer().results[0], KEYS_MAX as u64);
    engine.settles_without((long, short));
}

/// A client dies in the middle of a request, with more leases than one turn frees.
#[test]
fn a_client_that_dies_in_the_middle_of_its_request_leaves_nothing() {
    let (engine, bystander) = EngineProcess::with_bystander("turns-death");
    let (mut client, namespace, keys) = longest_lookups(&engine);
    for session in 0..8 {
        client.send(client.lookup_request(session, 0, namespace, &keys));
    }
    eventually("some of it is done", || client.poll().is_some());
    drop(client);
    engine.stat_becomes("leases", 0);
    bystander.goes_on();
    engine.settles_beside(bystander, ());
}
