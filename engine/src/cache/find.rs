//! Lookups: the latency-critical path. `find` only reads; `pin_found` does what can wait until the answer is out.

use super::chunk::Chunks;
use super::error::FindError;
use super::index::{Guess, Hash};
use super::lease::LeaseId;
use super::{Cache, Key, NamespaceId, OWNERS, Owner, PAGE_BYTES, SlotId, SlotTable};
use crate::policy::ChunkId;

/// Keys that go through a stage of the pipeline together: each stage asks for the lines that the next one reads.
const BLOCK: usize = 16;

/// Where a shard is, and which life of its slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardRef {
    /// The slot.
    pub slot: SlotId,
    /// Its generation: a load compares it before and after its copy.
    pub generation: u64,
    /// First byte in the arena.
    pub offset: u64,
}

/// A lookup, and how far it has come: one of many keys goes on in pieces, and what a piece has found is leased before the
/// next one is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lookup {
    /// Who asks.
    pub owner: Owner,
    /// Its session.
    pub session: u64,
    /// Which of the session's admissions.
    pub admission: u32,
    /// Where.
    pub namespace: NamespaceId,
    /// Chunks that its pieces have found and leased so far.
    pub found: u32,
    /// Keys of all pieces.
    keys: u32,
    /// Logical time of the access to its first chunk; each chunk behind that is one earlier.
    time: u64,
    /// The admission has been looked up before: what it finds is no access.
    again: bool,
}

impl Lookup {
    /// Has the admission been looked up before? Then its lease may be longer than what is found now.
    #[must_use]
    pub fn is_repeated(&self) -> bool {
        self.again
    }
}

/// What a piece found, until it is pinned.
#[derive(Clone, Copy)]
pub(super) struct Found {
    lookup: Lookup,
    lease: Option<LeaseId>,
    /// Chunks that the lookup may find after this piece.
    to_come: u32,
}

impl<T: SlotTable> Cache<T> {
    /// Begins a lookup of so many keys.
    pub fn lookup(
        &mut self,
        owner: Owner,
        session: u64,
        admission: u32,
        namespace: NamespaceId,
        keys: usize,
    ) -> Lookup {
        self.tick += keys as u64;
        let known = usize::from(owner) < OWNERS && self.leases.find(owner, session, admission).0.is_some();
        let keys = u32::try_from(keys).unwrap_or(u32::MAX);
        Lookup { owner, session, admission, namespace, found: 0, keys, time: self.tick, again: known }
    }

