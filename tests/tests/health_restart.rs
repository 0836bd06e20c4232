//! A restarted engine takes over what its predecessor left, and its clients come back by themselves, with what they hold;
//! one that was removed or starts cold is another arena on other inodes, and they let go of the old one.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_adapter::{AttachError, Health, Role, Round};
use kvring_shm_abi::engine_segment::{LIFE_WORDS_AT, OWNER_WORD};
use kvring_shm_abi::life::LIFE_WORD_STRIDE;
use kvring_shm_abi::segment::EngineName;
use kvring_tests::engine::{EngineProcess, overrides, unique_name};
use kvring_tests::held::HeldBackend;
use kvring_tests::isolate::{Footprint, isolated, segments};
use kvring_tests::kv::{Shape, chain};
use kvring_tests::peer::Peer;
use kvring_tests::proto::{ClientSpec, Loaded, SchedulerSpec, Stored, WorkerSpec, all_loaded, all_stored};
use kvring_tests::raw::RawClient;
use kvring_tests::scheduler::SchedulerSide;
use kvring_tests::wait::{LIMIT, becomes, eventually};
use kvring_tests::worker::{WorkerSide, client};
use serde_json::json;
use std::os::unix::fs::{FileExt, MetadataExt};

fn round(number: u32) -> Round {
    Round { source: 1, number }
}

fn inode(engine: &EngineProcess, segment: &str) -> u64 {
    std::fs::metadata(engine.file(segment)).unwrap().ino()
}

#[test]
fn a_killed_engine_comes_back_with_everything_and_its_clients_with_what_they_hold() {
    isolated("a_killed_engine_comes_back_with_everything_and_its_clients_with_what_they_hold", || {
        let mut engine = EngineProcess::start("warm", 16);
        let mut worker = WorkerSide::start(&WorkerSpec::new(&engine.name)).unwrap();
        let mut scheduler = SchedulerSide::start(&SchedulerSpec::new(&engine.name));
        scheduler.client().wait_ready(LIMIT).unwrap();
        let keys = chain(1, 16);
        assert_eq!(worker.store("r", round(0), None, &keys, 7), all_stored(16));
        let held = scheduler.lookup("held", 0, &keys).unwrap();
        assert_eq!(worker.load("held", &held.ranks[0], 7), all_loaded(16));
        let files = [inode(&engine, "engine"), inode(&engine, "lobby"), inode(&engine, "arena")];
        let before = Footprint::now(&engine.name);
        for cycle in 1..=6u32 {
            engine.kill();
            eventually("the worker knows", || !worker.client().is_healthy());
            // What was looked up is loaded whether there is an engine or not.
            assert_eq!(worker.load("held", &held.ranks[0], 7), all_loaded(16));
            engine.restart();
            worker.wait_ready(LIMIT).unwrap();
            scheduler.client().wait_ready(LIMIT).unwrap();
            let now = [inode(&engine, "engine"), inode(&engine, "lobby"), inode(&engine, "arena")];
            assert_eq!(now, files, "the same inodes");
            assert_eq!(engine.stat("warm_start"), 1);
            assert_eq!(engine.stat("chunks_recovered"), 16 + u64::from(cycle - 1));
            // Exactly once each, and nobody is waited for any more.
            assert_eq!(engine.stat("attaches"), 2);
            assert_eq!(engine.stat("reattachments"), 2);
            assert_eq!(engine.stat("registrations"), 1);
            engine.stat_becomes("clients_awaited", 0);
            // The lease is held again, by this engine.
            assert_eq!((engine.stat("leases"), engine.stat("pins")), (1, 16));
            assert_eq!(scheduler.api().reset_cache().unwrap(), u64::from(cycle - 1), "what is pinned stays");
            assert_eq!(worker.load("held", &held.ranks[0], 7), all_loaded(16));
            // And everything goes on.
            let request = format!("r{cycle}");
            let more = chain(u64::from(cycle) + 10, 1 + (cycle as usize - 1));
            assert_eq!(worker.store(&request, round(cycle), None, &more, 3), all_stored(more.len()));
            let found = scheduler.lookup(&request, 0, &more).unwrap();
            assert_eq!(worker.load(&request, &found.ranks[0], 3), all_loaded(more.len()));
            scheduler.api().end_session(&request);
            let extra = chain(u64::from(cycle) + 100, cycle as usize);
            assert_eq!(scheduler.api().reset_cache().unwrap(), more.len() as u64);
            assert_eq!(worker.store(&request, round(cycle + 100), None, &extra, 3), all_stored(extra.len()));
            becomes("what this process holds", counts(&before), || counts(&Footprint::now(&engine.name)));
        }
        let stats = scheduler.client().stats();
        assert_eq!((stats.reattachments, stats.leases_declared, stats.leases_cut), (6, 6, 0));
        assert_eq!(stats.attachments, 7);
        scheduler.api().end_session("held");
        engine.stat_becomes("leases", 0);
        drop((worker, scheduler));
        engine.settles(0);
    });
}

