//! The chunk table: one cache line for what a lookup needs, and beside it a few bytes that only forming and
//! evictions need.

use bytemuck::{Pod, Zeroable};

use super::hash::Hash;
use super::pins::Pins;
use super::{Key, NAMESPACES, RANKS, Round, SlotId};
use crate::lazy::{Lazy, NoMemory};
use crate::policy::ChunkId;
use kvring_shm_abi::chunk::{LINE_SLOTS as LINE, LINES_MAX, RANKS_INLINE, lines_for, lines_of};
use kvring_shm_abi::directory::Spot;
use kvring_shm_abi::mapping::prefetch;

/// No slot.
const NO_SLOT: u32 = u32::MAX;
/// How many records, and how many lines, get memory together.
const RUN: u32 = 1024;
const _: () = assert!(LINES_MAX * LINE == RANKS);

/// What is missing for one more chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lack {
    /// A record; any chunk that is dropped gives one back.
    Record,
    /// Lines of the wide pool; only chunks of many ranks give some back.
    Lines,
}

/// What a chunk is. Zeroed memory says FREE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Life {
    Free = 0,
    /// It is of one round, and some shards are missing: WRITING or not reserved yet.
    Forming = 1,
    /// All shards are COMMITTED, in one round.
    Visible = 2,
    /// It was visible and is damaged; only its leases lead to it.
    Hidden = 3,
    /// Only during a recovery: its record says that it is visible, and not all its shards have been seen yet.
    Expected = 4,
}

/// A chunk, in one cache line.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub(super) struct Chunk {
    pub(super) key: Key,
    /// The slot of each rank; in larger worlds the lines of the wide pool that hold the slots, 16 ranks to a line.
    place: [u32; 4],
    /// Logical time of the last access; larger is later.
    pub(super) tick: u64,
    /// Forming: its round. Visible: the round of the last reservation that found it present.
    source: u32,
    number: u32,
    /// Its pins.
    pub(super) pins: Pins,
    /// The next forming chunk of the same overflowing index bucket, or the next free record; + 1 each.
    pub(super) chain: u32,
    /// Forming: the hash by which the index has it.
    pub(super) hash: u32,
    pub(super) namespace: u8,
    life: u8,
    /// How many shards are COMMITTED.
    pub(super) committed: u8,
    /// How many shards are WRITING.
    pub(super) writing: u8,
}

const _: () = assert!(size_of::<Chunk>() == 64);

impl Chunk {
    pub(super) fn life(&self) -> Life {
        match self.life {
            0 => Life::Free,
            1 => Life::Forming,
            2 => Life::Visible,
            3 => Life::Hidden,
            _ => Life::Expected,
        }
    }

    pub(super) fn round(&self) -> Round {
        Round { source: self.source, number: self.number }
    }

    pub(super) fn set_round(&mut self, round: Round) {
        (self.source, self.number) = (round.source, round.number);
    }
}

/// What only reservations, commits and evictions look at. Links are chunk id + 1.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Cold {
    /// The hash of its parent's [`Spot`] (low, high); 0: it has no parent in its chain.
    parent: [u32; 2],
    /// The neighbours in the namespace's idle list: the forming chunks that nobody is writing.
    prev: u32,
    next: u32,
    /// The number of the reservation that must not evict it.
    guard: u32,
}

#[derive(Clone, Copy, Default)]
struct IdleList {
    head: u32,
    tail: u32,
    len: u32,
}

/// How many chunks there are, by life.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub(super) struct ChunkCounts {
    pub(super) forming: u64,
    pub(super) visible: u64,
    pub(super) hidden: u64,
}

/// The position of a rank's slot in the wide pool.
#[inline(always)]
fn wide_at(place: &[u32; 4], rank: u32) -> usize {
    place[rank as usize / LINE] as usize * LINE + rank as usize % LINE
}

/// All chunks, by id, and the slots of their shards.
pub(super) struct Chunks {
    chunks: Lazy<Chunk>,
    cold: Lazy<Cold>,
    /// The first free record, + 1.
    free: u32,
    /// Records from this id on have never been used.
    pub(super) fresh: u32,
    /// How many records and lines have memory in the published tables.
    ready: (u32, u32),
    /// The slots of chunks of more than `RANKS_INLINE` ranks. Lines are given out one by one, so any chunk can use
    /// lines that a chunk of another world has given back.
    wide: Lazy<u32>,
    wide_fresh: u32,
    /// The first free line, + 1. A free line's first element is the link to the next one.
    wide_free: u32,
    /// How many lines before `wide_fresh` are free.
    wide_free_len: u32,
    /// How many chunks each namespace has, hidden ones included.
    of: [u32; NAMESPACES],
    idle: [IdleList; NAMESPACES],
    /// The number of the current reservation; 0: there is none.
    pub(super) guard: u32,
    pub(super) counts: ChunkCounts,
}

