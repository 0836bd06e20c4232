//! A client that holds as much as a client can hold, so that its death leaves something to undo.

use crate::child::{self, Job, client};
use crate::lookup::fill::{self, CHAIN, SHARD_BYTES};
use anyhow::ensure;
use kvring_adapter::{
    Key, PagedKv, Plane, PollingSchedulerAdapter, Role, Round, SchedulerOptions, StoreChunk, WorkerAdapter,
    WorkerOptions,
};
use kvring_gpu_kernels::{CopyBackend, CopyBatch, CopyDone, CopyError, Transfer};
use kvring_rig::pipe::Pipe;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Which engine.
#[derive(Serialize, Deserialize)]
pub(crate) struct HolderJob {
    /// Its name.
    pub(super) engine: String,
}

/// Leases held, each of a whole chain.
pub(super) const LEASES: u64 = 16;
/// Slots reserved and half written: two of a store's batches, as many as it has under way at once.
pub(super) const WRITING: u64 = 1024;

impl Job for HolderJob {
    const NAME: &'static str = "holder";

    /// The child's side: takes everything, says so, and waits for its death.
    fn be(self, mut pipe: Pipe) -> anyhow::Result<()> {
        let mut page = vec![0u8; SHARD_BYTES].into_boxed_slice();
        let plane = Plane { base: page.as_mut_ptr(), block_stride: SHARD_BYTES, page_bytes: SHARD_BYTES };
        // SAFETY: one block that outlives the adapter: this function never drops either. Nobody writes it.
        let paged = unsafe { PagedKv::new(vec![plane], 1, 1) }?;
        let options = WorkerOptions::new(fill::FINGERPRINT, 1, 0, fill::CHUNK_TOKENS);
        let worker = client(&self.engine, Role::Worker, None)?;
        let mut worker = WorkerAdapter::with_backend(&worker, options, Arc::new(Stuck))?;
        worker.register_kv_caches(paged)?;

        let scheduler = client(&self.engine, Role::Scheduler, None)?;
        let mut scheduler =
            PollingSchedulerAdapter::new(&scheduler, SchedulerOptions::new(fill::FINGERPRINT));
        for chain in 0..LEASES {
            let keys: Vec<Key> = (0..CHAIN as u64).map(|at| fill::key(chain, at)).collect();
            let found = scheduler.lookup(&format!("held-{chain}"), 1, &keys)?.chunks;
            ensure!(
                found as usize == CHAIN,
                "a lease on chain {chain}: expected {CHAIN} chunks, found {found}"
            );
        }

        // A chain that nobody has stored, another one for each holder.
        let chain = u64::from(std::process::id()) << 32;
        let chunks =
            (0..WRITING).map(|at| StoreChunk { key: fill::key(chain, at), blocks: vec![0] }).collect();
        worker.submit_store("stuck", Round { source: 3, number: 1 }, None, chunks, None)?;
        child::answer(&mut pipe, &())?;
        child::until_closed(&mut pipe);
        // Not by returning: that would wait for copies that never end.
        std::process::exit(0);
    }
}

/// A device that never finishes a copy.
struct Stuck;

impl CopyBackend for Stuck {
    kvring_gpu_kernels::copies_host_memory!();

    fn submit(&self, _batch: CopyBatch) -> Result<Box<dyn Transfer>, CopyError> {
        Ok(Box::new(Stuck))
    }

    fn name(&self) -> &'static str {
        "stuck"
    }
}

impl Transfer for Stuck {
    fn poll(&mut self) -> bool {
        false
    }

    fn wait(self: Box<Self>) -> Result<CopyDone, CopyError> {
        loop {
            std::thread::park();
        }
    }
}
