//! The worker's adapter.

use crate::errors::{self, guarded};
use crate::group::KvGroup;
use crate::handles::unpack;
use crate::held::Held;
use crate::options;
use crate::scheduler::dict;
use crate::waiting::{in_slices, wait_ready};
use crate::{keys, logs};
use core::ops::ControlFlow;
use kvring_adapter::{
    Checksum, Client, ComputeStream, CopyMode, Drops, JobId, Jobs, LOST, LoadChunk, LoadFailures, Memory,
    PagedKv, RegisterError, Role, Round, StoreChunk, SubmitError, WorkerOptions,
};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::sync::Arc;
use std::time::Duration;

/// A job that has ended. `WorkerAdapter.get_finished` makes it.
#[pyclass(frozen, get_all, module = "kvring._native")]
pub(crate) struct Finished {
    /// The job's id, as `submit_store` or `submit_load` returned it.
    job: u64,
    /// The name of the request that the job was submitted for.
    request: String,
    /// True for a store, false for a load.
    is_store: bool,
    /// The number of chunks stored, or loaded and validated.
    done: u32,
    /// Of a store: the number of chunks that were there already, or are being stored by another job.
    skipped: u32,
    /// The number of chunks that a store dropped, or that could not be loaded; `why` has the reasons.
    failed: u32,
    /// The number of failed chunks by reason; only reasons that occurred. They add up to `failed`.
    why: std::collections::BTreeMap<&'static str, u32>,
    /// The bytes copied.
    bytes: u64,
    /// The time spent copying, in seconds.
    seconds: f64,
}

#[pymethods]
impl Finished {
    fn __repr__(&self) -> String {
        let Finished { job, request, is_store, done, skipped, failed, why, .. } = self;
        let is_store = if *is_store { "True" } else { "False" };
        format!(
            "Finished(job={job}, request={request:?}, is_store={is_store}, done={done}, skipped={skipped}, failed={failed}, \
             why={why:?})"
        )
    }
}

fn finished(ended: kvring_adapter::Finished) -> Vec<Finished> {
    let seconds = |ns: u64| ns as f64 / 1e9;
    let stores = ended.stores.into_iter().map(|(job, request, report)| {
        let Drops { no_space, busy, not_registered, unavailable, gone, cancelled, failed } = report.why;
        let why = [
            ("no_space", no_space),
            ("busy", busy),
            ("not_registered", not_registered),
            ("unavailable", unavailable),
            ("gone", gone),
            ("cancelled", cancelled),
            ("failed", failed),
        ];
        Finished {
            job: job.0,
            request,
            is_store: true,
            done: report.stored,
            skipped: report.skipped,
            failed: report.dropped,
            why: why.into_iter().filter(|(_, count)| *count > 0).collect(),
            bytes: report.bytes,
            seconds: seconds(report.copy_ns),
        }
    });
    let loads = ended.loads.into_iter().map(|(job, request, report)| {
        let LoadFailures { gone, other_arena, unavailable, mismatch, corrupt, cancelled, failed } =
            report.why;
        let why = [
            ("gone", gone),
            ("other_arena", other_arena),
            ("unavailable", unavailable),
            ("mismatch", mismatch),
            ("corrupt", corrupt),
            ("cancelled", cancelled),
            ("failed", failed),
        ];
        Finished {
            job: job.0,
            request,
            is_store: false,
            done: report.loaded,
            skipped: 0,
            failed: report.failed,
            why: why.into_iter().filter(|(_, count)| *count > 0).collect(),
            bytes: report.bytes,
            seconds: seconds(report.copy_ns),
        }
    });
    stores.chain(loads).collect()
}

/// The adapter, and the Python object that owns the memory that it touches.
struct Worker {
    // Dropped before `owner`: after that nothing touches the memory.
    adapter: kvring_adapter::WorkerAdapter,
    owner: Option<Py<PyAny>>,
}

impl Worker {
    fn blocks_per_chunk(&self) -> Result<usize, SubmitError> {
        self.adapter.kv_cache().map(|paged| paged.blocks_per_chunk() as usize).ok_or(SubmitError::NoKvCache)
    }
}

/// Why a job was not taken.
enum NotTaken {
    Count { chunks: usize, blocks_per_chunk: usize, got: usize },
    Submit(SubmitError),
}

impl From<SubmitError> for NotTaken {
    fn from(error: SubmitError) -> NotTaken {
        NotTaken::Submit(error)
    }
}