/// What is given back while there is no engine is not held by the next one; what is given back while the keeper says what
/// is held, neither.
#[test]
fn leases_that_end_while_the_engine_is_away_are_not_taken_up_again() {
    let mut engine = EngineProcess::start("ends", 16);
    let mut worker = WorkerSide::start(&WorkerSpec::new(&engine.name)).unwrap();
    let mut scheduler = SchedulerSide::start(&SchedulerSpec::new(&engine.name));
    scheduler.client().wait_ready(LIMIT).unwrap();
    let keys = chain(1, 12);
    assert_eq!(worker.store("r", round(0), None, &keys, 7), all_stored(12));
    for request in ["ended", "released", "cut", "kept", "late"] {
        assert_eq!(scheduler.lookup(request, 0, &keys).unwrap().chunks, 12);
    }
    engine.stat_becomes("pins", 60);
    engine.kill();
    scheduler.api().end_session("ended");
    scheduler.api().free_lookup_locks("released", 0, 0);
    scheduler.api().free_lookup_locks("cut", 0, 3);
    engine.restart();
    scheduler.client().wait_ready(LIMIT).unwrap();
    assert_eq!((engine.stat("leases"), engine.stat("pins")), (3, 3 + 12 + 12));
    scheduler.api().end_session("late");
    engine.stat_becomes("pins", 15);
    for request in ["cut", "kept", "released"] {
        scheduler.api().end_session(request);
    }
    engine.stat_becomes("leases", 0);
    drop((worker, scheduler));
    engine.settles(0);
}

/// A request that waits for room keeps its answer, but not over the death of the engine that gave it.
#[test]
fn an_answer_of_an_engine_that_is_gone_is_asked_for_again() {
    let mut engine = EngineProcess::start("again", 16);
    let mut worker = WorkerSide::start(&WorkerSpec::new(&engine.name)).unwrap();
    let mut scheduler = SchedulerSide::start(&SchedulerSpec::new(&engine.name));
    scheduler.client().wait_ready(LIMIT).unwrap();
    let keys = chain(1, 12);
    assert_eq!(worker.store("r", round(0), None, &keys, 7), all_stored(12));
    for request in ["dead", "warm"] {
        assert_eq!(scheduler.lookup(request, 0, &keys).unwrap().chunks, 12);
        assert!(scheduler.api().is_current(request));
    }
    engine.stop();
    assert!(scheduler.api().is_current("warm"), "what an engine has pinned that only hangs can be loaded");
    engine.resume();
    engine.kill();
    assert!(!scheduler.api().is_current("dead") && !scheduler.api().is_current("warm"));
    assert_eq!(scheduler.lookup("dead", 0, &keys).unwrap().chunks, 0);
    assert!(scheduler.api().is_current("dead"), "nothing that was not found can be lost");
    engine.restart();
    scheduler.client().wait_ready(LIMIT).unwrap();
    assert!(!scheduler.api().is_current("warm"));
    assert_eq!(scheduler.lookup("dead", 0, &keys).unwrap().chunks, 0, "an answer is an answer");
    assert_eq!(scheduler.lookup("warm", 0, &keys).unwrap().chunks, 12);
    assert!(scheduler.api().is_current("warm"));
    engine.stat_becomes("pins", 12);
    for request in ["dead", "warm"] {
        scheduler.api().end_session(request);
    }
    engine.stat_becomes("leases", 0);
    drop((worker, scheduler));
    engine.settles(0);
}

