//! What is wanted of each number.

use super::row::Row;
use kvring_gpu_kernels::CopyMode;

/// From this many contiguous bytes on DMA needs no help.
const BATCH_FROM: usize = 64 << 10;
/// From this many on gathering and scattering may not cost anything.
const STAGED_FROM: usize = 8 << 10;
/// Of the ceiling.
const NEARLY_ALL: f64 = 0.95;
/// The same below [`STAGED_FROM`].
const MOST: f64 = 0.9;
const SUBMIT_US: f64 = 10.0;
/// Of a gather alone on the whole device, device to device, in GB/s.
pub(super) const GATHER_GBS: f64 = 1000.0;
/// Of registering memory that has been touched.
pub(super) const REGISTER_S_PER_GB: f64 = 0.1;

/// What a row has to reach: the ratio to the ceiling, µs in `submit` for a chunk.
fn wanted(mode: CopyMode, fragment: usize) -> (Option<f64>, Option<f64>) {
    let gathered = Some(if fragment >= STAGED_FROM { NEARLY_ALL } else { MOST });
    match mode {
        // Of whichever it has taken.
        CopyMode::Staged | CopyMode::Auto => (gathered, Some(SUBMIT_US)),
        // A copy for each fragment: for long ones only.
        CopyMode::Batch if fragment >= BATCH_FROM => (Some(NEARLY_ALL), Some(SUBMIT_US)),
        CopyMode::Batch | CopyMode::ZeroCopy => (None, None),
    }
}

/// Puts the goals into a row, and whether it has met them.
pub(super) fn judge(row: &mut Row, mode: CopyMode) {
    (row.goal_ratio, row.goal_submit_us) = wanted(mode, row.fragment_bytes);
    row.met = row.goal_ratio.zip(row.goal_submit_us).map(|(ratio, submit_us)| {
        row.ratio.is_some_and(|got| got >= ratio) && row.submit_us.is_some_and(|got| got <= submit_us)
    });
}

/// For people.
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
