//! Lookups that wait for a lower tier: they are pending and then hit, time out, or end with their session. The tier is the
//! test's, and the engine is a thread of this process.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_adapter::{Key, LookupStats, PollingSchedulerAdapter, SchedulerApi, SchedulerOptions};
use kvring_engine::byte_size::ByteSize;
use kvring_engine::config::EngineConfig;
use kvring_engine::tier::LowerTier;
use kvring_engine::{RunningEngine, spawn_with_tier};
use kvring_shm_abi::lobby::Role;
use kvring_shm_abi::message::{Request, Status};
use kvring_tests::engine::view_of;
use kvring_tests::{
    Peer, RawClient, SchedulerSide, SchedulerSpec, Sweep, WorkerSpec, all_loaded, all_stored, becomes, chain,
    eventually, round, segments, stat_of, unique_name, until, within,
};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// The state of the test's tier.
#[derive(Default)]
struct State {
    /// The keys that each lookup has asked it for.
    begun: Vec<Vec<Key>>,
    /// It has brought everything up.
    done: bool,
    /// It has nothing, so a miss is a miss.
    empty: bool,
}

#[derive(Clone, Default)]
struct Tier(Arc<Mutex<State>>);

impl LowerTier for Tier {
    fn begin(&mut self, _namespace: u32, missing: &[Key]) -> Option<u64> {
        let mut state = self.0.lock().unwrap();
        if state.empty {
            return None;
        }
        state.begun.push(missing.to_vec());
        Some(state.begun.len() as u64)
    }

    fn is_done(&mut self, ticket: u64) -> bool {
        let state = self.0.lock().unwrap();
        assert!((1..=state.begun.len() as u64).contains(&ticket), "a ticket that was never given");
        state.done
    }
}

impl Tier {
    fn set_done(&self, done: bool) {
        self.0.lock().unwrap().done = done;
    }

    fn begun(&self) -> usize {
        self.0.lock().unwrap().begun.len()
    }
}

struct Scene {
    tier: Tier,
    engine: RunningEngine,
    worker: Peer,
    name: String,
    _sweep: Sweep,
}

/// An engine with a slow tier and two of four chunks.
fn scene(tag: &str) -> Scene {
    let name = unique_name(tag);
    let sweep = Sweep(name.clone());
    let tier = Tier::default();
    let mebi = |count: u64| Some(ByteSize(count << 20));
    let config =
        EngineConfig { name: name.clone(), arena: mebi(8), slab: mebi(1), ..EngineConfig::default() };
    let engine = spawn_with_tier(config, Box::new(tier.clone())).unwrap();
    becomes("arena_bytes_allocated", 8 << 20, || stat(&name, "arena_bytes_allocated"));
    let mut worker = Peer::worker(&WorkerSpec::new(&name));
    assert_eq!(worker.store(round(1), &chain(1, 2), 0), all_stored(2));
    Scene { tier, engine, worker, name, _sweep: sweep }
}

fn stat(engine: &str, name: &str) -> u64 {
    stat_of(&view_of(engine), name)
}

fn scheduler(scene: &Scene, polling: bool, lookup_ms: u64) -> SchedulerSide {
    SchedulerSide::started(&SchedulerSpec { polling, lookup_ms, ..SchedulerSpec::new(&scene.name) })
}

fn ends_clean(scene: Scene) {
    let Scene { tier, engine, worker, name, _sweep } = scene;
    tier.set_done(true);
    drop(worker);
    becomes("clients", 0, || stat(&name, "clients"));
    becomes("leases", 0, || stat(&name, "leases"));
    engine.stop_and_join();
    assert!(segments(&name).is_empty(), "{:?}", segments(&name));
}

#[test]
fn pending_until_the_tier_has_brought_it_up_and_then_a_hit() {
    let mut scene = scene("pending");
    let mut scheduler = scheduler(&scene, false, 5);
    let keys = chain(1, 4);
    scheduler.submit("r", 0, &keys).unwrap();
    becomes("lookups that the tier was asked for", 1, || scene.tier.begun());
    assert_eq!(scene.tier.0.lock().unwrap().begun[0], keys[2..], "it is asked for what is missing");
    for _ in 0..1000 {
        assert_eq!(scheduler.check("r"), None, "pending");
    }
    assert_eq!((stat(&scene.name, "lookups"), stat(&scene.name, "lookups_pending")), (0, 1));
    // Others are served meanwhile, also with lookups that find everything.
    let mut other = Peer::scheduler(&SchedulerSpec::new(&scene.name));
    assert_eq!(other.lookup("present", 0, &keys[..2]).chunks, 2);
    drop(other);
    // What was missing comes up.
    assert_eq!(scene.worker.store(round(2), &keys, 0).stored, 2);
    assert_eq!(scheduler.check("r"), None);
    scene.tier.set_done(true);
    let found = until("the lookup is answered", || scheduler.check("r"));
    assert_eq!(found.chunks, 4);
    assert_eq!(scene.worker.load(&found.handles, 0), all_loaded(4));
    assert_eq!(scene.tier.begun(), 1, "the same lookup is not begun twice");
    scheduler.api().end_session("r");
    drop(scheduler);
    ends_clean(scene);
}

