//! Ranks that disagree, impossible numbers, block ids out of range, a full table of namespaces: typed errors with the values in
//! them, and correct clients do not notice.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_adapter::{
    BlockError, Key, LoadChunk, RegisterError, Role, StoreChunk, SubmitError, WorkerAdapter, WorkerOptions,
};
use kvring_shm_abi::chunk::ChunkWord;
use kvring_shm_abi::engine_segment::NAMESPACES_MAX;
use kvring_shm_abi::failpoint::{Place, Rule};
use kvring_shm_abi::message::{Disagreement, Request, Status};
use kvring_shm_abi::namespace::namespace_index;
use kvring_tests::proto::fingerprint;
use kvring_tests::raw::registration;
use kvring_tests::{
    BREAK, Bystander, EngineProcess, FAIL_POINT, Peer, RawClient, SchedulerSide, SchedulerSpec, Shape,
    WorkerSide, WorkerSpec, all_loaded, all_stored, chain, client, eventually, round,
};
use serde_json::json;
use std::collections::BTreeSet;

#[test]
fn ranks_that_disagree_are_told_about_what() {
    let (engine, bystander) = EngineProcess::with_bystander("ranks");
    let right = WorkerSpec::rank(&engine.name, 2, 0);
    let mut first = WorkerSide::start(&right).unwrap();
    let refused = |spec: &WorkerSpec| match WorkerSide::start(spec) {
        Err(RegisterError::Disagreement { what, expected, got }) => {
            let error = RegisterError::Disagreement { what, expected, got }.to_string();
            assert!(error.contains(&expected.to_string()) && error.contains(&got.to_string()), "{error}");
            (what, expected, got)
        }
        other => panic!("{spec:?}: {:?}", other.err()),
    };
    let second = WorkerSpec::rank(&engine.name, 2, 1);
    assert_eq!(refused(&WorkerSpec { world: 3, ..second.clone() }), (Disagreement::World, 2, 3));
    assert_eq!(
        refused(&WorkerSpec { chunk_tokens: 128, ..second.clone() }),
        (Disagreement::ChunkTokens, 64, 128)
    );
    // The same rank again, with another order of pages and with other sizes.
    let mut other = right.clone();
    other.shape.page_bytes = [12288, 4096];
    assert_eq!(refused(&other).0, Disagreement::Layout);
    let mut raw = RawClient::attach(&engine.name, Role::Worker);
    let mut record = registration(1, 2, 0, 999 * 4096);
    let completion = raw.call_register(&record);
    assert_eq!(completion.status, Status::Disagreement);
    assert_eq!(completion.results[..3], [Disagreement::ShardBytes as u64, 65536, 999 * 4096]);
    record.shard_bytes = 65536;
    assert_eq!(raw.call_register(&record).status, Status::Ok, "the same again is fine");
    drop(raw);
    // The correct ranks go on.
    let mut second = WorkerSide::start(&second).unwrap();
    let keys = chain(1, 4);
    for worker in [&mut first, &mut second] {
        assert_eq!(worker.store(round(1), &keys, 0), all_stored(4));
    }
    let mut scheduler = SchedulerSide::started(&SchedulerSpec::new(&engine.name));
    let found = scheduler.lookup("r", 0, &keys);
    assert_eq!(second.load(&found.handles, 0), all_loaded(4));
    engine.settles_beside(bystander, (first, second, scheduler));
}

/// A registration that is refused when the keeper repeats it: that rank is degraded, and says why, until an engine accepts it.
#[test]
fn a_registration_that_a_new_engine_refuses_degrades_its_rank_alone() {
    let mut engine = EngineProcess::start("later", 16);
    let right = WorkerSpec::new(&engine.name);
    let mut peer = Peer::worker(&right);
    assert_eq!(peer.health(), "healthy");
    peer.stop();
    engine.kill();
    // Another arena, so a cold start.
    engine.restart_with_arena(8);
    // Another worker of the same namespace registers first.
    let other = WorkerSide::start(&WorkerSpec { chunk_tokens: 128, ..right }).unwrap();
    peer.resume();
    eventually("it is told", || peer.health().starts_with("refused: "));
    assert!(peer.health().contains("128"), "{}", peer.health());
    assert_eq!(peer.store(round(1), &chain(1, 4), 1).dropped, 4);
    assert_eq!(engine.stat("clients"), 2, "it stays attached: its other ranks may be welcome");
    drop(other);
    engine.kill();
    engine.restart_with_arena(16);
    eventually("another engine accepts it", || peer.health() == "healthy");
    assert_eq!(peer.store(round(1), &chain(1, 4), 1), all_stored(4));
}