/// A copy that outlives its engine: twice over, and then the third one commits it.
#[test]
fn a_store_whose_copy_outlives_the_engine_is_committed_by_the_next() {
    let mut engine = EngineProcess::start("outlives", 16);
    let backend = HeldBackend::new();
    let mut worker = WorkerSide::copying_with(&WorkerSpec::new(&engine.name), backend.clone()).unwrap();
    let mut scheduler = SchedulerSide::start(&SchedulerSpec::new(&engine.name));
    scheduler.client().wait_ready(LIMIT).unwrap();
    worker.wait_ready(LIMIT).unwrap();
    let keys = chain(1, 8);
    for (number, restarts) in [(1u32, 1), (2, 2), (3, 5)] {
        let keys = chain(u64::from(number), 8);
        backend.hold();
        let job = worker.submit_store("r", round(number), None, &keys, 9).unwrap();
        backend.holds(1);
        for _ in 0..restarts {
            engine.kill();
            engine.restart();
            worker.wait_ready(LIMIT).unwrap();
            assert_eq!(engine.stat("slots_quarantined"), 8);
            assert_eq!((engine.stat("slots_declared"), engine.stat("slots_undeclared")), (8, 0));
            assert_eq!(engine.stat("slots_writing"), 8, "still being written");
        }
        backend.let_go();
        assert_eq!(worker.finished_store(job), all_stored(8));
        scheduler.client().wait_ready(LIMIT).unwrap();
        let found = scheduler.lookup("r", number, &keys).unwrap();
        assert_eq!(found.chunks, 8);
        assert_eq!(worker.load("r", &found.ranks[0], 9), all_loaded(8));
    }
    // The copy ends while there is no engine at all.
    let keys_late = chain(9, 8);
    backend.hold();
    let job = worker.submit_store("r", round(9), None, &keys_late, 9).unwrap();
    backend.holds(1);
    engine.kill();
    backend.let_go();
    eventually("the worker knows", || !worker.client().is_healthy());
    engine.restart();
    assert_eq!(worker.finished_store(job), all_stored(8));
    assert_eq!(worker.client().stats().late_commits, 8);
    scheduler.client().wait_ready(LIMIT).unwrap();
    let found = scheduler.lookup("late", 0, &keys_late).unwrap();
    assert_eq!(worker.load("late", &found.ranks[0], 9), all_loaded(8));
    assert_eq!(scheduler.lookup("first", 0, &keys).unwrap().chunks, 8);
    drop((worker, scheduler));
    engine.settles(0);
}

/// A copy that outlives its engine, whose successor is another arena: nothing is stored, and nothing is harmed.
#[test]
fn a_store_whose_arena_is_gone_is_dropped() {
    let mut engine = EngineProcess::start("gone", 16);
    let backend = HeldBackend::new();
    let mut worker = WorkerSide::copying_with(&WorkerSpec::new(&engine.name), backend.clone()).unwrap();
    worker.wait_ready(LIMIT).unwrap();
    backend.hold();
    let job = worker.submit_store("r", round(1), None, &chain(1, 8), 9).unwrap();
    backend.holds(1);
    engine.kill();
    engine.restart_with_arena(32);
    // The keeper waits for the copy before it gives its slots up.
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert!(!worker.client().is_healthy());
    backend.let_go();
    assert_eq!(worker.finished_store(job), Stored { dropped: 8, ..Stored::default() });
    worker.wait_ready(LIMIT).unwrap();
    assert_eq!(worker.store("r", round(2), None, &chain(1, 8), 9), all_stored(8));
    drop(worker);
    engine.settles(0);
}

/// A load that runs while its engine is killed and restarted is validated, and succeeds.
#[test]
fn a_load_that_outlives_the_engine_is_validated_and_succeeds() {
    let mut engine = EngineProcess::start("load", 16);
    let backend = HeldBackend::new();
    let mut worker = WorkerSide::copying_with(&WorkerSpec::new(&engine.name), backend.clone()).unwrap();
    let mut scheduler = SchedulerSide::start(&SchedulerSpec::new(&engine.name));
    scheduler.client().wait_ready(LIMIT).unwrap();
    let keys = chain(1, 8);
    assert_eq!(worker.store("r", round(1), None, &keys, 9), all_stored(8));
    let found = scheduler.lookup("r", 0, &keys).unwrap();
    backend.hold();
    let killer = std::thread::scope(|scope| {
        let loader = scope.spawn(|| worker.load("r", &found.ranks[0], 9));
        backend.holds(1);
        engine.kill();
        engine.restart();
        scheduler.client().wait_ready(LIMIT).unwrap();
        backend.let_go();
        loader.join().unwrap()
    });
    assert_eq!(killer, all_loaded(8));
    drop((worker, scheduler));
    engine.settles(0);
}

