//! The guard: a process that outlives the coordinator, if that is killed, and then takes everything away.
//!
//! All children die with the coordinator by themselves, except an engine that stands still at that moment (the signal
//! that ends it in order waits until it goes on); and a killed engine's segments stay until somebody removes them.

use crate::children::kvring;
use kvring_rig::child::{Peer, Stderr};
use kvring_rig::pipe::{Abort, Pipe};
use kvring_rig::shm;
use kvring_shm_abi::segment::EngineName;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// How long the guard goes on removing what is still being made.
const SWEEP_MAX: Duration = Duration::from_secs(20);
/// Nothing has to come up for so long.
const QUIET: Duration = Duration::from_millis(400);

/// To the guard.
#[derive(Debug, Serialize, Deserialize)]
enum ToGuard {
    /// First of all: the engine's name.
    Name(String),
    /// The engine's process now.
    Engine(u32),
}

/// The coordinator's end.
pub(super) struct Guard {
    peer: Peer,
}

impl Guard {
    /// Starts it.
    pub(super) fn start(name: &EngineName) -> anyhow::Result<Guard> {
        let mut peer =
            Peer::start("the guard".to_owned(), kvring("chaos-guard")?, Stderr::Inherited, Abort::default())?;
        peer.send(&ToGuard::Name(name.to_string()))?;
        Ok(Guard { peer })
    }

    /// The engine's process is this one now.
    pub(super) fn engine_is(&mut self, pid: u32) -> anyhow::Result<()> {
        self.peer.send(&ToGuard::Engine(pid))
    }

    /// It is not needed any more: it sweeps, and ends.
    pub(super) fn finish(self) -> anyhow::Result<()> {
        self.peer.finish().map(drop)
    }
}

/// The guard's process.
pub(crate) fn be_guard() -> anyhow::Result<()> {
    let mut pipe = Pipe::to_parent()?;
    let (mut name, mut engine) = (None, None);
    // An error is an end like any other: whatever happened, it is swept.
    while let Ok(Some(message)) = pipe.receive(None) {
        match message {
            ToGuard::Name(text) => name = Some(EngineName::new(&text)?),
            ToGuard::Engine(pid) => engine = Some(pid),
        }
    }
    let Some(name) = name else { return Ok(()) };
    if let Some(pid) = engine {
        kill_if_it_is(pid, &name);
    }
    let (began, mut quiet_since) = (Instant::now(), Instant::now());
    while quiet_since.elapsed() < QUIET && began.elapsed() < SWEEP_MAX {
        if !shm::files(&name).is_empty() {
            quiet_since = Instant::now();
            shm::sweep(&name);
        }
        std::thread::sleep(QUIET / 10);
    }
    Ok(())
}

/// The process, if it still is that engine: by now the id may be somebody else's.
fn kill_if_it_is(pid: u32, name: &EngineName) {
    let said = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let is_it = said.split(|byte| *byte == 0).any(|word| word == name.as_str().as_bytes());
    if let Some(pid) = i32::try_from(pid).ok().filter(|_| is_it) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}
