//! Measures how long a recovery takes, without the segments: a slot table of N committed shards of 4 KiB is read
//! into an empty cache.
//!
//! `cargo run --release -p kvring-engine --example restore_speed [chunks] [world]`

use kvring_engine::cache::{Cache, CacheConfig, Found, Owner, Round, Shard, ShardHeader, SlotId, SlotTable};
use kvring_shm_abi::mapping::{Mapping, View};
use kvring_shm_abi::slot::{ShardIdentity, SlotHeader, SlotState, SlotWord};
use std::sync::Arc;
use std::time::Instant;

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

const SLAB: u64 = 16 << 20;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1).map(|text| text.parse::<u32>());
    let chunks = arguments.next().unwrap_or(Ok(1_000_000))?;
    let world = arguments.next().unwrap_or(Ok(1))?;
    let slots = chunks * world;
    let slabs = (u64::from(slots) * 4096).div_ceil(SLAB) as u32;
    let memory = Arc::new(Mapping::private(slots as usize * 128));
    let headers: View<SlotHeader> = View::new(&memory, 0, slots as usize)?;
    for (slot, header) in headers.iter().enumerate() {
        let chunk = slot as u64 / u64::from(world);
        let identity = ShardIdentity {
            key: [chunk.wrapping_mul(0x9e37_79b9_7f4a_7c15), chunk],
            namespace: 0,
            rank: slot as u32 % world,
            offset: slot as u64 * 4096,
            length: 4096,
        };
        let word = |state| SlotWord { state, owner: 1, generation: 3 };
        header.begin_writing(word(SlotState::Writing), &identity, 5, 6);
        header.commit(word(SlotState::Committed), 7);
        // The chunks are stored in another order than that of the slots.
        header.touch(chunk.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32);
    }
    for _ in 0..5 {
        let began = Instant::now();
        let mut cache = Cache::new(CacheConfig::new(SLAB, slabs), NoTable)?;
        for slab in 0..slabs {
            cache.add_slab(slab)?;
        }
        for rank in 0..world {
            cache.register(0, world, rank, 4096)?;
        }
        let made = began.elapsed();
        for first in 0..slabs {
            cache.restore_span(first, 1, 4096)?;
            for slot in cache.slots_of_span(first) {
                let Some(header) = headers.get(slot as usize) else { break };
                if let Some(soon) = headers.get(slot as usize + 8) {
                    let identity = soon.identity();
                    cache.restore_soon(identity.namespace, identity.key);
                }
                let content = header.read();
                let identity = content.identity;
                let header = ShardHeader {
                    owner: content.word.owner,
                    nonce: content.nonce,
                    key: identity.key,
                    namespace: identity.namespace,
                    rank: identity.rank,
                    round: Round { source: 1, number: 1 },
                    offset: identity.offset,
                    length: identity.length,
                };
                let generation = content.word.generation;
                let shard = Shard { header, generation, found: Found::Committed, tick: content.last_touch };
                cache.restore(slot, &shard)?;
            }
        }
        let read = began.elapsed();
        let restored = cache.restore_end();
        let all = began.elapsed();
        println!(
            "{} chunks: made {:.1} ms, read {:.1} ms ({:.0} ns a slot), ended {:.1} ms ({:.0} ns a chunk)",
            restored.visible,
            made.as_secs_f64() * 1e3,
            (read - made).as_secs_f64() * 1e3,
            (read - made).as_secs_f64() * 1e9 / f64::from(slots),
            (all - read).as_secs_f64() * 1e3,
            (all - read).as_secs_f64() * 1e9 / f64::from(chunks),
        );
    }
    Ok(())
}
