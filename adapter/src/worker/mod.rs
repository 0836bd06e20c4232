//! The worker's adapter: stores and loads of one rank's paged KV cache, in the background.

mod job;
mod jobs;
mod loading;
mod mover;
mod queue;
mod report;
mod storing;
mod unsettled;

pub use job::{Finished, JobId, LoadChunk, StoreChunk};
pub use jobs::Jobs;
pub use kvring_gpu_kernels::{
    BlockError, ComputeStream, CopyError, CopyMode, KvGroup, LayoutError, Memory, PagedKv, Plane, SKIP,
};
pub use report::{Drops, LoadFailures, LoadReport, StoreReport};

use crate::client::{Client, Probe};
use crate::error::{CallError, RegisterError};
use crate::health::Health;
use crate::options::usable_cpus;
use crate::shared::Registered;
use job::{Job, Work};
use kvring_gpu_kernels::{CopyBackend, CpuBackend, CudaBackend, GpuOptions};
use kvring_shm_abi::engine_segment::RANKS_MAX;
use kvring_shm_abi::lobby::Role;
use kvring_shm_abi::message::{DTYPE_BYTES, Key, MODEL_NAME_BYTES, Registration, Round};
use mover::Mover;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// Checksum policy for shards. Only workers compute and verify checksums, while they copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checksum {
    /// No checksums.
    #[default]
    Off,
    /// A store computes them, a load ignores them.
    Store,
    /// A store computes them, and a load verifies them: a mismatch is a failed load.
    Verify,
}

/// The options of a worker.
///
/// # Example
/// ```
/// use kvring_adapter::{Checksum, WorkerOptions};
///
/// // Rank 1 of 2, chunks of 16 tokens.
/// let options = WorkerOptions { checksum: Checksum::Verify, ..WorkerOptions::new([1, 2, 3, 4], 2, 1, 16) };
/// ```
#[derive(Clone, Debug)]
pub struct WorkerOptions {
    /// Names the namespace: a digest of everything that chunk keys do not cover.
    pub fingerprint: [u64; 4],
    /// Number of ranks.
    pub world: u32,
    /// This rank.
    pub rank: u32,
    /// Tokens per chunk.
    pub chunk_tokens: u32,
    /// For people: the model's name.
    pub model: String,
    /// For people: the KV cache's dtype.
    pub dtype: String,
    /// Checksum policy. Default off.
    pub checksum: Checksum,
    /// For a cache in host memory: how many threads copy, the mover included. `None`: two, or one if this process may
    /// run on one CPU only.
    pub copy_threads: Option<usize>,
    /// For a cache in a GPU's memory: how its bytes are moved. Default auto.
    pub copy: CopyMode,
}

impl WorkerOptions {
    /// The defaults for one rank of `world` in a namespace.
    #[must_use]
    pub fn new(fingerprint: [u64; 4], world: u32, rank: u32, chunk_tokens: u32) -> WorkerOptions {
        WorkerOptions {
            fingerprint,
            world,
            rank,
            chunk_tokens,
            model: String::new(),
            dtype: String::new(),
            checksum: Checksum::Off,
            copy_threads: None,
            copy: CopyMode::Auto,
        }
    }
}

/// Why a job was not taken.
///
/// # Example
/// ```
/// use kvring_adapter::{Client, ClientOptions, Role, SubmitError, WorkerAdapter, WorkerOptions};
///
/// let client = Client::new(Role::Worker, ClientOptions::default())?;
/// let mut worker = WorkerAdapter::new(&client, WorkerOptions::new([1, 2, 3, 4], 1, 0, 16))?;
/// assert_eq!(worker.submit_load("request", Vec::new(), None), Err(SubmitError::NoKvCache));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// `register_kv_caches` has not been called.
    #[error("no KV cache is registered with this adapter: call register_kv_caches first")]
    NoKvCache,
    /// A chunk's blocks are wrong.
    #[error("chunk {chunk}: {error}")]
    Blocks {
        /// The chunk's index in the call.
        chunk: usize,
        /// What is wrong.
        error: BlockError,
    },
    /// The copy cannot be ordered after the caller's stream.
    #[error("cannot order the copy after the stream: {0}")]
    Fence(CopyError),
    /// The adapter has been shut down, or belongs to the parent of a fork.
    #[error("the adapter is {0}")]
    Ended(Health),
}

