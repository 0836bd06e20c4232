//! Lookups, the latency-critical path. `find` only reads; `pin_found` does what can wait until the answer has left.

use super::chunk::Chunks;
use super::error::FindError;
use super::lease::LeaseId;
use super::{Cache, Key, NamespaceId, OWNERS, Owner, SlotTable};
use crate::policy::ChunkId;
use kvring_shm_abi::chunk::ChunkWord;
use kvring_shm_abi::directory::{Directory, Spot};
use kvring_shm_abi::namespace::namespace_index;

/// For how many keys the directory is asked at once, if it is asked.
const BLOCK: usize = 16;
/// How many chunks ahead the lines of consecutive ones are prefetched.
const AHEAD: ChunkId = 8;

/// A lookup, and how far it has come. A lookup of many keys goes on in pieces; what one piece has found is leased
/// before the next piece begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lookup {
    /// The client that asks.
    pub owner: Owner,
    /// Its session.
    pub session: u64,
    /// Which of the session's admissions.
    pub admission: u32,
    /// The namespace of the keys.
    pub namespace: NamespaceId,
    /// How many chunks the pieces so far have found and leased.
    pub found: u32,
    /// How many keys the lookup has, in all pieces together.
    keys: u32,
    /// Logical time of the access to the first chunk; each further chunk is accessed one tick earlier.
    time: u64,
    /// The admission has been looked up before, so what the lookup finds does not count as an access.
    again: bool,
}

impl Lookup {
    /// Whether the admission has been looked up before. Then its lease may be longer than what is found now.
    #[must_use]
    pub fn is_repeated(&self) -> bool {
        self.again
    }
}

/// What one piece found, until it is pinned.
#[derive(Clone, Copy)]
pub(super) struct Found {
    lookup: Lookup,
    lease: Option<LeaseId>,
    /// How many chunks the lookup may still find after this piece.
    to_come: u32,
}

impl<T: SlotTable> Cache<T> {
    /// Begins a lookup of this many keys.
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
    /// As [`Cache::find_piece`].
    pub fn find(
        &mut self,
        owner: Owner,
        session: u64,
        admission: u32,
        namespace: NamespaceId,
        keys: &[Key],
        sink: &mut impl FnMut(ChunkWord),
    ) -> Result<u32, FindError> {
        let lookup = self.lookup(owner, session, admission, namespace, keys.len());
        self.find_piece(&lookup, keys, sink)
    }

    /// Finds the longest visible prefix of `keys`, which follow the keys that the lookup has found so far. Calls
    /// `sink` with every chunk. Returns the number of chunks; `sink` may have been called for more chunks than that.
    /// Changes nothing; the caller calls [`Cache::pin_found`] right after it.
    ///
    /// The prefix is cut to what this client may still lease. A chunk that any client has leased already costs it
    /// nothing.
    ///
    /// # Errors
    ///
    /// [`FindError::Busy`] if there is a hit but not even its first chunk may be leased; unknown namespace or
    /// owner; too many keys.
    pub fn find_piece(
        &mut self,
        lookup: &Lookup,
        keys: &[Key],
        sink: &mut impl FnMut(ChunkWord),
    ) -> Result<u32, FindError> {
        let namespace = namespace_index(lookup.namespace);
        self.piece(lookup, keys.len(), |cache, count| cache.search(namespace, &keys[..count], sink))
    }

    /// As [`Cache::find_piece`], for chunks that the client had leased under an earlier engine: up to the first one that is
    /// not there any more.
    ///
    /// # Errors
    ///
    /// As [`Cache::find_piece`].
    pub fn hold_piece(
        &mut self,
        lookup: &Lookup,
        words: impl ExactSizeIterator<Item = ChunkWord>,
    ) -> Result<u32, FindError> {
        let namespace = namespace_index(lookup.namespace);
        self.piece(lookup, words.len(), |cache, count| {
            let Self { table, chunks, found, .. } = cache;
            let is_there = |word: &ChunkWord| {
                let is_of_it = chunks.visible(word.chunk()).is_some_and(|(other, _)| other == namespace);
                is_of_it && table.chunks().word(word.chunk()) == Some(*word)
            };
            found.extend(words.take(count).take_while(is_there).map(|word| word.chunk()));
        })
    }

