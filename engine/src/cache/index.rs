//! The index of forming chunks, (namespace, key) → chunks: a table of buckets of one cache line each, which grows by
//! one bucket at a time (linear hashing). Visible chunks are found by the published directory instead.
//!
//! Growing never moves more than one bucket, and takes memory only as it goes. If a bucket has more than seven
//! chunks, the others are chained to it through their own records.

use bytemuck::{Pod, Zeroable};

use super::Key;
use super::chunk::Chunks;
use super::hash::Hash;
use crate::lazy::{Lazy, NoMemory};
use crate::policy::ChunkId;
use kvring_shm_abi::mapping::prefetch;

/// How many chunks fit into a bucket's own line.
const WAYS: usize = 7;
/// How many buckets there are at the start.
const BUCKETS_MIN: u32 = 64;
/// How many chunks a bucket has on average when the table grows.
const LOAD: u64 = 3;
/// The most rounds of one key that form at once.
pub(super) const FORMING_MAX: usize = 4;

/// A bucket, in one cache line. Each way has the chunk's hash and a link (chunk id + 1; 0: none).
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Bucket {
    hashes: [u32; WAYS],
    _pad: u32,
    /// The last one links to the first chunk beyond `WAYS`; it is set only while the bucket is full.
    ids: [u32; WAYS + 1],
}

impl Bucket {
    /// The way that has this link; 0 finds a free way.
    fn way_of(&self, link: u32) -> Option<usize> {
        self.ids[..WAYS].iter().position(|other| *other == link)
    }
}

/// The forming chunks of one key, at most `FORMING_MAX`.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Forming {
    chunks: [ChunkId; FORMING_MAX],
    len: usize,
}

impl core::ops::Deref for Forming {
    type Target = [ChunkId];

    fn deref(&self) -> &[ChunkId] {
        &self.chunks[..self.len]
    }
}

/// The table.
pub(super) struct Index {
    buckets: Lazy<Bucket>,
    /// 2^level buckets, of which the first `split` have been split in two.
    level: u32,
    split: u32,
    pub(super) len: u64,
}

impl Index {
    /// Takes address space for this many chunks, and touches none of it.
    pub(super) fn new(chunks: u32) -> Result<Self, NoMemory> {
        let buckets =
            (u64::from(chunks) / LOAD + 1).next_power_of_two().clamp(u64::from(BUCKETS_MIN), 1 << 30);
        Ok(Self {
            buckets: Lazy::new_dense(buckets as usize)?,
            level: BUCKETS_MIN.trailing_zeros(),
            split: 0,
            len: 0,
        })
    }

    #[inline(always)]
    fn bucket_of(&self, hash: u32) -> usize {
        let low = hash & ((1 << self.level) - 1);
        let bucket = if low < self.split { hash & ((2 << self.level) - 1) } else { low };
        bucket as usize
    }

    #[inline(always)]
    pub(super) fn prefetch(&self, hash: Hash) {
        prefetch(&self.buckets, self.bucket_of(hash.bits()));
    }

    /// The forming chunks of this key.
    pub(super) fn forming(&self, chunks: &Chunks, hash: Hash, namespace: u8, key: Key) -> Forming {
        let mut forming = Forming::default();
        self.each(chunks, hash.bits(), |id| {
            let chunk = chunks.get(id);
            if chunk.key == key && chunk.namespace == namespace && forming.len < FORMING_MAX {
                forming.chunks[forming.len] = id;
                forming.len += 1;
            }
        });
        forming
    }

    fn each(&self, chunks: &Chunks, hash: u32, mut see: impl FnMut(ChunkId)) {
        let bucket = &self.buckets[self.bucket_of(hash)];
        for way in 0..WAYS {
            if let (true, Some(id)) = (bucket.hashes[way] == hash, bucket.ids[way].checked_sub(1)) {
                see(id);
            }
        }
        let mut link = bucket.ids[WAYS];
        while let Some(id) = link.checked_sub(1) {
            let chunk = chunks.get(id);
            if chunk.hash == hash {
                see(id);
            }
            link = chunk.chain;
        }
    }

    /// Whether the chunk is in the table, under its own hash.
    pub(super) fn holds(&self, chunks: &Chunks, id: ChunkId) -> bool {
        let mut seen = false;
        self.each(chunks, chunks.get(id).hash, |other| seen |= other == id);
        seen
    }

    /// Puts a forming chunk into the table.
    pub(super) fn insert(&mut self, chunks: &mut Chunks, id: ChunkId) {
        self.len += 1;
        let buckets = (1_u64 << self.level) + u64::from(self.split);
        if self.len > buckets * LOAD && buckets < self.buckets.len() as u64 {
            self.grow(chunks);
        }
        self.place(chunks, id);
    }

    fn place(&mut self, chunks: &mut Chunks, id: ChunkId) {
        let hash = chunks.get(id).hash;
        let bucket = self.bucket_of(hash);
        let bucket = &mut self.buckets[bucket];
        match bucket.way_of(0) {
            Some(way) => (bucket.hashes[way], bucket.ids[way]) = (hash, id + 1),
            None => chunks.get_mut(id).chain = std::mem::replace(&mut bucket.ids[WAYS], id + 1),
        }
    }

    /// Takes a chunk out of the index.
    pub(super) fn remove(&mut self, chunks: &mut Chunks, id: ChunkId) {
        let at = self.bucket_of(chunks.get(id).hash);
        self.len -= 1;
        let Some(way) = self.buckets[at].way_of(id + 1) else {
            self.remove_over(chunks, at, id);
            return;
        };
        let bucket = &mut self.buckets[at];
        (bucket.hashes[way], bucket.ids[way]) = (0, 0);
        // A chunk that did not fit moves into the free way.
        if let Some(over) = bucket.ids[WAYS].checked_sub(1) {
            bucket.ids[WAYS] = chunks.get(over).chain;
            chunks.get_mut(over).chain = 0;
            self.place(chunks, over);
        }
    }

    fn remove_over(&mut self, chunks: &mut Chunks, at: usize, id: ChunkId) {
        let next = std::mem::take(&mut chunks.get_mut(id).chain);
        let mut link = self.buckets[at].ids[WAYS];
        if link == id + 1 {
            self.buckets[at].ids[WAYS] = next;
            return;
        }
        while let Some(before) = link.checked_sub(1) {
            link = chunks.get(before).chain;
            if link == id + 1 {
                chunks.get_mut(before).chain = next;
                return;
            }
        }
        debug_assert!(false, "chunk {id} is not in the index");
    }

    /// Splits one bucket into two.
    fn grow(&mut self, chunks: &mut Chunks) {
        let at = self.split as usize;
        let old = std::mem::replace(&mut self.buckets[at], Bucket::zeroed());
        self.split += 1;
        if self.split == 1 << self.level {
            (self.level, self.split) = (self.level + 1, 0);
        }
        for link in old.ids.into_iter().take(WAYS) {
            if let Some(id) = link.checked_sub(1) {
                self.place(chunks, id);
            }
        }
        let mut link = old.ids[WAYS];
        while let Some(id) = link.checked_sub(1) {
            link = std::mem::take(&mut chunks.get_mut(id).chain);
            self.place(chunks, id);
        }
    }
}
