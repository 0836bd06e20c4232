//! Waits that a signal may end: Ctrl-C, for instance.

use crate::options::milliseconds;
use core::ops::ControlFlow;
use kvring_adapter::{Client, Health};
use pyo3::prelude::*;
use std::time::{Duration, Instant};

/// The longest wait after which Python may look for a signal.
const SLICE: Duration = Duration::from_millis(100);

/// Calls `wait` with the longest time that it may take, until it breaks off with an answer. False after `timeout_ms`.
pub(crate) fn in_slices(
    py: Python<'_>,
    timeout_ms: f64,
    wait: impl Fn(Duration) -> PyResult<ControlFlow<bool>>,
) -> PyResult<bool> {
    let until = Instant::now() + milliseconds(py, "timeout_ms", timeout_ms)?;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if let ControlFlow::Break(answer) = wait(left.min(SLICE))? {
            return Ok(answer);
        }
        if left <= SLICE {
            return Ok(false);
        }
        py.check_signals()?;
    }
}

/// Waits until the client is attached and the engine has answered its registrations.
pub(crate) fn wait_ready(py: Python<'_>, client: &Client, timeout_ms: f64) -> PyResult<bool> {
    in_slices(py, timeout_ms, |slice| {
        Ok(match py.detach(|| client.wait_ready(slice)) {
            Ok(()) => ControlFlow::Break(true),
            // A client that has been shut down never gets ready, and does not wait.
            Err(Health::ShutDown) => ControlFlow::Break(false),
            Err(_) => ControlFlow::Continue(()),
        })
    })
}
