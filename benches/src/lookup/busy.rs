//! A client that stores and loads as fast as it can, so that lookups are measured beside it.
//!
//! It works in a namespace of its own and clears that whenever it has filled its share, so that the index that is
//! measured stays what it is.

use super::fill;
use crate::child::{self, Job};
use anyhow::{Context, ensure};
use kvring_adapter::{
    CallError, Key, LoadChunk, PagedKv, Plane, PollingSchedulerAdapter, Role, Round, SchedulerOptions,
    StoreChunk, WorkerAdapter,
};
use kvring_rig::pipe::Pipe;
use kvring_rig::random::Random;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// Which engine.
#[derive(Serialize, Deserialize)]
pub(crate) struct BusyJob {
    /// Its name.
    pub(crate) engine: String,
}

/// Bytes of a shard.
const SHARD_BYTES: usize = 256 << 10;
/// Chunks of one store and one load: 16 MiB.
const CHUNKS: usize = 64;
/// Longer than either can take.
const PATIENCE: Duration = Duration::from_secs(20);

struct Busy {
    worker: WorkerAdapter,
    scheduler: PollingSchedulerAdapter,
    random: Random,
    round: u32,
    stored: u64,
}

impl Job for BusyJob {
    const NAME: &'static str = "busy";

    /// The process itself: a first message starts it, a second one ends it and is answered with the number of chunks stored.
    fn be(self, mut pipe: Pipe) -> anyhow::Result<()> {
        let mut memory = fill::touched(SHARD_BYTES * CHUNKS)?;
        let plane = Plane { base: memory.as_mut_ptr(), block_stride: SHARD_BYTES, page_bytes: SHARD_BYTES };
        // SAFETY: the memory outlives the adapter, which is dropped before it, and only its jobs touch it.
        let paged = unsafe { PagedKv::new(vec![plane], CHUNKS as u32, 1) }?;
        let client = child::client(&self.engine, Role::Worker, None)?;
        let mut worker = WorkerAdapter::new(&client, fill::other_worker())?;
        worker.register_kv_caches(paged)?;
        let client = child::client(&self.engine, Role::Scheduler, None)?;
        let options = SchedulerOptions::new(fill::OTHER_FINGERPRINT);
        let scheduler = PollingSchedulerAdapter::new(&client, options);
        let mut busy = Busy { worker, scheduler, random: Random::new(99, 0), round: 0, stored: 0 };
        // The lookups must not be disturbed by page faults.
        busy.cycle()?;
        child::answer(&mut pipe, &())?;
        while pipe.receive::<()>(None)?.is_some() {
            child::answer(&mut pipe, &())?;
            busy.stored = 0;
            if !busy.until_told(&mut pipe)? {
                break;
            }
            child::answer(&mut pipe, &busy.stored)?;
        }
        busy.worker.shutdown();
        drop(memory);
        Ok(())
    }
}

impl Busy {
    /// Works until there is another message. False when there will be none.
    fn until_told(&mut self, pipe: &mut Pipe) -> anyhow::Result<bool> {
        loop {
            self.cycle()?;
            match pipe.drain::<()>(Duration::ZERO)? {
                (messages, true) if messages.is_empty() => {}
                (messages, _) => return Ok(!messages.is_empty()),
            }
        }
    }

    /// Stores chunks, looks them up, loads them, and forgets them.
    fn cycle(&mut self) -> anyhow::Result<()> {
        let chain = self.random.bits();
        let keys: Vec<Key> = (0..CHUNKS as u64).map(|at| fill::key(chain, at)).collect();
        let chunks = keys.iter().zip(0..).map(|(key, block)| StoreChunk { key: *key, blocks: vec![block] });
        self.round += 1;
        self.worker.submit_store(
            "busy",
            Round { source: 2, number: self.round },
            None,
            chunks.collect(),
            None,
        )?;
        ensure!(self.worker.wait_idle(PATIENCE), "a store did not end within {PATIENCE:?}");
        // Under a load like this one an answer may be late: then there is less to load.
        let hit = self.scheduler.lookup("busy", self.round, &keys)?;
        let loads: Vec<LoadChunk> =
            hit.handles().zip(0..).map(|(chunk, block)| LoadChunk { chunk, blocks: vec![block] }).collect();
        self.worker.submit_load("busy", loads, None)?;
        ensure!(self.worker.wait_idle(PATIENCE), "a load did not end within {PATIENCE:?}");
        self.scheduler.end_session("busy");
        self.clear()?;
        let finished = self.worker.get_finished();
        self.stored += finished.stores.iter().map(|(_, _, report)| u64::from(report.stored)).sum::<u64>();
        Ok(())
    }

    /// Clears the namespace. An engine that lost its CPU for a while looks stalled until it has it again.
    fn clear(&mut self) -> anyhow::Result<()> {
        let until = Instant::now() + PATIENCE;
        loop {
            match self.scheduler.reset_cache() {
                Ok(_) => return Ok(()),
                Err(CallError::Degraded(_) | CallError::TimedOut { .. }) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => return Err(error).context("clearing the busy client's namespace"),
            }
        }
    }
}
