//! How soon a successor takes stores, and what lookups find and cost meanwhile, for clients that were there before it as well.

use super::Times;
use super::life::Life;
use crate::child;
use crate::engine_bench::start_nothing;
use crate::lookup::fill::{self, CHAIN, Chains, SHARD_BYTES};
use anyhow::{Context, ensure};
use indicatif::ProgressBar;
use kvring_adapter::{
    Client, ClientOptions, EngineView, Key, PagedKv, Plane, PollingSchedulerAdapter, Role, Round,
    SchedulerOptions, StoreChunk, WorkerAdapter, WorkerOptions,
};
use kvring_engine::preflight::Room;
use kvring_engine::stats::Stat;
use kvring_shm_abi::abi::{Described, Type};
use kvring_shm_abi::chunk::ChunkRecord;
use kvring_shm_abi::engine_segment::Places;
use kvring_shm_abi::futex::{Deadline, monotonic_ns};
use kvring_shm_abi::mapping::Shared;
use kvring_shm_abi::segment::{Access, EngineName, SegmentFile};
use kvring_shm_abi::slot::SLOT_HEADER_BYTES;
use kvring_shm_abi::superblock::ARENA_TRAILER;
use kvring_shm_abi::sync::{AtomicU64, Ordering};
use std::time::Duration;

/// A successor that has taken no store by then does not serve.
const FIRST_STORE_MAX: Duration = Duration::from_secs(5);
/// The pause between two attempts: short beside the time that is measured. The engine has the CPU meanwhile.
const POLL_EVERY: Duration = Duration::from_micros(100);
/// Lookups of an engine that is stopped, and of one that is dead, in each restart.
const LOOKUPS: u32 = 200;
/// The request that looks up.
const REQUEST: &str = "lookup";

/// The times of restarts with one number of chunks.
#[derive(Default)]
pub(super) struct Restarts {
    /// From the making of the successor's process to the first store of an earlier client that is through.
    pub(super) to_store: Times,
    /// Restarts after which there was none.
    pub(super) without: usize,
    /// Lookups of a whole chain while the engine was stopped, dead, and recovering.
    pub(super) stopped: Times,
    pub(super) dead: Times,
    pub(super) recovering: Times,
    /// Of all of these, those that found the whole chain, and how many there were.
    pub(super) found: u64,
    pub(super) looked_up: u64,
    /// An empty process from its making to its end.
    pub(super) process: Times,
    /// A plain read of as many chunk records and slot headers, through a fresh mapping.
    pub(super) read: Times,
    /// Chunks found after a restart, of those before: the least.
    pub(super) warm: f64,
}

/// An engine with `chunks` chunks is killed and started again, `restarts` times or for as long as `budget` allows, and
/// not again once it has forgotten everything. `None` where there is no room for so many chunks.
pub(super) fn measure(
    chunks: u32,
    restarts: usize,
    budget: Duration,
    bar: &ProgressBar,
) -> anyhow::Result<Option<Restarts>> {
    bar.set_message(format!("restarting with {chunks} chunks: storing them"));
    let steps = bar.position() + restarts as u64 + 1;
    let tables = u64::from(chunks) * (SLOT_HEADER_BYTES + size_of::<ChunkRecord>()) as u64;
    let index_bytes = u64::from(chunks) * SHARD_BYTES as u64;
    // A part of the slots is kept free by eviction, which must have nothing to do.
    let arena = index_bytes + index_bytes / 10 + (64 << 20);
    if arena + tables + tables / 10 + ARENA_TRAILER > Room::now().tightest().usable() {
        bar.set_position(steps);
        return Ok(None);
    }
    let mut life = Life::start(arena, Some((arena / SHARD_BYTES as u64) as u32), None)?;
    life.engine()?.wait_allocated()?;
    let chains = Chains::new(chunks);
    fill::fill(life.engine()?, &chains).context("storing chunks")?;
    let evicted = life.engine()?.stat(Stat::Evictions)?;
    ensure!(evicted == 0, "expected an index that keeps all of {chunks} chunks, but {evicted} were evicted");
    // Default options: the pauses of an earlier client before it attaches again are part of the answer.
    let options = ClientOptions { engine: life.name().to_string(), ..ClientOptions::default() };
    let client = child::attached(Role::Scheduler, options)?;
    let mut poller = Poller::new(&client, &chains);
    ensure!(poller.poll()?.1, "a lookup before the death found less than was stored");
    let mut storer = Storer::new(life.name())?;
    let found = count(&client, &chains)?;
    ensure!(found == u64::from(chunks), "expected {chunks} chunks before the death, found {found}");
    bar.inc(1);

    let mut measured = Restarts { warm: 1.0, ..Restarts::default() };
    let deadline = Deadline::after(budget);
    for restart in 0..restarts {
        if restart > 0 && deadline.passed() {
            break;
        }
        bar.set_message(format!("restarting with {chunks} chunks"));
        measured.process.push(start_nothing()? as u64);
        measured.read.push(read_tables(life.name(), chunks)?);
        life.freeze()?;
        let Restarts { stopped, dead, recovering, found: hits, looked_up, .. } = &mut measured;
        poller.polls(LOOKUPS, stopped, hits, looked_up)?;
        life.kill()?;
        life.bury();
        poller.polls(LOOKUPS, dead, hits, looked_up)?;
        let began = life.restart()?;
        let stored = loop {
            poller.polls(1, recovering, hits, looked_up)?;
            if let Some(ns) = storer.store(began)? {
                break Some(ns);
            }
            if Deadline::after_ns(began, FIRST_STORE_MAX).passed() {
                break None;
            }
            std::thread::sleep(POLL_EVERY);
        };
        life.settle(&client)?;
        let found = count(&client, &chains)?;
        measured.warm = measured.warm.min(found as f64 / f64::from(chunks));
        bar.inc(1);
        match stored {
            Some(ns) => measured.to_store.push(ns),
            None => {
                measured.without += 1;
                break;
            }
        }
    }
    bar.set_position(steps);
    storer.worker.shutdown();
    client.shutdown();
    life.stop()?;
    Ok(Some(measured))
}

