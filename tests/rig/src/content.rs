//! What a page of KV holds: a function of the page's place, so that every byte that was loaded can be told right or wrong.
//!
//! Word `i` of a page is an invertible mix of `seed + i × γ`: a counter. All words of a page differ, and pages of
//! different chunks, ranks, blocks or planes share no run of words. So a byte that comes from another place, another
//! time or nowhere is noticed. The loops have no branch and no multiplication: they run at the speed of memory.

use crate::random::{GAMMA, mix};
use kvring_adapter::Key;

/// Words that the loops handle at once. A page has a multiple of so many words.
pub const LANES: usize = 8;

/// What one computation of one rank's part of a chunk gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Content {
    /// The chunk's key.
    pub key: Key,
    /// The rank.
    pub rank: u32,
    /// Which computation: the bytes of two versions differ.
    pub version: u64,
}

/// A page of a chunk: what the chunk holds, which block of the chunk, which plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageId {
    /// What the chunk holds.
    pub content: Content,
    /// The block's place in the chunk.
    pub block: u32,
    /// The plane.
    pub plane: u32,
}

/// The key of a trace's block. The ids of a trace cover the prefix, so the keys do.
#[must_use]
pub fn key_of(block_id: u64) -> Key {
    [mix(block_id.wrapping_add(GAMMA)), mix(block_id ^ 0x6b76_7269_6e67_6b65)]
}

impl PageId {
    fn seed(&self) -> u64 {
        let Content { key, rank, version } = self.content;
        let place = u64::from(rank) << 48 ^ u64::from(self.block) << 24 ^ u64::from(self.plane);
        mix(mix(mix(mix(key[0]) ^ key[1]) ^ version) ^ place)
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

/// Writes the page's content.
pub fn fill(page: &mut [u64], id: PageId) {
    write(page, id, 0);
}

/// Writes what the page's content differs from in every bit: of a copy that does not write all of the page, each byte that it
/// leaves out is wrong.
pub fn spoil(page: &mut [u64], id: PageId) {
    write(page, id, u64::MAX);
}

#[inline(always)]
fn write(page: &mut [u64], id: PageId, flipped: u64) {
    let mut counters = counters(id.seed());
    let (groups, rest) = page.as_chunks_mut::<LANES>();
    debug_assert!(rest.is_empty());
    for group in groups {
        for (word, counter) in group.iter_mut().zip(&mut counters) {
            *word = scramble(*counter) ^ flipped;
            *counter = counter.wrapping_add(GAMMA.wrapping_mul(LANES as u64));
        }
    }
}

/// The number of bytes of the page that are not the page's content.
#[must_use]
pub fn wrong_bytes(page: &[u64], id: PageId) -> u64 {
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
    if differences == [0; LANES] { 0 } else { count_wrong_bytes(page, id) }
}

/// All words of the page, and what each should be.
fn words(page: &[u64], id: PageId) -> impl Iterator<Item = (u64, u64)> {
    let seed = id.seed();
    page.iter().zip(0u64..).map(move |(word, index)| {
        let expected = scramble(seed.wrapping_add(GAMMA.wrapping_mul(index)));
        (*word, expected)
    })
}

/// The slow way, for pages that are known to be wrong.
#[cold]
fn count_wrong_bytes(page: &[u64], id: PageId) -> u64 {
    let wrong = words(page, id).map(|(found, expected)| {
        let difference = (found ^ expected).to_ne_bytes();
        difference.iter().filter(|byte| **byte != 0).count() as u64
    });
    wrong.sum()
}

/// The first wrong word, for a message: its index, what was expected, and what is there.
#[must_use]
pub fn first_wrong(page: &[u64], id: PageId) -> Option<(usize, u64, u64)> {
    let mut words = words(page, id).enumerate();
    words.find_map(|(index, (found, expected))| (found != expected).then_some((index, expected, found)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    const CONTENT: Content = Content { key: [1, 2], rank: 3, version: 0 };
    const ID: PageId = PageId { content: CONTENT, block: 4, plane: 5 };

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
        spoil(&mut page, ID);
        assert_eq!(wrong_bytes(&page, ID), 4096);
        // A page that nobody has written: (almost) every byte is wrong.
        assert!(wrong_bytes(&[0; 512], ID) > 4000);
    }

    #[test]
    fn every_word_differs_and_so_does_every_page() {
        let others = [
            PageId { content: Content { key: [2, 1], ..CONTENT }, ..ID },
            PageId { content: Content { key: [1, 3], ..CONTENT }, ..ID },
            PageId { content: Content { rank: 2, ..CONTENT }, ..ID },
            PageId { content: Content { version: 1, ..CONTENT }, ..ID },
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
