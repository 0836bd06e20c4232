//! Lookups read the engine's tables by themselves: whatever the engine is doing, they find what is there, and what they have
//! found can be loaded until it is released.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_adapter::{Key, LookupStats};
use kvring_rig::child::thread_state;
use kvring_shm_abi::failpoint::Place;
use kvring_shm_abi::lobby::Role;
use kvring_shm_abi::lookup::Marked;
use kvring_shm_abi::segment::EngineName;
use kvring_shm_abi::sync::{AtomicBool, AtomicU32, Ordering};
use kvring_tests::isolate::isolated;
use kvring_tests::{
    EngineProcess, FAIL_POINT, Handle, LIMIT, RawClient, SchedulerSide, Shape, WorkerSide, WorkerSpec,
    all_loaded, all_stored, becomes, chain, eventually, overrides, round, soak, unique_name,
};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Lookups of these chunks find all of them, as `held` has them, and they can be loaded.
#[track_caller]
fn finds_the_same(scheduler: &mut SchedulerSide, worker: &mut WorkerSide, request: &str, held: &[Handle]) {
    let keys: Vec<_> = held.iter().map(|handle| handle.key).collect();
    let found = scheduler.finds(request, 0, &keys);
    assert_eq!(found.handles, held, "{request}");
    assert_eq!(worker.load(&found.handles, 7), all_loaded(keys.len()), "{request}");
    scheduler.api().end_session(request);
}

#[test]
fn a_stopped_engine_costs_no_hit_and_hears_of_it_afterwards() {
    let (engine, mut worker, mut scheduler) = EngineProcess::with_clients("rd-stop");
    let keys = worker.stores(round(1), chain(1, 16), 7);
    let held = scheduler.finds("before", 0, &keys).handles;
    engine.stop();
    assert!(scheduler.api().is_current("before"));
    finds_the_same(&mut scheduler, &mut worker, "again", &held);
    scheduler.finds("meanwhile", 0, &keys[..5]);
    scheduler.ends(&["before"]);
    engine.resume();
    engine.stat_becomes("pins", 5);
    assert_eq!(scheduler.tally().answered, 3);
    engine.stat_becomes("lookups", 3);
    assert_eq!(engine.stat("holds_cut"), 0);
    engine.settles_without((worker, scheduler));
}

#[test]
fn a_dead_engine_costs_no_hit_and_the_next_one_holds_what_was_found() {
    let (mut engine, mut worker, mut scheduler) = EngineProcess::with_clients("rd-dead");
    let keys = worker.stores(round(1), chain(1, 16), 7);
    let held = scheduler.finds("before", 0, &keys).handles;
    engine.kill();
    assert!(scheduler.api().is_current("before"));
    finds_the_same(&mut scheduler, &mut worker, "again", &held);
    // Found while nobody serves, and still held.
    scheduler.finds("meanwhile", 0, &keys[..5]);
    let stats = scheduler.tally();
    assert_eq!(stats, LookupStats { answered: 3, not_serving: 2, ..LookupStats::default() });
    engine.restart();
    scheduler.ready();
    assert_eq!((engine.stat("leases"), engine.stat("pins")), (2, 21));
    engine.stat_becomes("lookups_not_serving", 2);
    finds_the_same(&mut scheduler, &mut worker, "after", &held);
    engine.settles_without((worker, scheduler));
}

/// An engine that is asked to stop and to leave everything where it is.
#[test]
fn an_engine_that_has_kept_its_segments_costs_no_hit() {
    let mut engine = EngineProcess::configured("rd-keep", 16, &json!({ "keep": true }));
    let (mut worker, mut scheduler) = (engine.worker(), engine.scheduler());
    let keys = worker.stores(round(1), chain(1, 16), 7);
    let held = scheduler.finds("before", 0, &keys).handles;
    assert_eq!(engine.terminate(), Some(0));
    eventually("the scheduler knows", || !scheduler.client().is_healthy());
    finds_the_same(&mut scheduler, &mut worker, "again", &held);
    engine.restart();
    scheduler.ready();
    engine.stat_becomes("pins", 16);
}