/// A scheduler that asks for the same chain again and again, each time in a new admission.
struct Poller {
    adapter: PollingSchedulerAdapter,
    keys: Vec<Key>,
    admission: u32,
}

impl Poller {
    fn new(client: &std::sync::Arc<Client>, chains: &Chains) -> Poller {
        let adapter = PollingSchedulerAdapter::new(client, SchedulerOptions::new(fill::FINGERPRINT));
        Poller { adapter, keys: chains.keys(0).collect(), admission: 0 }
    }

    /// One lookup: how long it took, and whether all of the chain was found.
    fn poll(&mut self) -> anyhow::Result<(u64, bool)> {
        self.admission += 1;
        let before = monotonic_ns();
        let found = self.adapter.lookup(REQUEST, self.admission, &self.keys)?.chunks;
        let took = monotonic_ns() - before;
        self.adapter.free_lookup_locks(REQUEST, self.admission, 0);
        Ok((took, found as usize == self.keys.len()))
    }

    /// So many lookups, and how many of them found all of the chain.
    fn polls(&mut self, count: u32, times: &mut Times, hits: &mut u64, all: &mut u64) -> anyhow::Result<()> {
        for _ in 0..count {
            let (took, is_hit) = self.poll()?;
            times.push(took);
            *hits += u64::from(is_hit);
            *all += 1;
        }
        Ok(())
    }
}

/// A worker that tries to store one chunk more, again and again.
struct Storer {
    worker: WorkerAdapter,
    /// The worker's cache: one block.
    _page: Box<[u8]>,
    round: u32,
}

impl Storer {
    fn new(engine: &EngineName) -> anyhow::Result<Storer> {
        let mut page = vec![0u8; SHARD_BYTES].into_boxed_slice();
        let plane = Plane { base: page.as_mut_ptr(), block_stride: SHARD_BYTES, page_bytes: SHARD_BYTES };
        // SAFETY: one block, which lives as long as the worker, and which nobody writes.
        let paged = unsafe { PagedKv::new(vec![plane], 1, 1) }?;
        let options = ClientOptions { engine: engine.to_string(), ..ClientOptions::default() };
        let client = child::attached(Role::Worker, options)?;
        let options = WorkerOptions::new(fill::FINGERPRINT, 1, 0, fill::CHUNK_TOKENS);
        let mut worker = WorkerAdapter::new(&client, options)?;
        worker.register_kv_caches(paged)?;
        Ok(Storer { worker, _page: page, round: 0 })
    }

    /// One attempt. Nanoseconds since `began` if it was through.
    fn store(&mut self, began: u64) -> anyhow::Result<Option<u64>> {
        self.round += 1;
        // Chains that nobody looks up.
        let key = fill::key(u64::MAX, self.round.into());
        let round = Round { source: 2, number: self.round };
        self.worker.submit_store("store", round, None, vec![StoreChunk { key, blocks: vec![0] }], None)?;
        ensure!(self.worker.wait_idle(FIRST_STORE_MAX), "a store of one chunk did not end");
        let stored = self.worker.get_finished().stores.iter().any(|(_, _, report)| report.stored > 0);
        Ok(stored.then(|| monotonic_ns().saturating_sub(began)))
    }
}

/// How many chunks lookups find.
fn count(client: &std::sync::Arc<Client>, chains: &Chains) -> anyhow::Result<u64> {
    let mut adapter = PollingSchedulerAdapter::new(client, SchedulerOptions::new(fill::FINGERPRINT));
    let mut found = 0;
    let mut keys = Vec::with_capacity(CHAIN);
    for chain in 0..chains.count() {
        keys.clear();
        keys.extend(chains.keys(chain));
        found += u64::from(adapter.lookup("count", chain as u32, &keys)?.chunks);
        adapter.free_lookup_locks("count", chain as u32, 0);
    }
    Ok(found)
}

/// A line of a table, to be read whatever is in it.
#[repr(C, align(64))]
struct Line([AtomicU64; 8]);

/// As a reader that has it to itself.
impl Described for Line {
    const TYPE: &'static Type = &Type::itself::<Line>("a line");
}

// SAFETY: atomics.
unsafe impl Shared for Line {}

/// Nanoseconds for mapping the engine's segment afresh and reading its first `chunks` chunk records and slot headers.
fn read_tables(name: &EngineName, chunks: u32) -> anyhow::Result<u64> {
    let view = EngineView::open(name)?;
    let places = Places::of(&view.identity.geometry);
    drop(view);
    let before = monotonic_ns();
    let mapping =
        SegmentFile::open(&name.engine_segment(), Access::ReadOnly)?.map(places.bytes, Access::ReadOnly)?;
    let mut sum = 0u64;
    for (at, bytes) in [(places.records_at, size_of::<ChunkRecord>()), (places.slots_at, SLOT_HEADER_BYTES)] {
        let lines: &[Line] = mapping.slice(at as usize, chunks as usize * bytes / size_of::<Line>())?;
        for word in lines.iter().flat_map(|line| &line.0) {
            sum = sum.wrapping_add(word.load(Ordering::Relaxed));
        }
    }
    core::hint::black_box(sum);
    Ok(monotonic_ns().saturating_sub(before))
}