#[test]
fn a_tier_without_it_makes_no_lookup_pending_and_a_failed_one_gives_what_there_is() {
    let scene = scene("empty");
    let mut scheduler = scheduler(&scene, false, 5);
    scene.tier.0.lock().unwrap().empty = true;
    assert_eq!(scheduler.lookup("miss", 0, &chain(1, 4)).chunks, 2);
    scene.tier.0.lock().unwrap().empty = false;
    scheduler.api().submit_lookup("failed", 0, &chain(1, 4)).unwrap();
    becomes("lookups that the tier was asked for", 1, || scene.tier.begun());
    // The tier is done, but has brought nothing up.
    scene.tier.set_done(true);
    assert_eq!(scheduler.lookup("failed", 0, &chain(1, 4)).chunks, 2);
    scheduler.ends(&["miss", "failed"]);
    drop(scheduler);
    ends_clean(scene);
}

#[test]
fn a_synchronous_lookup_does_not_wait_for_a_tier_longer_than_it_may() {
    let scene = scene("polltier");
    let mut scheduler = scheduler(&scene, true, 50);
    let keys = chain(1, 4);
    let wait = Duration::from_millis(50);
    let found = within(wait, "the lookup", || scheduler.lookup("r", 0, &keys));
    assert_eq!(found.chunks, 0);
    assert_eq!(scheduler.tally(), LookupStats { timed_out: 1, ..LookupStats::default() });
    // The engine's beat moves, so other lookups are asked.
    assert_eq!(scheduler.lookup("present", 0, &keys[..2]).chunks, 2);
    scheduler.api().end_session("present");
    scene.tier.set_done(true);
    // The late answer is taken, and its lease given back.
    becomes("lookups", 2, || stat(&scene.name, "lookups"));
    becomes("leases", 0, || stat(&scene.name, "leases"));
    assert_eq!(scheduler.lookup("r", 0, &keys).chunks, 0, "that admission's answer");
    assert_eq!(scheduler.lookup("r", 1, &keys).chunks, 2);
    drop(scheduler);
    ends_clean(scene);
}

#[test]
fn the_end_of_a_session_its_client_or_its_admission_ends_a_pending_lookup() {
    let mut scene = scene("cancel");
    let keys = chain(1, 4);
    let mut pending = scheduler(&scene, false, 5);
    // Ended, released, and replaced by the next admission.
    for request in ["ended", "released", "replaced"] {
        pending.api().submit_lookup(request, 0, &keys).unwrap();
    }
    becomes("lookups that the tier was asked for", 3, || scene.tier.begun());
    pending.api().end_session("ended");
    pending.api().free_lookup_locks("released", 0, 0);
    pending.api().submit_lookup("replaced", 1, &keys[..2]).unwrap();
    eventually("the next admission is answered", || {
        pending.check("replaced").is_some_and(|found| found.chunks == 2)
    });
    eventually("a released lookup finds nothing", || {
        pending.check("released").is_some_and(|found| found.chunks == 0)
    });
    // A client that is killed while it waits, and one that leaves.
    for kill in [true, false] {
        let mut other = Peer::scheduler(&SchedulerSpec { lookup_ms: 10, ..SchedulerSpec::new(&scene.name) });
        assert_eq!(other.lookup("mine", 0, &keys).chunks, 0);
        if kill { other.kill() } else { other.shutdown() }
    }
    assert_eq!(scene.worker.store(round(2), &keys, 0).stored, 2);
    scene.tier.set_done(true);
    // None of them comes back as a lease but the one that is asked for now.
    pending.api().end_session("replaced");
    pending.api().end_session("released");
    let found = pending.lookup("new", 0, &keys);
    assert_eq!(found.chunks, 4);
    becomes("leases", 1, || stat(&scene.name, "leases"));
    pending.api().end_session("new");
    becomes("leases", 0, || stat(&scene.name, "leases"));
    drop(pending);
    ends_clean(scene);
}

