//! A copy backend whose copies stand still or go wrong when a test says so.

use crate::wait::eventually;
use crate::worker::WorkerSide;
use kvring_adapter::{JobId, Key, Round};
use kvring_gpu_kernels::{CopyBackend, CopyBatch, CopyDone, CopyError, CpuBackend, GpuError, Transfer};
use std::sync::{Arc, Condvar, Mutex};

/// How a copy goes wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Fault {
    #[default]
    None,
    RefuseToStart,
    PanicAtStart,
    FailWhileCopying,
    PanicWhileCopying,
    /// A device may still be copying.
    Unended,
}

#[derive(Default)]
struct State {
    hold: bool,
    held: usize,
    fault: Fault,
}

#[derive(Default)]
struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

/// Copies as the CPU backend does, but a copy that begins after [`HeldBackend::hold`] ends only after
/// [`HeldBackend::let_go`]: its bytes are moved then.
pub struct HeldBackend {
    inner: Arc<CpuBackend>,
    gate: Arc<Gate>,
}

impl HeldBackend {
    /// Nothing is held yet.
    pub fn new() -> Arc<HeldBackend> {
        Arc::new(HeldBackend { inner: Arc::new(CpuBackend::new(1)), gate: Arc::default() })
    }

    /// Copies stand still from now on.
    pub fn hold(&self) {
        self.gate.state.lock().unwrap().hold = true;
    }

    /// Waits until this many copies stand still.
    pub fn holds(&self, copies: usize) {
        eventually("copies are under way", || self.gate.state.lock().unwrap().held == copies);
    }

    /// Begins a store of this worker, which copies with this backend, and waits until its copy stands still.
    pub fn hold_a_store(&self, worker: &mut WorkerSide, round: Round, keys: &[Key], version: u64) -> JobId {
        self.hold();
        let job = worker.submit_store(round, keys, version).expect("a good job");
        self.holds(1);
        job
    }

    /// Copies go on, those that stand still and further ones.
    pub fn let_go(&self) {
        self.gate.state.lock().unwrap().hold = false;
        self.gate.changed.notify_all();
    }

    /// From now on copies go wrong in this way, also those that stand still.
    pub fn set(&self, fault: Fault) {
        self.gate.state.lock().unwrap().fault = fault;
    }
}

impl CopyBackend for HeldBackend {
    kvring_gpu_kernels::copies_host_memory!();

    fn submit(&self, batch: CopyBatch) -> Result<Box<dyn Transfer>, CopyError> {
        let fault = self.gate.state.lock().unwrap().fault;
        assert_ne!(fault, Fault::PanicAtStart, "a fault that was asked for");
        if fault == Fault::RefuseToStart {
            return Err(CopyError::ShutDown);
        }
        Ok(Box::new(HeldTransfer { batch: Some(batch), inner: self.inner.clone(), gate: self.gate.clone() }))
    }

    fn name(&self) -> &'static str {
        "held"
    }
}

struct HeldTransfer {
    batch: Option<CopyBatch>,
    inner: Arc<CpuBackend>,
    gate: Arc<Gate>,
}

impl HeldTransfer {
    fn copy(&mut self) -> Result<CopyDone, CopyError> {
        let Some(batch) = self.batch.take() else { return Ok(CopyDone::default()) };
        let mut state = self.gate.state.lock().unwrap();
        state.held += 1;
        let mut state = self.gate.changed.wait_while(state, |state| state.hold).unwrap();
        state.held -= 1;
        let fault = state.fault;
        drop(state);
        let done = self.inner.submit(batch)?.wait()?;
        assert_ne!(fault, Fault::PanicWhileCopying, "a fault that was asked for");
        match fault {
            Fault::FailWhileCopying => Err(CopyError::ThreadFailed),
            Fault::Unended => Err(CopyError::Unended(GpuError::NoDriver)),
            _ => Ok(done),
        }
    }
}

impl Transfer for HeldTransfer {
    fn poll(&mut self) -> bool {
        false
    }

    fn wait(mut self: Box<Self>) -> Result<CopyDone, CopyError> {
        self.copy()
    }
}

impl Drop for HeldTransfer {
    fn drop(&mut self) {
        // A copy is never abandoned half-way.
        let _ = self.copy();
    }
}
