//! What a page of KV holds: a function of whose it is, so that every byte that was loaded can be told right or wrong.
//!
//! Word `i` of a page is an invertible mix of `seed + i × γ`: a counter. All words of a page differ, and pages of
//! different chunks, ranks, blocks or planes share no run of words, so a byte that comes from another place, another
//! time or nowhere is seen. The loops have no branch and no multiplication: they run at the speed of memory.

use kvring_adapter::Key;

/// Words that are done at once; a page is a multiple of it.
pub(crate) const LANES: usize = 8;

/// An odd number without pattern (2⁶⁴ / the golden ratio): the counter's step.
const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// Names a page: which chunk's, which rank's, which block of the chunk, which plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageId {
    /// The chunk's key.
    pub(crate) key: Key,
    /// The rank.
    pub(crate) rank: u32,
    /// The block's place in the chunk.
    pub(crate) block: u32,
    /// The plane.
    pub(crate) plane: u32,
}

/// The finaliser of SplitMix64: every bit of the result depends on every bit of `value`.
pub(crate) fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// The key of a trace's block. The ids cover the prefix, so the keys do.
pub(crate) fn key_of(block_id: u64) -> Key {
    [mix(block_id.wrapping_add(GAMMA)), mix(block_id ^ 0x6b76_7269_6e67_6b65)]
}

impl PageId {
    fn seed(&self) -> u64 {
        let place = u64::from(self.rank) << 48 ^ u64::from(self.block) << 24 ^ u64::from(self.plane);
        mix(mix(mix(self.key[0]) ^ self.key[1]) ^ place)
    }
}

#[inline(always)]
fn scramble(counter: u64) -> u64 {
    counter ^ (counter >> 29)
}

#[inline(always)]
fn counters(seed: u64) -> [u64; LANES] {
    core::array::from_fn(|lane| seed.wrapping_add(GAMMA.wrapping_mul(lane as u64)))
}

/// Writes the page's content; `page` is a multiple of [`LANES`] words.
pub(crate) fn fill(page: &mut [u64], id: PageId) {
    let mut counters = counters(id.seed());
    let (groups, rest) = page.as_chunks_mut::<LANES>();
    debug_assert!(rest.is_empty());
    for group in groups {
        for (word, counter) in group.iter_mut().zip(&mut counters) {
            *word = scramble(*counter);
            *counter = counter.wrapping_add(GAMMA.wrapping_mul(LANES as u64));
        }
    }
}

/// The first and the last word of a page of `words` words.
pub(crate) fn ends(words: usize, id: PageId) -> (u64, u64) {
    let seed = id.seed();
    let last = (words as u64).wrapping_sub(1);
    (scramble(seed), scramble(seed.wrapping_add(GAMMA.wrapping_mul(last))))
}

/// How many bytes of the page are not the page's.
pub(crate) fn wrong_bytes(page: &[u64], id: PageId) -> u64 {
    let mut differences = [0u64; LANES];
    let mut counters = counters(id.seed());
    let (groups, rest) = page.as_chunks::<LANES>();
    debug_assert!(rest.is_empty());
    for group in groups {
        for lane in 0..LANES {
            differences[lane] |= group[lane] ^ scramble(counters[lane]);
            counters[lane] = counters[lane].wrapping_add(GAMMA.wrapping_mul(LANES as u64));
        }
    }
    if differences == [0; LANES] { 0 } else { count_wrong_bytes(page, id.seed()) }
}

/// The slow way, for pages that are known to be wrong.
#[cold]
fn count_wrong_bytes(page: &[u64], seed: u64) -> u64 {
    let wrong = page.iter().zip(0u64..).map(|(word, index)| {
        let expected = scramble(seed.wrapping_add(GAMMA.wrapping_mul(index)));
        let difference = (word ^ expected).to_ne_bytes();
        difference.iter().filter(|byte| **byte != 0).count() as u64
    });
    wrong.sum()
}

/// The first word that is wrong, for a message: its index, what was expected, what is there.
pub(crate) fn first_wrong(page: &[u64], id: PageId) -> Option<(usize, u64, u64)> {
    let seed = id.seed();
    page.iter().enumerate().find_map(|(index, word)| {
        let expected = scramble(seed.wrapping_add(GAMMA.wrapping_mul(index as u64)));
        (*word != expected).then_some((index, expected, *word))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    const ID: PageId = PageId { key: [1, 2], rank: 3, block: 4, plane: 5 };

    fn page(id: PageId, words: usize) -> Vec<u64> {
        let mut page = vec![0; words];
        fill(&mut page, id);
        page
    }

    #[test]
    fn what_was_filled_is_right_and_each_wrong_byte_counts_once() {
        let mut page = page(ID, 512);
        assert_eq!((wrong_bytes(&page, ID), first_wrong(&page, ID)), (0, None));
        let right = page[100];
        page[100] ^= 0x0100_0000_0000_0080;
        page[511] ^= 1;
        assert_eq!(wrong_bytes(&page, ID), 3);
        assert_eq!(first_wrong(&page, ID), Some((100, right, right ^ 0x0100_0000_0000_0080)));
        // Never copied to: (almost) every byte is wrong.
        assert!(wrong_bytes(&[0; 512], ID) > 4000);
    }

    #[test]
    fn every_word_differs_and_so_does_every_page() {
        let others = [
            PageId { key: [2, 1], ..ID },
            PageId { key: [1, 3], ..ID },
            PageId { rank: 2, ..ID },
            PageId { block: 5, ..ID },
            PageId { plane: 4, ..ID },
            PageId { block: 5, plane: 4, ..ID },
            ID,
        ];
        let words: HashSet<u64> = others.iter().flat_map(|id| page(*id, 1024)).collect();
        assert_eq!(words.len(), others.len() * 1024);
        // Shifted by one word, a page is wrong almost everywhere.
        let mut shifted = page(ID, 1024);
        shifted.rotate_left(1);
        assert!(wrong_bytes(&shifted, ID) > 8000);
    }

    #[test]
    fn keys_of_different_blocks_differ() {
        let keys: HashSet<Key> = (0..10_000).map(key_of).collect();
        assert_eq!(keys.len(), 10_000);
        assert!(!keys.contains(&[0, 0]));
    }
}
