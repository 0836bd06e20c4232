//! Percentiles, and medians over windows.

/// Samples of one window, in any unit.
#[derive(Clone, Debug, Default)]
pub(crate) struct Samples {
    values: Vec<u64>,
    sorted: bool,
}

impl Samples {
    /// With room, so that taking a sample allocates nothing.
    pub(crate) fn with_capacity(count: usize) -> Samples {
        Samples { values: Vec::with_capacity(count), sorted: true }
    }

    /// Adds one.
    #[inline]
    pub(crate) fn push(&mut self, value: u64) {
        self.values.push(value);
        self.sorted = false;
    }

    /// Adds all of another window's.
    pub(crate) fn extend(&mut self, other: &Samples) {
        self.values.extend_from_slice(&other.values);
        self.sorted = false;
    }

    /// The smallest value that at least `share` of the samples do not exceed (nearest rank); `None` without samples.
    pub(crate) fn percentile(&mut self, share: f64) -> Option<u64> {
        if !self.sorted {
            self.values.sort_unstable();
            self.sorted = true;
        }
        let rank = (share * self.values.len() as f64).ceil() as usize;
        self.values.get(rank.max(1) - 1).or(self.values.last()).copied()
    }
}

/// The median; of an even number of values the mean of the two in the middle. `None` without values.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(sorted[middle]),
        _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
    }
}

/// One number per window.
#[derive(Clone, Debug, Default)]
pub(crate) struct Windows(Vec<f64>);

impl Windows {
    /// Adds a window's number.
    pub(crate) fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// The median over windows; not a number without windows, which JSON shows as null.
    pub(crate) fn median(&self) -> f64 {
        median(&self.0).unwrap_or(f64::NAN)
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// The smallest number that at least `share` of the windows do not exceed (nearest rank); not a number without windows.
    pub(crate) fn share(&self, share: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        let rank = (share * sorted.len() as f64).ceil() as usize;
        sorted.get(rank.max(1) - 1).copied().unwrap_or(f64::NAN)
    }

    /// The median of the ratios window by window, in which changes of the machine's speed cancel out.
    pub(crate) fn ratio(&self, limit: &Windows) -> f64 {
        let ratios: Vec<f64> = self.0.iter().zip(&limit.0).map(|(ours, limit)| ours / limit).collect();
        median(&ratios).unwrap_or(f64::NAN)
    }

    /// The larger of two numbers in each window.
    pub(crate) fn best(&self, other: &Windows) -> Windows {
        Windows(self.0.iter().zip(&other.0).map(|(a, b)| a.max(*b)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(values: impl IntoIterator<Item = u64>) -> Samples {
        let mut samples = Samples::with_capacity(0);
        values.into_iter().for_each(|value| samples.push(value));
        samples
    }

    fn windows(values: &[f64]) -> Windows {
        Windows(values.to_vec())
    }

    #[test]
    fn percentiles_are_nearest_ranks() {
        let mut hundred = samples((1..=100).rev());
        for (share, value) in
            [(0.0, 1), (0.01, 1), (0.5, 50), (0.501, 51), (0.99, 99), (0.999, 100), (1.0, 100)]
        {
            assert_eq!(hundred.percentile(share), Some(value), "{share}");
        }
        hundred.push(0);
        assert_eq!(hundred.percentile(0.0), Some(0), "a sample after a look counts");
        assert_eq!(samples([]).percentile(0.5), None);
        assert_eq!(samples([7]).percentile(0.999), Some(7));
        let mut both = samples([1, 2]);
        both.extend(&samples([3, 4, 5]));
        assert_eq!(both.percentile(0.5), Some(3));
    }

    #[test]
    fn medians_of_odd_even_and_nothing() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(&[]), None);
        assert!(Windows::default().median().is_nan() && Windows::default().share(0.5).is_nan());
        let twenty = windows(&(1..=20).rev().map(f64::from).collect::<Vec<_>>());
        assert_eq!((twenty.share(0.05), twenty.share(0.95), twenty.len()), (1.0, 19.0, 20));
    }

    #[test]
    fn ratios_are_taken_window_by_window() {
        // The machine got four times slower half-way: the ratio does not notice, the ratio of medians would.
        let ours = windows(&[120.0, 120.0, 480.0, 480.0, 480.0]);
        let limit = windows(&[100.0, 100.0, 100.0, 400.0, 400.0]);
        assert_eq!(ours.ratio(&limit), 1.2);
        assert_eq!(ours.median() / limit.median(), 4.8);
        assert_eq!(
            ours.best(&windows(&[500.0, 1.0, 500.0, 1.0, 1.0])).0,
            [500.0, 120.0, 500.0, 480.0, 480.0]
        );
    }
}
