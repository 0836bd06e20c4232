//! The laboratory drives engines to prove or to measure something. The command `kvring` calls it.
//!
//! | command | module |
//! | --- | --- |
//! | `kvring bench` | `rtt`, `lookup`, `copy`, `engine_bench`, `health`, `gpu` |
//! | `kvring replay` | `replay`: a trace through an engine, and every byte of it verified |
//! | `kvring chaos` | `chaos`: a verified workload while everything is killed, stopped and restarted |
//! | `kvring simulate` | `simulate`: the hit rate of the eviction policies, by capacity |
//!
//! In a benchmark every number stands beside its limit, which the machine itself can reach. It is measured in the same run, in windows
//! that alternate with ours (the hypervisor moves virtual CPUs within seconds, so a bare time says little). A window gives
//! a median and a ratio, and the report shows the median over windows. Nothing here asserts a time.
//!
//! Engines and clients are always other processes: this executable again. An environment variable tells each its job, so
//! every binary that uses this crate calls [`child_main`] first.

mod chaos;
mod child;
mod clock;
mod console;
mod copy;
mod cores;
mod engine_bench;
mod gpu;
mod health;
mod instances;
mod jobs;
mod lookup;
mod pingpong;
mod replay;
mod report;
mod rtt;
mod signals;
mod simulate;
mod stats;
mod sweeper;
mod trace;
mod turn;

pub use chaos::{Args as ChaosArgs, run as chaos};
pub use console::Console;
pub use jobs::child_main;
pub use replay::{Args as ReplayArgs, run as replay};
pub use simulate::{Args as SimulateArgs, run as simulate};

/// Fewer windows than this say nothing on a machine whose CPUs move.
const WINDOWS_MIN: u32 = 15;

/// Measure, each number beside the machine's own limit
///
/// A benchmark starts engines and clients of its own, under names of their own, and leaves nothing in /dev/shm. What it
/// measures, and what the machine can do at best, are measured in turn, since virtual CPUs move.
#[derive(clap::Args, Clone, Debug)]
pub struct BenchArgs {
    /// What to measure.
    #[command(subcommand)]
    pub bench: Bench,
    /// Print JSON: times in nanoseconds where a name does not say otherwise, GB/s in 10⁹ bytes a second.
    #[arg(long, global = true)]
    pub json: bool,
    /// Windows of each measurement, taken in turn with those of its limit.
    #[arg(long, global = true, default_value_t = 21, value_parser = clap::value_parser!(u32).range(WINDOWS_MIN as i64..))]
    pub windows: u32,
}

/// The benchmarks.
#[derive(clap::Subcommand, Clone, Debug)]
pub enum Bench {
    /// The round trip through the engine's loop: spinning, asleep, on one core.
    Rtt,
    /// The synchronous lookup: 1 to 512 chunks in indexes of 10⁴ to 10⁶, quiet and beside a busy client.
    Lookup(lookup::LookupArgs),
    /// Stores and loads through a worker, beside the best plain copy.
    Copy,
    /// The engine itself: start, idling, memory, the cost of a health check, its longest turn under the worst clients.
    Engine,
    /// Stores and loads between a GPU and host memory, by each way of copying, beside plain copies of the same bytes.
    ///
    /// Needs a CUDA driver and a device; without them it says so, and ends with 1.
    Gpu(gpu::GpuArgs),
    /// Deaths: how soon an engine's is noticed and made good by a successor, how soon a client's is undone.
    ///
    /// Kills engines and clients with SIGKILL, again and again, and prints how long it took until a caller that slept
    /// for an answer had its error (notice_death), until a store of a client from before the death was through
    /// (restart_to_first_store), and until nothing of a killed client was left in the engine (client_death_to_reclaim).
    /// Each beside its limit: what this machine takes for the same without kvring, measured in between. And what lookups
    /// find and cost while the engine is stopped, dead, or recovering.
    Health(health::HealthArgs),
}

impl BenchArgs {
    /// Do its options go together?
    ///
    /// # Errors
    /// They do not: what was expected, and what came.
    pub fn check(&self) -> anyhow::Result<()> {
        match &self.bench {
            Bench::Gpu(gpu) => gpu.check(),
            _ => Ok(()),
        }
    }
}

/// Runs a benchmark and prints what it found.
///
/// # Errors
/// Whatever keeps it from measuring: no room for the arena, a child that does not start, an answer that is not right.
pub fn bench(args: BenchArgs, console: &Console) -> anyhow::Result<()> {
    let how = report::How { json: args.json, windows: args.windows as usize, out: console.out };
    // Dropped when all engines have ended; it also survives us, however we end. One benchmark starts no engine.
    let starts_engines = !matches!(args.bench, Bench::Gpu(_));
    let _sweeper = starts_engines.then(|| sweeper::Sweeper::start(&child::name_prefix())).transpose()?;
    match args.bench {
        Bench::Rtt => rtt::run(how),
        Bench::Lookup(lookup) => lookup::run(how, &lookup),
        Bench::Copy => copy::run(how),
        Bench::Engine => engine_bench::run(how),
        Bench::Health(health) => health::run(how, &health),
        Bench::Gpu(gpu) => gpu::run(how, &gpu),
    }
}