/// The log's text about a lost load (see [`Jobs::lost`]).
pub const LOST: &str = "the GPU's driver has not said whether a load into the KV cache has ended: the GPU may still write there, \
    so vLLM must not go on";

/// The copy backend.
enum Backend {
    /// One that the caller gave.
    Given(Arc<dyn CopyBackend>),
    /// One that the adapter has made for the kind of memory of the registered cache, once there is one.
    Own(Option<(Memory, Arc<dyn CopyBackend>)>),
}

struct Running {
    backend: Arc<dyn CopyBackend>,
    paged: Arc<PagedKv>,
    registered: Arc<Registered>,
    mover: Option<JoinHandle<()>>,
}

/// Stores and loads of one rank. Every call returns at once, except `handle_preemptions` and `flush`, which wait for copies
/// that read the blocks concerned, and `shutdown`.
///
/// # Example
/// ```
/// use kvring_adapter::{Client, PagedKv, Plane, Role, Round, StoreChunk, WorkerAdapter, WorkerOptions};
/// # use std::time::Duration;
///
/// # let (engine, options) = include!(concat!(env!("CARGO_MANIFEST_DIR"), "/doc/engine.rs"));
/// // Eight blocks of 4 KiB in one tensor; two of them make a chunk of 16 tokens.
/// let mut cache = vec![7u8; 8 * 4096];
/// let plane = Plane { base: cache.as_mut_ptr(), block_stride: 4096, page_bytes: 4096 };
/// // SAFETY: `cache` outlives the worker, and nobody else touches it.
/// let paged = unsafe { PagedKv::new(vec![plane], 8, 2) }?;
///
/// let client = Client::new(Role::Worker, options)?;
/// let mut worker = WorkerAdapter::new(&client, WorkerOptions::new([1, 2, 3, 4], 1, 0, 16))?;
/// worker.register_kv_caches(paged)?;
/// let chunk = StoreChunk { key: [10, 0], blocks: vec![4, 1] };
/// let job = worker.submit_store("request", Round { source: 1, number: 1 }, None, vec![chunk], None)?;
/// worker.wait_job(job, Duration::from_secs(3600));
/// let (_, request, report) = &worker.get_finished().stores[0];
/// assert_eq!((request.as_str(), report.stored, report.dropped), ("request", 1, 0));
/// worker.shutdown();
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
/// See [`Hit`] for a load.
pub struct WorkerAdapter {
    client: Arc<Client>,
    probe: Probe,
    options: WorkerOptions,
    backend: Backend,
    running: Option<Running>,
    jobs: Jobs,
    next_job: u64,
}

impl WorkerAdapter {
    /// An adapter on a client of the worker's role. For a cache in host memory it copies with threads of this process
    /// (`copy_threads`), for one in a GPU's memory with the GPU's kernels and copy engines (`copy`).
    ///
    /// # Errors
    /// Options that are out of range.
    pub fn new(client: &Arc<Client>, options: WorkerOptions) -> Result<WorkerAdapter, RegisterError> {
        WorkerAdapter::with(client, options, Backend::Own(None))
    }

    /// An adapter that copies with the given backend.
    pub fn with_backend(
        client: &Arc<Client>,
        options: WorkerOptions,
        backend: Arc<dyn CopyBackend>,
    ) -> Result<WorkerAdapter, RegisterError> {
        WorkerAdapter::with(client, options, Backend::Given(backend))
    }

    fn with(
        client: &Arc<Client>,
        options: WorkerOptions,
        backend: Backend,
    ) -> Result<WorkerAdapter, RegisterError> {
        let invalid = |what, expected, got: u64| Err(RegisterError::Invalid { what, expected, got });
        if client.role() != Role::Worker {
            return invalid("the client's role", "a worker's (2)", client.role() as u64);
        }
        if !(1..=RANKS_MAX as u32).contains(&options.world) {
            return invalid("world", "1 to 64", options.world.into());
        }
        if options.rank >= options.world {
            return invalid("rank", "below the world", options.rank.into());
        }
        if options.chunk_tokens == 0 {
            return invalid("chunk_tokens", "above 0", 0);
        }
        Ok(WorkerAdapter {
            client: client.clone(),
            probe: client.probe(),
            options,
            backend,
            running: None,
            jobs: Jobs::new(client),
            next_job: 0,
        })
    }