impl Chunks {
    pub(super) fn new(count: u32) -> Result<Self, NoMemory> {
        Ok(Self {
            chunks: Lazy::new_dense(count as usize)?,
            cold: Lazy::new(count as usize)?,
            free: 0,
            fresh: 0,
            ready: (0, 0),
            wide: Lazy::new(lines_for(count) * LINE)?,
            wide_fresh: 0,
            wide_free: 0,
            wide_free_len: 0,
            of: [0; NAMESPACES],
            idle: [IdleList::default(); NAMESPACES],
            guard: 0,
            counts: ChunkCounts::default(),
        })
    }

    /// How many chunks the namespace at this index has, hidden ones included.
    pub(super) fn of(&self, namespace: u8) -> u32 {
        self.of.get(usize::from(namespace)).copied().unwrap_or(0)
    }

    #[inline(always)]
    pub(super) fn get(&self, id: ChunkId) -> &Chunk {
        &self.chunks[id as usize]
    }

    pub(super) fn get_mut(&mut self, id: ChunkId) -> &mut Chunk {
        &mut self.chunks[id as usize]
    }

    #[inline(always)]
    pub(super) fn prefetch(&self, id: ChunkId) {
        prefetch(&self.chunks, id as usize);
    }

    /// The slot of a rank's shard, if it has one.
    #[inline(always)]
    pub(super) fn shard(&self, id: ChunkId, world: u32, rank: u32) -> Option<SlotId> {
        let place = &self.get(id).place;
        let slot = match world as usize {
            ..=RANKS_INLINE => place[rank as usize],
            _ => self.wide[wide_at(place, rank)],
        };
        (slot != NO_SLOT).then_some(slot)
    }

    pub(super) fn set_shard(&mut self, id: ChunkId, world: u32, rank: u32, slot: Option<SlotId>) {
        let slot = slot.unwrap_or(NO_SLOT);
        let place = &mut self.chunks[id as usize].place;
        match world as usize {
            ..=RANKS_INLINE => place[rank as usize] = slot,
            _ => self.wide[wide_at(place, rank)] = slot,
        }
    }

    /// Whether chunks of this world use lines of the wide pool.
    pub(super) fn is_wide(world: u32) -> bool {
        lines_of(world) > 0
    }

    /// What is missing for one more chunk of this world, if anything.
    pub(super) fn lack(&self, world: u32) -> Option<Lack> {
        let (records, lines) = self.ready;
        let lines = lines - self.wide_fresh + self.wide_free_len;
        if self.free == 0 && self.fresh == records {
            Some(Lack::Record)
        } else if (lines as usize) < lines_of(world) {
            Some(Lack::Lines)
        } else {
            None
        }
    }

    /// How many records and lines should have memory before one more chunk of this world is made, and how many of
    /// these have none yet. `None`: as many as can have it have it.
    pub(super) fn next_run(&self, lack: Lack) -> Option<((u32, u32), u32)> {
        let (records, lines) = self.ready;
        let (all, all_lines) = (self.chunks.len() as u32, (self.wide.len() / LINE) as u32);
        let ready = match lack {
            Lack::Record => (all.min(records.saturating_add(RUN)), lines),
            Lack::Lines => (records, all_lines.min(lines.saturating_add(RUN))),
        };
        let more = (ready.0 - records) + (ready.1 - lines);
        (more > 0).then_some((ready, more))
    }

    /// So many records and lines have memory.
    pub(super) fn set_ready(&mut self, ready: (u32, u32)) {
        self.ready = ready;
    }

    /// The lines of a chunk.
    pub(super) fn lines(&self, id: ChunkId, world: u32) -> &[u32] {
        &self.get(id).place[..lines_of(world)]
    }

