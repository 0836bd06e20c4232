//! Operations that are in flight when the engine stops answering: each times out once, and an answer that comes late is undone.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_adapter::LookupStats;
use kvring_tests::{
    ClientSpec, EngineProcess, LIMIT, SchedulerSide, SchedulerSpec, Shape, Stored, WorkerSide, WorkerSpec,
    all_dropped, all_stored, chain, eventually, in_a_call, round, within,
};
use serde_json::json;
use std::time::Duration;

const KEYS: usize = 8;

/// An engine with eight chunks in it, and a scheduler whose lookups take at most `lookup_ms`.
fn scene(tag: &str, lookup_ms: u64) -> (EngineProcess, WorkerSide, SchedulerSide) {
    let engine = EngineProcess::start(tag, 16);
    let mut worker = engine.worker();
    assert_eq!(worker.store(round(1), &chain(1, KEYS), 0), all_stored(KEYS));
    let scheduler = SchedulerSide::started(&SchedulerSpec { lookup_ms, ..SchedulerSpec::new(&engine.name) });
    (engine, worker, scheduler)
}

#[test]
fn a_timed_out_lookup_is_that_admissions_answer_and_its_late_lease_is_released() {
    let (engine, worker, mut scheduler) = scene("late", 100);
    let keys = chain(1, KEYS);
    let before = engine.stat("lookups");
    engine.stop();
    let wait = Duration::from_millis(100);
    assert_eq!(within(wait, "the lookup", || scheduler.lookup("r", 0, &keys)).chunks, 0);
    let timed_out = LookupStats { timed_out: 1, ..LookupStats::default() };
    assert_eq!(scheduler.tally(), timed_out);
    // Asking again does not wait again: it is not even counted.
    for _ in 0..10_000 {
        assert_eq!(scheduler.lookup("r", 0, &keys).chunks, 0);
    }
    assert_eq!(scheduler.tally(), timed_out);
    // Neither do other requests: the client knows that the engine does not move.
    for number in 0..1000 {
        assert_eq!(scheduler.lookup(&format!("other {number}"), 0, &keys).chunks, 0);
    }
    assert_eq!(scheduler.tally(), LookupStats { timed_out: 1, degraded: 1000, ..LookupStats::default() });
    engine.resume();
    // The engine answers the one lookup in the ring. The test does not call the scheduler: its keeper gives the lease back.
    engine.stat_becomes("lookups", before + 1);
    engine.stat_becomes("leases", 0);
    eventually("the scheduler is well again", || scheduler.client().is_healthy());
    assert_eq!(scheduler.lookup("r", 0, &keys).chunks, 0, "still that admission's answer");
    engine.beats(5);
    assert_eq!(engine.stat("lookups"), before + 1);
    // The next admission is asked.
    eventually("a lookup is in time", || {
        for admission in 1..100 {
            if scheduler.lookup("r", admission, &keys).chunks == KEYS as u32 {
                return true;
            }
        }
        false
    });
    scheduler.api().end_session("r");
    engine.settles_without((worker, scheduler));
}

#[test]
fn many_late_answers_are_undone_whatever_has_become_of_their_sessions() {
    let (engine, worker, mut scheduler) = scene("many", 1);
    let keys = chain(1, KEYS);
    let mut kinds = [0; 3];
    for number in 0..30 {
        let request = format!("r{number}");
        engine.stop();
        assert_eq!(scheduler.lookup(&request, 0, &keys).chunks, 0);
        // The session is left alone, ended, or begun anew before the answer comes.
        kinds[number % 3] += 1;
        match number % 3 {
            0 => {}
            1 => scheduler.api().end_session(&request),
            _ => drop(scheduler.lookup(&request, 1, &keys)),
        }
        engine.resume();
        if number.is_multiple_of(2) {
            engine.beats(2);
        }
        eventually("the scheduler is well again", || scheduler.client().is_healthy());
    }
    assert_eq!(kinds, [10, 10, 10]);
    let tally = scheduler.tally();
    assert!(tally.timed_out >= 20, "{tally:?}");
    drop(worker);
    for number in 0..30 {
        scheduler.api().end_session(&format!("r{number}"));
    }
    assert_eq!(scheduler.api().open_sessions(), 0);
    engine.stat_becomes("leases", 0);
    engine.settles_without(scheduler);
}

/// Makes a lookup on a thread of its own, and does something to the engine while that thread sleeps for the answer.
fn in_the_middle_of_a_poll(
    tag: &str,
    act: impl FnOnce(&mut EngineProcess),
) -> (EngineProcess, WorkerSide, SchedulerSide, u32) {
    let (mut engine, worker, mut scheduler) = scene(tag, LIMIT.as_millis() as u64);
    engine.stop();
    let poller = in_a_call('S', move || {
        // It has no deadline, so it comes back only because of what happens to the engine.
        let found = scheduler.lookup("r", 0, &chain(1, KEYS));
        (scheduler, found.chunks)
    });
    act(&mut engine);
    let (scheduler, chunks) = poller.join().unwrap();
    (engine, worker, scheduler, chunks)
}

