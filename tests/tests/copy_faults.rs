//! A backend that fails, before and during a copy, with errors and with panics: every job is reported once, and no slot
//! stays reserved for a client that lives on.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "test code: a panic is how a test fails")]

use kvring_adapter::{Finished, LoadChunk, Round};
use kvring_gpu_kernels::{
    ArenaMapping, ComputeStream, CopyBackend, CopyBatch, CopyDone, CopyError, CpuBackend, Fence, GpuError,
    MappedArena, PagedKv, Transfer,
};
use kvring_tests::engine::EngineProcess;
use kvring_tests::kv::chain;
use kvring_tests::proto::{Loaded, SchedulerSpec, Stored, WorkerSpec, all_loaded, all_stored};
use kvring_tests::scheduler::SchedulerSide;
use kvring_tests::wait::LIMIT;
use kvring_tests::worker::WorkerSide;
use std::sync::{Arc, Mutex};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    RefuseToStart,
    PanicAtStart,
    FailWhileCopying,
    PanicWhileCopying,
    Unended,
}

/// Copies as the CPU backend does, except for the faults that it is told of.
struct Faulty {
    inner: CpuBackend,
    fault: Mutex<Fault>,
}

struct FaultyTransfer {
    inner: Box<dyn Transfer>,
    fault: Fault,
}

impl Faulty {
    fn set(&self, fault: Fault) {
        *self.fault.lock().unwrap() = fault;
    }
}

impl CopyBackend for Faulty {
    kvring_gpu_kernels::copies_host_memory!();

    fn submit(&self, batch: CopyBatch) -> Result<Box<dyn Transfer>, CopyError> {
        let fault = *self.fault.lock().unwrap();
        assert_ne!(fault, Fault::PanicAtStart, "a fault that was asked for");
        if fault == Fault::RefuseToStart {
            return Err(CopyError::ShutDown);
        }
        Ok(Box::new(FaultyTransfer { inner: self.inner.submit(batch)?, fault }))
    }

    fn name(&self) -> &'static str {
        "faulty"
    }
}

impl Transfer for FaultyTransfer {
    fn poll(&mut self) -> bool {
        self.inner.poll()
    }

    fn wait(self: Box<Self>) -> Result<CopyDone, CopyError> {
        assert_ne!(self.fault, Fault::PanicWhileCopying, "a fault that was asked for");
        let done = self.inner.wait()?;
        match self.fault {
            Fault::FailWhileCopying => Err(CopyError::ThreadFailed),
            Fault::Unended => Err(CopyError::Unended(GpuError::NoDriver)),
            _ => Ok(done),
        }
    }
}

#[test]
fn a_failing_backend_costs_jobs_and_nothing_else() {
    let engine = EngineProcess::start("faults", 16);
    let backend = Arc::new(Faulty { inner: CpuBackend::new(2), fault: Mutex::new(Fault::None) });
    let mut worker = WorkerSide::copying_with(&WorkerSpec::new(&engine.name), backend.clone()).unwrap();
    let mut scheduler = SchedulerSide::start(&SchedulerSpec::new(&engine.name));
    scheduler.client().wait_ready(LIMIT).unwrap();
    let there = chain(1, 8);
    let round = |number| Round { source: 1, number };
    assert_eq!(worker.store("there", round(1), None, &there, 0), all_stored(8));
    let faults =
        [Fault::RefuseToStart, Fault::PanicAtStart, Fault::FailWhileCopying, Fault::PanicWhileCopying];
    for (number, fault) in (2..).zip(faults) {
        backend.set(fault);
        let keys = chain(u64::from(number), 8);
        let stored = worker.store("r", round(number), None, &keys, 0);
        assert_eq!(stored, Stored { dropped: 8, ..Stored::default() }, "{fault:?}");
        // The client lives, and has nothing reserved any more.
        engine.stat_becomes("slots_writing", 0);
        let found = scheduler.lookup("there", number, &there).unwrap();
        assert_eq!(found.chunks, 8);
        let loaded = worker.load("there", &found.ranks[0], 0);
        assert_eq!(loaded, Loaded { failed: 8, ..Loaded::default() }, "{fault:?}");
        backend.set(Fault::None);
        assert_eq!(worker.load("there", &found.ranks[0], 0), all_loaded(8), "after {fault:?}");
        assert_eq!(worker.store("r", round(number + 100), None, &keys, 0), all_stored(8), "after {fault:?}");
    }
    drop((worker, scheduler));
    engine.settles(0);
}