/// The engine dies between two ranks' stores of one round: what the first has committed waits for the second.
#[test]
fn a_round_that_one_rank_has_committed_is_completed_under_the_next_engine() {
    let mut engine = EngineProcess::start("halves", 16);
    let mut ranks = [0, 1].map(|rank| WorkerSide::start(&WorkerSpec::rank(&engine.name, 2, rank)).unwrap());
    let mut scheduler = SchedulerSide::start(&SchedulerSpec::world(&engine.name, 2));
    let keys = chain(1, 8);
    assert_eq!(ranks[0].store("r", round(1), None, &keys, 5), all_stored(8));
    for _ in 0..2 {
        engine.kill();
        engine.restart();
        ranks.iter().for_each(|worker| worker.wait_ready(LIMIT).unwrap());
        assert_eq!((engine.stat("chunks_recovered"), engine.stat("chunks_kept")), (0, 8));
    }
    scheduler.client().wait_ready(LIMIT).unwrap();
    assert_eq!(scheduler.lookup("early", 0, &keys).unwrap().chunks, 0, "half of it is nothing");
    assert_eq!(ranks[1].store("r", round(1), None, &keys, 5), all_stored(8));
    let found = scheduler.lookup("r", 0, &keys).unwrap();
    assert_eq!(found.chunks, 8);
    for (worker, handles) in ranks.iter_mut().zip(&found.ranks) {
        assert_eq!(worker.load("r", handles, 5), all_loaded(8));
    }
    // Another round of the same source takes the place of a half that nobody completes.
    let keys = chain(2, 4);
    assert_eq!(ranks[0].store("r", round(2), None, &keys, 5), all_stored(4));
    engine.kill();
    engine.restart();
    ranks.iter().for_each(|worker| worker.wait_ready(LIMIT).unwrap());
    for worker in &mut ranks {
        assert_eq!(worker.store("r", round(3), None, &keys, 6), all_stored(4));
    }
    scheduler.client().wait_ready(LIMIT).unwrap();
    let found = scheduler.lookup("again", 0, &keys).unwrap();
    assert_eq!(ranks[0].load("again", &found.ranks[0], 6), all_loaded(4));
    drop((ranks, scheduler));
    engine.settles(0);
}

#[test]
fn a_kept_engine_hands_over_what_it_held_when_it_is_asked_to_stop() {
    let mut engine = EngineProcess::configured("keep", 16, &json!({ "keep": true }));
    let mut worker = WorkerSide::start(&WorkerSpec::new(&engine.name)).unwrap();
    let keys = chain(1, 8);
    assert_eq!(worker.store("r", round(1), None, &keys, 1), all_stored(8));
    assert_eq!(engine.terminate(), Some(0));
    assert_eq!(segments(&engine.name).len(), 3);
    // Who watches for deaths can tell it from one.
    let end = |engine: &EngineProcess| engine.view().end(&EngineName::new(&engine.name).unwrap());
    assert!(matches!(end(&engine), Some(AttachError::Stopped(_))));
    engine.restart();
    worker.wait_ready(LIMIT).unwrap();
    assert!(end(&engine).is_none());
    assert_eq!(engine.stat("chunks_recovered"), 8);
    // Unless it is asked to start anew.
    engine.kill();
    assert!(matches!(end(&engine), Some(AttachError::Dead(_))));
    engine.reconfigure(&json!({ "cold": true }));
    engine.restart();
    worker.wait_ready(LIMIT).unwrap();
    assert_eq!((engine.stat("warm_start"), engine.stat("chunks_visible")), (0, 0));
    assert_eq!(worker.store("r", round(2), None, &keys, 1), all_stored(8));
    drop(worker);
    engine.settles(0);
}

