//! What the processes say to each other. Everything goes through the coordinator: so each of them can be killed and
//! started again without the others' pipes being cut.

use super::plan::RANKS;
use super::work::{CHUNK_TOKENS, SHAPE, Turn};
use super::{ATTACH, DRAIN, OPERATION, REGISTER};
use kvring_adapter::{ClientOptions, Key};
use kvring_rig::wire::{Lookups, Shard};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Names the namespace: the same for all instances.
pub(super) const FINGERPRINT: [u64; 4] =
    [u64::from_le_bytes(*b"kvrchaos"), RANKS as u64, SHAPE.shard_bytes(), CHUNK_TOKENS as u64];

/// What a client is, when it is started.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Start {
    /// The engine's name.
    pub(super) engine: String,
    /// The run's seed.
    pub(super) seed: u64,
    /// Its instance.
    pub(super) instance: u32,
    /// Its rank, if it is a worker.
    pub(super) rank: Option<u32>,
    /// Which life of this client: counts up, and seeds its choices.
    pub(super) life: u32,
    /// `stall_after` of its client.
    pub(super) stall_ms: u64,
    /// Negative control: blocks of preempted requests are overwritten without a word to the adapter.
    pub(super) careless: bool,
}

impl Start {
    /// How it attaches: with deadlines that are soon over, so that most of what goes wrong goes wrong in time.
    pub(super) fn client_options(&self) -> ClientOptions {
        let rank = self.rank.map_or("scheduler".to_owned(), |rank| format!("rank {rank}"));
        ClientOptions {
            engine: self.engine.clone(),
            client: format!("chaos {} {rank}", self.instance),
            attach_timeout: ATTACH,
            register_timeout: REGISTER,
            operation_timeout: OPERATION,
            drain_timeout: DRAIN,
            stall_after: Duration::from_millis(self.stall_ms),
            payload_bytes: 256 << 10,
            ..ClientOptions::default()
        }
    }
}

/// From the coordinator to a scheduler.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum ToScheduler {
    /// First of all.
    Start(Start),
    /// From here on: requests of this phase.
    Work {
        /// The phase.
        phase: u32,
        /// Requests that this instance has made in it.
        requests: u32,
    },
    /// This life of a worker serves its rank now; `None`: it is gone, and so is what it was told.
    Rank(u32, Option<u32>),
    /// A worker's answer.
    From(u32, Reply),
    /// The cache is to be cleared.
    Clear,
    /// No new requests; finish, then look up everything once more, end all sessions, and say so.
    Finish,
    /// End politely.
    End,
}

/// From a scheduler to the coordinator.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum FromScheduler {
    /// It takes requests.
    Ready,
    /// Alive; what has happened since the last one.
    Beat(Tally),
    /// To a rank's worker, if it is still in the life that is meant.
    To(u32, u32, ToWorker),
    /// A lookup that the engine answered: when it began, and how many chunks it found.
    Looked {
        /// What was looked up.
        turn: Turn,
        /// When it began.
        began_ns: u64,
        /// Chunks found.
        found: u32,
    },
    /// All ranks have committed these chunks, in one life of the engine.
    Acknowledged {
        /// Of which turn.
        turn: Turn,
        /// From this chunk on.
        from: u32,
        /// When the store began.
        began_ns: u64,
        /// When the last rank had reported.
        ended_ns: u64,
        /// By which request.
        job: Job,
        /// Of all ranks' shards, those that were there already.
        skipped: u32,
    },
    /// The cache has been cleared.
    Cleared,
    /// Nothing is under way, all sessions have ended, and the engine has heard of it.
    Quiet,
}

/// From a scheduler to a worker.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum ToWorker {
    /// First of all.
    Start(Start),
    /// Load these.
    Load {
        /// Names the request.
        job: Job,
        /// Which arena the shards are in.
        arena_id: [u64; 2],
        /// The shards.
        shards: Vec<Shard>,
    },
    /// "Compute" these, and store them.
    Store {
        /// Names the request.
        job: Job,
        /// Source and number.
        round: (u32, u32),
        /// The key before the first one.
        parent: Option<Key>,
        /// The keys.
        keys: Vec<Key>,
    },
    /// The request is preempted: its blocks are somebody else's at once.
    Preempt(Job),
    /// Come to rest and say so.
    Drain,
    /// End politely.
    End,
}

/// Names a request: life of the scheduler, and number in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Job {
    /// Which life of the scheduler.
    pub(super) life: u32,
    /// Which of its requests.
    pub(super) number: u32,
}

/// From a worker to the coordinator.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum FromWorker {
    /// Registered, or about to be: it takes jobs.
    Ready,
    /// Alive; what has happened since the last one.
    Beat(Tally),
    /// To the scheduler.
    Reply(Reply),
    /// Nothing is under way.
    Quiet,
}

/// A worker's answer.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Reply {
    /// To which request.
    pub(super) job: Job,
    /// What.
    pub(super) what: Outcome,
}

/// What became of a job.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) enum Outcome {
    /// The load has ended.
    Loaded,
    /// The store has ended: shards acknowledged, and which life of the engine it was in, if only one.
    Stored {
        /// Committed.
        stored: u32,
        /// There already.
        skipped: u32,
        /// The engine's life.
        life: Option<Life>,
    },
    /// It was not taken: no blocks.
    Refused,
}

/// A life of the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Life {
    /// Random; the same after a warm restart.
    pub(super) arena_id: [u64; 2],
    /// Different after every restart.
    pub(super) incarnation: u32,
}

/// What a client has done and seen since its last word.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Tally {
    /// Calls into the adapter.
    pub(super) operations: u64,
    /// Calls that returned late.
    pub(super) deadline_misses: u64,
    /// What the first of them was.
    pub(super) missed: Vec<String>,
    /// The largest gap that the canary saw.
    pub(super) gap_us: u64,
    /// Milliseconds for which the oldest open job has been open.
    pub(super) oldest_job_ms: u64,
    /// Requests begun.
    pub(super) requests: u64,
    /// Preemptions.
    pub(super) preemptions: u64,
    /// Lookups by what they came to.
    pub(super) lookups: Lookups,
    /// Shards.
    pub(super) stored: u64,
    /// Shards that were there.
    pub(super) skipped: u64,
    /// Shards that were not stored.
    pub(super) dropped: u64,
    /// Shards.
    pub(super) loaded: u64,
    /// Shards that could not be loaded.
    pub(super) failed: u64,
    /// Bytes that were loaded and are not what was stored.
    pub(super) wrong_bytes: u64,
}

impl Tally {
    /// Sums; the largest of what is largest.
    pub(super) fn add(&mut self, other: Tally) {
        self.operations += other.operations;
        self.deadline_misses += other.deadline_misses;
        self.missed.extend(other.missed);
        self.gap_us = self.gap_us.max(other.gap_us);
        self.oldest_job_ms = self.oldest_job_ms.max(other.oldest_job_ms);
        self.requests += other.requests;
        self.preemptions += other.preemptions;
        self.lookups.add(&other.lookups);
        self.stored += other.stored;
        self.skipped += other.skipped;
        self.dropped += other.dropped;
        self.loaded += other.loaded;
        self.failed += other.failed;
        self.wrong_bytes += other.wrong_bytes;
    }
}
