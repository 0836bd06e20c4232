//! The directory: from a key to the chunks that probably have it.
//!
//! Each key has two buckets of eight hints. A hint names a chunk and proves nothing: whoever follows it compares the key in
//! the chunk's record. So a hint that is out of date costs a look and does no harm. The engine removes the hints of chunks that
//! end, and overwrites those that an earlier engine, which died too soon, has left. No search looks at more than sixteen hints;
//! nothing grows, and no hint is ever moved.
//!
//! The directory has at least two places for each chunk. Then it practically never happens that a key finds both buckets full
//! ([`Directory::insert`]), unless somebody chooses keys to that end; such keys are then not found, and nothing else suffers.

use crate::abi;
use crate::mapping::{Shared, View, prefetch};
use crate::sync::{AtomicU64, Ordering};

abi! {
    /// How many hints a bucket has: one cache line.
    const WAYS: usize = 8;

    /// Bits of a hint that are the chunk's id, from the lowest one on. The other bits are a tag, which is never 0.
    pub const CHUNK_ID_BITS: u32 = 24;

    /// How many chunks a bucket stands for.
    const CHUNKS_PER_BUCKET: usize = 4;

    /// A bucket of the directory. A hint of 0 is none.
    #[repr(C, align(64))]
    pub struct Bucket {
        hints: [AtomicU64; WAYS],
    }

    /// The hash of an example: another way to compute it changes the layout hash.
    const SPOT_EXAMPLE: u64 = Spot::new([1, 2], 3, [4, 5]).0;
    /// The buckets, of a thousand, and the tag of that hash.
    const BUCKETS_EXAMPLE: u64 = Spot(SPOT_EXAMPLE).buckets(1000)[0] as u64 * 1000 + Spot(SPOT_EXAMPLE).buckets(1000)[1] as u64;
    const TAG_EXAMPLE: u64 = Spot(SPOT_EXAMPLE).tag();
}

/// How many chunk ids there can be.
pub const CHUNK_IDS: u32 = 1 << CHUNK_ID_BITS;

// SAFETY: atomics only.
unsafe impl Shared for Bucket {}
#[cfg(not(loom))]
const _: () = assert!(size_of::<Bucket>() == 64);

#[cfg(loom)]
impl Bucket {
    /// An empty bucket in private memory, for models.
    #[must_use]
    #[allow(clippy::new_without_default, reason = "made in models alone")]
    pub fn new() -> Bucket {
        Bucket { hints: core::array::from_fn(|_| AtomicU64::new(0)) }
    }
}

/// Where the directory has the hints of one key of one namespace: a hash of the key and of the namespace's index.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spot(u64);

/// A product of which the high half is folded into the low one, as in wyhash.
const fn fold(a: u64, b: u64) -> u64 {
    let product = a as u128 * b as u128;
    product as u64 ^ (product >> 64) as u64
}

impl Spot {
    /// The hash of a key of the namespace at this index.
    #[inline(always)]
    #[must_use]
    pub const fn new(seed: [u64; 2], namespace: u8, key: [u64; 2]) -> Spot {
        let namespace = (namespace as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let first = fold(key[0] ^ seed[0], key[1] ^ seed[1] ^ namespace);
        Spot(fold(first ^ seed[1], 0xa076_1d64_78bd_642f))
    }

    /// The hash itself. It also names the chunk's content where a number has to do for that.
    #[must_use]
    pub fn hash(self) -> u64 {
        self.0
    }

    /// The spot with this hash.
    #[must_use]
    pub fn of_hash(hash: u64) -> Spot {
        Spot(hash)
    }

    /// The two buckets, of `count`. They are different if there are two.
    #[inline(always)]
    const fn buckets(self, count: usize) -> [usize; 2] {
        let count = count as u64;
        let first = ((self.0 & 0xffff_ffff) * count) >> 32;
        let second = ((self.0 >> 32) * count) >> 32;
        let second = if second == first { (first + 1) % count } else { second };
        [first as usize, second as usize]
    }

    /// The tag: never 0, so a hint never is.
    #[inline(always)]
    const fn tag(self) -> u64 {
        (self.0.wrapping_mul(0xd6e8_feb8_6659_fd93) >> CHUNK_ID_BITS) | 1
    }

    #[inline(always)]
    const fn hint(self, chunk: u32) -> u64 {
        (self.tag() << CHUNK_ID_BITS) | chunk as u64
    }
}

/// The directory of an engine's chunks. The engine writes it; whoever maps its segment may read it.
#[derive(Clone)]
pub struct Directory {
    buckets: View<Bucket>,
    seed: [u64; 2],
}

impl Directory {
    /// How many buckets a directory for this many chunks has.
    #[must_use]
    pub const fn buckets_for(chunks: u32) -> usize {
        (chunks as usize).div_ceil(CHUNKS_PER_BUCKET) + 1
    }