impl NotTaken {
    fn raised(self, py: Python<'_>) -> PyErr {
        match self {
            NotTaken::Count { chunks, blocks_per_chunk, got } => errors::layout(
                py,
                format_args!(
                    "expected {blocks_per_chunk} block ids for each of {chunks} chunks, {} in all, got {got}",
                    chunks * blocks_per_chunk
                ),
            ),
            NotTaken::Submit(error @ SubmitError::Blocks { .. }) => errors::layout(py, error),
            NotTaken::Submit(error) => errors::kvring(py, error),
        }
    }
}

/// Splits the blocks by chunk.
fn by_chunk(
    blocks: &[u32],
    chunks: usize,
    blocks_per_chunk: usize,
) -> Result<std::slice::Chunks<'_, u32>, NotTaken> {
    if blocks.len() == chunks * blocks_per_chunk {
        Ok(blocks.chunks(blocks_per_chunk))
    } else {
        Err(NotTaken::Count { chunks, blocks_per_chunk, got: blocks.len() })
    }
}

/// A worker's adapter: stores and loads one rank's paged KV cache, in the background. Calls return at once unless they say
/// otherwise.
///
/// `fingerprint`: 32 bytes that name the namespace. `world`: the number of ranks. `rank`: this worker's, from 0 on.
/// `chunk_tokens`: the tokens of a chunk. `model` and `dtype`: for people, in `kvring status`.
///
/// `checksum`: "off", "store" (a store computes checksums) or "verify" (a load also compares them; a mismatch is a failed load).
///
/// `copy_threads`: for a cache in host memory, how many threads copy; by default 2, or 1 on a single CPU.
///
/// `copy`: for a cache on a GPU, how its bytes are moved. "batch": DMA, one copy for each contiguous run. "staged": a kernel
/// gathers or scatters in a buffer on the GPU, and DMA moves that. "zerocopy": a kernel reads or writes the host's memory itself.
/// "auto": whatever is measured to be fastest when the cache is registered, which takes up to 100 ms.
///
/// `options`: see `ClientOptions`.
///
/// Raises `ConfigError`, which names the option, for a value that cannot work. An engine that is not there is no error.
#[pyclass(frozen, module = "kvring._native")]
pub(crate) struct WorkerAdapter {
    held: Held<Worker>,
    jobs: Jobs,
    client: Arc<Client>,
}

impl WorkerAdapter {
    /// # Errors
    /// A load is lost: nobody knows whether its copy has ended.
    fn nothing_is_lost(&self, py: Python<'_>) -> PyResult<()> {
        let lost = |error| Err(errors::device(py, format_args!("{LOST}: {error}")));
        self.jobs.lost().map_or(Ok(()), lost)
    }

    /// Waits at most `timeout_ms`. Once a load is lost it fails at once, because that load will never end.
    fn wait_for(
        &self,
        py: Python<'_>,
        timeout_ms: f64,
        wait: impl Fn(&Jobs, Duration) -> bool + Sync,
    ) -> PyResult<bool> {
        in_slices(py, timeout_ms, |slice| {
            let enough = py.detach(|| wait(&self.jobs, slice));
            self.nothing_is_lost(py)?;
            Ok(if enough { ControlFlow::Break(true) } else { ControlFlow::Continue(()) })
        })
    }
}