/// At each step of a recovery, and between its end and the answer to a client that comes back.
#[test]
fn an_engine_that_recovers_costs_no_hit() {
    let (mut engine, mut worker, mut scheduler) = EngineProcess::with_clients("rd-recovers");
    let keys = worker.stores(round(1), chain(1, 16), 7);
    let held = scheduler.finds("held", 0, &keys).handles;
    for (number, place) in [
        Place::RecoveryOwner,
        Place::RecoveryOdd,
        Place::RecoveryWords,
        Place::RecoveryRecords,
        Place::RecoveryChunks,
        Place::ServingEven,
        Place::AttachAnswer,
        Place::Hold,
        Place::DeclareEnd,
    ]
    .into_iter()
    .enumerate()
    {
        engine.kill();
        engine.launch(&[(FAIL_POINT, &format!("{place}:1:stop"))]);
        engine.has_stopped();
        finds_the_same(&mut scheduler, &mut worker, &format!("{place}"), &held);
        // Found while it stands there, and held from then on.
        scheduler.finds(&format!("kept {number}"), 0, &keys[..1]);
        engine.resume();
        engine.serves().unwrap();
        scheduler.ready();
        worker.ready();
        engine.stat_becomes("pins", 17 + number as u64);
    }
    assert_eq!(engine.stat("holds_cut"), 0);
    engine.settles_without((worker, scheduler));
}

#[test]
fn an_engine_that_is_restarted_all_the_time_costs_neither_a_hit_nor_a_load() {
    let (mut engine, mut worker, mut scheduler) = EngineProcess::with_clients("rd-again");
    let keys = worker.stores(round(1), chain(1, 16), 7);
    let held = scheduler.finds("held", 0, &keys).handles;
    // Relaxed: only the numbers matter.
    let (over, lookups) = (AtomicBool::new(false), AtomicU32::new(0));
    // (This thread restarts it: an engine ends with the thread that has started it.)
    std::thread::scope(|scope| {
        let looking = scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let number = lookups.fetch_add(1, Ordering::Relaxed);
                finds_the_same(&mut scheduler, &mut worker, &format!("r{number}"), &held);
                assert!(scheduler.api().is_current("held"));
            }
        });
        let mut restarts = 0;
        while (restarts < 50 * soak() || lookups.load(Ordering::Relaxed) < 30) && !looking.is_finished() {
            engine.kill_and_restart();
            restarts += 1;
        }
        over.store(true, Ordering::Relaxed);
        looking.join().unwrap();
    });
    assert_eq!(scheduler.tally().degraded + scheduler.tally().refused, 0);
    scheduler.ready();
    worker.ready();
    engine.stat_becomes("pins", 16);
    assert_eq!(scheduler.client().stats().leases_cut, 0);
    finds_the_same(&mut scheduler, &mut worker, "in the end", &held);
    engine.settles_without((worker, scheduler));
}

/// The states of an engine whose tables must not be read.
#[test]
fn what_is_not_to_be_read_is_answered_with_nothing() {
    let (mut engine, mut worker, mut scheduler) = EngineProcess::with_clients("rd-not");
    let keys = worker.stores(round(1), chain(1, 4), 7);
    scheduler.finds("held", 0, &keys);
    let gives_nothing = |scheduler: &mut SchedulerSide, request: &str| {
        let before = scheduler.tally();
        assert_eq!(scheduler.lookup(request, 0, &keys).chunks, 0, "{request}");
        let now = scheduler.tally();
        assert_eq!((now.degraded, now.answered), (before.degraded + 1, before.answered), "{request}");
        assert!(!scheduler.api().is_current("held"), "{request}");
    };
    // It has found itself broken. (The file is written from outside, as the engine would.)
    let path = EngineName::new(&engine.name).unwrap();
    let unhealthy = set_unhealthy(&path, 1);
    gives_nothing(&mut scheduler, "unhealthy");
    assert_eq!(unhealthy, 0, "it was well before");
    set_unhealthy(&path, 0);
    scheduler.finds("well again", 0, &keys);
    // It was removed: by itself, and, after its death, by somebody else.
    assert_eq!(engine.terminate(), Some(0));
    gives_nothing(&mut scheduler, "retired");
    engine.restart();
    engine.is_allocated();
    worker.ready();
    scheduler.ready();
    assert_eq!(worker.store(round(2), &keys, 7), all_stored(4));
    scheduler.ends(&["held"]);
    scheduler.finds("held", 0, &keys);
    engine.kill();
    scheduler.finds("dead", 0, &keys);
    kvring_engine::segments::remove(&path, false, LIMIT).unwrap();
    gives_nothing(&mut scheduler, "removed");
    // Not all of its ranks are registered: there may be shards of an earlier vLLM only.
    engine.restart();
    engine.is_allocated();
    let half = WorkerSide::start(&WorkerSpec { namespace: 8, ..WorkerSpec::rank(&engine.name, 2, 0) });
    let mut early = SchedulerSide::started(&kvring_tests::SchedulerSpec {
        namespace: 8,
        ..kvring_tests::SchedulerSpec::new(&engine.name)
    });
    assert_eq!(early.lookup("half", 0, &keys).chunks, 0);
    assert_eq!(early.tally(), LookupStats { refused: 1, ..LookupStats::default() });
    worker.ready();
    engine.settles_without((worker, scheduler, half, early));
}

