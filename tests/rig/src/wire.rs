//! What an adapter answers, in a form that can be sent to another process.

use kvring_adapter::{ChunkHandle, ChunkWord, Key, LookupStats};
use serde::{Deserialize, Serialize};

/// [`LookupStats`] that can be sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lookups {
    /// Lookups that were answered from an engine's tables.
    pub answered: u64,
    /// Of those: while the engine was not serving.
    pub not_serving: u64,
    /// Of those: cut, because the client holds as much as it may.
    pub cut: u64,
    /// Lookups that were answered with 0 because there were no tables that may be read.
    pub degraded: u64,
    /// Lookups that were answered with 0 because not all workers had registered the namespace.
    pub refused: u64,
}

impl From<LookupStats> for Lookups {
    fn from(stats: LookupStats) -> Lookups {
        let LookupStats { answered, not_serving, cut, degraded, refused } = stats;
        Lookups { answered, not_serving, cut, degraded, refused }
    }
}

impl Lookups {
    /// The lookups since these statistics were as in `before`.
    #[must_use]
    pub fn since(&self, before: &Lookups) -> Lookups {
        Lookups {
            answered: self.answered - before.answered,
            not_serving: self.not_serving - before.not_serving,
            cut: self.cut - before.cut,
            degraded: self.degraded - before.degraded,
            refused: self.refused - before.refused,
        }
    }

    /// Adds others.
    pub fn add(&mut self, other: &Lookups) {
        let Lookups { answered, not_serving, cut, degraded, refused } = other;
        self.answered += answered;
        self.not_serving += not_serving;
        self.cut += cut;
        self.degraded += degraded;
        self.refused += refused;
    }
}

/// A [`ChunkHandle`] that can be sent, as vLLM's metadata carries it from the scheduler to the workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handle {
    /// The arena's id.
    pub arena_id: [u64; 2],
    /// The chunk's word.
    pub word: u64,
    /// What the chunk must be.
    pub key: Key,
}

impl From<(ChunkHandle, &Key)> for Handle {
    fn from((chunk, key): (ChunkHandle, &Key)) -> Handle {
        Handle { arena_id: chunk.arena_id, word: chunk.word.bits(), key: *key }
    }
}

impl Handle {
    /// The handle as a worker's adapter takes it.
    #[must_use]
    pub fn chunk(&self) -> ChunkHandle {
        ChunkHandle { arena_id: self.arena_id, word: ChunkWord::from_bits(self.word) }
    }
}
