//! The engine under chaos: it is killed, stopped, continued and started again, and says what it has seen each time.

mod ends;

use super::guard::Guard;
use super::plan::Phase;
use crate::children::kvring;
use crate::console::LogChoice;
use crate::serve::READY_LINE;
use anyhow::{Context, anyhow};
use kvring_adapter::EngineView;
use kvring_engine::stats::{Snapshot, Stat};
use kvring_rig::child::Process;
use kvring_rig::shm;
use kvring_shm_abi::segment::EngineName;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Stdio;
use std::time::{Duration, Instant};

/// How long the engine may take to serve, and to end in order.
const START_MAX: Duration = Duration::from_secs(10);
/// How long its beat may stand still on a busy machine.
const BEAT_MAX: Duration = Duration::from_secs(5);

/// What has happened to the engine by itself.
#[derive(Debug)]
pub(super) enum Event {
    /// It serves; is its arena the one that was there before?
    Serves {
        /// The same arena id.
        warm: bool,
    },
    /// It ended, and nobody had killed it: what it said.
    Ended(String),
    /// After a cold start: all of the arena is there.
    Settled,
    /// It neither serves nor beats.
    Hangs(String),
}

/// Sums over all lives.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sums {
    /// Chunks evicted.
    pub(super) evictions: u64,
    /// The same in phases in which nothing should be.
    pub(super) roomy_evictions: u64,
    /// Clients detached for a breach.
    pub(super) breaches: u64,
    /// Failed self-checks.
    pub(super) check_failures: u64,
}

/// The engine, and what comes next for it.
pub(super) struct Engine {
    pub(super) name: EngineName,
    log: LogChoice,
    /// Until the end.
    guard: Option<Guard>,
    phase: Phase,
    process: Option<Process>,
    /// Where it says that it serves, and what it has said.
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
    pub(super) sums: Sums,
}

impl Engine {
    /// Not started yet.
    pub(super) fn new(
        name: EngineName,
        phase: Phase,
        log: &LogChoice,
        hang_limit: Duration,
    ) -> anyhow::Result<Engine> {
        let guard = Some(Guard::start(&name)?);
        let now = Instant::now();
        Ok(Engine {
            name,
            log: log.clone(),
            guard,
            phase,
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
    pub(super) fn start(&mut self) -> anyhow::Result<()> {
        let mut command = kvring("serve")?;
        command.args(arguments(&self.name, &self.phase)).stdin(Stdio::null()).stdout(Stdio::piped());
        let stderr = self.log.hand_to(&mut command);
        let mut process = Process::start("the engine".to_owned(), command, stderr)?;
        if let Some(guard) = &mut self.guard {
            guard.engine_is(process.child().id())?;
        }
        let stdout = process.child().stdout.take().context("the engine's stdout")?;
        self.stdout = Some((File::from(OwnedFd::from(stdout)), Vec::new()));
        self.process = Some(process);
        (self.started, self.restart_at) = (Instant::now(), None);
        Ok(())
    }

    /// Does it serve with all of its arena?
    pub(super) fn has_settled(&self) -> bool {
        self.serves() && !self.settling
    }

    /// Does it serve, and is it not standing still?
    pub(super) fn serves(&self) -> bool {
        self.view.is_some() && self.stopped_until.is_none()
    }

    /// May it be killed? One that does not serve yet only once in a row.
    pub(super) fn may_be_killed(&self) -> bool {
        self.process.is_some() && (self.view.is_some() || self.unborn == 0)
    }

    /// Shards for which a slot was given, in this life so far.
    pub(super) fn reserved(&self) -> u64 {
        let stats = self.view.as_ref().map(|view| &view.segment.stats);
        stats.map_or(0, |stats| Stat::ShardsReserved.of(stats).get())
    }

    /// Slots that somebody was writing at its last beat.
    pub(super) fn writing(&self) -> u64 {
        let stats = self.view.as_ref().and_then(|view| Snapshot::read(&view.segment.stats).ok());
        stats.map_or(0, |stats| stats.get(Stat::SlotsWriting))
    }

    /// `kill -9`; started again after `pause`. With none it is started as soon as it is dead, which is long before
    /// what is left of its process has gone.
    pub(super) fn kill(&mut self, pause: Duration, again: Option<Duration>) -> anyhow::Result<()> {
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

    /// What the life that has ended had counted.
    fn end_of_life(&mut self) {
        self.stopped_until = None;
        self.unborn = if self.view.is_some() { 0 } else { self.unborn + u32::from(self.stdout.is_some()) };
        self.stdout = None;
        let view = self.view.take();
        if let (Some(view), Some(base)) = (view, self.base.take())
            && let Ok(stats) = Snapshot::read(&view.segment.stats)
        {
            let since = stats.since(&base);
            let roomy = self.phase.roomy && !self.settling;
            let evictions = if roomy { since.get(Stat::Evictions) } else { 0 };
            self.sums.roomy_evictions += evictions;
            self.sums.evictions += since.get(Stat::Evictions);
            self.sums.breaches += since.get(Stat::Breaches);
            self.sums.check_failures += since.get(Stat::CheckFailures);
        }
    }

    /// It stands still for a while. False if it did already, or does not run.
    pub(super) fn stop(&mut self, pause: Duration) -> bool {
        let stops = self.stopped_until.is_none();
        if let Some(process) = self.process.as_mut().filter(|_| stops) {
            process.signal(Signal::SIGSTOP);
            self.stopped_until = Some(Instant::now() + pause);
            return true;
        }
        false
    }

    /// Goes on at once, or is started at once; and is not killed any more.
    pub(super) fn calm(&mut self) {
        let now = Instant::now();
        self.kill_at = None;
        self.stopped_until = self.stopped_until.map(|_| now);
        self.restart_at = self.restart_at.map(|_| now);
    }

    /// What is due, and what has happened. The number of lives that began, and of kills.
    pub(super) fn tick(&mut self, events: &mut Vec<Event>) -> anyhow::Result<(u64, u64)> {
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
    pub(super) fn stats(&self) -> anyhow::Result<Snapshot> {
        let view = self.view.as_ref().context("the engine does not serve")?;
        Ok(Snapshot::read(&view.segment.stats)?)
    }

    /// Its beat now.
    pub(super) fn beat(&self) -> u32 {
        self.view.as_ref().map_or(0, |view| view.segment.epoch().beat())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.process = None;
        shm::sweep(&self.name);
    }
}

/// How a phase's engine is started.
fn arguments(name: &EngineName, phase: &Phase) -> Vec<String> {
    let share = phase.client_share as f64 / 100.0;
    let arguments = [
        ("--name", name.to_string()),
        ("--arena", phase.arena_bytes.to_string()),
        ("--policy", phase.policy.name().to_owned()),
        ("--client-share", share.to_string()),
        ("--stop-with-parent", std::process::id().to_string()),
    ];
    arguments.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect()
}
