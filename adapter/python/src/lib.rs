//! The Rust side of the Python package `kvring`. What is public in Python has its docstring here, as a doc comment;
//! `adapter/python/tests/stub.py` copies the docstrings to `kvring/_native.pyi`, which type checkers and editors read.
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

/// Reads a size as `kvring serve --arena` takes it, such as `"8GiB"`, `"1.5G"` or `"4096"`, and returns it in bytes.
///
/// Raises `ConfigError` for a text that is no size.
#[pyfunction]
fn byte_size(py: Python<'_>, text: &str) -> PyResult<u64> {
    errors::guarded(py, || {
        text.parse().map(|ByteSize(bytes)| bytes).map_err(|error| errors::config(py, error))
    })
}

/// Checks an engine's name as `kvring serve --name` takes it, and returns it unchanged.
///
/// Raises `ConfigError` for a name that no engine can have.
#[pyfunction]
fn engine_name(py: Python<'_>, name: &str) -> PyResult<String> {
    errors::guarded(py, || {
        EngineName::new(name).map(|name| name.to_string()).map_err(|error| errors::config(py, error))
    })
}

/// Returns the state of the engine of this name as others see it, without attaching: "serving", "recovering" (it starts, and
/// may be taking over what it held before), "dead", "stopped" (it was asked to stop, and `--keep` has kept what it held),
/// "absent", "unhealthy" (it has found an error in its own tables), or "incompatible: " and the reason.
///
/// Raises `ConfigError` for a name that no engine can have.
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
    errors::add_to(module)?;
    module.add_function(wrap_pyfunction!(byte_size, module)?)?;
    module.add_function(wrap_pyfunction!(engine_name, module)?)?;
    module.add_function(wrap_pyfunction!(engine_state, module)?)?;
    module.add_function(wrap_pyfunction!(options::client_defaults, module)?)?;
    module.add_function(wrap_pyfunction!(logs::next_logs, module)?)?;
    module.add_function(wrap_pyfunction!(logs::close_logs, module)?)?;
    module.add_function(wrap_pyfunction!(logs::set_log_level, module)?)?;
    module.add_class::<scheduler::Hit>()?;
    module.add_class::<scheduler::PollingSchedulerAdapter>()?;
    module.add_class::<group::KvGroup>()?;
    module.add_class::<worker::Finished>()?;
    module.add_class::<worker::WorkerAdapter>()?;
    Ok(())
}
