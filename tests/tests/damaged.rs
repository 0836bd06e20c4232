//! A shard whose bytes are not those that were stored: the load that finds out fails and tells the engine, no later lookup
//! finds the chunk, and the next store puts it right.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_gpu_kernels::checksum;
use kvring_shm_abi::slot::CHECKSUM_EXAMPLE;
use kvring_tests::{EngineProcess, Handle, Loaded, Stored, WorkerSide, WorkerSpec, all_loaded, chain, round};
use std::os::unix::fs::FileExt;

fn worker(engine: &EngineProcess) -> WorkerSide {
    WorkerSide::start(&WorkerSpec { checksum: true, ..WorkerSpec::new(&engine.name) }).unwrap()
}

/// Flips a byte of a chunk in the arena's file.
fn damage(engine: &EngineProcess, chunk: &Handle) {
    let at = engine.shard(chunk, 1, 0).identity.offset + 100;
    let arena = std::fs::OpenOptions::new().read(true).write(true).open(engine.file("arena")).unwrap();
    let mut byte = [0];
    arena.read_exact_at(&mut byte, at).unwrap();
    arena.write_all_at(&[!byte[0]], at).unwrap();
}

/// Another way to compute checksums is another layout: to a version that computes them in another way, all that this one has
/// stored would be damaged.
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
    let (mut worker, mut scheduler) = (worker(&engine), engine.scheduler());
    let keys = worker.stores(round(1), chain(1, 8), 0);
    let found = scheduler.lookup("first", 0, &keys);
    // Another session has leased the same chunks.
    assert_eq!(scheduler.lookup("other", 0, &keys).chunks, 8);
    // The engine has heard of both.
    scheduler.client().noop().unwrap();
    damage(&engine, &found.handles[5]);
    let one_failed = Loaded { loaded: 7, failed: 1, wrong: 0 };
    assert_eq!(worker.load(&found.handles, 0), one_failed);
    engine.stat_becomes("chunks_invalidated", 1);
    // No lookup finds the chunk any more, and a store of it is written.
    assert_eq!(scheduler.lookup("second", 0, &keys).chunks, 5);
    let replaced = Stored { stored: 1, skipped: 7, dropped: 0 };
    assert_eq!(worker.store(round(2), &keys, 0), replaced);
    let again = scheduler.finds("third", 0, &keys);
    assert_eq!(worker.load(&again.handles, 0), all_loaded(8));
    // What is leased stays where it is until the last lease ends.
    assert_eq!((engine.stat("chunks_hidden"), engine.stat("slots_committed")), (1, 9));
    assert_eq!(worker.load(&found.handles, 0), one_failed, "the same bytes still");
    scheduler.api().end_session("first");
    assert_eq!((engine.stat("chunks_hidden"), engine.stat("slots_committed")), (1, 9));
    scheduler.api().end_session("other");
    engine.stat_becomes("slots_committed", 8);
    assert_eq!((engine.stat("chunks_hidden"), engine.stat("chunks_invalidated")), (0, 1));
    engine.settles_without((worker, scheduler));
}

#[test]
fn what_is_damaged_and_still_leased_is_not_shown_by_the_next_engine() {
    let mut engine = EngineProcess::start("damaged-restart", 16);
    let (mut worker, mut scheduler) = (worker(&engine), engine.scheduler());
    let keys = worker.stores(round(1), chain(1, 8), 0);
    let found = scheduler.lookup("holds", 0, &keys);
    scheduler.client().noop().unwrap();
    damage(&engine, &found.handles[5]);
    assert_eq!(worker.load(&found.handles, 0).failed, 1);
    engine.stat_becomes("chunks_hidden", 1);
    engine.kill_and_restart();
    scheduler.ready();
    worker.ready();
    assert_eq!(engine.stat("chunks_recovered"), 7);
    assert_eq!(scheduler.lookup("after", 0, &keys).chunks, 5);
    // Its slot has been freed, so a load by the old lease fails.
    assert_eq!(worker.load(&found.handles, 0), Loaded { loaded: 7, failed: 1, wrong: 0 });
    assert_eq!(engine.stat("chunks_invalidated"), 0, "a slot that is free is not damaged");
    assert_eq!(worker.store(round(2), &keys, 0), Stored { stored: 1, skipped: 7, dropped: 0 });
    let again = scheduler.lookup("at last", 0, &keys);
    assert_eq!(worker.load(&again.handles, 0), all_loaded(8));
    engine.settles_without((worker, scheduler));
}
