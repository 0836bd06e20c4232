//! `kvring bench copy`: stores and loads through a worker, beside the best plain copy of the same bytes.
//!
//! Cold to cold: both sides are far larger than the caches and every submit takes other blocks and other slots. All
//! pages have been touched before: the arena's by the worker, in stores that fill it once.

mod limit;

use crate::child::{DEFAULT_SPIN, Engine, Placement};
use crate::clock::Clock;
use crate::cores::{self, Pair};
use crate::report::{How, Sheet, bytes as show_bytes, number, rounded};
use crate::stats::Windows;
use anyhow::{Context, ensure};
use kvring_adapter::{
    Checksum, Client, Key, LoadChunk, PagedKv, Plane, PollingSchedulerAdapter, Role, Round, SchedulerOptions,
    StoreChunk, WorkerAdapter, WorkerOptions,
};
use kvring_engine::byte_size::ByteSize;
use kvring_engine::config::EngineConfig;
use kvring_gpu_kernels::{Direction, Loops};
use kvring_rig::random::mix;
use limit::{Found, Limit};
use serde::Serialize;
use std::sync::Arc;
use std::time::Duration;

/// Bytes of the shards that are measured.
const SHARDS: [usize; 3] = [64 << 10, 2 << 20, 32 << 20];
/// Bytes of one submit.
const SUBMIT: usize = 64 << 20;
/// Submits of a window, one after the other.
const SUBMITS: usize = 2;
/// Bytes of the paged cache, and of the limit's other side: 16 times a shared cache of 32 MiB.
const CACHE: usize = 512 << 20;
/// Bytes of the arena.
const ARENA: u64 = 1 << 30;
/// Longer than a submit can take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Tokens that a chunk stands for; only the registration asks.
const CHUNK_TOKENS: u32 = 256;

/// One row of `--json`.
#[derive(Serialize)]
struct Row {
    bytes: usize,
    threads: usize,
    store_gbs: Option<f64>,
    load_gbs: Option<f64>,
    limit_gbs: Option<f64>,
    ratio_store: Option<f64>,
    ratio_load: Option<f64>,
    checksum: &'static str,
    /// The limit by direction: into shared memory, and out of it. The ratios are to these.
    limit_store_gbs: Option<f64>,
    limit_load_gbs: Option<f64>,
    /// Which loops the limits are.
    limit_store_by: &'static str,
    limit_load_by: &'static str,
    /// Which loops the worker has chosen.
    store_by: &'static str,
    load_by: &'static str,
}

/// One size with one number of threads, window by window.
struct Case {
    bytes: usize,
    threads: usize,
    checksum: &'static str,
    store: Windows,
    load: Windows,
    limit_store: Windows,
    limit_load: Windows,
    limit_store_by: &'static str,
    limit_load_by: &'static str,
}

pub(crate) fn run(how: How) -> anyhow::Result<()> {
    let pair = Pair::choose()?;
    let about = pair.describe();
    let clock = Clock::new();
    let threads: &[usize] = if pair.two() { &[1, 2] } else { &[1] };
    let bar = how.bar(SHARDS.len() * threads.len() * how.windows);
    let memory = Memory::new()?;
    let mut cases = Vec::new();
    for shard in SHARDS {
        let config = EngineConfig { arena: Some(ByteSize(ARENA)), ..EngineConfig::default() };
        let placement = Placement { service_cpu: pair.two().then_some(pair.theirs), ..Placement::default() };
        let engine = Engine::spawn(config, &placement)?;
        engine.wait_allocated()?;
        for threads in threads {
            bar.set_message(format!("{} with {threads} thread(s)", show_bytes(shard)));
            // One thread runs apart from the engine's; two share its CPU.
            let cpus = if *threads == 1 { vec![pair.ours] } else { pair.all.clone() };
            let two = cores::on(&cpus, || measure(&engine, &memory, shard, *threads, how, &clock, &bar))?;
            cases.extend(two);
        }
        engine.stop()?;
    }
    bar.finish_and_clear();
    print(how, &cases, about)
}

/// The paged cache, and a segment to measure the limit with.
struct Memory {
    paged: Box<[u8]>,
    limit: Limit,
}

/// How a paged cache is aligned: as any allocator aligns a block of this size.
const ALIGNED: usize = 4096;

impl Memory {
    fn new() -> anyhow::Result<Memory> {
        Ok(Memory { paged: vec![1u8; CACHE + ALIGNED].into_boxed_slice(), limit: Limit::new(CACHE)? })
    }

    fn base(&self) -> *mut u8 {
        let base = self.paged.as_ptr().cast_mut();
        base.wrapping_add(base.align_offset(ALIGNED))
    }
}

