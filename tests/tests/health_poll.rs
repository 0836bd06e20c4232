//! Operations that are in flight when the engine stops answering: a reservation that comes late is undone, and what was given
//! back is given back later.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_tests::{
    ClientSpec, EngineProcess, Shape, WorkerSide, WorkerSpec, all_dropped, chain, eventually, round, within,
};
use serde_json::json;
use std::time::Duration;

const KEYS: usize = 8;

/// A reservation that is answered too late is aborted: its slots would be lost otherwise.
#[test]
fn a_late_reservation_is_aborted() {
    let engine = EngineProcess::start("reserve", 16);
    let client = ClientSpec { operation_ms: 100, ..ClientSpec::new(&engine.name) };
    let mut worker = WorkerSide::start(&WorkerSpec { client, ..WorkerSpec::new(&engine.name) }).unwrap();
    engine.stop();
    let stored = worker.store(round(1), &chain(1, KEYS), 0);
    assert_eq!(stored, all_dropped(KEYS));
    engine.resume();
    engine.stat_becomes("shards_reserved", KEYS as u64);
    engine.stat_becomes("shards_aborted", KEYS as u64);
    engine.stat_becomes("slots_writing", 0);
    eventually("it works again", || {
        eventually("the worker is well again", || worker.client().is_healthy());
        worker.store(round(2), &chain(1, KEYS), 0).stored == KEYS as u32
    });
    engine.settles_without(worker);
}

/// Messages that give something back are never dropped: while the engine stands still there are more of them than the ring has
/// places, and when it goes on all of them arrive.
#[test]
fn what_is_given_back_during_a_stall_arrives_afterwards() {
    let sessions = 600;
    let engine = EngineProcess::configured("deferred", 64, &json!({ "client_share": 1.0 }));
    let shape = Shape { page_bytes: [1024, 1024], ..Shape::SMALL };
    let mut worker = WorkerSide::start(&WorkerSpec { shape, ..WorkerSpec::new(&engine.name) }).unwrap();
    let keys = worker.stores(round(1), chain(1, KEYS), 0);
    let mut scheduler = engine.scheduler();
    for number in 0..sessions {
        let found = scheduler.lookup(&format!("r{number}"), 0, &keys);
        assert_eq!(found.chunks, KEYS as u32, "{number}");
    }
    engine.stat_becomes("leases", sessions);
    engine.stat_becomes("pins", sessions * KEYS as u64);
    engine.stop();
    for number in 0..sessions {
        let request = format!("r{number}");
        within(Duration::ZERO, "giving back", || match number % 3 {
            0 => scheduler.api().free_lookup_locks(&request, 0, 0),
            1 => scheduler.api().end_session(&request),
            _ => {
                scheduler.api().free_lookup_locks(&request, 0, 3);
                scheduler.api().free_lookup_locks(&request, 0, 1);
            }
        });
    }
    engine.resume();
    engine.stat_becomes("leases", sessions / 3);
    engine.stat_becomes("pins", sessions / 3);
    for number in 0..sessions {
        scheduler.api().end_session(&format!("r{number}"));
    }
    engine.stat_becomes("leases", 0);
    engine.settles_without((worker, scheduler));
}
