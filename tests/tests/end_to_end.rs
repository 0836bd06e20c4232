//! What kvring is for, across processes: one worker stores chunks, a scheduler finds them, and another worker loads them, with
//! the right bytes. And everything that must keep a chunk invisible.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_adapter::Round;
use kvring_shm_abi::lobby::Role;
use kvring_shm_abi::message::SlotOutcome;
use kvring_tests::{
    EngineProcess, Peer, RawClient, SchedulerSpec, Shape, Stored, WorkerSide, WorkerSpec, all_loaded,
    all_stored, chain, round,
};

#[test]
fn what_two_ranks_store_other_processes_find_and_load() {
    let engine = EngineProcess::start("e2e", 64);
    let name = &engine.name;
    let mut stores: Vec<Peer> = (0..2).map(|rank| Peer::worker(&WorkerSpec::rank(name, 2, rank))).collect();
    let mut scheduler = Peer::scheduler(&SchedulerSpec::new(name));
    let keys = chain(1, 100);
    assert_eq!(scheduler.lookup("before", 0, &keys).chunks, 0);
    for worker in &mut stores {
        assert_eq!(worker.store(round(1), &keys, 5), all_stored(100));
    }
    // The workers that stored may have gone when others load.
    drop(stores);
    engine.stat_becomes("clients", 1);
    let found = scheduler.finds("after", 0, &keys);
    for rank in 0..2 {
        let mut loads = Peer::worker(&WorkerSpec::rank(name, 2, rank));
        assert_eq!(loads.load(&found.handles, 5), all_loaded(100));
    }
    scheduler.end_session("after");
    scheduler.shutdown();
    engine.settles(0);
    assert_eq!(engine.stat("chunks_visible"), 100);
}

#[test]
fn a_chunk_is_invisible_until_every_rank_has_stored_it() {
    let engine = EngineProcess::start("ranks", 16);
    let name = &engine.name;
    let mut workers: Vec<Peer> = (0..3).map(|rank| Peer::worker(&WorkerSpec::rank(name, 3, rank))).collect();
    let mut scheduler = Peer::scheduler(&SchedulerSpec::new(name));
    let keys = chain(1, 4);
    for (rank, worker) in workers.iter_mut().enumerate() {
        let request = format!("after {rank}");
        assert_eq!(scheduler.lookup(&request, 0, &keys).chunks, 0, "{rank} of 3 ranks have stored it");
        assert_eq!(worker.store(round(1), &keys, 0), all_stored(4));
    }
    assert_eq!(scheduler.lookup("all", 0, &keys).chunks, 4);
    // Another store of it, in the same or in another round, writes nothing.
    for number in [1, 2] {
        let skipped = Stored { skipped: 4, ..Stored::default() };
        assert_eq!(workers[0].store(round(number), &keys, 9), skipped);
    }
}

/// A rank whose load has failed aborts its shards of the round. The other ranks have computed garbage in that round and do not
/// know it, so the chunks must stay invisible, and the next round's shards must replace those of all ranks.
#[test]
fn a_rank_that_aborts_keeps_the_chunk_invisible_until_a_new_round() {
    let engine = EngineProcess::start("abort", 16);
    let name = &engine.name;
    let shard_bytes = Shape::SMALL.shard_bytes();
    let mut worker = Peer::worker(&WorkerSpec::rank(name, 2, 0));
    let mut scheduler = Peer::scheduler(&SchedulerSpec::new(name));
    let keys = chain(1, 8);
    // Rank 1 is a raw client, which aborts exactly here.
    let mut raw = RawClient::attach(name, Role::Worker);
    let namespace = raw.register(1, 2, 1, shard_bytes);
    assert_eq!(worker.store(round(1), &keys, 666), all_stored(8));
    let slots = raw.reserve(namespace, 1, round(1), &keys);
    assert_eq!(slots.len(), 8);
    // It aborts the last four, and commits the first four.
    assert_eq!(raw.finish(&slots[4..], false), vec![SlotOutcome::Done; 4]);
    assert_eq!(raw.finish(&slots[..4], true), vec![SlotOutcome::Done; 4]);
    assert_eq!(scheduler.lookup("garbage", 0, &keys).chunks, 4, "the round's other chunks are whole");
    assert_eq!(scheduler.lookup("garbage tail", 0, &keys[4..]).chunks, 0);
    engine.stat_becomes("chunks_forming", 0);
    // In the next round rank 0 must store again: its garbage does not count.
    assert_eq!(worker.store(round(2), &keys[4..], 7), all_stored(4));
    assert_eq!(scheduler.lookup("one rank", 0, &keys[4..]).chunks, 0);
    let slots = raw.reserve(namespace, 1, round(2), &keys[4..]);
    assert_eq!(raw.finish(&slots, true), vec![SlotOutcome::Done; 4]);
    let found = scheduler.lookup("good", 0, &keys[4..]);
    assert_eq!(found.chunks, 4);
    assert_eq!(worker.load(&found.handles, 7), all_loaded(4));
}

