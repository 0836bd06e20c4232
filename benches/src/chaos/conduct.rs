//! The coordinator: it strikes as planned, and keeps the books.

mod rest;
mod strike;

use super::oracle::{Oracle, Promise};
use super::plan::{Action, INSTANCES, Phase, RANKS};
use super::report::Counts;
use super::{Args, FINGERPRINT, Sabotage};
use crate::chaos::work::{CHUNK_TOKENS, SHAPE};
use crate::console::Console;
use crate::instances::{Conductor, Event, Fleet, FromScheduler, Manner, News, Run, Start, ToScheduler, Who};
use anyhow::bail;
use indicatif::ProgressBar;
use kvring_rig::pipe::Abort;
use kvring_rig::random::Random;
use kvring_shm_abi::futex::monotonic_ns;
use kvring_shm_abi::segment::EngineName;
use std::time::{Duration, Instant};

/// After its scheduler has died, the engine may still do a clear. It counts as ended when an engine has served undisturbed for so
/// long.
const CLEAR_MAX: Duration = Duration::from_secs(1);
/// Processes that end by themselves before the run is given up.
const CRASHES_MAX: u64 = 20;
/// Findings that are told in words.
const TOLD: usize = 12;

/// Everything, while it runs.
pub(super) struct Chaos<'a> {
    pub(super) seed: u64,
    pub(super) run: Run,
    pub(super) oracle: Oracle,
    pub(super) counts: Counts,
    /// The first findings, in words.
    pub(super) found: Vec<String>,
    pub(super) sabotage: Option<Sabotage>,
    bar: &'a ProgressBar,
    phase: Phase,
    /// The next cold start was asked for.
    expect_cold: bool,
    /// The instance that clears; and, once its scheduler has died, since when an engine has served undisturbed.
    clearing: Option<(u32, Option<Instant>)>,
    /// An action that waits for a store; the worker whose store it waits for, if not any worker's; how long after the store has
    /// its slots the action strikes; since when it waits.
    ambush: Option<(Action, Option<Who>, Duration, Instant)>,
}

impl<'a> Chaos<'a> {
    /// Nothing is started yet.
    pub(super) fn new(
        args: &Args,
        name: &EngineName,
        first: &Phase,
        console: &Console,
        abort: &Abort,
        bar: &'a ProgressBar,
    ) -> anyhow::Result<Chaos<'a>> {
        let (seed, hang_limit) = (args.seed, Duration::from_millis(args.hang_limit_ms));
        let (engine, careless) = (name.to_string(), args.sabotage == Some(Sabotage::Careless));
        let start = move |who: Who, life: u32| {
            let at = Who::all(INSTANCES, RANKS).iter().position(|other| *other == who).unwrap_or(0);
            let mut random = Random::new(seed, (at as u64) << 32 | u64::from(life));
            // Mostly as it is by default; else so short that a stopped engine counts as stalled.
            let stall_ms = if random.percent(50) { 2000 } else { 300 };
            Start {
                engine: engine.clone(),
                model: "chaos".to_owned(),
                fingerprint: FINGERPRINT,
                who,
                ranks: RANKS,
                life,
                chunk_tokens: CHUNK_TOKENS,
                shape: SHAPE,
                manner: Manner::Wild { seed, stall_ms, careless },
            }
        };
        let clients = (INSTANCES, RANKS);
        let setup = first.setup();
        Ok(Chaos {
            seed,
            run: Run::new(name.clone(), setup, clients, Box::new(start), console, abort, hang_limit)?,
            oracle: Oracle::new(seed),
            counts: Counts::default(),
            found: Vec::new(),
            sabotage: args.sabotage,
            bar,
            phase: first.clone(),
            expect_cold: true,
            clearing: None,
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
        self.run.work.fill_with(|| None);
        self.run.stir();
        let way = Random::new(self.seed, u64::from(phase.number)).bits();
        self.run.engine.begin_phase(phase.setup(), way)?;
        if phase.number > 0 {
            self.run.counts.restarts += 1;
        }
        self.await_all("the engine to serve, and all clients to be ready", Fleet::all_ready)?;
        self.run.work.fill_with(|| Some(ToScheduler::Work { phase: phase.number, requests: 0 }));
        self.run.stir();
        (0..INSTANCES).for_each(|instance| self.run.introduce(instance));
        Ok(())
    }

    /// A client takes no messages any more: a clear that it has asked for may still be done.
    fn gone(&mut self, who: Who) {
        if let Some((clears, since)) = &mut self.clearing
            && who == (Who::Scheduler { instance: *clears })
        {
            *since = Some(Instant::now());
        }
    }

    /// Something has happened to the engine: the time in which it has served undisturbed begins again.
    fn disturbed(&mut self) {
        if let Some((_, Some(since))) = &mut self.clearing {
            *since = Instant::now();
        }
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
            // Chunks that were acknowledged before that may have been evicted, because there was less room.
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

    /// Kills so far.
    fn kills(&self) -> u64 {
        self.run.counts.engine_kills + self.counts.worker_kills + self.counts.scheduler_kills
    }

    fn crashed(&mut self, said: String) {
        self.counts.crashes += 1;
        self.find(said);
    }

    fn scheduler_said(&mut self, instance: u32, message: FromScheduler) {
        match message {
            FromScheduler::Looked { turn, began_ns, found } if turn.phase == self.phase.number => {
                if let Some(ToScheduler::Work { requests, .. }) = &mut self.run.work[instance as usize] {
                    *requests += 1;
                }
                self.oracle.looked(turn, began_ns, found);
            }
            FromScheduler::Acknowledged { turn, from, began_ns, ended_ns, job, skipped }
                if turn.phase == self.phase.number =>
            {
                let promise = Promise { began_ns, ended_ns, instance, job, skipped };
                self.oracle.acknowledge(turn, from, promise);
            }
            FromScheduler::Cleared if self.clearing.is_some_and(|(clears, _)| clears == instance) => {
                self.cleared();
            }
            _ => {}
        }
    }
}

impl Conductor for Chaos<'_> {
    fn run(&mut self) -> &mut Run {
        &mut self.run
    }

    fn heard(&mut self, news: News) -> anyhow::Result<()> {
        match news {
            News::Scheduler(instance, message) => self.scheduler_said(instance, message),
            News::StoreBegins(worker) => self.store_begins(worker)?,
            News::Gone(who) => self.gone(who),
            News::Crashed(who, said) => {
                self.crashed(said);
                self.gone(who);
            }
            News::Hangs(who, why) => {
                self.counts.hangs += 1;
                self.find(format!("{who} hangs: {why}"));
                self.gone(who);
            }
            News::Engine(event) => self.engine_event(event),
        }
        if self.counts.crashes > CRASHES_MAX {
            bail!(
                "{CRASHES_MAX} processes have ended by themselves; the first said:\n{}",
                self.found.join("\n")
            );
        }
        Ok(())
    }

    fn end_turn(&mut self) {
        if !self.run.engine.serves() {
            self.disturbed();
        }
        if let Some((_, Some(since))) = self.clearing
            && since.elapsed() > CLEAR_MAX
        {
            self.cleared();
        }
        self.bar.set_position((self.bar.elapsed().as_millis() as u64).min(self.bar.length().unwrap_or(0)));
    }
}
