//! Clients come back to another engine, and something happens in the middle of it, or the first attempt fails.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_shm_abi::engine_segment::{EngineSegment, NAMESPACES_MAX};
use kvring_shm_abi::failpoint::Place;
use kvring_shm_abi::lobby::Role;
use kvring_shm_abi::message::{ANY_NAMESPACE, Request, SlotOutcome, Status};
use kvring_shm_abi::segment::{Access, EngineName, SegmentFile};
use kvring_shm_abi::sync::Ordering;
use kvring_tests::engine::merged;
use kvring_tests::{
    ClientSpec, EngineProcess, FAIL_POINT, Fault, HeldBackend, LIMIT, Peer, RawClient, SchedulerSide,
    SchedulerSpec, WorkerSide, WorkerSpec, all_loaded, all_stored, chain, eventually, overrides, round,
    unique_name,
};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;

fn impatient(engine: &str) -> ClientSpec {
    ClientSpec { operation_ms: 300, ..ClientSpec::new(engine) }
}

/// A lease that ends between two attempts to declare to the same engine.
#[test]
fn a_lease_that_ends_between_two_attempts_to_declare_does_not_stay() {
    let mut engine = EngineProcess::start("rj-lease", 16);
    let mut worker = engine.worker();
    let spec = SchedulerSpec { client: impatient(&engine.name), ..SchedulerSpec::new(&engine.name) };
    let mut scheduler = SchedulerSide::start(&spec);
    scheduler.ready();
    let keys = worker.stores(round(0), chain(1, 8), 7);
    for request in ["a", "b"] {
        assert_eq!(scheduler.lookup(request, 0, &keys).chunks, 8);
    }
    engine.kill();
    engine.restart_with(&[(FAIL_POINT, &format!("{}:2:stop", Place::Hold))]).unwrap();
    engine.has_stopped();
    scheduler.ends(&["a", "b"]);
    // This attempt and further ones fail at their deadlines.
    std::thread::sleep(Duration::from_millis(1500));
    engine.resume();
    scheduler.ready();
    worker.ready();
    engine.beats(50);
    assert_eq!((engine.stat("leases"), engine.stat("pins")), (0, 0), "every session has ended");
}

/// An engine stops when it hears that everything is declared, so the client declares again, by the same attachment. What it
/// finds meanwhile is told by that attachment too, and as soon as all is told the engine evicts again.
#[test]
fn what_is_found_after_an_unanswered_declaration_is_told_by_the_same_attachment() {
    let settings = json!({ "client_share": 1.0, "reattach_grace_ms": 600_000 });
    let mut engine = EngineProcess::configured("rj-end", 4, &settings);
    let mut worker = engine.worker();
    let spec = SchedulerSpec { client: impatient(&engine.name), ..SchedulerSpec::new(&engine.name) };
    let mut scheduler = SchedulerSide::start(&spec);
    scheduler.ready();
    let keys = worker.stores(round(0), chain(1, 64), 7);
    drop(worker);
    engine.kill();
    engine.restart_with(&[(FAIL_POINT, &format!("{}:1:stop", Place::DeclareEnd))]).unwrap();
    engine.has_stopped();
    // More of them than the ring has places.
    let requests: Vec<_> = (0..300).map(|number| format!("r{number}")).collect();
    for request in &requests {
        assert_eq!(scheduler.lookup(request, 0, &keys[..2]).chunks, 2);
    }
    // This attempt and further ones fail at their deadlines.
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(scheduler.lookup("late", 0, &keys[2..4]).chunks, 2);
    engine.resume();
    scheduler.ready();
    engine.stat_becomes("leases", 301);
    let mut worker = engine.worker();
    worker.stores(round(1), chain(2, 60), 7);
    assert_eq!(scheduler.lookup("again", 0, &keys[..4]).chunks, 4, "what is held stays");
    let requests: Vec<_> = requests.iter().map(String::as_str).chain(["late", "again"]).collect();
    scheduler.ends(&requests);
    engine.stat_becomes("leases", 0);
    worker.stores(round(2), chain(3, 64), 7);
    assert_eq!(engine.stat("holds_cut"), 0);
    engine.settles_without((worker, scheduler));
}

