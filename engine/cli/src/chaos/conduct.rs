//! The coordinator: strikes as planned, passes on what the processes say to each other, and keeps the books.

mod rest;
mod strike;

use super::engine::{Engine, Event};
use super::fleet::{Fleet, Said};
use super::message::{FromScheduler, FromWorker, ToScheduler, ToWorker};
use super::oracle::{Oracle, Promise};
use super::plan::{Action, INSTANCES, Phase, RANKS, Who};
use super::report::Counts;
use super::{Args, LOOK, Sabotage};
use crate::console::LogChoice;
use anyhow::bail;
use indicatif::ProgressBar;
use kvring_rig::pipe::Abort;
use kvring_rig::random::Random;
use kvring_shm_abi::futex::monotonic_ns;
use kvring_shm_abi::segment::EngineName;
use std::time::{Duration, Instant};

/// A clear whose scheduler has died may still be done: until an engine has served undisturbed for so long.
const CLEAR_MAX: Duration = Duration::from_secs(1);
/// Processes that end by themselves before the run is given up.
const CRASHES_MAX: u64 = 20;
/// Findings that are told in words.
const TOLD: usize = 12;

/// Everything, while it runs.
pub(super) struct Conductor<'a> {
    pub(super) seed: u64,
    pub(super) engine: Engine,
    pub(super) fleet: Fleet,
    pub(super) oracle: Oracle,
    pub(super) counts: Counts,
    /// What was found, in words: the first few.
    pub(super) found: Vec<String>,
    pub(super) abort: &'a Abort,
    pub(super) sabotage: Option<Sabotage>,
    bar: &'a ProgressBar,
    phase: Phase,
    /// The next cold start was asked for.
    expect_cold: bool,
    /// Requests of each instance in this phase.
    requests: [u32; INSTANCES as usize],
    /// Who clears, and since when an engine has served undisturbed.
    clearing: Option<(u32, Option<Instant>)>,
    /// The phase has begun: there are requests to be made.
    working: bool,
    finishing: bool,
    /// The schedulers have finished: workers come to rest, whoever is started now too.
    draining: bool,
    /// An action that waits for a store: whose, if not anybody's; how long after it has its slots; since when it waits.
    ambush: Option<(Action, Option<Who>, Duration, Instant)>,
}

