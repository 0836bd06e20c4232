//! What the adapter answers, in a form that can be sent from process to process.

use kvring_adapter::{Key, LookupStats, ShardHandle};
use serde::{Deserialize, Serialize};

/// [`LookupStats`], to be sent.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Lookups {
    /// Answered by the engine.
    pub(crate) answered: u64,
    /// Answered 0 because the engine was not fit to be asked.
    pub(crate) degraded: u64,
    /// Answered 0 because no answer came in time.
    pub(crate) timed_out: u64,
    /// Answered 0 because the engine refused.
    pub(crate) refused: u64,
}

impl From<LookupStats> for Lookups {
    fn from(stats: LookupStats) -> Lookups {
        let LookupStats { answered, degraded, timed_out, refused } = stats;
        Lookups { answered, degraded, timed_out, refused }
    }
}

impl Lookups {
    /// What has come since.
    pub(crate) fn since(&self, before: &Lookups) -> Lookups {
        Lookups {
            answered: self.answered - before.answered,
            degraded: self.degraded - before.degraded,
            timed_out: self.timed_out - before.timed_out,
            refused: self.refused - before.refused,
        }
    }

    /// Sums.
    pub(crate) fn add(&mut self, other: &Lookups) {
        let Lookups { answered, degraded, timed_out, refused } = other;
        self.answered += answered;
        self.degraded += degraded;
        self.timed_out += timed_out;
        self.refused += refused;
    }
}

/// [`ShardHandle`] without its arena, which is the same for all of a lookup.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Shard {
    slot: u32,
    generation: u64,
    offset: u64,
    /// The chunk's key.
    pub(crate) key: Key,
}

impl Shard {
    /// To be sent.
    pub(crate) fn of(handle: ShardHandle) -> Shard {
        let ShardHandle { slot, generation, offset, key, .. } = handle;
        Shard { slot, generation, offset, key }
    }

    /// As the worker's adapter takes it.
    pub(crate) fn handle(self, arena_id: [u64; 2]) -> ShardHandle {
        let Shard { slot, generation, offset, key } = self;
        ShardHandle { arena_id, slot, generation, offset, key }
    }
}
