//! What a rule is for, where a copy is under way when its slots change hands.

use super::FAIL_POINT;
use super::cast::{SHARD, SOLO, scheduler_spec, worker_spec};
use super::checks::Checks;
use super::engines::engine;
use super::settled::is_gone;
use crate::engine::EngineProcess;
use crate::held::HeldBackend;
use crate::kv::{Shape, chain};
use crate::proto::{Loaded, Stored, all_loaded, all_stored};
use crate::scheduler::SchedulerSide;
use crate::worker::WorkerSide;
use kvring_adapter::Round;
use kvring_shm_abi::failpoint::Place;

/// The namespace of those who take every slot that they can get.
const FILLER: u64 = 3;
/// Chunks that a filler stores at once.
const AT_ONCE: usize = 16;

fn round(number: u32) -> Round {
    Round { source: 1, number }
}

/// A worker of a namespace of its own, and its scheduler: they take all slots there are, and look at what they stored.
struct Filler {
    worker: WorkerSide,
    scheduler: SchedulerSide,
    stored: u32,
}

impl Filler {
    fn start(checks: &mut Checks, engine: &EngineProcess) -> Filler {
        let worker = WorkerSide::start(&worker_spec(&engine.name, FILLER, 1, 0, SHARD)).expect("a worker");
        let scheduler = SchedulerSide::start(&scheduler_spec(&engine.name, FILLER, 1));
        let filler = Filler { worker, scheduler, stored: 0 };
        filler.is_ready(checks);
        filler
    }

    /// Waits until its worker is registered and its scheduler is attached, also after a restart: a scheduler that is not
    /// back yet finds nothing, whatever the worker has stored.
    fn is_ready(&self, checks: &mut Checks) {
        ready(checks, &self.worker);
        checks.becomes("a filler's scheduler that is attached", true, || self.scheduler.client().is_healthy());
    }

    /// Takes every slot that is free, or can be had by eviction.
    fn fills(&mut self, slots: usize) {
        for number in 0..(slots / AT_ONCE) as u32 {
            let keys = chain(300 + u64::from(number), AT_ONCE);
            self.stored += self.worker.store("fill", round(number), None, &keys, 3).stored;
        }
    }

    /// What it stored last is there, and right.
    fn finds(&mut self, checks: &mut Checks, slots: usize) {
        let mut found_at_all = 0;
        for number in 0..(slots / AT_ONCE) as u32 {
            let found = self.scheduler.lookup("fill", number, &chain(300 + u64::from(number), AT_ONCE));
            let found = found.expect("a lookup within the limits");
            let loaded = self.worker.load("fill", &found.ranks[0], 3);
            checks.same("wrong bytes of somebody else's", 0, loaded.wrong);
            checks.same("somebody else's loads", all_loaded(found.chunks as usize), loaded);
            found_at_all += found.chunks;
        }
        self.scheduler.api().end_session("fill");
        checks.holds(found_at_all > 0 && self.stored > 0, "the filler has not stored anything");
    }
}

fn ready(checks: &mut Checks, worker: &WorkerSide) {
    checks.becomes("a worker that is ready", true, || {
        worker.wait_ready(std::time::Duration::from_millis(5)).is_ok()
    });
}

/// A copy into the arena runs on while its engine dies and another one comes; somebody else takes all the slots that he
/// can get. Nothing of his may be overwritten, and the copy is committed in the end.
///
/// # Panics
/// Where something else goes wrong than what is being tested.
#[must_use]
pub fn a_copy_into_the_arena() -> Vec<String> {
    let mut checks = Checks::new();
    let mut engine = engine("overtaken", 2);
    let backend = HeldBackend::new();
    let spec = worker_spec(&engine.name, SOLO, 1, 0, SHARD);
    let mut worker = WorkerSide::copying_with(&spec, backend.clone()).expect("a worker");
    ready(&mut checks, &worker);
    let mut filler = Filler::start(&mut checks, &engine);
    backend.hold();
    let job = worker.submit_store("held", round(1), None, &chain(1, 8), 1).expect("a good job");
    backend.holds(1);
    engine.kill();
    engine.restart();
    ready(&mut checks, &worker);
    filler.is_ready(&mut checks);
    filler.fills(32);
    backend.let_go();
    checks.same("the store whose copy ran on", all_stored(8), worker.finished_store(job));
    filler.finds(&mut checks, 32);
    drop((worker, filler));
    is_gone(&mut checks, &mut engine);
    checks.finish()
}

