//! Leases: (client, session, admission) → the chunks pinned for it, in the order of their chain.

use bytemuck::{Pod, Zeroable};

use super::{OWNERS, Owner};
use crate::lazy::{Lazy, NoMemory};
use crate::policy::ChunkId;

/// Chunks in a block.
const BLOCK: usize = 15;
/// Leases of one session: an honest one has one or two admissions at a time, and ending a session is bounded.
pub(super) const ADMISSIONS_MAX: usize = 16;

/// A lease's number; reused after its end.
pub(super) type LeaseId = u32;

/// One lease. Links are lease id + 1.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Lease {
    pub(super) session: u64,
    pub(super) admission: u32,
    /// Chunks; 0: the record is free.
    pub(super) len: u32,
    /// The first block, + 1.
    blocks: u32,
    /// The next lease of the same hash bucket, or the next free record.
    chain: u32,
    /// The neighbours in the client's list.
    prev: u32,
    next: u32,
    pub(super) owner: Owner,
    pub(super) namespace: u8,
    _pad: [u8; 6],
}

/// A piece of a lease's list of chunks.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Block {
    chunks: [ChunkId; BLOCK],
    /// The next block, + 1.
    next: u32,
}

/// All leases.
pub(super) struct Leases {
    leases: Lazy<Lease>,
    free: u32,
    fresh: u32,
    blocks: Lazy<Block>,
    blocks_free: u32,
    blocks_fresh: u32,
    blocks_used: u32,
    /// Heads of hash chains by (client, session).
    buckets: Lazy<u32>,
    seed: u64,
    /// Heads of the clients' lists.
    owners: [u32; OWNERS],
    pub(super) len: u32,
    /// Chunks in all leases.
    pub(super) pins: u64,
    pins_max: u64,
}

impl Leases {
    pub(super) fn new(leases_max: u32, pins_max: u32, seed: u64) -> Result<Self, NoMemory> {
        // Each lease may leave its last block unfilled.
        let blocks = (pins_max as usize).div_ceil(BLOCK) + leases_max as usize;
        Ok(Self {
            leases: Lazy::new(leases_max as usize)?,
            free: 0,
            fresh: 0,
            blocks: Lazy::new(blocks)?,
            blocks_free: 0,
            blocks_fresh: 0,
            blocks_used: 0,
            buckets: Lazy::new((leases_max as usize).next_power_of_two())?,
            seed,
            owners: [0; OWNERS],
            len: 0,
            pins: 0,
            pins_max: u64::from(pins_max),
        })
    }

