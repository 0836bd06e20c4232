//! Every call returns by its deadline, whether the engine was never there, was killed, is stopped, or is killed in the middle
//! of the call. Until there is an engine again stores are dropped, lookups go on where there are tables to be read, and loads
//! are right or refused.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_adapter::{CallError, Health, LookupStats};
use kvring_shm_abi::sync::{AtomicBool, AtomicU64, Ordering};
use kvring_tests::{
    ClientSpec, EngineProcess, Handle, SchedulerSide, SchedulerSpec, WorkerSide, WorkerSpec, all_dropped,
    all_loaded, all_stored, chain, eventually, round, segments, soak, unique_name, within,
};
use std::time::Duration;

const OPERATION: Duration = Duration::from_millis(200);
const DRAIN: Duration = Duration::from_millis(250);
const REGISTER: Duration = Duration::from_millis(300);

/// A client with short deadlines.
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
    scheduler: SchedulerSide,
}

fn clients(engine: &str) -> Clients {
    let client = hasty(engine);
    let scheduler = SchedulerSpec { client: client.clone(), ..SchedulerSpec::new(engine) };
    let worker = WorkerSpec { client, ..WorkerSpec::new(engine) };
    Clients {
        worker: within(REGISTER, "register_kv_caches", || WorkerSide::start(&worker)).unwrap(),
        scheduler: SchedulerSide::start(&scheduler),
    }
}

