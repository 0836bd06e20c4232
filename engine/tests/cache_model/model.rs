//! A model of the cache, made of plain vectors, with which the cache is compared after each operation.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::collections::{BTreeMap, BTreeSet};

use kvring_engine::cache::{
    Aborted, Cache, CacheConfig, CommitError, Committed, Going, Invalidated, Key, Reservation, Reserve,
    Round, SlotId, Sorted,
};
use kvring_engine::policy::PolicyKind;
use kvring_shm_abi::chunk::ChunkWord;

use crate::cache_support::{LeaseName, State, VecTable};
use crate::ops::{Listen, NAMESPACES, OWNERS};
use crate::waits::{Asked, Said, Waiting};

pub(crate) const SLAB_BYTES: u64 = 1 << 20;
pub(crate) const SLABS: u32 = 7;
/// The most records that a call may touch beyond what is allowed. One step of a search for room looks at 25 chunks in each of the
/// four namespaces. Then it drops one more chunk of the most ranks than it has reckoned with, and the spans that go with it; and
/// the message's keys have been looked at before.
const CHUNK: u64 = 256;
/// Shard bytes of each rank, by namespace: one rank; pipeline stages of two sizes; more ranks than a chunk's own
/// line has room for; shards longer than a slab.
pub(crate) const WORLDS: [&[u64]; NAMESPACES as usize] =
    [&[200_000], &[100_000, 300_000], &[99_999, 99_999, 99_999, 99_999, 200_000, 99_999], &[1_500_000]];

#[derive(Clone, Debug)]
pub(crate) struct Shard {
    pub(crate) slot: SlotId,
    pub(crate) generation: u64,
    pub(crate) committed: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct Chunk {
    /// Tells chunks apart that had the same key one after the other.
    pub(crate) id: u64,
    pub(crate) namespace: u32,
    pub(crate) key: Key,
    pub(crate) round: Round,
    pub(crate) shards: BTreeMap<u32, Shard>,
    pub(crate) visible: bool,
    /// The word by which clients found it first.
    pub(crate) word: Option<ChunkWord>,
}

impl Chunk {
    pub(crate) fn is_written(&self) -> bool {
        self.shards.values().any(|shard| !shard.committed)
    }
}

/// A slot that somebody may be writing. It outlives its chunk.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Write {
    pub(crate) owner: u8,
    pub(crate) nonce: u64,
    pub(crate) slot: SlotId,
    pub(crate) generation: u64,
    pub(crate) key: Key,
}

pub(crate) struct Model {
    pub(crate) policy: PolicyKind,
    pub(crate) cache: Cache<VecTable>,
    pub(crate) chunks: Vec<Chunk>,
    /// Damaged chunks that somebody has leased.
    pub(crate) hidden: Vec<Chunk>,
    chunks_made: u64,
    pub(crate) writes: Vec<Write>,
    pub(crate) done: Vec<Write>,
    /// What schedulers have published and nobody has read: the oldest message first.
    pub(crate) said: Vec<Said>,
    /// What the ears say.
    pub(crate) listen: Listen,
    /// Reservations and clears that had to wait.
    pub(crate) waiting: Vec<Waiting>,
    /// The chunks that were marked after the last operation.
    pub(crate) marked: BTreeSet<u64>,
    /// The ids of the chunks of each lease.
    pub(crate) leases: BTreeMap<LeaseName, Vec<u64>>,
    pub(crate) nonces: [u64; OWNERS as usize],
    pub(crate) quarantined: Vec<(u8, u64)>,
    pub(crate) added: Vec<u32>,
    /// Chunks that the last restart found and that have no place in the eviction order yet.
    pub(crate) sorted: Option<Sorted>,
    /// The number of records after which a call that goes on in pieces stops; 0: never.
    pub(crate) allowed: u64,
    /// How many keys were answered `NoSpace` because no room was found.
    refused: u64,
}

pub(crate) fn empty(policy: PolicyKind, table: VecTable, slabs: &[u32]) -> Cache<VecTable> {
    let config = CacheConfig {
        policy,
        keys_max: 64,
        leases_max: 64,
        pins_max: 1000,
        ..CacheConfig::new(SLAB_BYTES, SLABS)
    };
    let mut cache = Cache::new(config, table).unwrap();
    for (namespace, world) in WORLDS.iter().enumerate() {
        for (rank, bytes) in world.iter().enumerate() {
            cache.register(namespace as u32, world.len() as u32, rank as u32, *bytes).unwrap();
        }
    }
    for slab in slabs {
        cache.add_slab(*slab).unwrap();
    }
    cache
}

