//! What an adapter answers, in a form that can be sent to another process.

use kvring_adapter::{ChunkHandle, ChunkWord, Key, LookupStats};
use serde::{Deserialize, Serialize};

/// [`LookupStats`] that can be sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lookups {
    /// Lookups that the engine answered.
    pub answered: u64,
    /// Lookups that were answered with 0 because the engine was not fit to be asked.
    pub degraded: u64,
    /// Lookups that were answered with 0 because no answer came in time.
    pub timed_out: u64,
    /// Lookups that were answered with 0 because the engine refused them.
    pub refused: u64,
}

impl From<LookupStats> for Lookups {
    fn from(stats: LookupStats) -> Lookups {
        let LookupStats { answered, degraded, timed_out, refused } = stats;
        Lookups { answered, degraded, timed_out, refused }
    }
}

impl Lookups {
    /// The lookups since these statistics were as in `before`.
    #[must_use]
    pub fn since(&self, before: &Lookups) -> Lookups {
        Lookups {
            answered: self.answered - before.answered,
            degraded: self.degraded - before.degraded,
            timed_out: self.timed_out - before.timed_out,
            refused: self.refused - before.refused,
        }
    }

    /// Adds others.
    pub fn add(&mut self, other: &Lookups) {
        let Lookups { answered, degraded, timed_out, refused } = other;
        self.answered += answered;
        self.degraded += degraded;
        self.timed_out += timed_out;
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