#[test]
fn shards_of_different_rounds_never_combine() {
    let engine = EngineProcess::start("rounds", 16);
    let name = &engine.name;
    let mut workers: Vec<Peer> = (0..2).map(|rank| Peer::worker(&WorkerSpec::rank(name, 2, rank))).collect();
    let mut scheduler = Peer::scheduler(&SchedulerSpec::new(name));
    let keys = chain(1, 4);
    assert_eq!(workers[0].store(round(1), &keys, 1), all_stored(4));
    assert_eq!(workers[1].store(round(2), &keys, 2), all_stored(4));
    assert_eq!(scheduler.lookup("mixed", 0, &keys).chunks, 0);
    // An older round of the same source writes nothing.
    assert_eq!(workers[0].store(round(1), &keys, 1).stored, 0);
    assert_eq!(workers[0].store(round(2), &keys, 2), all_stored(4));
    let found = scheduler.finds("same", 0, &keys);
    for worker in &mut workers {
        assert_eq!(worker.load(&found.handles, 2), all_loaded(4));
    }
    // Rounds of different sources form side by side, and one of them must be complete.
    let keys = chain(2, 4);
    let of = |source| Round { source, number: 1 };
    assert_eq!(workers[0].store(of(10), &keys, 10), all_stored(4));
    assert_eq!(workers[1].store(of(11), &keys, 11), all_stored(4));
    assert_eq!(scheduler.lookup("two sources", 0, &keys).chunks, 0);
    assert_eq!(workers[1].store(of(10), &keys, 10), all_stored(4));
    let found = scheduler.finds("one source", 0, &keys);
    for worker in &mut workers {
        assert_eq!(worker.load(&found.handles, 10), all_loaded(4));
    }
}

#[test]
fn lookups_are_answered_once_per_request_and_admission() {
    let engine = EngineProcess::start("idem", 16);
    let mut worker = engine.worker();
    let keys = chain(1, 6);
    assert_eq!(worker.store(round(1), &keys[..3], 0), all_stored(3));
    for _ in 0..2 {
        let mut scheduler = engine.scheduler();
        let before = engine.stat("lookups");
        let first = scheduler.lookup("r", 0, &keys);
        assert_eq!(first.chunks, 3, "longer than cached: the prefix");
        for _ in 0..10 {
            assert_eq!(scheduler.lookup("r", 0, &keys), first, "the same answer");
        }
        assert_eq!(scheduler.tally().answered, 1);
        // A preempted request comes back with the next admission, for which the tables are read again.
        assert_eq!(scheduler.lookup("r", 1, &keys), first);
        assert_eq!(scheduler.tally().answered, 2);
        engine.stat_becomes("lookups", before + 2);
        engine.stat_becomes("leases", 2);
        engine.stat_becomes("pins", 6);
        // A part of the first admission's lease is given up, all of the second's, and then the session ends.
        scheduler.api().free_lookup_locks("r", 0, 2);
        engine.stat_becomes("pins", 5);
        scheduler.api().free_lookup_locks("r", 1, 0);
        engine.stat_becomes("leases", 1);
        scheduler.api().end_session("r");
        engine.stat_becomes("leases", 0);
        // Unknown sessions are no error.
        scheduler.api().end_session("r");
        scheduler.api().free_lookup_locks("nobody", 3, 0);
        assert_eq!(scheduler.api().open_sessions(), 0);
        assert_eq!(
            scheduler.lookup("r", 0, &keys),
            first,
            "an ended session has no answer, so it is a new one"
        );
        scheduler.api().end_session("r");
    }
    // A lookup of no keys finds nothing.
    let mut scheduler = engine.scheduler();
    assert_eq!(scheduler.lookup("empty", 0, &[]).chunks, 0);
    // A hole ends the prefix.
    let mut holed = keys.clone();
    holed[1] = [404, 404];
    assert_eq!(scheduler.lookup("hole", 0, &holed).chunks, 1);
    engine.settles_without((worker, scheduler));
}

