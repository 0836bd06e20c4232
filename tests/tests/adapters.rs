//! Several adapters on one client, one after another and side by side: what ends with each of them, and what does not.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_adapter::{
    Client, PollingSchedulerAdapter, RegisterError, Role, SchedulerOptions, StoreChunk, WorkerAdapter,
    WorkerOptions,
};
use kvring_rig::pages::Pages;
use kvring_tests::proto::fingerprint;
use kvring_tests::{
    ClientSpec, EngineProcess, LIMIT, Shape, WorkerSide, WorkerSpec, all_stored, becomes, chain, client,
    eventually, round,
};
use std::sync::Arc;

fn scheduler(client: &Arc<Client>) -> PollingSchedulerAdapter {
    PollingSchedulerAdapter::new(client, SchedulerOptions::new(fingerprint(1)))
}

#[test]
fn adapters_on_one_client_have_leases_of_their_own_which_end_with_them() {
    let engine = EngineProcess::start("adapters", 16);
    let mut worker = engine.worker();
    let keys = worker.stores(round(1), chain(1, 8), 0);
    let client = client(Role::Scheduler, &ClientSpec::new(&engine.name));
    client.wait_ready(LIMIT).unwrap();
    let (mut one, mut other) = (scheduler(&client), scheduler(&client));
    // The first session of each, of the same name and admission.
    assert_eq!(one.lookup("r", 0, &keys).unwrap().chunks, 8);
    assert_eq!(other.lookup("r", 0, &keys[..3]).unwrap().chunks, 3);
    engine.stat_becomes("pins", 11);
    one.end_session("r");
    engine.stat_becomes("pins", 3);
    assert_eq!(one.lookup("again", 0, &keys).unwrap().chunks, 8);
    engine.stat_becomes("pins", 11);
    // The client lives on; the leases of its adapter do not.
    drop(one);
    engine.stat_becomes("pins", 3);
    drop(other);
    engine.stat_becomes("leases", 0);
    client.noop().unwrap();
    engine.settles_without((client, worker));
}

#[test]
fn a_worker_adapter_on_a_schedulers_client_is_an_error() {
    let engine = EngineProcess::start("roles", 8);
    let client = client(Role::Scheduler, &ClientSpec::new(&engine.name));
    let error = WorkerAdapter::new(&client, WorkerOptions::new(fingerprint(1), 1, 0, 64)).err().unwrap();
    assert!(matches!(error, RegisterError::Invalid { what: "the client's role", .. }), "{error}");
}

#[test]
fn what_ended_under_one_kv_cache_is_reported_under_the_next_and_after_the_end() {
    let engine = EngineProcess::start("reports", 16);
    let client = client(Role::Worker, &ClientSpec::new(&engine.name));
    let pages = Pages::new(Shape::SMALL).unwrap();
    let mut adapter = WorkerAdapter::new(&client, WorkerOptions::new(fingerprint(1), 1, 0, 64)).unwrap();
    let store = |adapter: &mut WorkerAdapter, name: u64| {
        let chunks = vec![StoreChunk { key: chain(name, 1)[0], blocks: vec![0, 1, 2, 3] }];
        adapter.submit_store("r", round(name as u32), None, chunks, None).unwrap()
    };
    // SAFETY: the adapter is dropped before the pages, which nobody else touches.
    let paged = || unsafe { pages.describe() }.unwrap();
    adapter.register_kv_caches(paged()).unwrap();
    let first = store(&mut adapter, 1);
    adapter.register_kv_caches(paged()).unwrap();
    let second = store(&mut adapter, 2);
    adapter.shutdown();
    let reported: Vec<_> = adapter.get_finished().stores.into_iter().map(|(id, ..)| id).collect();
    assert_eq!(reported, [first, second]);
}

#[test]
fn a_registration_that_one_engine_refused_is_made_again_at_the_next() {
    let mut engine = EngineProcess::start("again", 16);
    // 4 MiB a shard.
    let shape = Shape { page_bytes: [1 << 20, 1 << 20], blocks: 8, ..Shape::LARGE };
    let mut worker = WorkerSide::start(&WorkerSpec { shape, ..WorkerSpec::new(&engine.name) }).unwrap();
    assert_eq!(worker.store(round(1), &chain(1, 1), 0), all_stored(1));
    engine.terminate();
    engine.restart_with_arena(2);
    eventually("the worker attaches and is refused", || {
        engine.stat("attaches") > 0 && worker.client().wait_ready(LIMIT).is_ok()
    });
    assert_eq!(worker.store(round(2), &chain(2, 1), 0).dropped, 1, "a shard that cannot fit");
    engine.terminate();
    engine.restart_with_arena(16);
    becomes("a store through the third engine", 1, || worker.store(round(3), &chain(3, 1), 0).stored);
    engine.settles_without(worker);
}
