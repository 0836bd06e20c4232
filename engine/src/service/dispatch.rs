//! Requests: copied out once, checked, done, answered.
//!
//! Three ways to be wrong. A request that this client may not make, or that cannot be met, is answered with a status.
//! One of another life is ignored. One that no correct client can send (an unknown opcode, a range outside the payload
//! area, a ring that jumps) is a breach: the client is detached and nobody else notices.

use super::declare::LeaseMessage;
use super::{BATCH, KEYS_PER_TURN, Service};
use crate::cache::{self, Aborted, CommitError, Committed, FindError, Invalidated, Reservation, Reserve};
use crate::stats::Stat;
use crate::tier::PendingLookup;
use kvring_shm_abi::lobby::Role;
use kvring_shm_abi::message::{
    ANY_NAMESPACE, Completion, Ident, KEY_WORDS, KEYS_MAX, Key, LeaseRecord, Record, Records, Request,
    ReserveAnswer, ReserveOutcome, ShardAnswer, SlotOutcome, SlotRecord, Status,
};
use kvring_shm_abi::payload::OutOfArea;

/// Memory for one request's arguments, taken at start.
pub(super) struct Scratch {
    pub(super) keys: Box<[Key]>,
    pub(super) slots: Box<[SlotRecord]>,
    pub(super) leases: Box<[LeaseRecord]>,
}

impl Scratch {
    pub(super) fn new() -> Scratch {
        Scratch {
            keys: vec![[0; 2]; KEYS_MAX].into_boxed_slice(),
            slots: vec![<SlotRecord as bytemuck::Zeroable>::zeroed(); KEYS_MAX].into_boxed_slice(),
            leases: vec![<LeaseRecord as bytemuck::Zeroable>::zeroed(); KEYS_MAX].into_boxed_slice(),
        }
    }
}

/// How a request ended, if not in a breach.
pub(super) enum Done {
    /// Now, with these results.
    Answer(Status, [u64; 4]),
    /// The answer comes later.
    Later,
    /// The answer has been given.
    Answered,
}

const OK: Done = Done::Answer(Status::Ok, [0; 4]);

pub(super) fn refuse(status: Status) -> Done {
    Done::Answer(status, [0; 4])
}

impl Service {
    /// Takes up to [`BATCH`] requests of one client. True when there was one.
    #[inline]
    pub(super) fn serve(&mut self, entry: usize) -> bool {
        let mut worked = false;
        self.named = 0;
        for _ in 0..BATCH {
            if self.named >= KEYS_PER_TURN {
                break;
            }
            let Some(connection) = &mut self.connections[entry] else { break };
            let body = match connection.pop() {
                Ok(Some(body)) => body,
                Ok(None) => break,
                Err(jump) => {
                    self.breach(entry, &jump);
                    return true;
                }
            };
            worked = true;
            let expected = connection.ident;
            match Request::decode(&body) {
                Ok((operation, ident, request)) if ident == expected => {
                    self.request(entry, operation, ident, &request);
                }
                // Of another life: ignored.
                Ok(_) => self.stat(Stat::StaleRequests, 1),
                Err(malformed) => self.breach(entry, &malformed),
            }
        }
        if worked && self.connections[entry].as_mut().is_some_and(|connection| connection.announce()) {
            self.stat(Stat::Wakes, 1);
        }
        worked
    }

