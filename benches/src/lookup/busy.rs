//! A client that stores and loads as fast as it can, so that lookups are measured beside it.
//!
//! It works in a namespace of its own and clears that whenever it has filled its share, so that the index that is
//! measured stays what it is.

use super::fill::{self, Random};
use crate::child;
use anyhow::{Context, ensure};
use kvring_adapter::{
    CallError, Key, LoadChunk, PagedKv, Plane, PollingSchedulerAdapter, Role, Round, SchedulerApi,
    SchedulerOptions, StoreChunk, WorkerAdapter,
};
use serde::{Deserialize, Serialize};
use std::sync::mpsc::{Receiver, TryRecvError};
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

/// The child's side: `go` starts, `stop` ends and answers how many chunks were stored.
pub(crate) fn be(job: BusyJob) -> anyhow::Result<()> {
    let mut memory = fill::touched(SHARD_BYTES * CHUNKS)?;
    let plane = Plane { base: memory.as_mut_ptr(), block_stride: SHARD_BYTES, page_bytes: SHARD_BYTES };
    // SAFETY: the memory outlives the adapter, which is dropped before it, and only its jobs touch it.
    let paged = unsafe { PagedKv::new(vec![plane], CHUNKS as u32, 1) }?;
    let client = child::client(&job.engine, Role::Worker, None)?;
    let mut worker = WorkerAdapter::new(&client, fill::other_worker())?;
    worker.register_kv_caches(paged)?;
    let client = child::client(&job.engine, Role::Scheduler, None)?;
    let options = SchedulerOptions::new(fill::OTHER_FINGERPRINT);
    let scheduler = PollingSchedulerAdapter::new(&client, options);
    let mut busy = Busy { worker, scheduler, random: Random(99), round: 0, stored: 0 };
    // Page faults are not what the lookups are to be disturbed by.
    busy.cycle()?;
    child::answer("ready")?;

    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for command in child::commands() {
            if tell.send(command).is_err() {
                return;
            }
        }
    });
    while told.recv().is_ok() {
        child::answer("going")?;
        busy.stored = 0;
        if !busy.until_told(&told)? {
            break;
        }
        child::answer(&busy.stored.to_string())?;
    }
    busy.worker.shutdown();
    drop(memory);
    Ok(())
}

impl Busy {
    /// Works until there is another command. False when there will be none.
    fn until_told(&mut self, told: &Receiver<String>) -> anyhow::Result<bool> {
        loop {
            self.cycle()?;
            match told.try_recv() {
                Ok(_) => return Ok(true),
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => return Ok(false),
            }
        }
    }

    /// Stores chunks, looks them up, loads them, and forgets them.
    fn cycle(&mut self) -> anyhow::Result<()> {
        let chain = self.random.next();
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
        let loads: Vec<LoadChunk> = hit
            .shards_of(0)
            .zip(0..)
            .map(|(shard, block)| LoadChunk { shard, blocks: vec![block] })
            .collect();
        self.worker.submit_load("busy", loads, None)?;
        ensure!(self.worker.wait_idle(PATIENCE), "a load did not end within {PATIENCE:?}");
        self.scheduler.end_session("busy");
        self.clear()?;
        let finished = self.worker.get_finished();
        self.stored += finished.stores.iter().map(|(_, _, report)| u64::from(report.stored)).sum::<u64>();
        Ok(())
    }

    /// Forgets what is stored. An engine that lost its CPU for a while looks stalled until it has it again.
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
