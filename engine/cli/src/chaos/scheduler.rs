//! A scheduler's process: several requests at once, each from its lookup to the end of its session. Its workers come
//! and go, and so does the engine: a request that they fail is aborted, and its session ends.

use super::lives::Lives;
use super::message::{FINGERPRINT, FromScheduler, Job, Outcome, Start, ToScheduler, ToWorker};
use super::plan::RANKS;
use super::random::Random;
use super::requests::{Request, State};
use super::watch::Watch;
use super::work::Turn;
use super::{BEAT, DRAIN, LOOKUP, OPERATION, TELL};
use crate::simulated::child;
use crate::simulated::pipe::Pipe;
use crate::simulated::wire::{Lookups, Shard};
use anyhow::{Context, bail};
use kvring_adapter::{
    Client, Hit, Lookup, PollingSchedulerAdapter, Role, SchedulerAdapter, SchedulerApi, SchedulerOptions,
};
use kvring_shm_abi::futex::monotonic_ns;
use kvring_shm_abi::segment::EngineName;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Requests under way at once.
const AT_ONCE: usize = 4;
/// How long an asynchronous lookup may be pending.
const PENDING: Duration = Duration::from_millis(100);
/// How long it is left alone meanwhile.
const ASK_AGAIN: Duration = Duration::from_micros(200);
/// How long a request may wait for a worker that stands still.
const PATIENCE: Duration = Duration::from_secs(4);
/// How often a clear, a last lookup, or a last word to the engine is tried again.
const RETRY: Duration = Duration::from_millis(20);
/// How often a last lookup is tried before it counts as not answered.
const RETRIES: u32 = 80;

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
            source: random.next() as u32,
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

    fn to_all(&mut self, message: impl Fn(u32) -> ToWorker) -> anyhow::Result<()> {
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

    fn work(&mut self) -> anyhow::Result<()> {
        if Instant::now() < self.next_at || self.requests.len() >= AT_ONCE + 8 {
            return Ok(());
        }
        let busy = self.requests.iter().filter(|r| r.is_busy()).count();
        if busy >= AT_ONCE {
            return Ok(());
        }
        self.next_at = Instant::now() + self.random.ms(0..6);
        let turn = Turn::random(&mut self.random, self.phase, self.made);
        self.made += 1;
        self.watch.tally().requests += 1;
        let job = self.next_job();
        let (found, _) = self.look_up(job, 0, turn)?;
        let mut request = Request::new(job, turn, turn.keys(self.seed), found);
        match self.random.of(0..100) {
            // Somebody only looked.
            0..8 => self.end_session(job),
            // Somebody went away, and it takes a while until that is noticed.
            8..16 => {
                request.state = State::Abandoned(Instant::now() + self.random.ms(50..3000));
                self.requests.push(request);
            }
            // Preempted before it had begun: it comes back with the next admission, its first lease given back or not.
            choice @ 16..26 => {
                if choice < 21 {
                    let (adapter, name) = (&mut self.adapter, name_of(job));
                    let release = || adapter.free_lookup_locks(&name, 0, 0);
                    self.watch.call("free_lookup_locks", Duration::ZERO, release);
                }
                let (found, _) = self.look_up(job, 1, turn)?;
                request.hit = found;
                self.begin(request, 1)?;
            }
            _ => self.begin(request, 0)?,
        }
        Ok(())
    }

    fn next_job(&mut self) -> Job {
        self.number += 1;
        Job { life: self.life, number: self.number }
    }

    /// Chunks found, and whether the engine said so.
    fn look_up(&mut self, job: Job, admission: u32, turn: Turn) -> anyhow::Result<(usize, bool)> {
        let keys = turn.keys(self.seed);
        let (adapter, name) = (&mut self.adapter, name_of(job));
        let answered = adapter.lookup_stats().answered;
        let began_ns = monotonic_ns();
        let (deadline, pending) =
            if self.asynchronous { (Duration::ZERO, PENDING) } else { (LOOKUP, Duration::ZERO) };
        self.watch.call("submit_lookup", deadline, || adapter.submit_lookup(&name, admission, &keys))?;
        let (found, world) = self.watch.call("check_lookup", pending, || {
            loop {
                match adapter.check_lookup(&name) {
                    Lookup::Hit(hit) => return (hit.chunks, hit.world),
                    Lookup::Pending => std::thread::sleep(ASK_AGAIN),
                }
            }
        });
        if found > 0 && world != RANKS {
            bail!("expected a hit of {RANKS} ranks, got {world}");
        }
        let answered = adapter.lookup_stats().answered > answered;
        if answered {
            self.tell(&FromScheduler::Looked { turn, began_ns, found })?;
        }
        Ok((found as usize, answered))
    }

    /// Loads what was found, or stores what was not, or ends.
    fn begin(&mut self, mut request: Request, admission: u32) -> anyhow::Result<()> {
        let job = request.job;
        if self.ranks.contains(&None) {
            self.end_session(job);
            return Ok(());
        }
        if request.hit == 0 {
            return self.store(request);
        }
        // A known admission: its answer again, and no work.
        self.adapter.submit_lookup(&name_of(job), admission, &request.keys)?;
        let Lookup::Hit(hit) = self.adapter.check_lookup(&name_of(job)) else {
            bail!("an answer was forgotten")
        };
        let hit = hit.clone();
        match self.random.of(0..100) {
            // Aborted with its load under way: what it loads may be evicted under its hands.
            0..10 if !request.audit => {
                self.send_load(job, &hit)?;
                self.end_session(job);
                return Ok(());
            }
            // Somebody loads long after nobody has a right to it any more: what it means, or an error.
            10..18 if !request.audit => {
                self.end_session(job);
                request.state = State::Stale(Instant::now() + self.random.ms(0..1500));
                self.stale.insert(job, hit);
                self.requests.push(request);
                return Ok(());
            }
            _ => self.send_load(job, &hit)?,
        }
        request.begin(State::Loading);
        self.requests.push(request);
        Ok(())
    }

    fn send_load(&mut self, job: Job, hit: &Hit) -> anyhow::Result<()> {
        self.to_all(|rank| ToWorker::Load {
            job,
            arena_id: hit.arena_id,
            shards: hit.shards_of(rank).map(Shard::of).collect(),
        })
    }

    fn store(&mut self, mut request: Request) -> anyhow::Result<()> {
        let job = request.job;
        let keys = request.keys[request.hit..].to_vec();
        if keys.is_empty() || request.audit || self.ranks.contains(&None) {
            self.end_session(job);
            return Ok(());
        }
        request.begin_store(monotonic_ns(), self.lives.now());
        let round = (self.source, job.number);
        let parent = request.hit.checked_sub(1).map(|last| request.keys[last]);
        self.to_all(|_| ToWorker::Store { job, round, parent, keys: keys.clone() })?;
        match self.random.of(0..100) {
            // At once, or somewhat later.
            0..12 => self.to_all(|_| ToWorker::Preempt(job))?,
            12..18 => request.preempt = Some(Instant::now() + self.random.ms(0..4)),
            _ => {}
        }
        for other in &mut self.requests {
            request.contest(other);
        }
        self.requests.push(request);
        Ok(())
    }

    fn reply(&mut self, rank: u32, job: Job, outcome: Outcome) -> anyhow::Result<()> {
        // Of a request that was aborted, or of an earlier life of ours.
        let Some(at) = self.requests.iter().position(|request| request.job == job) else { return Ok(()) };
        if !self.requests[at].answered(rank, outcome) {
            return Ok(());
        }
        let request = self.requests.swap_remove(at);
        match request.state {
            State::Loading => {
                // All ranks have reported: nobody needs the pins any more. (An unknown admission is fine.)
                let (adapter, name) = (&mut self.adapter, name_of(job));
                let release = || (0..2).for_each(|admission| adapter.free_lookup_locks(&name, admission, 0));
                self.watch.call("free_lookup_locks", Duration::ZERO, release);
                self.store(request)
            }
            State::Storing => {
                if request.acknowledged() {
                    let Request { turn, hit, store_ns, skipped, .. } = request;
                    let (from, began_ns, ended_ns) = (hit as u32, store_ns, monotonic_ns());
                    self.tell(&FromScheduler::Acknowledged { turn, from, began_ns, ended_ns, job, skipped })?;
                }
                self.end_session(job);
                Ok(())
            }
            State::Abandoned(_) | State::Stale(_) => Ok(()),
        }
    }

    /// Requests whose time has come: to be preempted, to be given up, to be noticed as abandoned.
    fn preempt_and_give_up(&mut self) -> anyhow::Result<()> {
        let now = Instant::now();
        let due = |request: &mut Request| request.preempt.take_if(|at| *at <= now).is_some();
        let preempted: Vec<Job> =
            self.requests.iter_mut().filter_map(|request| due(request).then_some(request.job)).collect();
        for job in preempted {
            self.to_all(|_| ToWorker::Preempt(job))?;
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

    /// Asks until the answer is yes: what timed out may still be done, and must not be done after we said "done".
    fn clear(&mut self) -> anyhow::Result<()> {
        if self.clear_at.is_some_and(|at| at <= Instant::now()) {
            let adapter = &mut self.adapter;
            let cleared = self.watch.call("reset_cache", OPERATION, || adapter.reset_cache());
            self.clear_at = if cleared.is_ok() { None } else { Some(Instant::now() + RETRY) };
            if cleared.is_ok() {
                self.tell(&FromScheduler::Cleared)?;
            }
        }
        Ok(())
    }

    /// Looks everything up once more, loads it, and comes to rest.
    fn finish(&mut self) -> anyhow::Result<()> {
        let busy = self.requests.len();
        let (phase, made, instance) = (self.phase, self.made, self.instance);
        let Mode::Finishing(left) = &mut self.mode else { return Ok(()) };
        let Some(left) = left else {
            if busy == 0 {
                let mine = |turn: &Turn| turn.conversation % super::plan::INSTANCES == instance;
                // The other instance may have got further.
                *left = Some(Turn::all(phase, made * 2 + 64).filter(mine).collect());
            }
            return Ok(());
        };
        if busy >= AT_ONCE {
            return Ok(());
        }
        if let Some(turn) = left.pop_front() {
            return self.audit(turn);
        }
        if busy == 0 && Instant::now() >= self.next_at {
            self.next_at = Instant::now() + RETRY;
            let client = &self.client;
            if self.watch.call("noop", OPERATION, || client.noop()).is_ok() {
                self.mode = Mode::Idle;
                let tally = self.take_tally();
                self.tell(&FromScheduler::Beat(tally))?;
                self.tell(&FromScheduler::Quiet)?;
            }
        }
        Ok(())
    }

    fn audit(&mut self, turn: Turn) -> anyhow::Result<()> {
        let job = self.next_job();
        for admission in 0..RETRIES {
            let (found, answered) = self.look_up(job, admission, turn)?;
            if answered {
                let mut request = Request::new(job, turn, turn.keys(self.seed), found);
                request.audit = true;
                return self.begin(request, admission);
            }
            std::thread::sleep(RETRY);
        }
        self.end_session(job);
        Ok(())
    }

    fn end(&mut self) -> anyhow::Result<()> {
        let adapter = &mut self.adapter;
        self.watch.call("shutdown", DRAIN, || adapter.shutdown());
        let tally = self.take_tally();
        self.tell(&FromScheduler::Beat(tally))
    }
}

/// A request's name in the adapter.
fn name_of(job: Job) -> String {
    format!("life {} request {}", job.life, job.number)
}
