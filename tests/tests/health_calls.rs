//! Every call returns by its deadline whatever the engine does: never there, killed, stopped, killed in the middle. What
//! it returns then is what "degraded" means: nothing found, stores dropped, loads right or refused.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_adapter::{CallError, Health, Round};
use kvring_shm_abi::sync::{AtomicBool, AtomicU64, Ordering};
use kvring_tests::engine::{EngineProcess, unique_name};
use kvring_tests::kv::chain;
use kvring_tests::proto::{ClientSpec, Handle, SchedulerSpec, Stored, WorkerSpec, all_loaded, all_stored};
use kvring_tests::scheduler::SchedulerSide;
use kvring_tests::wait::{LIMIT, eventually, within};
use kvring_tests::worker::WorkerSide;
use std::time::Duration;

const LOOKUP: Duration = Duration::from_millis(150);
const OPERATION: Duration = Duration::from_millis(200);
const DRAIN: Duration = Duration::from_millis(250);
const REGISTER: Duration = Duration::from_millis(300);

fn round(number: u32) -> Round {
    Round { source: 1, number }
}

/// Deadlines that are soon over.
fn hasty(engine: &str) -> ClientSpec {
    ClientSpec {
        attach_ms: 200,
        register_ms: REGISTER.as_millis() as u64,
        operation_ms: OPERATION.as_millis() as u64,
        drain_ms: DRAIN.as_millis() as u64,
        stall_ms: 300,
        ..ClientSpec::new(engine)
    }
}

struct Clients {
    worker: WorkerSide,
    polling: SchedulerSide,
    pending: SchedulerSide,
}

fn clients(engine: &str) -> Clients {
    let client = hasty(engine);
    let spec = SchedulerSpec {
        client: client.clone(),
        lookup_ms: LOOKUP.as_millis() as u64,
        pending_ms: LOOKUP.as_millis() as u64,
        ..SchedulerSpec::new(engine)
    };
    let worker = WorkerSpec { client, ..WorkerSpec::new(engine) };
    Clients {
        worker: within(REGISTER, "register_kv_caches", || WorkerSide::start(&worker)).unwrap(),
        polling: SchedulerSide::start(&spec),
        pending: SchedulerSide::start(&SchedulerSpec { polling: false, ..spec }),
    }
}

/// Every call there is, twice: by its deadline, and with a degraded answer.
fn every_call_is_degraded(clients: &mut Clients, handles: &[Handle], version: u64) {
    let Clients { worker, polling, pending } = clients;
    let keys = chain(1, 8);
    for pass in 0..2 {
        let request = format!("degraded {pass}");
        for scheduler in [&mut *polling, &mut *pending] {
            let answered = scheduler.tally().answered;
            within(LOOKUP, "submit_lookup", || scheduler.api().submit_lookup(&request, 0, &keys)).unwrap();
            // A pending lookup is asked about until it gives up; no single question waits longer than a lookup may.
            eventually("the lookup is answered", || {
                within(LOOKUP, "check_lookup", || scheduler.check(&request))
                    .is_some_and(|found| found.chunks == 0)
            });
            assert_eq!(scheduler.tally().answered, answered, "not by the engine");
            within(Duration::ZERO, "free_lookup_locks", || scheduler.api().free_lookup_locks(&request, 0, 0));
            within(Duration::ZERO, "end_session", || scheduler.api().end_session(&request));
            let reset = within(OPERATION, "reset_cache", || scheduler.api().reset_cache()).unwrap_err();
            assert!(is_degraded(&reset), "{reset}");
            for what in [scheduler.client().noop(), scheduler.client().clear().map(|_| ())] {
                assert!(is_degraded(&what.unwrap_err()));
            }
            assert!(within(Duration::ZERO, "is_healthy", || !scheduler.api().is_healthy()));
            let waited = within(OPERATION, "wait_ready", || scheduler.client().wait_ready(OPERATION));
            // A stopped engine's client is attached all the same.
            assert!(waited.is_err() || scheduler.client().health() == Health::Stalled, "{waited:?}");
        }
        let job = within(Duration::ZERO, "submit_store", || {
            worker.submit_store("store", round(100 + pass), None, &chain(50, 4), 0)
        });
        within(OPERATION, "handle_preemptions", || worker.adapter().handle_preemptions(None));
        let stored = within(OPERATION * 3, "get_finished", || worker.finished_store(job.unwrap()));
        assert_eq!(stored, Stored { dropped: 4, ..Stored::default() }, "stores are dropped, and said to be");
        let loaded = within(OPERATION, "a load", || worker.load("load", handles, version));
        assert_eq!((loaded.loaded + loaded.failed) as usize, handles.len());
        assert_eq!(loaded.wrong, 0);
        assert!(within(Duration::ZERO, "wait_idle", || worker.adapter().wait_idle(OPERATION)));
    }
}