/// Slots that a dead engine granted, and of which its successor has not been told: nothing may be written there, although
/// the grant lies in the ring.
///
/// # Panics
/// Where something else goes wrong than what is being tested.
#[must_use]
pub fn a_grant_that_comes_too_late() -> Vec<String> {
    /// What fits the smallest payload area: so many chunks are reserved at once.
    const BATCH: usize = 25;
    let mut checks = Checks::new();
    let mut engine = engine("late", 4);
    engine.kill();
    // In the middle of its second answer.
    let point = format!("{}:{}:stop", Place::WritingDone, BATCH + 5);
    let status = engine.restart_with(&[(FAIL_POINT, &point)]);
    checks.holds(status.is_ok(), "the engine did not start");
    engine.is_allocated();
    let backend = HeldBackend::new();
    let mut spec = worker_spec(&engine.name, SOLO, 1, 0, Shape::SMALL);
    spec.client.payload_bytes = 8 << 10;
    let mut worker = WorkerSide::copying_with(&spec, backend.clone()).expect("a worker");
    ready(&mut checks, &worker);
    let mut filler = Filler::start(&mut checks, &engine);
    backend.hold();
    let job = worker.submit_store("late", round(1), None, &chain(1, 2 * BATCH), 1).expect("a good job");
    engine.has_stopped();
    // The mover found no second answer, and went to end its first copy.
    backend.holds(1);
    engine.resume();
    engine.stat_becomes("shards_reserved", 2 * BATCH as u64);
    engine.beats(2);
    engine.kill();
    engine.restart();
    ready(&mut checks, &worker);
    filler.is_ready(&mut checks);
    checks.same("slots that are declared", BATCH as u64, engine.stat("slots_declared"));
    filler.fills(64);
    backend.let_go();
    let expected = Stored { stored: BATCH as u32, skipped: 0, dropped: BATCH as u32 };
    checks.same("the store of two batches", expected, worker.finished_store(job));
    filler.finds(&mut checks, 64);
    checks.same("late grants", BATCH as u64, worker.client().stats().late_grants);
    drop((worker, filler));
    is_gone(&mut checks, &mut engine);
    checks.finish()
}

/// A load whose slots are given to somebody else while it copies: it must fail.
///
/// # Panics
/// Where something else goes wrong than what is being tested.
#[must_use]
pub fn a_copy_out_of_the_arena() -> Vec<String> {
    let mut checks = Checks::new();
    let mut engine = engine("read", 2);
    let backend = HeldBackend::new();
    let spec = worker_spec(&engine.name, SOLO, 1, 0, SHARD);
    let mut worker = WorkerSide::copying_with(&spec, backend.clone()).expect("a worker");
    let mut scheduler = SchedulerSide::start(&scheduler_spec(&engine.name, SOLO, 1));
    ready(&mut checks, &worker);
    checks.becomes("a scheduler that is ready", true, || scheduler.client().is_healthy());
    let mut filler = Filler::start(&mut checks, &engine);
    checks.same("a store", all_stored(8), worker.store("r", round(1), None, &chain(1, 8), 1));
    let found = scheduler.lookup("r", 0, &chain(1, 8)).expect("a lookup within the limits");
    backend.hold();
    let loaded = std::thread::scope(|scope| {
        let loader = scope.spawn(|| worker.load("r", &found.ranks[0], 1));
        backend.holds(1);
        scheduler.api().end_session("r");
        engine.stat_becomes("leases", 0);
        scheduler.client().clear().expect("an engine that answers");
        filler.fills(32);
        backend.let_go();
        loader.join().expect("a load")
    });
    checks.same("wrong bytes that were called right", 0, loaded.wrong);
    checks.same("the overtaken load", Loaded { failed: 8, ..Loaded::default() }, loaded);
    filler.finds(&mut checks, 32);
    drop((worker, scheduler, filler));
    is_gone(&mut checks, &mut engine);
    checks.finish()
}
