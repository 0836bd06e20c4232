//! A scheduler's process: several requests at once, each from its lookup to the end of its session. Its workers come
//! and go, and so does the engine: a request that they fail is aborted, and its session ends.

mod rest;
mod turns;

use super::lives::Lives;
use super::message::{FINGERPRINT, FromScheduler, Job, Start, ToScheduler, ToWorker};
use super::plan::RANKS;
use super::requests::{Request, State};
use super::watch::Watch;
use super::work::Turn;
use super::{BEAT, LOOKUP, TELL};
use anyhow::{Context, bail};
use kvring_adapter::{
    Client, Hit, PollingSchedulerAdapter, Role, SchedulerAdapter, SchedulerApi, SchedulerOptions,
};
use kvring_rig::child;
use kvring_rig::pipe::Pipe;
use kvring_rig::random::Random;
use kvring_rig::wire::Lookups;
use kvring_shm_abi::segment::EngineName;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long an asynchronous lookup may be pending.
const PENDING: Duration = Duration::from_millis(100);
/// How long a request may wait for a worker that stands still.
const PATIENCE: Duration = Duration::from_secs(4);

/// The process: makes requests until it is told to end, or its parent has ended.
pub(crate) fn be_scheduler() -> anyhow::Result<()> {
    child::die_with_parent()?;
    let mut pipe = Pipe::to_parent()?;
    let Some(ToScheduler::Start(start)) = pipe.receive(None)? else { bail!("expected `start` first") };
    let mut scheduler = Scheduler::start(&start, pipe)?;
    scheduler.tell(&FromScheduler::Ready)?;
    scheduler.serve()
}

/// What it is about.
#[derive(Debug, PartialEq, Eq)]
enum Mode {
    /// Not told yet.
    Idle,
    /// New requests.
    Working,
    /// None any more; first what is open ends, then everything is looked up once more.
    Finishing(Option<VecDeque<Turn>>),
}

struct Scheduler {
    adapter: Box<dyn SchedulerApi>,
    /// A lookup may be pending.
    asynchronous: bool,
    /// What requests in the state `Stale` load.
    stale: HashMap<Job, Hit>,
    client: Arc<Client>,
    seed: u64,
    instance: u32,
    life: u32,
    source: u32,
    random: Random,
    lives: Lives,
    watch: Watch,
    pipe: Pipe,
    mode: Mode,
    phase: u32,
    /// Requests of this phase, by all lives of this instance.
    made: u32,
    number: u32,
    requests: Vec<Request>,
    /// The lives of the ranks' workers.
    ranks: [Option<u32>; RANKS as usize],
    next_at: Instant,
    beaten: Instant,
    clear_at: Option<Instant>,
    lookups: Lookups,
}

impl Scheduler {
    fn start(start: &Start, pipe: Pipe) -> anyhow::Result<Scheduler> {
        let client = Client::new(Role::Scheduler, start.client_options())?;
        let options = SchedulerOptions {
            lookup_timeout: LOOKUP,
            pending_timeout: PENDING,
            ..SchedulerOptions::new(FINGERPRINT)
        };
        // Every third life looks up asynchronously.
        let asynchronous = start.life.is_multiple_of(3);
        let adapter: Box<dyn SchedulerApi> = if asynchronous {
            Box::new(SchedulerAdapter::new(&client, options))
        } else {
            Box::new(PollingSchedulerAdapter::new(&client, options))
        };
        let name = u64::from(start.instance) << 32 | u64::from(start.life);
        let mut random = Random::new(start.seed, name ^ u64::from_le_bytes(*b"schedule"));
        let now = Instant::now();
        Ok(Scheduler {
            adapter,
            asynchronous,
            stale: HashMap::new(),
            client,
            seed: start.seed,
            instance: start.instance,
            life: start.life,
            source: random.bits() as u32,
            random,
            lives: Lives::new(EngineName::new(&start.engine)?),
            watch: Watch::start()?,
            pipe,
            mode: Mode::Idle,
            phase: 0,
            made: 0,
            number: 0,
            requests: Vec::new(),
            ranks: [None; RANKS as usize],
            next_at: now,
            beaten: now,
            clear_at: None,
            lookups: Lookups::default(),
        })
    }

