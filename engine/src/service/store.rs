//! Stores: reservations, and the commits, aborts and declarations of granted slots; all done piece by piece.

use super::Service;
use super::done::{Done, PIECE, refuse, too_many};
use crate::cache::{self, Aborted, CommitError, Committed, Ears, Going, Invalidated, Reservation, Reserve};
use crate::stats::Stat;
use kvring_shm_abi::failpoint::{self, Place};
use kvring_shm_abi::lobby::Role;
use kvring_shm_abi::message::{
    KEY_WORDS, KEYS_MAX, Key, Record, Records, ReserveAnswer, ReserveOutcome, Round, ShardAnswer,
    SlotOutcome, SlotRecord, Status,
};
use kvring_shm_abi::payload::OutOfArea;

/// The content of a reservation's message.
#[derive(Clone, Copy)]
pub(super) struct ReserveMessage {
    pub(super) round: Round,
    pub(super) namespace: u32,
    pub(super) rank: u32,
    pub(super) keys: Records,
    pub(super) answer: u32,
    pub(super) parent: Option<u32>,
}

/// A reservation that is under way.
#[derive(Clone, Copy)]
pub(super) struct ReserveRequest {
    message: ReserveMessage,
    /// The key that comes before the next one to reserve.
    parent: Option<Key>,
    going: Going,
    /// Keys that have been answered.
    done: u32,
    granted: u64,
    dropped: u64,
}

/// What a worker says of slots that were granted to it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Finish {
    Commit,
    Abort,
    /// After a restart: they are still being written.
    Declare,
}

/// A message about slots, and how far it has been done.
#[derive(Clone, Copy)]
pub(super) struct FinishSlots {
    how: Finish,
    slots: Records,
    answer: u32,
    /// Records that have been answered.
    at: u32,
    done: u64,
    gone: u64,
}

impl Service {
    pub(super) fn begin_reserve(
        &mut self,
        entry: usize,
        message: ReserveMessage,
    ) -> Result<ReserveRequest, Result<Done, OutOfArea>> {
        let Some(connection) = self.entries[entry].connection() else { return Err(Ok(Done::Answered)) };
        if connection.role != Role::Worker {
            return Err(Ok(refuse(Status::WrongRole)));
        }
        if message.keys.count as usize > KEYS_MAX {
            return Err(Ok(too_many()));
        }
        if connection.rank_in(message.namespace) != Some(message.rank) {
            return Err(Ok(refuse(Status::UnknownNamespace)));
        }
        // A message with a range outside the payload area is a breach, and none of it is done.
        let check = |offset, words| connection.payload().check(offset, words).map_err(Err);
        check(message.keys.offset, message.keys.count as usize * KEY_WORDS)?;
        check(message.answer, message.keys.count as usize * ReserveAnswer::WORDS)?;
        let mut parent: Key = [0; KEY_WORDS];
        if let Some(offset) = message.parent {
            connection.payload().read(offset, &mut parent).map_err(Err)?;
        }
        let parent = message.parent.map(|_| parent);
        let going = self.cache.reservation(message.namespace, message.keys.count as usize);
        Ok(ReserveRequest { message, parent, going, done: 0, granted: 0, dropped: 0 })
    }

    /// Goes on with a reservation. The namespace and the rank stay registered meanwhile: nobody else can take them away
    /// from this client.
    pub(super) fn reserve(&mut self, entry: usize, request: &mut ReserveRequest) -> Result<Done, OutOfArea> {
        let message = request.message;
        while request.done < message.keys.count {
            if self.cache.is_spent() {
                return Ok(Done::More);
            }
            let Some(connection) = self.entries[entry].connection() else { return Ok(Done::Answered) };
            let piece = PIECE.min((message.keys.count - request.done) as usize);
            let keys = &mut self.scratch.keys[..piece];
            let at = message.keys.offset + request.done * KEY_WORDS as u32;
            connection.payload().read(at, bytemuck::cast_slice_mut(keys))?;
            let at = message.answer + request.done * ReserveAnswer::WORDS as u32;
            let mut writer = connection.payload().writer(at, piece * ReserveAnswer::WORDS)?;
            let (mut granted, mut skipped, mut dropped) = (0u64, 0u64, 0u64);
            let reserve = Reserve {
                owner: entry as u8,
                nonce: connection.nonce,
                namespace: message.namespace,
                rank: message.rank,
                round: cache::Round { source: message.round.source, number: message.round.number },
                parent: request.parent,
                keys,
            };
            let (entries, schedulers) = (&self.entries, self.schedulers);
            let ears: &mut Ears<'_> = &mut || Service::heard(entries, schedulers);
            let reserved =
                self.cache.reserve_piece(reserve, &mut request.going, ears, &mut |_, reservation| {
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
                });
            self.stat(Stat::ShardsReserved, granted);
            self.stat(Stat::ShardsSkipped, skipped);
            self.stat(Stat::ShardsDropped, dropped);
            // The rank and the count were checked when the request began: the only error left is a namespace that is
            // gone.
            let Ok(done) = reserved else { return Ok(refuse(Status::UnknownNamespace)) };
            request.granted += granted;
            request.dropped += dropped;
            request.done += done as u32;
            if let Some(last) = done.checked_sub(1) {
                request.parent = Some(self.scratch.keys[last]);
            }
            if self.cache.is_waiting() {
                self.listen();
                if request.done < message.keys.count {
                    return Ok(Done::More);
                }
            }
        }
        Ok(Done::Answer(Status::Ok, [request.granted, request.dropped, 0, 0]))
    }

