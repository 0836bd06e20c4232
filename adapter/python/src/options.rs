//! Options as Python gives them.

use crate::errors::{self, guarded};
use kvring_adapter::ClientOptions;
use pyo3::conversion::FromPyObjectOwned;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
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

/// The keyword argument `key`, as `value` gives it.
fn argument<'py, T: FromPyObjectOwned<'py>>(key: &str, value: &Bound<'py, PyAny>) -> PyResult<T> {
    value.extract::<T>().map_err(|error| {
        let error: PyErr = error.into();
        PyTypeError::new_err(format!("argument '{key}': {}", error.value(value.py())))
    })
}

/// A client's options, from the keyword arguments that all adapters take: `kvring.ClientOptions` says what they mean.
pub(crate) fn client(py: Python<'_>, given: Option<&Bound<'_, PyDict>>) -> PyResult<ClientOptions> {
    let mut options = ClientOptions::default();
    for (key, value) in given.into_iter().flatten() {
        let key: String = key.extract()?;
        match key.as_str() {
            "name" => options.engine = argument(&key, &value)?,
            "client" => options.client = argument::<Option<String>>(&key, &value)?.unwrap_or(options.client),
            "spin_us" => {
                let spin = argument::<Option<f64>>(&key, &value)?;
                options.spin = spin.map(|spin| microseconds(py, &key, spin)).transpose()?;
            }
            _ => {
                let is_asked = |name: &str| key.strip_suffix("_ms") == Some(name);
                let timeout = options.timeouts().into_iter().find(|(name, _)| is_asked(name));
                let (_, timeout) = timeout.ok_or_else(|| {
                    PyTypeError::new_err(format!("expected the options of kvring.ClientOptions, got '{key}'"))
                })?;
                *timeout = milliseconds(py, &key, argument(&key, &value)?)?;
            }
        }
    }
    Ok(options)
}

/// The options that every adapter takes, with their defaults: those of `kvring.ClientOptions`.
#[pyfunction]
pub(crate) fn client_defaults(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    guarded(py, || {
        let mut options = ClientOptions::default();
        let defaults = PyDict::new(py);
        defaults.set_item("name", &options.engine)?;
        defaults.set_item("client", py.None())?;
        for (name, timeout) in options.timeouts() {
            defaults.set_item(format!("{name}_ms"), timeout.as_secs_f64() * 1e3)?;
        }
        defaults.set_item("spin_us", py.None())?;
        Ok(defaults)
    })
}

/// The digest that names a namespace.
pub(crate) fn fingerprint(py: Python<'_>, bytes: &[u8]) -> PyResult<[u64; 4]> {
    match bytes.as_chunks::<8>() {
        ([a, b, c, d], []) => Ok([a, b, c, d].map(|word| u64::from_le_bytes(*word))),
        _ => Err(errors::config(py, format_args!("fingerprint: expected 32 bytes, got {}", bytes.len()))),
    }
}
