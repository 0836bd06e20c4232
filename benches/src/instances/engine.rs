//! The engine: `kvring serve` in a process of its own. It is killed, stopped, continued and started again, and this module says
//! what has become of it each time.

mod ends;

use crate::child::{READY_LINE, kvring};
use crate::console::Console;
use crate::sweeper::Sweeper;
use anyhow::{Context, anyhow};
use kvring_adapter::EngineView;
use kvring_engine::policy::PolicyKind;
use kvring_engine::stats::{Snapshot, Stat};
use kvring_rig::child::Process;
use kvring_rig::shm;
use kvring_shm_abi::segment::EngineName;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use serde::Serialize;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Stdio;
use std::time::{Duration, Instant};

/// How long the engine may take to serve, and to end in order.
const START_MAX: Duration = Duration::from_secs(10);
/// How long its beat may stand still on a busy machine.
const BEAT_MAX: Duration = Duration::from_secs(5);

/// How an engine is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Setup {
    /// The arena.
    pub(crate) arena_bytes: u64,
    /// The eviction policy.
    pub(crate) policy: PolicyKind,
    /// The part of the arena that one client may hold, in percent; `None`: as by default.
    pub(crate) client_share: Option<u64>,
    /// Does the arena hold everything that is ever stored? Then nothing may be evicted.
    pub(crate) roomy: bool,
}

/// Something that has happened to the engine by itself.
#[derive(Debug)]
pub(crate) enum Event {
    /// It serves; is its arena the one that was there before?
    Serves {
        /// The same arena id.
        warm: bool,
    },
    /// It has ended though nobody had killed it; the explanation.
    Ended(String),
    /// After a cold start: all of the arena is there.
    Settled,
    /// It neither serves nor beats.
    Hangs(String),
}

/// Sums over all lives.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Sums {
    /// Chunks evicted.
    pub(crate) evictions: u64,
    /// The same in phases in which nothing should be.
    pub(crate) roomy_evictions: u64,
    /// Clients detached for a breach.
    pub(crate) breaches: u64,
    /// Failed self-checks.
    pub(crate) check_failures: u64,
}

/// The engine, and the times at which it is to be killed, continued or started.
pub(crate) struct Engine {
    pub(crate) name: EngineName,
    console: Console,
    /// Takes everything away if this process is killed.
    sweeper: Sweeper,
    pub(crate) setup: Setup,
    process: Option<Process>,
    /// Its standard output, on which it says that it serves, and the bytes that have come.
    stdout: Option<(File, Vec<u8>)>,
    started: Instant,
    /// Of the life that serves.
    view: Option<EngineView>,
    /// The statistics when it began to serve: a warm start may go on counting.
    base: Option<Snapshot>,
    arena_id: Option<[u64; 2]>,
    /// Began cold, and its arena is not wholly allocated yet: until then there is less room than there will be.
    settling: bool,
    /// Lives in a row that were killed before they served: after two of them a start is cold, by design.
    unborn: u32,
    restart_at: Option<Instant>,
    kill_at: Option<Instant>,
    stopped_until: Option<Instant>,
    /// The beat, and since when it has been that.
    beat: (u32, Instant),
    hang_limit: Duration,
    pub(crate) sums: Sums,
}

impl Engine {
    /// Not started yet.
    pub(crate) fn new(
        name: EngineName,
        setup: Setup,
        console: &Console,
        hang_limit: Duration,
    ) -> anyhow::Result<Engine> {
        let sweeper = Sweeper::start(&format!("{name}."))?;
        let now = Instant::now();
        Ok(Engine {
            name,
            console: console.clone(),
            sweeper,
            setup,
            process: None,
            stdout: None,
            started: now,
            view: None,
            base: None,
            arena_id: None,
            settling: false,
            unborn: 0,
            restart_at: None,
            kill_at: None,
            stopped_until: None,
            beat: (0, now),
            hang_limit,
            sums: Sums::default(),
        })
    }

    /// Starts a life of it.
    pub(crate) fn start(&mut self) -> anyhow::Result<()> {
        let mut command = kvring()?;
        command
            .arg("serve")
            .args(arguments(&self.name, &self.setup))
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let stderr = self.console.hand_to(&mut command);
        let mut process = Process::start("the engine".to_owned(), command, stderr)?;
        self.sweeper.engine_is(process.pid())?;
        let stdout = process.child().stdout.take().context("the engine's stdout")?;
        self.stdout = Some((File::from(OwnedFd::from(stdout)), Vec::new()));
        self.process = Some(process);
        (self.started, self.restart_at) = (Instant::now(), None);
        Ok(())
    }

