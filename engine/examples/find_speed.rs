//! Measures how long a lookup takes: the nanoseconds of one `find`, by the number of keys and of chunks in the
//! cache. All keys are hits.
//!
//! `cargo run --release -p kvring-engine --example find_speed [world]`: one rank unless given otherwise, shards of
//! 4 KiB, up to 64 random chains that were stored interleaved. *Warm*: random chunks of the whole cache were looked
//! up before. *Cold*: everything was pushed out of the CPU's caches.

use std::hint::black_box;
use std::time::Instant;

use kvring_engine::cache::{
    Cache, CacheConfig, Key, Owner, Reservation, Reserve, Round, ShardHeader, SlotId, SlotTable,
};

/// A table that nobody reads.
struct NoTable;

impl SlotTable for NoTable {
    fn writing(&mut self, _: SlotId, _: u64, _: &ShardHeader) {}
    fn committed(&mut self, _: SlotId, _: u64, _: Owner, _: u64) {}
    fn orphaned(&mut self, _: SlotId, _: u64, _: Owner) {}
    fn hidden(&mut self, _: SlotId) {}
    fn freed(&mut self, _: SlotId, _: u64) {}
    fn span_made(&mut self, _: u32, _: u32, _: u64) {}
    fn span_gone(&mut self, _: u32) {}
    fn touched(&mut self, _: SlotId, _: u64) {}
    fn ensure(&mut self, _: SlotId, _: u32) -> bool {
        true
    }
    fn generation(&self, _: SlotId) -> u64 {
        0
    }
}

const CHAINS_MAX: u64 = 64;
/// How many keys the longest lookup has.
const KEYS_MAX: u64 = 512;
/// How many bytes are read to push the tables out of the CPU's caches.
const FLUSH_BYTES: usize = 64 << 20;

fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb)
}

fn fill(world: u32, chains: &[Vec<Key>]) -> anyhow_free::Result<Cache<NoTable>> {
    let chunks: u64 = chains.iter().map(|chain| chain.len() as u64).sum();
    let slabs = (chunks * u64::from(world) * 4096).div_ceil(16 << 20) as u32 + 1;
    let mut cache = Cache::new(CacheConfig::new(16 << 20, slabs), NoTable)?;
    for slab in 0..slabs {
        cache.add_slab(slab)?;
    }
    for rank in 0..world {
        cache.register(0, world, rank, 4096)?;
    }
    let round = Round { source: 1, number: 1 };
    let mut state = 1;
    let mut at = vec![0; chains.len()];
    let mut slots = Vec::new();
    for _ in 0..chunks {
        let mut chain = random(&mut state) as usize % chains.len();
        while at[chain] == chains[chain].len() {
            chain = (chain + 1) % chains.len();
        }
        let keys = &chains[chain][at[chain]..][..1];
        let parent = at[chain].checked_sub(1).map(|before| chains[chain][before]);
        at[chain] += 1;
        for rank in 0..world {
            let message = Reserve { owner: 0, nonce: 1, namespace: 0, rank, round, parent, keys };
            cache.reserve(message, &mut |_, answer| {
                if let Reservation::Write { slot, generation, .. } = answer {
                    slots.push((slot, generation));
                }
            })?;
        }
        for (slot, generation) in slots.drain(..) {
            cache.commit(0, slot, generation, keys[0], 0)?;
        }
    }
    Ok(cache)
}

mod anyhow_free {
    pub(crate) type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;
}

fn main() -> anyhow_free::Result<()> {
    let world: u32 = std::env::args().nth(1).map_or(Ok(1), |world| world.parse())?;
    println!("world {world}, shards of 4 KiB, at most {CHAINS_MAX} chains; median of each, everything found");
    println!(
        "{:>9} {:>5} {:>12} {:>12} {:>14} {:>12}",
        "chunks", "keys", "warm ns", "cold ns", "cold ns/key", "pin ns"
    );
    let flush = vec![1_u8; FLUSH_BYTES];
    for chunks in [10_000_u64, 100_000, 1_000_000] {
        let mut state = chunks;
        let len = (chunks / CHAINS_MAX).max(KEYS_MAX);
        let count = chunks / len;
        let chains: Vec<Vec<Key>> = (0..count)
            .map(|_| (0..len).map(|_| [random(&mut state), random(&mut state)]).collect())
            .collect();
        let mut cache = fill(world, &chains)?;
        assert_eq!(cache.stats().chunks_visible, len * count);
        for keys in [1_usize, 16, 128, 512] {
            let keys = keys.min(len as usize);
            let mut shards = vec![0_u64; keys * world as usize];
            let mut lookup = |cache: &mut Cache<NoTable>, chain: &[Key]| {
                let mut at = 0;
                let found = cache.find(0, 1, 1, 0, &chain[..keys], &mut |shard| {
                    shards[at] = shard.offset ^ shard.generation ^ u64::from(shard.slot);
                    at += 1;
                });
                black_box(&mut shards);
                assert_eq!(found, Ok(keys as u32));
            };
            // Warm: chunks all over the cache are looked up in between, as in a server that does nothing else.
            let (mut warm, mut cold, mut pin) = (Vec::new(), Vec::new(), Vec::new());
            let mut any_chain = || {
                let chain = &chains[(random(&mut state) % count) as usize];
                &chain[random(&mut state) as usize % (chain.len() - keys + 1)..]
            };
            for _ in 0..8192 {
                let chain = any_chain();
                black_box(chain[..keys].iter().fold(0, |sum, key| sum ^ key[0]));
                let start = Instant::now();
                lookup(&mut cache, chain);
                warm.push(start.elapsed().as_nanos());
            }
            for _ in 0..64 {
                let chain = any_chain();
                black_box(flush.iter().step_by(64).map(|byte| u64::from(*byte)).sum::<u64>());
                // The keys are warm: a caller has just read them from its ring.
                black_box(chain[..keys].iter().fold(0, |sum, key| sum ^ key[0]));
                let start = Instant::now();
                lookup(&mut cache, chain);
                cold.push(start.elapsed().as_nanos());
                let start = Instant::now();
                cache.pin_found();
                pin.push(start.elapsed().as_nanos());
                cache.release(0, 1, 1, 0);
            }
            let median = |mut times: Vec<u128>| {
                times.sort_unstable();
                times[times.len() / 2]
            };
            let (warm, cold, pin) = (median(warm), median(cold), median(pin));
            println!(
                "{:>9} {keys:>5} {warm:>12} {cold:>12} {:>14.1} {pin:>12}",
                len * count,
                cold as f64 / keys as f64
            );
        }
    }
    Ok(())
}