    fn bucket(&self, owner: Owner, session: u64) -> usize {
        let product = u128::from(session ^ self.seed) * u128::from(self.seed.rotate_left(23) | 1);
        let folded = (product as u64 ^ (product >> 64) as u64).wrapping_add(u64::from(owner));
        (folded.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize & (self.buckets.len() - 1)
    }

    pub(super) fn get(&self, id: LeaseId) -> &Lease {
        &self.leases[id as usize]
    }

    /// The lease of an admission, if any, and how many the session has.
    pub(super) fn find(&self, owner: Owner, session: u64, admission: u32) -> (Option<LeaseId>, usize) {
        let (mut found, mut admissions) = (None, 0);
        let mut link = self.buckets[self.bucket(owner, session)];
        while let Some(id) = link.checked_sub(1) {
            let lease = self.get(id);
            if lease.owner == owner && lease.session == session {
                admissions += 1;
                if lease.admission == admission {
                    found = Some(id);
                }
            }
            link = lease.chain;
        }
        (found, admissions)
    }

    /// Any lease of a session.
    pub(super) fn any_of(&self, owner: Owner, session: u64) -> Option<LeaseId> {
        let mut link = self.buckets[self.bucket(owner, session)];
        while let Some(id) = link.checked_sub(1) {
            let lease = self.get(id);
            if lease.owner == owner && lease.session == session {
                return Some(id);
            }
            link = lease.chain;
        }
        None
    }

    /// Any lease of a client.
    pub(super) fn first_of(&self, owner: Owner) -> Option<LeaseId> {
        self.owners[owner as usize].checked_sub(1)
    }

    /// How many chunks one more lease could pin, where `instead` ends first.
    pub(super) fn room(&self, instead: Option<LeaseId>, admissions: usize) -> u64 {
        let ending = instead.map_or(0, |id| u64::from(self.get(id).len));
        let has_record = self.len < self.leases.len() as u32 && admissions < ADMISSIONS_MAX;
        if instead.is_some() || has_record { self.pins_max - self.pins + ending } else { 0 }
    }

    /// Makes a lease of at least one chunk; the caller has asked `room` and ended the one it stands for.
    pub(super) fn create(
        &mut self,
        owner: Owner,
        session: u64,
        admission: u32,
        namespace: u8,
        chunks: &[ChunkId],
    ) {
        let id = match self.free.checked_sub(1) {
            Some(id) => {
                self.free = self.get(id).chain;
                id
            }
            None => {
                self.fresh += 1;
                self.fresh - 1
            }
        };
        let bucket = self.bucket(owner, session);
        let chain = std::mem::replace(&mut self.buckets[bucket], id + 1);
        let next = std::mem::replace(&mut self.owners[owner as usize], id + 1);
        if let Some(next) = next.checked_sub(1) {
            self.leases[next as usize].prev = id + 1;
        }
        let mut blocks = 0;
        for part in chunks.chunks(BLOCK).rev() {
            let block = self.take_block();
            self.blocks[block as usize].chunks[..part.len()].copy_from_slice(part);
            self.blocks[block as usize].next = blocks;
            blocks = block + 1;
        }
        let len = chunks.len() as u32;
        self.leases[id as usize] =
            Lease { session, admission, len, blocks, chain, prev: 0, next, owner, namespace, _pad: [0; 6] };
        self.len += 1;
        self.pins += u64::from(len);
    }

    fn take_block(&mut self) -> u32 {
        self.blocks_used += 1;
        match self.blocks_free.checked_sub(1) {
            Some(block) => {
                self.blocks_free = self.blocks[block as usize].next;
                block
            }
            None => {
                self.blocks_fresh += 1;
                self.blocks_fresh - 1
            }
        }
    }

    /// The chunks of a lease, head first.
    pub(super) fn chunks(&self, id: LeaseId) -> impl Iterator<Item = ChunkId> {
        let lease = self.get(id);
        let mut link = lease.blocks;
        (0..lease.len as usize).map(move |i| {
            if i > 0 && i.is_multiple_of(BLOCK) {
                link = self.blocks[link as usize - 1].next;
            }
            self.blocks[link as usize - 1].chunks[i % BLOCK]
        })
    }

    /// Takes the chunks beyond the first `keep` off a lease; keeping none ends it.
    pub(super) fn truncate(&mut self, id: LeaseId, keep: u32, mut dropped: impl FnMut(ChunkId)) {
        let Lease { len, blocks, .. } = *self.get(id);
        if keep >= len {
            return;
        }
        let (mut link, mut before, mut at) = (blocks, 0, 0);
        while let Some(block) = link.checked_sub(1) {
            let Block { chunks, next } = self.blocks[block as usize];
            for (i, chunk) in (at..len.min(at + BLOCK as u32)).zip(chunks) {
                if i >= keep {
                    dropped(chunk);
                }
            }
            if at >= keep {
                self.blocks[block as usize].next = std::mem::replace(&mut self.blocks_free, block + 1);
                self.blocks_used -= 1;
            } else {
                before = link;
            }
            (link, at) = (next, at + BLOCK as u32);
        }
        self.pins -= u64::from(len - keep);
        self.leases[id as usize].len = keep;
        match before.checked_sub(1) {
            Some(last) => self.blocks[last as usize].next = 0,
            None => self.end(id),
        }
    }

    /// Frees the record of a lease whose chunks are gone.
    fn end(&mut self, id: LeaseId) {
        let Lease { owner, session, chain, prev, next, .. } = *self.get(id);
        let bucket = self.bucket(owner, session);
        let mut link = self.buckets[bucket];
        if link == id + 1 {
            self.buckets[bucket] = chain;
        }
        while let Some(other) = link.checked_sub(1) {
            link = self.get(other).chain;
            if link == id + 1 {
                self.leases[other as usize].chain = chain;
                break;
            }
        }
        match prev.checked_sub(1) {
            Some(prev) => self.leases[prev as usize].next = next,
            None => self.owners[owner as usize] = next,
        }
        if let Some(next) = next.checked_sub(1) {
            self.leases[next as usize].prev = prev;
        }
        let chain = std::mem::replace(&mut self.free, id + 1);
        self.leases[id as usize] = Lease { chain, ..Lease::zeroed() };
        self.len -= 1;
    }

    /// Records that were ever used: the ids below it.
    pub(super) fn fresh(&self) -> u32 {
        self.fresh
    }

    /// Blocks that are not free.
    pub(super) fn blocks_used(&self) -> u64 {
        u64::from(self.blocks_used)
    }

    /// Blocks that a lease of this many chunks has.
    pub(super) fn blocks_of(len: u32) -> u64 {
        u64::from(len.div_ceil(BLOCK as u32))
    }
}
