//! The coordinator's work: requests to whichever instance is free, and what comes back.

use super::engine::Engine;
use super::message::{FromScheduler, Loaded, Plan, REQUEST_MAX, RequestReport, Stored, ToScheduler};
use super::plan::Resolved;
use super::worker::ATTACH_MAX;
use super::{Args, Sabotage, Speed};
use crate::children::kvring;
use crate::console::{self, LogChoice};
use crate::trace::Trace;
use anyhow::{Context, bail};
use indicatif::ProgressBar;
use kvring_rig::child::Peer;
use kvring_rig::pipe::Abort;
use kvring_rig::wire::Lookups;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How often the coordinator looks whether the engine lives, and draws.
const LOOK: Duration = Duration::from_millis(20);

/// What all requests came to.
#[derive(Debug, Default)]
pub(super) struct Driven {
    /// From the first request to the last answer.
    pub(super) seconds: f64,
    /// Chunks that lookups found.
    pub(super) hit_chunks: u64,
    /// Tokens in those: a prompt's last chunk may hold fewer.
    pub(super) hit_tokens: u64,
    /// One per lookup, in nanoseconds.
    pub(super) lookup_ns: Vec<u64>,
    /// All loads of each worker: by instance, then by rank.
    pub(super) loads: Vec<Vec<Loaded>>,
    /// All stores of all workers.
    pub(super) stores: Stored,
    /// What lookups came to.
    pub(super) lookups: Lookups,
}

/// Starts all instances, and waits until they are attached.
pub(super) fn start_instances(
    resolved: &Resolved,
    log: &LogChoice,
    abort: &Abort,
) -> anyhow::Result<Vec<Peer>> {
    let mut instances = Vec::new();
    for instance in 0..resolved.instances {
        let name = format!("instance {instance}");
        let mut command = kvring("replay-scheduler")?;
        let stderr = log.hand_to(&mut command);
        let mut peer = Peer::start(name, command, stderr, abort.clone())?;
        peer.send(&ToScheduler::Start(Plan { instance, ..resolved.plan.clone() }))?;
        instances.push(peer);
    }
    for peer in &mut instances {
        match peer.receive(ATTACH_MAX * 4)? {
            FromScheduler::Ready => {}
            other => bail!("{}: expected `ready`, got {other:?}", peer.name()),
        }
    }
    Ok(instances)
}

/// The requests that are still to be done.
struct Queue<'a> {
    trace: &'a Trace,
    speed: Speed,
    began: Instant,
    next: Mutex<usize>,
    bar: ProgressBar,
}

impl Queue<'_> {
    /// The next request.
    fn take(&self) -> Option<usize> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let index = Some(*next).filter(|index| *index < self.trace.requests.len())?;
        *next += 1;
        Some(index)
    }

    /// Waits until the request has arrived.
    fn wait_for_arrival(&self, index: usize, abort: &Abort) {
        let Speed::Times(factor) = self.speed else { return };
        let first_ms = self.trace.requests.first().map_or(0, |request| request.timestamp_ms);
        let after_ms = self.trace.requests[index].timestamp_ms.saturating_sub(first_ms) as f64 / factor;
        let due = self.began + Duration::from_secs_f64((after_ms / 1e3).min(1e9));
        while !abort.is_on() {
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            thread::sleep(left.min(LOOK));
        }
    }
}

/// What the threads of the coordinator share.
struct Shared<'a> {
    queue: Queue<'a>,
    driven: Mutex<Driven>,
    /// Why the replay was given up: the first reason; what follows from it is of no interest.
    failure: Mutex<Option<anyhow::Error>>,
    abort: &'a Abort,
}

impl Shared<'_> {
    fn fail(&self, error: anyhow::Error) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        if failure.is_none() && !self.abort.is_on() {
            *failure = Some(error);
        }
        self.abort.now();
    }

    fn driven(&self) -> MutexGuard<'_, Driven> {
        self.driven.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Drives the whole trace, then lets everything come to rest.
