//! The index, (namespace, key) → chunks: a table of buckets of one cache line each, which grows by one bucket at a
//! time (linear hashing).
//!
//! Growing never moves more than one bucket, and takes memory only as it goes: ten thousand chunks cost the same in
//! an arena of any size. If a bucket has more than seven chunks, the others are chained to it through their own
//! records.

use bytemuck::{Pod, Zeroable};

use super::Key;
use super::chunk::{Chunks, Life};
use super::hash::Hash;
use crate::lazy::{Lazy, NoMemory, prefetch};
use crate::policy::ChunkId;

/// How many chunks fit into a bucket's own line.
const WAYS: usize = 7;
/// How many buckets there are at the start.
const BUCKETS_MIN: u32 = 64;
/// How many chunks a bucket has on average when the table grows.
const LOAD: u64 = 3;
/// The most rounds of one key that form at once.
pub(super) const FORMING_MAX: usize = 4;

/// A bucket, in one cache line. Each way has a tag (hash << 1 | visible) and a link (chunk id + 1; 0: none).
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Bucket {
    /// The last one is always 0, so it never matches a visible chunk.
    tags: [u32; WAYS + 1],
    /// The last one links to the first chunk beyond `WAYS`; it is set only while the bucket is full.
    ids: [u32; WAYS + 1],
}

impl Bucket {
    /// The way that has this link; 0 finds a free way.
    fn way_of(&self, link: u32) -> Option<usize> {
        self.ids[..WAYS].iter().position(|other| *other == link)
    }
}

/// The chunks of one key.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Matches {
    pub(super) visible: Option<ChunkId>,
    forming: [ChunkId; FORMING_MAX],
    forming_len: usize,
}

impl Matches {
    /// The forming chunks, at most `FORMING_MAX`.
    pub(super) fn forming(&self) -> &[ChunkId] {
        &self.forming[..self.forming_len]
    }
}

/// The result of a look at a key's bucket.
#[derive(Clone, Copy, Default)]
pub(super) struct Guess {
    /// The chunk whose tag matches, + 1; 0: none.
    link: u32,
    /// The bucket overflows, so the chunk may be beyond its line.
    more: bool,
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

    /// The visible chunk that the key probably names, by its bucket's own line alone.
    #[inline(always)]
    pub(super) fn guess(&self, hash: Hash) -> Guess {
        let bucket = &self.buckets[self.bucket_of(hash.bits())];
        let tag = hash.bits() << 1 | 1;
        let mut link = 0;
        // There is no branch here: at most one tag matches, unless two chunks collide, which `resolve` notices.
        for (other, id) in bucket.tags.iter().zip(bucket.ids) {
            link |= if *other == tag { id } else { 0 };
        }
        Guess { link, more: bucket.ids[WAYS] != 0 }
    }

    /// Prefetches the record of the guessed chunk.
    #[inline(always)]
    pub(super) fn prefetch_guess(&self, guess: Guess, chunks: &Chunks) {
        if let Some(id) = guess.link.checked_sub(1) {
            chunks.prefetch(id);
        }
    }

    /// The visible chunk of this key. It checks the guess first.
    #[inline(always)]
    pub(super) fn resolve(
        &self,
        guess: Guess,
        chunks: &Chunks,
        hash: Hash,
        namespace: u8,
        key: Key,
    ) -> Option<ChunkId> {
        let id = match guess.link.checked_sub(1) {
            Some(id) if (id as usize) < chunks.fresh as usize => id,
            None if !guess.more => return None,
            _ => return self.matches(chunks, hash, namespace, key).visible,
        };
        let chunk = chunks.get(id);
        if chunk.key == key && chunk.namespace == namespace && chunk.life() == Life::Visible {
            return Some(id);
        }
        self.matches(chunks, hash, namespace, key).visible
    }