#[pymethods]
impl WorkerAdapter {
    #[new]
    #[pyo3(signature = (
        fingerprint, *, world, rank, chunk_tokens, model = String::new(), dtype = String::new(),
        checksum = "off", copy_threads = None, copy = "auto", **options
    ))]
    #[allow(clippy::too_many_arguments, reason = "keyword arguments of Python's")]
    fn new(
        py: Python<'_>,
        fingerprint: &[u8],
        world: u32,
        rank: u32,
        chunk_tokens: u32,
        model: String,
        dtype: String,
        checksum: &str,
        copy_threads: Option<usize>,
        copy: &str,
        options: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        guarded(py, || {
            let checksum = match checksum {
                "off" => Checksum::Off,
                "store" => Checksum::Store,
                "verify" => Checksum::Verify,
                got => {
                    let text = format!("checksum: expected off, store or verify, got {got:?}");
                    return Err(errors::config(py, text));
                }
            };
            let Some(copy) = CopyMode::from_name(copy) else {
                let all = CopyMode::ALL.map(CopyMode::as_str).join(", ");
                return Err(errors::config(py, format!("copy: expected one of {all}, got {copy:?}")));
            };
            let fingerprint = options::fingerprint(py, fingerprint)?;
            let worker = WorkerOptions {
                model,
                dtype,
                checksum,
                copy_threads,
                copy,
                ..WorkerOptions::new(fingerprint, world, rank, chunk_tokens)
            };
            let client = options::client(py, options)?;
            logs::begin(py)?;
            let made = py.detach(|| {
                let client = Client::new(Role::Worker, client).map_err(|error| error.to_string())?;
                let adapter = kvring_adapter::WorkerAdapter::new(&client, worker);
                adapter.map(|adapter| (client, adapter)).map_err(|error| error.to_string())
            });
            let (client, adapter) = made.map_err(|text| errors::config(py, text))?;
            let jobs = adapter.jobs();
            Ok(WorkerAdapter { held: Held::new(Worker { adapter, owner: None }), jobs, client })
        })
    }

    /// Registers this rank's KV cache, now and after every restart of the engine. Waits for the engine, without the GIL, for
    /// up to `register_timeout_ms`, and goes on without it: until it is there, stores are dropped and loads fail.
    ///
    /// `groups`: one for each block table; the block ids of a chunk are those of the first group, then those of the second,
    /// and so on. `owner`: an object that is kept alive for as long as the memory may be touched. `device`: the CUDA device in
    /// whose memory the groups' addresses are, as this process counts devices (torch's index); `None` for host memory.
    ///
    /// Raises `RegisterError` where ranks disagree, or a chunk can never fit into the arena. Raises `LayoutError`, with the
    /// reason, for memory that cannot be copied from and to: there is no CUDA driver or no such device, the addresses are not
    /// that device's, or the driver or the layout does not allow the `copy` that was asked for.
    #[pyo3(signature = (groups, owner = None, device = None))]
    fn register_kv_caches(
        &self,
        py: Python<'_>,
        groups: Vec<Py<KvGroup>>,
        owner: Option<Py<PyAny>>,
        device: Option<u32>,
    ) -> PyResult<()> {
        guarded(py, || {
            let memory = device.map_or(Memory::Host, Memory::Cuda);
            let order = groups.iter().fold(0u64, |order, group| order.rotate_left(1) ^ group.get().order());
            let groups = groups.iter().map(|group| group.get().group()).collect();
            // SAFETY: the caller describes its own memory, keeps it alive by `owner`, and keeps to the rules of who may
            // touch which block when. Python code cannot give more than that.
            let paged = unsafe { PagedKv::grouped(groups) }
                .map_err(|error| errors::layout(py, error))?
                .on(memory)
                .ordered(order);
            let (registered, before) = self.held.wait(py, |worker| {
                // The mover that touched the earlier memory ends in this call, so `before` may be dropped after it.
                let registered = worker.adapter.register_kv_caches(paged);
                let owner = if registered.is_ok() { owner } else { None };
                (registered, core::mem::replace(&mut worker.owner, owner))
            });
            drop(before);
            registered.map_err(|error| match error {
                RegisterError::Call(error) => errors::kvring(py, error),
                RegisterError::Copy(error) => errors::layout(py, error),
                error => errors::register(py, error),
            })
        })
    }

    /// The bytes of this rank's part of a chunk; 0 before `register_kv_caches`.
    #[getter]
    fn shard_bytes(&self, py: Python<'_>) -> PyResult<u64> {
        guarded(py, || {
            Ok(self.held.now(py, |worker| worker.adapter.kv_cache().map_or(0, PagedKv::shard_bytes)))
        })
    }

    /// The number of block ids that name a chunk, those of all groups together; 0 before `register_kv_caches`.
    #[getter]
    fn blocks_per_chunk(&self, py: Python<'_>) -> PyResult<u32> {
        guarded(py, || {
            Ok(self.held.now(py, |worker| worker.adapter.kv_cache().map_or(0, PagedKv::blocks_per_chunk)))
        })
    }

    /// Stores chunks, and returns the job's id. The blocks must keep their content until the job is reported or flushed.
    ///
    /// `request`: the name of the request. `round`: (source, number), the same on all ranks. `keys`: one for each chunk, in chain
    /// order; bytes of which the first `KEY_BYTES` count. `blocks`: the block ids of the first chunk, then those of the second,
    /// and so on, `blocks_per_chunk` for each. `parent`: the key before the first one, if there is one.
    ///
    /// `stream`: for a cache on a GPU, the stream that computes (a `CUstream`; torch's `Stream.cuda_stream`). The copy reads
    /// after everything that is on that stream at the time of this call, and needs no other waiting. `None`: the default stream.
    /// For host memory it is ignored, and the content must be there already.
    ///
    /// Raises `LayoutError` for block ids that the cache does not have, or a wrong number of them; `ConfigError` for a key that
    /// is too short; and `KvringError` before `register_kv_caches`, after `shutdown`, while the stream is captured into a CUDA
    /// graph, and when the GPU has failed. No job has been taken then.
    #[pyo3(signature = (request, round, keys, blocks, parent = None, stream = None))]
    #[allow(clippy::too_many_arguments, reason = "keyword arguments of Python's")]
    fn submit_store(
        &self,
        py: Python<'_>,
        request: &str,
        round: (u32, u32),
        keys: &Bound<'_, PyAny>,
        blocks: &Bound<'_, PyAny>,
        parent: Option<&Bound<'_, PyAny>>,
        stream: Option<u64>,
    ) -> PyResult<u64> {
        guarded(py, || {
            let stream = stream.map(ComputeStream);
            let keys = keys::Every::new(keys, 1, None)?.all()?;
            let blocks = keys::blocks(blocks)?;
            let parent = parent.map(|parent| keys::one(parent, "parent")).transpose()?;
            let round = Round { source: round.0, number: round.1 };
            let job = self.held.soon(py, stream.is_some(), |worker| {
                let by_chunk = by_chunk(&blocks, keys.len(), worker.blocks_per_chunk()?)?;
                let chunks = keys.iter().zip(by_chunk);
                let chunks = chunks.map(|(key, blocks)| StoreChunk { key: *key, blocks: blocks.to_vec() });
                Ok(worker.adapter.submit_store(request, round, parent, chunks.collect(), stream)?)
            });
            job.map(|job| job.0).map_err(|error: NotTaken| error.raised(py))
        })
    }

    /// Loads chunks from where a lookup found them, and returns the job's id. The blocks belong to the job until it is
    /// reported.
    ///
    /// `request`: the name of the request. `handles`: what `Hit.handles` returned. `blocks`: the block ids for the
    /// first chunk, then those for the second, and so on, `blocks_per_chunk` for each; `SKIP` for a page that must not be
    /// written.
    ///
    /// `stream`: as for `submit_store`. The copy writes after everything that is on that stream at the time of this call. When
    /// the load is reported, its bytes are there for whatever is put on any stream from then on.
    ///
    /// Raises what `submit_store` raises, and `ConfigError` for `handles` that are not from `Hit.handles` of this release.
    #[pyo3(signature = (request, handles, blocks, stream = None))]
    fn submit_load(
        &self,
        py: Python<'_>,
        request: &str,
        handles: &Bound<'_, PyAny>,
        blocks: &Bound<'_, PyAny>,
        stream: Option<u64>,
    ) -> PyResult<u64> {
        guarded(py, || {
            let stream = stream.map(ComputeStream);
            let Ok(bytes) = handles.extract::<&[u8]>() else {
                let got = handles.get_type().name()?;
                return Err(PyTypeError::new_err(format!("handles: expected bytes, got {got}")));
            };
            let handles = unpack(bytes).map_err(|error| errors::config(py, error))?;
            let blocks = keys::blocks(blocks)?;
            let job = self.held.soon(py, stream.is_some(), |worker| {
                let by_chunk = by_chunk(&blocks, handles.len(), worker.blocks_per_chunk()?)?;
                let chunks = handles.iter().zip(by_chunk);
                let chunks =
                    chunks.map(|(chunk, blocks)| LoadChunk { chunk: *chunk, blocks: blocks.to_vec() });
                Ok(worker.adapter.submit_load(request, chunks.collect(), stream)?)
            });
            job.map(|job| job.0).map_err(|error: NotTaken| error.raised(py))
        })
    }

    /// Returns the jobs that have ended since the last call, each exactly once.
    ///
    /// Raises `DeviceError` when a load is lost: a GPU may still write into the KV cache, and nothing may be computed from it.
    fn get_finished(&self, py: Python<'_>) -> PyResult<Vec<Finished>> {
        guarded(py, || {
            self.nothing_is_lost(py)?;
            Ok(finished(self.jobs.get_finished()))
        })
    }

    /// Returns the ids of the blocks whose load has failed since the last call. A load's blocks are here no later than its
    /// report is in `get_finished`: call that first.
    fn get_block_ids_with_load_errors(&self, py: Python<'_>) -> PyResult<Vec<u32>> {
        guarded(py, || Ok(self.jobs.get_block_ids_with_load_errors()))
    }

    /// To be called before the blocks that these stores read are given to somebody else: when it returns, the stores read them
    /// no more, whatever the engine does. Waits, without the GIL, for copies that run, and for each store that is still to be
    /// copied until `flush_timeout_ms` after its submission. `jobs`: ids of `submit_store`. Jobs that are unknown, or have ended,
    /// are ignored.
    fn flush(&self, py: Python<'_>, jobs: Vec<u64>) -> PyResult<()> {
        guarded(py, || {
            let jobs: Vec<JobId> = jobs.into_iter().map(JobId).collect();
            py.detach(|| self.jobs.flush(&jobs));
            Ok(())
        })
    }

    /// As `flush`, for all stores of these requests, by name; `None`: for all stores.
    #[pyo3(signature = (requests = None))]
    fn handle_preemptions(&self, py: Python<'_>, requests: Option<Vec<String>>) -> PyResult<()> {
        guarded(py, || {
            let requests = requests.as_ref().map(|all| all.iter().map(String::as_str).collect::<Vec<_>>());
            py.detach(|| self.jobs.handle_preemptions(requests.as_deref()));
            Ok(())
        })
    }

    /// Waits, without the GIL, until fewer jobs are open than now. Returns false after `timeout_ms` milliseconds.
    ///
    /// Raises `DeviceError` as `get_finished` does.
    fn wait_some(&self, py: Python<'_>, timeout_ms: f64) -> PyResult<bool> {
        guarded(py, || self.wait_for(py, timeout_ms, Jobs::wait_some))
    }

    /// Waits, without the GIL, until this job has ended; true also for an unknown job. Returns false after `timeout_ms`
    /// milliseconds.
    ///
    /// Raises `DeviceError` as `get_finished` does.
    fn wait_job(&self, py: Python<'_>, job: u64, timeout_ms: f64) -> PyResult<bool> {
        guarded(py, || self.wait_for(py, timeout_ms, |jobs, timeout| jobs.wait_job(JobId(job), timeout)))
    }

    /// Waits, without the GIL, until no job is open. Returns false after `timeout_ms` milliseconds.
    ///
    /// Raises `DeviceError` as `get_finished` does.
    fn wait_idle(&self, py: Python<'_>, timeout_ms: f64) -> PyResult<bool> {
        guarded(py, || self.wait_for(py, timeout_ms, Jobs::wait_idle))
    }

    /// Waits, without the GIL, until the engine is there and has answered this rank's registration, if there is one. Returns
    /// false after `timeout_ms` milliseconds, and after `shutdown`; `health` then says why. For tools and tests: vLLM goes on
    /// without an engine.
    fn wait_ready(&self, py: Python<'_>, timeout_ms: f64) -> PyResult<bool> {
        guarded(py, || wait_ready(py, &self.client, timeout_ms))
    }

    /// Says whether the engine is there and well, and has accepted this rank's registration. Takes a few loads.
    fn is_healthy(&self, py: Python<'_>) -> PyResult<bool> {
        guarded(py, || Ok(self.held.now(py, |worker| worker.adapter.is_healthy())))
    }

    /// Returns "healthy", or what the engine is instead for this rank: "absent", "dead", "recovering", "attaching", "stalled",
    /// "unhealthy", "refused: " or "incompatible: " and the reason, or "shut down".
    fn health(&self, py: Python<'_>) -> PyResult<String> {
        guarded(py, || Ok(self.held.now(py, |worker| worker.adapter.health().to_string())))
    }

    /// Returns counts of what this client has seen of its engine, by name: attachments, deaths, restarts, stalls, and more.
    fn client_stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        guarded(py, || dict(py, self.client.stats().iter()))
    }

    /// Finishes the open jobs, without the GIL: waits for them for up to `drain_timeout_ms`, and for copies that run however
    /// long they take. Afterwards nothing of this adapter touches the KV cache any more. A second call does nothing.
    fn shutdown(&self, py: Python<'_>) -> PyResult<()> {
        guarded(py, || {
            let owner = self.held.wait(py, |worker| {
                worker.adapter.shutdown();
                worker.owner.take()
            });
            match self.jobs.lost() {
                None => drop(owner),
                // The owner is never dropped: the memory must stay ours as long as this process lives.
                Some(_) => core::mem::forget(owner),
            }
            Ok(())
        })
    }
}