impl Model {
    pub(crate) fn new(policy: PolicyKind) -> Self {
        let slots = (SLAB_BYTES / 4096) as usize * SLABS as usize;
        let added = vec![0, 1, 2, 3];
        let cache = empty(policy, VecTable::new(slots), &added);
        let (chunks, writes, done, quarantined) = Default::default();
        Self {
            policy,
            cache,
            chunks,
            hidden: Vec::new(),
            chunks_made: 0,
            writes,
            done,
            said: Vec::new(),
            listen: Listen::Truly,
            waiting: Vec::new(),
            marked: BTreeSet::new(),
            leases: BTreeMap::new(),
            nonces: [1; 3],
            quarantined,
            added,
            sorted: None,
            allowed: 0,
            refused: 0,
        }
    }

    /// Calls `piece`, with what is allowed each time, until it says that all is done. It must be done after a
    /// limited number of calls.
    pub(crate) fn in_pieces(&mut self, mut piece: impl FnMut(&mut Self) -> bool) {
        for calls in 0.. {
            assert!(calls < 20_000, "it comes to no end");
            let allowed = if self.allowed == 0 { u64::MAX } else { self.allowed };
            self.cache.allow(allowed);
            let before = self.cache.work();
            let done = piece(self);
            let spent = self.cache.work() - before;
            assert!(spent <= allowed.saturating_add(CHUNK), "{spent} records where {allowed} were allowed");
            if done {
                return;
            }
        }
    }

    /// Does the next piece of building the eviction order after a restart.
    pub(crate) fn go_on_placing(&mut self) {
        let Some(mut sorted) = self.sorted.take() else { return };
        let mut is_over = false;
        self.in_pieces(|model| {
            is_over = model.cache.go_on_placing(&mut sorted);
            true
        });
        self.sorted = (!is_over).then_some(sorted);
    }

    pub(crate) fn is_leased(&self, chunk: &Chunk) -> bool {
        self.leases.values().any(|chunks| chunks.contains(&chunk.id))
    }

    /// Whether anybody holds it, whether the engine has heard of it or not.
    pub(crate) fn is_held(&self, chunk: &Chunk) -> bool {
        self.is_leased(chunk) || self.said.iter().any(|said| said.ids.contains(&chunk.id))
    }

    pub(crate) fn visible(&self, namespace: u32, key: Key) -> Option<&Chunk> {
        self.chunks.iter().find(|chunk| chunk.visible && chunk.namespace == namespace && chunk.key == key)
    }

    /// Removes a chunk. Its COMMITTED slots must have been freed, its WRITING ones must not.
    pub(crate) fn dropped(&mut self, at: usize, freed: &[SlotId]) {
        let chunk = self.chunks.remove(at);
        for shard in chunk.shards.values() {
            assert_eq!(freed.contains(&shard.slot), shard.committed, "{chunk:?}");
        }
    }

    /// Removes the chunks of which slots were freed because a message with these keys needed room.
    pub(crate) fn evicted(&mut self, freed: &[SlotId], namespace: u32, keys: &[Key]) {
        let mut at = 0;
        while at < self.chunks.len() {
            let chunk = &self.chunks[at];
            let lost = chunk.shards.values().any(|shard| shard.committed && freed.contains(&shard.slot));
            let is_named = chunk.namespace == namespace && keys.contains(&chunk.key);
            if !lost || is_named {
                at += 1;
                continue;
            }
            assert!(!chunk.is_written(), "evicted while it was written: {chunk:?}");
            assert!(!self.is_held(chunk), "evicted while it was held: {chunk:?}");
            assert!(!chunk.visible || self.listen != Listen::Never || self.marked.contains(&chunk.id));
            self.dropped(at, freed);
        }
    }

    /// The slots that were freed since the last call, without those of hidden chunks: those must be freed exactly
    /// when the last lease of their chunk has ended.
    pub(crate) fn take_freed(&mut self) -> Vec<SlotId> {
        let mut freed: Vec<SlotId> = self.cache.table_mut().freed.drain(..).collect();
        let (held, unheld) =
            std::mem::take(&mut self.hidden).into_iter().partition(|chunk| self.is_leased(chunk));
        self.hidden = held;
        for shard in Vec::from_iter(unheld).iter().flat_map(|chunk: &Chunk| chunk.shards.values()) {
            let at = freed.iter().position(|slot| *slot == shard.slot);
            freed
                .remove(at.unwrap_or_else(|| panic!("nobody holds slot {}, and it is not free", shard.slot)));
        }
        freed
    }

