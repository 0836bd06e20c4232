//! After a restart: clients of the earlier engine come back, and say what they still hold.
//!
//! A living client keeps its life word, and with it its entry; so whatever was reserved for that entry is its own, and a
//! message on that entry's channel is all the proof there is to give. What it does not declare is free when it says that it
//! has declared everything. Until all have, or [`Awaited::grace_ns`] has passed, nothing is evicted, cleared or forgotten.

use super::Service;
use super::dispatch::{Done, refuse};
use crate::cache::FindError;
use crate::stats::Stat;
use kvring_shm_abi::failpoint;
use kvring_shm_abi::futex::monotonic_ns;
use kvring_shm_abi::lobby::Role;
use kvring_shm_abi::message::{KEYS_MAX, Key, LeaseRecord, Records, SlotOutcome, Status};
use kvring_shm_abi::payload::OutOfArea;

impl Service {
    /// Serving begins: from now on the grace runs.
    pub(super) fn await_clients(&mut self) {
        if self.awaited.entries != 0 {
            self.awaited.until_ns = monotonic_ns().saturating_add(self.awaited.grace_ns);
            self.cache.hold_evictions(true);
        }
    }

    /// Are clients of the earlier engine waited for? Until they are back, or the grace is over, nothing of what they may
    /// hold is taken away: nothing is evicted, cleared, or forgotten.
    pub(super) fn is_awaiting(&self) -> bool {
        self.cache.evictions_held()
    }

    /// Nobody waits for this client any more: it has declared everything, or is gone.
    pub(super) fn no_longer_awaited(&mut self, entry: usize) {
        let before = self.awaited.entries;
        self.awaited.entries &= !(1 << entry);
        if before != 0 && self.awaited.entries == 0 {
            self.cache.hold_evictions(false);
            tracing::info!("every client of the earlier engine has come back, or is gone");
        }
    }

    /// Somebody does not come back, stopped perhaps: the others' stores wait for it no longer. What it was writing stays
    /// its own; what it has leased may go, and its loads then fail their check.
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

    /// Slots that this entry was writing, and goes on with.
    pub(super) fn declare_slots(
        &mut self,
        entry: usize,
        slots: Records,
        answer: u32,
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
        let mut adopted = 0u64;
        for record in records.iter() {
            // A slot id beyond 32 bits is nobody's.
            let slot = u32::try_from(record.slot).unwrap_or(u32::MAX);
            failpoint::here("declare.slot");
            let is_its = self.cache.adopt(entry as u8, connection.nonce, slot, record.generation, record.key);
            adopted += u64::from(is_its);
            // Committed already, for one: its commit was done, and the answer lost.
            writer.push(if is_its { SlotOutcome::Done } else { SlotOutcome::Gone } as u64);
        }
        self.stat(Stat::SlotsDeclared, adopted);
        Ok(Done::Answer(Status::Ok, [adopted, count as u64 - adopted, 0, 0]))
    }

    /// A lease that this client had: pinned again as far as its chunks are still the same.
    pub(super) fn declare_lease(&mut self, entry: usize, lease: &LeaseMessage) -> Result<Done, OutOfArea> {
        let Some(connection) = &self.connections[entry] else { return Ok(Done::Answered) };
        if connection.role != Role::Scheduler {
            return Ok(refuse(Status::WrongRole));
        }
        let count = lease.chunks.count as usize;
        if count > KEYS_MAX {
            return Ok(Done::Answer(Status::TooMany, [KEYS_MAX as u64, 0, 0, 0]));
        }
        let Some((world, _)) = self.registry.shape(lease.namespace) else {
            return Ok(refuse(Status::UnknownNamespace));
        };
        self.named += count as u32;
        let records = &mut self.scratch.leases[..count];
        connection.payload().read(lease.chunks.offset, bytemuck::cast_slice_mut(records))?;
        let keys: &mut [Key] = &mut self.scratch.keys[..count];
        for (key, record) in keys.iter_mut().zip(records.iter()) {
            *key = record.key;
        }
        let LeaseMessage { session, admission, namespace, .. } = *lease;
        let owner = entry as u8;
        let (mut shard, mut same) = (0usize, 0usize);
        let records: &[LeaseRecord] = records;
        let found = self.cache.find(owner, session, admission, namespace, keys, &mut |found| {
            let (chunk, rank) = (shard / world as usize, shard % world as usize);
            shard += 1;
            let was = records[chunk].shard;
            if rank == 0 && chunk == same && (found.slot, found.generation) == (was.slot(), was.generation) {
                same += 1;
            }
        });
        // Another chunk under the same key is not what its handles lead to.
        let found = match found {
            Ok(chunks) if same < chunks as usize => {
                self.cache.find(owner, session, admission, namespace, &keys[..same], &mut |_| {})
            }
            other => other,
        };
        match found {
            Ok(chunks) => {
                failpoint::here("declare.lease");
                self.cache.pin_found();
                self.stat(Stat::LeasesDeclared, 1);
                self.stat(Stat::ChunksDeclared, u64::from(chunks));
                Ok(Done::Answer(Status::Ok, [u64::from(chunks), 0, 0, 0]))
            }
            Err(FindError::UnknownNamespace { .. }) => Ok(refuse(Status::UnknownNamespace)),
            Err(FindError::Busy { .. } | FindError::NoSuchOwner { .. } | FindError::TooManyKeys { .. }) => {
                Ok(refuse(Status::Busy))
            }
        }
    }

    /// Everything has been declared.
    pub(super) fn declare_end(&mut self, entry: usize) -> Done {
        failpoint::here("declare.end");
        let freed = u64::from(self.cache.declare_end(entry as u8));
        failpoint::here("declare.ended");
        self.stat(Stat::SlotsUndeclared, freed);
        self.no_longer_awaited(entry);
        Done::Answer(Status::Ok, [freed, 0, 0, 0])
    }
}

/// A lease as its client remembers it.
#[derive(Clone, Copy)]
pub(super) struct LeaseMessage {
    pub(super) session: u64,
    pub(super) admission: u32,
    pub(super) namespace: u32,
    pub(super) chunks: Records,
}
