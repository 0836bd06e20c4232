//! A worker's process: one rank, which serves whatever life of its scheduler there is.

use super::lives::Lives;
use super::message::{DRAIN, FromClient, Job, Life, Manner, OPERATION, Outcome, Reply, Start, ToWorker, Who};
use super::watch::Watch;
use super::{BEAT, TELL};
use crate::child::ready;
use anyhow::{Context, bail};
use kvring_adapter::{
    Client, Finished, JobId, Key, LoadChunk, LoadReport, Role, Round, StoreChunk, StoreReport, WorkerAdapter,
    WorkerOptions,
};
use kvring_rig::blocks::BlockPool;
use kvring_rig::content::Content;
use kvring_rig::pages::Pages;
use kvring_rig::pipe::Pipe;
use kvring_rig::wire::Handle;
use kvring_shm_abi::segment::EngineName;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a look for messages sleeps while jobs are open, and while none is.
const LOOK: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(20));

/// The process: it does its jobs until it is told to end, or its parent has ended.
pub(crate) fn be_worker(start: &Start, pipe: Pipe) -> anyhow::Result<()> {
    let mut worker = Worker::start(start, pipe)?;
    worker.tell(&FromClient::Ready)?;
    worker.serve()
}

/// A job of the adapter's that has not been reported.
struct Open {
    job: Job,
    since: Instant,
    keys: Vec<Key>,
    blocks: Vec<Vec<u32>>,
    /// The engine's life when it began.
    life: Option<Life>,
    is_store: bool,
}

struct Worker {
    // Dropped first: it shuts the adapter down, which uses the pages.
    adapter: WorkerAdapter,
    client: Arc<Client>,
    pages: Pages,
    rank: u32,
    pool: BlockPool,
    jobs: HashMap<JobId, Open>,
    /// Blocks whose load has failed. The adapter may name them before it reports the load.
    failed: HashSet<u32>,
    lives: Lives,
    watch: Watch,
    pipe: Pipe,
    beaten: Instant,
    draining: bool,
    manner: Manner,
}

impl Worker {
    fn start(start: &Start, pipe: Pipe) -> anyhow::Result<Worker> {
        let Who::Worker { rank, .. } = start.who else { bail!("expected a worker, got {}", start.who) };
        let (mut watch, copy_threads) = match start.manner {
            Manner::Calm { copy_threads, .. } => (Watch::that_counts(), copy_threads),
            Manner::Wild { .. } => (Watch::start()?, Some(1 + (start.life % 2) as usize)),
        };
        let pages = Pages::new(start.shape)?;
        let client = Client::new(Role::Worker, start.client_options())?;
        let options = WorkerOptions {
            model: start.model.clone(),
            dtype: "counter".to_owned(),
            copy_threads,
            ..WorkerOptions::new(start.fingerprint, start.ranks, rank, start.chunk_tokens)
        };
        let mut adapter = WorkerAdapter::new(&client, options)?;
        // SAFETY: `adapter` is dropped before `pages`, and blocks are left alone while a job names them.
        let paged = unsafe { pages.describe()? };
        watch.call("register_kv_caches", OPERATION, || adapter.register_kv_caches(paged))?;
        if start.is_calm() {
            ready(&client)?;
        }
        Ok(Worker {
            adapter,
            client,
            pages,
            rank,
            manner: start.manner,
            pool: BlockPool::new(start.shape.blocks),
            jobs: HashMap::new(),
            failed: HashSet::new(),
            lives: Lives::new(EngineName::new(&start.engine)?),
            watch,
            pipe,
            beaten: Instant::now(),
            draining: false,
        })
    }

    fn tell(&mut self, message: &FromClient) -> anyhow::Result<()> {
        self.pipe.send(message, Instant::now() + TELL).context("telling the coordinator")
    }

    fn reply(&mut self, job: Job, what: Outcome) -> anyhow::Result<()> {
        self.tell(&FromClient::Reply(Reply { job, what }))
    }

