//! A batch is the slots that one reservation was granted. Here are its id and the outcome of its commit.

use kvring_shm_abi::message::Completion;

/// Names a batch of granted slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct BatchId(pub(crate) u64);

/// The outcome of a batch's commit, in shards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Settled {
    /// Shards that are committed, now or before.
    pub(crate) done: u32,
    /// Shards that are no longer wanted, because their round had failed or was replaced.
    pub(crate) gone: u32,
}

impl Settled {
    /// The outcome in the completion of a commit that the engine has carried out.
    pub(crate) fn by(commit: &Completion) -> Settled {
        let [done, gone, ..] = commit.results.map(|value| u32::try_from(value).unwrap_or(u32::MAX));
        Settled { done, gone }
    }
}
