//! Coming back to another engine, where something happens in the middle of it, or comes to nothing the first time.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_adapter::Round;
use kvring_gpu_kernels::{CopyBackend, CopyBatch, CopyDone, CopyError, Transfer};
use kvring_shm_abi::engine_segment::{EngineSegment, NAMESPACES_MAX};
use kvring_shm_abi::failpoint::Place;
use kvring_shm_abi::lobby::Role;
use kvring_shm_abi::message::{ANY_NAMESPACE, Request, SlotOutcome, Status};
use kvring_shm_abi::segment::{Access, EngineName, SegmentFile};
use kvring_shm_abi::sync::Ordering;
use kvring_tests::crash::FAIL_POINT;
use kvring_tests::engine::{EngineProcess, all_stopped, overrides, unique_name};
use kvring_tests::held::HeldBackend;
use kvring_tests::kv::chain;
use kvring_tests::peer::Peer;
use kvring_tests::proto::{ClientSpec, SchedulerSpec, WorkerSpec, all_loaded, all_stored};
use kvring_tests::raw::RawClient;
use kvring_tests::scheduler::SchedulerSide;
use kvring_tests::wait::{LIMIT, eventually};
use kvring_tests::worker::WorkerSide;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

fn round(number: u32) -> Round {
    Round { source: 1, number }
}

fn impatient(engine: &str) -> ClientSpec {
    ClientSpec { operation_ms: 300, ..ClientSpec::new(engine) }
}

/// A lease that ends between two attempts to declare to the same engine.
#[test]
fn a_lease_that_ends_between_two_attempts_to_declare_does_not_stay() {
    let mut engine = EngineProcess::start("rj-lease", 16);
    let mut worker = WorkerSide::start(&WorkerSpec::new(&engine.name)).unwrap();
    let spec = SchedulerSpec { client: impatient(&engine.name), ..SchedulerSpec::new(&engine.name) };
    let mut scheduler = SchedulerSide::start(&spec);
    scheduler.client().wait_ready(LIMIT).unwrap();
    let keys = chain(1, 8);
    assert_eq!(worker.store("r", round(0), None, &keys, 7), all_stored(8));
    for request in ["a", "b"] {
        assert_eq!(scheduler.lookup(request, 0, &keys).unwrap().chunks, 8);
    }
    engine.kill();
    engine.restart_with(&[(FAIL_POINT, &format!("{}:2:stop", Place::DeclareLease))]).unwrap();
    engine.has_stopped();
    for request in ["a", "b"] {
        scheduler.api().end_session(request);
    }
    // The attempt fails at its deadline, and further ones.
    std::thread::sleep(Duration::from_millis(1500));
    engine.resume();
    scheduler.client().wait_ready(LIMIT).unwrap();
    worker.wait_ready(LIMIT).unwrap();
    engine.beats(50);
    assert_eq!((engine.stat("leases"), engine.stat("pins")), (0, 0), "every session has ended");
}

/// Who has not come back yet is not gone: neither its namespace is forgotten nor what it has leased cleared.
#[test]
fn what_awaited_clients_may_hold_is_neither_forgotten_nor_cleared() {
    let mut engine = EngineProcess::configured("rj-awaited", 16, &json!({ "reattach_grace_ms": 600_000 }));
    let mut holder = Peer::worker(&WorkerSpec::new(&engine.name));
    holder.add_scheduler(&SchedulerSpec::new(&engine.name));
    holder.ready();
    let keys = chain(1, 4);
    assert_eq!(holder.store(round(1), &keys, 1), all_stored(4));
    assert_eq!(holder.lookup("r", 0, &keys).chunks, 4);
    let mut raw = RawClient::attach(&engine.name, Role::Worker);
    // Enough of them that one goes with each registration; each is younger than the holder's.
    for model in 0..NAMESPACES_MAX as u64 - 7 {
        let namespace = raw.register(1000 + model, 1, 0, 4096);
        let slots = raw.reserve(namespace, 0, raw_round(1), &chain(9, 1));
        assert_eq!(raw.finish(&slots, true), [SlotOutcome::Done]);
    }
    drop(raw);
    let namespaces = engine.stat("namespaces");
    let chunks = engine.stat("chunks_visible");
    holder.stop();
    engine.kill();
    engine.restart();
    let mut raw = RawClient::attach(&engine.name, Role::Worker);
    let mut other = RawClient::attach(&engine.name, Role::Scheduler);
    raw.register(5000, 1, 0, 4096);
    let clear = Request::Clear { namespace: ANY_NAMESPACE };
    assert_eq!(other.call(clear).status, Status::Busy);
    engine.beats(50);
    assert_eq!((engine.stat("namespaces"), engine.stat("chunks_visible")), (namespaces + 1, chunks));
    holder.resume();
    engine.stat_becomes("clients_awaited", 0);
    engine.stat_becomes("leases", 1);
    // Now it is known what is held, and everything else goes.
    assert_eq!(other.call(clear).status, Status::Ok);
    assert_eq!(engine.stat("chunks_visible"), 4);
    assert_eq!(holder.store(round(2), &keys, 1).skipped, 4);
    raw.register(5001, 1, 0, 4096);
    engine.stat_becomes("namespaces", namespaces + 1);
}

