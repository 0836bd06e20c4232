//! Reservations: which of a message's chunks one rank is to write, and where.

use super::chunk::{Life, NO_PARENT};
use super::error::ReserveError;
use super::index::FORMING_MAX;
use super::slot::State;
use super::{Cache, Key, NamespaceId, OWNERS, Owner, Round, ShardHeader, SlotId, SlotTable};
use crate::policy::ChunkId;
use kvring_shm_abi::failpoint;

/// Keys whose index lines are asked for in advance.
const AHEAD: usize = 8;

/// What one rank asks to store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reserve<'a> {
    /// Who writes.
    pub owner: Owner,
    /// Its attach nonce.
    pub nonce: u64,
    /// The chunks' namespace.
    pub namespace: NamespaceId,
    /// Whose parts.
    pub rank: u32,
    /// The store that they belong to.
    pub round: Round,
    /// The chunk just before the first key in its chain, if there is one.
    pub parent: Option<Key>,
    /// A chain, head first.
    pub keys: &'a [Key],
}

/// The answer for one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reservation {
    /// Write the shard there, then commit or abort.
    Write {
        /// The slot.
        slot: SlotId,
        /// Its generation.
        generation: u64,
        /// First byte in the arena.
        offset: u64,
    },
    /// Visible already: nothing to do.
    Present,
    /// A newer round of the same source forms this chunk.
    Superseded,
    /// This rank has a slot for it in this round already.
    Pending {
        /// Whether that is COMMITTED, else it is being written.
        committed: bool,
    },
    /// No slot, or too many rounds form this chunk, and nothing may be evicted for it.
    NoSpace,
    /// The client is charged with as much as it may be.
    Busy,
}

/// A reservation's message, with what was looked up for it once.
#[derive(Clone, Copy)]
struct Context<'a> {
    message: Reserve<'a>,
    world: u32,
    class: u16,
    slot_bytes: u64,
    shard_bytes: u64,
    attachment: u8,
}

impl<T: SlotTable> Cache<T> {
    /// Reserves slots for one rank's shards. `sink` is called once for each key, in order, with its index.
    ///
    /// Only *visible* chunks are skipped; that counts as an access once for each round. A newer round of the same source
    /// replaces an older one that is incomplete. Neither the message's own chunks nor `parent` are evicted for it.
    ///
    /// # Errors
    ///
    /// Unknown namespace, rank or owner; too many keys. Then `sink` was not called.
    pub fn reserve(
        &mut self,
        message: Reserve<'_>,
        sink: &mut impl FnMut(usize, Reservation),
    ) -> Result<(), ReserveError> {
        self.change();
        let Reserve { owner, nonce, namespace, rank, parent, keys, .. } = message;
        if usize::from(owner) >= OWNERS {
            return Err(ReserveError::NoSuchOwner { owner });
        }
        let most = self.config.keys_max as usize;
        if keys.len() > most {
            return Err(ReserveError::TooManyKeys { keys: keys.len(), most });
        }
        let registered = self.namespace(namespace).ok_or(ReserveError::UnknownNamespace { namespace })?;
        if !registered.has(rank) {
            return Err(ReserveError::UnknownRank { namespace, rank });
        }
        let layout = registered.layouts[rank as usize];
        let world = registered.world;
        let Some(attachment) = self.slots.attach(owner, nonce) else {
            (0..keys.len()).for_each(|i| sink(i, Reservation::Busy));
            return Ok(());
        };
        let (class, slot_bytes, shard_bytes) = (layout.class, layout.slot_bytes, layout.shard_bytes);
        let context = Context { message, world, class, slot_bytes, shard_bytes, attachment };

        self.use_namespace(namespace);
        self.guard_keys(&message);
        // The head gets the latest time, as if the chain had been touched tail first.
        self.tick += keys.len() as u64 + 1;
        self.present.clear();
        let mut before = parent.map_or(NO_PARENT, |key| self.hash(namespace, key).bits());
        let mut starved = false;
        for (i, key) in keys.iter().enumerate() {
            let tick = self.tick - i as u64;
            let answer = self.reserve_one(&context, *key, before, tick, &mut starved, i);
            before = self.hash(namespace, *key).bits();
            sink(i, answer);
        }
        for at in (0..self.present.len()).rev() {
            let (id, i) = self.present[at];
            self.touch(id, self.tick - u64::from(i));
        }
        self.chunks.guard = 0;
        Ok(())
    }

