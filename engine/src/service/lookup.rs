//! Lookups of as many keys as a message may name: found and leased piece by piece, answered once.

use super::Service;
use super::done::{Done, PIECE, refuse, too_many};
use super::registry::Shape;
use crate::cache::{FindError, Lookup};
use crate::stats::Stat;
use crate::tier::AskedLookup;
use kvring_shm_abi::lobby::Role;
use kvring_shm_abi::message::{KEY_WORDS, KEYS_MAX, Status};
use kvring_shm_abi::payload::OutOfArea;

/// Records that a lookup touches for each chunk and for each of its shards: to find it, to pin it, to count the access.
const RECORDS: u64 = 3;

/// A lookup that is being done.
#[derive(Clone, Copy)]
pub(super) struct LookupRequest {
    asked: AskedLookup,
    /// What it has found so far.
    lookup: Lookup,
    shape: Shape,
    /// A lower tier has been asked for what was missing.
    pub(super) asked_tier: bool,
}

/// How many of the `rest` chunks, of so many ranks each, may be looked up in one piece while `left` records may be touched: at
/// least one.
#[inline]
pub(super) fn piece_of(left: u64, world: u32, rest: u32) -> usize {
    let (rest, each) = (PIECE.min(rest as usize), RECORDS * (1 + u64::from(world)));
    // The usual case, without the division: that takes longer than the rest of this.
    if left >= rest as u64 * each {
        return rest;
    }
    usize::try_from(left / each).unwrap_or(rest).clamp(1, rest)
}

impl Service {
    pub(super) fn begin_lookup(
        &mut self,
        asked: AskedLookup,
    ) -> Result<LookupRequest, Result<Done, OutOfArea>> {
        let AskedLookup { entry, session, admission, namespace, keys, answer, .. } = asked;
        let Some(connection) = self.entries[entry].connection() else { return Err(Ok(Done::Answered)) };
        if connection.role != Role::Scheduler {
            return Err(Ok(refuse(Status::WrongRole)));
        }
        if keys.count as usize > KEYS_MAX {
            return Err(Ok(too_many()));
        }
        let Some(shape) = self.registry.get(namespace).map(|known| known.shape) else {
            return Err(Ok(refuse(Status::UnknownNamespace)));
        };
        let count = keys.count as usize;
        // All of it is there, or none of it is done.
        let check = |offset, words| connection.payload().check(offset, words).map_err(Err);
        check(keys.offset, count * KEY_WORDS)?;
        check(answer, count)?;
        let lookup = self.cache.lookup(entry as u8, session, admission, namespace, count);
        Ok(LookupRequest { asked, lookup, shape, asked_tier: false })
    }

    /// Goes on with a lookup. What a piece has found is pinned before the next one; what the last one has found, when the
    /// answer is on its way.
    pub(super) fn lookup(&mut self, request: &mut LookupRequest) -> Result<Done, OutOfArea> {
        let LookupRequest { asked, shape, .. } = *request;
        let Shape { world, chunk_tokens } = shape;
        let (entry, answer, all) = (asked.entry, asked.answer, asked.keys.count);
        loop {
            if self.cache.is_spent() {
                return Ok(Done::More);
            }
            let piece = piece_of(self.cache.left(), world, all - request.lookup.found);
            let Some(connection) = self.entries[entry].connection() else { return Ok(Done::Answered) };
            let payload = connection.payload();
            let keys = &mut self.scratch.keys[..piece];
            let before = request.lookup.found;
            let at = asked.keys.offset + before * KEY_WORDS as u32;
            payload.read(at, bytemuck::cast_slice_mut(keys))?;
            let mut writer = payload.writer(answer + before, piece)?;
            let found = self.cache.find_piece(&request.lookup, keys, &mut |word| {
                writer.push(word.bits());
            });
            let found = match found {
                Ok(found) => found,
                Err(FindError::UnknownNamespace { .. }) => return Ok(refuse(Status::UnknownNamespace)),
                Err(
                    FindError::Busy { .. } | FindError::NoSuchOwner { .. } | FindError::TooManyKeys { .. },
                ) => {
                    self.stat(Stat::LookupsBusy, 1);
                    return Ok(refuse(Status::Busy));
                }
            };
            let chunks = before + found;
            if found as usize == piece && chunks < all {
                self.cache.pin_found();
                request.lookup.found = chunks;
                continue;
            }
            if chunks < all && !request.asked_tier {
                // A lower tier may have more: then the answer comes when it has brought it up.
                let missing = &self.scratch.keys[found as usize..piece];
                if let Some(ticket) = self.tier.begin(asked.namespace, missing)
                    && self.pending.push(asked, ticket)
                {
                    self.stat(Stat::LookupsPending, 1);
                    return Ok(Done::Later);
                }
            }
            let [low, high] = self.segments.arena_id();
            let results = [u64::from(chunks), u64::from(answer), low, high];
            self.complete(entry, asked.operation, Status::Ok, results);
            if let Some(connection) = self.entries[entry].connection_mut() {
                connection.announce();
            }
            // The answer is on its way; what it promised is done before anything else can happen.
            self.cache.pin_found();
            self.stat(Stat::Lookups, 1);
            self.stat(Stat::ChunksAsked, u64::from(all));
            self.stat(Stat::ChunksHit, u64::from(chunks));
            self.stat(Stat::TokensAsked, u64::from(all) * u64::from(chunk_tokens));
            self.stat(Stat::TokensHit, u64::from(chunks) * u64::from(chunk_tokens));
            let AskedLookup { session, admission, .. } = asked;
            let is_over = !request.lookup.is_repeated();
            return Ok(if is_over {
                Done::Answered
            } else {
                Done::Trim { session, admission, keep: chunks }
            });
        }
    }

    /// The session ended, or gave up its lease, while its lookup was pending: answered with nothing.
    pub(super) fn pending_cancel(&mut self, entry: usize, session: u64, admission: Option<u32>) {
        while let Some(lookup) = self.pending.take_session(entry, session, admission) {
            self.complete(entry, lookup.operation, Status::Ok, [0; 4]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_touches_no_more_than_it_may_but_is_never_empty() {
        let chunk = RECORDS * 65;
        assert_eq!(piece_of(u64::MAX, 64, 3), 3);
        assert_eq!(piece_of(u64::MAX, 1, u32::MAX), PIECE);
        assert_eq!([3 * chunk, 3 * chunk - 1, chunk, 0].map(|left| piece_of(left, 64, 100)), [3, 2, 1, 1]);
        assert_eq!(piece_of(0, 64, 0), 0);
    }
}