    /// A committed shard is reported as damaged.
    pub(crate) fn invalidate(&mut self, which: usize, how: u8) {
        let Some(write) = self.done.get(which % self.done.len().max(1)).copied() else { return };
        let Write { slot, generation, key, .. } = write;
        let is_it = |chunk: &Chunk| {
            chunk.shards.values().any(|shard| (shard.slot, shard.generation) == (slot, generation))
        };
        let at = self.chunks.iter().position(is_it);
        let is_there = at.is_some() || self.hidden.iter().any(is_it);
        let (told, reads) = (if how == 0 { [key[0], !key[1]] } else { key }, how != 1);
        let mut asked = None;
        let outcome = self.cache.invalidate(slot, generation, told, |namespace, rank| {
            asked = Some((namespace, rank));
            reads
        });
        let freed = self.take_freed();
        if let (Some(at), Some((namespace, rank))) = (at, asked) {
            let chunk = &self.chunks[at];
            assert_eq!((namespace, chunk.shards[&rank].slot), (chunk.namespace, slot));
        }
        let visible = at.filter(|at| self.chunks[*at].visible);
        match visible {
            _ if is_there && how < 2 => assert_eq!((outcome, freed), (Invalidated::Refused, vec![])),
            None => assert_eq!((outcome, freed), (Invalidated::Gone, vec![])),
            Some(at) if self.is_leased(&self.chunks[at]) => {
                assert_eq!((outcome, freed), (Invalidated::Hidden, vec![]));
                self.hidden.push(self.chunks.remove(at));
            }
            Some(at) => {
                assert_eq!(outcome, Invalidated::Dropped);
                self.dropped(at, &freed);
            }
        }
    }

    pub(crate) fn reserve(
        &mut self,
        owner: u8,
        namespace: u32,
        rank: u32,
        round: Round,
        parent: Option<Key>,
        keys: &[Key],
    ) {
        let going = self.cache.reservation(namespace, keys.len());
        let (keys, was_waiting, nonce) = (keys.to_vec(), false, self.nonces[usize::from(owner)]);
        let asked = Asked { owner, nonce, namespace, rank, round, parent, keys, going, done: 0, was_waiting };
        self.go_on_reserving(asked);
    }

    /// Goes on with a reservation, until everything is answered or it has to wait.
    pub(crate) fn go_on_reserving(&mut self, mut asked: Asked) {
        let mut is_over = false;
        self.in_pieces(|model| {
            let Asked { owner, namespace, rank, round, done, .. } = asked;
            let refused = model.refused;
            let before = asked.done.checked_sub(1).map(|last| asked.keys[last]).or(asked.parent);
            let rest = asked.keys[done..].to_vec();
            let Some(answered) =
                model.reserve_piece(owner, (namespace, rank), round, before, &rest, &mut asked.going)
            else {
                is_over = true;
                return true;
            };
            // Chunks may have been released since a reservation that waited has looked at them.
            if model.refused > refused && !asked.was_waiting && model.listen != Listen::Never {
                model.assert_no_room(namespace, rank, &asked.keys, asked.parent);
            }
            asked.done += answered;
            is_over = asked.done == asked.keys.len();
            is_over || model.cache.is_waiting()
        });
        if !is_over {
            asked.was_waiting = true;
            self.waiting.push(Waiting::Reserve(asked));
        }
    }

    /// A client was told that there is no space. Then no chunk may be evictable that would give back a slot of the
    /// size, except those that the message names.
    fn assert_no_room(&self, namespace: u32, rank: u32, keys: &[Key], parent: Option<Key>) {
        let pages = |namespace: u32, rank: u32| WORLDS[namespace as usize][rank as usize].div_ceil(4096);
        let wanted = pages(namespace, rank);
        for chunk in &self.chunks {
            let is_named =
                chunk.namespace == namespace && (keys.contains(&chunk.key) || parent == Some(chunk.key));
            let gives = chunk.shards.keys().any(|rank| pages(chunk.namespace, *rank) == wanted);
            let may_go = !chunk.is_written() && !self.is_held(chunk);
            assert!(is_named || !gives || !may_go, "no space, and this may go: {chunk:?}");
        }
    }

