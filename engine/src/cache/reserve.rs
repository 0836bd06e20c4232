//! Reservations: which of a message's chunks one rank writes, and where.

use super::chunk::Life;
use super::error::ReserveError;
use super::evict::{Record, Room, Search};
use super::index::FORMING_MAX;
use super::mark::{Ears, Heard};
use super::slot::State;
use super::{Cache, Key, NamespaceId, OWNERS, Owner, Round, ShardHeader, SlotId, SlotTable};
use crate::policy::ChunkId;
use kvring_shm_abi::directory::Spot;
use kvring_shm_abi::failpoint::{self, Rule};
use kvring_shm_abi::namespace::namespace_index;

/// How many keys ahead the lines of the directory and of the index are prefetched.
const AHEAD: usize = 8;

/// One rank's request to store chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reserve<'a> {
    /// The client that writes.
    pub owner: Owner,
    /// Its attach nonce.
    pub nonce: u64,
    /// The chunks' namespace.
    pub namespace: NamespaceId,
    /// The rank whose shards they are.
    pub rank: u32,
    /// The round to which they belong.
    pub round: Round,
    /// The chunk in front of the first key in its chain, if there is one.
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
    /// The chunk is visible already: there is nothing to do.
    Present,
    /// A newer round of the same source is forming this chunk.
    Superseded,
    /// This rank already has a slot for the chunk in this round.
    Pending {
        /// Whether the slot is COMMITTED; if not, it is WRITING.
        committed: bool,
    },
    /// There is no slot, or too many rounds form this chunk, and nothing may be evicted for it.
    NoSpace,
    /// The client's share is used up.
    Busy,
}

/// How far a reservation has come. One of many keys goes on in pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Going {
    /// Logical time of the access to the next key. Each further key is accessed one tick earlier, as if the chain
    /// had been touched from its tail on.
    time: u64,
    /// The last chunk that was found visible, and its key. The next visible chunk is touched just behind it.
    front: Option<(ChunkId, Key)>,
    search: Search,
}

