//! The free slabs, and where enough of them lie in a row: found without a look at all of them.

use core::ops::Range;

use crate::lazy::{Lazy, NoMemory};

/// The slabs that are usable, in no span and not closed.
pub(super) struct Pool {
    /// One bit for each slab.
    bits: Lazy<u64>,
    /// The length of the longest run of free slabs in each group, as the leaves (from `leaves` on) of a binary
    /// tree; each inner node has the larger value of its two children.
    longest: Lazy<u32>,
    leaves: usize,
    /// How many slabs a group has. No run crosses the boundary between two groups.
    group: u32,
    count: u32,
    /// How many slabs are free.
    pub(super) len: u32,
}

impl Pool {
    pub(super) fn new(count: u32, group: u32) -> Result<Self, NoMemory> {
        let leaves = (count.div_ceil(group) as usize).next_power_of_two();
        let (bits, longest) = (Lazy::new((count as usize).div_ceil(64))?, Lazy::new(2 * leaves)?);
        Ok(Self { bits, longest, leaves, group, count, len: 0 })
    }

    pub(super) fn has(&self, slab: u32) -> bool {
        self.bits[slab as usize / 64] >> (slab % 64) & 1 == 1
    }

    /// Adds slabs of one group, none of which is in the pool.
    pub(super) fn put(&mut self, slabs: Range<u32>) {
        let group = slabs.start / self.group;
        self.len += slabs.end - slabs.start;
        slabs.clone().for_each(|slab| self.bits[slab as usize / 64] |= 1 << (slab % 64));
        // Only the run that contains them has grown.
        let (first, end) = self.slabs_of(group);
        let mut run = slabs.end - slabs.start;
        run += (slabs.end..end).take_while(|slab| self.has(*slab)).count() as u32;
        run += (first..slabs.start).rev().take_while(|slab| self.has(*slab)).count() as u32;
        self.set_longest(group, run.max(self.longest[self.leaves + group as usize]));
    }

    /// Takes slabs of one group, all of which are in the pool.
    pub(super) fn take(&mut self, slabs: Range<u32>) {
        let group = slabs.start / self.group;
        self.len -= slabs.end - slabs.start;
        slabs.for_each(|slab| self.bits[slab as usize / 64] &= !(1 << (slab % 64)));
        let longest = self.runs(group).map(|run| run.end - run.start).max().unwrap_or(0);
        self.set_longest(group, longest);
    }

    /// The first run of `most` free slabs, or else the longest run of at least `least`.
    pub(super) fn find(&self, least: u32, most: u32) -> Option<Range<u32>> {
        let want = self.longest[1].min(most);
        if want < least.max(1) {
            return None;
        }
        let mut node = 1;
        while node < self.leaves {
            node = 2 * node + usize::from(self.longest[2 * node] < want);
        }
        let run = self.runs((node - self.leaves) as u32).find(|run| run.end - run.start >= want)?;
        Some(run.start..run.start + want)
    }

    fn slabs_of(&self, group: u32) -> (u32, u32) {
        let first = group * self.group;
        (first, self.count.min(first.saturating_add(self.group)))
    }

    /// The runs of free slabs in a group.
    fn runs(&self, group: u32) -> impl Iterator<Item = Range<u32>> + '_ {
        let (mut at, end) = self.slabs_of(group);
        std::iter::from_fn(move || {
            let start = (at..end).find(|slab| self.has(*slab))?;
            at = (start..end).find(|slab| !self.has(*slab)).unwrap_or(end);
            Some(start..at)
        })
    }

    fn set_longest(&mut self, group: u32, longest: u32) {
        let mut node = self.leaves + group as usize;
        self.longest[node] = longest;
        while node > 1 {
            node /= 2;
            self.longest[node] = self.longest[2 * node].max(self.longest[2 * node + 1]);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The same search over all slabs, one by one.
    fn find(free: &[bool], group: usize, least: u32, most: u32) -> Option<Range<u32>> {
        let mut best: Range<u32> = 0..0;
        for start in 0..free.len() {
            let end = (start - start % group + group).min(free.len());
            let len = free[start..end].iter().take_while(|free| **free).count().min(most as usize) as u32;
            if len > best.end - best.start {
                best = start as u32..start as u32 + len;
            }
        }
        (best.end - best.start >= least).then_some(best)
    }

    proptest! {
        #[test]
        fn finds_what_a_look_at_all_slabs_finds(
            count in 1..200_u32,
            group in prop::sample::select(vec![1_u32, 4, 16, 64, 1024]),
            steps in prop::collection::vec((any::<u32>(), 1..9_u32, 1..9_u32, 1..9_u32), 1..200),
        ) {
            let mut pool = Pool::new(count, group).unwrap();
            let mut free = vec![false; count as usize];
            for (at, len, least, more) in steps {
                let start = at % count;
                let end = (start + len).min(count).min((start - start % group).saturating_add(group));
                let slabs = start..end;
                let all = &mut free[start as usize..end as usize];
                if all.iter().all(|free| *free) {
                    all.fill(false);
                    pool.take(slabs);
                } else if all.iter().all(|free| !*free) {
                    all.fill(true);
                    pool.put(slabs);
                }
                prop_assert_eq!(pool.len as usize, free.iter().filter(|free| **free).count());
                prop_assert!((0..count).all(|slab| pool.has(slab) == free[slab as usize]));
                let most = least + more - 1;
                prop_assert_eq!(pool.find(least, most), find(&free, group as usize, least, most));
            }
        }
    }
}