    /// The directory in these buckets, of which there are at least two. The seed belongs to the segment: it is the same for all
    /// engines that take it over.
    #[must_use]
    pub fn new(buckets: View<Bucket>, seed: [u64; 2]) -> Directory {
        debug_assert!(buckets.len() >= 2);
        Directory { buckets, seed }
    }

    /// Where the hints of this key are, in the namespace at this index.
    #[inline(always)]
    #[must_use]
    pub fn spot(&self, namespace: u8, key: [u64; 2]) -> Spot {
        Spot::new(self.seed, namespace, key)
    }

    /// Asks the processor for the two buckets.
    #[inline(always)]
    pub fn prefetch(&self, spot: Spot) {
        for bucket in spot.buckets(self.buckets.len()) {
            prefetch(&self.buckets, bucket);
        }
    }

    /// The chunks that the hints name, at most sixteen; usually the one that has the key, if there is one.
    #[inline(always)]
    pub fn hints(&self, spot: Spot) -> impl Iterator<Item = u32> {
        let tag = spot.tag();
        let places = spot.buckets(self.buckets.len()).map(|bucket| &self.buckets[bucket].hints);
        // Relaxed: a hint proves nothing. All sixteen at once, because usually at most one of them has the tag.
        let hints: [u64; 2 * WAYS] =
            core::array::from_fn(|at| places[at / WAYS][at % WAYS].load(Ordering::Relaxed));
        let mut matching = 0_u32;
        for (at, hint) in hints.iter().enumerate() {
            matching |= u32::from(hint >> CHUNK_ID_BITS == tag) << at;
        }
        core::iter::from_fn(move || {
            let at = (matching != 0).then(|| matching.trailing_zeros() as usize)?;
            matching &= matching - 1;
            Some(chunk_of(hints[at]))
        })
    }

    /// Engine: enters a hint, in the emptier bucket. If both are full, it takes the place of a stale hint: `spot_of` tells the
    /// spot of a visible chunk, and a hint that is not there any more, or never was, is stale. False: none is.
    #[must_use]
    pub fn insert(&self, spot: Spot, chunk: u32, mut spot_of: impl FnMut(u32) -> Option<Spot>) -> bool {
        let buckets = spot.buckets(self.buckets.len()).map(|bucket| &self.buckets[bucket].hints);
        let read = |hint: &AtomicU64| hint.load(Ordering::Relaxed);
        let free = buckets.map(|hints| hints.iter().filter(|hint| read(hint) == 0).count());
        let emptier = buckets[usize::from(free[1] > free[0])];
        let mut is_stale =
            |hint: u64| spot_of(chunk_of(hint)).is_none_or(|own| own.hint(chunk_of(hint)) != hint);
        let mut all = buckets.into_iter().flatten();
        let place =
            emptier.iter().find(|hint| read(hint) == 0).or_else(|| all.find(|hint| is_stale(read(hint))));
        // Relaxed: the chunk's record becomes visible by a later Release store.
        place.map(|place| place.store(spot.hint(chunk), Ordering::Relaxed)).is_some()
    }