    /// All chunks of this key.
    pub(super) fn matches(&self, chunks: &Chunks, hash: Hash, namespace: u8, key: Key) -> Matches {
        let mut matches = Matches::default();
        self.each(chunks, hash.bits(), |id| {
            let chunk = chunks.get(id);
            if chunk.key != key || chunk.namespace != namespace {
                return;
            }
            if chunk.life() == Life::Visible {
                matches.visible = Some(id);
            } else if matches.forming_len < FORMING_MAX {
                matches.forming[matches.forming_len] = id;
                matches.forming_len += 1;
            }
        });
        matches
    }

    /// A visible chunk of this namespace with this hash: that of the key or, rarely, of another key with the same
    /// hash.
    pub(super) fn any_visible(&self, chunks: &Chunks, hash: u32, namespace: u8) -> Option<ChunkId> {
        let mut found = None;
        self.each(chunks, hash, |id| {
            let chunk = chunks.get(id);
            if chunk.life() == Life::Visible && chunk.namespace == namespace {
                found = Some(id);
            }
        });
        found
    }

    fn each(&self, chunks: &Chunks, hash: u32, mut see: impl FnMut(ChunkId)) {
        let bucket = &self.buckets[self.bucket_of(hash)];
        for way in 0..WAYS {
            if let (true, Some(id)) = (bucket.tags[way] >> 1 == hash, bucket.ids[way].checked_sub(1)) {
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

    /// Whether the chunk is in the table, under its own hash and life.
    pub(super) fn holds(&self, chunks: &Chunks, id: ChunkId) -> bool {
        let chunk = chunks.get(id);
        let mut seen = false;
        self.each(chunks, chunk.hash, |other| seen |= other == id);
        let bucket = &self.buckets[self.bucket_of(chunk.hash)];
        let tag = tag(chunks, id);
        seen && (0..WAYS).all(|way| bucket.ids[way] != id + 1 || bucket.tags[way] == tag)
    }

    /// Puts a forming chunk into the table.
    pub(super) fn insert(&mut self, chunks: &mut Chunks, id: ChunkId) {
        self.len += 1;
        let buckets = (1_u64 << self.level) + u64::from(self.split);
        if self.len > buckets * LOAD && buckets < self.buckets.len() as u64 {
            self.grow(chunks);
        }
        self.place(chunks, tag(chunks, id), id);
    }

    fn place(&mut self, chunks: &mut Chunks, tag: u32, id: ChunkId) {
        let bucket = self.bucket_of(tag >> 1);
        let bucket = &mut self.buckets[bucket];
        match bucket.way_of(0) {
            Some(way) => (bucket.tags[way], bucket.ids[way]) = (tag, id + 1),
            None => chunks.get_mut(id).chain = std::mem::replace(&mut bucket.ids[WAYS], id + 1),
        }
    }

    /// Marks the chunk's tag as visible.
    pub(super) fn set_visible(&mut self, chunks: &Chunks, id: ChunkId) {
        let hash = chunks.get(id).hash;
        let bucket = self.bucket_of(hash);
        let bucket = &mut self.buckets[bucket];
        if let Some(way) = bucket.way_of(id + 1) {
            bucket.tags[way] = hash << 1 | 1;
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
        (bucket.tags[way], bucket.ids[way]) = (0, 0);
        // A chunk that did not fit moves into the free way.
        if let Some(over) = bucket.ids[WAYS].checked_sub(1) {
            bucket.ids[WAYS] = chunks.get(over).chain;
            chunks.get_mut(over).chain = 0;
            self.place(chunks, tag(chunks, over), over);
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
        for (link, tag) in old.ids.into_iter().zip(old.tags).take(WAYS) {
            if let Some(id) = link.checked_sub(1) {
                self.place(chunks, tag, id);
            }
        }
        let mut link = old.ids[WAYS];
        while let Some(id) = link.checked_sub(1) {
            link = std::mem::take(&mut chunks.get_mut(id).chain);
            self.place(chunks, tag(chunks, id), id);
        }
    }
}

fn tag(chunks: &Chunks, id: ChunkId) -> u32 {
    let chunk = chunks.get(id);
    chunk.hash << 1 | u32::from(chunk.life() == Life::Visible)
}