/// A worker that is registered can store, also while its keeper is still busy with the attachment.
#[test]
fn the_first_store_after_a_registration_is_not_dropped() {
    let engine = EngineProcess::start("first", 16);
    let mut peer = Peer::spawn_with(&[(FAIL_POINT, &format!("{}:1:pause", Place::ClientEntered))]);
    peer.add_worker(&WorkerSpec::new(&engine.name)).unwrap();
    assert_eq!(peer.store(round(1), &chain(1, 4), 1), all_stored(4));
}

#[test]
fn numbers_that_cannot_be_are_errors_at_construction() {
    let engine = EngineProcess::start("numbers", 4);
    let spec = WorkerSpec::new(&engine.name);
    let client = client(Role::Worker, &spec.client);
    for (world, rank, tokens, part) in [
        (0, 0, 64, "world: expected 1 to 64, got 0"),
        (65, 0, 64, "got 65"),
        (2, 2, 64, "rank"),
        (1, 0, 0, "chunk_tokens"),
    ] {
        let options = WorkerOptions::new(spec.fingerprint(), world, rank, tokens);
        let error = WorkerAdapter::new(&client, options).err().unwrap();
        assert!(
            matches!(error, RegisterError::Invalid { .. }) && error.to_string().contains(part),
            "{error}"
        );
    }
}

#[test]
fn block_ids_out_of_range_are_refused_before_anything_is_touched() {
    let (engine, bystander) = EngineProcess::with_bystander("blocks");
    let mut worker = engine.worker();
    let mut scheduler = engine.scheduler();
    let keys = worker.stores(round(1), chain(1, 2), 0);
    let found = scheduler.lookup("r", 0, &keys);
    let num_blocks = Shape::SMALL.blocks;
    for (blocks, expected) in [
        (vec![0, 1, 2, num_blocks], BlockError::OutOfRange { block: num_blocks, num_blocks }),
        (vec![u32::MAX - 1, 1, 2, 3], BlockError::OutOfRange { block: u32::MAX - 1, num_blocks }),
        (vec![0, 1, 2], BlockError::WrongCount { expected: 4, got: 3 }),
        (vec![], BlockError::WrongCount { expected: 4, got: 0 }),
    ] {
        let good = vec![0, 1, 2, 3];
        let key: Key = [9, 9];
        let stores = [StoreChunk { key, blocks: good.clone() }, StoreChunk { key, blocks: blocks.clone() }];
        let error = worker.adapter().submit_store("bad", round(2), None, stores.to_vec(), None).unwrap_err();
        assert_eq!(error, SubmitError::Blocks { chunk: 1, error: expected });
        let loads = [good, blocks].map(|blocks| LoadChunk { chunk: found.handles[0].chunk(), blocks });
        let error = worker.adapter().submit_load("bad", loads.to_vec(), None).unwrap_err();
        assert_eq!(error, SubmitError::Blocks { chunk: 1, error: expected });
        assert!(error.to_string().starts_with("chunk 1: expected"), "{error}");
    }
    assert_eq!(worker.load(&found.handles, 0), all_loaded(2));
    // Without a KV cache there is nothing to submit.
    let client = client(Role::Worker, &WorkerSpec::new(&engine.name).client);
    let options = WorkerOptions::new(fingerprint(1), 1, 0, 64);
    let mut bare = WorkerAdapter::new(&client, options).unwrap();
    assert_eq!(bare.submit_store("r", round(1), None, vec![], None).unwrap_err(), SubmitError::NoKvCache);
    drop((worker, scheduler, bare));
    client.shutdown();
    engine.settles_beside(bystander, ());
}

#[test]
fn the_table_of_namespaces_is_finite_and_unused_ones_make_room() {
    let engine = EngineProcess::start("spaces", 8);
    // The bystander takes one of them.
    let bystander = Bystander::start(&engine.name);
    let mut raw = RawClient::attach(&engine.name, Role::Worker);
    for namespace in 0..NAMESPACES_MAX as u64 - 1 {
        assert_eq!(raw.call_register(&registration(1000 + namespace, 1, 0, 4096)).status, Status::Ok);
    }
    let status = raw.call_register(&registration(5000, 1, 0, 4096)).status;
    assert_eq!(status, Status::TooManyNamespaces);
    let error = WorkerSide::start(&WorkerSpec::new(&engine.name)).err().unwrap();
    assert_eq!(error, RegisterError::TooManyNamespaces);
    assert!(error.to_string().contains("kvring clear"), "{error}");
    bystander.goes_on();
    // No client uses them any more, and they hold nothing.
    drop(raw);
    engine.stat_becomes("clients", 2);
    let mut worker = engine.worker();
    assert_eq!(worker.store(round(1), &chain(1, 4), 0), all_stored(4));
    engine.settles_beside(bystander, worker);
}

