//! The scheduler's adapter.

use crate::errors::{self, guarded};
use crate::handles::{pack, packed_bytes};
use crate::held::Held;
use crate::keys::Every;
use crate::logs;
use crate::options;
use crate::waiting::wait_ready;
use kvring_adapter::{CallError, Client, LookupStats, Role, SchedulerOptions};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use std::sync::Arc;

/// What a lookup found: the longest visible prefix of its keys, held for its request and admission.
#[pyclass(frozen, module = "kvring._native")]
pub(crate) struct Hit(kvring_adapter::Hit);

#[pymethods]
impl Hit {
    /// The number of chunks found, from the first key on; 0 also if there is no engine whose tables may be read.
    #[getter]
    fn chunks(&self) -> u32 {
        self.0.chunks
    }

    /// Returns the chunks from `start` up to `stop` (exclusive) as opaque bytes, which the scheduler sends to the processes of
    /// all ranks for `WorkerAdapter.submit_load`: each rank finds its own part of a chunk.
    ///
    /// Raises `ConfigError` for a chunk that the hit does not have.
    fn handles<'py>(&self, py: Python<'py>, start: usize, stop: usize) -> PyResult<Bound<'py, PyBytes>> {
        guarded(py, || {
            let chunks = self.0.chunks as usize;
            if start > stop || stop > chunks {
                return Err(errors::config(
                    py,
                    format_args!("expected 0 <= start <= stop <= {chunks}, got start {start}, stop {stop}"),
                ));
            }
            let count = stop - start;
            PyBytes::new_with(py, packed_bytes(count), |bytes| {
                pack(self.0.arena_id, self.0.handles().skip(start).take(count), bytes);
                Ok(())
            })
        })
    }

    fn __repr__(&self) -> String {
        format!("Hit(chunks={})", self.0.chunks)
    }
}

/// Counts by their names.
pub(crate) fn dict<'py>(
    py: Python<'py>,
    counts: impl Iterator<Item = (&'static str, u64)>,
) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    for (name, count) in counts {
        dict.set_item(name, count)?;
    }
    Ok(dict)
}

/// A scheduler's adapter: lookups that have a definite answer at once, in microseconds. They read the engine's tables in
/// shared memory, so they wait for nobody, and go on while the engine sleeps, is stopped, dead, or recovering.
///
/// `fingerprint`: 32 bytes that name the namespace, the same as the workers'. `options`: see `ClientOptions`.
///
/// Raises `ConfigError`, which names the option, for a value that cannot work. An engine that is not there is no error.
#[pyclass(frozen, module = "kvring._native")]
pub(crate) struct PollingSchedulerAdapter {
    held: Held<kvring_adapter::PollingSchedulerAdapter>,
    client: Arc<Client>,
}

#[pymethods]
impl PollingSchedulerAdapter {
    #[new]
    #[pyo3(signature = (fingerprint, **options))]
    fn new(py: Python<'_>, fingerprint: &[u8], options: Option<&Bound<'_, PyDict>>) -> PyResult<Self> {
        guarded(py, || {
            let lookups = SchedulerOptions::new(options::fingerprint(py, fingerprint)?);
            let options = options::client(py, options)?;
            logs::begin(py)?;
            let client = py.detach(|| Client::new(Role::Scheduler, options));
            let client = client.map_err(|error| errors::config(py, error))?;
            let held = Held::new(kvring_adapter::PollingSchedulerAdapter::new(&client, lookups));
            Ok(Self { held, client })
        })
    }

    /// Returns the longest visible prefix of `keys[every - 1::every]`, held for this request and admission until
    /// `free_lookup_locks` or `end_session`. Asked again for the same admission, it gives the same answer and does no work, as
    /// long as that holds (`is_current`).
    ///
    /// `request`: its name. `admission`: a number that grows each time that the request is preempted. `keys`: bytes of at
    /// least `KEY_BYTES` each, of which the first `KEY_BYTES` count, in chain order; of a list only a few are read beyond the
    /// first miss. `every`: the number of keys for each chunk, of which the last one names it. `salt`: 16 bytes that
    /// every key is XORed with, as what was stored under them must have been.
    ///
    /// Raises `ConfigError` for a key or a salt of wrong length, and `KvringError` in a forked child.
    #[pyo3(signature = (request, admission, keys, every = 1, salt = None))]
    fn lookup(
        &self,
        py: Python<'_>,
        request: &str,
        admission: u32,
        keys: &Bound<'_, PyAny>,
        every: usize,
        salt: Option<&[u8]>,
    ) -> PyResult<Hit> {
        guarded(py, || {
            let mut keys = Every::new(keys, every, salt)?;
            let (count, is_lazy) = (keys.total(), keys.are_in_a_list());
            let read = |adapter: &mut kvring_adapter::PollingSchedulerAdapter| {
                let hit = adapter.lookup_lazily(request, admission, count, &mut keys).cloned();
                if keys.is_wrong() {
                    adapter.end_session(request);
                }
                hit
            };
            let found = if is_lazy { self.held.try_now(read) } else { None };
            let hit = match found {
                Some(hit) => {
                    keys.check()?;
                    hit
                }
                // Another thread uses the adapter, and this one waits without the interpreter and its objects; or to read the
                // keys is to run code of Python's, which may itself use the adapter.
                None => {
                    let keys = keys.all()?;
                    self.held.now(py, |adapter| adapter.lookup(request, admission, &keys).cloned())
                }
            };
            hit.map(Hit).map_err(|error| errors::kvring(py, error))
        })
    }

