//! A worker as a test sees it: it stores and loads keys, and says whether the bytes were right.

use crate::kv::on_fake_gpu;
use crate::proto::{ClientSpec, Loaded, Stored, WorkerSpec, all_stored};
use crate::wait::{LIMIT, until};
use kvring_adapter::{
    Checksum, Client, JobId, Key, LoadChunk, RegisterError, Role, Round, StoreChunk, SubmitError,
    WorkerAdapter, WorkerOptions,
};
use kvring_gpu_kernels::{CopyBackend, CpuBackend};
use kvring_rig::content::Content;
use kvring_rig::pages::Pages;
use kvring_rig::wire::Handle;
use std::sync::Arc;
use std::time::Duration;

/// How long a look at a job may wait for its end.
const A_LOOK: Duration = Duration::from_millis(20);

/// The name of the request that all stores and loads of a [`WorkerSide`] are for.
pub const REQUEST: &str = "r";

/// One rank's worker with its KV cache.
pub struct WorkerSide {
    // Dropped first: nothing touches the cache's memory after it.
    adapter: WorkerAdapter,
    client: Arc<Client>,
    pages: Pages,
    rank: u32,
    next_block: u32,
    /// The blocks of the last store that was submitted.
    submitted: Vec<u32>,
    /// Reports of stores that nobody has asked for yet.
    stores: Vec<(JobId, Stored)>,
    /// Reports of loads that nobody has asked for yet: how many chunks were loaded, and how many failed.
    loads: Vec<(JobId, u32, u32)>,
}

/// A new client of this role.
pub fn client(role: Role, spec: &ClientSpec) -> Arc<Client> {
    Client::new(role, spec.options()).expect("good options")
}

impl WorkerSide {
    /// A worker with a cache of its own. Waits at most `register_ms` until it is attached and registered.
    pub fn start(spec: &WorkerSpec) -> Result<WorkerSide, RegisterError> {
        match on_fake_gpu(spec.shape) {
            Some(pages) => WorkerSide::made(spec, pages, WorkerAdapter::new),
            None => WorkerSide::copying_with(spec, Arc::new(CpuBackend::new(2))),
        }
    }

    /// The same with a copy backend of the test's own.
    pub fn copying_with(
        spec: &WorkerSpec,
        backend: Arc<dyn CopyBackend>,
    ) -> Result<WorkerSide, RegisterError> {
        let with = |client: &Arc<Client>, options| WorkerAdapter::with_backend(client, options, backend);
        WorkerSide::made(spec, Pages::new(spec.shape).expect("a shape that can be"), with)
    }

    fn made(
        spec: &WorkerSpec,
        pages: Pages,
        make: impl FnOnce(&Arc<Client>, WorkerOptions) -> Result<WorkerAdapter, RegisterError>,
    ) -> Result<WorkerSide, RegisterError> {
        let client = client(Role::Worker, &spec.client);
        let mut options = WorkerOptions::new(spec.fingerprint(), spec.world, spec.rank, spec.chunk_tokens);
        options.model = "test-model".to_owned();
        options.checksum = if spec.checksum { Checksum::Verify } else { Checksum::Off };
        let mut adapter = make(&client, options)?;
        // SAFETY: a `WorkerSide` shuts its adapter down before it drops the pages, and touches a block only while no job has it.
        let paged = unsafe { pages.describe() }.expect("a cache that the adapter takes");
        adapter.register_kv_caches(paged)?;
        let (submitted, stores, loads) = (Vec::new(), Vec::new(), Vec::new());
        Ok(WorkerSide { adapter, client, pages, rank: spec.rank, next_block: 0, submitted, stores, loads })
    }

    pub fn client(&self) -> &Arc<Client> {
        &self.client
    }

    /// The adapter itself, for calls that have no helper here.
    pub fn adapter(&mut self) -> &mut WorkerAdapter {
        &mut self.adapter
    }

    /// Waits until it is attached and registered.
    pub fn ready(&self) {
        self.client.wait_ready(LIMIT).expect("a worker that is ready");
    }

    /// The blocks of the next chunk, in an order that is not that of their ids.
    fn take_blocks(&mut self) -> Vec<u32> {
        let shape = self.pages.shape();
        let per_chunk = shape.blocks_per_chunk;
        if self.next_block + per_chunk > shape.blocks {
            self.next_block = 0;
        }
        let first = self.next_block;
        self.next_block += per_chunk;
        (first..first + per_chunk).rev().collect()
    }