    #[inline(always)]
    fn request(&mut self, entry: usize, operation: u16, ident: Ident, request: &Request) {
        self.stat(Stat::Requests, 1);
        if self.unhealthy && !matches!(request, Request::Detach | Request::Noop) {
            return self.complete(entry, operation, ident, Status::Busy, [0; 4]);
        }
        let done = match *request {
            Request::Noop => Ok(OK),
            Request::Detach => {
                self.complete(entry, operation, ident, Status::Ok, [0; 4]);
                if let Some(connection) = &mut self.connections[entry] {
                    connection.announce();
                }
                self.leave(entry);
                return;
            }
            Request::Lookup { session, admission, namespace, keys, answer } => {
                let lookup = PendingLookup {
                    entry,
                    operation,
                    session,
                    admission,
                    namespace,
                    keys,
                    answer,
                    ticket: None,
                };
                self.lookup(ident, lookup)
            }
            Request::Release { session, admission, keep } => {
                self.pending_cancel(entry, session, Some(admission));
                self.cache.release(entry as u8, session, admission, keep);
                Ok(OK)
            }
            Request::EndSession { session } => {
                self.pending_cancel(entry, session, None);
                self.cache.end_session(entry as u8, session);
                Ok(OK)
            }
            Request::Register { record } => self.register(entry, record).map(|(s, r)| Done::Answer(s, r)),
            Request::Unregister { namespace } => Ok(self.unregister(entry, namespace)),
            Request::Reserve { round, namespace, rank, keys, answer, parent } => {
                self.reserve(entry, ReserveMessage { round, namespace, rank, keys, answer, parent })
            }
            Request::Commit { slots, answer } => self.finish_slots(entry, slots, answer, true),
            Request::Abort { slots, answer } => self.finish_slots(entry, slots, answer, false),
            Request::Clear { namespace } => {
                let which = (namespace != ANY_NAMESPACE).then_some(namespace);
                let begun = self.begin_clear(entry, operation, ident, which);
                Ok(if begun { Done::Later } else { refuse(Status::Busy) })
            }
            Request::DeclareSlots { slots, answer } => self.declare_slots(entry, slots, answer),
            Request::DeclareLease { session, admission, namespace, chunks } => {
                self.declare_lease(entry, &LeaseMessage { session, admission, namespace, chunks })
            }
            Request::DeclareEnd => Ok(self.declare_end(entry)),
            Request::Invalidate { slot, generation, key } => {
                Ok(self.invalidate(entry, slot, generation, key))
            }
        };
        match done {
            Ok(Done::Answer(status, results)) => self.complete(entry, operation, ident, status, results),
            Ok(Done::Later | Done::Answered) => {}
            Err(breach) => self.breach(entry, &breach),
        }
    }

    /// Publishes a completion.
    #[inline]
    pub(super) fn complete(
        &mut self,
        entry: usize,
        operation: u16,
        ident: Ident,
        status: Status,
        results: [u64; 4],
    ) {
        if let Some(connection) = &mut self.connections[entry] {
            connection.push(&Completion { operation, ident, status, results });
        }
    }

    fn has_role(&self, entry: usize, role: Role) -> bool {
        self.connections[entry].as_ref().is_some_and(|connection| connection.role == role)
    }

    fn lookup(&mut self, ident: Ident, lookup: PendingLookup) -> Result<Done, OutOfArea> {
        let entry = lookup.entry;
        if !self.has_role(entry, Role::Scheduler) {
            return Ok(refuse(Status::WrongRole));
        }
        let Some(connection) = &self.connections[entry] else { return Ok(Done::Answered) };
        let count = lookup.keys.count as usize;
        if count > KEYS_MAX {
            return Ok(Done::Answer(Status::TooMany, [KEYS_MAX as u64, 0, 0, 0]));
        }
        let Some((world, chunk_tokens)) = self.registry.shape(lookup.namespace) else {
            return Ok(refuse(Status::UnknownNamespace));
        };
        let count = count.min(lookup.answer.count as usize / world as usize);
        self.named += count as u32;
        let keys = &mut self.scratch.keys[..count];
        connection.payload().read(lookup.keys.offset, bytemuck::cast_slice_mut(keys))?;
        let answer = lookup.answer.offset;
        let mut writer =
            connection.payload().writer(answer, lookup.answer.count as usize * ShardAnswer::WORDS)?;
        let found = self.cache.find(
            entry as u8,
            lookup.session,
            lookup.admission,
            lookup.namespace,
            keys,
            &mut |shard| {
                for word in ShardAnswer::new(shard.slot, shard.offset, shard.generation).words() {
                    writer.push(word);
                }
            },
        );
        let chunks = match found {
            Ok(chunks) => chunks,
            Err(FindError::UnknownNamespace { .. }) => return Ok(refuse(Status::UnknownNamespace)),
            Err(FindError::Busy { .. } | FindError::NoSuchOwner { .. } | FindError::TooManyKeys { .. }) => {
                self.stat(Stat::LookupsBusy, 1);
                return Ok(refuse(Status::Busy));
            }
        };
        if (chunks as usize) < count && lookup.ticket.is_none() {
            // A lower tier may have the rest: then the answer comes when it has brought it up.
            let missing = &self.scratch.keys[chunks as usize..count];
            if let Some(ticket) = self.tier.begin(lookup.namespace, missing)
                && self.pending.push(PendingLookup { ticket: Some(ticket), ..lookup })
            {
                self.stat(Stat::LookupsPending, 1);
                return Ok(Done::Later);
            }
        }
        let [low, high] = self.segments.arena_id();
        self.complete(
            entry,
            lookup.operation,
            ident,
            Status::Ok,
            [u64::from(chunks), u64::from(answer), low, high],
        );
        if let Some(connection) = &mut self.connections[entry] {
            connection.announce();
        }
        // The answer is on its way; what it promised is done before anything else can happen.
        self.cache.pin_found();
        self.stat(Stat::Lookups, 1);
        self.stat(Stat::ChunksAsked, count as u64);
        self.stat(Stat::ChunksHit, u64::from(chunks));
        self.stat(Stat::TokensAsked, count as u64 * u64::from(chunk_tokens));
        self.stat(Stat::TokensHit, u64::from(chunks) * u64::from(chunk_tokens));
        Ok(Done::Answered)
    }

