//! A small arena: which chunks are evicted, which stay, and that a load of an evicted chunk is an error and never gives
//! another chunk's bytes.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_adapter::Key;
use kvring_shm_abi::directory::{CHUNK_ID_BITS, CHUNK_IDS};
use kvring_shm_abi::lobby::Role;
use kvring_shm_abi::message::{Request, SlotOutcome};
use kvring_tests::{
    EngineProcess, Loaded, RawClient, SchedulerSide, SchedulerSpec, Shape, WorkerSide, WorkerSpec,
    all_failed, all_loaded, all_stored, chain, eventually, round, soak,
};
use serde_json::json;
use std::collections::VecDeque;

fn pair(engine: &str, shape: Shape) -> (WorkerSide, SchedulerSide) {
    let worker = WorkerSide::start(&WorkerSpec { shape, ..WorkerSpec::new(engine) }).unwrap();
    (worker, SchedulerSide::started(&SchedulerSpec::new(engine)))
}

/// Waits until the engine has served what this scheduler gave up: its requests are served in order. (The gauge of leases
/// cannot tell: it may still show a moment before there were any.)
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
        let keys = worker.stores(round(1), chain(1, 32), 1);
        let leased = scheduler.lookup("leased", 0, &keys[..8]);
        assert_eq!(leased.chunks, 8);
        // Five times what the arena holds.
        for number in 2..12 {
            let stored = worker.store(round(number), &chain(u64::from(number), 32), 1);
            assert_eq!(stored, all_stored(32), "{policy}: eviction makes room");
        }
        eventually("the evictions are counted", || engine.stat("evictions") > 200);
        assert_eq!(worker.load(&leased.handles, 1), all_loaded(8), "{policy}");
        assert_eq!(scheduler.lookup("rest", 0, &keys[8..]).chunks, 0, "{policy}: the rest went");
        // Without the lease it goes too.
        scheduler.ends(&["leased", "rest"]);
        has_let_go(&scheduler);
        for number in 12..17 {
            worker.store(round(number), &chain(u64::from(number), 32), 1);
        }
        let left = scheduler.lookup("gone", 0, &keys).chunks;
        // ARC keeps chunks that were used twice while all new ones are used once.
        assert!(left == 0 || policy == "arc", "{policy}: {left}");
        engine.is_sound();
    }
}

/// How many of these chunks a lookup finds. It leaves no lease.
fn finds(scheduler: &mut RawClient, namespace: u32, keys: &[Key]) -> u64 {
    let found = scheduler.call(scheduler.hold_found(1, 0, namespace, keys));
    scheduler.call(Request::EndSession { session: 1 });
    found.results[0]
}

/// A restarted engine that finds many chunks orders them after it has begun to serve. Then it goes on with the evictions,
/// in the order of all accesses before its predecessor's death and since.
#[test]
fn what_was_used_longest_ago_goes_first_after_a_restart() {
    const PART: usize = 128;
    for policy in ["lru", "arc"] {
        // The arena has room for exactly these chunks, of a page each.
        let mut engine = EngineProcess::configured("evict-restart", 40, &json!({ "policy": policy }));
        engine.is_allocated();
        let parts: Vec<Vec<Key>> = (0..80).map(|part| chain(part, PART)).collect();
        let mut worker = RawClient::attach(&engine.name, Role::Worker);
        let mut scheduler = RawClient::attach(&engine.name, Role::Scheduler);
        let namespace = worker.register(500, 1, 0, 4096);
        for part in &parts {
            let slots = worker.reserve(namespace, 0, round(1), part);
            assert_eq!(worker.finish(&slots, true), [SlotOutcome::Done; PART]);
        }
        assert_eq!(finds(&mut scheduler, namespace, &parts[0]), PART as u64);
        engine.settles_without((worker, scheduler));
        engine.kill_and_restart();
        let mut scheduler = RawClient::attach(&engine.name, Role::Scheduler);
        assert_eq!(finds(&mut scheduler, namespace, &parts[2]), PART as u64, "{policy}: it serves");
        let mut worker = RawClient::attach(&engine.name, Role::Worker);
        assert_eq!(worker.register(500, 1, 0, 4096), namespace);
        for (at, key) in chain(99, PART).into_iter().enumerate() {
            let mut slots = Vec::new();
            eventually("there is room", || {
                slots = worker.reserve(namespace, 0, round(2), &[key]);
                !slots.is_empty()
            });
            assert_eq!(worker.finish(&slots, true), [SlotOutcome::Done], "{policy}: chunk {at}");
        }
        assert_eq!(engine.stat("chunks_recovered"), parts.len() as u64 * PART as u64, "{policy}");
        for (part, left) in [(1, 0), (0, PART), (2, PART), (79, PART)] {
            let found = finds(&mut scheduler, namespace, &parts[part]);
            assert_eq!(found, left as u64, "{policy}: part {part}");
        }
        engine.settles_without((worker, scheduler));
    }
}

