//! `kvring replay`: real traffic through a real engine, and every byte of it verified.
//!
//! ```text
//! coordinator ──┬── engine (kvring serve)
//! (this one)    ├── scheduler 0 ──┬── worker 0.0      each of them a process; schedulers and workers are
//!               │                 └── worker 0.1      real clients of the engine, through the adapter
//!               └── scheduler 1 ── …
//! ```
//!
//! The coordinator hands the trace's requests, in order, to whichever instance is free. A page's content is a function
//! of whose page it is ([`content`](kvring_rig::content)), so every byte that comes back can be told right or wrong.

mod drive;
mod engine;
mod message;
mod plan;
mod report;
mod scheduler;
mod worker;

pub(crate) use scheduler::be_scheduler;
pub(crate) use worker::be_worker;

use crate::clear;
use crate::console::{self, LogChoice};
use crate::signals;
use crate::simulate;
use crate::trace::Trace;
use anyhow::{Context, anyhow};
use drive::Driven;
use engine::Engine;
use kvring_adapter::{Client, PollingSchedulerAdapter, SchedulerApi, SchedulerOptions};
use kvring_engine::byte_size::ByteSize;
use kvring_engine::policy::PolicyKind;
use kvring_engine::stats::{Snapshot, Stat};
use kvring_rig::content;
use kvring_rig::pipe::Abort;
use kvring_shm_abi::engine_segment::RANKS_MAX;
use kvring_shm_abi::segment::EngineName;
use plan::Resolved;
use report::Report;
use serde::Serialize;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

/// How long the engine may take to answer the coordinator itself.
const ANSWER_MAX: Duration = Duration::from_secs(20);

/// Drive a real trace through an engine and simulated vLLM instances, and verify every byte.
///
/// It starts an engine of its own and N instances: one scheduler process each, with a worker process for each rank, all
/// real clients. Every request goes through lookup, load, "compute" and store, with block-level KV whose content is a
/// function of its key. Exit code 1 if a byte is wrong, something leaks, or a process fails.
///
/// The hit rate counts prompt blocks, as `kvring simulate` does, and should be what that says for the same capacity
/// and policy (concurrency reorders requests a little).
#[derive(clap::Args, Debug)]
#[command(after_long_help = "Examples:
  kvring replay                                     1000 requests, compiled in
  kvring replay --trace conversation_trace.jsonl    a whole trace of your own
  kvring replay --arena 4GiB --policy arc --json    for a program
  kvring replay --instances 4 --ranks 1             no tensor parallelism
  kvring replay --speed 10                          at ten times its own pace")]
pub(crate) struct Args {
    /// A trace in Mooncake's format (JSON lines: timestamp, input_length, output_length, hash_ids); without it, 1000
    /// requests of Mooncake's conversation trace, which are compiled in
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,

    /// Only the first N requests
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,

    /// Simulated vLLM instances
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    instances: u32,

    /// Ranks of each instance, a worker process each
    #[arg(long, value_name = "R", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=RANKS_MAX as i64))]
    ranks: u32,

    /// Size of the engine's arena [default: 1GiB, or half of what is left if that is less]
    #[arg(long, value_name = "SIZE")]
    arena: Option<ByteSize>,

    /// KV bytes per token, of all ranks together
    #[arg(long, value_name = "B", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=(16 << 20)))]
    bytes_per_token: u32,

    /// The engine's eviction policy: lru, arc [default: the engine's]
    #[arg(long)]
    policy: Option<PolicyKind>,

    /// How fast requests arrive: the trace's own pace times X, or `max`, as fast as they are done
    #[arg(long, value_name = "X", default_value = "max")]
    speed: Speed,

    /// Compare every loaded byte with what it must be; this is the default
    #[arg(long, overrides_with = "no_verify")]
    verify: bool,

    /// Do not compare: leaves more of the processors to the copies
    #[arg(long, overrides_with = "verify")]
    no_verify: bool,

    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,

    /// Negative control: do something that the checks must find
    #[arg(long, hide = true)]
    sabotage: Option<Sabotage>,
}

/// How fast requests arrive.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub(crate) enum Speed {
    /// As fast as they are done.
    #[serde(serialize_with = "max_as_text")]
    Max,
    /// The trace's own pace times this.
    Times(f64),
}

fn max_as_text<S: serde::Serializer>(serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str("max")
}

impl FromStr for Speed {
    type Err = String;

    fn from_str(text: &str) -> Result<Speed, String> {
        let times =
            |text: &str| text.parse().ok().filter(|x: &f64| x.is_finite() && *x > 0.0).map(Speed::Times);
        let speed = if text == "max" { Some(Speed::Max) } else { times(text) };
        speed.ok_or_else(|| format!("expected `max` or a factor above 0 such as 10, got {text:?}"))
    }
}

/// What a negative control does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Sabotage {
    /// Halfway, flips a bit in every page of the arena.
    Corrupt,
    /// Holds a lease at the end.
    Leak,
    /// Halfway, kills the engine.
    KillEngine,
    /// Halfway, kills a scheduler.
    KillScheduler,
}

