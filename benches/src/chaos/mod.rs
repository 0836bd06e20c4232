//! `kvring chaos`: a verified workload while everything dies, stands still, and comes back.
//!
//! The engine, the schedulers and the workers ([`instances`](crate::instances)) are killed, stopped and started again at random.
//!
//! A run is a sequence of phases, each with an arena of its own: roomy ones, in which nothing is ever evicted and
//! every acknowledged chunk must be found for ever ([`oracle`]), and small ones, in which room is short. At the end of
//! each phase everybody goes on, everything is looked up and loaded once more, all sessions end, and nothing may be
//! left.

mod conduct;
mod oracle;
mod plan;
mod report;
mod work;

pub(crate) use plan::INSTANCES;
pub(crate) use work::Turn;

use crate::console::Console;
use crate::instances::Conductor;
use crate::signals;
use anyhow::{Context, ensure};
use conduct::Chaos;
use indicatif::ProgressBar;
use kvring_engine::byte_size::ByteSize;
use kvring_engine::preflight::Room;
use kvring_rig::pipe::Abort;
use kvring_shm_abi::segment::EngineName;
use plan::Phase;
use report::Report;
use std::io::Write;
use std::time::Duration;
use work::{CHUNK_TOKENS, SHAPE};

/// Names the namespace: the same for all instances.
const FINGERPRINT: [u64; 4] =
    [u64::from_le_bytes(*b"kvrchaos"), plan::RANKS as u64, SHAPE.shard_bytes(), CHUNK_TOKENS as u64];
/// How long nobody does anything before leaks are looked for.
const QUIET: Duration = Duration::from_secs(1);

/// Kill, stop and restart everything under load, and verify what comes back.
///
/// It starts an engine of its own, two schedulers, and two workers for each, all real clients in processes of their own,
/// and lets them store, look up and load without a pause. Meanwhile it kills (SIGKILL), stops (SIGSTOP), continues and
/// restarts them at random: the engine too, and all of them at the worst moments that chance can find, more than 20
/// kills a minute. Then it says what was done, and what was found. These must be 0, else the exit code is 1:
///
/// - wrong bytes: every loaded byte is compared with what was stored.
///
/// - lost chunks: acknowledged by all ranks, neither evicted nor cleared, and not found.
///
/// - leaks: leases, slots and segments that are held when nobody uses anything.
///
/// - hangs and deadline misses: calls that return 30 s after their deadline, or later than by as much as the
///   machine itself was late at that time.
///
/// The seed fixes what is done to whom and in which order, and what every process chooses; it does not fix the timing,
/// so two runs of one seed differ. A failure says what was found, and the seed.
#[derive(clap::Args, Debug)]
#[command(after_long_help = "Examples:
  kvring chaos                            a minute of it
  kvring chaos --seconds 600 --seed 7     longer, and another plan
  kvring chaos --json                     one JSON object, for programs

It needs about 700 MiB in /dev/shm, and leaves nothing there, also when it is
interrupted or killed.")]
pub struct Args {
    /// How long things are killed; the checks at the end of each phase come on top
    #[arg(long, value_name = "S", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    seconds: u64,

    /// Fixes the plan and all choices, but not the timing
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,

    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,

    /// Negative control: do something that the checks must find
    #[arg(long, hide = true)]
    sabotage: Option<Sabotage>,

    /// How long after its deadline something counts as hanging, in milliseconds
    #[arg(long, hide = true, default_value_t = 30_000, value_parser = clap::value_parser!(u64).range(..=86_400_000))]
    hang_limit_ms: u64,
}

/// What is done wrong on purpose, to see that it is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Sabotage {
    /// Flips a bit in every page of the arena, before everything is looked at once more.
    Corrupt,
    /// Holds a lease at the end.
    Leak,
    /// Removes the segments between a death of the engine and its next life.
    Lose,
    /// Stops a worker for ever.
    Hang,
    /// Overwrites the blocks of preempted requests without a word to the adapter.
    Careless,
}

/// Runs the command. True if nothing was found that must not be.
///
/// # Errors
/// Whatever ends the run before its time: no room, an interruption, processes that end by themselves again and again.
pub fn run(args: &Args, console: &Console) -> anyhow::Result<bool> {
    let abort = Abort::default();
    signals::abort_on_signal(&abort, console.say)?;
    let bar = (console.count_bar)("chaos", args.seconds * 1000);
    let report = chaos(args, console, &abort, &bar)?;
    bar.finish_and_clear();
    let mut out = (console.out)();
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&report).context("cannot print the report")?)?;
    } else {
        write!(out, "{}", report.table())?;
    }
    report.found().iter().for_each(|line| (console.say)(&format!("found: {line}")));
    let failures = report.failures();
    failures.iter().for_each(|failure| (console.say)(&format!("failed (seed {}): {failure}", args.seed)));
    Ok(failures.is_empty())
}

/// The whole of it.
fn chaos(args: &Args, console: &Console, abort: &Abort, bar: &ProgressBar) -> anyhow::Result<Report> {
    let name = EngineName::new(&format!("chaos-{}", std::process::id()))?;
    let phases = plan::phases(args.seed, args.seconds);
    // After a cold start the arena before it lives on until its last client has let go.
    let needed = 2 * phases.iter().map(|phase| phase.arena_bytes).max().unwrap_or(0);
    let left = Room::now().tightest().usable();
    ensure!(
        left >= needed,
        "expected room for {} in /dev/shm, {} are left; in a container: docker run --shm-size=2g",
        ByteSize(needed).human(),
        ByteSize(left).human()
    );
    // Whatever happens below, all processes end and all segments go when it is dropped.
    let mut run = Chaos::new(args, &name, &phases[0], console, abort, bar)?;
    for phase in &phases {
        carry_out(&mut run, phase)?;
    }
    if !run.end_all()? {
        run.counts.hangs += 1;
        run.find("the engine does not end".to_owned());
    }
    let (seconds, count) = (args.seconds, phases.len() as u64);
    let told = (args.seed, seconds, count);
    let mut report = Report::new(told, run.counts, &run.run, &run.oracle, &run.found);
    report.count_left(run.run.engine.finish()?);
    Ok(report)
}

fn carry_out(run: &mut Chaos<'_>, phase: &Phase) -> anyhow::Result<()> {
    run.begin_phase(phase)?;
    run.run_phase(phase)?;
    run.sabotage(phase)?;
    run.let_all_go_on()?;
    run.come_to_rest()?;
    run.look_for_leaks(phase.number)
}
