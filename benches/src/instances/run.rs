//! The coordinator's part: it lets the processes come and go, passes on what they say to each other, brings everything to rest,
//! and looks for what is left then.

use super::engine::{Engine, Event, Setup};
use super::fleet::{Fleet, Said};
use super::message::{FromScheduler, Start, ToScheduler, ToWorker, Who};
use super::{LOOK, WAIT_MAX};
use crate::child::operator;
use crate::console::Console;
use anyhow::{Context, bail};
use kvring_adapter::{Client, Key, PollingSchedulerAdapter, SchedulerOptions};
use kvring_engine::stats::{Snapshot, Stat};
use kvring_rig::pipe::Abort;
use kvring_rig::shm;
use kvring_shm_abi::segment::EngineName;
use serde::Serialize;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the engine may take to answer the coordinator itself.
const ANSWER_MAX: Duration = Duration::from_secs(20);
/// How long statistics may take to come to rest.
const SETTLE_MAX: Duration = Duration::from_secs(3);
/// Segments that an engine has.
const OWN_SEGMENTS: usize = 3;

/// The numbers that a run counts over all lives.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Counts {
    /// Kills of the engine.
    pub(crate) engine_kills: u64,
    /// Lives that began after an end.
    pub(crate) restarts: u64,
    /// Workers that stood still, and engines that died, while slots were being written.
    pub(crate) caught_writing: u64,
}

/// Something that the conductor of the run has to know.
pub(crate) enum News {
    /// A scheduler has said something that is for the coordinator.
    Scheduler(u32, FromScheduler),
    /// This worker has just been told to store something.
    StoreBegins(Who),
    /// A client takes no messages any more.
    Gone(Who),
    /// A client has ended though nobody had killed it; the explanation.
    Crashed(Who, String),
    /// A client hangs; the reason to think so.
    Hangs(Who, String),
    /// Something has become of the engine by itself.
    Engine(Event),
}

/// The engine and its clients, while they run.
pub(crate) struct Run {
    pub(crate) engine: Engine,
    pub(crate) fleet: Fleet,
    pub(crate) counts: Counts,
    pub(crate) abort: Abort,
    ranks: u32,
    instances: u32,
    /// The work that each scheduler is told when it is ready, once there is some.
    pub(crate) work: Vec<Option<ToScheduler>>,
    finishing: bool,
    /// The schedulers have finished: workers come to rest, also those that are started now.
    draining: bool,
}

impl Run {
    /// Nothing is started yet.
    pub(crate) fn new(
        name: EngineName,
        setup: Setup,
        (instances, ranks): (u32, u32),
        start: Box<dyn Fn(Who, u32) -> Start>,
        console: &Console,
        abort: &Abort,
        hang_limit: Duration,
    ) -> anyhow::Result<Run> {
        Ok(Run {
            engine: Engine::new(name, setup, console, hang_limit)?,
            fleet: Fleet::new(Who::all(instances, ranks), start, console, abort, hang_limit),
            counts: Counts::default(),
            abort: abort.clone(),
            ranks,
            instances,
            work: (0..instances).map(|_| None).collect(),
            finishing: false,
            draining: false,
        })
    }

    /// From here on there is work again.
    pub(crate) fn stir(&mut self) {
        (self.finishing, self.draining) = (false, false);
        self.fleet.stir();
    }

    /// Tells a scheduler its workers and its work.
    pub(crate) fn introduce(&mut self, instance: u32) {
        for rank in 0..self.ranks {
            let life = self.fleet.life(Who::Worker { instance, rank });
            self.fleet.tell_scheduler(instance, &ToScheduler::Rank(rank, life));
        }
        if let Some(work) = &self.work[instance as usize] {
            self.fleet.tell_scheduler(instance, work);
        }
        if self.finishing {
            self.fleet.tell_scheduler(instance, &ToScheduler::Finish);
        }
    }

    /// A client takes no messages any more: its scheduler hears of it.
    pub(crate) fn gone(&mut self, who: Who) {
        if let Who::Worker { instance, rank } = who {
            self.fleet.tell_scheduler(instance, &ToScheduler::Rank(rank, None));
        }
    }

