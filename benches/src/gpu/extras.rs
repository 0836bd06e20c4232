//! Numbers beside the table: the gather alone, registering, and how soon something small has arrived.

use super::goals::{self, GATHER_GBS, REGISTER_S_PER_GB};
use super::layout::Shape;
use super::rig::{Mounted, Rig, Ways};
use super::row::TURNS_MIN;
use crate::report::{Sheet, bytes as show_bytes, number, rounded};
use crate::stats::Windows;
use anyhow::Context;
use kvring_gpu_kernels::CopyMode;
use kvring_gpu_kernels::raw::Gather;
use serde::Serialize;
use std::time::{Duration, Instant};

/// Bytes of a chunk when the gather is measured alone: enough to keep every SM busy. A smaller working set is cut into two chunks.
const GATHERED: usize = 64 << 20;
/// Blocks of threads that an SM holds: 2048 threads, of which a block has 512.
const BLOCKS_PER_SM: u32 = 4;
/// Bytes of a tiny load.
pub(super) const TINY: usize = 64 << 10;
/// The most tiny loads of each kind.
const TINY_MAX: usize = 2000;
/// How often the working set is registered.
const REGISTRATIONS: usize = 3;

/// Is there to be another turn? There are as many as the time allows, but no fewer than [`TURNS_MIN`].
fn goes_on(turn: usize, until: Instant) -> bool {
    turn < TURNS_MIN || Instant::now() < until
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct GatherRow {
    fragment_bytes: usize,
    chunk_bytes: usize,
    /// The most blocks of threads of one launch.
    grid: u32,
    /// The speed in gathered bytes. Each of them is read once and written once.
    gbs: Option<f64>,
    gbs_p95: Option<f64>,
    turns: usize,
    goal_gbs: Option<f64>,
    met: Option<bool>,
}

/// Measures the gather kernel from device memory to device memory: on the whole device, and on as many SMs as a backend takes.
pub(super) fn gather(
    rig: &Rig,
    fragment: usize,
    sm_count: u32,
    each: Duration,
) -> anyhow::Result<Vec<GatherRow>> {
    let chunk = GATHERED.min(rig.working_set / 2).max(fragment);
    let caches = rig.caches(Shape { fragment, chunk })?;
    let layout = &caches.store;
    let kernel = Gather::new(&rig.device, &layout.paged)?;
    let stream = rig.device.stream()?;
    let turn = |grid: u32| {
        let began = Instant::now();
        let submit = || {
            for chunk in 0..layout.chunks() {
                let to = rig.gathered().address() + (chunk * layout.shape.chunk) as u64;
                // SAFETY: both sides are the rig's and hold all chunks; the stream is waited for below.
                unsafe { kernel.chunk(layout.blocks(chunk), to, grid, &stream) }?;
            }
            stream.mark()
        };
        match submit() {
            Ok(mark) => {
                while !mark.has_come()? {
                    std::thread::yield_now();
                }
                let seconds = began.elapsed().as_secs_f64();
                Ok((layout.chunks() * layout.shape.chunk) as f64 / seconds / 1e9)
            }
            Err(error) => {
                let _ = stream.synchronize();
                Err(anyhow::Error::from(error))
            }
        }
    };
    let full = rig.device.info().multiprocessors * BLOCKS_PER_SM;
    let mut rows = Vec::new();
    for (grid, goal) in [(full, Some(GATHER_GBS)), (sm_count, None)] {
        let until = Instant::now() + each;
        let about = || format!("a gather of fragments of {}", show_bytes(fragment));
        rig.renew_stored(chunk)?;
        turn(grid).with_context(about)?;
        rig.fetch_gathered(chunk)?;
        rig.compare_stored(layout).with_context(about)?;
        let mut found = Windows::default();
        while goes_on(found.len(), until) {
            found.push(turn(grid)?);
        }
        rows.push(GatherRow {
            fragment_bytes: fragment,
            chunk_bytes: chunk,
            grid,
            gbs: rounded(found.median(), 2),
            gbs_p95: rounded(found.share(0.05), 2),
            turns: found.len(),
            goal_gbs: goal,
            met: goal.map(|goal| found.median() >= goal),
        });
    }
    Ok(rows)
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct Registration {
    bytes: usize,
    seconds_per_gb: Option<f64>,
    unregister_seconds_per_gb: Option<f64>,
    goal_seconds_per_gb: f64,
    pub(super) met: Option<bool>,
}

/// Measures how long registering takes, for host memory whose pages have been touched. No backend may have that memory registered
/// at the same time.
pub(super) fn register(rig: &Rig) -> anyhow::Result<Registration> {
    let bytes = rig.host.bytes();
    let (mut on, mut off) = (Windows::default(), Windows::default());
    for _ in 0..REGISTRATIONS {
        let before = Instant::now();
        // SAFETY: the rig's memory; nothing is copied before it is unregistered.
        let registered = unsafe { rig.device.register(rig.host.base(), bytes) };
        let registered = registered.context("cannot register host memory; look at `ulimit -l`")?;
        on.push(before.elapsed().as_secs_f64() / bytes as f64 * 1e9);
        let before = Instant::now();
        drop(registered);
        off.push(before.elapsed().as_secs_f64() / bytes as f64 * 1e9);
    }
    Ok(Registration {
        bytes,
        seconds_per_gb: rounded(on.median(), 4),
        unregister_seconds_per_gb: rounded(off.median(), 4),
        goal_seconds_per_gb: REGISTER_S_PER_GB,
        met: Some(on.median() <= REGISTER_S_PER_GB),
    })
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct Latency {
    backend: &'static str,
    fragment_bytes: usize,
    bytes: usize,
    /// The time from the call of `submit` until the caller has seen the end of the load.
    us: Option<f64>,
    us_p95: Option<f64>,
    /// The same for one plain copy.
    limit_us: Option<f64>,
    limit_us_p95: Option<f64>,
    loads: usize,
}

/// Measures loads of [`TINY`] bytes, one at a time.
pub(super) fn tiny(
    rig: &Rig,
    mounted: &Mounted,
    mode: CopyMode,
    fragment: usize,
    each: Duration,
) -> anyhow::Result<Latency> {
    let until = Instant::now() + each;
    let caches = rig.caches(Shape { fragment, chunk: TINY })?;
    let about = || format!("{mode}, a tiny load in fragments of {}", show_bytes(fragment));
    rig.check(mounted, &caches, Ways::Load).with_context(about)?;
    let (mut ours, mut limit) = (Windows::default(), Windows::default());
    for at in (0..caches.store.chunks()).cycle().take(TINY_MAX) {
        if !goes_on(ours.len(), until) {
            break;
        }
        limit.push(rig.ceiling(TINY, Ways::Load, at..at + 1)?.seconds * 1e6);
        ours.push(rig.turn_over(mounted, &caches, Ways::Load, at..at + 1)?.seconds * 1e6);
    }
    Ok(Latency {
        backend: mode.as_str(),
        fragment_bytes: fragment,
        bytes: TINY,
        us: rounded(ours.median(), 2),
        us_p95: rounded(ours.share(0.95), 2),
        limit_us: rounded(limit.median(), 2),
        limit_us_p95: rounded(limit.share(0.95), 2),
        loads: ours.len(),
    })
}

/// Shows all of these numbers to people.
pub(super) fn sheet(gathers: &[GatherRow], registration: &Registration, tiny: &[Latency]) -> Sheet {
    let mut sheet = Sheet::new(&["", "measured", "p95", "unit", "limit", "goal", "met"]);
    let show = |value: Option<f64>, digits| number(value.unwrap_or(f64::NAN), digits);
    for row in gathers {
        sheet.row(vec![
            format!("gather alone, fragments of {}, {} blocks", show_bytes(row.fragment_bytes), row.grid),
            show(row.gbs, 0),
            show(row.gbs_p95, 0),
            "GB/s".to_owned(),
            String::new(),
            row.goal_gbs.map_or(String::new(), |goal| format!("≥ {goal}")),
            goals::word(row.met).to_owned(),
        ]);
    }
    sheet.row(vec![
        format!("registering {} that have been touched", show_bytes(registration.bytes)),
        show(registration.seconds_per_gb, 3),
        String::new(),
        "s/GB".to_owned(),
        String::new(),
        format!("≤ {}", registration.goal_seconds_per_gb),
        goals::word(registration.met).to_owned(),
    ]);
    for row in tiny {
        let (backend, bytes) = (row.backend, show_bytes(row.bytes));
        sheet.row(vec![
            format!("a load of {bytes} in fragments of {}, {backend}", show_bytes(row.fragment_bytes)),
            show(row.us, 1),
            show(row.us_p95, 1),
            "µs".to_owned(),
            show(row.limit_us, 1),
            String::new(),
            String::new(),
        ]);
    }
    sheet
}

impl GatherRow {
    pub(super) fn met(&self) -> Option<bool> {
        self.met
    }
}
