//! The scheduler's adapters.

use crate::errors::{self, guarded};
use crate::handles::{pack, packed_bytes};
use crate::held::Held;
use crate::options::{self, microseconds, milliseconds};
use crate::waiting::wait_ready;
use crate::{keys, logs};
use kvring_adapter::{
    CallError, Client, ClientOptions, KEYS_MAX, Key, Lookup, LookupStats, Role, SchedulerApi,
    SchedulerOptions,
};
use kvring_shm_abi::sync::{AtomicU32, Ordering};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use std::sync::Arc;
use std::time::Duration;

/// What a lookup found: the longest visible prefix of its keys, pinned for its request and admission.
#[pyclass(frozen, module = "kvring._native")]
pub(crate) struct Hit(kvring_adapter::Hit);

#[pymethods]
impl Hit {
    /// The number of chunks found, from the first key on; 0 also if the engine could not be asked.
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

/// An adapter of either kind.
struct Adapter<const POLLING: bool> {
    held: Held<kvring_adapter::Adapter<POLLING>>,
    client: Arc<Client>,
    /// How long a lookup may spin while attached to the interpreter.
    spin: Duration,
    /// Lookups since spinning last brought an answer.
    in_vain: AtomicU32,
}

/// While spinning brings no answer, because the engine sleeps or waits for our CPU, only one of so many lookups tries
/// it again.
const SPIN_EVERY: u32 = 16;

impl<const POLLING: bool> Adapter<POLLING> {
    fn new(
        py: Python<'_>,
        lookups: SchedulerOptions,
        options: ClientOptions,
        spin: Duration,
    ) -> PyResult<Self> {
        logs::begin(py)?;
        let client = py.detach(|| Client::new(Role::Scheduler, options));
        let client = client.map_err(|error| errors::config(py, error))?;
        let held = Held::new(kvring_adapter::Adapter::new(&client, lookups));
        Ok(Adapter { held, client, spin, in_vain: AtomicU32::new(0) })
    }

    fn is_healthy(&self, py: Python<'_>) -> bool {
        let now = self.held.try_now(|adapter| adapter.is_healthy());
        now.unwrap_or_else(|| py.detach(|| self.client.is_healthy()))
    }

    fn reset_cache(&self, py: Python<'_>) -> PyResult<u64> {
        self.held.wait(py, |adapter| adapter.reset_cache()).map_err(|error| match error {
            CallError::Forked => errors::kvring(py, error),
            error => errors::engine(py, error),
        })
    }