/// Runs the command.
pub(crate) fn run(args: Args, log: &LogChoice) -> anyhow::Result<ExitCode> {
    let mut trace = Trace::read_or_bundled(args.trace.as_deref())?;
    if let Some(limit) = args.limit {
        trace.requests.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
    }
    let resolved = Resolved::new(&args, &trace)?;
    let abort = Abort::default();
    signals::abort_on_signal(&abort)?;
    let (report, said) = replay(&args, &resolved, &trace, log, &abort)?;
    let mut out = console::out();
    if args.json {
        let text = serde_json::to_string(&report).context("cannot print the report")?;
        writeln!(out, "{text}")?;
    } else {
        write!(out, "{}", report.table())?;
    }
    let failures = report.failures();
    if !failures.is_empty() {
        said.iter().for_each(|line| console::say(line));
    }
    for failure in &failures {
        console::say(&format!("failed: {failure}"));
    }
    Ok(if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The whole of it. Answers the report, and what the instances had to say.
fn replay(
    args: &Args,
    resolved: &Resolved,
    trace: &Trace,
    log: &LogChoice,
    abort: &Abort,
) -> anyhow::Result<(Report, Vec<String>)> {
    let name = EngineName::new(&resolved.plan.engine)?;
    // Dropped last: whatever happens below, the engine is stopped and its segments are removed.
    let mut engine = Engine::start(name, resolved.arena, resolved.policy, log, abort)?;
    let driven = drive_and_check(args, resolved, trace, &mut engine, log, abort);
    // Where the engine has ended, or we were interrupted, everything else only follows from that.
    let (driven, checked, said) = driven.map_err(|error| engine.check(abort).err().unwrap_or(error))?;
    engine.stop()?;
    let simulated = simulate::hit_rate(trace, resolved.policy, checked.capacity_chunks)?;
    Ok((Report::new(args, resolved, trace, driven, &checked, &simulated), said))
}

fn drive_and_check(
    args: &Args,
    resolved: &Resolved,
    trace: &Trace,
    engine: &mut Engine,
    log: &LogChoice,
    abort: &Abort,
) -> anyhow::Result<(Driven, Checked, Vec<String>)> {
    engine.wait_allocated(abort)?;
    let mut instances = drive::start_instances(resolved, log, abort)?;
    let driven = drive::drive(args, trace, &mut instances, engine, abort)?;
    let checked = check_leaks(args, resolved, trace, engine)?;
    let mut said = Vec::new();
    for instance in instances {
        let name = instance.name().to_owned();
        said.extend(instance.finish()?.into_iter().map(|line| format!("{name}: {line}")));
    }
    Ok((driven, checked, said))
}

/// What the engine's statistics say at the end.
struct Checked {
    /// Before anything was cleared.
    stats: Snapshot,
    /// What should be nothing: leases, and chunks pinned by them, after all sessions have ended.
    leaked_leases: u64,
    /// What should be nothing: slots that are not free after that and a `clear`.
    leaked_slots: u64,
    /// Chunks that the arena has room for.
    capacity_chunks: usize,
}

/// After all sessions have ended: what is still held, and what does not become free. The instances are still attached:
/// a leak of theirs must not be cured by their leaving.
fn check_leaks(
    args: &Args,
    resolved: &Resolved,
    trace: &Trace,
    engine: &mut Engine,
) -> anyhow::Result<Checked> {
    let operator = clear::attach(engine.name(), "replay coordinator", ANSWER_MAX)?;
    // Held until the checks are over.
    let _lease = match args.sabotage {
        Some(Sabotage::Leak) => Some(hold_lease(&operator, resolved, trace)?),
        _ => None,
    };
    let held = |stats: &Snapshot| stats.get(Stat::Leases) + stats.get(Stat::Pins);
    let stats = engine.settled(|stats| held(stats) == 0)?;
    operator.clear().context("clearing the cache at the end")?;
    // Those that are written for no chunk are among those that are written.
    let taken = |stats: &Snapshot| stats.get(Stat::SlotsWriting) + stats.get(Stat::SlotsCommitted);
    let after = engine.settled(|stats| taken(stats) == 0)?;
    operator.shutdown();
    let chunks = engine.slots(&stats) / u64::from(resolved.plan.ranks);
    Ok(Checked {
        leaked_leases: held(&stats),
        leaked_slots: taken(&after),
        capacity_chunks: usize::try_from(chunks).context("too many chunks")?,
        stats,
    })
}

/// Negative control: a lease that nobody gives back.
fn hold_lease(
    client: &Arc<Client>,
    resolved: &Resolved,
    trace: &Trace,
) -> anyhow::Result<PollingSchedulerAdapter> {
    let mut options = SchedulerOptions::new(resolved.plan.fingerprint);
    options.lookup_timeout = ANSWER_MAX;
    let mut adapter = PollingSchedulerAdapter::new(client, options);
    let last = trace.requests.iter().rev().find(|request| !request.blocks.is_empty());
    let keys: Vec<_> =
        last.iter().flat_map(|request| &request.blocks).map(|id| content::key_of(*id)).collect();
    let hit = adapter.lookup("sabotage", 0, &keys)?;
    if hit.chunks == 0 {
        return Err(anyhow!("the sabotage needs a chunk that is there: {:?}", adapter.lookup_stats()));
    }
    Ok(adapter)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speeds_are_max_or_a_factor() {
        assert_eq!("max".parse(), Ok(Speed::Max));
        assert_eq!("2.5".parse(), Ok(Speed::Times(2.5)));
        for wrong in ["", "0", "-1", "nan", "inf", "fast"] {
            assert!(wrong.parse::<Speed>().unwrap_err().contains("expected `max` or a factor"));
        }
        let json = |speed| serde_json::to_string(&speed).unwrap();
        assert_eq!((json(Speed::Max), json(Speed::Times(2.0))), ("\"max\"".to_owned(), "2.0".to_owned()));
    }
}