    /// Returns how many keys were answered; `None` for a rank that does not exist.
    fn reserve_piece(
        &mut self,
        owner: u8,
        (namespace, rank): (u32, u32),
        round: Round,
        parent: Option<Key>,
        keys: &[Key],
        going: &mut Going,
    ) -> Option<usize> {
        let nonce = self.nonces[usize::from(owner)];
        let mut answers = Vec::new();
        let message = Reserve { owner, nonce, namespace, rank, round, parent, keys };
        let ears = self.ears();
        let result = self.cache.reserve_piece(message, going, &mut || ears, &mut |i, answer| {
            assert_eq!(i, answers.len());
            answers.push(answer);
        });
        let world = WORLDS[namespace as usize];
        if rank as usize >= world.len() {
            assert!(result.is_err() && answers.is_empty());
            return None;
        }
        let answered = answers.len();
        assert_eq!(result, Ok(answered));
        let freed = self.take_freed();
        let named: Vec<Key> = keys.iter().copied().chain(parent).collect();
        self.evicted(&freed, namespace, &named);
        for (key, answer) in keys.iter().zip(answers) {
            let of_key = |chunk: &Chunk| chunk.namespace == namespace && chunk.key == *key;
            let visible = self.visible(namespace, *key).is_some();
            let of_source =
                |chunk: &Chunk| of_key(chunk) && !chunk.visible && chunk.round.source == round.source;
            let forming = self.chunks.iter().position(of_source);
            let number = forming.map(|at| self.chunks[at].round.number);
            let held = forming
                .and_then(|at| self.chunks[at].shards.get(&rank))
                .filter(|_| number == Some(round.number));
            let expected = match (visible, number) {
                (true, _) => Some(Reservation::Present),
                (_, Some(number)) if number > round.number => Some(Reservation::Superseded),
                _ => held.map(|shard| Reservation::Pending { committed: shard.committed }),
            };
            let Reservation::Write { slot, generation, offset } = answer else {
                assert_eq!(answer, expected.unwrap_or(Reservation::NoSpace));
                // There may be no space for other reasons: four rounds of the key form, headers have no memory, or
                // restored chunks have no place in the eviction order yet.
                let is_full = self.chunks.iter().filter(|chunk| of_key(chunk)).count() == 4;
                let is_short = is_full || self.cache.table().out_of_space || self.sorted.is_some();
                self.refused += u64::from(answer == Reservation::NoSpace && !is_short);
                continue;
            };
            assert_eq!(expected, None, "answered {answer:?}");
            if let (Some(at), true) = (forming, number != Some(round.number)) {
                self.dropped(at, &freed);
            }
            let count = self.chunks.iter().filter(|chunk| of_key(chunk)).count();
            if forming.is_none() && count == 4 {
                let replaced = |chunk: &Chunk| {
                    of_key(chunk)
                        && !chunk.is_written()
                        && chunk.shards.values().all(|s| freed.contains(&s.slot))
                };
                let at = self
                    .chunks
                    .iter()
                    .position(replaced)
                    .expect("a fifth round for a key replaces an idle one");
                self.dropped(at, &freed);
            }
            let State::Writing(header) = self.cache.table().entries[slot as usize].state else {
                panic!("slot {slot} was given and is not being written");
            };
            assert_eq!((header.owner, header.nonce, header.key, header.rank), (owner, nonce, *key, rank));
            assert_eq!((header.offset, header.length), (offset, world[rank as usize]));
            let same = |chunk: &&mut Chunk| of_key(chunk) && chunk.round == round;
            let shard = Shard { slot, generation, committed: false };
            match self.chunks.iter_mut().find(same) {
                Some(chunk) => assert!(chunk.shards.insert(rank, shard).is_none()),
                None => {
                    let shards = BTreeMap::from([(rank, shard)]);
                    self.chunks_made += 1;
                    let id = self.chunks_made;
                    let (visible, word) = (false, None);
                    self.chunks.push(Chunk { id, namespace, key: *key, round, shards, visible, word });
                }
            }
            self.writes.push(Write { owner, nonce, slot, generation, key: *key });
        }
        // Every freed slot belonged to a chunk that is gone by now.
        for chunk in &self.chunks {
            let reused = |shard: &Shard| {
                self.cache.table().entries[shard.slot as usize].generation != shard.generation
            };
            assert!(!chunk.shards.values().any(reused), "lost a slot and stayed: {chunk:?}");
        }
        Some(answered)
    }

    pub(crate) fn chunk_of(&self, write: Write) -> Option<usize> {
        let is_it = |shard: &Shard| (shard.slot, shard.generation) == (write.slot, write.generation);
        self.chunks.iter().position(|chunk| chunk.shards.values().any(is_it))
    }

