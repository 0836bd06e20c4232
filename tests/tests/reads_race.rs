//! Lookups race evictions, in an arena so small that everything is evicted all the time. Whatever a lookup has answered can be
//! loaded until it is released, and is what it is said to be.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_adapter::Round;
use kvring_rig::random::Random;
use kvring_shm_abi::sync::{AtomicBool, AtomicU64, Ordering};
use kvring_tests::{
    EngineProcess, Loaded, Peer, SchedulerSpec, Shape, WorkerSide, WorkerSpec, chain, round, soak,
};
use serde_json::json;

/// Different prompts. Together they have three times as many chunks as the arena has room for.
const PROMPTS: u64 = 24;
/// Chunks of each.
const CHUNKS: usize = 8;

/// An engine with 64 slots, of which one client may hold half.
fn small(policy: &str) -> EngineProcess {
    EngineProcess::configured("race", 4, &json!({ "policy": policy, "client_share": 0.5 }))
}

fn worker(engine: &str) -> WorkerSide {
    WorkerSide::start(&WorkerSpec { shape: Shape::SMALL, ..WorkerSpec::new(engine) }).unwrap()
}

/// What a scheduler's lookups came to.
#[derive(Debug, Default)]
struct Outcome {
    found: u64,
    missed: u64,
    loaded: Loaded,
}

/// Looks prompts up until so many lookups have found something, loads what they have found, and releases it a few lookups
/// later, all of it, or a part first.
fn looks_up(engine: &str, seed: u64, hits: u64) -> Outcome {
    let mut random = Random::new(seed, 0);
    let mut worker = worker(engine);
    let mut scheduler = kvring_tests::SchedulerSide::started(&SchedulerSpec::new(engine));
    let (mut outcome, mut open) = (Outcome::default(), Vec::new());
    let mut load = |outcome: &mut Outcome, prompt: u64, handles: &[kvring_tests::Handle]| {
        let loaded = worker.load(handles, prompt);
        outcome.loaded.loaded += loaded.loaded;
        outcome.loaded.failed += loaded.failed;
        outcome.loaded.wrong += loaded.wrong;
    };
    let mut left = hits;
    for number in 0u64.. {
        if left == 0 {
            break;
        }
        let prompt = random.below(PROMPTS);
        let request = format!("{number}");
        let keys = chain(prompt, 1 + random.below(CHUNKS as u64) as usize);
        let found = scheduler.lookup(&request, 0, &keys);
        outcome.found += u64::from(found.chunks);
        outcome.missed += keys.len() as u64 - u64::from(found.chunks);
        if found.chunks == 0 {
            std::thread::yield_now();
            continue;
        }
        left -= 1;
        if random.one_in(2) {
            load(&mut outcome, prompt, &found.handles);
        }
        if random.one_in(3) {
            scheduler.api().free_lookup_locks(&request, 0, found.chunks / 2);
            open.push((request, prompt, found.handles[..found.chunks as usize / 2].to_vec()));
        } else {
            open.push((request, prompt, found.handles));
        }
        while open.len() > random.below(4) as usize {
            let (request, prompt, handles) = open.swap_remove(random.below(open.len() as u64) as usize);
            // Just before it is released.
            load(&mut outcome, prompt, &handles);
            scheduler.api().end_session(&request);
        }
    }
    outcome
}

/// Tells those who store that it is over, also by a panic.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        // Release; pairs with the Acquire in `stores`.
        self.0.store(true, Ordering::Release);
    }
}

/// Stores prompts until it is told to end.
fn stores(engine: &str, source: u32, over: &AtomicBool, stored: &AtomicU64) {
    let mut random = Random::new(source.into(), 1);
    let mut worker = worker(engine);
    for number in 0.. {
        if over.load(Ordering::Acquire) {
            break;
        }
        let prompt = random.below(PROMPTS);
        let report = worker.store(Round { source, number }, &chain(prompt, CHUNKS), prompt);
        stored.fetch_add(report.stored.into(), Ordering::Relaxed);
    }
}

#[test]
fn what_lookups_answer_is_not_evicted_until_it_is_released() {
    for policy in ["lru", "arc"] {
        let engine = small(policy);
        let hits = 1500 * soak();
        let (over, stored) = (AtomicBool::new(false), AtomicU64::new(0));
        let outcomes: Vec<Outcome> = std::thread::scope(|scope| {
            let (name, over, stored) = (&engine.name, &over, &stored);
            let _ends = Ends(over);
            for source in 1..3 {
                scope.spawn(move || stores(name, source, over, stored));
            }
            let readers: Vec<_> =
                (0..3).map(|seed| scope.spawn(move || looks_up(name, seed, hits))).collect();
            readers.into_iter().map(|reader| reader.join().unwrap()).collect()
        });
        for outcome in &outcomes {
            assert_eq!((outcome.loaded.failed, outcome.loaded.wrong), (0, 0), "{policy}: {outcome:?}");
            assert!(outcome.missed > hits / 4, "{policy}: {outcome:?}");
        }
        let evictions = engine.stat("evictions");
        assert!(evictions > hits, "{policy}: {evictions} evictions beside {hits} hits each");
        engine.settles(0);
    }
}

/// A scheduler is killed at any moment of its lookups and releases, and others go on: nothing of it is left, and nothing of
/// the others is lost.
#[test]
fn schedulers_that_die_among_their_lookups_leave_nothing() {
    let engine = small("lru");
    let mut worker = worker(&engine.name);
    let (over, stored) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let (name, over, stored) = (&engine.name, &over, &stored);
        let _ends = Ends(over);
        scope.spawn(move || stores(name, 1, over, stored));
        let reader = scope.spawn(move || looks_up(name, 9, 800 * soak()));
        for number in 0..20u32 {
            let mut peer = Peer::scheduler(&SchedulerSpec::new(&engine.name));
            for request in 0..=number {
                let prompt = u64::from(request) % PROMPTS;
                let found = peer.lookup(&request.to_string(), 0, &chain(prompt, CHUNKS));
                assert_eq!(worker.load(&found.handles, prompt).failed, 0);
            }
            peer.kill();
        }
        let outcome = reader.join().unwrap();
        assert_eq!((outcome.loaded.failed, outcome.loaded.wrong), (0, 0), "{outcome:?}");
    });
    engine.stat_becomes("pins", 0);
    worker.stores(round(1000), chain(2000, 24), 1);
    engine.settles_without(worker);
}
