//! Which loop copies what: measured once in each process, on memory of our own, in some 20 ms.
//!
//! Each sample copies bytes that have been flushed from the caches, as those of a KV cache and of an arena are that are many times
//! larger: in the caches other loops are fast. The fastest of a few samples counts: whatever else runs at
//! the same time only slows samples down.

use crate::batch::Direction;
use crate::copy::{Loop, Stretch, copy, evict, store_fence};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The time for all measurements, where a processor is so slow that [`SAMPLES`] take longer. A sample that has begun by then still
/// ends.
const BUDGET: Duration = Duration::from_millis(40);
/// Samples of each loop in each case.
const SAMPLES: usize = 5;
/// Bytes of a sample.
const BYTES: usize = 256 << 10;
/// How both sides are aligned: as caches and arenas are. What is not aligned to a cache line is copied more slowly.
const ALIGNED: usize = 4096;
/// From so many contiguous bytes on a page is long.
const LONG_MIN: usize = 8 << 10;
/// Bytes of the pages with which each length is measured: short, long.
const PAGES: [usize; 2] = [2 << 10, 64 << 10];
/// A loop must be faster by this factor than one that comes before it in [`Loop::ALL`]. So processes on one machine agree, and
/// equals leave the caches alone.
const WORTH: f64 = 1.04;

/// For each direction, for short and for long pages, without and with a checksum: the loop that copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loops([[[Loop; 2]; 2]; 2]);

impl Loops {
    /// The same loop for everything.
    #[must_use]
    pub const fn only(how: Loop) -> Loops {
        Loops([[[how; 2]; 2]; 2])
    }

    /// The fastest ones here. The first call in a process measures.
    pub fn measured() -> Loops {
        static MEASURED: OnceLock<Loops> = OnceLock::new();
        *MEASURED.get_or_init(|| {
            let began = Instant::now();
            let loops = measure(began + BUDGET);
            let took_ms = began.elapsed().as_millis() as u64;
            tracing::info!(store = %loops.describe(Direction::Store), load = %loops.describe(Direction::Load), took_ms, "copies between host memory and arena");
            loops
        })
    }

    /// The loop for a page of so many contiguous bytes.
    #[must_use]
    pub fn of(&self, direction: Direction, bytes: usize, checksum: bool) -> Loop {
        self.0[direction as usize][usize::from(bytes >= LONG_MIN)][usize::from(checksum)]
    }

    /// For people: one direction's loops.
    #[must_use]
    pub fn describe(&self, direction: Direction) -> String {
        let [short, long] =
            self.0[direction as usize].map(|[plain, summed]| match (plain.as_str(), summed.as_str()) {
                (plain, summed) if plain == summed => plain.to_owned(),
                (plain, summed) => format!("{plain} ({summed} with a checksum)"),
            });
        if short == long { long } else { format!("{long}; short pages {short}") }
    }
}

/// Measures until then; what there is no time for goes by the loop that comes first.
fn measure(until: Instant) -> Loops {
    let candidates: Vec<Loop> = Loop::here().collect();
    let mut loops = Loops::only(candidates[0]);
    if candidates.len() == 1 {
        return loops;
    }
    let mut cases = Vec::new();
    for direction in [Direction::Store, Direction::Load] {
        for (long, page) in PAGES.into_iter().enumerate() {
            cases.extend([false, true].map(|checksum| Case { direction, long, page, checksum }));
        }
    }
    let mut scratch = Scratch { paged: vec![1; BYTES + ALIGNED], arena: vec![1; BYTES + ALIGNED] };
    let mut seconds = vec![vec![f64::INFINITY; candidates.len()]; cases.len()];
    // In turn, so that all of them see the machine's good and bad moments.
    for _ in 0..SAMPLES {
        for (case, seconds) in cases.iter().zip(&mut seconds) {
            for (how, seconds) in candidates.iter().zip(seconds) {
                if Instant::now() < until {
                    *seconds = scratch.sample(case, *how).min(*seconds);
                }
            }
        }
    }
    for (case, seconds) in cases.iter().zip(&seconds) {
        let gbs: Vec<_> = candidates
            .iter()
            .zip(seconds)
            .map(|(how, seconds)| (how.as_str(), BYTES as f64 / seconds / 1e9))
            .collect();
        tracing::debug!(
            direction = case.direction.as_str(),
            page = case.page,
            case.checksum,
            ?gbs,
            "measured"
        );
        loops.0[case.direction as usize][case.long][usize::from(case.checksum)] =
            candidates[fastest(seconds)];
    }
    loops
}