    /// Does what a piece of a lookup does whatever it looks for; `search` puts as many of its first chunks into `found` as
    /// there are.
    fn piece(
        &mut self,
        lookup: &Lookup,
        count: usize,
        search: impl FnOnce(&mut Self, usize),
    ) -> Result<u32, FindError> {
        self.found_for = None;
        self.found.clear();
        let Lookup { owner, session, admission, namespace, found: before, .. } = *lookup;
        if usize::from(owner) >= OWNERS {
            return Err(FindError::NoSuchOwner { owner });
        }
        let most = self.config.keys_max as usize;
        if count > most {
            return Err(FindError::TooManyKeys { keys: count, most });
        }
        let Some(registered) = self.namespace(namespace) else {
            return Err(FindError::UnknownNamespace { namespace });
        };
        let (chunk_bytes, is_complete) = (registered.chunk_bytes, registered.is_complete());
        let (lease, admissions) = self.leases.find(owner, session, admission);
        let bytes = self.charges.of[usize::from(owner)];
        // The lease of the earlier pieces stays until this client releases it, and no other message of this client
        // is handled in between.
        if before > lease.map_or(0, |lease| self.leases.get(lease).len) {
            debug_assert!(false, "a lookup that goes on without its lease");
            return Err(FindError::Busy { owner, bytes });
        }
        let room = self.leases.room(lease, before, admissions);
        let fits = count.min(usize::try_from(room).unwrap_or(usize::MAX));
        if is_complete {
            // Without any room, it matters whether there is a hit.
            search(self, fits.max(usize::from(before == 0).min(count)));
            self.work += self.found.len() as u64 + 1;
            let room_bytes = self.charges.room(owner);
            let mut affordable = fits;
            if self.found.len() as u64 * chunk_bytes > room_bytes {
                affordable = affordable.min(self.affordable(room_bytes / chunk_bytes.max(1)));
            }
            if affordable == 0 && before == 0 && !self.found.is_empty() {
                self.found.clear();
                return Err(FindError::Busy { owner, bytes });
            }
            self.found.truncate(affordable);
        }
        let found = self.found.len() as u32;
        // If this piece missed a key, no further piece follows.
        let to_come = if found as usize == count { lookup.keys.saturating_sub(before + found) } else { 0 };
        self.found_for = Some(Found { lookup: *lookup, lease, to_come });
        Ok(found)
    }

    /// How many of the found chunks may be leased, if at most `new` of them may be chunks that nobody has leased
    /// yet.
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

    /// Fills `found`. The chunks of a chain usually have consecutive ids, so the chunk behind the one just found is tried first.
    /// Where it is another one, the directory is asked for a block of keys at once: first for all of its lines, then for the
    /// chunks that these name.
    #[inline(always)]
    fn search(&mut self, namespace: u8, keys: &[Key], sink: &mut impl FnMut(ChunkWord)) {
        let Self { table, chunks, found, .. } = self;
        let (table, directory) = (table.chunks(), table.chunks().directory());
        let mut spots = [Spot::default(); BLOCK];
        let mut next = None;
        while let Some(key) = keys.get(found.len()) {
            if let Some(id) = next.filter(|id| chunks.is_visible(*id, namespace, *key))
                && let Some(word) = table.word(id)
            {
                found.push(id);
                sink(word);
                next = Some(id + 1);
                chunks.prefetch(id + AHEAD);
                table.prefetch(id + AHEAD);
                continue;
            }
            // The first chunk tells whether the others lie behind it.
            let block = if found.is_empty() { 1 } else { BLOCK };
            let block = &keys[found.len()..keys.len().min(found.len() + block)];
            for (spot, key) in spots.iter_mut().zip(block) {
                *spot = directory.spot(namespace, *key);
                directory.prefetch(*spot);
            }
            for (spot, _) in spots.iter().zip(block) {
                if let Some(id) = directory.hints(*spot).next() {
                    chunks.prefetch(id);
                    table.prefetch(id);
                }
            }
            for (spot, key) in spots.iter().zip(block) {
                let id = visible(directory, chunks, *spot, namespace, *key);
                let Some((id, word)) = id.and_then(|id| Some((id, table.word(id)?))) else { return };
                found.push(id);
                sink(word);
                next = Some(id + 1);
            }
        }
    }

    /// Pins the chunks that the last [`Cache::find_piece`] found, in the lease of its (session, admission), and
    /// counts that as an access. If the admission has a lease already, that lease becomes this one: chunks that it
    /// has at the same places keep their pins, and then nothing counts as an access (polls and retries are not).
    /// The caller then [`Cache::release`]s what the lease has beyond the lookup's end.
    ///
    /// To be called right after `find_piece`, before anything else; otherwise it does nothing and returns false.
    pub fn pin_found(&mut self) -> bool {
        let Some(Found { lookup, mut lease, to_come }) = self.found_for.take() else {
            debug_assert!(false, "pin_found without its find");
            return false;
        };
        self.version += 1;
        let Lookup { owner, session, admission, namespace, found: before, time, again, .. } = lookup;
        if let Some(registered) = self.namespace_mut(namespace) {
            registered.used = registered.used.max(time);
        }
        // The lease is walked once for the whole piece: to the last place of the piece before it, or to its own
        // first place.
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
            // Chunks that the lookup may still find have first claim on the client's share; chunks that others
            // lease and nobody pays for come after them.
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

/// The visible chunk of this key, which has this spot.
#[inline(always)]
pub(super) fn visible(
    directory: &Directory,
    chunks: &Chunks,
    spot: Spot,
    namespace: u8,
    key: Key,
) -> Option<ChunkId> {
    directory.hints(spot).find(|id| chunks.is_visible(*id, namespace, key))
}
