//! A restarted engine takes over what its predecessor left, and its clients come back by themselves, with all that they hold.
//! After a removal or a cold start the arena is another one on other inodes, and clients let go of the old one.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_adapter::{AttachError, Health, Role};
use kvring_shm_abi::engine_segment::{LIFE_WORDS_AT, OWNER_WORD};
use kvring_shm_abi::life::LIFE_WORD_STRIDE;
use kvring_shm_abi::segment::EngineName;
use kvring_tests::isolate::Footprint;
use kvring_tests::{
    ClientSpec, EngineProcess, LIMIT, Peer, RawClient, SchedulerSide, SchedulerSpec, Shape, WorkerSide,
    WorkerSpec, all_dropped, all_failed, all_loaded, all_stored, becomes, chain, client, eventually,
    isolated, overrides, round, segments, unique_name,
};
use serde_json::json;
use std::os::unix::fs::{FileExt, MetadataExt};

fn inode(engine: &EngineProcess, segment: &str) -> u64 {
    std::fs::metadata(engine.file(segment)).unwrap().ino()
}

#[test]
fn a_killed_engine_comes_back_with_everything_and_its_clients_with_what_they_hold() {
    isolated("a_killed_engine_comes_back_with_everything_and_its_clients_with_what_they_hold", || {
        let (mut engine, mut worker, mut scheduler) = EngineProcess::with_clients("warm");
        let keys = worker.stores(round(0), chain(1, 16), 7);
        let held = scheduler.lookup("held", 0, &keys);
        assert_eq!(worker.load(&held.handles, 7), all_loaded(16));
        let files = [inode(&engine, "engine"), inode(&engine, "lobby"), inode(&engine, "arena")];
        let before = Footprint::now(&engine.name);
        for cycle in 1..=6u32 {
            engine.kill();
            eventually("the worker knows", || !worker.client().is_healthy());
            // Loads of what has been looked up need no engine.
            assert_eq!(worker.load(&held.handles, 7), all_loaded(16));
            engine.restart();
            worker.ready();
            scheduler.ready();
            let now = [inode(&engine, "engine"), inode(&engine, "lobby"), inode(&engine, "arena")];
            assert_eq!(now, files, "the same inodes");
            assert_eq!(engine.stat("warm_start"), 1);
            assert_eq!(engine.stat("chunks_recovered"), 16 + u64::from(cycle - 1));
            // Each client has come back exactly once, and the engine waits for no other.
            assert_eq!(engine.stat("attaches"), 2);
            assert_eq!(engine.stat("reattachments"), 2);
            assert_eq!(engine.stat("registrations"), 1);
            engine.stat_becomes("clients_awaited", 0);
            // This engine knows the lease.
            assert_eq!((engine.stat("leases"), engine.stat("pins")), (1, 16));
            assert_eq!(scheduler.api().reset_cache().unwrap(), u64::from(cycle - 1), "what is pinned stays");
            assert_eq!(worker.load(&held.handles, 7), all_loaded(16));
            // And everything goes on.
            let request = format!("r{cycle}");
            let more = chain(u64::from(cycle) + 10, 1 + (cycle as usize - 1));
            assert_eq!(worker.store(round(cycle), &more, 3), all_stored(more.len()));
            let found = scheduler.lookup(&request, 0, &more);
            assert_eq!(worker.load(&found.handles, 3), all_loaded(more.len()));
            scheduler.api().end_session(&request);
            let extra = chain(u64::from(cycle) + 100, cycle as usize);
            assert_eq!(scheduler.api().reset_cache().unwrap(), more.len() as u64);
            assert_eq!(worker.store(round(cycle + 100), &extra, 3), all_stored(extra.len()));
            becomes("what this process holds", counts(&before), || counts(&Footprint::now(&engine.name)));
        }
        let stats = scheduler.client().stats();
        assert_eq!((stats.reattachments, stats.leases_declared, stats.leases_cut), (6, 6, 0));
        assert_eq!(stats.attachments, 7);
        scheduler.api().end_session("held");
        engine.stat_becomes("leases", 0);
        engine.settles_without((worker, scheduler));
    });
}