#[test]
fn an_engine_killed_in_the_middle_of_a_poll_ends_it_at_once() {
    let (mut engine, mut worker, mut scheduler, chunks) =
        in_the_middle_of_a_poll("pollkill", |engine| engine.kill());
    assert_eq!(chunks, 0);
    assert_eq!(scheduler.tally(), LookupStats { degraded: 1, ..LookupStats::default() });
    assert_eq!(scheduler.lookup("r", 0, &chain(1, KEYS)).chunks, 0, "that admission's answer");
    engine.restart();
    scheduler.ready();
    worker.ready();
    assert_eq!(scheduler.lookup("r", 0, &chain(1, KEYS)).chunks, 0, "still");
    // The successor has everything.
    assert_eq!(worker.store(round(2), &chain(1, KEYS), 1), Stored { skipped: 8, ..Stored::default() });
    assert_eq!(scheduler.lookup("r", 1, &chain(1, KEYS)).chunks, KEYS as u32);
    engine.settles_without((worker, scheduler));
}

#[test]
fn an_engine_restarted_in_the_middle_of_a_poll_ends_it_at_once() {
    let (engine, worker, scheduler, chunks) = in_the_middle_of_a_poll("pollstart", |engine| {
        engine.kill_and_restart();
    });
    assert_eq!(chunks, 0);
    assert_eq!(scheduler.tally().degraded, 1);
    engine.settles_without((worker, scheduler));
}

#[test]
fn an_engine_stopped_in_the_middle_of_a_poll_answers_when_it_goes_on() {
    let (engine, worker, scheduler, chunks) = in_the_middle_of_a_poll("pollcont", |engine| engine.resume());
    assert_eq!(chunks, KEYS as u32, "within the deadline: the right answer");
    assert_eq!(scheduler.tally(), LookupStats { answered: 1, ..LookupStats::default() });
    engine.stat_becomes("leases", 1);
    engine.settles_without((worker, scheduler));
}

/// A reservation that is answered too late is aborted: its slots would be lost otherwise.
#[test]
fn a_late_reservation_is_aborted() {
    let engine = EngineProcess::start("reserve", 16);
    let client = ClientSpec { operation_ms: 100, ..ClientSpec::new(&engine.name) };
    let mut worker = WorkerSide::start(&WorkerSpec { client, ..WorkerSpec::new(&engine.name) }).unwrap();
    engine.stop();
    let stored = worker.store(round(1), &chain(1, KEYS), 0);
    assert_eq!(stored, all_dropped(KEYS));
    engine.resume();
    engine.stat_becomes("shards_reserved", KEYS as u64);
    engine.stat_becomes("shards_aborted", KEYS as u64);
    engine.stat_becomes("slots_writing", 0);
    eventually("it works again", || {
        eventually("the worker is well again", || worker.client().is_healthy());
        worker.store(round(2), &chain(1, KEYS), 0).stored == KEYS as u32
    });
    engine.settles_without(worker);
}

/// Messages that give something back are never dropped: while the engine stands still there are more of them than the ring has
/// places, and when it goes on all of them arrive.
#[test]
fn what_is_given_back_during_a_stall_arrives_afterwards() {
    let sessions = 600;
    let engine = EngineProcess::configured("deferred", 64, &json!({ "client_share": 1.0 }));
    let shape = Shape { page_bytes: [1024, 1024], ..Shape::SMALL };
    let mut worker = WorkerSide::start(&WorkerSpec { shape, ..WorkerSpec::new(&engine.name) }).unwrap();
    let keys = worker.stores(round(1), chain(1, KEYS), 0);
    let mut scheduler = engine.scheduler();
    for number in 0..sessions {
        let found = scheduler.lookup(&format!("r{number}"), 0, &keys);
        assert_eq!(found.chunks, KEYS as u32, "{number}");
    }
    engine.stat_becomes("leases", sessions);
    engine.stat_becomes("pins", sessions * KEYS as u64);
    engine.stop();
    for number in 0..sessions {
        let request = format!("r{number}");
        within(Duration::ZERO, "giving back", || match number % 3 {
            0 => scheduler.api().free_lookup_locks(&request, 0, 0),
            1 => scheduler.api().end_session(&request),
            _ => {
                scheduler.api().free_lookup_locks(&request, 0, 3);
                scheduler.api().free_lookup_locks(&request, 0, 1);
            }
        });
    }
    engine.resume();
    engine.stat_becomes("leases", sessions / 3);
    engine.stat_becomes("pins", sessions / 3);
    for number in 0..sessions {
        scheduler.api().end_session(&format!("r{number}"));
    }
    engine.stat_becomes("leases", 0);
    engine.settles_without((worker, scheduler));
}
