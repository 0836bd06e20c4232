//! What was in flight when the engine stopped answering: it times out once, and what comes late is undone.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_adapter::Round;
use kvring_tests::engine::{EngineProcess, thread_state};
use kvring_tests::kv::{Shape, chain};
use kvring_tests::proto::{ClientSpec, SchedulerSpec, Stored, Tally, WorkerSpec, all_stored};
use kvring_tests::scheduler::SchedulerSide;
use kvring_tests::wait::{LIMIT, eventually, within};
use kvring_tests::worker::WorkerSide;
use serde_json::json;
use std::sync::mpsc;
use std::time::Duration;

fn round(number: u32) -> Round {
    Round { source: 1, number }
}

const KEYS: usize = 8;

/// An engine with eight chunks in it, and a scheduler whose lookups take at most `lookup_ms`.
fn scene(tag: &str, lookup_ms: u64) -> (EngineProcess, WorkerSide, SchedulerSide) {
    let engine = EngineProcess::start(tag, 16);
    let mut worker = WorkerSide::start(&WorkerSpec::new(&engine.name)).unwrap();
    assert_eq!(worker.store("r", round(1), None, &chain(1, KEYS), 0), all_stored(KEYS));
    let scheduler = SchedulerSide::start(&SchedulerSpec { lookup_ms, ..SchedulerSpec::new(&engine.name) });
    scheduler.client().wait_ready(LIMIT).unwrap();
    (engine, worker, scheduler)
}

#[test]
fn a_timed_out_lookup_is_that_admissions_answer_and_its_late_lease_is_released() {
    let (mut engine, worker, mut scheduler) = scene("late", 100);
    let keys = chain(1, KEYS);
    let before = engine.stat("lookups");
    engine.stop();
    let wait = Duration::from_millis(100);
    assert_eq!(within(wait, "the lookup", || scheduler.lookup("r", 0, &keys)).unwrap().chunks, 0);
    let timed_out = Tally { timed_out: 1, ..Tally::default() };
    assert_eq!(scheduler.tally(), timed_out);
    // Asking again does not wait again: it is not even counted.
    for _ in 0..10_000 {
        assert_eq!(scheduler.lookup("r", 0, &keys).unwrap().chunks, 0);
    }
    assert_eq!(scheduler.tally(), timed_out);
    // Neither do other requests: the engine is known not to move.
    for number in 0..1000 {
        assert_eq!(scheduler.lookup(&format!("other {number}"), 0, &keys).unwrap().chunks, 0);
    }
    assert_eq!(scheduler.tally(), Tally { timed_out: 1, degraded: 1000, ..Tally::default() });
    engine.resume();
    // The engine answers what it finds in the ring: one lookup. Nobody calls the scheduler: its keeper gives the lease back.
    engine.stat_becomes("lookups", before + 1);
    engine.stat_becomes("leases", 0);
    eventually("the scheduler is well again", || scheduler.client().is_healthy());
    assert_eq!(scheduler.lookup("r", 0, &keys).unwrap().chunks, 0, "still that admission's answer");
    engine.beats(5);
    assert_eq!(engine.stat("lookups"), before + 1);
    // The next admission is asked.
    eventually("a lookup is in time", || {
        for admission in 1..100 {
            if scheduler.lookup("r", admission, &keys).unwrap().chunks == KEYS as u32 {
                return true;
            }
        }
        false
    });
    scheduler.api().end_session("r");
    drop((worker, scheduler));
    engine.settles(0);
}