    /// Engine: removes a chunk's hint.
    pub fn remove(&self, spot: Spot, chunk: u32) {
        let hint = spot.hint(chunk);
        for bucket in spot.buckets(self.buckets.len()) {
            for place in &self.buckets[bucket].hints {
                if place.load(Ordering::Relaxed) == hint {
                    place.store(0, Ordering::Relaxed);
                    return;
                }
            }
        }
    }
}

fn chunk_of(hint: u64) -> u32 {
    hint as u32 & (CHUNK_IDS - 1)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::mapping::Mapping;
    use std::sync::Arc;

    const SEED: [u64; 2] = [0x1234_5678_9abc_def0, 0x0fed_cba9_8765_4321];

    #[allow(clippy::unwrap_used, reason = "a test's helper")]
    fn directory(chunks: u32) -> Directory {
        let count = Directory::buckets_for(chunks);
        let mapping = Arc::new(Mapping::private(count * size_of::<Bucket>()));
        Directory::new(View::new(&mapping, 0, count).unwrap(), SEED)
    }

    fn names(directory: &Directory, spot: Spot, chunk: u32) -> bool {
        directory.hints(spot).any(|hint| hint == chunk)
    }

    #[test]
    fn as_many_chunks_as_it_is_made_for_find_a_place_again_and_again() {
        let chunks = 1 << 16;
        let directory = directory(chunks);
        let spot = |generation: u64, chunk: u32| directory.spot(7, [u64::from(chunk), generation]);
        for generation in 0..4 {
            for chunk in 0..chunks {
                let spot = spot(generation, chunk);
                assert!(directory.insert(spot, chunk, |_| unreachable!()), "chunk {chunk} finds no place");
                assert!(names(&directory, spot, chunk));
            }
            assert!((0..chunks).all(|chunk| names(&directory, spot(generation, chunk), chunk)));
            for chunk in 0..chunks {
                directory.remove(spot(generation, chunk), chunk);
                assert!(!names(&directory, spot(generation, chunk), chunk));
            }
        }
        assert!(
            directory
                .buckets
                .iter()
                .flat_map(|bucket| &bucket.hints)
                .all(|hint| hint.load(Ordering::Relaxed) == 0)
        );
    }

    #[test]
    fn where_both_buckets_are_full_only_a_stale_hint_gives_way() {
        let directory = directory(4);
        assert_eq!(directory.buckets.len(), 2, "every key has both buckets");
        let spot = |chunk: u32| directory.spot(0, [u64::from(chunk), 0]);
        assert!((0..16).all(|chunk| directory.insert(spot(chunk), chunk, |_| unreachable!())));
        let mut asked = Vec::new();
        assert!(!directory.insert(spot(16), 16, |chunk| {
            asked.push(chunk);
            Some(spot(chunk))
        }));
        asked.sort_unstable();
        assert_eq!(asked, (0..16).collect::<Vec<_>>(), "every hint was asked about");
        // Chunk 5 has ended; chunk 9 has another key by now.
        for (new, stale, now) in [(16, 5, None), (17, 9, Some(spot(99)))] {
            assert!(directory.insert(spot(new), new, |chunk| if chunk == stale {
                now
            } else {
                Some(spot(chunk))
            }));
            assert!(names(&directory, spot(new), new) && !names(&directory, spot(stale), stale));
        }
        let left = (0..18).filter(|chunk| ![5, 9].contains(chunk));
        assert!(left.into_iter().all(|chunk| names(&directory, spot(chunk), chunk)));
    }

    #[test]
    fn a_hint_is_of_its_namespace_and_key() {
        let directory = directory(1000);
        let spot = directory.spot(1, [2, 3]);
        assert!(directory.insert(spot, CHUNK_IDS - 1, |_| unreachable!()));
        assert!(names(&directory, spot, CHUNK_IDS - 1));
        for other in [directory.spot(2, [2, 3]), directory.spot(1, [3, 3]), directory.spot(1, [2, 2])] {
            assert_ne!(other, spot);
            assert_eq!(directory.hints(other).count(), 0);
        }
    }
}