    /// Takes a record for a forming chunk that has no shard yet; the caller adds the first one. `None`: see
    /// [`Chunks::lack`].
    pub(super) fn create(
        &mut self,
        key: Key,
        hash: Hash,
        namespace: u8,
        world: u32,
        round: Round,
    ) -> Option<ChunkId> {
        if self.lack(world).is_some() {
            return None;
        }
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
        let mut place = [NO_SLOT; 4];
        for line in &mut place[..lines_of(world)] {
            *line = self.take_line();
            let first = *line as usize * LINE;
            self.wide[first..first + LINE].fill(NO_SLOT);
        }
        self.chunks[id as usize] = Chunk {
            key,
            place,
            source: round.source,
            number: round.number,
            hash: hash.bits(),
            namespace,
            life: Life::Forming as u8,
            ..Chunk::zeroed()
        };
        self.cold[id as usize] = Cold::zeroed();
        self.counts.forming += 1;
        self.of[usize::from(namespace)] += 1;
        Some(id)
    }

    /// A recovery begins: this many records and lines have memory, and all of them may be in use.
    pub(super) fn restore_begin(&mut self, ready: (u32, u32)) {
        let most = (self.chunks.len() as u32, (self.wide.len() / LINE) as u32);
        self.ready = (ready.0.min(most.0), ready.1.min(most.1));
        (self.fresh, self.wide_fresh) = self.ready;
    }

    /// A recovery has found the record of a visible chunk, all of whose shards are to be found yet. `lines` has those that
    /// are in use. False: it names lines that it cannot have.
    pub(super) fn expect(
        &mut self,
        id: ChunkId,
        key: Key,
        namespace: u8,
        world: u32,
        place: [u32; LINES_MAX],
        lines: &mut [bool],
    ) -> bool {
        let own = &place[..lines_of(world)];
        let is_free = |line: &u32| lines.get(*line as usize) == Some(&false);
        if !own.iter().enumerate().all(|(at, line)| is_free(line) && !own[..at].contains(line)) {
            return false;
        }
        own.iter().for_each(|line| lines[*line as usize] = true);
        self.chunks[id as usize] =
            Chunk { key, place, namespace, life: Life::Expected as u8, ..Chunk::zeroed() };
        self.of[usize::from(namespace)] += 1;
        true
    }

    /// A recovery has found no chunk in this record: it is the next that is given out.
    pub(super) fn restore_free(&mut self, id: ChunkId) {
        if id < self.fresh {
            self.chunks[id as usize].chain = std::mem::replace(&mut self.free, id + 1);
        }
    }

    /// The recovery has read all records: the lines that no chunk has are free, the lowest first.
    pub(super) fn restore_free_lines(&mut self, lines: &[bool]) {
        for line in (0..self.wide_fresh).rev().filter(|line| !lines[*line as usize]) {
            self.wide[line as usize * LINE] = std::mem::replace(&mut self.wide_free, line + 1);
            self.wide_free_len += 1;
        }
    }

    /// Frees a chunk's id and lines. The caller has freed or orphaned its shards, and nothing leads to it any more.
    pub(super) fn destroy(&mut self, id: ChunkId, world: u32) {
        let Chunk { place, namespace, .. } = *self.get(id);
        for line in &place[..lines_of(world)] {
            self.wide[*line as usize * LINE] = std::mem::replace(&mut self.wide_free, line + 1);
            self.wide_free_len += 1;
        }
        self.of[usize::from(namespace)] -= 1;
        match self.get(id).life() {
            Life::Forming => self.counts.forming -= 1,
            Life::Visible => self.counts.visible -= 1,
            Life::Hidden => self.counts.hidden -= 1,
            Life::Expected => {}
            Life::Free => debug_assert!(false, "chunk {id} is destroyed twice"),
        }
        let chain = std::mem::replace(&mut self.free, id + 1);
        self.chunks[id as usize] = Chunk { chain, ..Chunk::zeroed() };
    }

    /// The caller has checked that there is one.
    fn take_line(&mut self) -> u32 {
        match self.wide_free.checked_sub(1) {
            Some(line) => {
                self.wide_free = self.wide[line as usize * LINE];
                self.wide_free_len -= 1;
                line
            }
            None => {
                self.wide_fresh += 1;
                self.wide_fresh - 1
            }
        }
    }

    /// The caller has made its record visible, and has taken it out of the index of forming chunks.
    pub(super) fn set_visible(&mut self, id: ChunkId) {
        let before = self.get(id).life();
        self.chunks[id as usize].life = Life::Visible as u8;
        self.counts.forming -= u64::from(before == Life::Forming);
        self.counts.visible += 1;
    }

