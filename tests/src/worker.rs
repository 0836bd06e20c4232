//! A worker as a test sees it: it stores and loads keys, and says whether the bytes were right.

use crate::kv::{Content, Kv, Shape, with_fake_gpu};
use crate::proto::{ClientSpec, Handle, Loaded, Stored, WorkerSpec};
use crate::wait::until;
use kvring_adapter::{
    Checksum, Client, JobId, Key, LoadChunk, RegisterError, Role, Round, StoreChunk, SubmitError,
    WorkerAdapter, WorkerOptions,
};
use kvring_gpu_kernels::{CopyBackend, CpuBackend};
use std::sync::Arc;
use std::time::Duration;

/// How long a look at a job may wait for its end.
const A_LOOK: Duration = Duration::from_millis(20);

/// One rank's worker with its KV cache.
pub struct WorkerSide {
    // Dropped first: nothing touches the cache's memory after it.
    adapter: WorkerAdapter,
    client: Arc<Client>,
    kv: Kv,
    rank: u32,
    next_block: u32,
    /// Of the last store that was submitted.
    submitted: Vec<u32>,
    /// Reports of stores that nobody has asked for yet.
    stores: Vec<(JobId, Stored)>,
    /// Of loads: loaded and failed.
    loads: Vec<(JobId, u32, u32)>,
}

/// A new client of this role.
///
/// # Panics
/// For options that cannot be.
#[must_use]
pub fn client(role: Role, spec: &ClientSpec) -> Arc<Client> {
    Client::new(role, spec.options()).expect("good options")
}

impl WorkerSide {
    /// A client, an adapter on it, a cache, registered.
    ///
    /// # Errors
    /// What the registration said.
    pub fn start(spec: &WorkerSpec) -> Result<WorkerSide, RegisterError> {
        if with_fake_gpu() {
            let new = |client: &Arc<Client>, options| WorkerAdapter::new(client, options);
            return WorkerSide::made(spec, Kv::on_fake_gpu(spec.shape), new);
        }
        WorkerSide::copying_with(spec, Arc::new(CpuBackend::new(2)))
    }

    /// The same, with a way of copying of the test's own.
    ///
    /// # Errors
    /// What the registration said.
    pub fn copying_with(
        spec: &WorkerSpec,
        backend: Arc<dyn CopyBackend>,
    ) -> Result<WorkerSide, RegisterError> {
        let with = |client: &Arc<Client>, options| WorkerAdapter::with_backend(client, options, backend);
        WorkerSide::made(spec, Kv::new(spec.shape), with)
    }

    fn made(
        spec: &WorkerSpec,
        kv: Kv,
        make: impl FnOnce(&Arc<Client>, WorkerOptions) -> Result<WorkerAdapter, RegisterError>,
    ) -> Result<WorkerSide, RegisterError> {
        let client = client(Role::Worker, &spec.client);
        let mut options = WorkerOptions::new(spec.fingerprint(), spec.world, spec.rank, spec.chunk_tokens);
        options.model = "test-model".to_owned();
        options.checksum = if spec.checksum { Checksum::Verify } else { Checksum::Off };
        let mut adapter = make(&client, options)?;
        adapter.register_kv_caches(kv.paged())?;
        let (submitted, stores, loads) = (Vec::new(), Vec::new(), Vec::new());
        Ok(WorkerSide { adapter, client, kv, rank: spec.rank, next_block: 0, submitted, stores, loads })
    }

    /// The client behind it.
    #[must_use]
    pub fn client(&self) -> &Arc<Client> {
        &self.client
    }

    /// The adapter itself, for calls that have no helper here.
    pub fn adapter(&mut self) -> &mut WorkerAdapter {
        &mut self.adapter
    }

    /// The cache's form.
    #[must_use]
    pub fn shape(&self) -> Shape {
        self.kv.shape()
    }

    /// Waits until it is attached and registered.
    ///
    /// # Errors
    /// The health after the limit.
    pub fn wait_ready(&self, limit: Duration) -> Result<(), String> {
        self.client.wait_ready(limit).map_err(|health| health.to_string())
    }

    /// The blocks of the next chunk, in an order that is not that of their ids.
    fn take_blocks(&mut self) -> Vec<u32> {
        let shape = self.kv.shape();
        let per_chunk = shape.blocks_per_chunk;
        if self.next_block + per_chunk > shape.blocks {
            self.next_block = 0;
        }
        let first = self.next_block;
        self.next_block += per_chunk;
        (first..first + per_chunk).rev().collect()
    }