    /// Does it serve with all of its arena?
    pub(crate) fn has_settled(&self) -> bool {
        self.serves() && !self.settling
    }

    /// Does it serve, and is it not standing still?
    pub(crate) fn serves(&self) -> bool {
        self.view.is_some() && self.stopped_until.is_none()
    }

    /// May it be killed? One that does not serve yet only once in a row.
    pub(crate) fn may_be_killed(&self) -> bool {
        self.process.is_some() && (self.view.is_some() || self.unborn == 0)
    }

    /// Shards for which a slot was given, in this life so far.
    pub(crate) fn reserved(&self) -> u64 {
        let stats = self.view.as_ref().map(|view| &view.segment.stats);
        stats.map_or(0, |stats| Stat::ShardsReserved.of(stats).get())
    }

    /// Slots that somebody was writing at its last beat.
    pub(crate) fn writing(&self) -> u64 {
        let stats = self.view.as_ref().and_then(|view| Snapshot::read(&view.segment.stats).ok());
        stats.map_or(0, |stats| stats.get(Stat::SlotsWriting))
    }

    /// `kill -9`; started again after `pause`. With none it is started as soon as it is dead, which is long before
    /// what is left of its process has gone.
    pub(crate) fn kill(&mut self, pause: Duration, again: Option<Duration>) -> anyhow::Result<()> {
        let now = Instant::now();
        let mut old = self.process.take();
        if let Some(process) = &mut old {
            process.signal(Signal::SIGKILL);
        }
        match &self.view {
            // The kernel says when: a start before that is refused, and rightfully.
            Some(view) => while view.owner_lives() && now.elapsed() < START_MAX {},
            // It had not come so far: nobody but the kernel knows when it is dead.
            None => drop(old.take()),
        }
        self.end_of_life();
        if pause.is_zero() {
            self.start()?;
        } else {
            self.restart_at = Some(now + pause);
        }
        self.kill_at = again.map(|after| now + pause + after);
        // Waits for it.
        drop(old);
        Ok(())
    }

    /// Adds the counters of the life that has ended.
    fn end_of_life(&mut self) {
        self.stopped_until = None;
        self.unborn = if self.view.is_some() { 0 } else { self.unborn + u32::from(self.stdout.is_some()) };
        self.stdout = None;
        let view = self.view.take();
        if let (Some(view), Some(base)) = (view, self.base.take())
            && let Ok(stats) = Snapshot::read(&view.segment.stats)
        {
            let since = stats.since(&base);
            let roomy = self.setup.roomy && !self.settling;
            let evictions = if roomy { since.get(Stat::Evictions) } else { 0 };
            self.sums.roomy_evictions += evictions;
            self.sums.evictions += since.get(Stat::Evictions);
            self.sums.breaches += since.get(Stat::Breaches);
            self.sums.check_failures += since.get(Stat::CheckFailures);
        }
    }

    /// It stands still for a while. False if it did already, or does not run.
    pub(crate) fn stop(&mut self, pause: Duration) -> bool {
        let stops = self.stopped_until.is_none();
        if let Some(process) = self.process.as_mut().filter(|_| stops) {
            process.signal(Signal::SIGSTOP);
            self.stopped_until = Some(Instant::now() + pause);
            return true;
        }
        false
    }

    /// Goes on at once, or is started at once; and is not killed any more.
    pub(crate) fn calm(&mut self) {
        let now = Instant::now();
        self.kill_at = None;
        self.stopped_until = self.stopped_until.map(|_| now);
        self.restart_at = self.restart_at.map(|_| now);
    }

    /// Does what is due, and reports what has happened. Returns the number of lives that began, and of kills.
    pub(crate) fn tick(&mut self, events: &mut Vec<Event>) -> anyhow::Result<(u64, u64)> {
        let now = Instant::now();
        let (mut starts, mut kills) = (0, 0);
        if self.stopped_until.take_if(|until| *until <= now).is_some() {
            self.beat.1 = now;
            self.started = now;
            if let Some(process) = &mut self.process {
                process.signal(Signal::SIGCONT);
            }
        }
        if self.restart_at.is_some_and(|at| at <= now) {
            self.start()?;
            starts += 1;
        }
        if self.process.is_some() && self.kill_at.take_if(|at| *at <= now).is_some() && self.may_be_killed() {
            self.kill(Duration::ZERO, None)?;
            (starts, kills) = (starts + 1, kills + 1);
        }
        self.look(now, events)?;
        Ok((starts, kills))
    }