/// The next engine does not take up leases that end while there is no engine, or while the keeper declares.
#[test]
fn leases_that_end_while_the_engine_is_away_are_not_taken_up_again() {
    let (mut engine, mut worker, mut scheduler) = EngineProcess::with_clients("ends");
    let keys = worker.stores(round(0), chain(1, 12), 7);
    for request in ["ended", "released", "cut", "kept", "late"] {
        assert_eq!(scheduler.lookup(request, 0, &keys).chunks, 12);
    }
    engine.stat_becomes("pins", 60);
    engine.kill();
    scheduler.api().end_session("ended");
    scheduler.api().free_lookup_locks("released", 0, 0);
    scheduler.api().free_lookup_locks("cut", 0, 3);
    engine.restart();
    scheduler.ready();
    assert_eq!((engine.stat("leases"), engine.stat("pins")), (3, 3 + 12 + 12));
    scheduler.api().end_session("late");
    engine.stat_becomes("pins", 15);
    scheduler.ends(&["cut", "kept", "released"]);
    engine.stat_becomes("leases", 0);
    engine.settles_without((worker, scheduler));
}

/// A request that waits for room keeps its answer through stops, deaths and restarts of the engine.
#[test]
fn an_answer_outlives_the_engine() {
    let (mut engine, mut worker, mut scheduler) = EngineProcess::with_clients("again");
    let keys = worker.stores(round(0), chain(1, 12), 7);
    let found = scheduler.finds("waits", 0, &keys);
    let is_there = |scheduler: &mut SchedulerSide, when: &str| {
        assert!(scheduler.api().is_current("waits"), "{when}");
        assert_eq!(scheduler.finds("waits", 0, &keys), found, "{when}");
    };
    engine.stop();
    is_there(&mut scheduler, "stopped");
    engine.resume();
    engine.kill();
    is_there(&mut scheduler, "dead");
    engine.restart();
    scheduler.ready();
    is_there(&mut scheduler, "restarted");
    assert_eq!(scheduler.tally().answered, 1, "the tables were read once");
    engine.stat_becomes("pins", 12);
    assert_eq!(worker.load(&found.handles, 7), all_loaded(12));
    // In another arena nothing of it is left, and the same admission looks again.
    engine.kill();
    engine.reconfigure(&json!({ "cold": true }));
    engine.restart();
    eventually("the scheduler knows", || !scheduler.api().is_current("waits"));
    assert_eq!(scheduler.lookup("waits", 0, &keys).chunks, 0);
    assert!(scheduler.api().is_current("waits"), "nothing that was not found can be lost");
    scheduler.ends(&["waits"]);
    engine.stat_becomes("leases", 0);
    engine.settles_without((worker, scheduler));
}

/// A copy outlives one or several engines, and the next one commits it.
#[test]
fn a_store_whose_copy_outlives_the_engine_is_committed_by_the_next() {
    let mut engine = EngineProcess::start("outlives", 16);
    let (mut worker, backend) = engine.held_worker();
    let mut scheduler = engine.scheduler();
    let keys = chain(1, 8);
    for (number, restarts) in [(1u32, 1), (2, 2), (3, 5)] {
        let keys = chain(u64::from(number), 8);
        let job = backend.hold_a_store(&mut worker, round(number), &keys, 9);
        for _ in 0..restarts {
            engine.kill_and_restart();
            worker.ready();
            assert_eq!(engine.stat("slots_quarantined"), 8);
            assert_eq!((engine.stat("slots_declared"), engine.stat("slots_undeclared")), (8, 0));
            assert_eq!(engine.stat("slots_writing"), 8, "still being written");
        }
        backend.let_go();
        assert_eq!(worker.finished_store(job), all_stored(8));
        scheduler.ready();
        let found = scheduler.finds("r", number, &keys);
        assert_eq!(worker.load(&found.handles, 9), all_loaded(8));
    }
    // The copy ends while there is no engine.
    let keys_late = chain(9, 8);
    let job = backend.hold_a_store(&mut worker, round(9), &keys_late, 9);
    engine.kill();
    backend.let_go();
    eventually("the worker knows", || !worker.client().is_healthy());
    engine.restart();
    assert_eq!(worker.finished_store(job), all_stored(8));
    assert_eq!(worker.client().stats().late_commits, 8);
    scheduler.ready();
    let found = scheduler.lookup("late", 0, &keys_late);
    assert_eq!(worker.load(&found.handles, 9), all_loaded(8));
    assert_eq!(scheduler.lookup("first", 0, &keys).chunks, 8);
    engine.settles_without((worker, scheduler));
}

