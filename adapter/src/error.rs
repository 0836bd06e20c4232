//! The errors of an attempt to attach, of a call, and of a registration.

use crate::health::Health;
use kvring_shm_abi::channel::ChannelError;
use kvring_shm_abi::engine_segment::AttachStatus;
use kvring_shm_abi::lobby::CLIENTS_MAX;
use kvring_shm_abi::mapping::OutOfBounds;
use kvring_shm_abi::message::Disagreement;
use kvring_shm_abi::segment::SegmentError;
use kvring_shm_abi::superblock::Mismatch;
use std::time::Duration;

/// Why an attempt to attach did not succeed. The keeper tries again after all of them.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// There is no engine of that name.
    #[error("no kvring engine named {0} runs here; start one with `kvring serve --name {0}`")]
    NoEngine(String),
    /// The engine's segments are there, but their owner is dead.
    #[error("the kvring engine named {0} has died; start it again with `kvring serve --name {0}`")]
    Dead(String),
    /// As `Dead`, but the engine was asked to stop and kept its segments (`kvring serve --keep`).
    #[error(
        "the kvring engine named {0} was stopped, and has kept what it held; start it again with `kvring serve --name {0}`"
    )]
    Stopped(String),
    /// The engine is recovering and not ready yet.
    #[error("the kvring engine is starting, and may be taking over what it held before")]
    Recovering(u32),
    /// The engine found its own invariants broken.
    #[error(
        "the kvring engine named {0} found an error in its own tables and stopped serving; see its log, and restart it"
    )]
    Unhealthy(String),
    /// The engine was restarted during the attempt.
    #[error("the kvring engine was restarted during the attempt")]
    Restarted,
    /// The segment comes from another release or build, or is only half created.
    #[error("segment {segment}: {mismatch}")]
    Mismatch {
        /// Which segment.
        segment: String,
        /// What differs.
        mismatch: Mismatch,
    },
    /// The name does not lead to the arena of the held claim any more: the engine was started anew, or removed.
    #[error("the kvring engine named {0} was started anew, or removed")]
    AnotherStart(String),
    /// Two segments belong to different cold starts, because a restart was half-way. The next attempt may succeed.
    #[error("segment {0} belongs to another start of the kvring engine")]
    OtherArena(String),
    /// All entries are taken.
    #[error(
        "the kvring engine's client table is full: all {CLIENTS_MAX} entries are taken; `kvring status` lists them"
    )]
    TableFull,
    /// The engine did not answer in time.
    #[error("the kvring engine did not answer within {} ms", .0.as_millis())]
    TimedOut(Duration),
    /// The client is being shut down.
    #[error("the client is being shut down")]
    Cancelled,
    /// Another process has overwritten the life word by which we claim our entry. The next attempt takes another entry.
    #[error("another process has overwritten what makes this client known to the kvring engine")]
    ClaimLost(usize),
    /// The engine refused the claim.
    #[error("the kvring engine refused the connection: {}", .0.as_str())]
    Refused(AttachStatus),
    /// A segment could not be opened.
    #[error(transparent)]
    Segment(#[from] SegmentError),
    /// A segment is shorter than its own geometry says.
    #[error(transparent)]
    Bounds(#[from] OutOfBounds),
    /// The channel could not be made.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The kernel has no randomness, or refuses a file lock.
    #[error("{what}: {error}")]
    System {
        /// The call that failed.
        what: &'static str,
        /// The system's error.
        error: std::io::Error,
    },
}

impl AttachError {
    /// The health that this error amounts to.
    #[must_use]
    pub fn health(&self) -> Health {
        match self {
            AttachError::NoEngine(_) => Health::Absent,
            AttachError::Dead(_) | AttachError::Stopped(_) => Health::Dead,
            AttachError::Recovering(_) => Health::Recovering,
            AttachError::Unhealthy(_) => Health::Unhealthy,
            AttachError::Mismatch { mismatch: Mismatch::Incomplete, .. }
            | AttachError::Restarted
            | AttachError::AnotherStart(_)
            | AttachError::ClaimLost(_)
            | AttachError::OtherArena(_) => Health::Attaching,
            AttachError::TimedOut(_) => Health::Stalled,
            AttachError::Cancelled => Health::ShutDown,
            AttachError::Mismatch { .. } => Health::Incompatible(self.to_string()),
            other => Health::Refused(other.to_string()),
        }
    }

    /// Is there no memory for a channel at the moment?
    pub(crate) fn is_no_room(&self) -> bool {
        matches!(self, AttachError::Channel(ChannelError::Segment(SegmentError::NoSpace { .. })))
    }

    /// Is the claim of no further use? Otherwise the next attempt uses it again, with this engine or the next.
    pub(crate) fn ends_claim(&self) -> bool {
        match self {
            AttachError::Dead(_)
            | AttachError::Stopped(_)
            // Keep the claim with an engine whose tables are broken: what its arena holds can still be loaded, because
            // each load is validated. Its successor starts cold.
            | AttachError::Unhealthy(_)
            | AttachError::Recovering(_)
            | AttachError::Restarted
            | AttachError::TimedOut(_)
            | AttachError::Refused(AttachStatus::Stale)
            | AttachError::System { .. } => false,
            // There is no memory for a channel, or no file descriptor, at the moment.
            AttachError::Channel(_) => false,
            AttachError::Segment(SegmentError::Os { .. } | SegmentError::Crate { .. }) => false,
            _ => true,
        }
    }
}

/// Why a call did not do what was asked. None of these is fatal to the caller: there is a degraded answer for each.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// The engine is not healthy, so it was not asked.
    #[error("the kvring engine is {0}: nothing is stored until it is back")]
    Degraded(Health),
    /// The engine died while the call waited for its answer.
    #[error("the kvring engine died before it answered")]
    Dead,
    /// The engine was restarted while the call waited for its answer.
    #[error("the kvring engine was restarted before it answered")]
    Restarted,
    /// There was no answer by the deadline. If one still comes, what it gained is given back.
    #[error("the kvring engine did not answer within {waited_ms} ms")]
    TimedOut {
        /// How long the call waited.
        waited_ms: u64,
    },
    /// The engine does not know this namespace, or has not answered this client's registration yet.
    #[error("this KV cache is not registered with the kvring engine, or not yet again")]
    NotRegistered,
    /// No room for now: this client has used up its share of leased and reserved bytes, or its operations in flight. Or
    /// the engine has just been restarted and does not clear anything yet, because clients that have not come back may
    /// still hold some of it.
    #[error(
        "busy: the kvring engine has not read yet what this process has sent, or it has just been restarted and \
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
        /// How many were given.
        got: usize,
    },
    /// The engine refused the operation, or its answer makes no sense.
    #[error("the kvring engine refused the operation: {0}")]
    Refused(&'static str),
    /// The call was made in a child of `fork`: the adapter belongs to the parent.
    #[error("this adapter belongs to the process that made it; make a new one after fork")]
    Forked,
}

/// Why a registration failed. Except for `Call`, this does not mend itself: something is configured wrongly.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegisterError {
    /// Ranks do not agree.
    #[error("this rank disagrees with an earlier one of its model: {}: expected {expected}, got {got}", what.as_str())]
    Disagreement {
        /// What they do not agree on.
        what: Disagreement,
        /// What an earlier rank registered.
        expected: u64,
        /// What this rank registered.
        got: u64,
    },
    /// A shard can never fit.
    #[error(
        "a chunk has {shard_bytes} bytes on each rank, and the kvring engine has room for up to {largest} in one piece: use smaller \
         chunks (kvring.chunk_blocks), or a kvring engine with a larger --arena"
    )]
    ShardTooLarge {
        /// The bytes of one shard.
        shard_bytes: u64,
        /// The largest possible, in bytes.
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
    /// A value is out of range.
    #[error("registration: {what}: expected {expected}, got {got}")]
    Invalid {
        /// The field.
        what: &'static str,
        /// What was expected.
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