    /// A worker is to come to rest.
    fn drain(&mut self, instance: u32, rank: u32) {
        if let Some(life) = self.fleet.life(Who::Worker { instance, rank }) {
            self.fleet.tell_worker(instance, rank, life, &ToWorker::Drain);
        }
    }

    /// Passes on a message of a client. Returns the news in it for the conductor.
    fn heard(&mut self, said: Said) -> Option<News> {
        match said {
            Said::Ready(Who::Scheduler { instance }) => {
                self.introduce(instance);
                None
            }
            Said::Ready(who @ Who::Worker { instance, rank }) => {
                let life = self.fleet.life(who);
                self.fleet.tell_scheduler(instance, &ToScheduler::Rank(rank, life));
                if self.draining {
                    self.drain(instance, rank);
                }
                None
            }
            Said::Scheduler(instance, FromScheduler::To(rank, life, message)) => {
                self.fleet.tell_worker(instance, rank, life, &message);
                let begins = matches!(message, ToWorker::Store { .. });
                begins.then_some(News::StoreBegins(Who::Worker { instance, rank }))
            }
            Said::Scheduler(instance, message) => Some(News::Scheduler(instance, message)),
            // To a scheduler of another life it means nothing: the name of the request says so.
            Said::Reply(instance, rank, reply) => {
                self.fleet.tell_scheduler(instance, &ToScheduler::From(rank, reply));
                None
            }
            Said::Ended(who, said) => {
                self.gone(who);
                Some(said.map_or(News::Gone(who), |said| News::Crashed(who, said)))
            }
            Said::Hangs(who, why) => {
                self.fleet.kill(who, Duration::ZERO);
                self.gone(who);
                Some(News::Hangs(who, why))
            }
        }
    }
}

/// The conductor of a run: a replay, or chaos.
pub(crate) trait Conductor {
    /// The run.
    fn run(&mut self) -> &mut Run;

    /// Hears the news.
    fn heard(&mut self, news: News) -> anyhow::Result<()>;

    /// Is called once in each turn, when all that has happened has been heard.
    fn end_turn(&mut self) {}

    /// One look at everything.
    fn turn(&mut self) -> anyhow::Result<()> {
        if self.run().abort.is_interrupted() {
            bail!("interrupted");
        }
        let mut said = Vec::new();
        self.run().fleet.listen(LOOK, &mut said)?;
        for said in said {
            if let Some(news) = self.run().heard(said) {
                self.heard(news)?;
            }
        }
        let (run, mut events) = (self.run(), Vec::new());
        let (starts, kills) = run.engine.tick(&mut events)?;
        let (clients, resumed) = run.fleet.tick()?;
        if resumed > 0 && run.engine.serves() {
            run.counts.caught_writing += u64::from(run.engine.writing() > 0);
        }
        run.counts.restarts += starts + clients;
        run.counts.engine_kills += kills;
        for event in events {
            self.heard(News::Engine(event))?;
        }
        self.end_turn();
        Ok(())
    }

    /// Turns until it is so, and an engine serves with all of its arena. Nothing that is waited for here takes long, unless
    /// somebody hangs, who is killed then and started again.
    fn await_all(&mut self, what: &str, done: impl Fn(&Fleet) -> bool) -> anyhow::Result<()>
    where
        Self: Sized,
    {
        let began = Instant::now();
        loop {
            self.turn()?;
            if self.run().engine.has_settled() && done(&self.run().fleet) {
                return Ok(());
            }
            if began.elapsed() > WAIT_MAX {
                bail!("waited {} s in vain for {what}", began.elapsed().as_secs());
            }
        }
    }

    /// No new requests: everything that is under way ends, and all sessions do.
    fn come_to_rest(&mut self) -> anyhow::Result<()>
    where
        Self: Sized,
    {
        let run = self.run();
        run.finishing = true;
        (0..run.instances).for_each(|instance| run.fleet.tell_scheduler(instance, &ToScheduler::Finish));
        let scheduler = |who| matches!(who, Who::Scheduler { .. });
        self.await_all("the schedulers to finish", |fleet| fleet.all_quiet(scheduler))?;
        let run = self.run();
        run.draining = true;
        for instance in 0..run.instances {
            (0..run.ranks).for_each(|rank| run.drain(instance, rank));
        }
        self.await_all("the workers to finish", |fleet| fleet.all_quiet(|_| true))
    }

