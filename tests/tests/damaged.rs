//! A shard whose bytes are not those that were stored: the load that finds it out fails, the engine is told, and no other
//! load is sent there; the next store puts the chunk right.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_adapter::Round;
use kvring_gpu_kernels::checksum;
use kvring_shm_abi::slot::CHECKSUM_EXAMPLE;
use kvring_tests::engine::EngineProcess;
use kvring_tests::kv::chain;
use kvring_tests::proto::{Handle, Loaded, SchedulerSpec, Stored, WorkerSpec, all_loaded, all_stored};
use kvring_tests::scheduler::SchedulerSide;
use kvring_tests::wait::LIMIT;
use kvring_tests::worker::WorkerSide;
use std::os::unix::fs::FileExt;

fn round(number: u32) -> Round {
    Round { source: 1, number }
}

fn worker(engine: &EngineProcess) -> WorkerSide {
    WorkerSide::start(&WorkerSpec { checksum: true, ..WorkerSpec::new(&engine.name) }).unwrap()
}

fn scheduler(engine: &EngineProcess) -> SchedulerSide {
    let scheduler = SchedulerSide::start(&SchedulerSpec::new(&engine.name));
    scheduler.client().wait_ready(LIMIT).unwrap();
    scheduler
}

/// Flips a byte of a shard, behind everybody's back.
fn damage(engine: &EngineProcess, shard: &Handle) {
    let arena = std::fs::OpenOptions::new().read(true).write(true).open(engine.file("arena")).unwrap();
    let mut byte = [0];
    arena.read_exact_at(&mut byte, shard.offset + 100).unwrap();
    arena.write_all_at(&[!byte[0]], shard.offset + 100).unwrap();
}

/// Another way to compute checksums is another layout: what one version has stored would be damaged to another one.
#[test]
fn checksums_are_computed_as_the_layout_says() {
    let bytes: Vec<u8> = (0..26).collect();
    let sum = bytes.chunks(13).zip([0, 13]).map(|(page, at)| checksum::part(page, at));
    let computed = checksum::finish(sum.fold(0, u64::wrapping_add), 26);
    assert_eq!(
        computed, CHECKSUM_EXAMPLE,
        "expected what kvring_shm_abi::slot says, got {computed:#018x}: if that is meant, write it down there"
    );
}

#[test]
fn a_damaged_chunk_costs_one_load_and_is_replaced_by_the_next_store() {
    let engine = EngineProcess::start("damaged", 16);
    let (mut worker, mut scheduler) = (worker(&engine), scheduler(&engine));
    let keys = chain(1, 8);
    assert_eq!(worker.store("r", round(1), None, &keys, 0), all_stored(8));
    let found = scheduler.lookup("first", 0, &keys).unwrap();
    // Somebody else holds the same chunks.
    assert_eq!(scheduler.lookup("other", 0, &keys).unwrap().chunks, 8);
    damage(&engine, &found.ranks[0][5]);
    let one_failed = Loaded { loaded: 7, failed: 1, wrong: 0 };
    assert_eq!(worker.load("first", &found.ranks[0], 0), one_failed);
    engine.stat_becomes("chunks_invalidated", 1);
    // Nobody is sent there any more; and what is computed again is stored again.
    assert_eq!(scheduler.lookup("second", 0, &keys).unwrap().chunks, 5);
    let replaced = Stored { stored: 1, skipped: 7, dropped: 0 };
    assert_eq!(worker.store("r", round(2), None, &keys, 0), replaced);
    let again = scheduler.lookup("third", 0, &keys).unwrap();
    assert_eq!(again.chunks, 8);
    assert_eq!(worker.load("third", &again.ranks[0], 0), all_loaded(8));
    // A lease is a lease: what it holds stays where it is until the last one ends.
    assert_eq!((engine.stat("chunks_hidden"), engine.stat("slots_committed")), (1, 9));
    assert_eq!(worker.load("first", &found.ranks[0], 0), one_failed, "the same bytes still");
    scheduler.api().end_session("first");
    assert_eq!((engine.stat("chunks_hidden"), engine.stat("slots_committed")), (1, 9));
    scheduler.api().end_session("other");
    engine.stat_becomes("slots_committed", 8);
    assert_eq!((engine.stat("chunks_hidden"), engine.stat("chunks_invalidated")), (0, 1));
    drop((worker, scheduler));
    engine.settles(0);
}

#[test]
fn what_is_damaged_and_still_leased_is_not_shown_by_the_next_engine() {
    let mut engine = EngineProcess::start("damaged-restart", 16);
    let (mut worker, mut scheduler) = (worker(&engine), scheduler(&engine));
    let keys = chain(1, 8);
    assert_eq!(worker.store("r", round(1), None, &keys, 0), all_stored(8));
    let found = scheduler.lookup("holds", 0, &keys).unwrap();
    damage(&engine, &found.ranks[0][5]);
    assert_eq!(worker.load("holds", &found.ranks[0], 0).failed, 1);
    engine.stat_becomes("chunks_hidden", 1);
    engine.kill();
    engine.restart();
    scheduler.client().wait_ready(LIMIT).unwrap();
    worker.wait_ready(LIMIT).unwrap();
    assert_eq!(engine.stat("chunks_recovered"), 7);
    assert_eq!(scheduler.lookup("after", 0, &keys).unwrap().chunks, 5);
    // Its slot has been freed, so the lease that led there leads to nothing.
    assert_eq!(worker.load("holds", &found.ranks[0], 0), Loaded { loaded: 7, failed: 1, wrong: 0 });
    assert_eq!(engine.stat("chunks_invalidated"), 0, "a slot that is free is not damaged");
    assert_eq!(worker.store("r", round(2), None, &keys, 0), Stored { stored: 1, skipped: 7, dropped: 0 });
    let again = scheduler.lookup("at last", 0, &keys).unwrap();
    assert_eq!(worker.load("at last", &again.ranks[0], 0), all_loaded(8));
    drop((worker, scheduler));
    engine.settles(0);
}
