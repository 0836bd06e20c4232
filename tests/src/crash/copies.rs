//! Scenarios in which a copy is under way when its slots change hands: each goes wrong where its rule is broken.

use super::FAIL_POINT;
use super::checks::Checks;
use super::scene::{SHARD, SOLO, Scene, scheduler_spec, solo_spec, worker_spec};
use crate::kv::chain;
use crate::proto::{Stored, all_failed, all_loaded, all_stored, round};
use crate::scheduler::SchedulerSide;
use crate::worker::WorkerSide;
use kvring_rig::pages::Shape;
use kvring_shm_abi::failpoint::Place;

/// The namespace of the filler.
const FILLER: u64 = 3;
/// Chunks that the filler stores at once.
const AT_ONCE: usize = 16;

/// A worker of a namespace of its own, and its scheduler: they take all slots there are, and look at what they stored.
struct Filler {
    worker: WorkerSide,
    scheduler: SchedulerSide,
    stored: u32,
}

impl Filler {
    fn start(scene: &mut Scene) -> Filler {
        let engine = &scene.engine.name;
        let worker = WorkerSide::start(&worker_spec(engine, FILLER, 1, 0, SHARD)).expect("a worker");
        let scheduler = SchedulerSide::start(&scheduler_spec(engine, FILLER));
        let filler = Filler { worker, scheduler, stored: 0 };
        filler.is_ready(&mut scene.checks);
        filler
    }

    /// Waits until its worker is registered and its scheduler is attached, also after a restart: a scheduler that is not
    /// back yet finds nothing, whatever the worker has stored.
    fn is_ready(&self, checks: &mut Checks) {
        checks.is_ready(&self.worker);
        checks.is_attached(&self.scheduler);
    }

    /// Takes every slot that is free, or can be had by eviction.
    fn fills(&mut self, slots: usize) {
        for number in 0..(slots / AT_ONCE) as u32 {
            let keys = chain(300 + u64::from(number), AT_ONCE);
            self.stored += self.worker.store(round(number), &keys, 3).stored;
        }
    }

    /// Its stores that are still there are right.
    fn finds(&mut self, checks: &mut Checks, slots: usize) {
        let mut found_at_all = 0;
        for number in 0..(slots / AT_ONCE) as u32 {
            let found = self.scheduler.lookup("fill", number, &chain(300 + u64::from(number), AT_ONCE));
            let loaded = self.worker.load(&found.handles, 3);
            checks.same("wrong bytes of somebody else's", 0, loaded.wrong);
            checks.same("somebody else's loads", all_loaded(found.chunks as usize), loaded);
            found_at_all += found.chunks;
        }
        self.scheduler.api().end_session("fill");
        checks.holds(found_at_all > 0 && self.stored > 0, "the filler has not stored anything");
    }
}

/// A copy into the arena runs on while its engine dies and another one comes, and the filler takes all slots that it can
/// get. The copy may overwrite nothing of the filler's, and is committed in the end.
pub fn a_copy_into_the_arena() -> Vec<String> {
    let mut scene = Scene::new("overtaken", 2);
    let (mut worker, backend) = scene.held_worker(&solo_spec(&scene.engine.name));
    let mut filler = Filler::start(&mut scene);
    let job = backend.hold_a_store(&mut worker, round(1), &chain(1, 8), 1);
    scene.engine.kill_and_restart();
    scene.checks.is_ready(&worker);
    filler.is_ready(&mut scene.checks);
    filler.fills(32);
    backend.let_go();
    scene.checks.same("the store whose copy ran on", all_stored(8), worker.finished_store(job));
    filler.finds(&mut scene.checks, 32);
    scene.ends_without((worker, filler))
}

/// A dead engine granted slots of which its successor has not been told: nothing may be written there, although the grant
/// lies in the ring.
pub fn a_grant_that_comes_too_late() -> Vec<String> {
    /// So many chunks are reserved at once with the smallest payload area.
    const BATCH: usize = 25;
    let mut scene = Scene::new("late", 4);
    scene.engine.kill();
    // In the middle of its second answer.
    let point = format!("{}:{}:stop", Place::WritingDone, BATCH + 5);
    let status = scene.engine.restart_with(&[(FAIL_POINT, &point)]);
    scene.checks.holds(status.is_ok(), "the engine did not start");
    scene.engine.is_allocated();
    let mut spec = worker_spec(&scene.engine.name, SOLO, 1, 0, Shape::SMALL);
    spec.client.payload_bytes = 8 << 10;
    let (mut worker, backend) = scene.held_worker(&spec);
    let mut filler = Filler::start(&mut scene);
    backend.hold();
    let job = worker.submit_store(round(1), &chain(1, 2 * BATCH), 1).expect("a good job");
    scene.engine.has_stopped();
    // The mover found no second answer, and went to end its first copy.
    backend.holds(1);
    scene.engine.resume();
    scene.engine.stat_becomes("shards_reserved", 2 * BATCH as u64);
    scene.engine.beats(2);
    scene.engine.kill_and_restart();
    scene.checks.is_ready(&worker);
    filler.is_ready(&mut scene.checks);
    scene.checks.same("slots that are declared", BATCH as u64, scene.engine.stat("slots_declared"));
    filler.fills(64);
    backend.let_go();
    let expected = Stored { stored: BATCH as u32, skipped: 0, dropped: BATCH as u32 };
    scene.checks.same("the store of two batches", expected, worker.finished_store(job));
    filler.finds(&mut scene.checks, 64);
    scene.checks.same("late grants", BATCH as u64, worker.client().stats().late_grants);
    scene.ends_without((worker, filler))
}

/// The slots of a load are given to the filler while it copies: the load must fail.
pub fn a_copy_out_of_the_arena() -> Vec<String> {
    let mut scene = Scene::new("read", 2);
    let (mut worker, backend) = scene.held_worker(&solo_spec(&scene.engine.name));
    let mut scheduler = scene.scheduler(SOLO);
    let mut filler = Filler::start(&mut scene);
    scene.checks.same("a store", all_stored(8), worker.store(round(1), &chain(1, 8), 1));
    let found = scheduler.lookup("r", 0, &chain(1, 8));
    backend.hold();
    let loaded = std::thread::scope(|scope| {
        let loader = scope.spawn(|| worker.load(&found.handles, 1));
        backend.holds(1);
        scheduler.api().end_session("r");
        scene.engine.stat_becomes("leases", 0);
        scheduler.client().clear().expect("an engine that answers");
        filler.fills(32);
        backend.let_go();
        loader.join().expect("a load")
    });
    scene.checks.same("wrong bytes that were called right", 0, loaded.wrong);
    scene.checks.same("the overtaken load", all_failed(8), loaded);
    filler.finds(&mut scene.checks, 32);
    scene.ends_without((worker, scheduler, filler))
}