    /// As [`Cache::find_piece`], for all keys at once.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn find(
        &mut self,
        owner: Owner,
        session: u64,
        admission: u32,
        namespace: NamespaceId,
        keys: &[Key],
        sink: &mut impl FnMut(ShardRef),
    ) -> Result<u32, FindError> {
        let lookup = self.lookup(owner, session, admission, namespace, keys.len());
        self.find_piece(&lookup, keys, sink)
    }

    /// The longest visible prefix of `keys`, which follow those that the lookup has found: `sink` is called with every
    /// shard, chunk by chunk, rank by rank. Answers the number of chunks, of which `sink` may have been told of more.
    /// Changes nothing; [`Cache::pin_found`] is to follow at once.
    ///
    /// A prefix that is longer than what this client may still lease is cut to that. What is leased already, by
    /// whomever, costs nothing more.
    ///
    /// # Errors
    ///
    /// [`FindError::Busy`] where there is a hit but not even its first chunk may be leased; unknown namespace or
    /// owner; too many keys.
    pub fn find_piece(
        &mut self,
        lookup: &Lookup,
        keys: &[Key],
        sink: &mut impl FnMut(ShardRef),
    ) -> Result<u32, FindError> {
        self.found_for = None;
        self.found.clear();
        let Lookup { owner, session, admission, namespace, found: before, .. } = *lookup;
        if usize::from(owner) >= OWNERS {
            return Err(FindError::NoSuchOwner { owner });
        }
        let most = self.config.keys_max as usize;
        if keys.len() > most {
            return Err(FindError::TooManyKeys { keys: keys.len(), most });
        }
        let Some(registered) = self.namespace(namespace) else {
            return Err(FindError::UnknownNamespace { namespace });
        };
        let (world, chunk_bytes) = (registered.world, registered.chunk_bytes);
        let complete = registered.is_complete();
        let (lease, admissions) = self.leases.find(owner, session, admission);
        let bytes = self.charges.of[usize::from(owner)];
        // What the earlier pieces leased stays until this client says otherwise, which it cannot in between.
        if before > lease.map_or(0, |lease| self.leases.get(lease).len) {
            debug_assert!(false, "a lookup that goes on without its lease");
            return Err(FindError::Busy { owner, bytes });
        }
        let room = self.leases.room(lease, before, admissions);

        let namespace = namespace as u8;
        let fits = keys.len().min(usize::try_from(room).unwrap_or(usize::MAX));
        if complete && fits > 0 {
            if world == 1 {
                self.search::<true>(namespace, world, &keys[..fits], sink);
            } else {
                self.search::<false>(namespace, world, &keys[..fits], sink);
            }
            self.work += self.found.len() as u64 * u64::from(world) + 1;
            let room_bytes = self.charges.room(owner);
            if self.found.len() as u64 * chunk_bytes > room_bytes {
                let affordable = self.affordable(room_bytes / chunk_bytes.max(1));
                if affordable == 0 && before == 0 {
                    self.found.clear();
                    return Err(FindError::Busy { owner, bytes });
                }
                self.found.truncate(affordable);
            }
        } else if complete
            && before == 0
            && let Some(first) = keys.first()
        {
            let hash = self.hash(u32::from(namespace), *first);
            if self.index.matches(&self.chunks, hash, namespace, *first).visible.is_some() {
                return Err(FindError::Busy { owner, bytes });
            }
        }
        let found = self.found.len() as u32;
        // Where it has found less than was asked for, no piece follows.
        let to_come =
            if found as usize == keys.len() { lookup.keys.saturating_sub(before + found) } else { 0 };
        self.found_for = Some(Found { lookup: *lookup, lease, to_come });
        Ok(found)
    }

    /// How many of what was found may be leased, if `new` chunks of it may be that nobody has leased yet.
    fn affordable(&mut self, mut new: u64) -> usize {
        self.work += self.found.len() as u64;
        let costs = |id: &ChunkId| !self.chunks.get(*id).pins.any();
        let cut = self.found.iter().position(|id| {
            let costs = costs(id);
            let too_much = costs && new == 0;
            new -= u64::from(costs && !too_much);
            too_much
        });
        cut.unwrap_or(self.found.len())
    }

    /// Fills `found`, a block of keys at a time, and each stage a block behind the one before it: index line, chunk
    /// record, slots.
    #[inline(always)]
    fn search<const SINGLE: bool>(
        &mut self,
        namespace: u8,
        world: u32,
        keys: &[Key],
        sink: &mut impl FnMut(ShardRef),
    ) {
        let Self { index, chunks, slots, slabs, found, config, .. } = self;
        found.resize(keys.len(), 0);
        let mut hashes = [[Hash::default(); BLOCK]; 3];
        let mut guesses = [[Guess::default(); BLOCK]; 2];
        // Shrinks to the first miss: nothing after it counts.
        let mut end = keys.len();
        // With one rank, the chunk's record has all that the answer needs.
        let last_stage = if SINGLE { 2 } else { 4 };
        let block_at = |step: usize, stage: usize, end: usize| {
            let first = step.saturating_sub(stage) * BLOCK;
            if step < stage || first >= end { 0..0 } else { first..end.min(first + BLOCK) }
        };
        let mut step = 0;
        while step < end.div_ceil(BLOCK) + last_stage {
            for (i, key) in block_at(step, 0, end).zip(&keys[block_at(step, 0, end)]) {
                let hash = Hash::new(config.seed, u32::from(namespace), *key);
                hashes[step % 3][i % BLOCK] = hash;
                index.prefetch(hash);
            }
            for i in block_at(step, 1, end) {
                let guess = index.guess(hashes[(step + 2) % 3][i % BLOCK]);
                guesses[step % 2][i % BLOCK] = guess;
                index.prefetch_guess(guess, chunks);
            }
            for i in block_at(step, 2, end) {
                let (hash, guess) = (hashes[(step + 1) % 3][i % BLOCK], guesses[(step + 1) % 2][i % BLOCK]);
                let Some(id) = index.resolve(guess, chunks, hash, namespace, keys[i]) else {
                    end = i;
                    break;
                };
                found[i] = id;
                if SINGLE {
                    let (slot, generation, page) = chunks.get(id).single();
                    sink(ShardRef { slot, generation, offset: u64::from(page) * PAGE_BYTES });
                } else {
                    chunks.prefetch_shards(id, world);
                }
            }
            if !SINGLE {
                for i in block_at(step, 3, end) {
                    each_shard(chunks, found[i], world, |slot| slots.prefetch(slot));
                }
                for i in block_at(step, 4, end) {
                    each_shard(chunks, found[i], world, |slot| {
                        let generation = slots.get(slot).generation();
                        sink(ShardRef { slot, generation, offset: slabs.offset(slot) });
                    });
                }
            }
            step += 1;
        }
        found.truncate(end);
    }

    /// Pins what the last [`Cache::find_piece`] found, in the lease of its (session, admission), and counts it as an access.
    /// A lease that the admission had before becomes this one: what it has already at the same places stays as it is, and
    /// nothing of it is an access: polls and retries are not. What it has beyond the lookup's end is the caller's to
    /// [`Cache::release`].
    ///
    /// To be called right after `find`, before anything else; otherwise it does nothing and answers false.
    pub fn pin_found(&mut self) -> bool {
        let Some(Found { lookup, mut lease, to_come }) = self.found_for.take() else {
            debug_assert!(false, "pin_found without its find");
            return false;
        };
        self.version += 1;
        let Lookup { owner, session, admission, namespace, found: before, time, again, .. } = lookup;
        if let Some(Some(registered)) = self.namespaces.get_mut(namespace as usize) {
            registered.used = registered.used.max(time);
        }
        // One walk for the whole piece, to the last place of the piece before it, or to its own first.
        let (mut place, mut front) = (None, None);
        if let Some(lease) = lease {
            let start = before.saturating_sub(1);
            self.work += u64::from(self.leases.steps_to(lease, start));
            place = self.leases.place(lease, start);
            if before > 0 {
                front = place.map(|last| self.leases.chunk_at(last));
                place = place.and_then(|last| self.leases.behind(last));
            }
        }
        let held = lease.map_or(0, |lease| self.leases.get(lease).len);
        self.work += self.found.len() as u64;
        for i in 0..self.found.len() {
            let (id, at) = (self.found[i], before + i as u32);
            // What is new to come is paid for before what others have leased and nobody pays for.
            let to_come = u64::from(to_come) + (self.found.len() - i - 1) as u64;
            match (lease, place) {
                (Some(_), Some(here)) if at < held => {
                    place = self.leases.behind(here);
                    let other = self.leases.replace(here, id);
                    if other != id {
                        self.pin(id, owner, to_come);
                        self.unpin(owner, other);
                    }
                }
                (Some(lease), _) => {
                    self.pin(id, owner, to_come);
                    self.leases.push(lease, id);
                }
                (None, _) => {
                    self.pin(id, owner, to_come);
                    lease = Some(self.leases.create(owner, session, admission, id));
                }
            }
            if !again {
                self.touch(id, time - u64::from(at), front);
            }
            front = Some(id);
        }
        true
    }
}

#[inline(always)]
fn each_shard(chunks: &Chunks, id: ChunkId, world: u32, mut act: impl FnMut(SlotId)) {
    for rank in 0..world {
        if let Some(slot) = chunks.shard(id, world, rank) {
            act(slot);
        }
    }
}
