//! The way from `main` to the job of a child, with a table of all jobs.

use crate::child::{EngineJob, JOB_VARIABLE, Job};
use crate::engine_bench::{Naps, Nothing};
use crate::health::bare::BareJob;
use crate::health::holder::HolderJob;
use crate::instances::Start;
use crate::lookup::busy::BusyJob;
use crate::pingpong::PeerJob;
use crate::sweeper::SweeperJob;
use anyhow::Context;
use kvring_rig::child::die_with_parent;
use kvring_rig::pipe::Pipe;
use serde_json::Value;

/// Becomes the child that somebody here has started, and ends; returns at once in a process that is none.
///
/// Every binary that uses this crate calls this first in `main`, before it parses arguments and starts threads.
/// `start_log` begins logging at the given level, or at the one that the environment says.
pub fn child_main(start_log: fn(&str) -> anyhow::Result<()>) {
    let Ok(job) = std::env::var(JOB_VARIABLE) else { return };
    let code = match start_log("error").and_then(|()| find_and_be(&job)) {
        Ok(()) => 0,
        Err(error) => {
            // In one piece: several processes share standard error.
            eprint!("{}", format_args!("error: {error:#}\n"));
            1
        }
    };
    std::process::exit(code);
}

fn find_and_be(job: &str) -> anyhow::Result<()> {
    let jobs = [
        row::<EngineJob>(),
        row::<PeerJob>(),
        row::<BusyJob>(),
        row::<Nothing>(),
        row::<Naps>(),
        row::<BareJob>(),
        row::<HolderJob>(),
        row::<SweeperJob>(),
        row::<Start>(),
    ];
    let (name, job): (String, Value) =
        serde_json::from_str(job).with_context(|| format!("{JOB_VARIABLE}: expected a child's job"))?;
    let row = jobs.iter().find(|(known, _)| *known == name);
    let (_, be) = row.with_context(|| format!("{JOB_VARIABLE}: there is no job {name:?}"))?;
    be(job)
}

/// A job's name, and what a child does that finds it.
type Row = (&'static str, fn(Value) -> anyhow::Result<()>);

fn row<J: Job>() -> Row {
    (J::NAME, |job| {
        if !J::OUTLIVES_PARENT {
            die_with_parent()?;
        }
        serde_json::from_value::<J>(job)?.be(Pipe::to_parent()?)
    })
}
