//! After a restart, clients of the earlier engine come back and declare what they still hold.
//!
//! A living client keeps its life word, and with it its entry. So the slots that were reserved for that entry are its own,
//! and it needs no other proof than to say so on that entry's channel. When it says that it has declared everything, the
//! slots that it was writing and did not declare are freed. Until all clients have said so, or [`Awaited::grace_ns`] has
//! passed, nothing is evicted, cleared or forgotten.

use super::Service;
use super::done::{Done, refuse, too_many};
use super::lookup::piece_of;
use crate::cache::{FindError, Lookup};
use crate::stats::Stat;
use kvring_shm_abi::chunk::ChunkWord;
use kvring_shm_abi::failpoint::{self, Place};
use kvring_shm_abi::futex::monotonic_ns;
use kvring_shm_abi::lobby::Role;
use kvring_shm_abi::message::{KEYS_MAX, Records, Status};
use kvring_shm_abi::payload::OutOfArea;

impl Service {
    /// Begins the grace, when serving begins and clients are awaited.
    pub(super) fn await_clients(&mut self) {
        if self.awaited.entries != 0 {
            self.awaited.until_ns = monotonic_ns().saturating_add(self.awaited.grace_ns);
            self.cache.hold_evictions(true);
        }
    }

    /// Are clients of the earlier engine awaited? Until they are back, or the grace is over, nothing is evicted, cleared or
    /// forgotten, because they may hold it.
    pub(super) fn is_awaiting(&self) -> bool {
        self.cache.evictions_held()
    }

    /// This client is no longer awaited: it has declared everything, or is gone.
    pub(super) fn no_longer_awaited(&mut self, entry: usize) {
        let before = self.awaited.entries;
        self.awaited.entries &= !(1 << entry);
        if before != 0 && self.awaited.entries == 0 {
            self.cache.hold_evictions(false);
            tracing::info!("every client of the earlier engine has come back, or is gone");
        }
    }

    /// Ends the grace when its time has come: a client that does not come back (stopped, perhaps) no longer keeps the others'
    /// stores from evicting. The slots that it was writing stay its own; chunks that it has leased may be evicted, and its
    /// loads of them then fail their check.
    pub(super) fn look_at_grace(&mut self, now: u64) {
        if self.awaited.entries != 0 && now >= self.awaited.until_ns {
            self.awaited.until_ns = u64::MAX;
            self.cache.hold_evictions(false);
            let missing = self.awaited.entries.count_ones();
            tracing::warn!(
                missing,
                "clients of the earlier engine have not come back; evicting and clearing go on without them"
            );
        }
    }

    pub(super) fn begin_lease(
        &mut self,
        entry: usize,
        session: u64,
        admission: u32,
        namespace: u32,
        chunks: Records,
    ) -> Result<DeclareLease, Result<Done, OutOfArea>> {
        let Some(connection) = self.entries[entry].connection() else { return Err(Ok(Done::Answered)) };
        if connection.role != Role::Scheduler {
            return Err(Ok(refuse(Status::WrongRole)));
        }
        if chunks.count as usize > KEYS_MAX {
            return Err(Ok(too_many()));
        }
        let Some(world) = self.registry.get(namespace).map(|known| known.shape.world) else {
            return Err(Ok(refuse(Status::UnknownNamespace)));
        };
        connection.payload().check(chunks.offset, chunks.count as usize).map_err(Err)?;
        let lookup = self.cache.lookup(entry as u8, session, admission, namespace, chunks.count as usize);
        Ok(DeclareLease { lookup, chunks, world })
    }

    /// Goes on with the declaration of a lease: pins its chunks again, piece by piece, up to the first that is not the same.
    pub(super) fn declare_lease(
        &mut self,
        entry: usize,
        operation: u16,
        request: &mut DeclareLease,
    ) -> Result<Done, OutOfArea> {
        let DeclareLease { chunks, world, .. } = *request;
        loop {
            if self.cache.is_spent() {
                return Ok(Done::More);
            }
            let before = request.lookup.found;
            let piece = piece_of(self.cache.left(), world, chunks.count - before);
            let Some(connection) = self.entries[entry].connection() else { return Ok(Done::Answered) };
            let words = &mut self.scratch.words[..piece];
            connection.payload().read(chunks.offset + before, words)?;
            let words = words.iter().map(|word| ChunkWord::from_bits(*word));
            let found = self.cache.hold_piece(&request.lookup, words);
            match found {
                Ok(found) => {
                    failpoint::here(Place::DeclareLease);
                    self.cache.pin_found();
                    request.lookup.found += found;
                    if found as usize == piece && request.lookup.found < chunks.count {
                        continue;
                    }
                }
                Err(FindError::UnknownNamespace { .. }) => return Ok(refuse(Status::UnknownNamespace)),
                Err(
                    FindError::Busy { .. } | FindError::NoSuchOwner { .. } | FindError::TooManyKeys { .. },
                ) => {
                    return Ok(refuse(Status::Busy));
                }
            }
            let Lookup { session, admission, found, .. } = request.lookup;
            self.stat(Stat::LeasesDeclared, 1);
            self.stat(Stat::ChunksDeclared, u64::from(found));
            self.complete(entry, operation, Status::Ok, [u64::from(found), 0, 0, 0]);
            return Ok(Done::Trim { session, admission, keep: found });
        }
    }

    /// The client has declared everything: frees, in pieces, the slots that it was writing and did not declare.
    pub(super) fn declare_end(&mut self, entry: usize, freed: &mut u32) -> Done {
        failpoint::here(Place::DeclareEnd);
        let before = *freed;
        let is_over = self.cache.declare_end(entry as u8, freed);
        self.stat(Stat::SlotsUndeclared, u64::from(*freed - before));
        if !is_over {
            return Done::More;
        }
        failpoint::here(Place::DeclareEnded);
        self.no_longer_awaited(entry);
        Done::Answer(Status::Ok, [u64::from(*freed), 0, 0, 0])
    }
}

/// A lease as its client remembers it, and how much of it has been pinned again.
#[derive(Clone, Copy)]
pub(super) struct DeclareLease {
    lookup: Lookup,
    chunks: Records,
    /// How many ranks its chunks have.
    world: u32,
}