    /// Keeps what the message names from being evicted for it.
    fn guard_keys(&mut self, message: &Reserve<'_>) {
        self.guard = self.guard.wrapping_add(1).max(1);
        self.chunks.guard = self.guard;
        let (seed, namespace, keys) = (self.config.seed, message.namespace, message.keys);
        for (i, key) in message.parent.iter().chain(keys).enumerate() {
            if let Some(later) = keys.get(i + AHEAD) {
                self.index.prefetch(super::Hash::new(seed, namespace, *later));
            }
            let hash = super::Hash::new(seed, namespace, *key);
            let matches = self.index.matches(&self.chunks, hash, namespace as u8, *key);
            for id in matches.visible.iter().chain(matches.forming()) {
                self.chunks.guard(*id);
            }
        }
    }

    fn reserve_one(
        &mut self,
        context: &Context<'_>,
        key: Key,
        before: u32,
        tick: u64,
        starved: &mut bool,
        i: usize,
    ) -> Reservation {
        let Reserve { owner, namespace, rank, round, .. } = context.message;
        let hash = self.hash(namespace, key);
        let matches = self.index.matches(&self.chunks, hash, namespace as u8, key);
        if let Some(id) = matches.visible {
            if self.chunks.get(id).round() != round {
                self.chunks.get_mut(id).set_round(round);
                self.present.push((id, i as u32));
            }
            return Reservation::Present;
        }
        let (mut same, mut older) = (None, None);
        for id in matches.forming() {
            let forming = self.chunks.get(*id).round();
            let forming = if failpoint::broken("rounds in a reservation") { round } else { forming };
            if forming.source == round.source {
                match round.number.wrapping_sub(forming.number) as i32 {
                    0 => same = Some(*id),
                    1.. => older = Some(*id),
                    _ => return Reservation::Superseded,
                }
            }
        }
        if let Some(slot) = same.and_then(|id| self.chunks.shard(id, context.world, rank)) {
            return Reservation::Pending { committed: self.slots.get(slot).state() == State::Committed };
        }
        if self.charges.of[usize::from(owner)].saturating_add(context.slot_bytes)
            > self.config.client_bytes_max
        {
            return Reservation::Busy;
        }
        let mut replaced = older;
        if same.is_none() && older.is_none() && matches.forming().len() == FORMING_MAX {
            let idle = matches.forming().iter().filter(|id| self.chunks.get(**id).writing == 0);
            replaced = idle.min_by_key(|id| self.chunks.get(**id).tick).copied();
            if replaced.is_none() {
                self.counters.no_space += 1;
                return Reservation::NoSpace;
            }
        }
        // What matched is guarded, so making room leaves it as it is. The record first: without one, a slot is of no use.
        let has_record = same.is_some() || replaced.is_some() || self.make_record(context.world);
        if !has_record {
            self.counters.no_space += 1;
            return Reservation::NoSpace;
        }
        let Some(slot) = self.take_slot(context.class, starved) else {
            self.counters.no_space += 1;
            return Reservation::NoSpace;
        };
        if let Some(id) = replaced {
            self.drop_chunk(id, false);
        }
        let id = match same {
            Some(id) => {
                if self.chunks.get(id).writing == 0 {
                    self.chunks.idle_remove(id);
                }
                id
            }
            None => match self.create_chunk(key, context, before, tick) {
                Some(id) => id,
                None => {
                    self.slabs.give(slot, &mut self.slots, &mut self.table);
                    self.counters.no_space += 1;
                    return Reservation::NoSpace;
                }
            },
        };
        self.begin_writing(context, id, slot, tick)
    }

    fn create_chunk(&mut self, key: Key, context: &Context<'_>, before: u32, tick: u64) -> Option<ChunkId> {
        let Reserve { namespace, round, .. } = context.message;
        let hash = self.hash(namespace, key);
        let id = self.chunks.create(key, hash, namespace as u8, context.world, round)?;
        debug_assert_eq!(self.chunks.get(id).life(), Life::Forming);
        self.chunks.get_mut(id).tick = tick;
        self.chunks.set_parent(id, before);
        self.chunks.guard(id);
        self.index.insert(&mut self.chunks, id);
        Some(id)
    }

    fn begin_writing(&mut self, context: &Context<'_>, id: ChunkId, slot: SlotId, tick: u64) -> Reservation {
        let Reserve { owner, nonce, namespace, rank, round, .. } = context.message;
        self.slots.begin_writing(slot, context.attachment, id, rank as u8);
        self.slabs.busy(slot);
        self.chunks.set_shard(id, context.world, rank, Some(slot));
        self.chunks.get_mut(id).writing += 1;
        self.charges.of[usize::from(owner)] += context.slot_bytes;
        let (generation, offset) = (self.slots.get(slot).generation(), self.slabs.offset(slot));
        let key = self.chunks.get(id).key;
        let length = context.shard_bytes;
        let header = ShardHeader { owner, nonce, key, namespace, rank, round, offset, length };
        self.table.writing(slot, generation, &header);
        self.table.touched(slot, tick);
        Reservation::Write { slot, generation, offset }
    }
}
