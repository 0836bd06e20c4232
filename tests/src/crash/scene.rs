//! An engine of the crash suite with its clients, from its start to the end of the last of them.

use super::checks::Checks;
use crate::engine::{EngineProcess, channels, claimed_entries, stat_of};
use crate::held::HeldBackend;
use crate::isolate::segments;
use crate::proto::{ClientSpec, SchedulerSpec, WorkerSpec};
use crate::scheduler::SchedulerSide;
use crate::worker::WorkerSide;
use kvring_rig::pages::Shape;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;

/// 64 KiB a shard, 16 to a slab.
pub const SHARD: Shape = Shape { blocks: 128, ..Shape::SMALL };
/// 256 KiB a shard, 4 to a slab: another shard size needs slabs of its own.
pub const LARGE_SHARD: Shape = Shape { page_bytes: [64 << 10, 64 << 10], blocks: 16, ..Shape::LARGE };

/// The namespace of two ranks.
pub const PAIR: u64 = 1;
/// The namespace of single workers.
pub const SOLO: u64 = 2;

fn client_spec(engine: &str) -> ClientSpec {
    // Small channels.
    ClientSpec { payload_bytes: 128 << 10, ..ClientSpec::new(engine) }
}

/// A worker of the crash suite. Its registration does not hold up the test.
pub fn worker_spec(engine: &str, namespace: u64, world: u32, rank: u32, shape: Shape) -> WorkerSpec {
    let client = ClientSpec { register_ms: 100, ..client_spec(engine) };
    WorkerSpec { client, namespace, world, rank, shape, ..WorkerSpec::new(engine) }
}

/// The only rank of [`SOLO`].
pub fn solo_spec(engine: &str) -> WorkerSpec {
    worker_spec(engine, SOLO, 1, 0, SHARD)
}

/// A scheduler of the crash suite.
pub fn scheduler_spec(engine: &str, namespace: u64) -> SchedulerSpec {
    SchedulerSpec { client: client_spec(engine), namespace }
}

/// How an engine of the crash suite is configured: slabs of 1 MiB, a fast beat, and patience with clients that come back.
pub fn engine(tag: &str, slabs: u64) -> EngineProcess {
    let fields = json!({ "beat_interval_ms": 1, "reattach_grace_ms": 60_000, "client_share": 1.0 });
    EngineProcess::configured(tag, slabs, &fields)
}

/// An engine, and what has gone wrong so far.
pub struct Scene {
    pub checks: Checks,
    pub engine: EngineProcess,
}

impl Scene {
    pub fn new(tag: &str, slabs: u64) -> Scene {
        Scene { checks: Checks::new(), engine: engine(tag, slabs) }
    }

    /// A worker that is attached and registered.
    pub fn worker(&mut self, namespace: u64, world: u32, rank: u32) -> WorkerSide {
        let spec = worker_spec(&self.engine.name, namespace, world, rank, SHARD);
        let worker = WorkerSide::start(&spec).expect("a worker");
        self.checks.is_ready(&worker);
        worker
    }

    /// The same, and the backend that holds its copies.
    pub fn held_worker(&mut self, spec: &WorkerSpec) -> (WorkerSide, Arc<HeldBackend>) {
        let backend = HeldBackend::new();
        let worker = WorkerSide::copying_with(spec, backend.clone()).expect("a worker");
        self.checks.is_ready(&worker);
        (worker, backend)
    }

    /// A scheduler that is attached.
    pub fn scheduler(&mut self, namespace: u64) -> SchedulerSide {
        let scheduler = SchedulerSide::start(&scheduler_spec(&self.engine.name, namespace));
        self.checks.is_attached(&scheduler);
        scheduler
    }

    /// These clients, which are the last, go. Nothing is left. Returns what has gone wrong.
    pub fn ends_without<T>(mut self, clients: T) -> Vec<String> {
        drop(clients);
        self.checks.is_gone(&mut self.engine);
        self.checks.finish()
    }
}

impl Checks {
    /// Waits until a worker is attached and registered.
    pub fn is_ready(&mut self, worker: &WorkerSide) {
        let ready = || worker.client().wait_ready(Duration::from_millis(5)).is_ok();
        self.becomes("a worker that is ready", true, ready);
    }

    /// Waits until a scheduler is attached.
    pub fn is_attached(&mut self, scheduler: &SchedulerSide) {
        self.becomes("a scheduler that is attached", true, || scheduler.client().is_healthy());
    }

    /// Nothing of any client is left but of `clients` that are attached, with `leases` leases and `writing` slots that they
    /// write: no orphan, no channel, no entry. The engine has found nothing wrong with itself. With `forming`, there may be
    /// rounds that wait for another one to replace them.
    pub fn is_settled(
        &mut self,
        engine: &EngineProcess,
        clients: u64,
        leases: u64,
        writing: u64,
        forming: bool,
    ) {
        let view = engine.view();
        let all = ["leases", "slots_writing", "slots_orphaned", "clients", "breaches", "check_failures"];
        let expected = [leases, writing, 0, clients, 0, 0];
        self.becomes(format!("{all:?}"), expected, || all.map(|name| stat_of(&view, name)));
        if !forming {
            self.becomes("chunks that form for nobody", 0, || stat_of(&view, "chunks_forming"));
        }
        let lobby = engine.lobby();
        self.becomes("claimed entries", clients, || claimed_entries(&lobby) as u64);
        self.becomes("channels with a name", Vec::<String>::new(), || channels(&engine.name));
    }

    /// The engine is asked to stop, after its last client has gone: nothing is left.
    pub fn is_gone(&mut self, engine: &mut EngineProcess) {
        self.is_settled(engine, 0, 0, 0, false);
        // It checks itself while it is idle: twenty ticks are 1280 steps.
        engine.beats(20);
        self.same("failed self-checks", 0, stat_of(&engine.view(), "check_failures"));
        self.same("the engine's exit", Some(0), engine.terminate());
        self.same("left in /dev/shm", Vec::new(), segments(&engine.name).into_iter().collect());
    }
}