/// Sets the word by which an engine says that it has found itself broken. Returns what it was.
fn set_unhealthy(name: &EngineName, to: u32) -> u32 {
    use kvring_shm_abi::engine_segment::EngineSegment;
    use kvring_shm_abi::segment::{Access, SegmentFile};
    let file = SegmentFile::open(&name.engine_segment(), Access::ReadWrite).unwrap();
    let mapping = std::sync::Arc::new(file.map(file.len().unwrap(), Access::ReadWrite).unwrap());
    let view = kvring_adapter::EngineView::open(name).unwrap();
    let identity = view.identity;
    let segment = EngineSegment::new(mapping, &identity.geometry, identity.arena_id).unwrap();
    segment.info().unhealthy.swap(to, Ordering::Relaxed)
}

/// An engine of 64 slots, in which one client may hold everything.
fn small(tag: &str) -> EngineProcess {
    EngineProcess::configured(tag, 4, &json!({ "client_share": 1.0 }))
}

/// More lookups than a ring has places.
const FILL: u64 = 300;

/// The scheduler says so often that it holds the first chunk that the ring of the stopped engine is full, and then finds all of
/// them, of which it cannot tell the engine.
fn fills_its_ring(scheduler: &mut SchedulerSide, keys: &[Key]) -> Vec<Handle> {
    for number in 0..FILL {
        scheduler.finds(&format!("fill {number}"), 0, &keys[..1]);
    }
    scheduler.finds("late", 0, keys).handles
}

/// What a scheduler holds and could not say is not evicted, although the arena is full and a reservation that needs room lies
/// in front of it.
#[test]
fn what_could_not_be_published_is_not_evicted() {
    let engine = small("rd-full");
    let (mut worker, mut scheduler) = (engine.worker(), engine.scheduler());
    let mut raw = RawClient::attach(&engine.name, Role::Worker);
    let namespace = raw.register(1, 1, 0, Shape::SMALL.shard_bytes());
    let keys = worker.stores(round(1), chain(1, 16), 7);
    // The rest of the arena; the chunks above are the coldest now.
    worker.stores(round(2), chain(2, 48), 7);
    engine.stop();
    let held = fills_its_ring(&mut scheduler, &keys);
    for number in 0..3 {
        raw.send(raw.reserve_request(namespace, 0, round(6 + number), &chain(100 + u64::from(number), 40)));
    }
    engine.resume();
    for _ in 0..3 {
        raw.answer();
    }
    assert_eq!(worker.load(&held, 7), all_loaded(16), "just after it went on");
    // By and by the engine hears of everything.
    engine.stat_becomes("leases", FILL + 1);
    assert_eq!(worker.load(&held, 7), all_loaded(16));
    assert!(scheduler.api().is_current("late"));
    drop(raw);
    engine.stat_becomes("slots_writing", 0);
    worker.stores(round(20), chain(20, 40), 7);
    assert_eq!(worker.load(&held, 7), all_loaded(16), "with room for 48 others");
    assert_eq!(engine.stat("holds_cut"), 0);
    // Once they are released they are evicted like any.
    for number in 0..FILL {
        scheduler.api().end_session(&format!("fill {number}"));
    }
    scheduler.ends(&["late"]);
    engine.stat_becomes("leases", 0);
    worker.stores(round(21), chain(21, 64), 7);
    assert_eq!(scheduler.lookup("after", 0, &keys).chunks, 0);
    engine.settles_without((worker, scheduler));
}

