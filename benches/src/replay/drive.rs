//! The coordinator's work: it hands the trace's requests, in order, to whichever instance is free.

use super::plan::Resolved;
use super::{Args, Sabotage, Speed};
use crate::console::Console;
use crate::instances::{Conductor, Done, Event, Fleet, FromScheduler, News, Run, Start, ToScheduler, Who};
use crate::stats::Samples;
use crate::trace::Trace;
use anyhow::{Context, bail};
use indicatif::ProgressBar;
use kvring_engine::byte_size::ByteSize;
use kvring_rig::content::key_of;
use kvring_rig::pipe::Abort;
use kvring_shm_abi::segment::EngineName;
use std::time::{Duration, Instant};

/// How long the allocation of the arena may stand still.
const ALLOCATION_MAX: Duration = Duration::from_secs(30);
/// How long after its deadline something counts as hanging.
const HANG_LIMIT: Duration = Duration::from_secs(30);

/// A replay, while it runs.
pub(super) struct Replay<'a> {
    pub(super) run: Run,
    trace: &'a Trace,
    speed: Speed,
    sabotage: Option<Sabotage>,
    /// The next request.
    next: usize,
    /// Is each instance free?
    free: Vec<bool>,
    bar: ProgressBar,
    pub(super) driven: Driven,
}

/// The results of all requests.
#[derive(Debug, Default)]
pub(super) struct Driven {
    /// From the first request to the last answer.
    pub(super) seconds: f64,
    /// Chunks that lookups found.
    pub(super) hit_chunks: u64,
    /// Tokens in those: a prompt's last chunk may hold fewer.
    pub(super) hit_tokens: u64,
    /// One per lookup, in nanoseconds.
    pub(super) lookup_ns: Samples,
    /// All of them together.
    pub(super) lookups_ns: u64,
}

