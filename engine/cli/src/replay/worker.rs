//! One simulated vLLM worker: a rank with its own paged KV cache, in a process of its own.

use super::message::{FromWorker, Loaded, Plan, STEP_MAX, Step, Stored, ToWorker};
use anyhow::{Context, bail};
use kvring_adapter::{
    Client, ClientOptions, Finished, JobId, Key, LoadChunk, Role, Round, StoreChunk, WorkerAdapter,
    WorkerOptions,
};
use kvring_adapter::{LoadReport, StoreReport};
use kvring_rig::child::die_with_parent;
use kvring_rig::content::Content;
use kvring_rig::pages::Pages;
use kvring_rig::pipe::Pipe;
use kvring_rig::wire::Shard;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the engine may take to attach a client of a replay.
pub(super) const ATTACH_MAX: Duration = Duration::from_secs(20);
/// How long one look for finished jobs sleeps at most.
const LOOK: Duration = Duration::from_millis(100);

/// The worker's process: does what its scheduler says, until that closes the pipe.
pub(crate) fn be_worker() -> anyhow::Result<()> {
    die_with_parent()?;
    let mut pipe = Pipe::to_parent()?;
    let Some(ToWorker::Start(plan, rank)) = pipe.receive(None)? else { bail!("expected `start` first") };
    let mut worker =
        Worker::start(&plan, rank).with_context(|| format!("instance {} rank {rank}", plan.instance))?;
    tell(&mut pipe, &FromWorker::Ready)?;
    while let Some(message) = pipe.receive(None)? {
        match message {
            ToWorker::Start(..) => bail!("expected `start` once"),
            ToWorker::Step(step) => worker.step(&step, &mut pipe)?,
            ToWorker::Quiesce => {
                worker.quiesce()?;
                tell(&mut pipe, &FromWorker::Quiet)?;
            }
        }
    }
    worker.adapter.shutdown();
    Ok(())
}

fn tell(pipe: &mut Pipe, message: &FromWorker) -> anyhow::Result<()> {
    pipe.send(message, Instant::now() + STEP_MAX).context("telling the scheduler")
}

struct Worker {
    // Dropped first: it shuts the adapter down, which uses the pages.
    adapter: WorkerAdapter,
    client: Arc<Client>,
    pages: Pages,
    rank: u32,
    verify: bool,
}

impl Worker {
    fn start(plan: &Plan, rank: u32) -> anyhow::Result<Worker> {
        let pages = Pages::new(plan.shape)?;
        let client = Client::new(
            Role::Worker,
            ClientOptions {
                engine: plan.engine.clone(),
                client: format!("replay {} rank {rank}", plan.instance),
                attach_timeout: ATTACH_MAX,
                register_timeout: ATTACH_MAX,
                ..ClientOptions::default()
            },
        )?;
        let mut adapter = WorkerAdapter::new(
            &client,
            WorkerOptions {
                model: "replay".to_owned(),
                dtype: "counter".to_owned(),
                copy_threads: plan.copy_threads,
                ..WorkerOptions::new(plan.fingerprint, plan.ranks, rank, plan.chunk_tokens)
            },
        )?;
        // SAFETY: `adapter` is dropped before `pages`, and `step` leaves blocks alone while a job names them.
        let paged = unsafe { pages.describe()? };
        adapter.register_kv_caches(paged)?;
        if let Err(health) = client.wait_ready(ATTACH_MAX) {
            bail!("the engine is {health} after {} s", ATTACH_MAX.as_secs());
        }
        Ok(Worker { adapter, client, pages, rank, verify: plan.verify })
    }

    fn content(&self, key: Key) -> Content {
        Content { key, rank: self.rank, version: 0 }
    }

