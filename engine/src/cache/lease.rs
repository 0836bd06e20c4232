//! Leases: the chunks that are pinned for each (client, session, admission), in the order of their chain.

use bytemuck::{Pod, Zeroable};

use super::{OWNERS, Owner};
use crate::lazy::{Lazy, NoMemory};
use crate::policy::ChunkId;

/// How many chunks a block holds.
const BLOCK: usize = 14;
/// The most leases of one session. An honest session has one or two admissions at a time; the limit bounds the work
/// of ending a session.
pub(super) const ADMISSIONS_MAX: usize = 16;

/// A lease's number. It is reused after the lease's end.
pub(super) type LeaseId = u32;

/// One lease. Links are lease id + 1.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Lease {
    pub(super) session: u64,
    pub(super) admission: u32,
    /// How many chunks it has; 0: the record is free.
    pub(super) len: u32,
    /// The first and the last block, + 1 each.
    first: u32,
    last: u32,
    /// The next lease of the same hash bucket, or the next free record.
    chain: u32,
    /// The neighbours in the list of the client's leases.
    prev: u32,
    next: u32,
    pub(super) owner: Owner,
    _pad: [u8; 3],
}

/// A piece of a lease's list of chunks.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Block {
    chunks: [ChunkId; BLOCK],
    /// The neighbours, + 1 each. A lease grows and shrinks at its tail, and is read from its head.
    before: u32,
    next: u32,
}

/// Where a lease has one of its chunks. It is valid until that chunk is taken off the lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    block: u32,
    at: usize,
}

/// How much a client holds.
#[derive(Clone, Copy, Default)]
struct Holdings {
    leases: u32,
    pins: u64,
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
    /// The heads of the hash chains of (client, session).
    buckets: Lazy<u32>,
    seed: u64,
    /// The heads of the clients' lists.
    owners: [u32; OWNERS],
    pub(super) len: u32,
    /// Pins: the chunks of all leases.
    pub(super) pins: u64,
    /// What each client holds, and the most that it may.
    held: [Holdings; OWNERS],
    most: Holdings,
    /// How many blocks were passed on the way to places.
    #[cfg(test)]
    pub(super) passed: std::cell::Cell<u64>,
}