    fn lookup_stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = self.held.now(py, |adapter| adapter.lookup_stats());
        let LookupStats { answered, degraded, timed_out, refused } = stats;
        let all =
            [("answered", answered), ("degraded", degraded), ("timed_out", timed_out), ("refused", refused)];
        dict(py, all.into_iter())
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

/// Makes a class with its own methods and those that both classes have: PyO3 takes only one block of methods for each
/// class.
macro_rules! scheduler_class {
    ($(#[$doc:meta])* $name:ident, $polling:literal, { $($own:tt)* }) => {
        $(#[$doc])*
        #[pyclass(frozen, module = "kvring._native")]
        pub(crate) struct $name(Adapter<$polling>);

        #[pymethods]
        impl $name {
            $($own)*

            /// Says whether the answer of this request's admission still holds. It does not once the engine that gave it is gone:
            /// then the next lookup of the same admission asks again. Takes a few loads.
            fn is_current(&self, py: Python<'_>, request: &str) -> PyResult<bool> {
                guarded(py, || Ok(self.0.held.now(py, |adapter| adapter.is_current(request))))
            }

            /// Gives up the pins of this request's admission beyond its first `keep` chunks. To be called when all ranks have
            /// reported the load (`keep` 0), or when less is loaded than was found. An unknown request is ignored.
            #[pyo3(signature = (request, admission, keep = 0))]
            fn free_lookup_locks(&self, py: Python<'_>, request: &str, admission: u32, keep: u32) -> PyResult<()> {
                guarded(py, || {
                    self.0.held.now(py, |adapter| adapter.free_lookup_locks(request, admission, keep));
                    Ok(())
                })
            }

            /// Ends a request: its answer, its pending lookup and its pins. An unknown request is ignored.
            fn end_session(&self, py: Python<'_>, request: &str) -> PyResult<()> {
                guarded(py, || {
                    self.0.held.now(py, |adapter| adapter.end_session(request));
                    Ok(())
                })
            }

            /// Drops the chunks of this namespace that nobody has pinned, and returns their number. Waits for the engine, without
            /// the GIL, for up to `operation_timeout_ms`.
            ///
            /// Raises `EngineError` where no engine can be asked, or none answers in time.
            fn reset_cache(&self, py: Python<'_>) -> PyResult<u64> {
                guarded(py, || self.0.reset_cache(py))
            }

            /// Waits, without the GIL, until the engine is there and has accepted this client. Returns false after `timeout_ms`
            /// milliseconds, and after `shutdown`; `health` then says why. For tools and tests: vLLM goes on without an engine.
            fn wait_ready(&self, py: Python<'_>, timeout_ms: f64) -> PyResult<bool> {
                guarded(py, || wait_ready(py, &self.0.client, timeout_ms))
            }

            /// Says whether the engine is there and well. Takes a few loads.
            fn is_healthy(&self, py: Python<'_>) -> PyResult<bool> {
                guarded(py, || Ok(self.0.is_healthy(py)))
            }

            /// Returns "healthy", or what the engine is instead: "absent", "dead", "recovering", "attaching", "stalled", "unhealthy",
            /// "refused: " or "incompatible: " and the reason, or "shut down".
            fn health(&self, py: Python<'_>) -> PyResult<String> {
                guarded(py, || Ok(py.detach(|| self.0.client.health().to_string())))
            }

            /// Returns how many lookups there were by their outcome: "answered" by the engine; and answered with 0 chunks, because
            /// the engine was not well ("degraded"), did not answer in time ("timed_out"), or because no worker has registered the
            /// namespace or too much is pinned ("refused").
            fn lookup_stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
                guarded(py, || self.0.lookup_stats(py))
            }

            /// Returns counts of what this client has seen of its engine, by name: attachments, deaths, restarts, stalls, and more.
            fn client_stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
                guarded(py, || dict(py, self.0.client.stats().iter()))
            }

            /// Returns the number of requests that have looked something up and have not ended.
            fn open_sessions(&self, py: Python<'_>) -> PyResult<usize> {
                guarded(py, || Ok(self.0.held.now(py, |adapter| adapter.open_sessions())))
            }

            /// Detaches from the engine, and gives up all pins. Waits, without the GIL, for up to `drain_timeout_ms`. Lookups find
            /// nothing from then on. A second call does nothing.
            fn shutdown(&self, py: Python<'_>) -> PyResult<()> {
                guarded(py, || {
                    py.detach(|| self.0.client.shutdown());
                    Ok(())
                })
            }
        }
    };
}

scheduler_class!(
    /// A scheduler's adapter for lookups that are asked now and answered later.
    ///
    /// `fingerprint`: 32 bytes that name the namespace, the same as the workers'. `pending_timeout_ms`: how long a lookup may
    /// stay pending; after that its answer is 0 chunks. `options`: see `ClientOptions`.
    ///
    /// Raises `ConfigError`, which names the option, for a value that cannot work. An engine that is not there is no error.
    SchedulerAdapter, false, {
    #[new]
    #[pyo3(signature = (fingerprint, *, pending_timeout_ms = 30_000.0, **options))]
    fn new(
        py: Python<'_>,
        fingerprint: &[u8],
        pending_timeout_ms: f64,
        options: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        guarded(py, || {
            let lookups = SchedulerOptions {
                pending_timeout: milliseconds(py, "pending_timeout_ms", pending_timeout_ms)?,
                ..SchedulerOptions::new(options::fingerprint(py, fingerprint)?)
            };
            Adapter::new(py, lookups, options::client(py, options)?, Duration::ZERO).map(Self)
        })
    }

    /// Asks for the longest visible prefix of `keys[every - 1::every]`, once for each request and admission. `check_lookup`
    /// gives the answer.
    ///
    /// `request`: its name. `admission`: a number that grows each time that the request is preempted. `keys`: bytes of at
    /// least `KEY_BYTES` each, of which the first `KEY_BYTES` count, in chain order; at most `KEYS_MAX` of them are looked up.
    /// `every`: the number of keys for each chunk, of which the last one names it. `salt`: 16 bytes that every key is XORed
    /// with, as what was stored under them must have been.
    ///
    /// Raises `ConfigError` for a key or a salt of wrong length, and `KvringError` in a forked child.
    #[pyo3(signature = (request, admission, keys, every = 1, salt = None))]
    fn submit_lookup(
        &self,
        py: Python<'_>,
        request: &str,
        admission: u32,
        keys: &Bound<'_, PyAny>,
        every: usize,
        salt: Option<&[u8]>,
    ) -> PyResult<()> {
        guarded(py, || {
            let mut keys = keys::every(keys, every, KEYS_MAX)?;
            keys::salt(py, &mut keys, salt)?;
            let submitted = self.0.held.now(py, |adapter| adapter.submit_lookup(request, admission, &keys));
            submitted.map_err(|error| errors::kvring(py, error))
        })
    }

    /// Returns the answer of the request's lookup; `None` while it is pending. A request that was never submitted has 0
    /// chunks.
    fn check_lookup(&self, py: Python<'_>, request: &str) -> PyResult<Option<Hit>> {
        guarded(py, || {
            Ok(self.0.held.now(py, |adapter| match adapter.check_lookup(request) {
                Lookup::Pending => None,
                Lookup::Hit(hit) => Some(Hit(hit.clone())),
            }))
        })
    }
});

/// How long a lookup spins by default: as long as an engine that sleeps takes to wake up and answer. If the caller
/// slept meanwhile, it would have to be woken as well, which takes as long again. On one CPU it does not spin, because
/// the engine would wait for our CPU.
fn poll_interval() -> Duration {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    if cpus > 1 { Duration::from_micros(200) } else { Duration::ZERO }
}

impl Adapter<true> {
    fn lookup(&self, py: Python<'_>, request: &str, admission: u32, keys: &[Key]) -> PyResult<Hit> {
        // Relaxed: it is only a guess. Spinning in vain takes time from the interpreter's other threads, and on a busy
        // machine from the engine too.
        let in_vain = self.in_vain.load(Ordering::Relaxed);
        let spin = if in_vain.is_multiple_of(SPIN_EVERY) { self.spin } else { Duration::ZERO };
        let now = self
            .held
            .try_now(|adapter| adapter.try_lookup(request, admission, keys, spin).map(|hit| hit.cloned()));
        let came = matches!(now, Some(Ok(Some(_))));
        self.in_vain.store(if came { 0 } else { in_vain.wrapping_add(1) }, Ordering::Relaxed);
        let answer = match now {
            Some(Ok(Some(hit))) => Ok(hit),
            Some(Err(error)) => Err(error),
            Some(Ok(None)) | None => {
                self.held.wait(py, |adapter| adapter.lookup(request, admission, keys).cloned())
            }
        };
        answer.map(Hit).map_err(|error| errors::kvring(py, error))
    }
}

scheduler_class!(
    /// A scheduler's adapter for lookups that have a definite answer at once.
    ///
    /// `fingerprint`: 32 bytes that name the namespace, the same as the workers'. `lookup_timeout_ms`: how long a lookup may
    /// take, or all lookups of a step together (see `begin_step`); after that the answer is 0 chunks. `poll_interval_us`: how
    /// long a lookup spins, with the GIL, before it waits without it. By default 200, or 0 on a single CPU: an engine that is
    /// awake answers in a few microseconds, one that sleeps in some 80. While spinning brings no answer, most lookups wait at
    /// once. `options`: see `ClientOptions`.
    ///
    /// Raises `ConfigError`, which names the option, for a value that cannot work. An engine that is not there is no error.
    PollingSchedulerAdapter, true, {
    #[new]
    #[pyo3(signature = (fingerprint, *, lookup_timeout_ms = 5.0, poll_interval_us = None, **options))]
    fn new(
        py: Python<'_>,
        fingerprint: &[u8],
        lookup_timeout_ms: f64,
        poll_interval_us: Option<f64>,
        options: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        guarded(py, || {
            let lookups = SchedulerOptions {
                lookup_timeout: milliseconds(py, "lookup_timeout_ms", lookup_timeout_ms)?,
                ..SchedulerOptions::new(options::fingerprint(py, fingerprint)?)
            };
            let mut options = options::client(py, options)?;
            // `lookup` has spun already when it begins to wait.
            options.spin.get_or_insert(Duration::ZERO);
            let spin = match poll_interval_us {
                Some(interval) => microseconds(py, "poll_interval_us", interval)?,
                None => poll_interval(),
            };
            Adapter::new(py, lookups, options, spin).map(Self)
        })
    }

    /// Begins a scheduling step: from here on all lookups together may wait for `lookup_timeout_ms`. So an engine in trouble
    /// slows a step down by that much at most, however many requests ask. If this is never called, each lookup may wait that
    /// long.
    fn begin_step(&self, py: Python<'_>) -> PyResult<()> {
        guarded(py, || {
            self.0.held.now(py, |adapter| adapter.begin_step());
            Ok(())
        })
    }

    /// Returns the longest visible prefix of `keys[every - 1::every]`, pinned for this request and admission until
    /// `free_lookup_locks` or `end_session`. Asked again for the same admission, it gives the same answer and does no work; 0
    /// chunks after a timeout are an answer, too.
    ///
    /// `request`: its name. `admission`: a number that grows each time that the request is preempted. `keys`: bytes of at
    /// least `KEY_BYTES` each, of which the first `KEY_BYTES` count, in chain order; at most `KEYS_MAX` of them are looked up.
    /// `every`: the number of keys for each chunk, of which the last one names it. `salt`: 16 bytes that every key is XORed
    /// with, as what was stored under them must have been.
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
            let mut keys = keys::every(keys, every, KEYS_MAX)?;
            keys::salt(py, &mut keys, salt)?;
            self.0.lookup(py, request, admission, &keys)
        })
    }
});