/// A copy outlives its engine, whose successor has another arena: the store is dropped, and no harm is done.
#[test]
fn a_store_whose_arena_is_gone_is_dropped() {
    let mut engine = EngineProcess::start("gone", 16);
    let (mut worker, backend) = engine.held_worker();
    let job = backend.hold_a_store(&mut worker, round(1), &chain(1, 8), 9);
    engine.kill();
    engine.restart_with_arena(32);
    // The keeper waits for the copy before it gives its slots up.
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert!(!worker.client().is_healthy());
    backend.let_go();
    assert_eq!(worker.finished_store(job), all_dropped(8));
    worker.ready();
    assert_eq!(worker.store(round(2), &chain(1, 8), 9), all_stored(8));
    engine.settles_without(worker);
}

/// A load that runs while its engine is killed and restarted is validated, and succeeds.
#[test]
fn a_load_that_outlives_the_engine_is_validated_and_succeeds() {
    let mut engine = EngineProcess::start("load", 16);
    let (mut worker, backend) = engine.held_worker();
    let mut scheduler = engine.scheduler();
    let keys = worker.stores(round(1), chain(1, 8), 9);
    let found = scheduler.lookup("r", 0, &keys);
    backend.hold();
    let loaded = std::thread::scope(|scope| {
        let loader = scope.spawn(|| worker.load(&found.handles, 9));
        backend.holds(1);
        engine.kill_and_restart();
        scheduler.ready();
        backend.let_go();
        loader.join().unwrap()
    });
    assert_eq!(loaded, all_loaded(8));
    engine.settles_without((worker, scheduler));
}

/// The engine dies between two ranks' stores of one round: the shards that the first has committed wait for the second's.
#[test]
fn a_round_that_one_rank_has_committed_is_completed_under_the_next_engine() {
    let mut engine = EngineProcess::start("halves", 16);
    let mut ranks = [0, 1].map(|rank| WorkerSide::start(&WorkerSpec::rank(&engine.name, 2, rank)).unwrap());
    let mut scheduler = SchedulerSide::start(&SchedulerSpec::new(&engine.name));
    let keys = chain(1, 8);
    assert_eq!(ranks[0].store(round(1), &keys, 5), all_stored(8));
    for _ in 0..2 {
        engine.kill_and_restart();
        ranks.iter().for_each(|worker| worker.ready());
        assert_eq!((engine.stat("chunks_recovered"), engine.stat("chunks_kept")), (0, 8));
    }
    scheduler.ready();
    assert_eq!(scheduler.lookup("early", 0, &keys).chunks, 0, "half of it is nothing");
    assert_eq!(ranks[1].store(round(1), &keys, 5), all_stored(8));
    let found = scheduler.finds("r", 0, &keys);
    for worker in &mut ranks {
        assert_eq!(worker.load(&found.handles, 5), all_loaded(8));
    }
    // Another round of the same source replaces a half that no rank completes.
    let keys = chain(2, 4);
    assert_eq!(ranks[0].store(round(2), &keys, 5), all_stored(4));
    engine.kill_and_restart();
    ranks.iter().for_each(|worker| worker.ready());
    for worker in &mut ranks {
        assert_eq!(worker.store(round(3), &keys, 6), all_stored(4));
    }
    scheduler.ready();
    let found = scheduler.lookup("again", 0, &keys);
    assert_eq!(ranks[0].load(&found.handles, 6), all_loaded(4));
    engine.settles_without((ranks, scheduler));
}