/// The index of the best time. An earlier one is left only for one that is better by [`WORTH`].
fn fastest(seconds: &[f64]) -> usize {
    (0..seconds.len()).fold(0, |best, at| if seconds[at] * WORTH < seconds[best] { at } else { best })
}

/// What a loop is measured for.
struct Case {
    direction: Direction,
    /// 0 or 1: the index in [`PAGES`].
    long: usize,
    page: usize,
    checksum: bool,
}

/// Both sides of the copies that are measured.
struct Scratch {
    paged: Vec<u8>,
    arena: Vec<u8>,
}

impl Scratch {
    /// How many seconds it takes to copy everything, page by page, between pages in an order without a pattern and an arena in
    /// order.
    fn sample(&mut self, case: &Case, how: Loop) -> f64 {
        let Case { direction, page, checksum, .. } = *case;
        let [paged, arena] = [&mut self.paged, &mut self.arena].map(|side| {
            evict(side);
            side.as_mut_ptr().wrapping_add(side.as_ptr().align_offset(ALIGNED))
        });
        let pages = BYTES / page;
        // An odd factor: each page comes once.
        let sides = |index: usize| {
            let paged = paged.wrapping_add(index.wrapping_mul(2_654_435_761) % pages * page);
            let arena = arena.wrapping_add(index % pages * page);
            if direction == Direction::Store { (arena, paged) } else { (paged, arena) }
        };
        let began = Instant::now();
        for index in 0..pages {
            let ((to, from), (_, next)) = (sides(index), sides(index + 1));
            let stretch = Stretch { to, from, next, bytes: page, position: (index * page) as u64 };
            // SAFETY: each side is a page of its own vector, and nobody else knows of them.
            unsafe {
                if checksum {
                    copy::<true>(how, stretch)
                } else {
                    copy::<false>(how, stretch)
                };
            }
        }
        store_fence();
        began.elapsed().as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_left_only_for_one_that_is_clearly_faster() {
        assert_eq!(fastest(&[1.0, 0.99, 0.97]), 0);
        assert_eq!(fastest(&[1.0, 0.7, 0.69]), 1);
        assert_eq!(fastest(&[1.0, 0.9, 0.6]), 2);
        assert_eq!(fastest(&[f64::INFINITY; 3]), 0, "nothing was measured");
        assert_eq!(fastest(&[f64::INFINITY, f64::INFINITY, 1.0]), 2, "one was measured");
    }

    #[test]
    fn each_case_has_a_loop_of_its_own() {
        let mut loops = Loops::only(Loop::Bytes);
        loops.0[Direction::Load as usize][1] = [Loop::Cached, Loop::Streaming];
        let of = |direction, bytes, checksum| loops.of(direction, bytes, checksum);
        assert_eq!(of(Direction::Load, LONG_MIN, false), Loop::Cached);
        assert_eq!(of(Direction::Load, LONG_MIN, true), Loop::Streaming);
        assert_eq!(of(Direction::Load, LONG_MIN - 1, true), Loop::Bytes);
        assert_eq!(of(Direction::Store, LONG_MIN, true), Loop::Bytes);
        assert_eq!(loops.describe(Direction::Store), "bytes");
        assert_eq!(loops.describe(Direction::Load), "cached (streaming with a checksum); short pages bytes");
    }

    #[test]
    fn without_time_the_first_loop_is_taken_and_all_that_are_measured_run_here() {
        assert_eq!(measure(Instant::now()), Loops::only(Loop::here().next().unwrap()));
        let measured = Loops::measured();
        let all = measured.0.as_flattened().as_flattened();
        assert!(all.iter().all(|how| Loop::here().any(|here| here == *how)), "{measured:?}");
    }
}
