//! `kvring simulate`: which eviction policy suits a workload, and how much memory is worth its price.
//!
//! No engine, no copies: it drives the engine's own cache as its clients would, so its hit rates are the engine's (`kvring replay`
//! checks that).

use std::io::Write;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use comfy_table::Table;
use indicatif::{ProgressBar, ProgressDrawTarget};
use kvring_engine::policy::PolicyKind;
use serde::Serialize;

use crate::console::Console;
use crate::report::{align_right, new_table};
use crate::trace::Trace;

mod cache;

pub(crate) use cache::{SimResult, hit_rate};

/// The most chunks that an engine takes too.
const MAX_CHUNKS: usize = 1 << 24;
/// A run shorter than this shows no progress bar.
const QUIET: Duration = Duration::from_millis(500);

/// Simulate the hit rate of eviction policies on a trace, by capacity.
///
/// The hit rate is the share of all prompt blocks that the cache could have served: of each request, the
/// longest prefix that is resident when it arrives. A prompt's last, partial block counts as a whole one;
/// --json also gives the share of prompt tokens, where it counts for the tokens in it.
///
/// The ceiling is what an infinite cache reaches. Read the table downwards: where the hit rate stops growing
/// towards the ceiling, more memory no longer helps. Read it across to choose a policy.
#[derive(clap::Args, Debug)]
#[command(after_long_help = "Examples:
  kvring simulate                                    the bundled slice, both policies
  kvring simulate conversation_trace.jsonl           a whole trace of your own
  kvring simulate t.jsonl --capacity 5%,20000        5% of the distinct blocks; 20000 chunks
  kvring simulate t.jsonl --policy arc --json        for a program

How many chunks fit: arena bytes / (512 x KV bytes per token).
  Llama-3.1-8B in bf16: 128 KiB per token, 64 MiB per chunk, 1600 chunks in 100 GiB")]
pub struct Args {
    /// A trace in Mooncake's format (JSON lines: timestamp, input_length, output_length, hash_ids); without
    /// it, 1000 requests of Mooncake's conversation trace, which are compiled in.
    trace: Option<PathBuf>,

    /// Policies to compare: lru, arc.
    #[arg(long, value_delimiter = ',', default_value = "lru,arc")]
    policy: Vec<PolicyKind>,

    /// Capacities: a share of the trace's distinct blocks (5%) or a number of chunks (2000).
    #[arg(long, value_delimiter = ',', default_value = "1%,2%,3%,5%,7%,10%,15%,25%,50%")]
    capacity: Vec<Capacity>,

    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

/// How much the cache holds, as a person says it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Capacity {
    /// A share of the distinct blocks, in percent.
    Percent(f64),
    /// A number of chunks.
    Chunks(usize),
}

impl Capacity {
    fn chunks(self, distinct_blocks: usize) -> usize {
        match self {
            Self::Percent(percent) => ((distinct_blocks as f64 * percent / 100.0) as usize).max(1),
            Self::Chunks(chunks) => chunks,
        }
    }
}

impl FromStr for Capacity {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let capacity = match text.strip_suffix('%') {
            Some(percent) => percent.parse().ok().filter(|p| *p > 0.0 && *p <= 100.0).map(Self::Percent),
            None => text.parse().ok().filter(|chunks| (1..=MAX_CHUNKS).contains(chunks)).map(Self::Chunks),
        };
        capacity.ok_or_else(|| {
            format!("expected a share above 0% and up to 100% (5%), or 1 to {MAX_CHUNKS} chunks (2000), got {text:?}")
        })
    }
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report<'a> {
    trace: &'a str,
    requests: usize,
    block_tokens: u32,
    distinct_blocks: usize,
    ceiling: f64,
    ceiling_token: f64,
    results: Vec<ReportRow>,
}

#[derive(Serialize)]
struct ReportRow {
    policy: PolicyKind,
    capacity_chunks: usize,
    capacity_share: f64,
    hit_rate: f64,
    token_hit_rate: f64,
    hit_blocks: u64,
    prompt_blocks: u64,
    hit_tokens: u64,
    prompt_tokens: u64,
    evictions: u64,
}

/// Runs the command.
///
/// # Errors
/// A trace that cannot be read, or that is too large for a cache.
pub fn run(args: Args, console: &Console) -> Result<()> {
    let trace = Trace::read_or_bundled(args.trace.as_deref())?;
    let distinct_blocks = trace.distinct_blocks();
    ensure!(
        (1..=MAX_CHUNKS).contains(&distinct_blocks),
        "{}: expected 1 to {MAX_CHUNKS} distinct blocks, got {distinct_blocks}",
        trace.name
    );
    let capacities: Vec<usize> =
        args.capacity.iter().map(|capacity| capacity.chunks(distinct_blocks)).collect();

    // A cache that holds every block never evicts, so any policy shows the ceiling.
    let ceiling = hit_rate(&trace, PolicyKind::Lru, distinct_blocks)?;
    let results = simulate_all(&trace, &args.policy, &capacities)?;

    let mut out = (console.out)();
    if args.json {
        let report = report(&trace, distinct_blocks, &ceiling, &results);
        writeln!(out, "{}", serde_json::to_string(&report)?)?;
    } else {
        writeln!(out, "{}\n", summary(&trace, distinct_blocks))?;
        writeln!(out, "{}\n", table(distinct_blocks, &args.policy, &capacities, &results).trim_fmt())?;
        writeln!(out, "ceiling (infinite cache): {:.3}", ceiling.hit_rate())?;
    }
    Ok(())
}

