//! `kvring bench gpu`: stores and loads between a GPU's memory and host memory, beside plain copies of the same bytes.
//!
//! Every number stands beside its ceiling: copies of pieces as long as a chunk, between device memory and registered host memory,
//! contiguous on both sides, on streams of their own. The two take turns. Before a row is timed, fresh random bytes are copied
//! in the same way, and each of them is verified. Each turn moves a whole working set, which is larger than a GPU's L2 cache.

mod about;
mod extras;
mod goals;
mod layout;
mod memory;
mod rig;
mod row;

use crate::report::{How, bytes as show_bytes};
use about::About;
use anyhow::ensure;
use extras::{GatherRow, Latency, Registration};
use kvring_engine::byte_size::ByteSize;
use kvring_gpu_kernels::{CopyMode, GpuOptions, probe};
use layout::Shape;
use rig::{Rig, Ways};
use row::Row;
use serde::Serialize;
use std::io::Write;
use std::time::Duration;

/// Bytes that a backend registers at once. The length of a chunk must divide it.
const PART: usize = 1 << 30;

/// The arguments of `kvring bench gpu`.
#[derive(clap::Args, Clone, Debug)]
pub struct GpuArgs {
    /// The CUDA device, as CUDA_VISIBLE_DEVICES lets this process count them.
    #[arg(long, default_value_t = 0)]
    pub device: u32,
    /// About how long all of it takes. Each row has the same part, and three turns at least.
    #[arg(long, default_value_t = 120.0, value_parser = seconds)]
    pub seconds: f64,
    /// Ways of copying.
    #[arg(long, value_delimiter = ',', value_parser = mode, default_value = "batch,staged,zerocopy,auto")]
    pub backends: Vec<CopyMode>,
    /// Bytes that are contiguous in the paged cache.
    #[arg(long, value_delimiter = ',', default_value = "2KiB,4KiB,8KiB,16KiB,32KiB,64KiB,256KiB,2MiB")]
    pub fragments: Vec<ByteSize>,
    /// Bytes of a chunk.
    #[arg(long, value_delimiter = ',', default_value = "2MiB,8MiB")]
    pub chunks: Vec<ByteSize>,
    /// Bytes that each turn moves in each direction. Less than 128 MiB may stay in a GPU's L2: for trying it, not for quoting.
    #[arg(long, default_value = "256MiB")]
    pub working_set: ByteSize,
    /// SMs that kernels may occupy.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    pub sm_count: u32,
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse().ok().filter(|seconds: &f64| *seconds >= 0.0 && *seconds <= 86_400.0);
    seconds.ok_or_else(|| "expected 0 to 86400 seconds".to_owned())
}

fn mode(text: &str) -> Result<CopyMode, String> {
    let all = || CopyMode::ALL.map(CopyMode::as_str).join(", ");
    CopyMode::from_name(text).ok_or_else(|| format!("expected one of {}", all()))
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    device: About,
    working_set_bytes: usize,
    rows: Vec<Row>,
    gather: Vec<GatherRow>,
    registration: Registration,
    latency: Vec<Latency>,
    goals: Goals,
}

#[derive(Serialize)]
struct Goals {
    met: usize,
    missed: usize,
}

pub(crate) fn run(how: How, args: &GpuArgs) -> anyhow::Result<()> {
    let measured = measure(how, args);
    if let (true, Err(error)) = (how.json, &measured) {
        let mut out = (how.out)();
        serde_json::to_writer(&mut out, &serde_json::json!({ "error": format!("{error:#}") }))?;
        writeln!(out)?;
    }
    print(how, &measured?)
}

impl GpuArgs {
    /// Do its sizes go together?
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        shapes(self).map(drop)
    }
}

fn bytes(size: ByteSize) -> anyhow::Result<usize> {
    Ok(usize::try_from(size.0)?)
}

/// These sizes in one text, for people.
fn sizes(all: &[ByteSize]) -> String {
    all.iter().map(ByteSize::to_string).collect::<Vec<_>>().join(", ")
}

