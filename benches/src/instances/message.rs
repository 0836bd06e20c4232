//! The messages between the processes.

use crate::chaos::Turn;
use kvring_adapter::{ClientOptions, Key};
use kvring_rig::pages::Shape;
use kvring_rig::wire::{Handle, Lookups};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// One of the clients: schedulers are named by their instance, workers by instance and rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Who {
    /// A scheduler.
    Scheduler {
        /// Of this instance.
        instance: u32,
    },
    /// A worker.
    Worker {
        /// Of this instance.
        instance: u32,
        /// Its rank.
        rank: u32,
    },
}

impl std::fmt::Display for Who {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Who::Scheduler { instance } => write!(f, "instance {instance} scheduler"),
            Who::Worker { instance, rank } => write!(f, "instance {instance} rank {rank}"),
        }
    }
}

impl Who {
    /// All clients of so many instances with so many ranks each.
    pub(crate) fn all(instances: u32, ranks: u32) -> Vec<Who> {
        let of = |instance| {
            let workers = (0..ranks).map(move |rank| Who::Worker { instance, rank });
            std::iter::once(Who::Scheduler { instance }).chain(workers)
        };
        (0..instances).flat_map(of).collect()
    }

    /// Its instance.
    pub(crate) fn instance(self) -> u32 {
        match self {
            Who::Scheduler { instance } | Who::Worker { instance, .. } => instance,
        }
    }
}

/// The job of one life of a client.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Start {
    /// The engine's name.
    pub(crate) engine: String,
    /// The name of the model that is simulated.
    pub(crate) model: String,
    /// Names the namespace: the same for all instances.
    pub(crate) fingerprint: [u64; 4],
    /// Which client it is.
    pub(crate) who: Who,
    /// How many ranks each instance has.
    pub(crate) ranks: u32,
    /// Which life of this client: counts up, and seeds its choices.
    pub(crate) life: u32,
    /// Tokens of a chunk.
    pub(crate) chunk_tokens: u32,
    /// The paged KV cache of each rank.
    pub(crate) shape: Shape,
    /// How it behaves.
    pub(crate) manner: Manner,
}

/// How clients behave.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) enum Manner {
    /// As good ones do, with requests that the coordinator hands them, and with the deadlines of vLLM.
    Calm {
        /// Is every loaded byte compared?
        verify: bool,
        /// How many threads copy in each worker; `None`: as the adapter chooses.
        copy_threads: Option<usize>,
    },
    /// As bad ones do: they make up requests and abort, preempt and abandon them at random. Deadlines are soon over, so that most
    /// of what goes wrong goes wrong in time.
    Wild {
        /// The run's seed.
        seed: u64,
        /// `stall_after` of the client.
        stall_ms: u64,
        /// Negative control: blocks of preempted requests are overwritten without a word to the adapter.
        careless: bool,
    },
}

/// How long a calm client waits for the engine to attach and to register it.
pub(super) const ATTACH_MAX: Duration = Duration::from_secs(20);
/// How long a wild client waits for the answer to an operation, a registration included.
pub(super) const OPERATION: Duration = Duration::from_millis(500);
/// How long an attempt of a wild client to attach may take.
const ATTACH: Duration = Duration::from_secs(1);
/// How long a wild client waits for the end of its copies, and for the engine's goodbye.
pub(super) const DRAIN: Duration = Duration::from_secs(1);

impl Start {
    /// How it attaches.
    pub(super) fn client_options(&self) -> ClientOptions {
        let name = match self.who {
            Who::Scheduler { instance } => format!("{} {instance} scheduler", self.model),
            Who::Worker { instance, rank } => format!("{} {instance} rank {rank}", self.model),
        };
        let options = ClientOptions { engine: self.engine.clone(), client: name, ..ClientOptions::default() };
        match self.manner {
            Manner::Calm { .. } => {
                ClientOptions { attach_timeout: ATTACH_MAX, register_timeout: ATTACH_MAX, ..options }
            }
            Manner::Wild { stall_ms, .. } => ClientOptions {
                attach_timeout: ATTACH,
                register_timeout: OPERATION,
                operation_timeout: OPERATION,
                drain_timeout: DRAIN,
                stall_after: Duration::from_millis(stall_ms),
                payload_bytes: 256 << 10,
                ..options
            },
        }
    }

    /// Is it a calm one?
    pub(super) fn is_calm(&self) -> bool {
        matches!(self.manner, Manner::Calm { .. })
    }
}

/// From the coordinator to a scheduler.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum ToScheduler {
    /// A calm scheduler serves this request, from its lookup to its store.
    Request {
        /// Its number in the trace.
        number: u32,
        /// The keys of its prompt.
        keys: Vec<Key>,
    },
    /// From here on a wild one makes requests of this phase.
    Work {
        /// The phase.
        phase: u32,
        /// Requests that this instance has made in it.
        requests: u32,
    },
    /// This life of a worker serves its rank now; `None`: the worker is gone, and with it all jobs that it had.
    Rank(u32, Option<u32>),
    /// A worker's answer.
    From(u32, Reply),
    /// The cache is to be cleared.
    Clear,
    /// No new requests: it finishes those that it has (a wild one then looks up everything once more), ends all sessions, and says
    /// so.
    Finish,
    /// End politely.
    End,
}

