//! The Rust side of the Python package `kvring`: `adapter/python/kvring/_native.pyi` says what it offers.
//!
//! Rules of this crate: no thread waits while it is attached to the interpreter (except that a lookup may spin), no
//! thread waits for the interpreter while it holds a lock, and no panic reaches Python.

mod errors;
mod group;
mod handles;
mod held;
mod keys;
mod logs;
mod options;
mod planes;
mod records;
mod scheduler;
mod waiting;
mod worker;

use kvring_adapter::{AttachError, EngineView, Health};
use kvring_shm_abi::byte_size::ByteSize;
use kvring_shm_abi::segment::EngineName;
use pyo3::prelude::*;

/// The bytes of a size as `kvring serve --arena` takes it.
#[pyfunction]
fn byte_size(py: Python<'_>, text: &str) -> PyResult<u64> {
    errors::guarded(py, || {
        text.parse().map(|ByteSize(bytes)| bytes).map_err(|error| errors::config(py, error))
    })
}

/// Checks a name as `kvring serve --name` takes it, and returns it unchanged.
#[pyfunction]
fn engine_name(py: Python<'_>, name: &str) -> PyResult<String> {
    errors::guarded(py, || {
        EngineName::new(name).map(|name| name.to_string()).map_err(|error| errors::config(py, error))
    })
}

/// The state of the engine of this name as others see it: `absent`, `dead`, `stopped` (asked to, with `--keep`),
/// `recovering`, `serving`, ….
#[pyfunction]
#[pyo3(signature = (name = "default"))]
fn engine_state(py: Python<'_>, name: &str) -> PyResult<String> {
    errors::guarded(py, || {
        let name = EngineName::new(name).map_err(|error| errors::config(py, error))?;
        let state = py.detach(|| EngineView::open(&name).and_then(|view| view.serving(&name)));
        Ok(match state {
            Ok(_) => "serving".to_owned(),
            Err(AttachError::Stopped(_)) => "stopped".to_owned(),
            Err(error) => match error.health() {
                // The segments are only half created.
                Health::Attaching => Health::Recovering.to_string(),
                health => health.to_string(),
            },
        })
    })
}

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("SKIP", kvring_adapter::SKIP)?;
    module.add("KEY_BYTES", keys::KEY_BYTES)?;
    module.add("KEYS_MAX", kvring_adapter::KEYS_MAX)?;
    errors::add_to(module)?;
    module.add_function(wrap_pyfunction!(byte_size, module)?)?;
    module.add_function(wrap_pyfunction!(engine_name, module)?)?;
    module.add_function(wrap_pyfunction!(engine_state, module)?)?;
    module.add_function(wrap_pyfunction!(logs::next_logs, module)?)?;
    module.add_function(wrap_pyfunction!(logs::close_logs, module)?)?;
    module.add_function(wrap_pyfunction!(logs::set_log_level, module)?)?;
    module.add_class::<scheduler::Hit>()?;
    module.add_class::<scheduler::SchedulerAdapter>()?;
    module.add_class::<scheduler::PollingSchedulerAdapter>()?;
    module.add_class::<group::KvGroup>()?;
    module.add_class::<worker::Finished>()?;
    module.add_function(wrap_pyfunction!(options::client_defaults, module)?)?;
    module.add_class::<worker::WorkerAdapter>()?;
    Ok(())
}
