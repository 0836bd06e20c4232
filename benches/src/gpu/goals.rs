//! The goals that the numbers are compared with.

use super::row::Row;
use kvring_gpu_kernels::CopyMode;

/// Fragments of at least this many bytes are long enough for a copy engine to reach the ceiling, with one copy for each.
const BATCH_FROM: usize = 64 << 10;
/// With fragments of at least this many bytes, gathering and scattering must cost almost nothing.
const STAGED_FROM: usize = 8 << 10;
/// The share of the ceiling that such fragments must reach.
const NEARLY_ALL: f64 = 0.95;
/// The same for fragments that are shorter than [`STAGED_FROM`].
const MOST: f64 = 0.9;
/// The most microseconds in `submit` for a chunk.
const SUBMIT_US: f64 = 10.0;
/// The least speed of a gather that has the whole device, from device memory to device memory, in GB/s.
pub(super) const GATHER_GBS: f64 = 1000.0;
/// The most seconds for registering a GB of memory that has been touched.
pub(super) const REGISTER_S_PER_GB: f64 = 0.1;

/// The goals of a row: the least ratio to the ceiling, and the most µs in `submit` for a chunk.
fn wanted(mode: CopyMode, fragment: usize) -> (Option<f64>, Option<f64>) {
    let gathered = Some(if fragment >= STAGED_FROM { NEARLY_ALL } else { MOST });
    match mode {
        // `auto` has the goal of `staged`, whichever way it has taken.
        CopyMode::Staged | CopyMode::Auto => (gathered, Some(SUBMIT_US)),
        // It makes a copy for each fragment, so only long fragments have a goal.
        CopyMode::Batch if fragment >= BATCH_FROM => (Some(NEARLY_ALL), Some(SUBMIT_US)),
        CopyMode::Batch | CopyMode::ZeroCopy => (None, None),
    }
}

/// Writes into a row its goals, and whether it has met them.
pub(super) fn judge(row: &mut Row, mode: CopyMode) {
    (row.goal_ratio, row.goal_submit_us) = wanted(mode, row.fragment_bytes);
    row.met = row.goal_ratio.zip(row.goal_submit_us).map(|(ratio, submit_us)| {
        row.ratio.is_some_and(|got| got >= ratio) && row.submit_us.is_some_and(|got| got <= submit_us)
    });
}

/// The word that people read for it.
pub(super) fn word(met: Option<bool>) -> &'static str {
    match met {
        None => "",
        Some(true) => "yes",
        Some(false) => "NO",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goals_go_by_the_way_and_the_fragment() {
        let ratio = |mode, kib: usize| wanted(mode, kib << 10).0;
        assert_eq!([2, 4, 8, 2048].map(|kib| ratio(CopyMode::Staged, kib)), [0.9, 0.9, 0.95, 0.95].map(Some));
        assert_eq!([32, 64].map(|kib| ratio(CopyMode::Batch, kib)), [None, Some(0.95)]);
        assert_eq!(ratio(CopyMode::ZeroCopy, 64), None);
        assert_eq!(wanted(CopyMode::Auto, 2048), (Some(0.9), Some(10.0)));
    }
}