/// A worker with its paged cache, and a scheduler that finds the chunks that the worker has stored.
struct Mover<'a> {
    worker: WorkerAdapter,
    scheduler: PollingSchedulerAdapter,
    clock: &'a Clock,
    shard: usize,
    /// Blocks taken so far.
    next_block: usize,
    round: u32,
    source: u32,
}

fn measure(
    engine: &Engine,
    memory: &Memory,
    shard: usize,
    threads: usize,
    how: How,
    clock: &Clock,
    bar: &indicatif::ProgressBar,
) -> anyhow::Result<Vec<Case>> {
    let case = |checksum| Case {
        bytes: shard,
        threads,
        checksum,
        store: Windows::default(),
        load: Windows::default(),
        limit_store: Windows::default(),
        limit_load: Windows::default(),
        limit_store_by: "",
        limit_load_by: "",
    };
    let mut cases = vec![case("off"), case("verify")];
    // Where this thread is pinned, a client would take the machine for one with a single CPU.
    let worker = engine.client(Role::Worker, Some(DEFAULT_SPIN))?;
    let scheduler = engine.client(Role::Scheduler, Some(DEFAULT_SPIN))?;
    let mut movers = Vec::new();
    for (checksum, source) in [(Checksum::Off, 1), (Checksum::Verify, 2)] {
        movers.push(Mover::new(&worker, &scheduler, memory, shard, threads, checksum, source, clock)?);
    }
    for mover in &mut movers {
        // Every slot of the arena is written once, by this process: its pages are in the page table from here on.
        for _ in 0..ARENA as usize / SUBMIT + 1 {
            mover.store()?;
        }
    }
    let mut limits = Found::new();
    for _ in 0..how.windows {
        memory.limit.measure(&mut limits, memory.base(), shard, threads, SUBMIT * SUBMITS, clock)?;
        for (case, mover) in cases.iter_mut().zip(&mut movers) {
            let (store, load) = mover.window()?;
            case.store.push(store);
            case.load.push(load);
        }
        bar.inc(1);
    }
    for case in &mut cases {
        (case.limit_store_by, case.limit_store) = limits.best_into();
        (case.limit_load_by, case.limit_load) = limits.best_out();
    }
    for mut mover in movers {
        mover.worker.shutdown();
    }
    Ok(cases)
}

impl<'a> Mover<'a> {
    #[allow(clippy::too_many_arguments, reason = "each is one thing that a row says")]
    fn new(
        worker: &Arc<Client>,
        scheduler: &Arc<Client>,
        memory: &Memory,
        shard: usize,
        threads: usize,
        checksum: Checksum,
        source: u32,
        clock: &'a Clock,
    ) -> anyhow::Result<Mover<'a>> {
        let fingerprint = [0x6b76_7269_6e67, 0x636f_7079, shard as u64, 1];
        let options = WorkerOptions {
            checksum,
            copy_threads: Some(threads),
            ..WorkerOptions::new(fingerprint, 1, 0, CHUNK_TOKENS)
        };
        let mut worker = WorkerAdapter::new(worker, options)?;
        let plane = Plane { base: memory.base(), block_stride: shard, page_bytes: shard };
        // SAFETY: the memory outlives the worker, which is shut down at the end of `measure`; jobs of the two workers
        // and the limit's copies take turns, so nobody else touches a block while a job runs.
        let paged = unsafe { PagedKv::new(vec![plane], (CACHE / shard) as u32, 1) }?;
        worker.register_kv_caches(paged)?;
        Ok(Mover {
            worker,
            scheduler: PollingSchedulerAdapter::new(scheduler, SchedulerOptions::new(fingerprint)),
            clock,
            shard,
            next_block: 0,
            round: 0,
            source,
        })
    }

    /// The block of the next shard.
    fn take_block(&mut self) -> Vec<u32> {
        let block = scattered(self.next_block, CACHE / self.shard);
        self.next_block += 1;
        vec![block as u32]
    }

    fn keys(&self) -> Vec<Key> {
        let name = u64::from(self.source) << 32 | u64::from(self.round);
        (0..(SUBMIT / self.shard) as u64).map(|at| [mix(name), at]).collect()
    }

    /// One store: its keys and how long it took, in nanoseconds.
    fn store(&mut self) -> anyhow::Result<(Vec<Key>, f64)> {
        self.round += 1;
        let keys = self.keys();
        let chunks: Vec<StoreChunk> =
            keys.iter().map(|key| StoreChunk { key: *key, blocks: self.take_block() }).collect();
        let round = Round { source: self.source, number: self.round };
        let before = self.clock.ticks();
        self.worker.submit_store("copy", round, None, chunks, None)?;
        ensure!(self.worker.wait_idle(PATIENCE), "a store did not end within {PATIENCE:?}");
        let spent = self.clock.ns(self.clock.ticks() - before);
        let finished = self.worker.get_finished();
        let stored: usize = finished.stores.iter().map(|(_, _, report)| report.stored as usize).sum();
        ensure!(stored == keys.len(), "expected {} shards stored, got {:?}", keys.len(), finished.stores);
        Ok((keys, spent))
    }

    fn load(&mut self, keys: &[Key]) -> anyhow::Result<f64> {
        let hit = self.scheduler.lookup("copy", self.round, keys)?;
        ensure!(hit.chunks as usize == keys.len(), "expected {} chunks, found {}", keys.len(), hit.chunks);
        let handles: Vec<_> = hit.handles().collect();
        let chunks: Vec<LoadChunk> =
            handles.into_iter().map(|chunk| LoadChunk { chunk, blocks: self.take_block() }).collect();
        let before = self.clock.ticks();
        self.worker.submit_load("copy", chunks, None)?;
        ensure!(self.worker.wait_idle(PATIENCE), "a load did not end within {PATIENCE:?}");
        let spent = self.clock.ns(self.clock.ticks() - before);
        self.scheduler.end_session("copy");
        let finished = self.worker.get_finished();
        let failed: u32 = finished.loads.iter().map(|(_, _, report)| report.failed).sum();
        ensure!(failed == 0, "{failed} shards could not be loaded");
        Ok(spent)
    }

    /// One window: GB/s of stores and of loads. Loads take chunks that were stored a whole cache ago.
    fn window(&mut self) -> anyhow::Result<(f64, f64)> {
        let (mut store_ns, mut load_ns) = (0.0, 0.0);
        let mut stored = Vec::new();
        for _ in 0..SUBMITS {
            let (keys, ns) = self.store().context("a store")?;
            store_ns += ns;
            stored.push(keys);
        }
        for keys in &stored {
            load_ns += self.load(keys).context("a load")?;
            // Another admission each time.
            self.round += 1;
        }
        let bytes = (SUBMIT * SUBMITS) as f64;
        Ok((bytes / store_ns, bytes / load_ns))
    }
}