/// A device may still write there: nobody else gets the slots while this client is there, whatever becomes of the engine.
#[test]
fn slots_of_a_copy_that_may_still_run_are_given_to_nobody() {
    let mut engine = EngineProcess::start("unended", 16);
    let backend = Arc::new(Faulty { inner: CpuBackend::new(2), fault: Mutex::new(Fault::Unended) });
    let mut worker = WorkerSide::copying_with(&WorkerSpec::new(&engine.name), backend.clone()).unwrap();
    let (keys, round) = (chain(1, 8), |number| Round { source: 1, number });
    assert_eq!(worker.store("r", round(1), None, &keys, 0), Stored { dropped: 8, ..Stored::default() });
    backend.set(Fault::None);
    assert_eq!(worker.store("r", round(2), None, &chain(2, 8), 0), all_stored(8));
    engine.stat_becomes("slots_writing", 8);
    engine.kill();
    engine.restart();
    worker.wait_ready(LIMIT).unwrap();
    engine.stat_becomes("slots_writing", 8);
    drop(worker);
    engine.settles(0);
}

/// A device may still write into its blocks: reported as failed they would be computed again meanwhile, reported as loaded they would
/// be believed. So it is not reported at all, and whoever asks is told why.
#[test]
fn a_load_that_may_still_write_is_reported_as_nothing() {
    let engine = EngineProcess::start("lost", 16);
    let backend = Arc::new(Faulty { inner: CpuBackend::new(2), fault: Mutex::new(Fault::None) });
    let mut worker = WorkerSide::copying_with(&WorkerSpec::new(&engine.name), backend.clone()).unwrap();
    let mut scheduler = SchedulerSide::start(&SchedulerSpec::new(&engine.name));
    scheduler.client().wait_ready(LIMIT).unwrap();
    // More than one batch: neither those before the lost one nor those after it make a report.
    let keys = chain(1, 8);
    assert_eq!(worker.store("r", Round { source: 1, number: 1 }, None, &keys, 0), all_stored(8));
    let found = scheduler.lookup("r", 0, &keys).unwrap();
    assert_eq!(worker.adapter().lost(), None);
    backend.set(Fault::Unended);
    let chunks = found.ranks[0].iter().zip(0..).map(|(handle, chunk)| LoadChunk {
        shard: handle.shard(),
        blocks: (0..4).map(|block| 4 * chunk + block).collect(),
    });
    let job = worker.adapter().submit_load("r", chunks.collect(), None).unwrap();
    // Whoever waits for it is not kept waiting for what will not come.
    assert!(!worker.adapter().wait_job(job, LIMIT));
    assert_eq!(worker.adapter().lost(), Some(CopyError::Unended(GpuError::NoDriver)));
    backend.set(Fault::None);
    let next = worker.store("r", Round { source: 1, number: 2 }, None, &chain(2, 4), 0);
    assert_eq!(next, all_stored(4), "the mover goes on");
    assert_eq!(worker.adapter().get_finished(), Finished::default());
    assert_eq!(worker.adapter().get_block_ids_with_load_errors(), [] as [u32; 0]);
    // Nor is an end kept waiting.
    drop((worker, scheduler));
    engine.settles(0);
}

/// Makes nothing of the arena, and says so by a panic.
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
        let stored = worker.store("r", Round { source: 1, number }, None, &keys, 0);
        assert_eq!(stored, Stored { dropped: 8, ..Stored::default() });
        engine.stat_becomes("slots_writing", 0);
    }
    drop(worker);
    engine.settles(0);
}