/// From a client to the coordinator.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum FromClient {
    /// It takes requests or jobs; a worker is registered, or about to be.
    Ready,
    /// It is alive; its tally since the last beat.
    Beat(Tally),
    /// Nothing is under way, all sessions have ended, and the engine has heard of it.
    Quiet,
    /// A message of a scheduler.
    Scheduler(FromScheduler),
    /// A worker's answer to its scheduler.
    Reply(Reply),
}

/// From a scheduler to the coordinator.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum FromScheduler {
    /// To a rank's worker, if it is still in the life that is meant.
    To(u32, u32, ToWorker),
    /// The request is done.
    Done(Done),
    /// A lookup that the engine answered: when it began, and how many chunks it found.
    Looked {
        /// The turn that was looked up.
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
}

/// The result of a calm scheduler's request.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Done {
    /// Its number.
    pub(crate) number: u32,
    /// Chunks that the lookup found.
    pub(crate) hit_chunks: u32,
    /// How long the lookup took.
    pub(crate) lookup_ns: u64,
}

/// From a scheduler to a worker.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum ToWorker {
    /// Load these.
    Load {
        /// Names the request.
        job: Job,
        /// The chunks.
        chunks: Vec<Handle>,
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
pub(crate) struct Job {
    /// Which life of the scheduler.
    pub(crate) life: u32,
    /// Which of its requests.
    pub(crate) number: u32,
}

impl Job {
    /// The request's name in the adapters.
    pub(super) fn name(self) -> String {
        format!("life {} request {}", self.life, self.number)
    }
}

/// A worker's answer.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Reply {
    /// To which request.
    pub(crate) job: Job,
    /// The result.
    pub(crate) what: Outcome,
}

/// The result of a job.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) enum Outcome {
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
pub(crate) struct Life {
    /// Random; the same after a warm restart.
    pub(crate) arena_id: [u64; 2],
    /// Different after every restart.
    pub(crate) incarnation: u32,
}

/// Everything that a client has done and seen since its last beat.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Tally {
    /// Calls into the adapter.
    pub(crate) operations: u64,
    /// Calls that returned late.
    pub(crate) deadline_misses: u64,
    /// The first of them, in words.
    pub(crate) missed: Vec<String>,
    /// The largest gap that the canary saw.
    pub(crate) gap_us: u64,
    /// Milliseconds for which the oldest open job has been open.
    pub(crate) oldest_job_ms: u64,
    /// Requests begun.
    pub(crate) requests: u64,
    /// Preemptions.
    pub(crate) preemptions: u64,
    /// Lookups, by their results.
    pub(crate) lookups: Lookups,
    /// Lookups that found something while the engine was not serving.
    pub(crate) hits_while_dead: u64,
    /// Shards that were stored.
    pub(crate) stored: u64,
    /// Their bytes.
    pub(crate) stored_bytes: u64,
    /// How long copying them took.
    pub(crate) store_ns: u64,
    /// Shards that were there.
    pub(crate) skipped: u64,
    /// Shards that were not stored.
    pub(crate) dropped: u64,
    /// Shards that were loaded.
    pub(crate) loaded: u64,
    /// Their bytes.
    pub(crate) loaded_bytes: u64,
    /// How long copying them took.
    pub(crate) load_ns: u64,
    /// Shards that could not be loaded.
    pub(crate) failed: u64,
    /// Loaded bytes that differ from those that were stored.
    pub(crate) wrong_bytes: u64,
}

impl Tally {
    /// Adds another one. Of the gap and of the age of the oldest job the larger one counts.
    pub(crate) fn add(&mut self, other: Tally) {
        self.operations += other.operations;
        self.deadline_misses += other.deadline_misses;
        self.missed.extend(other.missed);
        self.gap_us = self.gap_us.max(other.gap_us);
        self.oldest_job_ms = self.oldest_job_ms.max(other.oldest_job_ms);
        self.requests += other.requests;
        self.preemptions += other.preemptions;
        self.lookups.add(&other.lookups);
        self.hits_while_dead += other.hits_while_dead;
        self.stored += other.stored;
        self.stored_bytes += other.stored_bytes;
        self.store_ns += other.store_ns;
        self.skipped += other.skipped;
        self.dropped += other.dropped;
        self.loaded += other.loaded;
        self.loaded_bytes += other.loaded_bytes;
        self.load_ns += other.load_ns;
        self.failed += other.failed;
        self.wrong_bytes += other.wrong_bytes;
    }
}
