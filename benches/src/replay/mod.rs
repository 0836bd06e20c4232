//! `kvring replay`: real traffic through a real engine, and every byte of it verified.
//!
//! The coordinator hands the trace's requests, in order, to whichever instance is free ([`instances`](crate::instances)). A page's
//! content is a function of its place ([`content`]), so every byte that comes back can be told right or wrong.

mod drive;
mod plan;
mod report;

use crate::console::Console;
use crate::instances::{Conductor, hold_lease};
use crate::signals;
use crate::simulate;
use crate::trace::Trace;
use anyhow::{Context, ensure};
use drive::Replay;
use kvring_engine::byte_size::ByteSize;
use kvring_engine::policy::PolicyKind;
use kvring_rig::content;
use kvring_rig::pipe::Abort;
use kvring_rig::shm;
use kvring_shm_abi::engine_segment::RANKS_MAX;
use plan::Resolved;
use report::Report;
use serde::Serialize;
use std::io::Write;
use std::path::PathBuf;
use std::str::FromStr;

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
pub struct Args {
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

/// What is done wrong on purpose, to see that it is found.
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

impl Args {
    /// Do its options go together?
    ///
    /// # Errors
    /// They do not: what was expected, and what came.
    pub fn check(&self) -> anyhow::Result<()> {
        plan::check_clients(self)
    }
}

/// Runs the command. True if all was right.
///
/// # Errors
/// Whatever ends the replay before its time: no room, an interruption, a process that fails.
pub fn run(args: Args, console: &Console) -> anyhow::Result<bool> {
    let mut trace = Trace::read_or_bundled(args.trace.as_deref())?;
    if let Some(limit) = args.limit {
        trace.requests.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
    }
    let resolved = Resolved::new(&args, &trace)?;
    let abort = Abort::default();
    signals::abort_on_signal(&abort, console.say)?;
    let report = replay(&args, &resolved, &trace, console, &abort)?;
    let mut out = (console.out)();
    if args.json {
        let text = serde_json::to_string(&report).context("cannot print the report")?;
        writeln!(out, "{text}")?;
    } else {
        write!(out, "{}", report.table())?;
    }
    let failures = report.failures();
    failures.iter().for_each(|failure| (console.say)(&format!("failed: {failure}")));
    Ok(failures.is_empty())
}

/// The whole of it.
fn replay(
    args: &Args,
    resolved: &Resolved,
    trace: &Trace,
    console: &Console,
    abort: &Abort,
) -> anyhow::Result<Report> {
    // Whatever happens below, all processes end and all segments go when it is dropped.
    let mut replay = Replay::start(args, resolved, trace, console, abort)?;
    replay.drive()?;
    let keys = |blocks: &Vec<u64>| blocks.iter().map(|id| content::key_of(*id)).collect();
    let prompts = trace.requests.iter().rev().map(|request| keys(&request.blocks));
    let leaks = replay.check_leaks("replay coordinator", |client| {
        let leak = args.sabotage == Some(Sabotage::Leak);
        leak.then(|| hold_lease(client, resolved.fingerprint, prompts)).transpose()
    })?;
    let chunks = replay.run.engine.slots(&leaks.stats) / u64::from(resolved.ranks);
    let capacity_chunks = usize::try_from(chunks).context("too many chunks")?;
    ensure!(replay.end_all()?, "the engine was told to end, and did not");
    let left = shm::files(&replay.run.engine.name);
    ensure!(left.is_empty(), "the engine has ended, and left segments behind: {left:?}");
    let simulated = simulate::hit_rate(trace, resolved.setup.policy, capacity_chunks)?;
    Ok(Report::new(args, resolved, trace, &mut replay, &leaks, &simulated))
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