fn raw_round(number: u32) -> kvring_shm_abi::message::Round {
    kvring_shm_abi::message::Round { source: 1, number }
}

/// A copy that stands still, and then fails.
#[derive(Default)]
struct Failing {
    go: Mutex<bool>,
    changed: Condvar,
    begun: Mutex<usize>,
}
struct FailingTransfer(Arc<Failing>, #[allow(dead_code)] CopyBatch);
struct FailingBackend(Arc<Failing>);
impl CopyBackend for FailingBackend {
    kvring_gpu_kernels::copies_host_memory!();

    fn submit(&self, batch: CopyBatch) -> Result<Box<dyn Transfer>, CopyError> {
        *self.0.begun.lock().unwrap() += 1;
        Ok(Box::new(FailingTransfer(self.0.clone(), batch)))
    }
    fn name(&self) -> &'static str {
        "failing"
    }
}
impl Transfer for FailingTransfer {
    fn poll(&mut self) -> bool {
        false
    }
    fn wait(self: Box<Self>) -> Result<CopyDone, CopyError> {
        let _go = self.0.changed.wait_while(self.0.go.lock().unwrap(), |go| !*go).unwrap();
        Err(CopyError::ThreadFailed)
    }
}

/// A batch that is given up between two attempts to declare to the same engine.
#[test]
fn slots_that_are_given_up_between_two_attempts_to_declare_do_not_stay() {
    let mut engine = EngineProcess::start("rj-slots", 16);
    let failing = Arc::new(Failing::default());
    let spec = WorkerSpec { client: impatient(&engine.name), ..WorkerSpec::new(&engine.name) };
    let mut worker = WorkerSide::copying_with(&spec, Arc::new(FailingBackend(failing.clone()))).unwrap();
    worker.wait_ready(LIMIT).unwrap();
    let job = worker.submit_store("r", round(1), None, &chain(1, 8), 1).unwrap();
    eventually("a copy runs", || *failing.begun.lock().unwrap() == 1);
    engine.kill();
    engine.restart_with(&[(FAIL_POINT, &format!("{}:1:stop", Place::DeclareEnd))]).unwrap();
    engine.has_stopped();
    // While the first attempt waits for its end.
    *failing.go.lock().unwrap() = true;
    failing.changed.notify_all();
    assert_eq!(worker.finished_store(job).dropped, 8);
    std::thread::sleep(Duration::from_millis(1500));
    engine.resume();
    worker.wait_ready(LIMIT).unwrap();
    engine.beats(50);
    assert_eq!(engine.stat("slots_writing"), 0, "nobody writes them");
}

/// A worker none of whose operations has a deadline that would end a wait for an engine; but its shutdown has.
fn soon_drained(engine: &str) -> WorkerSpec {
    let client = ClientSpec { drain_ms: 100, ..ClientSpec::new(engine) };
    WorkerSpec { client, ..WorkerSpec::new(engine) }
}

