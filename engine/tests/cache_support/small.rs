//! Small caches and the steps that tests take in them. Each rank's shards are written by the client entry of the
//! same number.

use kvring_engine::cache::{
    Cache, CacheConfig, Committed, Key, Leaving, Owner, Parting, Reservation, Reserve, Round, SlotId,
};

use super::{ShardRef, VecTable, look_up};
use std::ops::Range;

pub(crate) const SLAB_BYTES: u64 = 1 << 20;
pub(crate) const SLOTS_PER_SLAB: u32 = (SLAB_BYTES / 4096) as u32;
pub(crate) const NONCE: u64 = 77;

pub(crate) fn config(slabs: u32) -> CacheConfig {
    CacheConfig { keys_max: 512, ..CacheConfig::new(SLAB_BYTES, slabs) }
}

pub(crate) fn cache_of(config: CacheConfig, ranks: &[u64]) -> Cache<VecTable> {
    let slots = (config.slab_count * SLOTS_PER_SLAB) as usize;
    let mut cache = Cache::new(config, VecTable::new(slots)).unwrap();
    for slab in 0..config.slab_count {
        cache.add_slab(slab).unwrap();
    }
    register(&mut cache, 0, ranks);
    cache
}

pub(crate) fn cache(slabs: u32, ranks: &[u64]) -> Cache<VecTable> {
    cache_of(config(slabs), ranks)
}

pub(crate) fn register(cache: &mut Cache<VecTable>, namespace: u32, ranks: &[u64]) {
    for (rank, bytes) in ranks.iter().enumerate() {
        cache.register(namespace, ranks.len() as u32, rank as u32, *bytes).unwrap();
    }
}

pub(crate) const fn round(number: u32) -> Round {
    Round { source: 1, number }
}

/// Asks for slots in namespace 0; the client entry has the rank's number.
pub(crate) fn message(rank: u32, round: Round, keys: &[Key]) -> Reserve<'_> {
    Reserve { owner: rank as u8, nonce: NONCE, namespace: 0, rank, round, parent: None, keys }
}

/// Reserves in namespace 0; the client entry has the rank's number.
pub(crate) fn reserve(
    cache: &mut Cache<VecTable>,
    rank: u32,
    round: Round,
    keys: &[Key],
) -> Vec<Reservation> {
    reserve_in(cache, 0, rank, round, keys)
}

pub(crate) fn reserve_in(
    cache: &mut Cache<VecTable>,
    namespace: u32,
    rank: u32,
    round: Round,
    keys: &[Key],
) -> Vec<Reservation> {
    let mut answers = Vec::new();
    let message = Reserve { namespace, ..message(rank, round, keys) };
    cache.reserve(message, &mut |_, answer| answers.push(answer)).unwrap();
    cache.check_all().unwrap();
    answers
}

/// Reserves one slot of rank 0, without a self-check: for many of them in a large cache.
pub(crate) fn reserve_quietly(cache: &mut Cache<VecTable>, key: Key) -> (SlotId, u64) {
    let mut answers = Vec::new();
    cache.reserve(message(0, round(1), &[key]), &mut |_, answer| answers.push(answer)).unwrap();
    slot_of(answers[0])
}

pub(crate) fn slot_of(answer: Reservation) -> (SlotId, u64) {
    let Reservation::Write { slot, generation, .. } = answer else { panic!("not to write: {answer:?}") };
    (slot, generation)
}

pub(crate) fn reserve_one(cache: &mut Cache<VecTable>, rank: u32, round: Round, key: Key) -> (SlotId, u64) {
    slot_of(reserve(cache, rank, round, &[key])[0])
}

pub(crate) fn commit(
    cache: &mut Cache<VecTable>,
    rank: u8,
    (slot, generation): (SlotId, u64),
    key: Key,
) -> Committed {
    let committed = cache.commit(rank, slot, generation, key, 0).unwrap();
    cache.check_all().unwrap();
    committed
}

/// Stores chunks of namespace 0 as rank 0.
pub(crate) fn store(cache: &mut Cache<VecTable>, number: u32, keys: &[Key]) {
    store_ranks(cache, 0, 0..1, number, keys);
}

/// Stores the shards of these ranks, rank by rank.
pub(crate) fn store_ranks(
    cache: &mut Cache<VecTable>,
    namespace: u32,
    ranks: Range<u32>,
    number: u32,
    keys: &[Key],
) {
    for rank in ranks {
        for (answer, key) in reserve_in(cache, namespace, rank, round(number), keys).into_iter().zip(keys) {
            if answer != Reservation::Present {
                let (slot, generation) = slot_of(answer);
                cache.commit(rank as u8, slot, generation, *key, 0).unwrap();
            }
        }
        cache.check_all().unwrap();
    }
}

/// Looks up in namespace 0 as client 0. Returns the shards of the chunks that are held.
pub(crate) fn find(cache: &mut Cache<VecTable>, session: u64, keys: &[Key]) -> Vec<ShardRef> {
    let words = look_up(cache, (0, session, 0), 0, keys);
    cache.check_all().unwrap();
    words.into_iter().flat_map(|word| cache.table().shards(word)).collect()
}

/// Does a lookup of `client`'s. Returns how many chunks are held.
pub(crate) fn leased(cache: &mut Cache<VecTable>, client: Owner, session: u64, keys: &[Key]) -> usize {
    let words = look_up(cache, (client, session, 0), 0, keys);
    cache.check_all().unwrap();
    words.len()
}

/// How many of the keys a lookup finds. Leaves no lease, but counts as an access.
pub(crate) fn hits(cache: &mut Cache<VecTable>, keys: &[Key]) -> u32 {
    let found = look_up(cache, (9, 999, 9), 0, keys);
    cache.end_session(9, 999);
    found.len() as u32
}

/// A client parts, all at once.
pub(crate) fn part(cache: &mut Cache<VecTable>, owner: Owner, how: Leaving) {
    assert!(cache.part(&mut Parting::new(owner, how)));
    cache.check_all().unwrap();
}

/// Frees what earlier attachments of this entry are writing. Returns the number of slots.
pub(crate) fn declare_end(cache: &mut Cache<VecTable>, owner: Owner) -> u32 {
    let mut freed = 0;
    assert!(cache.declare_end(owner, &mut freed));
    cache.check_all().unwrap();
    freed
}