    /// Computes the chunks of `keys` and submits their store, without waiting for it.
    ///
    /// # Errors
    /// The adapter's.
    ///
    /// # Panics
    /// For more keys than the cache has room for at once.
    pub fn submit_store(
        &mut self,
        request: &str,
        round: Round,
        parent: Option<Key>,
        keys: &[Key],
        version: u64,
    ) -> Result<JobId, SubmitError> {
        assert!(keys.len() <= self.kv.shape().chunks());
        let mut chunks = Vec::with_capacity(keys.len());
        self.submitted.clear();
        for key in keys {
            let blocks = self.take_blocks();
            self.submitted.extend(&blocks);
            self.kv.fill(&blocks, Content { key: *key, rank: self.rank, version });
            chunks.push(StoreChunk { key: *key, blocks });
        }
        self.adapter.submit_store(request, round, parent, chunks, None)
    }

    /// Gives the blocks of the last submitted store to somebody else, as vLLM does after a preemption.
    pub fn overwrite_submitted(&mut self) {
        self.kv.poison(&self.submitted);
    }

    /// Computes the chunks of `keys`, stores them, and waits for the end.
    ///
    /// # Panics
    /// When a job is not reported.
    pub fn store(
        &mut self,
        request: &str,
        round: Round,
        parent: Option<Key>,
        keys: &[Key],
        version: u64,
    ) -> Stored {
        let mut total = Stored::default();
        let mut parent = parent;
        for part in keys.chunks(self.kv.shape().chunks()) {
            let job = self.submit_store(request, round, parent, part, version).expect("a good job");
            let report = self.finished_store(job);
            total.stored += report.stored;
            total.skipped += report.skipped;
            total.dropped += report.dropped;
            parent = part.last().copied();
        }
        total
    }

    /// Waits for a store's report.
    pub fn finished_store(&mut self, job: JobId) -> Stored {
        until(format_args!("store {job:?} is reported"), || {
            let _ = self.adapter.wait_job(job, A_LOOK);
            self.report_of(job)
        })
    }

    /// A store's report, if it has come.
    pub fn report_of(&mut self, job: JobId) -> Option<Stored> {
        self.collect();
        let at = self.stores.iter().position(|(id, _)| *id == job)?;
        Some(self.stores.swap_remove(at).1)
    }

    /// Takes the reports that have come.
    fn collect(&mut self) {
        let finished = self.adapter.get_finished();
        for (id, _, report) in finished.stores {
            let (stored, skipped, dropped) = (report.stored, report.skipped, report.dropped);
            self.stores.push((id, Stored { stored, skipped, dropped }));
        }
        self.loads
            .extend(finished.loads.into_iter().map(|(id, _, report)| (id, report.loaded, report.failed)));
    }

    /// Loads chunks into poisoned blocks, waits for the end, and looks at every byte of those without an error.
    ///
    /// # Panics
    /// When a job is not reported, or its report does not fit its errors.
    pub fn load(&mut self, request: &str, handles: &[Handle], version: u64) -> Loaded {
        let mut total = Loaded::default();
        for part in handles.chunks(self.kv.shape().chunks()) {
            let chunks: Vec<LoadChunk> = part
                .iter()
                .map(|handle| {
                    let blocks = self.take_blocks();
                    self.kv.poison(&blocks);
                    LoadChunk { shard: handle.shard(), blocks }
                })
                .collect();
            let job = self.adapter.submit_load(request, chunks.clone(), None).expect("a good job");
            let (loaded, failed, errors) = self.finished_load(job);
            assert_eq!((loaded + failed) as usize, chunks.len(), "a report of every chunk");
            let mut bad = 0;
            for chunk in &chunks {
                if chunk.blocks.iter().any(|block| errors.contains(block)) {
                    assert!(
                        chunk.blocks.iter().all(|block| errors.contains(block)),
                        "a chunk fails as a whole"
                    );
                    bad += 1;
                    continue;
                }
                let content = Content { key: chunk.shard.key, rank: self.rank, version };
                if let Some(wrong) = self.kv.verify(&chunk.blocks, content) {
                    eprintln!(
                        "WRONG BYTES: chunk {:?}, slot {}: {wrong:x?}",
                        chunk.shard.key, chunk.shard.slot
                    );
                    total.wrong += 1;
                }
            }
            assert_eq!(bad, failed, "blocks with errors are those of the chunks that failed");
            total.loaded += loaded;
            total.failed += failed;
        }
        self.kv.check_gaps();
        total
    }

    fn finished_load(&mut self, job: JobId) -> (u32, u32, Vec<u32>) {
        let (loaded, failed) = until(format_args!("load {job:?} is reported"), || {
            let _ = self.adapter.wait_job(job, A_LOOK);
            self.collect();
            let at = self.loads.iter().position(|(id, ..)| *id == job)?;
            let (_, loaded, failed) = self.loads.swap_remove(at);
            Some((loaded, failed))
        });
        // Errors are there no later than the report: so they are asked for after it.
        (loaded, failed, self.adapter.get_block_ids_with_load_errors())
    }
}

impl Drop for WorkerSide {
    fn drop(&mut self) {
        // Before the cache's memory goes.
        self.adapter.shutdown();
    }
}
