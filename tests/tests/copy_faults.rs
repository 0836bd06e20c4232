//! A backend that fails, before and during a copy, with errors and with panics: every job is reported once, and no slot
//! stays reserved for a client that lives on.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_adapter::{Finished, LoadChunk};
use kvring_gpu_kernels::{
    ArenaMapping, ComputeStream, CopyBackend, CopyBatch, CopyError, CpuBackend, Fence, GpuError, MappedArena,
    PagedKv, Transfer,
};
use kvring_tests::{
    EngineProcess, Fault, LIMIT, WorkerSide, WorkerSpec, all_dropped, all_failed, all_loaded, all_stored,
    chain, round,
};
use std::sync::Arc;

#[test]
fn a_failing_backend_costs_jobs_and_nothing_else() {
    let engine = EngineProcess::start("faults", 16);
    let (mut worker, backend) = engine.held_worker();
    let mut scheduler = engine.scheduler();
    let there = chain(1, 8);
    assert_eq!(worker.store(round(1), &there, 0), all_stored(8));
    let faults =
        [Fault::RefuseToStart, Fault::PanicAtStart, Fault::FailWhileCopying, Fault::PanicWhileCopying];
    for (number, fault) in (2..).zip(faults) {
        backend.set(fault);
        let keys = chain(u64::from(number), 8);
        let stored = worker.store(round(number), &keys, 0);
        assert_eq!(stored, all_dropped(8), "{fault:?}");
        // The client lives, and has nothing reserved any more.
        engine.stat_becomes("slots_writing", 0);
        let found = scheduler.lookup("there", number, &there);
        assert_eq!(found.chunks, 8);
        let loaded = worker.load(&found.handles, 0);
        assert_eq!(loaded, all_failed(8), "{fault:?}");
        backend.set(Fault::None);
        assert_eq!(worker.load(&found.handles, 0), all_loaded(8), "after {fault:?}");
        assert_eq!(worker.store(round(number + 100), &keys, 0), all_stored(8), "after {fault:?}");
    }
    engine.settles_without((worker, scheduler));
}

/// A device may still write into the slots of a copy that has not ended: no other client gets them while this one is there,
/// also after a restart.
#[test]
fn slots_of_a_copy_that_may_still_run_are_given_to_nobody() {
    let mut engine = EngineProcess::start("unended", 16);
    let (mut worker, backend) = engine.held_worker();
    backend.set(Fault::Unended);
    assert_eq!(worker.store(round(1), &chain(1, 8), 0), all_dropped(8));
    backend.set(Fault::None);
    assert_eq!(worker.store(round(2), &chain(2, 8), 0), all_stored(8));
    engine.stat_becomes("slots_writing", 8);
    engine.kill_and_restart();
    worker.ready();
    engine.stat_becomes("slots_writing", 8);
    engine.settles_without(worker);
}

/// A device may still write into the blocks of a load. If they were reported as failed, vLLM would compute them again
/// meanwhile; if they were reported as loaded, it would believe them. So the load is not reported, and `lost` says why.
#[test]
fn a_load_that_may_still_write_is_reported_as_nothing() {
    let engine = EngineProcess::start("lost", 16);
    let (mut worker, backend) = engine.held_worker();
    let mut scheduler = engine.scheduler();
    let keys = worker.stores(round(1), chain(1, 8), 0);
    let found = scheduler.lookup("r", 0, &keys);
    assert_eq!(worker.adapter().lost(), None);
    backend.set(Fault::Unended);
    let chunks = found.handles.iter().zip(0..).map(|(handle, chunk)| LoadChunk {
        chunk: handle.chunk(),
        blocks: (0..4).map(|block| 4 * chunk + block).collect(),
    });
    let job = worker.adapter().submit_load("r", chunks.collect(), None).unwrap();
    // A wait for it ends at once, because no report will come.
    assert!(!worker.adapter().wait_job(job, LIMIT));
    assert_eq!(worker.adapter().lost(), Some(CopyError::Unended(GpuError::NoDriver)));
    backend.set(Fault::None);
    let next = worker.store(round(2), &chain(2, 4), 0);
    assert_eq!(next, all_stored(4), "the mover goes on");
    assert_eq!(worker.adapter().get_finished(), Finished::default());
    assert_eq!(worker.adapter().get_block_ids_with_load_errors(), [] as [u32; 0]);
    // Nor does a shutdown wait for it.
    engine.settles_without((worker, scheduler));
}

/// Panics when it is to map the arena.
struct NoArena(CpuBackend);

impl CopyBackend for NoArena {
    fn prepare(&self, paged: &Arc<PagedKv>) -> Result<(), CopyError> {
        self.0.prepare(paged)
    }

    fn map_arena(&self, _: ArenaMapping) -> Arc<dyn MappedArena> {
        panic!("a fault that was asked for")
    }

    fn writes_by_device(&self) -> bool {
        true
    }

    fn fence(&self, stream: ComputeStream) -> Result<Fence, CopyError> {
        self.0.fence(stream)
    }

    fn submit(&self, batch: CopyBatch) -> Result<Box<dyn Transfer>, CopyError> {
        self.0.submit(batch)
    }

    fn name(&self) -> &'static str {
        "no arena"
    }
}

#[test]
fn a_backend_that_fails_at_the_arena_costs_jobs_and_not_their_reports() {
    let engine = EngineProcess::start("no-arena", 16);
    let backend = Arc::new(NoArena(CpuBackend::new(2)));
    let mut worker = WorkerSide::copying_with(&WorkerSpec::new(&engine.name), backend).unwrap();
    for number in 1..4 {
        let keys = chain(u64::from(number), 8);
        let stored = worker.store(round(number), &keys, 0);
        assert_eq!(stored, all_dropped(8));
        engine.stat_becomes("slots_writing", 0);
    }
    engine.settles_without(worker);
}