/// A client that has not come back yet is not gone: its namespace is not forgotten, and what it has leased is not cleared.
#[test]
fn what_awaited_clients_may_hold_is_neither_forgotten_nor_cleared() {
    let mut engine = EngineProcess::configured("rj-awaited", 16, &json!({ "reattach_grace_ms": 600_000 }));
    let mut holder = Peer::worker(&WorkerSpec::new(&engine.name));
    holder.add_scheduler(&SchedulerSpec::new(&engine.name));
    holder.ready();
    let keys = chain(1, 4);
    assert_eq!(holder.store(round(1), &keys, 1), all_stored(4));
    assert_eq!(holder.lookup("r", 0, &keys).chunks, 4);
    let mut raw = RawClient::attach(&engine.name, Role::Worker);
    // Enough of them that one goes with each registration; each is younger than the holder's.
    for model in 0..NAMESPACES_MAX as u64 - 7 {
        let namespace = raw.register(1000 + model, 1, 0, 4096);
        let slots = raw.reserve(namespace, 0, round(1), &chain(9, 1));
        assert_eq!(raw.finish(&slots, true), [SlotOutcome::Done]);
    }
    drop(raw);
    let namespaces = engine.stat("namespaces");
    let chunks = engine.stat("chunks_visible");
    holder.stop();
    engine.kill_and_restart();
    let mut raw = RawClient::attach(&engine.name, Role::Worker);
    let mut other = RawClient::attach(&engine.name, Role::Scheduler);
    raw.register(5000, 1, 0, 4096);
    let clear = Request::Clear { namespace: ANY_NAMESPACE };
    assert_eq!(other.call(clear).status, Status::Busy);
    engine.beats(50);
    assert_eq!((engine.stat("namespaces"), engine.stat("chunks_visible")), (namespaces + 1, chunks));
    holder.resume();
    engine.stat_becomes("clients_awaited", 0);
    engine.stat_becomes("leases", 1);
    // Now the engine knows what is leased, and everything else goes.
    assert_eq!(other.call(clear).status, Status::Ok);
    assert_eq!(engine.stat("chunks_visible"), 4);
    assert_eq!(holder.store(round(2), &keys, 1).skipped, 4);
    raw.register(5001, 1, 0, 4096);
    engine.stat_becomes("namespaces", namespaces + 1);
}

/// A batch that is given up between two attempts to declare to the same engine.
#[test]
fn slots_that_are_given_up_between_two_attempts_to_declare_do_not_stay() {
    let mut engine = EngineProcess::start("rj-slots", 16);
    let spec = WorkerSpec { client: impatient(&engine.name), ..WorkerSpec::new(&engine.name) };
    let backend = HeldBackend::new();
    let mut worker = WorkerSide::copying_with(&spec, backend.clone()).unwrap();
    worker.ready();
    let job = backend.hold_a_store(&mut worker, round(1), &chain(1, 8), 1);
    engine.kill();
    engine.restart_with(&[(FAIL_POINT, &format!("{}:1:stop", Place::DeclareEnd))]).unwrap();
    engine.has_stopped();
    // The copy fails while the first attempt waits for the engine.
    backend.set(Fault::FailWhileCopying);
    backend.let_go();
    assert_eq!(worker.finished_store(job).dropped, 8);
    std::thread::sleep(Duration::from_millis(1500));
    engine.resume();
    worker.ready();
    engine.beats(50);
    assert_eq!(engine.stat("slots_writing"), 0, "nobody writes them");
}

