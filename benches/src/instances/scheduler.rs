//! A scheduler's process: several requests at once, each from its lookup to the end of its session. Its workers come
//! and go, and so does the engine: a wild scheduler aborts a request that they fail, and ends its session.

mod rest;
mod turns;

use super::lives::Lives;
use super::message::{Done, FromClient, FromScheduler, Job, Manner, Start, ToScheduler, ToWorker};
use super::requests::{Request, State};
use super::watch::Watch;
use super::{BEAT, TELL};
use crate::chaos::Turn;
use crate::child::ready;
use anyhow::{Context, bail};
use kvring_adapter::{Client, Hit, Key, PollingSchedulerAdapter, Role, SchedulerOptions};
use kvring_rig::pipe::Pipe;
use kvring_rig::random::Random;
use kvring_rig::wire::Lookups;
use kvring_shm_abi::segment::EngineName;
use kvring_shm_abi::superblock::random_u64;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a wild scheduler's request may wait for a worker that stands still.
const PATIENCE: Duration = Duration::from_secs(4);
/// The same of a calm one: far above anything real, so that only a hang reaches it.
const CALM_PATIENCE: Duration = Duration::from_secs(150);

/// The process: makes requests until it is told to end, or its parent has ended.
pub(crate) fn be_scheduler(start: &Start, pipe: Pipe) -> anyhow::Result<()> {
    let mut scheduler = Scheduler::start(start, pipe)?;
    scheduler.tell(&FromClient::Ready)?;
    scheduler.serve()
}

/// Its present task.
#[derive(Debug, PartialEq, Eq)]
enum Mode {
    /// None yet.
    Idle,
    /// It makes new requests.
    Working,
    /// No new requests: first all open ones end, then everything is looked up once more.
    Finishing(Option<VecDeque<Turn>>),
}

struct Scheduler {
    adapter: PollingSchedulerAdapter,
    /// A lookup may be pending.
    /// The hits that requests in the state `Stale` will load.
    stale: HashMap<Job, (Hit, Vec<Key>)>,
    client: Arc<Client>,
    start: Start,
    /// Makes a wild scheduler's keys and choices.
    seed: u64,
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
    ranks: Vec<Option<u32>>,
    next_at: Instant,
    beaten: Instant,
    clear_at: Option<Instant>,
    lookups: Lookups,
}

impl Scheduler {
    fn start(start: &Start, pipe: Pipe) -> anyhow::Result<Scheduler> {
        let client = Client::new(Role::Scheduler, start.client_options())?;
        let options = SchedulerOptions::new(start.fingerprint);
        let (seed, options, watch) = match start.manner {
            Manner::Calm { .. } => (random_u64().context("a random number")?, options, Watch::that_counts()),
            Manner::Wild { seed, .. } => (seed, options, Watch::start()?),
        };
        let adapter = PollingSchedulerAdapter::new(&client, options);
        if start.is_calm() {
            ready(&client)?;
        }
        let name = u64::from(start.who.instance()) << 32 | u64::from(start.life);
        let mut random = Random::new(seed, name ^ u64::from_le_bytes(*b"schedule"));
        let now = Instant::now();
        Ok(Scheduler {
            adapter,
            stale: HashMap::new(),
            client,
            start: start.clone(),
            seed,
            source: random.bits() as u32,
            random,
            lives: Lives::new(EngineName::new(&start.engine)?),
            watch,
            pipe,
            mode: Mode::Idle,
            phase: 0,
            made: 0,
            number: 0,
            requests: Vec::new(),
            ranks: vec![None; start.ranks as usize],
            next_at: now,
            beaten: now,
            clear_at: None,
            lookups: Lookups::default(),
        })
    }

    fn tell(&mut self, message: &FromClient) -> anyhow::Result<()> {
        self.pipe.send(message, Instant::now() + TELL).context("telling the coordinator")
    }

    fn say(&mut self, message: FromScheduler) -> anyhow::Result<()> {
        self.tell(&FromClient::Scheduler(message))
    }

    fn serve(&mut self) -> anyhow::Result<()> {
        loop {
            let patience =
                if self.start.is_calm() { Duration::from_millis(20) } else { Duration::from_millis(1) };
            let (messages, open) = self.pipe.drain(patience)?;
            for message in messages {
                match message {
                    ToScheduler::Request { number, keys } => self.serve_request(number, keys)?,
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
            self.tell(&FromClient::Beat(tally))?;
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
        for rank in 0..self.start.ranks {
            // Without a worker the message is for nobody: the request ends when the next one comes.
            let life = self.ranks[rank as usize].unwrap_or(0);
            self.say(FromScheduler::To(rank, life, message(rank)))?;
        }
        Ok(())
    }

    fn end_session(&mut self, job: Job) {
        let name = job.name();
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
        let calm = self.start.is_calm();
        let patience = if calm { CALM_PATIENCE } else { PATIENCE };
        let over = |request: &Request| match request.state {
            State::Abandoned(until) | State::Stale(until) => finishing || until <= now,
            _ => request.since.elapsed() > patience,
        };
        let over: Vec<Job> = self.requests.iter().filter(|r| over(r)).map(|r| r.job).collect();
        if let Some(job) = over.first().filter(|_| calm) {
            bail!("request {} was not done within {} s: a hang", job.number, patience.as_secs());
        }
        self.requests.retain(|request| !over.contains(&request.job));
        for job in over {
            match self.stale.remove(&job) {
                Some((hit, keys)) => self.send_load(job, &hit, &keys)?,
                None => self.end_session(job),
            }
        }
        Ok(())
    }
}
