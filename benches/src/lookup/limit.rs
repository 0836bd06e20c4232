//! The limit of a lookup: as many plain loads of private memory as it reads cache lines, prefetched as far ahead.

use super::fill::{CHAIN, Chains};
use super::{PER_WINDOW, Samples};
use crate::clock::Clock;
use core::hint::black_box;
use kvring_rig::random::Random;

/// A cache line.
#[repr(align(64))]
#[derive(Clone, Copy)]
struct Line([u64; 8]);

/// How many lines ahead are prefetched.
const AHEAD: usize = 8;

/// Private memory as large as the records and the directory of an index.
pub(super) struct Limit<'a> {
    chains: &'a Chains,
    records: Vec<Line>,
    buckets: Vec<Line>,
    random: Random,
}

impl<'a> Limit<'a> {
    pub(super) fn new(chains: &'a Chains) -> Limit<'a> {
        let records = (0..chains.chunks()).map(|at| Line([at; 8])).collect();
        let buckets = vec![Line([1; 8]); chains.chunks() as usize / 4 + 1];
        Limit { chains, records, buckets, random: Random::new(11, 0) }
    }

    /// The records of a chain that begins at the place `first`, from the one with this number on.
    fn lines(&self, first: usize, number: usize) -> impl Iterator<Item = &Line> {
        let (count, step) = (self.records.len(), self.chains.stored_as(1) as usize);
        let mut place = (first + number * step) % count;
        core::iter::repeat_with(move || {
            let line = &self.records[place];
            place += step;
            place -= if place < count { 0 } else { count };
            line
        })
    }

    /// The loads of so many lookups: of a directory's two lines, and of each record twice, the second time when all have been
    /// read. A miss reads the two lines only.
    pub(super) fn window(&mut self, asked: usize, present: bool, clock: &Clock) -> Samples {
        let mut samples = Samples::with_capacity(PER_WINDOW as usize);
        for _ in 0..PER_WINDOW {
            let spots = [(); 2].map(|()| self.random.below(self.buckets.len() as u64) as usize);
            let chain = self.chains.stored_as(self.random.below(self.chains.whole()) * CHAIN as u64) as usize;
            let before = clock.ticks();
            let mut sum = spots.iter().fold(0u64, |sum, spot| sum.wrapping_add(self.buckets[*spot].0[3]));
            if present {
                // The place of the first record is known only when the directory's lines have been read.
                let first = black_box(chain + usize::from(sum == u64::MAX));
                for (line, ahead) in self.lines(first, 0).zip(self.lines(first, AHEAD)).take(asked) {
                    prefetch(ahead);
                    sum = sum.wrapping_add(line.0[0] ^ line.0[1] ^ line.0[2]);
                }
                sum = self.lines(first, 0).take(asked).fold(sum, |sum, line| sum.wrapping_add(line.0[0]));
            }
            black_box(sum);
            samples.push(clock.ticks() - before);
        }
        samples
    }
}

#[cfg(target_arch = "x86_64")]
fn prefetch(line: &Line) {
    // SAFETY: the intrinsic needs SSE, which every x86-64 processor has; it reads nothing.
    unsafe {
        core::arch::x86_64::_mm_prefetch::<{ core::arch::x86_64::_MM_HINT_T0 }>(
            core::ptr::from_ref(line).cast(),
        )
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn prefetch(_: &Line) {}
