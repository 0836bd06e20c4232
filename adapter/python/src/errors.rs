//! The package's exceptions, and the guard that turns panics into one of them.

use pyo3::exceptions::{PyException, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple, PyType};
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};

struct Kinds {
    base: Py<PyType>,
    config: Py<PyType>,
    layout: Py<PyType>,
    register: Py<PyType>,
    engine: Py<PyType>,
    device: Py<PyType>,
}

static KINDS: PyOnceLock<Kinds> = PyOnceLock::new();

/// Makes a class by Python's `type(name, bases, …)`, because `PyErr::new_type` takes one base only.
fn make(py: Python<'_>, name: &str, doc: &str, bases: &[&Bound<'_, PyType>]) -> PyResult<Py<PyType>> {
    let content = PyDict::new(py);
    content.set_item("__module__", "kvring")?;
    content.set_item("__doc__", doc)?;
    let class = py.get_type::<PyType>().call1((name, PyTuple::new(py, bases)?, content))?;
    Ok(class.cast_into::<PyType>()?.unbind())
}

fn kinds(py: Python<'_>) -> PyResult<&Kinds> {
    KINDS.get_or_try_init(py, || {
        let base =
            make(py, "KvringError", "The base of all errors of this package.", &[&py.get_type::<PyException>()])?;
        let (kvring, value, runtime) =
            (base.bind(py), py.get_type::<PyValueError>(), py.get_type::<PyRuntimeError>());
        Ok(Kinds {
            config: make(
                py,
                "ConfigError",
                "A configuration that cannot work; the message names the option.",
                &[kvring, &value],
            )?,
            layout: make(
                py,
                "LayoutError",
                "A KV cache that cannot be described, or block ids that it does not have.",
                &[kvring, &value],
            )?,
            register: make(
                py,
                "RegisterError",
                "The registration disagrees with what the engine has been told before: expected and got are in the message.",
                &[kvring],
            )?,
            engine: make(
                py,
                "EngineError",
                "The engine did not do what only an operator asks of it: start, stop, clear.",
                &[kvring, &runtime],
            )?,
            device: make(
                py,
                "DeviceError",
                "A GPU may still write into the KV cache, and its driver does not say: nothing may be computed from it any more.",
                &[kvring, &runtime],
            )?,
            base,
        })
    })
}

pub(crate) fn add_to(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let Kinds { base, config, layout, register, engine, device } = kinds(module.py())?;
    module.add("KvringError", base)?;
    module.add("ConfigError", config)?;
    module.add("LayoutError", layout)?;
    module.add("RegisterError", register)?;
    module.add("EngineError", engine)?;
    module.add("DeviceError", device)
}

fn raised(py: Python<'_>, message: impl Display, kind: impl Fn(&Kinds) -> &Py<PyType>) -> PyErr {
    match kinds(py) {
        Ok(kinds) => PyErr::from_type(kind(kinds).bind(py).clone(), message.to_string()),
        Err(error) => error,
    }
}

pub(crate) fn kvring(py: Python<'_>, message: impl Display) -> PyErr {
    raised(py, message, |kinds| &kinds.base)
}

pub(crate) fn config(py: Python<'_>, message: impl Display) -> PyErr {
    raised(py, message, |kinds| &kinds.config)
}

pub(crate) fn layout(py: Python<'_>, message: impl Display) -> PyErr {
    raised(py, message, |kinds| &kinds.layout)
}

pub(crate) fn register(py: Python<'_>, message: impl Display) -> PyErr {
    raised(py, message, |kinds| &kinds.register)
}

pub(crate) fn engine(py: Python<'_>, message: impl Display) -> PyErr {
    raised(py, message, |kinds| &kinds.engine)
}

pub(crate) fn device(py: Python<'_>, message: impl Display) -> PyErr {
    raised(py, message, |kinds| &kinds.device)
}

/// Runs a call from Python. A panic becomes a `KvringError`: PyO3's own exception for it is not an `Exception`, and would end
/// vLLM.
pub(crate) fn guarded<T>(py: Python<'_>, call: impl FnOnce() -> PyResult<T>) -> PyResult<T> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|payload| {
        let text = payload.downcast_ref::<&str>().copied();
        let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        Err(kvring(py, format_args!("a bug in kvring: {}", text.unwrap_or("it panicked"))))
    })
}
