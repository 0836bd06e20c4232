//! Schedulers that say of themselves what is not so: holds of chunks that are not there, not theirs or too many, and words that
//! are never taken back. The engine holds at most what is right of it, evicts on, and others lose nothing.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_adapter::Key;
use kvring_shm_abi::chunk::ChunkWord;
use kvring_shm_abi::directory::CHUNK_IDS;
use kvring_shm_abi::lobby::Role;
use kvring_shm_abi::message::{HOLD_MAX, Request, SlotOutcome, Status};
use kvring_shm_abi::ring::{Body, DEPTH};
use kvring_shm_abi::sync::{AtomicBool, Ordering};
use kvring_tests::{
    EngineProcess, Found, RawClient, SchedulerSide, Shape, WorkerSide, all_loaded, all_stored, chain,
    eventually, round,
};
use serde_json::json;

/// An engine of 64 slots, with a worker and a scheduler that holds eight chunks of it.
struct Scene {
    engine: EngineProcess,
    worker: WorkerSide,
    scheduler: SchedulerSide,
    keys: Vec<Key>,
    held: Found,
}

fn scene(tag: &str, fields: &serde_json::Value) -> Scene {
    let engine = EngineProcess::configured(tag, 4, fields);
    let (mut worker, mut scheduler) = (engine.worker(), engine.scheduler());
    let keys = worker.stores(round(1), chain(1, 16), 7);
    let held = scheduler.finds("held", 0, &keys[..8]);
    engine.stat_becomes("pins", 8);
    Scene { engine, worker, scheduler, keys, held }
}

impl Scene {
    /// Everything is evicted but what the honest scheduler holds.
    fn others_are_untouched(mut self, raw: impl Sized) {
        eventually("there is room for many others", || {
            (0..8u32).all(|number| {
                let stored = self.worker.store(round(10 + number), &chain(50 + u64::from(number), 12), 7);
                stored == all_stored(12)
            })
        });
        assert_eq!(self.worker.load(&self.held.handles, 7), all_loaded(8));
        assert!(self.scheduler.api().is_current("held"));
        drop(raw);
        self.engine.stat_becomes("pins", 8);
        self.engine.settles_without((self.worker, self.scheduler));
    }
}

/// Holds these chunks as session 1; how many of them the engine holds then.
fn holds(raw: &mut RawClient, namespace: u32, first: u32, words: &[ChunkWord]) -> u64 {
    let hold = raw.hold_request(1, 0, namespace, first, words);
    let completion = raw.call(hold);
    assert_eq!(completion.status, Status::Ok, "{completion:?}");
    completion.results[0]
}

#[test]
fn a_hold_ends_at_the_first_chunk_that_is_not_there() {
    let scene = scene("hh-bad", &json!({}));
    let namespace = scene.engine.namespace(1);
    let engine = &scene.engine;
    let mut raw = RawClient::attach(&engine.name, Role::Scheduler);
    let mut other = RawClient::attach(&engine.name, Role::Worker);
    let theirs = other.register(9, 1, 0, 65536);
    let slots = other.reserve(theirs, 0, round(1), &chain(1, 4));
    assert_eq!(other.finish(&slots, true), [SlotOutcome::Done; 4]);
    let good = raw.search(namespace, &scene.keys);
    assert_eq!(good.len(), 16);
    let foreign = raw.search(theirs, &chain(1, 4))[0];
    let (id, generation) = (good[0].chunk(), good[0].generation());
    for (bad, what) in [
        (ChunkWord::new(id, generation + 1), "a later life"),
        (ChunkWord::new(id, generation.wrapping_sub(1)), "an earlier life, or one that cannot be"),
        (ChunkWord::new(CHUNK_IDS - 1, 0), "beyond all chunks"),
        (ChunkWord::new(60_000, 0), "without memory"),
        (ChunkWord::new(40, 0), "a chunk that was never there"),
        (ChunkWord::from_bits(u64::MAX), "nonsense"),
        (foreign, "of another namespace"),
    ] {
        assert_eq!(holds(&mut raw, namespace, 0, &[bad]), 0, "{what}");
        engine.stat_becomes("leases", 1);
        // What comes behind is not held, either.
        assert_eq!(holds(&mut raw, namespace, 0, &[good[8], good[9], bad, good[10]]), 2, "{what}");
        engine.stat_becomes("pins", 8 + 2);
        raw.call(Request::EndSession { session: 1 });
    }
    assert_eq!(holds(&mut raw, theirs, 0, &[good[0]]), 0, "as of another namespace");
    assert_eq!(holds(&mut raw, theirs, 0, &[foreign]), 1);
    assert_eq!(engine.stat("breaches"), 0);
    scene.others_are_untouched((raw, other));
}

#[test]
fn a_hold_may_be_said_again_and_goes_on_behind_what_the_lease_has() {
    let scene = scene("hh-again", &json!({}));
    let namespace = scene.engine.namespace(1);
    let engine = &scene.engine;
    let mut raw = RawClient::attach(&engine.name, Role::Scheduler);
    let good = raw.search(namespace, &scene.keys);
    for _ in 0..3 {
        assert_eq!(holds(&mut raw, namespace, 0, &good[..4]), 4);
        engine.stat_becomes("pins", 8 + 4);
        // Behind the end; beyond it there is a gap, and nothing changes.
        assert_eq!(holds(&mut raw, namespace, 4, &good[4..6]), 2);
        engine.stat_becomes("pins", 8 + 6);
        for first in [7, 8, 1000, u32::MAX] {
            assert_eq!(holds(&mut raw, namespace, first, &good[6..8]), 0, "behind {first}");
        }
        engine.stat_becomes("pins", 8 + 6);
        // In the middle: what the lease has behind that is replaced.
        assert_eq!(holds(&mut raw, namespace, 1, &good[12..14]), 2);
        engine.stat_becomes("pins", 8 + 3);
        assert_eq!(holds(&mut raw, namespace, 3, &[]), 0, "no chunks");
        engine.stat_becomes("pins", 8 + 3);
        // Nothing behind the first: the lease is cut.
        assert_eq!(holds(&mut raw, namespace, 1, &[]), 0);
        engine.stat_becomes("pins", 8 + 1);
    }
    assert_eq!(engine.stat("holds_cut"), 3 * 4, "those with a gap");
    raw.call(Request::Release { session: 1, admission: 0, keep: 0 });
    assert_eq!(holds(&mut raw, namespace, 1, &good[..4]), 0, "behind a lease that is gone");
    scene.others_are_untouched(raw);
}