/// The `index`th of `count` places (a power of two) in an order without a pattern, over and over.
fn scattered(index: usize, count: usize) -> usize {
    // An odd factor: every place comes once before any comes again.
    index.wrapping_mul(2_654_435_761) % count
}

fn print(how: How, cases: &[Case], about: String) -> anyhow::Result<()> {
    let loops = Loops::measured();
    let by = |direction, case: &Case| loops.of(direction, case.bytes, case.checksum != "off").as_str();
    let rows: Vec<Row> = cases
        .iter()
        .map(|case| Row {
            bytes: case.bytes,
            threads: case.threads,
            store_gbs: rounded(case.store.median(), 2),
            load_gbs: rounded(case.load.median(), 2),
            limit_gbs: rounded(case.limit_store.best(&case.limit_load).median(), 2),
            ratio_store: rounded(case.store.ratio(&case.limit_store), 3),
            ratio_load: rounded(case.load.ratio(&case.limit_load), 3),
            checksum: case.checksum,
            limit_store_gbs: rounded(case.limit_store.median(), 2),
            limit_load_gbs: rounded(case.limit_load.median(), 2),
            limit_store_by: case.limit_store_by,
            limit_load_by: case.limit_load_by,
            store_by: by(Direction::Store, case),
            load_by: by(Direction::Load, case),
        })
        .collect();
    let mut sheet = Sheet::new(&[
        "shard",
        "threads",
        "checksum",
        "store GB/s",
        "limit",
        "ratio",
        "load GB/s",
        "limit",
        "ratio",
        "goal",
    ]);
    for row in &rows {
        let show = |value: Option<f64>, digits| number(value.unwrap_or(f64::NAN), digits);
        sheet.row(vec![
            show_bytes(row.bytes),
            row.threads.to_string(),
            row.checksum.to_owned(),
            show(row.store_gbs, 1),
            show(row.limit_store_gbs, 1),
            show(row.ratio_store, 2),
            show(row.load_gbs, 1),
            show(row.limit_load_gbs, 1),
            show(row.ratio_load, 2),
            (if row.checksum == "off" { "≥ 0.95" } else { "≥ 0.8" }).to_owned(),
        ]);
    }
    let notes = [
        about,
        format!(
            "submits of {}, one at a time, from call to report; a shard is one block of the paged cache, blocks in \
             an order without a pattern; paged cache {}, arena {}; limit: the best of glibc memcpy and all of kvring's \
             loops between the same paged cache, in such an order, and a segment of shared memory, as many threads; \
             medians over {} windows, in turn",
            show_bytes(SUBMIT),
            show_bytes(CACHE),
            show_bytes(ARENA as usize),
            how.windows
        ),
        "two threads share the second CPU with the engine and the waiting caller".to_owned(),
    ];
    how.print(&rows, &sheet, &notes)
}