    fn serve(&mut self) -> anyhow::Result<()> {
        loop {
            let mut patience = if self.jobs.is_empty() { LOOK.1 } else { LOOK.0 };
            if matches!(self.manner, Manner::Calm { .. }) && !self.jobs.is_empty() {
                // No message comes meanwhile, and the end of a copy must not wait for the next look.
                self.adapter.wait_some(LOOK.0);
                patience = Duration::ZERO;
            }
            let (messages, open) = self.pipe.drain(patience)?;
            for message in messages {
                match message {
                    ToWorker::Load { job, chunks } => self.load(job, &chunks)?,
                    ToWorker::Store { job, round, parent, keys } => self.store(job, round, parent, keys)?,
                    ToWorker::Preempt(job) => self.preempt(job),
                    ToWorker::Drain => self.draining = true,
                    ToWorker::End => return self.end(),
                }
            }
            if !open {
                return Ok(());
            }
            self.look_for_finished()?;
            self.beat()?;
            self.come_to_rest()?;
        }
    }

    fn beat(&mut self) -> anyhow::Result<()> {
        if self.beaten.elapsed() >= BEAT || self.watch.tally().deadline_misses > 0 {
            self.beaten = Instant::now();
            self.watch.call("is_healthy", Duration::ZERO, || self.adapter.is_healthy());
            let oldest = self.jobs.values().map(|open| open.since.elapsed()).max().unwrap_or_default();
            let mut tally = self.watch.take();
            tally.oldest_job_ms = u64::try_from(oldest.as_millis()).unwrap_or(u64::MAX);
            self.tell(&FromClient::Beat(tally))?;
        }
        Ok(())
    }

    fn verifies(&self) -> bool {
        !matches!(self.manner, Manner::Calm { verify: false, .. })
    }

    fn content(&self, key: Key) -> Content {
        Content { key, rank: self.rank, version: 0 }
    }

    fn take_blocks(&mut self, chunks: usize) -> Option<Vec<Vec<u32>>> {
        self.pool.take(chunks, self.pages.shape().blocks_per_chunk).ok()
    }

    fn load(&mut self, job: Job, handles: &[Handle]) -> anyhow::Result<()> {
        let Some(blocks) = self.take_blocks(handles.len()) else { return self.reply(job, Outcome::Refused) };
        let keys: Vec<Key> = handles.iter().map(|handle| handle.key).collect();
        if self.verifies() {
            for (key, blocks) in keys.iter().zip(&blocks) {
                let content = self.content(*key);
                // SAFETY: blocks fresh from the pool: no job names them.
                unsafe { self.pages.spoil(content, blocks) };
            }
        }
        let chunk = |(handle, blocks): (&Handle, &Vec<u32>)| LoadChunk {
            chunk: handle.chunk(),
            blocks: blocks.clone(),
        };
        let chunks = handles.iter().zip(&blocks).map(chunk).collect();
        let (adapter, name) = (&mut self.adapter, job.name());
        let id =
            self.watch.call("submit_load", Duration::ZERO, || adapter.submit_load(&name, chunks, None))?;
        let open = Open { job, since: Instant::now(), keys, blocks, life: None, is_store: false };
        self.jobs.insert(id, open);
        Ok(())
    }

    fn store(
        &mut self,
        job: Job,
        round: (u32, u32),
        parent: Option<Key>,
        keys: Vec<Key>,
    ) -> anyhow::Result<()> {
        let Some(blocks) = self.take_blocks(keys.len()) else { return self.reply(job, Outcome::Refused) };
        for (key, blocks) in keys.iter().zip(&blocks) {
            let content = self.content(*key);
            // SAFETY: blocks fresh from the pool: no job names them.
            unsafe { self.pages.compute(content, blocks) };
        }
        let chunk = |(key, blocks): (&Key, &Vec<u32>)| StoreChunk { key: *key, blocks: blocks.clone() };
        let chunks = keys.iter().zip(&blocks).map(chunk).collect();
        let (source, number) = round;
        let life = self.lives.now();
        let (adapter, name, round) = (&mut self.adapter, job.name(), Round { source, number });
        let submit = || adapter.submit_store(&name, round, parent, chunks, None);
        let id = self.watch.call("submit_store", Duration::ZERO, submit)?;
        self.jobs.insert(id, Open { job, since: Instant::now(), keys, blocks, life, is_store: true });
        Ok(())
    }