    /// Registers this rank's KV cache; the keeper repeats that after every restart of the engine. This call waits up to
    /// `register_timeout` for the first answer. Without one the keeper goes on trying, and stores are dropped and loads
    /// fail until then.
    ///
    /// # Errors
    /// Only problems that do not mend themselves: ranks that disagree, a shard that can never fit, a full namespace
    /// table, or memory that cannot be copied from and to here. And a call in a forked child, which has none of the
    /// parent's threads.
    pub fn register_kv_caches(&mut self, paged: PagedKv) -> Result<(), RegisterError> {
        if !self.client.shared.fork.is_ours() {
            // Before anything is locked: a thread of the parent may have held the lock at the fork.
            return Err(CallError::Forked.into());
        }
        if let Some(running) = self.running.take() {
            self.stop(running);
        }
        let paged = Arc::new(paged);
        let backend = self.backend_for(&paged)?;
        if backend.writes_by_device() {
            // Declare it before the first store: a device may go on writing after this process's death has been marked.
            self.client.register_dma();
        }
        let record = self.record(&paged);
        let registered = self.client.add_registration(record);
        let outcome = self.client.wait_registered(&registered, self.client.options().register_timeout);
        if let Err(error) = outcome {
            self.client.remove_registration(&registered);
            return Err(error);
        }
        let mover = Mover {
            client: self.client.clone(),
            registered: registered.clone(),
            queue: self.jobs.queue.clone(),
            backend: backend.clone(),
            arena: Mutex::default(),
            options: self.options.clone(),
        };
        self.jobs.queue.reopen();
        let thread = std::thread::Builder::new().name("kvring-mover".into()).spawn(move || mover.run());
        let thread = thread.map_err(|_| {
            self.client.remove_registration(&registered);
            RegisterError::Invalid { what: "threads", expected: "one more thread to be had", got: 0 }
        })?;
        self.running = Some(Running { backend, paged, registered, mover: Some(thread) });
        Ok(())
    }

    /// The backend that copies from and to this cache, prepared for it.
    fn backend_for(&mut self, paged: &Arc<PagedKv>) -> Result<Arc<dyn CopyBackend>, RegisterError> {
        let memory = paged.memory();
        let backend = match &self.backend {
            Backend::Given(backend) => backend.clone(),
            Backend::Own(Some((of, backend))) if *of == memory => backend.clone(),
            Backend::Own(_) => {
                let backend: Arc<dyn CopyBackend> = match memory {
                    Memory::Host => {
                        let threads =
                            self.options.copy_threads.unwrap_or_else(|| usable_cpus().min(2)).max(1);
                        Arc::new(CpuBackend::new(threads))
                    }
                    Memory::Cuda(device) => {
                        let options = GpuOptions { mode: self.options.copy, ..GpuOptions::new(device) };
                        Arc::new(
                            CudaBackend::new(options).map_err(|error| RegisterError::Copy(error.into()))?,
                        )
                    }
                };
                self.backend = Backend::Own(Some((memory, backend.clone())));
                backend
            }
        };
        backend.prepare(paged).map_err(RegisterError::Copy)?;
        Ok(backend)
    }

    fn record(&self, paged: &PagedKv) -> Registration {
        let mut record = Registration {
            fingerprint: self.options.fingerprint,
            layout: paged.layout_digest(),
            shard_bytes: paged.shard_bytes(),
            world: self.options.world,
            rank: self.options.rank,
            chunk_tokens: self.options.chunk_tokens,
            reserved: 0,
            model: [0; MODEL_NAME_BYTES],
            dtype: [0; DTYPE_BYTES],
        };
        copy_text(&mut record.model, &self.options.model);
        copy_text(&mut record.dtype, &self.options.dtype);
        record
    }