    /// The caller has ended the chunk's record, and has taken it out of the eviction order.
    pub(super) fn set_hidden(&mut self, id: ChunkId) {
        self.chunks[id as usize].life = Life::Hidden as u8;
        self.counts.visible -= 1;
        self.counts.hidden += 1;
    }

    pub(super) fn parent(&self, id: ChunkId) -> Option<Spot> {
        let [low, high] = self.cold[id as usize].parent;
        let hash = u64::from(low) | u64::from(high) << 32;
        (hash != 0).then(|| Spot::of_hash(hash))
    }

    pub(super) fn set_parent(&mut self, id: ChunkId, parent: Option<Spot>) {
        let hash = parent.map_or(0, Spot::hash);
        self.cold[id as usize].parent = [hash as u32, (hash >> 32) as u32];
    }

    /// Namespace (its index) and key of a chunk that lookups find. The id may be a guess.
    pub(super) fn published(&self, id: ChunkId) -> Option<(u8, Key)> {
        let chunk = self.chunks.get(id as usize)?;
        let is_published = matches!(chunk.life(), Life::Visible | Life::Expected);
        is_published.then_some((chunk.namespace, chunk.key))
    }

    /// As `published`, of chunks that are visible now.
    pub(super) fn visible(&self, id: ChunkId) -> Option<(u8, Key)> {
        self.published(id).filter(|_| self.get(id).life() == Life::Visible)
    }

    /// The chunk of this id, if it has this namespace and key. The id may be a guess.
    #[inline(always)]
    pub(super) fn published_as(&self, id: ChunkId, namespace: u8, key: Key) -> Option<&Chunk> {
        self.chunks.get(id as usize).filter(|chunk| chunk.key == key && chunk.namespace == namespace)
    }

    /// Keeps the current reservation from evicting this chunk.
    pub(super) fn guard(&mut self, id: ChunkId) {
        self.cold[id as usize].guard = self.guard;
    }

    /// Whether the chunk may be evicted: it is not leased, not being written, and not named by the current
    /// reservation.
    pub(super) fn is_evictable(&self, id: ChunkId) -> bool {
        let chunk = self.get(id);
        !chunk.pins.any() && chunk.writing == 0 && !self.is_guarded(id)
    }

    pub(super) fn is_guarded(&self, id: ChunkId) -> bool {
        self.guard != 0 && self.cold[id as usize].guard == self.guard
    }

    /// A forming chunk has lost its last writer: it joins the idle list at the tail, and may be evicted after those
    /// that joined before.
    pub(super) fn idle_insert(&mut self, id: ChunkId) {
        let list = &mut self.idle[self.chunks[id as usize].namespace as usize];
        list.len += 1;
        let prev = std::mem::replace(&mut list.tail, id + 1);
        match prev.checked_sub(1) {
            Some(prev) => self.cold[prev as usize].next = id + 1,
            None => list.head = id + 1,
        }
        let cold = &mut self.cold[id as usize];
        (cold.prev, cold.next) = (prev, 0);
    }

    /// Takes a forming chunk off the idle list: it has a writer again, or is dropped.
    pub(super) fn idle_remove(&mut self, id: ChunkId) {
        let list = &mut self.idle[self.chunks[id as usize].namespace as usize];
        list.len -= 1;
        let Cold { prev, next, .. } = self.cold[id as usize];
        match prev.checked_sub(1) {
            Some(prev) => self.cold[prev as usize].next = next,
            None => list.head = next,
        }
        match next.checked_sub(1) {
            Some(next) => self.cold[next as usize].prev = prev,
            None => list.tail = prev,
        }
    }

    /// The head of the namespace's idle list.
    pub(super) fn first_idle(&self, namespace: usize) -> Option<ChunkId> {
        self.idle[namespace].head.checked_sub(1)
    }

    /// The length of the namespace's idle list.
    pub(super) fn idle_len(&self, namespace: usize) -> u32 {
        self.idle[namespace].len
    }

    /// The namespace's idle list, from its head on.
    pub(super) fn idle(&self, namespace: usize) -> impl Iterator<Item = ChunkId> {
        let mut link = self.idle[namespace].head;
        std::iter::from_fn(move || {
            let id = link.checked_sub(1)?;
            link = self.cold[id as usize].next;
            Some(id)
        })
    }
}