    fn look(&mut self, now: Instant, events: &mut Vec<Event>) -> anyhow::Result<()> {
        let Some(process) = &mut self.process else { return Ok(()) };
        if process.ended().is_some() {
            let error = process.explain(anyhow!("nobody had killed it"));
            events.push(Event::Ended(format!("{error:#}")));
            self.process = None;
            self.end_of_life();
            self.restart_at = Some(now);
            return Ok(());
        }
        if self.stopped_until.is_some() {
            return Ok(());
        }
        if let Some(view) = &self.view {
            let beat = view.segment.epoch().beat();
            if self.settling {
                let stats = Snapshot::read(&view.segment.stats)?;
                if stats.get(Stat::ArenaBytesAllocated) >= view.identity.geometry.arena_bytes {
                    self.settling = false;
                    self.base = Some(stats);
                    events.push(Event::Settled);
                }
            }
            if beat != self.beat.0 {
                self.beat = (beat, now);
            } else if now - self.beat.1 > BEAT_MAX + self.hang_limit {
                events.push(Event::Hangs(format!("the engine's beat stands still at {beat}")));
                self.kill(Duration::ZERO, None)?;
            }
        } else if self.has_said_ready()? {
            let view =
                EngineView::open(&self.name).context("the engine serves, and its segment cannot be read")?;
            let warm = self.arena_id == Some(view.identity.arena_id);
            self.arena_id = Some(view.identity.arena_id);
            self.settling = !warm;
            self.base = Some(Snapshot::read(&view.segment.stats)?);
            self.beat = (view.segment.epoch().beat(), now);
            self.view = Some(view);
            self.unborn = 0;
            events.push(Event::Serves { warm });
        } else if now - self.started > START_MAX + self.hang_limit {
            events.push(Event::Hangs("the engine was started, and does not serve".to_owned()));
            self.kill(Duration::ZERO, None)?;
        }
        Ok(())
    }

    fn has_said_ready(&mut self) -> anyhow::Result<bool> {
        let Some((stdout, said)) = &mut self.stdout else { return Ok(false) };
        let ready = poll(&mut [PollFd::new(stdout.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO);
        if ready.unwrap_or(0) > 0 {
            let mut bytes = [0; 64];
            let read = stdout.read(&mut bytes).context("reading from the engine")?;
            said.extend_from_slice(&bytes[..read]);
        }
        Ok(said.ends_with(b"\n") && said.trim_ascii_end() == READY_LINE.as_bytes())
    }

    /// All statistics now.
    pub(crate) fn stats(&self) -> anyhow::Result<Snapshot> {
        let view = self.view.as_ref().context("the engine does not serve")?;
        Ok(Snapshot::read(&view.segment.stats)?)
    }

    /// How much of the arena is allocated, in bytes.
    pub(crate) fn allocated(&self) -> u64 {
        self.stats().map_or(0, |stats| stats.get(Stat::ArenaBytesAllocated))
    }

    /// Has the allocation stopped for want of room?
    pub(crate) fn has_stalled(&self) -> bool {
        self.stats().is_ok_and(|stats| stats.get(Stat::AllocationStalled) != 0)
    }

    /// Slots that the arena has for shards, all of which have one size: in spans, and in slabs not used yet.
    pub(crate) fn slots(&self, stats: &Snapshot) -> u64 {
        let slab_bytes = self.view.as_ref().map_or(1, |view| view.identity.geometry.slab_bytes);
        let free_slabs = stats.get(Stat::SlabsFree);
        let used_slabs = (stats.get(Stat::ArenaBytesAllocated) / slab_bytes).saturating_sub(free_slabs);
        let slots =
            stats.get(Stat::SlotsFree) + stats.get(Stat::SlotsWriting) + stats.get(Stat::SlotsCommitted);
        slots + free_slabs * slots / used_slabs.max(1)
    }

    /// Its beat now.
    pub(crate) fn beat(&self) -> u32 {
        self.view.as_ref().map_or(0, |view| view.segment.epoch().beat())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.process = None;
        shm::sweep(&self.name);
    }
}

/// The arguments of `kvring serve`.
fn arguments(name: &EngineName, setup: &Setup) -> Vec<String> {
    let mut arguments = vec![
        ("--name", name.to_string()),
        ("--arena", setup.arena_bytes.to_string()),
        ("--policy", setup.policy.name().to_owned()),
        ("--stop-with-parent", std::process::id().to_string()),
    ];
    arguments
        .extend(setup.client_share.map(|percent| ("--client-share", (percent as f64 / 100.0).to_string())));
    arguments.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect()
}
