//! Random numbers that a seed fixes.

use crate::simulated::content::mix;
use std::ops::Range;
use std::time::Duration;

/// A stream of random numbers: the same for the same seed and name.
#[derive(Clone, Debug)]
pub(super) struct Random(u64);

impl Random {
    /// The stream of this name.
    pub(super) fn new(seed: u64, name: u64) -> Random {
        Random(mix(mix(seed.wrapping_add(0x6b76_7269_6e67)) ^ name))
    }

    /// The next number.
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number of the range; its start if it is empty.
    pub(super) fn of(&mut self, range: Range<u64>) -> u64 {
        range.start + self.next() % range.end.saturating_sub(range.start).max(1)
    }

    /// True so often in a hundred times.
    pub(super) fn percent(&mut self, times: u64) -> bool {
        self.of(0..100) < times
    }

    /// A number of milliseconds from the range.
    pub(super) fn ms(&mut self, range: Range<u64>) -> Duration {
        Duration::from_millis(self.of(range))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seed_and_the_name_fix_the_stream() {
        let some = |seed, name| {
            let mut random = Random::new(seed, name);
            [random.next(), random.next(), random.of(10..20), random.of(5..5)]
        };
        assert_eq!(some(1, 2), some(1, 2));
        assert_ne!(some(1, 2), some(1, 3));
        assert_ne!(some(1, 2), some(2, 2));
        assert!((10..20).contains(&some(7, 7)[2]) && some(7, 7)[3] == 5);
    }
}