/// The error names the table that is full, and its advice helps.
#[test]
fn the_table_of_shard_sizes_is_finite_and_unused_ones_make_room() {
    let engine = EngineProcess::start("sizes", 8);
    let of_size = |size: u64| registration(1000 + size / 64, 64, size as u32 % 64, 4096 * (size + 1));
    for life in 0..3 {
        let mut raw = RawClient::attach(&engine.name, Role::Worker);
        for size in 256 * life..256 * (life + 1) {
            assert_eq!(raw.call_register(&of_size(size)).status, Status::Ok, "size {size}");
        }
        let refused = raw.call_register(&of_size(256 * (life + 1)));
        assert_eq!((refused.status, refused.results[0]), (Status::TooManySizes, 256));
        assert_eq!(engine.stat("namespaces"), 4, "what was refused leaves nothing behind");
        // No client has these sizes any more.
        drop(raw);
        engine.stat_becomes("clients", 0);
    }
    let error = RegisterError::TooManySizes { most: 256 }.to_string();
    assert!(error.contains("table of chunk sizes is full") && error.contains("256"), "{error}");
    engine.settles(0);
}

#[test]
fn namespaces_of_former_models_are_forgotten_before_the_table_is_full() {
    let engine = EngineProcess::start("models", 64);
    let mut workers = Vec::new();
    for model in 0..2 * NAMESPACES_MAX as u64 {
        let spec = WorkerSpec { namespace: 100 + model, ..WorkerSpec::new(&engine.name) };
        let mut worker = WorkerSide::start(&spec).unwrap();
        assert_eq!(worker.store(round(1), &chain(1, 2), 0), all_stored(2), "model {model}");
        // The first one is used all the time, each of the others until the next one comes.
        workers.truncate(1);
        workers.push(worker);
        engine.stat_becomes("clients", workers.len() as u64);
    }
    let namespaces = engine.stat("namespaces");
    assert!((48..=NAMESPACES_MAX as u64 - 8).contains(&namespaces), "{namespaces} namespaces");
    assert_eq!(engine.stat("chunks_visible"), 2 * namespaces, "what is kept is whole");
    // The first one's chunks are still there: a second store finds them.
    let again = workers[0].store(round(2), &chain(1, 2), 0);
    assert_eq!(again.skipped, 2, "{again:?}");
    engine.settles_without(workers);
}

/// Indices are used again, ids are not, over any number of engines.
#[test]
fn no_two_namespaces_have_the_same_id() {
    let mut engine = EngineProcess::start("ids", 8);
    let mut seen = BTreeSet::new();
    for life in 0..3 {
        for part in 0..2 {
            let mut raw = RawClient::attach(&engine.name, Role::Worker);
            for number in 0..NAMESPACES_MAX as u64 {
                let id = raw.register(1000 * life + 100 * part + number, 1, 0, 4096);
                assert!(usize::from(namespace_index(id)) < NAMESPACES_MAX);
                assert!(seen.insert(id), "life {life}, part {part}: {id:x} has been another namespace's");
            }
            // No client uses them any more.
            drop(raw);
            engine.stat_becomes("clients", 0);
        }
        let last = 1000 * life + 100 + NAMESPACES_MAX as u64 - 1;
        let id = engine.namespace(last);
        engine.kill_and_restart();
        assert_eq!(engine.namespace(last), id, "a namespace that is still there keeps its id");
    }
}