pub(super) fn drive(
    args: &Args,
    trace: &Trace,
    instances: &mut [Peer],
    engine: &mut Engine,
    abort: &Abort,
) -> anyhow::Result<Driven> {
    let total = trace.requests.len() as u64;
    let bar = console::count_bar("requests", total);
    let queue = Queue { trace, speed: args.speed, began: Instant::now(), next: Mutex::new(0), bar };
    let driven = Driven { loads: vec![Vec::new(); instances.len()], ..Driven::default() };
    let shared = Shared { queue, driven: Mutex::new(driven), failure: Mutex::new(None), abort };
    let first_pid = instances.first_mut().map(Peer::pid);
    thread::scope(|scope| {
        let shared = &shared;
        let mut threads = Vec::new();
        for (number, instance) in instances.iter_mut().enumerate() {
            let work =
                move || run_instance(number, instance, shared).unwrap_or_else(|error| shared.fail(error));
            threads.push(scope.spawn(work));
        }
        let mut sabotage = args.sabotage;
        while !threads.iter().all(|thread| thread.is_finished()) {
            let due = shared.queue.bar.position() * 2 >= total;
            let committed = sabotage.take_if(|_| due).map_or(Ok(()), |what| commit(what, engine, first_pid));
            if let Err(error) = committed.and_then(|()| engine.check(abort)) {
                shared.fail(error);
            }
            thread::sleep(LOOK);
        }
    });
    shared.queue.bar.finish_and_clear();
    let seconds = shared.queue.began.elapsed().as_secs_f64();
    let failure = shared.failure.into_inner().unwrap_or_else(PoisonError::into_inner);
    if let Some(error) = failure {
        return Err(error);
    }
    engine.check(abort)?;
    let mut driven = shared.driven.into_inner().unwrap_or_else(PoisonError::into_inner);
    driven.seconds = seconds;
    for instance in instances.iter_mut() {
        instance.send(&ToScheduler::Quiesce)?;
    }
    for instance in instances {
        match instance.receive(REQUEST_MAX)? {
            FromScheduler::Quiet(lookups) => driven.lookups.add(&lookups),
            other => bail!("{}: expected `quiet`, got {other:?}", instance.name()),
        }
    }
    Ok(driven)
}

/// One instance's requests, one at a time, until there is none left.
fn run_instance(number: usize, instance: &mut Peer, shared: &Shared<'_>) -> anyhow::Result<()> {
    let queue = &shared.queue;
    while let Some(index) = queue.take() {
        queue.wait_for_arrival(index, shared.abort);
        let request = &queue.trace.requests[index];
        let index = u32::try_from(index).context("a trace of more than 2^32 requests")?;
        instance.send(&ToScheduler::Request { index, blocks: request.blocks.clone() })?;
        let report = match instance.receive(REQUEST_MAX)? {
            FromScheduler::Done(report) => report,
            other => bail!("{}: expected `done`, got {other:?}", instance.name()),
        };
        let hit_tokens = u64::from(report.hit_chunks) * u64::from(queue.trace.block_tokens);
        shared.driven().count(number, &report, hit_tokens.min(request.input_tokens.into()));
        queue.bar.inc(1);
    }
    Ok(())
}

impl Driven {
    fn count(&mut self, instance: usize, report: &RequestReport, hit_tokens: u64) {
        self.hit_chunks += u64::from(report.hit_chunks);
        self.hit_tokens += hit_tokens;
        self.lookup_ns.push(report.lookup_ns);
        let loads = &mut self.loads[instance];
        loads.resize(report.ranks.len(), Loaded::default());
        for (sum, (loaded, stored)) in loads.iter_mut().zip(&report.ranks) {
            sum.add(loaded);
            self.stores.add(stored);
        }
    }
}

/// Negative controls that strike during the replay.
fn commit(sabotage: Sabotage, engine: &mut Engine, first_pid: Option<u32>) -> anyhow::Result<()> {
    match sabotage {
        Sabotage::Corrupt => engine.corrupt(),
        Sabotage::KillEngine => engine.kill(),
        Sabotage::KillScheduler => {
            let pid = first_pid.and_then(|pid| i32::try_from(pid).ok()).context("no instance to kill")?;
            kill(Pid::from_raw(pid), Signal::SIGKILL).context("killing an instance")
        }
        // At the end.
        Sabotage::Leak => Ok(()),
    }
}