    /// Lookups that waited for a lower tier. True when one was answered.
    pub(super) fn settle_pending(&mut self) -> bool {
        let mut settled = false;
        while let Some(lookup) = self.pending.take_ready(&mut *self.tier) {
            settled = true;
            let (entry, operation) = (lookup.entry, lookup.operation);
            let Some(ident) = self.connections[entry].as_ref().map(|connection| connection.ident) else {
                continue;
            };
            match self.lookup(ident, lookup) {
                Ok(Done::Answer(status, results)) => self.complete(entry, operation, ident, status, results),
                Ok(Done::Later | Done::Answered) => {}
                Err(breach) => self.breach(entry, &breach),
            }
            if let Some(connection) = &mut self.connections[entry] {
                connection.announce();
            }
        }
        settled
    }

    /// The session ended, or gave up its lease, while its lookup was pending: answered with nothing.
    fn pending_cancel(&mut self, entry: usize, session: u64, admission: Option<u32>) {
        while let Some(lookup) = self.pending.take_session(entry, session, admission) {
            let Some(ident) = self.connections[entry].as_ref().map(|connection| connection.ident) else {
                return;
            };
            self.complete(entry, lookup.operation, ident, Status::Ok, [0; 4]);
        }
    }

    fn reserve(&mut self, entry: usize, message: ReserveMessage) -> Result<Done, OutOfArea> {
        let Some(connection) = &self.connections[entry] else { return Ok(Done::Answered) };
        if connection.role != Role::Worker {
            return Ok(refuse(Status::WrongRole));
        }
        let count = message.keys.count as usize;
        if count > KEYS_MAX {
            return Ok(Done::Answer(Status::TooMany, [KEYS_MAX as u64, 0, 0, 0]));
        }
        if connection.rank_in(message.namespace) != Some(message.rank) {
            return Ok(refuse(Status::UnknownNamespace));
        }
        self.named += count as u32;
        let keys = &mut self.scratch.keys[..count];
        connection.payload().read(message.keys.offset, bytemuck::cast_slice_mut(keys))?;
        let mut parent: Key = [0; KEY_WORDS];
        if let Some(offset) = message.parent {
            connection.payload().read(offset, &mut parent)?;
        }
        let mut writer = connection.payload().writer(message.answer, count * ReserveAnswer::WORDS)?;
        let (mut granted, mut skipped, mut dropped) = (0u64, 0u64, 0u64);
        let reserved = self.cache.reserve(
            Reserve {
                owner: entry as u8,
                nonce: connection.nonce,
                namespace: message.namespace,
                rank: message.rank,
                round: cache::Round { source: message.round.source, number: message.round.number },
                parent: message.parent.map(|_| parent),
                keys,
            },
            &mut |_, reservation| {
                let answer = match reservation {
                    Reservation::Write { slot, generation, offset } => {
                        granted += 1;
                        ReserveAnswer::write(ShardAnswer::new(slot, offset, generation))
                    }
                    Reservation::Present => {
                        skipped += 1;
                        ReserveAnswer::skip(ReserveOutcome::Present)
                    }
                    Reservation::Pending { .. } => {
                        skipped += 1;
                        ReserveAnswer::skip(ReserveOutcome::Held)
                    }
                    Reservation::Superseded => {
                        skipped += 1;
                        ReserveAnswer::skip(ReserveOutcome::Superseded)
                    }
                    Reservation::NoSpace => {
                        dropped += 1;
                        ReserveAnswer::skip(ReserveOutcome::NoSpace)
                    }
                    Reservation::Busy => {
                        dropped += 1;
                        ReserveAnswer::skip(ReserveOutcome::Busy)
                    }
                };
                for word in answer.words() {
                    writer.push(word);
                }
            },
        );
        self.stat(Stat::ShardsReserved, granted);
        self.stat(Stat::ShardsSkipped, skipped);
        self.stat(Stat::ShardsDropped, dropped);
        match reserved {
            Ok(()) => Ok(Done::Answer(Status::Ok, [granted, dropped, 0, 0])),
            // The rank was compared above with what this client registered, the count with the limit: what is left is a
            // namespace that is gone.
            Err(_) => Ok(refuse(Status::UnknownNamespace)),
        }
    }