impl<'a> Replay<'a> {
    /// Starts the engine and waits until all of its arena is allocated, so that its capacity is the same from the first request
    /// on; then starts all clients and waits until they are attached.
    pub(super) fn start(
        args: &Args,
        resolved: &Resolved,
        trace: &'a Trace,
        console: &Console,
        abort: &Abort,
    ) -> anyhow::Result<Replay<'a>> {
        let name = format!("replay-{}", std::process::id());
        let Resolved { instances, ranks, fingerprint, shape, manner, .. } = *resolved;
        let (engine, chunk_tokens) = (name.clone(), trace.block_tokens);
        let start = move |who, life| {
            let (engine, model) = (engine.clone(), "replay".to_owned());
            Start { engine, model, fingerprint, who, ranks, life, chunk_tokens, shape, manner }
        };
        let (name, setup, clients) = (EngineName::new(&name)?, resolved.setup.clone(), (instances, ranks));
        let mut replay = Replay {
            run: Run::new(name, setup, clients, Box::new(start), console, abort, HANG_LIMIT)?,
            trace,
            speed: args.speed,
            sabotage: args.sabotage,
            next: 0,
            free: vec![true; instances as usize],
            bar: ProgressBar::hidden(),
            driven: Driven::default(),
        };
        replay.run.engine.start()?;
        replay.wait_allocated(&(console.byte_bar)("allocating the arena", resolved.setup.arena_bytes))?;
        replay.await_all("all clients to be attached", Fleet::all_ready)?;
        replay.bar = (console.count_bar)("requests", trace.requests.len() as u64);
        Ok(replay)
    }

    fn wait_allocated(&mut self, bar: &ProgressBar) -> anyhow::Result<()> {
        let mut last = (0, Instant::now());
        while !self.run.engine.has_settled() {
            let mut events = Vec::new();
            self.run.engine.tick(&mut events)?;
            for event in events {
                self.heard(News::Engine(event))?;
            }
            if self.run.abort.is_interrupted() {
                bail!("interrupted");
            }
            let allocated = self.run.engine.allocated();
            bar.set_position(allocated);
            if allocated != last.0 {
                last = (allocated, Instant::now());
            }
            if self.run.engine.has_stalled() || last.1.elapsed() > ALLOCATION_MAX {
                bail!(
                    "{} of {} of the arena are allocated, and there is no room for more; use a smaller --arena",
                    ByteSize(allocated).human(),
                    ByteSize(self.run.engine.setup.arena_bytes).human()
                );
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// Drives the whole trace, then lets everything come to rest.
    pub(super) fn drive(&mut self) -> anyhow::Result<()> {
        let (began, total) = (Instant::now(), self.trace.requests.len());
        while self.next < total || self.free.contains(&false) {
            while let Some(instance) =
                self.free.iter().position(|free| *free).filter(|_| self.has_arrived(began))
            {
                let blocks = &self.trace.requests[self.next].blocks;
                let number = u32::try_from(self.next).context("a trace of more than 2^32 requests")?;
                let keys = blocks.iter().map(|id| key_of(*id)).collect();
                self.run.fleet.tell_scheduler(instance as u32, &ToScheduler::Request { number, keys });
                (self.free[instance], self.next) = (false, self.next + 1);
            }
            self.turn()?;
            if self.bar.position() * 2 >= total as u64 {
                self.commit_sabotage()?;
            }
        }
        self.driven.seconds = began.elapsed().as_secs_f64();
        self.bar.finish_and_clear();
        self.come_to_rest()
    }

    /// Has the next request arrived?
    fn has_arrived(&self, began: Instant) -> bool {
        let Some(request) = self.trace.requests.get(self.next) else { return false };
        let Speed::Times(factor) = self.speed else { return true };
        let first_ms = self.trace.requests.first().map_or(0, |request| request.timestamp_ms);
        let after_ms = request.timestamp_ms.saturating_sub(first_ms) as f64 / factor;
        began.elapsed().as_secs_f64() >= after_ms / 1e3
    }

    /// Negative controls that strike once, during the replay.
    fn commit_sabotage(&mut self) -> anyhow::Result<()> {
        match self.sabotage.take_if(|sabotage| *sabotage != Sabotage::Leak) {
            Some(Sabotage::Corrupt) => self.run.engine.corrupt()?,
            Some(Sabotage::KillEngine) => self.run.engine.kill_secretly(),
            Some(Sabotage::KillScheduler) => self.run.fleet.kill_secretly(Who::Scheduler { instance: 0 }),
            Some(Sabotage::Leak) | None => {}
        }
        Ok(())
    }

    fn done(&mut self, instance: u32, done: Done) {
        let request = &self.trace.requests[done.number as usize];
        let hit_tokens = u64::from(done.hit_chunks) * u64::from(self.trace.block_tokens);
        self.driven.hit_chunks += u64::from(done.hit_chunks);
        self.driven.hit_tokens += hit_tokens.min(request.input_tokens.into());
        self.driven.lookup_ns.push(done.lookup_ns);
        self.driven.lookups_ns += done.lookup_ns;
        self.free[instance as usize] = true;
        self.bar.inc(1);
    }
}

impl Conductor for Replay<'_> {
    fn run(&mut self) -> &mut Run {
        &mut self.run
    }

    /// Nobody has killed anybody, so every end is a failure.
    fn heard(&mut self, news: News) -> anyhow::Result<()> {
        match news {
            News::Scheduler(instance, FromScheduler::Done(done)) => self.done(instance, done),
            News::Scheduler(..)
            | News::StoreBegins(_)
            | News::Gone(_)
            | News::Engine(Event::Serves { .. } | Event::Settled) => {}
            News::Hangs(who, why) => bail!("{who} hangs: {why}"),
            News::Crashed(_, why) | News::Engine(Event::Ended(why) | Event::Hangs(why)) => bail!("{why}"),
        }
        Ok(())
    }
}
