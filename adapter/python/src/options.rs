//! Options as Python gives them.

use crate::errors;
use kvring_adapter::ClientOptions;
use pyo3::prelude::*;
use std::time::Duration;

/// The longest duration, more than anybody waits: added to the present time it must not overflow.
const SECONDS_MAX: f64 = 1e9;

/// A duration of `value` times `unit` seconds.
fn duration(py: Python<'_>, name: &str, value: f64, unit: f64) -> PyResult<Duration> {
    if value.is_nan() || value < 0.0 {
        return Err(errors::config(py, format_args!("{name}: expected a number from 0 on, got {value}")));
    }
    Ok(Duration::from_secs_f64((value * unit).min(SECONDS_MAX)))
}

pub(crate) fn milliseconds(py: Python<'_>, name: &str, value: f64) -> PyResult<Duration> {
    duration(py, name, value, 1e-3)
}

pub(crate) fn microseconds(py: Python<'_>, name: &str, value: f64) -> PyResult<Duration> {
    duration(py, name, value, 1e-6)
}

/// The options that all adapters share.
pub(crate) struct Shared {
    pub(crate) name: String,
    pub(crate) client: Option<String>,
    pub(crate) attach_timeout_ms: f64,
    pub(crate) register_timeout_ms: f64,
    pub(crate) operation_timeout_ms: f64,
    pub(crate) drain_timeout_ms: f64,
    pub(crate) flush_timeout_ms: f64,
    pub(crate) stall_after_ms: f64,
    pub(crate) spin_us: Option<f64>,
}

impl Shared {
    pub(crate) fn options(self, py: Python<'_>) -> PyResult<ClientOptions> {
        let ms = |name, value| milliseconds(py, name, value);
        let defaults = ClientOptions::default();
        Ok(ClientOptions {
            engine: self.name,
            client: self.client.unwrap_or(defaults.client),
            attach_timeout: ms("attach_timeout_ms", self.attach_timeout_ms)?,
            register_timeout: ms("register_timeout_ms", self.register_timeout_ms)?,
            operation_timeout: ms("operation_timeout_ms", self.operation_timeout_ms)?,
            drain_timeout: ms("drain_timeout_ms", self.drain_timeout_ms)?,
            flush_timeout: ms("flush_timeout_ms", self.flush_timeout_ms)?,
            stall_after: ms("stall_after_ms", self.stall_after_ms)?,
            spin: self.spin_us.map(|spin| microseconds(py, "spin_us", spin)).transpose()?,
            ..defaults
        })
    }
}

/// The digest that names a namespace.
pub(crate) fn fingerprint(py: Python<'_>, bytes: &[u8]) -> PyResult<[u64; 4]> {
    match bytes.as_chunks::<8>() {
        ([a, b, c, d], []) => Ok([a, b, c, d].map(|word| u64::from_le_bytes(*word))),
        _ => Err(errors::config(py, format_args!("fingerprint: expected 32 bytes, got {}", bytes.len()))),
    }
}