/// Every call, twice: each returns by its deadline, stores and what needs an engine's answer fail, and lookups find `found` of
/// the chunks that were stored.
fn no_call_waits(clients: &mut Clients, handles: &[Handle], version: u64, found: u32) {
    let Clients { worker, scheduler } = clients;
    let keys = chain(1, 8);
    for pass in 0..2 {
        let request = format!("degraded {pass}");
        let before = scheduler.tally();
        let hit = within(Duration::ZERO, "a lookup", || scheduler.lookup(&request, 0, &keys));
        assert_eq!(hit.chunks, found);
        let LookupStats { answered, not_serving, degraded, .. } = scheduler.tally();
        let read = u64::from(found > 0);
        assert_eq!((answered - before.answered, not_serving - before.not_serving), (read, read));
        assert_eq!(degraded - before.degraded, 1 - read);
        assert_eq!(worker.load(&hit.handles, version), all_loaded(found as usize));
        within(Duration::ZERO, "free_lookup_locks", || scheduler.api().free_lookup_locks(&request, 0, 0));
        within(Duration::ZERO, "end_session", || scheduler.api().end_session(&request));
        let reset = within(OPERATION, "reset_cache", || scheduler.api().reset_cache()).unwrap_err();
        assert!(is_degraded(&reset), "{reset}");
        for what in [scheduler.client().noop(), scheduler.client().clear().map(|_| ())] {
            assert!(is_degraded(&what.unwrap_err()));
        }
        assert!(within(Duration::ZERO, "is_healthy", || !scheduler.api().is_healthy()));
        let waited = within(OPERATION, "wait_ready", || scheduler.client().wait_ready(OPERATION));
        // The client of a stopped engine stays attached.
        assert!(waited.is_err() || scheduler.client().health() == Health::Stalled, "{waited:?}");
        let job = within(Duration::ZERO, "submit_store", || {
            worker.submit_store(round(100 + pass), &chain(50, 4), 0)
        });
        within(OPERATION, "handle_preemptions", || worker.adapter().handle_preemptions(None));
        let stored = within(OPERATION * 3, "get_finished", || worker.finished_store(job.unwrap()));
        assert_eq!(stored, all_dropped(4), "stores are dropped, and said to be");
        let loaded = within(OPERATION, "a load", || worker.load(handles, version));
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
    let Clients { mut worker, mut scheduler } = clients;
    within(DRAIN, "shutdown", || scheduler.api().shutdown());
    within(Duration::ZERO, "a second shutdown", || scheduler.api().shutdown());
    assert_eq!(scheduler.lookup("late", 0, &chain(1, 1)).chunks, 0, "a call after it");
    within(DRAIN * 2, "shutdown", || worker.adapter().shutdown());
    within(Duration::ZERO, "a second shutdown", || worker.adapter().shutdown());
}

/// Clients of an engine that have stored something, and its handles.
fn with_content(engine: &EngineProcess) -> (Clients, Vec<Handle>) {
    let mut clients = clients(&engine.name);
    let Clients { worker, scheduler } = &mut clients;
    worker.ready();
    scheduler.ready();
    let keys = chain(1, 8);
    // With such short deadlines, a busy machine may need several attempts.
    eventually("everything is stored", || {
        let stored = worker.store(round(1), &keys, 5);
        stored.stored + stored.skipped == 8
    });
    let found = scheduler.finds("r", 0, &keys);
    assert_eq!(worker.load(&found.handles, 5), all_loaded(8));
    (clients, found.handles)
}

#[test]
fn with_an_engine_that_was_never_there() {
    let mut clients = clients(&unique_name("never"));
    let nowhere = Handle { arena_id: [1, 2], word: 3, key: [5, 6] };
    no_call_waits(&mut clients, &[nowhere; 3], 0, 0);
    assert_eq!(clients.worker.client().health(), Health::Absent);
    ends(clients);
}

#[test]
fn with_an_engine_that_was_killed() {
    let mut engine = EngineProcess::start("killed", 16);
    let (mut clients, handles) = with_content(&engine);
    engine.kill();
    eventually("the clients know", || {
        let Clients { worker, scheduler } = &clients;
        !worker.client().is_healthy() && !scheduler.client().is_healthy()
    });
    no_call_waits(&mut clients, &handles, 5, 8);
    eventually("the client knows", || clients.worker.client().health() == Health::Dead);
    ends(clients);
}

#[test]
fn with_an_engine_that_ended_politely() {
    let mut engine = EngineProcess::start("polite", 16);
    let (mut clients, handles) = with_content(&engine);
    assert_eq!(engine.terminate(), Some(0));
    assert!(segments(&engine.name).is_empty(), "it takes everything away");
    no_call_waits(&mut clients, &handles, 5, 0);
    eventually("the client knows", || clients.worker.client().health() == Health::Absent);
    ends(clients);
}

#[test]
fn with_an_engine_that_is_stopped() {
    let engine = EngineProcess::start("stopped", 16);
    let (mut clients, handles) = with_content(&engine);
    engine.stop();
    eventually("the clients know", || {
        let Clients { worker, scheduler } = &clients;
        let asked = [worker.client().noop(), scheduler.client().noop()];
        asked.iter().all(|answer| answer.is_err())
    });
    no_call_waits(&mut clients, &handles, 5, 8);
    // A load needs no answer of the engine's.
    assert_eq!(clients.worker.load(&handles, 5), all_loaded(8));
    // When it goes on the clients do too, by themselves and in the same attachment.
    let attaches = engine.stat("attaches");
    engine.resume();
    let Clients { worker, scheduler } = &mut clients;
    for client in [worker.client(), scheduler.client()] {
        eventually("the client is well again", || client.health().is_healthy());
    }
    eventually("stores work again", || worker.store(round(500), &chain(9, 4), 7) == all_stored(4));
    assert_eq!(engine.stat("attaches"), attaches);
    engine.stop();
    ends(clients);
    engine.resume();
    engine.settles(0);
}

/// Threads call all the time, and meanwhile the engine is killed, stopped and started again.
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
                stored += within(OPERATION * 4, "a store", || worker.store(round(number), &keys, 3)).stored;
                within(OPERATION, "handle_preemptions", || worker.adapter().handle_preemptions(None));
            }
            stored
        });
        let schedulers = [(1, &finds[0]), (2, &finds[1])].map(|(which, found)| {
            scope.spawn(move || {
                let spec = SchedulerSpec { client: hasty(name), ..SchedulerSpec::new(name) };
                let mut scheduler = SchedulerSide::start(&spec);
                let mut loader =
                    WorkerSide::start(&WorkerSpec { client: hasty(name), ..WorkerSpec::new(name) });
                let loader = loader.as_mut().unwrap();
                let mut wrong = 0;
                for number in 0u64.. {
                    if ended.load(Ordering::Acquire) {
                        break;
                    }
                    let request = format!("{which} {number}");
                    let keys = chain(number % 20, 8);
                    let hit = within(Duration::ZERO, "a lookup", || scheduler.lookup(&request, 0, &keys));
                    found.fetch_add(u64::from(hit.chunks), Ordering::Relaxed);
                    if hit.chunks > 0 {
                        wrong += within(OPERATION, "a load", || loader.load(&hit.handles, 3)).wrong;
                    }
                    within(Duration::ZERO, "end_session", || scheduler.api().end_session(&request));
                    if number.is_multiple_of(64) {
                        let _ = within(OPERATION, "reset_cache", || scheduler.api().reset_cache());
                    }
                }
                wrong
            })
        });
        for cycle in 0..4 * soak() {
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
        // Both schedulers use the last engine. On a busy machine one of them may not have found anything yet.
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
