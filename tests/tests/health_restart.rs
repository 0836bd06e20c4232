//! A restarted engine is another arena on other inodes: clients find it by themselves, and let go of the old one.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_adapter::Round;
use kvring_tests::engine::{EngineProcess, overrides, unique_name};
use kvring_tests::isolate::{Footprint, isolated, segments};
use kvring_tests::kv::chain;
use kvring_tests::peer::Peer;
use kvring_tests::proto::{Loaded, SchedulerSpec, WorkerSpec, all_loaded, all_stored};
use kvring_tests::scheduler::SchedulerSide;
use kvring_tests::wait::{LIMIT, becomes, eventually};
use kvring_tests::worker::WorkerSide;
use std::os::unix::fs::MetadataExt;

fn round(number: u32) -> Round {
    Round { source: 1, number }
}

fn inode(engine: &EngineProcess, segment: &str) -> u64 {
    std::fs::metadata(engine.file(segment)).unwrap().ino()
}

#[test]
fn clients_attach_and_register_again_by_themselves_and_let_go_of_the_old_arena() {
    isolated("clients_attach_and_register_again_by_themselves_and_let_go_of_the_old_arena", || {
        let mut engine = EngineProcess::start("restart", 16);
        let mut worker = WorkerSide::start(&WorkerSpec::new(&engine.name)).unwrap();
        let mut scheduler = SchedulerSide::start(&SchedulerSpec::new(&engine.name));
        scheduler.client().wait_ready(LIMIT).unwrap();
        let keys = chain(1, 16);
        let mut first = None;
        for cycle in 0..6u32 {
            let version = u64::from(cycle);
            let (request, found) = (format!("r{cycle}"), scheduler.lookup("probe", cycle, &keys).unwrap());
            assert_eq!(found.chunks, 0, "a cold start has nothing");
            assert_eq!(worker.store(&request, round(cycle), None, &keys, version), all_stored(16));
            let found = scheduler.lookup(&request, 0, &keys).unwrap();
            assert_eq!(found.chunks, 16);
            assert_eq!(worker.load(&request, &found.ranks[0], version), all_loaded(16));
            // One worker, one scheduler, one view of each segment; nothing of earlier engines.
            let now = Footprint::now(&engine.name);
            let expected = first.get_or_insert_with(|| now.clone()).clone();
            becomes("what this process holds", counts(&expected), || counts(&Footprint::now(&engine.name)));
            let old = [inode(&engine, "engine"), inode(&engine, "lobby"), inode(&engine, "arena")];

            if cycle.is_multiple_of(2) {
                engine.kill();
            } else {
                assert_eq!(engine.terminate(), Some(0));
            }
            // Nobody keeps a dead engine's arena in memory.
            becomes("arenas mapped", 0, || Footprint::now(&engine.name).mapped(".arena"));
            eventually("the worker knows", || !worker.client().is_healthy());
            let refused = Loaded { failed: 16, ..Loaded::default() };
            assert_eq!(worker.load(&request, &found.ranks[0], version), refused);
            engine.restart();
            engine.is_allocated();
            worker.wait_ready(LIMIT).unwrap();
            scheduler.client().wait_ready(LIMIT).unwrap();
            if cycle.is_multiple_of(2) {
                // What was killed left its files: the successor has others.
                let new = [inode(&engine, "engine"), inode(&engine, "lobby"), inode(&engine, "arena")];
                assert!(old.iter().zip(new).all(|(old, new)| *old != new), "{old:?} {new:?}");
            }
            // Handles of the last life are refused, whatever their slots hold now.
            assert_eq!(worker.load(&request, &found.ranks[0], version), refused);
            assert_eq!(engine.stat("registrations"), 1);
            scheduler.api().end_session(&request);
        }
        drop((worker, scheduler));
        engine.settles(0);
    });
}

/// How many of what, but not which: names of channels differ each time.
fn counts(footprint: &Footprint) -> (usize, [usize; 4], usize) {
    let mapped = [".engine", ".lobby", ".arena", ".client."].map(|part| footprint.mapped(part));
    (footprint.threads.len(), mapped, footprint.descriptors)
}

#[test]
fn an_engine_that_comes_late_is_found() {
    let name = unique_name("late");
    let mut worker = Peer::spawn();
    worker
        .add_worker(&WorkerSpec {
            client: kvring_tests::proto::ClientSpec { register_ms: 50, ..WorkerSpec::new(&name).client },
            ..WorkerSpec::new(&name)
        })
        .unwrap();
    let mut scheduler = Peer::spawn();
    scheduler.add_scheduler(&SchedulerSpec::new(&name));
    assert_eq!(scheduler.lookup("early", 0, &chain(1, 4)).chunks, 0);
    let engine = EngineProcess::try_start(&overrides(&name, 16)).unwrap();
    engine.is_allocated();
    worker.ready();
    scheduler.ready();
    assert_eq!(worker.store(round(1), &chain(1, 4), 0), all_stored(4));
    let found = scheduler.lookup("late", 0, &chain(1, 4));
    assert_eq!(worker.load(&found.ranks[0], 0), all_loaded(4));
    drop((worker, scheduler));
    engine.settles(0);
}

/// Another geometry under the same name: a cold start, and the clients' arena is the new one.
#[test]
fn an_engine_with_another_arena_takes_the_name_over() {
    let mut small = EngineProcess::start("grow", 8);
    let mut worker = WorkerSide::start(&WorkerSpec::new(&small.name)).unwrap();
    let mut scheduler = SchedulerSide::start(&SchedulerSpec::new(&small.name));
    scheduler.client().wait_ready(LIMIT).unwrap();
    let keys = chain(1, 32);
    assert_eq!(worker.store("r", round(1), None, &keys, 1), all_stored(32));
    let old = scheduler.lookup("r", 0, &keys).unwrap();
    small.kill();
    small.keep_segments();
    let large = EngineProcess::try_start(&overrides(&small.name, 64)).unwrap();
    large.is_allocated();
    worker.wait_ready(LIMIT).unwrap();
    scheduler.client().wait_ready(LIMIT).unwrap();
    assert_eq!(worker.load("r", &old.ranks[0], 1), Loaded { failed: 32, ..Loaded::default() });
    for number in 2..10 {
        let keys = chain(u64::from(number), 64);
        assert_eq!(worker.store("r", round(number), None, &keys, 2), all_stored(64));
    }
    let found = scheduler.lookup("r", 1, &chain(9, 64)).unwrap();
    assert!(found.ranks[0].iter().any(|handle| handle.offset > 8 << 20), "beyond the old arena's end");
    assert_eq!(worker.load("r", &found.ranks[0], 2), all_loaded(64));
    drop((worker, scheduler));
    large.settles(0);
    drop(large);
    assert!(segments(&small.name).is_empty());
}
