//! A small arena: who goes, who stays, and that a load of what went is an error and never somebody else's bytes.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_adapter::Round;
use kvring_tests::engine::EngineProcess;
use kvring_tests::kv::{Shape, chain};
use kvring_tests::proto::{Loaded, SchedulerSpec, WorkerSpec, all_loaded, all_stored};
use kvring_tests::scheduler::SchedulerSide;
use kvring_tests::wait::{LIMIT, eventually};
use kvring_tests::worker::WorkerSide;
use serde_json::json;
use std::collections::VecDeque;

fn round(number: u32) -> Round {
    Round { source: 1, number }
}

fn pair(engine: &str, shape: Shape) -> (WorkerSide, SchedulerSide) {
    let worker = WorkerSide::start(&WorkerSpec { shape, ..WorkerSpec::new(engine) }).unwrap();
    let scheduler = SchedulerSide::start(&SchedulerSpec::new(engine));
    scheduler.client().wait_ready(LIMIT).unwrap();
    (worker, scheduler)
}

/// The engine has done what this scheduler gave up: its requests are served in order. (The gauge of leases may still show
/// what it was a tick ago, before there were any.)
fn has_let_go(scheduler: &SchedulerSide) {
    scheduler.client().noop().unwrap();
}

/// An engine with 64 slots of 64 KiB, all of them allocated.
fn small(policy: &str) -> EngineProcess {
    EngineProcess::configured("evict", 4, &json!({ "policy": policy }))
}

#[test]
fn leased_chunks_stay_and_the_others_go() {
    for policy in ["lru", "arc"] {
        let engine = small(policy);
        let (mut worker, mut scheduler) = pair(&engine.name, Shape::SMALL);
        let keys = chain(1, 32);
        assert_eq!(worker.store("old", round(1), None, &keys, 1), all_stored(32));
        let leased = scheduler.lookup("leased", 0, &keys[..8]).unwrap();
        assert_eq!(leased.chunks, 8);
        // Five times what the arena holds.
        for number in 2..12 {
            let stored = worker.store("new", round(number), None, &chain(u64::from(number), 32), 1);
            assert_eq!(stored, all_stored(32), "{policy}: eviction makes room");
        }
        // Published with the engine's next tick.
        eventually("the evictions are counted", || engine.stat("evictions") > 200);
        assert_eq!(worker.load("leased", &leased.ranks[0], 1), all_loaded(8), "{policy}");
        assert_eq!(scheduler.lookup("rest", 0, &keys[8..]).unwrap().chunks, 0, "{policy}: the rest went");
        // Without the lease it goes too.
        scheduler.api().end_session("leased");
        scheduler.api().end_session("rest");
        has_let_go(&scheduler);
        for number in 12..17 {
            worker.store("new", round(number), None, &chain(u64::from(number), 32), 1);
        }
        let left = scheduler.lookup("gone", 0, &keys).unwrap().chunks;
        // ARC keeps what was used twice when all that comes is used once.
        assert!(left == 0 || policy == "arc", "{policy}: {left}");
        engine.is_sound();
    }
}

#[test]
fn with_everything_leased_stores_are_dropped_and_nothing_is_lost() {
    let engine = EngineProcess::configured("full", 4, &json!({ "client_share": 1.0 }));
    let (mut worker, mut scheduler) = pair(&engine.name, Shape::SMALL);
    let keys = chain(1, 64);
    let stored = worker.store("old", round(1), None, &keys, 1);
    assert_eq!(stored, all_stored(64));
    let found = scheduler.lookup("all", 0, &keys).unwrap();
    assert_eq!(found.chunks, 64);
    let dropped = worker.store("new", round(2), None, &chain(2, 8), 1);
    assert_eq!((dropped.stored, dropped.dropped), (0, 8), "no room is an answer");
    assert_eq!(worker.load("all", &found.ranks[0], 1), all_loaded(64));
    scheduler.api().end_session("all");
    has_let_go(&scheduler);
    assert_eq!(worker.store("new", round(3), None, &chain(2, 8), 1), all_stored(8));
}