/// What a scheduler cannot say waits for its keeper, which sleeps nearly always, also beside an engine that stands still.
#[test]
fn a_full_ring_keeps_no_keeper_busy() {
    // The keepers are counted, and another test of this process has some, too.
    isolated("a_full_ring_keeps_no_keeper_busy", || {
        let engine = small("rd-idle");
        let (mut worker, mut scheduler) = (engine.worker(), engine.scheduler());
        let keys = worker.stores(round(1), chain(1, 16), 7);
        engine.stop();
        fills_its_ring(&mut scheduler, &keys);
        let keepers = keepers();
        assert_eq!(keepers.len(), 2, "the worker's and the scheduler's");
        let used = || keepers.iter().map(PathBuf::as_path).map(used_by).sum::<Duration>();
        let (before, began) = (used(), Instant::now());
        std::thread::sleep(Duration::from_millis(700));
        let (used, waited) = (used() - before, began.elapsed());
        assert!(used * 30 < waited, "the keepers used {used:?} in {waited:?}");
        engine.resume();
        engine.stat_becomes("leases", FILL + 1);
        engine.settles_without((worker, scheduler));
    });
}

fn keepers() -> Vec<PathBuf> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten().map(|task| task.path());
    let is_keeper = |task: &PathBuf| {
        thread_state(task).is_some()
            && std::fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim() == "kvring-keeper")
    };
    tasks.filter(is_keeper).collect()
}

/// The CPU time of a thread.
fn used_by(task: &Path) -> Duration {
    let told = std::fs::read_to_string(task.join("schedstat")).unwrap();
    Duration::from_nanos(told.split(' ').next().unwrap().parse().unwrap())
}

/// An engine dies when it has marked chunks that it wants to evict. They are there for everybody, and its successor shows them
/// as what they were.
#[test]
fn what_a_dead_engine_had_marked_is_there() {
    let name = unique_name("rd-marked");
    let place = Place::ChunkMarked.name();
    let fields = kvring_tests::engine::merged(overrides(&name, 4), &json!({ "client_share": 1.0 }));
    let mut engine = EngineProcess::launched(&fields, &[(FAIL_POINT, place)]);
    engine.serves().unwrap();
    engine.is_allocated();
    let (mut worker, mut scheduler) = (engine.worker(), engine.scheduler());
    let keys = worker.stores(round(1), chain(1, 32), 7);
    let held = scheduler.finds("held", 0, &keys[..8]).handles;
    let marked = scheduler.finds("marked", 0, &keys[8..]).handles;
    scheduler.ends(&["marked"]);
    scheduler.client().noop().unwrap();
    // More than the arena has room for, so the coldest is marked: one that nobody holds.
    for number in 2..4 {
        worker.submit_store(round(number), &chain(number.into(), 32), 7).unwrap();
    }
    eventually("the engine has died of it", || engine.ended().is_some());
    let view = engine.view();
    let is_marked = |handle: &&Handle| {
        let (chunks, word) = (&view.segment.chunks, [handle.chunk().word]);
        [Marked::Missing, Marked::There].map(|marked| chunks.still(&word, marked)) == [0, 1]
    };
    assert_eq!(marked.iter().filter(is_marked).count(), 1, "one chunk was marked");
    finds_the_same(&mut scheduler, &mut worker, "dead", &held);
    finds_the_same(&mut scheduler, &mut worker, "dead too", &marked);
    engine.restart();
    scheduler.ready();
    worker.ready();
    assert_eq!(worker.load(&held, 7), all_loaded(8));
    assert!(scheduler.api().is_current("held"));
    assert_eq!(marked.iter().filter(is_marked).count(), 0, "it is shown again");
    becomes("pins", 8, || engine.stat("pins"));
    drop(view);
    engine.settles_without((worker, scheduler));
}