#[test]
fn a_kept_engine_hands_over_what_it_held_when_it_is_asked_to_stop() {
    let mut engine = EngineProcess::configured("keep", 16, &json!({ "keep": true }));
    let mut worker = engine.worker();
    let keys = worker.stores(round(1), chain(1, 8), 1);
    assert_eq!(engine.terminate(), Some(0));
    assert_eq!(segments(&engine.name).len(), 3);
    // Clients can tell this end from a death.
    let end = |engine: &EngineProcess| engine.view().end(&EngineName::new(&engine.name).unwrap());
    assert!(matches!(end(&engine), Some(AttachError::Stopped(_))));
    engine.restart();
    worker.ready();
    assert!(end(&engine).is_none());
    assert_eq!(engine.stat("chunks_recovered"), 8);
    // With `cold` it starts anew.
    engine.kill();
    assert!(matches!(end(&engine), Some(AttachError::Dead(_))));
    engine.reconfigure(&json!({ "cold": true }));
    engine.restart();
    worker.ready();
    assert_eq!((engine.stat("warm_start"), engine.stat("chunks_visible")), (0, 0));
    assert_eq!(worker.store(round(2), &keys, 1), all_stored(8));
    engine.settles_without(worker);
}

/// While a client has not come back nothing is evicted, but only for the grace. The slots that it writes stay its own.
#[test]
fn a_client_that_does_not_come_back_holds_the_others_up_for_the_grace_alone() {
    let mut engine =
        EngineProcess::configured("grace", 4, &json!({ "reattach_grace_ms": 700, "client_share": 1.0 }));
    let mut worker = engine.worker();
    // 16 shards of 64 KiB fit a slab, 64 the arena.
    assert_eq!(worker.store(round(1), &chain(1, 60), 1), all_stored(60));
    let mut raw = RawClient::attach(&engine.name, Role::Worker);
    let namespace = raw.register(1, 1, 0, Shape::SMALL.shard_bytes());
    assert_eq!(raw.reserve(namespace, 0, round(7), &chain(7, 4)).len(), 4);
    engine.kill();
    let began = std::time::Instant::now();
    engine.restart();
    worker.ready();
    let stored = worker.store(round(2), &chain(2, 4), 1);
    // The grace began after `began`. A machine that is slower than the grace skips this part.
    if began.elapsed().as_millis() < 700 {
        assert_eq!(stored, all_dropped(4), "nothing is evicted yet");
        assert_eq!(engine.stat("evictions"), 0);
        assert_eq!(engine.stat("clients_awaited"), 1);
    }
    becomes("stores after the grace", 4, || {
        let stored = worker.store(round(3), &chain(2, 4), 1);
        stored.stored + stored.skipped
    });
    assert!(engine.stat("evictions") > 0);
    assert_eq!(engine.stat("slots_writing"), 4, "its own until it declares, or dies");
    raw.give_up();
    engine.stat_becomes("slots_writing", 0);
    engine.settles_without((worker, raw));
}