#[test]
fn one_client_cannot_hold_more_than_its_share() {
    let engine = EngineProcess::configured("share", 8, &json!({ "client_share": 0.25 }));
    let (mut worker, mut scheduler) = pair(&engine.name, Shape::SMALL);
    let keys = chain(1, 96);
    // A quarter of 8 MiB is 32 shards: no more in one reservation ...
    let stored = worker.store("r", round(1), None, &keys[..40], 1);
    assert_eq!((stored.stored, stored.dropped), (32, 8));
    for part in keys.chunks(16).skip(2) {
        assert_eq!(worker.store("r", round(1), None, part, 1), all_stored(16));
    }
    // ... and none in leases: a shorter hit, which others share at no cost, and then a refusal that is counted.
    assert_eq!(scheduler.lookup("a", 0, &keys).unwrap().chunks, 32);
    for request in 0..40 {
        assert_eq!(scheduler.lookup(&format!("shares {request}"), 0, &keys).unwrap().chunks, 32);
    }
    assert_eq!(scheduler.lookup("b", 0, &keys[64..]).unwrap().chunks, 0);
    assert_eq!(scheduler.tally().refused, 1);
    for request in 0..40 {
        scheduler.api().end_session(&format!("shares {request}"));
    }
    scheduler.api().end_session("a");
    assert_eq!(scheduler.lookup("c", 0, &keys[64..]).unwrap().chunks, 32);
}

#[test]
fn a_load_of_what_was_evicted_is_an_error_whatever_the_slot_holds_now() {
    let engine = small("lru");
    let (mut worker, mut scheduler) = pair(&engine.name, Shape::SMALL);
    let keys = chain(1, 16);
    assert_eq!(worker.store("r", round(1), None, &keys, 1), all_stored(16));
    let found = scheduler.lookup("r", 0, &keys).unwrap();
    scheduler.api().end_session("r");
    has_let_go(&scheduler);
    for number in 2..8 {
        worker.store("new", round(number), None, &chain(u64::from(number), 32), 1);
    }
    let stale = worker.load("r", &found.ranks[0], 1);
    assert_eq!(stale, Loaded { failed: 16, ..Loaded::default() });
    // The same keys again: other generations, perhaps in the same slots.
    assert_eq!(worker.store("r", round(9), None, &keys, 2), all_stored(16));
    let stale = worker.load("r", &found.ranks[0], 2);
    assert_eq!(stale, Loaded { failed: 16, ..Loaded::default() });
    let fresh = scheduler.lookup("again", 0, &keys).unwrap();
    assert_eq!(worker.load("r", &fresh.ranks[0], 2), all_loaded(16));
    // A handle of which one part is another chunk's.
    let (a, b) = (fresh.ranks[0][0], fresh.ranks[0][1]);
    let mut mixed = [a; 6];
    mixed[0].slot = b.slot;
    mixed[1].offset = b.offset;
    mixed[2].key = b.key;
    mixed[3].generation = a.generation + 1;
    mixed[4].arena_id[0] ^= 1;
    mixed[5].slot = u32::MAX;
    assert_eq!(worker.load("r", &mixed, 2), Loaded { failed: 6, ..Loaded::default() });
}

/// A load without a lease, while another thread of stores turns the arena over as fast as it can. Shards of 1 MiB, so
/// that the copy itself is raced and not only the check before it.
#[test]
fn loads_that_race_eviction_never_give_wrong_bytes() {
    let engine = EngineProcess::start("race", 24);
    let name = engine.name.clone();
    let (mut loader, mut scheduler) = pair(&name, Shape::LARGE);
    let mut total = Loaded::default();
    let wanted = 40 * kvring_tests::soak() as u32;
    std::thread::scope(|scope| {
        let (keys, arrivals) = std::sync::mpsc::sync_channel(2);
        let storer = scope.spawn(move || {
            let spec = WorkerSpec { shape: Shape::LARGE, ..WorkerSpec::new(&name) };
            let mut worker = WorkerSide::start(&spec).unwrap();
            for number in 0u32.. {
                let stored = chain(u64::from(number) + 100, 4);
                worker.store("storer", round(number), None, &stored, u64::from(number));
                if keys.send((u64::from(number), stored)).is_err() {
                    break;
                }
            }
        });
        // Loads come a few stores late: about when their slots are given away.
        let mut waiting = VecDeque::new();
        while total.loaded < wanted || total.failed < wanted {
            let (version, keys) = arrivals.recv().unwrap();
            let request = format!("race {version}");
            let found = scheduler.lookup(&request, 0, &keys).unwrap();
            scheduler.api().end_session(&request);
            waiting.push_back((version, found));
            if waiting.len() > 4 {
                let (version, found) = waiting.pop_front().unwrap();
                let loaded = loader.load("race", &found.ranks[0], version);
                total.loaded += loaded.loaded;
                total.failed += loaded.failed;
                total.wrong += loaded.wrong;
            }
        }
        drop(arrivals);
        storer.join().unwrap();
    });
    assert_eq!(total.wrong, 0, "{total:?}");
    drop((loader, scheduler));
    eventually("the engine is still well", || engine.stat("clients") == 0);
    engine.settles(0);
}