fn is_degraded(error: &CallError) -> bool {
    matches!(
        error,
        CallError::Degraded(_) | CallError::Dead | CallError::Restarted | CallError::TimedOut { .. }
    )
}

fn ends(clients: Clients) {
    let Clients { mut worker, mut polling, mut pending } = clients;
    for scheduler in [&mut polling, &mut pending] {
        within(DRAIN, "shutdown", || scheduler.api().shutdown());
        within(Duration::ZERO, "a second shutdown", || scheduler.api().shutdown());
        assert_eq!(scheduler.lookup("late", 0, &chain(1, 1)).unwrap().chunks, 0, "a call after it");
    }
    within(DRAIN * 2, "shutdown", || worker.adapter().shutdown());
    within(Duration::ZERO, "a second shutdown", || worker.adapter().shutdown());
}

/// With an engine: something is stored, and found with these handles.
fn with_content(engine: &EngineProcess) -> (Clients, Vec<Handle>) {
    let mut clients = clients(&engine.name);
    let Clients { worker, polling, pending } = &mut clients;
    worker.wait_ready(LIMIT).unwrap();
    for scheduler in [&*polling, &*pending] {
        scheduler.client().wait_ready(LIMIT).unwrap();
    }
    let keys = chain(1, 8);
    // As hasty as these clients are, a busy machine may take several attempts.
    eventually("everything is stored", || {
        let stored = worker.store("r", round(1), None, &keys, 5);
        stored.stored + stored.skipped == 8
    });
    let mut found = polling.lookup("r", 0, &keys).unwrap();
    for admission in 1.. {
        if found.chunks == 8 {
            break;
        }
        found = polling.lookup("r", admission, &keys).unwrap();
    }
    assert_eq!(worker.load("r", &found.ranks[0], 5), all_loaded(8));
    (clients, found.ranks.remove(0))
}

#[test]
fn with_an_engine_that_was_never_there() {
    let mut clients = clients(&unique_name("never"));
    let nowhere = Handle { arena_id: [1, 2], slot: 3, generation: 4, offset: 4096, key: [5, 6] };
    every_call_is_degraded(&mut clients, &[nowhere; 3], 0);
    assert_eq!(clients.worker.client().health(), Health::Absent);
    ends(clients);
}

#[test]
fn with_an_engine_that_was_killed() {
    let mut engine = EngineProcess::start("killed", 16);
    let (mut clients, handles) = with_content(&engine);
    engine.kill();
    every_call_is_degraded(&mut clients, &handles, 5);
    eventually("the client knows", || clients.worker.client().health() == Health::Dead);
    ends(clients);
}

#[test]
fn with_an_engine_that_ended_politely() {
    let mut engine = EngineProcess::start("polite", 16);
    let (mut clients, handles) = with_content(&engine);
    assert_eq!(engine.terminate(), Some(0));
    assert!(kvring_tests::isolate::segments(&engine.name).is_empty(), "it takes everything away");
    every_call_is_degraded(&mut clients, &handles, 5);
    eventually("the client knows", || clients.worker.client().health() == Health::Absent);
    ends(clients);
}