    /// Says whether the answer of this request's admission still holds. It does not once its arena has been replaced, or an
    /// engine has evicted some of it, because it could not wait for this client after a restart or has thrown it out: then the
    /// next lookup of the same admission looks again. Takes a few loads; after a restart, once, a load for each chunk.
    fn is_current(&self, py: Python<'_>, request: &str) -> PyResult<bool> {
        guarded(py, || Ok(self.held.now(py, |adapter| adapter.is_current(request))))
    }

    /// Gives up what this request's admission holds beyond its first `keep` chunks. To be called when all ranks have
    /// reported the load (`keep` 0), or when less is loaded than was found. An unknown request is ignored.
    #[pyo3(signature = (request, admission, keep = 0))]
    fn free_lookup_locks(&self, py: Python<'_>, request: &str, admission: u32, keep: u32) -> PyResult<()> {
        guarded(py, || {
            self.held.now(py, |adapter| adapter.free_lookup_locks(request, admission, keep));
            Ok(())
        })
    }

    /// Ends a request: its answer, and all that it holds. An unknown request is ignored.
    fn end_session(&self, py: Python<'_>, request: &str) -> PyResult<()> {
        guarded(py, || {
            self.held.now(py, |adapter| adapter.end_session(request));
            Ok(())
        })
    }

    /// Drops the chunks of this namespace that nobody holds, and returns their number. Waits for the engine, without the GIL,
    /// for up to `operation_timeout_ms`.
    ///
    /// Raises `EngineError` where no engine can be asked, or none answers in time.
    fn reset_cache(&self, py: Python<'_>) -> PyResult<u64> {
        guarded(py, || {
            self.held.wait(py, |adapter| adapter.reset_cache()).map_err(|error| match error {
                CallError::Forked => errors::kvring(py, error),
                error => errors::engine(py, error),
            })
        })
    }

    /// Waits, without the GIL, until the engine is there and has accepted this client. Returns false after `timeout_ms`
    /// milliseconds, and after `shutdown`; `health` then says why. For tools and tests: vLLM goes on without an engine.
    fn wait_ready(&self, py: Python<'_>, timeout_ms: f64) -> PyResult<bool> {
        guarded(py, || wait_ready(py, &self.client, timeout_ms))
    }

    /// Says whether the engine is there and well. Takes a few loads.
    fn is_healthy(&self, py: Python<'_>) -> PyResult<bool> {
        guarded(py, || {
            let now = self.held.try_now(|adapter| adapter.is_healthy());
            Ok(now.unwrap_or_else(|| py.detach(|| self.client.is_healthy())))
        })
    }

    /// Returns "healthy", or what the engine is instead: "absent", "dead", "recovering", "attaching", "stalled", "unhealthy",
    /// "refused: " or "incompatible: " and the reason, or "shut down".
    fn health(&self, py: Python<'_>) -> PyResult<String> {
        guarded(py, || Ok(py.detach(|| self.client.health().to_string())))
    }

    /// Returns how many lookups there were by their outcome: "answered" from the engine's tables, of these "not_serving" while
    /// the engine was stopped, dead or recovering, and "cut" because this client holds as much as it may; and answered with 0
    /// chunks, because there were no tables that may be read ("degraded"), or because not all workers have registered the
    /// namespace ("refused").
    fn lookup_stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        guarded(py, || {
            let stats = self.held.now(py, |adapter| adapter.lookup_stats());
            let LookupStats { answered, not_serving, cut, degraded, refused } = stats;
            let all = [
                ("answered", answered),
                ("not_serving", not_serving),
                ("cut", cut),
                ("degraded", degraded),
                ("refused", refused),
            ];
            dict(py, all.into_iter())
        })
    }

    /// Returns counts of what this client has seen of its engine, by name: attachments, deaths, restarts, stalls, and more.
    fn client_stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        guarded(py, || dict(py, self.client.stats().iter()))
    }

    /// Returns the number of requests that have looked something up and have not ended.
    fn open_sessions(&self, py: Python<'_>) -> PyResult<usize> {
        guarded(py, || Ok(self.held.now(py, |adapter| adapter.open_sessions())))
    }

    /// Detaches from the engine, and gives up everything that is held. Waits, without the GIL, for up to `drain_timeout_ms`.
    /// Lookups find nothing from then on. A second call does nothing.
    fn shutdown(&self, py: Python<'_>) -> PyResult<()> {
        guarded(py, || {
            py.detach(|| self.client.shutdown());
            Ok(())
        })
    }
}