#[test]
fn with_everything_leased_stores_are_dropped_and_nothing_is_lost() {
    let engine = EngineProcess::configured("full", 4, &json!({ "client_share": 1.0 }));
    let (mut worker, mut scheduler) = pair(&engine.name, Shape::SMALL);
    let keys = chain(1, 64);
    let stored = worker.store(round(1), &keys, 1);
    assert_eq!(stored, all_stored(64));
    let found = scheduler.finds("all", 0, &keys);
    let dropped = worker.store(round(2), &chain(2, 8), 1);
    assert_eq!((dropped.stored, dropped.dropped), (0, 8), "no room is an answer");
    assert_eq!(worker.load(&found.handles, 1), all_loaded(64));
    scheduler.api().end_session("all");
    has_let_go(&scheduler);
    assert_eq!(worker.store(round(3), &chain(2, 8), 1), all_stored(8));
}

#[test]
fn one_client_cannot_hold_more_than_its_share() {
    let engine = EngineProcess::configured("share", 8, &json!({ "client_share": 0.25 }));
    let (mut worker, mut scheduler) = pair(&engine.name, Shape::SMALL);
    let keys = chain(1, 96);
    // A quarter of 8 MiB is 32 shards: no more in one reservation ...
    let stored = worker.store(round(1), &keys[..40], 1);
    assert_eq!((stored.stored, stored.dropped), (32, 8));
    for part in keys.chunks(16).skip(2) {
        assert_eq!(worker.store(round(1), part, 1), all_stored(16));
    }
    // ... and none in leases: a shorter hit, which others share at no cost, and then none at all. Each is counted.
    let cut = scheduler.lookup("a", 0, &keys);
    assert_eq!(cut.chunks, 32);
    for request in 0..40 {
        assert_eq!(scheduler.lookup(&format!("shares {request}"), 0, &keys).chunks, 32);
    }
    assert_eq!(scheduler.lookup("b", 0, &keys[64..]).chunks, 0);
    assert_eq!((scheduler.tally().answered, scheduler.tally().cut), (42, 42));
    engine.stat_becomes("pins", 41 * 32);
    engine.stat_becomes("lookups_cut", 42);
    // What was answered is held, whatever others store.
    for number in 2..12 {
        for part in chain(u64::from(number) + 10, 96).chunks(16) {
            assert_eq!(worker.store(round(number), part, 1), all_stored(16));
        }
    }
    assert_eq!(worker.load(&cut.handles, 1), all_loaded(32));
    assert_eq!(engine.stat("holds_cut"), 0, "the client counts no less than the engine");
    for request in 0..40 {
        scheduler.api().end_session(&format!("shares {request}"));
    }
    scheduler.api().end_session("a");
    let keys = worker.stores(round(20), chain(1000, 32), 1);
    scheduler.finds("c", 0, &keys);
}

#[test]
fn a_load_of_what_was_evicted_is_an_error_whatever_the_slot_holds_now() {
    let engine = small("lru");
    let (mut worker, mut scheduler) = pair(&engine.name, Shape::SMALL);
    let keys = worker.stores(round(1), chain(1, 16), 1);
    let found = scheduler.lookup("r", 0, &keys);
    scheduler.api().end_session("r");
    has_let_go(&scheduler);
    for number in 2..8 {
        worker.store(round(number), &chain(u64::from(number), 32), 1);
    }
    assert_eq!(worker.load(&found.handles, 1), all_failed(16));
    // The same keys again: other generations, perhaps in the same slots.
    assert_eq!(worker.store(round(9), &keys, 2), all_stored(16));
    assert_eq!(worker.load(&found.handles, 2), all_failed(16));
    let fresh = scheduler.lookup("again", 0, &keys);
    assert_eq!(worker.load(&fresh.handles, 2), all_loaded(16));
    // Another chunk's generation, another arena, a chunk that cannot be.
    let mut wrong = [fresh.handles[0]; 4];
    wrong[0].word += 1 << CHUNK_ID_BITS;
    wrong[1].word -= 1 << CHUNK_ID_BITS;
    wrong[2].arena_id[0] ^= 1;
    wrong[3].word |= u64::from(CHUNK_IDS - 1);
    assert_eq!(worker.load(&wrong, 2), all_failed(4));
}

/// Loads without a lease, while another thread evicts everything again and again by its stores. Shards have 1 MiB, so that
/// the copy itself is raced and not only the check before it.
#[test]
fn loads_that_race_eviction_never_give_wrong_bytes() {
    let engine = EngineProcess::start("race", 24);
    let name = engine.name.clone();
    let (mut loader, mut scheduler) = pair(&name, Shape::LARGE);
    let mut total = Loaded::default();
    let wanted = 40 * soak() as u32;
    std::thread::scope(|scope| {
        let (keys, arrivals) = std::sync::mpsc::sync_channel(2);
        let storer = scope.spawn(move || {
            let spec = WorkerSpec { shape: Shape::LARGE, ..WorkerSpec::new(&name) };
            let mut worker = WorkerSide::start(&spec).unwrap();
            for number in 0u32.. {
                let stored = chain(u64::from(number) + 100, 4);
                worker.store(round(number), &stored, u64::from(number));
                if keys.send((u64::from(number), stored)).is_err() {
                    break;
                }
            }
        });
        // Loads come a few stores late, about when their slots are given away.
        let mut waiting = VecDeque::new();
        while total.loaded < wanted || total.failed < wanted {
            let (version, keys) = arrivals.recv().unwrap();
            let request = format!("race {version}");
            let found = scheduler.lookup(&request, 0, &keys);
            scheduler.api().end_session(&request);
            waiting.push_back((version, found));
            if waiting.len() > 4 {
                let (version, found) = waiting.pop_front().unwrap();
                let loaded = loader.load(&found.handles, version);
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