#[test]
fn with_an_engine_that_is_stopped() {
    let mut engine = EngineProcess::start("stopped", 16);
    let (mut clients, handles) = with_content(&engine);
    engine.stop();
    every_call_is_degraded(&mut clients, &handles, 5);
    // A load needs no answer: what is there is right.
    assert_eq!(clients.worker.load("r", &handles, 5), all_loaded(8));
    // It goes on: so do they, by themselves and in the same attachment.
    let attaches = engine.stat("attaches");
    engine.resume();
    let Clients { worker, polling, pending } = &mut clients;
    for client in [worker.client(), polling.client(), pending.client()] {
        eventually("the client is well again", || client.health().is_healthy());
    }
    eventually("stores work again", || worker.store("r", round(500), None, &chain(9, 4), 7) == all_stored(4));
    assert_eq!(engine.stat("attaches"), attaches);
    engine.stop();
    ends(clients);
    engine.resume();
    engine.settles(0);
}

/// Threads that call all the time, and an engine that is killed, stopped, and started again under them.
#[test]
fn in_the_middle_of_everything() {
    let mut engine = EngineProcess::start("middle", 16);
    let ended = AtomicBool::new(false);
    // Chunks that each scheduler has found.
    let finds = [AtomicU64::new(0), AtomicU64::new(0)];
    let name = engine.name.clone();
    std::thread::scope(|scope| {
        let (name, ended) = (&name, &ended);
        let worker = scope.spawn(move || {
            let spec = WorkerSpec { client: hasty(name), ..WorkerSpec::new(name) };
            let mut worker = WorkerSide::start(&spec).unwrap();
            let mut stored = 0;
            for number in 0.. {
                if ended.load(Ordering::Acquire) {
                    break;
                }
                let keys = chain(u64::from(number % 20), 8);
                stored +=
                    within(OPERATION * 4, "a store", || worker.store("r", round(number), None, &keys, 3))
                        .stored;
                within(OPERATION, "handle_preemptions", || worker.adapter().handle_preemptions(None));
            }
            stored
        });
        let schedulers = [(true, &finds[0]), (false, &finds[1])].map(|(polling, found)| {
            scope.spawn(move || {
                let (lookup_ms, pending_ms) = (150, 150);
                let client = hasty(name);
                let spec =
                    SchedulerSpec { client, polling, lookup_ms, pending_ms, ..SchedulerSpec::new(name) };
                let mut scheduler = SchedulerSide::start(&spec);
                let mut loader =
                    WorkerSide::start(&WorkerSpec { client: hasty(name), ..WorkerSpec::new(name) });
                let loader = loader.as_mut().unwrap();
                let mut wrong = 0;
                for number in 0u64.. {
                    if ended.load(Ordering::Acquire) {
                        break;
                    }
                    let request = format!("{polling} {number}");
                    let keys = chain(number % 20, 8);
                    let hit =
                        within(LOOKUP * 2, "a lookup", || scheduler.lookup(&request, 0, &keys)).unwrap();
                    found.fetch_add(u64::from(hit.chunks), Ordering::Relaxed);
                    if hit.chunks > 0 {
                        wrong += within(OPERATION, "a load", || loader.load("r", &hit.ranks[0], 3)).wrong;
                    }
                    within(Duration::ZERO, "end_session", || scheduler.api().end_session(&request));
                    if number.is_multiple_of(64) {
                        let _ = within(OPERATION, "reset_cache", || scheduler.api().reset_cache());
                    }
                }
                wrong
            })
        });
        for cycle in 0..4 * kvring_tests::soak() {
            std::thread::sleep(Duration::from_millis(150));
            if cycle.is_multiple_of(2) {
                engine.stop();
                std::thread::sleep(Duration::from_millis(200));
                engine.resume();
                std::thread::sleep(Duration::from_millis(100));
            }
            engine.kill();
            std::thread::sleep(Duration::from_millis(50));
            engine.restart();
        }
        // The last engine is used too, and by both, also where the machine is so busy that one of them has found nothing yet.
        eventually("lookups hit again", || engine.stat("chunks_hit") > 0);
        eventually("both find something", || finds.iter().all(|found| found.load(Ordering::Relaxed) > 0));
        ended.store(true, Ordering::Release);
        assert!(worker.join().unwrap() > 0);
        for scheduler in schedulers {
            assert_eq!(scheduler.join().unwrap(), 0, "wrong bytes that were called right");
        }
    });
    engine.settles(0);
}