impl<'a> Conductor<'a> {
    /// Nothing is started yet.
    pub(super) fn new(
        args: &Args,
        name: &EngineName,
        first: &Phase,
        log: &LogChoice,
        abort: &'a Abort,
        bar: &'a ProgressBar,
    ) -> anyhow::Result<Conductor<'a>> {
        let (seed, hang_limit) = (args.seed, Duration::from_millis(args.hang_limit_ms));
        let careless = args.sabotage == Some(Sabotage::Careless);
        Ok(Conductor {
            seed,
            engine: Engine::new(name.clone(), first.clone(), log, hang_limit)?,
            fleet: Fleet::new(name, seed, log, abort, hang_limit, careless),
            oracle: Oracle::new(seed),
            counts: Counts::default(),
            found: Vec::new(),
            abort,
            sabotage: args.sabotage,
            bar,
            phase: first.clone(),
            expect_cold: true,
            requests: [0; INSTANCES as usize],
            clearing: None,
            working: false,
            finishing: false,
            draining: false,
            ambush: None,
        })
    }

    /// Something that must not be, in words.
    pub(super) fn find(&mut self, text: String) {
        tracing::error!("{text}");
        if self.found.len() < TOLD {
            self.found.push(text);
        }
    }

    /// A phase begins: cold, with another arena, and with keys of its own.
    pub(super) fn begin_phase(&mut self, phase: &Phase) -> anyhow::Result<()> {
        self.phase = phase.clone();
        self.expect_cold = true;
        self.oracle.forget(monotonic_ns());
        self.oracle.roomy = phase.roomy;
        self.clearing = None;
        self.working = false;
        let way = Random::new(self.seed, u64::from(phase.number)).bits();
        self.engine.begin_phase(phase, way)?;
        if phase.number > 0 {
            self.counts.restarts += 1;
        }
        self.await_all("the engine to serve, and all clients to be ready", Fleet::all_ready)?;
        (self.working, self.finishing, self.draining) = (true, false, false);
        self.requests = [0; INSTANCES as usize];
        self.fleet.stir();
        (0..INSTANCES).for_each(|instance| self.introduce(instance));
        Ok(())
    }

    /// Tells a scheduler what it needs to know: its workers and its work.
    fn introduce(&mut self, instance: u32) {
        for rank in 0..RANKS {
            let life = self.fleet.life(Who::Worker { instance, rank });
            self.fleet.tell_scheduler(instance, &ToScheduler::Rank(rank, life));
        }
        if !self.working {
            return;
        }
        let requests = self.requests[instance as usize];
        self.fleet.tell_scheduler(instance, &ToScheduler::Work { phase: self.phase.number, requests });
        if self.finishing {
            self.fleet.tell_scheduler(instance, &ToScheduler::Finish);
        }
    }

    /// A client takes messages no more: what others know of it ends.
    fn gone(&mut self, who: Who) {
        match who {
            Who::Worker { instance, rank } => {
                self.fleet.tell_scheduler(instance, &ToScheduler::Rank(rank, None));
            }
            Who::Scheduler { instance } => {
                if let Some((clears, since)) = &mut self.clearing
                    && *clears == instance
                {
                    *since = Some(Instant::now());
                }
            }
        }
    }

    /// The engine is not what it was a moment ago.
    fn disturbed(&mut self) {
        if let Some((_, Some(since))) = &mut self.clearing {
            *since = Instant::now();
        }
    }

    /// One look at everything.
    pub(super) fn turn(&mut self) -> anyhow::Result<()> {
        if self.abort.is_interrupted() {
            bail!("interrupted");
        }
        if self.counts.crashes > CRASHES_MAX {
            bail!(
                "{CRASHES_MAX} processes have ended by themselves; the first said:\n{}",
                self.found.join("\n")
            );
        }
        let mut said = Vec::new();
        self.fleet.listen(LOOK, &mut said)?;
        for said in said {
            self.heard(said)?;
        }
        let mut events = Vec::new();
        let (starts, kills) = self.engine.tick(&mut events)?;
        let (clients, resumed) = self.fleet.tick()?;
        if resumed > 0 && self.engine.serves() {
            self.counts.caught_writing += u64::from(self.engine.writing() > 0);
        }
        self.counts.restarts += starts + clients;
        self.counts.engine_kills += kills;
        for event in events {
            self.engine_event(event);
        }
        if !self.engine.serves() {
            self.disturbed();
        }
        if let Some((_, Some(since))) = self.clearing
            && since.elapsed() > CLEAR_MAX
        {
            self.cleared();
        }
        self.bar.set_position((self.bar.elapsed().as_millis() as u64).min(self.bar.length().unwrap_or(0)));
        Ok(())
    }

    fn cleared(&mut self) {
        self.clearing = None;
        self.oracle.end_clear(monotonic_ns());
    }

    fn engine_event(&mut self, event: Event) {
        match event {
            Event::Serves { warm: true } => self.counts.warm_restarts += 1,
            Event::Serves { warm: false } => {
                self.counts.cold_restarts += 1;
                self.oracle.settled = false;
                if !self.expect_cold {
                    self.counts.unasked_cold_restarts += 1;
                    self.oracle.cold_start(monotonic_ns());
                }
            }
            // What was acknowledged before that may have been evicted since: there was less room.
            Event::Settled => {
                self.oracle.settled = true;
                self.oracle.forget(monotonic_ns());
                return;
            }
            Event::Ended(said) => self.crashed(said),
            Event::Hangs(why) => {
                self.counts.hangs += 1;
                self.find(why);
            }
        }
        self.expect_cold = false;
    }

    fn crashed(&mut self, said: String) {
        self.counts.crashes += 1;
        self.find(said);
    }

    fn heard(&mut self, said: Said) -> anyhow::Result<()> {
        match said {
            Said::Scheduler(instance, message) => self.scheduler_said(instance, message)?,
            Said::Worker(instance, rank, message) => self.worker_said(instance, rank, message),
            Said::Ended(who, None) => self.gone(who),
            Said::Ended(who, Some(said)) => {
                self.crashed(said);
                self.gone(who);
            }
            Said::Hangs(who, why) => {
                self.counts.hangs += 1;
                self.find(format!("{who} hangs: {why}"));
                self.fleet.kill(who, Duration::ZERO);
                self.gone(who);
            }
        }
        Ok(())
    }

    fn scheduler_said(&mut self, instance: u32, message: FromScheduler) -> anyhow::Result<()> {
        match message {
            FromScheduler::Ready => self.introduce(instance),
            FromScheduler::To(rank, life, message) => {
                self.fleet.tell_worker(instance, rank, life, &message);
                if matches!(message, ToWorker::Store { .. }) {
                    self.store_begins(Who::Worker { instance, rank })?;
                }
            }
            FromScheduler::Looked { turn, began_ns, found } => {
                if turn.phase == self.phase.number {
                    self.requests[instance as usize] += 1;
                    self.oracle.looked(turn, began_ns, found);
                }
            }
            FromScheduler::Acknowledged { turn, from, began_ns, ended_ns, job, skipped } => {
                if turn.phase == self.phase.number {
                    let promise = Promise { began_ns, ended_ns, instance, job, skipped };
                    self.oracle.acknowledge(turn, from, promise);
                }
            }
            FromScheduler::Cleared => {
                if self.clearing.is_some_and(|(clears, _)| clears == instance) {
                    self.cleared();
                }
            }
            FromScheduler::Quiet | FromScheduler::Beat(_) => {}
        }
        Ok(())
    }

    /// A worker is to come to rest.
    fn drain(&mut self, instance: u32, rank: u32) {
        if let Some(life) = self.fleet.life(Who::Worker { instance, rank }) {
            self.fleet.tell_worker(instance, rank, life, &ToWorker::Drain);
        }
    }

    fn worker_said(&mut self, instance: u32, rank: u32, message: FromWorker) {
        match message {
            FromWorker::Ready => {
                let life = self.fleet.life(Who::Worker { instance, rank });
                self.fleet.tell_scheduler(instance, &ToScheduler::Rank(rank, life));
                if self.draining {
                    self.drain(instance, rank);
                }
            }
            // To a scheduler of another life it means nothing: the name of the request says so.
            FromWorker::Reply(reply) => {
                self.fleet.tell_scheduler(instance, &ToScheduler::From(rank, reply));
            }
            FromWorker::Quiet | FromWorker::Beat(_) => {}
        }
    }
}