    /// Stores chunks in the background, in chain order. `parent` is the key just before the first one. The blocks must
    /// keep their content until `get_finished` has reported the job, or `handle_preemptions` has returned for it.
    ///
    /// Blocks in a GPU's memory are read after all that is on the stream `after` at the time of this call; `None` is
    /// the default stream.
    pub fn submit_store(
        &mut self,
        request: &str,
        round: Round,
        parent: Option<Key>,
        chunks: Vec<StoreChunk>,
        after: Option<ComputeStream>,
    ) -> Result<JobId, SubmitError> {
        self.check(chunks.iter().map(|chunk| &chunk.blocks[..]), false)?;
        self.submit(request, Work::Store { round, parent, chunks }, after)
    }

    /// Loads chunks in the background. The blocks belong to the job until `get_finished` has reported it; the part of a
    /// chunk whose block is [`SKIP`] is not written anywhere. Blocks in a GPU's memory are written after all that is on
    /// the stream `after` at the time of this call; `None` is the default stream.
    pub fn submit_load(
        &mut self,
        request: &str,
        chunks: Vec<LoadChunk>,
        after: Option<ComputeStream>,
    ) -> Result<JobId, SubmitError> {
        self.check(chunks.iter().map(|chunk| &chunk.blocks[..]), true)?;
        self.submit(request, Work::Load { chunks }, after)
    }

    fn check<'a>(&self, chunks: impl Iterator<Item = &'a [u32]>, may_skip: bool) -> Result<(), SubmitError> {
        let running = self.running.as_ref().ok_or(SubmitError::NoKvCache)?;
        for (chunk, blocks) in chunks.enumerate() {
            running
                .paged
                .check_blocks(blocks, may_skip)
                .map_err(|error| SubmitError::Blocks { chunk, error })?;
        }
        Ok(())
    }

    fn submit(
        &mut self,
        request: &str,
        work: Work,
        after: Option<ComputeStream>,
    ) -> Result<JobId, SubmitError> {
        if !self.client.shared.fork.is_ours() {
            return Err(SubmitError::Ended(Health::ShutDown));
        }
        let running = self.running.as_ref().ok_or(SubmitError::NoKvCache)?;
        // Make the fence here, in the caller's thread, so that the copy does not wait for work that the caller puts on
        // its stream later.
        let fence = running.backend.fence(after.unwrap_or(ComputeStream(0))).map_err(SubmitError::Fence)?;
        self.next_job += 1;
        let id = JobId(self.next_job);
        let job = Arc::new(Job::new(id, request, work, running.paged.clone(), fence));
        if self.jobs.queue.push(job) { Ok(id) } else { Err(SubmitError::Ended(Health::ShutDown)) }
    }

    /// The submitted jobs, for other threads to wait for while this one goes on.
    #[must_use]
    pub fn jobs(&self) -> Jobs {
        self.jobs.clone()
    }

    /// See [`Jobs::get_finished`].
    pub fn get_finished(&mut self) -> Finished {
        self.jobs.get_finished()
    }

    /// See [`Jobs::lost`].
    #[must_use]
    pub fn lost(&self) -> Option<CopyError> {
        self.jobs.lost()
    }

    /// See [`Jobs::get_block_ids_with_load_errors`].
    pub fn get_block_ids_with_load_errors(&mut self) -> Vec<u32> {
        self.jobs.get_block_ids_with_load_errors()
    }

    /// See [`Jobs::handle_preemptions`].
    pub fn handle_preemptions(&mut self, requests: Option<&[&str]>) {
        self.jobs.handle_preemptions(requests);
    }

    /// See [`Jobs::flush`].
    pub fn flush(&mut self, jobs: &[JobId]) {
        self.jobs.flush(jobs);
    }

    /// See [`Jobs::wait_idle`].
    pub fn wait_idle(&self, timeout: Duration) -> bool {
        self.jobs.wait_idle(timeout)
    }

    /// See [`Jobs::wait_some`].
    pub fn wait_some(&self, timeout: Duration) -> bool {
        self.jobs.wait_some(timeout)
    }

    /// See [`Jobs::wait_job`].
    pub fn wait_job(&self, job: JobId, timeout: Duration) -> bool {
        self.jobs.wait_job(job, timeout)
    }

    /// The KV cache that is registered, if one is.
    #[must_use]
    pub fn kv_cache(&self) -> Option<&PagedKv> {
        self.running.as_ref().map(|running| &*running.paged)
    }

    /// Is the engine healthy, and has it accepted this rank's registration? Costs a few loads, and a lock that nobody
    /// holds for long.
    pub fn is_healthy(&mut self) -> bool {
        let Self { probe, running, .. } = self;
        let Ok(link) = probe.link() else { return false };
        let nonce = link.nonce;
        running.as_ref().is_some_and(|running| running.registered.health(nonce).is_healthy())
    }

    /// The engine's health for this rank. An engine that has refused this rank's registration is *refused* until the
    /// keeper registers again, with its next attachment.
    #[must_use]
    pub fn health(&self) -> Health {
        match (self.client.attached_nonce(), &self.running) {
            (Ok(nonce), Some(running)) => running.registered.health(nonce),
            (Ok(_), None) => Health::Attaching,
            (Err(health), _) => health,
        }
    }

    /// Finishes open jobs (for up to `drain_timeout`, but always waits for copies that run), then shuts the client
    /// down. Idempotent. Afterwards nothing of this adapter touches the KV cache or a GPU.
    pub fn shutdown(&mut self) {
        if let Some(running) = self.running.take() {
            self.stop(running);
        }
        self.client.shutdown();
        // Drop the backend: a process that goes on gets its memory back, and one that ends does not end while a thread
        // of the backend is inside a driver.
        if let Backend::Own(own) = &mut self.backend {
            *own = None;
        }
    }

    fn stop(&self, mut running: Running) {
        if !self.client.shared.fork.is_ours() {
            // This is a forked child: the threads are the parent's.
            core::mem::forget(running);
            return;
        }
        self.jobs.queue.close();
        if !self.jobs.queue.wait_open(0, self.client.options().drain_timeout) {
            for job in self.jobs.queue.open_jobs() {
                job.cancel();
            }
        }
        self.client.remove_registration(&running.registered);
        if let Some(mover) = running.mover.take() {
            // A mover that panicked has logged it.
            let _ = mover.join();
        }
    }
}