impl Leases {
    /// There is room for so many leases and pins of each client.
    pub(super) fn new(leases_max: u32, pins_max: u32, seed: u64) -> Result<Self, NoMemory> {
        let (leases, pins) = (leases_max as usize * OWNERS, pins_max as usize * OWNERS);
        // Each lease may leave its last block partly empty.
        let blocks = pins.div_ceil(BLOCK) + leases;
        Ok(Self {
            leases: Lazy::new(leases)?,
            free: 0,
            fresh: 0,
            blocks: Lazy::new(blocks)?,
            blocks_free: 0,
            blocks_fresh: 0,
            blocks_used: 0,
            buckets: Lazy::new(leases.next_power_of_two())?,
            seed,
            owners: [0; OWNERS],
            len: 0,
            pins: 0,
            held: [Holdings::default(); OWNERS],
            most: Holdings { leases: leases_max, pins: u64::from(pins_max) },
            #[cfg(test)]
            passed: std::cell::Cell::default(),
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

    /// The lease of an admission, if it has one, and the number of leases of its session.
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

    /// Any lease of this session.
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

    /// Any lease of this client.
    pub(super) fn first_of(&self, owner: Owner) -> Option<LeaseId> {
        self.owners[owner as usize].checked_sub(1)
    }

    /// How many more chunks this lease of a client's could hold. Without a lease: how many a new one could hold.
    pub(super) fn room(&self, owner: Owner, lease: Option<LeaseId>, admissions: usize) -> u64 {
        let held = self.held[usize::from(owner)];
        let has_record = held.leases < self.most.leases && admissions < ADMISSIONS_MAX;
        if lease.is_some() || has_record { self.most.pins - held.pins } else { 0 }
    }

    /// Makes a lease with its first chunk. The caller has checked `room`.
    pub(super) fn create(&mut self, owner: Owner, session: u64, admission: u32, first: ChunkId) -> LeaseId {
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
        let lease = Lease { session, admission, chain, next, owner, ..Lease::zeroed() };
        self.leases[id as usize] = lease;
        self.len += 1;
        self.held[usize::from(owner)].leases += 1;
        self.push(id, first);
        id
    }

    /// Appends a chunk. The caller has checked `room`.
    pub(super) fn push(&mut self, id: LeaseId, chunk: ChunkId) {
        let Lease { len, last, .. } = *self.get(id);
        let at = len as usize % BLOCK;
        let block = match last.checked_sub(1) {
            Some(block) if at > 0 => block,
            before => {
                let block = self.take_block();
                self.blocks[block as usize] = Block { before: last, ..Block::zeroed() };
                match before {
                    Some(before) => self.blocks[before as usize].next = block + 1,
                    None => self.leases[id as usize].first = block + 1,
                }
                self.leases[id as usize].last = block + 1;
                block
            }
        };
        self.blocks[block as usize].chunks[at] = chunk;
        self.leases[id as usize].len += 1;
        self.pins += 1;
        self.held[usize::from(self.get(id).owner)].pins += 1;
    }

    /// Takes the last chunk off a lease. The lease ends with its only chunk.
    pub(super) fn pop(&mut self, id: LeaseId) -> Option<ChunkId> {
        let Lease { len, last, owner, .. } = *self.get(id);
        let (at, block) = (len.checked_sub(1)? as usize, last.checked_sub(1)?);
        let Block { chunks, before, .. } = self.blocks[block as usize];
        self.leases[id as usize].len -= 1;
        self.pins -= 1;
        self.held[usize::from(owner)].pins -= 1;
        if at.is_multiple_of(BLOCK) {
            self.blocks[block as usize].next = std::mem::replace(&mut self.blocks_free, block + 1);
            self.blocks_used -= 1;
            self.leases[id as usize].last = before;
            match before.checked_sub(1) {
                Some(before) => self.blocks[before as usize].next = 0,
                None => self.end(id),
            }
        }
        Some(chunks[at % BLOCK])
    }

    /// The place of the lease's chunk number `at`, searched for from the nearer end.
    pub(super) fn place(&self, id: LeaseId, at: u32) -> Option<Place> {
        let Lease { len, first, last, .. } = *self.get(id);
        if at >= len {
            return None;
        }
        let is_forward = at < len / 2;
        let mut link = if is_forward { first } else { last };
        for _ in 0..self.steps_to(id, at) {
            let Block { before, next, .. } = self.blocks[link.checked_sub(1)? as usize];
            link = if is_forward { next } else { before };
            #[cfg(test)]
            self.passed.set(self.passed.get() + 1);
        }
        Some(Place { block: link.checked_sub(1)?, at: at as usize % BLOCK })
    }

    /// How many blocks are passed on the way to that place.
    pub(super) fn steps_to(&self, id: LeaseId, at: u32) -> u32 {
        let (len, block) = (self.get(id).len, BLOCK as u32);
        if at < len / 2 { at / block } else { (len.saturating_sub(1) / block).saturating_sub(at / block) }
    }

    /// The lease's last chunk.
    pub(super) fn last(&self, id: LeaseId) -> Option<ChunkId> {
        let Lease { len, last, .. } = *self.get(id);
        let (at, block) = (len.checked_sub(1)? as usize, last.checked_sub(1)?);
        Some(self.blocks[block as usize].chunks[at % BLOCK])
    }

    /// The chunk at a place.
    pub(super) fn chunk_at(&self, place: Place) -> ChunkId {
        self.blocks[place.block as usize].chunks[place.at]
    }

    /// The place behind this one, if the lease has a block for it.
    pub(super) fn behind(&self, place: Place) -> Option<Place> {
        if place.at + 1 < BLOCK {
            return Some(Place { at: place.at + 1, ..place });
        }
        let next = self.blocks[place.block as usize].next.checked_sub(1)?;
        Some(Place { block: next, at: 0 })
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

    /// The chunks of a lease from number `from` on, towards its tail.
    pub(super) fn chunks(&self, id: LeaseId, from: u32) -> impl Iterator<Item = ChunkId> {
        let rest = self.get(id).len.saturating_sub(from);
        let mut next = self.place(id, from);
        (0..rest).map_while(move |_| {
            let place = next?;
            next = self.behind(place);
            Some(self.chunk_at(place))
        })
    }

    /// Frees the record of a lease that has no chunk left.
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
        self.held[usize::from(owner)].leases -= 1;
    }

    /// How many records were ever used; their ids are below this number.
    pub(super) fn fresh(&self) -> u32 {
        self.fresh
    }

    /// How many blocks are in use.
    pub(super) fn blocks_used(&self) -> u64 {
        u64::from(self.blocks_used)
    }

    /// How many blocks a lease of this many chunks has.
    pub(super) fn blocks_of(len: u32) -> u64 {
        u64::from(len.div_ceil(BLOCK as u32))
    }
}