/// Every capacity with every policy: the policies of the first capacity, then of the second, and so on.
fn simulate_all(trace: &Trace, policies: &[PolicyKind], capacities: &[usize]) -> Result<Vec<SimResult>> {
    let start = Instant::now();
    let total = (policies.len() * capacities.len()) as u64;
    let progress = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::hidden());
    let mut results = Vec::with_capacity(policies.len() * capacities.len());
    for &capacity in capacities {
        for &policy in policies {
            results.push(hit_rate(trace, policy, capacity)?);
            progress.inc(1);
            if progress.is_hidden() && start.elapsed() > QUIET {
                // Stays hidden where stderr is no terminal.
                progress.set_draw_target(ProgressDrawTarget::stderr());
            }
        }
    }
    progress.finish_and_clear();
    Ok(results)
}

fn summary(trace: &Trace, distinct_blocks: usize) -> String {
    let span_ms = trace.requests.last().map_or(0, |request| request.timestamp_ms);
    let output_tokens: u64 = trace.requests.iter().map(|request| u64::from(request.output_tokens)).sum();
    format!(
        "{}: {} requests over {:.1} minutes\n{:.1} M prompt tokens, {:.1} M answer tokens, {} distinct blocks of {} tokens",
        trace.name,
        trace.requests.len(),
        span_ms as f64 / 60e3,
        trace.input_tokens() as f64 / 1e6,
        output_tokens as f64 / 1e6,
        distinct_blocks,
        trace.block_tokens,
    )
}

fn table(
    distinct_blocks: usize,
    policies: &[PolicyKind],
    capacities: &[usize],
    results: &[SimResult],
) -> Table {
    let mut table = new_table();
    let names = policies.iter().map(PolicyKind::to_string);
    table.set_header(["capacity", "chunks"].map(str::to_owned).into_iter().chain(names));
    for (&capacity, row) in capacities.iter().zip(results.chunks(policies.len().max(1))) {
        let share_percent = 100.0 * capacity as f64 / distinct_blocks as f64;
        let rates = row.iter().map(|result| format!("{:.3}", result.hit_rate()));
        table.add_row([format!("{share_percent:.1} %"), capacity.to_string()].into_iter().chain(rates));
    }
    let columns = table.column_count();
    align_right(&mut table, 0..columns);
    table
}

fn report<'a>(
    trace: &'a Trace,
    distinct_blocks: usize,
    ceiling: &SimResult,
    results: &[SimResult],
) -> Report<'a> {
    let row = |result: &SimResult| ReportRow {
        policy: result.policy,
        capacity_chunks: result.capacity_chunks,
        capacity_share: result.capacity_chunks as f64 / distinct_blocks as f64,
        hit_rate: result.hit_rate(),
        token_hit_rate: result.token_hit_rate(),
        hit_blocks: result.hit_blocks,
        prompt_blocks: result.prompt_blocks,
        hit_tokens: result.hit_tokens,
        prompt_tokens: result.prompt_tokens,
        evictions: result.evictions,
    };
    Report {
        trace: &trace.name,
        requests: trace.requests.len(),
        block_tokens: trace.block_tokens,
        distinct_blocks,
        ceiling: ceiling.hit_rate(),
        ceiling_token: ceiling.token_hit_rate(),
        results: results.iter().map(row).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::cache::tests::trace_of;
    use super::*;

    #[test]
    fn capacities_are_shares_or_chunks() {
        assert_eq!("5%".parse(), Ok(Capacity::Percent(5.0)));
        assert_eq!("2000".parse(), Ok(Capacity::Chunks(2000)));
        assert_eq!([Capacity::Percent(5.0).chunks(182_790), Capacity::Percent(0.1).chunks(10)], [9139, 1]);
        for wrong in ["", "%", "0", "0%", "101%", "nan%", "-3", "5 %x", "1e3"] {
            let error = wrong.parse::<Capacity>().unwrap_err();
            assert!(error.contains("(5%)") && error.ends_with(&format!("got {wrong:?}")), "{error}");
        }
    }

    #[test]
    fn the_report_has_a_row_for_each_policy_and_capacity() {
        let trace = trace_of(&[&[1, 2, 3], &[1, 2, 3]]);
        let results = simulate_all(&trace, &PolicyKind::ALL, &[1, 3]).unwrap();
        let rows: Vec<_> =
            results.iter().map(|r| (r.capacity_chunks, r.policy.name(), r.hit_blocks)).collect();
        assert_eq!(rows, [(1, "lru", 1), (1, "arc", 1), (3, "lru", 3), (3, "arc", 3)]);
        let json = serde_json::to_value(report(&trace, 3, &results[2], &results)).unwrap();
        assert_eq!(json["results"][3]["policy"], "arc");
        assert_eq!(
            (json["ceiling"].as_f64(), json["results"].as_array().map(Vec::len)),
            (Some(0.5), Some(4))
        );
        let table = table(3, &PolicyKind::ALL, &[1, 3], &results).to_string();
        assert!(table.contains("lru") && table.contains("100.0 %") && table.contains("0.500"), "{table}");
    }
}
