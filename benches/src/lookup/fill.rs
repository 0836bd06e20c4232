//! The content of the index: chains of chunks, as prompts make them.

use crate::child::Engine;
use anyhow::{Context, ensure};
use kvring_adapter::{Key, PagedKv, Plane, Role, Round, StoreChunk, WorkerAdapter, WorkerOptions};
use kvring_rig::random::mix;
use std::time::Duration;

/// Chunks of a chain: 131 072 tokens at 256 a chunk.
pub(crate) const CHAIN: usize = 512;
/// Bytes of a shard: as little as a slot takes.
pub(crate) const SHARD_BYTES: usize = 4096;
/// The benchmark's namespace.
pub(crate) const FINGERPRINT: [u64; 4] = [0x6b76_7269_6e67, 0x62_656e_6368, 1, 1];
/// Tokens that a chunk stands for.
pub(crate) const CHUNK_TOKENS: u32 = 256;
/// Chains of one store.
const CHAINS_PER_JOB: u64 = 16;
/// Longer than storing them can take.
const PATIENCE: Duration = Duration::from_secs(120);

/// The key at a place of a chain: distinct, and without a pattern.
pub(crate) fn key(chain: u64, at: u64) -> Key {
    [mix(chain.wrapping_mul(0x1_0000_0001).wrapping_add(at)), mix(!chain ^ at.rotate_left(32))]
}

/// The chains of an index of a given size; the last one may be shorter.
pub(crate) struct Chains {
    chunks: u64,
    is_scattered: bool,
}

/// A prime above every size of an index, so that its multiples visit every place once.
const STRIDE: u64 = 4_294_967_311;

/// Where the chunk at this place goes when chunks are scattered over `count` places: far from its neighbours.
fn scattered(at: u64, count: u64) -> u64 {
    (u128::from(at) * u128::from(STRIDE) % u128::from(count)) as u64
}

impl Chains {
    pub(crate) fn new(chunks: u32) -> Chains {
        Chains { chunks: chunks.into(), is_scattered: false }
    }

    /// Stored so that the chunks of a chain lie apart, as after many evictions.
    pub(super) fn scattered(self) -> Chains {
        Chains { is_scattered: true, ..self }
    }

    /// The chunks of all chains.
    pub(super) fn chunks(&self) -> u64 {
        self.chunks
    }

    /// Which chunk of all chains, one behind the other, is stored as this one.
    pub(super) fn stored_as(&self, at: u64) -> u64 {
        if self.is_scattered { scattered(at, self.chunks) } else { at }
    }

    /// Chains of full length.
    pub(super) fn whole(&self) -> u64 {
        self.chunks / CHAIN as u64
    }

    /// All chains.
    pub(crate) fn count(&self) -> u64 {
        self.chunks.div_ceil(CHAIN as u64)
    }

    /// The keys in the order in which they are stored, from the place `first` on, as many as a chain has.
    fn stored(&self, first: u64) -> impl Iterator<Item = Key> {
        (first..(first + CHAIN as u64).min(self.chunks)).map(|at| {
            let at = self.stored_as(at);
            key(at / CHAIN as u64, at % CHAIN as u64)
        })
    }

    /// The keys of a chain.
    pub(crate) fn keys(&self, chain: u64) -> impl Iterator<Item = Key> {
        let length = (self.chunks - chain * CHAIN as u64).min(CHAIN as u64);
        (0..length).map(move |at| key(chain, at))
    }
}

/// Stores all chains through a worker. Every chunk has the same bytes: only their number matters here.
pub(crate) fn fill(engine: &Engine, chains: &Chains) -> anyhow::Result<()> {
    let mut page = vec![0u8; SHARD_BYTES].into_boxed_slice();
    let plane = Plane { base: page.as_mut_ptr(), block_stride: SHARD_BYTES, page_bytes: SHARD_BYTES };
    // SAFETY: one block, which outlives the adapter (it is shut down below, and declared later) and which nobody
    // writes.
    let paged = unsafe { PagedKv::new(vec![plane], 1, 1) }?;
    let client = engine.client(Role::Worker, None)?;
    let mut worker = WorkerAdapter::new(&client, WorkerOptions::new(FINGERPRINT, 1, 0, CHUNK_TOKENS))?;
    worker.register_kv_caches(paged)?;
    let mut stored = 0u64;
    for first in (0..chains.count()).step_by(CHAINS_PER_JOB as usize) {
        for chain in first..(first + CHAINS_PER_JOB).min(chains.count()) {
            let keys = chains.stored(chain * CHAIN as u64);
            let chunks = keys.map(|key| StoreChunk { key, blocks: vec![0] }).collect();
            let round = Round { source: 1, number: chain as u32 + 1 };
            worker.submit_store("fill", round, None, chunks, None)?;
        }
        ensure!(worker.wait_idle(PATIENCE), "storing did not end within {PATIENCE:?}");
        let finished = worker.get_finished();
        stored += finished.stores.iter().map(|(_, _, report)| u64::from(report.stored)).sum::<u64>();
    }
    ensure!(stored == chains.chunks, "expected {} chunks stored, got {stored}", chains.chunks);
    worker.shutdown();
    drop(worker);
    drop(page);
    Ok(())
}

/// The options of a worker of another namespace, which must not touch the index.
pub(super) fn other_worker() -> WorkerOptions {
    WorkerOptions::new(OTHER_FINGERPRINT, 1, 0, CHUNK_TOKENS)
}

/// The busy client's namespace.
pub(super) const OTHER_FINGERPRINT: [u64; 4] = [0x6b76_7269_6e67, 0x62_656e_6368, 1, 2];

/// A buffer of which all pages have been touched.
pub(super) fn touched(bytes: usize) -> anyhow::Result<Box<[u8]>> {
    let mut buffer = Vec::new();
    buffer.try_reserve_exact(bytes).with_context(|| format!("{bytes} bytes of memory"))?;
    buffer.resize(bytes, 1u8);
    Ok(buffer.into_boxed_slice())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn chains_cover_the_index_with_distinct_keys_and_all_are_stored() {
        let chains = Chains::new(1300);
        assert_eq!((chains.whole(), chains.count()), (2, 3));
        let keys: Vec<Key> = (0..chains.count()).flat_map(|chain| chains.keys(chain)).collect();
        assert_eq!(keys.len(), 1300);
        let all: HashSet<_> = keys.iter().collect();
        assert_eq!(all.len(), 1300);
        let stored = |chains: &Chains| -> Vec<Key> {
            (0..chains.count()).flat_map(|chain| chains.stored(chain * CHAIN as u64)).collect()
        };
        assert_eq!(stored(&chains), keys);
        let scattered = stored(&chains.scattered());
        assert_eq!(scattered.len(), 1300);
        assert_eq!(scattered.iter().collect::<HashSet<_>>(), all);
        let place = |key: &Key| scattered.iter().position(|other| other == key).unwrap();
        assert!(keys.windows(2).all(|two| place(&two[0]).abs_diff(place(&two[1])) > 16));
    }
}