/// What waits behind a commit that the engine's death left open.
#[test]
fn a_load_does_not_wait_for_a_dead_engine() {
    let mut engine = EngineProcess::start("rj-load", 16);
    let backend = HeldBackend::new();
    let mut worker = WorkerSide::copying_with(&soon_drained(&engine.name), backend.clone()).unwrap();
    let mut scheduler = SchedulerSide::start(&SchedulerSpec::new(&engine.name));
    scheduler.client().wait_ready(LIMIT).unwrap();
    let keys = chain(1, 8);
    assert_eq!(worker.store("r", round(0), None, &keys, 7), all_stored(8));
    let found = scheduler.lookup("r", 0, &keys).unwrap();
    backend.hold();
    worker.submit_store("r", round(1), None, &chain(2, 8), 7).unwrap();
    backend.holds(1);
    engine.kill();
    eventually("the worker knows", || !worker.client().is_healthy());
    backend.let_go();
    assert_eq!(worker.load("r", &found.ranks[0], 7), all_loaded(8));
}

/// The same for a shutdown.
#[test]
fn a_shutdown_does_not_wait_for_a_dead_engine() {
    let mut engine = EngineProcess::start("rj-down", 16);
    let backend = HeldBackend::new();
    let mut worker = WorkerSide::copying_with(&soon_drained(&engine.name), backend.clone()).unwrap();
    worker.wait_ready(LIMIT).unwrap();
    backend.hold();
    worker.submit_store("r", round(1), None, &chain(2, 8), 7).unwrap();
    backend.holds(1);
    engine.kill();
    eventually("the worker knows", || !worker.client().is_healthy());
    backend.let_go();
    worker.adapter().shutdown();
}

/// And for a preemption that began while the engine was well.
#[test]
fn a_preemption_does_not_wait_for_a_dead_engine() {
    let mut engine = EngineProcess::start("rj-pre", 16);
    let backend = HeldBackend::new();
    let mut worker = WorkerSide::copying_with(&soon_drained(&engine.name), backend.clone()).unwrap();
    worker.wait_ready(LIMIT).unwrap();
    backend.hold();
    worker.submit_store("r", round(1), None, &chain(2, 8), 7).unwrap();
    backend.holds(1);
    std::thread::scope(|scope| {
        let adapter = worker.adapter();
        let flush = scope.spawn(move || adapter.handle_preemptions(None));
        std::thread::sleep(Duration::from_millis(100));
        engine.kill();
        backend.let_go();
        flush.join().unwrap();
    });
}

/// Released before its answer is taken.
#[test]
fn a_lease_that_was_released_before_its_answer_was_taken_is_not_declared() {
    let mut engine = EngineProcess::start("rj-early", 16);
    let mut worker = WorkerSide::start(&WorkerSpec::new(&engine.name)).unwrap();
    let spec = SchedulerSpec { polling: false, ..SchedulerSpec::new(&engine.name) };
    let mut scheduler = SchedulerSide::start(&spec);
    scheduler.client().wait_ready(LIMIT).unwrap();
    let keys = chain(1, 8);
    assert_eq!(worker.store("r", round(0), None, &keys, 7), all_stored(8));
    scheduler.api().submit_lookup("a", 0, &keys).unwrap();
    scheduler.api().free_lookup_locks("a", 0, 0);
    eventually("answered", || scheduler.check("a").is_some());
    scheduler.api().end_session("a");
    engine.stat_becomes("leases", 0);
    engine.kill();
    engine.restart();
    scheduler.client().wait_ready(LIMIT).unwrap();
    assert_eq!(engine.stat("leases"), 0, "every session has ended");
}

