//! Simulated vLLM instances around a real engine, for `kvring replay` and `kvring chaos`.
//!
//! ```text
//! coordinator ──┬── engine (kvring serve)                 each of them a process; schedulers and workers are real
//! (this one)    ├── scheduler 0, workers 0.0, 0.1, …      clients of the engine, through the adapter. What they say to
//!               ├── scheduler 1, workers 1.0, 1.1, …      each other goes through the coordinator, so that each of them
//!               └── sweeper                               can be killed and started again by itself
//! ```
//!
//! The coordinator ([`run`]) makes the processes come and go, passes messages on, and looks for leaks at the end. A replay hands
//! its requests to the schedulers; under chaos they make requests themselves, and do much that a client should not do.

mod engine;
mod fleet;
mod lives;
mod message;
mod requests;
mod run;
mod scheduler;
mod watch;
mod worker;

pub(crate) use engine::{Event, Setup, Sums};
pub(crate) use fleet::Fleet;
pub(crate) use message::{Done, FromScheduler, Job, Manner, Start, Tally, ToScheduler, Who};
pub(crate) use run::{Conductor, Counts, Leaks, News, Run, hold_lease};

use crate::child;
use kvring_rig::pipe::Pipe;
use std::time::Duration;

/// The process of one life of a client.
impl child::Job for Start {
    const NAME: &'static str = "client";

    fn be(self, pipe: Pipe) -> anyhow::Result<()> {
        match self.who {
            Who::Scheduler { .. } => scheduler::be_scheduler(&self, pipe),
            Who::Worker { .. } => worker::be_worker(&self, pipe),
        }
    }
}

/// How often a client says that it lives.
const BEAT: Duration = Duration::from_millis(100);
/// How long a client may take to tell the coordinator something.
const TELL: Duration = Duration::from_secs(60);
/// How long the coordinator waits for news.
const LOOK: Duration = Duration::from_millis(2);
/// The longest that a client is busy with calls before it says something; a longer silence is late.
const HANG_AFTER: Duration = Duration::from_secs(5);
/// The longest that a job may take: each of its reservations, copies and commits has a deadline.
const JOB_MAX: Duration = Duration::from_secs(5);
/// How long everything together may take to come to rest, hangs included.
pub(crate) const WAIT_MAX: Duration = Duration::from_secs(180);
