//! The rows of the table: a backend beside its ceiling.

use super::goals;
use super::layout::Shape;
use super::rig::{Mounted, Rig, Ways};
use crate::report::{Sheet, bytes as show_bytes, number, rounded};
use crate::stats::Windows;
use anyhow::Context;
use kvring_gpu_kernels::CopyMode;
use serde::Serialize;
use std::time::{Duration, Instant};

/// The fewest turns of a backend, and of its ceiling, however long they take.
pub(super) const TURNS_MIN: usize = 3;

/// One row of `--json`. GB/s are 10⁹ bytes a second, of both directions together where both are measured.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    pub(super) direction: Ways,
    pub(super) backend: &'static str,
    pub(super) fragment_bytes: usize,
    pub(super) chunk_bytes: usize,
    /// SMs that a kernel may occupy.
    pub(super) sm_count: u32,
    /// The median over turns. What is called `p95` is reached by all turns but the slowest twentieth.
    gbs: Option<f64>,
    gbs_p95: Option<f64>,
    ceiling_gbs: Option<f64>,
    ceiling_gbs_p95: Option<f64>,
    /// The median of the ratios, turn by turn.
    pub(super) ratio: Option<f64>,
    /// Time in `submit` for each chunk.
    pub(super) submit_us: Option<f64>,
    submit_us_p95: Option<f64>,
    turns: usize,
    /// What `auto` has decided.
    decided: Option<String>,
    pub(super) goal_ratio: Option<f64>,
    pub(super) goal_submit_us: Option<f64>,
    /// Whether both goals are met; null if there are none.
    pub(super) met: Option<bool>,
}

/// Checks and measures the rows of one backend and one shape.
pub(super) fn measure(
    rig: &Rig,
    mounted: &Mounted,
    mode: CopyMode,
    sm_count: u32,
    shape: Shape,
    each: Duration,
) -> anyhow::Result<Vec<Row>> {
    let name = mode.as_str();
    let about = |ways: Ways| {
        let Shape { fragment, chunk } = shape;
        let (fragment, chunk) = (show_bytes(fragment), show_bytes(chunk));
        format!("{name}, {}, fragments of {fragment}, chunks of {chunk}", ways.as_str())
    };
    let caches = rig.caches(shape)?;
    let mut rows = Vec::new();
    for ways in Ways::ALL {
        let until = Instant::now() + each;
        rig.check(mounted, &caches, ways).with_context(|| about(ways))?;
        let decided = (mode == CopyMode::Auto).then(|| mounted.backend.describe(&caches.store.paged));
        let chunks = caches.store.chunks();
        let ceiling = || rig.ceiling(shape.chunk, ways, 0..chunks);
        let (mut ours, mut limit, mut submit) = (Windows::default(), Windows::default(), Windows::default());
        // The check was the backend's first turn and did not count. So the ceiling's first turn does not count either.
        ceiling()?;
        for turn in 0.. {
            if turn >= TURNS_MIN && Instant::now() >= until {
                break;
            }
            // The two take turns, and each goes first as often as the other.
            if turn % 2 == 1 {
                limit.push(ceiling().with_context(|| about(ways))?.gbs());
            }
            let found = rig.turn(mounted, &caches, ways).with_context(|| about(ways))?;
            ours.push(found.gbs());
            submit.push(found.submit_seconds * 1e6);
            if turn % 2 == 0 {
                limit.push(ceiling().with_context(|| about(ways))?.gbs());
            }
        }
        let mut row = Row {
            direction: ways,
            backend: name,
            fragment_bytes: shape.fragment,
            chunk_bytes: shape.chunk,
            sm_count,
            gbs: rounded(ours.median(), 3),
            gbs_p95: rounded(ours.share(0.05), 3),
            ceiling_gbs: rounded(limit.median(), 3),
            ceiling_gbs_p95: rounded(limit.share(0.05), 3),
            ratio: rounded(ours.ratio(&limit), 4),
            submit_us: rounded(submit.median(), 3),
            submit_us_p95: rounded(submit.share(0.95), 3),
            turns: ours.len(),
            decided,
            goal_ratio: None,
            goal_submit_us: None,
            met: None,
        };
        goals::judge(&mut row, mode);
        rows.push(row);
    }
    Ok(rows)
}

/// Shows the rows to people.
pub(super) fn sheet(rows: &[Row]) -> Sheet {
    let mut sheet = Sheet::new(&[
        "direction",
        "backend",
        "fragment",
        "chunk",
        "SMs",
        "GB/s",
        "p95",
        "ceiling",
        "ratio",
        "goal",
        "submit µs",
        "p95",
        "goal",
        "met",
    ]);
    let show = |value: Option<f64>, digits| number(value.unwrap_or(f64::NAN), digits);
    let goal = |sign: &str, goal: Option<f64>| goal.map_or(String::new(), |goal| format!("{sign} {goal}"));
    for row in rows {
        sheet.row(vec![
            row.direction.as_str().to_owned(),
            row.backend.to_owned(),
            show_bytes(row.fragment_bytes),
            show_bytes(row.chunk_bytes),
            row.sm_count.to_string(),
            show(row.gbs, 1),
            show(row.gbs_p95, 1),
            show(row.ceiling_gbs, 1),
            show(row.ratio, 3),
            goal("≥", row.goal_ratio),
            show(row.submit_us, 1),
            show(row.submit_us_p95, 1),
            goal("≤", row.goal_submit_us),
            goals::word(row.met).to_owned(),
        ]);
    }
    sheet
}

/// Lists what `auto` has decided: each decision once, with the fragments that it was made for.
pub(super) fn decisions(rows: &[Row]) -> Vec<String> {
    let mut found: Vec<(&str, Vec<String>)> = Vec::new();
    for row in rows {
        let Some(decided) = row.decided.as_deref() else { continue };
        let at = format!("{} in {}", show_bytes(row.fragment_bytes), show_bytes(row.chunk_bytes));
        match found.iter_mut().find(|(known, _)| *known == decided) {
            Some((_, shapes)) if shapes.contains(&at) => {}
            Some((_, shapes)) => shapes.push(at),
            None => found.push((decided, vec![at])),
        }
    }
    let line = |(decided, shapes): (&str, Vec<String>)| format!("auto {decided}: {}", shapes.join(", "));
    found.into_iter().map(line).collect()
}