/// Slabs that a successor's allocator finishes before it serves.
#[test]
fn every_slab_in_use_is_published() {
    let mut fields = overrides(&unique_name("rj-slabs"), 2);
    fields["beat_interval_ms"] = json!(2);
    let mut engine = EngineProcess::try_start(&fields).unwrap();
    let mut worker = WorkerSide::start(&WorkerSpec::new(&engine.name)).unwrap();
    worker.wait_ready(LIMIT).unwrap();
    engine.is_allocated();
    // As if it had died when one of its two slabs had memory: the allocator has the other while the tables are made.
    engine.kill();
    let segment = EngineName::new(&engine.name).unwrap().engine_segment();
    let file = SegmentFile::open(&segment, Access::ReadWrite).unwrap();
    let mapping = Arc::new(file.map(file.len().unwrap(), Access::ReadWrite).unwrap());
    let segment = EngineSegment::new(mapping, &engine.view().identity.geometry).unwrap();
    segment.info().slabs_allocated.store(1, Ordering::Relaxed);
    engine.restart_with(&[(FAIL_POINT, &format!("{}:1:pause", Place::AllocatorStarted))]).unwrap();
    engine.is_allocated();
    engine.beats(20);
    assert_eq!(engine.view().segment.info().slabs_allocated.load(Ordering::Relaxed), 2);
    worker.wait_ready(LIMIT).unwrap();
    let stored: u32 =
        (0..4).map(|at| worker.store("r", round(at), None, &chain(at.into(), 12), 7).stored).sum();
    engine.kill();
    engine.restart();
    assert_eq!(engine.stat("warm_start"), 1);
    assert!(engine.stat("chunks_recovered") > u64::from(stored) / 2, "{stored} stored");
}

/// Attached, but not yet entered, when the engine was restarted.
#[test]
fn a_client_that_was_only_just_attached_is_not_awaited_for_ever() {
    let name = unique_name("rj-await");
    let mut peer = Peer::spawn_with(&[(FAIL_POINT, &format!("{}:1:stop", Place::ClientAttached))]);
    peer.add_scheduler(&SchedulerSpec::new(&name));
    let mut fields = overrides(&name, 16);
    fields["reattach_grace_ms"] = json!(1000);
    let mut engine = EngineProcess::try_start(&fields).unwrap();
    engine.stat_becomes("attaches", 1);
    all_stopped(peer.pid());
    engine.kill();
    engine.restart();
    kill(Pid::from_raw(peer.pid() as i32), Signal::SIGCONT).unwrap();
    peer.ready();
    engine.stat_becomes("clients_awaited", 0);
}

/// A life word that somebody wiped while there was no engine: what is told while there is one, nobody tells here.
#[test]
fn a_client_whose_life_word_was_wiped_without_an_engine_attaches_again() {
    let mut engine = EngineProcess::start("rj-wiped", 8);
    let client = ClientSpec { attach_ms: 300, ..ClientSpec::new(&engine.name) };
    let scheduler = SchedulerSide::start(&SchedulerSpec { client, ..SchedulerSpec::new(&engine.name) });
    scheduler.client().wait_ready(LIMIT).unwrap();
    let lobby = engine.lobby();
    engine.kill();
    lobby.life_words[0].futex().store(0, Ordering::Release);
    engine.restart();
    let ready = scheduler.client().wait_ready(LIMIT);
    assert_eq!(ready, Ok(()));
}

/// Two starts that fail for their own configuration are no failed recoveries.
#[test]
fn two_starts_with_a_wrong_limit_do_not_cost_the_cache() {
    let mut engine = EngineProcess::start("rj-limit", 8);
    let mut worker = WorkerSide::start(&WorkerSpec::new(&engine.name)).unwrap();
    worker.wait_ready(LIMIT).unwrap();
    assert_eq!(worker.store("r", round(0), None, &chain(1, 8), 7), all_stored(8));
    engine.kill();
    let mut wrong = overrides(&engine.name, 8);
    wrong["max_pins"] = json!(1u64 << 30);
    for _ in 0..2 {
        let error = EngineProcess::try_start(&wrong).err().expect("a limit that cannot be");
        assert!(error.contains("max_pins"), "{error}");
    }
    engine.restart();
    assert_eq!((engine.stat("warm_start"), engine.stat("chunks_recovered")), (1, 8));
}

/// Tables over which an engine panics are not taken over again and again.
#[test]
fn after_a_panic_the_next_start_is_a_cold_one() {
    let mut engine = EngineProcess::start("rj-panic", 8);
    let worker = WorkerSide::start(&WorkerSpec::new(&engine.name)).unwrap();
    worker.wait_ready(LIMIT).unwrap();
    engine.kill();
    engine.restart_with(&[(FAIL_POINT, &format!("{}:1:panic", Place::AttachAnswer))]).unwrap();
    eventually("it has panicked", || engine.ended().is_some());
    engine.restart();
    assert_eq!(engine.stat("warm_start"), 0);
    worker.wait_ready(LIMIT).unwrap();
}