    fn finish_slots(
        &mut self,
        entry: usize,
        slots: Records,
        answer: u32,
        commit: bool,
    ) -> Result<Done, OutOfArea> {
        let Some(connection) = &self.connections[entry] else { return Ok(Done::Answered) };
        if connection.role != Role::Worker {
            return Ok(refuse(Status::WrongRole));
        }
        let count = slots.count as usize;
        if count > KEYS_MAX {
            return Ok(Done::Answer(Status::TooMany, [KEYS_MAX as u64, 0, 0, 0]));
        }
        self.named += count as u32;
        let records = &mut self.scratch.slots[..count];
        connection.payload().read(slots.offset, bytemuck::cast_slice_mut(records))?;
        let mut writer = connection.payload().writer(answer, count)?;
        let (mut done, mut gone) = (0u64, 0u64);
        for record in records.iter() {
            // A slot id beyond 32 bits is nobody's.
            let slot = u32::try_from(record.slot).unwrap_or(u32::MAX);
            let outcome = if commit {
                let committed =
                    self.cache.commit(entry as u8, slot, record.generation, record.key, record.checksum);
                committed.map(|committed| !matches!(committed, Committed::Gone))
            } else {
                let aborted = self.cache.abort(entry as u8, slot, record.generation, record.key);
                aborted.map(|aborted| matches!(aborted, Aborted::Freed))
            };
            let outcome = match outcome {
                Ok(true) => {
                    done += 1;
                    SlotOutcome::Done
                }
                Ok(false) => {
                    gone += 1;
                    SlotOutcome::Gone
                }
                Err(
                    CommitError::NoSuchSlot { .. }
                    | CommitError::NotYours { .. }
                    | CommitError::OtherKey { .. },
                ) => SlotOutcome::NotYours,
            };
            writer.push(outcome as u64);
        }
        self.stat(if commit { Stat::ShardsCommitted } else { Stat::ShardsAborted }, done);
        self.stat(Stat::ShardsGone, gone);
        Ok(Done::Answer(Status::Ok, [done, gone, 0, 0]))
    }

    /// Any worker may say it of a shard that it reads itself. One that lies costs its own namespace a chunk, which any
    /// client of that could also have replaced.
    fn invalidate(&mut self, entry: usize, slot: u32, generation: u64, key: Key) -> Done {
        let Some(connection) = &self.connections[entry] else { return Done::Answered };
        if connection.role != Role::Worker {
            return refuse(Status::WrongRole);
        }
        let mut ranks = 0;
        let invalidated = self.cache.invalidate(slot, generation, key, |namespace, rank| {
            ranks = self.registry.shape(namespace).map_or(0, |(world, _)| world);
            connection.rank_in(namespace) == Some(rank)
        });
        // Each rank's slot is touched, as a key is.
        self.named += ranks;
        let outcome = match invalidated {
            Invalidated::Dropped | Invalidated::Hidden => {
                self.stat(Stat::ChunksInvalidated, 1);
                tracing::debug!(
                    entry,
                    slot,
                    "a worker found a shard damaged; lookups do not find its chunk any more"
                );
                SlotOutcome::Done
            }
            Invalidated::Gone => SlotOutcome::Gone,
            Invalidated::Refused => SlotOutcome::NotYours,
        };
        Done::Answer(Status::Ok, [outcome as u64, 0, 0, 0])
    }

    fn unregister(&mut self, entry: usize, namespace: u32) -> Done {
        let forgot = self.connections[entry].as_mut().is_some_and(|c| c.forget_rank(namespace));
        if forgot { OK } else { refuse(Status::UnknownNamespace) }
    }
}

#[derive(Clone, Copy)]
struct ReserveMessage {
    round: kvring_shm_abi::message::Round,
    namespace: u32,
    rank: u32,
    keys: Records,
    answer: u32,
    parent: Option<u32>,
}