    /// Computes the chunks of `keys`, which must fit into the cache at once, and submits their store.
    pub fn submit_store(&mut self, round: Round, keys: &[Key], version: u64) -> Result<JobId, SubmitError> {
        self.submit_after(None, round, keys, version)
    }

    fn submit_after(
        &mut self,
        parent: Option<Key>,
        round: Round,
        keys: &[Key],
        version: u64,
    ) -> Result<JobId, SubmitError> {
        assert!(keys.len() <= self.pages.shape().chunks());
        let mut chunks = Vec::with_capacity(keys.len());
        self.submitted.clear();
        for key in keys {
            let blocks = self.take_blocks();
            self.submitted.extend(&blocks);
            let content = Content { key: *key, rank: self.rank, version };
            // SAFETY: the blocks of the next chunk: no job has them any more.
            unsafe { self.pages.compute(content, &blocks) };
            chunks.push(StoreChunk { key: *key, blocks });
        }
        self.adapter.submit_store(REQUEST, round, parent, chunks, None)
    }

    /// Gives the blocks of the last submitted store to somebody else, as vLLM does after a preemption.
    pub fn overwrite_submitted(&mut self) {
        let somebody_elses = Content { key: [0; 2], rank: self.rank, version: u64::MAX };
        // SAFETY: by the preemption, the store reads them no more.
        unsafe { self.pages.compute(somebody_elses, &self.submitted) };
    }

    /// Computes the chunks of `keys`, stores them, and waits for the reports.
    pub fn store(&mut self, round: Round, keys: &[Key], version: u64) -> Stored {
        let (mut total, mut parent) = (Stored::default(), None);
        for part in keys.chunks(self.pages.shape().chunks()) {
            let job = self.submit_after(parent, round, part, version).expect("a good job");
            let report = self.finished_store(job);
            total.stored += report.stored;
            total.skipped += report.skipped;
            total.dropped += report.dropped;
            parent = part.last().copied();
        }
        total
    }

    /// Stores these chunks, all of which are written. Returns their keys.
    #[track_caller]
    pub fn stores(&mut self, round: Round, keys: Vec<Key>, version: u64) -> Vec<Key> {
        assert_eq!(self.store(round, &keys, version), all_stored(keys.len()));
        keys
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

    /// Loads chunks into spoilt blocks, waits for the reports, and looks at every byte of those without an error.
    pub fn load(&mut self, handles: &[Handle], version: u64) -> Loaded {
        let mut total = Loaded::default();
        for part in handles.chunks(self.pages.shape().chunks()) {
            let chunks: Vec<LoadChunk> = part
                .iter()
                .map(|handle| {
                    let blocks = self.take_blocks();
                    let content = Content { key: handle.key, rank: self.rank, version };
                    // SAFETY: as in `submit_after`.
                    unsafe { self.pages.spoil(content, &blocks) };
                    LoadChunk { chunk: handle.chunk(), blocks }
                })
                .collect();
            let job = self.adapter.submit_load(REQUEST, chunks.clone(), None).expect("a good job");
            let (loaded, failed, errors) = self.finished_load(job);
            assert_eq!((loaded + failed) as usize, chunks.len(), "a report of every chunk");
            let mut bad = 0;
            for (chunk, handle) in chunks.iter().zip(part) {
                if chunk.blocks.iter().any(|block| errors.contains(block)) {
                    let all_failed = chunk.blocks.iter().all(|block| errors.contains(block));
                    assert!(all_failed, "a chunk fails as a whole");
                    bad += 1;
                    continue;
                }
                let content = Content { key: handle.key, rank: self.rank, version };
                // SAFETY: the load has been reported.
                if let Some(wrong) = unsafe { self.pages.verify(content, &chunk.blocks) } {
                    eprintln!("WRONG BYTES: {handle:?}: {wrong:x?}");
                    total.wrong += 1;
                }
            }
            assert_eq!(bad, failed, "blocks with errors are those of the chunks that failed");
            total.loaded += loaded;
            total.failed += failed;
        }
        assert!(self.pages.gaps_are_untouched());
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
        // Errors are there no later than the report, so they are asked for after it.
        (loaded, failed, self.adapter.get_block_ids_with_load_errors())
    }
}

impl Drop for WorkerSide {
    fn drop(&mut self) {
        // Before the cache's memory goes.
        self.adapter.shutdown();
    }
}