/// A reservation's message, together with what was looked up once for all its keys.
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
    /// Begins a reservation of this many keys.
    pub fn reservation(&mut self, namespace: NamespaceId, keys: usize) -> Going {
        self.tick += keys as u64;
        self.use_namespace(namespace);
        Going { time: self.tick, front: None, search: Search::default() }
    }

    /// As [`Cache::reserve_piece`], for all keys at once, where nobody holds anything that the cache has not been told.
    ///
    /// # Errors
    ///
    /// As [`Cache::reserve_piece`].
    pub fn reserve(
        &mut self,
        message: Reserve<'_>,
        sink: &mut impl FnMut(usize, Reservation),
    ) -> Result<(), ReserveError> {
        let mut going = self.reservation(message.namespace, message.keys.len());
        let allowed = std::mem::replace(&mut self.allowed, u64::MAX);
        let done = self.reserve_piece(message, &mut going, &mut || Heard::All, sink);
        self.allowed = allowed;
        done.map(|done| debug_assert_eq!(done, message.keys.len()))
    }

    /// Reserves slots for one rank's shards, key by key, until what is allowed is spent, or the service has to listen before
    /// there can be room ([`Cache::is_waiting`]). Returns how many keys were answered. Calls `sink` once for each of them, in order, with its index. The next piece begins at the key
    /// behind the last of them, and has that last key as its `parent`.
    ///
    /// Only *visible* chunks are skipped, and that counts as an access, once for each round. A newer round replaces
    /// an incomplete older one of the same source. The search for room evicts neither `parent` nor the chunks of
    /// this piece. Those of earlier pieces need no guard: they are the warmest, or being written.
    ///
    /// # Errors
    ///
    /// Unknown namespace, rank or owner; too many keys. `sink` was not called then.
    pub fn reserve_piece(
        &mut self,
        message: Reserve<'_>,
        going: &mut Going,
        ears: &mut Ears<'_>,
        sink: &mut impl FnMut(usize, Reservation),
    ) -> Result<usize, ReserveError> {
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
            self.work += keys.len() as u64;
            (0..keys.len()).for_each(|i| sink(i, Reservation::Busy));
            return Ok(keys.len());
        };
        let (class, slot_bytes, shard_bytes) = (layout.class, layout.slot_bytes, layout.shard_bytes);
        let context = Context { message, world, class, slot_bytes, shard_bytes, attachment };

        self.guard_keys(&message);
        let index = namespace_index(namespace);
        let mut before = parent.map(|key| self.spot(index, key));
        let mut done = 0;
        for key in keys {
            if done > 0 && self.is_spent() {
                break;
            }
            let Some(answer) = self.reserve_one(&context, *key, before, going, ears) else { break };
            before = Some(self.spot(index, *key));
            sink(done, answer);
            done += 1;
            going.time -= 1;
        }
        self.chunks.guard = 0;
        Ok(done)
    }

    /// Guards the chunks that the message names: they are not evicted for it.
    fn guard_keys(&mut self, message: &Reserve<'_>) {
        self.guard = self.guard.wrapping_add(1).max(1);
        self.chunks.guard = self.guard;
        let (namespace, keys) = (namespace_index(message.namespace), message.keys);
        self.work += keys.len() as u64;
        for (i, key) in message.parent.iter().chain(keys).enumerate() {
            if let Some(later) = keys.get(i + AHEAD) {
                self.table.chunks().directory().prefetch(self.spot(namespace, *later));
                self.index.prefetch(self.hash(namespace, *later));
            }
            let forming = self.index.forming(&self.chunks, self.hash(namespace, *key), namespace, *key);
            for id in self.visible(namespace, *key).iter().chain(forming.iter()) {
                self.chunks.guard(*id);
                self.spare(*id);
            }
        }
    }

    /// The answer for one key; `None` if there cannot be one yet.
    fn reserve_one(
        &mut self,
        context: &Context<'_>,
        key: Key,
        before: Option<Spot>,
        going: &mut Going,
        ears: &mut Ears<'_>,
    ) -> Option<Reservation> {
        let Reserve { owner, namespace, rank, round, .. } = context.message;
        let namespace = namespace_index(namespace);
        self.work += 1;
        if let Some(id) = self.visible(namespace, key) {
            if self.chunks.get(id).round() != round {
                self.chunks.get_mut(id).set_round(round);
                let is_there = |(id, key): &(ChunkId, Key)| {
                    let chunk = self.chunks.get(*id);
                    chunk.life() == Life::Visible && chunk.key == *key && chunk.namespace == namespace
                };
                let front = going.front.filter(is_there).map(|(front, _)| front);
                self.touch(id, going.time, front);
                going.front = Some((id, key));
            }
            return Some(Reservation::Present);
        }
        let all_forming = self.index.forming(&self.chunks, self.hash(namespace, key), namespace, key);
        let (mut same, mut older) = (None, None);
        for id in all_forming.iter() {
            let forming = self.chunks.get(*id).round();
            let forming = if failpoint::broken(Rule::RoundsInAReservation) { round } else { forming };
            if forming.source == round.source {
                match round.number.wrapping_sub(forming.number) as i32 {
                    0 => same = Some(*id),
                    1.. => older = Some(*id),
                    _ => return Some(Reservation::Superseded),
                }
            }
        }
        if let Some(slot) = same.and_then(|id| self.chunks.shard(id, context.world, rank)) {
            let committed = self.slots.get(slot).state() == State::Committed;
            return Some(Reservation::Pending { committed });
        }
        if self.charges.of[usize::from(owner)].saturating_add(context.slot_bytes)
            > self.config.client_bytes_max
        {
            return Some(Reservation::Busy);
        }
        let mut replaced = older;
        if same.is_none() && older.is_none() && all_forming.len() == FORMING_MAX {
            let idle = all_forming.iter().filter(|id| self.chunks.get(**id).writing == 0);
            replaced = idle.min_by_key(|id| self.chunks.get(**id).tick).copied();
            if replaced.is_none() {
                return Some(self.no_space());
            }
        }
        // The chunks of this key are guarded, so making room does not evict them. The record comes first: without
        // a record, a slot is of no use.
        if same.is_none() && replaced.is_none() {
            match self.make_record(context.world, &mut going.search, ears) {
                Record::There => {}
                Record::None => return Some(self.no_space()),
                Record::Later => return None,
            }
        }
        let slot = match self.take_slot(context.class, &mut going.search, ears) {
            Room::Slot(slot) => slot,
            Room::None => return Some(self.no_space()),
            Room::Later => return None,
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
            None => match self.create_chunk(key, context, before, going.time) {
                Some(id) => id,
                // This cannot happen: `make_record` has made sure of a record, or dropping `replaced` gave one
                // back, and evicting for the slot takes none.
                None => {
                    debug_assert!(false, "a chunk without a record");
                    self.slabs.give(slot, &mut self.slots, &mut self.table);
                    return Some(self.no_space());
                }
            },
        };
        Some(self.begin_writing(context, id, slot, going.time))
    }

    pub(super) fn no_space(&mut self) -> Reservation {
        self.counters.no_space += 1;
        Reservation::NoSpace
    }

    fn create_chunk(
        &mut self,
        key: Key,
        context: &Context<'_>,
        before: Option<Spot>,
        tick: u64,
    ) -> Option<ChunkId> {
        let Reserve { namespace, round, .. } = context.message;
        let namespace = namespace_index(namespace);
        let hash = self.hash(namespace, key);
        let id = self.chunks.create(key, hash, namespace, context.world, round)?;
        debug_assert_eq!(self.chunks.get(id).life(), Life::Forming);
        self.chunks.get_mut(id).tick = tick;
        self.chunks.set_parent(id, before);
        self.chunks.guard(id);
        self.index.insert(&mut self.chunks, id);
        Some(id)
    }

    fn begin_writing(&mut self, context: &Context<'_>, id: ChunkId, slot: SlotId, tick: u64) -> Reservation {
        let Reserve { owner, nonce, namespace, rank, round, .. } = context.message;
        self.work += 2;
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