/// A client that does not count what it holds is held to its share by the engine.
#[test]
fn nobody_holds_more_than_its_share() {
    let scene = scene("hh-share", &json!({ "client_share": 0.25 }));
    let namespace = scene.engine.namespace(1);
    let mut raw = RawClient::attach(&scene.engine.name, Role::Scheduler);
    let good = raw.search(namespace, &scene.keys);
    // A quarter of 64 slots. What is held by somebody else costs nothing.
    assert_eq!(holds(&mut raw, namespace, 0, &good), 16);
    let mut more = scene.worker;
    let keys = more.stores(round(2), chain(2, 16), 7);
    let found = raw.search(namespace, &keys);
    assert_eq!(holds(&mut raw, namespace, 16, &found), 8, "eight were its own");
    raw.call(Request::EndSession { session: 1 });
    Scene { worker: more, ..scene }.others_are_untouched(raw);
}

/// A scheduler that says for ever that it holds what it cannot say is believed for a while.
#[test]
fn a_scheduler_that_never_says_what_it_holds_is_doubted() {
    let mut scene = scene("hh-doubt", &json!({ "reattach_grace_ms": 300, "client_share": 1.0 }));
    let raw = RawClient::attach(&scene.engine.name, Role::Scheduler);
    scene.worker.stores(round(2), chain(2, 48), 7);
    raw.channel.unpublished().set();
    let dropped = scene.worker.store(round(3), &chain(3, 8), 7);
    assert_eq!(dropped.dropped, 8, "it is believed");
    eventually("it is doubted", || scene.worker.store(round(4), &chain(4, 8), 7) == all_stored(8));
    // Once it has said everything for as long as it had not, and not at once, it is believed again.
    let mut number = 4;
    eventually("it is believed again", || {
        raw.channel.unpublished().clear();
        scene.engine.beats(50);
        raw.channel.unpublished().set();
        number += 1;
        scene.worker.store(round(number), &chain(number.into(), 8), 7).dropped == 8
    });
    assert!(number > 5, "it was believed at once");
    scene.others_are_untouched(raw);
}

/// The engine listens to what was said when it marked chunks, and not to all that is said afterwards.
#[test]
fn a_scheduler_that_never_stops_talking_keeps_nobody_from_storing() {
    let mut scene = scene("hh-flood", &json!({}));
    let namespace = scene.engine.namespace(1);
    let mut raw = RawClient::attach(&scene.engine.name, Role::Scheduler);
    let words = vec![raw.search(namespace, &scene.keys)[0]; HOLD_MAX];
    let hold = raw.hold_request(1, 0, namespace, 0, &words);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let worker = &mut scene.worker;
        let storing = scope.spawn(|| {
            let stored: Vec<_> = (0..20u32)
                .map(|number| worker.store(round(100 + number), &chain(100 + u64::from(number), 12), 7))
                .collect();
            over.store(true, Ordering::Release);
            stored
        });
        let mut in_flight = 0;
        while !over.load(Ordering::Acquire) {
            while in_flight < DEPTH {
                raw.send(hold);
                in_flight += 1;
            }
            while raw.poll().is_some() {
                in_flight -= 1;
            }
        }
        assert_eq!(storing.join().unwrap(), [all_stored(12); 20]);
    });
    scene.others_are_untouched(raw);
}

/// Schedulers go while the engine waits to hear what they have said: they die, leave, or are thrown out.
#[test]
fn a_scheduler_that_goes_while_it_is_listened_to_is_not_waited_for() {
    let mut scene = scene("hh-gone", &json!({ "client_share": 1.0 }));
    scene.worker.stores(round(2), chain(2, 48), 7);
    let engine = &scene.engine;
    let mut storing = RawClient::attach(&engine.name, Role::Worker);
    let namespace = storing.register(1, 1, 0, Shape::SMALL.shard_bytes());
    for way in 0..3u32 {
        let mut raw = RawClient::attach(&engine.name, Role::Scheduler);
        let words = raw.search(namespace, &scene.keys[..8]);
        engine.stop();
        let hold = raw.hold_request(1, 0, namespace, 0, &words);
        for _ in 0..100 {
            raw.send(hold);
        }
        storing.send(storing.reserve_request(namespace, 0, round(3 + way), &chain(70 + u64::from(way), 8)));
        match way {
            0 => raw.give_up(),
            1 => drop(raw.send(Request::Detach)),
            _ => raw.send_body(&Body::default()),
        }
        engine.resume();
        let answer = storing.answer();
        assert_eq!((answer.status, answer.results[0]), (Status::Ok, 8), "way {way}");
        drop(raw);
        engine.stat_becomes("pins", 8);
    }
    drop(storing);
    engine.stat_becomes("slots_writing", 0);
    scene.others_are_untouched(());
}