/// Clients that do not come back: nothing is evicted for a while, and then it is; what they write stays theirs.
#[test]
fn a_client_that_does_not_come_back_holds_the_others_up_for_the_grace_alone() {
    let mut engine =
        EngineProcess::configured("grace", 4, &json!({ "reattach_grace_ms": 700, "client_share": 1.0 }));
    let mut worker = WorkerSide::start(&WorkerSpec::new(&engine.name)).unwrap();
    // 16 shards of 64 KiB fit a slab, 64 the arena.
    assert_eq!(worker.store("r", round(1), None, &chain(1, 60), 1), all_stored(60));
    let mut raw = RawClient::attach(&engine.name, Role::Worker);
    let namespace = raw.register(1, 1, 0, Shape::SMALL.shard_bytes());
    assert_eq!(raw.reserve(namespace, 0, round(7), &chain(7, 4)).len(), 4);
    engine.kill();
    let began = std::time::Instant::now();
    engine.restart();
    worker.wait_ready(LIMIT).unwrap();
    let stored = worker.store("r", round(2), None, &chain(2, 4), 1);
    // The grace began after this. A machine that is too slow for it does not get to see that nothing is evicted.
    if began.elapsed().as_millis() < 700 {
        assert_eq!(stored, Stored { dropped: 4, ..Stored::default() }, "nothing is evicted yet");
        assert_eq!(engine.stat("evictions"), 0);
        assert_eq!(engine.stat("clients_awaited"), 1);
    }
    becomes("stores after the grace", 4, || {
        let stored = worker.store("r", round(3), None, &chain(2, 4), 1);
        stored.stored + stored.skipped
    });
    assert!(engine.stat("evictions") > 0);
    assert_eq!(engine.stat("slots_writing"), 4, "its own until it says so, or dies");
    raw.give_up();
    engine.stat_becomes("slots_writing", 0);
    drop((worker, raw));
    engine.settles(0);
}

/// The kernel marks an engine's words one after the other, and it may be a while before the owner's is: until then a client that has
/// been told of the death by its own word tries in vain to attach again. It has nothing new to say of the engine.
#[test]
fn an_engine_whose_words_are_not_all_marked_yet_is_dead() {
    let mut engine = EngineProcess::start("marked", 16);
    let client = client(Role::Scheduler, &ClientSpec::new(&engine.name));
    client.wait_ready(LIMIT).unwrap();
    let lobby = engine.lobby();
    let entry = &lobby.entries[0];
    // Of another thread: the kernel leaves it as it is.
    let file = std::fs::OpenOptions::new().write(true).open(engine.file("engine")).unwrap();
    let owner_becomes = |word: u32| {
        let at = (LIFE_WORDS_AT + OWNER_WORD * LIFE_WORD_STRIDE) as u64;
        file.write_all_at(&word.to_ne_bytes(), at).unwrap();
    };
    owner_becomes(1);
    engine.kill();
    for attempt in 1..=3 {
        let nonce = entry.read_nonce();
        eventually(&format!("attempt {attempt} to attach"), || entry.read_nonce() != nonce);
    }
    assert_eq!(client.health(), Health::Dead);
    let told = client.stats();
    assert_eq!((told.deaths, told.restarts), (1, 0));
    owner_becomes(libc::FUTEX_OWNER_DIED);
    engine.restart();
    client.wait_ready(LIMIT).unwrap();
}

/// After a clean end the arena is gone, and so is everything: clients let go of it, and find the next one.
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

            if cycle.is_multiple_of(2) {
                engine.kill();
                // Dead, it may still have a successor; removed, it has none.
                eventually("the worker knows", || !worker.client().is_healthy());
                assert_eq!(Footprint::now(&engine.name).mapped(".arena"), 1);
                let name = EngineName::new(&engine.name).unwrap();
                kvring_engine::segments::remove(&name, false, LIMIT).unwrap();
            } else {
                assert_eq!(engine.terminate(), Some(0));
            }
            becomes("arenas mapped", 0, || Footprint::now(&engine.name).mapped(".arena"));
            let refused = Loaded { failed: 16, ..Loaded::default() };
            assert_eq!(worker.load(&request, &found.ranks[0], version), refused);
            engine.restart();
            engine.is_allocated();
            worker.wait_ready(LIMIT).unwrap();
            scheduler.client().wait_ready(LIMIT).unwrap();
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