    pub(super) fn begin_slots(
        &self,
        entry: usize,
        slots: Records,
        answer: u32,
        how: Finish,
    ) -> Result<FinishSlots, Result<Done, OutOfArea>> {
        let Some(connection) = self.entries[entry].connection() else { return Err(Ok(Done::Answered)) };
        if connection.role != Role::Worker {
            return Err(Ok(refuse(Status::WrongRole)));
        }
        if slots.count as usize > KEYS_MAX {
            return Err(Ok(too_many()));
        }
        let check = |offset, words| connection.payload().check(offset, words).map_err(Err);
        check(slots.offset, slots.count as usize * SlotRecord::WORDS)?;
        check(answer, slots.count as usize)?;
        Ok(FinishSlots { how, slots, answer, at: 0, done: 0, gone: 0 })
    }

    pub(super) fn finish_slots(
        &mut self,
        entry: usize,
        request: &mut FinishSlots,
    ) -> Result<Done, OutOfArea> {
        let FinishSlots { how, slots, answer, .. } = *request;
        let before = (request.done, request.gone);
        while request.at < slots.count && !self.cache.is_spent() {
            let Some(connection) = self.entries[entry].connection() else { return Ok(Done::Answered) };
            let piece = PIECE.min((slots.count - request.at) as usize);
            let records = &mut self.scratch.slots[..piece];
            let at = slots.offset + request.at * SlotRecord::WORDS as u32;
            connection.payload().read(at, bytemuck::cast_slice_mut(records))?;
            let mut writer = connection.payload().writer(answer + request.at, piece)?;
            for record in records.iter() {
                if self.cache.is_spent() {
                    break;
                }
                let outcome = finish(&mut self.cache, entry as u8, connection.nonce, how, record);
                request.at += 1;
                request.done += u64::from(outcome == SlotOutcome::Done);
                request.gone += u64::from(outcome == SlotOutcome::Gone);
                writer.push(outcome as u64);
            }
        }
        let (done, gone) = (request.done - before.0, request.gone - before.1);
        match how {
            Finish::Commit => self.stat(Stat::ShardsCommitted, done),
            Finish::Abort => self.stat(Stat::ShardsAborted, done),
            Finish::Declare => self.stat(Stat::SlotsDeclared, done),
        }
        if how != Finish::Declare {
            self.stat(Stat::ShardsGone, gone);
        }
        if request.at < slots.count {
            return Ok(Done::More);
        }
        Ok(Done::Answer(Status::Ok, [request.done, request.gone, 0, 0]))
    }

    /// A worker says that a shard is damaged. It may say so of any shard of its own rank. One that lies costs its namespace a
    /// chunk, which any client of that namespace could also have replaced.
    pub(super) fn invalidate(&mut self, entry: usize, slot: u32, generation: u64, key: Key) -> Done {
        let Some(connection) = self.entries[entry].connection() else { return Done::Answered };
        if connection.role != Role::Worker {
            return refuse(Status::WrongRole);
        }
        let reads = |namespace, rank| connection.rank_in(namespace) == Some(rank);
        let invalidated = self.cache.invalidate(slot, generation, key, reads);
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
}

/// One slot's commit, abort or declaration.
fn finish(
    cache: &mut cache::Cache<super::SharedSlots>,
    owner: cache::Owner,
    nonce: u64,
    how: Finish,
    record: &SlotRecord,
) -> SlotOutcome {
    // No slot has an id beyond 32 bits.
    let slot = u32::try_from(record.slot).unwrap_or(u32::MAX);
    let SlotRecord { generation, key, checksum, .. } = *record;
    let outcome = match how {
        Finish::Commit => cache
            .commit(owner, slot, generation, key, checksum)
            .map(|committed| !matches!(committed, Committed::Gone)),
        Finish::Abort => {
            cache.abort(owner, slot, generation, key).map(|aborted| matches!(aborted, Aborted::Freed))
        }
        Finish::Declare => {
            failpoint::here(Place::DeclareSlot);
            // Not adopted is, for one, a slot that the dead engine had committed, and whose answer was lost.
            Ok(cache.adopt(owner, nonce, slot, generation, key))
        }
    };
    match outcome {
        Ok(true) => SlotOutcome::Done,
        Ok(false) => SlotOutcome::Gone,
        Err(CommitError::NoSuchSlot { .. } | CommitError::NotYours { .. } | CommitError::OtherKey { .. }) => {
            SlotOutcome::NotYours
        }
    }
}