/// A worker that has slept since its namespace was forgotten still knows it by its id, and loads without asking the engine.
/// Another model's namespace, in the same place of the table, has the same keys. Nothing of that one is reached.
#[test]
fn an_id_that_is_gone_does_not_lead_to_the_next_namespace_in_its_place() {
    let mut engine = EngineProcess::configured("reused", 16, &json!({ "reattach_grace_ms": 20 }));
    let mut sleeper = Peer::worker(&WorkerSpec::new(&engine.name));
    let keys = sleeper.stores(round(1), chain(1, 4), 1);
    let gone = engine.namespace(1);
    sleeper.stop();
    engine.kill_and_restart();
    let mut raw = RawClient::attach(&engine.name, Role::Worker);
    // The last of these leaves too few places.
    for number in 0..NAMESPACES_MAX as u64 - 8 {
        raw.register(1000 + number, 1, 0, 4096);
    }
    eventually("it is forgotten", || {
        raw.register(1000, 1, 0, 4096);
        engine.view().segment.find_namespace(&fingerprint(1)).is_none()
    });
    // The place remembers how many have begun there, also while there is none.
    drop(raw);
    engine.kill_and_restart();
    let mut raw = RawClient::attach(&engine.name, Role::Worker);
    let mut other = WorkerSide::start(&WorkerSpec { namespace: 2, ..WorkerSpec::new(&engine.name) }).unwrap();
    other.stores(round(1), keys.clone(), 2);
    let id = engine.namespace(2);
    assert_eq!(namespace_index(id), namespace_index(gone));
    assert!(id > gone, "{id:x} after {gone:x}");

    // Requests that name it, of clients that may do the same in the one that is there.
    assert_eq!(raw.register(2, 1, 0, Shape::SMALL.shard_bytes()), id);
    let reserve = raw.reserve_request(gone, 0, round(2), &chain(2, 1));
    assert_eq!(raw.call(reserve).status, Status::UnknownNamespace);
    assert_eq!(raw.call(Request::Unregister { namespace: gone }).status, Status::UnknownNamespace);
    assert_eq!(raw.call(Request::Clear { namespace: gone }).status, Status::UnknownNamespace);
    assert_eq!(raw.reserve(id, 0, round(2), &chain(2, 1)).len(), 1, "it is registered there");
    let mut asking = RawClient::attach(&engine.name, Role::Scheduler);
    assert!(asking.search(gone, &keys).is_empty());
    let words = asking.search(id, &keys);
    for (namespace, status, count) in [(gone, Status::UnknownNamespace, 0), (id, Status::Ok, 4)] {
        let hold = asking.hold_request(2, 1, namespace, 0, &words);
        let answer = asking.call(hold);
        assert_eq!((answer.status, answer.results[0]), (status, count), "{namespace:x}");
    }
    // Loads of its chunks. The engine is gone before the sleeper can ask it for the id that its own namespace has by now.
    let mut scheduler =
        SchedulerSide::started(&SchedulerSpec { namespace: 2, ..SchedulerSpec::new(&engine.name) });
    let found = scheduler.finds("r", 0, &keys);
    assert_eq!(other.load(&found.handles, 2), all_loaded(4));
    engine.kill();
    sleeper.resume();
    let loaded = sleeper.load(&found.handles, 1);
    assert_eq!((loaded.loaded, loaded.wrong), (0, 0), "{loaded:?}");
}

/// A request that has begun and has leased nothing yet holds no namespace. When it goes on, another one with another number of
/// ranks may be in the namespace's place. The answer has no chunks of that one.
#[test]
fn a_request_that_waits_for_its_turn_does_not_go_on_in_another_namespace() {
    let engine = EngineProcess::start_in(&[(BREAK, Rule::BeginAtOnce.name())], "refounded", 16);
    let mut scheduler = RawClient::attach(&engine.name, Role::Scheduler);
    let mut worker = RawClient::attach(&engine.name, Role::Worker);
    assert!(scheduler.entry < worker.entry, "the engine looks at it first");
    // So many that a new one gets the id of one that has gone.
    let ids: Vec<u32> =
        (0..NAMESPACES_MAX as u64).map(|number| worker.register(number, 1, 0, 4096)).collect();
    let mut namespace = ids[5];
    for number in [100, 101] {
        let asked = scheduler.hold_request(1, 1, namespace, 0, &[ChunkWord::new(0, 0)]);
        let answer = scheduler.call(asked);
        assert_eq!((answer.status, answer.results[0]), (Status::Ok, 0), "while it is there");
        engine.stop();
        scheduler.send(asked);
        worker.send(Request::Unregister { namespace });
        let founded = worker.register_request(&registration(number, 2, 0, 4096));
        worker.send(founded);
        engine.resume();
        assert_eq!(scheduler.answer().status, Status::UnknownNamespace, "namespace {number}");
        assert_eq!(worker.answer().status, Status::Ok);
        let founded = worker.answer();
        assert_eq!(founded.status, Status::Ok);
        assert_eq!(namespace_index(founded.results[0] as u32), namespace_index(namespace));
        namespace = founded.results[0] as u32;
    }
    engine.settles_without((scheduler, worker));
}
