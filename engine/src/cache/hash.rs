//! The hash by which the index knows a chunk's content. Keys come from clients, so a secret seed is mixed into it.

use super::Key;

/// How many bits of the hash the index uses: with one bit more they are a tag.
const HASH_BITS: u32 = 31;

/// A keyed hash of (namespace, key).
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(super) struct Hash(u64);

impl Hash {
    /// Made of folded multiplications, as in wyhash.
    #[inline(always)]
    pub(super) fn new(seed: [u64; 2], namespace: u8, key: Key) -> Self {
        let mix = |a: u64, b: u64| {
            let product = u128::from(a) * u128::from(b);
            product as u64 ^ (product >> 64) as u64
        };
        let namespace = u64::from(namespace).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let first = mix(key[0] ^ seed[0], key[1] ^ seed[1] ^ namespace);
        Self(mix(first ^ seed[1], 0xa076_1d64_78bd_642f))
    }

    /// The `HASH_BITS` bits that the index uses.
    #[inline(always)]
    pub(super) fn bits(self) -> u32 {
        (self.0 >> (64 - HASH_BITS)) as u32
    }
}