    fn tell(&mut self, message: &FromScheduler) -> anyhow::Result<()> {
        self.pipe.send(message, Instant::now() + TELL).context("telling the coordinator")
    }

    fn serve(&mut self) -> anyhow::Result<()> {
        loop {
            let (messages, open) = self.pipe.drain(Duration::from_millis(1))?;
            for message in messages {
                match message {
                    ToScheduler::Start(_) => bail!("expected `start` once"),
                    ToScheduler::Work { phase, requests } => {
                        (self.mode, self.phase, self.made) = (Mode::Working, phase, requests);
                    }
                    ToScheduler::Rank(rank, life) => self.rank_is(rank, life),
                    ToScheduler::From(rank, reply) => self.reply(rank, reply.job, reply.what)?,
                    ToScheduler::Clear => self.clear_at = Some(Instant::now()),
                    ToScheduler::Finish => self.mode = Mode::Finishing(None),
                    ToScheduler::End => return self.end(),
                }
            }
            if !open {
                return Ok(());
            }
            self.preempt_and_give_up()?;
            self.clear()?;
            match self.mode {
                Mode::Idle => {}
                Mode::Working => self.work()?,
                Mode::Finishing(_) => self.finish()?,
            }
            self.beat()?;
        }
    }

    fn beat(&mut self) -> anyhow::Result<()> {
        if self.beaten.elapsed() >= BEAT || self.watch.tally().deadline_misses > 0 {
            self.beaten = Instant::now();
            self.watch.call("is_healthy", Duration::ZERO, || self.adapter.is_healthy());
            let tally = self.take_tally();
            self.tell(&FromScheduler::Beat(tally))?;
        }
        Ok(())
    }

    fn take_tally(&mut self) -> super::message::Tally {
        let (now, before) = (Lookups::from(self.adapter.lookup_stats()), self.lookups);
        self.lookups = now;
        let mut tally = self.watch.take();
        tally.lookups = now.since(&before);
        tally
    }

    /// A worker has come, or gone: with it everything that it had been told.
    fn rank_is(&mut self, rank: u32, life: Option<u32>) {
        if let Some(known) = self.ranks.get_mut(rank as usize) {
            *known = life;
        }
        let requests = core::mem::take(&mut self.requests).into_iter();
        let (failed, left): (Vec<_>, Vec<_>) = requests.partition(|request| request.waits_for(rank));
        self.requests = left;
        for request in failed {
            self.end_session(request.job);
        }
    }

    fn tell_all(&mut self, message: impl Fn(u32) -> ToWorker) -> anyhow::Result<()> {
        for rank in 0..RANKS {
            // Without a worker the message is for nobody: the request ends when the next one comes.
            let life = self.ranks[rank as usize].unwrap_or(0);
            self.tell(&FromScheduler::To(rank, life, message(rank)))?;
        }
        Ok(())
    }

    fn end_session(&mut self, job: Job) {
        let name = name_of(job);
        self.watch.call("end_session", Duration::ZERO, || self.adapter.end_session(&name));
    }

    /// Requests whose time has come: to be preempted, to be given up, to be noticed as abandoned.
    fn preempt_and_give_up(&mut self) -> anyhow::Result<()> {
        let now = Instant::now();
        let due = |request: &mut Request| request.preempt.take_if(|at| *at <= now).is_some();
        let preempted: Vec<Job> =
            self.requests.iter_mut().filter_map(|request| due(request).then_some(request.job)).collect();
        for job in preempted {
            self.tell_all(|_| ToWorker::Preempt(job))?;
        }
        let finishing = matches!(self.mode, Mode::Finishing(_));
        let over = |request: &Request| match request.state {
            State::Abandoned(until) | State::Stale(until) => finishing || until <= now,
            _ => request.since.elapsed() > PATIENCE,
        };
        let over: Vec<Job> = self.requests.iter().filter(|r| over(r)).map(|r| r.job).collect();
        self.requests.retain(|request| !over.contains(&request.job));
        for job in over {
            match self.stale.remove(&job) {
                Some(hit) => self.send_load(job, &hit)?,
                None => self.end_session(job),
            }
        }
        Ok(())
    }
}

/// A request's name in the adapter.
fn name_of(job: Job) -> String {
    format!("life {} request {}", job.life, job.number)
}
