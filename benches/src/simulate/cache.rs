//! The engine's own cache, without an arena: each chunk is a page of nothing.

use anyhow::Result;
use kvring_engine::cache::{
    Cache, CacheConfig, Hold, Key, NoTable, PAGE_BYTES, Reservation, Reserve, Round, SlotTable,
};
use kvring_engine::policy::PolicyKind;
use kvring_rig::content::key_of;
use kvring_shm_abi::lookup::Marked;

use crate::trace::Trace;

/// The smallest slab that there is.
const SLAB_BYTES: u64 = 1 << 20;

/// The result of one policy with one capacity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SimResult {
    /// The policy.
    pub(crate) policy: PolicyKind,
    /// How many chunks the cache could hold.
    pub(crate) capacity_chunks: usize,
    /// Blocks in all prompts.
    pub(crate) prompt_blocks: u64,
    /// Those of them that were in a resident prefix.
    pub(crate) hit_blocks: u64,
    /// Tokens in all prompts.
    pub(crate) prompt_tokens: u64,
    /// Those of them that were in a resident prefix.
    pub(crate) hit_tokens: u64,
    /// Chunks that went to make room.
    pub(crate) evictions: u64,
}

impl SimResult {
    /// The share of prompt blocks that hit: each block counts as `block_tokens` tokens, a partial one too.
    pub(crate) fn hit_rate(&self) -> f64 {
        self.hit_blocks as f64 / (self.prompt_blocks as f64).max(1.0)
    }

    /// The share of prompt tokens that hit: a partial block counts for the tokens in it.
    pub(crate) fn token_hit_rate(&self) -> f64 {
        self.hit_tokens as f64 / (self.prompt_tokens as f64).max(1.0)
    }
}

/// Plays `trace` against one policy with room for `capacity_chunks` blocks, one block a chunk.
pub(crate) fn hit_rate(trace: &Trace, policy: PolicyKind, capacity_chunks: usize) -> Result<SimResult> {
    let longest = trace.requests.iter().map(|request| request.blocks.len()).max().unwrap_or(0);
    let mut cache = new_cache(policy, capacity_chunks, longest)?;
    let (mut hit_blocks, mut hit_tokens) = (0, 0);
    for (number, request) in (0..).zip(&trace.requests) {
        let hit = serve(&mut cache, number, &request.blocks)?;
        hit_blocks += hit;
        hit_tokens += (hit * u64::from(trace.block_tokens)).min(u64::from(request.input_tokens));
    }
    Ok(SimResult {
        policy,
        capacity_chunks,
        prompt_blocks: trace.requests.iter().map(|request| request.blocks.len() as u64).sum(),
        hit_blocks,
        prompt_tokens: trace.input_tokens(),
        hit_tokens,
        evictions: cache.stats().evicted,
    })
}

/// An empty cache that has slots enough for `capacity` chunks, and records for no more. It takes requests of up to `longest`
/// blocks.
fn new_cache(policy: PolicyKind, capacity: usize, longest: usize) -> Result<Cache<NoTable>> {
    let chunks = u32::try_from(capacity)?;
    let slabs = u32::try_from(u64::from(chunks) * PAGE_BYTES / SLAB_BYTES)? + 1;
    let config = CacheConfig {
        chunks_max: chunks,
        keys_max: u32::try_from(longest.max(1))?,
        policy,
        ..CacheConfig::new(SLAB_BYTES, slabs)
    };
    let mut cache = Cache::new(config, NoTable::new(chunks))?;
    (0..slabs).try_for_each(|slab| cache.add_slab(slab))?;
    cache.register(0, 1, 0, PAGE_BYTES)?;
    Ok(cache)
}

