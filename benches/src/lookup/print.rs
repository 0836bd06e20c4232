//! The output of `kvring bench lookup`.

use super::cpu::{CLIENTS, IN_FLIGHT};
use super::{ASKED, Case, Measured};
use crate::clock::Clock;
use crate::report::{How, Sheet, number, rounded, time};
use serde::Serialize;

/// One row of `--json`. Chunks 0 is the ring's round trip, which no lookup needs.
#[derive(Serialize)]
struct Row {
    chunks: usize,
    index_size: u32,
    present: usize,
    loaded: bool,
    /// The chunks of a chain lie apart.
    scattered: bool,
    p50_ns: Option<f64>,
    p99_ns: Option<f64>,
    p999_ns: Option<f64>,
    per_s: Option<f64>,
    engine_cpu_ns: Option<f64>,
    /// The same reads as plain prefetched loads of private memory, in the same windows, at the median; and p50 as a multiple.
    limit_p50_ns: Option<f64>,
    ratio: Option<f64>,
    /// The cost of each chunk more than in the next shorter row.
    further_chunk_ns: Option<f64>,
}

pub(super) fn print(
    how: How,
    is_scattered: bool,
    measured: Vec<Measured>,
    clock: &Clock,
    about: String,
) -> anyhow::Result<()> {
    let mut rows = Vec::new();
    let mut sheet = Sheet::new(&[
        "lookup",
        "index",
        "present",
        "p50",
        "p99",
        "p99.9",
        "limit",
        "ratio",
        "goal",
        "further chunk",
        "per s",
        "engine CPU",
    ]);
    for mut of in measured {
        for loaded in [false, true] {
            let mut new = rows_of(&mut of, loaded, clock);
            for row in &mut new {
                row.scattered = is_scattered;
                sheet.row(cells(row, is_scattered));
            }
            rows.append(&mut new);
        }
    }
    let notes = [
        about,
        format!(
            "medians over {} windows; p99.9 over all of them; 'busy': while another client's process stores and \
             loads, its threads on any CPU; limit: the same reads as plain prefetched loads of private memory; goals also: \
             p99 ≤ 2 × p50 when quiet, ≤ 5 × when busy",
            how.windows
        ),
        format!(
            "engine CPU: for each lookup, to hear what it found and when it is released; {CLIENTS} clients with \
             {IN_FLIGHT} lookups between two pauses each, an engine that does not spin while it waits (goal: ≤ 1 µs for one \
             chunk)"
        ),
    ];
    how.print(&rows, &sheet, &notes)
}

fn rows_of(of: &mut Measured, loaded: bool, clock: &Clock) -> Vec<Row> {
    let rtt = &mut of.rtt[usize::from(loaded)];
    let mut rows = vec![row(rtt, of.index, clock)];
    for case in of.cases.iter_mut().filter(|case| case.loaded == loaded) {
        let mut row = row(case, of.index, clock);
        row.limit_p50_ns = rounded(case.limit.median(), 0);
        row.ratio = rounded(case.p50.ratio(&case.limit), 2);
        let before = rows.iter().rev().find(|r: &&Row| r.chunks > 0 && (r.present > 0) == case.present);
        row.further_chunk_ns = before.and_then(|before| {
            let more = row.p50_ns? - before.p50_ns?;
            rounded(more / (row.chunks - before.chunks) as f64, 1)
        });
        if !loaded {
            let at = ASKED.iter().position(|asked| *asked == case.asked);
            let cost = at.and_then(|at| of.cpu.per_lookup.get(at));
            row.engine_cpu_ns = cost.and_then(|cost| rounded(cost[usize::from(!case.present)], 0));
        }
        rows.push(row);
    }
    rows
}

fn row(case: &mut Case, index_size: u32, clock: &Clock) -> Row {
    let p999 = case.pooled.percentile(0.999).map_or(f64::NAN, |ticks| clock.between_ns(ticks));
    Row {
        chunks: case.asked,
        index_size,
        present: if case.present { case.asked } else { 0 },
        loaded: case.loaded,
        scattered: false,
        p50_ns: rounded(case.p50.median(), 0),
        p99_ns: rounded(case.p99.median(), 0),
        p999_ns: rounded(p999, 0),
        per_s: rounded(case.per_s.median(), 0),
        engine_cpu_ns: None,
        limit_p50_ns: None,
        ratio: None,
        further_chunk_ns: None,
    }
}

fn cells(row: &Row, is_scattered: bool) -> Vec<String> {
    let time = |ns: Option<f64>| time(ns.unwrap_or(f64::NAN));
    let what = if row.chunks == 0 { "round trip".to_owned() } else { row.chunks.to_string() };
    let goal = match (row.chunks, row.present, row.index_size, row.loaded) {
        (512, 512, 10_000 | 1_000_000, false) if is_scattered => "≤ 12 µs",
        (512, 512, 1_000_000, false) => "≤ 8 µs",
        (512, 512, 10_000, false) => "≤ 6 µs",
        (1, 1, 10_000, false) => "≤ 0.35 µs",
        (1, 0, 10_000, false) => "≤ 0.15 µs",
        _ => "",
    };
    vec![
        if row.loaded { format!("{what}, busy") } else { what },
        row.index_size.to_string(),
        if row.chunks == 0 { "-".to_owned() } else { row.present.to_string() },
        time(row.p50_ns),
        time(row.p99_ns),
        time(row.p999_ns),
        time(row.limit_p50_ns),
        number(row.ratio.unwrap_or(f64::NAN), 2),
        goal.to_owned(),
        time(row.further_chunk_ns),
        number(row.per_s.unwrap_or(f64::NAN), 0),
        time(row.engine_cpu_ns),
    ]
}
