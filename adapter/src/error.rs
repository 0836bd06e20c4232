//! What a call into the adapter can come to.

use crate::health::Health;
use kvring_shm_abi::message::Disagreement;

/// Why a call did not do what was asked. None of these is fatal to the caller: every one has a degraded answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// The engine is not there for us right now.
    #[error("the kvring engine is {0}: nothing is stored or found until it is back")]
    Degraded(Health),
    /// The engine died while the call waited for its answer.
    #[error("the kvring engine died before it answered")]
    Dead,
    /// The engine was restarted while the call waited for its answer.
    #[error("the kvring engine was restarted before it answered")]
    Restarted,
    /// No answer by the deadline. Should one still come, it is undone.
    #[error("the kvring engine did not answer within {waited_ms} ms")]
    TimedOut {
        /// How long the call waited.
        waited_ms: u64,
    },
    /// No engine holds this namespace, or this client's registration has not come through yet.
    #[error("this KV cache is not registered with the kvring engine, or not yet again")]
    NotRegistered,
    /// Full for now: the client's share of leased and reserved bytes, or operations in flight. Or an engine that has just
    /// been restarted clears nothing yet: clients that have not come back may still hold some of it.
    #[error(
        "busy: this process has too many loads and stores under way, or the kvring engine has just been restarted and \
         waits for those that were attached before; try again in a few seconds"
    )]
    Busy,
    /// The arena has no room, even after eviction.
    #[error(
        "out of space: the kvring engine has no room for this, even after eviction; use a larger --arena"
    )]
    OutOfSpace,
    /// More keys than one request may name.
    #[error("expected at most {limit} keys in one call, got {got}")]
    TooManyKeys {
        /// The limit.
        limit: usize,
        /// Given.
        got: usize,
    },
    /// The engine says that this operation is not for this client.
    #[error("the kvring engine refused the operation: {0}")]
    Refused(&'static str),
    /// Called in a child of `fork`: the adapter belongs to the parent.
    #[error("this adapter belongs to the process that made it; make a new one after fork")]
    Forked,
}

/// Why a registration cannot stand. It does not mend itself: something is configured wrongly.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegisterError {
    /// Ranks do not agree.
    #[error("this rank disagrees with an earlier one of its model: {}: expected {expected}, got {got}", what.as_str())]
    Disagreement {
        /// What they do not agree on.
        what: Disagreement,
        /// What an earlier rank registered.
        expected: u64,
        /// What this one brought.
        got: u64,
    },
    /// A shard can never fit.
    #[error(
        "a chunk has {shard_bytes} bytes on each rank, and the kvring engine has room for up to {largest} in one piece: use smaller \
         chunks (kvring.chunk_blocks), or a kvring engine with a larger --arena"
    )]
    ShardTooLarge {
        /// Asked for.
        shard_bytes: u64,
        /// The largest possible.
        largest: u64,
    },
    /// The engine's namespace table is full.
    #[error("the kvring engine's namespace table is full; `kvring clear` frees namespaces that nobody uses")]
    TooManyNamespaces,
    /// The engine's table of shard sizes is full.
    #[error(
        "the kvring engine's table of chunk sizes is full: expected at most {most} different sizes among the models that are \
         attached or cached; a size is free again when no attached model has it and the cached chunks of that size are \
         gone (stop models that are not needed, then `kvring clear`)"
    )]
    TooManySizes {
        /// How many there may be.
        most: u64,
    },
    /// The record itself makes no sense.
    #[error("registration: {what}: expected {expected}, got {got}")]
    Invalid {
        /// The field.
        what: &'static str,
        /// What would do.
        expected: &'static str,
        /// What was given.
        got: u64,
    },
    /// The KV cache is in memory that cannot be copied from and to here, or not in the way that was asked for.
    #[error(transparent)]
    Copy(kvring_gpu_kernels::CopyError),
    /// A call error while registering; the keeper goes on trying.
    #[error(transparent)]
    Call(#[from] CallError),
}