/// Looks the prompt of request `number` up, then stores the blocks that are missing. Returns how many of its blocks hit.
fn serve(cache: &mut Cache<NoTable>, number: u32, blocks: &[u64]) -> Result<u64> {
    let keys: Vec<Key> = blocks.iter().map(|block| key_of(*block)).collect();
    let mut words = Vec::new();
    let most = keys.len();
    cache.table().chunks().search(0, keys.iter().copied(), most, Marked::Missing, &mut words);
    let mut hold = Hold::new(0, 0, 0, 0, 0, u32::try_from(words.len())?);
    cache.hold_piece(&mut hold, words)?;
    let hit = hold.held;
    let (prefix, rest) = keys.split_at(hit as usize);
    let (parent, round) = (prefix.last().copied(), Round { source: 0, number });
    let store = Reserve { owner: 0, nonce: 1, namespace: 0, rank: 0, round, parent, keys: rest };
    let mut granted = Vec::new();
    cache.reserve(store, &mut |index, answer| {
        if let Reservation::Write { slot, generation, .. } = answer {
            granted.push((slot, generation, rest[index]));
        }
    })?;
    for (slot, generation, key) in granted {
        cache.commit(0, slot, generation, key, 0)?;
    }
    cache.end_session(0, 0);
    Ok(u64::from(hit))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::trace::TraceRequest;

    /// A trace of prompts of whole blocks, two seconds apart.
    pub(crate) fn trace_of(prompts: &[&[u64]]) -> Trace {
        let requests = prompts.iter().enumerate().map(|(n, blocks)| TraceRequest {
            timestamp_ms: 2000 * n as u64,
            input_tokens: 512 * blocks.len() as u32,
            output_tokens: 1,
            blocks: blocks.to_vec(),
        });
        Trace { name: "hand-made".to_owned(), requests: requests.collect(), block_tokens: 512 }
    }

    fn hits(prompts: &[&[u64]], policy: PolicyKind, capacity: usize) -> (u64, u64) {
        let result = hit_rate(&trace_of(prompts), policy, capacity).unwrap();
        (result.hit_blocks, result.evictions)
    }

    #[test]
    fn hand_made_traces_hit_as_counted_by_hand() {
        let lru = PolicyKind::Lru;
        // The same prompt twice; then one that shares its first block.
        assert_eq!(hits(&[&[1, 2, 3], &[1, 2, 3], &[1, 4]], lru, 4), (4, 0));
        // Room for three: 4 pushes the leaf 3 out, so that the third prompt hits 1 and 2.
        assert_eq!(hits(&[&[1, 2, 3], &[4], &[1, 2, 3]], lru, 3), (2, 2));
        // Room for two: the prompt's own head is never evicted for its tail, which is not stored.
        assert_eq!(hits(&[&[1, 2, 3], &[1, 2, 3]], lru, 2), (2, 0));
        // The same after a hit, which warms a chain from its tail to its head.
        assert_eq!(hits(&[&[1, 2, 3], &[1, 2, 3], &[4], &[1, 2, 3]], lru, 3), (5, 2));
        // 1 is used twice; a burst takes everything in lru, and spares 1 in arc.
        let burst: &[&[u64]] = &[&[1], &[1], &[2], &[3], &[4], &[1]];
        assert_eq!(hits(burst, lru, 3), (1, 2));
        assert_eq!(hits(burst, PolicyKind::Arc, 3), (2, 1));
        // The longest *prefix* counts: 2 is resident behind a hole.
        let mut cache = new_cache(lru, 9, 3).unwrap();
        for (number, blocks, hit) in [(0, &[2][..], 0), (1, &[1, 2, 3], 0), (2, &[1, 2, 3], 3)] {
            assert_eq!(serve(&mut cache, number, blocks).unwrap(), hit);
        }
    }

    #[test]
    fn a_partial_block_counts_whole_as_a_block_and_in_part_as_tokens() {
        let mut trace = trace_of(&[&[1, 2], &[1, 2], &[3]]);
        trace.requests[1].input_tokens = 600;
        let result = hit_rate(&trace, PolicyKind::Lru, 3).unwrap();
        assert_eq!((result.hit_blocks, result.prompt_blocks), (2, 5));
        assert_eq!((result.hit_tokens, result.prompt_tokens), (600, 1024 + 600 + 512));
        assert!(
            (result.hit_rate() - 0.4).abs() < 1e-9 && (result.token_hit_rate() - 600.0 / 2136.0).abs() < 1e-9
        );
    }

    #[test]
    fn the_bundled_slice_gives_the_known_rates() {
        let trace = Trace::bundled().unwrap();
        let distinct_blocks = trace.distinct_blocks();
        assert_eq!(distinct_blocks, 21_514);
        for (percent, lru, arc) in
            [(1.0, 0.037, 0.037), (10.0, 0.043, 0.058), (25.0, 0.108, 0.117), (50.0, 0.174, 0.181)]
        {
            let chunks = (distinct_blocks as f64 * percent / 100.0) as usize;
            for (policy, expected) in [(PolicyKind::Lru, lru), (PolicyKind::Arc, arc)] {
                let rate = hit_rate(&trace, policy, chunks).unwrap().hit_rate();
                assert!(
                    (rate - expected).abs() < 0.002,
                    "{policy} at {percent} %: expected {expected}, got {rate:.4}"
                );
            }
        }
        // In an infinite cache each block misses once.
        for policy in PolicyKind::ALL {
            let ceiling = hit_rate(&trace, policy, distinct_blocks).unwrap();
            assert_eq!(ceiling.hit_blocks, ceiling.prompt_blocks - distinct_blocks as u64);
            assert_eq!(ceiling.evictions, 0);
        }
    }

    #[test]
    fn lru_never_loses_from_more_room() {
        let trace = Trace::bundled().unwrap();
        let hit = |chunks| hit_rate(&trace, PolicyKind::Lru, chunks).unwrap().hit_blocks;
        let hits: Vec<u64> = (1..=20).map(|step| hit(1000 * step)).collect();
        assert!(hits.is_sorted(), "{hits:?}");
    }
}
