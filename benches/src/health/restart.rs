//! How soon a successor serves the chunks that were stored before it, to a client that was there before it as well.

use super::Times;
use super::life::Life;
use crate::child;
use crate::engine_bench::start_nothing;
use crate::lookup::fill::{self, CHAIN, Chains, SHARD_BYTES};
use anyhow::{Context, ensure};
use indicatif::ProgressBar;
use kvring_adapter::{
    Client, ClientOptions, EngineView, Key, PollingSchedulerAdapter, Role, SchedulerApi, SchedulerOptions,
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

/// A lookup that counts chunks is not hurried.
pub(super) const PATIENT: Duration = Duration::from_secs(2);
/// A successor that has not served a full hit by then has forgotten the chunks.
const FIRST_HIT_MAX: Duration = Duration::from_secs(5);
/// The pause between two polls: short beside the time that is measured. The engine has the CPU meanwhile.
const POLL_EVERY: Duration = Duration::from_micros(100);
/// The request that is polled for.
const REQUEST: &str = "first-hit";

/// The times of restarts with one number of chunks.
#[derive(Default)]
pub(super) struct Restarts {
    /// From the making of the successor's process to an earlier client's first full hit.
    pub(super) to_hit: Times,
    /// Restarts after which there was none.
    pub(super) without: usize,
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
    ensure!(poller.poll()?, "a lookup before the death found less than was stored");
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
        life.kill()?;
        life.bury();
        let began = life.restart()?;
        let hit = poller.until_hit(began)?;
        life.settle(&client)?;
        let found = count(&client, &chains)?;
        measured.warm = measured.warm.min(found as f64 / f64::from(chunks));
        bar.inc(1);
        match hit {
            Some(ns) => measured.to_hit.push(ns),
            None => {
                measured.without += 1;
                break;
            }
        }
    }
    bar.set_position(steps);
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

    /// One lookup. True when all of the chain was found.
    fn poll(&mut self) -> anyhow::Result<bool> {
        self.admission += 1;
        let found = self.adapter.lookup(REQUEST, self.admission, &self.keys)?.chunks;
        self.adapter.free_lookup_locks(REQUEST, self.admission, 0);
        Ok(found as usize == self.keys.len())
    }

    /// Nanoseconds from `began` to the first full hit; `None` when there is none.
    fn until_hit(&mut self, began: u64) -> anyhow::Result<Option<u64>> {
        let deadline = Deadline::after_ns(began, FIRST_HIT_MAX);
        while !deadline.passed() {
            if self.poll()? {
                return Ok(Some(monotonic_ns().saturating_sub(began)));
            }
            std::thread::sleep(POLL_EVERY);
        }
        Ok(None)
    }
}

/// How many chunks lookups find.
fn count(client: &std::sync::Arc<Client>, chains: &Chains) -> anyhow::Result<u64> {
    let options = SchedulerOptions { lookup_timeout: PATIENT, ..SchedulerOptions::new(fill::FINGERPRINT) };
    let mut adapter = PollingSchedulerAdapter::new(client, options);
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