/// A session that ends has its pending lookup answered at once, and a client that gets the entry of one that has gone gets no
/// answer to the lookups of that one. Both are looked at on the ring itself.
#[test]
fn a_pending_lookup_is_answered_to_its_own_session_and_attachment_or_not_at_all() {
    let mut scene = scene("own");
    let keys = chain(1, 4);
    let mut raw = RawClient::attach(&scene.name, Role::Scheduler);
    for (session, end) in
        [(1, Request::EndSession { session: 1 }), (2, Request::Release { session: 2, admission: 7, keep: 0 })]
    {
        let lookup = raw.lookup_request(session, 7, 0, &keys);
        let lookup = raw.send(lookup);
        let end = raw.send(end);
        let mut answers = Vec::new();
        eventually("both are answered", || {
            answers.extend(raw.poll());
            answers.len() == 2
        });
        assert_eq!(answers.iter().map(|answer| answer.operation).collect::<Vec<_>>(), [lookup, end]);
        assert_eq!(
            (answers[0].status, answers[0].results),
            (Status::Ok, [0; 4]),
            "nothing was found, nothing pinned"
        );
    }
    // The end of another admission does not end this one.
    let lookup = raw.lookup_request(3, 7, 0, &keys);
    raw.send(lookup);
    let other = raw.call(Request::Release { session: 3, admission: 8, keep: 0 });
    assert_eq!(other.status, Status::Ok);
    let entry = raw.entry;
    drop(raw);
    let mut heir = loop {
        let heir = RawClient::attach(&scene.name, Role::Scheduler);
        if heir.entry == entry {
            break heir;
        }
    };
    assert_eq!(scene.worker.store(round(2), &keys, 0).stored, 2);
    scene.tier.set_done(true);
    assert_eq!(heir.call(Request::Noop).status, Status::Ok);
    assert_eq!(heir.poll(), None, "an answer to somebody else");
    assert_eq!(stat(&scene.name, "leases"), 0);
    drop(heir);
    ends_clean(scene);
}

/// More pending lookups than the engine keeps: the rest is answered with what is there.
#[test]
fn more_pending_lookups_than_there_is_room_for() {
    let scene = scene("crowd");
    let keys = chain(1, 4);
    let mut schedulers: Vec<SchedulerSide> = (0..3).map(|_| scheduler(&scene, false, 5)).collect();
    let mut open = Vec::new();
    for number in 0..200 {
        for (index, scheduler) in schedulers.iter_mut().enumerate() {
            let request = format!("{index} {number}");
            scheduler.api().submit_lookup(&request, 0, &keys[2..]).unwrap();
            open.push((index, request));
        }
    }
    becomes("lookups that the tier was asked for", 600, || scene.tier.begun());
    let answered = |schedulers: &mut Vec<SchedulerSide>| {
        open.iter().filter(|(index, request)| schedulers[*index].check(request).is_some()).count()
    };
    eventually("those without room are answered", || answered(&mut schedulers) == 600 - 256);
    scene.tier.set_done(true);
    eventually("all are answered", || answered(&mut schedulers) == 600);
    for (index, request) in &open {
        assert_eq!(schedulers[*index].check(request).unwrap().chunks, 0);
        schedulers[*index].api().end_session(request);
    }
    drop(schedulers);
    ends_clean(scene);
}

/// More lookups than a client may have under way stay pending: the engine has not answered them.
#[test]
fn a_full_table_of_our_own_is_no_answer() {
    let scene = scene("full");
    let mut scheduler = scheduler(&scene, false, 5);
    let keys = chain(1, 4);
    let requests: Vec<String> = (0..400).map(|number| format!("r{number}")).collect();
    for request in &requests {
        scheduler.api().submit_lookup(request, 0, &keys).unwrap();
    }
    becomes("lookups that the tier was asked for", 256, || scene.tier.begun());
    let client = scheduler.client().clone();
    let options = SchedulerOptions::new(SchedulerSpec::new(&scene.name).fingerprint());
    let mut polling = PollingSchedulerAdapter::new(&client, options);
    assert_eq!(polling.lookup("definite", 0, &keys).unwrap().chunks, 0);
    let stats = polling.lookup_stats();
    assert_eq!((stats.timed_out, stats.refused), (1, 0), "nobody has refused it: there was no time");
    drop(polling);
    assert!(
        requests.iter().all(|request| scheduler.check(request).is_none()),
        "what was not asked is pending"
    );
    scene.tier.set_done(true);
    eventually("all are answered", || requests.iter().all(|request| scheduler.check(request).is_some()));
    for request in &requests {
        assert_eq!(scheduler.check(request).unwrap().chunks, 2, "{request}");
        scheduler.api().end_session(request);
    }
    drop((scheduler, client));
    ends_clean(scene);
}
