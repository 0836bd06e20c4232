//! Checksums of shards: against stray writes, not against an adversary.
//!
//! A checksum is a sum over positions, so that any number of CPU threads or of a GPU's warps may take any part of it, in any
//! order. The little-endian word `w` at word index `i` of the shard adds
//!
//! ```text
//! (low32(w) + a(i)) × (high32(w) + b(i)) + swap32(w)      a(i) = bend(A·i + A₀), b(i) = bend(B·i + B₀), sums mod 2³²
//! bend(x) = x ^ (x >> 15)
//! ```
//!
//! to a sum mod 2⁶⁴. This is the NH hash of UMAC (Black et al., CRYPTO '99) with keys that depend on the position, plus the word
//! itself, so that a factor of zero does not hide the other half. The keys `a(i)` and `b(i)` are bent because with keys linear
//! in `i` four pages A B B A could have the sum of B A A B. A word costs two 32-bit additions and one 32 × 32 multiplication:
//! one vector instruction each on AVX2, one `IMAD` on a GPU. Bytes that do not fill a word *of their page* (in pages whose
//! length is not a multiple of 8) add `(byte + 1) × odd(position)`. [`finish`] adds the length.

const A: u32 = 0x9e37_79b1;
const A0: u32 = 0x85eb_ca6b;
const B: u32 = 0xc2b2_ae35;
const B0: u32 = 0x27d4_eb2f;

/// Stands for "no checksum was computed". No shard has it for its checksum.
pub const NONE: u64 = 0;

#[inline]
fn bend(x: u32) -> u32 {
    x ^ (x >> 15)
}

/// The keys of the word at this index before they are bent: `a` in the low half, `b` in the high one.
pub(crate) fn keys(index: u64) -> u64 {
    let i = index as u32;
    u64::from(i.wrapping_mul(A).wrapping_add(A0)) | (u64::from(i.wrapping_mul(B).wrapping_add(B0)) << 32)
}

/// What both halves of [`keys`] grow by over so many words.
#[cfg(target_arch = "x86_64")]
pub(crate) fn stride(words: u32) -> u64 {
    u64::from(words.wrapping_mul(A)) | (u64::from(words.wrapping_mul(B)) << 32)
}

/// The contribution of the word at index `index`.
#[inline]
fn word(index: u64, value: u64) -> u64 {
    let key = keys(index);
    let low = (value as u32).wrapping_add(bend(key as u32));
    let high = ((value >> 32) as u32).wrapping_add(bend((key >> 32) as u32));
    (u64::from(low) * u64::from(high)).wrapping_add(value.rotate_left(32))
}

/// The contribution of a byte that belongs to no whole word of its page.
#[inline]
fn single(position: u64, value: u8) -> u64 {
    let odd =
        position.wrapping_mul(0xff51_afd7_ed55_8ccd).rotate_left(31).wrapping_mul(0xc4ce_b9fe_1a85_ec53) | 1;
    (u64::from(value) + 1).wrapping_mul(odd)
}

/// The sum over `bytes`, which begin at byte `position` of the shard and lie inside one page. Parts of one page may be
/// summed apart if they are cut at positions that are multiples of 8. This is the plain way, word by word; copies sum vectors
/// ([`crate::copy`]).
#[must_use]
pub fn part(bytes: &[u8], position: u64) -> u64 {
    let head = ((8 - position % 8) % 8).min(bytes.len() as u64) as usize;
    let (head, rest) = bytes.split_at(head);
    let words = rest.len() / 8;
    let (body, tail) = rest.split_at(words * 8);
    let first = (position + head.len() as u64) / 8;
    let mut sum = 0u64;
    for (index, bytes) in (first..).zip(body.chunks_exact(8)) {
        let mut value = [0; 8];
        value.copy_from_slice(bytes);
        sum = sum.wrapping_add(word(index, u64::from_le_bytes(value)));
    }
    for (at, byte) in (position..).zip(head) {
        sum = sum.wrapping_add(single(at, *byte));
    }
    for (at, byte) in ((first + words as u64) * 8..).zip(tail) {
        sum = sum.wrapping_add(single(at, *byte));
    }
    sum
}

/// A shard's checksum from the sum of its parts; never [`NONE`].
#[must_use]
pub fn finish(sum: u64, bytes: u64) -> u64 {
    let mut hash = sum ^ bytes.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^= hash >> 33;
    if hash == NONE { 1 } else { hash }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn whole(bytes: &[u8]) -> u64 {
        finish(part(bytes, 0), bytes.len() as u64)
    }

    fn sample(bytes: usize) -> Vec<u8> {
        (0..bytes as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u8).collect()
    }

    proptest! {
        /// Cut at multiples of 8, in any order, the sum is the same.
        #[test]
        fn parts_in_any_order_sum_up(bytes in prop::collection::vec(any::<u8>(), 1..3000), start in 0u64..64, cuts in prop::collection::vec(0usize..3000, 0..6)) {
            let mut at: Vec<usize> = cuts.iter()
                .map(|cut| ((start as usize + cut).next_multiple_of(8)).saturating_sub(start as usize).min(bytes.len()))
                .collect();
            at.extend([0, bytes.len()]);
            at.sort_unstable();
            let sum = at.windows(2).rev().fold(0u64, |sum, w| {
                sum.wrapping_add(part(&bytes[w[0]..w[1]], start + w[0] as u64))
            });
            prop_assert_eq!(sum, part(&bytes, start));
        }

        #[test]
        fn any_flipped_bit_shows(at in 0usize..5003, bit in 0u32..8) {
            let mut bytes = sample(5003);
            let before = whole(&bytes);
            bytes[at] ^= 1 << bit;
            prop_assert_ne!(whole(&bytes), before);
        }
    }

    #[test]
    fn mirrored_patterns_show() {
        for words in [1, 8, 512, 4096] {
            for (a, b) in [(1u64, 2u64), (0, 1), (0x3c00_3c00_3c00_3c00, 0x3c01_3c00_3c00_3c00)] {
                let (a, b) = (a.to_le_bytes().repeat(words), b.to_le_bytes().repeat(words));
                let (abba, baab) = ([&a[..], &b, &b, &a].concat(), [&b[..], &a, &a, &b].concat());
                assert_ne!(whole(&abba), whole(&baab), "runs of {words} words");
            }
        }
    }

    #[test]
    fn swapped_shifted_zeroed_and_cut_shards_show() {
        let bytes = sample(1 << 16);
        let before = whole(&bytes);
        for (a, b) in [(0, 8), (0, 32), (64, 4096), (8, 65528)] {
            let mut other = bytes.clone();
            for k in 0..8 {
                other.swap(a + k, b + k);
            }
            assert_ne!(whole(&other), before, "words {a} and {b} swapped");
        }
        let mut pages = bytes.clone();
        let (first, second) = pages.split_at_mut(4096);
        first.swap_with_slice(&mut second[..4096]);
        assert_ne!(whole(&pages), before, "pages swapped");
        let mut zeroed = bytes.clone();
        zeroed[8192..12288].fill(0);
        assert_ne!(whole(&zeroed), before);
        let mut shifted = bytes.clone();
        shifted.rotate_left(8);
        assert_ne!(whole(&shifted), before);
        assert_ne!(whole(&bytes[..bytes.len() - 8]), before);
        assert_ne!(whole(&[0; 8]), whole(&[0; 16]), "the length counts");
    }
}