/// A worker whose operations never time out, so that no deadline ends a wait for an engine. Only its shutdown has one.
fn soon_drained(engine: &EngineProcess) -> (WorkerSide, Arc<HeldBackend>) {
    let client = ClientSpec { drain_ms: 100, ..ClientSpec::new(&engine.name) };
    let backend = HeldBackend::new();
    let spec = WorkerSpec { client, ..WorkerSpec::new(&engine.name) };
    (WorkerSide::copying_with(&spec, backend.clone()).unwrap(), backend)
}

/// A copy of the worker's ends after the engine's death.
fn its_copy_outlives(engine: &mut EngineProcess, worker: &mut WorkerSide, backend: &HeldBackend) {
    backend.hold_a_store(worker, round(1), &chain(2, 8), 7);
    engine.kill();
    eventually("the worker knows", || !worker.client().is_healthy());
    backend.let_go();
}

/// A load does not wait behind a commit that the engine's death has left open.
#[test]
fn a_load_does_not_wait_for_a_dead_engine() {
    let mut engine = EngineProcess::start("rj-load", 16);
    let (mut worker, backend) = soon_drained(&engine);
    let mut scheduler = engine.scheduler();
    let keys = worker.stores(round(0), chain(1, 8), 7);
    let found = scheduler.lookup("r", 0, &keys);
    its_copy_outlives(&mut engine, &mut worker, &backend);
    assert_eq!(worker.load(&found.handles, 7), all_loaded(8));
}

/// Nor does a shutdown.
#[test]
fn a_shutdown_does_not_wait_for_a_dead_engine() {
    let mut engine = EngineProcess::start("rj-down", 16);
    let (mut worker, backend) = soon_drained(&engine);
    its_copy_outlives(&mut engine, &mut worker, &backend);
    worker.adapter().shutdown();
}

/// Nor does a preemption that began while the engine was well.
#[test]
fn a_preemption_does_not_wait_for_a_dead_engine() {
    let mut engine = EngineProcess::start("rj-pre", 16);
    let (mut worker, backend) = soon_drained(&engine);
    backend.hold_a_store(&mut worker, round(1), &chain(2, 8), 7);
    std::thread::scope(|scope| {
        let adapter = worker.adapter();
        let flush = scope.spawn(move || adapter.handle_preemptions(None));
        std::thread::sleep(Duration::from_millis(100));
        engine.kill();
        backend.let_go();
        flush.join().unwrap();
    });
}

/// A lease that begins and ends before the engine has read of either.
#[test]
fn a_lease_that_was_released_before_the_engine_heard_of_it_is_not_declared() {
    let (mut engine, mut worker, mut scheduler) = EngineProcess::with_clients("rj-early");
    let keys = worker.stores(round(0), chain(1, 8), 7);
    engine.stop();
    for request in ["released", "ended", "kept"] {
        scheduler.finds(request, 0, &keys);
    }
    scheduler.api().free_lookup_locks("released", 0, 0);
    scheduler.ends(&["ended"]);
    engine.kill_and_restart();
    scheduler.ready();
    assert_eq!((engine.stat("leases"), engine.stat("pins")), (1, 8), "the other sessions have ended");
}

/// Slabs that a successor's allocator finishes before the successor serves.
#[test]
fn every_slab_in_use_is_published() {
    let mut engine = EngineProcess::start("rj-slabs", 2);
    let mut worker = engine.worker();
    // As if it had died when one of its two slabs had memory: the allocator finishes the other while the tables are made.
    engine.kill();
    let segment = EngineName::new(&engine.name).unwrap().engine_segment();
    let file = SegmentFile::open(&segment, Access::ReadWrite).unwrap();
    let mapping = Arc::new(file.map(file.len().unwrap(), Access::ReadWrite).unwrap());
    let segment =
        EngineSegment::new(mapping, &engine.view().identity.geometry, engine.view().identity.arena_id)
            .unwrap();
    segment.info().slabs_allocated.store(1, Ordering::Relaxed);
    engine.restart_with(&[(FAIL_POINT, &format!("{}:1:pause", Place::AllocatorStarted))]).unwrap();
    engine.is_allocated();
    engine.beats(20);
    assert_eq!(engine.view().segment.info().slabs_allocated.load(Ordering::Relaxed), 2);
    worker.ready();
    let stored: u32 = (0..4).map(|at| worker.store(round(at), &chain(at.into(), 12), 7).stored).sum();
    engine.kill_and_restart();
    assert_eq!(engine.stat("warm_start"), 1);
    assert!(engine.stat("chunks_recovered") > u64::from(stored) / 2, "{stored} stored");
}