#[test]
fn clearing_drops_what_is_not_leased() {
    let engine = EngineProcess::start("clear", 16);
    let mut worker = engine.worker();
    let mut scheduler = engine.scheduler();
    let keys = worker.stores(round(1), chain(1, 20), 3);
    let leased = scheduler.lookup("keeps", 0, &keys[..5]);
    assert_eq!(scheduler.api().reset_cache(), Ok(15));
    assert_eq!(scheduler.lookup("after", 0, &keys).chunks, 5);
    assert_eq!(worker.load(&leased.handles, 3), all_loaded(5));
    scheduler.ends(&["keeps", "after"]);
    assert_eq!(worker.client().clear(), Ok(5));
    assert_eq!(scheduler.lookup("at last", 0, &keys).chunks, 0);
    assert_eq!(worker.store(round(2), &keys, 4), all_stored(20), "and is stored again");
    let found = scheduler.lookup("again", 0, &keys);
    assert_eq!(worker.load(&found.handles, 4), all_loaded(20));
}

#[test]
fn checksums_are_verified_against_stray_writes() {
    let engine = EngineProcess::start("sums", 16);
    let spec = WorkerSpec { checksum: true, ..WorkerSpec::new(&engine.name) };
    let mut worker = WorkerSide::start(&spec).unwrap();
    let mut scheduler = engine.scheduler();
    let keys = worker.stores(round(1), chain(1, 4), 3);
    let found = scheduler.lookup("r", 0, &keys);
    assert_eq!(worker.load(&found.handles, 3), all_loaded(4));
    // One bit of one shard, as a stray write of another client would leave it.
    let arena = std::fs::OpenOptions::new().read(true).write(true).open(engine.file("arena")).unwrap();
    let mut byte = [0u8];
    let at = engine.shard(&found.handles[2], 1, 0).identity.offset + 777;
    std::os::unix::fs::FileExt::read_exact_at(&arena, &mut byte, at).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&arena, &[byte[0] ^ 1], at).unwrap();
    let loaded = worker.load(&found.handles, 3);
    assert_eq!((loaded.loaded, loaded.failed, loaded.wrong), (3, 1, 0));
}

/// When `handle_preemptions` has returned, vLLM may give the blocks to another request. The chunks that were being stored are
/// complete, or not stored.
#[test]
fn preempted_blocks_may_be_overwritten_at_once() {
    let engine = EngineProcess::start("preempt", 64);
    let spec = WorkerSpec { shape: Shape::LARGE, ..WorkerSpec::new(&engine.name) };
    let mut worker = WorkerSide::start(&spec).unwrap();
    let mut scheduler = engine.scheduler();
    let mut found = 0;
    for number in 0..30 {
        let keys = chain(u64::from(number), 8);
        let job = worker.submit_store(round(number), &keys, 1).unwrap();
        let requests = ["r", "another"];
        worker.adapter().handle_preemptions((number % 2 == 0).then_some(&requests[..]));
        worker.overwrite_submitted();
        let stored = worker.finished_store(job);
        assert_eq!(stored.stored + stored.dropped, 8);
        let request = format!("r{number}");
        let hit = scheduler.lookup(&request, 0, &keys);
        assert_eq!(hit.chunks, stored.stored);
        let loaded = worker.load(&hit.handles, 1);
        assert_eq!((loaded.failed, loaded.wrong), (0, 0), "{stored:?}");
        found += hit.chunks;
        scheduler.api().end_session(&request);
    }
    assert!(found > 0, "a store is finished first while the engine answers");
    // A preemption of another request does not wait for this store, and nothing is lost.
    worker.submit_store(round(100), &chain(100, 8), 1).unwrap();
    worker.adapter().handle_preemptions(Some(&["another"]));
    engine.settles_without((worker, scheduler));
}