impl Drop for WorkerAdapter {
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            self.stop(running);
        }
    }
}

fn copy_text(to: &mut [u8], text: &str) {
    for (to, from) in to.iter_mut().zip(text.bytes()) {
        *to = from;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::ClientOptions;

    fn copy_threads() -> usize {
        let name = |task: std::io::Result<std::fs::DirEntry>| {
            std::fs::read_to_string(task.ok()?.path().join("comm")).ok()
        };
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        tasks.filter_map(name).filter(|name| name.starts_with("kvring-copy")).count()
    }

    #[test]
    fn after_a_shutdown_there_is_no_backend() {
        let options = ClientOptions {
            engine: "no-engine-of-this-name".to_owned(),
            register_timeout: Duration::from_millis(1),
            ..ClientOptions::default()
        };
        let client = Client::new(Role::Worker, options).unwrap();
        let options = WorkerOptions { copy_threads: Some(3), ..WorkerOptions::new([1; 4], 1, 0, 16) };
        let mut adapter = WorkerAdapter::new(&client, options).unwrap();
        let mut memory = vec![0u8; 4096];
        let plane = Plane { base: memory.as_mut_ptr(), block_stride: 1024, page_bytes: 1024 };
        // SAFETY: the memory lives longer than the adapter.
        let paged = unsafe { PagedKv::new(vec![plane], 4, 1) }.unwrap();
        adapter.register_kv_caches(paged).unwrap();
        assert_eq!(copy_threads(), 2);
        adapter.shutdown();
        // A joined thread may still be listed for a moment.
        let until = std::time::Instant::now() + Duration::from_secs(10);
        while copy_threads() > 0 {
            assert!(std::time::Instant::now() < until, "its threads are there still");
            std::thread::yield_now();
        }
        adapter.shutdown();
        drop(adapter);
    }
}