    /// Loads, reports, computes, stores, reports.
    fn step(&mut self, step: &Step, pipe: &mut Pipe) -> anyhow::Result<()> {
        let (loaded, failed) = self.load(step)?;
        tell(pipe, &FromWorker::Loaded(loaded))?;
        // What could not be loaded is computed, as vLLM does with `kv_load_failure_policy: recompute`.
        let again = step.load.iter().filter(|(_, blocks)| blocks.iter().any(|block| failed.contains(block)));
        let compute = again.map(|(shard, blocks)| (shard.key, blocks));
        for (key, blocks) in compute.chain(step.store.iter().map(|(key, blocks)| (*key, blocks))) {
            let content = self.content(key);
            // SAFETY: the load has been reported, and there is no other job.
            unsafe { self.pages.compute(content, blocks) };
        }
        let stored = self.store(step)?;
        tell(pipe, &FromWorker::Stored(stored))
    }

    fn load(&mut self, step: &Step) -> anyhow::Result<(Loaded, HashSet<u32>)> {
        if step.load.is_empty() {
            return Ok(Default::default());
        }
        if self.verify {
            for (shard, blocks) in &step.load {
                let content = self.content(shard.key);
                // SAFETY: between two steps no job is open.
                unsafe { self.pages.spoil(content, blocks) };
            }
        }
        let chunk = |(shard, blocks): &(Shard, Vec<u32>)| LoadChunk {
            shard: shard.handle(step.arena_id),
            blocks: blocks.clone(),
        };
        let job = self.adapter.submit_load(&step.request, step.load.iter().map(chunk).collect(), None)?;
        let report = self.wait_for(job, |finished| find(&finished.loads, job))?;
        let failed: HashSet<u32> = self.adapter.get_block_ids_with_load_errors().into_iter().collect();
        let LoadReport { loaded, failed: failed_shards, bytes, copy_ns, .. } = report;
        let (loaded, failed_shards) = (loaded.into(), failed_shards.into());
        let mut wrong_bytes = 0;
        if self.verify {
            for (shard, blocks) in &step.load {
                if !blocks.iter().any(|block| failed.contains(block)) {
                    // SAFETY: the load has been reported.
                    let wrong = unsafe { self.pages.verify(self.content(shard.key), blocks) };
                    wrong_bytes += wrong.map_or(0, |wrong| {
                        tracing::error!(?wrong, "a loaded page is wrong");
                        wrong.bytes
                    });
                }
            }
        }
        Ok((Loaded { loaded, failed: failed_shards, bytes, copy_ns, wrong_bytes }, failed))
    }

    fn store(&mut self, step: &Step) -> anyhow::Result<Stored> {
        if step.store.is_empty() {
            return Ok(Stored::default());
        }
        let chunks = step.store.iter().map(|(key, blocks)| StoreChunk { key: *key, blocks: blocks.clone() });
        let (source, number) = step.round;
        let round = Round { source, number };
        let job = self.adapter.submit_store(&step.request, round, step.parent, chunks.collect(), None)?;
        let report = self.wait_for(job, |finished| find(&finished.stores, job))?;
        let StoreReport { stored, skipped, dropped, bytes, copy_ns, .. } = report;
        Ok(Stored { stored: stored.into(), skipped: skipped.into(), dropped: dropped.into(), bytes, copy_ns })
    }

    /// Waits for a job's report, as vLLM asks in each of its steps.
    fn wait_for<R>(&mut self, job: JobId, find: impl Fn(&Finished) -> Option<R>) -> anyhow::Result<R> {
        let deadline = Instant::now() + STEP_MAX;
        loop {
            if let Some(report) = find(&self.adapter.get_finished()) {
                return Ok(report);
            }
            if Instant::now() >= deadline {
                bail!("{job:?} was not reported within {} s: a hang of the adapter", STEP_MAX.as_secs());
            }
            self.adapter.wait_some(LOOK);
        }
    }

    fn quiesce(&mut self) -> anyhow::Result<()> {
        if !self.adapter.wait_idle(STEP_MAX) {
            bail!("jobs are open {} s after the last one was reported", STEP_MAX.as_secs());
        }
        // The ring is served in order: what came before this has been done when it is answered.
        self.client.noop().context("the engine does not answer at the end of the replay")
    }
}

fn find<R: Copy>(reports: &[(JobId, String, R)], job: JobId) -> Option<R> {
    reports.iter().find(|(id, ..)| *id == job).map(|(.., report)| *report)
}