    pub(crate) fn is_current(&self, write: Write) -> bool {
        self.nonces[usize::from(write.owner)] == write.nonce
    }

    pub(crate) fn commit(&mut self, which: usize) {
        if self.writes.is_empty() {
            return;
        }
        let at = which % self.writes.len();
        let write = self.writes[at];
        let Write { owner, slot, generation, key, .. } = write;
        let answer = self.cache.commit(owner, slot, generation, key, 0xc5);
        if !self.is_current(write) {
            assert_eq!(answer, Err(CommitError::NotYours { slot, owner }));
            return;
        }
        self.writes.remove(at);
        let freed = self.take_freed();
        let Some(at) = self.chunk_of(write) else {
            assert_eq!(
                (answer, freed),
                (Ok(Committed::Gone), vec![slot]),
                "an orphan is freed by its commit"
            );
            return;
        };
        assert_eq!(answer, Ok(Committed::Committed));
        self.done.push(write);
        let chunk = &mut self.chunks[at];
        chunk.shards.values_mut().find(|shard| shard.slot == slot).unwrap().committed = true;
        let world = WORLDS[chunk.namespace as usize].len();
        if chunk.shards.len() == world && !chunk.is_written() {
            chunk.visible = true;
            let (namespace, key) = (chunk.namespace, chunk.key);
            let other = |chunk: &Chunk| chunk.namespace == namespace && chunk.key == key && !chunk.visible;
            while let Some(at) = self.chunks.iter().position(other) {
                self.dropped(at, &freed);
            }
        } else {
            assert!(freed.is_empty());
        }
    }

    pub(crate) fn abort(&mut self, which: usize) {
        if self.writes.is_empty() {
            return;
        }
        let at = which % self.writes.len();
        let write = self.writes[at];
        let Write { owner, slot, generation, key, .. } = write;
        let answer = self.cache.abort(owner, slot, generation, key);
        if !self.is_current(write) {
            assert_eq!(answer, Err(CommitError::NotYours { slot, owner }));
            return;
        }
        assert_eq!(answer, Ok(Aborted::Freed));
        let freed = self.take_freed();
        self.freed_write(at, &freed);
    }

    /// A WRITING slot was freed because its writer said so or is gone. Its round is dropped.
    pub(crate) fn freed_write(&mut self, at: usize, freed: &[SlotId]) {
        let write = self.writes.remove(at);
        assert!(freed.contains(&write.slot));
        if let Some(at) = self.chunk_of(write) {
            let shards = &mut self.chunks[at].shards;
            shards.retain(|_, shard| shard.slot != write.slot);
            self.dropped(at, freed);
        }
    }

    pub(crate) fn forge(&mut self, which: usize, how: u8) {
        let all: Vec<Write> = self.writes.iter().chain(&self.done).copied().collect();
        let Some(write) = all.get(which % all.len().max(1)) else { return };
        let Write { owner, slot, generation, key, .. } = *write;
        let other = (owner + 1) % OWNERS;
        let live = self.cache.table().entries[slot as usize].generation == generation;
        let writing = live && self.writes.contains(write);
        match how {
            0 if writing => {
                let error = CommitError::NotYours { slot, owner: other };
                assert_eq!(self.cache.commit(other, slot, generation, key, 0), Err(error));
                assert_eq!(self.cache.abort(other, slot, generation, key), Err(error));
                assert!(self.cache.commit(255, slot, generation, key, 0).is_err());
            }
            1 => assert_eq!(
                self.cache.commit(owner, slot, generation + 1 + (1 << 40), key, 0),
                Ok(Committed::Gone)
            ),
            2 if writing && self.is_current(*write) && self.chunk_of(*write).is_some() => {
                let key = [key[0], !key[1]];
                assert_eq!(
                    self.cache.commit(owner, slot, generation, key, 0),
                    Err(CommitError::OtherKey { slot, key })
                );
                assert_eq!(
                    self.cache.abort(owner, slot, generation, key),
                    Err(CommitError::OtherKey { slot, key })
                );
            }
            3 if !writing => {
                let expected = if live { Committed::AlreadyCommitted } else { Committed::Gone };
                assert_eq!(self.cache.commit(owner, slot, generation, key, 0), Ok(expected));
                assert_eq!(self.cache.abort(owner, slot, generation, key), Ok(Aborted::Gone));
            }
            _ => {}
        }
    }
}
