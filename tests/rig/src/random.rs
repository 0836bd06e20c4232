//! Random numbers that a seed determines (SplitMix64).

use std::ops::Range;
use std::time::Duration;

/// An odd number without a pattern (2⁶⁴ divided by the golden ratio): the step of a counter whose values are mixed.
pub const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finaliser of SplitMix64: every bit of the result depends on every bit of `value`, and different values have different
/// results.
#[must_use]
pub fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// A stream of random numbers. Streams of the same seed and name are equal.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The stream of this seed and name.
    #[must_use]
    pub fn new(seed: u64, name: u64) -> Random {
        Random(mix(mix(seed.wrapping_add(0x6b76_7269_6e67)) ^ name))
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GAMMA);
        mix(self.0)
    }

    /// A number below `end`; 0 where that is 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.bits() % end.max(1)
    }

    /// A number of the range; its start where the range is empty.
    pub fn of(&mut self, range: Range<u64>) -> u64 {
        range.start + self.below(range.end.saturating_sub(range.start))
    }

    /// A number from `low` to `high`, both included.
    pub fn within(&mut self, low: usize, high: usize) -> usize {
        low + self.below((high - low) as u64 + 1) as usize
    }

    /// One of these values.
    ///
    /// # Panics
    /// Where there are none.
    pub fn pick<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len() as u64) as usize]
    }

    /// True once in `times` on average.
    pub fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// True with this probability in percent.
    pub fn percent(&mut self, probability: u64) -> bool {
        self.below(100) < probability
    }

    /// Brings these values into a random order.
    pub fn shuffle<T>(&mut self, values: &mut [T]) {
        for at in (1..values.len()).rev() {
            values.swap(at, self.within(0, at));
        }
    }

    /// Fills these bytes with random ones.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for word in bytes.chunks_mut(8) {
            word.copy_from_slice(&self.bits().to_le_bytes()[..word.len()]);
        }
    }

    /// A number of milliseconds from the range.
    pub fn ms(&mut self, range: Range<u64>) -> Duration {
        Duration::from_millis(self.of(range))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seed_and_the_name_determine_the_stream() {
        let some = |seed, name| {
            let mut random = Random::new(seed, name);
            [random.bits(), random.bits(), random.of(10..20), random.of(5..5)]
        };
        assert_eq!(some(1, 2), some(1, 2));
        assert_ne!(some(1, 2), some(1, 3));
        assert_ne!(some(1, 2), some(2, 2));
        assert!((10..20).contains(&some(7, 7)[2]) && some(7, 7)[3] == 5);
    }
}