    /// Everybody ends, politely. False: the engine did not end in time.
    fn end_all(&mut self) -> anyhow::Result<bool>
    where
        Self: Sized,
    {
        let run = self.run();
        Who::all(run.instances, run.ranks).into_iter().for_each(|who| run.fleet.end(who, false));
        self.await_all("everybody to end", Fleet::all_ended)?;
        self.run().engine.end()
    }

    /// The statistics once they are at rest, or as they are after [`SETTLE_MAX`]; in any case none from before this call.
    fn settled(&mut self, at_rest: impl Fn(&Snapshot) -> bool) -> anyhow::Result<Snapshot> {
        // Gauges are published with the beat.
        let (beat, began) = (self.run().engine.beat(), Instant::now());
        loop {
            self.turn()?;
            let engine = &self.run().engine;
            let fresh = engine.beat().wrapping_sub(beat) >= 3;
            let stats = engine.stats()?;
            if fresh && (at_rest(&stats) || began.elapsed() > SETTLE_MAX) {
                return Ok(stats);
            }
            if began.elapsed() > ANSWER_MAX {
                bail!("the engine does not beat: waited {} s for its statistics", ANSWER_MAX.as_secs());
            }
        }
    }

    /// After all sessions have ended: leases, slots that are written, channels; and after a clear every slot. The clients are still
    /// attached: a leak of theirs must not be cured by their leaving. `lease` may take one, as a negative control.
    fn check_leaks(
        &mut self,
        name: &str,
        lease: impl FnOnce(&Arc<Client>) -> anyhow::Result<Option<PollingSchedulerAdapter>>,
    ) -> anyhow::Result<Leaks> {
        let operator = operator(&self.run().engine.name, name, ANSWER_MAX)?;
        let lease = lease(&operator)?;
        let leases = |stats: &Snapshot| stats.get(Stat::Leases) + stats.get(Stat::Pins);
        let writing = |stats: &Snapshot| stats.get(Stat::SlotsWriting) + stats.get(Stat::SlotsOrphaned);
        let stats = self.settled(|stats| leases(stats) + writing(stats) == 0)?;
        let files = shm::files(&self.run().engine.name);
        operator.clear().context("clearing the cache at the end")?;
        let kept = |stats: &Snapshot| stats.get(Stat::SlotsCommitted) + stats.get(Stat::ChunksForming);
        let cleared = self.settled(|stats| kept(stats) == 0)?;
        drop(lease);
        operator.shutdown();
        let (leases, writing, kept) = (leases(&stats), writing(&stats), kept(&cleared));
        let segments = files.len().saturating_sub(OWN_SEGMENTS) as u64;
        Ok(Leaks { stats, leases, writing, kept, segments, files })
    }
}

/// Things that are left once everything has come to rest, and that should not be.
pub(crate) struct Leaks {
    /// The statistics before anything was cleared.
    pub(crate) stats: Snapshot,
    /// Leases, and chunks pinned by them.
    pub(crate) leases: u64,
    /// Slots that are being written, for somebody or for nobody.
    pub(crate) writing: u64,
    /// Slots and forming chunks that are left after a clear.
    pub(crate) kept: u64,
    /// Segments beyond the engine's own.
    pub(crate) segments: u64,
    /// All segments, by name.
    pub(crate) files: Vec<String>,
}

/// Negative control: a lease, on the first of these prompts of which the engine has something. It lasts as long as the adapter.
pub(crate) fn hold_lease(
    client: &Arc<Client>,
    fingerprint: [u64; 4],
    prompts: impl Iterator<Item = Vec<Key>>,
) -> anyhow::Result<PollingSchedulerAdapter> {
    let mut adapter = PollingSchedulerAdapter::new(client, SchedulerOptions::new(fingerprint));
    for (number, keys) in prompts.enumerate() {
        if adapter.lookup(&format!("sabotage {number}"), 0, &keys)?.chunks > 0 {
            return Ok(adapter);
        }
    }
    bail!("the sabotage needs a chunk that is there: {:?}", adapter.lookup_stats())
}