/// The working set in bytes, and the shapes of rows: every fragment in every chunk that is not shorter.
///
/// # Errors
/// Sizes that do not go together.
fn shapes(args: &GpuArgs) -> anyhow::Result<(usize, Vec<Shape>)> {
    let working_set = bytes(args.working_set)?;
    ensure!(
        working_set.is_power_of_two() && working_set >= extras::TINY,
        "--working-set: expected a power of two from {} on, got {}",
        show_bytes(extras::TINY),
        show_bytes(working_set)
    );
    let mut shapes = Vec::new();
    for chunk in &args.chunks {
        let chunk = bytes(*chunk)?;
        ensure!(
            chunk > 0 && working_set.is_multiple_of(chunk) && PART.is_multiple_of(chunk),
            "--chunks: expected sizes that divide 1 GiB and the working set of {}, got {}",
            show_bytes(working_set),
            show_bytes(chunk)
        );
        for fragment in &args.fragments {
            let fragment = bytes(*fragment)?;
            ensure!(
                fragment >= 16 && fragment.is_power_of_two(),
                "--fragments: expected powers of two from 16 bytes on, got {}",
                show_bytes(fragment)
            );
            if fragment <= chunk && chunk.is_multiple_of(fragment) {
                shapes.push(Shape { fragment, chunk });
            }
        }
    }
    ensure!(
        !shapes.is_empty(),
        "--fragments: expected one that divides a chunk of {}, got {}",
        sizes(&args.chunks),
        sizes(&args.fragments)
    );
    Ok((working_set, shapes))
}

fn measure(how: How, args: &GpuArgs) -> anyhow::Result<Report> {
    // Its errors say what is missing, and where to look.
    probe()?;
    let (working_set, shapes) = shapes(args)?;
    let mut fragments: Vec<usize> = shapes.iter().map(|shape| shape.fragment).collect();
    fragments.sort_unstable();
    fragments.dedup();
    let tiny = |fragment: &&usize| **fragment <= extras::TINY;
    // A tiny load is measured with the shortest fragments and with the longest that fit: by far the most and the fewest pieces.
    let mut ends: Vec<usize> = fragments
        .iter()
        .min()
        .into_iter()
        .chain(fragments.iter().rfind(tiny))
        .filter(tiny)
        .copied()
        .collect();
    ends.dedup();

    let steps = args.backends.len() * (shapes.len() + ends.len()) + fragments.len() + 1;
    let parts = args.backends.len() * (shapes.len() * Ways::ALL.len() + ends.len()) + fragments.len() * 2;
    let each = Duration::from_secs_f64(args.seconds / parts as f64);
    let bar = how.bar(steps);
    bar.set_message("memory");
    let rig = Rig::new(args.device, working_set)?;
    bar.set_message("registering");
    let registration = extras::register(&rig)?;
    bar.inc(1);
    let (mut rows, mut latency, mut gather) = (Vec::new(), Vec::new(), Vec::new());
    for mode in &args.backends {
        let options = GpuOptions { mode: *mode, sm_count: args.sm_count, ..GpuOptions::new(args.device) };
        // There is one backend at a time, because the host memory can be registered only once.
        let mounted = rig.mount(options)?;
        for fragment in &ends {
            bar.set_message(format!("{mode}, tiny loads"));
            latency.push(extras::tiny(&rig, &mounted, *mode, *fragment, each)?);
            bar.inc(1);
        }
        for shape in &shapes {
            let (fragment, chunk) = (show_bytes(shape.fragment), show_bytes(shape.chunk));
            bar.set_message(format!("{mode}, {fragment} in {chunk}"));
            rows.extend(row::measure(&rig, &mounted, *mode, args.sm_count, *shape, each)?);
            bar.inc(1);
        }
    }
    // The device is described while its link is still awake.
    let device = About::of(&rig.device);
    for fragment in fragments {
        bar.set_message(format!("gather, {}", show_bytes(fragment)));
        gather.extend(extras::gather(&rig, fragment, args.sm_count, each)?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    let judged = rows.iter().filter_map(|row| row.met);
    let judged: Vec<bool> =
        judged.chain(gather.iter().filter_map(GatherRow::met)).chain(registration.met).collect();
    let met = judged.iter().filter(|met| **met).count();
    let goals = Goals { met, missed: judged.len() - met };
    Ok(Report { device, working_set_bytes: working_set, rows, gather, registration, latency, goals })
}

fn print(how: How, report: &Report) -> anyhow::Result<()> {
    if !how.json {
        how.print(&(), &extras::sheet(&report.gather, &report.registration, &report.latency), &[])?;
    }
    let mut notes = vec![report.device.describe()];
    notes.extend(row::decisions(&report.rows));
    notes.push(format!(
        "working set {}, in batches of 8 chunks, all submitted and then waited for; ceiling: plain copies as long as a chunk, both sides \
         contiguous, in turn with ours; both: the sum of both directions; medians, and what all but the slowest twentieth of the turns \
         reach",
        show_bytes(report.working_set_bytes)
    ));
    if report.working_set_bytes < 128 << 20 {
        notes.push("a working set of less than 128 MiB: not for quoting".to_owned());
    }
    notes.push(format!("goals: {} met, {} missed", report.goals.met, report.goals.missed));
    how.print(report, &row::sheet(&report.rows), &notes)
}
