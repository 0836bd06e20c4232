//! A way of copying that stands still when a test says so: to have a copy run across an engine's death.

use crate::wait::eventually;
use kvring_gpu_kernels::{CopyBackend, CopyBatch, CopyDone, CopyError, CpuBackend, Transfer};
use std::sync::{Arc, Condvar, Mutex};

#[derive(Default)]
struct State {
    hold: bool,
    held: usize,
}

struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

/// Copies as the CPU backend does, but a copy that begins while [`HeldBackend::hold`] is in force does not end before
/// [`HeldBackend::let_go`]: its bytes are moved then.
pub struct HeldBackend {
    inner: Arc<CpuBackend>,
    gate: Arc<Gate>,
}

impl HeldBackend {
    /// Nothing is held yet.
    #[must_use]
    pub fn new() -> Arc<HeldBackend> {
        let gate = Gate { state: Mutex::default(), changed: Condvar::new() };
        Arc::new(HeldBackend { inner: Arc::new(CpuBackend::new(1)), gate: Arc::new(gate) })
    }

    /// Copies stand still from now on.
    ///
    /// # Panics
    /// Never.
    pub fn hold(&self) {
        self.gate.state.lock().unwrap().hold = true;
    }

    /// Waits until this many copies stand still.
    ///
    /// # Panics
    /// When they do not come.
    pub fn holds(&self, copies: usize) {
        eventually("copies are under way", || self.gate.state.lock().unwrap().held == copies);
    }

    /// They go on, and further ones do.
    ///
    /// # Panics
    /// Never.
    pub fn let_go(&self) {
        self.gate.state.lock().unwrap().hold = false;
        self.gate.changed.notify_all();
    }
}

impl CopyBackend for HeldBackend {
    kvring_gpu_kernels::copies_host_memory!();

    fn submit(&self, batch: CopyBatch) -> Result<Box<dyn Transfer>, CopyError> {
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
        drop(state);
        self.inner.submit(batch)?.wait()
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