/// A client that was attached, but had not entered yet, when the engine was restarted.
#[test]
fn a_client_that_was_only_just_attached_is_not_awaited_for_ever() {
    let name = unique_name("rj-await");
    let mut peer = Peer::spawn_with(&[(FAIL_POINT, &format!("{}:1:stop", Place::ClientAttached))]);
    peer.add_scheduler(&SchedulerSpec::new(&name));
    let fields = merged(overrides(&name, 16), &json!({ "reattach_grace_ms": 1000 }));
    let mut engine = EngineProcess::try_start(&fields).unwrap();
    engine.stat_becomes("attaches", 1);
    peer.has_stopped();
    engine.kill_and_restart();
    peer.resume();
    peer.ready();
    engine.stat_becomes("clients_awaited", 0);
}

/// A client that was thrown out attaches again, to the same tables. It does not hold any more what it held, also where that is
/// still there.
#[test]
fn what_was_held_before_a_client_was_thrown_out_is_looked_up_again() {
    let engine = EngineProcess::configured("rj-out", 4, &json!({ "client_share": 1.0 }));
    let mut scheduler = engine.scheduler();
    let mut worker = engine.worker();
    let keys = worker.stores(round(0), chain(1, 16), 7);
    assert_eq!(scheduler.lookup("r", 0, &keys).chunks, 16);
    engine.stat_becomes("leases", 1);
    engine.lobby().life_words[0].futex().store(0, Ordering::Release);
    engine.stat_becomes("attaches", 3);
    scheduler.ready();
    assert_eq!(engine.stat("leases"), 0);
    assert!(!scheduler.api().is_current("r"));
    let held = scheduler.finds("r", 0, &keys).handles;
    for number in 2..4 {
        worker.stores(round(number), chain(u64::from(number), 40), 7);
    }
    assert!(scheduler.api().is_current("r"));
    assert_eq!(worker.load(&held, 7), all_loaded(16), "they are held again");
    engine.settles_without((worker, scheduler));
}

/// A client whose life word was wiped while there was no engine: no engine tells it, and it finds out by itself.
#[test]
fn a_client_whose_life_word_was_wiped_without_an_engine_attaches_again() {
    let mut engine = EngineProcess::start("rj-wiped", 8);
    let client = ClientSpec { attach_ms: 300, ..ClientSpec::new(&engine.name) };
    let scheduler = SchedulerSide::start(&SchedulerSpec { client, ..SchedulerSpec::new(&engine.name) });
    scheduler.ready();
    let lobby = engine.lobby();
    engine.kill();
    lobby.life_words[0].futex().store(0, Ordering::Release);
    engine.restart();
    let ready = scheduler.client().wait_ready(LIMIT);
    assert_eq!(ready, Ok(()));
}

/// Tables that made an engine panic are not taken over.
#[test]
fn after_a_panic_the_next_start_is_a_cold_one() {
    let mut engine = EngineProcess::start("rj-panic", 8);
    let worker = engine.worker();
    engine.kill();
    engine.restart_with(&[(FAIL_POINT, &format!("{}:1:panic", Place::AttachAnswer))]).unwrap();
    eventually("it has panicked", || engine.ended().is_some());
    engine.restart();
    assert_eq!(engine.stat("warm_start"), 0);
    worker.ready();
}