    /// The request's blocks are given to another request at once. A store that still reads them would commit the bytes of that
    /// request, and a later load would see them.
    fn preempt(&mut self, job: Job) {
        let (adapter, name) = (&mut self.adapter, job.name());
        let preempt = || adapter.handle_preemptions(Some(&[&name]));
        if !matches!(self.manner, Manner::Wild { careless: true, .. }) {
            self.watch.call("handle_preemptions", OPERATION, preempt);
        }
        self.watch.tally().preemptions += 1;
        for open in self.jobs.values().filter(|open| open.job == job && open.is_store) {
            for (key, blocks) in open.keys.iter().zip(&open.blocks) {
                let somebody_elses = Content { key: *key, rank: self.rank, version: 1 };
                // SAFETY: a store of these blocks is open, but by the call above nothing reads them any more.
                unsafe { self.pages.compute(somebody_elses, blocks) };
            }
        }
    }

    fn look_for_finished(&mut self) -> anyhow::Result<()> {
        let adapter = &mut self.adapter;
        let Finished { stores, loads } =
            self.watch.call("get_finished", Duration::ZERO, || adapter.get_finished());
        for (id, _, report) in stores {
            self.stored(id, report)?;
        }
        if loads.is_empty() {
            return Ok(());
        }
        let failed = || self.adapter.get_block_ids_with_load_errors();
        self.failed.extend(self.watch.call("get_block_ids_with_load_errors", Duration::ZERO, failed));
        for (id, _, report) in loads {
            self.loaded(id, report)?;
        }
        Ok(())
    }

    fn stored(&mut self, id: JobId, report: StoreReport) -> anyhow::Result<()> {
        let Some(open) = self.jobs.remove(&id) else { bail!("{id:?} was reported, and never submitted") };
        let tally = self.watch.tally();
        tally.stored += u64::from(report.stored);
        tally.skipped += u64::from(report.skipped);
        tally.dropped += u64::from(report.dropped);
        tally.stored_bytes += report.bytes;
        tally.store_ns += report.copy_ns;
        self.pool.give(open.blocks);
        let life = open.life.filter(|life| self.lives.now() == Some(*life));
        let StoreReport { stored, skipped, .. } = report;
        self.reply(open.job, Outcome::Stored { stored, skipped, life })
    }

    fn loaded(&mut self, id: JobId, report: LoadReport) -> anyhow::Result<()> {
        let Some(open) = self.jobs.remove(&id) else { bail!("{id:?} was reported, and never submitted") };
        let mut wrong_bytes = 0;
        for (key, blocks) in open.keys.iter().zip(&open.blocks) {
            let failed = blocks.iter().filter(|block| self.failed.remove(*block)).count();
            if failed == 0 && self.verifies() {
                // SAFETY: the load has been reported.
                let wrong = unsafe { self.pages.verify(self.content(*key), blocks) };
                wrong_bytes += wrong.map_or(0, |wrong| {
                    tracing::error!(?wrong, "a loaded page is wrong");
                    wrong.bytes
                });
            }
        }
        let tally = self.watch.tally();
        tally.wrong_bytes += wrong_bytes;
        tally.loaded += u64::from(report.loaded);
        tally.failed += u64::from(report.failed);
        tally.loaded_bytes += report.bytes;
        tally.load_ns += report.copy_ns;
        self.pool.give(open.blocks);
        self.reply(open.job, Outcome::Loaded)
    }

    /// Says that it is quiet once it is: no job, and the engine has heard everything.
    fn come_to_rest(&mut self) -> anyhow::Result<()> {
        if self.draining && self.jobs.is_empty() {
            let client = &self.client;
            if self.watch.call("noop", OPERATION, || client.noop()).is_ok() {
                self.draining = false;
                let tally = self.watch.take();
                self.tell(&FromClient::Beat(tally))?;
                self.tell(&FromClient::Quiet)?;
            }
        }
        Ok(())
    }

    fn end(&mut self) -> anyhow::Result<()> {
        let adapter = &mut self.adapter;
        // It waits for its jobs, for answers that they still wait for, for a registration, and for the engine's goodbye.
        self.watch.call("shutdown", DRAIN * 2 + OPERATION * 3, || adapter.shutdown());
        let tally = self.watch.take();
        self.tell(&FromClient::Beat(tally))
    }
}