/// The same without a word from the scheduler's caller for longer than a keeper sleeps between looks.
#[test]
fn many_late_answers_are_undone_whatever_has_become_of_their_sessions() {
    let (mut engine, worker, mut scheduler) = scene("many", 1);
    let keys = chain(1, KEYS);
    let mut kinds = [0; 3];
    for number in 0..30 {
        let request = format!("r{number}");
        engine.stop();
        let found = scheduler.lookup(&request, 0, &keys).unwrap();
        assert_eq!(found.chunks, 0);
        // Left alone, ended, or begun anew before the answer comes.
        kinds[number % 3] += 1;
        match number % 3 {
            0 => {}
            1 => scheduler.api().end_session(&request),
            _ => drop(scheduler.lookup(&request, 1, &keys).unwrap()),
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
    drop(scheduler);
    engine.settles(0);
}

/// Runs a lookup on a thread of its own and does something to the engine while it sleeps for its answer.
fn in_the_middle_of_a_poll(
    tag: &str,
    act: impl FnOnce(&mut EngineProcess),
) -> (EngineProcess, WorkerSide, SchedulerSide, u32) {
    let (mut engine, worker, mut scheduler) = scene(tag, LIMIT.as_millis() as u64);
    engine.stop();
    let (tell, told) = mpsc::channel();
    let (scheduler, chunks) = std::thread::scope(|scope| {
        let poller = scope.spawn(move || {
            tell.send(nix::unistd::gettid()).unwrap();
            // Its deadline is as good as never: that it comes back at all is the point.
            let found = scheduler.lookup("r", 0, &chain(1, KEYS)).unwrap();
            (scheduler, found.chunks)
        });
        let task = std::path::PathBuf::from(format!("/proc/self/task/{}", told.recv().unwrap()));
        eventually("the caller sleeps for its answer", || thread_state(&task) == Some('S'));
        act(&mut engine);
        poller.join().unwrap()
    });
    (engine, worker, scheduler, chunks)
}

#[test]
fn an_engine_killed_in_the_middle_of_a_poll_ends_it_at_once() {
    let (mut engine, mut worker, mut scheduler, chunks) =
        in_the_middle_of_a_poll("pollkill", EngineProcess::kill);
    assert_eq!(chunks, 0);
    assert_eq!(scheduler.tally(), Tally { degraded: 1, ..Tally::default() });
    assert_eq!(scheduler.lookup("r", 0, &chain(1, KEYS)).unwrap().chunks, 0, "that admission's answer");
    engine.restart();
    scheduler.client().wait_ready(LIMIT).unwrap();
    worker.wait_ready(LIMIT).unwrap();
    assert_eq!(scheduler.lookup("r", 0, &chain(1, KEYS)).unwrap().chunks, 0, "still");
    // The successor has it all.
    assert_eq!(
        worker.store("r", round(2), None, &chain(1, KEYS), 1),
        Stored { skipped: 8, ..Stored::default() }
    );
    assert_eq!(scheduler.lookup("r", 1, &chain(1, KEYS)).unwrap().chunks, KEYS as u32);
    drop((worker, scheduler));
    engine.settles(0);
}

#[test]
fn an_engine_restarted_in_the_middle_of_a_poll_ends_it_at_once() {
    let (engine, worker, scheduler, chunks) = in_the_middle_of_a_poll("pollstart", |engine| {
        engine.kill();
        engine.restart();
    });
    assert_eq!(chunks, 0);
    assert_eq!(scheduler.tally().degraded, 1);
    drop((worker, scheduler));
    engine.settles(0);
}

#[test]
fn an_engine_stopped_in_the_middle_of_a_poll_answers_when_it_goes_on() {
    let (engine, worker, scheduler, chunks) = in_the_middle_of_a_poll("pollcont", EngineProcess::resume);
    assert_eq!(chunks, KEYS as u32, "within the deadline: the right answer");
    assert_eq!(scheduler.tally(), Tally { answered: 1, ..Tally::default() });
    engine.stat_becomes("leases", 1);
    drop((worker, scheduler));
    engine.settles(0);
}

/// A reservation that is answered too late is aborted: its slots would be lost otherwise.
#[test]
fn a_late_reservation_is_aborted() {
    let mut engine = EngineProcess::start("reserve", 16);
    let client = ClientSpec { operation_ms: 100, ..ClientSpec::new(&engine.name) };
    let mut worker = WorkerSide::start(&WorkerSpec { client, ..WorkerSpec::new(&engine.name) }).unwrap();
    worker.wait_ready(LIMIT).unwrap();
    engine.stop();
    let stored = worker.store("r", round(1), None, &chain(1, KEYS), 0);
    assert_eq!(stored, Stored { dropped: KEYS as u32, ..Stored::default() });
    engine.resume();
    engine.stat_becomes("shards_reserved", KEYS as u64);
    engine.stat_becomes("shards_aborted", KEYS as u64);
    engine.stat_becomes("slots_writing", 0);
    eventually("it works again", || {
        eventually("the worker is well again", || worker.client().is_healthy());
        worker.store("r", round(2), None, &chain(1, KEYS), 0).stored == KEYS as u32
    });
    drop(worker);
    engine.settles(0);
}

/// Messages that give something back are never dropped: more of them than the ring has places, while the engine stands
/// still, are delivered when it goes on.
#[test]
fn what_is_given_back_during_a_stall_arrives_afterwards() {
    let sessions = 600;
    let mut engine = EngineProcess::configured("deferred", 64, &json!({ "client_share": 1.0 }));
    let shape = Shape { pages: [1024, 1024], ..Shape::SMALL };
    let mut worker = WorkerSide::start(&WorkerSpec { shape, ..WorkerSpec::new(&engine.name) }).unwrap();
    let keys = chain(1, KEYS);
    assert_eq!(worker.store("r", round(1), None, &keys, 0), all_stored(KEYS));
    let mut scheduler = SchedulerSide::start(&SchedulerSpec::new(&engine.name));
    scheduler.client().wait_ready(LIMIT).unwrap();
    for number in 0..sessions {
        let found = scheduler.lookup(&format!("r{number}"), 0, &keys).unwrap();
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
    drop((worker, scheduler));
    engine.settles(0);
}
