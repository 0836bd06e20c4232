//! The simulated cache: the engine's, with everything but the order of eviction left out.

use std::collections::HashMap;

use kvring_engine::policy::{self, ChunkId, NoMemory, Policy, PolicyKind};

use crate::trace::{Trace, TraceRequest};

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
pub(crate) fn hit_rate(
    trace: &Trace,
    policy: PolicyKind,
    capacity_chunks: usize,
) -> Result<SimResult, NoMemory> {
    let mut cache = Cache::new(policy, capacity_chunks)?;
    let (mut hit_blocks, mut hit_tokens) = (0, 0);
    for request in &trace.requests {
        let hit = cache.serve(request) as u64;
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
        evictions: cache.evictions,
    })
}

/// The blocks that are resident, and the policy that evicts them.
struct Cache {
    policy: Box<dyn Policy>,
    resident: HashMap<u64, ChunkId>,
    /// Of each resident chunk, its block and the last request that used it.
    chunks: Vec<(u64, u64)>,
    free: Vec<ChunkId>,
    capacity: usize,
    requests: u64,
    evictions: u64,
}

impl Cache {
    fn new(policy: PolicyKind, capacity: usize) -> Result<Self, NoMemory> {
        let policy = policy::build(policy, capacity)?;
        let (resident, chunks, free) = (HashMap::new(), Vec::new(), Vec::new());
        Ok(Self { policy, resident, chunks, free, capacity, requests: 0, evictions: 0 })
    }

    /// Looks the prompt up, then stores the blocks that are missing. Returns how many of its blocks hit.
    fn serve(&mut self, request: &TraceRequest) -> usize {
        self.requests += 1;
        let blocks = &request.blocks;
        let hit = blocks.iter().take_while(|block| self.resident.contains_key(block)).count();
        let (prefix, rest) = blocks.split_at(hit);
        self.touch_tail_first(prefix);
        // Behind a hole: no hit, but in use again.
        self.touch_tail_first(rest);
        let mut parent = prefix.last().and_then(|block| self.resident.get(block)).copied();
        for &block in rest {
            parent = match self.resident.get(&block) {
                Some(&id) => Some(id),
                None => match self.take_chunk() {
                    Some(id) => {
                        self.insert(id, block, parent);
                        Some(id)
                    }
                    // All that is resident is this prompt: the rest of it is not stored.
                    None => break,
                },
            };
        }
        hit
    }

    fn touch_tail_first(&mut self, blocks: &[u64]) {
        for block in blocks.iter().rev() {
            if let Some(&id) = self.resident.get(block) {
                self.policy.touch(id, None);
                self.chunks[id as usize].1 = self.requests;
            }
        }
    }

    fn insert(&mut self, id: ChunkId, block: u64, parent: Option<ChunkId>) {
        self.policy.insert(0, id, block, parent);
        self.resident.insert(block, id);
        self.chunks[id as usize] = (block, self.requests);
    }

    /// A chunk that is not in use; where all are, the coldest that is not of the present request.
    fn take_chunk(&mut self) -> Option<ChunkId> {
        if let Some(id) = self.free.pop() {
            return Some(id);
        }
        if self.chunks.len() < self.capacity {
            self.chunks.push((0, 0));
            return Some(self.chunks.len() as ChunkId - 1);
        }
        let (chunks, request) = (&self.chunks, self.requests);
        let id = self.policy.victim(0, &mut u32::MAX.clone(), &mut |id| chunks[id as usize].1 != request)?;
        self.policy.remove(id, true);
        self.resident.remove(&self.chunks[id as usize].0);
        self.evictions += 1;
        Some(id)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

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
        let mut cache = Cache::new(lru, 9).unwrap();
        for (blocks, hit) in [(vec![2], 0), (vec![1, 2, 3], 0), (vec![1, 2, 3], 3)] {
            let request = TraceRequest { timestamp_ms: 0, input_tokens: 0, output_tokens: 0, blocks };
            assert_eq!(cache.serve(&request), hit);
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