/// The kernel marks an engine's words one after the other, and the owner word may be marked late. Until then a client, whose own
/// word has told it of the death, tries in vain to attach again. Its view of the engine does not change.
#[test]
fn an_engine_whose_words_are_not_all_marked_yet_is_dead() {
    let mut engine = EngineProcess::start("marked", 16);
    let client = client(Role::Scheduler, &ClientSpec::new(&engine.name));
    client.wait_ready(LIMIT).unwrap();
    let lobby = engine.lobby();
    let entry = &lobby.entries[0];
    // With the id of another thread in it the kernel does not mark it.
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

/// After a clean end the arena and all that was in it are gone: clients let go of it, and find the next one.
#[test]
fn clients_attach_and_register_again_by_themselves_and_let_go_of_the_old_arena() {
    isolated("clients_attach_and_register_again_by_themselves_and_let_go_of_the_old_arena", || {
        let (mut engine, mut worker, mut scheduler) = EngineProcess::with_clients("restart");
        let keys = chain(1, 16);
        let mut first = None;
        for cycle in 0..6u32 {
            let version = u64::from(cycle);
            let (request, found) = (format!("r{cycle}"), scheduler.lookup("probe", cycle, &keys));
            assert_eq!(found.chunks, 0, "a cold start has nothing");
            assert_eq!(worker.store(round(cycle), &keys, version), all_stored(16));
            let found = scheduler.finds(&request, 0, &keys);
            assert_eq!(worker.load(&found.handles, version), all_loaded(16));
            // The process holds nothing of earlier engines.
            let now = Footprint::now(&engine.name);
            let expected = first.get_or_insert_with(|| now.clone()).clone();
            becomes("what this process holds", counts(&expected), || counts(&Footprint::now(&engine.name)));

            if cycle.is_multiple_of(2) {
                engine.kill();
                // A dead engine may have a successor, so its arena stays mapped; one that is removed has none.
                eventually("the worker knows", || !worker.client().is_healthy());
                assert_eq!(Footprint::now(&engine.name).mapped(".arena"), 1);
                let name = EngineName::new(&engine.name).unwrap();
                kvring_engine::segments::remove(&name, false, LIMIT).unwrap();
            } else {
                assert_eq!(engine.terminate(), Some(0));
            }
            becomes("arenas mapped", 0, || Footprint::now(&engine.name).mapped(".arena"));
            let refused = all_failed(16);
            assert_eq!(worker.load(&found.handles, version), refused);
            engine.restart();
            engine.is_allocated();
            worker.ready();
            scheduler.ready();
            // Handles of the last arena are refused, whatever their slots hold now.
            assert_eq!(worker.load(&found.handles, version), refused);
            assert_eq!(engine.stat("registrations"), 1);
            scheduler.api().end_session(&request);
        }
        engine.settles_without((worker, scheduler));
    });
}

/// The numbers alone: the names of channels differ each time.
fn counts(footprint: &Footprint) -> (usize, [usize; 4], usize) {
    let mapped = [".engine", ".lobby", ".arena", ".client."].map(|part| footprint.mapped(part));
    (footprint.threads.len(), mapped, footprint.descriptors)
}

#[test]
fn an_engine_that_comes_late_is_found() {
    let name = unique_name("late");
    let mut worker = Peer::spawn();
    let client = ClientSpec { register_ms: 50, ..ClientSpec::new(&name) };
    worker.add_worker(&WorkerSpec { client, ..WorkerSpec::new(&name) }).unwrap();
    let mut scheduler = Peer::spawn();
    scheduler.add_scheduler(&SchedulerSpec::new(&name));
    assert_eq!(scheduler.lookup("early", 0, &chain(1, 4)).chunks, 0);
    let engine = EngineProcess::try_start(&overrides(&name, 16)).unwrap();
    engine.is_allocated();
    worker.ready();
    scheduler.ready();
    assert_eq!(worker.store(round(1), &chain(1, 4), 0), all_stored(4));
    let found = scheduler.lookup("late", 0, &chain(1, 4));
    assert_eq!(worker.load(&found.handles, 0), all_loaded(4));
    engine.settles_without((worker, scheduler));
}

/// Another geometry under the same name: a cold start, and the clients' arena is the new one.
#[test]
fn an_engine_with_another_arena_takes_the_name_over() {
    let mut small = EngineProcess::start("grow", 8);
    let mut worker = WorkerSide::start(&WorkerSpec::new(&small.name)).unwrap();
    let mut scheduler = SchedulerSide::start(&SchedulerSpec::new(&small.name));
    scheduler.ready();
    let keys = worker.stores(round(1), chain(1, 32), 1);
    let old = scheduler.lookup("r", 0, &keys);
    small.kill();
    small.keep_segments();
    let large = EngineProcess::try_start(&overrides(&small.name, 64)).unwrap();
    large.is_allocated();
    worker.ready();
    scheduler.ready();
    assert_eq!(worker.load(&old.handles, 1), all_failed(32));
    for number in 2..10 {
        worker.stores(round(number), chain(u64::from(number), 64), 2);
    }
    let found = scheduler.lookup("r", 1, &chain(9, 64));
    assert!(
        found.handles.iter().any(|handle| large.shard(handle, 1, 0).identity.offset > 8 << 20),
        "beyond the old arena's end"
    );
    assert_eq!(worker.load(&found.handles, 2), all_loaded(64));
    drop((worker, scheduler));
    large.settles(0);
    drop(large);
    assert!(segments(&small.name).is_empty());
}
